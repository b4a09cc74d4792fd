# transformers and torch's no_grad are untyped:
# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""What most teams serve first: transformers' `generate` behind FastAPI, one worker; a baseline for benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flows.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Generated:
    """One text."""

    text: str
    tokens: int


class Rival:
    """A model directory, generating greedily with transformers.

    Args:
        checkpoint: Floating-point model of the chain.
    """

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._tokenizer = load_tokenizer(checkpoint)
        self._end: int = self._model.config.eos_token_id

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_tokens: int) -> list[Generated]:
        """Continuations of the prompts, in one batch padded on the left."""
        rows = [self._tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([[self._end] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        made = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=self._end
        )
        return [self._cut(row[longest:].tolist()) for row in made]

    @torch.no_grad()
    def scores(self, ids: Sequence[int]) -> bytes:
        """Scores of the token after the last one [V], as float32."""
        return bytes(self._model(torch.tensor([list(ids)])).logits[0, -1].numpy().tobytes())

    def _cut(self, ids: list[int]) -> Generated:
        before_end = ids[: ids.index(self._end)] if self._end in ids else ids
        tokens = len(before_end) + (self._end in ids)
        return Generated(str(self._tokenizer.decode(before_end, skip_special_tokens=False)), tokens)


def serve(checkpoint: Path, port: int) -> None:
    """Answers POST /generate on loopback until it is stopped."""
    import uvicorn
    from fastapi import Body, FastAPI, Response

    rival, app = Rival(checkpoint), FastAPI()

    @app.post("/generate")
    async def generate(prompt: str = Body(), max_tokens: int = Body()) -> dict[str, Any]:
        return asdict(rival.generate([prompt], max_tokens)[0])  # one after the other: the model takes all cores

    @app.post("/scores")
    async def scores(ids: list[int] = Body(embed=True)) -> Response:  # noqa: B008
        return Response(rival.scores(ids), media_type="application/octet-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
