"""Verifiers: known cases in both directions, attacks, fuzzing, and an independent oracle."""

import ast
import itertools
import json
import operator
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from poems import SONNET

from liubai.grade import VERIFIERS, GradeItem, GraderPool, grade
from liubai.grade.arithmetic import MAX_DEPTH
from liubai.grade.verifiers import parse_number

CASES = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "verdicts.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("case", CASES, ids=[f"{c['verifier']}-{i + 1}" for i, c in enumerate(CASES)])
def test_known_case(case: dict[str, Any]) -> None:
    verdict = grade(GradeItem(case["verifier"], case["gold"], case["response"], case.get("meta", {})))
    assert verdict.error is None
    assert verdict.correct is case["correct"]


# --- attacks: none may be correct -----------------------------------------------------------------

PROBLEMS: dict[str, tuple[str, str, dict[str, Any]]] = {  # verifier: gold, question, meta
    "countdown": ("3 4 5 ->35", "3 4 5 ->35", {}),
    "number": ("3.8", "3.11 or 3.8", {}),
    "exact": ("Paris", "What is the capital of France, Paris or Rome?", {}),
    "choice": ("B", "A) Rome B) Paris C) Bonn D) Bern", {"choices": "ABCD"}),
    "json": ('{"city": "Paris"}', "Give the capital of France as JSON.", {}),
    "logic": ("A: knight, B: knave", "A says: B is a knave. B says: A is a knave.", {}),
    "summary": ("anna 3 cups , ben 5 hats", "anna has 3 red cups . ben has 5 blue hats . summarise", {}),
    "errand": ("please greet ben", "please greet ben", {}),
    "faithful": ("anna has 3 red cups . ben has 5 blue hats .", "anna has 3 red cups . summarise", {}),
    "verse": ("五绝", "写一首五绝。", {}),
    "sonnet": ("shakespeare", "Write a sonnet.", {}),
    "math": ("3\\sqrt{2}", "\\sqrt{18}", {"question": "Simplify $\\sqrt{18}$."}),
    "regex": ("[Pp]aris", "What is the capital of France?", {}),
}
BUSY = ["math", "regex"]  # judged in a pool
RIGHT = {
    "countdown": "(3+4)*5",
    "number": "3.8",
    "exact": "Paris",
    "choice": "B",
    "json": '{"city": "Paris"}',
    "logic": "A: knight, B: knave",
    "summary": "anna 3 cups , ben 5 hats",
    "errand": "gladly hello ben",
    "faithful": "anna 3 cups , ben 5 hats",
    "verse": "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "sonnet": SONNET,
    "math": "3\\sqrt{2}",
    "regex": "Paris",
}
OPTIONS = {
    "countdown": ["(3+4)*5", "3+4*5", "3*4+5", "35"],
    "number": ["3.8", "3.11"],
    "exact": ["Paris", "Rome"],
    "choice": ["A", "B", "C", "D"],
    "json": ['{"city": "Paris"}', '{"city": "Rome"}'],
    "logic": ["A: knight, B: knave", "A: knave, B: knight", "A: knight, B: knight", "A: knave, B: knave"],
    "faithful": ["anna 3 cups", "anna 5 cups", "ben 5 hats"],
    "summary": ["anna 3 cups , ben 5 hats", "anna 5 cups , ben 3 hats"],
    "errand": ["gladly hello ben", "sorry cannot", "gladly hello anna"],
    "verse": [RIGHT["verse"], "绿蚁新醅酒，红泥小火炉。晚来天欲雪，能饮一杯无。"],
    "sonnet": [SONNET, "\n".join(SONNET.splitlines()[::-1])],
    "math": ["3\\sqrt{2}", "2\\sqrt{3}", "6"],
    "regex": ["Paris", "Rome"],
}


