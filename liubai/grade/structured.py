"""``json`` and ``regex``: answers with a structure.

``json`` is bounded by construction. ``regex`` is not: patterns come with the data, and one that backtracks
without end must be killed (``CAGED``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

MAX_JSON = 20_000  #: characters
MAX_DEPTH = 40  #: nested lists and objects
MAX_NUMBER = 100  #: characters of a number
MAX_EXPONENT = 300  #: of ten
MAX_PATTERN = 2_000  #: characters

_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)


class _RefusedError(Exception):
    """Not JSON that we accept. The message says why."""


def json_equal(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    """The answer is JSON with gold's value: numbers by value (1 = 1.0 = 1e0, but not "1" or true), the keys
    of an object in any order.

    ``meta["ordered"] = false`` lets lists be in any order. ``meta["subset"] = true`` ignores keys that gold
    does not have. The whole answer is JSON, or one fenced block of it. Refused: duplicate keys, NaN,
    comments, more than one value, more than ``MAX_DEPTH`` levels. Raises ``ValueError`` for such a gold.
    """
    ordered, subset = flag(meta, "ordered", True), flag(meta, "subset", False)
    if subset and not ordered:
        raise ValueError("meta 'subset' and 'ordered' = false cannot be used together")
    try:
        right = _read(gold)
    except _RefusedError as error:
        raise ValueError(f"the gold answer is not usable JSON: {error}") from error
    try:
        given = _read(_unfenced(answer))
    except _RefusedError:
        return False
    if subset:
        return _covers(right, given)
    return bool(_canonical(right, ordered) == _canonical(given, ordered))


def flag(meta: Mapping[str, Any], name: str, default: bool) -> bool:
    """An option that is true or false. Raises ``ValueError`` for anything else."""
    value = meta.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"meta '{name}' is true or false, not {value!r:.60}")
    return value


def _unfenced(answer: str) -> str:
    fence = _FENCE.fullmatch(answer.strip())
    return fence[1] if fence and "```" not in fence[1] else answer


def _read(text: str) -> Any:
    """Strict JSON with exact numbers. Raises :class:`_RefusedError`, and nothing else."""
    if len(text) > MAX_JSON:
        raise _RefusedError(f"longer than {MAX_JSON} characters")
    try:
        value = json.loads(
            text,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_no_constant,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        raise _RefusedError(str(error)[:100]) from error
    if _depth(value) > MAX_DEPTH:
        raise _RefusedError(f"nested deeper than {MAX_DEPTH}")
    return value


def _number(text: str) -> Fraction:
    exponent = re.split("[eE]", text)[1:]
    if len(text) > MAX_NUMBER or (exponent and abs(int(exponent[0])) > MAX_EXPONENT):
        raise _RefusedError("a number is too long or too large")
    return Fraction(text)


def _no_constant(text: str) -> None:
    raise _RefusedError(f"{text} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RefusedError("a key stands twice in an object")
    return found


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    deepest, level = 0, [value]
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
        deepest += 1
    return deepest


def _canonical(value: Any, ordered: bool) -> Any:
    """Tuples that are equal exactly when the values are: in Python, ``True == 1`` and ``[] != ()``."""
    if isinstance(value, dict):
        return ("object", tuple((key, _canonical(value[key], ordered)) for key in sorted(value)))
    if isinstance(value, list):
        items = [_canonical(item, ordered) for item in value]
        return ("list", tuple(items if ordered else sorted(items, key=repr)))
    return (type(value).__name__, value)


def _covers(gold: Any, given: Any) -> bool:
    """Equal, but for keys of objects that only ``given`` has."""
    if isinstance(gold, dict) and isinstance(given, dict):
        return all(key in given and _covers(value, given[key]) for key, value in gold.items())
    if isinstance(gold, list) and isinstance(given, list):
        return len(gold) == len(given) and all(map(_covers, gold, given))
    return type(gold) is type(given) and bool(gold == given)


def regex(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    """Gold is a pattern (Python's ``re``) that must match the whole answer.

    ``meta["ignore_case"] = true`` does what it says. Raises ``ValueError`` for a pattern that is broken or
    matches the empty text: it would not ask for anything.
    """
    flags = re.IGNORECASE if flag(meta, "ignore_case", False) else 0
    if len(gold) > MAX_PATTERN:
        raise ValueError(f"the pattern is longer than {MAX_PATTERN} characters")
    try:
        pattern = re.compile(gold, flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the pattern cannot be read: {error}") from error
    if pattern.fullmatch(""):
        raise ValueError("the pattern matches the empty text")
    return pattern.fullmatch(answer) is not None
