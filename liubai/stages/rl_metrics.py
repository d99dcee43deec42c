"""What an RL step logs about its rollouts, and the control that deals rewards out at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from liubai.grade.parts import parts_of
from liubai.grade.rewards import shuffled
from liubai.learn.advantages import TOLERANCE
from liubai.measure.reflection import count_reflections
from liubai.stages.evaluate import Evaluation
from liubai.stages.rollouts import GradedGroup
from liubai.types import Group, Stop


def rollout_metrics(graded: Sequence[GradedGroup], version: int) -> dict[str, float]:
    """Means over the answers of a step; ``staleness`` in updates, lengths in tokens."""
    answers = [a for g in graded for a in g.answers]
    rewards = [r for g in graded for r in g.group.rewards]
    lengths = [len(a.sample.completion_ids) for a in answers]
    correct = [a.verdict.correct and a.sample.stop is Stop.EOS for a in answers]
    right = [n for n, ok in zip(lengths, correct, strict=True) if ok]
    wrong = [n for n, ok in zip(lengths, correct, strict=True) if not ok]
    solved = [_share_right(g) for g in graded if not varies(g.group)]
    parts = {name for r in rewards for name in r.parts}
    metrics = {
        "accuracy": _mean(correct),
        "zero_variance/right": sum(share == 1 for share in solved) / len(graded),
        "zero_variance/wrong": sum(share == 0 for share in solved) / len(graded),
        "format": _mean([a.verdict.parts["format"] > 0 and a.sample.stop is Stop.EOS for a in answers]),
        "reflections": _mean([count_reflections(a.response) for a in answers]),
        "truncated": _mean([a.sample.stop is Stop.LENGTH for a in answers]),
        "grade_errors": float(sum(a.verdict.error is not None for a in answers)),
        "reward/total": _mean([r.total for r in rewards]),
        "length/mean": _mean(lengths),
        "length/max": float(max(lengths)),
        "staleness": _mean([version - a.sample.version for a in answers]),
        "step_tokens": float(sum(lengths)),
    }
    if right:
        metrics["length/right"] = _mean(right)
    if wrong:
        metrics["length/wrong"] = _mean(wrong)
    for name in sorted({name for a in answers for name in a.findings}):
        shown = "language" if name == "language" else f"{name}/score"
        metrics[shown] = _mean([a.findings[name] for a in answers if name in a.findings])
    for name in sorted(parts):
        metrics[f"reward/{name}"] = _mean([r.parts.get(name, 0.0) for r in rewards])
    return metrics | _verse(graded)


def _verse(graded: Sequence[GradedGroup]) -> dict[str, float]:
    """Of poems the parts of the score, one by one; what is no answer has none of them. Poems that could not
    be judged are left out."""
    found: dict[str, list[float]] = {}
    for g in graded:
        asked = g.group.problem
        for a in g.answers:
            if a.verdict.error is None:
                poem = (a.verdict.answer or "") if a.sample.stop is Stop.EOS else ""
                for name, share in parts_of(asked.verifier, asked.gold, poem, asked.meta).items():
                    found.setdefault(name, []).append(share)
    return {name: _mean(shares) for name, shares in found.items()}


def probe_records(result: Evaluation, count: int) -> list[dict[str, Any]]:
    """The first answer to each of the first ``count`` held-out prompts, for ``samples.jsonl``."""
    return [
        {
            "probe": True,
            "problem": i,
            "prompt": result.problems[i].prompt,
            "response": result.responses[i][0],
            "correct": result.verdicts[i][0].correct,
            "answer": result.verdicts[i][0].answer,
            "tokens": len(result.samples[i][0].completion_ids),
            "stop": str(result.samples[i][0].stop),
        }
        for i in range(min(count, len(result.problems)))
    ]


def shuffle_rewards(groups: Sequence[Group], rng: random.Random) -> list[Group]:
    """The control: every group keeps its rewards, but which answer gets which is left to chance."""
    return [replace(g, rewards=tuple(shuffled(g.rewards, rng))) for g in groups]


def varies(group: Group) -> bool:
    totals = [r.total for r in group.rewards]
    return max(totals) - min(totals) > TOLERANCE


def _share_right(graded: GradedGroup) -> float:
    return _mean([a.verdict.correct and a.sample.stop is Stop.EOS for a in graded.answers])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
