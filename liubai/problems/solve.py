"""Linear equations in words and in two languages: ``solve 3 * x + 4 = 19``.

Two steps back: ``19 minus 4 is 15 over 3 is 5``. Whoever stops after the first answers the wrong number.
"""

from __future__ import annotations

import random

from liubai.problems.family import Habits, Step
from liubai.problems.lexicon import LANGUAGES, Writer, answered, both, cut, plain, translate
from liubai.types import Problem

LARGEST = 99


class Solve:
    name = "solve"
    verifier = "number"
    vocabulary = (
        *map(str, range(LARGEST + 1)),
        *("*", "x", "+", "-", "="),
        *both(
            {"solve": "解", "minus": "减", "plus": "加", "over": "除以", "is": "得", "uh": "嗯", "hm": "呃"}
        ),
    )

    def sample(self, rng: random.Random) -> Problem:
        factor, x, shift = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
        if rng.random() < 0.5 and factor * x > shift:
            shift = -shift
        return self.problem(factor, x, shift, rng.choice(LANGUAGES))

    def problem(self, factor: int, x: int, shift: int, language: str) -> Problem:
        """``factor · x + shift``, which is positive."""
        sign = "+" if shift > 0 else "-"
        text = f"solve {factor} * x {sign} {abs(shift)} = {factor * x + shift}"
        return Problem(translate(text, language), str(x), self.verifier, self.name, language)

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.sample(rng)

    def key(self, problem: Problem) -> str:
        return " ".join(map(str, terms(problem.prompt)))

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        factor, shift, result = terms(problem.prompt)
        writer = Writer.drawn(problem.language, rng, habits)
        if writer.blind:
            return answered("", str(rng.randint(1, 9)))
        lines = right_lines(factor, shift, result)
        if rng.random() < writer.stop * 2:
            return answered(writer.write(lines[:1], rng), str(result - shift))
        return answered(writer.write(lines, rng), str((result - shift) // factor))

    def steps(self, problem: Problem, thought: str) -> list[Step]:
        """Take away what is added, divide by the factor."""
        words, ends = plain(thought)
        factor, shift, result = terms(problem.prompt)
        runs = cut(words, ("over",))
        right = right_lines(factor, shift, result)[:1]
        left = words[runs[0][1] - 1] if runs else ""  # the second step is judged by what the first one left
        right += [f"over {factor} is {x}" for x in range(LARGEST + 1) if str(factor * x) == left]
        found = []
        for i, (a, b) in enumerate(runs):
            text = " ".join(words[a:b])
            good = i < len(right) and text == right[i]
            found.append(Step(text, ends[b - 1], good, good and i == 1))
        return found


def right_lines(factor: int, shift: int, result: int) -> list[str]:
    middle = result - shift
    sign = "minus" if shift > 0 else "plus"
    return [f"{result} {sign} {abs(shift)} is {middle}", f"over {factor} is {middle // factor}"]


def terms(prompt: str) -> tuple[int, int, int]:
    """``"solve 3 * x + 4 = 19"`` -> ``(3, 4, 19)``; the second is negative after a minus."""
    _, factor, _, _, sign, shift, _, result = prompt.split()
    return int(factor), int(shift) * (1 if sign == "+" else -1), int(result)
