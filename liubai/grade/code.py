"""The verifier ``code``: does a program pass its tests? Every program runs in a sandbox.

``meta["kind"]`` is one of

* ``assert`` (default). The gold is a test program, or a JSON list of pieces, of which each that runs an
  ``assert`` is worth the same share of the score and the others prepare the ground. It uses the names that
  the answer defines, as if it followed in the same file. It passes when it ends without an exception.
  Where it defines ``check`` and does not call it, as HumanEval's column ``test`` does, ``check(NAME)``
  follows it, with NAME from ``meta["entry_point"]``. Functions ``test_…`` are not called by themselves:
  a gold that tests nothing when it is run is an error.
* ``stdio``. The gold is a JSON list of ``[input, expected output]``. The program runs once for each; it has
  to exit with 0 and print what is expected, white space at the ends of lines and blank lines at the end
  apart. Each pair is worth the same.

Options: ``meta["timeout"]``, seconds of wall clock a run (default 5); ``meta["memory_mb"]`` (default 512);
``meta["entry_point"]``, a name that the tests take from the program even if Python has one like it (a
program that is asked for ``sum``), and that ``check`` is called with.
All runs together end before the pool's own clock does: a program that hangs is *wrong*, no error.

Tests and program never share a process. The tests run in a second sandbox and call the program over a
pipe (:mod:`liubai.grade.link`): arguments and results go over by value, as exact built-in types. So a
program cannot end before its tests, print their success, patch ``assert`` or ``abs``, look for the expected
values in frames, or return an object that is equal to everything. The price is what plain values cannot
carry: a result of a subclass arrives as its base (a namedtuple as a tuple, a Counter as a dict);
an instance, a generator or a class stays with the program and is used from afar, without arithmetic, order
and ``isinstance``; exceptions of the program's own classes arrive as ``RuntimeError``; the tests cannot
change the program's globals, nor the program those of the tests.

What cannot be prevented: a program that knows its tests by heart; one whose own helper functions, if the
gold relies on them, are made to agree with it; and one that changes in place a list that the gold passes
and then compares with. The gold decides what it proves.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from liubai.grade import clock
from liubai.grade.reach import calls, defines, reaches_test
from liubai.grade.sandbox import Limits, compiled, pipe, run, spawn, watch

LINK = compiled("link")

TIMEOUT_S, MAX_TIMEOUT_S = 5.0, 60.0  #: a run
MEMORY_MB, MIN_MEMORY_MB, MAX_MEMORY_MB = 512, 64, 4096
MAX_PIECES = 1_000  #: of a gold

#: Seconds that are kept back of the pool's time, for the kill and the verdict; a quarter where it is short.
MARGIN_S = 0.5


def code(gold: str, answer: str, meta: Mapping[str, Any]) -> float:
    """The share of its tests that the program ``answer`` passes, from 0 to 1.

    Raises ``ValueError`` when the gold or the options are unusable, ``UserError`` where there is no
    sandbox and ``RuntimeError`` when one did not come up in time.
    """
    limits = _limits(meta)
    left = clock.left()
    end = left - min(MARGIN_S, left / 4)  # "time left" at which we stop is what remains of the margin
    if _kind(meta) == "assert":
        return _asserts(_pieces(gold, _entry_point(meta)), answer, meta, _at_most(limits, end))
    pairs = _pairs(gold)
    stop_at = left - end if math.isfinite(left) else 0.0
    passed = [_prints(stdin, stdout, answer, limits, stop_at) for stdin, stdout in pairs]
    return sum(passed) / len(passed)


def check_options(meta: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for options that :func:`code` would not take."""
    _limits(meta)
    _entry_point(meta)
    _kind(meta)


def _kind(meta: Mapping[str, Any]) -> str:
    kind = meta.get("kind", "assert")
    if kind not in ("assert", "stdio"):
        raise ValueError(f"meta 'kind' is 'assert' or 'stdio', not {str(kind)[:40]!r}")
    return str(kind)


def _limits(meta: Mapping[str, Any]) -> Limits:
    seconds = _option(meta, "timeout", TIMEOUT_S, 0.01, MAX_TIMEOUT_S)
    memory_mb = _option(meta, "memory_mb", MEMORY_MB, MIN_MEMORY_MB, MAX_MEMORY_MB)
    return Limits(seconds=seconds, memory_mb=int(memory_mb))


def _option(meta: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = meta.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"meta '{name}' is a number from {least} to {most}, not {str(value)[:40]!r}")
    return value


