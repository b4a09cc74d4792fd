"""One rank of a program that is split over processes: loads its part, and passes on what that makes of each message.

    python3 -m <version>.rank <version directory> <program> <number> <sha256> <process> <socket> <socket>

It has neither an address nor a file of its own, and ends with the process that serves the model, whatever ends that.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np

from .digests import check_file
from .encryption import find
from .layers import STATES, Arrays, Layers
from .messages import receive, send
from .pipeline import ERROR, HELLO, open_part, part_path

PR_SET_PDEATHSIG = 1
SCORES = "logits"
ANSWERS = (SCORES, STATES)
"""What the last part makes; nothing else goes back."""


def main(version_dir: Path, program: str, number: int, digest: str, parent: int, read: int, write: int) -> None:
    """Works until the one who sends the messages has ended.

    Args:
        version_dir: The version.
        program: The file that the program would have if it were whole.
        number: Of this rank, which is that of its part.
        digest: sha256 of the part.
        parent: Process that started this one.
        read: Descriptor of the socket from the rank before.
        write: Descriptor of the socket to the next one.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        return
    for asked in (signal.SIGTERM, signal.SIGINT):  # the server finishes requests first; the sockets say when it has
        signal.signal(asked, signal.SIG_IGN)
    source, to = socket.socket(fileno=read), socket.socket(fileno=write)
    layers, failure, taken = None, "", 0
    try:
        path = part_path(version_dir / program, number)
        check_file(find(path) or path, digest)
        settings = json.loads((version_dir / "settings.json").read_text())
        layers, taken = open_part(version_dir / program, number, settings)
    except Exception as error:  # whatever it is, whoever loads the model is told
        failure = f"rank {number} cannot load its part: {error}"
    try:
        while True:
            message: Arrays = receive(source)
            if layers is None and ERROR not in message:
                message = _error(failure)
            elif layers is not None and HELLO in message:  # each says what it took; the last one's width comes last
                width = [layers.width] if SCORES in layers.outputs else []
                message = {HELLO: np.array([*message[HELLO], taken, *width])}
            elif layers is not None and ERROR not in message:
                message = _answer(layers, message, number)
            send(to, message)
    except OSError:  # a neighbour has ended
        return


def _answer(layers: Layers, message: Arrays, number: int) -> Arrays:
    try:
        made = layers.run(message)
    except Exception as error:  # a request that cannot be computed must not end the rank
        return _error(f"rank {number}: {error}")
    return {name: made[name] for name in ANSWERS if name in made} if SCORES in made else made


def _error(text: str) -> Arrays:
    return {ERROR: np.frombuffer(text.encode(), np.uint8)}


if __name__ == "__main__":
    place, name, own, sha256, *numbers = sys.argv[1:]
    process, *sockets = map(int, numbers)
    main(Path(place), name, int(own), sha256, process, *sockets)
