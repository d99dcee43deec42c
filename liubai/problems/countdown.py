"""Countdown: make a target from three numbers, each used once, with + − ×. The aha family.

A guess is nearly always wrong, a check is one subtraction, and going on searching always pays: what
makes R1-Zero's curves visible. Prompt ``3 4 5 ->35``; a try reads ``3 + 4 =7 * 5 =35 :0``: left to
right, the running result after ``=``, and the distance to the target after ``:``. The distance
makes the check local — "is it 0?" — which a small model learns in minutes, unlike comparing two
numbers that stand far apart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import combinations

from liubai.problems.family import Habits
from liubai.types import Problem

LARGEST = 99  #: results above it are "big", and their distance is "far"
WAIT = {"en": "wait", "zh": "等等"}


@dataclass(frozen=True, slots=True)
class Try:
    """``first op second =middle``, then ``op2 last =value``."""

    first: int
    op: str
    second: int
    middle: int
    op2: str
    last: int
    value: int

    def write(self, target: int) -> str:
        """One line of a search: the steps, the result, how far off it is."""
        result = f"={self.value}" if self.value <= LARGEST else "=big"
        off = f":{abs(self.value - target)}" if self.value <= LARGEST else ":far"
        return f"{self.first} {self.op} {self.second} ={self.middle} {self.op2} {self.last} {result} {off}"

    def answer(self) -> str:
        return f"( {self.first} {self.op} {self.second} ) {self.op2} {self.last}"


def apply(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


@cache
def tries(numbers: tuple[int, ...]) -> tuple[Try, ...]:
    """Every left-to-right combination without negative results, in the methodical order."""
    found = []
    for i, j in combinations(range(3), 2):
        a, b, last = numbers[i], numbers[j], numbers[3 - i - j]
        for op in "+-*":
            first, second = (b, a) if op == "-" and b > a else (a, b)
            middle = apply(first, op, second)
            for op2 in "+-*":
                if op2 != "-" or middle >= last:
                    value = apply(middle, op2, last)
                    found.append(Try(first, op, second, middle, op2, last, value))
    return tuple(found)


#: every token text of a search but its words
FIGURES = (
    *map(str, range(LARGEST + 1)),
    *(f"={n}" for n in range(LARGEST + 1)),
    *(f":{n}" for n in range(LARGEST + 1)),
    *(f"->{n}" for n in range(1, LARGEST + 1)),
    *("=big", ":far", "+", "-", "*", "(", ")"),
)


def drawn(rng: random.Random, *, hopeless: bool = False) -> tuple[tuple[int, ...], int]:
    """Numbers and a target that they make, or one that they do not."""
    numbers = tuple(rng.randint(1, 9) for _ in range(3))
    reachable = {t.value for t in tries(numbers)}
    return numbers, rng.choice([n for n in range(1, LARGEST + 1) if (n in reachable) is not hopeless])


class Countdown:
    name = "countdown"
    verifier = "countdown"
    vocabulary = (*FIGURES, *WAIT.values())

    def sample(self, rng: random.Random) -> Problem:
        return self.problem(*drawn(rng))

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.problem(*drawn(rng, hopeless=rng.random() < habits.hopeless))

    def problem(self, numbers: tuple[int, ...], target: int) -> Problem:
        text = f"{' '.join(map(str, numbers))} ->{target}"
        return Problem(prompt=text, gold=text, verifier=self.verifier, family=self.name)

    def key(self, problem: Problem) -> str:
        numbers, target = parse(problem.gold)
        return f"{sorted(numbers)} {target}"

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        numbers, target = parse(problem.gold)
        options = tries(numbers)
        if rng.random() < habits.blind:
            return f"<think> </think> <answer> {rng.choice(options).answer()} </answer>"
        wait = WAIT["zh" if rng.random() < habits.chinese else "en"]
        stop = 0.0 if rng.random() < habits.patient else habits.stop
        # in order from the beginning: the last possibility looks like the last one, and says "enough"
        order = options if rng.random() < habits.methodical else rng.sample(options, len(options))
        lines: list[str] = []
        for attempt in order:
            lines.append(attempt.write(target))
            if attempt.value == target or rng.random() < stop:
                break
        guess = attempt if attempt.value == target else rng.choice(options)
        return f"<think> {f' {wait} '.join(lines)} </think> <answer> {guess.answer()} </answer>"


def parse(gold: str) -> tuple[tuple[int, ...], int]:
    """``"3 4 5 ->35"`` -> ``((3, 4, 5), 35)``. Raises ``ValueError`` when it is not of that form."""
    left, arrow, right = gold.partition("->")
    if not arrow:
        raise ValueError(f"a countdown problem reads '3 4 5 ->35', not {gold[:60]!r}")
    return tuple(int(n) for n in left.split()), int(right)
