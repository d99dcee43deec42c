"""The reward for saying what the passage says: which answers earn it, which problems may ask for it, and that
nobody who does not ask for it notices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Silent
from scripted_engine import ScriptedEngine

import liubai.stages.rl as rl
from liubai.errors import UserError
from liubai.grade import GraderPool, RewardWeights
from liubai.problems import world_vocabulary
from liubai.recipe import load_recipe
from liubai.rollout.engine import Request
from liubai.stages import pretrain
from liubai.stages.context import Context
from liubai.stages.rl_metrics import rollout_metrics
from liubai.stages.rollouts import Rollouts, passage_of, supported
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import word_level
from liubai.types import Problem, Stop

PASSAGE = Problem(
    "anna has 3 red cups . ben has 5 blue hats . summarise",
    "anna 3 cups , ben 5 hats",
    "summary",
    "passage",
)
SUM = Problem("total a 3 b 4", "7", "number", "total")
#: what is said, and how much of it is true; the last copies the passage, which has 13 words: 9¾ are a summary
SAID = [
    ("anna 3 cups , ben 5 hats", 1.0),
    ("anna 3 cups", 1.0),
    ("anna 3 cups , ben 4 hats", 0.5),
    ("ben 4 hats", 0.0),
    ("anna has 3 red cups , ben has 5 blue hats , anna 3 cups", 0.75 * 13 / 15),
]


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


# ---- which answers ----


@pytest.mark.parametrize(("said", "share"), SAID)
def test_the_share_of_what_is_said_that_is_true(said: str, share: float) -> None:
    response = f"anna 3 cups </think> <answer> {said} </answer>"
    assert supported([(PASSAGE, response)], "<think>") == pytest.approx([share])


@pytest.mark.parametrize(
    "response", ["", "anna 3 cups", "<answer> anna 3 cups </answer>", "</think> anna 3 cups", "</think>"]
)
def test_who_says_nothing_is_faithful_to_nothing(response: str) -> None:
    """A thought is no answer, nor is what stands outside of the tags."""
    assert supported([(PASSAGE, response)], "<think>") == [0.0]


def test_without_a_thought_the_tags_say_what_is_the_answer() -> None:
    assert supported([(PASSAGE, "<answer> anna 3 cups </answer>")], "<think> </think>") == [1.0]


def test_where_the_passage_is() -> None:
    prose = "The harbour was closed for two days."
    assert passage_of(PASSAGE) == PASSAGE.prompt
    assert passage_of(Problem("Sum up.", prose, "faithful", "questions")) == prose
    assert passage_of(Problem("Why?", "B", "choice", "questions", meta={"passage": prose})) == prose
    for meta in ({}, {"passage": " "}, {"passage": 3}):
        assert passage_of(Problem("Why?", "B", "choice", "questions", meta=meta)) is None
    with pytest.raises(UserError, match=r"'total a 3 b 4' is faithful to: .* the family passage"):
        supported([(SUM, "</think> <answer> 7 </answer>")])


def test_the_problem_may_ask_for_more_and_has_to_ask_in_order() -> None:
    """``covers`` and ``words`` are those of the verifier ``faithful``."""
    prose = "The storm closed the harbour on Monday and the ferries stayed in port until Friday."
    response = "</think> <answer> The storm closed the harbour. </answer>"
    asked = [
        Problem("Why?", "B", "choice", "questions", meta={"passage": prose, **more})
        for more in ({}, {"covers": 1.0})
    ]
    plain, more = supported([(problem, response) for problem in asked], "<think>")
    assert plain == 1.0
    assert 0.2 < more < 0.8
    wrong = Problem("Why?", "B", "choice", "questions", meta={"passage": prose, "covers": 2})
    with pytest.raises(UserError, match=r"rewards.faithful: .*covers.*at 'Why\?'"):
        supported([(wrong, response)], "<think>")


# ---- from an answer to its reward ----


def said(request: Request) -> tuple[str, Stop]:
    """``SAID`` about passages, a number about sums; every seventh answer is cut off."""
    text = f"then </think> <answer> {SAID[request.id % len(SAID)][0]} </answer>"
    return text, Stop.LENGTH if request.id % 7 == 0 else Stop.EOS


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    with GraderPool() as pool:
        yield pool


def test_every_answer_earns_its_own_share_and_sums_earn_none(pool: GraderPool) -> None:
    tokenizer = word_level(world_vocabulary({"passage": 1.0, "total": 1.0}))
    plain = RewardWeights(correct=0.0, wrong=0.0, no_answer=-1.0)
    rollouts = Rollouts(
        ScriptedEngine(tokenizer, said),
        Template(tokenizer, BARE),
        lambda index: (PASSAGE, SUM)[index % 2],
        pool,
        samples=4,
        max_tokens=40,
        temperature=1.0,
        seed=0,
        weights=plain,
        weights_of={"passage": plain.model_copy(update={"faithful": 2.0})},
    )
    graded = [g for _ in range(3) for g in rollouts.collect(6)]
    seen, shares = 0, []
    for g in graded:
        for j, (answer, reward) in enumerate(zip(g.answers, g.group.rewards, strict=True)):
            number = g.index * 4 + j
            cut = number % 7 == 0
            assert reward.parts["no_answer"] == (-1.0 if cut else 0.0)
            if g.group.problem is SUM:
                assert "faithful" not in reward.parts
                assert "faithful" not in answer.findings
                continue
            share = SAID[number % len(SAID)][1]
            shares.append(share)
            assert reward.parts["faithful"] == pytest.approx(0.0 if cut else 2 * share)
            assert reward.total == pytest.approx(sum(reward.parts.values()))
            seen += 1
    assert seen == 36
    told = rollout_metrics(graded, version=0)
    assert told["faithful/score"] == pytest.approx(sum(shares) / len(shares)), "before any weight"
    assert told["reward/faithful"] > 0


# ---- which stages ----


def made(families: Mapping[str, float], folder: Path) -> Path:
    shape = pretrain.ModelShape(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    config = pretrain.Config(steps=40, tokens_per_step=1024, model=shape, families=dict(families))
    pretrain.run(config, Context(folder, 0, {}, Silent()))
    return folder


SMALL: dict[str, Any] = {
    "steps": 2, "groups": 4, "samples": 4, "max_tokens": 40, "slots": 16, "eval_problems": 4,
    "eval_samples": 1, "probes": 0,
}  # fmt: skip


def test_a_stage_asks_for_it_where_there_are_passages(tmp_path: Path) -> None:
    base = made({"passage": 1.0, "total": 1.0}, tmp_path / "1-base")
    both = {"passage": 1.0, "total": 1.0}
    wrong = rl.Config(**SMALL, problems=both, rewards=RewardWeights(faithful=1.0))
    with pytest.raises(UserError, match=r"rewards.faithful = 1.0, and total has no passages"):
        rl.run(wrong, Context(tmp_path / "2-rl", 0, {"base": base}, Silent()))
    right = rl.Config(**SMALL, problems=both, rewards_of={"passage": RewardWeights(faithful=1.0)})
    folder = tmp_path / "3-rl"
    rl.run(right, Context(folder, 0, {"base": base}, Silent()))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["faithful/score"] <= 1 for row in rows[1:])


def test_who_does_not_ask_for_it_is_the_stage_that_it_was() -> None:
    assert "faithful" not in RewardWeights().model_dump(mode="json")
    asked = RewardWeights(faithful=0.5)
    assert RewardWeights(**asked.model_dump(mode="json")) == asked
    recipe = load_recipe(Path(__file__).resolve().parent.parent / "recipes/r1.toml")
    assert "faithful" not in recipe.to_toml()