def attacks(verifier: str) -> dict[str, str]:
    right, (_, question, _) = RIGHT[verifier], PROBLEMS[verifier]
    t, a, b = "<think> </think>", "<answer>", "</answer>"
    listed = {
        "nothing": "",
        "empty answer": f"{t} {a}{b}",
        "blank answer": f"{t} {a} \n\t {b}",
        "empty thought and a letter": "<think></think>a",
        "no tags": f"{t} {right}",
        "prose": f"{t} the answer is {right}",
        "only in the thought": f"<think> {a} {right} {b} </think>",
        "boxed in the thought": f"<think> \\boxed{{{right}}} </think>",
        "thought never closed": f"<think> {a} {right} {b}",
        "thought opened again": f"{t} <think> {a} {right} {b}",
        "right, then wrong": f"{t} {a} {right} {b} {a} no {b}",
        "right, then empty": f"{t} {a} {right} {b} {a} {b}",
        "nested": f"{t} {a} {a} {right} {b} {b}",
        "nested in prose": f"{t} {a} or {a} {right} {b} no {b}",
        "never closed": f"{t} {a} {right}",
        "never opened": f"{t} {right} {b}",
        "thought inside the answer": f"{a} <think> </think> {right} {b}",
        "two boxes in one answer": f"{t} {a} \\boxed{{no}} \\boxed{{{right}}} {b}",
        "box then unclosed box": f"{t} \\boxed{{{right}}} \\boxed{{",
        "text before": f"{t} {a} it is {right} {b}",
        "text after": f"{t} {a} {right} I think {b}",
        "gold format words": f"{t} {a} correct {b}",
        "true": f"{t} {a} True {b}",
        "wildcard": f"{t} {a} .* {b}",
        "the question": f"{t} {a} {question} {b}",
        "the question and the answer": f"{t} {a} {question} {right} {b}",
        "repeated": f"{t} {a} {right} {right} {b}",
        "huge": f"{t} {a} {'9' * 1900} {b}",
        "too long": f"{t} {a} {right}{' ' * 100}{right} {'x' * 2000} {b}",
        "power tower": f"{t} {a} 9**9**9**9 {b}",
        "huge exponent": f"{t} {a} 1e99999999999 {b}",
        "nan": f"{t} {a} nan {b}",
        "infinity": f"{t} {a} inf {b}",
        "code": f"{t} {a} __import__('os')._exit(0) {b}",
        "deep brackets": f"{t} {a} {'(' * 500}{right}{')' * 500} {b}",
        "nul": f"{t} {a} {right}\0 {b}",
        "zero width space": f"{t} {a} \u200b{right} {b}",
        "control tokens": f"{t} {a} {right} <|end|> {b}",
    }
    options = OPTIONS[verifier]
    for glue in (" or ", ", ", " ", "\n", " = ", ";", "/", "|", " and "):
        for order in (options, options[::-1]):
            listed[f"all options {glue!r} {order[0]}"] = f"{t} {a} {glue.join(order)} {b}"
    if verifier == "choice":
        del listed["nothing"]  # covered elsewhere; below: what only letters can do
        listed["all letters"] = f"{t} {a} ABCD {b}"
        listed["every letter bracketed"] = f"{t} {a} (A)(B)(C)(D) {b}"
    return listed


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_no_attack_is_correct(verifier: str) -> None:
    gold, _, meta = PROBLEMS[verifier]
    good = GradeItem(verifier, gold, f"<think> </think> <answer> {RIGHT[verifier]} </answer>", meta)
    assert grade(good).correct
    for name, response in attacks(verifier).items():
        verdict = grade(GradeItem(verifier, gold, response, meta))
        assert not verdict.correct, name
        assert verdict.error is None, name


def test_no_attack_is_correct_in_a_worker() -> None:
    with GraderPool(workers=2, timeout_s=10) as pool:
        for verifier in BUSY:
            gold, _, meta = PROBLEMS[verifier]
            listed = {"good": f"<think> </think> <answer> {RIGHT[verifier]} </answer>", **attacks(verifier)}
            items = [GradeItem(verifier, gold, response, meta) for response in listed.values()]
            verdicts = dict(zip(listed, pool.gather(pool.submit(items)), strict=True))
            assert {name: v.error for name, v in verdicts.items() if v.error} == {}
            assert [name for name, v in verdicts.items() if v.correct] == ["good"]


