"""Running sums modulo 10 in words and in two languages: ``total 3 7 2 9 mod 10``.

Each operand is set beside the partial result, ``3 plus 7 is 0 plus 2 is 2``: a step is a copy and one
entry of a small table. Nobody sees the sum of eight digits at once.
"""

from __future__ import annotations

import random

from liubai.problems.family import Habits, Step
from liubai.problems.lexicon import LANGUAGES, Writer, answered, both, plain, translate
from liubai.types import Problem

SHORTEST, LONGEST = 4, 8  #: digits in a sum
MODULUS = 10


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
        total, lines = digits[0], []
        for digit in digits[1 : steps + 1]:
            before, total = total, (total + digit) % MODULUS
            lines.append(f"{'' if lines else f'{before} '}plus {digit} is {total}")
        return answered(writer.write(lines, rng), str(total))

    def steps(self, problem: Problem, thought: str) -> list[Step]:
        """A step adds the next digit of the problem to the result so far, and is right when the digit and the
        sum are; ``concludes`` when no digit is left."""
        digits = digits_of(problem.prompt)
        words = plain(thought)
        if not words:
            return []
        parts = " ".join(words).split("plus")
        found: list[Step] = []
        so_far = parts[0].split()
        for i, part in enumerate(parts[1:], 1):
            said = part.split()
            right = (
                i < len(digits)
                and len(so_far) == 1
                and so_far[0].isdigit()
                and (i > 1 or so_far == [str(digits[0])])
                and said == [str(digits[i]), "is", str((int(so_far[0]) + digits[i]) % MODULUS)]
            )
            found.append(
                Step(f"{' '.join(so_far)} plus{part}".strip(), right, right and i == len(digits) - 1)
            )
            so_far = said[-1:]
        return found or [Step(" ".join(words), False)]


def digits_of(prompt: str) -> tuple[int, ...]:
    """``"total 3 7 2 mod 10"`` -> ``(3, 7, 2)``, in either language."""
    return tuple(int(word) for word in prompt.split()[1:-2])
