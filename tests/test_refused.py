"""A mistake in a recipe costs nothing: it is told before anything works, or what it replaced comes back."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import toy_stage
from conftest import tiny_config
from test_recipe import TWO, Heard, contents, go, written

import liubai.stages
from liubai import files
from liubai.errors import UserError
from liubai.grade import Verdict
from liubai.measure.readiness import warn_unjudged
from liubai.model.lora import LoraConfig
from liubai.problems.questions import Questions, disagreement
from liubai.recipe import load_recipe, run
from liubai.stages.config import Brought
from liubai.stages.context import Context


class Config(toy_stage.Config):
    #: steps that are logged before the stage refuses to go on; -1: it does not refuse
    refuse_at: int = -1


def moody(config: Config, context: Context) -> None:
    if config.refuse_at < 0:
        toy_stage.run(config, context)
        about = json.dumps(tiny_config(max_position_embeddings=64).to_hf())
        (context.folder / "checkpoint" / "config.json").write_text(about)
        return
    for step in range(config.refuse_at):
        context.log(step + 1, config.steps, {"accuracy": -1.0})
    raise UserError("that cannot work")


def curves(context: Context, step: int, metrics: dict[str, float]) -> None:
    folder = context.folder.parent / "tensorboard" / context.stage
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "events", "a", encoding="utf-8") as file:
        file.write(f"{step} {metrics}\n")


@pytest.fixture(autouse=True)
def _moody(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("moody_stage")
    vars(module).update(Config=Config, run=moody)
    monkeypatch.setitem(sys.modules, "moody_stage", module)
    monkeypatch.setattr(liubai.stages, "KINDS", {**liubai.stages.KINDS, "moody": "moody_stage"})
    monkeypatch.setattr("liubai.stages.context.Context._tensorboard", curves)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("liubai.recipe.runner.describe", lambda threads: {"machine": "this one"})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written(tmp_path, TWO.replace('"toy"', '"moody"'))


@pytest.fixture
def out(recipe: Path, tmp_path: Path) -> Path:
    """A finished run of another machine."""
    go(recipe, tmp_path / "out")
    files.write_json(tmp_path / "out" / "environment.json", {"machine": "another"})
    return tmp_path / "out"


def refused(recipe: Path, out: Path, *overrides: str) -> Heard:
    heard = Heard()
    with pytest.raises(UserError, match="that cannot work"):
        run(load_recipe(recipe, overrides), out, heard)
    return heard


def test_a_stage_that_refuses_leaves_the_run_as_it_was(recipe: Path, out: Path) -> None:
    before = contents(out)
    assert any(name.startswith("tensorboard/top") for name in before)
    heard = refused(recipe, out, "top.refuse_at=0")
    assert heard.said[-1] == "top: nothing was computed; the old result is back in its place"
    assert contents(out) == before
    assert files.read_json(out / "environment.json") == {"machine": "another"}
    assert not [path for path in out.rglob("*") if files.is_leftover(path)]
    again = go(recipe, out)
    assert (again.reused, again.said) == ({"base": True, "top": True}, [])


def test_whatever_ends_it_before_its_first_step(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: Config, context: Context) -> None:
        raise KeyboardInterrupt

    before = contents(out)
    monkeypatch.setattr(sys.modules["moody_stage"], "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe, ["top.share=0.1"]), out, Heard())
    assert contents(out) == before


def test_a_stage_that_has_logged_a_step_takes_the_place(recipe: Path, out: Path) -> None:
    refused(recipe, out, "top.refuse_at=2")
    now = contents(out)
    assert "2-top/DONE" not in now
    assert [line["accuracy"] for line in now["2-top/metrics.jsonl"]] == [-1.0, -1.0]  # type: ignore[attr-defined]
    assert "refuse_at = 2" in (out / "recipe.toml").read_text()
    assert not [path for path in out.rglob("*") if files.is_leftover(path)]
    assert go(recipe, out).reused == {"base": True, "top": False}


def test_the_recipe_is_that_of_what_was_computed(recipe: Path, out: Path) -> None:
    """The first stage is made again, and the second refuses: its result is the old one, the recipe is not."""
    top = {name: what for name, what in contents(out).items() if "top" in name}
    refused(recipe, out, "base.share=0.1", "top.refuse_at=0")
    now = contents(out)
    assert {name: what for name, what in now.items() if "top" in name} == top
    assert "refuse_at = 0" in (out / "recipe.toml").read_text()
    assert go(recipe, out, "base.share=0.1").reused == {"base": True, "top": False}


def test_numbers_are_put_back(recipe: Path, out: Path) -> None:
    before = contents(out)
    middle = '[stages.middle]\nkind = "moody"\nsteps = 2\nrefuse_at = 0\n'
    refused(written(recipe.parent, recipe.read_text().replace("[stages.top]", middle + "[stages.top]")), out)
    now = contents(out)
    assert {name: now[name] for name in before} == before


def test_half_a_stage_is_put_back_too(recipe: Path, tmp_path: Path) -> None:
    class Stopping(Heard):
        def update(self, stage: str, step: int, *_: Any) -> None:
            if (stage, step) == ("top", 5):
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run(load_recipe(recipe), tmp_path / "out", Stopping())
    refused(recipe, tmp_path / "out", "top.refuse_at=0")
    assert go(recipe, tmp_path / "out").said[0] == "top: continues after step 4"


@pytest.mark.parametrize(("override", "reused"), [("top.refuse_at=0", True), ("top.share=0.1", None)])
def test_killed_at_every_change_to_the_disk_old_or_new_is_whole(
    recipe: Path, out: Path, tmp_path: Path, override: str, reused: bool | None
) -> None:
    recipe = written(tmp_path, recipe.read_text().replace("steps = 8", "steps = 1").replace("= 6", "= 2"))
    go(recipe, out)
    before = contents(out)
    go(recipe, tmp_path / "fresh", "top.share=0.1")
    after = contents(tmp_path / "fresh")
    at, kept = 0, []
    while True:
        at += 1
        killed, other = tmp_path / f"{at}", tmp_path / f"{at}-other"
        shutil.copytree(out, killed)
        child = os.fork()
        if child == 0:
            toy_stage.kill_at_call(at)
            try:
                run(load_recipe(recipe, [override]), killed, Heard())
            except UserError:
                os._exit(3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not reused and at % 2:
            shutil.copytree(killed, other)
            go(recipe, other, "top.share=0.1")
            now = contents(other)
            assert {n: now[n] for n in after if "tensorboard" not in n} == {
                n: w for n, w in after.items() if "tensorboard" not in n
            }, f"killed at change {at}"
            shutil.rmtree(other)
        heard = go(recipe, killed)
        kept.append(heard.reused["top"])
        assert heard.reused["base"]
        assert contents(killed) == before, f"killed at change {at}"
        shutil.rmtree(killed)
        if not os.WIFSIGNALED(status):
            break
    assert at > 10
    if reused:
        assert all(kept)
    else:  # the old one is there until the new one has logged a step, and not from then on
        assert kept == sorted(kept, reverse=True)
        assert kept[5]
        assert not kept[-1]


class Asking(Brought):
    max_tokens: int
    lora: LoraConfig | None = None


@pytest.mark.parametrize(
    ("override", "message"),
    [("ask.max_tokens=64", "lower max_tokens"), ("ask.lora.rank=33", "lora.rank 33 is more than")],
)
def test_room_in_the_model_of_an_earlier_stage(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known when the stage begins: nothing is touched, and nothing of the stage has been called."""
    asked: list[str] = []
    module = ModuleType("asking_stage")
    vars(module).update(Config=Asking, run=lambda config, context: asked.append(context.stage))
    monkeypatch.setitem(sys.modules, "asking_stage", module)
    monkeypatch.setitem(liubai.stages.KINDS, "asking", "asking_stage")
    base, _, _ = TWO.replace('"toy"', '"moody"').partition("[stages.top]")
    path = written(tmp_path, base + '[stages.ask]\nkind = "asking"\nfrom = "base"\nmax_tokens = 63\n')
    go(path, tmp_path / "out", "ask.lora.rank=32")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        run(load_recipe(path, ["ask.lora.rank=32", override]), tmp_path / "out", heard := Heard())
    assert (contents(tmp_path / "out"), asked, heard.said) == (before, ["ask"], [])


