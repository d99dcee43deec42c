"""The process of one model: ``python -m liubai.serve.inside FD``. Started by :class:`liubai.serve.host.Host`.

FD is one end of a socket; frames are those of :mod:`liubai.serve.wire`. First comes a note with the settings,
and ``["ready"]`` or ``["failed", text]`` goes back. Then each note in is a list of commands::

    ["write", stream, heard, prompt_ids, max_tokens, seed, temperature, top_p, stop_ids, alternatives]
    ["beams", stream, width, …the same fields from prompt_ids on]
    ["judge", stream, judge, [[question, response], …]]
    ["cancel", stream]

and out come pieces, and the notes ``["beams", stream, [[ids, logprobs, stop], …], steps]``,
``["scores", stream, […]]``, ``["refused", stream, text]`` (what was asked cannot be) and
``["broken", stream, text]`` (the fault is here). One loop does it all: commands are read between two steps of
the engine, a beam search advances one token and a judge reads a few answers at a time, so that nobody waits
for long. The process sleeps while there is nothing to do, leaves signals to its parent, and ends when the
socket does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from liubai.errors import UserError, is_out_of_memory
from liubai.model.checkpoint import load
from liubai.rollout.beam import BeamSearch
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.rollout.writer import Judge
from liubai.serve.errors import named
from liubai.serve.wire import NOTE, VERSION, Frames, Pieces, Written, note, pack
from liubai.stages.by_paths import judges_of
from liubai.stages.config import Compute
from liubai.types import Stop

#: Pieces that the other end is glad to handle in a second: with many streams, each is heard less often.
PIECES_A_SECOND = 1000
#: … but never more than this apart, in seconds.
LONGEST = 0.2
#: Requests are let in together, for each lot is a pass through the model that holds up all who are being
#: written: the seconds between two lots for each of these, and at most.
LOT, LONGEST_LOT = 1e-4, 0.02
#: Tokens of prompts that are read between two tokens of those who are being written. (One prompt alone may be
#: longer.)
PREFILL = 2048
#: The load is told at least so often while there is work, in seconds.
REPORT = 1.0
#: Answers that a judge reads between two steps.
JUDGED = 4


@dataclass(slots=True)
class Settings:
    """What the host says first. Folders are those of ``liubai run``; ``threads`` 0 leaves torch's choice."""

    checkpoint: str
    slots: int
    max_length: int
    device: str
    threads: int
    judges: dict[Judge, str] = field(default_factory=dict)


