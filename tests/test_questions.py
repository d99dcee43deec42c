"""The user's files: what is read, what is refused with its line, and which questions never meet."""

from __future__ import annotations

import csv
import datetime
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.measure.soundness import soundness
from liubai.problems import rows
from liubai.problems.questions import (
    Questions,
    digests,
    read_questions,
    splits,
)
from liubai.problems.rows import read_rows
from liubai.problems.source import Bank, Families, source_of
from liubai.problems.words import grams, near_duplicates, share_of, words

ROWS = [{"question": f"What is {a} plus {a + 3}?", "answer": str(2 * a + 3)} for a in range(60)]


def jsonl(path: Path, listed: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed), encoding="utf-8")
    return str(path)


def config(path: str, **changes: Any) -> Questions:
    return Questions(path=path, **changes)


# ---- reading ----


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    listed = [*ROWS, {"question": 'Zwei Zeilen,\n"Anführung"; 等等', "answer": "七"}]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(listed)
    parquet.write_table(pa.Table.from_pylist(listed), tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", listed)
    found = [
        [row for _, row in read_rows(str(tmp_path / f"a.{kind}"))] for kind in ("jsonl", "csv", "parquet")
    ]
    assert found == [listed] * 3
    assert [line for line, _ in read_rows(str(tmp_path / "a.csv"))] == list(range(2, 63))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "1"}\n{"question"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: must be a JSON object"),
        ("a.jsonl", b'\n\n{"a": "\xe9t\xe9"}\n', r"a\.jsonl:3: not UTF-8 text"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.csv", b"question,answer\n1,2\n3\n", r"a\.csv:3: 1 cells, but 2 columns"),
        ("a.csv", b"question,question\n1,2\n", r"a\.csv:1: the column 'question' is there twice"),
        ("a.csv", b'question,answer\n"a\nb",2\n"open,3\n', r"a\.csv:4: not CSV"),
        ("a.parquet", b"PAR1 but not really", "is not a whole Parquet file"),
        ("a.jsonl", '{"question": "x"}\n'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 text"),
        ("a.txt", b"hello", "questions are read from .jsonl"),
        ("a.csv", b"question;answer\nx;y\n", r"a\.csv:1: cells are separated by commas, not by ';'"),
        ("a.csv", b"question\tanswer\nx\ty\n", r"a\.csv:1: cells are separated by commas, not by tabs"),
        ("b.jsonl", b'{"question": "x"}\n{"question"\n', r"b\.jsonl:2: not JSON \([^()]*, column 12\)$"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / name)))
    with pytest.raises(UserError, match="there is no file"):
        list(read_rows(str(tmp_path / "none.jsonl")))


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    os.mkfifo(tmp_path / "b.csv")  # nobody writes into it: who opened it would wait for ever
    for name in ("a.jsonl", "b.csv"):
        with pytest.raises(UserError, match=f"'.*{name}' is not a file"):
            list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a\0b", "answer": "1"}, "'question' has a character that is no text"),
        ({"question": "a\ud800", "answer": "1"}, "'question' has a character that is no text"),
        ({"question": ["a"], "answer": "1"}, r"'question' must be text or a number, not \[\"a\"\]"),
        ({"question": "a", "answer": float("nan")}, "'answer' must be text or a number, not nan"),
        ({"question": "a", "answer": None}, "'answer' must be text or a number, not null"),
        ({"question": "a", "answer": [float("inf")]}, "'answer' is not JSON"),
        ({"question": " ", "answer": "1"}, "'question' is empty"),
    ],
)
def test_a_row_that_holds_no_text(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}"):
        read_questions(config(str(path)))


def test_bytes_and_dates_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"question": [b"Who is it?"], "answer": ["1"]}), path)
    assert read_questions(config(str(path)))[0].problem.prompt == "Who is it?"
    for value, kind in ((b"\xff", "bytes"), (datetime.date(2020, 1, 1), "date")):
        parquet.write_table(pa.table({"question": ["Who?"], "answer": [value]}), path)
        with pytest.raises(
            UserError, match=rf"a\.parquet:1: 'answer' must be text or a number, not \"{kind}\""
        ):
            read_questions(config(str(path)))


