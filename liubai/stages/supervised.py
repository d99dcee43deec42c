"""The loop of every stage that learns from given examples: pre-training, SFT, reward models, DPO.

What an example is and what is lost on it, the stage says (a :class:`Lesson`); this is the rest: steps,
replicas, a schedule, non-finite gradients, numbers, resume points.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from liubai.errors import Diverged
from liubai.learn.logprobs import batch_logprobs
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Batch
from liubai.learn.replicas import Replicas
from liubai.model.transformer import Transformer
from liubai.stages.config import MAX_SKIPPED
from liubai.stages.context import Context

Item = TypeVar("Item")


class Lesson(Protocol, Generic[Item]):
    """What is to be learned. Sums over an item are added up over the step; ``loss`` and ``tokens`` are always
    among them."""

    def items(self, step: int) -> list[Item]:
        """The micro-batches of a step: a pure function of it, so that a run can go on anywhere."""

    def learn(self, model: Transformer, items: Sequence[Item]) -> list[dict[str, float]]:
        """Add the gradient of some items to the model's; the sums to log, an item each."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to log beside loss, tokens and speed."""


def train(
    context: Context,
    model: Transformer,
    optimizer: Optimizer,
    lesson: Lesson[Any],
    *,
    steps: int,
    save_every: int,
    scale: Callable[[int], float],
    also: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> None:
    """Learn for ``steps`` steps, from the last resume point on. ``scale(step)`` multiplies the learning rate;
    ``also(steps done)`` gives more to log. Raises ``Diverged`` after ``MAX_SKIPPED`` steps in a row without a
    finite gradient."""
    tokens, first, skipped = 0, 0, 0
    if state := context.restore():
        model.load_state_dict(under("model/", state.tensors))
        optimizer.load_state_dict(under("optimizer/", state.tensors))
        tokens, first, skipped = state.meta["tokens"], state.step, state.meta["skipped"]
    replicas = Replicas(model)
    for step in range(first, steps):
        begun = time.perf_counter()
        sums: dict[str, float] = defaultdict(float)
        for found in replicas.map(lesson.learn, lesson.items(step)):
            for name, value in found.items():
                sums[name] += value
        loss, read = sums["loss"], int(sums["tokens"])
        if not math.isfinite(loss):
            optimizer.zero_grad()
        norm = optimizer.step(scale(step)) if math.isfinite(loss) else math.nan
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped:
            context.warn(f"step {step + 1}: loss or gradient was not finite; nothing was changed")
        if skipped >= MAX_SKIPPED:
            raise Diverged(f"{MAX_SKIPPED} steps in a row were not finite; lower {optimizer.rates}")
        tokens += read
        metrics = {
            "loss": loss,
            **lesson.metrics(sums),
            "lr": optimizer.lr * scale(step),
            "grad_norm": norm,
            "tokens": tokens,
            "tokens/s": read / (time.perf_counter() - begun),
        }
        context.log(step + 1, steps, metrics | dict(also(step + 1)))
        if (step + 1) % save_every == 0 and step + 1 < steps:
            context.save(
                step + 1,
                {f"model/{n}": t for n, t in model.state_dict().items()}
                | {f"optimizer/{n}": t for n, t in optimizer.state_dict().items()},
                {"tokens": tokens, "skipped": skipped},
            )
    optimizer.widen_parameters()


class NextToken:
    """Cross-entropy of the tokens on the mask, the mean over those of the whole step: how it is cut into
    micro-batches changes nothing. ``batches(step)`` gives them."""

    def __init__(self, batches: Callable[[int], list[Batch]]) -> None:
        self.batches = batches

    def items(self, step: int) -> list[tuple[Batch, float]]:
        batches = self.batches(step)
        weight = 1 / max(1, sum(int(b.mask_BT.sum()) for b in batches))
        return [(batch, weight) for batch in batches]

    def learn(self, model: Transformer, items: Sequence[tuple[Batch, float]]) -> list[dict[str, float]]:
        found = []
        for batch, weight in items:
            logprobs_BT, _ = batch_logprobs(model, batch.to(model.head_weight.device))
            loss = -logprobs_BT.sum() * weight
            loss.backward()  # type: ignore[no-untyped-call]
            found.append({"loss": float(loss.detach()), "tokens": float(batch.mask_BT.sum())})
        return found

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {}


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
