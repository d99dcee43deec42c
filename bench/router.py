"""``python -m bench.router CHECKPOINT``: always fast, always thinking and routed, on the same questions.

CHECKPOINT is a model of the wide world (``runs/…/16-r1/checkpoint``). The questions are held-out problems
of its families, with known golds, and arithmetic in natural wording, which it cannot read: who serves such a
model wants the calculator beside it. One question at a time, greedily; a way's latency is from the question
to the whole answer, the router's own time included. Prints the table of ``docs/router.md``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from liubai.grade import GradeItem, grade
from liubai.model.checkpoint import load
from liubai.problems import family
from liubai.problems.family import distinct_problems
from liubai.rollout.local import LocalWriter, run
from liubai.rollout.thinking import Ask, one
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive, stream
from liubai.serve.router import Router
from liubai.text.template import Template, template_for, template_source
from liubai.types import Problem

WAYS = ("fast", "think", "routed")
#: Of which families a kind of question is made.
KINDS: dict[str, tuple[str, ...]] = {
    "comparison": ("greater",), "summary": ("passage",), "errand": ("errand",),
    "hard": ("make", "total", "solve"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """``score`` from 0 to 1; ``tokens`` that the model wrote; ``way`` is where the question went."""

    kind: str
    score: float
    tokens: int
    seconds: float
    way: str


def arithmetic(rng: random.Random) -> Problem:
    """A calculation in words that people use; the gold is computed here, apart from the calculator."""
    a, b = rng.randint(10**8, 10**9 - 1), rng.randint(10**8, 10**9 - 1)
    p, q, r, s = (rng.randint(1, 9), rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 9))
    cents, other = rng.randint(1, 99999), rng.randint(1, 99999)
    share, whole = rng.randint(1, 99), 10 * rng.randint(1, 99)
    base, power = rng.randint(2, 9), rng.randint(10, 30)
    choices: list[tuple[str, str, Fraction]] = [
        (f"what is {a} * {b}?", f"{a}乘以{b}等于多少？", Fraction(a * b)),
        (f"calculate {p}/{q} + {r}/{s}", f"{p}/{q} 加 {r}/{s} 是多少", Fraction(p, q) + Fraction(r, s)),
        (
            f"how much is {cents / 100:.2f} plus {other / 100:.2f}",
            f"{cents / 100:.2f}加{other / 100:.2f}得多少",
            Fraction(cents + other, 100),
        ),
        (f"what is {share}% of {whole}", f"{whole}的{share}%是多少", Fraction(share * whole, 100)),
        (f"{base} to the power of {power}", f"{base}的{power}次方是多少？", Fraction(base**power)),
        (f"({a} - {b}) / {q} =", f"（{a}－{b}）÷{q}＝？", Fraction(a - b, q)),
    ]
    english, chinese, value = rng.choice(choices)
    language = rng.choice(("en", "zh"))
    prompt = english if language == "en" else chinese
    return Problem(prompt, str(value), "number", "arithmetic", language)


def questions(count: int, seed: int) -> list[tuple[str, Problem]]:
    """About ``count`` of each kind, mixed."""
    found = [("arithmetic", arithmetic(stream(seed, "arithmetic", i))) for i in range(count)]
    for kind, names in KINDS.items():
        for name in names:
            each = max(1, round(count / len(names)))
            found += [(kind, problem) for problem in distinct_problems(family(name), "eval", seed, each)]
    stream(seed, "mixed").shuffle(found)
    return found


class Side:
    """The model, with and without its thought, and the router in front of it."""

    def __init__(
        self, checkpoint: Path, max_tokens: int, temperature: float, seed: int, router: Router
    ) -> None:
        model, tokenizer = load(checkpoint, dtype=torch.float32, device="cpu")
        self.thinking = template_for(tokenizer, checkpoint)
        source = template_source(checkpoint) or self.thinking.source
        self.plain = Template(tokenizer, source, thinking=False)
        engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=1, max_length=max_tokens + 256)
        engine.load(model.state_dict(), version=0)
        self.writer = LocalWriter(engine, eos_ids=tokenizer.eos_ids)
        self.max_tokens, self.temperature, self.seed, self.router = max_tokens, temperature, seed, router

    async def answer(self, way: str, number: int, kind: str, problem: Problem) -> Outcome:
        started = time.perf_counter()
        taken, tokens = way, 0
        if way == "routed":
            decision = self.router.route(problem.prompt)
            taken = decision.way
            if decision.calculation is not None:
                response, prefilled = f"<answer> {decision.calculation.answer} </answer>", ""
        if taken != "tool":
            template = self.plain if taken == "fast" else self.thinking
            ask = Ask(
                question=problem.prompt,
                template=template,
                prompt_ids=tuple(template.prompt_ids(problem.prompt)),
                max_tokens=self.max_tokens,
                seed=derive(self.seed, "answer", number),
                temperature=self.temperature,
            )
            path = await one(self.writer, ask)
            response, prefilled, tokens = path.response, template.prefilled, path.tokens
        seconds = time.perf_counter() - started
        item = GradeItem(problem.verifier, problem.gold, response, {**problem.meta, "prefilled": prefilled})
        return Outcome(kind, grade(item).parts["correct"], tokens, seconds, taken)

    def all(self, asked: list[tuple[str, Problem]]) -> dict[str, list[Outcome]]:
        """Every question goes all ways in turn, so that a machine that grows busy is so for all of them."""

        async def work() -> dict[str, list[Outcome]]:
            outcomes: dict[str, list[Outcome]] = {way: [] for way in WAYS}
            for way in WAYS:
                await self.answer(way, 0, *asked[0])  # the first one warms up
            for i, question in enumerate(asked):
                for turn in range(len(WAYS)):
                    way = WAYS[(i + turn) % len(WAYS)]
                    outcomes[way].append(await self.answer(way, i, *question))
            return outcomes

        return run(self.writer, [work()])[0]


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Markdown: kinds of question down, ways across."""
    heads = ["questions", "n"]
    heads += [f"{what}: {way}" for what in ("score", "tokens", "ms") for way in WAYS] + ["routed to"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 2), "---"]]
    kinds = sorted({outcome.kind for outcome in outcomes[WAYS[0]]})

    def of_kind(way: str, kind: str) -> list[Outcome]:
        return [outcome for outcome in outcomes[way] if kind in (outcome.kind, "all")]

    for kind in [*kinds, "all"]:
        cells = [f"**{kind}**" if kind == "all" else kind, str(len(of_kind("fast", kind)))]
        cells += [f"{statistics.fmean(o.score for o in of_kind(way, kind)):.3f}" for way in WAYS]
        cells += [f"{statistics.fmean(o.tokens for o in of_kind(way, kind)):.1f}" for way in WAYS]
        cells += [f"{1000 * statistics.fmean(o.seconds for o in of_kind(way, kind)):.1f}" for way in WAYS]
        went = Counter(o.way for o in of_kind("routed", kind))
        cells.append(", ".join(f"{way} {n}" for way, n in went.most_common()))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.router", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=60, help="questions of each kind")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    asked = questions(options.count, options.seed)
    side = Side(options.checkpoint, options.max_tokens, options.temperature, options.seed, Router.load())
    print(table(side.all(asked)))


if __name__ == "__main__":
    main()
