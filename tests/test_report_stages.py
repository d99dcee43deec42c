"""The report of a pipeline: the table of checkpoints, how each measure went, learning from examples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fake_run import CHECKPOINTS, lines, write_fake_pipeline, write_fake_run
from html_page import Page

from liubai.report import headline, save_figure, write_report
from liubai.report.examples import example_charts, sample_table
from liubai.report.read import read_run
from liubai.report.stages import LEAST, course, stage_charts, stage_table
from liubai.report.story import columns, evaluations, pair

LABELS = ["Base", "Zero", "Dev1", "Dev2", "Dev3", "R1"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_pipeline(tmp_path_factory.mktemp("run") / "r1")


def change(run: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Every eval.json of ``run`` after ``edit``."""
    for path in sorted(run.glob("*/eval.json")):
        result = json.loads(path.read_text())
        edit(result)
        path.write_text(json.dumps(result))
    return run


def html_of(run: Path) -> str:
    html = write_report(run).read_text(encoding="utf-8")
    Page(html)  # balanced
    return html


def grid(html: str, name: str) -> list[list[str]]:
    """The rows of the first table inside the element called ``name``, as the text of their cells."""
    inside = html[html.index(f'id="{name}"') :]
    table = inside[: inside.index("</table>")]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in rows]
    return [[unescape(re.sub(r"<[^>]+>", " ", c)).strip() for c in row] for row in cells]


# --- the table ------------------------------------------------------------------------------------


def test_every_number_stands_in_its_cell(pipeline: Path) -> None:
    groups, header, *rows = grid(html_of(pipeline), "stage-by-stage")
    assert groups == ["", "accuracy", "form and thought", "length", "preference"]
    assert [cell.split()[0] for cell in header] == [
        *("checkpoint", "make", "sum", "solve", "errand"),
        *("format", "language", "readable", "unsound", "tokens", "win"),
    ]
    assert [cell.split()[-1] for cell in header[1:5]] == ["pass@1"] * 3 + ["score"]
    assert [row[0].split() for row in rows] == [
        *(
            ["Base", "pretrain"],
            ["Zero", "rl"],
            ["Dev1", "sft"],
            ["Dev2", "rl"],
            ["Dev3", "sft"],
            ["R1", "ppo"],
        )
    ]
    for row in rows:
        shares, form, tokens = CHECKPOINTS[row[0].split()[0]]
        for cell, share in zip(row[1:5], shares, strict=True):
            text = "–" if share is None else f"{100 * share:.1f} % ± 2.1"
            assert " ".join(cell.removeprefix("★").split()) == text
        for cell, share in zip(row[5:9], form, strict=True):
            assert cell.removeprefix("★").strip() == ("–" if share is None else f"{100 * share:.1f} %")
        assert row[9] == f"{tokens:.0f}"
    assert [" ".join(row[10].split()) for row in rows] == ["–"] * 5 + ["71.0 % over Dev3"]


def test_the_best_of_each_column_is_marked(pipeline: Path) -> None:
    html = html_of(pipeline)
    _, header, *rows = grid(html, "stage-by-stage")
    best = {
        title.split()[0]: [row[0].split()[0] for row in rows if row[j].startswith("★")]
        for j, title in enumerate(header)
    }
    assert best == {
        "checkpoint": [],
        "make": ["R1"],
        "sum": ["R1"],
        "solve": ["Dev3"],  # R1 has no figure there
        "errand": ["R1"],
        "format": ["R1"],
        "language": ["R1"],
        "readable": ["Dev3", "R1"],  # a tie
        "unsound": ["R1"],  # the least
        "tokens": [],  # neither more nor less is better
        "win": [],  # there is nothing to compare it with
    }
    assert html.count('<b class="best"><span>★</span>') == 9  # bold, and not by colour alone


def test_a_tie_is_what_reads_the_same(tmp_path: Path) -> None:
    close = {"Dev3": 0.80012, "R1": 0.80031}

    def edit(result: dict[str, Any]) -> None:
        result["families"]["make"]["pass@1"] = close.get(result["label"], 0.2)
        result["format"] = 0.9

    table = stage_table(read_run(change(write_fake_pipeline(tmp_path), edit)))
    assert table is not None
    by_label = {c.label: c for c in table.columns}
    assert [cell.best for cell in by_label["make"].cells] == [False] * 4 + [True] * 2
    assert not any(cell.best for cell in by_label["format"].cells)  # all alike: none is the best


