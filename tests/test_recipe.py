"""Recipes are checked before anything happens, and a run survives whatever stops it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import toy_stage

import liubai.stages
from liubai import files
from liubai.errors import UserError
from liubai.recipe import load_recipe, run, runner, toml
from liubai.stages.view import PlainView

TWO = """\
name = "two"
seed = 3

[stages.base]
kind = "toy"
steps = 8
save_every = 3

[stages.top]
kind = "toy"
from = "base"
steps = 6
save_every = 2
[stages.top.shape]
width = 4
"""


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liubai.stages, "KINDS", dict(liubai.stages.KINDS))
    toy_stage.register(liubai.stages.KINDS)
    monkeypatch.setattr("liubai.stages.context.Context._tensorboard", lambda *_: None)
    # no test here cuts the power, and waiting for the disk is most of their time
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written(tmp_path, TWO)


def written(folder: Path, text: str) -> Path:
    path = folder / "two.toml"
    path.write_text(text, encoding="utf-8")
    return path


class Heard(PlainView):
    """A view that remembers what was reused and what was said."""

    def __init__(self) -> None:
        self.reused: dict[str, bool] = {}
        self.said: list[str] = []

    def start(self, stage: str, kind: str, total: int) -> None: ...

    def update(self, *_: Any) -> None: ...

    def finish(self, stage: str, reused: bool) -> None:
        self.reused[stage] = reused

    def warn(self, message: str) -> None:
        self.said.append(message)


def go(path: Path, out: Path, *overrides: str) -> Heard:
    heard = Heard()
    assert run(load_recipe(path, overrides), out, heard) == out
    return heard


def contents(run_folder: Path) -> dict[str, object]:
    """Everything in a run folder but the clock and the machine."""
    found: dict[str, object] = {}
    for path in sorted(run_folder.rglob("*")):
        if path.is_dir() or path.name in (runner.MARK, "environment.json"):
            continue
        name = str(path.relative_to(run_folder))
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "time"} for line in lines]
        elif path.name == "DONE":
            found[name] = files.read_json(path)["fingerprint"]
        else:
            found[name] = path.read_bytes()
    return found


# Reading


def test_a_recipe_is_read_with_its_defaults(recipe: Path) -> None:
    r = load_recipe(recipe)
    assert (r.name, r.seed, r.threads) == ("two", 3, 0)
    assert [(p.name, p.kind, p.parents) for p in r.stages] == [("base", "toy", ()), ("top", "toy", ("base",))]
    config = r.stages[1].config
    assert isinstance(config, toy_stage.Config)
    assert (config.steps, config.share, config.shape.width, config.shape.betas) == (6, 0.5, 4, (0.9, 0.95))


def test_the_resolved_recipe_reads_as_itself(recipe: Path) -> None:
    odd = 'a "quoted" \\ 留白\n\x7f\t'
    r = load_recipe(recipe, ["base.share=1e-5", "top.weights={countdown=1, 'a b.c'=0.5}", "threads=2"])
    r = load_recipe(
        written(recipe.parent, r.to_toml().replace("flag = false", f"note = {toml._value(odd)}", 1))
    )
    assert load_recipe(written(recipe.parent, r.to_toml())) == r
    config = r.stages[0].config
    assert isinstance(config, toy_stage.Config)
    assert (config.note, config.share, r.threads) == (odd, 1e-5, 2)


def test_toml_is_written_as_tomllib_reads_it() -> None:
    table = {
        "a": 1, "b": -0.5, "c": True, "list": [1, [2.5], "x", {"k": 1, "none": None}], "inf": float("inf"),
        "odd key": "\"\\\n\x01é", "empty": {}, "t": {"u": {"v": {"w": 1}}, "x": "y", "": 0},
    }  # fmt: skip
    expected = {**table, "list": [1, [2.5], "x", {"k": 1}]}
    assert tomllib.loads(toml.dumps({**table, "gone": None})) == expected


@pytest.mark.parametrize(
    ("override", "stage", "key", "value"),
    [
        ("base.steps=5", 0, "steps", 5),
        ("stages.base.steps=5", 0, "steps", 5),
        (" base.share = 0.25 ", 0, "share", 0.25),
        ("base.note=plain words", 0, "note", "plain words"),
        ("base.note='7'", 0, "note", "7"),
        ("base.note=a=b", 0, "note", "a=b"),
        ("base.note=", 0, "note", ""),
        ("base.note=1\nx = 2", 0, "note", "1\nx = 2"),
        ("base.mode=fancy", 0, "mode", "fancy"),
        ("base.flag=true", 0, "flag", True),
        ("top.shape.width=16", 1, "shape", toy_stage.Shape(width=16)),
        ("base.shape.betas=[0.5, 1]", 0, "shape", toy_stage.Shape(betas=(0.5, 1.0))),
    ],
)
def test_an_override_changes_one_key(
    recipe: Path, override: str, stage: int, key: str, value: object
) -> None:
    r = load_recipe(recipe, [override])
    assert getattr(r.stages[stage].config, key) == value


def test_overrides_of_the_top_and_of_from(recipe: Path) -> None:
    r = load_recipe(recipe, ["seed=9", "threads=1", "name=other", "top.from=[]", "seed=10"])
    assert (r.seed, r.threads, r.name, r.stages[1].parents) == (10, 1, "other", ())


BASE = '[stages.base]\nkind = "toy"\nsteps = 8\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = = 1", "{}:1: invalid value: x = = 1"),
        (BASE + "steps = 9\n", "{}:4: 'stages.base.steps' is given twice"),
        (BASE + BASE, "{}:4: 'stages.base' is declared twice"),
        ("sede = 1\n" + BASE, "{}: 'sede': unknown key; did you mean 'seed'?"),
        ("seed = -1\n" + BASE, "{}: 'seed': must be a whole number from 0 to 9223372036854775807, not -1"),
        (
            "seed = true\n" + BASE,
            "{}: 'seed': must be a whole number from 0 to 9223372036854775807, not true",
        ),
        ('threads = "2"\n' + BASE, "{}: 'threads': must be a whole number from 0 to 1024, not \"2\""),
        ('name = "../x"\n' + BASE, "{}: 'name': must be letters, digits, '.', '_' and '-', not \"../x\""),
        ("", "{}: 'stages': a recipe needs at least one table [stages.NAME]"),
        ("stages = 3", "{}: 'stages': a recipe needs at least one table [stages.NAME]"),
        ("[stages]\nbase = 3", "{}: 'stages.base': must be a table [stages.base], not 3"),
        ('[stages."a/b"]', "{}: 'stages.a/b': the name of a stage must be letters, digits, '_' and '-'"),
        ("[stages.base]\nsteps = 8", "{}: 'stages.base.kind': is missing"),
        ("[stages.base]\nkind = 8", "{}: 'stages.base.kind': must be a string, not 8"),
        (
            '[stages.base]\nkind = "pretrian"',
            "{}: 'stages.base.kind': unknown stage kind 'pretrian'; did you mean 'pretrain'?",
        ),
        ('[stages.base]\nkind = "toy"', "{}: 'stages.base.steps': is missing"),
        (BASE + "stpes = 1", "{}: 'stages.base.stpes': unknown key; did you mean 'steps'?"),
        (BASE + "shape.widht = 1", "{}: 'stages.base.shape.widht': unknown key; did you mean 'width'?"),
        (BASE + "shape = 1", "{}: 'stages.base.shape': must be an object, not 1"),
        (BASE + "share = 1.5", "{}: 'stages.base.share': must be less than or equal to 1, not 1.5"),
        (BASE + "save_every = 0", "{}: 'stages.base.save_every': must be greater than 0, not 0"),
        (BASE + 'save_every = "9"', "{}: 'stages.base.save_every': must be a valid integer, not \"9\""),
        (BASE + "save_every = 1.5", "{}: 'stages.base.save_every': must be a valid integer, not 1.5"),
        (BASE + "share = true", "{}: 'stages.base.share': must be a valid number, not true"),
        (BASE + "flag = 1", "{}: 'stages.base.flag': must be a valid boolean, not 1"),
        (BASE + 'mode = "fancey"', "{}: 'stages.base.mode': unknown value \"fancey\"; did you mean 'fancy'?"),
        (BASE + "mode = 3", "{}: 'stages.base.mode': must be 'plain' or 'fancy', not 3"),
        (
            BASE + 'shape.betas = [1, "x"]',
            "{}: 'stages.base.shape.betas.1': must be a valid number, not \"x\"",
        ),
        (BASE + "shape.betas = [1]", "{}: 'stages.base.shape.betas.1': is missing"),
        (BASE + 'weights = {a = "b"}', "{}: 'stages.base.weights.a': must be a valid number, not \"b\""),
        (
            BASE + 'from = "bsae"',
            "{}: 'stages.base.from': there is no stage 'bsae'; there is no earlier stage",
        ),
        (BASE + 'from = "base"', "{}: 'stages.base.from': stage 'base' cannot come from itself"),
        (
            BASE + 'from = "top"\n[stages.top]\nkind = "toy"\nsteps = 1',
            "{}: 'stages.base.from': stage 'top' comes later; stages run in the order of the file",
        ),
        (
            BASE + '[stages.top]\nkind = "toy"\nsteps = 1\nfrom = ["bsae"]',
            "{}: 'stages.top.from': there is no stage 'bsae'; did you mean 'base'?",
        ),
        (
            BASE + '[stages.top]\nkind = "toy"\nsteps = 1\nfrom = ["base", "base"]',
            "{}: 'stages.top.from': stage 'base' is named twice",
        ),
        (
            BASE + "from = 3",
            "{}: 'stages.base.from': must be the name of a stage, or a list of names, not 3",
        ),
        (
            BASE + '[stages.fit]\nkind = "scaling"\nfrom = ["base"]',
            "{}: 'stages.fit.from': stage 'base' (toy) has no curve; scaling reads stages of the kinds "
            "pretrain, rl, ppo, eval",
        ),
        (
            '[stages.fit]\nkind = "scaling"',
            "{}: 'stages.fit.from': scaling reads the stages that its 'from' names, and it names none",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).lower() == message.format(path).lower()
    assert set(tmp_path.iterdir()) == {path}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.steps", "--set 'base.steps': write stage.key=value, for example base.steps=100 ({})"),
        ("=3", "--set '=3': write stage.key=value, for example base.steps=100 ({})"),
        ("base..steps=3", "--set 'base..steps=3': write stage.key=value, for example base.steps=100 ({})"),
        ("bsae.steps=3", "--set 'bsae.steps=3': {} has no stage 'bsae'; did you mean 'base'?"),
        ("sed=3", "--set 'sed=3': 'sed' is no key of {}; did you mean 'seed'?"),
        ("base=3", "--set 'base=3': 'base' is no key of {}; name a key of the stage too"),
        ("base.steps.x=3", "--set 'base.steps.x=3': 'stages.base.steps' in {} is a value, not a table"),
        ("base.stpes=3", "{}: 'stages.base.stpes': unknown key; did you mean 'steps'? (--set base.stpes=3)"),
        ("base.steps=-5", "{}: 'stages.base.steps': must be greater than 0, not -5 (--set base.steps=-5)"),
        ("base.steps=x", "{}: 'stages.base.steps': must be a valid integer, not \"x\" (--set base.steps=x)"),
        (
            "top.shape={widht=1}",
            "{}: 'stages.top.shape.widht': unknown key; did you mean 'width'? (--set top.shape={{widht=1}})",
        ),
        (
            "seed=x",
            "{}: 'seed': must be a whole number from 0 to 9223372036854775807, not \"x\" (--set seed=x)",
        ),
    ],
)
def test_a_mistake_in_an_override_is_one_line(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, [override])
    assert str(caught.value) == message.format(recipe)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no recipe file '.*/nope\.toml'"):
        load_recipe(tmp_path / "nope.toml")
    with pytest.raises(UserError, match=r"is a folder; name the recipe in it: .*/recipe\.toml$"):
        load_recipe(tmp_path)
    for name, content in (("q.json", b'[{"question": 1}]\n{'), ("q.txt", b"Who?\n"), ("q.xlsx", b"PK\x90")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"questions are read from \.jsonl, \.csv, \.parquet$"):
            load_recipe(tmp_path / name)
    path = tmp_path / "latin.toml"
    path.write_bytes(b'name = "\xe9"')
    with pytest.raises(UserError, match=r"latin\.toml: not UTF-8 text"):
        load_recipe(path)


def test_a_byte_order_mark_is_no_statement(tmp_path: Path) -> None:
    path = written(tmp_path, TWO)
    plain = load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_recipe(path) == plain


def test_a_key_without_its_stage_is_told_where_it_belongs(tmp_path: Path) -> None:
    path = written(tmp_path, TWO)
    first, second = (stage.name for stage in load_recipe(path).stages)
    hint = re.escape(f"name its stage, too: {first}.steps or {second}.steps")
    with pytest.raises(UserError, match=rf"'steps' is no key of .*; {hint}$"):
        load_recipe(path, ["steps=3"])
    with pytest.raises(UserError, match="did you mean 'seed'"):
        load_recipe(path, ["sed=3"])


def test_every_mistake_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, TWO.replace("steps = 6", "steps = 0"))
    with pytest.raises(UserError, match=re.escape(f"{path}: 'stages.top.steps'")):
        load_recipe(path)


# Running


def test_a_run_folder_has_everything(recipe: Path, tmp_path: Path) -> None:
    heard = go(recipe, tmp_path / "deep" / "out", "top.share=0.75")
    out = tmp_path / "deep" / "out"
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {
        runner.MARK, "recipe.toml", "environment.json",
        "1-base/metrics.jsonl", "1-base/samples.jsonl", "1-base/warnings.jsonl", "1-base/DONE",
        "1-base/checkpoint/weights.json",
        "2-top/metrics.jsonl", "2-top/samples.jsonl", "2-top/warnings.jsonl", "2-top/DONE",
        "2-top/checkpoint/weights.json",
    }  # fmt: skip
    assert heard.reused == {"base": False, "top": False}
    assert load_recipe(out / "recipe.toml") == load_recipe(recipe, ["top.share=0.75"])
    base, top = (json.loads((out / f / "checkpoint/weights.json").read_text()) for f in ("1-base", "2-top"))
    assert top[0] > base[-1]  # the parent's checkpoint was read


def test_what_is_finished_is_reused(recipe: Path, tmp_path: Path) -> None:
    go(recipe, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/*/*")}
    assert go(recipe, tmp_path / "out").reused == {"base": True, "top": True}
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/*/*")} == before


def test_the_same_stage_of_another_run_is_taken_over(recipe: Path, tmp_path: Path) -> None:
    """Only with the same fingerprint, and once: what is here already is not copied again."""
    go(recipe, tmp_path / "first")
    heard = Heard()
    run(load_recipe(recipe, ["top.share=0.1"]), tmp_path / "second", heard, [tmp_path / "first"])
    assert heard.reused == {"base": True, "top": False}
    assert [line for line in heard.said if "taken from" in line] == [
        f"1-base: taken from {tmp_path / 'first' / '1-base'}"
    ]
    go(recipe, tmp_path / "alone", "top.share=0.1")
    assert contents(tmp_path / "second") == contents(tmp_path / "alone")
    again = Heard()
    run(load_recipe(recipe, ["top.share=0.1"]), tmp_path / "second", again, [tmp_path / "first"])
    assert (again.reused, again.said) == ({"base": True, "top": True}, [])
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="is no run folder; --reuse takes the folder of an earlier run"):
        run(load_recipe(recipe), tmp_path / "third", Heard(), [tmp_path / "other"])
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("override", "reused"),
    [
        ("top.share=0.1", {"base": True, "top": False}),
        ("top.shape.width=5", {"base": True, "top": False}),
        ("base.share=0.1", {"base": False, "top": False}),  # what came from it is changed too
        ("seed=4", {"base": False, "top": False}),
        ("threads=1", {"base": False, "top": False}),
        ("base.share=0.5", {"base": True, "top": True}),  # the default, spelt out
        ("name=other", {"base": True, "top": True}),
    ],
)
def test_what_changed_is_run_again_and_said_so(
    recipe: Path, tmp_path: Path, override: str, reused: dict[str, bool]
) -> None:
    go(recipe, tmp_path / "out")
    heard = go(recipe, tmp_path / "out", override)
    assert heard.reused == reused
    redone = [line.partition(":")[0] for line in heard.said if "the recipe changed" in line]
    assert redone == [stage for stage, was in reused.items() if not was]
    go(recipe, tmp_path / "fresh", override)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_code_of_another_format_is_another_fingerprint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(recipe, tmp_path / "out")
    monkeypatch.setattr(runner, "FORMAT", 2)
    assert go(recipe, tmp_path / "out").reused == {"base": False, "top": False}


@pytest.fixture
def interrupted(recipe: Path, tmp_path: Path) -> Path:
    """A run whose second stage stopped after step 5, saved at step 4."""
    out = tmp_path / "out"

    class Stopping(Heard):
        def update(self, stage: str, step: int, *_: Any) -> None:
            if (stage, step) == ("top", 5):
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run(load_recipe(recipe), out, Stopping())
    assert (out / "2-top/state").is_dir()
    assert not (out / "2-top/DONE").exists()
    return out


def test_an_interrupted_stage_continues(interrupted: Path, recipe: Path, tmp_path: Path) -> None:
    heard = go(recipe, interrupted)
    assert heard.reused == {"base": True, "top": False}
    assert heard.said[0] == "top: continues after step 4"
    go(recipe, tmp_path / "fresh")
    assert contents(interrupted) == contents(tmp_path / "fresh")


def test_an_interrupted_stage_with_other_settings_begins_again(
    interrupted: Path, recipe: Path, tmp_path: Path
) -> None:
    heard = go(recipe, interrupted, "top.share=0.1")
    assert heard.said[0] == "top: was interrupted with other settings; begins again"
    go(recipe, tmp_path / "fresh", "top.share=0.1")
    assert contents(interrupted) == contents(tmp_path / "fresh")


def test_leftovers_of_a_stage_that_never_saved_are_wiped(recipe: Path, tmp_path: Path) -> None:
    """Also for a stage that never calls restore."""
    go(recipe, tmp_path / "out")
    (tmp_path / "out/2-top/DONE").unlink()
    (tmp_path / "out/2-top/metrics.jsonl").write_text("half a li")
    go(recipe, tmp_path / "out")
    go(recipe, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_damage_is_named_and_nothing_is_deleted(interrupted: Path, recipe: Path) -> None:
    before = contents(interrupted)
    meta, done = interrupted / "2-top/state/meta.json", interrupted / "1-base/DONE"
    whole = done.read_bytes()
    meta.write_text('{"step": 4')
    with pytest.raises(UserError, match=re.escape(f"'{meta}' is damaged")):
        go(recipe, interrupted)
    done.write_text('{"finger')
    with pytest.raises(UserError, match=re.escape(f"'{done}' is damaged")):
        go(recipe, interrupted)
    done.write_bytes(whole)
    assert {k: v for k, v in contents(interrupted).items() if "meta" not in k} == {
        k: v for k, v in before.items() if "meta" not in k
    }


def test_a_stage_that_moves_keeps_its_result(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(recipe, out)
    middle = '[stages.middle]\nkind = "toy"\nsteps = 2\n'
    path = written(tmp_path, TWO.replace("[stages.top]", middle + "[stages.top]"))
    assert go(path, out).reused == {"base": True, "middle": False, "top": True}
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"1-base", "2-middle", "3-top"}
    heard = go(written(tmp_path, TWO), out)
    assert heard.reused == {"base": True, "top": True}
    assert heard.said == ["2-middle belongs to no stage of this recipe; it is left as it is"]


def test_a_folder_that_is_no_run_is_not_touched(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "recipe.toml").write_text("a user's own")
    with pytest.raises(UserError, match=r"'.*mine' is not empty and not a run of liubai"):
        go(recipe, out)
    with pytest.raises(UserError, match=r"two\.toml' is a file; choose another folder with --out"):
        go(recipe, recipe)
    with pytest.raises(UserError, match=r"cannot work in '.*two\.toml/x': Not a directory"):
        go(recipe, recipe / "x")
    assert [p.name for p in out.iterdir()] == ["recipe.toml"]
    assert (out / "recipe.toml").read_text() == "a user's own"
    assert recipe.read_text() == TWO


def test_an_empty_folder_is_fine(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    go(recipe, tmp_path / "out")


def test_a_full_disk_loses_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up again and again in the middle of a line; in the end the run is what it should be."""
    go(recipe, tmp_path / "fresh")
    append, count = files.append, 0

    def filling(path: Path, text: str) -> None:
        nonlocal count
        count += 1
        if count % 11 == 0:
            with files.naming_full_disk(path):
                append(path, text[: len(text) // 2])  # as much as there was room for
                raise OSError(28, "No space left on device")
        append(path, text)

    monkeypatch.setattr(files, "append", filling)
    said: list[str] = []
    while not (tmp_path / "out/2-top/DONE").exists():
        try:
            go(recipe, tmp_path / "out")
        except UserError as error:
            said.append(str(error))
    assert len(said) > 2
    assert all(re.search(r"no space left on '.*-(base|top)' .*nothing was lost", line) for line in said)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_threads_are_set_for_torch(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    go(recipe, tmp_path / "out")
    assert asked == []
    go(recipe, tmp_path / "out", "threads=2")
    assert asked == [2, 2]


def test_too_many_threads_are_said_once_with_what_to_do(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    view = go(recipe, tmp_path / "out", "threads=4")
    said = [line for line in view.said if "threads" in line]
    assert said == ["4 threads on 2 cores: they will wait for each other; --set threads=2"]


# Killing


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    """The run in a process of its own, past its imports."""
    process = subprocess.Popen(
        [sys.executable, str(Path(toy_stage.__file__)), str(recipe), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(liubai.__file__).parent.parent)},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", process.communicate()[1]
    return process


def test_killed_at_random_moments_the_result_is_the_same(recipe: Path, tmp_path: Path) -> None:
    """test_resume_is_bit_exact, without a model: SIGKILL a dozen times, then let it finish."""
    recipe = written(tmp_path, TWO.replace('kind = "toy"', 'kind = "toy"\npause = 0.01'))
    go(recipe, tmp_path / "fresh")
    rng, outs, kills, at_work = random.Random(0), [tmp_path / "out-0"], 0, 0
    while kills < 12:
        process = start(recipe, outs[-1])
        time.sleep(rng.uniform(0.0, 0.1))
        process.kill()
        _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
            at_work += (outs[-1] / "1-base" / "metrics.jsonl").exists()
        else:  # it was quicker than the kill: the next ones need another run to interrupt
            assert (process.returncode, errors) == (0, "")
            outs.append(tmp_path / f"out-{len(outs)}")
    assert at_work >= 6  # the others had not begun
    for out in outs:
        go(recipe, out)
        assert contents(out) == contents(tmp_path / "fresh")
        assert not [path for path in out.rglob("*") if files.is_leftover(path)]


def test_killed_at_every_change_to_the_disk_the_result_is_the_same(recipe: Path, tmp_path: Path) -> None:
    """A child runs and kills itself at its n-th change to the disk, for every n; the parent goes on."""
    recipe = written(tmp_path, TWO.replace("steps = 8", "steps = 4").replace("steps = 6", "steps = 3"))
    plan = load_recipe(recipe)
    go(recipe, tmp_path / "fresh")
    expected = contents(tmp_path / "fresh")
    at = 0
    while True:
        at += 1
        out = tmp_path / str(at)
        child = os.fork()
        if child == 0:
            toy_stage.kill_at_call(at)
            run(plan, out, Heard())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        go(recipe, out)
        assert contents(out) == expected, f"killed at change {at}"
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert at > 60


def test_two_runs_in_one_folder_are_refused(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = written(tmp_path, TWO.replace('kind = "toy"', 'kind = "toy"\npause = 0.2'))
    process = start(slow, out)
    try:
        while not (out / "1-base" / "metrics.jsonl").exists():
            time.sleep(0.01)
        with pytest.raises(UserError) as caught:
            go(slow, out)
        assert f"another run is working in '{out}' (process {process.pid}); wait for it" in str(caught.value)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    go(recipe, out)  # the lock went with its process
