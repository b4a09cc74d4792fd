from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flows.artifact import Artifact, digest_file
from flows.config import ConfigError
from flows.config.data import CorpusConfig, Source, TokenizerConfig
from flows.config.model import Family
from flows.data.adopted_tokenizer import check_tokenizer, check_tokens_of
from flows.data.encode import encode_batches
from flows.data.tokenizer import (
    END_OF_TEXT,
    build,
    end_of_text_id,
    fingerprint,
    load_tokenizer,
    mask_token_id,
    spread_sample,
    trained_tokenizer,
    vocabulary_size,
)

BUILD = """
import sys
from pathlib import Path
from flows.artifact import load_artifact
from flows.config.data import TokenizerConfig
from flows.data.tokenizer import build
build(Path(sys.argv[1]), TokenizerConfig(vocab_size=1024), {"corpus": load_artifact(Path(sys.argv[2]))})
"""


def test_two_processes_train_the_same_bytes(email_chain: dict[str, Artifact], tmp_path: Path) -> None:
    made_here = email_chain["tokenizer"].path
    for seed in ("1", "2"):
        directory = tmp_path / seed
        directory.mkdir()
        subprocess.run(
            [sys.executable, "-c", BUILD, str(directory), str(email_chain["corpus"].path)],
            check=True,
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
        )
        for name in ("tokenizer.json", "token_bytes.npy"):
            assert digest_file(directory / name) == digest_file(made_here / name)


def test_end_of_text_is_token_zero_and_every_byte_has_a_token(email_chain: dict[str, Artifact]) -> None:
    tokenizer = Tokenizer.from_file(str(email_chain["tokenizer"].path / "tokenizer.json"))
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.get_vocab_size() == email_chain["tokenizer"].metrics["vocab_size"] == 1024
    lengths = np.load(email_chain["tokenizer"].path / "token_bytes.npy")
    assert lengths.dtype == np.int64
    assert lengths.shape == (1024,)
    assert lengths[0] == 0
    assert (lengths == 1).sum() == 256


@given(st.text(max_size=200))
def test_any_text_survives_and_its_bytes_are_accounted_for(email_chain: dict[str, Artifact], text: str) -> None:
    tokenizer = load_tokenizer(email_chain["tokenizer"].path)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    lengths = np.load(email_chain["tokenizer"].path / "token_bytes.npy")
    assert lengths[ids].sum() == len(text.encode())


def test_text_that_spells_the_special_token_is_text(email_chain: dict[str, Artifact]) -> None:
    tokenizer = load_tokenizer(email_chain["tokenizer"].path)
    ids = tokenizer.encode(f"before{END_OF_TEXT}after").ids
    assert 0 not in ids
    assert tokenizer.decode(ids) == f"before{END_OF_TEXT}after"


def test_a_tiny_corpus_gives_the_vocabulary_it_can(chain, write_json_lines) -> None:  # type: ignore[no-untyped-def]
    path = write_json_lines([{"text": "abab"}, {"text": "ab cd"}, {"text": "cd"}])
    made = chain(
        CorpusConfig(source=Source.files, paths=(str(path),), validation_fraction=0, test_fraction=0),
        TokenizerConfig(vocab_size=4096),
    )
    metrics = made["tokenizer"].metrics
    assert metrics["requested_vocab_size"] == 4096
    assert 259 < metrics["vocab_size"] < 272


def test_no_merge_below_the_configured_frequency() -> None:
    texts = ["ab ab ab", "cd cd"]
    often = trained_tokenizer(texts, TokenizerConfig(vocab_size=1000, min_frequency=3))
    assert often.token_to_id("ab") is not None
    assert often.token_to_id("cd") is None


@given(
    texts=st.lists(st.text(alphabet="a\u00e9\U0001f600", min_size=1, max_size=300), min_size=1, max_size=30),
    sample_bytes=st.integers(1, 2000),
)
def test_a_sample_is_bounded_and_taken_in_order(texts: list[str], sample_bytes: int) -> None:
    total = sum(len(text.encode()) for text in texts)
    sample = list(spread_sample(texts, total, sample_bytes))
    assert sum(len(piece.encode()) for piece in sample) <= sample_bytes
    if total <= sample_bytes:
        assert sample == texts
    rest = iter("".join(texts))
    assert all(character in rest for character in "".join(sample)), "a subsequence of the text"