def test_win_rates_over_different_checkpoints_are_not_compared(tmp_path: Path) -> None:
    def best(rivals: dict[str, str]) -> list[str]:
        def edit(result: dict[str, Any]) -> None:
            if result["label"] in rivals:
                rate = 0.4 if result["label"] == "Dev3" else 0.6
                result |= {"win_rate": rate, "against": rivals[result["label"]]}

        table = stage_table(read_run(change(write_fake_pipeline(tmp_path), edit)))
        assert table is not None
        cells = {c.label: c for c in table.columns}["win rate"].cells
        return [label for label, cell in zip(table.checkpoints, cells, strict=True) if cell.best]

    assert best({"Dev3": "Zero", "R1": "Zero"}) == ["R1"]
    assert best({"Dev3": "Zero", "R1": "Dev3"}) == []


def test_a_family_with_a_pass_rate_anywhere_shows_no_scores(tmp_path: Path) -> None:
    """A score among accuracies would be compared with them."""

    def edit(result: dict[str, Any]) -> None:
        if result["label"] == "R1":
            result["families"]["errand"]["pass@1"] = 0.5

    run = change(write_fake_pipeline(tmp_path), edit)
    _, header, *rows = grid(html_of(run), "stage-by-stage")
    assert header[4].split() == ["errand", "pass@1"]
    assert [row[4].split()[0] for row in rows] == ["–"] * 5 + ["50.0"]


def test_what_no_checkpoint_has_is_no_column(tmp_path: Path) -> None:
    def edit(result: dict[str, Any]) -> None:
        for key in ("unsound", "readable", "win_rate"):
            result[key] = None
        result.pop("language")
        result["families"].pop("solve")

    run = change(write_fake_pipeline(tmp_path), edit)
    groups, header, *_ = grid(html_of(run), "stage-by-stage")
    assert groups == ["", "accuracy", "form and thought", "length"]
    assert [cell.split()[0] for cell in header[1:]] == ["make", "sum", "errand", "format", "tokens"]
    table = stage_table(read_run(run))
    assert table is not None
    assert table.groups == [("accuracy", 3), ("form and thought", 1), ("length", 1)]
    assert [c.label for c in table.columns if c.opens] == ["make", "format", "tokens"]


def test_odd_values_are_not_measured(tmp_path: Path) -> None:
    """Null, NaN, text and figures of the wrong shape are "–", and the page is whole."""

    def edit(result: dict[str, Any]) -> None:
        if result["label"] == "Zero":
            result["families"] = {"make": {"pass@1": float("nan"), "stderr": "?"}, "sum": None, "solve": 3}
            result |= {"language": "much", "format": float("inf"), "mean_tokens": None, "problems": None}
        if result["label"] == "Dev1":
            result["families"] = "none"  # as if it had none: no row

    rows = grid(html_of(change(write_fake_pipeline(tmp_path), edit)), "stage-by-stage")[2:]
    assert [row[0].split()[0] for row in rows] == ["Base", "Zero", "Dev2", "Dev3", "R1"]
    assert rows[1][1:7] == ["–"] * 6
    assert rows[1][9] == "–"


@pytest.mark.parametrize("kept", [0, 1])
def test_one_evaluation_over_families_is_no_pipeline(tmp_path: Path, kept: int) -> None:
    run = write_fake_run(tmp_path)
    path = run / "3-zero-after" / "eval.json"
    if kept:
        families = {"make": {"pass@1": 0.5}, "sum": {"pass@1": 0.6}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"families": families}))
    page = Page(html_of(run))
    assert not {"stage-by-stage", "examples", "chart-families", "chart-form"} & set(page.ids)
    assert stage_charts(read_run(run)) == []


