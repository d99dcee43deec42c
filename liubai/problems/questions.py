"""Your own questions: which rows become problems, which of them are held out, and which are left out.

A question's split is decided by its words alone, so that no order, new row or wording of white space can
move it. Near duplicates go where the first of them goes. Questions that share ten words in a row with a
named evaluation set are left out of training.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from liubai.errors import UserError, nearest
from liubai.problems.rows import HUB, Row, read_rows
from liubai.types import Problem

GRAM = 10  #: words in a row that two questions may not share across the line to an evaluation set
SHINGLE = 3  #: words, for telling near duplicates
SIMILAR = 0.8  #: share of shingles that near duplicates have in common (Jaccard)
#: questions longer than this are cut for telling duplicates
MAX_QUESTION = 100_000

_WORD = re.compile(r"\w+", re.UNICODE)
_HAN = re.compile(r"[\u3400-\u9fff]")


class Questions(BaseModel):
    """A file of questions. ``question``, ``answer``, ``verifier`` and ``language`` name columns; the
    verifier of rows that name none is ``default_verifier``; ``meta`` columns go to the verifier."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    question: str = "question"
    answer: str = "answer"
    verifier: str = "verifier"
    language: str = "language"
    meta: tuple[str, ...] = ()
    default_verifier: str = "math"
    #: code that rows may name as their verifier: data alone never chooses what is run
    checkers: tuple[str, ...] = ()
    #: what comes before the answer in its column, such as GSM8K's "####"; the last one counts
    answer_after: str = ""
    #: asked before every question, such as "Put the answer in \\boxed{}."
    instruction: str = ""
    eval_share: float = Field(0.2, ge=0, le=1)
    #: files whose questions must not be trained on; their questions stand in ``question``
    keep_out: tuple[str, ...] = ()

    def located(self, folder: Path) -> Questions:
        """The same with paths that are relative to ``folder``, where the recipe stands, made absolute."""

        def place(path: str) -> str:
            return path if path.startswith(HUB) else str((folder / path).absolute())

        def code(name: str) -> str:
            file, colon, function = name.rpartition(":")
            return f"{place(file)}:{function}" if colon and file.endswith(".py") else name

        return self.model_copy(
            update={
                "path": place(self.path),
                "keep_out": tuple(map(place, self.keep_out)),
                "default_verifier": code(self.default_verifier),
                "checkers": tuple(map(code, self.checkers)),
            }
        )


@dataclass(frozen=True, slots=True)
class Question:
    """``line`` is that of the file. ``held_out`` is its split; ``left_out`` why it is in none, or ""."""

    line: int
    problem: Problem
    held_out: bool
    left_out: str = ""


def read_questions(config: Questions) -> list[Question]:
    """All rows, with their splits. Raises ``UserError`` with file and line for a row that is no question."""
    problems = [(line, _problem(row, config, line)) for line, row in read_rows(config.path)]
    if not problems:
        raise UserError(f"'{config.path}' has no questions")
    forbidden = _grams_of(config)
    groups = near_duplicates([p.prompt for _, p in problems])
    first: dict[int, int] = {}
    found = []
    for i, (line, problem) in enumerate(problems):
        leader = first.setdefault(groups[i], i)
        held_out = share_of(problems[leader][1].prompt) < config.eval_share
        why = ""
        if leader != i:
            why = f"nearly the same as line {problems[leader][0]}"
        elif not held_out and forbidden and (shared := grams(problem.prompt) & forbidden.keys()):
            why = f"shares ten words with {forbidden[min(shared)]}"
        found.append(Question(line, problem, held_out, why))
    return found


def splits(found: Sequence[Question]) -> tuple[list[Problem], list[Problem]]:
    """What is trained on, and what is held out."""
    used = [q for q in found if not q.left_out]
    train, held_out = ([q.problem for q in used if q.held_out is side] for side in (False, True))
    return train, held_out


