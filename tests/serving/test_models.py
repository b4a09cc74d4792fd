"""What the two served models answer, asked of a real server."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from flows.data.tokenizer import load_tokenizer
from flows.serving.client import Client, Transport
from flows.serving.server import InferenceServer
from tests.serving import tiny_model
from tests.serving.tiny_chain import EXPORT, NAME, Chain

pytestmark = pytest.mark.server
TEXT = f"{NAME}_text"
LENGTH = tiny_model.SEQUENCE_LENGTH


@pytest.fixture(params=[Transport.http, Transport.grpc])
def client(server: InferenceServer, request: pytest.FixtureRequest) -> Iterator[Client]:
    address = server.http_address if request.param is Transport.http else server.grpc_address
    with Client(request.param, address) as connected:
        yield connected


def post(server: InferenceServer, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://{server.http_address}/v2/models/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def metrics(server: InferenceServer) -> dict[str, float]:
    """The text model's own metrics."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=60) as response:
        lines = re.findall(r"^millrace_(\w+)\{.*\} (\S+)$", response.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def ones(ids: np.ndarray) -> np.ndarray:
    return np.ones_like(ids)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, tiny_model.VOCAB_SIZE]], [[1, 1]], rf"contains {tiny_model.VOCAB_SIZE}: ids must lie between 0 and"),
        ([[1, -1]], [[1, 1]], "contains -1: ids must lie between 0 and"),
        ([[1] * (LENGTH + 1)], [[1] * (LENGTH + 1)], f"has {LENGTH + 1} tokens a row: it must have 1 to {LENGTH}"),
        ([[1, 2, 3]], [[1, 0, 1]], "one block of ones"),
        ([[1, 2]], [[0, 0]], "one block of ones"),
        ([[1, 2]], [[2, 2]], "one block of ones"),
        ([[1, 2]], [[1]], r"attention_mask has shape \(1, 1\), not \(1, 2\)"),
        ([[]], [[]], "has 0 tokens a row"),
        ([[1]] * (EXPORT.max_batch_size + 1), [[1]] * (EXPORT.max_batch_size + 1), "batch-size must be <= "),
    ],
)
def test_bad_ids_are_refused(client: Client, ids: list[list[int]], mask: list[list[int]], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message):
        client.scores(NAME, np.array(ids, np.int64), np.array(mask, np.int64))


def test_wrong_type_is_refused(server: InferenceServer) -> None:
    tensor = {"datatype": "FP32", "shape": [1, 1], "data": [1.0]}
    code, answer = post(
        server, f"{NAME}/infer", {"inputs": [{"name": n, **tensor} for n in ("input_ids", "attention_mask")]}
    )
    assert (code, "data-type" in answer["error"]) == (400, True), answer


def test_bad_requests_do_not_disturb_their_neighbours(server: InferenceServer) -> None:
    good = np.array([[5, 6, 7]], np.int64)
    bad = np.array([[5, 6, 7, tiny_model.VOCAB_SIZE]], np.int64)

    def ask(ids: np.ndarray) -> list[Any]:
        answers: list[Any] = []
        with Client(Transport.grpc, server.grpc_address) as client:
            for _ in range(30):
                try:
                    answers.append(client.scores(NAME, ids, ones(ids)))
                except InferenceServerException as error:
                    answers.append(error.message())
        return answers

    with Client(Transport.http, server.http_address) as client, ThreadPoolExecutor(6) as pool:
        alone = client.scores(NAME, good, ones(good))
        before = client.executed_batches(NAME)
        answers = list(pool.map(ask, [good, bad] * 3))
        together = client.executed_batches(NAME) - before
    assert max(together) > 1, "the server never put two requests into one batch"
    largest = float(np.abs(alone).max())
    for scores in (one for group in answers[0::2] for one in group):
        # padding to the length of a neighbour changes the order of sums, no more: some units in the last place
        assert np.abs(scores - alone).max() <= 64 * np.finfo(np.float32).eps * largest
    assert all("ids must lie between" in one for group in answers[1::2] for one in group)


PROMPTS = ["", "def", "return self.value", "x" * 100, "äußern \U0001f600", "\n", "class A:\n    def"]


def test_texts_together_equal_texts_alone(server: InferenceServer) -> None:
    def ask(number: int) -> Any:
        options = {"max_tokens": 3 + number, "temperature": float(number % 2), "seed": number}
        with Client(Transport.grpc, server.grpc_address) as client:
            return client.generate(TEXT, PROMPTS[number], options=options)

    numbers = list(range(len(PROMPTS)))
    alone = [ask(number) for number in numbers]
    before = metrics(server)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(ask, numbers)) == alone
    tokens, steps = (metrics(server)[name] - before[name] for name in ("tokens_total", "steps_total"))
    assert tokens == sum(one.completion_tokens for one in alone)
    assert steps < tokens, "no step ever computed a token of two texts"
    assert [one.completion_tokens for one in alone] == [3 + number for number in numbers]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": EXPORT.max_new_tokens + 1}, f"max_tokens is {EXPORT.max_new_tokens + 1}: it must lie between"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": -1.0}, "temperature is -1.0: it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options_are_refused(client: Client, options: dict[str, float], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message):
        client.generate(TEXT, "def", options=options)


