"""The options in a problem's ``meta``, checked without an answer and without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from liubai.grade.verifiers import VERIFIERS, tolerance_of

#: what each of ours reads of a meta; gym's is its own, judge's goes to a model, and checkers of one's own
#: read what they like
KNOWN: dict[str, tuple[str, ...]] = {
    "choice": ("choices",),
    "code": ("entry_point", "kind", "memory_mb", "timeout"),
    "countdown": (),
    "errand": (),
    "exact": (),
    "faithful": ("covers", "words"),
    "json": ("ordered", "subset"),
    "logic": ("kind", "max_signs"),
    "math": ("compute", "tolerance"),
    "number": ("tolerance", "unit"),
    "regex": ("ignore_case",),
    "sonnet": ("rhyme",),
    "summary": (),
    "verse": ("rhyme",),
}
#: what a meta may say whoever judges
ANYWHERE = frozenset({"prefilled", "question"})


def check_options(verifier: str, gold: str, meta: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for an option that ``verifier`` does not take, or a meta that is not JSON.

    What it reads of the gold answer on the way may be as wrong as it likes: that is found by judging it.
    """
    try:
        json.dumps(dict(meta))
    except TypeError as error:
        raise ValueError(f"meta goes to the verifier as JSON: {error}") from None
    if verifier in KNOWN:
        for name in meta:
            if name not in KNOWN[verifier] and name not in ANYWHERE:
                known = f"it knows {', '.join(KNOWN[verifier])}" if KNOWN[verifier] else "it has none"
                raise ValueError(
                    f"meta '{name[:40]}' is no option of '{verifier}' ({known}); name the column so, or "
                    "leave it out of meta; where only some rows have it, leave the others' cells empty"
                )
    if verifier in VERIFIERS:
        try:
            VERIFIERS[verifier](gold, gold, meta)
        except ValueError as error:
            if str(error).startswith("meta '"):
                raise
    elif verifier == "math":
        tolerance_of(meta)
    elif verifier == "regex":
        from liubai.grade.structured import flag

        flag(meta, "ignore_case", False)
    elif verifier == "code":
        from liubai.grade.code import check_options as check_code

        check_code(meta)