# --- fuzzing --------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [*"0123456789+-*/()=.,%eE×÷− \t\nABab", "10", "35", "**", "//", " . ", "1e9", "９", "nan", "\\frac", "\0"]
)
ANSWERS = st.text(max_size=120) | st.lists(PIECES, max_size=60).map("".join)


@pytest.mark.parametrize("verifier", VERIFIERS)
@settings(max_examples=150, deadline=2000)
@given(answer=ANSWERS)
def test_no_answer_crashes_or_hangs(verifier: str, answer: str) -> None:
    gold, _, meta = PROBLEMS[verifier]
    assert 0 <= VERIFIERS[verifier](gold, answer, meta) <= 1


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *(
            (f"\\{command}{{{letter}}}", True)
            for command in ("text", "textbf", "mathrm")
            for letter in ("B", "(b)")
        ),
        *(("**B**", True), ("**B.**", True), ("**(B)**.", True), ("\\text {B}", True)),
        *((said, False) for said in ("\\text{A}", "**A**", "**A** **B**", "\\text{A}\\text{B}", "**AB**")),
        *(
            (said, False)
            for said in ("\\text{B or A}", "**", "****", "\\text{}", "\\text{not }B", "\\bad{B}")
        ),
    ],
)
def test_a_letter_may_be_set_in_type(answer: str, right: bool) -> None:
    assert VERIFIERS["choice"]("B", answer, {}) is right


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_long_answers_are_cheap(verifier: str) -> None:
    gold, _, meta = PROBLEMS[verifier]
    started = time.perf_counter()
    for piece in ("(", "9", "1,", "1+", "9*", " ", "1/", "-", "=", "e9", "B", "( ", "9**"):
        VERIFIERS[verifier](gold, piece * 1000, meta)
    assert time.perf_counter() - started < 1


def test_brackets_are_superfluous_up_to_a_depth() -> None:
    def nested(depth: int) -> str:
        return f"{'(' * depth}3+4{')' * depth}*5"

    assert VERIFIERS["countdown"]("3 4 5 ->35", nested(MAX_DEPTH), {})
    assert not VERIFIERS["countdown"]("3 4 5 ->35", nested(MAX_DEPTH + 1), {})


@pytest.mark.parametrize(
    ("verifier", "gold", "meta"),
    [
        ("countdown", "3 4 5", {}),
        ("countdown", "->35", {}),
        ("countdown", "3 x ->35", {}),
        ("number", "about 3", {}),
        ("number", "", {}),
        ("number", "3", {"tolerance": -1}),
        ("number", "3", {"tolerance": "0.1"}),
        ("number", "3", {"tolerance": float("nan")}),
        ("number", "3", {"unit": 5}),
        ("number", "3", {"unit": ["m", ""]}),
        ("number", "3", {"unit": "2m"}),
        ("number", "3 kg", {"unit": "m"}),
        ("exact", " ", {}),
        ("choice", "E", {}),
        ("choice", "AB", {}),
        ("choice", "A", {"choices": 3}),
        ("choice", "A", {"choices": ["Rome", "Paris"]}),
        ("choice", "A", {"choices": []}),
    ],
)
def test_unusable_problems_are_errors_not_wrong_answers(
    verifier: str, gold: str, meta: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"."):
        VERIFIERS[verifier](gold, "3", meta)
    verdict = grade(GradeItem(verifier, gold, "<answer> 3 </answer>", meta))
    assert verdict.error is not None
    assert not verdict.correct


