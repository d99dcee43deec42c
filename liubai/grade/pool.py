"""Graders that can be killed: verdicts from worker processes, each answer with its own wall clock.

A checker that hangs, crashes or eats memory costs one *error* verdict and one process, nothing more:
the process group is killed, a new one takes over the rest of its batch, and the error is counted. No
signals are used in the caller's process, so the pool works from any thread. Bounded verifiers
(``is_bounded``) are graded at once in the caller's process; workers start with the first item that
needs one. POSIX only. Deliberately missing: a sandbox. A worker is a normal process of this user; do not
grade code that a model wrote with a checker that runs it as it is (the verifier ``code`` brings a sandbox).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from liubai.grade.judge import (
    LOAD_S,
    UNLOADED,
    GradeItem,
    Verdict,
    check_verifier,
    error_verdict,
    grade,
    is_bounded,
)

#: Items in one message at most. Batches save round trips; small ones keep the workers evenly busy.
BATCH = 16

_Job = tuple[int, GradeItem]


class GraderPool:
    """``submit`` answers, ``poll`` or ``gather`` verdicts. Close it, or use it as a context manager.

    ``timeout_s``: wall-clock seconds for one verdict. ``memory_mb``: address space of one worker.
    ``errors`` counts the error verdicts so far, those for unusable gold answers included.

    >>> with GraderPool() as pool:
    ...     verdicts = pool.gather(pool.submit(items))
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_mb: int = 4096) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError("a grader pool needs at least one worker and a positive time limit")
        self.workers, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self.errors = 0
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[_Job] = deque()
        self._open: dict[int, GradeItem] = {}
        self._results: dict[int, Verdict] = {}
        self._next = 0
        self._known: set[str] = set()
        self._processes: set[_Process] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, items: Sequence[GradeItem]) -> list[int]:
        """Tickets, in the order of ``items``. Raises ``UserError`` for an unknown verifier and
        ``TypeError`` for a meta that is not JSON, before anything is graded."""
        for item in items:
            if item.verifier not in self._known:
                check_verifier(item.verifier)
                self._known.add(item.verifier)
            if not is_bounded(item.verifier):
                json.dumps(dict(item.meta))
        with self._changed:
            self._refuse_when_closed()
            tickets = list(range(self._next, self._next + len(items)))
            self._next += len(items)
            jobs = list(zip(tickets, items, strict=True))
            self._open.update(jobs)
            away = [job for job in jobs if not is_bounded(job[1].verifier)]
            self._waiting.extend(away)
            if away and not self._threads:
                self._start_threads()
            self._changed.notify_all()
        for ticket, item in jobs:
            if is_bounded(item.verifier):
                self._finish(ticket, grade(item))
        return tickets

    def poll(self) -> dict[int, Verdict]:
        """All verdicts that are ready and were not handed out yet. Never waits."""
        with self._changed:
            ready = dict(sorted(self._results.items()))
            self._results.clear()
        return ready

    def gather(self, tickets: Sequence[int]) -> list[Verdict]:
        """The verdicts of ``tickets``, in their order, as soon as all are there.

        Raises ``KeyError`` for a ticket that was never given or whose verdict was handed out before.
        """
        with self._changed:
            for ticket in tickets:
                while ticket in self._open:
                    self._changed.wait()
                if ticket not in self._results:
                    raise KeyError(f"ticket {ticket} was never given, or its verdict was handed out")
            return [self._results.pop(ticket) for ticket in tickets]

    def close(self) -> None:
        """Kill the workers. Answers that wait get an error verdict (not counted in ``errors``)."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._waiting.clear()
            for process in self._processes:
                process.kill()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._changed:
            for ticket, item in self._open.items():
                self._results[ticket] = error_verdict(item, "the grader pool was closed")
            self._open.clear()
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the grader pool is closed")

    def _start_threads(self) -> None:
        atexit.register(self.close)  # a pool that nobody closed must not leave a hanging grader behind
        for i in range(self.workers):
            thread = threading.Thread(target=self._serve, name=f"grader-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _finish(self, ticket: int, verdict: Verdict) -> None:
        with self._changed:
            if self._open.pop(ticket, None) is None:
                return
            self._results[ticket] = verdict
            self.errors += verdict.error is not None
            self._changed.notify_all()

    # --- one thread a worker process ------------------------------------------------------------

    def _serve(self) -> None:
        """Keep one worker process alive and feed it batches until the pool is closed."""
        process: _Process | None = None
        batch: deque[_Job] = deque()
        while True:
            batch = batch or self._take()
            if not batch:
                break
            try:
                if process is not None and process.popen.poll() is not None:
                    self._drop(process)  # it died while idle: no answer is to blame
                    process = None
                if process is None:
                    process = self._start()
                process.work(batch, self.timeout_s, self._finish)
            except _LostError as lost:
                if process is not None:
                    self._drop(process)
                process = None
                if self._closed:
                    break
                ticket, item = batch.popleft()  # what it was busy with; the rest goes to a new process
                self._finish(ticket, error_verdict(item, str(lost)))
        if process is not None:
            self._drop(process)

    def _take(self) -> deque[_Job]:
        """The next batch; empty when the pool is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            count = min(BATCH, 1 + len(self._waiting) // (2 * self.workers), len(self._waiting))
            return deque(self._waiting.popleft() for _ in range(count))

    def _start(self) -> _Process:
        """A process that is ready. Raises :class:`_LostError` when it does not come up."""
        try:
            process = _Process(self.timeout_s, self.memory_mb)
        except OSError as error:  # no more processes, no more memory
            raise _LostError(f"no grader process could be started: {error}") from error
        with self._changed:
            self._processes.add(process)
            closed = self._closed
        try:
            if closed:
                raise _LostError("the grader pool was closed")
            process.wait_ready()
        except _LostError:
            self._drop(process)
            raise
        return process

    def _drop(self, process: _Process) -> None:
        with self._changed:
            self._processes.discard(process)
        process.kill()
        process.release()


class _LostError(Exception):
    """The worker process is of no use any more. The message is the error of the verdict."""


class _Process:
    """One worker process and its pipes. Used by one thread; only ``kill`` may come from others."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "liubai.grade.worker", str(timeout_s), str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # its own process group: children of a checker are killed with it
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.inbox, self.outbox = self.popen.stdin, self.popen.stdout
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.outbox, selectors.EVENT_READ)
        self.read = b""

    def wait_ready(self) -> None:
        self._message(LOAD_S, "the grader did not start in time")

    def work(self, batch: deque[_Job], timeout_s: float, finish: Callable[[int, Verdict], None]) -> None:
        """Have ``batch`` graded; items leave it from the left as their verdicts come.

        Raises :class:`_LostError` when the process hangs or dies; the first item left is the one to blame.
        """
        rows = [[ticket, i.verifier, i.gold, i.response, dict(i.meta)] for ticket, i in batch]
        # a worker that has died is noticed by the read below, with its exit code
        with contextlib.suppress(BrokenPipeError):
            self.send(json.dumps(rows).encode() + b"\n")
        late = f"timeout after {timeout_s} s"
        limit, message = timeout_s, late
        while batch:
            kind, *fields = self._message(limit, message)
            if kind == "loading":
                limit, message = LOAD_S, f"the checker {UNLOADED}: timeout after {LOAD_S} s"
                continue
            limit, message = timeout_s, late
            if kind == "done":
                ticket, correct, answer, parts, error = fields
                batch.popleft()
                finish(ticket, Verdict(correct, answer, parts, error))

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.inbox.write(view) or 0 :]

    def _message(self, limit_s: float, late: str) -> list[Any]:
        """The next message, which has to come within ``limit_s`` seconds."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self.read:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                raise _LostError(late)
            data = os.read(self.outbox.fileno(), 1 << 16)
            if not data:
                raise _LostError(self._obituary())
            self.read += data
        line, self.read = self.read.split(b"\n", 1)
        message: list[Any] = json.loads(line)
        return message

    def _obituary(self) -> str:
        try:
            code = self.popen.wait(0.3)
        except subprocess.TimeoutExpired:  # it lives on, but has closed its pipe
            return "the grader closed its output"
        return f"the grader crashed ({f'signal {-code}' if code < 0 else f'exit code {code}'})"

    def kill(self) -> None:
        """End it and all its children, at once. Harmless when it is dead already."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def release(self) -> None:
        """Reap it and close the pipes."""
        self.popen.wait()
        self.selector.close()
        self.inbox.close()
        self.outbox.close()


def grade_lines(items: Iterable[GradeItem], *, timeout_s: float = 5.0, workers: int = 2) -> Iterator[Verdict]:
    """Verdicts for a stream of answers, in its order, with bounded look-ahead and memory."""
    ahead: deque[int] = deque()
    with GraderPool(workers, timeout_s) as pool:
        for item in items:
            ahead += pool.submit([item])
            if len(ahead) >= 4 * BATCH * workers:
                yield from pool.gather([ahead.popleft()])
        while ahead:
            yield from pool.gather([ahead.popleft()])
