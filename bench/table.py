"""From results to the Markdown table: medians, ranges, ratios and shares of the GEMM peak."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.job import Result


@dataclass
class Rows:
    """All results of one side under one setting, round by round."""

    side: str
    knob: str
    results: list[Result] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [rate for result in self.results for rate in result.rates]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def lengths(self) -> list[int]:
        return [n for result in self.results for n in result.lengths]

    @property
    def mean_length(self) -> float:
        return statistics.fmean(self.lengths)

    @property
    def stderr(self) -> float:
        """Standard error of the mean length."""
        return statistics.pstdev(self.lengths) / math.sqrt(len(self.lengths))


@dataclass(frozen=True, slots=True)
class Shape:
    """What the arithmetic of a model depends on, read from its config.json."""

    layers: int
    attention: int  #: query heads × head size
    matrices: int  #: parameters that are multiplied once a token, the vocabulary projection included

    @classmethod
    def read(cls, checkpoint: Path) -> Shape:
        c = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        width, head = c["hidden_size"], c["head_dim"]
        heads, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        block = width * (2 * heads + 2 * kv) + 3 * width * c["intermediate_size"]
        layers = c["num_hidden_layers"]
        return cls(layers, heads, layers * block + c["vocab_size"] * width)

    def forward(self, tokens: float, context: float) -> float:
        """FLOPs of ``tokens`` tokens that look back on ``context`` tokens altogether."""
        return 2 * self.matrices * tokens + 4 * self.layers * self.attention * context


def needed_flops(shape: Shape, result: Result, *, trains: bool) -> float:
    """FLOPs that the counted answers need, however a side computes them: every completion token once
    forward, and for an update prompt and completion once more forward and twice backward. Padding,
    recomputation and prompts read again do not count."""
    prompt, answers = result.prompt_tokens, result.lengths
    tokens = sum(answers)
    context = sum(n * prompt + n * (n + 1) / 2 for n in answers)
    once = shape.forward(tokens, context)
    if not trains:
        return once
    ahead = len(answers) * prompt
    return once + 3 * shape.forward(tokens + ahead, context + ahead * (prompt + 1) / 2)


def share_of_peak(shape: Shape, rows: Rows, peak: float, *, trains: bool) -> float:
    work = sum(needed_flops(shape, r, trains=trains) for r in rows.results)
    return work / sum(sum(r.seconds) for r in rows.results) / peak


HEAD = (
    "| side | tokens/s: median (min–max) | × {base}: of medians (by round) | "
    "mean tokens | at the cap | share of GEMM peak | peak RSS |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def table(rows: Sequence[Rows], cap: int, shape: Shape, peak: float, *, trains: bool) -> str:
    """One setting; the first of ``rows`` is what the others are compared with."""
    base = rows[0]
    lines = [HEAD.format(base=base.side)]
    for row in rows:
        rates = row.rates
        by_round = [
            statistics.median(mine.rates) / statistics.median(theirs.rates)
            for mine, theirs in zip(row.results, base.results, strict=True)
        ]
        capped = statistics.fmean(n >= cap for n in row.lengths)
        share = share_of_peak(shape, row, peak, trains=trains)
        ratio = f"**{row.median / base.median:.2f}** ({min(by_round):.2f}–{max(by_round):.2f})"
        lines.append(
            f"| {row.side}{f' ({row.knob})' if row.knob else ''} "
            f"| {row.median:,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) "
            f"| {'1' if row is base else ratio} "
            f"| {row.mean_length:.1f} | {capped:.0%} | {share:.1%} "
            f"| {max(r.peak_rss for r in row.results) / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def warnings(rows: Sequence[Rows]) -> list[str]:
    """What would make a comparison unfair."""
    base, found = rows[0], []
    for row in rows[1:]:
        gap = abs(row.mean_length - base.mean_length)
        if gap > max(0.03 * base.mean_length, 3 * math.hypot(row.stderr, base.stderr)):
            found.append(
                f"mean lengths differ by more than chance allows: {row.side} {row.mean_length:.1f}, "
                f"{base.side} {base.mean_length:.1f}"
            )
    for row in rows:
        if worst := max((r.notes.get("zero_variance", 0.0) for r in row.results), default=0.0):
            found.append(f"{row.side}: {worst:.1%} of the groups had equal rewards")
    return found
