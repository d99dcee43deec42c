"""Parts of the report: text that was not read, the heads, the layers, and poems with their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from liubai.grade import GradeItem, Verdict, grade
from liubai.grade.verse import read_verse
from liubai.report import attention, headline, unread, verse, whitebox, write_report
from liubai.report.read import Curve, read_run
from liubai.stages.rl_metrics import rollout_metrics
from liubai.stages.rollouts import Answer, GradedGroup
from liubai.types import Group, Problem, Reward, Sample, Span, Stop


def stage(run: Path, name: str, kind: str, rows: list[dict[str, Any]], **files: dict[str, Any]) -> None:
    number = len(list(run.glob("*-*"))) + 1
    folder = run / f"{number}-{name}"
    folder.mkdir()
    (folder / "DONE").write_text('{"seconds": 9.0}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, told in files.items():
        (folder / f"{file}.json").write_text(json.dumps(told))
    with open(run / "recipe.toml", "a") as recipe:
        recipe.write(f'[stages.{name}]\nkind = "{kind}"\n')


# --- text that was not read ---


def steps(bits: list[float], speed: float) -> list[dict[str, Any]]:
    """100 tokens a step, a look at every second step."""
    rows: list[dict[str, Any]] = [
        {"step": i + 1, "loss": 3.0, "tokens": 100.0 * (i + 1), "tokens/s": speed}
        for i in range(2 * len(bits))
    ]
    for i, value in enumerate(bits):
        rows[2 * i + 1]["eval/bits_per_byte"] = value
    return rows


def test_bits_a_byte_over_tokens_and_seconds(tmp_path: Path) -> None:
    size = {"texts": 12, "bytes": 3456}
    whose = {"architecture": "CrateAlphaForCausalLM", "parameters": 853120, **size}
    stage(tmp_path, "plain", "pretrain", steps([2.9, 2.4, 2.5], 50.0), held_out=size)
    stage(tmp_path, "alpha", "pretrain", steps([2.8, 2.45], 25.0), held_out=whose)
    stage(tmp_path, "other", "pretrain", [{"step": 1, "loss": 3.0, "tokens": 100.0, "tokens/s": 9.0}])
    part = unread.section(read_run(tmp_path))
    assert part is not None
    assert part.finding == (
        "Bits for a byte of text that was not read, at the end: alpha 2.450, plain 2.500. "
        "plain had been better before: what it read, it knew by heart."
    )
    by_tokens, by_seconds = part.charts
    assert [line.label for line in by_tokens.lines] == ["plain", "alpha"]
    assert by_tokens.lines[0].curve == Curve((200, 400, 600), (2.9, 2.4, 2.5))
    assert by_seconds.lines[0].curve.xs == pytest.approx((4, 8, 12))
    assert by_seconds.lines[1].curve.xs == pytest.approx((8, 16))
    assert "<small>CrateAlpha</small></th><td>853,120</td><td>400</td><td>16</td><td>2.450</td>" in part.body
    assert "<td>600</td><td>12</td><td>2.500</td><td>2.400</td>" in part.body
    assert "On 12 texts, 3,456 bytes" in part.body
    assert 'id="unread"' in write_report(tmp_path).read_text()
    # no checkpoint was evaluated: that is what the run has to say
    assert headline(tmp_path) == f"Text that was not read: {part.finding}"


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        # half a byte's bit less on every text, whatever else they differ in
        (
            [100, 230, 150],
            "plain needs 0.500 ± 0.000 fewer than other (twice the standard error over 3 texts).",
        ),
        ([150, 100, 200], "plain and other are not told apart: 0.600 ± 1.200 "),
    ],
)
def test_the_best_two_are_told_apart_by_the_same_texts(bits: list[float], said: str, tmp_path: Path) -> None:
    sizes = {"texts": 3, "bytes": 300, "sizes": [100, 100, 100]}
    stage(tmp_path, "other", "pretrain", steps([2.5], 50.0), held_out=sizes | {"bits": [150, 280, 200]})
    stage(tmp_path, "plain", "pretrain", steps([2.0], 50.0), held_out=sizes | {"bits": bits})
    stage(tmp_path, "third", "pretrain", steps([2.7], 50.0))
    part = unread.section(read_run(tmp_path))
    assert part is not None
    assert f" at the end: plain 2.000, other 2.500, third 2.700. {said}" in part.finding
    # other texts, or some that were lost: nothing is said
    told = next(tmp_path.glob("*-plain")) / "held_out.json"
    for wrong in ({"sizes": [100, 90, 110]}, {"bits": [1.0]}, {"bits": 3}):
        told.write_text(json.dumps(sizes | {"bits": bits} | wrong))
        part = unread.section(read_run(tmp_path))
        assert part is not None
        assert part.finding.endswith("third 2.700.")


def test_other_runs_have_no_such_part(tmp_path: Path) -> None:
    stage(tmp_path, "other", "pretrain", [{"step": 1, "loss": 3.0, "tokens": 100.0, "tokens/s": 9.0}])
    run = read_run(tmp_path)
    assert unread.section(run) is None
    assert verse.section(run) is None


# --- the heads ---

HEADS = {
    "label": "Base",
    "best": {
        "source": {"layer": 0, "head": 1, "score": 0.5},
        "same": {"layer": 0, "head": 0, "score": 0.4},
    },
    "scores": {"source": [[0.1, 0.5]], "same": [[0.4, 0.3]]},
    "ablation": [[0.2, -0.01]],
}


def test_what_a_head_scores_by_chance_is_no_specialty(tmp_path: Path) -> None:
    kept = {"chance": {"source": 0.04, "same": 0.25, "target": None}, "ablation_error": [[0.02, None]]}
    stage(tmp_path, "heads", "attention", [], attention=HEADS | kept)
    part = attention.section(read_run(tmp_path))
    assert part is not None
    assert "source (on the number in the question that is written next): head 1.2, 50 %" in part.finding
    assert "(by chance 4 %)" in part.finding
    assert "same" not in part.finding  # 40 % where 25 % is chance
    assert '<th scope="row">1.1</th><td>40 %</td><td>10 %</td><td>+0.200 ± 0.040</td>' in part.body
    assert '<th scope="row">1.2</th><td>30 %</td><td><b>50 %</b></td><td>-0.010</td>' in part.body
    assert '<th scope="row">by chance</th><td>25 %</td><td>4 %</td><td></td>' in part.body


def test_heads_that_were_looked_at_before_chance_was_kept(tmp_path: Path) -> None:
    stage(tmp_path, "heads", "attention", [], attention=HEADS)
    part = attention.section(read_run(tmp_path))
    assert part is not None
    assert "same (on earlier tokens like this one): head 1.1, 40 % of its weight." in part.finding
    assert "by chance" not in part.finding + part.body
    assert "<td><b>40 %</b></td><td>10 %</td><td>+0.200</td>" in part.body


# --- the layers ---


def test_compression_is_drawn_as_before_and_after(tmp_path: Path) -> None:
    layers = [
        {"sparsity": 0.9, "rate": 30.0, "before": 20.0, "compressed": 15.0},
        {"sparsity": 0.7, "rate": 28.0, "before": 18.0, "compressed": 19.0},
    ]
    plain = [{"sparsity": 0.4, "rate": 25.0, "before": None, "compressed": None}] * 2
    stage(tmp_path, "look", "whitebox", [], whitebox={"label": "CRATE", "layers": layers})
    stage(tmp_path, "other", "whitebox", [], whitebox={"label": "Transformer", "layers": plain})
    part = whitebox.section(read_run(tmp_path))
    assert part is not None
    assert part.finding == (
        "Silent units, the mean of the layers: CRATE 80 %, Transformer 40 %. "
        "Layers whose attention lowers the coding rate in its subspaces: CRATE 1 of 2."
    )
    before, after = part.charts[2].lines
    assert (before.label, after.label) == ("CRATE, before attention", "CRATE, after it")
    assert (before.curve.ys, after.curve.ys) == ((20.0, 18.0), (15.0, 19.0))
    assert before.ink == after.ink
    assert before.dash != after.dash
    assert len(part.charts[1].lines) == 2


# --- the form of poems ---


def test_how_the_form_went(tmp_path: Path) -> None:
    rows = [
        {
            "step": i + 1,
            "accuracy": 0.0,
            "verse/tones": 0.6 + i / 100,
            "verse/rhyme": i / 40,
            "verse/ills": 0.9,
        }
        for i in range(20)
    ]
    stage(tmp_path, "zero", "rl", rows)
    stage(tmp_path, "short", "rl", rows[:1])
    part = verse.section(read_run(tmp_path))
    assert part is not None
    # the first two steps and the last two
    assert (
        part.finding
        == "From the first tenth of the steps to the last, zero: tones 60 % → 78 %, rhyme 1 % → 46 %."
    )
    assert [line.label for line in part.charts[0].lines] == ["tones", "rhyme", "ills"]
    assert part.charts[0].lines[1].curve.ys[-1] == 19 / 40
    assert 'id="verse"' in write_report(tmp_path).read_text()


POEM = "白日依山盡，黄河入海流。欲窮千里目，更上一層樓。"
HALF = "白日依山盡，黄河入海風。"


def test_parts_are_means_over_all_answers_and_what_is_none_has_none() -> None:
    """A poem, half a poem, a poem that was cut off, no answer; and one that could not be judged."""
    problem = Problem("五绝", "五绝", "verse", "verse", "zh")
    said = [(POEM, Stop.EOS), (HALF, Stop.EOS), (POEM, Stop.LENGTH), ("", Stop.EOS), (POEM, Stop.EOS)]
    answers = []
    for text, stop in said:
        response = f"</think> <answer> {text} </answer>"
        verdict = grade(GradeItem("verse", "五绝", response, {"prefilled": "<think>"}))
        sample = Sample((1,), (2, 3), (-1.0, -1.0), stop, (Span(0, 2),))
        answers.append(Answer(sample, response, verdict))
    judged = answers[-1].verdict
    answers[-1] = Answer(answers[-1].sample, "", Verdict(False, judged.answer, judged.parts, "timeout"))
    rewards = tuple(Reward({"correct": 0.0}, 0.0) for _ in answers)
    graded = GradedGroup(0, Group(problem, tuple(a.sample for a in answers), rewards), tuple(answers))
    number = Problem("1 + 1", "2", "number")
    plain = GradedGroup(1, Group(number, tuple(a.sample for a in answers), rewards), tuple(answers))
    told = rollout_metrics([graded, plain], version=0)
    whole, half = (read_verse("五绝", text, {}).parts for text in (POEM, HALF))
    assert {k for k in told if k.startswith("verse/")} == {f"verse/{name}" for name in whole}
    assert half["rhyme"] < whole["rhyme"] == 1
    for name in whole:
        assert told[f"verse/{name}"] == pytest.approx((whole[name] + half[name]) / 4)
    assert not any(k.startswith("verse/") for k in rollout_metrics([plain], version=0))
