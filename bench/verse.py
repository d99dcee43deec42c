"""``python -m bench.verse [FOLDER | RUN]``: how the verse verifiers do, or what a run did to verse.

FOLDER holds ``tang300_regulated.jsonl`` and ``sonnets.jsonl`` (default: ``../shared/data`` beside the
checkout). Printed are the share of poems that score 0.9 or more, how well the score tells them from the same
poems shuffled (area under the ROC curve), what it costs to hear Shakespeare's rhymes with today's ears, and
poems a second, in one process and in a :class:`liubai.grade.GraderPool` with two workers.

RUN is the folder of a run of ``recipes/experiments/verse.toml``. Its checkpoints answer held-out prompts, and
the parts of the score are printed, with standard errors over prompts, beside the share of poems that were
planned.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from liubai.grade import GradeItem, GraderPool, extract
from liubai.grade.sonnet import hear_sonnet
from liubai.grade.verse import FORMS, read_verse, verse

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
SHUFFLES = 10


def auc(above: Sequence[float], below: Sequence[float]) -> float:
    """How often a number of ``above`` is greater than one of ``below``; equal ones count half."""
    wins = sum((a > b) + (a == b) / 2 for a in above for b in below)
    return wins / len(above) / len(below)


def shuffled(lines: Sequence[str], unit: str, rng: random.Random) -> list[str]:
    """In another order: the lines, or all characters of a Chinese poem, or the words of each English line."""
    if unit == "lines":
        return rng.sample(list(lines), len(lines))
    if unit == "words":
        return [" ".join(rng.sample(words, len(words))) for words in map(str.split, lines)]
    loose = rng.sample("".join(lines), sum(map(len, lines)))
    size = len(lines[0])
    return ["".join(loose[i : i + size]) for i in range(0, len(loose), size)]


def report(
    name: str, poems: Sequence[Sequence[str]], units: Iterable[str], score: Callable[..., float]
) -> None:
    rng = random.Random(0)
    real = [score(i, lines) for i, lines in enumerate(poems)]
    text = f"{name:<34} {len(real):>4} poems  mean {mean(real):.3f}  {share(real):6.1%} score 0.9 or more"
    for unit in units:
        mixed = [
            score(i, shuffled(lines, unit, rng)) for i, lines in enumerate(poems) for _ in range(SHUFFLES)
        ]
        text += f"   {unit} shuffled: {mean(mixed):.3f}, AUC {auc(real, mixed):.3f}"
    print(text)


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def share(scores: Sequence[float]) -> float:
    return mean([float(score >= 0.9) for score in scores])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def agreement(folder: Path) -> None:
    tang = rows_of(folder / "tang300_regulated.jsonl")
    groups = {f"{form}, labelled": [r for r in tang if (r["form"], r["form_source"]) == (form, "label")]
              for form in FORMS}  # fmt: skip
    groups["labelled, without 五绝"] = [
        r for r in tang if r["form_source"] == "label" and r["form"] != "五绝"
    ]
    groups["all"] = tang
    for name, rows in groups.items():
        forms = [row["form"] for row in rows]
        report(
            name,
            [row["lines"] for row in rows],
            ("lines", "characters"),
            lambda i, lines, forms=forms: verse(forms[i], "\n".join(lines), {}),
        )
    sonnets = [row["lines"] for row in rows_of(folder / "sonnets.jsonl") if row["regular"]]
    for how in ("early", "modern"):
        meta = {"rhyme": how}

        def whole(i: int, lines: list[str], meta: dict[str, str] = meta) -> float:
            return hear_sonnet("", "\n".join(lines), meta).score

        def rhymes(i: int, lines: list[str], meta: dict[str, str] = meta) -> float:
            return hear_sonnet("", "\n".join(lines), meta).parts["rhyme"]

        report(f"sonnets, rhymes {how}", sonnets, ("lines", "words"), whole)
        report("  their rhyme alone", sonnets, ("lines", "words"), rhymes)
    kinds: dict[str, int] = defaultdict(int)
    for lines in sonnets:
        for fault in hear_sonnet("", "\n".join(lines), {}).faults:
            kinds[fault.code] += fault.code.startswith("rhyme ")
    pairs = 7 * len(sonnets)
    said = ", ".join(f"{code.removeprefix('rhyme ')} {n / pairs:.1%}" for code, n in kinds.items() if n)
    print(f"of {pairs} pairs of line ends, not full rhymes today: {said}")


def speed(folder: Path) -> None:
    items = [
        GradeItem("verse", row["form"], f"<think> </think> <answer>{row['text']}</answer>")
        for row in rows_of(folder / "tang300_regulated.jsonl")
    ]
    sonnets = [
        GradeItem("sonnet", "", "<think> </think> <answer>" + "\n".join(row["lines"]) + "</answer>")
        for row in rows_of(folder / "sonnets.jsonl")
    ]
    for name, work in (("verse", items * 10), ("sonnet", sonnets * 10)):
        with GraderPool(2) as pool:
            pool.gather(pool.submit(work[:1]))  # the tables are read
            started, processor = time.perf_counter(), time.process_time()
            pool.gather(pool.submit(work))
            took, used = time.perf_counter() - started, time.process_time() - processor
        print(f"{name:<8} {len(work) / took:>8,.0f} poems/s, {len(work) / used:,.0f} a processor second")


def parts_of(run: Path, prompts: int = 200, samples: int = 8) -> None:
    """What the checkpoints of a run write, part by part."""
    from liubai.stages.evaluate import answered, held_out_of

    problems = held_out_of("verse", prompts, 0)
    for path in sorted(run.glob("*/checkpoint")):
        found = answered(path, problems, samples, max_tokens=64, temperature=1.0, top_p=1.0, seed=0)
        by_prompt: dict[str, list[float]] = defaultdict(list)
        for problem, responses in zip(problems, found.responses, strict=True):
            rows = [parts(problem.gold, response) for response in responses]
            for name in rows[0]:
                by_prompt[name].append(mean([row[name] for row in rows]))
        said = "  ".join(
            f"{name} {mean(each):.3f} ± {statistics.stdev(each) / len(each) ** 0.5:.3f}"
            for name, each in by_prompt.items()
        )
        print(f"{path.parent.name:<12} {said}")


def parts(form: str, response: str) -> dict[str, float]:
    reading = read_verse(form, extract(response, "<think>").answer or "", {})
    planned = float("韵" in response.partition("</think>")[0])
    return {"score": reading.score, "full": float(reading.score == 1), **reading.parts, "planned": planned}


def main(place: Path) -> None:
    if (place / "recipe.toml").exists():
        parts_of(place)
        return
    agreement(place)
    speed(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
