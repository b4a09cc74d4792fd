"""Memory of the whole data path stays flat in corpus size; each run has a process, so a peak, of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

PIECE_BYTES = 20_000
RUN = """
import resource, sys
from pathlib import Path
from flows.artifact import ArtifactStore, Stage
from flows.config.data import CorpusConfig, EncodeConfig, Source, TokenizerConfig
from flows.data import splits
splits.ROW_GROUP_BYTES = 2**18  # buffers small against the corpora, so that they are full in both
store = ArtifactStore(Path(sys.argv[2]))
config = CorpusConfig(source=Source.files, paths=(sys.argv[1],))
corpus = store.make(Stage("corpus", "flows.data.corpus", config))
tokenizer = store.make(
    Stage("tokenizer", "flows.data.tokenizer", TokenizerConfig(vocab_size=512, sample_bytes=2**19), {"corpus": corpus})
)
parents = {"corpus": corpus, "tokenizer": tokenizer}
store.make(Stage("tokens", "flows.data.encode", EncodeConfig(batch_bytes=2**18, shard_bytes=2**20), parents))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_edited_library(path: Path, size: int) -> None:
    """JSON lines of the standard library's source over and over, each line edited so that no two are equal."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [file.read_text()[:PIECE_BYTES] for file in sorted(folder.glob("*.py"))]
    written = 0
    with path.open("w") as lines:
        while written < size:
            for text in texts:
                written += lines.write(json.dumps({"text": f"# copy at {written}\n{text}"}) + "\n")


def peak_bytes(tmp_path: Path, size: int) -> int:
    path = tmp_path / f"{size}.jsonl"
    write_edited_library(path, size)
    command = [sys.executable, "-c", RUN, str(path), str(tmp_path / f"artifacts-{size}")]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_peak_memory_is_flat_in_corpus_size(tmp_path: Path) -> None:
    small, large = 2_000_000, 12_000_000
    growth = peak_bytes(tmp_path, large) - peak_bytes(tmp_path, small)
    assert growth < (large - small) / 2, "holding the additional text once would grow by twice as much"
