"""The chain as its user sees it: one command, carried on after any interruption, skipped when nothing changed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil

from tests.flows.workplace import ROOT, Done, Workplace

CACHED = re.compile(r"Task run '(\S+)' - Finished in state Cached")
BEFORE_DISTILLATION = {"corpus", "tokenizer", "tokens", "baselines", "base", "base_program", "base_quality"}


def ranks() -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "flows.training" in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE
    ]


def test_one_command_publishes_a_verified_version(first_run: tuple[Workplace, Done]) -> None:
    place, done = first_run
    assert done.returncode == 0, done.stderr
    assert "smoke version 1 is published" in done.stdout
    assert "Traceback" not in done.stderr
    version = place.root / "model_repo" / "smoke" / "1"
    passport = json.loads((version / "passport.json").read_text())
    assert passport["verdict"] == "passed"
    assert passport["worst_difference"] <= passport["tolerance"]
    assert (place.root / "model_repo" / "smoke" / "config.pbtxt").exists()
    assert (place.root / "model_repo" / "smoke_text" / "1").is_dir()
    report = (place.root / "artifacts/runs/smoke/report.html").read_text()
    for candidate in ("base", "student", "base_int8", "student_int8"):
        assert candidate in report


def test_a_rerun_skips_every_stage(workplace: Workplace) -> None:
    done = workplace.run("train", "+experiment=smoke")
    assert done.returncode == 0, done.stderr
    assert workplace.ran("smoke") == []
    assert set(CACHED.findall(done.stderr)) == set(workplace.stages("smoke"))
    assert "smoke version 1 is published" in done.stdout


def test_a_changed_temperature_reruns_distillation_and_what_follows(workplace: Workplace) -> None:
    words = ["+experiment=smoke", "steps=distill", "distill.temperature=3"]
    explained = workplace.run("explain", *words).stdout
    assert re.search(r"^student +run +temperature changed from 2.0 to 3.0$", explained, re.MULTILINE)
    for stage in BEFORE_DISTILLATION:
        assert re.search(rf"^{stage} +skip ", explained, re.MULTILINE)
    done = workplace.run("train", *words)
    assert done.returncode == 0, done.stderr
    ran = {stage for stage, row in workplace.stages("smoke").items() if row["ran"]}
    assert {"student", "student_program", "student_quality", "latency", "gates", "passport", "publish"} <= ran
    assert not ran & BEFORE_DISTILLATION
    assert workplace.stages("smoke")["student"]["reason"] == "temperature changed from 2.0 to 3.0"
    assert "smoke version 2 is published" in done.stdout


def test_damage_is_repaired_and_what_follows_from_equal_bytes_is_not_repeated(workplace: Workplace) -> None:
    served = workplace.root / "model_repo" / "smoke" / "1" / "model.onnx"
    served.write_bytes(served.read_bytes()[:-1])
    (program,) = (workplace.root / "artifacts/store").glob("base_program-*/model.onnx")
    whole = program.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    program.write_bytes(damaged)
    next((workplace.root / "artifacts/store").glob("base_quality-*/quality.json")).unlink()
    done = workplace.run("train", "+experiment=smoke")
    assert done.returncode == 0, done.stderr
    assert workplace.ran("smoke")[:3] == ["base_program", "base_quality", "publish"]
    assert "smoke version 2 is published" in done.stdout
    assert "model.onnx has sha256" in workplace.stages("smoke")["base_program"]["reason"]
    assert "quality.json is missing" in workplace.stages("smoke")["base_quality"]["reason"]
    assert program.read_bytes() == whole


def test_a_run_that_is_interrupted_and_killed_carries_on(
    workplace: Workplace, until: Callable[[Callable[[], Any]], Any]
) -> None:
    words = ["+experiment=smoke", "name=long", "steps=none", "train.max_steps=60"]
    words += ["train.optimizer.learning_rate=1e-7", "evaluate.gates.beat_unigram=true"]
    words += ["train.checkpoint_interval_steps=10"]
    workplace = replace(workplace, api_url="")  # the temporary server has to end, too
    store = workplace.root / "artifacts/store"

    def newest() -> str:
        found = store.glob("base-*.partial/checkpoints/step-*/manifest.json")
        return max((path.parent.name for path in found), default="")

    for ending in (signal.SIGINT, signal.SIGKILL):
        before = newest()
        flow = subprocess.Popen(
            workplace.command("train", *words),
            cwd=ROOT,
            env=workplace.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        until(lambda before=before, flow=flow: newest() > before or flow.poll() is not None)
        assert flow.poll() is None
        if ending == signal.SIGINT:
            os.killpg(flow.pid, ending)  # a terminal's Ctrl-C reaches every process of the group
        else:
            flow.kill()
        _, spoken = flow.communicate(timeout=60)
        assert flow.returncode != 0
        assert ("Interrupted; the same command carries on from here." in spoken) == (ending == signal.SIGINT)
        until(lambda: not ranks())
    done = workplace.run("train", *words)
    # It ends at the gates: this model has learned nothing, and nothing is published.
    assert done.returncode == 1
    assert "error: No candidate passed the gates, so nothing was published." in done.stderr
    assert "Traceback" not in done.stderr
    stages = workplace.stages("long")
    assert not {"corpus", "tokenizer", "tokens", "baselines"} & set(workplace.ran("long"))
    manifest = json.loads((store / stages["base"]["key"] / "manifest.json").read_text())
    assert manifest["metrics"]["resumed_from_step"] >= 20
    report = (workplace.root / "artifacts/runs/long/report.html").read_text()
    assert "does not beat the unigram" in report
    assert not list((workplace.root / "model_repo" / "smoke").glob("2"))
