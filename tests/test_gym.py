"""reasoning-gym's data sets as families: every one of them, its options, its scorer, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra: pip install 'liubai[gym]'")

from liubai.errors import UserError
from liubai.grade import GradeItem, GraderPool, Verdict
from liubai.grade.gym import guarded_eval
from liubai.measure.soundness import drawn, soundness
from liubai.problems import family, problem_at
from liubai.problems.family import split_of
from liubai.problems.gym import maker
from liubai.problems.gym_maker import packed, registry, unpacked
from liubai.stages.evaluate import Config as EvalConfig
from liubai.stages.pretrain import Config as PretrainConfig
from liubai.types import Problem

NAMES = sorted(registry())

#: slow with their usual options: a second an entry, of which an eval problem needs five on average
SMALLER = {
    "knight_swap": "impossible_ratio=0.9",
    "futoshiki": "min_board_size=4, max_board_size=4",
    "sudoku": "min_empty=30, max_empty=32",
}
#: They have many right answers and give none, not even as an example: no gold to prove the scorer with.
UNPROVEN = {"boxnet", "rush_hour"}


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    maker.stop()  # the sandbox's tests count this process's children


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(workers=1, timeout_s=20.0) as pool:
        yield pool


def judged(pool: GraderPool, problem: Problem, *answers: str) -> list[Verdict]:
    meta = json.loads(json.dumps(problem.meta))  # as a file or a pipe would hand it on
    items = [GradeItem("gym", problem.gold, f"<think> </think> <answer>{a}</answer>", meta) for a in answers]
    return pool.gather(pool.submit(items))


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set(name: str, pool: GraderPool) -> None:
    kind = family(f"gym:{name}:{SMALLER[name]}" if name in SMALLER else f"gym:{name}")
    for split in ("train", "eval"):
        for index in range(2):
            problem = problem_at(kind, split, 0, index)
            assert problem.prompt.strip()
            assert split_of(f"gym:{name}/{kind.key(problem)}") == split
            gold, *wrong = judged(pool, problem, problem.gold, "", "a banana", problem.prompt[:2000])
            assert (problem.gold == "") == (name in UNPROVEN)
            assert gold.error is None
            assert gold.correct == (name not in UNPROVEN)
            for verdict in wrong:
                assert verdict.error is None
                assert not verdict.correct


def test_the_same_problems_in_every_process(tmp_path: Path) -> None:
    """Some data sets go through sets of strings, whose order changes with Python's hash seed."""
    script = (
        "from liubai.problems import family, problem_at\n"
        "for name in ('polynomial_multiplication', 'isomorphic_strings', 'ransom_note'):\n"
        "    p = problem_at(family('gym:' + name), 'train', 3, 4)\n"
        "    print(p.prompt, p.gold, p.meta)\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
    assert said[0].count("\n") >= 3


def test_options_are_those_of_the_data_set() -> None:
    few = family("gym:countdown:min_numbers=3, max_numbers=3, operators=['+']")
    problem = problem_at(few, "train", 0, 0)
    entry = unpacked(problem.meta["entry"])
    assert len(entry["metadata"]["numbers"]) == 3
    assert not set("-*/") & set(problem.gold)
    assert problem.family == few.name == "gym:countdown"  # split alike with all options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym:countdwn", "no data set 'countdwn'; did you mean 'countdown'"),
        ("gym:countdown:max_nubmers=3", "no option 'max_nubmers'; did you mean 'max_numbers'"),
        ("gym:countdown:size=3", "no option 'size'"),
        ("gym:countdown:max_numbers", "written key=value"),
        ("gym:countdown:a=1}\nb={c=2", "written key=value"),
        ("gym:countdown:max_numbers=1", "refuses its options: max_numbers must be >= min_numbers"),
        ("gym:countdown:max_numbers='x'", "refuses its options"),
        ("gym:composite", "name them one by one"),
    ],
)
def test_a_wrong_name_or_option_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        family(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        EvalConfig(problems=name)


def test_nobody_is_pretrained_on_them() -> None:
    with pytest.raises(ValueError, match="nobody wrote text about 'gym:gcd'"):
        PretrainConfig(steps=1, families={"gym:gcd": 1.0})
    assert EvalConfig(problems="gym:gcd").outside()["reasoning-gym"]  # another version, another stage


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'liubai\[gym\]'"):
        family("gym:lcm:max_value=77")
    with GraderPool() as pool, pytest.raises(UserError, match=r"pip install 'liubai\[gym\]'"):
        pool.submit([GradeItem("gym", "1", "1")])


def test_partial_scores_are_kept(pool: GraderPool) -> None:
    problem = problem_at(family("gym:spell_backward"), "train", 0, 0)
    (partly,) = judged(pool, problem, f"{problem.gold} zzz")
    assert 0 < partly.parts["correct"] < 1
    assert not partly.correct


def test_packing_is_exact() -> None:
    value = {"a": (1, [2, (3,)]), 4: {"()": [1]}, "{}": {"x": None}, "b": {("k", 1): 2.5}}
    again = unpacked(json.loads(json.dumps(packed(value))))
    assert again == value
    assert repr(again) == repr(value)
    with pytest.raises(TypeError):
        packed(object())


# ---- answers are not code ----


ATTACK = "__import__('pathlib').Path({!r}).touch()"


@pytest.mark.parametrize(
    "name",
    [
        *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "number_sorting"),  # eval
        *("simple_integration", "intermediate_integration", "polynomial_multiplication"),  # SymPy's
        *("countdown", "puzzle24"),
    ],
)
def test_an_answer_is_never_run(name: str, pool: GraderPool, tmp_path: Path) -> None:
    problem = problem_at(family(f"gym:{name}"), "train", 0, 0)
    attack = ATTACK.format(str(tmp_path / "ran"))
    answers = [attack, f"[{attack}]", f"[[{attack}]]", f"['', {attack}]", f"{problem.gold} + 0*{attack}"]
    assert not any(v.correct for v in judged(pool, problem, *answers))
    assert not (tmp_path / "ran").exists()
    (gold,) = judged(pool, problem, problem.gold)
    assert gold.correct