def test_bytes_that_are_no_text_are_refused(server: InferenceServer) -> None:
    import tritonclient.grpc as grpc

    tensor = grpc.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"\xff\xfe"], dtype=np.object_))
    connection = grpc.InferenceServerClient(server.grpc_address)
    answers: SimpleQueue[Any] = SimpleQueue()
    connection.start_stream(lambda result, error: answers.put(error))
    connection.async_stream_infer(TEXT, [tensor])
    assert "text_input is not UTF-8" in str(answers.get(timeout=60))
    connection.close()


def test_generate_endpoint_takes_plain_json(server: InferenceServer) -> None:
    code, answer = post(server, f"{TEXT}/generate", {"text_input": "def ", "max_tokens": 5})
    assert code == 200
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 5)
    code, longer = post(server, f"{TEXT}/generate", {"text_input": "def ", "max_tokens": 12, "temperature": 0})
    assert longer["text_output"].startswith(answer["text_output"].rstrip("\ufffd"))
    code, answer = post(server, f"{TEXT}/generate", {"max_tokens": 5})
    assert (code, answer["error"]) == (400, "text_input is missing")


def test_stop_string_ends_the_text_before_it(client: Client) -> None:
    for seed in range(100):  # until the random model writes a letter behind the third place
        options = {"max_tokens": EXPORT.max_new_tokens, "temperature": 2.0, "seed": seed}
        whole = client.generate(TEXT, "return", options=options)
        if stop := next((one for one in whole.text[3:] if one.isascii() and one not in whole.text[:3]), ""):
            break
    cut = client.generate(TEXT, "return", stop=["not in it", stop], options=options)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.completion_tokens < whole.completion_tokens


def test_one_candidate_makes_sampling_greedy(client: Client) -> None:
    greedy = client.generate(TEXT, "def", options={"max_tokens": 8})
    assert client.generate(TEXT, "def", options={"max_tokens": 8, "temperature": 3.0, "top_k": 1}) == greedy


def test_no_seed_gives_other_samples(client: Client) -> None:
    texts = {client.generate(TEXT, "def", options={"max_tokens": 16, "temperature": 5.0}).text for _ in range(3)}
    assert len(texts) > 1


def test_a_prompt_that_is_too_long_keeps_its_end(client: Client) -> None:
    options = {"max_tokens": EXPORT.max_new_tokens}
    answer = client.generate(TEXT, "def " * LENGTH, options=options)
    assert answer.finish_reason == "stop" or answer.completion_tokens == EXPORT.max_new_tokens
    assert answer.prompt_tokens > LENGTH


