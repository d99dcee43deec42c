"""``json``, ``logic`` and ``regex``: known cases both ways, attacks, an oracle, patterns without end."""

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.grade import VERIFIERS, GradeItem, GraderPool, grade
from liubai.grade.formula import MAX_NAMES, RefusedError, names, table, tokens
from liubai.grade.structured import MAX_DEPTH, regex

json_equal, logic = VERIFIERS["json"], VERIFIERS["logic"]

Meta = dict[str, Any]

# --- json -----------------------------------------------------------------------------------------

RECORD = '{"name": "Ada", "born": 1815, "works": ["notes", "letters"]}'


@pytest.mark.parametrize(
    ("gold", "answer", "meta", "correct"),
    [
        (RECORD, '{"works":["notes","letters"],"born":1815.0,"name":"Ada"}', {}, True),
        (RECORD, f"```json\n{RECORD}\n```", {}, True),
        (RECORD, f"```\n{RECORD}\n```\n", {}, True),
        (RECORD, f"Here it is:\n```json\n{RECORD}\n```", {}, False),
        (RECORD, f"```json\n{RECORD}\n```\n```json\n{RECORD}\n```", {}, False),
        (RECORD, f"{RECORD} {RECORD}", {}, False),
        (RECORD, f"[{RECORD}]", {}, False),
        (RECORD, RECORD.replace("1815", '"1815"'), {}, False),
        (RECORD, RECORD.replace("Ada", "ada"), {}, False),
        (RECORD, '{"name": "Ada", "works": ["letters", "notes"], "born": 1815}', {}, False),
        (RECORD, '{"name": "Ada", "works": ["letters", "notes"], "born": 1815}', {"ordered": False}, True),
        (RECORD, '{"name": "Ada", "works": ["notes", "notes"], "born": 1815}', {"ordered": False}, False),
        (RECORD, '{"name": "Ada", "works": ["notes"], "born": 1815}', {"ordered": False}, False),
        (RECORD, RECORD[:-1] + ', "more": 1}', {}, False),
        (RECORD, RECORD[:-1] + ', "more": 1}', {"subset": True}, True),
        (RECORD, '{"name": "Ada"}', {"subset": True}, False),
        (RECORD, RECORD[:-1] + ', "name": "Ada"}', {}, False),
        (RECORD, RECORD[:-1] + ', "born": 1}', {}, False),
        ('{"a": {"b": 1}}', '{"a": {"b": 1, "c": 2}}', {"subset": True}, True),
        ('{"a": {"b": 1}}', '{"a": {"b": true}}', {"subset": True}, False),
        ("[[1, 2], [3]]", "[[3], [2, 1]]", {"ordered": False}, True),
        ("1", "1.0", {}, True),
        ("1", "1e0", {}, True),
        ("0.1", "1E-1", {}, True),
        ("0.3", "0.30000000000000004", {}, False),
        ("1", "true", {}, False),
        ("0", "false", {}, False),
        ("0", "-0", {}, True),
        ("null", "0", {}, False),
        ("null", "None", {}, False),
        ('""', "[]", {}, False),
        ("{}", "[]", {}, False),
        ("[]", "[]", {}, True),
        ('"1"', "1", {}, False),
        ('"\\u00e9"', '"é"', {}, True),
        ("1", "NaN", {}, False),
        ("1", "1 // one", {}, False),
        ("[1]", "[1,]", {}, False),
        ("1", "01", {}, False),
        ("1", "1e999999999", {}, False),
        ("1", "1" * 200, {}, False),
        ("[1]", "[" * 1900, {}, False),
        ("[1]", "[" * 900 + "1" + "]" * 900, {}, False),
    ],
)
def test_json(gold: str, answer: str, meta: Meta, correct: bool) -> None:
    assert json_equal(gold, answer, meta) is correct


@pytest.mark.parametrize(
    ("gold", "meta"),
    [
        ("", {}),
        ("{'a': 1}", {}),
        ('{"a": 1, "a": 2}', {}),
        ("NaN", {}),
        ("1e9999", {}),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), {}),
        ("1", {"ordered": "no"}),
        ("1", {"subset": 1}),
        ("1", {"subset": True, "ordered": False}),
    ],
)
def test_unusable_json_golds_are_errors(gold: str, meta: Meta) -> None:
    with pytest.raises(ValueError, match=r"."):
        json_equal(gold, "1", meta)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def exactly(value: Any) -> Any:
    """Python's ``==``, but with True ≠ 1."""
    if isinstance(value, list):
        return [exactly(item) for item in value]
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    return (type(value).__name__, value)


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES, st.randoms())
def test_json_equals_pythons_own_reading(a: Any, b: Any, random: Any) -> None:
    assert json_equal(json.dumps(a), json.dumps(b, indent=1), {}) is (exactly(a) == exactly(b))
    assert json_equal(json.dumps(a), json.dumps(a, ensure_ascii=False), {"subset": True})
    if isinstance(a, list):
        mixed = random.sample(a, len(a))
        assert json_equal(json.dumps(a), json.dumps(mixed), {"ordered": False})
        assert not json_equal(json.dumps(a), json.dumps([*mixed, 1]), {"ordered": False})


