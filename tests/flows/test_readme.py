"""The README keeps its word: its commands compose or run as printed, its paths exist, its numbers of lines too."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flows.compose import compose_config
from tests.flows.workplace import ROOT, Done, Workplace

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python|text)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("   #")[0].strip()
    for language, block in BLOCKS
    if language in ("bash", "text")
    for line in block.splitlines()
    if line.startswith("python -m flows.") or "&& python -m flows." in line
]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    words = shlex.split(command.rpartition("&& ")[2])
    verb = words[2].removeprefix("flows.")
    assert (ROOT / "flows" / f"{verb.replace('.', '/')}.py").exists()
    if verb not in ("train", "explain", "plan", "serve", "bench"):
        return
    overrides = [word for word in words[3:] if not word.startswith("--") and word != "job"]
    if "--multirun" in words:
        overrides = [word.partition(",")[0] for word in overrides]
    compose_config(overrides)


def test_paths_exist() -> None:
    mentioned = set(re.findall(r"`((?:flows|kernels|conf|tests|model_repo)/[\w/.]*\w)`", README))
    assert len(mentioned) >= 8
    missing = [path for path in mentioned if not (ROOT / path).exists()]
    assert not missing


@pytest.fixture(scope="module")
def served(first_run: tuple[Workplace, Done]) -> Iterator[list[str]]:
    """`python -m flows.serve` on what the small run published; its addresses, HTTP's and the one like OpenAI's."""
    place, _ = first_run
    ports = [f"serve.{name}_port=0" for name in ("http", "grpc", "metrics", "openai")]
    command = place.command("serve", *ports)
    server = subprocess.Popen(command, cwd=ROOT, env=place.environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    starts = "Ready. HTTP http://", "OpenAI-compatible: base_url=http://"
    found = [next(line for line in server.stdout if line.startswith(start)).removeprefix(start) for start in starts]
    yield [re.split(r"[\s/]", rest)[0] for rest in found]
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0


@pytest.fixture
def as_here(served: list[str]) -> Callable[[str], str]:
    """A snippet of the README, for the small model on the ports that were free."""

    def changed(text: str) -> str:
        for printed, here in zip(("127.0.0.1:8000", "127.0.0.1:8080"), served, strict=True):
            text = text.replace(printed, here)
        return text.replace("quickstart", "smoke")

    return changed


@pytest.mark.server
def test_curl_answers_as_printed(as_here: Callable[[str], str]) -> None:
    (command,) = [line for language, block in BLOCKS for line in block.splitlines() if line.startswith("curl")]
    done = subprocess.run(["bash", "-c", as_here(command)], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert "text_output" in answer, answer


@pytest.mark.server
def test_python_clients_answer_as_printed(as_here: Callable[[str], str]) -> None:
    snippets = [block for language, block in BLOCKS if language == "python"]
    scores, openai = (
        subprocess.run([sys.executable, "-c", as_here(snippet)], capture_output=True, text=True, check=True).stdout
        for snippet in snippets
    )
    assert "tritonclient" in snippets[0]
    assert re.fullmatch(r"\(1, 512\) \d+\n", scores)
    assert len(openai.strip()) > 0
