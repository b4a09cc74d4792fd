"""Stage `passport`: proof that the model that a real inference server serves is the model that was trained.

Starts a private server on the entry that is about to be published and compares what it answers with the checkpoint. The
tolerance is the model's own float noise, not a guess: a few times the checkpoint's float32 error on the same inputs.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.artifact import RECORDS_DIR, Artifact, library_versions, write_json_atomically
from flows.compression.candidate import load_candidate
from flows.config import RunError
from flows.config.serving import CacheDtype, PassportConfig
from flows.data.mixture import open_split
from flows.data.tokenizer import load_tokenizer
from flows.export.int8_cache import keep_cache_in_int8
from flows.model.decoder import Decoder
from flows.serving.client import Client, Transport
from flows.serving.entry import REPOSITORY, STAGED_VERSION, read_files, version_digests
from flows.serving.installation import ServerError
from flows.serving.scores_check import Check, check_scores, make_reference
from flows.serving.server import InferenceServer
from flows.serving.text_check import Checkpoint, Served, check_text

PASSPORT = "passport.json"
SHOWN_FAILURES = 5


class PassportError(RunError):
    """The served model is not the trained one; nothing was published."""


def build(directory: Path, config: PassportConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Writes `passport.json`: verdict, every check with its numbers, and all digests from data to served files.

    Raises:
        PassportError: Served and trained differ; the message names the check and its numbers.
    """
    started = time.monotonic()
    fresh_seed = secrets.randbits(63)
    random = np.random.default_rng([config.seed, fresh_seed])
    names = [config.model_name, f"{config.model_name}_text"]
    staged = parents["entry"].path / REPOSITORY
    model = load_candidate(parents["model"].path).eval()
    tokenizer = load_tokenizer(parents["tokenizer"].path)
    index = json.loads((parents["tokens"].path / "index.json").read_text())
    real = _real_inputs(parents["tokens"].path, config)
    fresh = random.integers(0, index["vocab_size"], real.shape)
    lengths = sorted({*config.verify.lengths, config.sequence_length})
    reference = make_reference(model, np.concatenate([real, fresh]), lengths, config.verify.noise_factor)
    text_tolerance = reference.tolerance
    if config.export.cache_dtype == CacheDtype.int8:  # texts are those of the checkpoint with such a cache
        assert isinstance(model, Decoder)
        keep_cache_in_int8(model)
        text_tolerance = make_reference(model, reference.ids_NL, lengths, config.verify.noise_factor).tolerance
    checkpoint = Checkpoint(model, tokenizer, index["eos_token_id"], config.sequence_length)
    prompts = _prompts(real, checkpoint, config)

    with tempfile.TemporaryDirectory(dir=directory) as scratch:  # the server writes byte code beside the models
        repository = Path(scratch) / REPOSITORY
        shutil.copytree(staged, repository, copy_function=os.link)
        checks = [_check_digests(repository, names, parents)]
        try:
            with InferenceServer(repository, names, directory / RECORDS_DIR / "server.log") as server:
                addresses = {Transport.http: server.http_address, Transport.grpc: server.grpc_address}
                with Client(Transport.http, server.http_address) as client:
                    server_version = client.server_version()
                checks += check_scores(
                    addresses, names[0], STAGED_VERSION, reference, config.export.max_batch_size, random
                )
                served = Served(addresses, names[1], STAGED_VERSION)
                checks += check_text(served, checkpoint, prompts, config.verify.text_new_tokens, text_tolerance, random)
        except ServerError as error:
            raise PassportError(f"The model cannot be served, so nothing was published. {error}") from error

    failed = [check for check in checks if not check.passed]
    worst = max(check.worst_difference for check in checks if check.worst_difference is not None)
    summary = {
        "verdict": "failed" if failed else "passed",
        "checks": len(checks),
        "failed": len(failed),
        "worst_difference": worst,
        "tolerance": reference.tolerance,
        "float_noise": reference.noise,
        "server": f"NVIDIA Triton Inference Server {server_version}",
    }
    passport = {
        **summary,
        "noise_factor": config.verify.noise_factor,
        "model_name": config.model_name,
        "seeds": {"configured": config.seed, "fresh": fresh_seed},
        "inputs": {"real": len(real), "random": len(fresh), "lengths": lengths, "prompts": len(prompts)},
        "passed_by_check": Counter(check.name for check in checks if check.passed),
        "digests": {
            **{role: parents[role].digest for role in ("tokens", "tokenizer", "model", "program", "entry")},
            "served_files": {name: read_files(staged / name / STAGED_VERSION) for name in names},
        },
        "versions": library_versions(),
        "verified_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - started, 1),
        "rows": [{name: value for name, value in asdict(check).items() if value is not None} for check in checks],
    }
    write_json_atomically(directory / PASSPORT, passport)
    if failed:
        raise PassportError(_describe(failed, directory / PASSPORT))
    return summary


def _real_inputs(tokens: Path, config: PassportConfig) -> NDArray[np.int64]:
    """Inputs [N, L] spread over the test split."""
    dataset = open_split(tokens, "test", config.sequence_length)
    places = np.linspace(0, len(dataset) - 1, config.verify.real_inputs).round().astype(int)
    inputs: NDArray[np.int64] = np.stack([dataset[int(place)][: config.sequence_length] for place in places])
    return inputs


def _prompts(real: NDArray[np.int64], checkpoint: Checkpoint, config: PassportConfig) -> list[str]:
    """Beginnings of real inputs, from one token to what leaves room for the answer; the last one is too long."""
    longest = max(1, config.sequence_length - config.verify.text_new_tokens)
    counts = np.linspace(1, longest, config.verify.text_prompts).astype(int)
    rows = [real[number % len(real), :count].tolist() for number, count in enumerate(counts)]
    rows[-1] = real[:2].flatten().tolist() + rows[-1]
    return [checkpoint.decode(row) for row in rows]


def _check_digests(repository: Path, names: Sequence[str], parents: Mapping[str, Artifact]) -> Check:
    """The files that the server will load are those that `files.json` lists, program and tokenizer among them."""
    wrong = []
    for name in names:
        version = repository / name / STAGED_VERSION
        on_disk, listed = version_digests(version), read_files(version)
        wrong += [f"{name}/{STAGED_VERSION}/{file}" for file in listed if on_disk[file] != listed[file]]
    sources = {
        f"{names[0]}/{STAGED_VERSION}/model.onnx": parents["program"].path / "model.onnx",
        f"{names[1]}/{STAGED_VERSION}/tokenizer.json": parents["tokenizer"].path / "tokenizer.json",
    }
    wrong += [name for name, path in sources.items() if (repository / name).read_bytes() != path.read_bytes()]
    details = {"failure": f"{', '.join(sorted(set(wrong)))} is not what was exported"} if wrong else {}
    return Check("digests", not wrong, details=details)


def _describe(failed: Sequence[Check], passport: Path) -> str:
    lines = []
    for check in failed[:SHOWN_FAILURES]:
        details = ", ".join(f"{name} {value}" for name, value in check.details.items())
        numbers = f": differs by {check.worst_difference:.3g}" if check.worst_difference is not None else ""
        numbers += f", tolerance {check.tolerance:.3g}" if check.tolerance is not None else ""
        lines.append(f"  {check.name} ({details}){numbers}")
    more = [f"  and {len(failed) - SHOWN_FAILURES} more"] if len(failed) > SHOWN_FAILURES else []
    return "\n".join(
        [
            f"The served model is not the trained one: {len(failed)} checks failed. Nothing was published.",
            f"All numbers: {passport}",
            *lines,
            *more,
        ]
    )
