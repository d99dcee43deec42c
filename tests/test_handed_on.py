"""What stages hand to each other, and the ways in which it could silently be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Silent

from liubai.errors import UserError
from liubai.grade import Verdict
from liubai.problems import world_vocabulary
from liubai.problems.source import Bank, Families
from liubai.stages import evaluate, pretrain, rl, sample
from liubai.stages.context import Context
from liubai.stages.evaluate import Evaluation
from liubai.stages.records import Example, encoded, read_examples, write_examples
from liubai.stages.scoring import without_thought
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import word_level
from liubai.types import Problem, Sample, Span, Stop

TOKENIZER = word_level([*world_vocabulary(["make"]), "<|im_start|>"])
#: writes nothing of the assistant's turn, as ChatML does not
CHATML = "{{ bos_token }} {{ messages[-1].content }}"
PROBLEM = Problem("3.11 or 3.8", "3.8", "number", "greater", "en")


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


@pytest.mark.parametrize("line_end", ["\u2028", "\u0085", "\x0b", "\n"])
def test_an_answer_may_hold_any_line_end(line_end: str, tmp_path: Path) -> None:
    kept = [Example("a", f"one{line_end}two"), Example("b", "three", ended=False)]
    write_examples(tmp_path / "x.jsonl", kept)
    assert read_examples(tmp_path / "x.jsonl") == kept


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    write_examples(tmp_path / "x.jsonl", [Example("a", "b")])
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2: not an example"):
        read_examples(tmp_path / "x.jsonl")


@pytest.mark.parametrize("source", [BARE, CHATML])
@pytest.mark.parametrize("opening", ["<think> ", ""])
def test_the_thought_is_opened_once_whoever_opens_it(source: str, opening: str) -> None:
    said = f"{opening}3 same </think> <answer> 3.8 </answer>"
    made = encoded(Template(TOKENIZER, source), Example(PROBLEM.prompt, said))
    text = TOKENIZER.decode(made.ids)
    assert text == "<|start|> 3 . 11 or 3 . 8 <think> 3 same </think> <answer> 3 . 8 </answer> <|end|>"
    learned = TOKENIZER.decode([i for i, on in zip(made.ids, made.learn, strict=True) if on])
    assert learned.startswith("3 same" if source is BARE else "<think> 3 same")


def test_what_was_cut_off_is_taught_no_end() -> None:
    template = Template(TOKENIZER, BARE)
    whole, cut = (encoded(template, Example("3.11 or 3.8", "3 same", ended=e)) for e in (True, False))
    assert whole.ids[:-1] == cut.ids
    assert whole.ids[-1] == TOKENIZER.eos_id
    assert TOKENIZER.eos_id not in cut.ids


def test_a_thought_that_never_ends_says_nothing_to_a_reward_model() -> None:
    template = Template(TOKENIZER, BARE)
    read = {
        TOKENIZER.decode(without_thought(template, "please greet ben", said).ids)
        for said in ("gladly hello ben", "<think> gladly", "gladly </think>")
    }
    assert read == {"<|start|> please greet ben <think> </think> <|end|>"}
    plain = without_thought(Template(TOKENIZER, CHATML), "please greet ben", "gladly hello ben")
    assert TOKENIZER.decode(plain.ids).endswith("gladly hello ben <|end|>"), (
        "without a thought it is all answer"
    )


def judged(verdicts: list[Verdict], stops: list[Stop]) -> Evaluation:
    samples = [Sample((1,), (2,), (0.0,), stop, (Span(0, 1),)) for stop in stops]
    said = ["3 or 3 same then 11 or 80 is 80 </think> <answer> 3.8 </answer>"] * len(samples)
    return Evaluation([PROBLEM], [samples], [said], [verdicts])


RIGHT = Verdict(True, "3.8", {"correct": 1.0, "format": 1.0})
WRONG = Verdict(False, "3.11", {"correct": 0.0, "format": 1.0})
UNKNOWN = Verdict(False, "3.8", {"correct": 0.0, "format": 1.0}, error="the judge did not answer")


def run_sample(folder: Path, monkeypatch: pytest.MonkeyPatch, asked: int, **options: Any) -> dict[str, Any]:
    """The stage with an evaluation that is made up: four answers to each problem, all of them PROBLEM."""
    result = judged([RIGHT, WRONG, UNKNOWN, RIGHT], [Stop.EOS, Stop.EOS, Stop.EOS, Stop.LENGTH])
    monkeypatch.setattr(sample, "evaluate", lambda engine, template, problems, **_: Evaluation(
        [PROBLEM] * len(problems), result.samples * len(problems), result.responses * len(problems),
        result.verdicts * len(problems)))  # fmt: skip
    shape = pretrain.ModelShape(hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    base = folder / "base"
    pretrain.run(
        pretrain.Config(steps=1, tokens_per_step=256, model=shape, families={"greater": 1.0}),
        Context(base, 0, {}, Silent()),
    )
    config = sample.Config(problems={"greater": 1.0}, prompts=asked, samples=4, slots=8, **options)
    sample.run(config, Context(folder / "s", 0, {"base": base}, Silent(), stage="s"))
    return json.loads((folder / "s" / "sample.json").read_text())


def test_what_could_not_be_graded_is_neither_kept_nor_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run_sample(tmp_path, monkeypatch, asked=1)
    graded = read_examples(tmp_path / "s" / "graded.jsonl")
    assert [(e.score, e.ended) for e in graded] == [(1.0, True), (0.0, True), (0.0, False)]
    assert told == {"asked": 4, "kept": 1, "dropped": {"not graded": 1, "wrong": 1, "cut off": 1}}


def test_a_problem_that_is_asked_twice_is_still_one_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run_sample(tmp_path, monkeypatch, asked=3, keep=1)
    assert told["kept"] == 1
    assert told["dropped"]["enough of this problem"] == 2


def test_rewriting_is_for_the_wide_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sample.Config(problems={"countdown": 1.0}, prompts=1, rewrite=True)
    monkeypatch.setattr(sample, "load", lambda *_, **__: (torch.nn.Linear(1, 1), TOKENIZER))
    folder = tmp_path / "ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    context = Context(tmp_path / "s", 0, {"ckpt": folder.parent}, Silent(), stage="s")
    with pytest.raises(UserError, match=r"rewrite = true .* dictionary, for the families errand, greater"):
        sample.run(config, context)


def test_a_verdict_that_is_missing_counts_for_nobody() -> None:
    result = judged([RIGHT, UNKNOWN, WRONG], [Stop.EOS] * 3)
    assert result.scores[0][0::2] == [1.0, 0.0]
    assert result.scores[0][1] != result.scores[0][1], "NaN"
    assert result.process(evaluate.ReadableConfig())["score"] == 0.5


def test_a_process_reward_nobody_can_give_is_refused(base: Path, tmp_path: Path) -> None:
    config = rl.Config(steps=1, problems={"countdown": 1.0}, rewards={"process": 1.0}, max_tokens=8)
    with pytest.raises(UserError, match="nobody can check the steps of countdown; it is for make, total"):
        rl.run(config, Context(tmp_path / "s", 0, {"base": base}, Silent(), stage="s"))


def test_a_language_that_cannot_be_recognised_is_refused_at_once(tmp_path: Path, base: Path) -> None:
    """Also when only a question to train on has it."""
    rows = [
        {"question": f"how much is {i} plus {i}", "answer": str(2 * i), "language": "en"} for i in range(40)
    ]
    for row in rows:
        row["language"] = "fr" if row["question"].endswith("plus 7") else "en"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = {"path": str(tmp_path / "q.jsonl"), "default_verifier": "number", "language": "language"}
    config = rl.Config(steps=1, questions=questions, rewards={"language": 1.0}, max_tokens=8)
    assert config.questions is not None
    assert Bank(config.questions).languages() == {"en", "fr"}
    assert Families({"make": 1.0}).languages() == {"en", "zh"}
