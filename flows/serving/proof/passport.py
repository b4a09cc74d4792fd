"""What a served version has to equal, every check of a server that serves it, and what its passport says of them."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.artifact import Artifact, digest_file, library_versions
from flows.compression.candidate import load_candidate
from flows.config import RunError, to_plain
from flows.config.serving import CacheDtype, PassportConfig
from flows.data.mixture import open_split
from flows.data.tokenizer import load_tokenizer
from flows.export.coded_cache import keep_cache_in
from flows.export.runtime import PROGRAM
from flows.export.shipped import encryption
from flows.model.decoder import Decoder
from flows.serving import config_pbtxt
from flows.serving.client import TRANSPORTS, Transport
from flows.serving.endpoint import Endpoint
from flows.serving.entry import FILES, REPOSITORY, STAGED_VERSION, program_files, read_files, version_digests
from flows.serving.proof.config_check import check_served_configs, expected_configs, served_backend
from flows.serving.proof.edge_check import check_refusals, check_special_tokens, special_inputs
from flows.serving.proof.given_text_check import GivenTexts, check_given_texts, make_given_texts
from flows.serving.proof.recorded_samples import RECORDED, record_samples
from flows.serving.proof.scores_check import Check, Reference, check_scores, make_reference
from flows.serving.proof.text_check import Checkpoint, Served, check_text
from flows.serving.repository import PASSPORT, model_names

PROVEN_FROM = ("tokens", "tokenizer", "model", "program", "entry")
"""Roles of the artifacts that a proof needs; `passport.json` names their digests."""
SHOWN_FAILURES = 5


class PassportError(RunError):
    """The served model is not the trained one, or nothing is there to prove that it is."""


@dataclass(frozen=True)
class Expected:
    """The trained model, with all that is asked of the one that claims to be it."""

    config: PassportConfig
    reference: Reference
    text_tolerance: float
    """Two scores of generated text that are closer than this may change places."""
    given_texts: GivenTexts | None
    """None: the served program tells nothing of a text's own tokens."""
    special_rows: Sequence[int]
    """Inputs of the reference with special tokens."""
    checkpoint: Checkpoint
    prompts: Sequence[str]
    configs: Mapping[str, config_pbtxt.ModelConfig]
    vocab_size: int
    random: np.random.Generator
    inputs: Mapping[str, Any]
    """How many there are of which kind."""
    fresh_seed: int

    @property
    def models(self) -> tuple[str, str]:
        """Names of the scores model and the text model."""
        return model_names(self.config.model_name)


def expect(config: PassportConfig, parents: Mapping[str, Artifact]) -> Expected:
    """Inputs, half of them never seen before, and the checkpoint's answers to them in plain torch."""
    fresh_seed = secrets.randbits(63)
    random = np.random.default_rng([config.seed, fresh_seed])
    model = load_candidate(parents["model"].path).eval()
    tokenizer = load_tokenizer(parents["tokenizer"].path)
    index = json.loads((parents["tokens"].path / "index.json").read_text())
    eos_token_id, vocab_size = index["eos_token_id"], index["vocab_size"]
    real = _real_inputs(parents["tokens"].path, config)
    fresh = random.integers(0, vocab_size, real.shape)
    special = special_inputs(tokenizer, eos_token_id, vocab_size, config.sequence_length, fresh[0])
    everything = np.concatenate([real, fresh, special])
    lengths = sorted({*config.verify.lengths, config.sequence_length})
    reference = make_reference(model, everything, lengths, config.verify.noise_factor)
    text_tolerance = reference.tolerance
    if config.export.cache_dtype != CacheDtype.float32:  # texts are those of the checkpoint with such a cache
        assert isinstance(model, Decoder)
        keep_cache_in(config.export.cache_dtype, model)
        text_tolerance = make_reference(model, everything, lengths, config.verify.noise_factor).tolerance
    given_texts = None
    if isinstance(model, Decoder):
        # beginning with one of each kind, so that every length has one, and the longest, which all can have, several
        kinds = [real[0], fresh[0], *special, real[-1]]
        pooling, factor = config.export.pooling, config.verify.noise_factor
        several = [*lengths, *[config.sequence_length] * 2]
        given_texts = make_given_texts(model, np.stack(kinds), several, pooling, text_tolerance, factor)
    checkpoint = Checkpoint(model, tokenizer, eos_token_id, config.sequence_length)
    prompts = _prompts(real, checkpoint, config)
    return Expected(
        config=config,
        reference=reference,
        text_tolerance=text_tolerance,
        given_texts=given_texts,
        special_rows=range(len(everything) - len(special), len(everything)),
        checkpoint=checkpoint,
        prompts=prompts,
        configs=expected_configs(
            config, program_files(parents["program"].path / PROGRAM, config.export.pipeline_stages)
        ),
        vocab_size=vocab_size,
        random=random,
        inputs={
            "real": len(real),
            "random": len(fresh),
            "special": len(special),
            "lengths": lengths,
            "prompts": len(prompts),
        },
        fresh_seed=fresh_seed,
    )


