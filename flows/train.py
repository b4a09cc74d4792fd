"""Raw data to a verified model version behind NVIDIA Triton Inference Server, in one command.

    python -m flows.train +experiment=quickstart                  # two CPU cores, five minutes
    python -m flows.train +experiment=quickstart distill.temperature=3
    python -m flows.train data=files data.corpus.paths=[corpus/**/*.txt] model=decoder_125m engine=zero1_bf16
    python -m flows.train +experiment=quickstart --multirun seed=0,1,2

Stages: corpus, tokenizer, tokens -> base -> cache or text of a teacher -> student -> INT8 of each -> program, quality
and latency of every candidate -> gates -> model repository entry -> passport (served compared with trained) -> publish
-> report. Each one leaves a content-addressed artifact and is skipped while that artifact verifies; an interrupted run
carries on with the same command. `python -m flows.explain` with the same words says what would run and why.

Ctrl-C and a cancelled Prefect run end at once. SIGTERM while a model trains (preemption) saves a checkpoint first: the
command ends with exit code 75, a run of a Prefect deployment is scheduled again.
"""

from __future__ import annotations

from functools import partial

from flows.compose import run_cli
from flows.config import Config, RunError
from flows.join import join
from flows.launcher import Preempted
from flows.launcher.rendezvous import leads
from flows.preflight import check
from flows.temporary_server import TemporaryServer


def main(config: Config, server: TemporaryServer) -> None:
    """Runs the flow here and now, and says in one line how it ended."""
    check(config)  # before Prefect starts anything
    if not leads(config.launcher):
        join(config)
        return
    from flows.train_flow import PREEMPTED, train  # Prefect takes a second, in which the server starts, too

    server.start()
    state = train(config=config, return_state=True)
    if not state.is_completed():
        kind = Preempted if state.name == PREEMPTED else RunError
        raise kind(state.message or state.name)
    print(state.message)


if __name__ == "__main__":
    run_cli(partial(main, server=TemporaryServer()), __doc__)
