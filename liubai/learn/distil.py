"""On-policy distillation: how far the student is from the teacher at each token, over the whole vocabulary.

On the student's own samples the reverse divergence makes it give up what the teacher would not say (GKD,
arXiv 2306.13649; MiniLLM, arXiv 2306.08543); the forward one makes it cover all that the teacher would.
Nothing is differentiated through the sampling.

As in :mod:`liubai.learn.logprobs` the logits exist in chunks of tokens only, and where one chunk is not
all, they are computed again in the backward pass: memory does not grow with tokens × vocabulary.

Left out: temperatures, and mixtures of the two divergences.

Shapes: N tokens, V vocabulary, D and E the hidden sizes of student and teacher.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liubai.errors import UserError
from liubai.learn import logprobs
from liubai.model.matmul import linear

Divergence = Callable[[Tensor, Tensor], Tensor]


def reverse_kl(
    student_ND: Tensor, student_weight_VD: Tensor, teacher_NE: Tensor, teacher_weight_VE: Tensor
) -> Tensor:
    """``KL(π_student ‖ π_teacher) = Σ_v π_s (log π_s − log π_t)`` at each position, float32 ``[N]`` in nats,
    from hidden states and vocabulary projections. Gradients flow to the student only.

    Raises ``UserError`` where the two vocabularies are not of one size.
    """
    return _divergence(_reverse, student_ND, student_weight_VD, teacher_NE, teacher_weight_VE)


def forward_kl(
    student_ND: Tensor, student_weight_VD: Tensor, teacher_NE: Tensor, teacher_weight_VE: Tensor
) -> Tensor:
    """``KL(π_teacher ‖ π_student) = Σ_v π_t (log π_t − log π_s)``; else as :func:`reverse_kl`."""
    return _divergence(_forward, student_ND, student_weight_VD, teacher_NE, teacher_weight_VE)


def _reverse(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    # what the other half of the product's gradient gives sums to 0 in a softmax; left in, it is rounding
    # noise where the two agree, which Adam would make full steps of
    return torch.linalg.vecdot(student_NV.exp(), (student_NV - teacher_NV).detach())


def _forward(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return torch.linalg.vecdot(teacher_NV.exp(), teacher_NV - student_NV)


def _divergence(
    of: Divergence,
    student_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_NE: Tensor,
    teacher_weight_VE: Tensor,
) -> Tensor:
    ours, theirs = student_weight_VD.shape[0], teacher_weight_VE.shape[0]
    if ours != theirs:
        raise UserError(
            f"the student's vocabulary has {ours} tokens, the teacher's {theirs}: "
            "take a teacher with the student's tokenizer, or train on the teacher's texts instead"
        )

    dtype = student_weight_VD.dtype

    def of_chunk(student_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_NV = linear(teacher_NE, teacher_weight_VE).float().log_softmax(-1)
        return of(linear(student_ND, weight_VD.to(dtype)).float().log_softmax(-1), teacher_NV)

    step = max(1, logprobs.CHUNK_LOGITS // (2 * ours))  # the logits of both
    chunks = list(zip(student_ND.split(step), teacher_NE.split(step), strict=True))
    if len(chunks) == 1:  # small enough to keep
        return of_chunk(student_ND, student_weight_VD, teacher_NE)
    # the chunks' gradients of the head come together in float32, and are rounded once
    wide_VD = student_weight_VD.to(torch.promote_types(dtype, torch.float32))
    return torch.cat(
        [
            checkpoint(of_chunk, student, wide_VD, teacher, use_reentrant=False, preserve_rng_state=False)
            for student, teacher in chunks
        ]
    )
