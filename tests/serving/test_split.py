"""A model that is split over two ranks, served by a real server: equal, proven, and whole again after a rank died."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.utils import InferenceServerException

from flows.artifact import Artifact
from flows.compression.candidate import load_candidate
from flows.config.serving import GenerationConfig, SplitConfig
from flows.data.tokenizer import load_tokenizer
from flows.export import generation, split
from flows.export.program import scores_of
from flows.export.runtime import Program
from flows.serving.client import Client, Transport
from flows.serving.drills.release_drill import PROBE_TIMEOUT_S, load_on, serving
from flows.serving.drills.server_faults import OF_A_RANK, faults
from flows.serving.proof import verify_stage
from flows.serving.proof.planted_errors import _seal
from flows.serving.proof.text_check import Checkpoint
from flows.serving.releases.canary import Samples
from flows.serving.replicas.deaths import DeathWatch, model_processes
from flows.serving.server import InferenceServer
from tests.serving import tiny_model
from tests.serving.replicas.test_proxy import needs_haproxy
from tests.serving.test_server import own_leftovers
from tests.serving.tiny_chain import ENTRY, EXPORT, NAME, PASSPORT, Chain, build_entry

pytestmark = [pytest.mark.server]
TEXT = f"{NAME}_text"
SPLIT = replace(EXPORT, pipeline_stages=2)
PATIENCE_S = 120
PROMPT = "def import value self"
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def split_chain(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The tiny model, its two layers in two parts."""
    root = tmp_path_factory.mktemp("split_chain")
    parents = {"model": chain.model}
    (root / "split").mkdir()
    made = split.build(root / "split", SplitConfig(pipeline_stages=2), parents)
    assert made["layers"] == [1, 1]
    assert made["largest_difference"] <= made["tolerance"]
    (root / "generation").mkdir()
    generation.build(root / "generation", GenerationConfig(pipeline_stages=2), parents)
    parts = {name: tiny_model.artifact(name, root / name) for name in ("split", "generation")}
    parts["split"] = replace(parts["split"], metrics=made)
    made_from = {"program": parts["split"], "generation": parts["generation"]}
    entry = build_entry(root / "entry", made_from, replace(ENTRY, export=SPLIT))
    return replace(chain, program=parts["split"], generation=parts["generation"], entry=entry)


def rows() -> tuple[np.ndarray, np.ndarray]:
    """As many tokens as are worth several micro batches, some of them padding."""
    ids = np.random.default_rng(0).integers(0, tiny_model.VOCAB_SIZE, (3, tiny_model.SEQUENCE_LENGTH))
    mask = np.ones_like(ids)
    mask[1, :9] = mask[2, 20:] = 0
    return ids, mask


def ranks_of(server: InferenceServer, model: str) -> list[int]:
    found = model_processes(server.pid).items()
    return [pid for pid, (_, instance) in found if instance.startswith(f"rank 1 of {model} ")]


def refusals_until_answered(ask: Callable[[], Any], expected: Callable[[Any], bool]) -> list[str]:
    """What a client is told while there is no answer, which has to be right when it comes."""
    refusals = []
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            assert expected(ask())
        except InferenceServerException as error:
            refusals.append(str(error))
        else:
            return refusals
    raise AssertionError(f"no answer: {refusals[-1]}")