def test_names_from_files_are_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"' </td></table>"

    def edit(result: dict[str, Any]) -> None:
        result["families"][evil] = {"score": 0.5}
        result |= {"label": evil + result["label"], "against": evil, "problems": {evil: 1.0}}

    run = change(write_fake_pipeline(tmp_path), edit)
    (run / "4-cold" / "sample.json").write_text(json.dumps({"asked": 3, "kept": 1, "dropped": {evil: 2}}))
    page = Page(html_of(run))
    assert not [t for t, a in page.tags if t == "img" or any(k.startswith("on") for k in a)]
    assert "onerror=alert(1)" in page.text["stage-by-stage"]
    assert "onerror=alert(1)" in page.text["kept"]


# --- the rest of the page -------------------------------------------------------------------------


def test_the_headline_has_the_overall_figures_in_the_recipes_order(pipeline: Path) -> None:
    html = html_of(pipeline)
    header, *rows = grid(html, "headline")
    assert [row[0].split()[0] for row in rows] == LABELS
    overall = {"Base": 0.162, "Dev2": 0.754, "R1": 0.8375}  # means of make, sum and solve, where measured
    by_label = {row[0].split()[0]: row for row in rows}
    for label, value in overall.items():
        cell = by_label[label][header.index("pass@1")]
        assert cell.split() == [f"{100 * value:.1f}", "%", "±", "1.1"], label
    assert [row[header.index("unsound")] for row in rows] == [
        "–",
        *(f"{v} %" for v in (18.4, 9.1, 4.2, 3.5, "3.0")),
    ]
    assert "200 held-out problems (make, sum, solve, errand) × 4 answers per checkpoint." in html
    text = headline(pipeline).splitlines()
    assert [line.split()[0] for line in text] == ["checkpoint", *LABELS]
    assert "missing" not in Page(html).ids


def test_the_title_tells_the_way_from_first_to_last(pipeline: Path) -> None:
    match = re.search(r"<h1>(.*?)</h1>", html_of(pipeline))
    assert match is not None
    assert match[1].replace("\N{NO-BREAK SPACE}", " ") == (
        "From Base to R1, pass@1 went from 16.2 % to 83.8 % and the mean answer from 31 to 90 tokens. "
        "Language consistency falls to 61 % in Zero and is back at 99 % in R1."
    )


def test_weights_come_from_the_parent_that_has_some(pipeline: Path) -> None:
    """Stages find their inputs by what they are: the order of ``from`` says nothing."""
    run = read_run(pipeline)
    stages = {s.name: s for s in run.stages}
    assert stages["dev1"].parents == ("cold", "base")
    assert [stages[name].parent for name in ("dev1", "dev3", "r1", "eval-r1")] == [
        "base",
        "base",
        "dev3",
        "r1",
    ]
    assert [e.label for e in evaluations(run) if e.after] == ["Zero", "Dev2", "R1"]  # ppo counts as rl
    both = pair(run)
    assert both is not None
    assert [e.label for e in both] == ["Base", "Zero"]


def test_ppo_shares_the_curves_of_reinforcement_learning(pipeline: Path, tmp_path: Path) -> None:
    html = html_of(pipeline)
    page = Page(html)
    for chart in ("chart-accuracy", "chart-reflections", "chart-entropy"):
        assert all(name in page.text[chart] for name in ("zero", "dev2", "r1")), chart
    assert "<dt>steps of RL</dt><dd>120</dd>" in html  # three stages of 40
    assert save_figure(pipeline, tmp_path / "x.png").stat().st_size > 20_000


def test_rl_shows_language_soundness_and_preferences(pipeline: Path) -> None:
    page = Page(html_of(pipeline))
    assert {"chart-language", "chart-unsound", "chart-preference", "chart-win"} <= set(page.ids)
    language = page.text["chart-language"]
    assert all(name in language for name in ("zero", "dev2", "r1", "readable"))
    assert "r1" in page.text["chart-win"]  # the only line says whose it is
    assert "zero" not in page.text["chart-win"]
    for name in ("language", "preference", "process"):
        assert name in page.text["chart-parts-r1"]
    assert "process" not in page.text["chart-parts-zero"]
    assert {"exploration", "reward"} <= set(page.ids)
    plain = Page(html_of(write_fake_run(pipeline.parent / "plain")))
    assert not {"chart-language", "chart-unsound", "chart-preference", "chart-win"} & set(plain.ids)


