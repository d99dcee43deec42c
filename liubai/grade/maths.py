r"""``math``: is the answer equal to the gold answer as mathematics? For worker processes only (``CAGED``).

Numbers, words and equal spellings are decided exactly by :mod:`liubai.grade.mathtext`. The rest goes to
Math-Verify (Apache-2.0, ``pip install 'liubai[math]'``) and sympy, which may hang: the pool's wall clock is
the only time limit, Math-Verify's own (``signal.alarm``) are switched off because they fail off the main
thread. The relation is asymmetric: gold first.

Stricter than Math-Verify, so that nothing is earned by leaving the work to the checker:

- Where gold is a number, the answer has to be written as one: ``2+2``, ``\frac{8}{2}\cdot 1`` and ``2^{2}``
  are not 4, but ``x=4``, ``4\text{ cm}``, ``\frac{8}{2}`` are. ``meta["compute"] = true`` lifts this.
- ``\sum``, ``\int``, ``!`` … count only when gold has them, too.
- With ``meta["question"]``, a formula that is copied from the question is wrong unless gold stands there.
- ± and lists of alternatives are never equal to one value.

Plain notation is brought into LaTeX's: ``2*pi``, ``ln(2)``, ``x**2``, ``x²``, ``{5}``, ``0.\overline{3}``.
What is left, and wrong: other names of functions (``asin(x)``, ``root(3, 2)``), a power of a bracket in
brackets (``2**(x**2)``), ``{1, 2}`` for a tuple, a union of intervals written with "or", words for formulas.

An answer that is dangerous to compute (towers of powers, huge exponents) is wrong, not an error.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational

from liubai.grade.mathtext import (
    MAX_LENGTH,
    based,
    explodes,
    hazard,
    is_composite,
    is_empty,
    is_list,
    is_name,
    says,
    split_name,
    text_of,
    tidy,
    unfinished,
    words,
)
from liubai.grade.quantity import Quantity, read_number, same_number, split_unit, units_agree
from liubai.grade.verifiers import tolerance_of

# it warns that its time limits are off, which is what we want
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# units are our business: Math-Verify takes the m of 5m for metres, and the formula for 5
_NORMAL = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
_FORMULA_ONLY = (LatexExtractionConfig(normalization_config=_NORMAL),)
_LATEX = (LatexExtractionConfig(),)
_ANYWHERE = (LatexExtractionConfig(), ExprExtractionConfig())
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z]")
_FORMULA = re.compile(r"\$[^$]*\$|\\\([^()]*\\\)|\\\[[^\[\]]*\\\]|\\boxed\{[^\n]*\}")
_PROSE = re.compile(r"[A-Za-z]{2,} [A-Za-z]|\n|\. |<")
MAX_PREDICTION = 20_000  #: characters of a whole output that is searched for an answer


def math(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    """Does ``answer`` (what stood in the box or the answer tags) equal ``gold``?

    ``meta``: ``tolerance`` (relative, for numbers), ``compute``, ``question``. Raises ``ValueError`` for an
    empty or hazardous gold answer.
    """
    right, given = tidy(gold), tidy(answer)
    if not right:
        raise ValueError("an empty gold answer")
    danger = hazard(right)
    if danger:
        raise ValueError(f"a gold answer that cannot be used: {danger}")
    if not given or hazard(given):
        return False
    if right == given:
        return True
    decided = _plainly(right, given, meta)
    if decided is not None:
        return decided
    if is_list(given) and not is_composite(right):
        return False
    number = read_number(given)
    if number is not None and is_composite(right):
        return False
    if ("\\pm" in right or "\\mp" in right) and not is_composite(given):
        return False
    if not meta.get("compute", False) and unfinished(given) - unfinished(right):
        return False
    if _copied(right, given, meta):
        return False
    if not units_agree(split_unit(right, trusted=True)[1], split_unit(given)[1]):
        return False
    golds = _parsed(right, trusted=True)
    answers = _parse(given) if number is None else [_sympy_number(number)]
    if not golds or not answers or not _same(golds[0], answers[0]):
        return False
    return "=" in right or _chain_holds(given)


def _chain_holds(given: str) -> bool:
    """Of ``a=b=c`` Math-Verify looks at c alone. Are the others names, or not plainly different from it?"""
    if is_list(given):
        return True
    *others, last = given.split("=")
    sides = [_parse(side) for side in others if not is_name(side)]
    final = _parse(last) if sides else []
    return not any(not side or not final or _differ(final[0], side[0]) for side in sides)


def _plainly(right: str, given: str, meta: Mapping[str, Any]) -> bool | None:
    """The verdict where gold is a number, a numeral in some base, or a word; else ``None``."""
    tolerance = tolerance_of(meta)
    gold_name, gold_value = split_name(right)
    given_name, given_value = split_name(given)
    same_name = not gold_name or not given_name or gold_name == given_name
    numeral = based(gold_value)
    if numeral is not None:  # the question names the base: it may be missing in the answer
        return same_name and (based(given_value) or (given_value.lstrip("0"), numeral[1])) == numeral
    number, other = read_number(gold_value, trusted=True), read_number(given_value)
    if number is not None:
        if other is not None:
            return same_name and same_number(number, other, tolerance)
        if based(given_value) is not None or not meta.get("compute", False):
            return _last_side(given, number, tolerance)
        return None
    said = text_of(right)
    if said is not None and says(given, said):
        return True
    if is_empty(right) and is_empty(given):
        return True
    said = words(right)
    if said is not None and (len(said) > 1 or words(given) is not None):
        return said == words(given)
    return None


def _last_side(given: str, gold: Quantity, tolerance: Fraction) -> bool:
    """``2+2=4`` and ``x=2+2=4`` for 4: a chain of equations whose last side is the number.

    The first side may be a name; the others hold no letters and are no other number.
    """
    first, *sides = given.split("=")
    last = read_number(sides[-1]) if sides else None
    if last is None or is_list(given) or not same_number(gold, last, tolerance):
        return False
    if not is_name(first):
        sides.append(first)
    for side in sides:
        number = read_number(side)
        if not same_number(last, number, tolerance) if number else not side or _LETTER.search(side):
            return False
    return True


def _copied(right: str, given: str, meta: Mapping[str, Any]) -> bool:
    question = meta.get("question")
    if not isinstance(question, str) or len(given) < 3:
        return False

    def bare(text: str) -> str:
        return "".join(tidy(text).split())

    asked = "".join(bare(piece) for piece in question.split("$"))
    return bare(given) in asked and bare(right) not in asked


def _sympy_number(number: Quantity) -> Any:
    """As Math-Verify would read it, without its parser: a decimal is a float, and may be rounded."""
    exact = sympy.Rational(number.value.numerator, number.value.denominator)
    return exact if number.places is None or number.percent else exact.evalf(max(15, number.places))


def _parse(text: str, trusted: bool = False) -> list[Any]:
    """What Math-Verify makes of one formula: at most one sympy object, or nothing."""
    formula = split_unit(text, trusted)[0].replace("\\degree", "^{\\circ}").replace("\n", " ")
    found: list[Any] = parse(f"${formula}$", _FORMULA_ONLY, fallback_mode="no_fallback", parsing_timeout=0)
    return found


_parsed = lru_cache(maxsize=4096)(_parse)  # golds are seen again with every answer of their group


def _same(gold: Any, given: Any) -> bool:
    if isinstance(gold, Relational) and isinstance(given, Relational):
        same = _same_relation(gold, given)
        if same is not None:
            return same
    if isinstance(gold, sympy.Set) and isinstance(given, Relational | sympy.And):
        return _same_region(gold, given)
    if _differ(gold, given):
        return False
    if verify(gold, given, timeout_seconds=None):
        return True
    return _same_where_real(gold, given)


def _same_region(gold: Any, given: Any) -> bool:
    """Is ``given``, such as ``1<x\\le 3``, solved, and the interval ``gold``?"""
    relations = given.args if isinstance(given, sympy.And) else (given,)
    symbols: list[Any] = sorted(given.free_symbols, key=str)
    if not isinstance(gold, sympy.Interval) or len(symbols) != 1:
        return False
    solved = all(
        type(relation) in (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)
        and any(a == symbols[0] and b.is_number for a, b in itertools.permutations(relation.args))
        for relation in relations
    )
    try:
        return solved and bool(gold == sympy.And(*relations).as_set())  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, AttributeError, NotImplementedError):
        return False


_MIRRORED = {
    sympy.Eq: sympy.Eq,
    sympy.Ne: sympy.Ne,
    sympy.Ge: sympy.Le,
    sympy.Le: sympy.Ge,
    sympy.Gt: sympy.Lt,
    sympy.Lt: sympy.Gt,
}


def _same_relation(gold: Any, given: Any) -> bool | None:
    """One relation is the other times a constant. ``None``: not of that kind, ask Math-Verify.

    Math-Verify calls two different lines equal because both have "all" of no solutions in common.
    """
    try:
        left, right = gold.lhs - gold.rhs, given.lhs - given.rhs
        if not (left.free_symbols or right.free_symbols):
            return None
        ratio = sympy.simplify(left / right)
    except (TypeError, AttributeError, ValueError, ZeroDivisionError):  # tuples, sets, matrices
        return None
    kind, other = type(gold), type(given)
    if kind in (sympy.Eq, sympy.Ne):
        return kind is other and bool(ratio.is_number and ratio.is_finite and ratio.is_zero is False)
    if ratio.is_number and ratio.is_positive:
        return kind is other
    if ratio.is_number and ratio.is_negative:
        return _MIRRORED.get(kind) is other
    return None if _MIRRORED.get(kind) in (other, _MIRRORED.get(other)) else False


#: Points at which two formulas are compared, in turn for every symbol; none of them is special.
_POINTS = (sympy.Rational(7, 3), sympy.Rational(-5, 7), sympy.Rational(11, 13), sympy.Rational(-19, 6))
#: Relative distances from which on values differ: of exact formulas, and where a decimal may be rounded.
_FAR, _FAR_ROUNDED = sympy.Rational(1, 10**12), sympy.Rational(1, 10**5)
_MAX_SYMBOLS = 4
_DIGITS = 25
_CLOSE = sympy.Rational(1, 10**15)


def _differ(gold: Any, given: Any) -> bool:
    """Are they surely different: real numbers that are far apart, at one point?

    Saves a long simplification, and with it the time-out that a wrong answer could otherwise ask for. The
    distance is relative: Math-Verify takes all tiny numbers for equal.
    """
    if not isinstance(gold, sympy.Expr) or not isinstance(given, sympy.Expr):
        return False
    symbols: list[Any] = sorted(gold.free_symbols | given.free_symbols, key=str)
    if any(str(symbol) == "e" for symbol in symbols) or gold.is_Symbol or given.is_Symbol:
        return False  # may be Euler's number, or a word that was read letter by letter
    at = {symbol: _POINTS[0] + sympy.Rational(i, 7) for i, symbol in enumerate(symbols)}
    try:
        a, b = gold.subs(at).evalf(_DIGITS), given.subs(at).evalf(_DIGITS)
        if not a.is_Float or not b.is_Float:
            return False
        far = _FAR_ROUNDED if gold.has(sympy.Float) or given.has(sympy.Float) else _FAR
        return bool(abs(a - b) > far * max(abs(a), abs(b)))
    except (TypeError, ValueError, AttributeError, NotImplementedError, RecursionError, ZeroDivisionError):
        return False


def _same_where_real(gold: Any, given: Any) -> bool:
    """√(1/n) = 1/√n: equal for positive symbols, and nowhere different where both sides are real.

    Without the second condition x would be √(x²).
    """
    if not isinstance(gold, sympy.Expr) or not isinstance(given, sympy.Expr):
        return False
    symbols: list[Any] = sorted(gold.free_symbols, key=str)
    if gold.free_symbols != given.free_symbols or not 0 < len(symbols) <= _MAX_SYMBOLS:
        return False
    try:
        for signs in itertools.product(range(len(_POINTS)), repeat=len(symbols)):
            at = {
                s: _POINTS[(sign + i) % len(_POINTS)]
                for i, (s, sign) in enumerate(zip(symbols, signs, strict=True))
            }
            a, b = gold.subs(at).evalf(_DIGITS), given.subs(at).evalf(_DIGITS)
            if not a.is_number or not b.is_number:
                return False
            if a.is_real and b.is_real and abs(a - b) > abs(a) * _CLOSE:
                return False
        positive: Any = dict(zip(symbols, sympy.symbols(f"p:{len(symbols)}", positive=True), strict=True))
        return bool(sympy.simplify((gold - given).subs(positive)).is_zero)
    except (TypeError, ValueError, AttributeError, NotImplementedError, RecursionError, ZeroDivisionError):
        return False


def equivalent(
    gold: str,
    prediction: str,
    *,
    precision: int = 6,
    strict: bool = True,
    allow_set_relation_comp: bool = False,
) -> bool:
    """Is the answer somewhere in ``prediction`` (a whole output) equal to the one in ``gold`` (a solution)?

    Math-Verify's own search and rules, so with its leniency: for comparing checkers on published cases, not
    for rewards. Never raises; a text that is too long or dangerous to compute is not equivalent.
    """
    if not gold.strip() or max(len(gold), len(prediction)) > MAX_PREDICTION:
        return False
    formulas = [gold, prediction, *_FORMULA.findall(gold), *_FORMULA.findall(prediction)]
    formulas = [formula for formula in formulas if not _PROSE.search(formula)]
    if any(len(formula) > MAX_LENGTH or explodes(formula) for formula in formulas):
        return False
    right, given = tidy(gold), tidy(prediction)
    if right and right == given:
        return True
    numbers = read_number(right), read_number(given)
    if numbers[0] is not None and numbers[1] is not None and same_number(numbers[0], numbers[1]):
        return True
    golds, answers = (
        parse(text, _ANYWHERE, parsing_timeout=0) or parse(f"${text}$", _LATEX, parsing_timeout=0)
        for text in (gold, prediction)
    )
    for a, b in itertools.product(golds, answers):
        if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq):
            same = _same_relation(a, b)
            if same is not None:
                return same
    return bool(
        verify(
            golds,
            answers,
            float_rounding=precision,
            strict=strict,
            allow_set_relation_comp=allow_set_relation_comp,
            timeout_seconds=None,
        )
    )


_parse("\\frac{1}{2}")  # the grammar is read on first use: that belongs to loading, not to a verdict