def test_two_ranks_answer_like_one_process_and_live_again_after_one_was_killed(
    chain: Chain, split_chain: Chain, tmp_path: Path
) -> None:
    before_start = own_leftovers(os.getpid())
    whole = Program(chain.program.path, 1).next_token_scores(*rows())
    checkpoint = Checkpoint(
        load_candidate(chain.model.path).eval(), load_tokenizer(chain.tokenizer.path), 0, tiny_model.SEQUENCE_LENGTH
    )
    ids, leads = checkpoint.continue_greedily(PROMPT, NEW_TOKENS)
    assert min(leads) > 1e-4, "a near tie proves nothing"
    continuation = checkpoint.decode([one for one in ids if one])
    died: SimpleQueue[str] = SimpleQueue()
    shutil.copytree(split_chain.entry.path / "repo", tmp_path / "repo")
    with InferenceServer(tmp_path / "repo", [NAME, TEXT], tmp_path / "server.log") as server:
        with Client(Transport.grpc, server.grpc_address) as client, DeathWatch(server.pid, died.put):

            def is_whole(scores: Any) -> bool:
                return float(np.abs(scores - whole).max()) <= split_chain.program.metrics["tolerance"]

            def ask_scores() -> Any:
                return client.scores(NAME, *rows())

            def ask_text() -> str:
                with Client(Transport.http, server.http_address) as texts:
                    return texts.generate(TEXT, PROMPT, options={"max_tokens": NEW_TOKENS}).text

            assert is_whole(ask_scores())
            assert [ask_text(), ask_text()] == [continuation] * 2  # the second reads the first one's pages
            (before,), (of_text,) = ranks_of(server, NAME), ranks_of(server, TEXT)
            refusals: list[str] = []
            while not refusals:  # a client that is slower than the restart notices nothing
                (before,) = ranks_of(server, NAME)
                os.kill(before, signal.SIGKILL)
                refusals = refusals_until_answered(ask_scores, is_whole)
            assert f"rank 1 of 2 (process {before}) was ended by signal 9. It is started again" in refusals[0]
            assert f"rank 1 of {NAME} beside process" in died.get(timeout=PATIENCE_S)
            os.kill(of_text, signal.SIGKILL)
            refusals = refusals_until_answered(ask_text, continuation.__eq__)
            assert f"rank 1 of 2 (process {of_text}) was ended by signal 9" in refusals[0], "its pages were lost"
            after = ranks_of(server, NAME) + ranks_of(server, TEXT)
            assert len(after) == 2
            assert not {before, of_text} & set(after)
        watched = [os.pidfd_open(pid) for pid in after]
        assert server._process is not None
        server._process.kill()  # alone, not its session
        server._process.wait()
        for one in watched:
            assert select.select([one], [], [], PATIENCE_S)[0], "a rank outlived the server"
            os.close(one)
    assert own_leftovers(os.getpid()) == before_start


