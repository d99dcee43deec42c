"""What a stage asks questions from: a mixture of families, or a file of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from liubai.errors import UserError
from liubai.problems import family, problem_at
from liubai.problems.family import distinct_problems
from liubai.problems.questions import Questions, left_out, read_questions, splits
from liubai.seeds import stream
from liubai.types import Problem


class Source(Protocol):
    """Questions for training, without end, and held-out ones. ``note`` says which were left out, or is ""."""

    note: str

    def train(self, seed: int, index: int) -> Problem:
        """Question ``index``: a pure function of its arguments, so that a run can go on anywhere."""

    def held_out(self, count: int) -> list[Problem]:
        """About ``count`` different ones, the same in every run."""

    def longest(self, length: Callable[[str], int]) -> int:
        """The greatest ``length`` of a prompt that ``train`` or ``held_out`` may give."""

    def languages(self) -> set[str]:
        """Of all questions."""


class Families:
    """Generated problems; ``shares`` say how often each family's turn is."""

    note = ""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.shares = shares

    def train(self, seed: int, index: int) -> Problem:
        names, weights = list(self.shares), list(self.shares.values())
        name = stream(seed, "family", "train", index).choices(names, weights)[0]
        return problem_at(family(name), "train", seed, index)

    def held_out(self, count: int) -> list[Problem]:
        total = sum(self.shares.values())
        return [
            problem
            for name, share in self.shares.items()
            for problem in distinct_problems(family(name), "eval", 0, max(1, round(count * share / total)))
        ]

    def longest(self, length: Callable[[str], int]) -> int:
        seen = [problem_at(family(name), "train", 0, i) for name in self.shares for i in range(64)]
        # there may be problems that are a little longer than those that were looked at
        return 2 * max(length(problem.prompt) for problem in seen)

    def languages(self) -> set[str]:
        return {problem_at(family(name), "train", 0, i).language for name in self.shares for i in range(64)}


class Bank:
    """The questions of a file, each once an epoch, in an order of each epoch's own."""

    def __init__(self, questions: Questions) -> None:
        found = read_questions(questions)
        self._train, self._held_out = splits(found)
        self.note = left_out(found)
        self._path = questions.path
        self._order: tuple[tuple[int, int], Sequence[int]] = ((-1, -1), ())

    def train(self, seed: int, index: int) -> Problem:
        if not self._train:
            raise UserError(
                f"'{self._path}' leaves nothing to train on; lower eval_share, or see `liubai check`"
            )
        epoch, at = divmod(index, len(self._train))
        if self._order[0] != (seed, epoch):
            order = list(range(len(self._train)))
            stream(seed, "epoch", epoch).shuffle(order)
            self._order = ((seed, epoch), order)
        return self._train[self._order[1][at]]

    def held_out(self, count: int) -> list[Problem]:
        """Those whose words hash lowest: more rows in the file change few of them."""
        if not self._held_out:
            raise UserError(f"'{self._path}' holds out no question; raise eval_share, or add questions")
        return self._held_out[:count]

    def longest(self, length: Callable[[str], int]) -> int:
        return max(length(problem.prompt) for problem in [*self._train, *self._held_out])

    def languages(self) -> set[str]:
        return {problem.language for problem in [*self._train, *self._held_out]}


def source_of(problems: Mapping[str, float], questions: Questions | None) -> Source:
    """The user's questions where there are some."""
    return Bank(questions) if questions else Families(problems)
