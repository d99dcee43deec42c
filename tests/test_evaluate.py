"""The figures of an evaluation, by hand; its rows; the control without the blank; no leak of eval."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import tiny_config, tiny_model

from liubai.errors import UserError
from liubai.grade import Verdict
from liubai.model.config import ModelConfig
from liubai.problems import family, world_vocabulary
from liubai.problems.family import distinct_problems, split_of
from liubai.rollout.torch_engine import TorchEngine
from liubai.stages import pretrain
from liubai.stages.evaluate import Evaluation, evaluate
from liubai.stages.rollouts import without_blank
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import word_level
from liubai.types import Problem, Sample, Span, Stop


def sample(tokens: int, stop: Stop = Stop.EOS) -> Sample:
    return Sample((1,), (2,) * tokens, (-1.0,) * tokens, stop, (Span(0, tokens),))


def verdict(correct: bool, answer: str | None, formatted: bool = True) -> Verdict:
    return Verdict(correct, answer, {"correct": float(correct), "format": float(formatted)})


def test_summary_by_hand() -> None:
    """Two problems, three answers: right, wrong, cut off though right; nothing, wrong, wrong."""
    result = Evaluation(
        [Problem("a", "1", "exact"), Problem("b", "2", "exact")],
        [[sample(10), sample(20), sample(30, Stop.LENGTH)], [sample(4), sample(6), sample(8)]],
        [["wait wait</think>", "x</think>", "wait"], ["</think>wait", "</think>", "check</think>"]],
        [
            [verdict(True, "1"), verdict(False, "3"), verdict(True, "1")],
            [verdict(False, None, False), verdict(False, "5"), verdict(False, "5")],
        ],
    )
    figures = result.summary()
    assert figures["pass@1"] == pytest.approx(1 / 6)
    assert figures["pass@3"] == pytest.approx(1 / 2)
    assert figures["cons@3"] == pytest.approx(1 / 2)  # "1" twice against "3"; then "5" twice
    assert figures["mean_tokens"] == 13
    assert (figures["tokens_right"], figures["tokens_wrong"]) == (10, pytest.approx(68 / 5))
    assert figures["format"] == pytest.approx(4 / 6)
    assert figures["reflections"] == pytest.approx(4 / 6)
    assert figures["truncated"] == pytest.approx(1 / 6)
    assert (figures["n_problems"], figures["samples"]) == (2, 3)
    assert figures["pass@k"] == {"1": pytest.approx(1 / 6), "2": pytest.approx(1 / 3)}
    assert figures["stderr"] == pytest.approx(1 / 6)
    assert result.as_metrics()["eval/pass@k"] == figures["pass@3"]


def test_one_problem_and_nothing_right_is_still_json() -> None:
    result = Evaluation([Problem("a", "1", "exact")], [[sample(3)]], [["x"]], [[verdict(False, "2")]])
    figures = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert figures["stderr"] is None
    assert figures["tokens_right"] is None


def test_row_i_belongs_to_problem_i() -> None:
    tokenizer = word_level(world_vocabulary())
    config: ModelConfig = tiny_config(vocab_size=tokenizer.vocab_size)
    model = tiny_model(1, config)
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=5, max_length=64)
    engine.load(model.state_dict(), version=0)
    template = Template(tokenizer, BARE)
    problems = distinct_problems(family("countdown"), "eval", 0, 4)
    result = evaluate(engine, template, problems, samples=3, max_tokens=9, temperature=1.0, seed=5)
    for problem, row, responses in zip(problems, result.samples, result.responses, strict=True):
        assert len(row) == 3
        for s, response in zip(row, responses, strict=True):
            assert s.prompt_ids == tuple(template.prompt_ids(problem.prompt))
            assert response == tokenizer.decode(s.completion_ids[: len(s.completion_ids) - (s.stop == "eos")])


def test_held_out_problems_are_all_different() -> None:
    countdown = family("countdown")
    problems = distinct_problems(countdown, "eval", 1, 200)
    assert len({countdown.key(p) for p in problems}) == 200
    assert problems[:50] == distinct_problems(countdown, "eval", 1, 50)


def test_a_family_without_so_many_problems_says_how_many() -> None:
    class Few:
        name = "few"

        def sample(self, rng: random.Random) -> Problem:
            return Problem(str(rng.randrange(40)), "0", "exact")

        def key(self, problem: Problem) -> str:
            return problem.prompt

    held_out = [str(i) for i in range(40) if split_of(f"few/{i}") == "eval"]
    found = distinct_problems(Few(), "eval", 1, len(held_out))  # type: ignore[arg-type]
    assert sorted(p.prompt for p in found) == sorted(held_out)
    with pytest.raises(UserError, match=f"'few' has only about {len(held_out)} eval problems, not 41"):
        distinct_problems(Few(), "eval", 1, 41)  # type: ignore[arg-type]


def test_the_corpus_never_shows_an_eval_problem() -> None:
    config = pretrain.Config(
        steps=1, tokens_per_step=20_000, families={"countdown": 1.0, "chain": 1.0, "compare": 1.0}
    )
    tokenizer, draw = pretrain.invent(config)
    seen = [tokenizer.decode(s.ids).partition(" <think>")[0] for s in pretrain.documents(draw, 20_000, 0, 0)]
    prompts = {text.removeprefix(f"{tokenizer.bos} ") for text in seen}
    assert len(prompts) > 300
    for name in config.families:
        kind = family(name)
        held_out = {
            tokenizer.decode(tokenizer.encode(p.prompt)) for p in distinct_problems(kind, "eval", 0, 150)
        }
        assert not prompts & held_out
    countdown = family("countdown")
    for prompt in prompts:
        if "->" in prompt:
            key = countdown.key(Problem(prompt, prompt, "countdown"))
            assert split_of(f"countdown/{key}") == "train"


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        (" <answer> 3 + 4 </answer>", True),
        ("<answer>3</answer>", True),
        ("3 + 4 =7 wait <answer> 3 </answer>", False),
        ("<think> 3 + 4 =7 </think> <answer> 3 </answer>", False),
    ],
)
def test_without_the_blank_nobody_thinks_elsewhere(response: str, kept: bool) -> None:
    before = verdict(True, "3")
    after = without_blank(before, response)
    assert (after == before) == kept
    if not kept:
        assert (after.correct, after.answer, after.parts["correct"]) == (False, None, 0.0)


def test_a_template_is_found_in_either_place(tmp_path: Path) -> None:
    from liubai.text.template import THINK_ANSWER, template_for

    tokenizer = word_level(world_vocabulary())
    assert template_for(tokenizer, tmp_path).source == THINK_ANSWER
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A {{ messages[-1].content }}"}))
    assert template_for(tokenizer, tmp_path).source.startswith("A ")
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "B {{ messages }}"}]}))
    assert template_for(tokenizer, tmp_path).source.startswith("B ")
    (tmp_path / "chat_template.jinja").write_text("C {{ messages[-1].content }}")
    assert template_for(tokenizer, tmp_path).source.startswith("C ")
