"""The stages that follow R1-Zero, end to end on a model of a few thousand weights: each does what it says,
and each, killed anywhere, ends in the same bits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Killed, Silent

from liubai.errors import UserError
from liubai.learn.optim import cosine
from liubai.model.checkpoint import load
from liubai.model.scorer import load_scorer
from liubai.stages import distill, dpo, ppo, pretrain, process, reward_model, rl, sample, sft
from liubai.stages.context import Context
from liubai.stages.records import Example, encoded, read_examples, write_examples
from liubai.stages.rollouts import GradedGroup, Rollouts
from liubai.stages.scoring import Preference, checked_steps, with_steps, without_thought
from liubai.stages.supervised import drawn_at
from liubai.text.template import template_for
from liubai.types import Problem, Stop

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
FAMILIES = {"make": 1.0, "total": 1.0, "greater": 2.0, "errand": 1.0}
HABITS = {"blind": 0.3, "patient": 0.5, "methodical": 1.0, "mixed": 0.7, "muttered": 0.3, "careless": 0.3}


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the wide world, and answers to learn from: those of careful writers and of others."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
        config = pretrain.Config(
            steps=200, tokens_per_step=1024, model=SHAPE, families=FAMILIES, habits=HABITS
        )
        pretrain.run(config, Context(folder / "base", 0, {}, Silent()))
        small = pretrain.Config(
            steps=10, tokens_per_step=1024, model=SHAPE | {"hidden_size": 16}, families=FAMILIES
        )
        pretrain.run(small, Context(folder / "small", 0, {}, Silent()))
    (folder / "answers").mkdir()
    examples = sft.careful(FAMILIES, 60, 0)
    graded = []
    for e in examples:
        spoilt = e.response.replace("<answer> ", "<answer> 9 ")
        graded += [e, replace(e, response=spoilt, score=0.0)]
    problems = {(e.prompt): e for e in examples}
    write_examples(folder / "answers" / "examples.jsonl", problems.values())
    write_examples(folder / "answers" / "graded.jsonl", graded)
    return folder


POLICY: dict[str, Any] = {
    "steps": 5, "groups": 3, "samples": 4, "max_tokens": 24, "slots": 8, "lr": 3e-3, "eval_every": 2,
    "eval_problems": 4, "eval_samples": 2, "probes": 1, "save_every": 2,
    "problems": {"greater": 1.0, "errand": 1.0},
    "rewards": {"overlong": -0.5, "overlong_from": 0.0},
}  # fmt: skip

#: name -> (module, config, stages that it comes from, steps at which it is killed)
STAGES: dict[str, tuple[ModuleType, dict[str, Any], tuple[str, ...], tuple[int, ...]]] = {
    "sft": (
        sft,
        {"epochs": 1.5, "batch": 16, "careful": {"errand": 1.0}, "save_every": 2},
        ("base", "answers"),
        (1, 3, 6),
    ),
    "sft with lora": (
        sft,
        {"epochs": 1.0, "batch": 16, "lora": {"rank": 2}, "save_every": 1},
        ("base", "answers"),
        (1, 2),
    ),
    "sample": (
        sample,
        {"problems": {"total": 1.0}, "prompts": 200, "samples": 2, "max_tokens": 40, "slots": 64},
        ("base",),
        (1, 3),
    ),
    "reward model": (
        reward_model,
        {"epochs": 2.0, "batch": 8, "save_every": 3, "pairs": {"balance": False}},
        ("base", "answers"),
        (2, 4, 7),
    ),
    "safety model": (
        reward_model,
        {"epochs": 1.0, "batch": 8, "save_every": 3, "objective": "pointwise", "pairs": {"balance": False}},
        ("base", "answers"),
        (4,),
    ),
    "process model": (process, {"epochs": 2.0, "batch": 16, "save_every": 2}, ("base", "answers"), (1, 3)),
    "dpo": (
        dpo,
        {"epochs": 2.0, "batch": 8, "save_every": 2, "pairs": {"balance": False}},
        ("base", "answers"),
        (1, 3, 6),
    ),
    "ppo": (ppo, POLICY | {"critic_warmup": 1, "lam": 0.9, "critic_epochs": 2}, ("base",), (1, 3, 4)),
    "ppo in flight": (ppo, POLICY | {"critic_warmup": 0, "inflight": True}, ("base",), (3,)),
    "distill": (distill, POLICY, ("small", "base"), (1, 3, 4)),
    "language": (
        rl,
        POLICY
        | {"problems": {"greater": 1.0}}
        | {"rewards": {"language": 1.0, "process": 1.0, "overlong": -0.5}},
        ("base",),
        (3,),
    ),
    "rl with lora": (rl, POLICY | {"lora": {"rank": 2}, "loss": {"kl": 0.1}}, ("base",), (3,)),
}


def run(name: str, wide: Path, folder: Path, kill_at: int | None = None, **changes: Any) -> Path:
    module, options, parents, _ = STAGES[name]
    config = module.Config(**module.Config.filled(options | changes))
    context = Context(folder, 0, {p: wide / p for p in parents}, Silent(kill_at), stage=name)
    try:
        module.run(config, context)
    finally:
        context.close()
    return folder


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """Without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = re.compile(r"time|tokens/s|seconds/.*")
    return [{n: v for n, v in row.items() if not clock.fullmatch(n)} for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "state" not in path.parts and path.name != "metrics.jsonl"
    }


