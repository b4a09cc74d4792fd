"""Plants the errors that serving goes wrong by into copies of a published version, and says which check catches each.

    python -m flows.serving.proof.planted_errors model_repo/quickstart/1 --artifacts artifacts

A proof is worth what it would have caught. Every plant is a version of its own on one private server, its `files.json`
made anew, as if the error had been made before anything was digested: only behaviour can tell.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from flows.artifact import digest_file, write_json_atomically
from flows.compression.candidate import load_candidate
from flows.config import ConfigError, RunError
from flows.export.runtime import PROGRAM
from flows.export.shipped import encryption
from flows.model.decoder import Decoder
from flows.serving import config_pbtxt
from flows.serving.endpoint import Endpoint
from flows.serving.entry import FILES
from flows.serving.installation import ServerError
from flows.serving.proof.config_check import EMBEDDED, check_config_files
from flows.serving.proof.passport import Expected, check_scores_model, check_text_model
from flows.serving.proof.reverify import Proven, copy_version, read_proven
from flows.serving.proof.scores_check import Check
from flows.serving.repository import PASSPORT
from flows.serving.server import InferenceServer

WRONG = 4
"""Factor by which planted constants are wrong."""


@dataclass(frozen=True)
class Planted:
    """An error, and what saw it."""

    error: str
    caught_by: list[str]
    """Names of the checks that failed."""
    told: str
    """What the first of them said."""


@dataclass(frozen=True)
class Plant:
    """How an error is made."""

    error: str
    apply: Callable[[Path, Decoder], None]
    """Changes a version directory."""
    in_text: bool = False
    """Whether the text model is the one that is changed."""


def _edit_program(version: Path, edit: Callable[[onnx.GraphProto], None]) -> None:
    place = _program(version)
    model = onnx.load_model_from_string(encryption.read(place))
    place.unlink()
    edit(model.graph)
    onnx.save(model, place.with_name(place.name.removesuffix(encryption.SUFFIX)))


def _program(version: Path) -> Path:
    """The scores' program; of a split one the last part."""
    places = version.glob(f"{Path(PROGRAM).stem}*{Path(PROGRAM).suffix}*")
    return max(places, key=lambda path: (len(path.name), path.name))


def _edit_source(name: str, before: str, after: str) -> Callable[[Path, Decoder], None]:
    def apply(version: Path, model: Decoder) -> None:
        source = (version / name).read_text()
        assert before in source, f"{name} has no {before!r}"
        (version / name).write_text(source.replace(before, after))

    return apply


def _flip_a_weight_byte(version: Path, model: Decoder) -> None:
    """The highest byte of the largest weight of the last layer: its sign, and most of its exponent or value."""

    def edit(graph: onnx.GraphProto) -> None:
        tensor = _stored(graph, _last_layer(model)["mlp.down_proj"])
        values = onnx.numpy_helper.to_array(tensor).copy()
        place = np.abs(values.astype(np.float64)).argmax()
        values.view(np.uint8).reshape(-1, values.itemsize)[place, -1] ^= 0x80 if values.itemsize == 1 else 0x03
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    _edit_program(version, edit)


def _change_epsilon(version: Path, model: Decoder) -> None:
    epsilon = np.float32(model.model.norm.eps)
    _edit_program(version, lambda graph: _replace_constants(graph, np.array([epsilon]), epsilon * 100))


def _change_rope_theta(version: Path, model: Decoder) -> None:
    stack = model.model
    pairs = torch.arange(0, stack.head_dim, 2) / stack.head_dim
    right, wrong = (1.0 / theta**pairs for theta in (stack.rope_theta, WRONG * stack.rope_theta))
    _edit_program(version, lambda graph: _replace_constants(graph, right.numpy(), wrong.numpy()))


def _drop_a_layer(version: Path, model: Decoder) -> None:
    """What the last layer adds to the residual stream is nothing."""
    last = _last_layer(model)

    def edit(graph: onnx.GraphProto) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensor = _stored(graph, last[name])
            nothing = np.zeros_like(onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(nothing, tensor.name))

    _edit_program(version, edit)


def _swap_two_tokens(version: Path, model: Decoder) -> None:
    """Another tokenizer: two letters have changed places."""
    path = version / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    path.write_text(json.dumps(tokenizer))


PLANTS = (
    Plant("one flipped weight byte", _flip_a_weight_byte),
    Plant("wrong epsilon", _change_epsilon),
    Plant("wrong rope theta", _change_rope_theta),
    Plant("a dropped layer", _drop_a_layer),
    Plant(
        "a swapped input",
        _edit_source(
            "model.py",
            '{"input_ids": ids_BL, "attention_mask": mask_BL}',
            '{"input_ids": mask_BL, "attention_mask": ids_BL.clip(0, 1)}',
        ),
    ),
    Plant(
        "wrong padding side",
        _edit_source(
            "model.py",
            "block = np.s_[first : first + len(ids), : ids.shape[1]]",
            "block = np.s_[first : first + len(ids), longest - ids.shape[1] :]\n        mask = mask[:, ::-1]",
        ),
    ),
    Plant(
        "padding that is not masked",
        _edit_source("model.py", '"attention_mask": mask_BL}', '"attention_mask": np.ones_like(mask_BL)}'),
    ),
    Plant("another tokenizer", _swap_two_tokens, in_text=True),
    Plant(
        "a key and value cache off by one",
        _edit_source("text_programs.py", '"past_lengths": past,', '"past_lengths": np.maximum(past - 1, 0),'),
        in_text=True,
    ),
    Plant(
        "pooling that counts padding",
        _edit_source("text_programs.py", "made[STATES][row, : counts[row]]", "made[STATES][row]"),
        in_text=True,
    ),
    Plant(
        "a given text scored one token late",
        _edit_source(
            "continuous_batching.py",
            "text.ids[first + 1 : text.prompt_tokens]",
            "text.ids[first : text.prompt_tokens - 1]",
        ),
        in_text=True,
    ),
)


