"""The room that a host keeps for one request."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from liubai.rollout.engine import Request
from liubai.rollout.writer import Beams, Heard, Judge
from liubai.types import Sample

if TYPE_CHECKING:
    from liubai.serve.host import Host


class Places:
    """Room that was given to one request; a ``Writer``. What it writes is not refused for want of room."""

    def __init__(self, host: Host, answers: int) -> None:
        self.host, self.answers = host, answers

    def __enter__(self) -> Self:
        self.host._places += self.answers
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.host._places -= self.answers

    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        return await self.host._write(request, heard)

    async def beams(self, request: Request, width: int) -> Beams:
        return await self.host._beams(request, width)

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        return await self.host.judge(judge, answers)

    def judges(self) -> frozenset[Judge]:
        return self.host.judges()
