"""Arithmetic on tokens, exact and bounded: what :mod:`liubai.serve.calculator` has read is computed here.

Values are fractions. Every size is checked before it is made: digits of a number, exponents, factorials,
depth of brackets. Nothing is rounded; a root that is no fraction is refused. So is what people read in two
ways: ``100 + 10%``, ``the square root of 9 + 16``, ``5!!``.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 4000  #: of a numerator or denominator (below the 4,300 that Python writes without being asked)
MAX_BITS = int(MAX_DIGITS * math.log2(10))
MAX_FACTORIAL = 1000
MAX_ROOT = 64  #: the q of an exponent p/q
MAX_DEPTH = 50  #: nested brackets and signs
MAX_TOKENS = 400
MAX_STEPS = 12  #: that are told
SHOWN_DIGITS = 60  #: of a number in a step
DECIMAL_PLACES = 40  #: a decimal that ends later is given as a fraction
ROUNDED = 10  #: digits of what is rounded


class Refused(Exception):
    """Not plainly arithmetic, or out of bounds. The message says why."""


@dataclass(frozen=True, slots=True)
class Token:
    """``kind``, one character: ``n`` a number; ``+ - * / ^`` and ``m`` (modulo); ``( )``; ``! %``; ``q`` a
    power and ``Q`` a root, both written behind; ``r`` a root in front; ``f`` a function's name; ``o`` "of",
    ``d`` 的; ``,`` and ``;`` (a comma with no blank behind it). Other kinds are the calculator's.
    ``loose``: a word whose reach is not plain, a number with commas in it."""

    kind: str
    text: str
    value: Fraction = Fraction(0)
    loose: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """``operations``: how many there were; ``written``: the expression in one spelling."""

    value: Fraction
    written: str
    steps: tuple[str, ...]
    operations: int


@dataclass(frozen=True, slots=True)
class _Value:
    of: Fraction
    percent: bool = False
    share: bool = False  #: a fraction as it is written before "of"


SIGNS = {"*": "×", "/": "÷", "-": "−", "m": "mod"}


def evaluate(tokens: Sequence[Token]) -> Result:
    """Raises :class:`Refused`, and nothing else, for any tokens."""
    if len(tokens) > MAX_TOKENS:
        raise Refused(f"longer than {MAX_TOKENS} numbers and signs")
    reader = _Reader(tokens)
    value = reader.total()
    if reader.peek():
        raise Refused(f"an operator is missing before '{tokens[reader.at].text}'")
    return Result(value.of, write(tokens), tuple(reader.steps[:MAX_STEPS]), reader.operations)


def write(tokens: Sequence[Token]) -> str:
    """``3 × (4 − 1)``: blanks around what stands between two values."""
    out = ""
    before = ""
    for token in tokens:
        operator = token.kind in "+-*/mod" and (before in ("n", ")", "!", "%", "q", "Q"))
        text = SIGNS.get(token.kind, token.text)
        if token.kind == "/" and before == "n" and operator:
            out += "/"  # 1/3, as fractions are written
        elif operator:
            out += f" {text} "
        elif token.kind in ",;":
            out += ", "
        else:
            out += text
        before = token.kind
    return out


class _Reader:
    """``total = product (± product)*``, ``product = signed (× ÷ mod of signed)*``, ``signed = ±? power``,
    ``power = primary postfix* (^ signed)?``. Computes as it reads."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.steps: list[str] = []
        self.operations = 0
        self.loose_seen = False

    def peek(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    def next(self) -> Token:
        if self.at >= len(self.tokens):
            raise Refused("a number is missing at the end")
        self.at += 1
        return self.tokens[self.at - 1]

    def did(self, written: str, value: Fraction, *, percent: bool = False) -> _Value:
        self.operations += 1
        checked(value)
        if len(self.steps) < MAX_STEPS:
            self.steps.append(f"{written} = {short(value)}")
        return _Value(value, percent)

    def total(self) -> _Value:
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = self.next().kind
            other = self.product()
            if value.percent != other.percent:
                raise Refused("a percentage added to a number can mean two things")
            result = value.of + other.of if sign == "+" else value.of - other.of
            written = f"{short(value.of)} {SIGNS.get(sign, sign)} {short(other.of)}"
            value = self.did(written, result, percent=value.percent)
        return value

    def product(self) -> _Value:
        value = self.signed()
        while self.peek() and self.peek() in "*/mod":
            sign = self.next().kind
            if sign == "o" and not (value.percent or value.share):
                raise Refused("'of' stands behind a percentage or a fraction")
            begin = self.at
            other = self.signed()
            a, b = value.of, other.of
            if sign == "d" and not (other.percent or other.share or self.peek() == "/"):
                raise Refused("'的' stands before a percentage or a fraction")
            if sign in "/m" and b == 0:
                raise Refused("division by zero is not defined")
            if sign == "m" and not (a.denominator == b.denominator == 1 and b > 0):
                raise Refused("remainders are of whole numbers, by a positive one")
            result = a / b if sign == "/" else a % b if sign == "m" else a * b
            text = {"/": "÷", "m": "mod"}.get(sign, "×")
            # a percentage of a percentage is one, too
            value = self.did(f"{short(a)} {text} {short(b)}", result, percent=sign == "o" and other.percent)
            plain = self.tokens[begin - 2 : begin + 1]
            if sign == "/" and [t.kind for t in plain] == ["n", "/", "n"]:
                value = _Value(value.of, share=begin == 2 or self.tokens[begin - 3].kind in "+-(")
        return value

    def signed(self) -> _Value:
        if self.peek() not in ("+", "-"):
            return self.power()
        sign = self.next().kind
        if self.peek() in ("+", "-"):
            raise Refused("two signs in a row")
        value = self.power()
        return _Value(-value.of if sign == "-" else value.of, value.percent)

    def power(self) -> _Value:
        begin = self.at
        value = self.primary()
        while self.peek() in ("!", "%", "q", "Q"):
            value = self.postfix(value, begin)
        if self.peek() != "^":
            return value
        self.next()
        self.enter()
        exponent = self.signed()
        self.depth -= 1
        return self.did(f"{short(value.of)}^{short(exponent.of)}", raised(value.of, exponent.of))

    def postfix(self, value: _Value, begin: int) -> _Value:
        token = self.next()
        if token.loose:
            if begin and self.tokens[begin - 1].kind in "+-*/m" and not self.loose_seen:
                raise Refused(f"'{token.text}' may be of all that stands before it or of the last number")
            self.loose_seen = True
        match token.kind:
            case "%":
                if value.percent:
                    raise Refused("two percent signs in a row")
                return _Value(value.of / 100, percent=True)
            case "!":
                if self.peek() == "!":
                    raise Refused("'!!' can mean two things")
                return self.did(f"{short(value.of)}!", factorial(value.of))
            case "q":
                if self.peek() == "q":  # 2²³ may be 2^23
                    raise Refused("two powers in a row")
                return self.did(f"{short(value.of)}^{token.value}", raised(value.of, token.value))
        return self.rooted(value, int(token.value))

    def primary(self) -> _Value:
        token = self.next()
        match token.kind:
            case "n":
                return _Value(
                    checked(token.value), share=token.value.denominator > 1 and "." not in token.text
                )
            case "(":
                self.enter()
                value = self.total()
                if self.next().kind != ")":
                    raise Refused("a bracket is never closed")
                self.depth -= 1
                return _Value(value.of, value.percent)
            case "r":
                self.enter()
                bracket = self.peek() == "("
                value = self.primary()
                self.depth -= 1
                following = self.peek()
                if not bracket and following and following in ("+-*/m^!%qQ" if token.loose else "!%qQ"):
                    raise Refused(f"'{token.text}' may be of the next number or of all that follows")
                return self.rooted(value, int(token.value))
            case "f":
                return self.function(token.text)
        raise Refused(f"a number is missing before '{token.text}'")

    def rooted(self, value: _Value, index: int) -> _Value:
        """Or, for an index of 0, the factorial, which words put in front, too."""
        if index == 0:
            return self.did(f"{short(value.of)}!", factorial(value.of))
        return self.did(f"{'√' if index == 2 else '∛'}{short(value.of)}", root(value.of, index))

    def function(self, name: str) -> _Value:
        if self.next().kind != "(":
            raise Refused(f"'{name}' is followed by a bracket")
        self.enter()
        begin = self.at
        values = [self.total().of]
        while self.peek() in (",", ";"):
            self.next()
            values.append(self.total().of)
        if self.next().kind != ")":
            raise Refused("a bracket is never closed")
        if any(token.kind == "n" and token.loose for token in self.tokens[begin : self.at]):
            raise Refused("a comma in a function's brackets stands between numbers, not in one")
        self.depth -= 1
        written = f"{name}({', '.join(map(short, values))})"
        return self.did(written, FUNCTIONS[name](values))

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused(f"brackets or powers nested deeper than {MAX_DEPTH}")


def checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Refused(f"a number of more than {MAX_DIGITS} digits")
    return value


def raised(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator > 1:
        if base < 0 or exponent.denominator > MAX_ROOT:
            raise Refused("such a power is no fraction, or one out of reach")
        base, exponent = root(base, exponent.denominator), Fraction(exponent.numerator)
    if base == 0:
        if exponent <= 0:
            raise Refused("0 to such a power is not defined")
        return base
    if abs(base) == 1:
        return Fraction(1 if base == 1 or exponent % 2 == 0 else -1)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1  # at least 1
    if bits * abs(exponent) > MAX_BITS:
        raise Refused(f"a power of more than {MAX_DIGITS} digits")
    return base ** int(exponent)


def root(value: Fraction, index: int) -> Fraction:
    """The root that is a fraction; of a negative number where ``index`` is odd."""
    if value < 0 and index % 2 == 0:
        raise Refused("such a root of a negative number is no number here")
    up, down = (_whole_root(n, index) for n in (abs(value.numerator), value.denominator))
    if up is None or down is None:
        raise Refused("the root is no fraction, so that it cannot be given exactly")
    return Fraction(-up if value < 0 else up, down)


def _whole_root(n: int, index: int) -> int | None:
    """Newton's method from above, on whole numbers."""
    if index == 2:
        found = math.isqrt(n)
    elif n < 2:
        found = n
    else:
        found = 1 << -(-n.bit_length() // index)
        while True:
            lower = ((index - 1) * found + n // found ** (index - 1)) // index
            if lower >= found:
                break
            found = lower
    return found if found**index == n else None


def factorial(value: Fraction) -> Fraction:
    if value.denominator > 1 or not 0 <= value <= MAX_FACTORIAL:
        raise Refused(f"factorials are of whole numbers from 0 to {MAX_FACTORIAL}")
    return Fraction(math.factorial(int(value)))


def _whole(values: Sequence[Fraction], least: int) -> list[int]:
    if len(values) < least or any(value.denominator > 1 for value in values):
        raise Refused(f"this function takes {least} or more whole numbers")
    return [int(value) for value in values]


def _several(values: Sequence[Fraction]) -> Sequence[Fraction]:
    if len(values) < 2:
        raise Refused("this function takes two or more numbers")
    return values


def _lcm(values: Sequence[Fraction]) -> Fraction:
    found = 1
    for value in _whole(values, 2):  # step by step, so that no size is made unchecked
        found = int(checked(Fraction(math.lcm(found, value))))
    return Fraction(found)


def _only(values: Sequence[Fraction]) -> Fraction:
    if len(values) != 1:
        raise Refused("this function takes one number")
    return values[0]


FUNCTIONS: dict[str, Callable[[Sequence[Fraction]], Fraction]] = {
    "gcd": lambda values: Fraction(math.gcd(*_whole(values, 2))),
    "lcm": _lcm,
    "max": lambda values: max(_several(values)),
    "min": lambda values: min(_several(values)),
    "abs": lambda values: abs(_only(values)),
    "factorial": lambda values: factorial(_only(values)),
}


def places(value: Fraction) -> int | None:
    """Decimals behind the point; ``None`` for a decimal that never ends."""
    rest, counts = value.denominator, {2: 0, 5: 0}
    for prime in counts:
        while rest % prime == 0:
            rest //= prime
            counts[prime] += 1
    return max(counts.values()) if rest == 1 else None


def plain(value: Fraction) -> str:
    """The exact value: an integer, a decimal of at most :data:`DECIMAL_PLACES` places, or a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    behind = places(value)
    if behind is None or behind > DECIMAL_PLACES:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**behind // value.denominator).rjust(behind + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-behind]}.{digits[-behind:]}"


def about(value: Fraction) -> str:
    """Rounded to :data:`ROUNDED` digits, half to even."""
    context = decimal.Context(prec=ROUNDED, Emax=10**6, Emin=-(10**6))
    found = context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator))
    return f"{found:f}" if -7 < found.adjusted() < 16 else f"{found:e}"


def short(value: Fraction) -> str:
    """For a step: what is too long to be read is rounded."""
    text = plain(value)
    return text if len(text) <= SHOWN_DIGITS else f"≈{about(value)}"