def test_options_that_a_row_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,tolerance,unit\nHow far?,1,0.01,km\nHow long?,2,,\n")
    found = read_questions(config(str(tmp_path / "a.csv"), meta=("tolerance", "unit")))
    assert [q.problem.meta for q in found] == [{"tolerance": 0.01, "unit": "km"}, {}]


def test_a_duplicate_with_another_answer_says_so(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], ROWS[0], ROWS[0] | {"answer": "0"}])
    why = [q.left_out for q in read_questions(config(path))]
    assert why == ["", "nearly the same as line 1", "nearly the same as line 1, with another answer"]
    found = soundness(read_questions(config(path)))
    assert [(f.line, f.kind, f.fatal) for f in found.findings if f.line] == [
        (2, "duplicate", False),
        (3, "contradiction", True),
    ]


def test_a_line_without_end_is_never_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE", 1 << 20)
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"question": "fine"}\n')
        file.seek(2 << 30)  # a hole: two gigabytes that cost no disk
        file.write(b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line is longer than 1 MB"):
        list(read_rows(str(path)))


def test_a_data_set_of_the_hub_without_the_package_or_a_network() -> None:
    with pytest.raises(UserError, match=r"pip install 'liubai\[data\]'|the hub gave no data set"):
        list(read_rows("hf:org/name"))


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:org/name:test", ("org/name", None, "test")),
        ("hf:org/name@main", ("org/name", "main", "train")),
        ("hf:org/name@main:test[:9]", ("org/name", "main", "test[:9]")),
    ],
)
def test_what_the_hub_is_asked_for(name: str, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repository: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        assert (repository, configuration, split) == asked
        return ROWS[:2]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(read_rows(name)) == [(1, ROWS[0]), (2, ROWS[1])]


# ---- rows to problems ----


def test_columns_verifiers_and_what_precedes_the_answer(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        [
            {"q": "一共有多少个苹果?", "a": "2 + 3 = 5 #### 0\n#### 5", "v": "number", "tol": 0.1},
            {"q": "How many?", "a": "x #### 7", "tol": 0},
        ],
    )
    first, second = read_questions(
        config(
            path,
            question="q",
            answer="a",
            verifier="v",
            meta=("tol",),
            answer_after="####",
            instruction="Box it.",
        )
    )
    assert (first.line, first.problem.gold, first.problem.verifier, first.problem.language) == (
        1,
        "5",
        "number",
        "zh",
    )
    assert first.problem.meta == {"tol": 0.1}
    assert first.problem.prompt == "Box it.\n一共有多少个苹果?"
    assert (second.problem.verifier, second.problem.language) == ("math", "en")


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (
            {"questions": "1", "answer": "2"},
            {},
            r":2: there is no column 'question'; there are: questions, answer\. A recipe says",
        ),
        ({"question": "1"}, {}, ":2: there is no column 'answer'"),
        ({"question": "  ", "answer": "2"}, {}, ":2: 'question' is empty"),
        ({"question": "1", "answer": ""}, {}, ":2: 'answer' is empty"),
        ({"question": "1", "answer": None}, {}, ":2: 'answer' must be text or a number, not null"),
        ({"question": "1", "answer": True}, {}, ":2: 'answer' must be text or a number, not true"),
        ({"question": "1", "answer": "5"}, {"answer_after": "####"}, ":2: 'answer' has no '####'"),
        ({"question": "1", "answer": "5"}, {"meta": ("unit",)}, ":2: there is no column 'unit'"),
    ],
)
def test_a_row_that_is_no_question(
    row: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = {"question": "What is one?", "answer": "#### 1", "unit": "m"}
    with pytest.raises(UserError, match=message):
        read_questions(config(jsonl(tmp_path / "a.jsonl", [good, row]), **changes))


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no questions"):
        read_questions(config(jsonl(tmp_path / "a.jsonl", [])))


# ---- splits ----


def test_the_split_depends_on_the_words_alone(tmp_path: Path) -> None:
    found = read_questions(config(jsonl(tmp_path / "a.jsonl", ROWS)))
    held_out = {q.problem.prompt for q in found if q.held_out}
    assert 4 <= len(held_out) <= 24
    shuffled = random.Random(0).sample(
        [*ROWS, *({"question": f"New {i}", "answer": "1"} for i in range(9))], 69
    )
    for row in shuffled:
        row = dict(row)
        row["question"] = row["question"].upper().replace(" ", "  ")
    again = read_questions(config(jsonl(tmp_path / "b.jsonl", shuffled)))
    assert {q.problem.prompt for q in again if q.held_out and "New" not in q.problem.prompt} == held_out
    train, test = splits(found)
    assert not {p.prompt for p in train} & {p.prompt for p in test}


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80), st.sampled_from([str.upper, str.title, lambda t: f"  {t}!  "]))
def test_spelling_does_not_move_a_question(text: str, change: Any) -> None:
    if words(text) == words(change(text)):  # some letters have no way back from capitals
        assert share_of(text) == share_of(change(text))
    assert 0 <= share_of(text) < 1


