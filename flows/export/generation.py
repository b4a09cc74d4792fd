# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""The program that generates text: new tokens meet keys and values of the tokens before them, which are kept in pages.

The pages of all texts are one pool per layer, so that texts of any length share it without gaps, and texts that begin
alike share their first pages (PagedAttention, arXiv:2309.06180). The program reads pages and returns the keys and
values of the new tokens; whoever runs it writes them to their place.

Shape letters: B rows, S new tokens of a row, R scored tokens of all rows, M pages of a row, T tokens of a page,
P = M x T, N layers, G key and value heads, K width of a head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import embedding

from flows.artifact import Artifact
from flows.compression.candidate import load_candidate
from flows.config.model import ModelConfig
from flows.config.serving import CacheDtype, GenerationConfig
from flows.export.coded_cache import CODES, decode, encode, keep_cache_in
from flows.export.graph import export_graph
from flows.export.parity import compare
from flows.export.parts import DecoderPart, PartsInTurn, share_layers
from flows.export.program import NextTokenScores
from flows.export.shipped.layers import STATES, Layers, Runner
from flows.export.shipped.pipeline import part_path
from flows.export.shipped.text_programs import PagedProgram
from flows.model.attention import Attention, angles, attend
from flows.model.decoder import Decoder
from kernels.reference import FP8

GENERATION = "generation.onnx"
PAGE_TOKENS = 16
POOL_DTYPES = {CacheDtype.float32: torch.float32, CacheDtype.int8: torch.int8, CacheDtype.fp8: torch.uint8}
"""Of pages: onnxruntime takes no E4M3 from numpy, only its bytes."""
CHECKED_BYTES = 1 << 26
"""Of keys and values, while program and candidate are compared."""


def build(directory: Path, config: GenerationConfig, parents: Mapping[str, Artifact]) -> Mapping[str, Any]:
    """Stage: writes generation.onnx, or generation-0.onnx and so on for as many ranks.

    Args:
        directory: Where it goes.
        config: In what keys and values are kept.
        parents: `model`: a candidate that is a decoder of ours.

    Returns:
        `largest_difference` and `tolerance` of the comparison with the candidate.

    Raises:
        ProgramError: The program does not compute what the candidate computes.
    """
    model = load_candidate(parents["model"].path)
    assert isinstance(model, Decoder), "others have no such program"
    export_generation(model, directory / GENERATION, config.cache_dtype, config.pipeline_stages)
    whole = load_candidate(parents["model"].path)
    assert isinstance(whole, Decoder)
    keep_cache_in(config.cache_dtype, whole)
    path, stages, num_layers = directory / GENERATION, config.pipeline_stages, whole.config.num_hidden_layers
    made = PartsInTurn(path, stages, CHECKED_BYTES, num_layers) if stages > 1 else Layers(path, 0, CHECKED_BYTES)
    parity = compare(NextTokenScores(whole).eval(), _TokenByToken(made), whole.vocab_size)
    return {"largest_difference": parity.largest_difference, "tolerance": parity.tolerance}


@dataclass
class _Ids:
    ids: list[int]
    prompt_tokens: int
    most_tokens: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    scores_prompt: bool = False
    reads_states: bool = False


