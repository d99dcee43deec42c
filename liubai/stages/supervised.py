"""The loop of every stage that learns from given examples: pre-training, SFT, reward models, DPO.

What an example is and what is lost on it, the stage says (a :class:`Lesson`); this is the rest: steps,
replicas, a schedule, memory that runs out, non-finite gradients, numbers, resume points.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from liubai import ranks
from liubai.errors import Diverged, UserError, is_out_of_memory
from liubai.learn.logprobs import batch_logprobs
from liubai.learn.memory import Lot, map_within_memory
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Batch, Sequence1, stacked
from liubai.learn.replicas import Replicas
from liubai.learn.sharded import settle, tokens_of
from liubai.model.transformer import Transformer
from liubai.seeds import stream
from liubai.stages.config import MAX_SKIPPED
from liubai.stages.context import Context

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lesson(Protocol, Generic[Item]):
    """What is to be learned. Sums over an item are added up over the step; ``loss`` and ``tokens`` are always
    among them."""

    def items(self, step: int, tokens: int) -> list[Item]:
        """The micro-batches of a step, of at most so many tokens or of one example: a pure function of both,
        so that a run can go on anywhere."""

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
    tokens: int,
    save_every: int,
    scale: Callable[[int], float],
    look: Callable[[], Mapping[str, float]] = dict,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Learn for ``steps`` steps, from the last resume point on, in micro-batches of ``tokens`` tokens, or of
    half as many where memory runs out. ``scale(step)`` multiplies the learning rate; ``look()``
    gives more to log wherever a resume point is due, and at the end; ``after(step)`` is called
    after every step. Raises ``Diverged`` after
    ``MAX_SKIPPED`` steps in a row without a finite gradient, ``UserError`` when one example alone does not
    fit the memory."""

    def held() -> dict[str, torch.Tensor]:
        settle(model)
        return {f"model/{n}": t for n, t in optimizer.weights().items()} | {
            f"optimizer/{n}": t for n, t in optimizer.state_dict().items()
        }

    seen, first, skipped = 0, 0, 0
    if state := context.restore(held()):
        optimizer.load_weights(under("model/", state.tensors))
        optimizer.load_state_dict(under("optimizer/", state.tensors))
        seen, first, skipped = state.meta["tokens"], state.step, state.meta["skipped"]
        # sums of the same parts, to the last bit
        tokens = min(tokens, state.meta["microbatch"])
    replicas = Replicas(model)
    for step in range(first, steps):
        begun = time.perf_counter()
        sums: dict[str, float] = defaultdict(float)
        listed, fit = _within_memory(replicas, optimizer, lesson, step, tokens)
        if fit < tokens:
            tokens = fit
            context.warn(
                f"step {step + 1}: memory ran out; micro-batches now have {tokens} tokens. Nothing was lost"
            )
        for found in listed:
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
        seen += read
        metrics = {
            "loss": loss,
            **lesson.metrics(sums),
            "lr": optimizer.lr * scale(step),
            "grad_norm": norm,
            "tokens": seen,
            "tokens/s": read / (time.perf_counter() - begun),
        }
        after(step + 1)
        due = (step + 1) % save_every == 0 or step + 1 == steps
        context.log(step + 1, steps, metrics | (dict(look()) if due else {}))
        if (step + 1) % save_every == 0 and step + 1 < steps:
            context.save(step + 1, held(), {"tokens": seen, "skipped": skipped, "microbatch": tokens})
    optimizer.widen_parameters()


def _within_memory(
    replicas: Replicas, optimizer: Optimizer, lesson: Lesson[Any], step: int, tokens: int
) -> tuple[list[dict[str, float]], int]:
    """What there is to log of the step's items, whose gradients are the model's then, and the size of the
    micro-batches that they fit the memory with. Raises ``UserError`` when one example alone does not."""
    while True:
        items = _items(lesson, step, tokens)
        try:
            return replicas.map(lesson.learn, items), tokens
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler: the error's frames hold the tensors that memory ran out with
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(_items(lesson, step, 1)) == len(items):
            raise UserError(
                "not even one example alone fits the memory; set checkpointing = true or "
                'optimizer_state = "bfloat16", or leave the longest out'
            )
        tokens //= 2
        while len(_items(lesson, step, tokens)) == len(items):  # cut as before: no attempt is wasted on it
            tokens //= 2


def _items(lesson: Lesson[Item], step: int, tokens: int) -> list[Item]:
    """The step's items, as many as the ranks have work with."""
    items = lesson.items(step, tokens)
    fit = ranks.portion(sum(map(tokens_of, items)), tokens)
    return items if fit == tokens else lesson.items(step, fit)


def batches_within_memory(
    replicas: Replicas,
    work: Callable[[Transformer, Sequence[Batch]], list[Result]],
    batches: Sequence[Batch],
    undo: Callable[[], None] | None = None,
) -> tuple[list[Result], int]:
    """``replicas.map(work, batches)``, where ``work`` gives a result a batch. When memory runs out, there are
    more batches, and more results, whose rows are in the same order; see :func:`map_within_memory`."""

    def of_lots(model: Transformer, lots: Sequence[Lot]) -> list[list[Result]]:
        return [work(model, lot.batches) for lot in lots]

    found, halvings = map_within_memory(replicas, of_lots, [Lot((), [b]) for b in batches], undo)
    return [result for results in found for result in results], halvings


def require_room(model: Transformer, sequences: Sequence[Sequence1]) -> None:
    """Raises ``UserError`` if one is longer than the model has positions."""
    longest, room = max((len(s.ids) for s in sequences), default=0), model.config.max_position_embeddings
    if longest > room:
        raise UserError(
            f"an example has {longest} tokens, and the model {room} positions; leave it out, or cut it"
        )


def pair_batches(
    pairs: Sequence[tuple[Sequence1, Sequence1]], pad_id: int, tokens: int
) -> list[tuple[list[int], Batch]]:
    """Whole pairs in micro-batches of at most ``tokens`` tokens, or of one pair, the longest first: which
    they are, and their ``[2N]`` rows, the two of each in turn."""
    widths = [max(len(a.ids), len(b.ids)) for a, b in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -widths[i])
    found = []
    while order:
        count = max(1, tokens // (2 * widths[order[0]]))
        lot, order = order[:count], order[count:]
        found.append((lot, stacked([s for i in lot for s in pairs[i]], pad_id)))
    return found


class NextToken:
    """Cross-entropy of the tokens on the mask, the mean over those of the whole step: how it is cut into
    micro-batches changes nothing. ``batches(step, tokens)`` gives them."""

    def __init__(self, batches: Callable[[int, int], list[Batch]]) -> None:
        self.batches = batches

    def items(self, step: int, tokens: int) -> list[tuple[Batch, float]]:
        batches = self.batches(step, tokens)
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


def drawn_at(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Which of ``count`` examples a step reads: each once an epoch, in an order of each epoch's own."""
    found: list[int] = []
    orders: dict[int, Sequence[int]] = {}
    for position in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = shuffled(count, stream(seed, "epoch", epoch))
        found.append(orders[epoch][at])
    return found


def shuffled(count: int, rng: random.Random) -> list[int]:
    order = list(range(count))
    rng.shuffle(order)
    return order
