"""Which answer must a thought make likely? Where gold is an answer, that one; where many are right, all that
are known.

For some problems ``gold`` is a specification (countdown: numbers and a target), and any answer that meets it
is right. Then a thought is measured by the probability of *some* right answer of a fixed list: those that the
family's careful writers give, whatever order they try things in. The list is the same for every model. Only
where there is no writer either, right answers of the model itself stand in: such figures cannot be compared
between models, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from liubai.grade import GradeItem, Verdict, extract
from liubai.grade.judge import PROGRAMS
from liubai.measure.tricks import answered
from liubai.problems import FAMILIES
from liubai.problems.family import CAREFUL
from liubai.seeds import stream
from liubai.types import Problem

#: Documents asked of a careful writer, and right answers that are kept.
DRAWN, KEPT = 32, 8

Judge = Callable[[Sequence[GradeItem]], list[Verdict]]
Source = Literal["gold", "written", "own", "none"]


@dataclass(frozen=True, slots=True)
class Gold:
    """Different right ``answers`` of a problem, and whose they are: the problem's own ``gold``, ``written``
    by the family, the model's ``own``, or ``none`` are known."""

    answers: tuple[str, ...]
    source: Source


def golds(
    problems: Sequence[Problem], own: Sequence[Sequence[str]], judge: Judge, known: Callable[[str], bool]
) -> list[Gold]:
    """For each problem. ``own`` are answers of the model that were judged right; ``known`` says which answers
    the model's tokenizer can write."""
    plain = judge([_item(p, p.gold) for p in problems])
    found: dict[int, Gold] = {
        i: Gold((normal(p.gold),), "gold")
        for i, (p, verdict) in enumerate(zip(problems, plain, strict=True))
        if verdict.correct and known(normal(p.gold))
    }
    drafts = {i: _written(p, known) for i, p in enumerate(problems) if i not in found}
    asked = [(i, text) for i, texts in drafts.items() for text in texts]
    verdicts = judge([_item(problems[i], text) for i, text in asked])
    right: dict[int, list[str]] = {}
    for (i, text), verdict in zip(asked, verdicts, strict=True):
        if verdict.correct:
            right.setdefault(i, []).append(text)
    for i in drafts:
        # a program does not stand where answers do
        mine = () if problems[i].verifier in PROGRAMS else map(normal, own[i])
        said = [a for a in dict.fromkeys(mine) if known(a)]
        source: Source = "written" if right.get(i) else "own" if said else "none"
        found[i] = Gold(tuple((right.get(i) or said)[:KEPT]), source)
    return [found[i] for i in range(len(problems))]


def normal(answer: str) -> str:
    """What two writings of one answer have in common: single blanks."""
    return " ".join(answer.split())


def _item(problem: Problem, answer: str) -> GradeItem:
    return GradeItem(problem.verifier, problem.gold, answered(answer), problem.meta)


def _written(problem: Problem, known: Callable[[str], bool]) -> list[str]:
    """Different answers of writers who try things in all orders until one is right."""
    family = FAMILIES.get(problem.family)
    if family is None:
        return []
    habits = CAREFUL.model_copy(update={"methodical": 0.0})
    documents = (
        family.document(problem, stream(0, "bridge", problem.prompt, i), habits) for i in range(DRAWN)
    )
    said = [normal(a) for document in documents if (a := extract(document).answer)]
    return [a for a in dict.fromkeys(said) if known(a)]
