"""A domain of one's own, from `liubai init` to a trained checkpoint, and what `liubai check` finds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_model

from liubai.errors import UserError
from liubai.grade import check_verifier
from liubai.grade.judge import CAGED
from liubai.grade.options import KNOWN, check_options
from liubai.grade.sandbox import require
from liubai.grade.verifiers import VERIFIERS
from liubai.measure.findings import describe
from liubai.measure.soundness import GIVE_UP, Finding, Soundness, soundness
from liubai.measure.tricks import TRICKS
from liubai.model.checkpoint import save_checkpoint
from liubai.problems.questions import Question, Questions, read_questions
from liubai.recipe import load_recipe
from liubai.text.template import BARE
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Problem


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("liubai.stages.context.Context._tensorboard", lambda *_: None)
    monkeypatch.chdir(tmp_path)


# ---- init and check ----


def test_what_init_writes_is_sound(liubai_: Any, tmp_path: Path) -> None:
    written = liubai_("init", "mine")
    assert written.code == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "problems.jsonl",
        "checker.py",
        "recipe.toml",
    }
    checked = liubai_("check", "mine")
    assert checked.code == 0, checked.out
    assert checked.out.endswith("\nsound\n")
    assert "WRONG" not in checked.out
    assert liubai_("check", "mine/recipe.toml").code == 0


def test_init_never_writes_over_anything(liubai_: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert liubai_("init", "mine").code == 0  # an empty folder is as good as none
    (tmp_path / "mine" / "problems.jsonl").write_text("my own")
    again = liubai_("init", "mine")
    assert (again.code, again.out) == (2, "")
    assert "is there already" in again.err
    assert (tmp_path / "mine" / "problems.jsonl").read_text() == "my own"
    (tmp_path / "file").write_text("x")
    assert liubai_("init", "file").code == 2


def change(path: Path, line: int, **fields: object) -> None:
    rows = path.read_text(encoding="utf-8").splitlines()
    rows[line - 1] = json.dumps(json.loads(rows[line - 1]) | fields, ensure_ascii=False)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def test_check_names_the_lines_of_what_is_wrong(liubai_: Any, tmp_path: Path) -> None:
    liubai_("init", "mine")
    path = tmp_path / "mine" / "problems.jsonl"
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    change(path, 3, answer="a dozen")
    change(path, 4, verifier="numbr")
    change(path, 6, answer="2/4", verifier="checker.py:lowest_terms")  # right, and not in lowest terms
    change(path, 7, **first)
    found = liubai_("check", "mine", "--json")
    assert found.code == 2
    report = json.loads(found.out)
    assert report["sound"] is False
    ((_, file),) = report["files"].items()
    seen = {(f["line"], f["kind"], f["fatal"]) for f in file["findings"]}
    assert seen == {(3, "gold", True), (4, "verifier", True), (6, "gold", True), (7, "duplicate", False)}
    assert file["left_out"] == 1
    table = liubai_("check", "mine")
    assert table.code == 2
    assert "line 4: WRONG verifier: there is no verifier 'numbr'; did you mean 'number'?" in table.out
    assert table.out.endswith("not sound: what is WRONG would be learned\n")


def test_rows_do_not_choose_code(liubai_: Any, tmp_path: Path) -> None:
    liubai_("init", "mine")
    path = tmp_path / "mine" / "problems.jsonl"
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(*a): return True\n")
    change(path, 2, verifier="evil.py:f")
    checked = liubai_("check", "mine")
    assert checked.code == 2
    assert re.search(r"problems\.jsonl:2: 'evil\.py:f' is code; to run it, name it in checkers", checked.err)
    assert not (tmp_path / "ran").exists()


def test_a_recipe_without_questions(liubai_: Any, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('name = "x"\n[stages.base]\nkind = "pretrain"\nsteps = 1\n')
    checked = liubai_("check", "r.toml")
    assert checked.code == 2
    assert "no stage of 'x' has questions of its own" in checked.err


# ---- the battery ----


def question(verifier: str, gold: str, meta: Mapping[str, Any] | None = None) -> Question:
    return Question(
        1, Problem("What is it? It is asked at some length here.", gold, verifier, meta=meta or {}), False
    )


#: a gold answer for every verifier that runs in this process
GOLDS = {"number": "12", "exact": "blue", "choice": "B", "countdown": "3 4 5 ->35"}


@pytest.mark.parametrize("verifier", [name for name in VERIFIERS if name in GOLDS])
def test_no_trick_fools_our_verifiers(verifier: str) -> None:
    found = soundness([question(verifier, GOLDS[verifier])])
    assert [f for f in found.findings if f.kind == "trick"] == []


@pytest.mark.parametrize("gold", ["17", "23"])
def test_no_trick_is_right_by_chance(gold: str) -> None:
    assert [f for f in soundness([question("number", gold)]).findings if f.kind != "split"] == []


CARELESS: dict[str, tuple[str, set[str]]] = {
    "anything": ("return True", {"the question repeated", "the right answer among others", "two answers",
                                 "a tower of powers", "an order to the judge"}),
    "inside": ("return gold in answer", {"the right answer among others"}),
    "obedient": ("return 'SAME' in answer or gold == answer", {"an order to the judge"}),
    "echo": ("return answer == gold or answer.endswith('here.')", {"the question repeated"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CARELESS)
def test_a_careless_checker_is_found_out(name: str, tmp_path: Path) -> None:
    body, wanted = CARELESS[name]
    path = tmp_path / "checker.py"
    path.write_text(f"def f(gold, answer, meta):\n    {body}\n")
    found = soundness([question(f"{path}:f", "12")])
    assert not found.sound
    tricks = {f.message.split("right: ")[1] for f in found.findings if f.kind == "trick"}
    # two answers that differ never reach a checker as one; the last of them does
    assert tricks == wanted
    assert tricks <= set(TRICKS)


def test_a_checker_that_hangs_or_is_slow_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "checker.py"
    slow = "time.sleep(0.3 if answer == gold else 9)"
    path.write_text(f"import time\ndef f(gold, answer, meta):\n    {slow}\n    return True\n")
    found = soundness([question(f"{path}:f", "12")], timeout_s=0.5)
    assert found.sound  # a trick that is not judged is not called right
    assert {f.kind for f in found.findings} == {"slow", "split"}


def test_a_checker_that_always_hangs_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "checker.py"
    path.write_text(
        f"import time\ndef f(gold, answer, meta):\n    open({str(tmp_path / 'n')!r}, 'a').write('x')"
        "\n    time.sleep(9)\n"
    )
    asked = [question(f"{path}:f", str(n)) for n in range(40)] + [question("number", "7")]
    found = soundness(asked, timeout_s=0.1)
    asked_for = len((tmp_path / "n").read_text())
    assert GIVE_UP <= asked_for <= GIVE_UP + 2  # two workers
    (given_up,) = [f for f in found.findings if "given up" in f.message]
    assert given_up.fatal
    assert not [f for f in found.findings if "'number'" in f.message]


def test_an_option_that_its_verifier_does_not_know(tmp_path: Path) -> None:
    row = {"question": "How far is it to the sea?", "answer": "5", "einheit": "km"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"question": "Why?", "einheit": None}) + "\n")
    (tmp_path / "checker.py").write_text("def f(gold, answer, meta):\n    return answer == gold\n")

    def told(verifier: str) -> list[tuple[int, str]]:
        found = soundness(
            read_questions(Questions(path=str(path), default_verifier=verifier, meta=("einheit",)))
        )
        return [(f.line, f.message) for f in found.findings if f.kind == "verifier" and f.fatal]

    ((line, message),) = told("number")
    assert line == 1
    assert "meta 'einheit' is no option of 'number' (it knows tolerance, unit)" in message
    assert told(f"{tmp_path / 'checker.py'}:f") == []


# each has every option that it knows, and nothing is called unknown
@pytest.mark.parametrize(
    ("verifier", "gold", "meta"),
    [
        ("number", "5", {"tolerance": 0.1, "unit": "m", "question": "?"}),
        ("math", "5", {"tolerance": 0.1, "compute": True, "question": "?"}),
        ("choice", "A", {"choices": "AB"}),
        ("json", "{}", {"ordered": True, "subset": False}),
        ("regex", "a", {"ignore_case": True}),
        ("logic", "p & q", {"kind": "formula", "max_signs": 9}),
        ("code", "assert f()", {"kind": "assert", "entry_point": "f", "timeout": 1, "memory_mb": 99}),
        ("judge", "5", {"anything": 1}),
        ("gym", "5", {"dataset": "x", "options": {}, "entry": "y"}),
    ],
)
def test_what_a_verifier_knows(verifier: str, gold: str, meta: dict[str, Any]) -> None:
    check_options(verifier, gold, meta)


def test_the_options_of_all_our_verifiers_are_known() -> None:
    assert set(KNOWN) == (VERIFIERS.keys() | CAGED.keys()) - {"gym", "judge"}


# ---- programs ----


ADD = "def add(a, b):\n    return a + b"
TESTS = "assert add(1, 2) == 3\nassert add(2, 2) == 4"
PAIRS = json.dumps([["1\n", "1\n"], ["2\n", "2\n"]])


def program(gold: str, solution: str, **meta: Any) -> Question:
    return Question(1, Problem("Write it, please.", gold, "code", meta=meta), False, solution=solution)


def kinds(*questions: Question) -> set[tuple[str, bool]]:
    return {(f.kind, f.fatal) for f in soundness(questions).findings if f.kind != "split"}


@pytest.fixture
def sandbox() -> None:
    try:
        check_verifier("code")
    except UserError as error:
        pytest.skip(str(error))


def test_a_solution_proves_the_tests(sandbox: None) -> None:
    assert kinds(program(TESTS, ADD)) == set()
    assert kinds(program(TESTS, f"So:\n```python\n{ADD}\n```\n")) == set()
    assert kinds(program(PAIRS, "print(input())", kind="stdio")) == set()
    assert kinds(program(TESTS, ADD.replace("+", "*"))) == {("gold", True)}
    assert kinds(program("assert add(1, 2) ==", ADD)) == {("gold", True)}
    assert kinds(program(TESTS, "")) == {("unproven", False)}


def test_tests_that_prove_nothing_are_found_out(sandbox: None) -> None:
    weak = soundness([program("add(1, 2)\nassert True", ADD), program("assert True", ADD)])
    said = {f.message.split("right: ")[1] for f in weak.findings if f.kind == "trick"}
    assert {
        "an empty program",
        "functions that return nothing",
        "a result that is equal to everything",
    } <= said
    same = json.dumps([["1\n", "yes\n"], ["2\n", "yes\n"]])
    found = soundness([program(same, "print(input() and 'yes')", kind="stdio")]).findings
    said = {f.message.split("right: ")[1] for f in found if f.kind == "trick"}
    assert said == {"the first case's output for all"}


def test_a_solution_is_a_column_like_others(tmp_path: Path) -> None:
    row = {"question": "Add.", "answer": ["assert add(1, 2) == 3"], "solution": "pass", "mine": ADD}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    path = str(tmp_path / "a.jsonl")
    assert [q.solution for q in read_questions(Questions(path=path))] == ["pass"]
    assert [q.solution for q in read_questions(Questions(path=path, solution="mine"))] == [ADD]
    assert [q.solution for q in read_questions(Questions(path=path, solution="none"))] == [""]


def test_programs_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    require.cache_clear()
    found = soundness([program(TESTS, ADD)])
    require.cache_clear()
    assert not found.sound
    assert "install the Debian package bubblewrap" in found.findings[-1].message


# ---- the table ----


def test_the_table_fits_a_narrow_terminal() -> None:
    findings = [
        Finding(n, "gold", "a sentence that goes on and on, and is wrong", True) for n in range(1, 13)
    ]
    found = Soundness(3, 1, 0, {"number": 0.001}, [Finding(0, "slow", "slow"), *findings])
    for width in (60, 80):
        table = describe("home/questions.jsonl", found, width)
        assert max(map(len, table.splitlines())) <= width
        assert " ".join(table.split()) == " ".join(describe("home/questions.jsonl", found).split())
    plain = describe("q", found).splitlines()
    assert plain[2].startswith("  lines 1, 2, 3, 4, 5, 6, 7, 8 and 4 more: WRONG gold: a sentence")
    assert plain[3] == "  all: slow: slow"


def test_check_takes_a_file(liubai_: Any, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "What is 1 and 2?", "answer": "three"}\n')
    checked = liubai_("check", "q.jsonl", "--verifier", "number")
    assert checked.code == 2
    assert "line 1: WRONG gold: 'number' cannot judge it" in checked.out
    assert liubai_("check", "q.jsonl", "--verifier", "exact").code == 0


# ---- training ----


RECIPE = """
name = "mine"
threads = 1
[stages.before]
kind = "eval"
model = "model"
limit = 4
samples = 2
max_tokens = 12
[stages.before.questions]
path = "questions.csv"
default_verifier = "exact"
[stages.train]
kind = "rl"
model = "model"
preset = "dr-grpo"
steps = 2
groups = 2
samples = 4
max_tokens = 12
slots = 8
eval_problems = 2
eval_samples = 2
[stages.train.rewards]
overlong = -0.5
overlong_from = 0.0
[stages.train.questions]
path = "questions.csv"
default_verifier = "exact"
"""


@pytest.fixture
def domain(world: TextTokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    config = tiny_config(vocab_size=world.vocab_size, eos_token_id=world.eos_id, bos_token_id=world.bos_id)
    save_checkpoint(folder / "model", tiny_model(1, config), world, BARE)
    rows = [(f"{a} {b} {c} ->{a + b}", a + b) for a in range(1, 10) for b, c in ((4, 5), (7, 2))]
    lines = ["question,answer", *(f"{question},{answer}" for question, answer in rows)]
    (folder / "questions.csv").write_text("\n".join(lines) + "\n")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def test_a_model_and_questions_of_ones_own_are_trained(liubai_: Any, domain: Path, tmp_path: Path) -> None:
    """Paths are those of the recipe's folder, wherever the command is given."""
    done = liubai_("run", "home/recipe.toml", "--out", "run", "--no-live")
    assert done.code == 0, done.err
    before = json.loads((tmp_path / "run" / "1-before" / "eval.json").read_text())
    assert before["problems"] == str(domain / "questions.csv")
    questions = read_questions(Questions(path=str(domain / "questions.csv")))
    assert before["n_problems"] == min(4, sum(q.held_out for q in questions)) > 0
    assert (tmp_path / "run" / "2-train" / "checkpoint" / "config.json").exists()
    resolved = load_recipe(tmp_path / "run" / "recipe.toml")
    assert resolved == load_recipe(domain / "recipe.toml")
    asked = ["--problems", "home/questions.csv", "--verifier", "exact", "--limit", "3"]
    shape = ["--samples", "2", "--max-tokens", "8", "--json"]
    evaluated = liubai_("eval", "run/2-train/checkpoint", *asked, *shape)
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["n_problems"] == 3