def test_before_and_after_show_what_was_judged_and_only_that(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path)
    before = [row[0] for row in grid(html_of(run), "headline")[1:]]
    assert not {"language", "readable", "unsound"} & set(before)
    path = run / "3-zero-after" / "eval.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"language": 0.613, "readable": None, "unsound": 0.0})
    )
    html = html_of(run)
    rows = {row[0]: row[1:] for row in grid(html, "headline")[1:]}
    assert rows["language"] == ["–", "61.3 %", "–"]
    assert rows["unsound"] == ["–", "0.0 %", "–"]
    assert "readable" not in rows
    assert [row for row in rows if row not in ("language", "unsound")] == before
    assert "Language is the share of" in Page(html).text["headline"]
    assert "Readable are" not in Page(html).text["headline"]
    assert re.search(r"^language +– +→ +61\.3 %$", headline(run), re.MULTILINE)
    assert [key for key, _, _ in columns(evaluations(read_run(run)))][-4:-1] == [
        "format",
        "language",
        "unsound",
    ]


# --- how it went ----------------------------------------------------------------------------------


def told(*values: float, least: float = LEAST) -> str | None:
    said = course("It", [(f"c{i}", v) for i, v in enumerate(values)], least)
    return said and said.replace("\N{NO-BREAK SPACE}", " ")


def test_what_a_course_is_told_as() -> None:
    assert told(0.9, 0.61, 0.95, 0.99) == "It falls to 61 % in c1 and is back at 99 % in c3"
    assert told(0.9, 0.5, 0.7) == "It falls to 50 % in c1 and recovers to 70 % in c2"
    assert told(0.9, 0.5, 0.87) == "It falls to 50 % in c1 and is back at 87 % in c2"  # but for noise
    # the fall that was made good, not the lowest point
    assert told(0.1, 0.8, 0.6, 0.9) == "It falls to 60 % in c2 and is back at 90 % in c3"
    assert told(0.1, 0.5, 0.8) == "It rises from 10 % in c0 to 80 % in c2"
    assert told(0.8, 0.5, 0.1) == "It falls from 80 % in c0 to 10 % in c2"
    assert told(0.1, 0.9, 0.4) == "It peaks at 90 % in c1 and ends at 40 % in c2"
    assert told(0.5, 0.53, 0.5) == "It stays between 50 % and 53 %"
    assert told(0.991, 0.992) == "It stays at 99 %"
    assert told(0.5) is None
    assert told() is None
    # what is within the noise is not told
    assert told(0.5, 0.58, least=0.1) == "It stays between 50 % and 58 %"


def test_titles_say_what_was_found(tmp_path: Path) -> None:
    run = write_fake_pipeline(tmp_path)
    titles = [chart.title.replace("\N{NO-BREAK SPACE}", " ") for chart in stage_charts(read_run(run))]
    assert titles == [
        "Overall accuracy falls to 60 % in Dev1 and is back at 84 % in R1",
        "Language consistency falls to 61 % in Zero and is back at 99 % in R1",
    ]

    def edit(result: dict[str, Any]) -> None:
        for key in ("language", "pass@1"):
            result.pop(key)

    families, form = stage_charts(read_run(change(run, edit)))
    assert families.title == "Accuracy by family"
    assert form.title == "The form of the thoughts"
    assert [line.label for line in form.lines] == ["readable", "format"]


