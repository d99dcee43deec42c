"""One way from a request to its answer, for all who ask: streams, whole answers and the terminal.

    async with aclosing(answer(house, request)) as events:
        async for event in events: ...

The first event is :class:`Started`, before which everything is raised that is wrong with the request or for
which there is no room. To close the events is to withdraw what is still being written.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from liubai.rollout.paths import PathsConfig
from liubai.rollout.paths import answer as write_paths
from liubai.rollout.thinking import Ask, Called, Path
from liubai.rollout.writer import Heard, Piece, Writer
from liubai.serve.asking import Job, prepared, require_sound, routed, way_of
from liubai.serve.events import ChoiceCalled, ChoiceSaid, Ended, Event, Finish, PathSaid, Started, Usage
from liubai.serve.house import House
from liubai.serve.router import CALCULATOR, Decision
from liubai.serve.schema import ChatRequest
from liubai.serve.streams import Kind, Said, Speech
from liubai.serve.toolcalls import Call
from liubai.serve.tools import TOOLS, ToolError, read_call
from liubai.types import Sample, Stop


async def answer(house: House, request: ChatRequest, lull: Lull | None = None) -> AsyncGenerator[Event]:
    """Raises :class:`Refused`, ``UserError``, and what the writer raises."""
    decision = routed(house, request)
    if decision is not None and decision.calculation is not None:
        for event in _calculated(house, request, decision):
            yield event
        return
    job = await prepared(house, request, decision)
    with job.served.room(job.answers) as writer:
        yield Started(job.served, len(job.ask.prompt_ids), job.route)
        choices = [Choice(i, job.speech()) for i in range(job.choices)]
        write = _several if job.several else _single
        written = flow(lambda emit: [write(job, writer, choices, i, emit) for i in range(job.choices)], lull)
        async with aclosing(written) as events:
            async for event in events:
                yield event


class Choice:
    """A choice, or one of several paths, while it is being written: what was said of it so far."""

    def __init__(self, index: int, speech: Speech) -> None:
        self.index, self.speech = index, speech
        self.texts: dict[Kind, str] = {"reasoning": "", "content": ""}
        self.path: Path | None = None
        self.stop = Stop.LENGTH
        self.over = False
        self.answering_at: float | None = None

    def events(self, said: Sequence[Said | Call]) -> list[Event]:
        found: list[Event] = []
        place = len(self.speech.calls) - sum(isinstance(one, Call) for one in said)
        for one in said:
            if isinstance(one, Said):
                self.texts[one.kind] += one.text
                found.append(ChoiceSaid(self.index, one.kind, one.text, one.tokens))
            else:
                found.append(ChoiceCalled(self.index, place, f"call_{secrets.token_hex(12)}", one))
                place += 1
            if self.answering_at is None and not (isinstance(one, Said) and one.kind == "reasoning"):
                self.answering_at = time.monotonic()
        return found

    def take(self, path: Path) -> None:
        """It is complete."""
        self.path, self.stop = path, path.sample.stop

    @property
    def finish(self) -> Finish:
        if self.speech.calls:
            return "tool_calls"
        return "stop" if self.speech.stopped or self.stop is Stop.EOS else "length"

    @property
    def tokens(self) -> int:
        return self.path.tokens if self.path is not None else self.speech.tokens

    @property
    def thought_tokens(self) -> int:
        return self.path.thought_tokens if self.path is not None else self.speech.thought_tokens

    def thought(self, began: float, budget: int | None) -> dict[str, Any]:
        tokens = self.thought_tokens
        seconds = (self.answering_at or time.monotonic()) - began if tokens else 0.0
        forced = self.path.forced if self.path is not None else budget is not None and tokens >= budget > 0
        return {"tokens": tokens, "seconds": round(seconds, 3), "forced": forced}

    def described(self) -> dict[str, Any]:
        path = self.path
        return {
            "index": self.index,
            "reasoning": self.texts["reasoning"],
            "content": self.texts["content"],
            "answer": path.answer if path is not None else None,
            "votes": path.votes if path is not None else None,
            "score": _finite(path.score) if path is not None else None,
            "tokens": self.tokens,
            "finish_reason": self.finish,
        }


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


#: Awaited when there is nothing more to tell for the moment.
Lull = Callable[[], Awaitable[None]]


class Emit(Protocol):
    def __call__(self, event: Event, soon: bool = False) -> None:
        """Tell ``event``. ``soon``: another one follows at once, or the end, with which it may go."""


T = TypeVar("T")


async def until_enough(
    choice: Choice, emit: Emit, write: Callable[[Heard], Coroutine[Any, Any, T]]
) -> T | None:
    """What ``write`` returns, whose pieces are told as they come; ``None`` when the choice had enough before
    it was complete. Then the rest is not written."""

    def heard(piece: Piece) -> None:
        if choice.speech.stopped:
            return
        said = choice.speech.hear(piece)
        for event in choice.events(said):
            emit(event, choice.speech.ended)
        if choice.speech.stopped:
            writing.cancel()

    writing = asyncio.create_task(write(heard))
    try:
        result: T | None = await writing
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not choice.speech.stopped or (task is not None and task.cancelling()):
            raise
        result = None
    for event in choice.events(choice.speech.end()):
        emit(event)
    choice.over = True
    return result


async def _single(job: Job, writer: Writer, choices: Sequence[Choice], index: int, emit: Emit) -> None:
    """One choice that is one path: told as it is written."""
    choice = choices[index]
    ask = job.asked(index)
    outcome = await until_enough(
        choice, emit, lambda heard: write_paths(writer, ask, job.config, lambda _, piece: heard(piece))
    )
    if outcome is not None:
        choice.take(outcome.best)
    if all(other.over for other in choices):
        completion = sum(choice.tokens for choice in choices)
        usage = Usage(len(ask.prompt_ids), completion, sum(choice.thought_tokens for choice in choices))
        emit(Ended(index, choice.finish, usage, _summary(job, choices, 0, completion)), True)
    else:
        emit(Ended(index, choice.finish))


async def _several(job: Job, writer: Writer, choices: Sequence[Choice], _: int, emit: Emit) -> None:
    """One choice that is chosen from several paths: these are told as they are written, then the choice."""
    paths: dict[int, Choice] = {}
    pieces: dict[int, list[Piece]] = {}

    def tell(i: int, said: Sequence[Said | Call]) -> None:
        for event in paths[i].events(said):
            if isinstance(event, ChoiceSaid):
                emit(PathSaid(i, event.kind, event.text))

    def heard(i: int, piece: Piece) -> None:
        if i not in paths:
            paths[i] = Choice(i, job.speech(of_path=True))
        pieces.setdefault(i, []).append(piece)
        tell(i, paths[i].speech.hear(piece))

    outcome = await write_paths(writer, job.asked(0), job.config, heard)
    for i, path in enumerate(outcome.paths):
        if i not in paths:  # a search is silent
            heard(i, Piece(path.sample.completion_ids, path.sample.logprobs))
        tell(i, paths[i].speech.end())
        paths[i].take(path)
        await asyncio.sleep(0)  # a search has hundreds, and others are to be heard meanwhile
    (choice,) = choices
    chosen = outcome.chosen
    for piece in pieces.get(chosen, []):
        for event in choice.events(choice.speech.hear(piece)):
            emit(event)
    for event in choice.events(choice.speech.end()):
        emit(event)
    choice.take(outcome.best)
    choice.answering_at = paths[chosen].answering_at
    told = [paths[i] for i in range(len(outcome.paths))]
    spent = max(outcome.spent.written, choice.tokens)
    thought = min(spent, sum(path.thought_tokens for path in outcome.paths))
    usage = Usage(len(job.ask.prompt_ids), spent, thought)
    emit(Ended(0, choice.finish, usage, _summary(job, told, chosen, spent)), True)


def _summary(job: Job, told: Sequence[Choice], chosen: int, tokens: int) -> dict[str, Any]:
    """What is said of the whole answer in "liubai" (docs/serving.md)."""
    best = told[chosen]
    calls = best.path.calls if best.path is not None else ()
    return {
        **({"route": job.route} if job.route else {}),
        "thinking": best.thought(job.began, job.ask.budget),
        "paths": {
            "kind": job.config.kind,
            "chosen": chosen,
            "tokens": tokens,
            "list": [choice.described() for choice in told],
        },
        "tools": [_used(call, job.built) for call in calls],
    }


def _used(called: Called, built: Sequence[str]) -> dict[str, str]:
    """A call of a built-in tool, for a reader."""
    try:
        call = read_call(called.call, built)
    except ToolError:  # the result says what was wrong with it
        return {"name": "", "input": called.call, "output": called.result}
    return {"name": call.name, "input": call.argument, "output": called.result}


def _calculated(house: House, request: ChatRequest, decision: Decision) -> Iterator[Event]:
    """The calculator's answer, for which no model writes a token. Raises as :func:`prepared`, as far as it
    can matter here."""
    found = decision.calculation
    assert found is not None
    require_sound(house, request)
    served = house.find(request.model)
    arguments = {TOOLS[CALCULATOR].takes: found.understood}
    call = json.dumps({"name": CALCULATOR, "arguments": arguments}, ensure_ascii=False)
    nothing = Sample((), (), (), Stop.EOS, ())
    path = Path(
        nothing, (), found.text, "", found.text, found.answer, 0.0, 0, calls=(Called(call, found.answer),)
    )
    job = Job(
        served=served,
        ask=Ask(question="", template=served.plain, prompt_ids=(), max_tokens=0, seed=0),
        config=PathsConfig(kind="greedy"),
        choices=request.n or 1,
        built=(CALCULATOR,),
        route=way_of(decision),
    )
    yield Started(served, 0, job.route)
    choices = [
        Choice(i, Speech(served.tokenizer, stops=request.stops(), before=found.text))
        for i in range(job.choices)
    ]
    for choice in choices:
        yield from choice.events(choice.speech.end())
        choice.take(path)
        last = choice is choices[-1]
        summary = _summary(job, choices, 0, 0) if last else None
        yield Ended(choice.index, choice.finish, Usage(0, 0, 0) if last else None, summary)


async def flow(
    work: Callable[[Emit], Sequence[Coroutine[Any, Any, None]]], lull: Lull | None = None
) -> AsyncGenerator[Event]:
    """What they emit, as it comes. The first error ends all of them, as does the end of whoever listens."""
    told = deque[Event | BaseException | None]()
    loop = asyncio.get_running_loop()
    called: asyncio.Future[None] | None = None  # while nothing is told

    def emit(event: Event | BaseException | None, soon: bool = False) -> None:
        told.append(event)
        if not soon and called is not None and not called.done():
            called.set_result(None)

    tasks = [asyncio.create_task(one) for one in work(emit)]
    for task in tasks:
        task.add_done_callback(lambda done: emit(None if done.cancelled() else done.exception()))
    open_ones = len(tasks)
    try:
        while open_ones:
            if not told and lull is not None:
                await lull()
            if not told:
                called = loop.create_future()
                await called
            event = told.popleft()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                open_ones -= 1
            else:
                yield event
    finally:
        if not_done := [task for task in tasks if not task.done()]:
            for task in not_done:
                task.cancel()
            await asyncio.gather(*not_done, return_exceptions=True)