# --- logic: assignments ---------------------------------------------------------------------------

KNIGHTS = "Zoey: knight, Oliver: knave, Al: knight"


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        (KNIGHTS, True),
        ("al = true; oliver = false; zoey = true", True),
        ("Zoey is a knight, Oliver is a knave, and Al is a knight.", True),
        ("Zoey is a knight and Oliver is a knave and Al is a knight", True),
        ("(1) Zoey is a knight\n(2) Oliver is a knave\n(3) Al is a knight", True),
        ("- **Zoey**: Knight\n- **Oliver**: Knave\n- **Al**: Knight", True),
        ('{"Zoey": true, "Oliver": false, "Al": true}', True),
        ("Zoey := yes; Oliver := no; Al := yes", True),
        ("Zoey is not a knave, Oliver is not a knight, Al is truthful", True),
        ("Zoey: knight, Oliver: liar, Al: truth-teller", True),
        ("Zoey: knight, Oliver: knight, Al: knight", False),
        ("Zoey: knight, Oliver: knave", False),
        (f"{KNIGHTS}, Bo: knave", False),
        (f"{KNIGHTS}, Zoey: knave", False),
        (f"{KNIGHTS}, Zoey: knight", False),
        (f"Oliver: knight, {KNIGHTS}", False),
        ("Zoey: knight or knave, Oliver: knave or knight, Al: knight or knave", False),
        ("Zoey: knight/knave, Oliver: knave, Al: knight", False),
        ("Zoey: not, Oliver: knave, Al: knight", False),
        ("Zoey: , Oliver: knave, Al: knight", False),
        ("knight, knave, knight", False),
        ("Zoey, Oliver, Al", False),
        ("Zoey and Al are knights, Oliver is a knave", False),
        ("everybody: knight", False),
        ("", False),
        ("=", False),
        (",;.", False),
    ],
)
def test_assignments(answer: str, correct: bool) -> None:
    assert logic(KNIGHTS, answer, {}) is correct


def test_values_of_any_kind_and_statements() -> None:
    assert logic("house 1 = red; house 2 = blue", "House 2: Blue, House 1: red", {})
    assert not logic("house 1 = red; house 2 = blue", "House 2: red, House 1: blue", {})
    assert logic("it rains; Bo sleeps", "Bo sleeps, and it rains.", {})
    assert not logic("it rains; Bo sleeps", "it rains", {})
    assert not logic("it rains; Bo sleeps", "it rains; Bo sleeps; Al sleeps", {})


NAMES = st.lists(st.text("abcdefgh", min_size=2, max_size=6), min_size=1, max_size=6, unique=True).filter(
    lambda found: not {"and"} & set(found)
)


@settings(max_examples=100, deadline=None)
@given(NAMES, st.data())
def test_exactly_one_assignment_is_right(people: list[str], data: st.DataObject) -> None:
    def write(values: tuple[bool, ...], style: str) -> str:
        pairs = list(zip(people, values, strict=True))
        mixed = data.draw(st.permutations(pairs))
        if style == "is":
            return " and ".join(f"{n} is a {'knight' if v else 'knave'}" for n, v in mixed)
        return "; ".join(f"{n.upper()}={'true' if v else 'false'}" for n, v in mixed)

    gold = data.draw(st.tuples(*[st.booleans() for _ in people]))
    right = [
        values
        for values in itertools.product([True, False], repeat=len(people))
        if logic(write(gold, "is"), write(values, data.draw(st.sampled_from(["is", "="]))), {})
    ]
    assert right == [gold]


# --- logic: formulas ------------------------------------------------------------------------------

FORMULA: Meta = {"kind": "formula"}


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("p -> q", "not p or q", True),
        ("p -> q", "¬q → ¬p", True),
        ("p -> q", "q -> p", False),
        ("p \\land (q \\lor r)", "(p & q) | (p & r)", True),
        ("p <-> q", "(p -> q) and (q -> p)", True),
        ("p <-> q", "(p and q) or (not p and not q)", True),
        ("p -> q -> r", "p -> (q -> r)", True),
        ("p -> q -> r", "(p -> q) -> r", False),
        ("not p and q", "(not p) and q", True),
        ("p or q and r", "p or (q and r)", True),
        ("p", "p and (q or not q)", True),
        ("p or not p", "true", True),
        ("p and ~p", "⊥", True),
        ("P and Q", "Q AND P", True),
        ("p", "P", False),
        ("p", "q", False),
        ("p", "", False),
        ("p", "p q", False),
        ("p", "(p", False),
        ("p", "p)", False),
        ("p", "p or", False),
        ("p", "p = p", False),
        ("p", "p, q", False),
        ("p", "\\text{p}", False),
        ("p", "(" * 300 + "p" + ")" * 300, False),
        ("p", "not " * 300 + "p", False),
        ("p", " and ".join(f"x{i}" for i in range(MAX_NAMES + 1)), False),
    ],
)
def test_formulas(gold: str, answer: str, correct: bool) -> None:
    assert logic(gold, answer, FORMULA) is correct


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("A & B", "B & A", True),
        ("A ∧ B", "B and A", True),
        ("not A or B", "A -> B", True),
        ("~(A | B)", "~A & ~B", True),
        ("A & B", "A | B", False),
        ("A: knight, B: knave", "B is a knave and A is a knight", True),
        ("Alice -> red", "alice: red", True),
    ],
)
def test_a_gold_with_the_sign_of_a_formula_is_one(gold: str, answer: str, correct: bool) -> None:
    assert VERIFIERS["logic"](gold, answer, {}) == correct