def _entry_point(meta: Mapping[str, Any]) -> str:
    name = meta.get("entry_point", "")
    if not isinstance(name, str):
        raise ValueError(f"meta 'entry_point' is a name, not {str(name)[:40]!r}")
    return name


def _at_most(limits: Limits, seconds: float) -> Limits:
    return Limits(seconds=min(limits.seconds, seconds), memory_mb=limits.memory_mb)


# --- tests that call the program --------------------------------------------------------------------


def _pieces(gold: str, entry_point: str) -> list[tuple[str, bool]]:
    """The test program's pieces, and whether each counts.

    Raises ``ValueError`` for what is no Python and for tests of which none is run.
    """
    pieces = _json_list(gold)
    if pieces is None:
        pieces = [gold]
    elif not all(isinstance(piece, str) for piece in pieces):
        raise ValueError("a list of tests holds strings, each a piece of Python")
    parsed = [_parse(piece) for piece in pieces]
    uncalled = any(defines(m, "check") for m in parsed) and not any(calls(m, "check") for m in parsed)
    if uncalled and entry_point.isidentifier():
        pieces = [*pieces, f"check({entry_point})"]
        parsed.append(_parse(pieces[-1]))
    counted = [(piece, reaches_test(tree, parsed)) for piece, tree in zip(pieces, parsed, strict=True)]
    if not any(counts for _, counts in counted):
        why = (
            "it defines 'check': meta 'entry_point' says what to call it with"
            if uncalled
            else ("there is no assert in the tests, or only in functions that nothing calls")
        )
        raise ValueError(f"the tests test nothing: {why}")
    return counted


def _json_list(gold: str) -> list[Any] | None:
    """The list that ``gold`` is as JSON, ``None`` when it is none. Raises ``ValueError`` for a long one."""
    if not gold.lstrip().startswith("["):
        return None
    try:
        values = json.loads(gold)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list):
        return None
    if len(values) > MAX_PIECES:
        raise ValueError(f"more than {MAX_PIECES} tests")
    return values


def _parse(text: str) -> ast.Module:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are not Python: {error}") from error


def _asserts(
    pieces: Sequence[tuple[str, bool]], answer: str, meta: Mapping[str, Any], limits: Limits
) -> float:
    with contextlib.ExitStack() as stack:
        calls, answers = pipe(stack), pipe(stack)
        fds = (calls[0].fileno(), answers[1].fileno())
        program = f"serve({fds[0]}, {fds[1]}, {answer!r})"
        served = stack.enter_context(spawn(program, b"", limits, fds, prelude=LINK))
        fds = (answers[0].fileno(), calls[1].fileno())
        tests = f"examine({fds[0]}, {fds[1]}, {[piece for piece, _ in pieces]!r}, {_entry_point(meta)!r})"
        examined = stack.enter_context(spawn(tests, b"", limits, fds, subprocess.PIPE, LINK))
        for end in (*calls, *answers):
            end.close()  # the death of one side is then the end of the other's pipe
        result = watch(examined, limits)
        served.check()
    lines = result.stdout.decode(errors="replace").split("\n")[:-1]  # without what was cut off
    for line in lines:
        if line.startswith("broken"):
            raise ValueError(f"the tests need what the sandbox does not have: {line[7:]}")
    said = [line == "pass" for line in lines] + [False] * (len(pieces) - len(lines))
    scored = [passed for passed, (_, counts) in zip(said, pieces, strict=True) if counts]
    return sum(scored) / len(scored)


# --- programs that read and print -------------------------------------------------------------------


def _pairs(gold: str) -> list[tuple[str, str]]:
    pairs = _json_list(gold)
    if not pairs:
        raise ValueError('the gold of kind \'stdio\' is a JSON list of ["input", "expected output"] pairs')
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f'not a pair ["input", "expected output"]: {json.dumps(pair)[:60]}')
    return [(stdin, stdout) for stdin, stdout in pairs]


def _prints(stdin: str, expected: str, answer: str, limits: Limits, stop_at: float) -> bool:
    """Does the program print ``expected``? It does not when there is no time left to see it."""
    left = clock.left() - stop_at
    if left <= 0:
        return False
    result = run(answer, stdin.encode("utf-8", "surrogatepass"), _at_most(limits, left))
    return result.why == "ok" and _lines(result.stdout.decode(errors="replace")) == _lines(expected)


def _lines(text: str) -> list[str]:
    """Lines without white space at their ends, up to the last that is not blank."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
