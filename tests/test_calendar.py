"""The example of docs/your-domain.md: its notes are what it says they are, and its path works end to end."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from liubai import cli
from liubai.problems.questions import Questions, read_questions, splits

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "calendar"


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("calendar_make", EXAMPLE / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---- the notes ----


def invented(kind: str, rng: random.Random, make: ModuleType) -> tuple[dict[str, Any], str]:
    """What reasoning-gym says about a question, and its answer, found by walking through the days."""
    start = date(2022, 1, 1) + timedelta(days=rng.randrange(365))
    if kind == "weekday_offset":
        offset = rng.choice((-1, 1)) * rng.randint(1, 100)
        about = {"start_date": start.isoformat(), "offset_days": offset}
        return about, make.DAYS[(start + timedelta(days=offset)).weekday()]
    end = date(2022, 1, 1) + timedelta(days=rng.randint(1, 100))
    first = rng.randrange(7)
    about = {"first_day": make.DAYS[first], "target_date": end.isoformat()}
    return about, make.DAYS[(first + (end - date(2022, 1, 1)).days) % 7]


def notes(make: ModuleType, **habits: float) -> list[tuple[Any, str]]:
    """(note, right answer) of many questions."""
    for name, value in habits.items():
        setattr(make, name, value)
    rng = random.Random(1)
    asked = [(kind, *invented(kind, rng, make)) for kind in make.KINDS for _ in range(700)]
    return [(make.note({"task": kind, **about}, rng), gold) for kind, about, gold in asked]


def test_who_does_not_slip_is_right(make: ModuleType) -> None:
    for check in (0.0, 1.0):
        made = notes(make, GUESS=0, SKIP=0, SLIP=0, CHECK=check)
        assert all(note.answer == gold and note.slips == 0 for note, gold in made)
        assert all(("Check:" in note.text) == (check == 1) for note, _ in made)
        assert not any("No, again" in note.text for note, _ in made)


def test_habits_are_as_frequent_as_stated(make: ModuleType) -> None:
    made = [note for note, _ in notes(make)]
    guesses = [note for note in made if note.habit == "guess"]
    thought = [note for note in made if note.habit != "guess"]
    assert len(guesses) / len(made) == pytest.approx(make.GUESS, abs=0.03)
    skips = [note for note in thought if note.habit.startswith("skip")]
    assert len(skips) / len(thought) == pytest.approx(make.SKIP, abs=0.04)
    checks = [note for note in thought if note.habit.endswith("check")]
    assert len(checks) / len(thought) == pytest.approx(make.CHECK, abs=0.04)


def test_steps_slip_as_often_as_stated(make: ModuleType) -> None:
    author = make.Author(random.Random(2))
    author.skips = False
    for _ in range(2000):
        author.number(50)
        author.count(3, 4)
    assert author.slips / 10_000 == pytest.approx(make.SLIP, rel=0.15)


def test_a_check_finds_slips(make: ModuleType) -> None:
    made = notes(make, GUESS=0, SKIP=0, SLIP=0.05)
    by = {checked: [n.answer == gold for n, gold in made if ("Check" in n.text) is checked]
          for checked in (True, False)}  # fmt: skip
    assert sum(by[True]) / len(by[True]) > 0.05 + sum(by[False]) / len(by[False])


def test_what_make_writes_is_sound_and_keeps_held_out_questions_out(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    run(make, tmp_path, monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 60 * len(make.KINDS) == 120
    train, held_out = splits(read_questions(Questions(path=str(tmp_path / "questions.jsonl"))))
    noted = {json.loads(line)["prompt"] for line in (tmp_path / "notes.jsonl").read_text().splitlines()}
    assert held_out
    assert noted == {problem.prompt for problem in train}
    assert not noted & {problem.prompt for problem in held_out}


def run(make: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["make.py", "--out", str(folder), "--size", "60", "--notes", "2"]
    monkeypatch.setattr(sys, "argv", options)
    make.main()


# ---- the path ----


@pytest.fixture
def liubai_(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr("liubai.stages.context.Context._tensorboard", lambda *_: None)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["liubai", *arguments])
        try:
            return cli.main() or 0
        except SystemExit as leaving:
            return int(leaving.code or 0)

    return call


def test_the_whole_story_in_small(
    make: ModuleType, liubai_: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    for file in ("base.toml", "recipe.toml"):
        shutil.copy(EXAMPLE / file, tmp_path)
    run(make, tmp_path, monkeypatch)
    few = ["threads=1", "base.steps=2", "base.tokens_per_step=512", "base.model.num_hidden_layers=1"]
    base = ("run", str(tmp_path / "base.toml"), "--out", str(tmp_path / "base"), "--no-live")
    assert liubai_(*base, *(part for each in few for part in ("--set", each))) == 0
    assert liubai_("check", str(tmp_path)) == 0
    few = ["threads=1", "train.steps=2", "train.groups=2", "train.samples=4", "train.eval_problems=2"]
    for stage in ("before", "train", "after"):
        few += [f"{stage}.max_tokens=16", f"{stage}.slots=8"]
    for stage in ("before", "after"):
        few += [f"{stage}.limit=4", f"{stage}.samples=2"]
    out = tmp_path / "run"
    done = liubai_(
        "run", str(tmp_path / "recipe.toml"), "--out", str(out), "--no-live",
        *(part for each in few for part in ("--set", each)),
    )  # fmt: skip
    assert done == 0
    assert json.loads((out / "3-after" / "eval.json").read_text())["n_problems"] == 4
    assert (out / "report.html").exists()
