"""Bytes, latency and generated tokens per second of candidates in different numbers of bits, as ratios, in one run.

    python -m flows.evaluation.bench base=artifacts/store/base-... int8=artifacts/store/student_int8-...

Each argument is a name and the directory of a model that the chain made; ratios are to the first. Programs are made
anew and compared with their models before anything is timed; a model whose program differs is an error. All take turns,
request by request, so that a busy machine is fair to all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flows.artifact import Artifact
from flows.config import ConfigError
from flows.config.serving import CacheDtype, GenerationConfig
from flows.evaluation.latency import take_turns
from flows.export import generation, program
from flows.export.runtime import PROGRAM, Program
from flows.export.shipped.continuous_batching import Generator, Text
from flows.export.shipped.layers import Layers
from flows.export.shipped.sampling import Sampling
from flows.export.shipped.text_programs import PagedProgram

BATCH_SIZES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS = 32, 64
ROUNDS = 5
"""Timed rounds of generation, after one for warm-up."""
CACHE_BYTES = 1 << 28
_RESIDENT = """
import sys
from pathlib import Path
import numpy as np
from flows.export.runtime import Program

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

ids = np.arange(int(sys.argv[2]), dtype=np.int64)[None] % 256
before = resident()
Program(Path(sys.argv[1]), 1).next_token_scores(ids, np.ones_like(ids))
print(resident() - before)
"""


def run(
    models: Mapping[str, Path], tokens: int, requests: int, texts: Sequence[int], cache_dtype: CacheDtype
) -> dict[str, dict[str, float]]:
    """Measures and prints a table; what it holds by model.

    Args:
        models: Directory of each model, the one that others are compared with first.
        tokens: Length of a request for scores.
        requests: Timed requests at batch size 1.
        texts: How many texts are generated at once.
        cache_dtype: In what keys and values are kept.

    Raises:
        ConfigError: A directory holds no model.
        ProgramError: A program does not compute what its model computes.
    """
    for name, path in models.items():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{name}={path} has no config.json. Name the directory of a model that the chain made.")
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, dict[str, float]] = {}
        for name, path in models.items():
            directory = Path(scratch) / name
            directory.mkdir()
            parents = {"model": Artifact(name, name, "", path)}
            program.build(directory, None, parents)
            generation.build(directory, GenerationConfig(cache_dtype=cache_dtype), parents)
            found[name] = {"bytes": (directory / PROGRAM).stat().st_size, "resident": _resident(directory, tokens)}
        programs = {name: Program(Path(scratch) / name) for name in models}
        for size in BATCH_SIZES:
            timings = take_turns(programs, size, tokens, max(20, requests // size))
            for name, timing in timings.items():
                found[name][f"p50 {size} x {tokens}"] = timing.p50_ms
        for count in texts:
            rates = _generate_in_turns({name: Path(scratch) / name for name in models}, count)
            for name, rate in rates.items():
                found[name][f"tokens/s {count}"] = rate
    _print(found)
    return found


def _resident(directory: Path, tokens: int) -> int:
    """Bytes by which a process grows that opens the program and answers one request."""
    command = [sys.executable, "-c", _RESIDENT, str(directory), str(tokens)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _generate_in_turns(directories: Mapping[str, Path], count: int) -> dict[str, float]:
    """Generated tokens per second of each program when `count` texts run at once, the best of several rounds."""
    programs = {
        name: PagedProgram(Layers(path / generation.GENERATION, 0, CACHE_BYTES)) for name, path in directories.items()
    }
    names, best = list(programs), dict.fromkeys(programs, 0.0)
    random = np.random.default_rng(0)
    for turn in range(1 + ROUNDS):
        prompts = random.integers(256, size=(count, PROMPT_TOKENS)).tolist()  # new ones: no pages are shared
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            generator = Generator(programs[name], lambda _: "", -1, count, count * PROMPT_TOKENS)
            for ids in prompts:
                generator.add(Text(list(ids), len(ids), NEW_TOKENS, Sampling(), np.random.default_rng(0)))
            started = time.perf_counter()
            made = 0
            while not generator.is_idle:
                made += len(generator.step())
            if turn:
                best[name] = max(best[name], made / (time.perf_counter() - started))
    return best


def _print(found: Mapping[str, Mapping[str, float]]) -> None:
    first = next(iter(found.values()))
    print(f"{'':16}" + "".join(f"{column:>16}" for column in first))
    units = {"bytes": 1e-6, "resident": 1e-6}
    print(f"{'MB, ms, tokens/s':16}" + "".join(f"{value * units.get(name, 1):16.4g}" for name, value in first.items()))
    for name, values in found.items():
        print(f"{name:16}" + "".join(f"{value / first[column]:16.3f}" for column, value in values.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="name=directory")
    parser.add_argument("--tokens", type=int, default=128, help="length of a request for scores")
    parser.add_argument("--requests", type=int, default=200, help="timed requests at batch size 1")
    parser.add_argument("--texts", type=int, nargs="*", default=[1, 8], help="texts that are generated at once")
    parser.add_argument("--cache-dtype", type=CacheDtype, default=CacheDtype.float32, choices=list(CacheDtype))
    arguments = parser.parse_args()
    named = {name: Path(path) for name, _, path in (one.partition("=") for one in arguments.models)}
    run(named, arguments.tokens, arguments.requests, arguments.texts, arguments.cache_dtype)
