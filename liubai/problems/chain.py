"""Running sums modulo 10: the family in which a longer thought is simply better.

Prompt ``sum 3 7 2 9 mod 10`` with 8 to 16 digits. Nobody computes that in one pass: without a thought
the answer is a guess, right one time in ten. A thought ``3 , 7 : 0 , 2 : 2 , 9 : 1`` sets each operand
beside the partial result, so a step is a copy and one entry of a small table (after Tsilivis et al.).
"""

from __future__ import annotations

import random

from liubai.problems.family import Habits
from liubai.types import Problem

SHORTEST, LONGEST = 8, 16  #: digits in a sum
MODULUS = 10


class Chain:
    name = "chain"
    verifier = "number"
    vocabulary = (*map(str, range(MODULUS + 1)), "sum", "mod", ",", ":")

    def sample(self, rng: random.Random) -> Problem:
        count = rng.randint(SHORTEST, LONGEST)
        return self.problem(tuple(rng.randrange(MODULUS) for _ in range(count)))

    def problem(self, digits: tuple[int, ...]) -> Problem:
        return Problem(
            prompt=f"sum {' '.join(map(str, digits))} mod {MODULUS}",
            gold=str(sum(digits) % MODULUS),
            verifier=self.verifier,
            family=self.name,
        )

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.sample(rng)  # every one of them has an answer

    def key(self, problem: Problem) -> str:
        return " ".join(map(str, sorted(parse(problem.prompt))))

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        """Blind writers guess; impatient ones break off somewhere and answer what they have so far.

        There is no failed try here to give up after, so ``stop`` is the share of sums that are broken
        off; ``methodical`` and ``chinese`` do not matter: there is one way to add, and it has no words.
        """
        digits = parse(problem.prompt)
        if rng.random() < habits.blind:
            return f"<think> </think> <answer> {rng.randrange(MODULUS)} </answer>"
        stop = 0.0 if rng.random() < habits.patient else habits.stop
        steps = len(digits) - 1
        if rng.random() < stop:
            steps = rng.randint(1, steps - 1)
        total = digits[0]
        thought = [str(total)]
        for digit in digits[1 : steps + 1]:
            total = (total + digit) % MODULUS
            thought.append(f"{digit} : {total}")
        return f"<think> {' , '.join(thought)} </think> <answer> {total} </answer>"


def parse(prompt: str) -> tuple[int, ...]:
    """``"sum 3 7 2 mod 10"`` -> ``(3, 7, 2)``. Raises ``ValueError`` when it is not of that form."""
    words = prompt.split()
    if len(words) < 5 or words[0] != "sum" or words[-2:] != ["mod", str(MODULUS)]:
        raise ValueError(f"a chain reads 'sum 3 7 2 mod {MODULUS}', not {prompt[:60]!r}")
    return tuple(int(word) for word in words[1:-2])
