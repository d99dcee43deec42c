"""What a problem family is, and how (seed, split, index) becomes a problem.

Train and eval are disjoint by construction: a problem's canonical key is hashed, and the hash alone
says which split it belongs to. No seed, index or wording can move it to the other side.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from liubai.errors import UserError
from liubai.seeds import stream
from liubai.types import Problem

Split = Literal["train", "eval"]

#: Share of keys held out for evaluation.
EVAL_SHARE = 0.2
#: A family that shows no problem of a split in so many has too few of them.
DRAWS = 200


class Habits(BaseModel):
    """How the people wrote whose text the base model reads. Shares are of documents.

    ``blind`` guess with no thought at all; the others search, and after each failed try give up
    with probability ``stop``, except the few ``patient`` ones. Searchers are ``methodical`` (they
    go through the possibilities in order, and stop at the end of the list) or restless (they jump
    about). ``chinese`` of them write their asides in Chinese. ``hopeless`` of the problems that they
    write about have no solution.

    In the wide world there are two languages. Most write in that of the question; of the patient, ``mixed``
    write each line in either, and ``muttered`` of their lines begin with a word that says nothing. Summaries
    and errands are ``careless``ly done wrong, or done without courtesy (``rude``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    blind: float = Field(0.7, ge=0, le=1)
    stop: float = Field(0.2, ge=0, le=1)
    patient: float = Field(0.1, ge=0, le=1)
    methodical: float = Field(0.5, ge=0, le=1)
    chinese: float = Field(0.2, ge=0, le=1)
    hopeless: float = Field(0.0, ge=0, le=1)
    mixed: float = Field(0.0, ge=0, le=1)
    muttered: float = Field(0.0, ge=0, le=1)
    careless: float = Field(0.0, ge=0, le=1)
    rude: float = Field(0.0, ge=0, le=1)


#: People who think everything through, in one language, and are polite: the writers of good examples.
CAREFUL = Habits(blind=0.0, stop=0.0, patient=1.0, methodical=1.0, chinese=0.0)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a thought, which ends before character ``end`` of it; whether it is right, and whether the
    answer may follow from it."""

    text: str
    end: int
    right: bool
    concludes: bool = False


class Family(Protocol):
    """A kind of problem. One file, one class, registered in ``liubai.problems``."""

    name: str
    verifier: str
    #: every token text that its prompts and documents may contain, in a fixed order
    vocabulary: tuple[str, ...]

    def sample(self, rng: random.Random) -> Problem:
        """Draw a problem, from either split."""

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        """Draw a problem that people write about: unlike those of ``sample``, it may be hopeless."""

    def key(self, problem: Problem) -> str:
        """The same for all wordings and orders of one problem."""

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        """Found text about the problem: what follows the prompt, tags included."""


@runtime_checkable
class Audited(Protocol):
    """A family whose thoughts can be checked step by step."""

    def steps(self, problem: Problem, thought: str) -> list[Step]:
        """The steps of ``thought``, the text between the think tags. Never raises for any text."""


def split_of(key: str) -> Split:
    """Which split a canonical key belongs to."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") < EVAL_SHARE * 2**64 else "train"


def problem_at(family: Family, split: Split, seed: int, index: int) -> Problem:
    """Problem number ``index`` of a split: a pure function of its arguments.

    Raises ``UserError`` when the family seems to have none of that split.
    """
    rng = stream(seed, "problem", family.name, split, index)
    for _ in range(DRAWS):
        problem = family.sample(rng)
        if split_of(f"{family.name}/{family.key(problem)}") == split:
            return problem
    raise UserError(f"'{family.name}' has no {split} problems: none of {DRAWS} was one; widen its options")


def distinct_problems(family: Family, split: Split, seed: int, count: int) -> list[Problem]:
    """``count`` problems with ``count`` different keys: what a mean and its standard error assume.

    Raises ``UserError`` when the family does not seem to have that many.
    """
    found: dict[str, Problem] = {}
    for index in range(50 * count):
        problem = problem_at(family, split, seed, index)
        found.setdefault(family.key(problem), problem)
        if len(found) == count:
            return list(found.values())
    raise UserError(f"'{family.name}' has only about {len(found)} {split} problems, not {count}")
