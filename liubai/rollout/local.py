"""A writer in this process: many coroutines share one engine, which is stepped while all of them wait.

    writer = LocalWriter(engine, eos_ids=tokenizer.eos_ids)
    answers = run(writer, [one(writer, ask) for ask in asks])

Inside a loop that is running anyhow, ``writer.serve()`` is the task that does the stepping. One thread does
it all: a step of the engine, a token of every beam search and the judges' reading hold the loop up, so this
is for evaluation and the terminal. (A server has its model in another process, :mod:`liubai.serve.host`.)

What is written depends on the requests alone, not on who waits beside whom; the order of events is that of
the coroutines, so that a run repeats.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from liubai.errors import UserError
from liubai.rollout.beam import BeamSearch
from liubai.rollout.engine import Request
from liubai.rollout.thinking import together
from liubai.rollout.torch_engine import TorchEngine
from liubai.rollout.writer import Beams, Heard, Judge, Piece
from liubai.types import Sample

T = TypeVar("T")
#: Scores of (question, response) pairs.
Judging = Callable[[Sequence[tuple[str, str]]], list[float]]
#: Rounds of the loop without a new request after which all are held to be waiting. What one ended answer
#: sets off goes through a few callbacks (its task, a ``gather``, the one who waits for that).
QUIET = 8


@dataclass(slots=True)
class _Open:
    future: asyncio.Future[Sample]
    heard: Heard | None
    curious: bool


@dataclass(slots=True)
class _Judgement:
    judge: Judge
    answers: Sequence[tuple[str, str]]
    future: asyncio.Future[list[float]]


class LocalWriter:
    """A :class:`liubai.rollout.writer.Writer`. The engine must have its weights, and be used by nobody else
    meanwhile. ``judges`` say what answers are worth; they are asked about many at once."""

    def __init__(
        self,
        engine: TorchEngine,
        *,
        eos_ids: Sequence[int],
        judges: Mapping[Judge, Judging] | None = None,
    ) -> None:
        self.engine, self.eos_ids, self._judges = engine, tuple(eos_ids), dict(judges or {})
        self._numbers = itertools.count()
        self._open: dict[int, _Open] = {}
        self._searches: dict[int, tuple[BeamSearch, asyncio.Future[Beams]]] = {}
        self._judgements: list[_Judgement] = []
        self._asked = 0  # all that was ever asked for
        self._woken = True  # did the last step give anybody what they waited for?
        self._called: asyncio.Event | None = None

    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        number = next(self._numbers)
        self.engine.submit([replace(request, id=number)])
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._open[number] = _Open(future, heard, request.alternatives > 0)
        self._call()
        try:
            return await future
        finally:
            if self._open.pop(number, None) is not None:  # withdrawn: the slot is free at once
                self.engine.cancel([number])

    async def beams(self, request: Request, width: int) -> Beams:
        need = len(request.prompt_ids) + request.max_tokens
        if need > self.engine.max_length:
            raise ValueError(f"a request needs {need} tokens, the engine holds {self.engine.max_length}")
        version = self.engine.version
        search = BeamSearch(self.engine.model, request, width, eos_ids=self.eos_ids, version=version)
        number = next(self._numbers)
        future: asyncio.Future[Beams] = asyncio.get_running_loop().create_future()
        self._searches[number] = search, future
        self._call()
        try:
            return await future
        finally:
            self._searches.pop(number, None)

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        if judge not in self._judges:
            raise UserError(f"there is no {judge} model to judge answers; name one, or leave the judge out")
        if not answers:
            return []
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        judgement = _Judgement(judge, answers, future)
        self._judgements.append(judgement)
        self._call()
        try:
            return await future
        finally:
            if judgement in self._judgements:
                self._judgements.remove(judgement)

    def judges(self) -> frozenset[Judge]:
        return frozenset(self._judges)

    async def serve(self) -> None:
        """Works until it is cancelled. Whatever ends it ends all that is open, too."""
        self._called = asyncio.Event()
        try:
            while True:
                if not self._has_work():
                    self._called.clear()
                    await self._called.wait()
                await self._settle()
                self._step()
        except BaseException as error:
            # whoever waits must hear of it: of the error itself, or that nobody works any more
            told = error if isinstance(error, Exception) else RuntimeError("nobody steps the engine any more")
            self._fail_all(told)
            raise
        finally:
            self._called = None

    def _call(self) -> None:
        self._asked += 1
        if self._called is not None:
            self._called.set()

    def _has_work(self) -> bool:
        return bool(self._open or self._searches or self._judgements)

    async def _settle(self) -> None:
        """Let the others run until nobody has anything to add; one round where the last step woke nobody."""
        quiet, asked = 0, self._asked
        rounds, self._woken = QUIET if self._woken else 1, False
        while quiet < rounds:
            await asyncio.sleep(0)
            quiet = quiet + 1 if asked == self._asked else 0
            rounds = rounds if asked == self._asked else QUIET
            asked = self._asked

    def _step(self) -> None:
        """All that there is to do goes on by a token; the judges hear all who ask."""
        if self._open:
            try:
                ended = self.engine.step()
            except UserError as error:  # broken weights, or no memory: all who were being written are lost
                self.engine.abort()
                for one in self._take_open():
                    self._give(one.future, error)
            else:
                self._tell()
                for request, sample in ended:
                    if (found := self._open.pop(request.id, None)) is not None:
                        self._give(found.future, sample)
        self._search()
        self._judge()

    def _tell(self) -> None:
        """Who listens hears what was just written. What goes wrong there is the listener's own affair."""
        if not any(one.heard for one in self._open.values()):
            return
        for fresh in self.engine.fresh():
            one = self._open.get(fresh.id)
            if one is None or one.heard is None or one.future.done():
                continue
            try:
                one.heard(
                    Piece((fresh.token,), (fresh.logprob,), (fresh.alternatives,) if one.curious else ())
                )
            except Exception as error:
                self._give(one.future, error)

    def _search(self) -> None:
        for number, (search, future) in list(self._searches.items()):
            try:
                if search.step():
                    continue
            except UserError as error:
                self._give(future, error)
            else:
                self._give(future, Beams(search.best(), search.length))
            self._searches.pop(number, None)

    def _judge(self) -> None:
        asked, self._judgements = self._judgements, []
        for judge in dict.fromkeys(judgement.judge for judgement in asked):
            mine = [judgement for judgement in asked if judgement.judge == judge]
            try:
                scores = self._judges[judge]([pair for one in mine for pair in one.answers])
            except Exception as error:
                for one in mine:
                    self._give(one.future, error)
                continue
            place = iter(scores)
            for one in mine:
                self._give(one.future, list(itertools.islice(place, len(one.answers))))

    def _take_open(self) -> list[_Open]:
        taken = list(self._open.values())
        self._open.clear()
        return taken

    def _fail_all(self, error: Exception) -> None:
        searches, self._searches = self._searches, {}
        judgements, self._judgements = self._judgements, []
        open_now = self._take_open()
        if open_now:
            self.engine.abort()
        futures: list[asyncio.Future[Any]] = [one.future for one in open_now]
        futures += [future for _, future in searches.values()]
        futures += [judgement.future for judgement in judgements]
        for future in futures:
            self._give(future, error)

    def _give(self, future: asyncio.Future[Any], result: Any) -> None:
        """To somebody who may be gone by now."""
        self._woken = True
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def run(writer: LocalWriter, jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all ``jobs``, in their order. The first error stops the others and is raised."""

    async def work() -> list[T]:
        serving = asyncio.create_task(writer.serve())
        try:
            return await together(jobs)
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving

    return asyncio.run(work())
