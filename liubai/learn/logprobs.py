"""Log-probabilities of given tokens without the ``[tokens, vocabulary]`` wall.

The vocabulary projection is done in chunks of tokens, and where one chunk is not all, done again in
the backward pass, so memory does not grow with batch × length × vocabulary (the classic out-of-memory
of RL trainers).
Shapes: N tokens, D hidden, V vocabulary.
"""

# mypy: disable-error-code="override,no-untyped-call,no-any-return"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from liubai.learn.packing import Batch
from liubai.model import kernels
from liubai.model.matmul import outer_product, product
from liubai.model.transformer import Attend, Transformer, causal

#: At most this many logits are computed at a time (16 Mi float32 = 64 MiB).
CHUNK_LOGITS = 1 << 24


class _TokenLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        temperature: float,
        entropy_learns: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(targets_N.shape[0], dtype=torch.float32, device=hidden_ND.device)
        entropy = torch.empty_like(logprobs)
        probs = logprobs.new_empty(0)
        for rows in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
            logits = product(hidden_ND[rows], weight_VD).float()
            logprobs[rows], entropy[rows], probs = _read(logits, targets_N[rows], temperature)
        # one chunk is small enough to keep; of several, none is kept
        kept = probs if len(probs) == len(logprobs) else None
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, kept, entropy)
        ctx.temperature, ctx.entropy_learns = temperature, entropy_learns
        if not entropy_learns:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor, of_entropy_N: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden_ND, weight_VD, targets_N, kept, entropy_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        # of one chunk the whole product; of several a sum, a part of the vocabulary at a time, in float32
        learns = ctx.needs_input_grad[1]
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if learns and kept is None else None
        for rows in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
            probs = kept
            if probs is None:
                logits = product(hidden_ND[rows], weight_VD).float()
                probs = _read(logits, targets_N[rows], ctx.temperature)[2]
            grad = _write(grad_N[rows], probs, targets_N[rows], ctx.temperature)
            if ctx.entropy_learns:
                grad -= _entropy_write(of_entropy_N[rows], probs, entropy_N[rows]) / ctx.temperature
            grad = grad.to(hidden_ND.dtype)
            grad_hidden[rows] = product(grad, weight_VD.T)
            if learns and kept is not None:
                grad_weight = outer_product(grad, hidden_ND[rows])
            elif grad_weight is not None:
                for part in _chunks(weight_VD.shape[0], weight_VD.shape[1]):
                    grad_weight[part] += outer_product(grad[:, part], hidden_ND[rows])
        if learns:
            grad_weight = torch.zeros_like(weight_VD) if grad_weight is None else grad_weight
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None


def _read(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, entropies, probabilities. ``logits_NV`` is used up."""
    if kernels.ready(logits_NV):
        return *kernels.token_logprobs(logits_NV, targets_N.contiguous(), temperature), logits_NV
    full_NV = logits_NV.div_(temperature).log_softmax(-1)
    probs_NV = full_NV.exp()
    return full_NV.gather(1, targets_N[:, None])[:, 0], -torch.linalg.vecdot(probs_NV, full_NV), probs_NV


def _write(grad_N: Tensor, probs_NV: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """d/d logits of ``grad · logprobs``: (onehot − p) · grad / temperature."""
    if kernels.ready(grad_N, probs_NV):
        return kernels.token_logprobs_backward(grad_N, probs_NV, targets_N.contiguous(), temperature)
    scale_N1 = grad_N[:, None] / temperature
    return (probs_NV * -scale_N1).scatter_add_(1, targets_N[:, None], scale_N1)


def _entropy_write(grad_N: Tensor, probs_NV: Tensor, entropy_N: Tensor) -> Tensor:
    """−d/d(logits/T) of ``grad · H``: ``p · (log p + H) · grad``; 0 where p is, as p·log p is."""
    surprise_NV = torch.where(probs_NV > 0, probs_NV.log(), 0.0) + entropy_N[:, None]
    return probs_NV * surprise_NV * grad_N[:, None]


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Rows of a matrix in parts of at most ``CHUNK_LOGITS`` numbers."""
    step = max(1, CHUNK_LOGITS // width)
    return (slice(i, i + step) for i in range(0, rows, step))


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    entropy_learns: bool = False,
) -> tuple[Tensor, Tensor]:
    """``log softmax(hidden @ weightᵀ / temperature)`` at ``targets_N``, and the entropy, both
    float32 ``[N]`` in nats. Gradients flow through the first only, unless ``entropy_learns``: entropy is
    an instrument first."""
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, temperature, entropy_learns)


def batch_logprobs(
    model: Transformer,
    batch: Batch,
    temperature: float = 1.0,
    attend: Attend | None = None,
    *,
    entropy_learns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the batch's targets and the entropies there, ``[B, T]``, 0 off the mask.
    Rows that continue something need its ``attend``."""
    attend = attend or causal(batch.attention_documents)
    hidden_BTD = model.hidden(batch.ids_BT, batch.positions_BT, attend)
    # nearly every position is on the mask: picking them out would cost more than the few others
    logprobs_N, entropy_N = token_logprobs(
        hidden_BTD.flatten(0, 1), model.head_weight, batch.targets_BT.flatten(), temperature, entropy_learns
    )
    logprobs_BT, entropy_BT = (
        torch.where(batch.mask_BT, values_N.view(batch.mask_BT.shape), 0.0)
        for values_N in (logprobs_N, entropy_N)
    )
    return logprobs_BT, entropy_BT
