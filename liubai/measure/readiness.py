"""Can these questions be judged at all? Asked before anything starts, so that no run ends in its middle.

What is asked here costs next to nothing: does the verifier of every row exist, does it have what it needs,
are its options ones that it takes, can the user's checkers be loaded, and is there any gold answer of a few
that its verifier can judge? Whether all gold answers pass is the business of `liubai check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from liubai.errors import UserError
from liubai.grade import GradeItem, GraderPool, Verdict, check_verifier, is_ours
from liubai.grade.judge import PROGRAMS, UNLOADED
from liubai.grade.options import check_options
from liubai.measure.tricks import answered, fenced
from liubai.problems.questions import Entry, Questions, read_entries

#: gold answers that are judged
GOLDS = 8
#: answers that are enough to say that none can be judged
FEW = 4
#: what is said when nothing of a step or an evaluation could be judged
UNJUDGED = "every verdict was an error"


def require_ready(config: Questions, timeout_s: float = 5.0) -> None:
    """Raises ``UserError`` with file and line for the first row that could not be judged, and when of
    :data:`GOLDS` gold answers from all over the file none can be."""
    known: set[str] = set()
    own: list[tuple[int, GradeItem]] = []
    entries = read_entries(config)
    for line, _, problem, _ in entries:
        name = problem.verifier
        try:
            if name not in known:
                check_verifier(name)
                known.add(name)
                if not is_ours(name):
                    item = GradeItem(name, problem.gold, f"<answer>{problem.gold}</answer>", problem.meta)
                    own.append((line, item))
            check_options(name, problem.gold, problem.meta)
        except (UserError, ValueError) as error:
            raise UserError(f"{config.path}:{line}: {error}") from None
    golds = _golds(entries)
    with GraderPool(workers=1, timeout_s=timeout_s) as pool:
        verdicts = pool.gather(pool.submit([item for _, item in own + golds]))
    for (line, _), verdict in zip(own, verdicts, strict=False):
        if verdict.error is not None and UNLOADED in verdict.error:
            raise UserError(f"{config.path}:{line}: {verdict.error}")
    errors = [verdict.error for verdict in verdicts[len(own) :]]
    if errors and errors[0] is not None and None not in errors:
        raise UserError(
            f"{config.path}:{golds[0][0]}: the gold answer cannot be judged: {errors[0]}. Nor can any other "
            f"of {len(errors)} that were tried; run `liubai check` on the questions"
        )


def _golds(entries: list[Entry]) -> list[tuple[int, GradeItem]]:
    """(line, what has to be right) of a few rows, evenly spaced; of programs, those with a solution."""
    rows = [e for e in entries if e.problem.verifier not in PROGRAMS or e.solution.strip()]
    found = []
    for e in (rows[i * len(rows) // GOLDS] for i in range(GOLDS)) if len(rows) > GOLDS else rows:
        p = e.problem
        right = fenced(e.solution) if p.verifier in PROGRAMS else answered(p.gold)
        found.append((e.line, GradeItem(p.verifier, p.gold, right, p.meta)))
    return found


def warn_unjudged(verdicts: Iterable[Verdict], warn: Callable[[str], None], said: Path) -> None:
    """Say so when all of ``verdicts`` are errors, once a stage. Responses without an answer, which no
    verifier has seen, count for nothing where :data:`FEW` others are left. ``said`` is the file in which
    ``warn`` keeps what was said: a run that goes on after a kill says no more than one left alone."""
    given = list(verdicts)
    judged = [v for v in given if v.error is not None or v.answer is not None]
    errors = [v.error for v in judged if v.error is not None]
    if not errors or len(errors) < len(judged) or len(judged) < min(FEW, len(given)):
        return
    if said.exists() and UNJUDGED in said.read_text(encoding="utf-8"):
        return
    warn(f"{UNJUDGED}: {errors[0]}; run `liubai check` on the questions")
