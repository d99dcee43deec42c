"""Your own questions: which rows become problems, which of them are held out, and which are left out.

A question's split is decided by its own words alone (``words.py``), not by the instruction before it, so
that no order, other row or wording of white space can move it. Near duplicates stay together: they are held
out if the words of all of them say so, and no row that is added can hold out what was trained on. Questions
that share ten words in a row with a named evaluation set are left out of training, and so are their near
duplicates.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from liubai.errors import UserError
from liubai.problems.rows import Row, digest, place, read_rows
from liubai.problems.words import HAN, grams, identity, near_duplicates, share_of
from liubai.types import Problem

#: where the questions of a file to keep out may stand, if not in the recipe's own column
KEPT_IN = ("question", "problem", "prompt")

#: What decides on which side of the split a question of a file stands, and whether it is trained on.
SPLIT = ("question", "eval_share", "keep_out")
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")


class Questions(BaseModel):
    """A file of questions. ``question``, ``answer``, ``verifier``, ``language``, ``solution`` name
    columns; rows without a verifier have ``default_verifier``; ``meta`` columns go to the verifier."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    question: str = "question"
    answer: str = "answer"
    verifier: str = "verifier"
    language: str = "language"
    #: of questions whose answer is a program: one that passes the tests, by which `liubai check` proves them
    solution: str = "solution"
    meta: tuple[str, ...] = ()
    default_verifier: str = "math"
    #: code that rows may name as their verifier: data alone never chooses what is run
    checkers: tuple[str, ...] = ()
    #: what comes before the answer in its column, such as GSM8K's "####"; the last one counts
    answer_after: str = ""
    #: asked before every question, such as "Put the answer in \\boxed{}."
    instruction: str = ""
    eval_share: float = Field(0.2, ge=0, le=1)
    #: files whose questions must not be trained on; they stand in ``question`` or a column of KEPT_IN
    keep_out: tuple[str, ...] = ()

    def located(self, folder: Path) -> Questions:
        """The same with paths that are relative to ``folder``, where the recipe stands, made absolute."""

        def code(name: str) -> str:
            file, colon, function = name.rpartition(":")
            return f"{place(file, folder)}:{function}" if colon and file.endswith(".py") else name

        return self.model_copy(
            update={
                "path": place(self.path, folder),
                "keep_out": tuple(place(path, folder) for path in self.keep_out),
                "default_verifier": code(self.default_verifier),
                "checkers": tuple(map(code, self.checkers)),
            }
        )


class Entry(NamedTuple):
    """A row: ``text`` is the question without the instruction, by which it is known; ``solution`` a program
    that should pass, where gold is a program's tests and the row has one, or ""."""

    line: int
    text: str
    problem: Problem
    solution: str


@dataclass(frozen=True, slots=True)
class Question:
    """``line`` is that of the file. ``held_out`` is its split; ``left_out`` why it is in none, or "".
    ``solution`` and ``text`` are those of :class:`Entry`."""

    line: int
    problem: Problem
    held_out: bool
    left_out: str = ""
    solution: str = ""
    text: str = ""


def read_entries(config: Questions) -> list[Entry]:
    """All rows. Raises ``UserError`` with file and line for a row that is no question."""
    entries = [_entry(row, config, line) for line, row in read_rows(config.path)]
    if not entries:
        raise UserError(f"'{config.path}' has no questions")
    return entries


def read_questions(config: Questions) -> list[Question]:
    """All rows, with their splits. Raises ``UserError`` with file and line for a row that is no question."""
    entries = read_entries(config)
    groups = near_duplicates([e.text for e in entries])
    share: dict[int, float] = {}  # of each group, the greatest: a new row never holds out what was trained on
    for group, entry in zip(groups, entries, strict=True):
        share[group] = max(share.get(group, 0.0), share_of(entry.text))
    kept_out = _kept_out(config, entries, groups)
    same: dict[tuple[str, ...], Entry] = {}
    alike: dict[tuple[int, str], Entry] = {}
    found = []
    for group, entry in zip(groups, entries, strict=True):
        line, text, problem, solution = entry
        held_out = share[group] < config.eval_share
        twin = same.setdefault(identity(text), entry)
        # what is worded a little differently and has another answer is another question
        first = alike.setdefault((group, problem.gold), entry)
        why = ""
        if twin is not entry or first is not entry:
            other = twin if twin is not entry else first
            why = f"nearly the same as line {other.line}"
            if problem.gold != other.problem.gold:
                why += ", with another answer"
        elif not held_out and group in kept_out:
            why = f"shares ten words with {kept_out[group]}"
        found.append(Question(line, problem, held_out, why, solution, text))
    return found


def disagreement(one: Questions, other: Questions) -> str:
    """The first key by which two tables of one file split it differently, or "": what one trains on, the
    other may hold out. Columns of verifiers, answers and instructions move no question."""
    if realpath(one.path) != realpath(other.path):
        return ""
    sides = [{key: getattr(table, key) for key in SPLIT} for table in (one, other)]
    for side in sides:
        side["keep_out"] = {realpath(path) for path in side["keep_out"]}
    return next((key for key in SPLIT if sides[0][key] != sides[1][key]), "")


