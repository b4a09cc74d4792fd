"""Aliases, their history, and the command that changes them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows import promote as command
from flows.config import ConfigError
from flows.serving.releases import promotion
from flows.serving.releases.state import (
    HISTORY,
    Aliases,
    ReleaseError,
    check_proven,
    read_aliases,
    read_history,
    record_published,
)
from flows.serving.releases.watch import check_published
from flows.serving.repository import PASSPORT, VERSION_CONFIG
from tests.serving.made_up_repository import NAME, add_version


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Versions 1 and 2, live one after the other, and version 3 as the candidate."""
    root = tmp_path / "model_repo"
    for version in (1, 2):
        add_version(root, version)
    add_version(root, 3, live=False)
    return root


def test_a_release_goes_through_its_life(repository: Path) -> None:
    assert read_aliases(repository, NAME) == Aliases(live=2, previous=1, candidate=3)
    assert promotion.canary(repository, NAME, 0.1) == Aliases(2, 1, 3, 0.1)
    assert promotion.canary(repository, NAME, 0.5).share == 0.5
    assert promotion.promote(repository, NAME, why="fine") == Aliases(live=3, previous=2)
    assert promotion.rollback(repository, NAME) == Aliases(live=2, previous=1)
    assert promotion.rollback(repository, NAME) == Aliases(live=1)
    assert promotion.promote(repository, NAME, version=3) == Aliases(live=3, previous=1)
    promotion.canary(repository, NAME, 0.1, version=2)
    assert promotion.abort(repository, NAME, why="slow") == Aliases(live=3, previous=1)
    history = read_history(repository, NAME)
    assert [event["verb"] for event in history[3:]] == [
        *("canary", "canary", "promote", "rollback", "rollback", "promote", "canary", "abort")
    ]
    assert [event["why"] for event in history if event["why"]] == ["fine", "slow"]
    assert all(event["who"] and event["at"] and len(event["passport"]) == 64 for event in history)


def test_what_a_run_publishes_again_keeps_what_was_decided(repository: Path) -> None:
    promotion.rollback(repository, NAME)
    record_published(repository, NAME, 2, live=True)
    assert read_aliases(repository, NAME).live == 1, "a rollback was undone by a run that changed nothing"
    add_version(repository, 4, live=False)
    record_published(repository, NAME, 4, live=True)
    assert read_aliases(repository, NAME) == Aliases(live=4, previous=1), "a candidate that waits may become live"


def test_a_new_live_version_ends_a_canary(repository: Path) -> None:
    promotion.canary(repository, NAME, 0.3)
    add_version(repository, 4)
    assert read_aliases(repository, NAME) == Aliases(live=4, previous=2)


def test_without_a_history_the_newest_is_live(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        add_version(tmp_path, version, recorded=False)
    assert read_aliases(tmp_path, NAME) == Aliases(live=3, previous=2)
    assert promotion.rollback(tmp_path, NAME) == Aliases(live=2, previous=1)
    record_published(tmp_path, NAME, 2, live=True)
    assert read_aliases(tmp_path, NAME) == Aliases(live=2, previous=1), "a run that changed nothing"
    add_version(tmp_path, 4)
    assert read_aliases(tmp_path, NAME) == Aliases(live=4, previous=2)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (f"{NAME}/3/model.py", r"model\.py has sha256 .* as its passport says"),
        (f"{NAME}_text/3/model.py", r"model\.py has sha256"),
        (f"{NAME}/3/{PASSPORT}", "has changed since it was published"),
        (f"{NAME}_text/3/{VERSION_CONFIG}/config.pbtxt", "has changed since it was published"),
        (f"{NAME}/3/files.json", "has sha256 missing"),
    ],
)
def test_a_version_that_is_not_the_proven_one_is_not_released(repository: Path, file: str, message: str) -> None:
    (repository / file).write_text((repository / file).read_text() + " ")
    if file.endswith("files.json"):
        (repository / file).write_text("{")
    before = read_history(repository, NAME)
    for change in (lambda: promotion.canary(repository, NAME, 0.1), lambda: promotion.promote(repository, NAME)):
        with pytest.raises(ReleaseError, match=message):
            change()
    assert read_history(repository, NAME) == before


def test_a_passport_that_failed_is_no_passport(repository: Path) -> None:
    path = repository / NAME / "3" / PASSPORT
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": "failed"}))
    with pytest.raises(ReleaseError, match="says 'failed', not 'passed'"):
        check_proven(repository, NAME, 3)


