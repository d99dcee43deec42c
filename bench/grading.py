"""``python -m bench.grading [FOLDER]``: verdicts a second of the verifier ``math``, and how fast a hang ends.

FOLDER holds ``math500.jsonl`` and ``gsm8k_test.jsonl`` (default: ``../shared/data`` beside the checkout).
Each gold answer is judged against itself in another spelling, and against the gold answer of another
problem, in a :class:`liubai.grade.GraderPool` with two workers that are already up, as in a training run;
the rounds differ because gold answers are remembered. On a busy machine look at the last column: verdicts
a second of processor time, in one process, with nothing remembered.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import sympy.core.cache

from liubai.grade import GradeItem, GraderPool, maths
from liubai.grade.judge import judge

WORKERS = 2
ROUNDS = 3
LIMIT_S = 1.0
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def rewritten(answer: str) -> str:
    """The same answer as another writer would put it."""
    if re.fullmatch(r"-?[0-9]+", answer):
        return f"{int(answer):,}.0"
    answer = re.sub(r"\\d?frac *([0-9]) *([0-9])(?![0-9])", r"\\frac{\1}{\2}", answer)
    answer = answer.replace("\\frac", "\\dfrac").replace("(", "\\left( ").replace(")", " \\right)")
    return f"${answer.replace(' + ', '+')}$"


def for_sympy(golds: list[str]) -> list[str]:
    """The formulas among ``golds``, which no comparison of strings decides once "+ 0" is added."""
    return [
        g
        for g in golds
        if re.search(r"\\sqrt|\\pi|[a-z]", g)
        and not re.search(r"[,=]|text|mbox|begin|circ|^[^a-z]*.frac[^a-z]*$", g)
    ]


def items(golds: list[str], answers: list[str]) -> list[GradeItem]:
    return [
        GradeItem("math", gold, f"<think> so </think> so it is \\boxed{{{answer}}}.")
        for gold, answer in zip(golds, answers, strict=True)
    ]


def measure(pool: GraderPool, name: str, work: list[GradeItem]) -> None:
    rates = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        verdicts = pool.gather(pool.submit(work))
        rates.append(len(work) / (time.perf_counter() - started))
    right = sum(v.correct for v in verdicts)
    errors = sum(v.error is not None for v in verdicts)
    shown = ", ".join(f"{rate:,.0f}" for rate in rates)
    print(
        f"{name:<28} {len(work):>6} answers  {right:>5} right  {errors} errors   {shown} verdicts/s, "
        f"{by_processor(work):,.0f} a processor second"
    )


def by_processor(work: list[GradeItem]) -> float:
    maths._parsed.cache_clear()
    sympy.core.cache.clear_cache()
    started = time.process_time()
    for item in work:
        judge(item, maths.math)
    return len(work) / (time.process_time() - started)


def time_to_kill() -> None:
    hang = GradeItem("regex", "(a+)+b", f"<answer> {'a' * 60} </answer>")
    fine = GradeItem("regex", "(a+)+b", "<answer> aab </answer>")
    with GraderPool(1, LIMIT_S) as pool:
        pool.gather(pool.submit([fine]))
        for _ in range(ROUNDS):
            started = time.perf_counter()
            (verdict,) = pool.gather(pool.submit([hang]))
            took = time.perf_counter() - started
            again = time.perf_counter()
            pool.gather(pool.submit([fine]))
            back = time.perf_counter() - again
            print(
                f"{verdict.error}: gone {took - LIMIT_S:.3f} s after its limit, "
                f"a new worker {back:.2f} s later"
            )


def main(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "math500.jsonl").read_text().splitlines()]
    maths_golds = [row["answer"] for row in rows]
    rows = [json.loads(line) for line in (folder / "gsm8k_test.jsonl").read_text().splitlines()]
    school = [row["answer"].rsplit("####", 1)[1].strip() for row in rows]
    with GraderPool(WORKERS) as pool:
        pool.gather(pool.submit(items(["1"] * 64, ["\\sqrt{2}"] * 64)))  # both workers up, sympy loaded
        for name, golds in (("MATH-500", maths_golds), ("GSM8K", school)):
            measure(pool, f"{name}, rewritten", items(golds, [rewritten(gold) for gold in golds]))
            measure(pool, f"{name}, answer of the next", items(golds, golds[1:] + golds[:1]))
        formulas = for_sympy(maths_golds)
        measure(pool, "MATH-500, formulas + 0", items(formulas, [f"{gold} + 0" for gold in formulas]))
    time_to_kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
