"""Closed-world passages to summarise: who has how many of what, and nothing else is true.

``anna has 3 red cups . ben has 5 blue hats . summarise`` → ``anna 3 cups , ben 5 hats``. A summary may leave
the colours out; it may not say what the passage does not. Careless writers get a number or a thing wrong.
"""

from __future__ import annotations

import random

from liubai.problems.family import Habits
from liubai.problems.lexicon import (
    COLOURS,
    FILLERS,
    LANGUAGES,
    NAMES,
    TELLING,
    THINGS,
    Writer,
    answered,
    both,
    translate,
)
from liubai.types import Problem

FEWEST, MOST = 2, 3  #: facts in a passage

#: name, number, thing, in English
Fact = tuple[str, int, str]


class Passage:
    name = "passage"
    verifier = "summary"
    vocabulary = (
        *map(str, range(10)),
        *(".", ","),
        *both(NAMES, THINGS, COLOURS, TELLING, {"then": "再"}, FILLERS),
    )

    def sample(self, rng: random.Random) -> Problem:
        names = rng.sample(list(NAMES), rng.randint(FEWEST, MOST))
        facts = [(name, rng.randint(2, 9), rng.choice(list(THINGS))) for name in names]
        return self.problem(facts, [rng.choice(list(COLOURS)) for _ in facts], rng.choice(LANGUAGES))

    def problem(self, facts: list[Fact], colours: list[str], language: str) -> Problem:
        told = [
            f"{name} has {number} {colour} {thing} ."
            for (name, number, thing), colour in zip(facts, colours, strict=True)
        ]
        text = f"{' '.join(told)} summarise"
        gold = translate(summary(facts), language)
        return Problem(translate(text, language), gold, self.verifier, self.name, language)

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.sample(rng)

    def key(self, problem: Problem) -> str:
        return str(sorted(facts_of(problem.gold) or []))

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        facts = facts_of(problem.gold)
        assert facts is not None
        writer = Writer.drawn(problem.language, rng, habits)
        if rng.random() < habits.careless:
            at = rng.randrange(len(facts))
            facts[at] = _spoilt(facts[at], rng)
        said = translate(summary(facts), problem.language)
        if writer.blind:
            return answered("", said)
        lines = [f"{'then ' if i else ''}{' '.join(map(str, fact))}" for i, fact in enumerate(facts)]
        return answered(writer.write(lines, rng), said)


def _spoilt(fact: Fact, rng: random.Random) -> Fact:
    name, number, thing = fact
    if rng.random() < 0.5:
        return name, rng.choice([n for n in range(2, 10) if n != number]), thing
    return name, number, rng.choice([t for t in THINGS if t != thing])


def summary(facts: list[Fact]) -> str:
    return " , ".join(f"{name} {number} {thing}" for name, number, thing in facts)


def facts_of(text: str) -> list[Fact] | None:
    """The facts of a summary in either language; ``None`` when a part of it is none."""
    facts: list[Fact] = []
    for part in translate(text, "en").split(","):
        words = part.split()
        if len(words) != 3 or words[0] not in NAMES or words[2] not in THINGS:
            return None
        if len(words[1]) != 1 or words[1] not in "0123456789":
            return None
        facts.append((words[0], int(words[1]), words[2]))
    return facts
