"""Scores reach the answers that they are of: of models that judge, of process models, of evaluations that are
compared, and in reinforcement learning with a reward model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from conftest import Silent, scramble, tiny_config
from scripted_engine import ScriptedEngine
from torch import Tensor

from liubai.errors import UserError
from liubai.grade import GraderPool, RewardWeights, Verdict
from liubai.learn.packing import Sequence1
from liubai.model.scorer import Scorer, save_scorer
from liubai.rollout.engine import Request
from liubai.stages import process
from liubai.stages.context import Context
from liubai.stages.evaluate import SCORES, Evaluation, wins
from liubai.stages.records import Example
from liubai.stages.rollouts import Rollouts
from liubai.stages.scoring import CALIBRATION, Preference, last_scores, step_probabilities
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Problem, Sample, Span, Stop


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


def scorer_of(vocab_size: int = 60, eos_id: int = 1) -> Scorer:
    scorer = Scorer(tiny_config(vocab_size=vocab_size, eos_token_id=eos_id))
    scramble(scorer, 5)
    return scorer.eval()


# ---- models that judge ----


def fifty(seed: int = 0) -> list[Sequence1]:
    """Sequences of 4 to 200 tokens, several of them of one length; every fourth token or so ends a step, in
    the first ones none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [4 + 7 * (i * 11 % 29) for i in range(50)]
    found = []
    for number, n in enumerate(lengths):
        ids = torch.randint(2, 60, (n,), generator=generator).tolist()
        marks = (torch.rand(n, generator=generator) < (0.25 if number > 2 else 0.0)).tolist()
        found.append(Sequence1(ids, [False, *marks[1:]], {"right": [0.0] * n}))
    order = torch.randperm(50, generator=generator).tolist()
    return [found[i] for i in order]


@torch.no_grad()
def test_the_score_is_that_of_the_last_token_of_its_own_text() -> None:
    scorer, sequences = scorer_of(), fifty()
    got_N = last_scores(scorer, sequences, pad_id=0)
    wanted = [float(scorer(torch.tensor([s.ids]))[0, -1]) for s in sequences]
    assert max(wanted) - min(wanted) > 1
    assert got_N.tolist() == pytest.approx(wanted, abs=1e-4)


@torch.no_grad()
def test_the_chances_are_those_of_the_steps_of_their_own_text() -> None:
    """A mark at token i is read at the one before it, as everywhere."""
    scorer, sequences = scorer_of(), fifty(1)
    got = step_probabilities(scorer, sequences, pad_id=0)
    assert [] in got
    for s, row in zip(sequences, got, strict=True):
        logits = scorer(torch.tensor([s.ids]))[0].double()
        wanted = [1 / (1 + math.exp(-float(logits[i - 1]))) for i, on in enumerate(s.learn) if on]
        assert row == pytest.approx(wanted, abs=1e-4)


@pytest.fixture
def judge(world: TextTokenizer, tmp_path: Path) -> Preference:
    scorer = scorer_of(world.vocab_size, world.eos_id)
    save_scorer(tmp_path / "rm", scorer, world, BARE)
    (tmp_path / "rm" / CALIBRATION).write_text(json.dumps({"mean": 0.25, "spread": 0.5}))
    return Preference(tmp_path / "rm", torch.device("cpu"))


THOUGHTS = ("", "3", "wait wait", "3 + 4 = 7 wait 9 - 2", "3 </think> <answer> 9 </answer> wait")


def test_a_preference_is_the_same_whatever_was_thought(judge: Preference) -> None:
    """And not the same whatever was asked, or said. What was never said, in a thought without an end, is
    nothing."""
    judge.spread = 10.0  # nothing reaches the bound
    questions = [Problem(text, "1", "exact") for text in ("1 or 2", "7 + 8")]
    said = ["<answer> 1 </answer>", "<answer> 2 2 2 </answer>", "3"]
    by = {
        (p.prompt, text): judge([(p, f"{thought} </think> {text}") for thought in THOUGHTS])
        for p in questions
        for text in said
    }
    for scores in by.values():
        assert scores == pytest.approx([scores[0]] * len(THOUGHTS), abs=1e-5)
    assert len({round(scores[0], 3) for scores in by.values()}) == 6
    unended = judge([(questions[0], text) for text in ("", "3", "wait <answer> 1 </answer>")])
    assert unended == pytest.approx([unended[0]] * 3, abs=1e-5)


