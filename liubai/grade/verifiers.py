"""The verifiers that need no process of their own: pure, exact, and bounded by construction.

A verifier is ``(gold, answer, meta) -> bool``, or a score from 0 to 1. It raises ``ValueError`` when the
*problem* is unusable (its gold, or the part of its meta that the verifier reads) and never for any answer.
What it cannot read is wrong: nothing is guessed in the answer's favour.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from liubai.grade.arithmetic import RefusedError, parse_expression
from liubai.grade.faithful import faithful
from liubai.grade.logic import logic
from liubai.grade.sonnet import sonnet
from liubai.grade.structured import json_equal
from liubai.grade.verse import verse
from liubai.problems.countdown import parse as parse_countdown
from liubai.problems.errand import taste
from liubai.problems.passage import facts_of

Verifier = Callable[[str, str, Mapping[str, Any]], bool | float]

MAX_NUMBER = 100  #: characters of a number
MAX_EXPONENT = 300  #: of ten; beyond it nothing is computed

_RESULT = re.compile(r"[ \t\n]*([-−]?)[ \t\n]*(0|[1-9][0-9]{0,8})[ \t\n]*")

# "3 . 8" is how the word-level tokenizer writes 3.8: one blank on both sides or none, no other spacing,
# so that the list "3. 8" stays refused.
_INTEGER = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+"  # 0,111 is a decimal comma, and refused
_NUMBER = re.compile(
    rf"(?P<sign>[-+−]?) ?(?:"
    rf"(?P<over>{_INTEGER}) ?/ ?(?P<under>{_INTEGER})"
    rf"|(?P<whole>{_INTEGER})?(?:(?:\.| \. )(?P<part>[0-9]+)|\.?)(?:[eE](?P<power>[-+]?[0-9]{{1,4}}))?"
    rf")(?P<percent> ?%)?"
)
_CURRENCY = re.compile(r"([-+−]?) ?\\?([$€£¥₹₩]) ?([-+−]?[0-9.].*)", re.DOTALL)
_LETTER = re.compile(r"\( ?([A-Za-z]) ?\)[.:]?|([A-Za-z]) ?[).:]?")
_WRAPPED = re.compile(r"\*\*([^*]{1,20})\*\*[.:]?|\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]{1,20})\}")


def countdown(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    """``"3 4 5 ->35"``: an expression that uses exactly these numbers, each once, and makes 35.

    ``+ - * / ( )`` and ``× ÷ −``, integers only, exact rational arithmetic. A closing ``= 35`` may be
    there and must then be right. See :mod:`liubai.grade.arithmetic` for all that is refused.
    """
    numbers, target = parse_countdown(gold)
    if not numbers:
        raise ValueError(f"a countdown problem without numbers: {gold[:60]!r}")
    text, equals, result = answer.partition("=")
    if equals:
        claimed = _RESULT.fullmatch(result)
        if claimed is None or int(claimed[2]) * (-1 if claimed[1] else 1) != target:
            return False
    try:
        expression = parse_expression(text)
    except RefusedError:
        return False
    return expression.value == target and sorted(expression.numbers) == sorted(numbers)


def number(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    """Equal in value: 1,234 = 1234, 3.80 = 3.8, 1/2 = 0.5, 50% = 0.5 (and 50% ≠ 50), 1e3 = 1000.

    Exact, unless ``meta["tolerance"]`` (0 ≤ t < 1) allows |answer − gold| ≤ t·|gold|. One number and
    nothing else: no words, alternatives, inf or nan, no decimal comma. A unit may follow, or be missing,
    when ``meta["unit"]`` names it (a string, or a list of spellings; case does not matter). A sign of a
    currency may stand before the number; two different ones are not equal.
    """
    units = _units(meta)
    symbol, bare = _bare_number(gold, units)
    right = parse_number(bare)
    if right is None:
        raise ValueError(f"not a number: {gold[:60]!r}")
    tolerance = tolerance_of(meta)
    given_symbol, given_bare = _bare_number(answer, units)
    given = parse_number(given_bare)
    if given is None or (symbol and given_symbol and symbol != given_symbol):
        return False
    return abs(given - right) <= tolerance * abs(right)


def _bare_number(text: str, units: Iterable[str]) -> tuple[str, str]:
    """(sign of a currency, the rest without a unit): ``-$5.20 per day`` → ("$", "-5.20")."""
    text = text.strip()
    folded = text.casefold()
    for unit in units:
        rest = text[: -len(unit)].rstrip()
        # "5m" and "5 m" are five metres; in "5 cm" the unit "m" leaves a letter behind, which is no number
        if len(folded) == len(text) and folded.endswith(unit) and rest[-1:].isdigit():
            text = rest
            break
    money = _CURRENCY.fullmatch(text)
    return (money[2], money[1] + money[3]) if money else ("", text)


def _units(meta: Mapping[str, Any]) -> list[str]:
    """Spellings of the unit, the longest first."""
    raw = meta.get("unit", [])
    spellings = [raw] if isinstance(raw, str) else raw
    if not isinstance(spellings, list | tuple) or not all(
        isinstance(u, str) and u.strip() for u in spellings
    ):
        raise ValueError(f"meta 'unit' is a word or a list of words, not {raw!r:.60}")
    if any(character.isdigit() for unit in spellings for character in unit[:1]):
        raise ValueError("meta 'unit' must not begin with a digit")
    return sorted((unit.strip().casefold() for unit in spellings), key=len, reverse=True)


def parse_number(text: str) -> Fraction | None:
    """The exact value of one written number, ``None`` for everything else. Never raises."""
    if len(text) > MAX_NUMBER:
        return None
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    if match["over"] is not None:
        under = _integer(match["under"])
        if under == 0:
            return None
        value = Fraction(_integer(match["over"]), under)
    else:
        whole, part = match["whole"], match["part"] or ""
        if whole is None and not part:
            return None
        power = int(match["power"] or 0)
        if abs(power) > MAX_EXPONENT:
            return None
        value = Fraction(_integer((whole or "0") + part)) * Fraction(10) ** (power - len(part))
    if match["percent"]:
        value /= 100
    return -value if match["sign"] in ("-", "−") else value


def _integer(digits: str) -> int:
    return int(digits.replace(",", ""))


def tolerance_of(meta: Mapping[str, Any]) -> Fraction:
    raw = meta.get("tolerance", 0)
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 <= raw < 1:
        raise ValueError(f"meta 'tolerance' is a number from 0 up to but below 1, not {raw!r:.60}")
    return Fraction(str(raw))


def exact(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    """The same text, but for case, Unicode composition and the amount of white space."""
    if not gold.strip():
        raise ValueError("an empty gold answer")
    return _plain(gold) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def choice(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    """One letter of ``meta["choices"]`` (default "ABCD"): ``B``, ``b``, ``(B)``, ``B.``, ``B)``, ``**B**``,
    ``\\text{B}``.

    ``choices`` are the letters: a string, a list, or a mapping whose keys they are. Two letters, or a
    letter followed by its text, are refused.
    """
    letters = _letters(meta.get("choices", "ABCD"))
    right = _letter(gold)
    if right not in letters:
        raise ValueError(f"the gold answer {gold[:20]!r} is none of the choices {''.join(sorted(letters))}")
    return _letter(answer) == right


def _letters(choices: object) -> set[str]:
    if not isinstance(choices, Iterable):
        raise ValueError("meta 'choices' is a list of letters")
    letters = {str(c).strip().upper() for c in choices}
    if not letters or not all(len(c) == 1 and "A" <= c <= "Z" for c in letters):
        raise ValueError("meta 'choices' is a list of single letters from A to Z")
    return letters


def _letter(text: str) -> str | None:
    text = text.strip()
    wrapped = _WRAPPED.fullmatch(text)
    match = _LETTER.fullmatch((wrapped[1] or wrapped[2]).strip() if wrapped else text)
    return (match[1] or match[2]).upper() if match else None


def summary(gold: str, answer: str, meta: Mapping[str, Any]) -> float:
    """The share of the gold's facts (``anna 3 cups , ben 5 hats``) that a summary tells, each once and in the
    question's language; 0 as soon as it says anything that the gold does not."""
    told = facts_of(gold)
    if not told:
        raise ValueError(f"not a list of facts: {gold[:60]!r}")
    said = facts_of(answer)
    if said is None or len(set(said)) < len(said) or not set(said) <= set(told):
        return 0.0
    # the very words: a summary in the other language is no summary for this reader
    told_words = set(gold.split())
    return len(said) / len(told) if set(answer.split()) <= told_words else 0.0


def errand(gold: str, answer: str, meta: Mapping[str, Any]) -> float:
    """How an answer to a general prompt is liked: :func:`liubai.problems.errand.taste`."""
    return taste(gold, answer)


#: All bounded: the time for any answer of legal length is far below a millisecond, but for a sonnet of words
#: that nobody knows, whose spellings are tried (a hundredth of a second).
VERIFIERS: dict[str, Verifier] = {
    "countdown": countdown,
    "number": number,
    "exact": exact,
    "choice": choice,
    "json": json_equal,
    "logic": logic,
    "summary": summary,
    "errand": errand,
    "verse": verse,
    "sonnet": sonnet,
    "faithful": faithful,
}
