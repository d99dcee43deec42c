"""Can these questions be judged at all? Asked before anything starts, so that no run ends in its middle.

What is asked here costs next to nothing: does the verifier of every row exist, does it have what it needs,
are its options ones that it takes, and can the user's checkers be loaded? Whether the gold answers pass is
the business of `liubai check`.
"""

from __future__ import annotations

from liubai.errors import UserError
from liubai.grade import GradeItem, GraderPool, check_verifier, is_ours
from liubai.grade.judge import UNLOADED
from liubai.grade.options import check_options
from liubai.problems.questions import Questions, read_entries


def require_ready(config: Questions) -> None:
    """Raises ``UserError`` with file and line for the first row that could not be judged."""
    known: set[str] = set()
    own: list[tuple[int, GradeItem]] = []
    for line, _, problem, _ in read_entries(config):
        name = problem.verifier
        try:
            if name not in known:
                check_verifier(name)
                known.add(name)
                if not is_ours(name):
                    own.append(
                        (
                            line,
                            GradeItem(name, problem.gold, f"<answer>{problem.gold}</answer>", problem.meta),
                        )
                    )
            check_options(name, problem.gold, problem.meta)
        except (UserError, ValueError) as error:
            raise UserError(f"{config.path}:{line}: {error}") from None
    if not own:
        return
    with GraderPool(workers=1) as pool:
        for (line, _), verdict in zip(own, pool.gather(pool.submit([item for _, item in own])), strict=True):
            if verdict.error is not None and UNLOADED in verdict.error:
                raise UserError(f"{config.path}:{line}: {verdict.error}")
