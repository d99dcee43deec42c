"""The comparison of paths: one line a kind, over tokens, with the errors that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from html_page import Page

from liubai.report import write_report
from liubai.report.paths import finding, measured, section
from liubai.report.read import Run, Stage, read_run
from liubai.report.story import evaluations
from liubai.report.svg import Chart, Curve, Line


def evaluated(
    name: str, kind: str, accuracy: float, written: float, *, number: int = 1, by: str | None = None,
    judged: float = 0.0, stderr: float | None = 0.02, parent: str = "zero", n_problems: int = 200, **way: Any,
) -> Stage:  # fmt: skip
    result = {
        "label": name, "pass@1": accuracy, "stderr": stderr, "tokens_spent": written, "tokens_judged": judged,
        "tokens_read": 7.0, "seconds": 0.0125, "problems": {"make": 1.0}, "n_problems": n_problems,
        "way": {"name": name, "kind": kind, "number": number, "by": by, "thinking_budget": None,
                "think_at_least": 0, **way},
    }  # fmt: skip
    return Stage(f"by-{name}".replace(":", "-"), "eval", parent, (parent,), result=result)


def said(text: str) -> str:
    """As a title says it, with blanks that do not break."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def run_of(*stages: Stage) -> Run:
    return Run(Path("x"), "", {}, list(stages), [], None)


STAGES = (
    evaluated("vote:8", "vote", 0.70, 400.0, number=8),
    evaluated("sample:1", "sample", 0.50, 50.0),
    evaluated("vote:2", "vote", 0.55, 100.0, number=2),
    evaluated("best:8", "best", 0.68, 200.0, number=8, by="process", judged=250.0),
    evaluated("tree:16", "tree", 0.62, 300.0, number=16, by="rollouts"),
    evaluated("sample:1", "sample", 0.52, 80.0, think_at_least=60),
    evaluated("sample:1", "sample", 0.40, 20.0, thinking_budget=15),
)


def test_one_line_a_kind_over_the_tokens_of_an_answer() -> None:
    part = section(run_of(*STAGES))
    assert part is not None
    [chart] = part.charts
    lines = {line.label: line for line in chart.lines}
    assert list(lines) == [
        "one draw", "one draw, a longer thought", "one draw, a shorter thought", "majority vote",
        "best of n (process model)", "tree search (rollouts)",
    ]  # fmt: skip
    assert lines["majority vote"].curve == Curve((100.0, 400.0), (0.55, 0.70))
    assert lines["best of n (process model)"].curve == Curve((450.0,), (0.68,))  # what the judge read counts
    assert list(lines["majority vote"].errors) == [0.02, 0.02]
    assert len({(line.ink, line.dash) for line in chart.lines}) == 6
    assert chart.log_x
    assert part.finding == said("From 50.0 % by sample:1 to 70.0 % by vote:8, at 8.0 times the tokens.")
    assert chart.title == part.finding.rstrip(".")


def test_no_evaluation_by_paths_no_part() -> None:
    plain = evaluated("a", "vote", 0.5, 10.0)
    assert plain.result is not None
    del plain.result["way"]
    assert section(run_of(plain)) is None
    empty = Stage("e", "eval", "zero", result={"way": {"kind": "vote"}})
    assert measured(empty) is None


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (STAGES[1:2], "Nothing is better than sample:1 (50.0 %)."),
        (
            (STAGES[1], evaluated("vote:4", "vote", 0.53, 150.0)),
            "Nothing is surely better than sample:1 (50.0 %): vote:4 has 53.0 % at 3.0 times the tokens, "
            "which is within 2 standard errors.",
        ),
        (
            (STAGES[1], evaluated("vote:4", "vote", 0.68, 150.0), STAGES[0]),
            "From 50.0 % by sample:1 to 70.0 % by vote:8, at 8.0 times the tokens; vote:4 comes as far "
            "within the noise at 150 tokens.",
        ),
        (
            (
                evaluated("best:2", "best", 0.70, 100.0, by="process"),
                evaluated("best:16", "best", 0.60, 900.0, by="process"),
                evaluated("vote:2", "vote", 0.70, 110.0),
                evaluated("vote:16", "vote", 0.66, 910.0),
            ),
            "Nothing is better than best:2 (70.0 %). Best of n (process model) falls from 70.0 % to 60.0 %.",
        ),
    ],
)  # fmt: skip
def test_the_title_claims_no_more_than_the_numbers(stages: tuple[Stage, ...], expected: str) -> None:
    found = [m for s in stages if (m := measured(s)) is not None]
    assert finding(found) == said(expected)


