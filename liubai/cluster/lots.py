"""The books of an engine over many actors: what is written together, and what each actor has."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from liubai.rollout.engine import Partial, Request


@dataclass(slots=True, eq=False)
class Lot:
    """Requests that are written together; ``left`` of them are not answered yet. ``number`` is of this
    handing out: answers under an older one are nobody's. ``place``: whose alone it is."""

    asked: dict[int, Partial]
    left: dict[int, int]  # id -> tokens at most
    place: int | None = None
    number: int = -1
    losses: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.left.values())


@dataclass(slots=True, eq=False)
class Place:
    state: Literal["starting", "there", "down"] = "starting"
    lots: list[Lot] = field(default_factory=list)
    losses: int = 0  # in a row, without an answer between them
    unborn: int = 0  # … and without having come up
    due: float = 0.0  # when it is started again
    silent: float = 0.0  # seconds that somebody listened and heard nothing
    lately: deque[tuple[float, int]] = field(default_factory=deque)  # (time, tokens)

    @property
    def tokens(self) -> int:
        return sum(lot.tokens for lot in self.lots)


def lot_of(partials: Sequence[Partial], place: int | None = None) -> Lot:
    asked = {partial.request.id: partial for partial in partials}
    return Lot(asked, {id: tokens_at_most(partial.request) for id, partial in asked.items()}, place)


def tokens_at_most(request: Request) -> int:
    return len(request.prompt_ids) + request.max_tokens