def test_lines_run_over_the_checkpoints(pipeline: Path) -> None:
    families, form = stage_charts(read_run(pipeline))
    assert [line.label for line in families.lines] == ["make", "sum", "solve", "errand", "overall"]
    for i, line in enumerate(families.lines[:4]):
        assert line.curve.xs == (0, 1, 2, 3, 4, 5)
        assert line.curve.ys == tuple(CHECKPOINTS[label][0][i] for label in LABELS)
    assert [line.label for line in form.lines] == ["language", "readable", "format"]
    assert form.lines[1].curve.ys == (0.77, 0.41, 0.93, None, 0.97, 0.97)
    looks = [(line.ink, line.dash) for line in families.lines]
    assert len(set(looks)) == len(looks)
    svg = families.svg
    places = {
        label: float(x)
        for x, label in re.findall(r'class="tick" text-anchor="middle" x="([\d.]+)" y="\d+">(\w+)', svg)
    }
    assert list(places) == LABELS
    assert list(places.values()) == sorted(places.values())
    dots = re.findall(r'<circle class="ink0" cx="([\d.]+)"', svg)  # of "make": under each name its dot
    assert [float(x) for x in dots] == list(places.values())
    hover = re.search(r'data-hover="(.*?)"', svg)
    assert hover is not None
    assert json.loads(unescape(hover[1]))["names"] == LABELS


# --- learning from examples -----------------------------------------------------------------------


def test_stages_that_learn_from_examples(pipeline: Path) -> None:
    charts = {chart.id: chart for chart in example_charts(read_run(pipeline))}
    lines_of = {id.removeprefix("examples-"): [line.label for line in c.lines] for id, c in charts.items()}
    taught = ["dev1", "dev3", "liking", "steps", "taste", "small"]
    assert lines_of == {
        "loss": ["dev1", "dev3", "small"],  # nats per token …
        "judging": ["liking", "steps", "taste"],  # … and per judgement: not on one axis
        "accuracy": ["liking", "steps", "taste"],
        "margin": ["liking", "taste"],
        "lr": taught,
        "speed": taught,
    }
    looks = {line.label: (line.ink, line.dash) for line in charts["examples-lr"].lines}
    assert len(set(looks.values())) == len(taught)
    for chart in charts.values():  # a stage looks the same everywhere
        assert all(looks[line.label] == (line.ink, line.dash) for line in chart.lines)
    assert charts["examples-margin"].lines[0].curve.ys[-1] == pytest.approx(2.1)
    page = Page(html_of(pipeline))
    assert "由例而学" in page.text["examples"]
    assert {f"chart-{id}" for id in charts} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_a_single_stage_is_named_in_the_title(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path)
    (run / "recipe.toml").write_text((run / "recipe.toml").read_text() + '[stages.cold]\nkind = "sft"\n')
    (run / "4-cold").mkdir()
    lines(run / "4-cold" / "metrics.jsonl", [{"step": s, "loss": 1 / s} for s in (1, 2, 3)])
    (chart,) = example_charts(read_run(run))
    assert chart.title == "Loss on answers · cold"
    page = Page(html_of(run))
    assert "chart-examples-loss" in page.ids
    assert "kept" not in page.ids


def test_what_became_of_the_sampled_answers(pipeline: Path) -> None:
    header, *rows = grid(html_of(pipeline), "kept")
    assert header == ["stage", "asked", "kept", "wrong", "mixed language", "duplicate"]
    assert [[" ".join(cell.split()) for cell in row] for row in rows] == [
        ["cold", "2,048", "1,197 58.4 %", "611", "240", "–"],
        ["chosen", "400", "298 74.5 %", "95", "–", "7"],
    ]


def test_unfinished_samples(tmp_path: Path) -> None:
    run = write_fake_pipeline(tmp_path)
    (run / "4-cold" / "sample.json").write_text('{"asked": 0, "kept": null, "dropped": 7}')
    table = sample_table(read_run(run))
    assert table is not None
    cold = table.rows[0]
    assert (cold.asked, cold.kept, cold.share, list(cold.dropped)) == ("0", "–", "", ["–", "–"])
    (run / "4-cold" / "sample.json").write_text("[")
    page = Page(html_of(run))
    assert "Cannot read 4-cold/sample.json" in page.text["missing"]
    assert "sample.json is missing" not in page.text["missing"]
    (run / "9-chosen" / "sample.json").unlink()
    assert sample_table(read_run(run)) is None
    assert "kept" not in Page(html_of(run)).ids


def test_a_recipe_that_has_only_begun_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[stages.cold]\nkind = "sft"\n')
    page = Page(html_of(tmp_path))
    assert "No stage that learns from examples has logged a step yet" in page.text["examples"]
    assert "“cold” (sft) has not started" in page.text["missing"]