def test_one_canary_at_a_time_in_a_repository(repository: Path) -> None:
    add_version(repository, 1, name="other")
    add_version(repository, 2, name="other", live=False)
    promotion.canary(repository, NAME, 0.1)
    with pytest.raises(ReleaseError, match=r"made_up is under canary with share 0\.1.*or abort made_up"):
        promotion.canary(repository, "other", 0.1)


def test_of_many_who_promote_at_once_one_does(repository: Path) -> None:
    def attempt(number: int) -> str:
        try:
            promotion.promote(repository, NAME, why=str(number))
        except ReleaseError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(attempt, range(16)))
    assert outcomes.count("") == 1
    assert all("has no candidate" in outcome for outcome in outcomes if outcome)
    assert read_aliases(repository, NAME) == Aliases(live=3, previous=2)
    assert len(read_history(repository, NAME)) == 4


def test_a_history_is_never_half_written(repository: Path) -> None:
    """A promoter that is killed at any file operation leaves the state before or after, and the next one works."""
    script = """
import os, signal, sys
from pathlib import Path
from flows.serving.releases import promotion
step, seen = int(sys.argv[2]), 0
def hook(event, arguments):
    global seen
    if event in ("open", "os.rename") and "releases.jsonl" in str(arguments[0]):
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    if os.fork() == 0:
        step = number
        sys.addaudithook(hook)
        promotion.canary(Path(sys.argv[1]), "made_up", 0.1)
        os._exit(0)
    os.wait()
    print(len((Path(sys.argv[1]) / "made_up" / "releases.jsonl").read_text().splitlines()), flush=True)
"""
    command = [sys.executable, "-c", script, str(repository), "0", "8"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    counts = [int(line) for line in outcome.stdout.split()]
    assert counts[0] == 3, "it was killed before it wrote anything"
    assert counts[-1] > 3, "it was never left to end"
    history = read_history(repository, NAME)
    assert len(history) == counts[-1]
    assert promotion.promote(repository, NAME).live == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["canary", NAME, "--share", "1.5"], "share=1.5 must be above 0 and below 1. To serve all requests, promote"),
        (["promote", "nope"], r"nope is not published in .*; there are \['made_up'\]"),
        (["promote", NAME, "--version", "9"], r"made_up has no version 9 in .*; there are \[1, 2, 3\]"),
        (["promote", NAME, "--version", "2"], "version 2 of made_up is live already"),
        (["rollback", NAME, "--version", "3"], r"cannot go back to version 3: versions that were live are \[1\]"),
        (["publish", "nowhere"], "nowhere/stages.json does not exist: nowhere is no run's directory"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(
    repository: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_history(repository, NAME)
    assert command.main([*words, "--repository", str(repository)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert re.search(message, told), told
    assert read_history(repository, NAME) == before


@pytest.mark.parametrize("line", ["half a li", "7", "{}"])
def test_a_line_of_the_history_that_is_no_change_is_named(
    repository: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (repository / NAME / HISTORY).open("a") as file:
        file.write(f"{line}\n")
    assert command.main(["list", "--repository", str(repository)]) == 2
    assert re.search(rf"{HISTORY} has a line that is no change: .* Mend or remove", capsys.readouterr().err)


def test_a_live_version_that_is_not_there_is_named(repository: Path) -> None:
    check_published(repository)
    shutil.rmtree(repository / f"{NAME}_text" / "2")
    with pytest.raises(ConfigError, match=r"lacks version 2 of made_up, .* has \[1, 3\]\. .*--version 3 --repository"):
        check_published(repository)


def test_verify_asks_for_the_whole_proof_of_the_candidate(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["verify", NAME, "--repository", str(repository)]) == 1
    assert re.search(rf"{NAME}/3/{PASSPORT} .*it does not say how it was made", capsys.readouterr().err)


def test_the_command_says_what_is_what(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(*words: str) -> str:
        assert command.main([*words, "--repository", str(repository)]) == 0
        return capsys.readouterr().out

    assert "made_up: live 2, previous 1, candidate 3\n    versions 1, 2, 3" in say("list")
    assert "candidate 3, which answers 25 % of the requests" in say("canary", NAME, "--share", "0.25")
    assert say("promote", NAME, "--why", "a week without errors") == "made_up: live 3, previous 2\n"
    assert "promote version 3: a week without errors; passport" in say("list", "--history")
    assert say("rollback", NAME) == "made_up: live 2, previous 1\n"
    assert os.listdir(repository / NAME).count("releases.jsonl") == 1
