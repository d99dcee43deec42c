"""What a person sees of a cluster and says to it: a line on what everybody does, options, what to install."""

from __future__ import annotations

import io
import sys

import pytest
from crew import Clock, ScriptedCrew, engine_of, length_of, requests_of
from rich.console import Console

from liubai.cluster.connect import connect
from liubai.commands.shared import Elsewhere
from liubai.errors import UserError
from liubai.stages.view import LiveView, PlainView


def test_what_everybody_does_is_said_in_a_line() -> None:
    clock = Clock()
    lines: list[str] = []
    crew = ScriptedCrew(2, rush=0.0)
    engine = engine_of(crew, slots=2, clock=clock, status=lines.append)
    engine.load({}, 0)
    assert engine.describe() == "actor 0 starting, actor 1 starting"
    engine.submit(requests_of(2, 4, max_tokens=1))
    engine.step()
    assert engine.describe() == (
        "actor 0 writing 4 (queue 2, 0 tokens/s), actor 1 writing 4 (queue 2, 0 tokens/s)"
    )
    clock.now = 2.0
    engine.step()
    assert engine.describe() == "actor 0 idle, actor 1 idle"
    assert lines == ["actor 0 idle, actor 1 idle"]  # not more than once a second
    engine.submit(requests_of(1, 4, first=5))
    engine.step()
    del crew.hands[0]
    engine._lose(0, "gone")
    assert engine.describe() == "actor 0 down, actor 1 idle, 4 answers waiting, 1 lost"
    many = engine_of(ScriptedCrew(9, rush=0.0), slots=3, clock=clock)
    many.load({}, 0)
    many.submit(requests_of(9, 4))
    many.step()
    many._lose(8, "gone")
    assert many.describe() == "actors: 8 writing (queue 8, 0 tokens/s), 1 down, 4 answers waiting, 1 lost"


def test_speed_is_that_of_the_last_half_minute() -> None:
    clock = Clock()
    crew = ScriptedCrew(1)
    engine = engine_of(crew, clock=clock)
    engine.load({}, 0)
    asked = requests_of(2, 4)
    engine.submit(asked)
    clock.now = 8.0
    while engine.pending:
        engine.step()
    engine.submit(requests_of(1, 4, first=9))
    engine._hand_out()
    tokens = sum(length_of(r) for r in asked)
    clock.now = 10.0
    assert f"{tokens / 10:,.0f} tokens/s" in engine.describe()
    clock.now = 60.0
    assert " 0 tokens/s" in engine.describe()


def test_the_line_is_seen_in_both_views() -> None:
    clock = Clock()
    stream = io.StringIO()
    plain = PlainView(stream, every=5.0, clock=clock)
    for now in (0.0, 1.0, 14.0, 15.0, 16.0):
        clock.now = now
        plain.status(f"actors: at {now:g}")
    assert stream.getvalue().splitlines() == ["  actors: at 0", "  actors: at 15"]
    console = Console(file=io.StringIO(), width=120)
    live = LiveView(console, clock=clock)
    live.start("zero", "rl", 4)
    live.status("actors: 0 idle")
    console.print(live.picture())
    live.finish("zero", False)
    console.print(live.picture())
    assert console.file.getvalue().count("actors: 0 idle") == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("actors", "trainers"), [(2, 1), (None, 2)])
def test_what_is_for_a_cluster_needs_one(actors: int | None, trainers: int) -> None:
    with pytest.raises(UserError, match="add --cluster auto"):
        Elsewhere(None, actors, trainers)


def test_ranks_are_no_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank was given the same options as the one who started it."""
    monkeypatch.delenv("RANK", raising=False)
    assert Elsewhere("auto", None, 2).needs_trainers()
    assert not Elsewhere("auto", None, 1).needs_trainers()
    monkeypatch.setenv("RANK", "1")
    assert not Elsewhere("auto", None, 2).needs_trainers()


def test_without_ray_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'liubai\[ray\]'"):
        connect("127.0.0.1:1")