class Outbox:
    """Pieces of all streams, held back until they are due: a stream's first token and its end go at once, the
    rest at most every ``LONGEST`` seconds, oftener when few are listening."""

    def __init__(self, send: Callable[[bytes], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.send, self.clock = send, clock
        self.tokens = 0
        self._open: dict[int, Written] = {}
        self._curious: set[int] = set()
        self._heard: set[int] = set()  # those who listen; the others are told at the end
        self._new: set[int] = set()  # of these, who has heard nothing yet
        self._last = clock()

    def open(self, stream: int, heard: bool, alternatives: bool) -> None:
        self._open[stream] = Written(stream)
        if heard:
            self._heard.add(stream)
            self._new.add(stream)
        if alternatives:
            self._curious.add(stream)

    def close(self, stream: int) -> Written | None:
        self._heard.discard(stream)
        self._new.discard(stream)
        self._curious.discard(stream)
        return self._open.pop(stream, None)

    def streams(self) -> list[int]:
        return list(self._open)

    def pass_on(self, engine: TorchEngine, ended: Sequence[tuple[int, Stop]], news: bool = False) -> None:
        """After a step: take what it wrote, and send what is due. ``news``: the load has changed."""
        opened, curious, taken = self._open, self._curious, 0
        for stream, token, logprob, alternatives in engine.fresh():
            one = opened.get(stream)
            if one is None:
                continue
            one.ids.append(token)
            one.logprobs.append(logprob)
            if curious and stream in curious:
                one.alternatives.append(alternatives)
            taken += 1
        self.tokens += taken
        now = self.clock()
        since = now - self._last
        first = [stream for stream in self._new if opened[stream].ids]
        self._new.difference_update(first)
        full = since >= min(LONGEST, len(self._heard) / PIECES_A_SECOND)
        due = [stream for stream in self._heard if opened[stream].ids] if full else first
        last = {stream for stream, _ in ended}
        written = [self._take(stream) for stream in due if stream not in last]
        written += [one for stream in last if (one := self.close(stream)) is not None and one.ids]
        if written or ended or news or since >= REPORT:
            in_use = engine.in_use
            waiting = engine.pending - in_use
            self.send(pack(Pieces(in_use, waiting, self.tokens, written, list(ended))))
            if full:
                self._last = now

    def _take(self, stream: int) -> Written:
        one, self._open[stream] = self._open[stream], Written(stream)
        return one


class Inside:
    """The loop. ``run`` returns when the other end is gone."""

    def __init__(self, link: socket.socket, settings: Settings) -> None:
        self.link, self.frames, self.poll = link, Frames(), select.poll()
        self.poll.register(link, select.POLLIN)
        compute = Compute(device=settings.device)
        device = compute.where()
        folder = Path(settings.checkpoint)
        model, tokenizer = load(folder, dtype=compute.dtype(), device=device)
        self.model, self.eos_ids = model, tokenizer.eos_ids
        self.engine = TorchEngine(
            model,
            eos_ids=self.eos_ids,
            slots=settings.slots,
            max_length=settings.max_length,
            prefill=PREFILL,
        )
        self.let_in = 0.0  # when requests last were
        self.engine.load(model.state_dict(), VERSION)
        folders = {judge: Path(path) for judge, path in settings.judges.items()}
        self.judges = judges_of(folders, None, device)
        self.outbox = Outbox(link.sendall)
        self.judging: deque[tuple[int, Judge, list[tuple[str, str]], list[float]]] = deque()
        self.asked: deque[tuple[Request, int]] = deque()  # searches that have not begun: a request, a width
        self.search: tuple[int, BeamSearch] | None = None  # one at a time, for each holds much memory
        # kernels are compiled at the first use: not while somebody waits
        generate(self.engine, [Request(id=-1, prompt_ids=(tokenizer.eos_id,), max_tokens=2, seed=0)])

    def run(self) -> None:
        while True:
            busy = bool(self.engine.pending or self.judging or self.asked or self.search)
            commands = self._read(wait=not busy)
            if commands is None:
                return
            for command in commands:
                self._obey(*command)
            cancelled = any(command[0] == "cancel" for command in commands)
            try:
                ended = self._step()
            except (UserError, RuntimeError) as error:
                if not isinstance(error, UserError) and not is_out_of_memory(error):
                    raise
                self._fail_all(error)  # broken weights, no memory: all who were being written are lost
                continue
            self.outbox.pass_on(self.engine, ended, news=cancelled)
            self._search()
            self._judge()

    def _step(self) -> list[tuple[int, Stop]]:
        engine, now = self.engine, time.monotonic()
        lets_in = now - self.let_in >= min(LONGEST_LOT, LOT * engine.in_use)
        engine.lot = 1 if lets_in else engine.slots + 1
        if lets_in and engine.in_use < min(engine.pending, engine.slots):
            self.let_in = now
        return [(request.id, sample.stop) for request, sample in engine.step()]

    def _read(self, wait: bool) -> list[list[Any]] | None:
        """The commands that have come; ``None`` when nobody is there any more."""
        found: list[list[Any]] = []
        while self.poll.poll(None if wait and not found else 0):
            try:
                data = self.link.recv(1 << 18)
            except ConnectionResetError:
                return None
            if not data:
                return None
            for kind, body in self.frames.feed(data):
                assert kind == NOTE
                found += json.loads(body)
        return found

    def _obey(self, what: str, stream: int, *rest: Any) -> None:
        if what == "cancel":
            self._cancel(stream)
            return
        try:
            if what == "write":
                heard, *fields = rest
                request = _request(stream, *fields)
                self.engine.submit([request])
                self.outbox.open(stream, heard, request.alternatives > 0)
            elif what == "beams":
                width, *fields = rest
                self.asked.append((_request(stream, *fields), width))
            else:
                judge, answers = rest
                self.judging.append((stream, judge, list(map(tuple, answers)), []))
        except ValueError as error:
            self._refuse(stream, error)

    def _cancel(self, stream: int) -> None:
        self.engine.cancel([stream])
        self.outbox.close(stream)
        if self.search is not None and self.search[0] == stream:
            self.search = None
        self.asked = deque(search for search in self.asked if search[0].id != stream)
        self.judging = deque(job for job in self.judging if job[0] != stream)

    def _fail_all(self, error: Exception) -> None:
        told(error)
        for stream in self.outbox.streams():
            self.outbox.close(stream)
            self.link.sendall(note(["broken", stream, named(error)]))
        self.engine.abort()
        self.outbox.pass_on(self.engine, [], news=True)

    def _refuse(self, stream: int, error: Exception) -> None:
        self.link.sendall(note(["refused", stream, str(error)]))

    def _break(self, stream: int, error: Exception) -> None:
        """The others go on, whatever it was."""
        told(error)
        self.link.sendall(note(["broken", stream, named(error)]))

    def _judge(self) -> None:
        if not self.judging:
            return
        stream, judge, answers, scores = self.judging[0]
        some = answers[len(scores) : len(scores) + JUDGED]
        try:
            scores += self.judges[judge](some) if some else []
        except Exception as error:
            self.judging.popleft()
            self._refuse(stream, error) if isinstance(error, UserError) else self._break(stream, error)
            return
        if len(scores) == len(answers):
            self.judging.popleft()
            self.link.sendall(note(["scores", stream, scores]))

    def _search(self) -> None:
        if self.search is not None:
            self._advance(*self.search)
        while self.asked and self.search is None:
            request, width = self.asked.popleft()
            try:
                self.search = request.id, BeamSearch(self.model, request, width, eos_ids=self.eos_ids)
            except Exception as error:
                self._break(request.id, error)

    def _advance(self, stream: int, search: BeamSearch) -> None:
        try:
            if search.step():
                return
        except Exception as error:
            self._break(stream, error)
        else:
            found = [[s.completion_ids, s.logprobs, s.stop] for s in search.best()]
            self.link.sendall(note(["beams", stream, found, search.length]))
        self.search = None


def _request(
    stream: int,
    prompt_ids: list[int],
    max_tokens: int,
    seed: int,
    temperature: float,
    top_p: float,
    stop_ids: list[int],
    alternatives: int,
) -> Request:
    return Request(
        id=stream,
        prompt_ids=tuple(prompt_ids),
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        stop_ids=tuple(stop_ids),
        alternatives=alternatives,
    )


def told(error: Exception) -> None:
    """To whoever runs the server: no message, which may hold anything."""
    print(f"liubai: {named(error)}", file=sys.stderr, flush=True)


def main(fd: int) -> int:
    """The exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent, who got it too, lets answers finish first
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # what a library prints must not end up in the server's output
    with socket.socket(fileno=fd) as link:
        frames = Frames()
        first: list[tuple[int, bytes]] = []
        while not first:
            data = link.recv(1 << 16)
            if not data:
                return 0
            first = frames.feed(data)
        settings = Settings(**json.loads(first[0][1]))
        try:
            if settings.threads:
                torch.set_num_threads(settings.threads)
            inside = Inside(link, settings)
            link.sendall(note(["ready"]))
            inside.run()
        except UserError as error:
            link.sendall(note(["failed", str(error)]))
        except (BrokenPipeError, ConnectionResetError):
            pass
        except Exception as error:
            told(error)
            return 1
    return 0


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1])))  # threads of libraries must not keep us here
