"""Batches: sequences of unequal length in rows, with positions, document marks and masks.

Everything in a :class:`Batch` is aligned with the position that *predicts*: ``targets_BT[b, t]`` is
the token that follows ``ids_BT[b, t]`` in the same document, and ``mask_BT[b, t]`` says whether that
target is one to learn. The mask comes from the sequences, never from token values, so a pad id that
equals the end id hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequence1:
    """One document: ``ids`` and, for each of them, whether it is a target to learn.

    ``values`` are per-token numbers (behaviour log-probabilities, advantages…), one list a name,
    as long as ``ids``; they travel with their token. A sequence may continue a prefix that it shares
    with others: then ``start`` is the position of its first id.
    """

    ids: Sequence[int]
    learn: Sequence[bool]
    values: dict[str, Sequence[float]] = field(default_factory=dict)
    start: int = 0

    def after(self, n: int) -> Sequence1:
        """The same without its first ``n`` ids."""
        values = {name: v[n:] for name, v in self.values.items()}
        return Sequence1(self.ids[n:], self.learn[n:], values, self.start + n)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of documents. ``documents_BT`` is −1 on padding; ``values`` hold ``[B, T]`` float tensors."""

    ids_BT: Tensor
    targets_BT: Tensor
    mask_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    values: dict[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        return self._mapped(lambda t: t.to(device))

    @property
    def tokens(self) -> int:
        return int((self.documents_BT >= 0).sum())

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most ``rows`` rows."""
        for i in range(0, self.ids_BT.shape[0], rows):
            yield self.take(slice(i, i + rows))

    def take(self, rows: slice) -> Batch:
        return self._mapped(lambda t: t[rows])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.ids_BT),
            change(self.targets_BT),
            change(self.mask_BT),
            change(self.positions_BT),
            change(self.documents_BT),
            {name: change(v) for name, v in self.values.items()},
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
    """Pack into rows of ``width`` tokens. Document numbers are indices into ``sequences``. Sequences
    that continue a prefix have a row each (:func:`micro_batches`). Raises ``ValueError`` for those."""
    if any(s.start for s in sequences):
        raise ValueError("a sequence that continues a shared prefix cannot share its row")
    return _lay_out(sequences, place([len(s.ids) for s in sequences], width), width, pad_id)


def _lay_out(sequences: Sequence[Sequence1], rows: Sequence[Sequence[int]], width: int, pad_id: int) -> Batch:
    """``rows`` says which sequences stand in which row, one after another from the left."""
    order = [i for row in rows for i in row]
    listed = [sequences[i] for i in order]
    lengths = torch.tensor([len(s.ids) for s in listed], dtype=torch.long)
    ends = torch.tensor([sum(len(sequences[i].ids) for i in row) for row in rows], dtype=torch.long)
    real_BT = torch.arange(width) < ends[:, None]
    # one flat tensor a field, filled in at once: a tensor a sequence would cost more than its tokens
    first_N = torch.cumsum(lengths, 0) - lengths
    offset_N = torch.arange(int(lengths.sum())) - first_N.repeat_interleave(lengths)
    last_N = offset_N == lengths.repeat_interleave(lengths) - 1
    start_N = torch.tensor([s.start for s in listed], dtype=torch.long).repeat_interleave(lengths)

    def spread(flat_N: Tensor, empty: float) -> Tensor:
        return torch.full(real_BT.shape, empty, dtype=flat_N.dtype).masked_scatter_(real_BT, flat_N)

    def follow(flat_N: Tensor, empty: float) -> Tensor:
        """The value of the next token of the same document; ``empty`` at its last."""
        return spread(flat_N.roll(-1).masked_fill_(last_N, empty), empty)

    ids_N = _flat((s.ids for s in listed), torch.long)
    names = sequences[0].values.keys() if sequences else ()
    return Batch(
        ids_BT=spread(ids_N, pad_id),
        targets_BT=follow(ids_N, pad_id),
        mask_BT=follow(_flat((s.learn for s in listed), torch.bool), False),
        positions_BT=spread(offset_N + start_N, 0),
        documents_BT=spread(torch.tensor(order, dtype=torch.long).repeat_interleave(lengths), -1),
        values={n: follow(_flat((s.values[n] for s in listed), torch.float32), 0.0) for n in names},
    )


def _flat(parts: Iterable[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([x for part in parts for x in part], dtype=dtype)


def stacked(sequences: Sequence[Sequence1], pad_id: int) -> Batch:
    """One sequence a row, in their order."""
    width = max(len(s.ids) for s in sequences)
    return _lay_out(sequences, [[i] for i in range(len(sequences))], width, pad_id)


def by_length(sequences: Sequence[Sequence1]) -> list[int]:
    """Their numbers, the longest first: the order of the rows of ``micro_batches``."""
    return sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))


def micro_batches(sequences: Sequence[Sequence1], pad_id: int, tokens: int) -> list[Batch]:
    """Sequences of similar length share a micro-batch of at most ``tokens`` tokens (or one sequence
    that is longer), a row each. What they continue counts a quarter: it is only attended to.

    Rows are as wide as the longest sequence of their micro-batch, not of the whole update, so there is
    little padding; attention costs each token the width of its row; and no row needs a mask.
    """
    lots: list[list[Sequence1]] = []
    for s in (sequences[i] for i in by_length(sequences)):
        rows = len(lots[-1]) + 1 if lots else 0
        width = len(lots[-1][0].ids) if lots else 0
        if not rows or rows * width > tokens or rows * (s.start + width) > 4 * tokens:
            lots.append([])
        lots[-1].append(s)
    return [stacked(lot, pad_id) for lot in lots]
