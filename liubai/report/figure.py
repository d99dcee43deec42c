"""One PNG for a README: accuracy, mean length and reflections over steps. The only matplotlib here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from liubai.errors import UserError
from liubai.files import write_bytes
from liubai.report.read import Curve, read_run
from liubai.report.story import smooth, take_off

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER, INK, FAINT, SEAL = "#fdfcf9", "#1d1c1a", "#8d887f", "#b23a26"
COLOURS = (SEAL, INK, "#3f6076", "#a3813d", "#58745f", FAINT)


def save_figure(run: Path, out: Path) -> Path:
    """Write the three curves of ``run`` to ``out`` (a .png, 12 × 3.9 inches) and return ``out``.

    Raises ``UserError`` when ``run`` is not a run folder or no rl stage has logged a step.
    """
    stages = [s for s in read_run(run).of_kind("rl") if s.rows]
    if not stages:
        raise UserError(f"'{run}' has no rl stage with steps yet: there is no curve to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # Figure without pyplot: no global state, no display, no change to the caller's settings.
    figure = Figure(figsize=(12, 3.9), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    titles = (
        "Accuracy (share of answers right)",
        "Length (mean tokens per answer)",
        "Reflections (words per answer)",
    )
    keys = ("accuracy", "length/mean", "reflections")
    for axes, title, key in zip(panels, titles, keys, strict=True):
        for i, stage in enumerate(stages):
            label = stage.name if len(stages) > 1 else "rollouts"
            _draw(axes, stage.curve(key), COLOURS[i % len(COLOURS)], label)
            if key == "accuracy":
                held_out = stage.curve("eval/pass@1", sparse=True)
                xs, ys = zip(*held_out.known, strict=True) if held_out else ((), ())
                label = "held-out" if len(stages) == 1 else f"{stage.name}, held-out"
                axes.plot(xs, ys, "o", ms=4, color=INK if len(stages) == 1 else COLOURS[i % 6], label=label)
            step = take_off(stage.curve("reflections"))
            if step is not None:
                axes.axvline(step, color=COLOURS[i % 6] if len(stages) > 1 else FAINT, lw=1, ls=(0, (2, 3)))
                alone = len(stages) == 1
                colour, name = (FAINT, "take-off · ") if alone else (COLOURS[i % 6], f"{stage.name} · ")
                axes.annotate(
                    f"{name}step {step}", (step, 1), xycoords=("data", "axes fraction"),
                    xytext=(0, 3), textcoords="offset points", color=colour, fontsize=8, ha="center",
                )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=18)
        axes.set_xlabel("step of reinforcement learning", color=FAINT, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_facecolor(PAPER)
        axes.tick_params(colors=FAINT, labelsize=9, length=0)
        axes.grid(axis="y", color="#e5e1d8", lw=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=9, labelcolor=FAINT, loc="outside lower left", ncols=8
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAPER)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, buffer.getvalue())
    return out


def _draw(axes: Axes, curve: Curve, colour: str, label: str) -> None:
    nan = float("nan")  # matplotlib's own gap
    axes.plot(curve.xs, [nan if y is None else y for y in curve.ys], color=colour, lw=0.8, alpha=0.3)
    mean = [nan if y is None else y for y in smooth(curve).ys]
    axes.plot(curve.xs, mean, color=colour, lw=2, label=label)