def test_a_run_says_once_what_it_leaves_out(liubai_: Any, domain: Path) -> None:
    path = domain / "questions.csv"
    path.write_text(path.read_text() + "1 4 5 ->5,5\n")
    run = liubai_("run", "home/recipe.toml", "--out", "run", "--no-live")
    assert run.code == 0, run.err
    said = "train: 1 of 19 questions are left out (1: nearly the same as another)"
    assert (run.out + run.err).count(said) == 1


def test_a_changed_question_or_model_is_another_run(
    liubai_: Any, domain: Path, tmp_path: Path, world: TextTokenizer
) -> None:
    def again() -> list[bool]:
        run = liubai_("run", "home/recipe.toml", "--out", "run", "--no-live")
        assert run.code == 0, run.err
        return [
            "running it again" in line
            for line in (run.out + run.err).splitlines()
            if "recipe changed" in line
        ]

    assert again() == []
    stamp = (tmp_path / "run" / "2-train" / "DONE").stat().st_mtime_ns
    assert again() == []
    assert (tmp_path / "run" / "2-train" / "DONE").stat().st_mtime_ns == stamp
    path = domain / "questions.csv"
    path.write_text(path.read_text() + "9 9 9 ->27,27\n")
    assert again() == [True, True]
    config = tiny_config(vocab_size=world.vocab_size, eos_token_id=world.eos_id, bos_token_id=world.bos_id)
    save_checkpoint(domain / "model", tiny_model(2, config), world, BARE)
    assert again() == [True, True]


