"""``logic``: who is what (knights and knaves), or a formula of propositional logic.

Bounded by construction, exact, and deaf to everything that is not plainly an assignment: a name that is
missing, foreign or given twice makes the answer wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from liubai.grade import formula

MAX_LENGTH = 4_000  #: characters of an assignment

#: Spellings of one value; any other word stands for itself.
_SYNONYMS = {
    **dict.fromkeys(
        ["true", "yes", "t", "1", "knight", "truth-teller", "truth teller", "truthful", "honest"], "+"
    ),
    **dict.fromkeys(["false", "no", "f", "0", "knave", "liar", "lying", "dishonest"], "-"),
}
_OPPOSITE = {"+": "-", "-": "+"}

_SPLIT = re.compile(r"\s*(?:[,;\n]|\.(?=\s|$))\s*(?:and\s+)?|\s+and\s+", re.IGNORECASE)
_NUMBERED = re.compile(r"^ ?(?:\(?[0-9]{1,2}[.)]|[-*•]) ", re.MULTILINE)
_PAIR = re.compile(r"(.+?)\s*(?::=|[:=]|->|→|\s(?:is|are|must be|was)\s)\s*(.+)", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:a|an|the)\s+", re.IGNORECASE)
#: what no assignment has (an arrow may stand in one)
_CONNECTIVE = re.compile(r"[&|∧∨¬~↔⇔⊕^]|<->|\b(?:or|not|iff|implies|xor)\b", re.IGNORECASE)
_MARKUP = re.compile(r"[*`\"'$]|\\text\{([^{}]*)\}")


def logic(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    """``A: knight, B: knave``, ``A=true; B=false``, ``A is a knight and B is a knave``: the same assignment,
    whatever the order, case and wording (true, yes, knight … / false, no, knave …).

    A piece without a value is a statement, and counts as true: gold may be a set of statements. With
    ``meta["kind"] = "formula"``, or a gold that has a sign of one (``&``, ``∨``, ``not`` …), both are
    formulas that have to be equivalent (:mod:`liubai.grade.formula`); ``meta["max_signs"]`` then bounds the
    answer's length in names and connectives (brackets not counted),
    so that a formula that was to be simplified cannot just be repeated.
    """
    kind = meta.get("kind", "formula" if _CONNECTIVE.search(gold) else "assignment")
    if kind == "formula":
        return _equivalent(gold, answer, meta)
    if kind != "assignment":
        raise ValueError(f"meta 'kind' is 'assignment' or 'formula', not {kind!r:.60}")
    right = read_assignment(gold)
    if not right:
        raise ValueError(f"the gold answer is not an assignment with every name once: {gold[:60]!r}")
    return read_assignment(answer) == right


def read_assignment(text: str) -> dict[str, str] | None:
    """Name → value, both in lower case, ``+``/``-`` for the synonyms of true and false. ``None`` when a
    piece has no name or no value, or a name comes twice."""
    if len(text) > MAX_LENGTH:
        return None
    found: dict[str, str] = {}
    # blanks first: a long run of them would cost the other patterns its square
    text = _NUMBERED.sub("", re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)))
    text = _MARKUP.sub(lambda match: match[1] or "", text).strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    for piece in _SPLIT.split(text.strip()):
        if not piece:
            continue
        pair = _PAIR.fullmatch(piece)
        name, value = (pair[1], _value(pair[2])) if pair else (piece, "+")
        name = " ".join(name.casefold().split())
        if not name or not value or name in found:
            return None
        found[name] = value
    return found or None


def _value(said: str) -> str:
    said = " ".join(said.casefold().split())
    denied = said.startswith("not ")
    plain = _ARTICLE.sub("", said.removeprefix("not "), count=1)
    value = _SYNONYMS.get(plain, plain)
    if denied:  # "not a knight" is a knave; "not red" is no value
        return _OPPOSITE.get(value, "")
    return value


def _equivalent(gold: str, answer: str, meta: Mapping[str, Any]) -> bool:
    longest = meta.get("max_signs", formula.MAX_TOKENS)
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
        raise ValueError(f"meta 'max_signs' is a whole number from 1, not {longest!r:.60}")
    try:
        right = formula.tokens(gold)
        variables = sorted(formula.names(right))
        wanted = formula.table(right, variables)
    except formula.RefusedError as error:
        raise ValueError(f"the gold answer is not a formula: {error}") from error
    try:
        given = formula.tokens(answer)
        if sum(sign not in "()" for sign in given) > longest:
            return False
        together = sorted(formula.names(given) | set(variables))
        if together != variables:
            wanted = formula.table(right, together)
        return formula.table(given, together) == wanted
    except formula.RefusedError:
        return False
