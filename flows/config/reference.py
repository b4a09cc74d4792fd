"""Every setting with its type, default and meaning, read from the schema itself; printed by `--help`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FieldReference:
    """One setting."""

    name: str
    """Dotted, as typed on the command line."""
    type: str
    default: str
    doc: str


@cache
def field_references() -> tuple[FieldReference, ...]:
    """All settings of `Config`, in the order of the schema."""
    from flows.config import Config  # the package imports this module's siblings first

    return tuple(_walk(Config(), ""))


def _walk(section: Any, prefix: str) -> Iterator[FieldReference]:
    types = typing.get_type_hints(type(section))
    docs = _docs_below_fields(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{name}.")
        else:
            hint = types[field.name]
            doc = _meaning(hint, docs.get(field.name, ""))
            yield FieldReference(name, _type_name(hint), _value_text(value), doc)


def _meaning(hint: Any, doc: str) -> str:
    """A field's own doc, or else that of its enumeration; and what each of the choices means, where they say so."""
    if not isinstance(hint, type) or not issubclass(hint, Enum):
        return doc
    choices = "; ".join(f"`{name}`: {meaning.rstrip('.')}" for name, meaning in _docs_below_fields(hint).items())
    return " ".join([doc or str(hint.__doc__).split("\n")[0], *([f"{choices}."] if choices else [])])


def _docs_below_fields(section_type: type) -> dict[str, str]:
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(section_type))).body[0]).body
    docs = {}
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(following, ast.Expr):
            named = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            docs[ast.unparse(named)] = " ".join(str(ast.literal_eval(following.value)).split())
    return docs


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(member.value for member in hint)
    return re.sub(r"(\w+\.)+", "", str(hint)) if typing.get_args(hint) else str(hint.__name__)


def _value_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def render_help(doc: str, conf_dir: Path) -> str:
    """The text of `--help`: what the verb does, the groups to choose from, every setting.

    Args:
        doc: The verb's module docstring.
        conf_dir: Directory of the configuration groups.
    """
    lines = [doc.strip(), "", "Groups: choose one file each, e.g. `data=files`; an experiment comes on top with `+`"]
    for group in sorted(path for path in conf_dir.rglob("*") if path.is_dir() and path.name != "deployment"):
        name = ("+" if group.name == "experiment" else "") + group.relative_to(conf_dir).as_posix()
        lines.append(f"  {name:<16} {', '.join(sorted(path.stem for path in group.glob('*.yaml')))}")
    lines += [
        "",
        "Settings: type, default of the schema and meaning; `--cfg job` prints the values that a command would use",
    ]
    section, explained = "", dict[tuple[str, str], str]()
    for reference in field_references():
        head = reference.name.rpartition(".")[0]
        if head != section:
            section = head
            lines.append("")
        first = explained.setdefault((reference.name.rpartition(".")[2], reference.doc), reference.name)
        line = f"  {reference.name} ({reference.type}) = {reference.default}"
        if first != reference.name:
            lines.append(f"{line}  as {first}")
            continue
        lines.append(line)
        lines += textwrap.wrap(reference.doc, 106, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "Also: --cfg job (print the configuration), --multirun (one run per combination, e.g. seed=0,1,2)"]
    return "\n".join(lines)