@pytest.fixture(scope="module", params=list(STAGES))
def whole(
    request: pytest.FixtureRequest, wide: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """A stage that was left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
        yield request.param, run(request.param, wide, tmp_path_factory.mktemp("whole") / "stage")


def test_resume_is_bit_exact(whole: tuple[str, Path], wide: Path, tmp_path: Path) -> None:
    name, folder = whole
    for kill_at in STAGES[name][3]:
        with pytest.raises(Killed):
            run(name, wide, tmp_path / "killed", kill_at)
    run(name, wide, tmp_path / "killed")
    assert metrics_of(tmp_path / "killed") == metrics_of(folder)
    assert contents(tmp_path / "killed") == contents(folder)


def test_every_stage_learns_something(whole: tuple[str, Path], wide: Path) -> None:
    """What it leaves differs from what it began with, and every number is one."""
    name, folder = whole
    rows = metrics_of(folder)
    assert rows
    assert all(value is not None for row in rows for value in row.values())
    if name == "sample":
        return
    if (folder / "checkpoint").exists():
        ended = load(folder / "checkpoint")[0]
        began = load(wide / STAGES[name][2][0] / "checkpoint")[0]
        assert any(not torch.equal(p, q) for p, q in zip(began.parameters(), ended.parameters(), strict=True))
    else:
        (made,) = [p for p in folder.iterdir() if p.name in ("reward_model", "process_model")]
        load_scorer(made)


# ---- sft ----


def test_only_answers_are_learned_and_pad_is_not_a_mask(wide: Path) -> None:
    _, tokenizer = load(wide / "base" / "checkpoint")
    template = template_for(tokenizer, wide / "base" / "checkpoint")
    made = encoded(template, Example("3.11 or 3.8", "<think> 3 or 3 same </think> <answer> 3.8 </answer>"))
    text = "<|start|> 3 . 11 or 3 . 8 <think> 3 or 3 same </think> <answer> 3 . 8 </answer> <|end|>"
    assert tokenizer.decode(made.ids) == text
    assert tokenizer.decode([i for i, on in zip(made.ids, made.learn, strict=True) if on]) == (
        "3 or 3 same </think> <answer> 3 . 8 </answer> <|end|>"
    )
    assert made.ids[-1] == tokenizer.pad_id  # the end token, which must be learned, is the padding


def test_each_example_is_read_once_an_epoch() -> None:
    seen = [i for step in range(5) for i in drawn_at(step, 4, 10, seed=0)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_cosine_falls_to_its_floor() -> None:
    curve = [cosine(step, 100, 0.1, 0.1) for step in range(100)]
    assert curve[:10] == pytest.approx([0.1 * (i + 1) for i in range(9)] + [1.0])
    assert curve[10:] == sorted(curve[10:], reverse=True)
    assert curve[-1] == pytest.approx(0.1, abs=1e-3)
    assert curve[55] == pytest.approx(0.55, abs=0.01)


def test_careful_examples_are_right_and_of_the_train_split(wide: Path) -> None:
    from liubai.grade import GradeItem, grade
    from liubai.problems import FAMILIES as ALL
    from liubai.problems.family import problem_at

    made = sft.careful({"make": 1.0, "total": 1.0, "errand": 1.0}, 60, seed=3)
    assert {e.family for e in made} == {"make", "total", "errand"}
    held_out = {problem_at(ALL[n], "eval", 0, i).prompt for n in ("make", "errand") for i in range(200)}
    assert not held_out & {e.prompt for e in made}
    golds = {problem_at(ALL["errand"], "train", 3, i).prompt for i in range(60)}
    for e in (e for e in made if e.family == "errand"):
        assert e.prompt in golds
        assert grade(GradeItem("errand", e.prompt, e.response, {"prefilled": "<think>"})).correct


# ---- sample ----


def test_sampled_examples_are_right_and_readable(wide: Path, tmp_path: Path) -> None:
    folder = run("sample", wide, tmp_path / "sample")
    kept, graded = (read_examples(folder / f"{name}.jsonl") for name in ("examples", "graded"))
    told = json.loads((folder / "sample.json").read_text())
    assert len(graded) == told["asked"] == 400
    assert len(kept) == told["kept"] == 400 - sum(told["dropped"].values())
    missed = told["dropped"]["wrong"] + told["dropped"].get("cut off", 0)
    assert missed == sum(e.score < 1 for e in graded)
    assert kept
    assert all(e.score == 1 for e in kept)
    assert len({(e.prompt, e.response) for e in kept}) == len(kept)
    assert max(sum(e.prompt == k.prompt for e in kept) for k in kept) == 1


def test_rewriting_translates_the_thought_alone() -> None:
    response = "uh 3 还是 3 same 再 80 or 11 得 80 </think> <answer> 3.8 </answer>"
    assert sample.rewritten(response, "en") == (
        "3 or 3 same then 80 or 11 is 80 </think> <answer> 3.8 </answer>"
    )
    assert sample.rewritten(response, "zh") == (
        "3 还是 3 一样 再 80 还是 11 得 80 </think> <answer> 3.8 </answer>"
    )


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("3 or 3 same then 11 or 80 is 80 </think> <answer> 3.8 </answer>", ""),
        ("3 or 3 same then 11 or 80 is 11 </think> <answer> 3.8 </answer>", "unsound"),
        ("3 or 3 一样 then 11 or 80 is 80 </think> <answer> 3.8 </answer>", "mixed language"),
    ],
)
def test_why_an_answer_is_no_example(response: str, why: str) -> None:
    config = sample.Config(prompts=1, sound=True)
    problem = Problem("3.11 or 3.8", "3.8", "number", "greater", "en")
    assert sample.faults(problem, response, 1.0, config) == why
    assert sample.faults(problem, response, 0.9, config) == "wrong"


def test_nothing_kept_is_said(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kept none of 6 answers \(6 cut off\); ask more, or filter less"):
        run("sample", wide, tmp_path / "s", problems={"make": 1.0}, prompts=3, max_tokens=2)


# ---- reward models ----


def test_a_reward_model_tells_good_from_bad_and_never_sees_the_thought(wide: Path, tmp_path: Path) -> None:
    folder = run("reward model", wide, tmp_path / "rm", epochs=12.0, lr=3e-3)
    assert metrics_of(folder)[-1]["eval/accuracy"] >= 0.8
    judge = Preference(folder / "reward_model", torch.device("cpu"))
    problem = Problem("please greet ben", "please greet ben", "errand", "errand")
    said = ["</think> <answer> gladly hello ben </answer>", "</think> <answer> 9 gladly hello ben </answer>"]
    good, bad = judge([(problem, text) for text in said])
    assert good > bad
    # alone, and not in one batch with another: the same but for rounding
    assert judge([(problem, f"wait uh {said[0]}")]) == pytest.approx([good], abs=1e-5)
    assert all(-3 <= score <= 3 for score in (good, bad))


def test_what_a_reward_model_reads(wide: Path) -> None:
    path = wide / "base" / "checkpoint"
    template = template_for(load(path)[1], path)
    read = without_thought(template, "please greet ben", "uh greet </think> <answer> hello ben </answer>")
    assert template.tokenizer.decode(read.ids) == (
        "<|start|> please greet ben <think> </think> <answer> hello ben </answer> <|end|>"
    )


# ---- process models ----


def test_marks_stand_on_the_last_token_of_each_step(wide: Path) -> None:
    path = wide / "base" / "checkpoint"
    template = template_for(load(path)[1], path)
    problem = Problem("3.11 or 3.8", "3.8", "number", "greater", "en")
    response = "uh 3 or 3 same then 11 or 80 is 11 </think> <answer> 3.8 </answer>"
    made = with_steps(template, problem, response)
    # aligned with what predicts: a mark at i + 1 is read at i
    read = [i - 1 for i, on in enumerate(made.learn) if on]
    before = [template.tokenizer.decode(made.ids[: i + 1]).rpartition("<think> ")[2] for i in read]
    assert before == ["uh 3 or 3 same", "uh 3 or 3 same then 11 or 80 is 11"]
    assert [made.values["right"][i + 1] for i in read] == [1.0, 0.0]
    assert checked_steps([(problem, response), (problem, "</think> <answer> 3.8 </answer>")]) == [0.5, 0.0]


# ---- what does not fit together ----


@pytest.mark.parametrize(
    ("name", "parents", "said"),
    [
        ("sft", ("base",), "has no examples to learn from"),
        ("dpo", ("base",), "has no pairs to learn from"),
        ("reward model", ("base",), "has no pairs to learn from"),
        ("process model", ("base",), "has no steps to learn from"),
        ("distill", ("base",), "needs a student and a teacher"),
    ],
)
def test_a_stage_says_what_it_lacks(
    name: str, parents: tuple[str, ...], said: str, wide: Path, tmp_path: Path
) -> None:
    module, options, _, _ = STAGES[name]
    config = module.Config(**{k: v for k, v in options.items() if k != "careful"})
    with pytest.raises(UserError, match=said):
        module.run(config, Context(tmp_path / "s", 0, {p: wide / p for p in parents}, Silent(), stage=name))


def test_a_preference_needs_a_reward_model(wide: Path, tmp_path: Path) -> None:
    said = r"needs a reward model .*for rewards\.preference, .*names \(base\), 0 wrote one"
    with pytest.raises(UserError, match=said):
        run("language", wide, tmp_path / "s", rewards={"preference": 1.0})


def test_rewards_of_a_family_are_its_own(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errands earn what the reward model says and nothing else, comparisons what the rule says."""
    seen: list[GradedGroup] = []
    collect = Rollouts.collect

    def watched(self: Rollouts, groups: int) -> list[GradedGroup]:
        found = collect(self, groups)
        seen.extend(found)
        return found

    monkeypatch.setattr(Rollouts, "collect", watched)
    rm = run("reward model", wide, tmp_path / "rm")
    nothing = {"correct": 0.0, "wrong": 0.0, "no_answer": 0.0, "format": 0.0, "overlong": 0.0}
    config = rl.Config(
        **POLICY
        | {"rewards": {"correct": 1.0, "wrong": -1.0, "no_answer": -0.5, "format": 0.0}}
        | {"rewards_of": {"errand": {**nothing, "preference": 2.0}}}
        | {"steps": 1, "groups": 8, "max_tokens": 40}
    )
    inputs: Mapping[str, Path] = {"base": wide / "base", "rm": rm}
    rl.run(config, Context(tmp_path / "rl", 0, inputs, Silent(), stage="rl"))
    judge = Preference(rm / "reward_model", torch.device("cpu"))
    assert {g.group.problem.family for g in seen} == {"errand", "greater"}
    scores, ruled = set(), set()
    for g in seen:
        for answer, reward in zip(g.answers, g.group.rewards, strict=True):
            parts = {name: value for name, value in reward.parts.items() if value}
            if g.group.problem.family == "errand":
                (score,) = judge([(g.group.problem, answer.response)])
                assert parts == pytest.approx({"preference": 2 * score} if score else {}, abs=1e-4)
                scores.add(round(score, 3))
            else:
                right, usable = answer.verdict.correct, answer.verdict.answer is not None
                ended = answer.sample.stop is Stop.EOS
                wanted = (1.0 if right else -1.0) if usable and ended else -0.5
                assert parts == {{1.0: "correct", -1.0: "wrong", -0.5: "no_answer"}[wanted]: wanted}
                ruled.add(wanted)
            assert reward.total == pytest.approx(sum(parts.values()))
    assert len(scores) > 2
    assert len(ruled) > 1
