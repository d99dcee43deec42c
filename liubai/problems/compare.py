"""Which of two decimals is greater: the family with a wrong habit to unlearn.

Prompt ``3.11 or 3.8``. Most blind answers read the numbers as versions of a program (11 > 8, so 3.11);
a thought compares the whole parts, writes the digits after the point at one length and compares those:
``3 , 3 : same , 11 , 80 : 80``. The winner stands beside the two that it was chosen from, so each check
is local. Digits after the point: one or two, no leading and no trailing 0, so that every value is written
in one way and every group of digits is one token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from liubai.problems.family import Habits
from liubai.types import Problem

LARGEST = 99  #: whole parts
SAME_WHOLE = 0.75  #: share of questions that the digits after the point decide
TRAP = 0.5  #: share of those in which the version reading is wrong on purpose; chance adds some
VERSION_HABIT = 0.8  #: share of guesses that read the decimals as versions; the rest toss a coin
SAME = {"en": "same", "zh": "一样"}

FRACTIONS = tuple(n for n in range(1, 100) if n % 10 or n < 10)  #: 1…9, 11…99 without 20, 30, …


@dataclass(frozen=True, slots=True)
class Decimal:
    """``whole.part``, the part as written: 3.8 is (3, 8), and 3.11 is (3, 11)."""

    whole: int
    part: int

    def padded(self, width: int) -> int:
        """The digits after the point, written with ``width`` digits."""
        return int(str(self.part).ljust(width, "0"))

    def value(self) -> tuple[int, int]:
        return self.whole, self.padded(2)

    def version(self) -> tuple[int, int]:
        """What the wrong habit compares."""
        return self.whole, self.part

    def __str__(self) -> str:
        return f"{self.whole}.{self.part}"


class Compare:
    name = "compare"
    verifier = "number"
    vocabulary = (*map(str, range(LARGEST + 1)), ".", "or", ",", ":", *SAME.values())

    def sample(self, rng: random.Random) -> Problem:
        whole = rng.randint(0, LARGEST)
        if rng.random() >= SAME_WHOLE:
            other = (whole + rng.randint(1, LARGEST)) % (LARGEST + 1)
            pair = [Decimal(whole, rng.choice(FRACTIONS)), Decimal(other, rng.choice(FRACTIONS))]
        elif rng.random() < TRAP:
            digit = rng.randint(2, 9)
            lower = [n for n in FRACTIONS if 11 <= n < 10 * digit]
            pair = [Decimal(whole, digit), Decimal(whole, rng.choice(lower))]
        else:
            pair = [Decimal(whole, part) for part in rng.sample(FRACTIONS, 2)]
        rng.shuffle(pair)
        return self.problem(*pair)

    def problem(self, a: Decimal, b: Decimal) -> Problem:
        """Raises ``ValueError`` when they are equal: the question would have no answer."""
        if a.value() == b.value():
            raise ValueError(f"{a} and {b} are equal")
        greater = max(a, b, key=Decimal.value)
        return Problem(prompt=f"{a} or {b}", gold=str(greater), verifier=self.verifier, family=self.name)

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.sample(rng)  # every one of them has an answer

    def key(self, problem: Problem) -> str:
        return " ".join(map(str, sorted(parse(problem.prompt), key=Decimal.value)))

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        """Blind writers guess. Impatient thinkers give up, and guess, once the whole parts are the same."""
        a, b = parse(problem.prompt)
        if rng.random() < habits.blind:
            return f"<think> </think> <answer> {guess(a, b, rng)} </answer>"
        stop = 0.0 if rng.random() < habits.patient else habits.stop
        same = SAME["zh" if rng.random() < habits.chinese else "en"]
        found = max(a, b, key=Decimal.value)
        if a.whole != b.whole:
            thought = f"{a.whole} , {b.whole} : {found.whole}"
        else:
            thought = f"{a.whole} , {b.whole} : {same}"
            if rng.random() < stop:
                found = guess(a, b, rng)
            else:
                width = max(len(str(a.part)), len(str(b.part)))
                thought += f" , {a.padded(width)} , {b.padded(width)} : {found.padded(width)}"
        return f"<think> {thought} </think> <answer> {found} </answer>"


def guess(a: Decimal, b: Decimal, rng: random.Random) -> Decimal:
    if rng.random() < VERSION_HABIT:
        return max(a, b, key=Decimal.version)
    return rng.choice([a, b])


def parse(prompt: str) -> tuple[Decimal, Decimal]:
    """``"3.11 or 3.8"`` -> the two decimals. Raises ``ValueError`` when it is not of that form."""
    numbers = prompt.split(" or ")
    if len(numbers) != 2:
        raise ValueError(f"a comparison reads '3.11 or 3.8', not {prompt[:60]!r}")
    first, second = (Decimal(*map(int, n.split(".", 1))) for n in numbers if "." in n)
    return first, second