@pytest.mark.parametrize(
    "source",
    ["().__class__", "open('x')", "lambda: 1", "[a for a in 'b']", "exec('1')", "1 if 1 else 2", "2 ** 3",
     "'a'.join('b')", "f'{1}'", "(a := 1)", "1 or 2"],
)  # fmt: skip
def test_what_eval_may_not_see(source: str) -> None:
    with pytest.raises((ValueError, NameError)):
        guarded_eval(source)


def test_what_eval_may_see() -> None:
    sympy: Any = pytest.importorskip("sympy")
    assert guarded_eval("[['_', 'Q'], ['Q', '_']]") == [["_", "Q"], ["Q", "_"]]
    assert guarded_eval("(0x5 << 1) & 0xf") == 10
    x = sympy.Symbol("x")
    written = "sin (Symbol ('x' ))**Integer (2 )+ pi"
    assert guarded_eval(written, vars(sympy), {}) == sympy.sin(x) ** 2 + sympy.pi
    assert guarded_eval("x + Integer(1)", vars(sympy), {"x": x}) == x + 1
    for refused in ("lambdify(Symbol('x'), '1')", "sympify('1')", "Symbol('x').free_symbols"):
        with pytest.raises(ValueError, match="may not hold"):
            guarded_eval(refused, vars(sympy), {})


def test_what_a_scorer_cannot_read_is_wrong_and_a_broken_entry_an_error(pool: GraderPool) -> None:
    problem = problem_at(family("gym:prime_factorization"), "train", 0, 0)
    (unread,) = judged(pool, problem, "a banana")  # its scorer raises ValueError
    assert (unread.correct, unread.error) == (False, None)
    for meta in ({}, {"dataset": "lcm", "options": {}, "entry": {}}, {"dataset": "nope", "entry": {}}):
        (broken,) = judged(pool, Problem("?", "1", "gym", meta=meta), "1")
        assert broken.error is not None


def test_the_scorer_that_calls_everything_right(pool: GraderPool) -> None:
    problem = problem_at(family("gym:game_of_life_halting"), "train", 0, 0)
    other = {"True": "False", "False": "True"}[problem.gold]
    assert [v.correct for v in judged(pool, problem, problem.gold, other)] == [True, False]


def test_check_looks_at_them() -> None:
    found = soundness(drawn(family("gym:rush_hour")))
    assert found.sound
    assert (found.train, found.held_out) == (20, 20)
    assert [(f.kind, f.fatal) for f in found.findings] == [("unproven", False)]
    lenient = soundness(drawn(family("gym:fraction_simplification")))  # finds a fraction in any text
    assert {f.message.split("right: ")[1] for f in lenient.findings} == {"the right answer among others"}