def test_a_formula_that_was_to_be_simplified_may_not_be_repeated() -> None:
    question, gold = "(p and q) or (p and not q)", "p"
    assert logic(gold, question, FORMULA)
    assert not logic(gold, question, {**FORMULA, "max_signs": 1})
    assert logic(gold, "(p)", {**FORMULA, "max_signs": 1})


@st.composite
def formulas(draw: st.DrawFn, depth: int = 4) -> str:
    kind = draw(st.sampled_from(["name", "not", "and", "or", "->", "<->"])) if depth else "name"
    if kind == "name":
        return draw(st.sampled_from(["a", "b", "c", "d", "true", "false"]))
    if kind == "not":
        return f"not ({draw(formulas(depth=depth - 1))})"
    return f"({draw(formulas(depth=depth - 1))}) {kind} ({draw(formulas(depth=depth - 1))})"


def by_python(text: str, row: int) -> bool:
    """Our own text, so that Python may evaluate it: implication as ≤, equivalence as == on bools."""
    values = {name: bool(row >> i & 1) for i, name in enumerate("abcd")}
    code = text.replace("<->", "==").replace("->", "<=").replace("not", "1-").replace("and", "&")
    code = code.replace("or", "|").replace("true", "1").replace("false", "0")
    return bool(eval(code, {}, {name: int(value) for name, value in values.items()}))


@settings(max_examples=150, deadline=None)
@given(formulas(), formulas())
def test_truth_tables_against_python(a: str, b: str) -> None:
    rows = {text: table(tokens(text), ["$a", "$b", "$c", "$d"]) for text in (a, b)}
    for text, found in rows.items():
        assert [found >> row & 1 for row in range(16)] == [by_python(text, row) for row in range(16)]
    assert logic(a, b, FORMULA) is (rows[a] == rows[b])


def test_the_largest_formula_is_cheap() -> None:
    variables = [f"x{i}" for i in range(MAX_NAMES)]
    text = " <-> ".join((variables * 20)[:190])
    started = time.perf_counter()
    assert logic(text, text, FORMULA)
    assert time.perf_counter() - started < 0.2
    with pytest.raises(RefusedError):
        table(tokens("y"), [*variables, "y"])
    assert names(tokens("p and not q")) == {"$p", "$q"}


@pytest.mark.parametrize(
    ("gold", "meta"),
    [
        ("", {}),
        ("A: knight, A: knave", {}),
        ("A:", {"kind": "formula"}),
        ("p and", FORMULA),
        ("p", {"kind": "poem"}),
        ("p", {**FORMULA, "max_signs": 0}),
        ("p", {**FORMULA, "max_signs": True}),
        (" and ".join(f"x{i}" for i in range(MAX_NAMES + 1)), FORMULA),
    ],
)
def test_unusable_logic_golds_are_errors(gold: str, meta: Meta) -> None:
    with pytest.raises(ValueError, match=r"."):
        logic(gold, "A: knight", meta)


# --- regex ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "answer", "meta", "correct"),
    [
        (r"\d{4}-\d{2}", "2024-01", {}, True),
        (r"\d{4}-\d{2}", "on 2024-01", {}, False),
        (r"\d{4}-\d{2}", "2024-01\n", {}, False),
        (r"a|b", "a", {}, True),
        (r"a|b", "ab", {}, False),
        (r"paris", "Paris", {}, False),
        (r"paris", "Paris", {"ignore_case": True}, True),
    ],
)
def test_regex(pattern: str, answer: str, meta: Meta, correct: bool) -> None:
    assert regex(pattern, answer, meta) is correct


@pytest.mark.parametrize("pattern", ["(", "", ".*", "a?", "[", "x" * 3000, "(?P<a>x)(?P<a>y)"])
def test_patterns_that_ask_for_nothing_or_are_broken(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        regex(pattern, "a", {})


def test_a_pattern_without_end_costs_one_verdict() -> None:
    limit = 0.5
    item = GradeItem("regex", "(a+)+b", f"<answer> {'a' * 60} </answer>")
    fine = GradeItem("regex", "(a+)+b", "<answer> aaab </answer>")
    with pytest.raises(ValueError, match="GraderPool"):
        grade(fine)
    with GraderPool(workers=1, timeout_s=limit) as pool:
        assert pool.gather(pool.submit([fine]))[0].correct
        started = time.monotonic()
        (hung,) = pool.gather(pool.submit([item]))
        assert time.monotonic() - started < limit + 0.5
        (after,) = pool.gather(pool.submit([fine]))
    assert hung.error == f"timeout after {limit} s"
    assert after.correct