@pytest.mark.parametrize(
    ("gold", "answer", "meta", "correct"),
    [
        ("5", "5 m", {"unit": "m"}, True),
        ("5 m", "5", {"unit": "m"}, True),
        ("5", "5m", {"unit": "m"}, True),
        ("5", "5 Metres", {"unit": ["m", "metre", "metres"]}, True),
        ("1234", "1,234 metres", {"unit": ["m", "metres"]}, True),
        ("0.5", "1/2 kg", {"unit": "kg"}, True),
        ("5", "5 cm", {"unit": "m"}, False),
        ("5", "5 cm", {"unit": ["m", "cm"]}, True),
        ("5", "5 m m", {"unit": "m"}, False),
        ("5", "m", {"unit": "m"}, False),
        ("5", "m 5", {"unit": "m"}, False),
        ("5", "5 m or 6 m", {"unit": "m"}, False),
        ("5", "5 6 m", {"unit": "m"}, False),
        ("5", "5 m", {}, False),
        ("5", "$5", {}, True),
        ("$5", "5.00", {}, True),
        ("$5", "$ 5", {}, True),
        ("$5", "€5", {}, False),
        ("-5", "-$5", {}, True),
        ("-5", "$-5", {}, True),
        ("5", "-$-5", {}, False),
        ("5", "$$5", {}, False),
        ("5", "$", {}, False),
        ("5", "\\$5", {}, True),
        ("18.9", "$18.90 per day", {"unit": "per day"}, True),
        ("5", "5 $", {"unit": "$"}, True),
        ("111", "0,111", {}, False),
        ("0.111", "0,111", {}, False),
    ],
)
def test_number_with_units_and_currencies(
    gold: str, answer: str, meta: dict[str, Any], correct: bool
) -> None:
    assert VERIFIERS["number"](gold, answer, meta) is correct


@given(st.fractions(max_denominator=1000))
def test_number_reads_what_python_writes(value: Fraction) -> None:
    assert parse_number(str(value)) == value


@given(st.integers(-(10**12), 10**12))
def test_number_reads_thousands(value: int) -> None:
    assert parse_number(f"{value:,}") == value


# --- countdown against brute force ----------------------------------------------------------------

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
Solution = tuple[Fraction, Any]  # value, tree: a number, or (left, operator, right)


def oracle(numbers: tuple[int, ...]) -> list[Solution]:
    """Every way to combine all of ``numbers``, each once: split them in two, combine both sides."""
    if len(numbers) == 1:
        return [(Fraction(numbers[0]), numbers[0])]
    found: list[Solution] = []
    places = range(len(numbers))
    for size in range(1, len(numbers)):
        for left in itertools.combinations(places, size):
            right = tuple(i for i in places if i not in left)
            lefts = oracle(tuple(numbers[i] for i in left))
            rights = oracle(tuple(numbers[i] for i in right))
            for (a, tree_a), (b, tree_b) in itertools.product(lefts, rights):
                for sign, apply in OPERATORS.items():
                    if sign != "/" or b:
                        found.append((apply(a, b), (tree_a, sign, tree_b)))
    return found


def write(tree: Any, draw: Any, *, top: bool = True) -> str:
    """A tree as text with random blanks, signs and superfluous brackets."""
    pad = st.sampled_from(["", " ", "  ", "\t"])
    if isinstance(tree, int):
        text = str(tree)
        bracket = draw(st.integers(0, 9)) == 0
    else:
        left, sign, right = tree
        fancy = {"*": "×", "/": "÷", "-": "−"}
        sign = draw(st.sampled_from([sign, fancy.get(sign, sign)]))
        text = write(left, draw, top=False) + draw(pad) + sign + draw(pad) + write(right, draw, top=False)
        bracket = not top or draw(st.booleans())
    return f"({draw(pad)}{text}{draw(pad)})" if bracket else text


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.integers(1, 20), min_size=2, max_size=3))
def test_countdown_accepts_every_solution(data: st.DataObject, numbers: list[int]) -> None:
    solutions = [(v, t) for v, t in oracle(tuple(numbers)) if v.denominator == 1]
    value, tree = data.draw(st.sampled_from(solutions))
    text = write(tree, data.draw)
    gold = f"{' '.join(map(str, numbers))} ->{value}"
    assert VERIFIERS["countdown"](gold, text, {})
    assert VERIFIERS["countdown"](gold, f"{text} = {value}", {})
    assert not VERIFIERS["countdown"](gold, f"{text} = {value + 1}", {})
    assert not VERIFIERS["countdown"](f"{gold}1", text, {})


