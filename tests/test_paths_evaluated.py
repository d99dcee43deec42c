"""Evaluation by several paths: what it says of them, and for how much."""

from __future__ import annotations

import json
from pathlib import Path as Folder

import pytest
from conftest import Silent
from searching import TEMPLATE, local
from typer.testing import CliRunner

from liubai.cli import app
from liubai.errors import UserError
from liubai.problems import family
from liubai.problems.family import distinct_problems
from liubai.recipe.recipe import load_recipe
from liubai.rollout.paths import PathsConfig
from liubai.stages import evaluate
from liubai.stages.by_paths import Way, answers_by, described, way_of
from liubai.stages.context import Context


def evaluation_of(way: Way | None, base: Folder, samples: int = 3) -> evaluate.Evaluation:
    problems = distinct_problems(family("countdown"), "eval", 0, 3)
    return evaluate.answered(base / "checkpoint", problems, samples, 24, 1.0, 1.0, 5, slots=16, way=way)


def test_one_draw_is_the_plain_evaluation(base: Folder) -> None:
    plain, drawn = evaluation_of(None, base), evaluation_of(Way(PathsConfig()), base)
    assert [[s.completion_ids for s in row] for row in drawn.samples] == [
        [s.completion_ids for s in row] for row in plain.samples
    ]
    assert drawn.verdicts == plain.verdicts
    figures = drawn.summary()
    assert figures["tokens_spent"] == figures["mean_tokens"] == plain.summary()["mean_tokens"]
    assert {
        k: v for k, v in figures.items() if not k.startswith(("tokens_s", "tokens_read", "tokens_j", "sec"))
    } == (plain.summary())
    assert drawn.of("countdown").summary()["tokens_spent"] == figures["tokens_spent"]
    assert plain.of("countdown").summary() == plain.summary()


def test_repeats_have_seeds_of_their_own_and_settled_ways_have_none(base: Folder) -> None:
    voted = evaluation_of(Way(PathsConfig.parse("vote:4")), base)
    assert voted.summary()["samples"] == 3
    assert voted.summary()["tokens_spent"] > 3 * voted.summary()["mean_tokens"]
    assert len({s.completion_ids for row in voted.samples for s in row}) > 3
    for name in ("greedy", "beam:2"):
        settled = evaluation_of(Way(PathsConfig.parse(name)), base)
        assert settled.summary()["samples"] == 1
        assert "stderr" in settled.summary()


def test_evaluations_without_paths_keep_their_fingerprints(tmp_path: Folder) -> None:
    """What was finished before there were paths is taken over by --reuse as before."""
    plain = evaluate.Config(problems="countdown")
    assert not {"paths", "thinking_budget", "think_at_least"} & plain.model_dump(mode="json").keys()
    assert evaluate.Config(thinking_budget=0).model_dump(mode="json")["thinking_budget"] == 0
    text = '[stages.e]\nkind = "eval"\nmodel = "x"\n'
    (tmp_path / "a.toml").write_text(text + 'paths = "vote:4"\n', encoding="utf-8")
    (tmp_path / "b.toml").write_text(text + 'paths = { kind = "vote", n = 4 }\n', encoding="utf-8")
    (tmp_path / "c.toml").write_text(text + 'paths = "vote:5"\n', encoding="utf-8")
    recipes = [load_recipe(tmp_path / f"{name}.toml") for name in "abc"]
    configs = [r.stages[0].config for r in recipes]
    assert isinstance(configs[0], evaluate.Config)
    assert configs[0].paths == PathsConfig(kind="vote", n=4)
    assert configs[0] == configs[1] != configs[2]
    (tmp_path / "again.toml").write_text(recipes[0].to_toml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.toml").stages[0].config.model_dump() == configs[0].model_dump()
    (tmp_path / "bad.toml").write_text(text + 'paths = "votes:4"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"stages.e.paths.*did you mean 'vote'"):
        load_recipe(tmp_path / "bad.toml")


def test_a_stage_by_paths_says_how_and_for_how_much(base: Folder, tmp_path: Folder) -> None:
    config = evaluate.Config(
        limit=3, samples=2, max_tokens=24, slots=16, paths=PathsConfig.parse("tree:2"), thinking_budget=8
    )
    context = Context(tmp_path / "2-eval", 0, {"base": base}, Silent())
    context._tensorboard = lambda step, metrics: None  # type: ignore[method-assign]
    evaluate.run(config, context)
    figures = json.loads((tmp_path / "2-eval" / "eval.json").read_text(encoding="utf-8"))
    assert figures["way"] == {
        "name": "tree:2", "kind": "tree", "number": 2, "by": "rollouts", "thinking_budget": 8,
        "think_at_least": 0,
    }  # fmt: skip
    assert figures["tokens_spent"] > figures["mean_tokens"] > 0
    assert figures["seconds"] > 0


def test_what_was_left_open_is_said() -> None:
    there = {"process": Folder("p"), "preference": Folder("q")}
    cases: list[tuple[str, dict[str, Folder], str | None]] = [
        ("best:2", {}, "preference"),
        ("best:2", there, "process"),
        ("best:2:preference", there, "preference"),
        ("tree", {}, "rollouts"),
        ("tree", there, "process"),
        ("tree:4:rollouts", there, "rollouts"),
        ("vote", there, None),
    ]
    for name, judges, by in cases:
        assert described(Way(PathsConfig.parse(name), judges=judges))["by"] == by  # type: ignore[arg-type]


def test_judges_are_told_apart_by_their_folders(tmp_path: Folder) -> None:
    for name, files in {"a": ["config.json"], "b": ["config.json", "calibration.json"], "c": []}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}", encoding="utf-8")
    a, b, c = (tmp_path / name for name in "abc")
    way = way_of("best:4", [a, b])
    assert way is not None
    assert way.judges == {"process": a, "preference": b}
    assert way_of(None, []) is None
    with pytest.raises(UserError, match="both process"):
        way_of("best:4", [a, a])
    with pytest.raises(UserError, match="no model that judges"):
        way_of("best:4", [c])
    with pytest.raises(UserError, match="--paths best:8"):
        way_of(None, [a])


def test_the_command(base: Folder) -> None:
    asked = ["eval", str(base / "checkpoint"), "--problems", "countdown", "--limit", "2", "--samples", "2"]
    asked += ["--max-tokens", "16", "--json", "--device", "cpu"]
    result = CliRunner().invoke(app, [*asked, "--paths", "vote:3"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert figures["paths"] == "vote:3"
    assert figures["tokens_spent"] > figures["mean_tokens"]
    wrong = CliRunner().invoke(app, [*asked, "--paths", "vote:x"])
    assert isinstance(wrong.exception, UserError)
    assert "paths" not in json.loads(CliRunner().invoke(app, asked).output)


def test_progress_counts_answers() -> None:
    writer, told = local(), list[tuple[int, int]]()
    problems = distinct_problems(family("countdown"), "eval", 0, 2)
    answers_by(
        Way(PathsConfig.parse("vote:2")), writer, TEMPLATE, problems, samples=2, max_tokens=8,
        temperature=1.0, top_p=1.0, seed=0, progress=lambda *at: told.append(at),
    )  # fmt: skip
    assert told == [(i, 4) for i in range(1, 5)]
