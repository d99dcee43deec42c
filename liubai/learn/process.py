"""Process reward models: is each step of an answer right? ("Let's verify step by step", arXiv 2305.20050.)

A step is judged at its last token, from the text up to there.

Left out: a third label for steps that are neither right nor wrong; the caller leaves them off the mask.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Aggregate = Literal["min", "product", "mean", "last"]


def step_loss(logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Binary cross-entropy ``[B, T]`` at the ends of steps, where the mask is True; 0 elsewhere. Label 1 or
    True: the step is right."""
    logits_BT = torch.where(mask_BT, logits_BT, 0.0)  # NaN off the mask has a gradient through exp
    losses_BT = F.binary_cross_entropy_with_logits(logits_BT, labels_BT.to(logits_BT.dtype), reduction="none")
    return torch.where(mask_BT, losses_BT, 0.0)


def aggregate(probabilities: Sequence[float], how: Aggregate) -> float:
    """The score of an answer from the probabilities that its steps are right; 0.0 of no steps.

    - ``min``: the weakest step (arXiv 2305.20050, appendix F; Math-Shepherd, arXiv 2312.08935).
    - ``product``: that all are right, were they independent (arXiv 2305.20050, §2.6); more steps, less.
    - ``mean``: forgives a wrong step among many.
    - ``last``: the last step's, which has seen all others (arXiv 2408.03314, §5.1).
    """
    if not probabilities:
        return 0.0
    if how == "min":
        return min(probabilities)
    if how == "product":
        return math.prod(probabilities)
    if how == "mean":
        return math.fsum(probabilities) / len(probabilities)
    return probabilities[-1]