def _problem(row: Row, config: Questions, line: int) -> Problem:
    where = f"{config.path}:{line}"
    question = _text(row, config.question, where)
    answer = _text(row, config.answer, where)
    if config.answer_after:
        _, mark, answer = answer.rpartition(config.answer_after)
        if not mark:
            raise UserError(f"{where}: '{config.answer}' has no '{config.answer_after}'")
        answer = answer.strip()
    if not question.strip() or not answer.strip():
        empty = config.question if not question.strip() else config.answer
        raise UserError(f"{where}: '{empty}' is empty")
    if missing := [name for name in config.meta if name not in row]:
        raise UserError(f"{where}: there is no column '{missing[0]}'; {nearest(missing[0], row)}")
    verifier = str(row.get(config.verifier) or config.default_verifier)
    if ":" in verifier and verifier != config.default_verifier:
        named = {c.rpartition("/")[2]: c for c in config.checkers}  # a recipe may stand elsewhere
        if verifier not in named and verifier not in config.checkers:
            raise UserError(f"{where}: '{verifier}' is code; to run it, name it in checkers")
        verifier = named.get(verifier, verifier)
    return Problem(
        prompt=f"{config.instruction}\n{question}" if config.instruction else question,
        gold=answer,
        verifier=verifier,
        family="questions",
        language=str(row.get(config.language) or _language(question)),
        meta={name: row[name] for name in config.meta},
    )


def _text(row: Row, name: str, where: str) -> str:
    if name not in row:
        raise UserError(f"{where}: there is no column '{name}'; {nearest(name, map(str, row))}")
    value = row[name]
    if isinstance(value, bool) or value is None:
        raise UserError(f"{where}: '{name}' must be text or a number, not {json.dumps(value)}")
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    return json.dumps(value, ensure_ascii=False)  # tests of a program, say


def _language(text: str) -> str:
    return "zh" if len(_HAN.findall(text)) * 4 > len(text) else "en"


# ---- words ----


def words(text: str) -> list[str]:
    """Letters and digits, in small letters; of Chinese, every character is a word."""
    plain = unicodedata.normalize("NFKC", text[:MAX_QUESTION]).casefold()
    found: list[str] = []
    for word in _WORD.findall(plain):
        found += word if _HAN.search(word) else [word]
    return found


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the words of a question alone."""
    digest = blake2b(" ".join(words(text)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def grams(text: str) -> set[int]:
    """The ten-word runs of a text, as hashes; of a shorter text, all of it (if three words or more)."""
    return set(_runs(words(text), GRAM))


def _runs(listed: Sequence[str], n: int) -> Iterator[int]:
    if SHINGLE <= len(listed) < n:
        n = len(listed)
    for i in range(len(listed) - n + 1):
        yield int.from_bytes(blake2b(" ".join(listed[i : i + n]).encode(), digest_size=8).digest(), "big")


def _grams_of(config: Questions) -> dict[int, str]:
    """Ten-word runs of the files to keep out -> which file."""
    found: dict[int, str] = {}
    for path in config.keep_out:
        for line, row in read_rows(path):
            for gram in grams(_text(row, config.question, f"{path}:{line}")):
                found.setdefault(gram, path)
    return found


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """A group's number for each text; texts of a group have the same numbers and :data:`SIMILAR` of their
    three-word runs in common, directly or by way of others. With other numbers it is another question.

    Only texts that share one of their rarest runs are compared: two sets with a Jaccard index J must share
    one among the ``(1 − J)·n + 1`` rarest of either (prefix filtering, Chaudhuri et al. 2006).
    """
    listed = [words(t) for t in texts]
    runs = [frozenset(_runs(own, SHINGLE)) or frozenset(_runs([" ".join(own)], 1)) for own in listed]
    numbers = [[word for word in own if word.isdigit()] for own in listed]
    count: dict[int, int] = defaultdict(int)
    for own in runs:
        for run in own:
            count[run] += 1
    group = list(range(len(texts)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    seen: dict[int, list[int]] = defaultdict(list)
    for i, own in enumerate(runs):
        rare = sorted(own, key=lambda run: (count[run], run))
        prefix = rare[: int((1 - SIMILAR) * len(rare)) + 1]
        for j in dict.fromkeys(j for run in prefix for j in seen[run]):
            if root(i) == root(j) or numbers[i] != numbers[j]:
                continue
            if len(own & runs[j]) >= SIMILAR * len(own | runs[j]):
                a, b = sorted((root(i), root(j)))
                group[b] = a  # the first stands for all
        for run in prefix:
            seen[run].append(i)
    return [root(i) for i in range(len(texts))]


def digests(config: Questions) -> dict[str, str]:
    """What the files hold, for a stage's fingerprint: with other rows it is another stage."""
    found: dict[str, str] = {}
    for path in (config.path, *config.keep_out):
        state = blake2b(digest_size=16)
        for line, row in read_rows(path):
            state.update(f"{line} {json.dumps(row, sort_keys=True, default=str)}\n".encode())
        found[path] = state.hexdigest()
    return found
