"""``python -m bench.scale``: how a run of reinforcement learning scales to a thousand GPUs, simulated.

Nothing here was run on a GPU: decoding steps, updates and transfers take what ``liubai plan`` foretells
(``liubai.plan.roofline``), lengths and failures are drawn, and ``liubai.plan.simulate`` plays the events. A
model of 7.6 billion parameters on H100s, steps of 512 problems × 16 answers, a trainer GPU for every two that
write; the recipe stays the same, the machines become more. Prints the tables of docs/scale.md and, with
``--out``, draws its figure.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from liubai.model.config import ModelConfig
from liubai.plan import memory, roofline
from liubai.plan.hardware import DEVICES, Device
from liubai.plan.simulate import Outcome, Pipeline, log_normal, simulate

#: Qwen2.5-7B's shape
SHAPE = ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=152_064, hidden_size=3584, intermediate_size=18_944,
    num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, head_dim=128,
    tie_word_embeddings=False, max_position_embeddings=131_072,
)  # fmt: skip
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
STALENESS = (0, 1, 4, math.inf)
#: hours that a GPU lasts: Llama 3's 419 unexpected losses of 16,384 GPUs in 54 days (arXiv 2407.21783), and
#: machines that may be taken away at any time
LLAMA, SPOT = 54 * 24 * 16_384 / 419, 100.0
LONGER = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The recipe, and how long its answers are: ``mean`` tokens before they are cut off at ``longest``."""

    groups: int = 512
    samples: int = 16
    prompt: int = 256
    mean: float = 4000.0
    spread: float = 0.8
    longest: int = 16_384
    slots: int = 64
    writers_for_a_trainer: int = 2
    restart: float = 300.0
    device: Device = DEVICES["h100"]