def check_server(
    endpoint: Endpoint, version: str, expected: Expected, listings: Mapping[str, str]
) -> tuple[list[Check], dict[str, str]]:
    """Every check of a version that a server serves, and the checks that this server does not allow, with the reason.

    Args:
        endpoint: The server. Without its metrics and its key, what needs them is left out.
        version: The version to ask.
        expected: What it has to equal.
        listings: sha256 of each model's `files.json`.
    """
    checks = check_served_configs(endpoint, version, expected.configs)
    loaded, skipped = _check_loaded(endpoint, version, expected, listings)
    scores, left_out = check_scores_model(endpoint, version, expected)
    checks += [*loaded, *scores, *check_text_model(endpoint, version, expected)]
    if expected.given_texts is None:
        left_out["given text, embeddings"] = "the program of this architecture scores what follows a text alone"
    return checks, skipped | left_out


def check_scores_model(endpoint: Endpoint, version: str, expected: Expected) -> tuple[list[Check], dict[str, str]]:
    """The checks of the scores model, and what this server does not allow; arguments as for `check_server`."""
    model, config, reference, random = expected.models[0], expected.config, expected.reference, expected.random
    limit, transports, skipped = config.export.max_batch_size, list(TRANSPORTS), {}
    if endpoint.admin_key:
        transports.append(Transport.shared_memory)
    else:
        skipped["shared memory"] = "this server lets only who started it register memory"
    checks = check_scores(endpoint, transports, model, version, reference, limit, random)
    checks += check_special_tokens(endpoint, transports, model, version, reference, expected.special_rows, random)
    backend = served_backend(endpoint, model, version)
    if backend == "python":
        sizes = expected.vocab_size, config.sequence_length, limit
        checks += check_refusals(endpoint, TRANSPORTS, model, version, *sizes)
    else:
        skipped["refusals"] = f"the {backend} backend computes whatever it is given"
    return checks, skipped


def check_text_model(endpoint: Endpoint, version: str, expected: Expected) -> list[Check]:
    """The checks of the text model; arguments as for `check_server`."""
    served = Served(endpoint, expected.models[1], version)
    given = [] if expected.given_texts is None else check_given_texts(served, expected.given_texts)
    return given + check_text(
        served,
        expected.checkpoint,
        expected.prompts,
        expected.config.verify.text_new_tokens,
        expected.text_tolerance,
        expected.random,
    )


def check_digests(
    repository: Path, version: str, models: Sequence[str], parents: Mapping[str, Artifact], stated: Mapping[str, Any]
) -> Check:
    """The files of a version are those that it lists, program and tokenizer among them, and those that were proven.

    Args:
        repository: Model repository.
        version: Of both models.
        models: Names of the scores model and the text model.
        parents: `program`, `tokenizer` and `entry`.
        stated: sha256 by file name that each model has to have.
    """
    wrong = []
    for name in models:
        place = repository / name / version
        on_disk = version_digests(place)
        for listed in (read_files(place), stated[name]):
            wrong += [f"{name}/{version}/{file}" for file in listed if on_disk.get(file) != listed[file]]
    sources = {
        **{f"{models[0]}/{version}/{path.name}": path for path in parents["program"].path.glob("*.onnx")},
        f"{models[1]}/{version}/tokenizer.json": parents["tokenizer"].path / "tokenizer.json",
    }
    wrong += [name for name, path in sources.items() if _content(repository / name) != path.read_bytes()]
    details = {"failure": f"{', '.join(sorted(set(wrong)))} is not what was exported"} if wrong else {}
    return Check("digests", not wrong, details=details)