@pytest.mark.parametrize("same", [True, False])
def test_differences_are_taken_question_by_question_where_the_questions_are_the_same(
    same: bool, tmp_path: Path
) -> None:
    """Hard and easy questions make both means unsure, and say nothing about which is higher."""
    plain = evaluated("sample:1", "sample", 0.50, 50.0, stderr=0.05)
    voted = evaluated("vote:4", "vote", 0.55, 200.0, stderr=0.05)
    for stage, gain in ((plain, 0.0), (voted, 0.05)):
        stage.folder = tmp_path / stage.name
        stage.folder.mkdir()
        asked = [f"{i}{'' if same else stage.name}" for i in range(100)]
        scores = [[q, [i % 2 * 0.9 + gain + i % 3 * 0.01]] for i, q in enumerate(asked)]
        (stage.folder / "scores.json").write_text(json.dumps({"scores": scores}))
    told = finding([m for s in (plain, voted) if (m := measured(s)) is not None])
    assert told.startswith("From" if same else "Nothing is surely better")


def test_what_was_asked_otherwise_is_another_figure() -> None:
    other = (
        evaluated("vote:4", "vote", 0.9, 150.0, n_problems=10),
        evaluated("vote:4", "vote", 0.2, 150.0, parent="base"),
    )
    part = section(run_of(*STAGES, *other))
    assert part is not None
    assert len(part.charts) == 3
    assert len({chart.id for chart in part.charts}) == 3
    assert [sum(len(line.curve.xs) for line in chart.lines) for chart in part.charts] == [7, 1, 1]


def test_a_judge_is_not_whose_answers_they_are() -> None:
    """A checkpoint that was brought along, and a judge that was made here."""
    judge = Stage("judge", "process", "")
    part = section(
        run_of(judge, evaluated("vote:4", "vote", 0.5, 9.0, parent=""),
               evaluated("best:4", "best", 0.6, 9.0, parent="judge"))
    )  # fmt: skip
    assert part is not None
    assert len(part.charts) == 1
    assert "<caption>the model, by" in part.body


def test_bars_reach_one_error_up_and_down() -> None:
    """Against the places of the ticks: the axis is linear, so two ticks say where everything is."""
    line = Line("x", Curve((10.0, 40.0), (0.4, 0.6)), dots=True, errors=(0.1, 0.05))
    svg = str(Chart("c", "t", "c", "y", [line], percent=True, zero=False, log_x=True).svg)
    ticks = {
        int(text): float(y) - 4
        for y, text in re.findall(r'class="tick" text-anchor="end" x="[\d.]+" y="([\d.]+)">(\d+)%', svg)
    }
    (low, low_y), *_, (high, high_y) = sorted(ticks.items())

    def share(y: str) -> float:
        return (low + (float(y) - low_y) * (high - low) / (high_y - low_y)) / 100

    bars = re.search(r'class="raw bars ink0" d="([^"]+)"', svg)
    assert bars is not None
    ends = [[share(y) for y in pair] for pair in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", bars[1])]
    assert [sorted(e) for e in ends] == [
        pytest.approx([0.3, 0.5], abs=0.01),
        pytest.approx([0.55, 0.65], abs=0.01),
    ]
    assert low / 100 <= 0.3  # the axis has room for them
    assert "bars" not in str(Chart("c", "t", "c", "y", [Line("x", Curve((1.0, 2.0), (0.4, 0.6)))]).svg)


def test_it_stands_in_the_report_and_the_checkpoints_do_not_multiply(tmp_path: Path) -> None:
    names = ["plain", *(f"e{i}" for i in range(len(STAGES)))]
    recipe = ['name = "p"', "[stages.zero]", 'kind = "rl"']
    for name in names:
        recipe += [f"[stages.{name}]", 'kind = "eval"', 'from = "zero"']
    (tmp_path / "recipe.toml").write_text("\n".join(recipe), encoding="utf-8")
    plain = {k: v for k, v in (STAGES[1].result or {}).items() if k not in ("way", "tokens_spent")}
    results = [{**plain, "label": "Zero & co", "pass@k": {"1": 0.5}}, *(s.result for s in STAGES)]
    for i, (name, result) in enumerate(zip(names, results, strict=True), 2):
        folder = tmp_path / f"{i}-{name}"
        folder.mkdir()
        (folder / "eval.json").write_text(json.dumps(result), encoding="utf-8")
        (folder / "DONE").write_text("{}", encoding="utf-8")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert "Several paths, equal tokens" in page.text["paths"]
    assert "best of n (process model): best:8" in page.text["paths"]
    assert "one draw, a longer thought: sample:1, at least 60" in page.text["paths"]
    assert said("From 50.0 % by sample:1") in page.text["chart-paths-0"]
    assert [e.label for e in evaluations(read_run(tmp_path))] == ["Zero & co"]


def test_what_a_file_says_is_escaped() -> None:
    part = section(run_of(evaluated("<b>x", "vote", 0.5, 10.0), evaluated("y", "<i>", 0.4, 12.0)))
    assert part is not None
    assert "<b>x" not in str(part.body)
    assert "<i>" not in str(part.body) + str(part.charts[0].svg)
