from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from flows.artifact import Artifact
from flows.config.data import CorpusConfig, EncodeConfig, Source, TokenizerConfig
from flows.data import encode
from flows.data.encode import encode_batches
from flows.data.packed import map_shards
from flows.data.splits import SPLITS, read_documents_of
from flows.data.tokenizer import END_OF_TEXT


def stored_documents(tokens: Path, split: str) -> list[np.ndarray]:
    documents = []
    for shard in json.loads((tokens / "index.json").read_text())["splits"][split]["shards"]:
        ids = np.fromfile(tokens / shard["file"], "<u2")
        starts = np.load(tokens / shard["file"].replace(".bin", ".documents.npy"))
        assert starts.dtype == np.int64
        assert (len(ids), len(starts)) == (shard["tokens"], shard["documents"])
        documents += np.split(ids, starts[1:])
    return documents


def test_decoded_shards_are_the_cleaned_text(email_chain: dict[str, Artifact]) -> None:
    tokenizer = Tokenizer.from_file(str(email_chain["tokenizer"].path / "tokenizer.json"))
    index = json.loads((email_chain["tokens"].path / "index.json").read_text())
    token_bytes = np.load(email_chain["tokenizer"].path / "token_bytes.npy")
    assert (index["dtype"], index["vocab_size"], index["eos_token_id"]) == ("uint16", 1024, 0)
    assert len(index["splits"]["train"]["shards"]) > 3
    for split in SPLITS:
        texts = [text for _, text in read_documents_of(email_chain["corpus"].path, split)]
        documents = stored_documents(email_chain["tokens"].path, split)
        assert [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in documents] == texts
        assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in documents)
        entry = index["splits"][split]
        assert entry["documents"] == len(texts)
        assert entry["tokens"] == sum(map(len, documents))
        assert entry["bytes"] == sum(len(text.encode()) for text in texts) == token_bytes[np.hstack(documents)].sum()


def test_a_shard_is_closed_by_the_document_that_fills_it(email_chain: dict[str, Artifact]) -> None:
    tokens = email_chain["tokens"].path
    shards = json.loads((tokens / "index.json").read_text())["splits"]["train"]["shards"]
    for shard in shards[:-1]:
        last = np.load(tokens / shard["file"].replace(".bin", ".documents.npy"))[-1]
        assert 2 * last < 20_000 <= 2 * shard["tokens"]


def test_metrics_speak_of_the_same_numbers(email_chain: dict[str, Artifact]) -> None:
    metrics = email_chain["tokens"].metrics
    index = json.loads((email_chain["tokens"].path / "index.json").read_text())
    for split in SPLITS:
        assert {**metrics["splits"][split], "shards": index["splits"][split]["shards"]} == index["splits"][split]
    total = sum(split["bytes"] for split in metrics["splits"].values())
    assert metrics["bytes_per_token"] == total / sum(split["tokens"] for split in metrics["splits"].values())
    assert metrics["megabytes_per_second"] > 0


def test_batches_and_shards_do_not_change_the_stream(
    chain: Callable[..., dict[str, Artifact]], email_config: CorpusConfig, email_chain: dict[str, Artifact]
) -> None:
    whole = chain(email_config, TokenizerConfig(vocab_size=1024), EncodeConfig())["tokens"]
    assert whole.digest != email_chain["tokens"].digest
    for split in SPLITS:
        (stream,) = map_shards(whole.path, split)
        assert np.array_equal(stream, np.concatenate(map_shards(email_chain["tokens"].path, split)))


def test_the_same_input_gives_the_same_digests(
    chain: Callable[..., dict[str, Artifact]], email_config: CorpusConfig
) -> None:
    first, second = chain(email_config, folder="one"), chain(email_config, folder="two")
    assert {name: made.digest for name, made in first.items()} == {name: made.digest for name, made in second.items()}


def test_ids_are_those_of_bare_encode_batch(email_chain: dict[str, Artifact]) -> None:
    tokenizer = Tokenizer.from_file(str(email_chain["tokenizer"].path / "tokenizer.json"))
    texts = [text for _, text in read_documents_of(email_chain["corpus"].path, "train")]
    bare = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(texts)]
    batches = list(encode_batches(email_chain["tokenizer"].path, iter(texts), 50_000, np.dtype("<u2")))
    assert len(batches) > 3
    assert [ids.tolist() for batch in batches for ids in batch.documents] == bare


def test_a_document_cannot_forge_a_boundary(
    chain: Callable[..., dict[str, Artifact]], write_json_lines: Callable[..., Path]
) -> None:
    path = write_json_lines([{"text": f"a{END_OF_TEXT}b"}, {"text": "c"}])
    config = CorpusConfig(source=Source.files, paths=(str(path),), validation_fraction=0, test_fraction=0)
    tokens = chain(config)["tokens"].path
    (stream,) = map_shards(tokens, "train")
    assert np.count_nonzero(stream == 0) == 2
    assert json.loads((tokens / "index.json").read_text())["splits"]["test"] == {
        "tokens": 0,
        "documents": 0,
        "bytes": 0,
        "shards": [],
    }


def test_a_large_vocabulary_takes_four_bytes_a_token(email_chain: dict[str, Artifact], tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spellings = [END_OF_TEXT, *(f"unused {number}" for number in range(2**16)), *alphabet]
    tokenizer = Tokenizer(models.BPE({spelling: index for index, spelling in enumerate(spellings)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    np.save(tmp_path / "token_bytes.npy", np.ones(len(spellings), np.int64))
    large = Artifact(stage="tokenizer", key="large", digest="large", path=tmp_path)
    encode.build(tmp_path, EncodeConfig(), {"corpus": email_chain["corpus"], "tokenizer": large})
    (stream,) = map_shards(tmp_path, "test")
    texts = [text for _, text in read_documents_of(email_chain["corpus"].path, "test")]
    assert stream.dtype == np.uint32
    assert len(stream) == sum(len(text.encode()) + 1 for text in texts)
    assert stream[0] == 2**16 + 1 + alphabet.index(texts[0][0])


def test_an_error_while_reading_is_not_swallowed(email_chain: dict[str, Artifact]) -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield "some text"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(encode_batches(email_chain["tokenizer"].path, texts(), 1, np.dtype("<u2")))
