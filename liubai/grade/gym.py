"""The verifier ``gym``: what reasoning-gym's own ``score_answer`` says, from 0 to 1.

``meta`` is that of a problem of :mod:`liubai.problems.gym`: ``dataset``, ``options``, ``entry``. The scorers
are code of others and run in worker processes alone. Three things are mended here, since they decide what
a model learns:

* Some scorers pass the answer to ``eval``, their own or SymPy's. Here both see an ``eval`` that knows
  numbers, lists and the functions of school mathematics, and refuses everything else.
* Some raise for an answer that they cannot read. That is a wrong answer, as long as they can read the
  gold; where they cannot read that either, it is an error.
* One scorer calls everything right (``BROKEN``).
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from liubai.problems import gym_maker
from liubai.problems.gym_maker import unpacked

#: What answers may call: SymPy's constructors, as its parser writes them, and functions of one value.
FUNCTIONS = frozenset((
    "Symbol", "Integer", "Float", "Rational", "Abs", "abs", "exp", "log", "ln", "sqrt", "cbrt", "sin",
    "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "sinh", "cosh", "tanh", "asinh",
    "acosh", "atanh", "erf",
))  # fmt: skip
CONSTANTS = frozenset({"pi", "E", "I", "True", "False", "None"})
#: Data sets whose scorer takes any text for right (it compares truth values of texts): here, the same text.
BROKEN = frozenset({"game_of_life_halting"})

_PLAIN = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp, ast.Load)
_SIGNS = (ast.operator, ast.unaryop)
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, SyntaxError, ArithmeticError)


def gym(gold: str, answer: str, meta: Mapping[str, Any]) -> float:
    """The score of ``answer``. Raises ``ValueError`` for an unusable meta, ``UserError`` for a data set or
    option that does not exist, and what the scorer raises for its own gold."""
    dataset, options, entry = meta.get("dataset"), meta.get("options", {}), meta.get("entry")
    if not isinstance(dataset, str) or not isinstance(options, Mapping) or not isinstance(entry, Mapping):
        raise ValueError(
            "the verifier 'gym' needs 'dataset', 'options' and 'entry' in meta, as gym: makes them"
        )
    whole = unpacked(dict(entry))
    scorer = _dataset(dataset, json.dumps(options, sort_keys=True)).score_answer
    if dataset in BROKEN:
        return float(answer.strip().casefold() == str(whole["answer"]).casefold())
    try:
        return _clamped(scorer(answer, whole))
    except _UNREADABLE:
        scorer(gold or "", whole)
        return 0.0


@lru_cache(maxsize=256)
def _dataset(name: str, options: str) -> Any:
    made = gym_maker.dataset(name, options)
    import sympy.parsing.sympy_parser as parser

    # found before the built-in one; this process draws no problems, so nothing else is touched
    for module in [m for n, m in sys.modules.items() if n.startswith("reasoning_gym.")] + [parser]:
        vars(module)["eval"] = guarded_eval
    return made


def guarded_eval(
    source: object, names: Mapping[str, Any] | None = None, own: Mapping[str, Any] | None = None
) -> Any:
    """``eval`` of arithmetic and lists, and with SymPy's ``names`` of its functions. Raises ``ValueError``
    for any other expression."""
    tree = ast.parse(str(source).strip(), mode="eval")
    heads = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree.body):
        if isinstance(node, ast.Name):
            allowed = node.id in (FUNCTIONS if id(node) in heads else CONSTANTS) or node.id in (own or ())
        elif isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name) and not node.keywords and names is not None
        elif isinstance(node, ast.Pow):
            allowed = names is not None  # of numbers it could fill the memory; SymPy's are its own
        else:
            allowed = isinstance(node, _PLAIN + _SIGNS)
        if not allowed:
            raise ValueError(f"an answer may not hold {type(node).__name__}")
    given = {name: names[name] for name in FUNCTIONS | CONSTANTS if name in names} if names else {}
    code = compile(tree, "<answer>", "eval")
    return eval(code, {"__builtins__": {"abs": abs}, **given}, dict(own or {}))


def _clamped(score: object) -> float:
    return min(1.0, max(0.0, float(score)))  # type: ignore[arg-type]
