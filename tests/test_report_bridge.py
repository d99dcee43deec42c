"""The bridge in the report: what its titles claim, what its figures hold, and that model text stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from html_page import Page

from liubai.report.bridge import section, section_of, write_alone
from liubai.report.bridge_charts import apart
from liubai.report.bridge_draw import Series, Spread, Spreads, spread
from liubai.report.bridge_view import LEVELS, level
from liubai.report.read import read_run

GROUPS = ("all", "right", "wrong")


def cell(mean: float | None, half: float = 0.2, n: int = 100) -> dict[str, Any]:
    if mean is None:
        return {"mean": None, "low": None, "high": None, "stderr": None, "n": 0}
    return {"mean": mean, "low": mean - half, "high": mean + half, "stderr": half / 2, "n": n}


def told(label: str = "Base", worth: float = 1.0, entropy: float = 0.5, **changes: Any) -> dict[str, Any]:
    """What a bridge.json says; wrong thoughts are worth six bits less."""
    worths = {"all": worth, "right": worth, "wrong": worth - 6}
    places = {"empty": 5.0, "own": 5.0 - worth, "another": 5.0, "shuffled": 5.0 - worth / 4, "foreign": 9.0}
    share = [i / 10 for i in range(11)]
    steps = [4.0 - 3.9 * s for s in share]
    curve = {
        "share": share,
        "nll": [cell(bits) for bits in steps],
        "entropy": [cell(bits) for bits in steps],
        "chance": [cell(0.1 + 0.8 * s, 0.05) for s in share],
    }
    return {
        "label": label,
        "utility": {g: cell(worths[g]) for g in GROUPS},
        "nll": {g: {name: cell(bits) for name, bits in places.items()} for g in GROUPS},
        "curve": dict.fromkeys(GROUPS, curve),
        "thought": {g: {"entropy": cell(entropy, 0.05), "tokens": cell(20.0)} for g in GROUPS},
        "gain": {"step": cell(1.0), "right_step": cell(1.5), "wrong_step": cell(-1.0), "costly": cell(0.2)},
        "forks": {
            "tokens": 50,
            "threshold": 1.2,
            "carry": 0.9,
            "words": [{"word": "wait", "forking": 9, "written": 12, "entropy": 1.4}],
        },
        "shown": [
            {
                "prompt": "total a 3 b 7",
                "right": True,
                "answer": "10",
                "steps": [
                    {"text": "a 3 plus b 7 is 10", "right": True},
                    {"text": "hm", "right": False},
                ],
                "curve": [4.0, 0.5, 2.5],
                "entropy": [3.0, 1.0, 1.5],
            }
        ],
    } | changes


def titles(*found: dict[str, Any]) -> dict[str, str]:
    return {chart.id.removeprefix("bridge-"): chart.title for chart in section_of(found).charts}


def test_titles_say_no_more_than_the_intervals() -> None:
    more = titles(told(worth=1.0), told("Zero", worth=1.5, entropy=0.2))
    assert more["utility"] == "A thought buys Zero more than Base"
    assert more["path"] == "Where Zero is right, it takes a narrower path than Base and buys more"
    noise = titles(told(worth=1.0), told("Zero", worth=1.3, entropy=0.52))
    assert noise["utility"] == "Thoughts buy Zero as much as Base, within the noise"
    assert noise["path"] == "Where Zero is right, it takes a path as wide as Base's and buys as much"
    less = titles(told(worth=1.0), told("Zero", worth=0.2, entropy=0.9))
    assert less["utility"] == "A thought buys Zero less than Base"
    assert less["path"] == "Where Zero is right, it takes a wider path than Base and buys less"


def test_titles_of_one_checkpoint() -> None:
    alone = titles(told(worth=2.0))
    assert "path" not in alone  # there is nothing to compare with
    assert alone["utility"] == "A thought buys Base 2.00 bits"
    assert alone["places"] == "In another order, Base's steps keep 25 % of what they buy"
    assert alone["entropy-right"] == "Right: Base has half made up its mind after 60 % of the thought"
    assert alone["entropy-wrong"] == "Wrong: Base ends as sure as where it is right"
    assert alone["chance"] == "Half-way, Base would be right 50 % of the time, at the end 90 %"
    assert alone["steps"] == "Right steps buy more than wrong ones"
    assert titles(told(worth=0.1))["utility"] == "On average thoughts buy Base nothing, within the noise"
    assert titles(told(worth=-2.0))["utility"] == "A thought costs Base 2.00 bits"


def unsure(value: Any) -> Any:
    """The same estimates, of a single problem."""
    if isinstance(value, dict) and "mean" in value:
        return value | {"low": None, "high": None, "stderr": None}
    if isinstance(value, dict):
        return {key: unsure(each) for key, each in value.items()}
    return [unsure(each) for each in value] if isinstance(value, list) else value


def test_without_intervals_nothing_is_told_apart() -> None:
    """Two points without intervals are as far apart as they like: nobody knows what chance does."""
    assert apart(Spread(0.0, 0.0, 0.0, sure=False), Spread(9.0, 8.0, 10.0)) == 0
    assert apart(Spread(0.0, -1.0, 1.0), Spread(9.0, 9.0, 9.0, sure=False)) == 0
    assert apart(Spread(0.0, -1.0, 1.0), Spread(9.0, 8.0, 10.0)) == 1
    both = unsure(told(worth=1.0)), unsure(told("Zero", worth=5.0, entropy=0.1))
    said = titles(*both)
    assert said["utility"] == "Thoughts buy Zero as much as Base, within the noise"
    assert said["path"] == "Where Zero is right, it takes a path as wide as Base's and buys as much"
    assert said["places"] == "What a right answer costs after other thoughts"
    alone = titles(unsure(told(worth=2.0)))
    assert alone["utility"] == "What a thought buys"
    assert alone["entropy-right"] == "Right: Base's answer stays open to the end, within the noise"
    assert alone["chance"] == "Half-way, Base would be right as often as at the end, within the noise"
    assert alone["steps"] == "Right steps buy no more than wrong ones, within the noise"
    finding = section_of([both[0]]).finding
    assert "Base 1.00 bits (of too few for an interval)" in finding


def test_the_titles_of_curves_ask_the_intervals() -> None:
    """Means that fall below a half, or rise, in intervals so wide that they say nothing."""

    def curved(half: float) -> dict[str, Any]:
        each = told()["curve"]["all"]
        wide = {
            key: [cell(e["mean"], half if key == "entropy" else half / 4) for e in each[key]]
            for key in ("nll", "entropy", "chance")
        }
        return told(curve=dict.fromkeys(GROUPS, wide | {"share": each["share"]}))

    noise, some = titles(curved(2.1)), titles(curved(1.5))
    assert noise["entropy-right"] == "Right: Base's answer stays open to the end, within the noise"
    assert noise["chance"] == "Half-way, Base would be right as often as at the end, within the noise"
    assert some["entropy-right"] == "Right: Base ends surer than it began"  # by how much is not known
    late = told()
    late["curve"]["right"] |= {"entropy": [cell(4.0)] * 10 + [cell(0.1)]}
    assert titles(late)["entropy-right"] == "Right: Base has half made up its mind only with its last step"
    cost = {"empty": 5.0, "own": 3.0, "another": 5.0, "shuffled": 5.1, "foreign": 9.0}
    within = told(nll={g: {name: cell(bits) for name, bits in cost.items()} for g in GROUPS})
    assert titles(within)["places"] == "In another order, Base's steps buy nothing, within the noise"
    cost["shuffled"] = 7.0
    worse = told(nll={g: {name: cell(bits) for name, bits in cost.items()} for g in GROUPS})
    assert titles(worse)["places"] == "In another order, Base's steps are worse than none"


def test_the_finding_names_every_checkpoint() -> None:
    said = section_of([told(), told("Zero", worth=3.0)]).finding
    assert (
        "Base 1.00 bits (0.80 to 1.20), 1.00 where the answer is right and −5.00 where the answer is wrong"
        in said
    )
    assert "Zero 3.00 bits (2.80 to 3.20)" in said


def test_every_chart_has_units_error_bars_and_a_legend() -> None:
    for chart in section_of([told(), told("Zero"), told("R1")]).charts:
        shown = Page(f"<div>{chart.svg}</div>")
        assert any(unit in chart.y_label for unit in ("bits", "%")), chart.id
        assert "95 % intervals" in chart.caption
        assert len(chart.legend) > 1
        marks = [a.get("class") or "" for _, a in shown.tags]
        assert any(m.startswith(("whisker", "band")) for m in marks), chart.id
        looks = {(line.ink, line.dash) for line in chart.legend}
        assert len(looks) == len(chart.legend)  # nothing is told apart by its name alone
        dashes = [line.dash for line in chart.legend]
        assert len(set(dashes)) > 1  # nor by colour alone


def test_points_stand_where_they_belong() -> None:
    points = [Spread(1.0, 0.0, 2.0), None, Spread(2.0, 1.5, 4.0)]
    chart = Spreads("x", "t", "c", "bits", (), x_names=["a", "b", "c"], series=[Series("one", points)])
    heights = [float(y) for y in re.findall(r'<circle[^>]* cy="([\d.]+)"', chart.svg)]
    whiskers = [tuple(map(float, m)) for m in re.findall(r'd="M[\d.]+ ([\d.]+)V([\d.]+)"', chart.svg)]
    assert len(heights) == len(whiskers) == 2
    unit = (heights[0] - heights[1]) / 1.0  # one bit
    assert whiskers[0] == pytest.approx((heights[0] + unit, heights[0] - unit), abs=0.2)
    assert whiskers[1] == pytest.approx((heights[1] + unit / 2, heights[1] - 2 * unit), abs=0.2)
    assert "<title>c, one: 2 (1.5 to 4)</title>" in chart.svg
    data = json.loads(Page(str(chart.svg)).tags[0][1]["data-hover"] or "")
    assert [p[1:] for p in data["series"][0]["points"]] == [[0, 1.0], [2, 2.0]]


def test_below_zero_there_is_a_line_at_zero() -> None:
    chart = Spreads(
        "x", "t", "c", "bits", (), x_names=["a"], series=[Series("one", [Spread(-1.0, -2.0, 0.5)])]
    )
    assert chart.svg.count('class="base"') == 2
    assert "Nothing was measured" in Spreads("x", "t", "c", "bits", (), series=[Series("one", [None])]).svg


def test_each_step_shows_what_it_bought() -> None:
    shown = Page(f"<div>{section_of([told()]).body}</div>")
    classes = [a.get("class") for _, a in shown.tags if a.get("tabindex") == "0"]
    assert classes[-2:] == ["bought gain3", "bought cost2"]  # 3.5 bits bought, 2 lost
    body = str(section_of([told()]).body)
    assert "+3.50 bits: a right answer costs 0.50 after it, the entropy of the answer is 1.00" in body
    assert "−2.00 bits: a right answer costs 2.50 after it" in body
    assert "hm ✗" in body
    assert body.count("<li>") == 2


def test_levels_are_symmetric_and_deepen() -> None:
    assert [level(bits) for bits in (0.0, 0.05, -0.05)] == ["even"] * 3
    for depth, least in enumerate(LEVELS, 1):
        assert (level(least), level(-least)) == (f"gain{depth}", f"cost{depth}")
    body = str(section_of([told()]).body)
    for depth in range(1, len(LEVELS) + 1):
        for kind in ("gain", "cost"):
            assert f'class="bought {kind}{depth}"' in body  # the legend has them all
            assert f".{kind}{depth} {{ border-bottom: " in body  # and each has a line without colours


def test_the_same_question_stands_side_by_side() -> None:
    body = str(section_of([told(), told("Zero"), told("R1")]).body)
    assert body.count("<article>") == 1
    assert body.count('class="answer right"') == 3


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover='x' {0} {} %s </style></div>"


def test_model_text_is_text(tmp_path: Path) -> None:
    evil = told(EVIL)
    evil["shown"][0] |= {"prompt": EVIL, "answer": EVIL, "steps": [{"text": EVIL}, {"text": EVIL}]}
    evil["forks"]["words"][0]["word"] = EVIL
    html = write_alone([evil], tmp_path / "page.html").read_text(encoding="utf-8")
    shown = Page(html)  # also checks that nothing closed our elements
    assert not {"script", "img"} & {tag for tag, _ in shown.tags}
    assert not [a for _, a in shown.tags if any(k.startswith("on") for k in a)]
    assert html.count("alert(1)") >= 5  # the question, the answer, two steps and a word, readable
    assert not re.search(r"https?://|@import|url\(", html)


def test_a_run_is_read_as_far_as_it_is_there(tmp_path: Path) -> None:
    recipe = 'name = "r"\n'
    for i, name in enumerate(("one", "two", "three"), 1):
        recipe += f'[stages.{name}]\nkind = "bridge"\n'
        if i < 3:
            (tmp_path / f"{i}-{name}").mkdir()
    (tmp_path / "recipe.toml").write_text(recipe)
    assert section(read_run(tmp_path)) is None
    (tmp_path / "1-one" / "bridge.json").write_text(json.dumps(told("Base")))
    (tmp_path / "2-two" / "bridge.json").write_text("{")
    run = read_run(tmp_path)
    part = section(run)
    assert part is not None
    assert part.id == "bridge"
    assert any("bridge.json" in note for note in run.notes)
    for partial in ({}, {"label": "x"}, told(shown=[{"prompt": "p"}], forks={}, gain={}, curve={})):
        assert section_of([partial]).title  # what is not there is not drawn
    nothing = told(utility={g: cell(None) for g in GROUPS})
    assert section_of([nothing]).finding == "There was no thought to measure."


def test_estimates_are_read_with_care() -> None:
    assert spread({"mean": 1.0, "low": None, "high": None}) == Spread(1.0, 1.0, 1.0, sure=False)
    assert spread({"mean": 1.0, "low": 0.5, "high": 2.0}) == Spread(1.0, 0.5, 2.0)
    for nothing in (None, 3, {}, {"mean": None}, {"mean": float("nan")}, {"mean": True}):
        assert spread(nothing) is None
