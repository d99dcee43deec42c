"""reasoning-gym's side of :mod:`liubai.problems.gym`: what touches its code.

:func:`main` is the process in which entries are made, with a fixed hash seed: some data sets go through
sets of strings, and would ask something else in every process. In: JSON lines ``[dataset, options, number]``.
Out: the entry, packed; ``{"error": …}`` for what is the user's to mend. With number ``null``, only the
data set is made.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from datetime import date
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from typing import Any

from liubai.errors import UserError, nearest

SEED = 0
#: Entry numbers are drawn below this: the data sets add their seed, and NumPy takes 32 bits.
ENTRIES = 2**31
#: Data sets that make or number their entries beforehand -> how many they are asked for.
PREPARED = {"acre": 2_000, "gsm_symbolic": 100_000, "list_functions": 100_000, "word_ladder": 1_000}

INSTALL = "gym: families need the package reasoning-gym: pip install 'liubai[gym]'"


def registry() -> dict[str, Any]:
    """Name -> (data set, its options). Raises ``UserError`` where reasoning-gym is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(INSTALL)
    try:
        import reasoning_gym  # noqa: F401 — registers them
        from reasoning_gym import factory
    except ImportError as error:
        raise UserError(f"{INSTALL} ({error})") from None
    return {name: both for name, both in factory.DATASETS.items() if name != "composite"}


@lru_cache(maxsize=256)
def dataset(name: str, options: str) -> Any:
    """The data set; ``options`` is JSON. Raises ``UserError`` for what it does not know or refuses."""
    known = registry()
    if name == "composite":
        raise UserError("'gym:composite' mixes data sets; name them one by one in the recipe instead")
    if name not in known:
        raise UserError(f"reasoning-gym has no data set '{name[:80]}'; {nearest(name, known)}")
    kind, config = known[name]
    given = json.loads(options)
    fields = {field.name for field in dataclasses.fields(config)} - {"seed", "size"}
    for option in given:
        if option not in fields:
            raise UserError(f"'gym:{name}' has no option '{option[:80]}'; {nearest(option, fields)}")
    if name in PREPARED:
        given["size"] = PREPARED[name]
    try:
        return kind(config=config(**given, seed=SEED))
    except Exception as error:  # asserts, mostly, but any type can be wrong
        raise UserError(f"'gym:{name}' refuses its options: {_said(error)}") from error


def entry(name: str, options: str, number: int) -> Any:
    """Entry ``number`` of a data set, packed. Raises ``UserError`` where its options allow none."""
    made = dataset(name, options)
    try:
        return packed(made[number])
    except Exception as error:  # code of others, with options of the user's
        raise UserError(f"'gym:{name}' cannot make a problem: {_said(error)}") from error


def packed(value: Any) -> Any:
    """``value`` as JSON that :func:`unpacked` gives back, tuples and keys that are not strings included; of
    an enum or a NumPy scalar, its value; of a fraction or a date, its text.

    Raises ``TypeError`` for anything else that JSON does not know.
    """
    if isinstance(value, Enum):
        return packed(value.value)
    if hasattr(value, "item"):  # a number or text of NumPy's
        value = value.item()
    if isinstance(value, Fraction | date):  # in what is told about an answer; no scorer computes with them
        value = str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [packed(inner) for inner in value]
    if isinstance(value, tuple):
        return {"()": [packed(inner) for inner in value]}
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value) and not value.keys() & {"()", "{}"}:
            return {key: packed(inner) for key, inner in value.items()}
        return {"{}": [[packed(key), packed(inner)] for key, inner in value.items()]}
    raise TypeError(f"JSON cannot hold {type(value).__name__}")


def unpacked(value: Any) -> Any:
    """The inverse of :func:`packed`."""
    if isinstance(value, list):
        return [unpacked(inner) for inner in value]
    if isinstance(value, dict):
        if list(value) == ["()"]:
            return tuple(unpacked(value["()"]))
        if list(value) == ["{}"]:
            return {unpacked(key): unpacked(inner) for key, inner in value["{}"]}
        return {key: unpacked(inner) for key, inner in value.items()}
    return value


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def main() -> None:
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print must not reach it
    for line in sys.stdin:
        name, options, number = json.loads(line)
        try:
            if number is None:
                dataset(name, options)
                answer: Any = {"entries": PREPARED.get(name, ENTRIES)}
            else:
                answer = entry(name, options, number)
        except UserError as error:
            answer = {"error": str(error)}
        outbox.write(json.dumps(answer).encode() + b"\n")
        outbox.flush()