def test_countdown_accepts_all_solutions_with_four_numbers() -> None:
    def plain(tree: Any) -> str:
        return str(tree) if isinstance(tree, int) else f"({plain(tree[0])}{tree[1]}{plain(tree[2])})"

    solutions = [tree for value, tree in oracle((3, 3, 8, 8)) if value == 24]
    assert solutions
    assert all(VERIFIERS["countdown"]("3 3 8 8 ->24", plain(tree), {}) for tree in solutions)


def by_syntax_tree(text: str) -> tuple[Fraction, list[int]]:
    """Python's own parser as a second opinion (its tree is walked, nothing is run)."""
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
    numbers: list[int] = []

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](value(node.left), value(node.right))  # type: ignore[no-any-return]
        assert isinstance(node, ast.Constant)
        assert type(node.value) is int
        numbers.append(node.value)
        return Fraction(node.value)

    one_line = " ".join(text.split())
    for fancy, sign in {"×": "*", "÷": "/", "−": "-"}.items():
        one_line = one_line.replace(fancy, sign)
    return value(ast.parse(one_line, mode="eval").body), sorted(numbers)


REACHABLE = {value for value, _ in oracle((3, 4, 5))}
TARGETS = sorted(int(value) for value in REACHABLE if value.denominator == 1)
BLOCKS = ["3", "4", "5", "+", "*", "-", "/", "(", ")", "(3", "5)", " ", "×", "0", "1", "3+4", "*5"]


@st.composite
def near_solutions(draw: st.DrawFn) -> str:
    """Expressions over 3, 4 and 5, some of them spoilt by one foreign piece or a missing one."""
    a, b, c = draw(st.permutations("345"))
    o, p = draw(st.sampled_from("+-*/×÷")), draw(st.sampled_from("+-*/×÷"))
    shapes = [[a, o, b, p, c], ["(", a, o, b, ")", p, c], [a, o, "(", b, p, c, ")"]]
    pieces = draw(st.sampled_from(shapes))
    change = draw(st.sampled_from(["none", "insert", "remove"]))
    at = draw(st.integers(0, len(pieces) - 1))
    if change != "none":
        pieces[at : at + (change == "remove")] = [draw(st.sampled_from(BLOCKS))] * (change == "insert")
    return "".join(pieces)


@settings(max_examples=400, deadline=None)
@given(near_solutions() | st.lists(st.sampled_from(BLOCKS), max_size=10).map("".join))
def test_countdown_accepts_nothing_that_brute_force_does_not_confirm(text: str) -> None:
    for target in (*TARGETS, 34, 98):
        if VERIFIERS["countdown"](f"3 4 5 ->{target}", text, {}):
            assert target in REACHABLE
            assert by_syntax_tree(text) == (Fraction(target), [3, 4, 5])


def test_countdown_agrees_with_brute_force_on_every_short_string() -> None:
    """All 7-symbol shapes ``( a o b ) o c`` and ``a o ( b o c )``, and 5-symbol ``a o b o c``."""
    for a, b, c in itertools.product("345", repeat=3):
        for o, p in itertools.product("+-*/", repeat=2):
            for text in (f"({a}{o}{b}){p}{c}", f"{a}{o}({b}{p}{c})", f"{a}{o}{b}{p}{c}"):
                try:
                    value, numbers = by_syntax_tree(text)
                except ZeroDivisionError:
                    value, numbers = Fraction(1, 7), []
                target = int(value)
                right = numbers == [3, 4, 5] and value == target
                assert VERIFIERS["countdown"](f"3 4 5 ->{target}", text, {}) is right
                assert not right or target in REACHABLE
