# Shape letters are upper case; calling a module is untyped in torch:
# mypy: disable-error-code="no-any-return"
"""A Llama-class decoder (arXiv:2302.13971) with Hugging Face's module and weight names.

Shape letters: B batch, L length, D hidden size, V vocabulary. `x_BLD` is a tensor of batch x length x hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.config.model import Family, ModelConfig
from flows.model.attention import Attention, Visible, angles, positions, visible_keys
from flows.model.mixture_of_experts import MixtureOfExperts
from flows.model.norm import AddRMSNorm, RMSNorm
from kernels.glu import swiglu


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.kernels = config.kernels.value

    def forward(self, x_BLD: Tensor) -> Tensor:
        """What each position adds to its residual stream [B, L, D]."""
        return self.down_proj(swiglu(self.gate_proj(x_BLD), self.up_proj(x_BLD), self.kernels))


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on normalized input and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        if config.num_experts:
            self.block_sparse_moe = MixtureOfExperts(config)
        else:
            self.mlp = FeedForward(config)
        self._feeds_through = "block_sparse_moe" if config.num_experts else "mlp"
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.post_attention_layernorm = AddRMSNorm(config, config.hidden_size)

    def forward(self, x_BLD: Tensor, rotation: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        """The residual stream [B, L, D] after this layer."""
        gathered_BLD = self.self_attn(self.input_layernorm(x_BLD), rotation, visible)
        normalized_BLD, x_BLD = self.post_attention_layernorm(gathered_BLD, x_BLD)
        return x_BLD + getattr(self, self._feeds_through)(normalized_BLD)


class DecoderStack(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        # Given, not drawn: `initialize` draws it, and to draw it on the meta device imports a compiler for seconds.
        self.embed_tokens = nn.Embedding(
            vocab_size, config.hidden_size, _weight=torch.zeros(vocab_size, config.hidden_size)
        )
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, config.hidden_size)
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.kernels = config.kernels.value
        self.first_position = 0  # of the tokens given, where other ranks have those before them

    def forward(
        self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None, document_ids_BL: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, L, D]; see `Decoder.forward_hidden`."""
        x_BLD = self.embed_tokens(input_ids_BL)
        positions_BL = positions(input_ids_BL, attention_mask_BL, document_ids_BL, self.first_position)
        visible = visible_keys(x_BLD, self.head_dim, self.kernels, attention_mask_BL, document_ids_BL)
        rotation = angles(positions_BL, self.head_dim, self.rope_theta)
        for layer in self.layers:
            x_BLD = layer(x_BLD, rotation, visible)
        return self.norm(x_BLD)


class OutputHead(nn.Linear):
    """Hidden states to scores; or to a loss that takes them and the weight, and need not make the scores."""

    def forward(self, input: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Scores [..., V] of hidden states [..., D], or their loss []."""
        return super().forward(input) if loss is None else loss(input, self.weight)


class Decoder(nn.Module):
    """Token ids to scores of every next token.

    Args:
        config: Shape, and which kernels to run.
        vocab_size: Number of tokens V.
    """

    family = Family.causal_lm

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.model = DecoderStack(config, vocab_size)
        self.lm_head = OutputHead(config.hidden_size, vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the output projection the embedding matrix itself, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward_hidden(
        self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None, document_ids_BL: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, L, D] after the final norm; `lm_head` turns any of them into scores.

        Args:
            input_ids_BL: Token ids, int64.
            attention_mask_BL: 1 for real tokens, 0 for padding on either side, int64; None = all are real, which is
                faster. Positions count real tokens only. What comes out at padding is finite and without meaning.
            document_ids_BL: Number of the document that each token belongs to, int64, never falling along a row. No
                token looks at another document, and positions start anew with each; None = all look back at all.
        """
        return self.model(input_ids_BL, attention_mask_BL, document_ids_BL)

    def forward(
        self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None, document_ids_BL: Tensor | None = None
    ) -> Tensor:
        """Scores [B, L, V] of the token that follows each position; arguments as in `forward_hidden`."""
        return self.lm_head(self.forward_hidden(input_ids_BL, attention_mask_BL, document_ids_BL))


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Draws initial weights, the same ones on every rank: normal(0, `model.initializer_range`), norms one, biases zero.

    What writes to the residual stream is scaled by 1 / sqrt(2 layers), so that depth does not inflate it (GPT-2).
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        std = config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            std /= (2 * config.num_hidden_layers) ** 0.5
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
