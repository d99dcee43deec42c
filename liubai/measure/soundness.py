"""Is a set of questions fit to train on? Asked before anything trains.

Every gold answer must pass its own verifier, and a battery of cheap tricks must not: what earns a reward
here is what a model will learn. A finding names its line; those that are ``fatal`` would teach the wrong
thing, the others cost time or say less than they seem to.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from liubai.errors import UserError
from liubai.grade import GradeItem, GraderPool, Verdict, check_verifier
from liubai.grade.judge import NAMED, PROGRAMS
from liubai.grade.options import check_options
from liubai.measure.tricks import PROGRAM_TRICKS, TRICKS, answered, fenced
from liubai.problems.family import Family, Split, distinct_problems
from liubai.problems.questions import Question
from liubai.problems.words import words

#: tricks are tried on the first rows of each verifier: they are about the verifier, not about the row
TRIED = 20
#: problems of a family that are looked at, of each split
DRAWN = 20
SPLITS: tuple[Split, ...] = ("train", "eval")
#: seconds that a verdict may take on average before it slows training down
SLOW = 0.2
#: verdicts of a verifier in a row that do not come in time before it is given up
GIVE_UP = 5
#: words of a question, and characters of an answer, that are worth a second look
LONG_QUESTION, LONG_ANSWER = 2000, 500


@dataclass(frozen=True, slots=True)
class Finding:
    line: int
    kind: str  #: verifier, gold, unproven, trick, duplicate, contradiction, kept out, split, slow, long
    message: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Soundness:
    """``seconds`` is the mean time of a verdict, of each verifier."""

    train: int
    held_out: int
    left_out: int
    seconds: dict[str, float]
    findings: list[Finding]

    @property
    def sound(self) -> bool:
        return not any(finding.fatal for finding in self.findings)


def soundness(
    questions: Sequence[Question],
    *,
    timeout_s: float = 5.0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Soundness:
    """Judge all gold answers, and the tricks on some. Never raises for what the questions hold."""
    left_out = [(q, _kind(q)) for q in questions if q.left_out]
    findings = [Finding(q.line, kind, q.left_out, kind == "contradiction") for q, kind in left_out]
    usable: list[Question] = []
    refused: dict[str, str] = {}  # by verifier: to ask for a sandbox takes time
    for q in questions:
        name = q.problem.verifier
        if name not in refused:
            refused[name] = _refusal(name)
        try:
            check_options(name, q.problem.gold, q.problem.meta)
            wrong = refused[name]
        except ValueError as error:
            wrong = refused[name] or str(error)
        if wrong:
            findings.append(Finding(q.line, "verifier", wrong, fatal=True))
        else:
            usable.append(q)
        asked, said = len(words(q.problem.prompt)), len(q.problem.gold)
        if asked > LONG_QUESTION:
            findings.append(Finding(q.line, "long", f"a question of {asked} words"))
        if said > LONG_ANSWER and name not in PROGRAMS:
            findings.append(Finding(q.line, "long", f"an answer of {said} characters"))
    findings += _unproven(usable)
    jobs = _jobs(usable)
    seconds: dict[str, list[float]] = {}
    unasked: dict[str, list[tuple[Question, str]]] = {}
    with GraderPool(workers=workers, timeout_s=timeout_s) as pool, ExitStack() as stack:
        threads = ThreadPoolExecutor(workers)
        # Ctrl-C waits for nobody: what waits is dropped, and the closing pool answers the rest
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        judged = threads.map(_Judge(pool), [item for _, _, item in jobs])
        for done, ((q, trick, item), (verdict, took)) in enumerate(zip(jobs, judged, strict=True), 1):
            if verdict is None:
                unasked.setdefault(item.verifier, []).append((q, trick))
            else:
                if verdict.answer is not None:  # without one the verifier is not even asked
                    seconds.setdefault(item.verifier, []).append(took)
                if finding := _finding(q, trick, verdict):
                    findings.append(finding)
            if progress:
                progress(done, len(jobs))
    means = {name: _mean(each, workers) for name, each in seconds.items()}
    findings += [
        Finding(0, "slow", f"'{name}' takes {mean:.2f} s a verdict")
        for name, mean in means.items()
        if mean > SLOW and name not in unasked
    ]
    findings += [
        Finding(
            left[0][0].line,
            "slow",
            f"'{name}' gave no verdict within {timeout_s:g} s, {GIVE_UP} times in a row; it was given up, "
            f"and {len(left)} answers were not judged",
            fatal=any(not trick for _, trick in left),  # a right answer that nobody judged is not proven
        )
        for name, left in unasked.items()
    ]
    used = [q for q in questions if not q.left_out]
    held_out = sum(q.held_out for q in used)
    if held_out in (0, len(used)):
        findings.append(Finding(0, "split", "nothing to train on" if held_out else "nothing is held out"))
    return Soundness(
        len(used) - held_out,
        held_out,
        len(questions) - len(used),
        means,
        sorted(findings, key=lambda f: f.line),
    )


class _Judge:
    """An item's verdict and its seconds, until a verifier hangs :data:`GIVE_UP` times in a row: then none.
    Called by as many threads as the pool has workers, so that no verdict waits for another one."""

    def __init__(self, pool: GraderPool) -> None:
        self._pool = pool
        self._hung: Counter[str] = Counter()  # a lost count costs one timeout more

    def __call__(self, item: GradeItem) -> tuple[Verdict | None, float]:
        if self._hung[item.verifier] >= GIVE_UP:
            return None, 0.0
        began = time.perf_counter()
        (verdict,) = self._pool.gather(self._pool.submit([item]))
        took = time.perf_counter() - began
        if verdict.error is not None and "timeout after" in verdict.error:
            self._hung[item.verifier] += 1
        elif verdict.answer is not None and self._hung[item.verifier] < GIVE_UP:
            self._hung[item.verifier] = 0
        return verdict, took


def _mean(seconds: Sequence[float], workers: int) -> float:
    """Without the longest, one a worker: the first verdict of each pays for imports."""
    rest = sorted(seconds)[:-workers] or seconds
    return sum(rest) / len(rest)


def drawn(family: Family) -> list[Question]:
    """A few problems of a family's splits, numbered as if they were the lines of a file."""
    problems = [p for split in SPLITS for p in distinct_problems(family, split, 0, DRAWN)]
    return [Question(line, p, line > DRAWN) for line, p in enumerate(problems, 1)]


