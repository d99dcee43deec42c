"""The decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU.

One class covers Llama, Qwen2 (qkv bias) and Qwen3 (q/k norm). Everything but attention works
token by token, so the same code runs a packed training row ``[B, T]`` and a decoding batch
``[N]``; who attends to whom is a strategy, :data:`Attend`, which the caller passes in. Left out on
purpose: dropout, sliding windows, mixture of experts, any parallelism.

Shapes: B rows, T tokens, D hidden, H query heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from liubai.model.attention import attention
from liubai.model.config import Llama3Rope, ModelConfig
from liubai.model.functions import rms_norm, rotate, swiglu
from liubai.model.matmul import Linear, linear

#: (layer, q [..., H, E], k [..., K, E], v [..., K, E]) -> [..., H, E]; q and k are already rotated.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def rope_table(
    length: int, head_dim: int, theta: float, scaling: Llama3Rope | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (Su et al. 2021, eq. 34), half-split layout, ``[length, 1, E]`` each, as
    :func:`liubai.model.functions.rotate` wants them.

    The angles are computed in float64: at position 10⁵ float32 angles are off by 10⁻².
    """
    speed = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling:
        speed = _stretched(speed, scaling)
    angles = torch.arange(length, dtype=torch.float64)[:, None, None] * speed
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _stretched(speed: Tensor, scaling: Llama3Rope) -> Tensor:
    """Radians a position, for Llama 3.1's long contexts: a pair that turns fewer than ``low_freq_factor``
    times within the original length turns ``factor`` times more slowly, one that turns more than
    ``high_freq_factor`` times as before."""
    turns = scaling.original_max_position_embeddings * speed / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * speed + (1 - kept) * speed / scaling.factor


class RMSNorm(nn.Module):
    """Holds the weight of :func:`liubai.model.functions.rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.qk_norm = c.qk_norm

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(layer, rotate(q, *rope), rotate(k, *rope), v)
        return self.o_proj(out.flatten(-2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """``model(ids_BT) -> logits_BTV``. ``hidden`` and ``head`` are its two halves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rope = rope_table(0, config.head_dim, config.rope_theta, config.rope_scaling)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection ``[V, D]``, tied to the embedding or free."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The last hidden state ``[..., D]`` of ``ids [...]`` at ``positions [...]``."""
        x = self.embed_tokens(ids)
        cos, sin = self._rope_until(int(positions.max()) + 1, x)
        rope = cos[positions], sin[positions]
        for layer, block in enumerate(self.layers):
            x = block(x, rope, layer, attend)
        return self.norm(x)  # type: ignore[no-any-return]

    def _rope_until(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rope
        if cos.shape[0] < length or cos.dtype != like.dtype or cos.device != like.device:
            length = max(256, 1 << (length - 1).bit_length())
            # an ordinary tensor even when an engine asks first: training may use it later
            with torch.inference_mode(False), torch.no_grad():
                c = self.config
                cos, sin = rope_table(length, c.head_dim, c.rope_theta, c.rope_scaling)
                self._rope = cos.to(like.device, like.dtype), sin.to(like.device, like.dtype)
        return self._rope

    def head(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.head_weight)

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """Logits ``[B, T, V]``. ``documents_BT`` numbers the documents of packed rows."""
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self.head(self.hidden(ids_BT, positions_BT, causal(documents_BT)))

    def count_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def causal(documents_BT: Tensor | None = None) -> Attend:
    """Causal attention over ``[B, T, heads, E]``; with documents, only within one document.

    Right padding needs no mask under causality: no real token ever looks at a later one.
    """
    if documents_BT is None:
        return lambda layer, q, k, v: attention(q, k, v)
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    mask_B1TT = same_BTT.tril_()[:, None]
    # additive, made once: from a boolean mask every layer would make its own
    bias_B1TT = torch.zeros(mask_B1TT.shape, device=documents_BT.device).masked_fill_(~mask_B1TT, -torch.inf)

    def attend(layer: int, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        out_BHTE = F.scaled_dot_product_attention(
            q_BTHE.transpose(1, 2),
            k_BTKE.transpose(1, 2),
            v_BTKE.transpose(1, 2),
            attn_mask=bias_B1TT.to(q_BTHE.dtype),
            enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
        )
        return out_BHTE.transpose(1, 2)

    return attend


def build(config: ModelConfig, seed: int) -> Transformer:
    """A fresh model. Linear weights ~ N(0, 1/fan_in), embeddings and head N(0, 0.02²), residual
    outputs and biases zero.

    Zero residual outputs make the first steps those of a bigram model, which trains stably at the
    learning rates that Muon likes.
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", ".bias")):
                p.zero_()
            elif name == "embed_tokens.weight" or name == "lm_head.weight":
                p.normal_(0.0, 0.02, generator=generator)
            elif p.ndim == 2:
                p.normal_(0.0, p.shape[1] ** -0.5, generator=generator)
    return model
