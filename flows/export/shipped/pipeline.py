"""A program split over ranks (GPipe, arXiv:1811.06965): this process has the first part, others beside it one each.

Hidden states go from rank to rank over unnamed sockets, and scores from the last one back. A batch is cut into micro
batches, so that a rank computes one while the next rank computes the one before. When a rank ends, what was under way
and what comes until its successor has loaded is refused, with the reason.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from .digests import FILES
from .encryption import find
from .layers import Arrays, Layers
from .messages import receive, send

ERROR, HELLO = "error", "hello"
MICRO_BATCH_TOKENS = 32
"""Fewer are not worth a micro batch of their own: about so many rows make a product limited by arithmetic instead of by
reading weights, which every micro batch reads anew."""
MICRO_BATCHES_PER_RANK = 2
"""At most. M of them keep each of N ranks busy for M / (M + N - 1) of the time."""
GRACE_S = 1.0
"""Between the end of a rank and the first refusal: whoever watches processes can end the server before it, and a proxy
then repeats elsewhere what it had in flight."""
ENDS_WITHIN_S = 10.0
"""Between the end of a rank and that of those behind it."""
RESTART_PAUSE_S = 5.0
"""Between two attempts to start ranks that cannot be started."""


class RankEndedError(RuntimeError):
    """A rank has ended, and with it the work that it had, and the keys and values of texts."""


def part_path(program: Path, number: int) -> Path:
    """File of one part of a program, counted from 0."""
    return program.with_name(f"{program.stem}-{number}{program.suffix}")


def open_program(program: Path, settings: dict[str, Any]) -> Layers | Pipeline:
    """A program as its version's settings say, whole or split."""
    if settings["pipeline_stages"] > 1:
        return Pipeline(program, settings)
    return Layers(program, settings["threads"], settings.get("cache_bytes", 0))


def open_part(program: Path, number: int, settings: dict[str, Any]) -> tuple[Layers, int]:
    """One part of a split program, and the bytes of memory that it took to load it; RuntimeError if it is another."""
    path, is_last = part_path(program, number), number == settings["pipeline_stages"] - 1
    before = _own_bytes()
    part = Layers(path, settings["threads"], settings.get("cache_bytes", 0), settings.get("num_layers", 0))
    wanted = (f"hidden_{number - 1}" if number else "input_ids", "logits" if is_last else f"hidden_{number}")
    if (found := (part.inputs[0], part.outputs[0])) != wanted:
        raise RuntimeError(
            f"{path} makes {found[1]} of {found[0]}, and this part has to make {wanted[1]} of {wanted[0]}"
        )
    return part, _own_bytes() - before


def _own_bytes() -> int:
    """Memory of this process that it shares with no other one."""
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return (resident - shared) * os.sysconf("SC_PAGESIZE")


