"""A file of texts to a file of answers, by served models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.config.checks import require, require_address, require_positive

MAX_SEED = 2**62
FORMATS = (".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What `python -m flows.predict` reads, asks and writes."""

    input: Path | None = None
    """Rows with a text each: .jsonl (an object a line) or .parquet."""
    output: Path | None = None
    """The same rows in the same order and format, with four columns more; nothing may be there yet. The file
    `<output>.predict.json` beside it names the version that answered and the sha256 of its passport."""
    field: str = "text"
    """Column that holds the prompt."""
    output_field: str = "completion"
    """Column for the model's text; `<this>_finish_reason`, `<this>_tokens` and `<this>_error` stand beside it."""
    servers: tuple[str, ...] = ()
    """gRPC addresses, host:port, of servers that serve `publish.model_name`; empty = started for the time it takes."""
    replicas: int = 1
    """Servers to start where `servers` names none."""
    version: int = 0
    """Version to ask; 0 = the live one, of `servers` the highest that all have loaded, which is the one live there.
    A run that goes on stays with the version it began with."""
    requests_per_server: int = 16
    """Texts that one server works on at a time; `export.max_running` of them are generated together."""
    rows_per_part: int = 256
    """Rows that are written at once, and that an interruption costs at most, times two."""
    patience_s: float = 60.0
    """Seconds that a server may be out of reach before it is given up; its rows go to the others at once."""
    max_tokens: int = 128
    """Most new tokens for a row."""
    temperature: float = 0.0
    """0 = the likeliest token at each step."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens with this much probability to draw from; 1 = all."""
    seed: int = 0
    """Row n draws with seed + n, so that no answer depends on which server gave it, nor on what ran beside it."""

    def __post_init__(self) -> None:
        require_positive(
            "predict", self, ["replicas", "requests_per_server", "rows_per_part", "patience_s", "max_tokens"]
        )
        for name in ("version", "temperature", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"predict.{name}", value, "must not be negative", f"Set predict.{name}=0.")
        require(
            self.seed < MAX_SEED,
            "predict.seed",
            self.seed,
            f"must be below {MAX_SEED}: the row's number is added, and 63 bits are there",
            "Set predict.seed=0.",
        )
        require(
            0 < self.top_p <= 1, "predict.top_p", self.top_p, "must be above 0 and at most 1", "Set predict.top_p=1."
        )
        for name in ("field", "output_field"):
            require(
                bool(getattr(self, name)), f"predict.{name}", "''", "must name a column", f"Set predict.{name}=text."
            )
        for address in self.servers:
            require_address("predict.servers", address, "of the server's gRPC", "Set predict.servers=[127.0.0.1:8001].")
        for name in ("input", "output"):
            path = getattr(self, name)
            require(
                path is None or path.suffix in FORMATS,
                f"predict.{name}",
                path,
                f"must end in one of {', '.join(FORMATS)}",
                "Rename it, or convert it.",
            )
        if self.input is not None and self.output is not None:
            require(
                self.input.suffix == self.output.suffix,
                "predict.output",
                self.output,
                f"must have the format of predict.input={self.input}",
                f"Set predict.output={self.output.with_suffix(self.input.suffix)}.",
            )
