"""What a rank forked by `preloaded_ranks` does: become `python -m <module> <argument>` in its own session."""

# ruff: noqa: F821  runpy.run_path hands in `environment`, `log_path` and `arguments`
# mypy: disable-error-code="name-defined"

import os
import runpy
import sys

os.setsid()
log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
os.dup2(log, 1)
os.dup2(log, 2)
os.environ.clear()
os.environ.update(environment | {"PARENT_PID": str(os.getppid())})
module, *sys.argv[1:] = arguments
runpy.run_module(module, run_name="__main__", alter_sys=True)