LONG = "A train leaves the old station at noon and drives {} kilometres every hour through the quiet valley"


def test_near_duplicates_are_used_once_and_numbers_make_another_question(tmp_path: Path) -> None:
    listed = [
        LONG.format(80) + " until night.",
        LONG.format(80) + ", until dusk!",  # one word
        LONG.format(95) + " until night.",  # another number
        "Something else entirely, with no words in common whatsoever.",
    ]
    assert near_duplicates(listed) == [0, 0, 2, 3]
    found = read_questions(
        config(jsonl(tmp_path / "a.jsonl", [{"question": q, "answer": "1"} for q in listed]))
    )
    assert [q.left_out for q in found] == ["", "nearly the same as line 1", "", ""]
    assert found[0].held_out == found[1].held_out


def plain_duplicates(texts: Sequence[str]) -> list[set[int]]:
    """Every pair compared, groups by walking."""

    def runs(text: str) -> set[tuple[str, ...]]:
        listed = words(text)
        return {tuple(listed[i : i + 3]) for i in range(len(listed) - 2)} or {tuple(listed)}

    def alike(a: str, b: str) -> bool:
        same = [w for w in words(a) if w.isdigit()] == [w for w in words(b) if w.isdigit()]
        return same and 5 * len(runs(a) & runs(b)) >= 4 * len(runs(a) | runs(b))

    groups: list[set[int]] = []
    for i, text in enumerate(texts):
        friends = [g for g in groups if any(alike(text, texts[j]) for j in g)]
        groups = [g for g in groups if g not in friends] + [set.union({i}, *friends)]
    return groups


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_near_duplicates_equal_a_comparison_of_all_pairs(rng: random.Random) -> None:
    texts: list[str] = []
    for _ in range(12):
        if texts and rng.random() < 0.6:  # a change here or there
            listed = words(rng.choice(texts))
            for _ in range(rng.randrange(3)):
                at = rng.randrange(len(listed) + 1)
                # a word or operator is changed, or left out in the middle, or at the end
                listed[at : at + 1] = rng.choice(("a", "b", "1", "2", "+", "*", ""))
            listed = listed[: len(listed) - rng.randrange(3)] or ["a"]
        else:
            listed = [rng.choice("abcdefghij-^") for _ in range(rng.choice((1, 2, 8, 12, 30)))]
        texts.append(" ".join(listed) if words(" ".join(listed)) else "a")
    got: dict[int, set[int]] = {}
    for i, group in enumerate(near_duplicates(texts)):
        got.setdefault(group, set()).add(i)
    assert sorted(map(sorted, got.values())) == sorted(map(sorted, plain_duplicates(texts)))