class Pipeline:
    """All ranks of one instance; `run` is called by one thread.

    Args:
        program: The file that the program would have if it were whole.
        settings: The version's.

    Raises:
        RuntimeError: A rank cannot load its part.
    """

    def __init__(self, program: Path, settings: dict[str, Any]) -> None:
        self._program, self._stages = program, settings["pipeline_stages"]
        listed: dict[str, str] = json.loads((program.parent / FILES).read_text())
        paths = [find(part_path(program, number)) for number in range(self._stages)]
        # as they are now: a part that is replaced later is refused when its rank is started again
        self._digests = [listed[path.name] for path in paths if path]
        self._ranks: _Ranks | None = None
        """Those that serve."""
        self._started: _Ranks | None = None
        """Those that run, though they may be loading."""
        self._known: _Ranks | None = None
        """Those that computed last, and have the keys and values of the texts that run; None: nothing is kept."""
        self._failure = ""
        self._refuses_from = 0.0
        self._stopping, self._settled = threading.Event(), threading.Event()
        # The ranks end with the thread that starts them, so that is one that stays.
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        try:
            self._first, taken = open_part(program, 0, settings)
            self.num_pages, self.page_tokens = self._first.num_pages, self._first.page_tokens
        except BaseException:
            self.close()
            raise
        self._settled.wait()
        if self._ranks is None:
            raise RuntimeError(self._failure)
        self.width: int = self._ranks.width
        self.part_bytes = [taken, *self._ranks.part_bytes]
        """Memory that each rank took to load its part."""
        print(
            f"{program}: {self._stages} ranks, which took {self.part_bytes} bytes to load", file=sys.stderr, flush=True
        )

    def run(self, given: Arrays) -> Arrays:
        """What the last rank makes of it; see `Layers.run`.

        Raises:
            RankEndedError: A rank has ended; also if that was since the call before, where keys and values are kept.
        """
        ranks = self._ranks
        if ranks is None or (self.num_pages and self._known not in (None, ranks)):
            time.sleep(max(0.0, self._refuses_from - time.monotonic()))
            raise self._refusal()
        self._known = ranks
        answers, parts = [], list(self._micro_batches(given))
        sent = 0
        try:
            for part in parts:
                message = self._first.run(part)
                try:
                    send(ranks.first, message)
                except OSError:  # whoever receives the answers knows why
                    break
                sent += 1
        finally:  # also when this rank fails: the next call must not get these answers
            for _ in range(sent):
                if (answer := ranks.answers.get()) is None:
                    break
                answers.append(answer)
        if len(answers) < len(parts):
            ranks.has_ended.wait()
            raise self._refusal()
        for answer in answers:
            if ERROR in answer:
                raise RuntimeError(answer[ERROR].tobytes().decode())
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def close(self) -> None:
        """Ends the ranks."""
        self._stopping.set()
        if self._started is not None:
            self._started.kill()
        self._keeper.join()

    def _refusal(self) -> RankEndedError:
        self._known = None  # whoever is told takes nothing for kept
        return RankEndedError(f"{self._failure}. It is started again; try again")

    def _micro_batches(self, given: Arrays) -> Iterator[Arrays]:
        rows, tokens = given["input_ids"].shape
        count = max(1, min(rows, MICRO_BATCHES_PER_RANK * self._stages, rows * tokens // MICRO_BATCH_TOKENS))
        for first, behind in pairwise(rows * number // count for number in range(count + 1)):
            yield {name: array[first:behind] for name, array in given.items()}

    def _keep(self) -> None:
        """Starts the ranks, hands on their answers, and starts them again when one has ended."""
        while not self._stopping.is_set():
            ranks = self._started = _Ranks(self._stages)
            try:
                ranks.start(self._program, self._digests)
                if self._stopping.is_set():
                    ranks.kill()
                ranks.greet()
                self._ranks = ranks
                self._settled.set()
                while True:
                    ranks.answers.put(receive(ranks.last))
            except OSError:
                self._ranks, failure = None, ranks.find_ended()
            except Exception as error:  # whatever it is, nobody may wait for an answer for ever
                self._ranks, failure = None, str(error)
            ranks.kill()
            self._refuses_from = time.monotonic() + GRACE_S
            self._failure = failure
            if not self._stopping.is_set():
                print(f"{self._program}: {failure}", file=sys.stderr, flush=True)
            if not self._settled.is_set():
                self._settled.set()
                return  # they never served: whoever loads the model is told
            self._stopping.wait(GRACE_S if ranks.served else RESTART_PAUSE_S)
            ranks.has_ended.set()
            ranks.answers.put(None)


class _Ranks:
    """The processes of all ranks but the first, each with a socket from the one before."""

    def __init__(self, stages: int) -> None:
        self.answers: SimpleQueue[Arrays | None] = SimpleQueue()
        """None: there will be no more."""
        self.has_ended = threading.Event()
        self.served = False
        self.width = 0
        self.part_bytes: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stages = stages
        self._pairs = [socket.socketpair() for _ in range(stages)]
        self.first, self.last = self._pairs[0][0], self._pairs[-1][1]

    def start(self, program: Path, digests: list[str]) -> None:
        """Starts all of them; RuntimeError if one cannot be started."""
        here = program.parent
        for number in range(1, self._stages):
            ends = self._pairs[number - 1][1], self._pairs[number][0]
            words = [here, program.name, number, digests[number], os.getpid(), *(end.fileno() for end in ends)]
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", f"{here.name}.rank", *map(str, words)],
                    cwd=here.parent,  # the version is a package, as it is for the server
                    stdin=subprocess.DEVNULL,
                    pass_fds=[end.fileno() for end in ends],
                )
            except OSError as error:
                raise RuntimeError(f"rank {number} of {self._stages} cannot be started: {error}") from error
            self._processes.append(process)
            for end in ends:
                end.close()

    def greet(self) -> None:
        """Returns when every rank has loaded its part; RuntimeError with the reason if one cannot, or OSError."""
        send(self.first, {HELLO: np.zeros(0, np.int64)})
        answer = receive(self.last)
        if ERROR in answer:
            raise RuntimeError(answer[ERROR].tobytes().decode())
        *self.part_bytes, self.width = answer[HELLO].tolist()
        self.served = True

    def find_ended(self) -> str:
        """Which rank has ended, and how; the others end because their neighbour did."""
        for number, process in reversed(list(enumerate(self._processes, 1))):
            try:
                code = process.wait(ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                return f"rank {number} of {self._stages} (process {process.pid}) cannot be reached"
            if code:
                how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                return f"rank {number} of {self._stages} (process {process.pid}) {how}"
        return "the ranks have ended"

    def kill(self) -> None:
        """Ends all of them: they have nothing to put away."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for end in (end for pair in self._pairs for end in pair):
            end.close()
