"""The worker process of ``GraderPool``: ``python -m liubai.grade.worker TIMEOUT_S MEMORY_MB``.

In: one JSON line a batch, ``[[ticket, verifier, gold, response, meta], …]``. Out, one JSON line each:
``["ready"]``; ``["loading"]`` and ``["loaded"]`` around the import of user code, which has a clock of its
own; ``["done", ticket, correct, answer, parts, error]``. The pool keeps the wall clock and kills; the
limits here bound memory, and processor time should the pool itself be gone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from liubai.grade import clock
from liubai.grade.judge import (
    LOAD_S,
    UNLOADED,
    Checker,
    GradeItem,
    Verdict,
    describe,
    error_verdict,
    judge,
    load_checker,
)

#: Processor seconds beyond the wall clock's limit after which the system ends the process.
GRACE_S = 3


def main(timeout_s: float, memory_mb: int) -> None:
    inbox, say = _private_pipes()
    _limit_memory(memory_mb)
    os.environ["LIUBAI_VERDICT_S"] = str(timeout_s)  # a checker that waits for others plans with it
    checkers: dict[str, Checker | str] = {}
    say(["ready"])
    with inbox:
        for line in inbox:
            for ticket, *fields in json.loads(line):
                item = GradeItem(*fields)
                if item.verifier not in checkers:
                    say(["loading"])
                    _limit_processor(LOAD_S)
                    checkers[item.verifier] = _load(item.verifier)
                    say(["loaded"])
                _limit_processor(timeout_s)
                clock.start(timeout_s)
                v = _judge(item, checkers[item.verifier])
                say(["done", ticket, v.correct, v.answer, v.parts, v.error])


def _private_pipes() -> tuple[Any, Callable[[list[Any]], None]]:
    """Move the pool's pipes away from 0 and 1: what user code reads and prints must not touch them."""
    inbox = os.fdopen(os.dup(0), "rb")
    outbox = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)

    def say(message: list[Any]) -> None:
        outbox.write(json.dumps(message).encode() + b"\n")
        outbox.flush()

    return inbox, say


def _load(name: str) -> Checker | str:
    """The checker, made safe against anything that it may raise, or why there is none."""
    try:
        checker = load_checker(name)
    except BaseException as error:  # user code: SystemExit on import, too
        return f"'{name}' {UNLOADED}: {describe(error)}"

    def tamed(gold: str, answer: str, meta: Mapping[str, Any]) -> object:
        try:
            return checker(gold, answer, meta)
        except Exception:
            raise
        except BaseException as error:  # SystemExit and the like: one verdict is lost, not the worker
            raise RuntimeError(f"it tried to end the process ({type(error).__name__})") from error

    return tamed


def _judge(item: GradeItem, checker: Checker | str) -> Verdict:
    return error_verdict(item, checker) if isinstance(checker, str) else judge(item, checker)


def _limit_memory(memory_mb: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not write gigabytes of core
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    except (ImportError, OSError, ValueError):
        pass  # not on this system: the wall clock remains


def _limit_processor(seconds: float) -> None:
    """The system ends this process after ``seconds`` (and some grace) of computing from now on."""
    try:
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = int(usage.ru_utime + usage.ru_stime + seconds) + GRACE_S
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    except (ImportError, OSError, ValueError):
        pass


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # not by the front door: threads that user code left behind would keep us here