def test_a_sample_is_spread_evenly() -> None:
    texts = [f"{number:04d}" * 100 for number in range(1000)]
    sample = list(spread_sample(texts, 400_000, 40_000))
    numbers = np.array([int(piece[:4]) for piece in sample])
    quarters = np.bincount(numbers // 250, minlength=4)
    assert sum(map(len, sample)) > 39_000
    assert quarters.max() - quarters.min() <= 1


def test_the_tokenizer_of_a_model_is_taken_as_it_is(email_chain: dict[str, Artifact], tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    tokenizer = Tokenizer.from_file(str(email_chain["tokenizer"].path / "tokenizer.json"))
    tokenizer.add_tokens(["naïve"])
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "config.json").write_text(json.dumps({"vocab_size": 1100, "eos_token_id": [1025, 0]}))
    config = TokenizerConfig(directory=model)
    assert build(out, config, {})["vocab_size"] == vocabulary_size(out) == 1100
    assert end_of_text_id(out) == 1025
    assert digest_file(out / "tokenizer.json") == digest_file(model / "tokenizer.json")
    lengths = np.load(out / "token_bytes.npy")
    text = "a naïve “reader” "
    assert lengths[load_tokenizer(out).encode(text).ids].sum() == len(text.encode())
    assert lengths[1025:].sum() == 0
    batch = next(encode_batches(out, [text], 10, np.dtype("<u2")))
    assert batch.documents[0][-1] == 1025
    before = fingerprint(config)
    (model / "config.json").write_text(json.dumps({"vocab_size": 1101, "eos_token_id": 0}))
    assert fingerprint(config) != before


def test_the_tokenizer_of_an_encoder_is_taken_as_it_is(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "na", "##ïve", "reader", "."]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.add_special_tokens(pieces[:5])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "config.json").write_text(json.dumps({"vocab_size": 12}))
    described = {"mask_token": {"content": "[MASK]"}, "sep_token": "[SEP]"}
    (model / "tokenizer_config.json").write_text(json.dumps(described))
    build(out, TokenizerConfig(directory=model), {})
    assert end_of_text_id(out) == 3
    assert mask_token_id(out) == 4
    assert np.load(out / "token_bytes.npy").tolist() == [0, 0, 0, 0, 0, 2, 4, 6, 1, 0, 0, 0]
    batch = next(encode_batches(out, ["naïve reader.", "reader"], 100, np.dtype("<u2")))
    assert [document.tolist() for document in batch.documents] == [[5, 6, 7, 8, 3], [7, 3]]
    check_tokenizer(model, Family.masked_lm)
    with pytest.raises(ConfigError, match="is not byte-level BPE"):
        check_tokenizer(model, Family.causal_lm)
    before = fingerprint(TokenizerConfig(directory=model))
    (model / "tokenizer_config.json").write_text(json.dumps({**described, "mask_token": "[M]"}))
    assert fingerprint(TokenizerConfig(directory=model)) != before
    with pytest.raises(ConfigError, match=r"has no mask token: tokenizer_config\.json says mask_token=\[M\]"):
        check_tokenizer(model, Family.masked_lm)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"data\.tokenizer\.directory=.* has no tokenizer\.json"),
        ({"tokenizer.json": "{}", "config.json": "{}"}, r"cannot be read: .* Copy the model again"),
        ({"config.json": '{"vocab_size": 1024}'}, r"has eos_token_id=None in config\.json"),
        ({"config.json": '{"vocab_size": 1024, "eos_token_id": 5000}'}, r"has eos_token_id=5000 in config\.json"),
        ({"config.json": '{"vocab_size": 1024, "eos_token_id": 0}', "decoder": "WordPiece"}, r"is not byte-level BPE"),
    ],
)
def test_tokenizers_that_cannot_be_taken_are_refused(
    files: dict[str, str], message: str, email_chain: dict[str, Artifact], tmp_path: Path
) -> None:
    if files and "tokenizer.json" not in files:
        described = json.loads((email_chain["tokenizer"].path / "tokenizer.json").read_text())
        if decoder := files.get("decoder"):
            described["decoder"] = {"type": decoder, "prefix": "##", "cleanup": True}
        (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(tmp_path)


def test_weights_of_another_tokenizer_are_refused_and_spacing_does_not_count(
    email_chain: dict[str, Artifact], tmp_path: Path
) -> None:
    said = json.loads((email_chain["tokenizer"].path / "tokenizer.json").read_text())
    taken, weights = tmp_path / "taken", tmp_path / "weights"
    for directory, text in ((taken, json.dumps(said)), (weights, json.dumps({**said, "padding": {}}, indent=7))):
        directory.mkdir()
        (directory / "tokenizer.json").write_text(text)
    check_tokens_of(weights, taken, "distill.student")
    check_tokens_of(tmp_path, taken, "distill.student")  # there is nothing to compare
    first, second, *rest = said["model"]["merges"]
    said["model"]["merges"] = [second, first, *rest]
    (weights / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"distill.student.initial_weights=.*differ in model\. .* Set data.tokenizer"):
        check_tokens_of(weights, taken, "distill.student")
