"""torchrun as a well-behaved child: `python -m flows.launcher.torchrun <log_dir> <torchrun's arguments>`.

It ends with whoever started it, even by SIGKILL, and its ranks with it; it passes SIGTERM on so that they can save; and
it leaves in `log_dir` which rank failed first and how, which torchrun only prints.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from flows.launcher.rank import EXIT_PREEMPTED, follow_parent

EXIT_FAILED = 1


def main(log_dir: Path, arguments: list[str]) -> int:
    """Runs torchrun; 0, or EXIT_PREEMPTED if its ranks saved and stopped, or EXIT_FAILED."""
    follow_parent()
    os.environ["PARENT_PID"] = str(os.getpid())
    signal.signal(signal.SIGTERM, _pass_on)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        # SIGTERM is ours: torchrun's way is to kill its ranks 30 s later, whether they have saved or not.
        options = run.parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments])  # type: ignore[no-untyped-call]
        run.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        failures = [_plain(rank, failure) for rank, failure in error.failures.items()]
        (log_dir / f"node-{socket.gethostname()}-{os.getpid()}.json").write_text(json.dumps(failures))
        preempted = all(failure["exit_code"] == EXIT_PREEMPTED for failure in failures)
        return EXIT_PREEMPTED if preempted else EXIT_FAILED
    return 0


def _plain(rank: int, failure: Any) -> dict[str, int]:
    return {"rank": rank, "exit_code": failure.exitcode, "timestamp": failure.timestamp}


def _pass_on(number: int, frame: FrameType | None) -> None:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if parent == os.getpid():
            os.kill(int(stat.parent.name), number)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
