"""When memory runs out: the same work in smaller pieces, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from liubai.errors import UserError, is_out_of_memory
from liubai.learn.packing import Batch
from liubai.learn.replicas import Replicas
from liubai.model.transformer import Transformer

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Lot:
    """A prompt and all answers to it, in micro-batches that continue it; or sequences on their own, and
    ``prompt`` is empty."""

    prompt: tuple[int, ...]
    batches: list[Batch]


def map_within_memory(
    replicas: Replicas,
    work: Callable[[Transformer, Sequence[Lot]], list[Result]],
    lots: Sequence[Lot],
    undo: Callable[[], None] | None = None,
) -> tuple[list[Result], int]:
    """``replicas.map(work, lots)``; when memory runs out, ``undo()`` and all of it again with micro-batches
    of half the tokens. The second result counts the halvings. Without ``undo``, ``work`` has no gradients.
    Raises ``UserError`` when one row alone is too much."""
    halvings = 0
    while True:
        try:
            return (replicas.map if undo else replicas.read)(work, lots), halvings
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler: the error's frames hold the tensors that memory ran out with
        if undo:
            undo()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        lots = halved(lots)
        halvings += 1


def halved(lots: Sequence[Lot]) -> list[Lot]:
    """The same, with the largest micro-batches cut to half of what the largest of several rows attends to."""
    batches = [b for lot in lots for b in lot.batches]
    sizes = [len(b.ids_BT) * _reach(b) for b in batches if len(b.ids_BT) > 1]
    if not sizes:
        raise UserError(
            f"not even one row of {max(map(_reach, batches))} tokens fits the memory; set checkpointing = "
            'true, optimizer_state = "bfloat16" or lora, or lower max_tokens'
        )
    limit = max(sizes) // 2

    def smaller(batch: Batch) -> list[Batch]:
        return list(batch.split(max(1, limit // _reach(batch))))

    return [replace(lot, batches=[part for b in lot.batches for part in smaller(b)]) for lot in lots]


def _reach(batch: Batch) -> int:
    """Tokens of a row, and of what it continues."""
    return int(batch.positions_BT[0, 0]) + batch.ids_BT.shape[1]