@pytest.fixture(scope="module")
def split_passport(split_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    directory = tmp_path_factory.mktemp("split_passport")
    summary = verify_stage.build(directory, replace(PASSPORT, export=SPLIT), split_chain.passport_parents)
    return replace(tiny_model.artifact("passport", directory), metrics=summary)


@pytest.mark.exhaustive
def test_a_split_version_is_proven_like_any_other(split_passport: Artifact) -> None:
    assert split_passport.metrics["verdict"] == "passed"
    served = json.loads((split_passport.path / "passport.json").read_text())["digests"]["served_files"]
    for model, program in ((NAME, "model"), (TEXT, "generation")):
        assert {f"{program}-0.onnx", f"{program}-1.onnx"} <= served[model].keys()
        assert f"{program}.onnx" not in served[model]


@pytest.mark.exhaustive
def test_a_split_canary_is_held_against_its_passport(
    publish_to: Callable[[Path, Chain, Artifact], Artifact],
    split_chain: Chain,
    split_passport: Artifact,
    tmp_path: Path,
) -> None:
    publish_to(tmp_path / "repo", split_chain, split_passport)
    with InferenceServer(tmp_path / "repo", [NAME, TEXT], tmp_path / "server.log") as server:
        samples = Samples(tmp_path / "repo", NAME, 1, 4)
        assert samples.drift(server) == ""
        samples._passport["recorded"]["samples"][0]["scores"][0] += 1
        assert "differ from those of the checkpoint" in samples.drift(server)


@pytest.mark.exhaustive
@needs_haproxy
def test_behind_a_proxy_no_request_fails_when_a_rank_dies(
    publish_to: Callable[[Path, Chain, Artifact], Artifact],
    split_chain: Chain,
    split_passport: Artifact,
    tmp_path: Path,
) -> None:
    publish_to(tmp_path / "model_repo", split_chain, split_passport)
    with serving(tmp_path / "model_repo", tmp_path, replicas=2) as service, load_on(service, NAME) as load:
        faults(load, service, 10, PROBE_TIMEOUT_S, [OF_A_RANK])
    assert load.failures == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("sealed", [False, True], ids=["after it was sealed", "before it was sealed"])
@pytest.mark.parametrize("plant", ["swapped", "of another version"])
def test_a_wrong_part_is_caught(split_chain: Chain, tmp_path: Path, plant: str, sealed: bool) -> None:
    planted = shutil.copytree(split_chain.entry.path, tmp_path / "entry")
    version = planted / "repo" / NAME / "1"
    first, last = version / "model-0.onnx", version / "model-1.onnx"
    if plant == "swapped":
        first.rename(version / "aside")
        last.rename(first)
        (version / "aside").rename(last)
    else:
        other = tiny_model.make_checkpoint(tmp_path / "model", split_chain.tokenizer.path, seed=1)
        (tmp_path / "other").mkdir()
        split.build(tmp_path / "other", SplitConfig(pipeline_stages=2), {"model": tiny_model.artifact("m", other)})
        shutil.copy(tmp_path / "other" / "model-1.onnx", version)
    if sealed:
        _seal(version)
    changed = replace(split_chain, entry=tiny_model.artifact("entry", planted))
    (tmp_path / "passport").mkdir()
    told = "has sha256"
    if sealed:
        told = "this part has to make" if plant == "swapped" else "The served model is not the trained one"
    with pytest.raises(verify_stage.PassportError, match=told):
        verify_stage.build(tmp_path / "passport", replace(PASSPORT, export=SPLIT), changed.passport_parents)
    if sealed and plant != "swapped":  # it can be served: what it answers tells
        rows = json.loads((tmp_path / "passport" / "passport.json").read_text())["rows"]
        assert {"digests", "scores"} <= {row["name"] for row in rows if not row["passed"]}


OPENS_A_SPLIT_PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from flows.export.shipped.pipeline import Pipeline
version = Path(sys.argv[1])
pipeline = Pipeline(version / "model.onnx", json.loads((version / "settings.json").read_text()))
np.save(sys.argv[3], pipeline.run(dict(np.load(sys.argv[2])))["logits"])
pipeline.close()
print(json.dumps(pipeline.part_bytes))
"""


@pytest.mark.exhaustive
def test_each_rank_holds_its_share_of_the_weights_alone(split_chain: Chain, tmp_path: Path) -> None:
    stages = 4
    shape = tiny_model.changed(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=stages, initializer_range=0.02
    )
    checkpoint = tiny_model.make_checkpoint(tmp_path / "model", split_chain.tokenizer.path, config=shape)
    version = tmp_path / "repo" / "1"
    shutil.copytree(split_chain.entry.path / "repo" / NAME / "1", version)
    for part in version.glob("*.onnx"):
        part.unlink()
    made = split.build(version, SplitConfig(pipeline_stages=stages), {"model": tiny_model.artifact("m", checkpoint)})
    settings = {"pipeline_stages": stages, "threads": 1}
    (version / "settings.json").write_text(json.dumps(settings))
    _seal(version)
    whole = load_candidate(checkpoint).eval()
    ids, mask = rows()
    expected = scores_of(whole, checkpoint)(torch.from_numpy(ids), torch.from_numpy(mask)).detach().numpy()
    np.savez(tmp_path / "rows.npz", input_ids=ids, attention_mask=mask)
    # in a process that has not freed memory which loading could take again
    done = subprocess.run(
        [sys.executable, "-c", OPENS_A_SPLIT_PROGRAM, version, tmp_path / "rows.npz", tmp_path / "scores.npy"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert np.abs(np.load(tmp_path / "scores.npy") - expected).max() <= made["tolerance"]
    for own, taken in zip(made["part_bytes"], json.loads(done.stdout), strict=True):
        assert own == pytest.approx(made["program_bytes"] / stages, rel=0.1)
        # at least its weights; less than twice them, which would be a second part
        assert 0.9 * own < taken < 2 * own
