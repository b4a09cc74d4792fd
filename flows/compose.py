"""Hydra configuration -> one typed, validated, frozen `Config`. The only file that knows Hydra and OmegaConf."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper  # --cfg job writes paths through it
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from flows.config import Config, ConfigError, RunError, from_plain
from flows.config.json_form import unknown_settings
from flows.config.reference import field_references, render_help
from flows.launcher import EXIT_PREEMPTED, Preempted

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"


def run_cli(verb: Callable[[Config], None], doc: str) -> None:
    """Runs a verb from the command line: Hydra overrides in, exit code out.

    Args:
        verb: What to do with the configuration; called once per job of a `--multirun`.
        doc: What `--help` says before the settings.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(render_help(doc, CONF_DIR))
        return
    sys.argv[1:] = sorted(sys.argv[1:], key=_is_override)  # argparse wants them together; words may come in any order
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand us the exception instead of printing half of it
    _register_schema()

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
    def job(composed: DictConfig) -> None:
        with _spoken_errors():  # here too: Hydra prints its own lines about an exception that leaves the job
            verb(_to_config(composed))

    with _spoken_errors():
        job()


def _is_override(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


@contextmanager
def _spoken_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the same command carries on from here.")
    except Preempted as stop:
        print(f"{stop}; the same command carries on from there.", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except (HydraException, OmegaConfBaseException, ConfigError, RunError) as error:
        print(f"error: {explain_error(error)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, RunError) else ConfigError.exit_code)


def compose_config(overrides: Sequence[str]) -> Config:
    """The configuration that the command line would make of these overrides; for deployments and tests.

    Raises:
        ConfigError: A key, a type, a value or a combination is wrong; the message names field, value, rule, remedy.
    """
    _register_schema()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            return _to_config(hydra.compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(error)) from error


def explain_error(error: BaseException) -> str:
    """A sentence for the user: what was typed, what is wrong with it, what to type instead."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return f"{cause.full_key} is not a setting. {_nearest_settings(str(cause.full_key))}"
    if cause is not None:
        return _mistyped(str(cause.full_key or "configuration"), str(cause.msg if cause.msg else cause).split("\n")[0])
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} does not exist. Choose one of: {', '.join(error.options)}."
    return str(error).strip()


def _mistyped(name: str, rule: str) -> str:
    if "not a ListConfig" in rule:
        return f"{name} takes a list. Put its values in brackets, with commas between them: '{name}=[one,two]'."
    group = name.replace(".", "/")
    if "not a subclass of" in rule and (CONF_DIR / group).is_dir():
        return f"{name} is a section of settings, not one value. Choose a ready one: {group}={_choices(group)}."
    return f"{name}: {rule.rstrip('.')}. See --help for its type and meaning."


def _unreadable(override: str) -> str:
    name, sign, value = override.partition("=")
    if not sign:
        return f"{override} is not a setting with a value. Write name=value, e.g. train.max_steps=100; see --help."
    return (
        f"{name}={value} cannot be read. Close every bracket and quote; a value with spaces, commas, equals signs or "
        f"letters beyond a to z needs quotes of its own inside those of the shell: '{name}=\"my text\"'."
    )


def _choices(group: str) -> str:
    return "|".join(sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")))


def _nearest_settings(name: str) -> str:
    known = [reference.name for reference in field_references()]
    section, _, leaf = name.rpartition(".")
    prefix = f"{section}." if section else ""
    if same := [other for other in known if other.startswith(prefix) and other.endswith(f".{leaf}")]:
        return f"Did you mean {' or '.join(same[:3])}?"
    if groups := [path.relative_to(CONF_DIR).as_posix() for path in CONF_DIR.rglob(leaf) if path.is_dir()]:
        return f"Did you mean {groups[0]}={_choices(groups[0])}?"
    below = (other.removeprefix(prefix) for other in known if other.startswith(prefix))
    siblings = list(dict.fromkeys(other.partition(".")[0] for other in below))
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"Did you mean {prefix}{close[0]}?"
    if section and siblings:
        return f"Settings there: {', '.join(siblings)}."
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else "See --help for all settings."


def _to_config(composed: DictConfig) -> Config:
    plain = OmegaConf.to_container(composed, resolve=True)
    config = from_plain(Config, plain)
    for name in unknown_settings(plain, config):  # +name=value adds what nothing reads
        raise ConfigError(f"{name} is not a setting. {_nearest_settings(name)}")
    return config


@cache
def _register_schema() -> None:
    get_omega_conf_dumper().add_multi_representer(Path, lambda dumper, path: dumper.represent_str(str(path)))
    schema = OmegaConf.structured(Config)
    _thaw(schema)
    ConfigStore.instance().store("schema", schema)


def _thaw(node: Any) -> None:
    """Lets overrides through: OmegaConf makes nodes of frozen dataclasses read-only."""
    OmegaConf.set_readonly(node, None)
    for key in node if isinstance(node, DictConfig) else ():
        child = node._get_node(key)
        if OmegaConf.is_config(child):
            _thaw(child)
    if OmegaConf.get_type(node) is dict:
        OmegaConf.set_struct(node, False)  # raw keys of others, e.g. engine.deepspeed
        node._metadata.element_type = Any  # OmegaConf would make read-only entries; `_to_config` checks their types
