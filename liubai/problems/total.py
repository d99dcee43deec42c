"""Running sums modulo 10 in words and in two languages: ``total 3 7 2 9 mod 10``.

Each operand is set beside the partial result, ``3 plus 7 is 0 plus 2 is 2``: a step is a copy and one
entry of a small table. Nobody sees the sum of eight digits at once.
"""

from __future__ import annotations

import random

from liubai.problems.family import Habits, Step
from liubai.problems.lexicon import LANGUAGES, Writer, answered, both, cut, plain, translate
from liubai.types import Problem

SHORTEST, LONGEST = 4, 8  #: digits in a sum
MODULUS = 10
DIGITS = tuple(map(str, range(MODULUS)))


class Total:
    name = "total"
    verifier = "number"
    vocabulary = (
        *map(str, range(MODULUS + 1)),
        *both({"total": "求和", "mod": "模", "plus": "加", "is": "得", "uh": "嗯", "hm": "呃"}),
    )

    def sample(self, rng: random.Random) -> Problem:
        count = rng.randint(SHORTEST, LONGEST)
        return self.problem(tuple(rng.randrange(MODULUS) for _ in range(count)), rng.choice(LANGUAGES))

    def problem(self, digits: tuple[int, ...], language: str) -> Problem:
        text = f"total {' '.join(map(str, digits))} mod {MODULUS}"
        gold = str(sum(digits) % MODULUS)
        return Problem(translate(text, language), gold, self.verifier, self.name, language)

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.sample(rng)

    def key(self, problem: Problem) -> str:
        return " ".join(map(str, sorted(digits_of(problem.prompt))))

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        """Blind writers guess; impatient ones break off somewhere and answer what they have so far."""
        digits = digits_of(problem.prompt)
        writer = Writer.drawn(problem.language, rng, habits)
        if writer.blind:
            return answered("", str(rng.randrange(MODULUS)))
        steps = len(digits) - 1
        if rng.random() < writer.stop * 2:
            steps = rng.randint(1, steps - 1)
        lines: list[str] = []
        total = digits[0]
        for digit in digits[1 : steps + 1]:
            before, total = total, (total + digit) % MODULUS
            lines.append(f"{'' if lines else f'{before} '}plus {digit} is {total}")
        return answered(writer.write(lines, rng), str(total))

    def steps(self, problem: Problem, thought: str) -> list[Step]:
        """A step adds the next digit of the problem to the result so far, and is right when the digit and the
        sum are; ``concludes`` when no digit is left."""
        digits = digits_of(problem.prompt)
        words, ends = plain(thought)
        found: list[Step] = []
        total = str(digits[0])
        runs = cut(words, ("plus",))
        if len(runs) > 1 and words[:1] == [total]:  # the first digit belongs to the first step
            runs = [(0, runs[1][1]), *runs[2:]]
        for i, (a, b) in enumerate(runs, 1):
            digit = str(digits[i]) if i < len(digits) else ""
            before, total = total, words[b - 1]  # a later step is judged by what the last one left
            right = bool(digit) and before in DIGITS
            if right:
                result = str((int(before) + int(digit)) % MODULUS)
                first = [before] if i == 1 else []
                right = words[a:b] == [*first, "plus", digit, "is", result]
            found.append(Step(" ".join(words[a:b]), ends[b - 1], right, right and i == len(digits) - 1))
        return found


def digits_of(prompt: str) -> tuple[int, ...]:
    """``"total 3 7 2 mod 10"`` -> ``(3, 7, 2)``, in either language."""
    return tuple(int(word) for word in prompt.split()[1:-2])