def _kind(q: Question) -> str:
    if q.left_out.endswith("another answer"):
        return "contradiction"
    return "duplicate" if q.left_out.startswith("nearly") else "kept out"


def _refusal(verifier: str) -> str:
    try:
        check_verifier(verifier)
    except UserError as error:
        return str(error)
    return ""


def _right(q: Question) -> str | None:
    """A response that has to be right: gold itself, or where gold is no answer (a program's tests, a pattern,
    a form of verse) the row's solution."""
    if q.problem.verifier in PROGRAMS:
        return fenced(q.solution) if q.solution.strip() else None
    if q.problem.verifier in NAMED:
        return answered(q.solution) if q.solution.strip() else None
    if q.solution.strip() and q.problem.verifier == "regex":
        return answered(q.solution)
    if q.problem.verifier == "regex" and re.escape(q.problem.gold) != q.problem.gold:
        return None
    return answered(q.problem.gold) if q.problem.gold else None


def _unproven(questions: Sequence[Question]) -> list[Finding]:
    """Where no right answer is known, nothing shows that there is one: one finding a verifier."""
    without: dict[str, list[int]] = {}
    for q in questions:
        if _right(q) is None:
            without.setdefault(q.problem.verifier, []).append(q.line)
    return [
        Finding(
            lines[0],
            "unproven",
            f"that a right answer passes '{name}' could not be shown for {len(lines)} questions: "
            + ("they have no solution (a column of programs)" if name in PROGRAMS else "none is known"),
        )
        for name, lines in without.items()
    ]


def _jobs(questions: Sequence[Question]) -> list[tuple[Question, str, GradeItem]]:
    """(question, trick or "", what to judge)."""
    tried: dict[str, int] = {}
    jobs = []
    for q in questions:
        p = q.problem
        right = _right(q)
        if right is not None:
            jobs.append((q, "", GradeItem(p.verifier, p.gold, right, p.meta)))
        tried[p.verifier] = tried.get(p.verifier, 0) + 1
        if tried[p.verifier] <= TRIED:
            tricks = PROGRAM_TRICKS if p.verifier in PROGRAMS else TRICKS
            jobs += [
                (q, name, GradeItem(p.verifier, p.gold, response, p.meta))
                for name, trick in tricks.items()
                if (response := trick(p)) is not None and response != right
            ]
    return jobs


def _finding(q: Question, trick: str, verdict: Verdict) -> Finding | None:
    name = q.problem.verifier
    if trick:
        if not verdict.correct:
            return None
        return Finding(q.line, "trick", f"'{name}' calls this right: {trick}", fatal=True)
    if verdict.error is not None:
        return Finding(q.line, "gold", f"'{name}' cannot judge it: {verdict.error}", fatal=True)
    if not verdict.correct:
        what = "the solution" if name in PROGRAMS else f"its own gold answer: {q.problem.gold[:60]}"
        return Finding(q.line, "gold", f"'{name}' calls wrong {what}", fatal=True)
    return None