PATH, MODEL = 'path = "questions.csv"', 'model = "model"\npreset'
MISTAKES = [
    (MODEL, MODEL.replace('"model"', '"models"'), "home/models'"),
    (MODEL, "preset", "Or name a model"),
    ('"dr-grpo"', '"dr-grop"', "'stages.train': there is no preset 'dr-grop'; did you mean 'dr-grpo'"),
    ("questions.csv", "nowhere.csv", "there is no file"),
    ('default_verifier = "exact"', 'default_verifier = "exct"', "there is no verifier 'exct'"),
    (PATH, f'{PATH}\nquestion = "q"', "there is no column 'q'"),
    (PATH, f'{PATH}\npaths = "q"', "did you mean 'path'"),
]


@pytest.mark.parametrize(("written", "instead", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    written: str, instead: str, message: str, liubai_: Any, domain: Path, tmp_path: Path
) -> None:
    (domain / "recipe.toml").write_text(RECIPE.replace(written, instead))
    run = liubai_("run", "home/recipe.toml", "--out", "run", "--no-live")
    assert run.code == 2
    assert message in run.err
    assert not (tmp_path / "run" / "2-train" / "checkpoint").exists()


UNREADY: list[tuple[dict[str, Any], str, str]] = [
    ({"verifier": "numbr"}, "", "there is no verifier 'numbr'; did you mean 'number'"),
    ({"verifier": "number", "t": "a tenth"}, "", "meta 'tolerance' is a number"),
    ({"verifier": "exact", "t": 0.1}, "", "meta 'tolerance' is no option of 'exact' (it has none)"),
    ({"verifier": "math", "t": 2}, "", "meta 'tolerance' is a number"),
    ({"verifier": "mine.py:f"}, "import nowhere_at_all", "cannot be loaded: ModuleNotFoundError"),
    ({"verifier": "mine.py:f"}, "def f(:", "cannot be loaded: SyntaxError"),
    ({"verifier": "mine.py:f"}, "g = 1", "there is no function 'f'"),
    ({"verifier": "mine.py:f"}, "import sys; sys.exit(3)", "cannot be loaded: SystemExit"),
]


@pytest.mark.parametrize(("row", "checker", "message"), UNREADY)
def test_what_cannot_be_judged_is_said_before_anything_starts(
    row: dict[str, Any], checker: str, message: str, liubai_: Any, domain: Path, tmp_path: Path
) -> None:
    whole = {"question": "Where is it now?", "answer": "4", "tolerance": row.get("t")} | row
    rows = [{"question": "What is 1 and 2?", "answer": "3", "verifier": "number", "tolerance": None}, whole]
    path = domain / "questions.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    (domain / "mine.py").write_text(checker + "\n")
    table = 'path = "questions.jsonl"\ncheckers = ["mine.py:f"]\nmeta = ["tolerance"]'
    # the model is not even looked for
    (domain / "recipe.toml").write_text(RECIPE.replace(PATH, table).replace('"model"', '"none/such"'))
    run = liubai_("run", "home/recipe.toml", "--out", "run", "--no-live")
    assert run.code == 2
    assert f"{path}:2: " in run.err
    assert message in run.err
    assert run.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_eval_asks_the_same_first(liubai_: Any, domain: Path) -> None:
    (domain / "q.jsonl").write_text('{"question": "?a", "answer": "1", "verifier": "numbr"}\n')
    (domain / "model" / "model.safetensors").unlink()  # what would be read next
    run = liubai_("eval", "home/model", "--problems", "home/q.jsonl")
    assert run.code == 2
    assert "q.jsonl:1: there is no verifier 'numbr'" in run.err


def test_check_looks_at_every_table_of_a_file(liubai_: Any, domain: Path) -> None:
    """The second table of the same file has another verifier, by which no gold answer is right."""
    (domain / "mine.py").write_text("def f(gold, answer, meta):\n    return False\n")
    wrong = 'default_verifier = "mine.py:f"'
    head, _, _ = RECIPE.rpartition('default_verifier = "exact"')
    assert liubai_("check", "home").code == 0
    (domain / "recipe.toml").write_text(head + wrong + "\n")
    done = liubai_("check", "home", "--json")
    assert done.code == 2
    found = json.loads(done.out)["files"]
    path = domain / "questions.csv"
    assert set(found) == {f"{path} (stage before)", f"{path} (stage train)"}
    assert not [f for f in found[f"{path} (stage before)"]["findings"] if f["fatal"]]
    assert "calls wrong its own gold answer" in json.dumps(found[f"{path} (stage train)"])


def test_a_run_whose_answers_nobody_can_judge_says_so_once_a_stage(
    liubai_: Any, domain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gold answers can be judged: only what the model says breaks the checker."""
    for reader in ("evaluate", "rollouts"):
        monkeypatch.setattr(
            f"liubai.stages.{reader}.text_of", lambda *_: "<think> x </think> <answer>7777</answer>"
        )
    (domain / "mine.py").write_text("def f(gold, answer, meta):\n    return {gold: True}[answer]\n")
    text = RECIPE.replace('default_verifier = "exact"', 'default_verifier = "mine.py:f"')
    (domain / "recipe.toml").write_text(text)
    run = liubai_("run", "home/recipe.toml", "--out", "run", "--no-live")
    assert run.code == 0, run.err
    said = [line for line in (run.out + run.err).splitlines() if "every verdict was an error" in line]
    assert len(said) == 2
    assert "before: every verdict was an error: " in said[0]
    assert "train: every verdict was an error: " in said[1]
    assert "KeyError" in said[0]
