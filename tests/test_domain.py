"""A domain of one's own, from `liubai init` to a trained checkpoint, and what `liubai check` finds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_config, tiny_model

from liubai import cli
from liubai.grade.verifiers import VERIFIERS
from liubai.measure.soundness import TRICKS, soundness
from liubai.model.checkpoint import save_checkpoint
from liubai.problems.questions import Question, Questions, read_questions
from liubai.recipe import load_recipe
from liubai.text.template import BARE
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Problem


@pytest.fixture
def liubai_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command line in this process, somewhere else."""
    monkeypatch.setattr("liubai.stages.context.Context._tensorboard", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["liubai", *arguments])
        try:
            code = cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return call


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
    assert {f.kind for f in found.findings} == {"slow"}


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
    (MODEL, f'from = "before"\n{MODEL}', "begins with one"),
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