def state(
    expected: Expected,
    parents: Mapping[str, Artifact],
    checks: Sequence[Check],
    skipped: Mapping[str, str],
    server_version: str,
    started: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A passport, and its summary: verdict, every check with its numbers, and all digests from data to served files."""
    failed = [check for check in checks if not check.passed]
    summary = {
        "verdict": "failed" if failed else "passed",
        "checks": len(checks),
        "failed": len(failed),
        "worst_difference": max(
            (one.worst_difference for one in checks if one.worst_difference is not None), default=0
        ),
        "tolerance": expected.reference.tolerance,
        "float_noise": expected.reference.noise,
        "server": f"NVIDIA Triton Inference Server {server_version}",
    }
    return {
        **summary,
        "noise_factor": expected.config.verify.noise_factor,
        "model_name": expected.config.model_name,
        "config": to_plain(expected.config),
        "seeds": {"configured": expected.config.seed, "fresh": expected.fresh_seed},
        "inputs": dict(expected.inputs),
        RECORDED: record_samples(
            expected.reference, expected.checkpoint, expected.inputs["real"], expected.text_tolerance
        ),
        "passed_by_check": Counter(check.name for check in checks if check.passed),
        "skipped": dict(skipped),
        "digests": {
            **{role: parents[role].digest for role in PROVEN_FROM},
            "served_files": staged_files(parents["entry"], expected.models),
        },
        "versions": library_versions(),
        "verified_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - started, 1),
        "rows": [{name: value for name, value in asdict(check).items() if value is not None} for check in checks],
    }, summary


def read_passport(version_dir: Path) -> dict[str, Any]:
    """What a version's `passport.json` says.

    Raises:
        PassportError: It is not there, cannot be read, or does not say how it was made.
    """
    try:
        passport: dict[str, Any] = json.loads((version_dir / PASSPORT).read_text())
        if not {"config", "digests"} <= passport.keys():
            raise ValueError("it does not say how it was made")
    except (OSError, ValueError) as error:
        raise PassportError(f"{version_dir / PASSPORT} cannot be used: {error}. Publish the model again.") from error
    return passport


def staged_files(entry: Artifact, models: Sequence[str]) -> dict[str, dict[str, str]]:
    """sha256 by file name of each model, as the entry lists them, and of the lists."""
    places = {name: entry.path / REPOSITORY / name / STAGED_VERSION for name in models}
    return {name: {**read_files(place), FILES: digest_file(place / FILES)} for name, place in places.items()}


def describe(failed: Sequence[Check]) -> list[str]:
    """A line for each of the first failed checks, with its numbers."""
    lines = []
    for check in failed[:SHOWN_FAILURES]:
        details = ", ".join(f"{name} {value}" for name, value in check.details.items())
        numbers = f": differs by {check.worst_difference:.3g}" if check.worst_difference is not None else ""
        numbers += f", tolerance {check.tolerance:.3g}" if check.tolerance is not None else ""
        lines.append(f"  {check.name} ({details}){numbers}")
    return lines + ([f"  and {len(failed) - SHOWN_FAILURES} more"] if len(failed) > SHOWN_FAILURES else [])


def _content(path: Path) -> bytes | None:
    """Of a file, decrypted if need be; None if there is none, or none that the key opens."""
    try:
        place = encryption.find(path)
        return encryption.read(place) if place else None
    except RuntimeError:
        return None


def _check_loaded(
    endpoint: Endpoint, version: str, expected: Expected, listings: Mapping[str, str]
) -> tuple[list[Check], dict[str, str]]:
    """What the models themselves say they were loaded from."""
    if not endpoint.metrics:
        return [], {"loaded files": "nobody said where this server's metrics are"}
    loaded, checks, skipped = endpoint.loaded_files(), [], {}
    for model, wanted in listings.items():
        backend = served_backend(endpoint, model, version)
        if backend != "python":
            skipped[f"loaded files of {model}"] = f"the {backend} backend does not say what it loaded"
            continue
        found = loaded.get((model, version), "nothing")
        is_same = found == wanted
        failure = {} if is_same else {"failure": f"{FILES} was {found[:12]} when it was loaded, not {wanted[:12]}"}
        checks.append(Check("loaded files", is_same, details={"model": model, **failure}))
    return checks, skipped


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