def test_questions_of_an_evaluation_set_are_not_trained_on(tmp_path: Path) -> None:
    bench = jsonl(tmp_path / "bench.jsonl", [{"question": LONG.format(1) + " and sleeps.", "answer": "2"}])
    listed = [*ROWS, {"question": "Hear this: " + LONG.format(1) + ". Why?", "answer": "1"}]
    path = jsonl(tmp_path / "a.jsonl", listed)
    free = read_questions(config(path, eval_share=0.0))
    assert not free[-1].left_out
    kept = read_questions(config(path, eval_share=0.0, keep_out=(bench,)))
    assert kept[-1].left_out == f"shares ten words with {bench}"
    assert [q.left_out for q in kept[:-1]] == [""] * len(ROWS)


@pytest.mark.parametrize("column", ["q", "question", "problem", "prompt"])
def test_a_file_to_keep_out_may_have_another_column(column: str, tmp_path: Path) -> None:
    bench = jsonl(tmp_path / "bench.jsonl", [{"solution": "none", column: LONG.format(1) + " and sleeps."}])
    listed = [{"q": "Hear this: " + LONG.format(1) + ". Why?", "answer": "1"}, {"q": "What?", "answer": "2"}]
    asked = config(jsonl(tmp_path / "a.jsonl", listed), question="q", eval_share=0.0, keep_out=(bench,))
    assert [q.left_out for q in read_questions(asked)] == [f"shares ten words with {bench}", ""]


def test_a_file_to_keep_out_without_questions_is_named(tmp_path: Path) -> None:
    bench = jsonl(tmp_path / "bench.jsonl", [{"solution": "none", "id": 3}])
    asked = config(jsonl(tmp_path / "a.jsonl", ROWS), keep_out=(bench,))
    with pytest.raises(UserError, match=r"bench\.jsonl:1: .*'question', 'problem'.*there are: solution, id$"):
        read_questions(asked)


def test_ten_words_in_a_row() -> None:
    ten, nine = "a b c d e f g h i j", "a b c d e f g h i"
    assert grams(ten) & grams(f"x {ten} y")
    assert not grams(nine + " k") & grams(f"x {nine} y")
    assert grams("a b c") == grams("A, b: c!")  # a short question is compared whole
    assert not grams("a b")  # and a very short one not at all


