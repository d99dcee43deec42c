"""The decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU.

One class covers Llama, Qwen2 (qkv bias), Qwen3 (q/k norm) and, with blocks of its own
(:mod:`liubai.model.crate`), the white-box CRATE. Everything but attention works token by token, so
the same code runs a packed training row ``[B, T]`` and a decoding batch ``[N]``; who attends to whom
is a strategy, :data:`Attend`, which the caller passes in. Left out on purpose: dropout, sliding
windows, mixture of experts, any parallelism.

Shapes: B rows, T tokens, D hidden, H query heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from liubai.errors import UserError
from liubai.model.attention import attention
from liubai.model.blocks import Attend as Attend
from liubai.model.blocks import Block, Embedding, RMSNorm
from liubai.model.config import Llama3Rope, ModelConfig
from liubai.model.crate import CrateBlock
from liubai.model.matmul import Linear, linear

#: a vocabulary projection of so many numbers is worth some care
MANY = 1 << 24


def rope_table(
    length: int, head_dim: int, theta: float, scaling: Llama3Rope | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (Su et al. 2021, eq. 34), half-split layout, ``[length, 1, E]`` each, as
    :func:`liubai.model.functions.rotate` wants them.

    The angles are computed in float64: at position 10⁵ float32 angles are off by 10⁻².
    """
    speed = _speed(head_dim, theta)
    if scaling:
        speed = _stretched(speed, scaling)
    angles = torch.arange(length, dtype=torch.float64)[:, None, None] * speed
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _speed(head_dim: int, theta: float) -> Tensor:
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def _stretched(speed: Tensor, scaling: Llama3Rope) -> Tensor:
    """Radians a position, for Llama 3.1's long contexts: a pair that turns fewer than ``low_freq_factor``
    times within the original length turns ``factor`` times more slowly, one that turns more than
    ``high_freq_factor`` times as before."""
    turns = scaling.original_max_position_embeddings * speed / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * speed + (1 - kept) * speed / scaling.factor


def rope_slowing(head_dim: int, theta: float, scaling: Llama3Rope) -> Tensor:
    """How many times more slowly each pair turns, ``[E/2]``: what llama.cpp calls frequency factors."""
    speed = _speed(head_dim, theta)
    return (speed / _stretched(speed, scaling)).float()


class Transformer(nn.Module):
    """``model(ids_BT) -> logits_BTV``. ``hidden`` and ``head`` are its two halves.

    ``computes`` is the precision in which it will compute where its weights are kept in another one.
    With ``checkpointing``, training keeps only what goes into each block and computes the rest again in the
    backward pass (Chen et al. 2016, arXiv 1604.06174): a fifth more time, a small part of the activations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.computes: torch.dtype | None = None
        self._decoding: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.block: type[Block | CrateBlock] = CrateBlock if config.crate else Block
        self.layers = nn.ModuleList(self.block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rope = torch.empty(0), torch.empty(0)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection ``[V, D]``, tied to the embedding or free."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.computes or self.head_weight.dtype

    @property
    def fewest_rows(self) -> int:
        """Rows that a decoding step should have at least: torch.compile takes one row for another shape."""
        return 2 if self._decoding else 1

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The last hidden state ``[..., D]`` of ``ids [...]`` at ``positions [...]``."""
        x = embed(ids, self.embed_tokens.weight)
        # to ask a GPU for the largest would be to wait for it: there the table holds every position
        on_cpu = x.device.type == "cpu"
        reach = int(positions.max()) + 1 if on_cpu else self.config.max_position_embeddings
        cos, sin = self._rope_until(reach, x)
        rope = cos[positions], sin[positions]
        learns = torch.is_grad_enabled()
        for layer, block in enumerate(self.layers):
            if self._decoding and ids.ndim == 1 and not learns:
                before, after = self._decoding
                x = after(block, x, attend(layer, *before(block, x, rope)))
            elif self.checkpointing and learns:
                x = checkpoint(block, x, rope, layer, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, layer, attend)
        return self.norm(x)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def compile_decoding(self) -> None:
        """From now on, steps of one token a row run by ``torch.compile``: what stands between the matrix
        products of a layer becomes a few kernels, before attention and after it. One compilation serves
        all layers and all numbers of rows. Raises ``UserError`` where it does not work."""
        before: Callable[..., Any] = torch.compile(self.block.before, dynamic=True)
        after: Callable[..., Any] = torch.compile(self.block.after, dynamic=True)
        x = self.head_weight.new_zeros(3, self.config.hidden_size)
        cos, sin = self._rope_until(3, x)
        positions = torch.arange(3, device=x.device)
        try:
            q, _, _ = before(self.layers[0], x, (cos[positions], sin[positions]))
            after(self.layers[0], x, q)
        except Exception as error:  # from a compiler, of many kinds
            raise UserError(
                f"compile = true does not work here ({str(error).strip().splitlines()[0]}); it needs a C++ "
                "compiler, on a GPU Triton. Leave it out"
            ) from error
        self._decoding = before, after

    def _rope_until(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rope
        if cos.shape[0] < length or cos.dtype != like.dtype or cos.device != like.device:
            length = max(256, 1 << (length - 1).bit_length())
            # an ordinary tensor even when an engine asks first: training may use it later
            with torch.inference_mode(False), torch.no_grad():
                c = self.config
                cos, sin = rope_table(length, c.head_dim, c.rope_theta, c.rope_scaling)
                cos, sin = cos.to(like.device, like.dtype), sin.to(like.device, like.dtype)
            self._rope = cos, sin
        # not self._rope: another thread may have put a shorter table there
        return cos, sin

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


def embed(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the embedding, ``[..., D]``.

    What a large one learns here are the rows of a few tokens. Autograd would make a gradient of the
    whole size for them and, where the head shares the weight, another for the sum; here they are added to
    ``weight.grad`` as soon as they are known (by ``backward()`` alone: ``torch.autograd.grad`` misses them).
    """
    learns = torch.is_grad_enabled() and weight_VD.requires_grad
    # gradients of 16 bits must come by way of the optimizer's hook, to be added up in 32
    if not learns or weight_VD.numel() < MANY or weight_VD.dtype != torch.float32:
        return F.embedding(ids, weight_VD)

    def add(rows: Tensor) -> None:
        grad, rows.grad = rows.grad, None
        assert grad is not None
        weight_VD.grad = grad.to_dense() if weight_VD.grad is None else weight_VD.grad.add_(grad)

    same_VD = weight_VD.detach().requires_grad_()
    same_VD.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
    return F.embedding(ids, same_VD, sparse=True)


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
