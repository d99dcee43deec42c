"""A layer of the Transformer: what comes before attention, and what comes after it.

Shapes: D hidden, H query heads, K key/value heads, E head size; rows and tokens stand before them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from liubai.model.config import ModelConfig
from liubai.model.functions import rms_norm, rotate, swiglu
from liubai.model.matmul import Linear

#: (layer, q [..., H, E], k [..., K, E], v [..., K, E]) -> [..., H, E]; q and k are already rotated.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Embedding(nn.Embedding):
    """``nn.Embedding`` that begins at zero: its weights are drawn by whoever builds a model, or read. Normal
    numbers of no device, where a model is its shapes alone, would bring PyTorch's compiler with them, half of
    the time that a process needs to start."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What attention works on: q and k, rotated, and v."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rope), rotate(k, *rope), v


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class Layer(nn.Module, ABC):
    """What every kind of layer has: two norms, projections for attention (``self_attn``), and the order of
    its two halves."""

    def __init__(self, config: ModelConfig, self_attn: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        return self.after(x, attend(layer, *self.before(x, rope)))

    def before(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn(self.input_layernorm(x), rope)  # type: ignore[no-any-return]

    @abstractmethod
    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """What goes to the next layer. ``attended [..., H, E]`` is what attention returned."""


class Block(Layer):
    self_attn: Attention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Attention(config))
        self.mlp = MLP(config)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]