def plant_errors(proven: Proven, expected: Expected) -> list[Planted]:
    """Plants every error and runs the checks on each; the first row is no error at all.

    Raises:
        RunError: The version is not of a decoder of ours, or fails a check as it is.
    """
    model = load_candidate(proven.parents["model"].path)
    if not isinstance(model, Decoder):
        raise RunError("errors are planted into decoders of ours; this version is of another architecture.")
    names, own = expected.models, proven.version
    with tempfile.TemporaryDirectory(prefix="millrace-planted-") as scratch:
        repository = copy_version(proven.repository, names, own, Path(scratch) / "repo")
        for number, plant in enumerate(PLANTS, own + 1):
            version = repository / names[plant.in_text] / str(number)
            shutil.copytree(repository / names[plant.in_text] / str(own), version)
            plant.apply(version, model)
            _seal(version)
        _serve_every_version(repository, names)
        with InferenceServer(repository, names, Path(scratch) / "server.log") as server:
            untouched = _checks(server.endpoint, str(own), expected, in_text=False)
            untouched += _checks(server.endpoint, str(own), expected, in_text=True)
            rows = [_row("none", untouched)]
            for number, plant in enumerate(PLANTS, own + 1):
                rows.append(_row(plant.error, _checks(server.endpoint, str(number), expected, plant.in_text)))
            rows.append(_replaced_file(repository, names[0], own, server))
        rows.append(_disagreeing_config(repository, expected))
    return rows


def _checks(endpoint: Endpoint, version: str, expected: Expected, in_text: bool) -> list[Check]:
    if in_text:
        return check_text_model(endpoint, version, expected)
    return check_scores_model(endpoint, version, expected)[0]


def _replaced_file(repository: Path, model: str, own: int, server: InferenceServer) -> Planted:
    """A version one of whose files was replaced after it was published, as the server meets it."""
    place = repository / model / str(own + len(PLANTS) + 1)
    shutil.copytree(repository / model / str(own), place)
    program = _program(place)
    content = program.read_bytes()
    program.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told = "it was loaded"
    try:
        server.load(model)
    except ServerError as error:
        told = str(error)
    return Planted("a version file replaced after publishing", ["loads"] if "has sha256" in told else [], told)


def _disagreeing_config(repository: Path, expected: Expected) -> Planted:
    for name in ("config.pbtxt", EMBEDDED):
        path = repository / expected.models[0] / name
        config = config_pbtxt.parse(path.read_text())
        config.output[0].dims[0] += 1
        path.write_text(config_pbtxt.to_text(config))
    return _row("a config.pbtxt that disagrees", check_config_files(repository, expected.configs))


def _row(error: str, checks: list[Check]) -> Planted:
    failed = [check for check in checks if not check.passed]
    told = ""
    if failed:
        numbers = {"differs by": failed[0].worst_difference, "tolerance": failed[0].tolerance}
        told = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items() if value is not None)
        told = str(failed[0].details.get("failure") or failed[0].details.get("reason") or told)
    return Planted(error, list(dict.fromkeys(check.name for check in failed)), told)


def _seal(version: Path) -> None:
    files = [path for path in sorted(version.iterdir()) if path.is_file() and path.name not in (FILES, PASSPORT)]
    write_json_atomically(version / FILES, {path.name: digest_file(path) for path in files})


def _serve_every_version(repository: Path, names: tuple[str, str]) -> None:
    for path in [path for name in names for path in (repository / name).rglob("*.pbtxt")]:
        config = config_pbtxt.parse(path.read_text())
        config.version_policy.all.SetInParent()
        path.unlink()  # it may be a hard link to what is published
        path.write_text(config_pbtxt.to_text(config))


def _last_layer(model: Decoder) -> dict[str, torch.nn.Module]:
    return dict(model.model.layers[-1].named_modules())


def _stored(graph: Any, module: torch.nn.Module) -> Any:
    """The program's constant that holds a layer's weights."""
    weight = dict(module.state_dict())["weight"].numpy()
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if any(values.dtype == one.dtype and np.array_equal(values, one) for one in (weight, weight.T)):
            return tensor
    raise RunError("the program does not hold the weights of the last layer as they are.")


def _replace_constants(graph: onnx.GraphProto, right: Any, wrong: Any) -> None:
    found = 0
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size == right.size and np.allclose(values.ravel(), right, rtol=1e-5):
            changed = np.broadcast_to(wrong, right.shape).astype(np.float32).reshape(values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
            found += 1
    if not found:
        raise RunError(f"the program does not hold the constant {right}.")


def lines(rows: list[Planted]) -> list[str]:
    """A table for a terminal."""
    return [f"{row.error:<42} {', '.join(row.caught_by) or 'nothing':<40} {row.told}" for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="flows.serving.proof.planted_errors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", type=Path, help="<model repository>/<model name>/<version>")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="artifacts_dir of the run")
    given = parser.parse_args(arguments)
    place: Path = given.version.absolute()
    try:
        proven = read_proven(place.parents[1], place.parent.name, int(place.name), given.artifacts / "store")
        rows = plant_errors(proven, proven.expect())
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines(rows)))
    return int(bool(rows[0].caught_by) or not all(row.caught_by for row in rows[1:]))


if __name__ == "__main__":
    sys.exit(main())
