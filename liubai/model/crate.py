"""CRATE: a layer that is derived and not found, as a drop-in for the Transformer's.

Yu et al. 2023 (arXiv 2306.01129, eqs. 10-17) ask of a layer that it raises the *rate reduction* of the tokens
while it makes them sparse, and get one step of two known algorithms. For tokens as rows, Z [T, D]:

*Compression.* Each head k has a subspace U_k [D, E]; **one** projection is query, key and value::

    S_k   = softmax((Z U_k)(Z U_k)ᵀ / √E) (Z U_k)        # MSSA, causal
    Z'    = Z + [S_1 … S_H] W

*Sparsification.* ISTA for ``min ½|y − D a|² + λ|a|₁, a ≥ 0`` with a dictionary D [D, M]. Two steps from
a = 0, as in CRATE-LM (Bai & Ma 2024, arXiv 2410.16443), with y = norm(Z')::

    a₁ = relu(η Dᵀy − ηλ)
    a₂ = relu(a₁ + η(Dᵀy − DᵀD a₁) − ηλ)

``CrateForCausalLM`` goes on with D a₂ and nothing else; ``CrateAlphaForCausalLM`` (Yang et al. 2024,
arXiv 2405.20299) with Z' + D₁ a₂ and a dictionary D₁ of its own for the way back.

RMSNorm stands where the papers have LayerNorm, as in the other blocks. Positions turn the copies of Z U_k
that are compared and not the one that is summed, so the cache holds both. No other program knows this
architecture: config.json says ``model_type: liubai_crate``, and export to GGUF refuses it. Left out on
purpose: biases, ToST.
"""

from __future__ import annotations

from torch import Tensor, nn

from liubai.model.blocks import Layer
from liubai.model.config import ModelConfig
from liubai.model.functions import rotate
from liubai.model.matmul import Linear, linear

STEP = 0.1  #: η
THRESHOLD = 0.1  #: λ


class SubspaceAttention(nn.Module):
    """MSSA: ``u_proj`` holds all U_k, ``[H·E, D]``; ``o_proj`` is W."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.num_attention_heads * config.head_dim
        self.head_dim = config.head_dim
        self.u_proj = Linear(config.hidden_size, size, bias=False)
        self.o_proj = Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value: the same but for the turn."""
        u = self.u_proj(x).unflatten(-1, (-1, self.head_dim))
        turned = rotate(u, *rope)
        return turned, turned, u


class SparseCode(nn.Module):
    """Two ISTA steps: ``[..., D]`` -> the code ``[..., M]``, not negative, mostly zero.

    ``dictionary`` holds Dᵀ, ``[M, D]``: an atom a row.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dictionary = Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        seen = self.dictionary(y)  # Dᵀy is needed twice
        first = (STEP * (seen - THRESHOLD)).relu()
        again = self.dictionary(self.back(first))
        second: Tensor = (first + STEP * (seen - again - THRESHOLD)).relu()
        return second

    def back(self, code: Tensor) -> Tensor:
        """D a: what the code stands for, ``[..., D]``."""
        dictionary_DM: Tensor = self.dictionary.weight.t()
        found: Tensor = linear(code, dictionary_DM)
        return found


class CrateBlock(Layer):
    self_attn: SubspaceAttention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, SubspaceAttention(config))
        self.code = SparseCode(config)
        self.residual = config.architecture == "CrateAlphaForCausalLM"
        if self.residual:
            self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        code = self.code(self.post_attention_layernorm(x))
        return x + self.down_proj(code) if self.residual else self.code.back(code)  # type: ignore[no-any-return]
