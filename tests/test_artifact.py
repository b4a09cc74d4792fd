"""Artifacts are absent or complete, found by what made them, and explained."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import artifact
from flows.artifact import ArtifactError, ArtifactStore, Stage, load_artifact, source_digests
from flows.config import RunError
from flows.config.data import TokenizerConfig
from flows.run_record import explain_change

MODULE = """
import time
from pathlib import Path

def build(directory, config, parents):
    (directory / "vocab.txt").write_text(f"{config.vocab_size} of {[p.digest[:4] for p in parents.values()]}")
    (directory / "logs").mkdir()
    (directory / "logs" / "time.txt").write_text(str(time.monotonic_ns()))
    counter = directory.parents[1] / "runs.txt"
    counter.write_text(str(int(counter.read_text()) + 1) if counter.exists() else "1")
    return {"vocab": config.vocab_size}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project root of its own with a stage module `flows.toy`."""
    root = tmp_path / "project"
    (root / "flows").mkdir(parents=True)
    (root / "flows" / "toy.py").write_text(MODULE)
    monkeypatch.setattr(artifact, "PROJECT_ROOT", root)
    import flows

    monkeypatch.setattr(flows, "__path__", [str(root / "flows"), *flows.__path__])
    forget()
    yield root
    forget()
    sys.modules.pop("flows.toy", None)


def forget() -> None:
    """Sources are read once per process; a new process would read them again."""
    for read in (artifact._source, artifact.imported_modules, artifact.source_digests):
        read.cache_clear()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "work" / "store")


def toy(**config: Any) -> Stage:
    return Stage("toy", "flows.toy", TokenizerConfig(**config))


def rewrite(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def runs(store: ArtifactStore) -> int:
    return int((store.root.parent / "runs.txt").read_text())


def test_made_once_then_found(project: Path, store: ArtifactStore) -> None:
    made = store.make(toy())
    assert made.metrics == {"vocab": 4096}
    assert store.make(toy()) == made
    assert runs(store) == 1
    assert store.find(toy()) == (made, "its artifact exists and verifies")
    assert not list(store.root.glob("*.partial"))
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"vocab.txt", "logs/time.txt"}
    assert manifest["versions"]["torch"]


def test_what_a_resumable_stage_leaves_out_of_its_workplace_stays_in_its_key(
    project: Path, store: ArtifactStore
) -> None:
    resumable = (
        "from dataclasses import replace\n\ndef resumable_as(config):\n    return replace(config, vocab_size=4096)\n"
    )
    (project / "flows" / "toy.py").write_text(MODULE + resumable)
    forget()
    first, other = toy(vocab_size=300), toy()
    assert store.workplace(first) == store.workplace(other)
    made = store.make(first)
    assert store.find(toy(vocab_size=300)) == (made, "its artifact exists and verifies")
    assert json.loads((made.path / "manifest.json").read_text())["ingredients"]["config"]["vocab_size"] == 300
    assert store.find(other)[0] is None


def test_equal_content_has_an_equal_digest_whatever_the_logs_say(project: Path, tmp_path: Path) -> None:
    first, second = (ArtifactStore(tmp_path / name / "store").make(toy()) for name in ("a", "b"))
    assert first.digest == second.digest
    assert (first.path / "logs/time.txt").read_text() != (second.path / "logs/time.txt").read_text()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "vocab.txt").unlink(), "vocab.txt is missing"),
        (lambda path: (path / "vocab.txt").write_text("4097 of []"), "vocab.txt has sha256"),
        (lambda path: (path / "logs" / "time.txt").write_text("x"), "logs/time.txt has sha256"),
        (lambda path: (path / "new").write_text("x"), "new does not belong to it"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (
            lambda path: rewrite(path / "manifest.json", "4096", "4095"),
            "manifest.json has changed since it was written",
        ),
        (lambda path: (path / "manifest.json").unlink(), "no artifact was made from these inputs yet"),
    ],
)
def test_damage_is_found_named_and_repaired(
    damage: Callable[[Path], object], reason: str, project: Path, store: ArtifactStore
) -> None:
    made = store.make(toy())
    damage(made.path)
    found, why = store.find(toy())
    assert found is None
    assert reason in why
    assert store.make(toy()) == made
    assert runs(store) == 2


def test_every_ingredient_counts_and_is_explained(project: Path, store: ArtifactStore) -> None:
    parent = store.make(toy(vocab_size=300))
    base = Stage("child", "flows.toy", TokenizerConfig(), {"corpus": parent})
    other_config = Stage("child", "flows.toy", TokenizerConfig(vocab_size=500), {"corpus": parent})
    other_parent = Stage("child", "flows.toy", TokenizerConfig(), {"corpus": store.make(toy(vocab_size=301))})
    before = base.ingredients
    assert len({store.key(stage) for stage in (base, other_config, other_parent)}) == 3
    assert explain_change(before, other_config.ingredients) == "vocab_size changed from 4096 to 500"
    assert explain_change(before, other_parent.ingredients) == "its input corpus changed"
    assert explain_change(before, before) == ""
    (project / "flows" / "toy.py").write_text(MODULE + "# a thought\n")
    forget()
    assert explain_change(before, replace(base).ingredients) == "code changed in flows.toy"


def test_code_that_a_stage_imports_or_runs_counts(project: Path) -> None:
    (project / "flows" / "toy.py").write_text("RUNS = 'flows.rank'\n" + MODULE)
    (project / "flows" / "rank.py").write_text("from flows import deep\n")
    (project / "flows" / "deep.py").write_text("import os\n")
    forget()
    assert set(source_digests("flows.toy")) == {"flows.toy", "flows.rank", "flows.deep"}


def test_a_stage_that_fails_leaves_no_artifact(project: Path, store: ArtifactStore) -> None:
    (project / "flows" / "toy.py").write_text(
        "def build(d, c, p):\n    (d / 'half').write_text('')\n    raise OSError('full')\n"
    )
    forget()
    with pytest.raises(OSError, match="full"):
        store.make(toy())
    assert store.find(toy())[0] is None
    (project / "flows" / "toy.py").write_text(MODULE)
    forget()
    importlib.reload(sys.modules["flows.toy"])
    assert "half" not in json.loads((store.make(toy()).path / "manifest.json").read_text())["files"]


def test_a_kill_while_writing_leaves_nothing_visible(tmp_path: Path) -> None:
    """SIGKILL in the middle of a real stage: the store has no artifact, and the next run makes it."""
    (tmp_path / "text").mkdir()
    for number in range(5):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document number {number} " * 50)
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from flows import artifact
        from flows.artifact import ArtifactStore, Stage
        from flows.config.data import CorpusConfig
        root = Path(sys.argv[1])
        if sys.argv[2] == "kill":
            artifact._seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        config = CorpusConfig(source="files", paths=(f"{root}/text",))
        print(ArtifactStore(root / "store").make(Stage("corpus", "flows.data.corpus", config)).path)
        """
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path), "kill"], check=False)
    assert killed.returncode == -signal.SIGKILL
    (partial,) = (tmp_path / "store").glob("corpus-*")
    assert partial.suffix == ".partial"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "run"], capture_output=True, text=True, check=True
    )
    assert load_artifact(Path(done.stdout.strip())).metrics
    assert [path.suffix for path in (tmp_path / "store").glob("corpus-*")] == [""]


