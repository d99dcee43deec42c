"""Stages that learn from examples, and the examples that a stage of sampling kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from liubai.report.charts import stage_style
from liubai.report.read import IMITATING, JUDGING, Run, Stage, number
from liubai.report.story import show
from liubai.report.svg import Chart, Line

_ALL = (*IMITATING, *JUDGING)


@dataclass(frozen=True, slots=True)
class Kept:
    """One stage of sampling: answers asked for, kept, and dropped by each of ``SampleTable.reasons``."""

    stage: str
    asked: str
    kept: str
    share: str
    dropped: Sequence[str]


@dataclass(frozen=True, slots=True)
class SampleTable:
    reasons: Sequence[str]
    rows: Sequence[Kept]


def sample_table(run: Run) -> SampleTable | None:
    """What became of the sampled answers, from each sample.json; ``None`` when there is none."""
    found = [(s, s.result) for s in run.of_kind("sample") if s.result]
    if not found:
        return None
    dropped = [d if isinstance(d := kept.get("dropped"), dict) else {} for _, kept in found]
    reasons = list(dict.fromkeys(str(reason) for d in dropped for reason in d))
    rows = []
    for (stage, sampled), why in zip(found, dropped, strict=True):
        asked, kept = number(sampled.get("asked")), number(sampled.get("kept"))
        share = show(kept / asked, "%") if asked and kept is not None else ""
        counts = [show(number(why.get(reason)), "0") for reason in reasons]
        rows.append(Kept(stage.name, show(asked, "0"), show(kept, "0"), share, counts))
    return SampleTable(reasons, rows)


def example_charts(run: Run) -> list[Chart]:
    """Loss, accuracy, margin, learning rate and speed. A stage has one colour throughout; answers to
    imitate and judgements to agree with have losses of different units, and so a chart each."""
    stages = [s for s in run.of_kind(*_ALL) if s.rows]
    looks = {s.name: stage_style(i) for i, s in enumerate(stages)}

    def over_steps(
        id: str, title: str, caption: str, y_label: str, key: str, kinds: Sequence[str],
        *, percent: bool = False, zero: bool = True,
    ) -> Chart | None:  # fmt: skip
        mine: list[Stage] = [s for s in stages if s.kind in kinds and s.curve(key)]
        if not mine:
            return None
        if len(mine) == 1:  # a single line has no legend: the title says whose it is
            title = f"{title} · {mine[0].name}"
        lines = [Line(s.name, s.curve(key), *looks[s.name], noisy=True) for s in mine]
        return Chart(f"examples-{id}", title, caption, y_label, lines, percent=percent, zero=zero)

    charts = [
        over_steps(
            "loss", "Loss on answers",
            "Cross-entropy of the next token of the answers to imitate; of a distill stage, what its loss "
            "measures against the teacher. It levels off where the rest is chance.",
            "loss (nats per token)", "loss", IMITATING, zero=False,
        ),
        over_steps(
            "right", "Tokens foreseen",
            "Share of the answers' tokens that the model would have said itself.",
            "share of tokens (%)", "accuracy", IMITATING, percent=True,
        ),
        over_steps(
            "judging", "Loss on judgements",
            "Nats a judgement: which of two answers is better, or whether a step is right. Guessing costs "
            "0.69, the logarithm of two.",
            "loss (nats per judgement)", "loss", JUDGING,
        ),
        over_steps(
            "accuracy", "Judgements that are right",
            "Share of pairs in the right order, or of steps called what they are; half is guessing where "
            "both cases are as frequent.",
            "judgements that are right (%)", "accuracy", JUDGING, percent=True,
        ),
        over_steps(
            "margin", "Margin",
            "By how much the better answer of a pair leads, in logits; where accuracy no longer rises and "
            "the margin does, confidence grows and nothing is learned.",
            "margin (logits)", "margin", _ALL,
        ),
        over_steps(
            "lr", "Learning rate", "Its schedule: warm-up, plateau or decay, as the recipe says.",
            "learning rate", "lr", _ALL,
        ),
        over_steps(
            "speed", "Speed of learning", "Tokens learned from per second; steady is what to expect.",
            "tokens per second", "tokens/s", _ALL,
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]
