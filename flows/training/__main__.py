"""One rank of a training stage: `python -m flows.training <run.json>`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from flows.config import ConfigError, RunError, from_json
from flows.config.engine import Device
from flows.launcher import EXIT_PREEMPTED, Heartbeat, follow_parent, note_preemption, save_on_sigterm, speak_error
from flows.training.job import TrainingJob
from flows.training.out_of_memory import explain_out_of_memory, is_out_of_memory, rank_limit_bytes
from flows.training.plan import teacher_shape


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

    if not job.run.engine.compile:
        keep_compiler_out()
    from flows.training.loop import train
    from flows.training.preemption import StoppedEarly

    try:
        train(job)
    except StoppedEarly as stop:
        print(stop, flush=True)
        note_preemption(job.log_dir)
        return EXIT_PREEMPTED
    except (RunError, ConfigError) as error:
        _give_up(job, str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _give_up(job, _explain(job), RunError.exit_code)
    heartbeat.rest()
    return 0


def _give_up(job: TrainingJob, message: str, exit_code: int) -> NoReturn:
    speak_error(job.log_dir, message)
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(exit_code)  # other ranks have failed too, or wait for us: no orderly goodbye


def _explain(job: TrainingJob) -> str:
    import torch

    vocab_size = json.loads((job.tokens_dir / "index.json").read_text())["vocab_size"]
    on_gpu = os.environ["DS_ACCELERATOR"] == "cuda"
    limit = torch.cuda.mem_get_info()[1] if on_gpu else rank_limit_bytes(job.run.launcher.num_ranks)
    return explain_out_of_memory(job.run, vocab_size, on_gpu, teacher_shape(job.teacher_dir), limit)


def _accelerator(device: Device) -> str:
    if device != Device.auto:
        return device.value
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
