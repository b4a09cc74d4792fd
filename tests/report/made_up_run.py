"""A made-up run as the report finds it: artifacts of all stages, with the metrics that their stages return."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flows.artifact import Artifact
from flows.compression.prune_weights import LayerSparsity
from flows.compression.quantizer import LayerReport
from flows.config import Config
from flows.config.quantize import Scheme
from flows.config.steps import StepConfig, StepKind
from flows.data.cleaning import Dropped
from flows.evaluation import gates
from flows.evaluation.latency import Timing
from flows.evaluation.quality import Quality
from flows.serving.proof.scores_check import Check
from flows.training.hardware import Hardware
from flows.training.plan import Plan, make_plan

STEPS = {
    "student": StepConfig(distill="base"),
    "base_int8": StepConfig(quantize="base"),
    "student_int8": StepConfig(quantize="student"),
}
PRUNE_STEPS = {
    "pruned": StepConfig(prune="base"),
    "healed": StepConfig(distill="base", start="pruned"),
    "sparse": StepConfig(prune="base", settings={"intermediate_size": None, "sparsity": 0.5}),
}
BITS_PER_BYTE = {"base": 2.483, "student": 2.691, "base_int8": 2.486, "student_int8": 2.697}
BITS_PER_BYTE |= {"pruned": 2.683, "healed": 2.533, "sparse": 2.583}
UNIGRAM_BITS_PER_BYTE = 3.081
PROGRAM_BYTES = {"base": 17_104_233, "student": 6_033_911, "base_int8": 4_410_118, "student_int8": 1_602_240}
PROGRAM_BYTES |= {"pruned": 9_104_233, "healed": 9_104_233, "sparse": 17_104_233}
P50_MS = {"base": 9.41, "student": 4.12, "base_int8": 9.87, "student_int8": 3.18}
P50_MS |= {"pruned": 6.1, "healed": 6.0, "sparse": 9.4}
"""base_int8 is slower than base, so that the gates reject it."""
BYTES_PER_TOKEN = 3.41
TOLERANCE = 2.4e-5
DROPPED_NAME = "corpus/<img src=x onerror=alert(1)>.txt"
SKIPPED = "model.layers.3.mlp.down_proj"


def make_run(
    directory: Path, config: Config, bits_per_byte: Mapping[str, float] = BITS_PER_BYTE
) -> dict[str, Artifact]:
    """The artifacts by role, in `directory`; the gates are judged by their own stage.

    Args:
        directory: Where manifests, and passport.json, go.
        config: The run.
        bits_per_byte: Of each candidate.
    """
    made: dict[str, Artifact] = {}

    def add(role: str, seconds: float, parents: list[str], metrics: Mapping[str, Any]) -> Path:
        kind, _, name = role.partition(":")
        stage = f"{name}_{kind}" if name else kind
        digest = hashlib.sha256(role.encode()).hexdigest()
        path = directory / stage
        path.mkdir(parents=True)
        made[role] = Artifact(stage, f"{stage}-{digest[-20:]}", digest, path, metrics, seconds)
        manifest = {
            "parents": {parent: {"key": made[parent].key, "digest": made[parent].digest} for parent in parents},
            "versions": {"python": "3.11.9", "torch": "2.12.1" if role == "base" else "2.13.0", "deepspeed": "0.19.8"},
        }
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    splits = {name: _split(documents) for name, documents in (("train", 1512), ("validation", 47), ("test", 52))}
    dropped = {reason.value: {"documents": 0, "first": []} for reason in Dropped}
    dropped["duplicate"] = {"documents": 31, "first": ["idlelib/__init__.py", "lib2to3/pgen2/__init__.py"]}
    dropped["bad UTF-8"] = {"documents": 1, "first": [DROPPED_NAME]}
    read = {"documents": 1643, "bytes": 31_702_118}
    add("corpus", 3.1, [], {"read": read, "splits": splits, "dropped": dropped})
    add("tokenizer", 5.7, ["corpus"], {"vocab_size": 4096, "requested_vocab_size": 4096, "longest_token_bytes": 24})
    encoded = {"splits": splits, "bytes_per_token": BYTES_PER_TOKEN, "megabytes_per_second": 14.2}
    add("tokens", 2.4, ["corpus", "tokenizer"], encoded)
    baselines = {"unigram_bits_per_byte": UNIGRAM_BITS_PER_BYTE, "xz_bits_per_byte": 2.212, "xz_bytes_read": 1_034_112}
    add("baselines", 0.9, ["tokens", "tokenizer", "corpus"], baselines)

    for name in config.candidates:
        data, source = ["tokens", "tokenizer"], config.steps[name].source if name in config.steps else None
        if source and config.steps[name].kind == StepKind.prune:
            add(name, 3.2, [source, "tokens"], _pruning_metrics(config, name))
        elif name in config.trained_candidates:
            add(name, 88.0 if name == "base" else 61.3, data + [source] * bool(source), training_metrics(config, name))
        else:
            add(name, 0.6, [str(source)], _quantization_metrics(name))
    for name in config.candidates:
        program = {"program_bytes": PROGRAM_BYTES[name], "parameters": PROGRAM_BYTES[name] // 4, "opset": 20}
        add(f"program:{name}", 6.5, [name], program)
        loss = bits_per_byte[name] * BYTES_PER_TOKEN * math.log(2)
        quality = Quality(
            loss=loss,
            perplexity=math.exp(loss),
            accuracy=0.62 - loss / 25,
            macro_f1=None,
            bits_per_byte=bits_per_byte[name],
            word_accuracy=0.3 - loss / 50,
            agreement=1.0 if name == "base" else 0.97,
            divergence=0.0 if name == "base" else 0.0213,
            tokens=131_072,
            bytes=446_955,
            words=61_000,
        )
        others = {"tasks": {"my_choice acc": 0.5 - loss / 50}, "faults": []}
        add(f"quality:{name}", 8.2, [name, "base", "tokens", "tokenizer"], {**asdict(quality), **others})
    add("latency", 11.4, [f"program:{name}" for name in config.candidates], _latency_metrics(config))

    measured = [role for role in made if ":" in role] + ["latency", "baselines"]
    judged = gates.build(directory, config.gating(), {role: made[role] for role in measured})
    add("gates", 0.02, measured, json.loads(json.dumps(judged)))
    if judged["chosen"] is None:
        return made
    program = f"program:{judged['chosen']}"
    add("entry", 0.3, [program], {"vocab_size": 4096, "bytes": 12_811_923})
    passport = _passport(config, made)
    path = add("passport", 19.4, ["entry", judged["chosen"], program, "tokens", "tokenizer"], passport)
    (path / "passport.json").write_text(json.dumps(passport))
    record = {"model_repo": "model_repo", "model_name": config.publish.model_name, "version": 3, "is_new": True}
    add("publish", 0.1, ["entry", "passport", "gates"], record)
    return made


def training_metrics(config: Config, name: str) -> dict[str, Any]:
    """What a training stage returns: a summary and the events of its curve."""
    run = config.training_runs()[name]
    noise = np.random.default_rng(len(name))
    curve: list[dict[str, float]] = []
    for step in range(10, run.train.max_steps + 1, 10):
        loss = 5.9 + 2.4 * math.exp(-step / 60) - 0.00002 * step * step**0.5 * len(name)
        curve.append(
            {
                "step": step,
                "train_loss": loss + float(noise.normal(0, 0.05)),
                "learning_rate": 3e-3 * min(1, step / 20, 0.1 + 0.9 * math.cos(step / run.train.max_steps * 1.5)),
                "tokens_per_s": 24_000 + float(noise.normal(0, 400)),
                "step_ms_p50": 170.0,
                "step_ms_max": 201.0,
                "loader_share": 0.004,
                "peak_memory_bytes": 1_020_000_000 + 10_000 * step,
                "mfu": 0.41,
                "grad_norm": 0.8,
            }
        )
        if step % 50 == 0:
            curve.append({"step": step, "validation_loss": loss + 0.08})
    return {
        "steps": run.train.max_steps,
        "resumed_from_step": 0 if name == "base" else 100,
        "stopped_early": False,
        "best_validation_loss": curve[-1]["validation_loss"],
        "parameters": PROGRAM_BYTES[name] // 4,
        "train_tokens": run.train.max_steps * run.train.global_batch_size * run.sequence_length,
        "epochs": 0.431,
        "measured": {"tokens_per_s": 24_000.0, "mfu": 0.41, "train_s": 51.2, "step_ms_p50": 170.0},
        "plan": _plan(config, name).to_metrics(),
        "curve": curve,
    }


def _plan(config: Config, name: str) -> Plan:
    device = Hardware(
        name="this machine's 2 cores",
        bf16_flops=1.6e11,
        fp32_flops=1.6e11,
        fp8_flops=None,
        memory_bytes=24 * 10**9,
        bytes_per_s=1e10,
        typical_mfu=0.5,
        is_gpu=False,
        measured=True,
    )
    if name == "base":
        return make_plan(config.training_runs()["base"], 4096, device, config.plan)
    return make_plan(config.training_runs()[name], 4096, device, config.plan, config.model)


def _split(documents: int) -> dict[str, int]:
    return {"documents": documents, "bytes": documents * 19_400, "tokens": int(documents * 19_400 / BYTES_PER_TOKEN)}


def _quantization_metrics(name: str) -> dict[str, Any]:
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    columns += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = ["model.embed_tokens", *(f"model.layers.{block}.{one}" for block in range(4) for one in columns), "lm_head"]
    layers = []
    for number, layer in enumerate(names):
        skipped = layer == SKIPPED
        ratio = 24.31 if skipped else round(31 + 13 * math.sin(number) ** 2, 2)
        reason = "its weights keep 24.3 dB, less than quantize.min_sqnr_db=25" if skipped else None
        scheme = None if skipped else Scheme.w8a8
        sensitivity = 0.001 * number if name == "student_int8" else None
        layers.append(
            asdict(LayerReport(layer, (256, 704), scheme, ratio, sensitivity=sensitivity, skipped_reason=reason))
        )
    source_bytes = PROGRAM_BYTES[STEPS[name].source]
    return {
        "layers": layers,
        "quantized_layers": len(layers) - 1,
        "schemes": {"w8a8": len(layers) - 1, "floating point": 1},
        "calibration": {"sequences": 64, "tokens": 16_384, "digest": "ab" * 32} if name == "student_int8" else None,
        "bytes": PROGRAM_BYTES[name],
        "source_bytes": source_bytes,
    }


def _pruning_metrics(config: Config, name: str) -> dict[str, Any]:
    before, after = config.model, config.shapes()[name]
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    layers = [LayerSparsity("model.layers.0.mlp.up_proj", (704, 256), 0.53, None)]
    layers += [LayerSparsity("lm_head", (4096, 256), 0.0, "every token meets it")]
    falling = [round(1 - 0.04 * place, 3) for place in range(20)]
    return {
        "source_parameters": 4_000_000,
        "parameters": 2_100_000,
        "bytes": 9_400_000,
        "source_bytes": 16_000_000,
        "shape": {name: (getattr(before, name), getattr(after, name)) for name in names},
        "importance": {
            "layers": [0.9, 0.2, 0.1, 0.3],
            "layers_by": "cosine",
            "kept_layers": None if name == "sparse" else [0, 1, 3],
            "widths": {"neurons": [falling] * 4, "heads": [[1.0, 0.5, 0.4, 0.1]] * 4, "channels": [falling]},
        },
        "layers": [asdict(layer) for layer in layers] if name == "sparse" else [],
        "calibration": {"sequences": 64, "tokens": 16_384, "digest": "ab" * 32},
        "source_loss": 4.161,
        "loss": 4.512,
    }


def _latency_metrics(config: Config) -> dict[str, Any]:
    metrics = {}
    for name in config.candidates:
        p50 = P50_MS[name]
        one = Timing(1, 200, p50, 1.18 * p50, 1000 / p50, 128_000 / p50)
        eight = Timing(8, 25, 7 * p50, 8 * p50, 140 / p50, 8 * 128 * 140 / p50)
        metrics[name] = {"p50_ms": p50, "p95_ms": 1.18 * p50, "latency": vars(one), "throughput": vars(eight)}
        metrics[name] |= {"resident_bytes": 2 * PROGRAM_BYTES[name], "cpu_s_per_1000_tokens": 0.004 * p50}
    return metrics


def _passport(config: Config, made: Mapping[str, Artifact]) -> dict[str, Any]:
    checks = list(_checks(config))
    names = [config.publish.model_name, f"{config.publish.model_name}_text"]
    files = {name: {"model.py": "ab" * 32, "settings.json": "cd" * 32} for name in names}
    return {
        "verdict": "passed",
        "checks": len(checks),
        "failed": 0,
        "worst_difference": max(check.worst_difference or 0.0 for check in checks),
        "tolerance": TOLERANCE,
        "float_noise": 5.7e-6,
        "server": "NVIDIA Triton Inference Server 2.51.0",
        "noise_factor": 4.0,
        "model_name": config.publish.model_name,
        "seeds": {"configured": 0, "fresh": 4_611_686_018_427_387_904},
        "inputs": {"real": 16, "random": 16, "lengths": [1, 2, 17, 64, 256], "prompts": 4},
        "passed_by_check": Counter(check.name for check in checks),
        "digests": {"entry": made["entry"].digest, "served_files": files},
        "rows": [{name: value for name, value in asdict(check).items() if value is not None} for check in checks],
    }


def _checks(config: Config) -> Iterator[Check]:
    yield Check("digests", True)
    for transport in ("http", "grpc"):
        for size in range(1, config.export.max_batch_size + 1):
            for place, length in enumerate((1, 2, 17, 64, 256, "mixed")):
                for padding in ("none", "left", "right"):
                    worst = TOLERANCE * (0.04 + 0.05 * place + 0.012 * size + 0.02 * (padding == "left"))
                    details = {"transport": transport, "batch_size": size, "length": length, "padding": padding}
                    yield Check("scores", True, worst, TOLERANCE, details)
        yield Check("concurrent", True, 7.9e-6, TOLERANCE, {"transport": transport, "batches_by_size": {"8": 5}})
    yield Check("tokenizer", True, tolerance=TOLERANCE, details={"strings": 56, "near_ties": 2})
    for number in range(4):
        yield Check("greedy text", True, tolerance=TOLERANCE, details={"transport": "http", "prompt": number})
    yield Check("same seed, same sample", True, details={"seed": 7})