def splits(found: Sequence[Question]) -> tuple[list[Problem], list[Problem]]:
    """What is trained on, and what is held out: of the latter those first whose words hash lowest."""
    used = [q for q in found if not q.left_out]
    held_out = sorted((q for q in used if q.held_out), key=lambda q: share_of(q.text))
    return [q.problem for q in used if not q.held_out], [q.problem for q in held_out]


def left_out(found: Sequence[Question]) -> str:
    """How many are in no split, and why, in one sentence; "" if all are in one."""
    reasons = Counter(re.sub(r"(as) line \d+", r"\1 another", q.left_out) for q in found if q.left_out)
    if not reasons:
        return ""
    why = "; ".join(f"{n}: {reason}" for reason, n in sorted(reasons.items()))
    return f"{reasons.total()} of {len(found)} questions are left out ({why}); `liubai check` names them"


def _entry(row: Row, config: Questions, line: int) -> Entry:
    where = f"{config.path}:{line}"
    question = _text(row, config.question, where)
    answer = _text(row, config.answer, where, structured=True)
    if config.answer_after:
        _, mark, answer = answer.rpartition(config.answer_after)
        if not mark:
            raise UserError(f"{where}: '{config.answer}' has no '{config.answer_after}'")
        answer = answer.strip()
    if not question.strip() or not answer.strip():
        empty = config.question if not question.strip() else config.answer
        raise UserError(f"{where}: '{empty}' is empty")
    if missing := [name for name in config.meta if name not in row]:
        raise UserError(f"{where}: there is no column '{missing[0]}'; {_columns(row)}")
    verifier = str(row.get(config.verifier) or config.default_verifier)
    if ":" in verifier and verifier != config.default_verifier:
        named = {c.rpartition("/")[2]: c for c in config.checkers}  # a recipe may stand elsewhere
        if verifier not in named and verifier not in config.checkers:
            raise UserError(f"{where}: '{verifier}' is code; to run it, name it in checkers")
        verifier = named.get(verifier, verifier)
    problem = Problem(
        prompt=f"{config.instruction}\n{question}" if config.instruction else question,
        gold=answer,
        verifier=verifier,
        family="questions",
        language=str(row.get(config.language) or _language(question)),
        meta=_meta(row, config),
    )
    solution = row.get(config.solution)
    return Entry(line, question, problem, solution if isinstance(solution, str) else "")


def _meta(row: Row, config: Questions) -> dict[str, Any]:
    """What goes to the verifier. A cell that is empty or null says nothing, and the default holds."""
    meta = {name: row[name] for name in config.meta if row[name] is not None}
    if config.path.lower().endswith(".csv"):  # where every cell is text, 0.01 has to be a number all the same
        meta = {name: _cell(text) for name, text in meta.items() if text.strip()}
    return meta


def _cell(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _text(row: Row, name: str, where: str, structured: bool = False) -> str:
    if name not in row:
        raise UserError(
            f"{where}: there is no column '{name}'; {_columns(row)}. A recipe says which is which "
            '(question = "…", answer = "…")'
        )
    value = row[name]
    if isinstance(value, bytes):  # Parquet's, where the writer did not say that it is text
        with contextlib.suppress(UnicodeDecodeError):
            value = value.decode()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: '{name}' must be text or a number, not {value}")
    if not number and not isinstance(value, str | (list | dict if structured else str)):
        shown = json.dumps(value, default=lambda other: type(other).__name__)
        raise UserError(f"{where}: '{name}' must be text or a number, not {shown[:60]}")
    text = value if isinstance(value, str) else str(value) if number else _json(value, name, where)
    if _NO_TEXT.search(text):
        raise UserError(f"{where}: '{name}' has a character that is no text (NUL, or half of a pair)")
    return text


def _columns(row: Row) -> str:
    return "there are: " + (", ".join(map(str, row)) or "none")


def _json(value: object, name: str, where: str) -> str:
    """A list or an object as it would stand in JSON: the tests of a program, say."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: '{name}' is not JSON ({error})") from None


def _language(text: str) -> str:
    return "zh" if len(HAN.findall(text)) * 4 > len(text) else "en"


def _kept_out(config: Questions, entries: Sequence[Entry], groups: Sequence[int]) -> dict[int, str]:
    """Groups with a question that shares ten words with a file to keep out -> which file."""
    forbidden: dict[int, str] = {}
    for path in config.keep_out:
        for line, row in read_rows(path):
            names = (config.question, *KEPT_IN)
            column = next((name for name in names if name in row), None)
            if column is None:
                tried = ", ".join(f"'{name}'" for name in dict.fromkeys(names))
                raise UserError(f"{path}:{line}: a file to keep out needs a column {tried}; {_columns(row)}")
            for gram in grams(_text(row, column, f"{path}:{line}")):
                forbidden.setdefault(gram, path)
    found: dict[int, str] = {}
    for group, entry in zip(groups, entries, strict=True):
        if forbidden and (shared := grams(entry.text) & forbidden.keys()):
            found.setdefault(group, forbidden[min(shared)])
    return found


def digests(config: Questions) -> dict[str, str]:
    """What the files hold, for a stage's fingerprint: with other rows it is another stage."""
    return {path: digest(path) for path in (config.path, *config.keep_out)}