@torch.no_grad()
def test_a_preference_is_in_standard_deviations_and_bounded(judge: Preference, world: TextTokenizer) -> None:
    answers = [
        (Problem(f"{i} or 2", "1", "exact"), f"</think> <answer> {i * 7 % 50} </answer>") for i in range(30)
    ]
    found = judge(answers)
    wanted = []
    for problem, response in answers:
        ids = world.encode(f"<|start|> {problem.prompt} <think> {response} <|end|>")
        wanted.append((float(judge.scorer(torch.tensor([ids]))[0, -1]) - 0.25) / 0.5)
    assert any(abs(x) > 3 for x in wanted)
    assert sum(abs(x) < 3 for x in wanted) > 5
    assert found == pytest.approx([min(3.0, max(-3.0, x)) for x in wanted], abs=1e-3)


# ---- process models ----


class Chances:
    """A scorer that says of token i what ``chances[i]`` says, as a logit."""

    def __init__(self, chances: Sequence[float]) -> None:
        self.logits = torch.tensor(chances, dtype=torch.float64).logit()
        self.head_weight = self.logits

    def __call__(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        return self.logits[ids_BT]


def test_what_is_measured_of_a_process_model() -> None:
    """Two questions. Of the first, the answer with the strongest weakest step is wrong; of the second, it is
    half right, and the other three quarters. Token 0 says nothing, and the end would mislead."""
    answers = [
        # question, (chance, is it right?) of each step, score of the answer
        ("p", [(0.4, True), (0.95, True)], 1.0),
        ("q", [(0.7, True)], 0.5),
        ("p", [(0.7, True), (0.6, False)], 0.0),
        ("q", [(0.2, False), (0.3, False), (0.9, True), (0.99, True)], 0.75),
        ("p", [], 0.0),
    ]
    chances, read = [0.5], []
    for prompt, steps, score in answers:
        ids, learn, right = [0], [False], [0.0]
        for chance, good in steps:
            ids += [len(chances), 0]
            learn += [False, True]
            right += [0.0, float(good)]
            chances.append(chance)
        read.append(
            (
                Example(prompt, "", score=score),
                Sequence1([*ids, 0], [*learn, False], {"right": [*right, 0.0]}),
            )
        )
    found = process.measured_on(Chances(chances), read, pad_id=0)  # type: ignore[arg-type]
    assert found == {
        "eval/accuracy": pytest.approx(7 / 9),
        "eval/found_wrong": pytest.approx(2 / 3),
        "eval/false_alarm": pytest.approx(1 / 6),
        "eval/best_of_n": pytest.approx((0.0 + 0.5) / 2),
        "eval/any_of_n": pytest.approx((1.0 + 0.75) / 2),
        "eval/one": pytest.approx((1.0 + 0.5 + 0.0 + 0.75 + 0.0) / 5),
    }


# ---- evaluations ----


CUT = [(0.6, Stop.EOS), (1.0, Stop.LENGTH), (1.0, Stop.ABORT), (1.0, Stop.EOS)]


def evaluation_of(rows: Sequence[tuple[str, str, Sequence[float]]], stop: Stop = Stop.EOS) -> Evaluation:
    """Of (prompt, verifier, scores)."""
    return Evaluation(
        [Problem(prompt, "", verifier) for prompt, verifier, _ in rows],
        [[Sample((1,), (2,), (-1.0,), stop, (Span(0, 1),)) for _ in scores] for _, _, scores in rows],
        [["" for _ in scores] for _, _, scores in rows],
        [[Verdict(x == 1, "x", {"correct": x, "format": 1.0}) for x in scores] for _, _, scores in rows],
    )


def against(folder: Path, theirs: Mapping[str, Sequence[float]]) -> Context:
    """What a comparison is given: the other evaluation, as it stands on the disk."""
    (folder / "theirs").mkdir(parents=True)
    (folder / "theirs" / SCORES).write_text(json.dumps({"scores": [[p, row] for p, row in theirs.items()]}))
    (folder / "theirs" / "eval.json").write_text(json.dumps({"label": "Dev3"}))
    return Context(folder / "ours", 0, {"eval-dev3": folder / "theirs"}, Silent())


def test_what_was_cut_off_is_worth_nothing() -> None:
    parts = [evaluation_of([("a", "errand", [score])], stop) for score, stop in CUT]
    result = Evaluation(
        parts[0].problems,
        [[p.samples[0][0] for p in parts]],
        [[""] * len(parts)],
        [[p.verdicts[0][0] for p in parts]],
    )
    assert result.scores == [[0.6, 0.0, 0.0, 1.0]]
    assert result.correct == [[False, False, False, True]]


def test_wins_count_ties_half_and_general_prompts_alone(tmp_path: Path) -> None:
    """Every answer of ours against every one of theirs to the same prompt."""
    ours = evaluation_of(
        [
            ("greet ben", "errand", [1.0, 0.5]),
            ("3 or 4", "exact", [0.0, 0.0]),
            ("say why", "judge", [0.2, 0.7]),
        ]
    )
    theirs = {"say why": [0.9], "greet ben": [0.5, 0.0], "3 or 4": [1.0, 1.0], "never asked": [1.0]}
    # 1 > ½, 1 > 0, ½ = ½, ½ > 0; then 0.2 < 0.9 and 0.7 < 0.9
    wanted = {"win_rate": pytest.approx((1 + 1 + 0.5 + 1 + 0 + 0) / 6), "against": "Dev3"}
    assert wins(ours, against(tmp_path, theirs)) == wanted


def test_without_general_prompts_all_of_them_count(tmp_path: Path) -> None:
    ours = evaluation_of([("3 or 4", "exact", [1.0, 0.0]), ("5 or 6", "exact", [1.0])])
    told = wins(ours, against(tmp_path, {"3 or 4": [1.0, 0.0], "5 or 6": [0.0]}))
    assert told["win_rate"] == pytest.approx((0.5 + 1 + 0 + 0.5 + 1) / 5)


def test_who_is_cut_off_wins_nothing(tmp_path: Path) -> None:
    ours = evaluation_of([("greet ben", "errand", [1.0, 1.0])], Stop.LENGTH)
    assert wins(ours, against(tmp_path, {"greet ben": [0.5, 0.0]}))["win_rate"] == pytest.approx(1 / 4)


def test_other_problems_cannot_be_compared(tmp_path: Path) -> None:
    ours = evaluation_of([("greet ben", "errand", [1.0])])
    with pytest.raises(UserError, match=r"'theirs' was asked other problems; give both the same"):
        wins(ours, against(tmp_path, {"greet ann": [1.0]}))


# ---- reinforcement learning with a reward model ----


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    with GraderPool() as pool:
        yield pool


def said(request: Request) -> tuple[str, Stop]:
    """Answers are all of different lengths; the even ones are right."""
    thought = "3 " * (1 + 5 * request.id % 31)
    return f"{thought}</think> <answer> {7 if request.id % 2 == 0 else 8} </answer>", Stop.EOS


RULE = RewardWeights(correct=2.0, wrong=-3.0, format=0.25)
LIKED = RewardWeights(correct=0.0, wrong=0.0, format=0.0, preference=0.5)


@pytest.mark.parametrize("told_by", ["family", "verifier"])
@pytest.mark.parametrize("liked", ["errand", "others"])
def test_preferences_reach_their_answers_and_weights_their_kinds(
    liked: str, told_by: str, world: TextTokenizer, pool: GraderPool
) -> None:
    """Of three kinds one has weights of its own, as a family or, among the rows of a user's file, by its
    verifier; the reward model is asked about the answers alone for
    which its word counts."""
    asked: list[tuple[Problem, str]] = []

    def by_length(answers: Sequence[tuple[Problem, str]]) -> list[float]:
        asked.extend(answers)
        return [1000.0 * int(problem.prompt) + len(response.split()) for problem, response in answers]

    def problem_at(index: int) -> Problem:
        if told_by == "family":
            return Problem(str(index), "7", "exact", ("errand", "greater", "total")[index % 3])
        return Problem(str(index), "7", "exact" if index % 3 else "number", "questions")

    def of_its_own(problem: Problem) -> bool:
        return problem.family == "errand" or problem.verifier == "number"

    own, default = (LIKED, RULE) if liked == "errand" else (RULE, LIKED)
    rollouts = Rollouts(
        ScriptedEngine(world, said),
        Template(world, BARE),
        problem_at,
        pool,
        samples=4,
        max_tokens=40,
        temperature=1.0,
        seed=0,
        weights=default,
        weights_of={"errand" if told_by == "family" else "number": own},
        scorers={"preference": by_length},
    )
    wanted_of = set()
    for _ in range(2):
        for g in rollouts.collect(5):
            errand = of_its_own(g.group.problem)
            for j, (sample, reward) in enumerate(zip(g.group.samples, g.group.rewards, strict=True)):
                length = len(sample.completion_ids) - 1  # without the end
                if errand == (liked == "errand"):
                    wanted = 0.5 * (1000 * g.index + length)
                    assert reward.parts["preference"] == pytest.approx(wanted)
                    assert reward.total == pytest.approx(wanted)
                    wanted_of.add((g.index, length))
                else:
                    assert "preference" not in reward.parts
                    right = (g.index * 4 + j) % 2 == 0
                    assert reward.total == pytest.approx(2.25 if right else -2.75)
    assert len(asked) == len(wanted_of) == (16 if liked == "errand" else 24)
    assert all(of_its_own(problem) == (liked == "errand") for problem, _ in asked)
