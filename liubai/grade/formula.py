"""Formulas of propositional logic: a small parser and truth tables as integers, one bit a row.

``not and or -> <->`` with brackets, in words, ASCII, Unicode or LaTeX. Bounded: ``MAX_NAMES`` variables make
4,096 rows, and a connective costs one operation on an integer of as many bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_LENGTH = 2_000  #: characters
MAX_TOKENS = 400
MAX_DEPTH = 40  #: nested brackets and negations
MAX_NAMES = 12  #: variables of both formulas together

_WORDS = {
    "not": "not", "and": "and", "or": "or", "implies": "->", "iff": "<->", "true": "true", "false": "false",
    "~": "not", "!": "not", "¬": "not", "\\neg": "not", "\\lnot": "not",
    "&": "and", "&&": "and", "∧": "and", "/\\": "and", "\\land": "and", "\\wedge": "and",
    "|": "or", "||": "or", "∨": "or", "\\/": "or", "\\lor": "or", "\\vee": "or",
    "->": "->", "=>": "->", "→": "->", "⇒": "->", "\\to": "->", "\\rightarrow": "->", "\\Rightarrow": "->",
    "\\implies": "->", "<->": "<->", "<=>": "<->", "↔": "<->", "⇔": "<->", "≡": "<->", "\\iff": "<->",
    "\\leftrightarrow": "<->", "\\Leftrightarrow": "<->", "\\equiv": "<->",
    "⊤": "true", "\\top": "true", "⊥": "false", "\\bot": "false",
    "(": "(", ")": ")", "[": "(", "]": ")",
}  # fmt: skip
_TOKEN = re.compile(
    r"\s*(<->|<=>|->|=>|&&|\|\||/\\|\\/|\\[A-Za-z]+|[A-Za-z_][A-Za-z0-9_]*|[~!¬&∧|∨→⇒↔⇔≡⊤⊥()\[\]])\s*"
)


class RefusedError(Exception):
    """Not a formula that we accept. The message says why."""


def tokens(text: str) -> list[str]:
    """Connectives in their one spelling, names with a "$" before them. Raises :class:`RefusedError`."""
    if len(text) > MAX_LENGTH:
        raise RefusedError(f"longer than {MAX_LENGTH} characters")
    found: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise RefusedError(f"not a formula: {text[at : at + 20]!r}")
        at = match.end()
        word = match[1]
        known = _WORDS.get(word) or _WORDS.get(word.lower() if word.isalpha() else word)
        if known is None and word.startswith("\\"):
            raise RefusedError(f"unknown sign {word}")
        found.append(known or f"${word}")
    if not 0 < len(found) <= MAX_TOKENS:
        raise RefusedError(f"empty, or more than {MAX_TOKENS} signs")
    return found


def names(signs: Sequence[str]) -> set[str]:
    return {sign for sign in signs if sign.startswith("$")}


def table(signs: Sequence[str], variables: Sequence[str]) -> int:
    """The truth table: bit r is the value in row r, where variable i is bit i of r.

    Raises :class:`RefusedError` for anything that is not one formula over ``variables``.
    """
    if len(variables) > MAX_NAMES:
        raise RefusedError(f"more than {MAX_NAMES} variables")
    every = (1 << (1 << len(variables))) - 1
    # a run of 2^i zeros and 2^i ones, over and over: where bit i of the row's number is set
    columns = {name: every ^ every // ((1 << (1 << i)) + 1) for i, name in enumerate(variables)}
    reader = _Reader(signs, {**columns, "true": every, "false": 0}, every)
    value = reader.equivalence(0)
    if reader.peek():
        raise RefusedError(f"a connective is missing before '{reader.peek()}'")
    return value


class _Reader:
    """``<->`` binds least (and joins from the left), then ``->`` (from the right), or, and, not."""

    def __init__(self, signs: Sequence[str], columns: dict[str, int], every: int) -> None:
        self.signs, self.columns, self.every = signs, columns, every
        self.at = 0

    def peek(self) -> str:
        return self.signs[self.at] if self.at < len(self.signs) else ""

    def next(self) -> str:
        sign = self.peek()
        self.at += 1
        return sign

    def equivalence(self, depth: int) -> int:
        value = self.implication(depth)
        while self.peek() == "<->":
            self.next()
            value = self.every ^ value ^ self.implication(depth)
        return value

    def implication(self, depth: int) -> int:
        parts = [self.disjunction(depth)]
        while self.peek() == "->":
            self.next()
            parts.append(self.disjunction(depth))
        value = parts.pop()
        while parts:
            value |= self.every ^ parts.pop()
        return value

    def disjunction(self, depth: int) -> int:
        value = self.conjunction(depth)
        while self.peek() == "or":
            self.next()
            value |= self.conjunction(depth)
        return value

    def conjunction(self, depth: int) -> int:
        value = self.atom(depth)
        while self.peek() == "and":
            self.next()
            value &= self.atom(depth)
        return value

    def atom(self, depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise RefusedError(f"nested deeper than {MAX_DEPTH}")
        sign = self.next()
        if sign == "not":
            return self.every ^ self.atom(depth + 1)
        if sign == "(":
            value = self.equivalence(depth + 1)
            if self.next() != ")":
                raise RefusedError("a bracket is never closed")
            return value
        if sign not in self.columns:
            raise RefusedError(f"a formula is missing before '{sign}'" if sign else "a formula is missing")
        return self.columns[sign]
