"""One rank of a training stage: `python -m flows.training <run.json>`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flows.config import RunError, from_json
from flows.config.engine import Device
from flows.launcher import EXIT_PREEMPTED, Heartbeat, follow_parent, note_preemption, save_on_sigterm, speak_error
from flows.training.job import TrainingJob

EXIT_RUN_ERROR = 1


def main(run_path: Path) -> int:
    """Trains as run.json says; the process's exit code."""
    follow_parent()
    save_on_sigterm()
    job = from_json(TrainingJob, run_path.read_text())
    heartbeat = Heartbeat(job.log_dir)
    heartbeat.beat()  # from now on a rank that hangs shows where, also while it starts
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # one rank, run by hand
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ["DS_ACCELERATOR"] = _accelerator(job.run.engine.device)  # DeepSpeed reads it when it is imported
    from flows.training.quick_start import keep_compiler_out

    keep_compiler_out()
    from flows.training.loop import train
    from flows.training.preemption import StoppedEarly

    try:
        train(job)
    except StoppedEarly as stop:
        print(stop, flush=True)
        note_preemption(job.log_dir)
        return EXIT_PREEMPTED
    except RunError as error:
        speak_error(job.log_dir, str(error))
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_RUN_ERROR)  # other ranks have failed too, or wait for us: no orderly goodbye
    heartbeat.rest()
    return 0


def _accelerator(device: Device) -> str:
    if device != Device.auto:
        return device.value
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