@pytest.mark.parametrize("n", [5, 10, 15, 20, 40])
def test_exactly_four_fifths_in_common_is_enough(n: int) -> None:
    """The runs that only the longer text has are its rarest: it takes one more to find the shorter."""
    long = [f"w{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}" for i in range(n + 2)]
    short, shorter = long[: n * 4 // 5 + 2], long[: n * 4 // 5 + 1]
    assert near_duplicates([" ".join(long), " ".join(short)]) == [0, 0]
    assert near_duplicates([" ".join(short), " ".join(long)]) == [0, 0]
    assert near_duplicates([" ".join(long), " ".join(shorter)]) == [0, 1]


DIFFERENT = [
    ("What is 3 + 4?", "What is 3 - 4?", "What is 3 * 4?", "What is 3 ÷ 4?", "What is 3 × (4 + 0)?"),
    ("Solve x > 3", "Solve x < 3", "Solve x ≤ 3", "Solve x = 3"),
    ("Compute -5 + 3", "Compute 5 + 3"),
    ("What is A ∪ B?", "What is A ∩ B?"),
    ("What is 2³?", "What is 23?", "What is 3½?", "What is 31/2?", "What is 2.3?"),
    ("What is (2 + 3) * 4?", "What is 2 + (3 * 4)?"),
    ("What is 5!?", "What is 5?"),
    ("कि क्या है?", "का क्या है?"),  # marks are letters, too
    ("🍎 costs how much?", "🍐 costs how much?"),
    tuple(LONG.format(80) + f" and f(x) = {k}x, what is it?" for k in (2, 3)),
    tuple(LONG.format(80) + f" minus a, x {sign} 1, what is it?" for sign in "+-"),
]


@pytest.mark.parametrize("asked", DIFFERENT)
def test_operators_and_digits_make_another_question(asked: tuple[str, ...], tmp_path: Path) -> None:
    listed = [{"question": q, "answer": str(i)} for i, q in enumerate(asked)]
    found = read_questions(config(jsonl(tmp_path / "a.jsonl", listed)))
    assert [q.left_out for q in found] == [""] * len(asked)


def test_keeping_out_looks_at_operators(tmp_path: Path) -> None:
    bench = jsonl(tmp_path / "bench.jsonl", [{"question": "What is 17 * 23?"}, {"question": "5 / 4"}])
    asked = ["What is 17 + 23?", "what is $17 \\times 23 = $?", "5 - 4", "5 ÷ 4 = ?"]
    path = jsonl(tmp_path / "a.jsonl", [{"question": q, "answer": "1"} for q in asked])
    kept = read_questions(config(path, eval_share=0.0, keep_out=(bench,)))
    assert [bool(q.left_out) for q in kept] == [False, True, False, True]
    text = "Of all the numbers that were {} on the board today, x + 1 is how large? Say it."
    assert grams(text.format("written")) & grams("Hear this. " + text.format("written"))


SAME = [
    ("caf\u00e9 3 + 4", "cafe\u0301 3+4", "CAFÉ ３ ＋ ４ = ?", "c\u200baf\u00ade\u0301 $3+4$"),
    ("x^2 - y", "x² − y", "x**2 – y", "$x^{2}-y$", "x^2\\,-\\;y"),
    ("x <= 1/2", "x ≤ ½", "\\( x \\leq 1/2 \\)", "ｘ ＜＝ 1 ÷ 2"),
    ("\\frac{1}{2} (x)", "\\dfrac{1}{2} \\left( x \\right)", "\\tfrac{1} {2}\\quad(x)"),
    ("A well-known boy and/or girl has 1,000 apples", "a **well known** boy and or girl\nhas *1000* apples"),
    ("- Say it now", "Say it\tnow!", "> say it — now", "-----\nSay it now"),
    ("İstanbul ǰ", "i\u0307stanbul j\u030c"),
]


@pytest.mark.parametrize("spellings", SAME)
def test_the_same_in_other_signs(spellings: tuple[str, ...]) -> None:
    assert [words(text) for text in spellings] == [words(spellings[0])] * len(spellings)
    assert len({share_of(text) for text in spellings}) == 1


# ---- the instruction ----

TELL = "Think about it step by step and then " * 4 + "put the final answer in a box, please."


def test_an_instruction_makes_no_duplicates(tmp_path: Path) -> None:
    listed = [
        {"question": f"What is the capital of {land}?", "answer": town}
        for land, town in (("France", "x"), ("Spain", "x"), ("Italy", "x"), ("Peru", "x"))
    ]
    found = read_questions(config(jsonl(tmp_path / "a.jsonl", listed), instruction=TELL))
    assert [q.left_out for q in found] == [""] * 4
    assert all(q.problem.prompt.startswith(TELL) for q in found)


def test_an_instruction_moves_no_question(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    plain, told = config(path), config(path, instruction=TELL)
    assert [q.held_out for q in read_questions(plain)] == [q.held_out for q in read_questions(told)]
    asked = [[p.prompt.removeprefix(TELL + "\n") for p in Bank(c).held_out(3)] for c in (plain, told)]
    assert asked[0] == asked[1]


def test_an_instruction_hides_nothing_that_is_kept_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    bench = jsonl(tmp_path / "bench.jsonl", [ROWS[7]])
    for instruction in ("", TELL):
        kept = read_questions(config(path, eval_share=0.0, keep_out=(bench,), instruction=instruction))
        assert [q.line for q in kept if q.left_out] == [8]


# ---- groups ----


def test_near_duplicates_stay_together_in_any_order(tmp_path: Path) -> None:
    """Whichever comes first, and also where their answers differ and all of them are used."""
    ends = ["dusk", "dawn", "noon", "night", "lunch", "tea"]
    listed = [
        {"question": LONG.format(n) + f" until {end}.", "answer": end} for n in range(40) for end in ends
    ]
    sides = []
    for order in (listed, listed[::-1]):
        found = read_questions(config(jsonl(tmp_path / "a.jsonl", order), eval_share=0.8))
        assert not any(q.left_out for q in found)
        sides.append({q.text: q.held_out for q in found})
    assert sides[0] == sides[1]
    assert set(sides[0].values()) == {False, True}
    for n in range(40):
        assert len({sides[0][LONG.format(n) + f" until {end}."] for end in ends}) == 1
    # a row fewer holds out no less: what is added never holds out what was trained on
    fewer = read_questions(config(jsonl(tmp_path / "b.jsonl", listed[::2]), eval_share=0.8))
    assert all(q.held_out for q in fewer if sides[0][q.text])


def test_a_near_duplicate_of_what_is_kept_out_is_kept_out(tmp_path: Path) -> None:
    start, end = "One two three four five six seven eight nine", "b c d e f g h i j k l m n o p q r s t u v w"
    asked = [f"{start} {end} twice", f"{start} {end}"]
    bench = jsonl(tmp_path / "bench.jsonl", [{"question": "o p q r s t u v w twice"}])
    path = jsonl(tmp_path / "a.jsonl", [{"question": q, "answer": "1"} for q in reversed(asked)])
    kept = read_questions(config(path, eval_share=0.0, keep_out=(bench,)))
    assert [q.left_out for q in kept] == [f"shares ten words with {bench}", "nearly the same as line 1"]


def test_how_many_are_left_out_is_said_in_one_sentence(tmp_path: Path) -> None:
    assert Bank(config(jsonl(tmp_path / "a.jsonl", ROWS))).note == ""
    path = jsonl(tmp_path / "a.jsonl", [*ROWS, ROWS[0], ROWS[1], ROWS[2] | {"answer": "0"}])
    assert Bank(config(path)).note == (
        "3 of 63 questions are left out (2: nearly the same as another; 1: nearly the same as another, "
        "with another answer); `liubai check` names them"
    )


# ---- where stages ask ----


def test_a_bank_asks_every_question_once_an_epoch(tmp_path: Path) -> None:
    bank = source_of({}, config(jsonl(tmp_path / "a.jsonl", ROWS)))
    train, test = splits(read_questions(config(str(tmp_path / "a.jsonl"))))
    n = len(train)
    epochs = [[bank.train(5, e * n + i).prompt for i in range(n)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(p.prompt for p in train)
    assert epochs[0] != epochs[1]
    fresh = Bank(config(str(tmp_path / "a.jsonl")))
    assert [fresh.train(5, i).prompt for i in (2 * n + 3, 1, n)] == [epochs[2][3], epochs[0][1], epochs[1][0]]
    assert bank.train(6, 0) != bank.train(5, 0) or bank.train(6, 1) != bank.train(5, 1)
    held_out = bank.held_out(1000)
    assert sorted(p.prompt for p in held_out) == sorted(p.prompt for p in test)
    assert bank.held_out(2) == held_out[:2]
    assert bank.longest(len) == max(len(row["question"]) for row in ROWS)


def test_a_split_of_nothing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="holds out no question"):
        Bank(config(path, eval_share=0.0)).held_out(1)
    with pytest.raises(UserError, match="leaves nothing to train on"):
        Bank(config(path, eval_share=1.0)).train(0, 0)


def test_families_are_mixed_by_their_shares() -> None:
    source = Families({"countdown": 3.0, "compare": 1.0})
    asked = [source.train(0, i).family for i in range(200)]
    assert 120 < asked.count("countdown") < 180
    assert [source.train(0, i) for i in range(5)] == [source.train(0, i) for i in range(5)]
    assert {p.family for p in source.held_out(8)} == {"countdown", "compare"}


def test_a_changed_file_is_another_stage(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    before = digests(config(path))
    assert digests(config(path)) == before
    jsonl(tmp_path / "a.jsonl", [*ROWS[:-1], {**ROWS[-1], "answer": "0"}])
    assert digests(config(path)) != before
