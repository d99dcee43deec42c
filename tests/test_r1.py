"""The recipe of R1 as it is shipped, with small numbers: every stage finds what it needs, and hands it on."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Silent

from liubai import recipe
from liubai.model.checkpoint import load
from liubai.problems.source import source_of
from liubai.recipe.recipe import Recipe, load_recipe
from liubai.report import headline, write_report
from liubai.seeds import derive
from liubai.stages import evaluate
from liubai.stages.context import Context, read_done
from liubai.stages.policy import PolicyConfig
from liubai.stages.records import read_examples

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
#: experiments on another world
OWN_BASE = {"arise", "impatient", "crate", "crate-text", "verse"}
#: and those that ask no questions: they look at text that was not read
TEXT = {"crate-text"}
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "head_dim": 24}
SMALL = {
    "pretrain": {"steps": 150, "tokens_per_step": 1024, **{f"model.{k}": v for k, v in SHAPE.items()}},
    "eval": {"limit": 24, "samples": 2, "max_tokens": 32},
    "rl": {"steps": 2, "groups": 8, "samples": 4, "max_tokens": 32, "slots": 32, "eval_problems": 4},
    "distill": {"steps": 2, "groups": 8, "samples": 2, "max_tokens": 32, "slots": 32, "eval_problems": 4},
    "sample": {"prompts": 128, "max_tokens": 32, "keep": 4},
    "sft": {"epochs": 1.0},
    "reward_model": {"epochs": 1.0, "pairs.balance": "false"},
}


def small(name: str) -> Recipe:
    """A shipped recipe with the numbers above."""
    plans = load_recipe(RECIPES / name).stages
    sets = [f"{p.name}.{key}={value}" for p in plans for key, value in SMALL.get(p.kind, {}).items()]
    # this small, no model does a whole errand; the reward model needs the scores alone
    sets += ["liked.least=0.01" for p in plans if p.name == "liked"]
    return load_recipe(
        RECIPES / name, [*(s.replace("True", "true").replace("False", "false") for s in sets), "threads=0"]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
        recipe.run(small("r1.toml"), out / "r1", Silent())
        view = Silent()
        recipe.run(small("distill.toml"), out / "distill", view, [out / "r1"])
        assert any("1-base: taken from" in w for w in view.warnings), "the two recipes share a base"
        yield {"r1": out / "r1", "distill": out / "distill"}


def folders(run: Path) -> dict[str, Path]:
    return {f.name.partition("-")[2]: f for f in run.iterdir() if (f / "DONE").exists()}


def test_every_stage_is_done_and_its_checkpoint_opens(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        done = folders(run)
        assert set(done) == {plan.name for plan in small(f"{name}.toml").stages}
        for folder in (f for f in done.values() if (f / "checkpoint").exists()):
            assert all(torch.isfinite(p).all() for p in load(folder / "checkpoint")[0].parameters())


def test_each_evaluation_has_the_table_of_the_paper(runs: dict[str, Path]) -> None:
    labels = []
    for folder in (f for name, f in folders(runs["r1"]).items() if name.startswith("eval-")):
        told = json.loads((folder / "eval.json").read_text())
        assert set(told["families"]) == {"make", "total", "greater", "solve", "passage", "errand"}
        assert told["n_problems"] == 24
        assert {"language", "readable", "score", "unsound"} <= told.keys()
        mean = sum(e["pass@1"] * e["n_problems"] for e in told["families"].values()) / 24
        assert told["pass@1"] == pytest.approx(mean)
        assert ("win_rate" in told) == (told["label"] == "R1")
        labels.append(told["label"])
    assert sorted(labels) == ["Base", "Dev1", "Dev2", "Dev3", "R1", "Zero"]


def test_the_last_is_compared_with_dev3(runs: dict[str, Path]) -> None:
    told = json.loads((folders(runs["r1"])["eval-r1"] / "eval.json").read_text())
    assert told["against"] == "Dev3"
    assert 0 <= told["win_rate"] <= 1


def test_cold_start_examples_are_of_one_language(runs: dict[str, Path]) -> None:
    from liubai.grade.language import consistency
    from liubai.stages.rollouts import thought

    kept = read_examples(folders(runs["r1"])["cold"] / "examples.jsonl")
    assert kept
    for e in kept:
        assert consistency(thought(e.response), e.language, empty=1.0) == 1.0, e


def test_what_a_stage_learned_from_reaches_it(runs: dict[str, Path]) -> None:
    """Three examples of earlier stages to one of the careful writers."""
    done = folders(runs["r1"])
    kept = len(read_examples(done["kept"] / "examples.jsonl"))
    steps = len((done["dev3"] / "metrics.jsonl").read_text().splitlines())
    assert steps == max(1, round((kept + round(kept / 3)) / 32))


def test_the_report_shows_the_stages(runs: dict[str, Path]) -> None:
    page = write_report(runs["r1"]).read_text()
    for label in ("Base", "Zero", "Dev1", "Dev2", "Dev3", "R1"):
        assert label in page
    assert "Stage by stage" in page
    assert "R1" in headline(runs["r1"])


def test_a_second_run_does_nothing(runs: dict[str, Path]) -> None:
    before = {name: read_done(folder) for name, folder in folders(runs["r1"]).items()}
    stamps = {name: (f / "DONE").stat().st_mtime_ns for name, f in folders(runs["r1"]).items()}
    recipe.run(small("r1.toml"), runs["r1"], Silent())
    assert before == {name: read_done(folder) for name, folder in folders(runs["r1"]).items()}
    assert stamps == {name: (f / "DONE").stat().st_mtime_ns for name, f in folders(runs["r1"]).items()}


@pytest.mark.parametrize("path", sorted((RECIPES / "experiments").glob("*.toml")), ids=lambda p: p.stem)
def test_every_experiment_is_a_recipe_and_shares_the_base(path: Path) -> None:
    """But for those that are about another base."""
    plan, base = load_recipe(path), load_recipe(RECIPES / "r1.toml").stages[0]
    assert plan.name == path.stem
    assert (plan.stages[0].config == base.config) == (path.stem not in OWN_BASE)
    looks = [p for p in plan.stages if p.kind in ("eval", "attention") or getattr(p.config, "texts", None)]
    assert len(looks) >= 2


def test_the_instruments_look_at_r1_itself() -> None:
    """``--reuse`` takes all of its stages from there: they are the same, and the first."""
    inside, whole = (load_recipe(RECIPES / name) for name in ("experiments/inside.toml", "r1.toml"))
    assert inside.stages[: len(whole.stages)] == whole.stages
    assert (inside.seed, inside.threads) == (whole.seed, whole.threads)
    kinds = {p.kind for p in inside.stages[len(whole.stages) :]}
    assert kinds == {"hallucination", "bridge", "attention", "scaling"}
    asked = {(p.parents[0], p.config.blank) for p in inside.stages if p.kind == "hallucination"}
    made = {p.name for p in whole.stages if p.kind in ("pretrain", "sft", "rl")}
    assert asked == {(name, blank) for name in made for blank in (True, False)}


def test_the_faithfulness_reward_is_all_that_tells_its_arms_apart() -> None:
    whole = {p.name: p for p in load_recipe(RECIPES / "r1.toml").stages}
    plan = {p.name: p for p in load_recipe(RECIPES / "experiments/faithful.toml").stages}
    assert [plan[name] for name in ("base", "zero", "eval-zero")] == [
        whole[n] for n in ("base", "zero", "eval-zero")
    ]
    form, faithful = (plan[name].config.rewards_of["passage"] for name in ("form", "faithful"))
    assert (form.faithful, faithful.faithful) == (0.0, 2.0)
    assert faithful.model_copy(update={"faithful": 0.0}) == form
    alike = [
        plan[name].config.model_copy(update={"rewards_of": {}}) for name in ("form", "faithful", "whole")
    ]
    assert alike[0] == alike[1] == alike[2]


@functools.cache
def generated(shares: tuple[tuple[str, float], ...], limit: int, seed: int) -> int:
    return len(evaluate.held_out_of(dict(shares), limit, seed))


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("*.toml")) + sorted(RECIPES.glob("experiments/*.toml")), ids=lambda p: p.stem
)
def test_there_are_as_many_held_out_problems_as_a_recipe_asks(path: Path) -> None:
    """A family has only so many that differ: found out here, not after hours of the stages before."""
    plan = load_recipe(path)
    looked = 0
    for config in (p.config for p in plan.stages):
        if isinstance(config, evaluate.Config):
            shares, limit, seed = config.problems, config.limit, derive(plan.seed, "eval")
        elif isinstance(config, PolicyConfig):
            shares, limit, seed = config.problems, config.eval_problems, 0
        else:
            continue
        looked += 1
        if config.questions:
            asked = len(source_of({}, config.questions).held_out(limit))
        else:
            shares = {shares: 1.0} if isinstance(shares, str) else shares
            asked = generated(tuple(shares.items()), limit, seed)
        assert asked == pytest.approx(limit, abs=len(shares))  # each family's share is rounded
    assert looked or path.stem in TEXT
