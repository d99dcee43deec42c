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
    T, S = q_BTHE.shape[1], k_BSKE.shape[1]
    if S <= SHORT and kernels.ready(q_BTHE, k_BSKE, v_BSKE):
        if torch.is_grad_enabled():
            return _Short.apply(q_BTHE, k_BSKE, v_BSKE)
        return kernels.attention(q_BTHE, k_BSKE, v_BSKE)[0]
    mask_TS = None
    if S > T:  # the kernel's own causal mask begins at the first key
        mask_TS = torch.ones(T, S, dtype=torch.bool, device=q_BTHE.device).tril_(S - T)
    return F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=mask_TS,
        is_causal=mask_TS is None,
        enable_gqa=q_BTHE.shape[2] != k_BSKE.shape[2],
    ).transpose(1, 2)


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