# ---- before the first stage ----

RECIPE = """
[stages.first]
kind = "moody"
steps = 3
[stages.before]
kind = "eval"
model = "model"
max_tokens = 12
[stages.before.questions]
path = "questions.jsonl"
default_verifier = "exact"
[stages.train]
kind = "rl"
model = "model"
steps = 2
max_tokens = 12
[stages.train.questions]
path = "questions.jsonl"
default_verifier = "exact"
"""
TABLE = 'default_verifier = "exact"\n'
TRAIN = 'kind = "rl"\nmodel = "model"\n'
CASES = [
    (TRAIN, 'kind = "rl"\nmodel = "models/mine/one"\n', "no checkpoint folder '{home}/models/mine/one'"),
    (TRAIN, 'kind = "rl"\n', "Or name a model"),
    (TRAIN + "steps = 2\nmax_tokens = 12\n", TRAIN + "steps = 2\nmax_tokens = 64\n", "lower max_tokens"),
    (TRAIN, TRAIN + "lora = {{rank = 33, targets = ['k_proj']}}\n", "lora.rank 33 is more than"),
    (TABLE, TABLE + "eval_share = 1.0\n", "leaves nothing to train on"),
    (TABLE, TABLE + "eval_share = 0.0\n", "holds out no question"),
    (TRAIN, TRAIN + "problems = {{chain = 1.0}}\n", "'questions' and 'problems' are both set"),
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    config = tiny_config(max_position_embeddings=64)
    (home / "model" / "config.json").write_text(json.dumps(config.to_hf()))
    rows = [{"question": f"What is {n} and {n}?", "answer": f"{2 * n}"} for n in range(1, 20)]
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def refusal(home: Path, text: str) -> str:
    path = written(home, text)
    with pytest.raises(UserError) as caught:
        run(load_recipe(path), home / "out", Heard())
    assert not (home / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(("old", "new", "message"), CASES)
def test_what_cannot_work_is_told_before_the_first_stage(
    old: str, new: str, message: str, home: Path
) -> None:
    assert old in RECIPE
    assert message.format(home=home) in refusal(home, RECIPE.replace(old, new.format()))


def test_a_rank_and_a_length_that_just_fit(home: Path) -> None:
    """The stages refuse later, for the model has no weights: the toy before them has worked."""
    fits = RECIPE.replace(TRAIN, TRAIN + "lora = {rank = 32, targets = ['k_proj']}\n")
    with pytest.raises(UserError):
        run(
            load_recipe(written(home, fits.replace("max_tokens = 12", "max_tokens = 63"))),
            home / "out",
            Heard(),
        )
    assert (home / "out" / "1-first" / "DONE").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("eval_share", "0.3"), ("question", '"answer"'), ("keep_out", '["questions.jsonl"]')]
)
def test_tables_that_split_one_file_differently(key: str, value: str, home: Path) -> None:
    said = refusal(home, f"{RECIPE}{key} = {value}\n")
    assert said.startswith(
        f"stages 'before' and 'train' split '{home / 'questions.jsonl'}' differently ({key})"
    )
    assert said.endswith("Write the table word for word in every stage")


