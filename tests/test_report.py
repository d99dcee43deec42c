"""The report: self-contained, safe, complete, and forgiving of unfinished runs."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from fake_run import lines, rl_rows, write_eval, write_fake_run
from html_page import Page

from liubai.cli import report
from liubai.errors import UserError
from liubai.report import headline, save_figure, write_report
from liubai.report.answers import chosen_steps
from liubai.report.charts import stage_style, style
from liubai.report.read import Curve, read_run
from liubai.report.story import smooth, take_off, wide
from liubai.report.svg import Chart, Line, nice_ticks, shortened, thin, tick_text, y_scale

SECTIONS = (
    *("headline", "curves", "pass", "samples", "exploration", "reward", "update", "speed", "pretrain", "run"),
    *("stages", "environment", "warnings", "recipe"),
)
CHARTS = (
    *("accuracy", "length", "reflections", "pass", "entropy", "format", "parts", "variance", "clip", "gap"),
    *("throughput", "phases", "loss"),
)


def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("run") / "zero")


def test_every_section_and_chart_is_there(finished: Path) -> None:
    shown = page(finished)
    assert len(shown.ids) == len(set(shown.ids))
    assert set(SECTIONS) <= set(shown.ids)
    assert {f"chart-{name}" for name in CHARTS} <= set(shown.ids)
    assert "missing" not in shown.ids
    captions = [text for id, text in shown.text.items() if id.startswith("chart-")]
    assert all("step" in c or "tokens" in c or "k (" in c for c in captions)  # an x label each
    assert "timeout 2 s" in shown.text["warnings"]
    assert "[stages.zero]" in shown.text["recipe"]
    assert "before" in shown.text["headline"]


def test_one_file_that_loads_nothing(finished: Path) -> None:
    path = write_report(finished)
    assert path == finished / "report.html"
    html = path.read_text(encoding="utf-8")
    shown = Page(html)
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    assert not [(t, a) for t, a in shown.tags if loading & a.keys()]
    assert not re.search(r"https?://|@import|url\(", html)
    assert not {"link", "img", "iframe", "object", "embed"} & {t for t, _ in shown.tags}
    assert len([t for t, _ in shown.tags if t == "script"]) == 1
    assert not list(finished.glob("*tmp*"))  # the write is atomic and leaves nothing behind


def test_model_text_is_text(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    evil = "<script>alert(1)</script> wait <img src=x onerror=alert(2)> \" onmouseover='x' </div></section>"
    samples = run / "2-zero" / "samples.jsonl"
    row = {"step": 0, "probe": True, "problem": 0, "prompt": evil, "response": evil, "correct": False}
    row |= {"answer": evil, "tokens": 3, "stop": "length"}
    lines(samples, [row])
    lines(run / "2-zero" / "warnings.jsonl", [{"message": evil}])
    result = json.loads((run / "1-before" / "eval.json").read_text())
    (run / "1-before" / "eval.json").write_text(json.dumps(result | {"label": evil, "problems": evil}))
    recipe = (run / "recipe.toml").read_text().replace("fake-zero", "<script>alert(3)</script>")
    (run / "recipe.toml").write_text(recipe)
    shown = page(run)  # Page also checks that nothing closed our elements
    assert len([t for t, _ in shown.tags if t == "script"]) == 1
    assert "alert" not in "".join(shown.scripts)
    assert not [t for t, a in shown.tags if t == "img" or any(k.startswith("on") for k in a)]
    assert shown.text["samples"].count("alert(1)") == 3  # prompt, response and answer, readable
    assert "cut off" in shown.text["samples"]


def test_answers_are_marked(finished: Path) -> None:
    html = write_report(finished).read_text(encoding="utf-8")
    assert '<span class="wait">wait</span>' in html
    assert '<span class="wait">等等</span>' in html
    assert '<span class="tag">&lt;/think&gt;</span>' in html
    assert '<span class="said"> ( ' in html
    assert "✓ right" in html
    assert "✗ wrong" in html


def planted(at: int, n: int = 100, noise: float = 0.0) -> Curve:
    """0.5 until ``at``, then a ramp of 0.1 a step up to 2.5."""
    rng = random.Random(3)
    ys = [0.5 + min(2.0, 0.1 * max(0, s - at)) + rng.gauss(0, noise) for s in range(n)]
    return Curve(tuple(map(float, range(n))), tuple(ys))


def test_take_off_of_a_planted_curve() -> None:
    curve = planted(40)
    # 25 % of the rise of 2.0 is 0.5, which the ramp passes after 5 steps: first above at 46.
    assert take_off(curve) == 46
    points = smooth(curve).known
    assert all(y > 1.0 for x, y in points if x >= 46)
    step = take_off(planted(40, noise=0.1))
    assert step is not None
    assert abs(step - 46) <= 2


def test_take_off_must_last() -> None:
    curve = planted(40)
    bump = tuple(2.4 if 10 <= x < 25 else y for x, y in zip(curve.xs, curve.ys, strict=True))
    assert take_off(Curve(curve.xs, bump)) == 46
    fallen = tuple(0.5 if x > 80 else y for x, y in zip(curve.xs, curve.ys, strict=True))
    assert take_off(Curve(curve.xs, fallen)) is None


def test_no_take_off_of_flat_curves() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        ys = tuple(0.8 + rng.gauss(0, 0.3) for _ in range(64))
        assert take_off(Curve(tuple(map(float, range(64))), ys)) is None
    assert take_off(Curve((), ())) is None
    assert take_off(Curve((1.0, 2.0), (0.0, 5.0))) is None
    assert take_off(Curve(tuple(map(float, range(50))), (0.0,) * 50)) is None


def test_take_off_is_marked_on_the_three_curves(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    rows = rl_rows(100, None, random.Random(1))
    curve = planted(40, 101)
    lines(run / "2-zero" / "metrics.jsonl", [r | {"reflections": curve.ys[r["step"]]} for r in rows])
    shown = page(run)
    assert shown.marks() == [46, 46, 46]
    assert "step 46" in shown.text["curves"]
    assert "step 46" in headline_sentence(run)


def headline_sentence(run: Path) -> str:
    match = re.search(r"<h1>(.*?)</h1>", write_report(run).read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return match[1]


def test_a_flat_run_says_that_nothing_took_off(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", take_off=None)
    shown = page(run)
    assert shown.marks() == []
    assert "no take-off" in shown.text["chart-reflections"].lower()
    assert "did not take off" in headline_sentence(run)


def test_several_rl_stages_share_the_charts(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", controls=True)
    shown = page(run)
    for name in ("zero", "shuffled", "no-format"):
        assert name in shown.text["chart-accuracy"]
        assert name in shown.text["chart-pass"]
        assert f"chart-parts-{name}" in shown.ids
    assert len(shown.marks()) == 6  # two of three stages take off, on three charts each
    assert "There was no take-off in shuffled" in shown.text["chart-reflections"]
    text = headline(run).splitlines()
    assert [line.split()[0] for line in text] == ["checkpoint", "base", "zero", "shuffled", "no-format"]


def test_headline_is_eval_json(finished: Path) -> None:
    before, after = (
        json.loads((finished / f / "eval.json").read_text()) for f in ("1-before", "3-zero-after")
    )
    table = headline(finished)
    shown = page(finished).text["headline"]
    for key in ("pass@1", "pass@16", "cons@16", "format"):
        a, b = (f"{100 * result[key]:.1f} %" for result in (before, after))
        line = next(line for line in table.splitlines() if line.startswith(f"{key} "))
        assert re.fullmatch(rf"{key} +{re.escape(a)} +→ +{re.escape(b)}", line)
        assert a in shown
        assert b in shown
    assert f"{before['mean_tokens']:.1f}  →   {after['mean_tokens']:.1f}" in table
    assert f"{after['reflections']:.2f}" in table


def test_other_numbers_of_samples_name_their_k(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    for folder in ("1-before", "3-zero-after"):
        path = run / folder / "eval.json"
        result = json.loads(path.read_text())
        result |= {
            "pass@8": result.pop("pass@16"),
            "cons@8": result.pop("cons@16"),
            "pass@k": {"1": 0.1, "8": 0.5},
        }
        path.write_text(json.dumps(result))
    assert "pass@8" in headline(run)
    assert "pass@16" not in headline(run)
    assert "chart-pass" in page(run).ids


@pytest.mark.parametrize("kept", range(5))
def test_unfinished_runs_say_what_is_missing(tmp_path: Path, kept: int) -> None:
    run = write_fake_run(tmp_path / "run")
    for folder in sorted(run.glob("*-*"))[kept:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    shown = page(run)
    assert set(SECTIONS) <= set(shown.ids)
    names = ["base", "before", "zero", "zero-after"][kept:]
    assert ("missing" in shown.ids) == bool(names)
    for name in names:
        assert f"“{name}”" in shown.text["missing"]
    if kept == 0:
        assert "nothing has been evaluated" in headline(run)


def test_a_run_of_instruments_alone_is_a_whole_one(tmp_path: Path) -> None:
    """What its recipe never asked for is not missing, and what it found is its result."""
    (tmp_path / "1-look").mkdir()
    (tmp_path / "recipe.toml").write_text('[stages.look]\nkind = "hallucination"\nmodel = "m"\n')
    told = {"label": "Base", "rate": 0.25, "interval": [0.2, 0.3]}
    (tmp_path / "1-look" / "hallucination.json").write_text(json.dumps(told))
    (tmp_path / "1-look" / "DONE").write_text("{}")
    shown = page(tmp_path)
    assert unescape(headline_sentence(tmp_path)) == headline(tmp_path)
    assert not {"missing", *SECTIONS[:9]} & set(shown.ids)
    assert {"hallucination", "run"} <= set(shown.ids)


def test_a_stage_that_was_killed_mid_write(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    (run / "2-zero" / "DONE").unlink()
    metrics = run / "2-zero" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 65, "accuracy": 0.5, "leng')
    shown = page(run)
    assert "not finished" in shown.text["missing"]
    assert "64 steps so far" in shown.text["missing"]
    assert "1 unreadable line was skipped in 2-zero/metrics.jsonl" in shown.text["missing"]
    stage = read_run(run).stage("zero")
    assert stage is not None
    assert stage.steps == 64


def test_steps_that_a_resumed_run_wrote_again_count_once(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    rows = [{"step": s, "accuracy": 0.1} for s in (1, 2, 3)] + [{"step": 2, "accuracy": 0.2}]
    lines(run / "2-zero" / "metrics.jsonl", rows)
    stage = read_run(run).stage("zero")
    assert stage is not None
    assert stage.curve("accuracy") == Curve((1.0, 2.0, 3.0), (0.1, 0.2, 0.1))


@pytest.mark.parametrize(
    ("folder", "name", "text", "said"),
    [
        ("3-zero-after", "eval.json", "{oops", "Cannot read 3-zero-after/eval.json."),
        ("3-zero-after", "eval.json", "{}", "“zero-after” is done but its eval.json is empty."),
        ("3-zero-after", "eval.json", None, "“zero-after” is done but its eval.json is missing."),
        ("2-zero", "metrics.jsonl", "{oops\n", "1 unreadable line was skipped in 2-zero/metrics.jsonl."),
        ("4-look", "bridge.json", "{}", "“look” is done but its bridge.json is empty."),
        ("4-look", "bridge.json", None, "“look” is done but its bridge.json is missing."),
    ],
)
def test_what_a_finished_stage_has_lost_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str, name: str, text: str | None, said: str
) -> None:
    run = write_fake_run(tmp_path / "run")
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text() + '[stages.look]\nkind = "bridge"\nfrom = "zero"\n')
    (run / "4-look").mkdir()
    (run / "4-look" / "DONE").write_text("{}")
    (run / "4-look" / "bridge.json").write_text('{"label": "zero"}')
    report(run)
    assert capsys.readouterr().err == ""
    (run / folder / name).write_text(text) if text is not None else (run / folder / name).unlink()
    report(run)
    assert f"{said}\n" in capsys.readouterr().err
    shown = Page((run / "report.html").read_text(encoding="utf-8"))
    assert said in shown.text["missing"]


def test_null_and_nan_leave_a_gap(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    metrics = run / "2-zero" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row, value in zip(rows[10:14], (None, float("nan"), float("inf"), "soon"), strict=True):
        row["length/right"] = row["entropy"] = value
    for row in rows:
        row["kl"] = None
    lines(metrics, rows)
    html = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|inf|None)\b", "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL)), re.I)
    chart = re.search(r'id="chart-entropy".*?</figure>', html, re.DOTALL)
    assert chart is not None
    path = re.search(r'<path class="line ink0 dash0" d="([^"]*)"', chart[0])
    assert path is not None
    assert path[1].count("M") == 2  # two strokes: before the gap and after it
    assert 'id="chart-kl"' not in html


def test_thin_data(tmp_path: Path) -> None:
    """One step, constant values, an empty eval: nothing divides by zero."""
    run = write_fake_run(tmp_path / "run", steps=1)
    lines(run / "0-base" / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    (run / "3-zero-after" / "eval.json").write_text("{}")
    assert "missing" in page(run).ids
    lines(run / "2-zero" / "metrics.jsonl", [{"step": s, "accuracy": 0.0, "entropy": -1.0} for s in range(9)])
    lines(run / "2-zero" / "samples.jsonl", [])
    assert "No probe samples" in page(run).text["samples"]


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    for make in (write_report, headline):
        with pytest.raises(UserError, match="no run folder"):
            make(tmp_path / "nowhere")
        with pytest.raises(UserError, match=r"no recipe\.toml"):
            make(tmp_path)
    (tmp_path / "recipe.toml").write_text("[stages")
    with pytest.raises(UserError, match="cannot read"):
        write_report(tmp_path)
    (tmp_path / "recipe.toml").write_text("seed = 1")
    with pytest.raises(UserError, match="names no stages"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_before_is_what_the_rl_stage_began_from(tmp_path: Path) -> None:
    """Evaluations stand in any order, and a second base does not confuse the pair."""
    run = write_fake_run(tmp_path / "run")
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(
        '[stages.other]\nkind = "eval"\nfrom = "elsewhere"\n'
        + text.replace('name = "fake-zero"\nseed = 7', "")
    )
    (run / "9-other").mkdir()
    write_eval(run / "9-other", "other", 0.9, random.Random(0))
    assert "from 12.4 % to 59.4 %" in headline_sentence(run)


def test_the_resolved_recipe_lists_its_parents(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    plain = headline(run)
    text = re.sub(r"from = (.*)", r"from = [\1]", (run / "recipe.toml").read_text())
    (run / "recipe.toml").write_text(text)
    assert "→" in plain
    assert headline(run) == plain


def test_a_result_that_did_not_move_says_so(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    write_eval(run / "3-zero-after", "zero", 0.0, random.Random(0))
    assert "pass@1 stayed at 12.4 % and the mean answer stayed at 32 tokens" in headline_sentence(run)
    path = run / "3-zero-after" / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean_tokens": 50.0}))
    assert "stayed at 12.4 % and the mean answer went from 32 to 50 tokens" in headline_sentence(run)


def test_figure(finished: Path, tmp_path: Path) -> None:
    out = save_figure(finished, tmp_path / "new" / "figure.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 20_000
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.toml").write_text('[stages.zero]\nkind = "rl"\n')
    with pytest.raises(UserError, match="no curve"):
        save_figure(empty, tmp_path / "x.png")


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, liubai.report as r; assert r.headline; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"matplotlib", "torch", "jinja2"} & set(modules.split())


def test_ticks_cover_and_read_well() -> None:
    rng = random.Random(2)
    for _ in range(500):
        low = rng.uniform(-10, 10) * 10 ** rng.randint(-5, 6)
        high = low + rng.random() * 10 ** rng.randint(-4, 6)
        ticks = nice_ticks(low, high)
        slack = 1e-6 * (ticks[1] - ticks[0])
        assert ticks[0] <= low + slack
        assert ticks[-1] >= high - slack
        assert 2 <= len(ticks) <= 8
    assert [tick_text(t, [0, 0.25, 0.5], True) for t in (0, 0.25, 0.5)] == ["0%", "25%", "50%"]
    assert [tick_text(t, [0, 2500, 10000]) for t in (0, 2500, 10000)] == ["0", "2.5k", "10.0k"]
    # an axis of shares: rounding errors around 1, and nothing throughout
    for shares, zero in (([0.99999996, 1.00000004], False), ([0.0, 0.0], True), ([0.352, 0.3521], False)):
        ticks = y_scale(shares, zero, percent=True)
        assert ticks[0] <= min(shares)
        assert max(shares) <= ticks[-1] + 1e-6
        assert 0.019 < ticks[-1] - ticks[0] < 0.05
        assert ticks[0] >= 0
        assert ticks[-1] <= 1
        assert len({tick_text(t, ticks, True) for t in ticks}) == len(ticks)
        assert max(len(tick_text(t, ticks, True)) for t in ticks) <= 6
    assert tick_text(-0.5, [-0.5, 0.0]) == "−0.5"
    assert nice_ticks(0.0, 0.0)[0] == 0.0  # a share that is zero throughout has no negative half
    assert nice_ticks(3.0, 3.0)[0] < 3.0 < nice_ticks(3.0, 3.0)[-1]


def test_long_curves_are_thinned() -> None:
    n = 50_000
    curve = Curve(tuple(map(float, range(n))), tuple(float(i % 7) for i in range(n)))
    assert len(thin(curve).xs) <= 400
    chart = Chart("x", "x", "x", "y", [Line("l", curve, noisy=True)])
    assert len(chart.svg) < 60_000


def test_checkpoints_shown_side_by_side() -> None:
    assert chosen_steps([0, 8, 16], None) == [0, 8, 16]
    steps = list(range(0, 65, 8))
    assert chosen_steps(steps, 20) == [0, 24, 40, 64]
    assert len(chosen_steps(steps, None)) == 4


def test_names_under_a_chart_fit() -> None:
    names = [*(f"after-reinforcement-{i}" for i in range(6)), "R1", "强化学习之后三"]
    short = shortened(names)
    assert all(wide(name) <= 338 / len(names) / 8 for name in short)
    assert short[6:] == ["R1", "…三"]
    assert [name[-1] for name in short[:6]] == list("012345")  # still told apart
    assert len(set(short)) == len(short)
    assert shortened(["Base model", "Zero", "Dev1 (cold start)", "Dev2 (RL)"]) == (
        ["Base mod…", "Zero", "Dev1 (co…", "Dev2 (RL)"]
    )
    assert shortened(["Base", "Zero", "Dev1"]) == ["Base", "Zero", "Dev1"]
    assert shortened([]) == []


def test_a_dozen_lines_differ() -> None:
    for of in (style, stage_style):
        assert len({of(place) for place in range(12)}) == 12
        assert all(0 <= ink < 6 and 0 <= dash < 4 for ink, dash in map(of, range(40)))
    assert [style(place) for place in range(6)] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (5, 3)]


def test_small_ticks_are_exact() -> None:
    ticks = [0, 0.00025, 0.0005, 0.00075]  # of a learning rate
    assert [tick_text(t, ticks) for t in ticks] == ["0", "2.5e−4", "5.0e−4", "7.5e−4"]
    assert [tick_text(t, [0, 1e-4, 2e-4]) for t in (1e-4, 2e-4)] == ["1e−4", "2e−4"]