def pipeline(run: Run, gpus: int, staleness: float, hours: float, seed: int) -> Pipeline:
    """``gpus`` write; ``hours`` is how long one lasts on the mean."""
    size = memory.sizes(SHAPE)
    model = roofline.Model(config=SHAPE, size=size, dtype="bfloat16")
    work = roofline.Work(
        groups=run.groups, samples=run.samples, prompt=run.prompt, tokens=run.mean, longest=run.longest,
        checkpointing=True, forwards=1, layered=memory.layered(size, "bfloat16", run.device),
    )  # fmt: skip
    device, trainers = run.device, max(4, gpus // run.writers_for_a_trainer)
    about = memory.writing(SHAPE, size, model.dtype, run.slots)
    room = device.memory * device.usable - sum(about.values())
    # answers of mean length: those that grow longer make others wait
    fit = memory.answers_that_fit(room, SHAPE, model.dtype, round(run.prompt + run.mean), "paged")
    slots = min(run.slots, fit)
    step = [0.0, *(roofline.step_seconds(model, device, work, n) for n in range(1, slots + 1))]

    def update(tokens: float) -> float:
        return sum(
            roofline.update(model, device, replace(work, tokens=tokens / work.answers), trainers).values()
        )

    return Pipeline(
        engines=gpus,
        step=step,
        update=update,
        lengths=log_normal(run.mean, run.spread, run.longest),
        groups=run.groups,
        samples=run.samples,
        staleness=staleness,
        transfer=roofline.transfer(model, device, gpus + trainers),
        reread=roofline.prefill(model, device, work.context),
        failures=1 / (hours * 3600),
        trainer_failures=trainers / (hours * 3600),
        restart=run.restart,
        seed=seed,
    )


def name(staleness: float) -> str:
    return {0: "synchronous", math.inf: "no bound"}.get(staleness, f"staleness {staleness:g}")


def settled(outcome: Outcome) -> float:
    """Tokens/s once the pipeline is full: a real run has hundreds of updates."""
    return outcome.rate_after(outcome.updates // 4)


def table(found: dict[tuple[float, float, int], Outcome], hours: float) -> str:
    heads = ["", *(f"{gpus:,}" for gpus in GPUS)]
    rows = [heads, ["---", *["---:"] * len(GPUS)]]
    for staleness in STALENESS:
        outcomes = [found[staleness, hours, gpus] for gpus in GPUS]
        rows.append([name(staleness), *(f"{settled(o) / 1e3:,.0f} k" for o in outcomes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def details(found: dict[tuple[float, float, int], Outcome], hours: float, gpus: Sequence[int]) -> str:
    heads = ["GPUs that write", "", "tokens/s", "trainer idle", "slots in use", "dropped",
             "staleness, mean (most)", "length of what is learned from", "begun again"]  # fmt: skip
    rows = [heads, ["---", "---", *["---:"] * 7]]
    for count in gpus:
        for staleness in STALENESS:
            o = found[staleness, hours, count]
            old = sum(v * n for v, n in o.staleness.items()) / sum(o.staleness.values())
            rows.append(
                [
                    f"{count:,}", name(staleness), f"{settled(o):,.0f}", f"{o.idle / o.seconds:.0%}",
                    f"{o.occupied:.0%}", f"{o.dropped:.1%}", f"{old:.1f} ({max(o.staleness)})",
                    f"{o.shortening:.2f}", f"{o.resubmitted / max(1, o.lengths_begun[1]):.2%}",
                ]
            )  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


#: Okabe and Ito's colours, which colour-blind readers tell apart; each line has a mark of its own, too
INKS = {
    0: ("#000000", "o", 1.4), 1: ("#E69F00", "s", 1.4), 4: ("#0072B2", "^", 2.4),
    math.inf: ("#009E73", "D", 4.0),
}  # fmt: skip
PAPER, FAINT = "#fdfcf9", "#6f6a62"


def draw(found: dict[tuple[float, float, int], Outcome], title: str, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8.6, 5.2), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for staleness in STALENESS:
        colour, mark, width = INKS[staleness]
        for hours, dash in ((LLAMA, "-"), (SPOT, (0, (2, 2)))):
            rates = [settled(found[staleness, hours, gpus]) for gpus in GPUS]
            label = name(staleness) if hours == LLAMA else None
            order = 5 - width  # lines that lie on each other: the thinner on top
            axes.plot(
                GPUS, rates, ls=dash, marker=mark, ms=4 + width, lw=width, color=colour, label=label,
                zorder=order,
            )  # fmt: skip
    first = settled(found[4, LLAMA, GPUS[0]])
    axes.plot(
        GPUS,
        [first * g / GPUS[0] for g in GPUS],
        color=FAINT,
        lw=0.8,
        ls="-.",
        label="in proportion",
        zorder=0,
    )
    axes.plot([], [], color=FAINT, ls=(0, (2, 2)), lw=1.8, label=f"dotted: a GPU lasts {SPOT:.0f} hours")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(GPUS, [f"{g:,}" for g in GPUS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks([1e4, 3e4, 1e5, 3e5, 1e6, 3e6])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y / 1e6:g} M" if y >= 1e6 else f"{y / 1e3:g} k")
    )
    axes.set_xlabel("GPUs that write answers (half as many learn beside them)", color=FAINT, fontsize=9)
    axes.set_ylabel("tokens learned from, a second", color=FAINT, fontsize=9)
    axes.set_title(title, loc="left", fontsize=11, color="#1d1c1a", pad=12)
    axes.set_facecolor(PAPER)
    axes.grid(axis="y", color="#e5e1d8", lw=0.8)
    axes.tick_params(colors=FAINT, labelsize=9, length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, labelcolor=FAINT, loc="upper left")
    figure.savefig(out, format="png", facecolor=PAPER)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--updates", type=int, default=24, help="of each simulated run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="draw the figure, for example docs/scale.png")
    asked = parser.parse_args()
    run, begun, answers = Run(), time.perf_counter(), 0
    found: dict[tuple[float, float, int], Outcome] = {}
    for hours in (LLAMA, SPOT):
        for staleness in STALENESS:
            for gpus in GPUS:
                # of what is seldom lost, and lost for long, a few updates say nothing
                updates = asked.updates * (LONGER if hours == SPOT and gpus >= 128 else 1)
                outcome = simulate(pipeline(run, gpus, staleness, hours, asked.seed), updates)
                found[staleness, hours, gpus] = outcome
                answers += outcome.lengths_begun[1]
                every = 2 * len(STALENESS) * len(GPUS)
                print(
                    f"{len(found)} of {every}: {name(staleness)}, {gpus:,} GPUs that "
                    f"last {hours:,.0f} hours; {time.perf_counter() - begun:.0f} s so far",
                    file=sys.stderr,
                )
    print(f"Tokens/s that are learned from, by GPUs that write; a GPU lasts {LLAMA:,.0f} hours:\n")
    print(table(found, LLAMA))
    print(
        f"\nThe same; a GPU lasts {SPOT:,.0f} hours and takes {run.restart / 60:.0f} minutes to come back:\n"
    )
    print(table(found, SPOT))
    print("\nWhat happens, without many failures:\n")
    print(details(found, LLAMA, (64, 1024)))
    print("\nAnd with them:\n")
    print(details(found, SPOT, (1024,)))
    print(
        f"\n{len(found)} runs, {answers / 1e6:.1f} M answers, {time.perf_counter() - begun:.0f} s", flush=True
    )
    if asked.out:
        draw(found, headline(found), asked.out)


def headline(found: dict[tuple[float, float, int], Outcome]) -> str:
    """What the figure shows, in its own numbers."""
    last, first = GPUS[-1], GPUS[0]
    gain = {s: settled(found[s, LLAMA, last]) / settled(found[s, LLAMA, first]) for s in STALENESS}
    return (
        f"{last // first} × the GPUs: {gain[0]:.0f} × the speed when every update waits for the longest "
        f"answer,\n{gain[4]:.0f} × when writing may run four updates ahead"
    )


if __name__ == "__main__":
    main()
