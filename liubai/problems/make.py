"""Countdown in words and in two languages: ``make 1 4 3 ->7``, ``凑 1 4 3 ->7``.

The search is that of :mod:`liubai.problems.countdown`; its lines begin with ``try`` and ``wait``.
"""

from __future__ import annotations

import random

from liubai.problems.countdown import FIGURES, Try, apply, drawn, parse, tries
from liubai.problems.family import Habits, Step
from liubai.problems.lexicon import LANGUAGES, Writer, answered, both, cut, plain, translate
from liubai.types import Problem


class Make:
    name = "make"
    verifier = "countdown"
    vocabulary = (*FIGURES, *both({"make": "凑", "try": "试", "wait": "等等", "uh": "嗯", "hm": "呃"}))

    def sample(self, rng: random.Random) -> Problem:
        return self.problem(*drawn(rng), rng.choice(LANGUAGES))

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.problem(*drawn(rng, hopeless=rng.random() < habits.hopeless), rng.choice(LANGUAGES))

    def problem(self, numbers: tuple[int, ...], target: int, language: str) -> Problem:
        gold = f"{' '.join(map(str, numbers))} ->{target}"
        return Problem(translate(f"make {gold}", language), gold, self.verifier, self.name, language)

    def key(self, problem: Problem) -> str:
        numbers, target = parse(problem.gold)
        return f"{sorted(numbers)} {target}"

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        numbers, target = parse(problem.gold)
        options = tuple(dict.fromkeys(tries(numbers)))  # of equal numbers, no line comes twice
        writer = Writer.drawn(problem.language, rng, habits)
        if writer.blind:
            return answered("", rng.choice(options).answer())
        order = options if writer.methodical else rng.sample(options, len(options))
        lines: list[str] = []
        for attempt in order:
            lines.append(f"{'wait' if lines else 'try'} {attempt.write(target)}")
            if attempt.value == target or rng.random() < writer.stop:
                break
        guess = attempt if attempt.value == target else rng.choice(options)
        return answered(writer.write(lines, rng), guess.answer())

    def steps(self, problem: Problem, thought: str) -> list[Step]:
        """A step is one try: its numbers are the problem's, its results and its distance are right."""
        numbers, target = parse(problem.gold)
        words, ends = plain(thought)
        found = []
        for a, b in cut(words, ("try", "wait")):
            written = read_try(words[a + (words[a] in ("try", "wait")) : b], numbers, target)
            hit = written is not None and written.value == target
            found.append(Step(" ".join(words[a:b]), ends[b - 1], written is not None, hit))
        return found


def read_try(words: list[str], numbers: tuple[int, ...], target: int) -> Try | None:
    """``1 + 4 =5 + 3 =8 :1`` as it stands, ``None`` when anything in it is wrong."""
    if len(words) != 8 or not all(_digits(words[i]) for i in (0, 2, 5)):
        return None
    first, second, last = (int(words[i]) for i in (0, 2, 5))
    if not {words[1], words[4]} <= set("+-*") or sorted((first, second, last)) != sorted(numbers):
        return None
    middle = apply(first, words[1], second)
    written = Try(first, words[1], second, middle, words[4], last, apply(middle, words[4], last))
    return written if written.write(target) == " ".join(words) else None


def _digits(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 2