def test_pieces_make_up_the_whole(client: Client) -> None:
    options = {"max_tokens": EXPORT.max_new_tokens, "temperature": 1.5, "seed": 3}
    whole = client.generate(TEXT, "class A", options=options)
    pieces = list(client.stream(TEXT, "class A", options=options))
    assert len(pieces) > 1  # as many as leave while the next ones grow
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + [whole.finish_reason]
    counts = [piece.completion_tokens for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == whole.completion_tokens


def test_a_stop_string_never_shows_in_pieces(client: Client) -> None:
    options = {"max_tokens": EXPORT.max_new_tokens, "temperature": 2.0, "seed": 5}
    whole = client.generate(TEXT, "return", options=options).text
    stop = whole[6:10]  # more than one token of this vocabulary
    pieces = [piece.text for piece in client.stream(TEXT, "return", stop=[stop], options=options)]
    assert "".join(pieces) == whole[: whole.index(stop)]


def ask_and_hang_up(server: InferenceServer, transport: Transport, texts: int, options: dict[str, float]) -> None:
    if transport is Transport.http:
        body = json.dumps({"text_input": "def", "stream": True, **options})
        connections = [HTTPConnection(server.http_address) for _ in range(texts)]
        for one in connections:
            one.request("POST", f"/v2/models/{TEXT}/generate_stream", body)
        for one in connections:
            one.close()
        return
    import tritonclient.grpc as grpc

    inputs = {"text_input": np.array([b"def"], dtype=np.object_), "max_tokens": np.array([options["max_tokens"]], "i4")}
    tensors = [grpc.InferInput(name, [1], "BYTES" if name == "text_input" else "INT32") for name in inputs]
    for tensor, values in zip(tensors, inputs.values(), strict=True):
        tensor.set_data_from_numpy(values)
    connection = grpc.InferenceServerClient(server.grpc_address)
    connection.start_stream(lambda result, error: None)
    for _ in range(texts):
        connection.async_stream_infer(TEXT, tensors)
    connection.stop_stream(cancel_requests=True)


def test_whoever_hangs_up_frees_the_place(server: InferenceServer, client: Client) -> None:
    options: dict[str, float] = {"max_tokens": EXPORT.max_new_tokens}
    whole = client.generate(TEXT, "def", options=options).completion_tokens
    before, texts = metrics(server)["tokens_total"], 200  # many more than run at a time
    ask_and_hang_up(server, client.transport, texts, options)
    client.generate(TEXT, "def", options=options)  # its turn comes after all of theirs
    deadline = time.monotonic() + 60
    while metrics(server)["cache_used_ratio"] > 0:
        assert time.monotonic() < deadline
    assert metrics(server)["tokens_total"] - before < texts * whole


def test_what_takes_too_long_is_given_up(client: Client) -> None:
    # the whole text takes many steps, each of which takes long enough for the shortest deadline to pass in between
    options = {"max_tokens": EXPORT.max_new_tokens, "timeout_ms": 1}
    with pytest.raises(InferenceServerException, match=r"timeout_ms has passed after \d+ of 30 tokens"):
        client.generate(TEXT, "def" * 20, options=options)


def test_a_repetition_penalty_breaks_a_loop(client: Client) -> None:
    options = {"max_tokens": EXPORT.max_new_tokens, "repetition_penalty": 5.0}
    assert client.generate(TEXT, "def", options=options).text != client.generate(TEXT, "def").text


def test_log_probabilities_are_those_of_the_scores_model(server: InferenceServer, client: Client, chain: Chain) -> None:
    body = {"text_input": "def", "max_tokens": 4, "log_probabilities": True}
    _, answer = post(server, f"{TEXT}/generate", body)
    prompt = load_tokenizer(chain.tokenizer.path).encode("def").ids
    for number, (token, found) in enumerate(zip(answer["token_ids"], answer["log_probabilities"], strict=True)):
        ids = np.array([prompt + answer["token_ids"][:number]], np.int64)
        logits = client.scores(NAME, ids, ones(ids))[0].astype(np.float64)
        expected = logits[token] - np.log(np.exp(logits).sum())
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_given_text_has_the_log_probabilities_of_the_scores_model(client: Client, chain: Chain) -> None:
    text = "def éx"
    reading = client.read(TEXT, text)
    assert reading.token_ids == load_tokenizer(chain.tokenizer.path).encode(text).ids
    for place in range(1, len(reading.token_ids)):
        ids = np.array([reading.token_ids[:place]], np.int64)
        logits = client.scores(NAME, ids, ones(ids))[0].astype(np.float64)
        expected = logits[reading.token_ids[place]] - np.log(np.exp(logits).sum())
        assert reading.log_probabilities[place - 1] == pytest.approx(expected, abs=1e-4)
    assert reading.log_probability == pytest.approx(reading.log_probabilities.sum(), abs=1e-4)
    assert reading.places[0] == 0
    assert reading.places[-1] == len(text) - 1
    assert client.read(TEXT, reading.token_ids).log_probability == reading.log_probability


@pytest.mark.parametrize("given", ["", "d"])
def test_the_shortest_texts_are_read(client: Client, given: str) -> None:
    reading = client.read(TEXT, given)
    assert len(reading.token_ids) == len(reading.places) == len(given)
    assert (reading.log_probabilities.size, reading.log_probability) == (0, 0)
    assert np.linalg.norm(reading.embedding) == pytest.approx(1)


def test_only_whole_texts_are_read(server: InferenceServer, client: Client) -> None:
    assert len(client.read(TEXT, [5] * LENGTH).log_probabilities) == LENGTH - 1
    with pytest.raises(
        InferenceServerException, match=f"has {LENGTH + 1} tokens: .* of whole texts, of at most {LENGTH}"
    ):
        client.read(TEXT, [5] * (LENGTH + 1))
    for body, message in (
        ({"embedding": True, "max_tokens": 3, "input_ids": [5] * 31}, "of at most 30, with max_tokens=3 behind it"),
        ({"text_input": "d", "log_probabilities": True, "top_log_probabilities": 21}, "must lie between 0 and 20"),
    ):
        code, answer = post(server, f"{TEXT}/generate", body)
        assert code == 400
        assert message in answer["error"]


def test_reading_and_writing_go_together(server: InferenceServer) -> None:
    asked = {"text_input": "def", "log_probabilities": True, "top_log_probabilities": 2, "max_tokens": 3}
    _, alone = post(server, f"{TEXT}/generate", asked)
    _, both = post(server, f"{TEXT}/generate", asked | {"prompt_log_probabilities": True, "embedding": True})
    assert alone.items() <= both.items()
    assert len(both["top_token_ids"]) == 2 * len(both["token_ids"])
    assert len(both["prompt_top_token_ids"]) == 2 * (len(both["prompt_token_ids"]) - 1)
