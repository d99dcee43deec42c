"""Are the steps right, too? "Right answer, wrong reasoning" as a number.

An outcome reward sees the answer alone. Where a family can check its steps
(:class:`liubai.problems.family.Audited`), this says of a thought which of them are right and whether the
answer follows from them. Left out on purpose: thoughts of families that have no checker, and empty ones —
a guess is no wrong reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence

from liubai.measure.reflection import thought_span
from liubai.problems import FAMILIES
from liubai.problems.family import Audited, Step
from liubai.types import Problem


def steps_of(problem: Problem, response: str) -> list[Step] | None:
    """The checked steps of the thought in ``response``; ``None`` when nothing can be checked. ``Step.end`` is
    a character of ``response``."""
    family = FAMILIES.get(problem.family)
    if not isinstance(family, Audited):
        return None
    start, end = thought_span(response)
    steps = family.steps(problem, response[start:end])
    return [Step(s.text, start + s.end, s.right, s.concludes) for s in steps] or None


def share_right(steps: Sequence[Step] | None) -> float:
    """The share of right steps; 0 without any, so that silence is no perfect process."""
    return sum(step.right for step in steps) / len(steps) if steps else 0.0


def is_sound(steps: Sequence[Step]) -> bool:
    """Every step is right, and the last one leads to an answer."""
    return bool(steps) and all(step.right for step in steps) and steps[-1].concludes


def unsound_share(
    problems: Sequence[Problem], responses: Sequence[str], right: Sequence[bool]
) -> float | None:
    """The share of right answers with a thought whose reasoning is not sound; ``None`` without any."""
    checked = [
        steps
        for problem, response, ok in zip(problems, responses, right, strict=True)
        if ok and (steps := steps_of(problem, response)) is not None
    ]
    return sum(not is_sound(steps) for steps in checked) / len(checked) if checked else None
