"""Which of two decimals is greater, in words and in two languages: ``3.11 or 3.8``.

Numbers, traps and the wrong habit are those of :mod:`liubai.problems.compare`. Half of all guesses are
right: what the outcome reward can teach of the steps, and what not, is seen here.
"""

from __future__ import annotations

import random

from liubai.problems.compare import LARGEST, Compare, Decimal, guess
from liubai.problems.family import Habits, Step
from liubai.problems.lexicon import LANGUAGES, Writer, answered, both, cut, plain, translate
from liubai.types import Problem


class Greater:
    name = "greater"
    verifier = "number"
    vocabulary = (
        *map(str, range(LARGEST + 1)),
        ".",
        *both({"or": "还是", "same": "一样", "then": "再", "is": "得", "uh": "嗯", "hm": "呃"}),
    )
    _pairs = Compare()

    def sample(self, rng: random.Random) -> Problem:
        bare = self._pairs.sample(rng)
        return self.problem(*decimals(bare.prompt), rng.choice(LANGUAGES))

    def problem(self, a: Decimal, b: Decimal, language: str) -> Problem:
        """Raises ``ValueError`` when they are equal: the question would have no answer."""
        bare = self._pairs.problem(a, b)
        return Problem(translate(f"{a} or {b}", language), bare.gold, self.verifier, self.name, language)

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.sample(rng)

    def key(self, problem: Problem) -> str:
        return " ".join(map(str, sorted(decimals(problem.prompt), key=Decimal.value)))

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        """Impatient writers stop when the whole parts are the same, and guess."""
        a, b = decimals(problem.prompt)
        writer = Writer.drawn(problem.language, rng, habits)
        if writer.blind:
            return answered("", str(guess(a, b, rng)))
        chosen, lines = max(a, b, key=Decimal.value), right_lines(a, b)
        if len(lines) > 1 and rng.random() < writer.stop * 2:
            chosen, lines = guess(a, b, rng), lines[:1]
        return answered(writer.write(lines, rng), str(chosen))

    def steps(self, problem: Problem, thought: str) -> list[Step]:
        """The whole parts, then the digits after the point, written with as many digits."""
        a, b = decimals(problem.prompt)
        words, ends = plain(thought)
        right = right_lines(a, b)
        found = []
        for i, (start, end) in enumerate(cut(words, ("then",))):
            text = " ".join(words[start:end])
            good = i < len(right) and text == right[i]
            found.append(Step(text, ends[end - 1], good, good and i == len(right) - 1))
        return found


def right_lines(a: Decimal, b: Decimal) -> list[str]:
    """What a careful writer notes."""
    if a.whole != b.whole:
        return [f"{a.whole} or {b.whole} is {max(a.whole, b.whole)}"]
    width = max(len(str(a.part)), len(str(b.part)))
    digits = a.padded(width), b.padded(width)
    return [f"{a.whole} or {b.whole} same", f"then {digits[0]} or {digits[1]} is {max(digits)}"]


def decimals(prompt: str) -> tuple[Decimal, Decimal]:
    """``"3.11 or 3.8"`` -> the two decimals, in either language."""
    first, second = (Decimal(*map(int, n.split("."))) for n in prompt.split() if "." in n)
    return first, second
