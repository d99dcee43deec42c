"""Causal attention of a batch of rows, which may continue earlier keys and values.

PyTorch's fused kernel is made for long rows: on a CPU, a row of a hundred tokens costs it many times what
its products cost. Short rows there go to a kernel of our own (``kernels.c``), everything else to PyTorch.

Shapes: B rows, T queries, S = lead + T keys (``lead`` of them from before the row), H query heads,
K key/value heads, E head size.
"""

# mypy: disable-error-code="override,no-untyped-call,no-any-return"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from liubai.model import kernels

#: Rows of more keys than this are long: the backward kernel keeps ``[T, S]`` weights of one head at a time.
SHORT = 384


def attention(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> Tensor:
    """``softmax(q·kᵀ/√E + mask)·v``, ``[B, T, H, E]`` (Vaswani et al. 2017, eq. 1; grouped heads:
    Ainslie et al. 2023). Query t sees keys ``0 … S − T + t``."""
    if k_BSKE.shape[1] <= SHORT and kernels.ready(q_BTHE, k_BSKE, v_BSKE):
        if torch.is_grad_enabled():
            return _Short.apply(q_BTHE, k_BSKE, v_BSKE)
        return kernels.attention(q_BTHE, k_BSKE, v_BSKE)[0]
    # a GPU's kernel that knows grouped heads takes 16 bits alone; beside it is only the plain formula, which
    # writes down every weight
    groups = q_BTHE.device.type == "cpu" or q_BTHE.dtype in (torch.bfloat16, torch.float16)
    return fused(q_BTHE, k_BSKE, v_BSKE, groups)


def fused(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, groups: bool) -> Tensor:
    """The same by PyTorch's kernels. ``groups``: do they know grouped heads? Otherwise each key/value head is
    repeated for its queries."""
    T, S = q_BTHE.shape[1], k_BSKE.shape[1]
    size = q_BTHE.shape[2] // k_BSKE.shape[2]
    if size > 1 and not groups:
        k_BSKE, v_BSKE = (t.repeat_interleave(size, 2) for t in (k_BSKE, v_BSKE))
    # the kernels' own causal mask begins at the first key; this one ends at the last, and costs no memory
    # where they know it
    bias = _lower_right(T, S) if S > T else None
    return F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=bias,
        is_causal=bias is None,
        enable_gqa=size > 1 and groups,
    ).transpose(1, 2)


def _lower_right(T: int, S: int) -> Tensor:
    # imported here: it brings PyTorch's compiler with it, half of the time that a process needs to start
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(T, S)


class _Short(Function):
    @staticmethod
    def forward(ctx: Any, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> Tensor:
        out_BTHE, lse_BHT = kernels.attention(q_BTHE, k_BSKE, v_BSKE)
        ctx.save_for_backward(q_BTHE, k_BSKE, v_BSKE, out_BTHE, lse_BHT)
        return out_BTHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.attention_backward(grad_BTHE.contiguous(), *ctx.saved_tensors)
