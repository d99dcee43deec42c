"""Running sums in words and in two languages: ``total a 3 b 7 c 2``.

Every term has a name, so that the next one is found by what it is called and not by where it stands:
``a 3 plus b 7 is 10 plus c 2 is 12``. A step is a copy and a small sum. Nobody sees eight terms at once, and
nobody guesses their sum. (Modulo 10 a step is an entry of a table without order, which a small model does
not learn in minutes.)
"""

from __future__ import annotations

import random

from liubai.problems.family import Habits, Step
from liubai.problems.lexicon import FILLERS, LANGUAGES, MARKS, Writer, answered, both, cut, plain, translate
from liubai.types import Problem

SHORTEST, LONGEST = 4, 8  #: digits in a sum
LARGEST = 9 * LONGEST
MARKED = tuple(MARKS)
NUMBERS = frozenset(map(str, range(LARGEST + 1)))


class Total:
    name = "total"
    verifier = "number"
    vocabulary = (
        *map(str, range(LARGEST + 1)),
        *both(MARKS, {"total": "求和", "plus": "加", "is": "得"}, FILLERS),
    )

    def sample(self, rng: random.Random) -> Problem:
        count = rng.randint(SHORTEST, LONGEST)
        return self.problem(tuple(rng.randint(1, 9) for _ in range(count)), rng.choice(LANGUAGES))

    def problem(self, digits: tuple[int, ...], language: str) -> Problem:
        terms = " ".join(f"{mark} {digit}" for mark, digit in zip(MARKS, digits, strict=False))
        gold = str(sum(digits))
        return Problem(translate(f"total {terms}", language), gold, self.verifier, self.name, language)

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.sample(rng)

    def key(self, problem: Problem) -> str:
        return " ".join(map(str, sorted(digits_of(problem.prompt))))

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        """Blind writers guess; impatient ones break off somewhere and answer what they have so far."""
        digits = digits_of(problem.prompt)
        writer = Writer.drawn(problem.language, rng, habits)
        if writer.blind:
            return answered("", str(rng.randint(len(digits), 9 * len(digits))))
        steps = len(digits) - 1
        if rng.random() < writer.stop * 2:
            steps = rng.randint(1, steps - 1)
        lines: list[str] = []
        total = digits[0]
        for digit in digits[1 : steps + 1]:
            before, total = total, total + digit
            first = "" if lines else f"a {before} "
            lines.append(f"{first}plus {MARKED[len(lines) + 1]} {digit} is {total}")
        return answered(writer.write(lines, rng), str(total))

    def steps(self, problem: Problem, thought: str) -> list[Step]:
        """A step adds the next digit of the problem to the result so far, and is right when the digit and the
        sum are; ``concludes`` when no digit is left."""
        digits = digits_of(problem.prompt)
        words, ends = plain(thought)
        found: list[Step] = []
        total = str(digits[0])
        runs = cut(words, ("plus",))
        if len(runs) > 1 and words[0] != "plus":  # the first digit, right or wrong, belongs to the first step
            runs = [(0, runs[1][1]), *runs[2:]]
        for i, (a, b) in enumerate(runs, 1):
            digit = str(digits[i]) if i < len(digits) else ""
            before, total = total, words[b - 1]  # a later step is judged by what the last one left
            right = bool(digit) and before in NUMBERS
            if right:
                first = ["a", before] if i == 1 else []
                result = str(int(before) + int(digit))
                right = words[a:b] == [*first, "plus", MARKED[i], digit, "is", result]
            found.append(Step(" ".join(words[a:b]), ends[b - 1], right, right and i == len(digits) - 1))
        return found


def digits_of(prompt: str) -> tuple[int, ...]:
    """``"total a 3 b 7 c 2"`` -> ``(3, 7, 2)``, in either language."""
    return tuple(int(word) for word in prompt.split()[2::2])
