"""One model, served: the asyncio side of the process in which :mod:`liubai.serve.inside` runs.

    host = Host("r1", Path("runs/r1/16-r1/checkpoint"))
    await host.start()
    with host.admit(8) as writer:          # raises Busy when too many wait
        samples = await asyncio.gather(*(writer.write(request) for request in requests))
    await host.stop()

A host is a :class:`liubai.rollout.writer.Writer`. Whatever happens to the process happens to it alone: its
open answers fail with :class:`HostDied` and it is started again, after a while that doubles with each death
in a row. Deliberately missing: several processes for one model. POSIX only.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liubai.errors import UserError
from liubai.model.checkpoint import load_tokenizer, read_config
from liubai.model.hub import checkpoint_digest, find_folder
from liubai.rollout.engine import Request
from liubai.rollout.writer import Beams, Heard, Judge, Piece
from liubai.serve.errors import named
from liubai.serve.load import Busy, Figures, HostDied, Moving, State, Unavailable
from liubai.serve.places import Places
from liubai.serve.process import Process
from liubai.serve.wire import NOTE, VERSION, Written, unpack
from liubai.text.template import template_for
from liubai.types import Sample, Span, Stop

#: Tokens of prompt and answer together at most, where nobody says otherwise and the model can take more.
LENGTH = 8192
#: Seconds before a dead process is started again: the first time, and at most. One that lived for as long as
#: ``SETTLED`` was no failure of the start.
FIRST_PAUSE, LONGEST_PAUSE, SETTLED = 0.5, 30.0, 60.0
#: A request to come back later names between so many seconds.
SOONEST, LATEST = 1.0, 60.0
#: Below this, float32 cannot divide by a temperature, and the answer is the greedy one anyhow.
COLDEST, NARROWEST = 1e-3, 1e-6
#: Seconds that a process may be silent while answers wait for it. One step may be long: a long question read
#: by a large model on a small machine.
PATIENCE = 300.0
#: A restart may take so many times as long as the last start did, and ``PATIENCE`` in any case.
LONGER = 10.0


@dataclass(slots=True)
class _Open:
    """An answer, a search or a judgement that somebody waits for."""

    future: asyncio.Future[Any]
    request: Request | None = None
    heard: Heard | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Host:
    """See the module. ``checkpoint``, ``reward_model`` and ``process_model`` are folders; ``slots`` answers
    are written at once and ``waiting`` more may wait; ``max_length`` bounds prompt + answer in tokens.
    ``threads`` of the model's process: one fewer than there are cores, so that one is left for the server. A
    process that says nothing for ``patience_s`` although answers wait for it is started again, too. ``said``
    is told, for whoever runs the server, when the process ended and what became of it: no path, no question.

    Raises ``UserError`` for a folder that is no checkpoint; a file of weights that is broken is found by
    :meth:`start`.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Path,
        *,
        reward_model: Path | None = None,
        process_model: Path | None = None,
        slots: int = 256,
        max_length: int | None = None,
        waiting: int = 512,
        device: str = "auto",
        threads: int | None = None,
        patience_s: float = PATIENCE,
        said: Callable[[str], object] = lambda text: None,
    ) -> None:
        if slots < 1 or waiting < 0:
            raise UserError("a model is served in at least one slot, and no fewer than 0 may wait")
        self.name, self.slots, self.waiting, self.patience_s = name, slots, waiting, patience_s
        self.said = said
        self.folder = find_folder(checkpoint)
        self.config = read_config(self.folder)
        self.tokenizer = load_tokenizer(self.folder, self.config)
        self.template = template_for(self.tokenizer, self.folder)
        self.version = checkpoint_digest(self.folder)
        longest = self.config.max_position_embeddings
        self.max_length = max_length or min(longest, LENGTH)
        if not 2 <= self.max_length <= longest:
            raise UserError(f"max_length must be between 2 and the model's {longest} positions")
        judges = {"preference": reward_model, "process": process_model}
        self._settings: dict[str, Any] = {
            "checkpoint": str(self.folder.absolute()),
            "slots": slots,
            "max_length": self.max_length,
            "device": device,
            "threads": threads or max(1, len(os.sched_getaffinity(0)) - 1),
            "judges": {judge: str(path.absolute()) for judge, path in judges.items() if path is not None},
        }
        self.state: State = "new"
        self._trouble: str | None = None
        self._process: Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._open: dict[int, _Open] = {}
        self._places = 0
        self._in_use = self._waiting = 0
        self._tokens = self._told = self._answers = self._cancelled = self._refused = self._restarts = 0
        self._token_rate, self._answer_rate = Moving(), Moving()
        self._load_s, self._pause, self._started = 0.0, FIRST_PAUSE, 0.0

    # ---- life ----

    async def start(self) -> None:
        """Returns when the model is loaded. Raises ``UserError`` when it cannot be, ``HostDied`` when its
        process ends meanwhile."""
        if self.state != "new":
            raise RuntimeError(f"'{self.name}' was started before")
        try:
            await self._launch()
        except BaseException:
            await self.stop()
            raise

    async def stop(self, grace_s: float = 0.0) -> None:
        """Nothing new is let in; what is open may go on for ``grace_s`` seconds and then fails."""
        self.state = "stopped"
        if self._keeper is not None:
            self._keeper.cancel()
        deadline = time.monotonic() + grace_s
        while (self._open or self._places) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._fail_open(f"the server of '{self.name}' is being shut down")
        if self._process is not None:
            await self._process.end()
            self._process = None

    async def _launch(self) -> None:
        self.state = "loading"
        started = time.monotonic()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        process = self._process = Process(
            self._settings,
            lambda kind, body: self._take(ready, kind, body),
            lambda: self._died(process, ready),
        )
        try:
            await ready
            if not process.linked:  # it ended right after
                raise HostDied(f"the process of '{self.name}' ended while it was starting", SOONEST)
        except BaseException:
            await process.end()
            raise
        self._load_s = time.monotonic() - started
        self._told = self._in_use = self._waiting = 0
        self.state, self._trouble, self._started = "ready", None, time.monotonic()
        process.watch(lambda: bool(self._open), self.patience_s)

    def _died(self, process: Process, ready: asyncio.Future[None]) -> None:
        if not ready.done():
            ready.set_exception(
                HostDied(f"the process of '{self.name}' ended while it was starting", SOONEST)
            )
            return
        if self.state == "loading":  # whoever waits for it looks by itself
            return
        if time.monotonic() - self._started > SETTLED:
            self._pause = FIRST_PAUSE
        silent = f"was silent for {self.patience_s:g} s and was " if process.stuck else ""
        self._fail_open(
            f"the process that was writing for '{self.name}' {silent}ended; it is being started again"
        )
        if self.state != "ready":
            return
        self.state, self._trouble = "down", f"the process of '{self.name}' ended"
        self._in_use = self._waiting = 0
        self._keeper = asyncio.get_running_loop().create_task(self._start_again(process))

    async def _start_again(self, dead: Process) -> None:
        try:
            why = await dead.end()
        except Exception as error:  # whatever it is, it must not be the end of this task
            why = self._reason(error)
        self._trouble = f"it was silent for {self.patience_s:g} s, and {why}" if dead.stuck else why
        what = "starting"
        while True:
            pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            self.said(f"{self.name}: {self._trouble}; {what} again in {pause:g} s")
            await asyncio.sleep(pause)
            self._restarts += 1
            try:
                await asyncio.to_thread(self._require_same)
                async with asyncio.timeout(max(self.patience_s, LONGER * self._load_s)):
                    await self._launch()
            except Exception as error:
                self.state, self._trouble = "down", self._reason(error)
                what = "trying"
                continue
            self.said(f"{self.name}: ready again")
            return

    def _require_same(self) -> None:
        """Answers name the model that wrote them, by what was in its folder at the start. Raises
        ``UserError`` where that is something else by now."""
        if checkpoint_digest(self.folder) != self.version:
            raise UserError(
                "its checkpoint has changed since the server was started; put it back, or start the server "
                "again to serve the new one"
            )

    def _reason(self, error: Exception) -> str:
        """Why it could not be started, without the paths of its folders."""
        if isinstance(error, TimeoutError):
            return "its process was not ready in time"
        if not isinstance(error, UserError | HostDied):
            return named(error)
        text = str(error)
        for folder in (self._settings["checkpoint"], *self._settings["judges"].values()):
            text = text.replace(f"{folder}", Path(folder).name)
        return text

    def _fail_open(self, text: str) -> None:
        open_now, self._open = self._open, {}
        for one in open_now.values():
            if not one.future.done():
                one.future.set_exception(HostDied(text, self._back_in()))

    def _back_in(self) -> float:
        return min(LATEST, max(SOONEST, self._pause + self._load_s))

    # ---- the writer ----

    def admit(self, answers: int = 1) -> Places:
        """Room for so many answers at a time, which are then not refused: a context manager and a ``Writer``.

        Raises :class:`Busy` where too many wait already, :class:`HostDied` where the process is not there,
        and ``ValueError`` for more than there is ever room for."""
        if answers > self.slots + self.waiting:
            raise ValueError(
                f"{answers} answers at once are more than the {self.slots + self.waiting} allowed"
            )
        if self.state != "ready":
            raise HostDied(f"'{self.name}' is not there at the moment ({self.state})", self._back_in())
        excess = self._places + answers - self.slots - self.waiting
        if excess > 0:
            self._refused += 1
            raise Busy(f"too many requests wait for '{self.name}'; try again later", self._until_free(excess))
        return Places(self, answers)

    def _until_free(self, answers: int) -> float:
        """Seconds until so many have ended, as fast as they did lately."""
        rate = self._answer_rate.per_second()
        return min(LATEST, max(SOONEST, answers / rate if rate else SOONEST))

    async def write(self, request: Request, heard: Heard | None = None) -> Sample:
        with self.admit() as writer:
            return await writer.write(request, heard)

    async def beams(self, request: Request, width: int) -> Beams:
        with self.admit(width) as writer:
            return await writer.beams(request, width)

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        if judge not in self.judges():
            raise UserError(f"'{self.name}' is served without a {judge} model")
        found: list[float] = await self._ask(_Open(_future()), ["judge", judge, [list(a) for a in answers]])
        return found

    def judges(self) -> frozenset[Judge]:
        return frozenset(self._settings["judges"])

    def figures(self) -> Figures:
        return Figures(
            state=self.state,
            slots=self.slots,
            in_use=self._in_use,
            waiting=self._waiting,
            open=len(self._open),
            tokens_per_s=self._token_rate.per_second(),
            answers_per_s=self._answer_rate.per_second(),
            tokens=self._tokens,
            answers=self._answers,
            cancelled=self._cancelled,
            refused=self._refused,
            restarts=self._restarts,
            load_s=self._load_s,
            trouble=self._trouble,
        )

    async def _write(self, request: Request, heard: Heard | None) -> Sample:
        one = _Open(_future(), request, heard)
        sample: Sample = await self._ask(one, ["write", heard is not None, *self._fields(request)])
        return sample

    async def _beams(self, request: Request, width: int) -> Beams:
        if not 1 <= width <= self.slots + self.waiting:
            raise ValueError(f"a beam has a width between 1 and {self.slots + self.waiting}, not {width}")
        one = _Open(_future(), request)
        found: Beams = await self._ask(one, ["beams", width, *self._fields(request)])
        return found

    def _fields(self, request: Request) -> list[Any]:
        """What goes over the wire. The process must not meet what could end it, or spoil the step of all."""
        r = request
        if len(r.prompt_ids) + r.max_tokens > self.max_length:
            raise ValueError(
                f"a request needs {len(r.prompt_ids) + r.max_tokens} tokens (prompt + max_tokens), "
                f"'{self.name}' holds {self.max_length}"
            )
        if min(r.prompt_ids) < 0 or max(r.prompt_ids) >= self.config.vocab_size:
            # a tokenizer may have more tokens than its model: of the request, not of the server
            raise UserError(f"a prompt token is not one of the {self.config.vocab_size} of '{self.name}'")
        if not -(2**63) <= r.seed < 2**63:
            raise ValueError("a seed must fit into 64 bits")
        temperature = max(r.temperature, COLDEST) if r.temperature else 0.0
        top_p = max(r.top_p, NARROWEST)
        return [r.prompt_ids, r.max_tokens, r.seed, temperature, top_p, r.stop_ids, r.alternatives]

    async def _ask(self, one: _Open, command: list[Any]) -> Any:
        if self._process is None or self.state not in ("ready", "stopped"):
            raise HostDied(f"'{self.name}' is not there at the moment ({self.state})", self._back_in())
        number, process = next(self._numbers), self._process
        self._open[number] = one
        process.tell([command[0], number, *command[1:]])
        try:
            return await one.future
        finally:
            # cancelled, or the one who listened raised: the slot must not go on for nobody
            if self._open.pop(number, None) is not None:
                self._cancelled += 1
                process.tell(["cancel", number])

    # ---- what comes back ----

    def _take(self, ready: asyncio.Future[None], kind: int, body: bytes) -> None:
        if kind == NOTE:
            self._note(ready, *json.loads(body))
            return
        pieces = unpack(body)
        self._in_use, self._waiting = pieces.in_use, pieces.waiting
        fresh, self._told = pieces.tokens - self._told, pieces.tokens
        self._tokens += fresh
        self._token_rate.add(fresh)
        for written in pieces.written:
            if (one := self._open.get(written.stream)) is not None:
                self._hear(one, written)
        for stream, stop in pieces.ended:
            if (one := self._open.pop(stream, None)) is not None:
                self._end(one, _sample(one, one.ids, one.logprobs, stop))

    def _hear(self, one: _Open, written: Written) -> None:
        one.ids += written.ids
        one.logprobs += written.logprobs
        if one.heard is None or one.future.done():
            return
        try:
            one.heard(Piece(tuple(written.ids), tuple(written.logprobs), tuple(written.alternatives)))
        except Exception as error:  # of the one who listens: nobody else's business
            one.future.set_exception(error)

    def _note(self, ready: asyncio.Future[None], what: str, *rest: Any) -> None:
        if what in ("ready", "failed"):
            if not ready.done():
                ready.set_result(None) if what == "ready" else ready.set_exception(UserError(rest[0]))
            return
        stream, value, *more = rest
        one = self._open.pop(stream, None)
        if one is None or one.future.done():
            return
        if what == "refused":
            one.future.set_exception(UserError(value))
        elif what == "broken":
            one.future.set_exception(Unavailable(f"'{self.name}' cannot answer: {value}", self._back_in()))
        elif what == "scores":
            one.future.set_result(value)
        else:
            samples = (_sample(one, ids, logprobs, Stop(stop)) for ids, logprobs, stop in value)
            self._end(one, Beams(samples, *more))

    def _end(self, one: _Open, result: Any) -> None:
        self._answers += 1
        self._answer_rate.add(1)
        if not one.future.done():
            one.future.set_result(result)


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def _sample(one: _Open, ids: Sequence[int], logprobs: Sequence[float], stop: Stop) -> Sample:
    assert one.request is not None
    spans = (Span(VERSION, len(ids)),) if ids else ()
    return Sample(one.request.prompt_ids, tuple(ids), tuple(logprobs), stop, spans)
