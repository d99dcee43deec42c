"""Packing: sequences of unequal length into full rows, with positions, document marks and masks.

Everything in a :class:`Batch` is aligned with the position that *predicts*: ``targets_BT[b, t]`` is
the token that follows ``ids_BT[b, t]`` in the same document, and ``mask_BT[b, t]`` says whether that
target is one to learn. The mask comes from the sequences, never from token values, so a pad id that
equals the end id hides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequence1:
    """One document: ``ids`` and, for each of them, whether it is a target to learn.

    ``values`` are per-token numbers (behaviour log-probabilities, advantages…), one list a name,
    as long as ``ids``; they travel with their token.
    """

    ids: Sequence[int]
    learn: Sequence[bool]
    values: dict[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows. ``documents_BT`` is −1 on padding; ``values`` hold ``[B, T]`` float tensors."""

    ids_BT: Tensor
    targets_BT: Tensor
    mask_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    values: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        return int((self.documents_BT >= 0).sum())

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most ``rows`` rows."""
        for i in range(0, self.ids_BT.shape[0], rows):
            yield self.take(slice(i, i + rows))

    def take(self, rows: slice) -> Batch:
        return Batch(
            self.ids_BT[rows],
            self.targets_BT[rows],
            self.mask_BT[rows],
            self.positions_BT[rows],
            self.documents_BT[rows],
            {name: v[rows] for name, v in self.values.items()},
        )

    @property
    def attention_documents(self) -> Tensor | None:
        """What ``causal`` needs: nothing when every row holds one document (causality is enough)."""
        first_B1 = self.documents_BT[:, :1]
        alone = bool(((self.documents_BT == first_B1) | (self.documents_BT < 0)).all())
        return None if alone else self.documents_BT


def place(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First-fit decreasing: which sequences share which row. Raises ``ValueError`` if one is wider."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > width:
            raise ValueError(f"a sequence of {lengths[i]} tokens does not fit a row of {width}")
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            rows.append([])
            room.append(width)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def pack(sequences: Sequence[Sequence1], width: int, pad_id: int) -> Batch:
    """Pack into rows of ``width`` tokens. Document numbers are indices into ``sequences``."""
    rows = place([len(s.ids) for s in sequences], width)
    shape = (len(rows), width)
    ids = torch.full(shape, pad_id)
    targets = torch.full(shape, pad_id)
    mask = torch.zeros(shape, dtype=torch.bool)
    positions = torch.zeros(shape, dtype=torch.long)
    documents = torch.full(shape, -1)
    names = sequences[0].values.keys() if sequences else ()
    values = {name: torch.zeros(shape) for name in names}
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            s, n = sequences[i], len(sequences[i].ids)
            ids[r, at : at + n] = torch.as_tensor(s.ids)
            positions[r, at : at + n] = torch.arange(n)
            documents[r, at : at + n] = i
            targets[r, at : at + n - 1] = torch.as_tensor(s.ids[1:])
            mask[r, at : at + n - 1] = torch.as_tensor(s.learn[1:])
            for name, v in s.values.items():
                values[name][r, at : at + n - 1] = torch.as_tensor(v[1:], dtype=torch.float32)
            at += n
    return Batch(ids, targets, mask, positions, documents, values)


def micro_batches(sequences: Sequence[Sequence1], pad_id: int, tokens: int) -> list[Batch]:
    """Sequences of similar length share a micro-batch of about ``tokens`` tokens.

    Rows are as wide as the longest sequence of their micro-batch, not of the whole update: attention
    costs each token the width of its row, and where lengths are alike, each row is one document and
    needs no attention mask at all.
    """
    lots: list[list[Sequence1]] = [[]]
    room = tokens
    for s in sorted(sequences, key=lambda s: -len(s.ids)):
        if lots[-1] and room < len(s.ids):
            lots.append([])
            room = tokens
        lots[-1].append(s)
        room -= len(s.ids)
    return [pack(lot, len(lot[0].ids), pad_id) for lot in lots if lot]
