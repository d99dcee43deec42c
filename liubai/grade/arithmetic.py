"""Integer expressions with + − × ÷ and brackets, read by a small recursive-descent parser.

Written for text from a model that is rewarded for fooling it. Everything that is not plainly such an
expression is refused: signs before a number, juxtaposition, powers, decimals, leading zeros, digits
other than ASCII ones. Values are exact fractions. Length, depth and size of numbers are bounded, so
that the cost of any text is bounded too. Deliberately missing: names, functions, LaTeX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 300  #: characters of an expression
MAX_DEPTH = 20  #: nested brackets
MAX_DIGITS = 9  #: digits of one number

SYMBOLS = {"×": "*", "÷": "/", "−": "-"}
_TOKEN = re.compile(r"[ \t\n]*(?:(?P<number>[0-9]+)|(?P<sign>[-+*/()×÷−]))")


class RefusedError(Exception):
    """Not an expression that we accept. The message says why."""


@dataclass(frozen=True, slots=True)
class Expression:
    value: Fraction
    numbers: tuple[int, ...]  #: as written, left to right


def parse_expression(text: str) -> Expression:
    """Read and compute ``text``. Raises :class:`RefusedError`, and nothing else, for any string."""
    reader = _Reader(_tokens(text))
    value = reader.total(depth=0)
    if reader.peek():
        raise RefusedError(f"an operator is missing before '{reader.peek()}'")
    return Expression(value, tuple(reader.numbers))


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_LENGTH:
        raise RefusedError(f"longer than {MAX_LENGTH} characters")
    text = text.strip(" \t\n")
    found: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise RefusedError(f"not arithmetic: {text[at : at + 20]!r}")
        at = match.end()
        number = match["number"]
        if number is None:
            found.append(SYMBOLS.get(match["sign"], match["sign"]))
        elif len(number) > MAX_DIGITS or (len(number) > 1 and number.startswith("0")):
            raise RefusedError("a number is too long or begins with 0")
        else:
            found.append(number)
    return found


class _Reader:
    """``total = product (('+' | '-') product)*``, ``product = atom (('*' | '/') atom)*``."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        """The next token, "" at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def total(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            if self.next() == "+":
                value += self.product(depth)
            else:
                value -= self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.peek() in ("*", "/"):
            if self.next() == "*":
                value *= self.atom(depth)
                continue
            divisor = self.atom(depth)
            if divisor == 0:
                raise RefusedError("division by zero")
            value /= divisor
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.next()
        if token == "(":
            if depth >= MAX_DEPTH:
                raise RefusedError(f"brackets nested deeper than {MAX_DEPTH}")
            value = self.total(depth + 1)
            if self.next() != ")":
                raise RefusedError("a bracket is never closed")
            return value
        if not token.isdigit():
            raise RefusedError(f"a number is missing before '{token}'" if token else "a number is missing")
        self.numbers.append(int(token))
        return Fraction(int(token))