class _TokenByToken:
    """Next-token scores as generation computes them: half of each row at once, then one token after the other."""

    def __init__(self, layers: Runner) -> None:
        self._program = PagedProgram(layers)

    def next_token_scores(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores [batch, vocab] of the token after each row's last real one."""
        rows = [ids[mask == 1].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        texts = [_Ids(ids, len(ids), len(ids)) for ids in rows]
        scores = np.zeros((len(texts), self._program.vocab_size), np.float32)
        for text in texts:
            self._program.open(text)
        counts = [-(-(len(text.ids) - text.computed) // 2) for text in texts]
        while running := [row for row, count in enumerate(counts) if count]:
            steps = self._program.run([texts[row] for row in running], [counts[row] for row in running])
            scores[running] = [step.logits[-1] for step in steps]
            counts = [min(1, len(text.ids) - text.computed) for text in texts]
        for text in texts:
            self._program.close(text)
        return scores


class GenerationStep(nn.Module):
    """Scores of the tokens after chosen new ones, the new tokens' keys and values, and what they look like at the end.

    Args:
        part: Of any decoder, floating-point or of few bits; its attention layers are told to look at pages from then
            on. One that does not have the last layer makes the residual stream instead of scores.
        cache_dtype: In what keys and values are kept.
    """

    numbers: Tensor

    def __init__(self, part: DecoderPart, cache_dtype: CacheDtype) -> None:
        super().__init__()
        self.part = part
        self.codes = CODES.get(cache_dtype)
        self.attend_to_pages: Callable[..., Tensor] = _attend_to_pages
        if self.codes is not None:
            self.attend_to_pages = partial(_attend_to_coded_pages, self.codes)
        if self.codes == FP8:
            self.register_buffer("numbers", torch.arange(256).to(torch.uint8).view(FP8)[:, None])

    def forward(
        self, given: Tensor, scored: Tensor, past_lengths: Tensor, page_table: Tensor, *pages: Tensor
    ) -> tuple[Tensor, ...]:
        """Scores [R, V]; new keys and values, each [N, B, S, G, K], of codes also their steps [N, B, S, G, 1]; and the
        new tokens' hidden states after the final norm [B, S, D].

        Args:
            given: New tokens [B, S], int64, padded on the right; or the residual stream of them [B, S, D].
            scored: Which of them meet the output projection [R], at least one: row x S + place in the row.
            past_lengths: Tokens before them [B]; 0 for a new text.
            page_table: Numbers of the pages that hold those [B, M], in order; what lies behind them does not matter.
            *pages: Pool of each layer's keys, then of each layer's values, [pages, T, G, K] float32, int8 or uint8,
                the bytes of E4M3; of codes then of their steps, [pages, T, G, 1] float32.
        """
        part = self.part
        num_layers, length = len(part.layers), given.shape[1]
        order_S = torch.arange(length, device=given.device)
        positions_BS = past_lengths[:, None] + order_S
        past_P = torch.arange(page_table.shape[1] * PAGE_TOKENS, device=given.device)
        is_past_BSP = (past_P < past_lengths[:, None])[:, None].expand(-1, length, -1)
        is_before_BSS = (order_S[:, None] >= order_S)[None].expand(given.shape[0], -1, -1)
        allowed_B1SP = torch.cat((is_past_BSP, is_before_BSS), dim=-1)[:, None]
        x_BSD = part.enter(given)
        rotation = angles(positions_BS, part.head_dim, part.rope_theta)
        new: list[tuple[Tensor, ...]] = []
        for number, layer in enumerate(part.layers):
            attention = layer.self_attn
            assert isinstance(attention, Attention)
            past = tuple(self.read(pool, page_table) for pool in pages[number::num_layers])
            attention.attend = partial(self.attend_to_pages, past, new)
            x_BSD = layer(x_BSD, rotation, allowed_B1SP)
        kept = [torch.stack(of_all_layers) for of_all_layers in zip(*new, strict=True)]
        if self.codes == FP8:
            kept[:2] = [numbers.to(FP8) for numbers in kept[:2]]
        if not part.is_last:
            return x_BSD, *kept
        hidden_BSD = part.norm(x_BSD)
        return part.lm_head(embedding(scored, hidden_BSD.flatten(0, 1))), *kept, hidden_BSD

    def read(self, pages: Tensor, page_table_BM: Tensor) -> Tensor:
        """Keys or values of the rows' pages, or their steps [B, G, P, K or 1]; of E4M3 the numbers, as float32."""
        rows = embedding(page_table_BM, pages.flatten(1))  # one copy per page
        found = rows.view(page_table_BM.shape[0], -1, *pages.shape[2:]).transpose(1, 2)
        if found.dtype != torch.uint8:
            return found
        return embedding(found.int(), self.numbers.float()).squeeze(-1)  # the runtime can gather no E4M3


def _attend_to_pages(
    past: tuple[Tensor, ...],
    new: list[tuple[Tensor, ...]],
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    allowed_B1SP: Tensor | None,
) -> Tensor:
    new.append((k_BGSK.transpose(1, 2), v_BGSK.transpose(1, 2)))
    keys, values = (torch.cat(pair, dim=2) for pair in zip(past, (k_BGSK, v_BGSK), strict=True))
    return attend(q_BHSK, keys, values, allowed_B1SP)


def _attend_to_coded_pages(
    dtype: torch.dtype,
    past: tuple[Tensor, ...],
    new: list[tuple[Tensor, ...]],
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    allowed_B1SP: Tensor | None,
) -> Tensor:
    (k_codes, k_steps), (v_codes, v_steps) = encode(k_BGSK, dtype), encode(v_BGSK, dtype)
    if dtype == FP8:  # the runtime can put no E4M3 together either: they are numbers until they leave it
        k_codes, v_codes = k_codes.float(), v_codes.float()
    coded = (k_codes, v_codes, k_steps, v_steps)
    new.append(tuple(one.transpose(1, 2) for one in coded))
    k_codes, v_codes, k_steps, v_steps = (torch.cat(pair, dim=2) for pair in zip(past, coded, strict=True))
    return attend(q_BHSK, decode(k_codes, k_steps), decode(v_codes, v_steps), allowed_B1SP)


def export_generation(model: Decoder, path: Path, cache_dtype: CacheDtype, stages: int = 1) -> None:
    """Writes the graph, for any number of rows, new tokens and pages; equal weights give equal bytes.

    Args:
        model: Any decoder.
        path: ONNX file; of several parts each is beside it, numbered.
        cache_dtype: In what keys and values are kept.
        stages: Parts that it is made in.
    """
    for number, (first, behind) in enumerate(share_layers(model, stages)):
        place = part_path(path, number) if stages > 1 else path
        _export_part(DecoderPart(model, first, behind, number), model.config, place, cache_dtype)


def _export_part(part: DecoderPart, config: ModelConfig, path: Path, cache_dtype: CacheDtype) -> None:
    heads, width, layers = config.num_key_value_heads, config.head_dim, len(part.layers)
    codes = torch.zeros(5, PAGE_TOKENS, heads, width, dtype=POOL_DTYPES[cache_dtype])
    kept = {"key": codes, "value": codes}
    if cache_dtype != CacheDtype.float32:
        kept |= dict.fromkeys(("key_step", "value_step"), torch.zeros(5, PAGE_TOKENS, heads, 1))
    pages = [pool.clone() for pool in kept.values() for _ in range(layers)]
    names = ("rows", "new_tokens", "scored_tokens", "row_pages", "pool_pages")
    rows, new, scored, table, pool = map(torch.export.Dim, names)
    export_graph(
        GenerationStep(part, cache_dtype),
        (
            part.example(torch.zeros(2, 3, dtype=torch.int64)),
            torch.ones(4, dtype=torch.int64),
            torch.ones(2, dtype=torch.int64),
            torch.zeros(2, 4, dtype=torch.int64),
            *pages,
        ),
        [
            *(part.given, "scored", "past_lengths", "page_table"),
            *(f"{kind}_pages_{layer}" for kind in kept for layer in range(layers)),
        ],
        [part.made, *(f"new_{kind}s" for kind in kept), *([STATES] if part.is_last else [])],
        ({0: rows, 1: new}, {0: scored}, {0: rows}, {0: rows, 1: table}, tuple({0: pool} for _ in pages)),
        path,
    )
