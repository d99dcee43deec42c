"""Answers that somebody already has, to be judged: a JSONL file of verifier, gold, response and meta."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence

from liubai.errors import UserError
from liubai.grade import GradeItem, check_verifier, is_ours
from liubai.problems.rows import broken_json, decoded_lines


def read_answers(file: str, checkers: Sequence[str]) -> Iterator[GradeItem]:
    """The items of a JSONL file, or of standard input when it is called ``-``; blank lines are skipped.
    A gold that is a number is taken like its text. Raises ``UserError`` naming file:line, or when there is
    no answer at all.

    Data never chooses code: a line may name a checker only if the command line named it, too.
    """
    empty = True
    for number, line in _lines(file):
        if not line.strip():
            continue
        empty, where = False, f"{file}:{number}"
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({broken_json(error)})") from None
        if not isinstance(raw, dict):
            raise UserError(f"{where}: must be a JSON object with 'verifier', 'gold' and 'response'")
        for key in ("verifier", "gold", "response"):
            if key not in raw:
                raise UserError(f"{where}: '{key}' is missing")
            if key == "gold" and isinstance(raw[key], list | dict):
                raw[key] = json.dumps(raw[key], ensure_ascii=False)  # tests of a program
            if key == "gold" and _is_number(raw[key]):
                raw[key] = str(raw[key])
            if not isinstance(raw[key], str):
                raise UserError(f"{where}: '{key}' must be a string, not {json.dumps(raw[key])[:40]}")
        meta = raw.get("meta") or {}
        if not isinstance(meta, dict):
            raise UserError(f"{where}: 'meta' must be an object, not {json.dumps(meta)[:40]}")
        try:
            check_verifier(raw["verifier"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if not is_ours(raw["verifier"]) and raw["verifier"] not in checkers:
            raise UserError(
                f"{where}: '{raw['verifier']}' is code; to run it, name it: --checker {raw['verifier']}"
            )
        yield GradeItem(raw["verifier"], raw["gold"], raw["response"], meta)
    if empty:
        raise UserError(
            f"'{file}' has no answers; write one a line: "
            '{"verifier": "number", "gold": "5", "response": "<answer>5</answer>"}'
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _lines(file: str) -> Iterator[tuple[int, str]]:
    try:
        with sys.stdin.buffer if file == "-" else open(file, "rb") as binary:
            yield from decoded_lines(binary, file)
    except OSError as error:
        raise UserError(f"cannot read '{file}': {error.strerror}") from None