def test_what_moves_no_question_may_differ(home: Path) -> None:
    one = Questions(path=str(home / "questions.jsonl"), keep_out=("a.jsonl", "b.jsonl"))
    for key, value in {"default_verifier": "exact", "instruction": "Say it.", "meta": ("a",)}.items():
        assert disagreement(one, one.model_copy(update={key: value})) == ""
    assert disagreement(one, one.model_copy(update={"keep_out": one.keep_out[::-1]})) == ""
    odd = {"path": str(home / "model" / ".." / "questions.jsonl"), "eval_share": 0.5}
    assert disagreement(one, one.model_copy(update=odd)) == "eval_share"
    assert disagreement(one, one.model_copy(update=odd | {"path": "other.jsonl"})) == ""


def test_a_resolved_recipe_names_default_problems(home: Path) -> None:
    recipe = load_recipe(written(home, RECIPE))
    assert "countdown" in recipe.to_toml()
    assert load_recipe(written(home, recipe.to_toml())).stages == recipe.stages


@pytest.mark.parametrize(("fails", "refuses"), [("True", True), ("gold != '8'", False)])
def test_gold_answers_that_nobody_can_judge(fails: str, refuses: bool, home: Path) -> None:
    """All that are tried are errors: that is told. One that is none is enough to begin."""
    path = home / "questions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    code = f"def f(gold, answer, meta):\n    if {fails}:\n        raise ValueError('odd')\n    return True\n"
    (home / "mine.py").write_text(code)
    text = RECIPE.replace(TABLE, 'default_verifier = "mine.py:f"\neval_share = 0.5\n')
    if refuses:
        said = refusal(home, text)
        assert said.startswith(f"{home / 'questions.jsonl'}:1: the gold answer cannot be judged: ")
        assert "odd" in said
        assert said.endswith("run `liubai check` on the questions")
        return
    with pytest.raises(UserError, match=r"model|token"):
        run(load_recipe(written(home, text)), home / "out", Heard())
    assert (home / "out" / "1-first" / "DONE").exists()


def test_a_stage_of_errors_alone_says_so_once(tmp_path: Path) -> None:
    context = Context(tmp_path / "1-x", 0, {}, heard := Heard())
    said = context.folder / "warnings.jsonl"
    right = Verdict(True, "1", {"correct": 1.0, "format": 1.0})
    silent = Verdict(False, None, {"correct": 0.0, "format": 0.0})
    error = Verdict(False, "1", {"correct": 0.0, "format": 1.0}, "it broke")
    for fine in ([], [right], [error] * 8 + [right], [silent] * 8, [error] * 3 + [silent]):
        warn_unjudged(fine, context.warn, said)
    assert heard.said == []
    for _ in range(2):
        warn_unjudged([silent, *[error] * 4], context.warn, said)
    assert heard.said == ["1-x: every verdict was an error: it broke; run `liubai check` on the questions"]
