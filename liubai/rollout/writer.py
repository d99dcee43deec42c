"""Somebody who writes answers while others wait: what paths, the server, the chat and the evaluation share.

An :class:`Engine` is stepped by one loop; what is built on answers (a vote, a tree of thoughts, a tool that
is called in the middle) is a coroutine that awaits them, and any number of coroutines share one engine::

    sample = await writer.write(request)                     # one answer
    answers = await asyncio.gather(*(writer.write(r) for r in requests))   # several at once

To cancel the task is to withdraw the answer: its slot is free at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from liubai.rollout.engine import Request
from liubai.types import Sample

#: What judges an answer: the reward model sees question and answer, the process model each step.
Judge = Literal["preference", "process"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that were just written. ``alternatives[i]`` are the likeliest (id, log-probability) at token i,
    best first, as many as the request asked for."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()


Heard = Callable[[Piece], None]


class Beams(list[Sample]):
    """What a beam search found, best first. ``steps``: how many tokens long it made its beginnings before it
    was sure that these are the best."""

    def __init__(self, samples: Iterable[Sample], steps: int) -> None:
        super().__init__(samples)
        self.steps = steps


class Writer(Protocol):
    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        """The whole answer; ``heard`` is given its tokens as they come. Raises ``ValueError`` for a request
        that can never fit."""

    async def beams(self, request: Request, width: int) -> Beams:
        """The ``width`` likeliest answers that beam search finds, best first, at temperature 1."""

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        """A score for each (question, response); higher is better. Raises ``UserError`` where there is no
        such model."""

    def judges(self) -> frozenset[Judge]:
        """Which of them there are."""
