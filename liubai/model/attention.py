"""Causal attention of a batch of rows, which may continue earlier keys and values.

PyTorch's fused kernel is made for long rows: on a CPU, a row of a hundred tokens costs it nearly
twice what plain matrix products cost. So short rows on a CPU are done here, block by block of
queries, each block against the keys up to its own end; everything else goes to PyTorch's kernel.

Shapes: B rows, T queries, S = lead + T keys (``lead`` of them from before the row), H query heads,
K key/value heads, G = H/K, E head size.
"""

# mypy: disable-error-code="override,no-untyped-call,no-any-return"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

#: Rows of more keys than this are long: their weights ``[B, H, T, S]`` are not worth keeping.
SHORT = 384
#: Queries that are done together. A block of n wastes n/2 of the keys that it looks at.
BLOCK = 64


def attention(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> Tensor:
    """``softmax(q·kᵀ/√E + mask)·v``, ``[B, T, H, E]`` (Vaswani et al. 2017, eq. 1; grouped heads:
    Ainslie et al. 2023). Query t sees keys ``0 … S − T + t``."""
    T, S = q_BTHE.shape[1], k_BSKE.shape[1]
    if q_BTHE.device.type == "cpu" and S <= SHORT and q_BTHE.dtype in (torch.float32, torch.float64):
        if torch.is_grad_enabled():
            return _Blocked.apply(q_BTHE, k_BSKE, v_BSKE)
        return _forward(q_BTHE, k_BSKE, v_BSKE)[0]
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


def _forward(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, keep: bool = False
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The output and, to ``keep``, each block's queries and weights, heads first."""
    T, H, E = q_BTHE.shape[1:]
    S, K = k_BSKE.shape[1:3]
    k_RSE, v_RSE = _heads_first(k_BSKE), _heads_first(v_BSKE)
    out_BTHE = torch.empty(q_BTHE.shape, dtype=q_BTHE.dtype)
    kept = []
    for start, stop, seen in _blocks(T, S):
        q_RnE = _grouped(q_BTHE[:, start:stop], K)
        future_nS = torch.full((stop - start, seen), -torch.inf, dtype=q_RnE.dtype).triu_(S - T + start + 1)
        scores_RnS = torch.baddbmm(
            future_nS.repeat(H // K, 1), q_RnE, k_RSE[:, :seen].transpose(1, 2), alpha=E**-0.5
        )
        weights_RnS = torch.softmax(scores_RnS, -1)
        _ungroup(torch.bmm(weights_RnS, v_RSE[:, :seen]), out_BTHE[:, start:stop])
        if keep:
            kept.append((q_RnE, weights_RnS))
    return out_BTHE, kept


def _blocks(T: int, S: int) -> list[tuple[int, int, int]]:
    """First query, last query + 1, and how many keys the block sees."""
    return [(i, min(i + BLOCK, T), S - T + min(i + BLOCK, T)) for i in range(0, T, BLOCK)]


class _Blocked(Function):
    @staticmethod
    def forward(ctx: Any, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> Tensor:
        out_BTHE, kept = _forward(q_BTHE, k_BSKE, v_BSKE, keep=True)
        ctx.save_for_backward(k_BSKE, v_BSKE, *(t for pair in kept for t in pair))
        return out_BTHE

    @staticmethod
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_BSKE, v_BSKE, *kept = ctx.saved_tensors
        B, T, _, E = grad_BTHE.shape
        S, K = k_BSKE.shape[1:3]
        k_RSE, v_RSE = _heads_first(k_BSKE), _heads_first(v_BSKE)
        of_q_BTHE = torch.empty(grad_BTHE.shape, dtype=grad_BTHE.dtype)
        of_k_RSE, of_v_RSE = torch.zeros_like(k_RSE), torch.zeros_like(v_RSE)
        for block, (start, stop, seen) in enumerate(_blocks(T, S)):
            q_RnE, weights_RnS = kept[2 * block : 2 * block + 2]
            grad_RnE = _grouped(grad_BTHE[:, start:stop], K)
            of_weights_RnS = torch.bmm(grad_RnE, v_RSE[:, :seen].transpose(1, 2))
            of_scores_RnS = torch._softmax_backward_data(of_weights_RnS, weights_RnS, -1, weights_RnS.dtype)
            of_scores_RnS *= E**-0.5
            _ungroup(torch.bmm(of_scores_RnS, k_RSE[:, :seen]), of_q_BTHE[:, start:stop])
            # a product, then a sum: baddbmm_ into a part of each matrix goes one matrix at a time
            of_k_RSE[:, :seen] += torch.bmm(of_scores_RnS.transpose(1, 2), q_RnE)
            of_v_RSE[:, :seen] += torch.bmm(weights_RnS.transpose(1, 2), grad_RnE)
        of_k_BSKE, of_v_BSKE = (t.view(B, K, S, E).transpose(1, 2) for t in (of_k_RSE, of_v_RSE))
        return of_q_BTHE, of_k_BSKE, of_v_BSKE


def _heads_first(x_BSKE: Tensor) -> Tensor:
    """``[B, S, K, E]`` as ``[B·K, S, E]``."""
    return x_BSKE.transpose(1, 2).flatten(0, 1)


def _grouped(x_BnHE: Tensor, K: int) -> Tensor:
    """``[B, n, H, E]`` as ``[B·K, G·n, E]``: the queries that share a key head, one after another."""
    B, n, H, E = x_BnHE.shape
    return x_BnHE.reshape(B, n, K, H // K, E).permute(0, 2, 3, 1, 4).reshape(B * K, H // K * n, E)


def _ungroup(x_RnE: Tensor, out_BnHE: Tensor) -> None:
    """The reverse, into ``out_BnHE``."""
    B, n, H, E = out_BnHE.shape
    K = x_RnE.shape[0] // B
    out_BnHE.view(B, n, K, H // K, E).copy_(x_RnE.view(B, K, H // K, n, E).permute(0, 3, 1, 2, 4))
