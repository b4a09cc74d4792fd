"""What orchestration costs: `python -m flows.train` against the same stages called bare, each from nothing.

    python -m flows.bench +experiment=quickstart train.max_steps=50 distill.train.max_steps=50

Both run as a whole process, in directories of their own. The other benchmarks belong to what they measure:
`python -m flows.data.bench`, `python -m flows.training.bench`, `python -m flows.serving.bench MODEL_REPO NAME`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flows.compose import run_cli
from flows.config import Config, RunError

BARE = """
import sys
from flows.artifact import ArtifactStore
from flows.chain import run_chain
from flows.compose import compose_config
config = compose_config(sys.argv[1:])
run_chain(config, ArtifactStore(config.artifacts_dir / "store").make)
"""
FLOW = ["-m", "flows.train"]
ALLOWED_SHARE, ALLOWED_S = 0.03, 8.0


def compare(config: Config) -> None:
    """Prints seconds of both, and the overhead against what is allowed: 3 % and 8 s.

    Raises:
        RunError: One of them failed.
    """
    words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        bare_s = _seconds(["-c", BARE, *words], Path(scratch) / "bare")
        flow_s = _seconds([*FLOW, *words], Path(scratch) / "flow")
    allowed_s = ALLOWED_SHARE * bare_s + ALLOWED_S
    overhead_s = flow_s - bare_s
    print(
        f"{config.name}: bare {bare_s:.1f} s, flow {flow_s:.1f} s, ratio {flow_s / bare_s:.3f}, "
        f"overhead {overhead_s:.1f} s of {allowed_s:.1f} s allowed"
    )


def _seconds(command: list[str], directory: Path) -> float:
    places = [f"artifacts_dir={directory}/artifacts", f"publish.model_repo={directory}/model_repo"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command, *places], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{' '.join(command[-1:])} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - started


if __name__ == "__main__":
    run_cli(compare, __doc__)
