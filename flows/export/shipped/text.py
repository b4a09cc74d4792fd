# mypy: disable-error-code="import-not-found, import-untyped"
"""Text to text: tokenizes, generates together with whatever else runs, and answers at the end or as the text grows.

Or reads a text as it is: `prompt_log_probabilities` asks for those of its own tokens, `embedding` for a vector.

Carries its own tokenizer library, because the server's Python has none, and so that the one that was verified serves.
"""

import importlib.machinery
import importlib.util
import json
import math
import platform
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # provided by the server

from .continuous_batching import Generator, Text
from .digests import check_files, state_files
from .encryption import find
from .given_text import MOST_ALTERNATIVES, Likelihoods, Pool, token_places
from .pipeline import Pipeline, RankEndedError, open_program
from .responses import deliver, describe, describe_prompt, fail
from .sampling import Sampling
from .text_programs import PagedProgram, WholeProgram

GENERATION, WHOLE = "generation.onnx", "model.onnx"
OUTCOMES = ("stop", "length", "cancelled", "deadline", "refused", "queue_full", "failed")
"""How a request can end; the first two are answers."""
BUCKETS_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
"""Upper ends, in seconds, of what the metrics tell waiting times apart by."""
METRICS_S = 0.2
"""How often the metrics tell of steps: each number is a message to the server, which is waited for."""


class RefusedError(ValueError):
    """A request that cannot be answered."""


@dataclass
class Answer:
    """Where the responses to one request go."""

    sender: Any
    streams: bool
    """A response for each piece of the text, instead of one for all of it."""
    last: Future[None] | None = None
    """The piece that went out last, or is about to."""
    prompt_places: list[int] = field(default_factory=list)
    """Where the prompt's tokens stand in it, if that is asked for."""
    prompt_was_sent: bool = False
    sent_characters: int = 0
    sent_tokens: int = 0
    arrived_at: float = field(default_factory=time.monotonic)
    has_begun: bool = False
    """Whether its first token is there."""