def test_two_processes_make_an_artifact_once(project: Path, store: ArtifactStore) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            store.make(toy())
        finally:
            os._exit(0)
    store.make(toy())
    os.waitpid(pid, 0)
    assert runs(store) == 1


def test_load_artifact_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("not json")
    with pytest.raises(ArtifactError, match="not JSON"):
        load_artifact(tmp_path)


def test_no_import_and_no_function_of_a_stage_is_overlooked() -> None:
    """Both are found by their form; here a parser finds them, in every module of ours."""
    for path in (path for package in artifact.OWN_PACKAGES for path in (artifact.PROJECT_ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(artifact.PROJECT_ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        own = {name for name in imported if name.split(".")[0] in artifact.OWN_PACKAGES}
        assert {name for name in own if artifact._source_path(name).exists()} <= artifact.imported_modules(module)
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert functions <= artifact.defined_names(module)


def test_a_full_disk_is_one_sentence_and_what_was_made_before_stays(project: Path, store: ArtifactStore) -> None:
    kept = store.make(toy())
    rewrite(project / "flows" / "toy.py", "    return", '    Path("/dev/full").write_text("no room")\n    return')
    importlib.reload(importlib.import_module("flows.toy"))
    with pytest.raises(RunError, match=r"No space left on device: .* Make room, or set artifacts_dir or TMPDIR"):
        store.make(toy(vocab_size=300))
    assert load_artifact(kept.path).digest == kept.digest


def test_what_cannot_be_written_leaves_nothing_beside_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    artifact.write_json_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        artifact.write_json_atomically(path, {"b": object()})
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
    assert json.loads(path.read_text()) == {"a": 1}