class TritonPythonModel:
    """One instance of the text model: requests come in by one thread, texts grow in another, answers leave by a third.

    A response takes the server, and who reads it, longer than a small model takes for its token. So texts do not wait
    for their pieces to leave: what has grown meanwhile leaves as one piece.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Checks the version's files, loads program and tokenizer and starts to generate."""
        here = Path(__file__).parent
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.stated = state_files(pb_utils, labels, check_files(here))
        settings = json.loads((here / "settings.json").read_text())
        self.sequence_length: int = settings["sequence_length"]
        self.max_new_tokens: int = settings["max_new_tokens"]
        self.default_max_tokens: int = settings["default_max_tokens"]
        self.max_waiting: int = settings["max_waiting"]
        self.pooling: str = settings["pooling"]
        self.tokenizer = load_library(here, settings["platform"]).Tokenizer.from_file(str(here / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # as in training: what a user types is text, never a control token
        self.end_of_text: int = self.tokenizer.token_to_id(settings["end_of_text"])
        self.layers = None
        self.reads_texts = settings["pipeline_stages"] > 1 or find(here / GENERATION) is not None
        """Whether the program tells of every token of a text, and not of what follows it alone."""
        if self.reads_texts:
            self.layers = open_program(here / GENERATION, settings)
            program: Any = PagedProgram(self.layers)
        else:
            program = WholeProgram(here / WHOLE, settings["threads"])
        self.vocab_size: int = program.vocab_size
        self.generator = Generator(
            program, self.decode, self.end_of_text, settings["max_running"], settings["prefill_tokens"]
        )
        self.metrics = Metrics(labels)
        self.arrived: deque[tuple[Text, Answer]] = deque()
        self.answers: dict[Text, Answer] = {}
        self.stopping = False
        self.wake = threading.Condition()
        self.leaving = ThreadPoolExecutor(1)
        self.worker = threading.Thread(target=self.work, daemon=True)
        self.worker.start()

    def execute(self, requests: list[Any]) -> None:
        """Puts requests in line; a worker answers them."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                text, streams = self.read(request)
                text.is_cancelled = sender.is_cancelled
                answer = Answer(sender, streams)
                if text.scores_prompt:
                    answer.prompt_places = token_places(self.decode, text.ids)
                elif text.max_tokens == 0 and not text.reads_states:
                    text.finish_reason = "length"
                    self.send(text, answer)
                    self.metrics.end("length")
                    continue
                with self.wake:
                    if (waiting := len(self.arrived) + self.generator.waiting) >= self.max_waiting:
                        message = f"{waiting} texts wait already, as many as may. Try again later."
                        fail(sender, message, pb_utils.TritonError.UNAVAILABLE)
                        self.metrics.end("queue_full")
                        continue
                    self.arrived.append((text, answer))
                    self.wake.notify()
            except RefusedError as error:
                fail(sender, str(error), pb_utils.TritonError.INVALID_ARG)
                self.metrics.end("refused")

    def finalize(self) -> None:
        """Ends the worker."""
        with self.wake:
            self.stopping = True
            self.wake.notify()
        self.worker.join()
        self.leaving.shutdown()
        if isinstance(self.layers, Pipeline):
            self.layers.close()

    def work(self) -> None:
        """Generates while there is anything to generate."""
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.stopping or self.arrived or not self.generator.is_idle)
                arrived = list(self.arrived)
                self.arrived.clear()
                stopping = self.stopping
            for text, answer in arrived:
                self.answers[text] = answer
                self.generator.add(text)
            try:
                if stopping:
                    raise RuntimeError("the model is being unloaded. Try again")
                changed = self.generator.step()
                for text in changed:
                    answer = self.answers[text]
                    self.send(text, answer)
                    self.metrics.time(text, answer)
                    if text.finish_reason:
                        del self.answers[text]
                self.metrics.update(self.generator, sum(text.max_tokens > 0 for text in changed))
            except Exception as error:  # whatever it is, nobody may wait for an answer for ever
                pb_utils.Logger.log_error(f"text generation: {error!r}")
                self.generator.stop()
                is_temporary = isinstance(error, RankEndedError)
                code = pb_utils.TritonError.UNAVAILABLE if is_temporary else pb_utils.TritonError.INTERNAL
                for answer in self.answers.values():
                    self.leaving.submit(fail, answer.sender, f"generation failed: {error}.", code)
                    self.metrics.end("failed")
                self.answers.clear()
            if stopping:
                return

    def send(self, text: Text, answer: Answer) -> None:
        """Sends what is new, if somebody waits for it and the piece before has left."""
        if text.finish_reason == "cancelled":
            self.leaving.submit(fail, answer.sender, "the request was cancelled", pb_utils.TritonError.CANCELLED)
            return
        if text.finish_reason == "deadline":
            message = f"timeout_ms has passed after {len(text.new_ids)} of {text.max_tokens} tokens"
            self.leaving.submit(fail, answer.sender, message, pb_utils.TritonError.UNAVAILABLE)
            return
        piece = text.text[answer.sent_characters :]
        has_left = answer.last is None or answer.last.done()
        if not text.finish_reason and not (answer.streams and piece and has_left):
            return
        outputs = {
            "text_output": np.array([piece.encode()], dtype=np.object_),
            "finish_reason": np.array([text.finish_reason.encode()], dtype=np.object_),
            "prompt_tokens": np.array([text.asked_prompt_tokens], dtype=np.int32),
            "completion_tokens": np.array([len(text.new_ids)], dtype=np.int32),
        }
        if text.likelihoods is not None:
            outputs["token_ids"] = np.array(text.new_ids[answer.sent_tokens :], dtype=np.int64)
            outputs |= describe(text.likelihoods, answer.sent_tokens, "")
        if not answer.prompt_was_sent:
            answer.prompt_was_sent = True
            outputs |= describe_prompt(text, answer.prompt_places)
        answer.sent_characters, answer.sent_tokens = len(text.text), len(text.new_ids)
        answer.last = self.leaving.submit(deliver, answer.sender, outputs, bool(text.finish_reason))

    def decode(self, ids: list[int]) -> str:
        """Text of new tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def read_prompt(self, request: Any) -> list[int]:
        """The prompt's tokens: of a text, or as they are given; or `RefusedError`."""
        text = read_strings(request, "text_input")
        given = pb_utils.get_input_tensor_by_name(request, "input_ids")
        if bool(text) == (given is not None):
            raise RefusedError("a request has either text_input or input_ids" if text else "text_input is missing")
        if given is None:
            # unlike `encode`, it lets the texts that run grow meanwhile
            ids: list[int] = self.tokenizer.encode_batch_fast(text[:1], add_special_tokens=False)[0].ids
            return ids
        ids = given.as_numpy().tolist()
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise RefusedError(f"input_ids must lie between 0 and {self.vocab_size - 1}")
        return ids

    def read(self, request: Any) -> tuple[Text, bool]:
        """The text of a request, and whether it wants it in pieces; or `RefusedError`."""
        ids = self.read_prompt(request)
        scores_prompt = read_number(request, "prompt_log_probabilities", False)
        embeds = read_number(request, "embedding", False)
        number = {
            name: read_number(request, name, default)
            for name, default in {
                "max_tokens": 0 if scores_prompt or embeds else self.default_max_tokens,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "repetition_penalty": 1.0,
                "seed": None,
                "timeout_ms": None,
                "stream": False,
                "log_probabilities": False,
                "top_log_probabilities": 0,
            }.items()
        }
        max_tokens, seed, timeout_ms = number["max_tokens"], number["seed"], number["timeout_ms"]
        if not 0 <= max_tokens <= self.max_new_tokens:
            raise RefusedError(f"max_tokens is {max_tokens}: it must lie between 0 and {self.max_new_tokens}")
        if not (math.isfinite(number["temperature"]) and number["temperature"] >= 0):
            raise RefusedError(f"temperature is {number['temperature']}: it must be 0 (the likeliest token) or more")
        if number["top_k"] < 0:
            raise RefusedError(f"top_k is {number['top_k']}: it must be 0 (all tokens) or more")
        if not 0 < number["top_p"] <= 1:
            raise RefusedError(f"top_p is {number['top_p']}: it must be above 0 and at most 1")
        if not (math.isfinite(number["repetition_penalty"]) and number["repetition_penalty"] > 0):
            raise RefusedError(f"repetition_penalty is {number['repetition_penalty']}: it must be above 0; 1 is none")
        if seed is not None and seed < 0:
            raise RefusedError(f"seed is {seed}: it must be 0 or more")
        if timeout_ms is not None and timeout_ms <= 0:
            raise RefusedError(f"timeout_ms is {timeout_ms}: it must be above 0")
        alternatives = number["top_log_probabilities"]
        if not 0 <= alternatives <= MOST_ALTERNATIVES:
            raise RefusedError(
                f"top_log_probabilities is {alternatives}: it must lie between 0 and {MOST_ALTERNATIVES}"
            )
        room = max(1, self.sequence_length + 1 - max(1, max_tokens))  # the last new token is not read again
        if scores_prompt or embeds:
            self.check_readable(len(ids), room, max_tokens)
        kept = ids[-room:] or [self.end_of_text]
        text = Text(
            ids=kept,
            prompt_tokens=len(kept),
            max_tokens=max_tokens,
            sampling=Sampling(number["temperature"], number["top_k"], number["top_p"], number["repetition_penalty"]),
            random=np.random.default_rng(seed),
            stops=[stop for stop in read_strings(request, "stop") if stop],
            likelihoods=Likelihoods(alternatives) if number["log_probabilities"] else None,
            prompt_likelihoods=Likelihoods(alternatives) if scores_prompt else None,
            pool=Pool(self.pooling) if embeds else None,
            deadline=None if timeout_ms is None else time.monotonic() + timeout_ms / 1e3,
            asked_prompt_tokens=len(ids),
        )
        return text, number["stream"]

    def check_readable(self, tokens: int, room: int, max_tokens: int) -> None:
        """Refuses a text that cannot be read as a whole: what is left out of it would be missing without a word."""
        asked = "prompt_log_probabilities and embedding are"
        if not self.reads_texts:
            raise RefusedError(f"{asked} not to be had of this model: its program scores what follows a text alone")
        if tokens > room:
            behind = f", with max_tokens={max_tokens} behind it" if max_tokens > 1 else ""
            raise RefusedError(f"the text has {tokens} tokens: {asked} of whole texts, of at most {room}{behind}")


class Metrics:
    """What the server's metrics endpoint says about generation; each is one number per model and version."""

    def __init__(self, labels: dict[str, str]) -> None:
        def family(name: str, description: str, kind: Any) -> Any:
            return pb_utils.MetricFamily(name=f"millrace_{name}", description=description, kind=kind)

        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        self.families = {  # kept: a family that is collected takes its metrics along
            "tokens_total": family("tokens_total", "Tokens generated", counter),
            "steps_total": family("steps_total", "Steps of generation, each one token of every running text", counter),
            "texts_running": family("texts_running", "Texts that are being generated", gauge),
            "texts_waiting": family("texts_waiting", "Texts that wait for a place or for room in the cache", gauge),
            "cache_used_ratio": family("cache_used_ratio", "Share of the key and value cache that is reserved", gauge),
        }
        self.metrics = {name: one.Metric(labels=labels) for name, one in self.families.items()}
        histogram = pb_utils.MetricFamily.HISTOGRAM
        waits = {
            "first_token_seconds": family("first_token_seconds", "Seconds until a text's first token", histogram),
            "text_seconds": family("text_seconds", "Seconds until a text is whole", histogram),
        }
        self.metrics |= {name: one.Metric(labels=labels, buckets=BUCKETS_S) for name, one in waits.items()}
        ends = family("texts_total", "Requests for text, by how they ended", counter)
        self.outcomes = {outcome: ends.Metric(labels={**labels, "outcome": outcome}) for outcome in OUTCOMES}
        self.families |= waits | {"texts_total": ends}
        self.tokens = self.steps = 0
        self.next_update = 0.0

    def time(self, text: Text, answer: Answer) -> None:
        """Notes how long a text took, to its first token and to its end."""
        seconds = time.monotonic() - answer.arrived_at
        if text.new_ids and not answer.has_begun:
            answer.has_begun = True
            self.metrics["first_token_seconds"].observe(seconds)
        if text.finish_reason:
            self.end(text.finish_reason)
            self.metrics["text_seconds"].observe(seconds)

    def end(self, outcome: str) -> None:
        """Notes how a request ended: the server itself counts whatever is refused or fails here as a success."""
        self.outcomes[outcome].increment(1)

    def update(self, generator: Generator, tokens: int) -> None:
        """Notes a step, and tells of it when it is time to, or nothing runs any more."""
        self.tokens, self.steps, now = self.tokens + tokens, self.steps + 1, time.monotonic()
        if now < self.next_update and not generator.is_idle:
            return
        self.next_update = now + METRICS_S
        self.metrics["tokens_total"].increment(self.tokens)
        self.metrics["steps_total"].increment(self.steps)
        self.tokens = self.steps = 0
        self.metrics["texts_running"].set(generator.running)
        self.metrics["texts_waiting"].set(generator.waiting)
        self.metrics["cache_used_ratio"].set(generator.cache_used_ratio)


def load_library(version_dir: Path, built_for: str) -> Any:
    """The tokenizer library that the version carries."""
    if platform.machine() != built_for:
        raise RuntimeError(
            f"this version carries a tokenizer library for {built_for} and cannot serve on {platform.machine()}. "
            "Publish it from a machine of that kind."
        )
    loader = importlib.machinery.ExtensionFileLoader("tokenizers", str(version_dir / "tokenizers.abi3.so"))
    spec = importlib.util.spec_from_loader("tokenizers", loader)
    assert spec is not None
    library = importlib.util.module_from_spec(spec)
    loader.exec_module(library)
    return library


def read_strings(request: Any, name: str) -> list[str]:
    """A string input; nothing if the request has no such input."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    try:
        return [value.decode() for value in tensor.as_numpy()]
    except UnicodeDecodeError as error:
        raise RefusedError(f"{name} is not UTF-8: {error}") from error


def read_number(request: Any, name: str, default: Any) -> Any:
    """One number; the default if the request has no such input."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy()[0].item()
