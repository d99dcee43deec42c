"""What a person sees: plain lines that do not flood a log, a picture that stays when it is over."""

from __future__ import annotations

import io
import math
import sys
from contextlib import suppress

import pytest
from rich.console import Console

from liubai.stages.view import LiveView, PlainView, duration, make_view, progress_bar, sparkline


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_first_last_and_one_every_few_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    view = PlainView(stream, every=5, clock=clock)
    view.start("zero", "rl", 12)
    for step in range(1, 12):
        view.update("zero", step, 12, {"accuracy": step / 100, "lr": 1.0})
        clock.now += 2
    view.finish("zero", False)
    assert stream.getvalue().splitlines() == [
        "zero: rl, 12 steps",
        "zero 1/12  accuracy 0.010",
        "zero 4/12  accuracy 0.040  16 s to go",
        "zero 7/12  accuracy 0.070  10 s to go",
        "zero 10/12  accuracy 0.100  4 s to go",
        "zero 11/12  accuracy 0.110  2 s to go",
        "zero: done (22 s)",
    ]


def test_the_last_step_is_printed_once() -> None:
    stream = io.StringIO()
    with PlainView(stream, clock=Clock()) as view:
        view.start("zero", "rl", 2)
        view.update("zero", 1, 2, {})
        view.update("zero", 2, 2, {})
        view.finish("zero", False)
    assert [line for line in stream.getvalue().splitlines() if "2/2" in line] == ["zero 2/2"]


def test_an_interrupted_stage_shows_how_far_it_got() -> None:
    stream = io.StringIO()
    with suppress(KeyboardInterrupt), PlainView(stream, clock=Clock()) as view:
        view.start("zero", "rl", 9)
        view.update("zero", 1, 9, {})
        view.update("zero", 2, 9, {"loss": math.nan})
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1] == "zero 2/9  loss nan  0 s to go"


def test_reuse_and_warnings_are_said() -> None:
    stream = io.StringIO()
    view = PlainView(stream, clock=Clock())
    view.start("base", "pretrain", 0)
    view.finish("base", True)
    view.warn("zero: entropy is low")
    assert stream.getvalue().splitlines() == [
        "base: pretrain",
        "base: finished before, reused",
        "note: zero: entropy is low",
    ]


def test_the_live_picture_has_the_numbers_and_stays() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with LiveView(console, clock) as view:
        view.start("base", "pretrain", 5)
        view.finish("base", True)
        view.start("zero", "rl", 8)
        for step in range(1, 5):
            clock.now += 10
            view.update(
                "zero",
                step,
                8,
                {"accuracy": 0.1 * step, "length/mean": 30.0 + step, "reflections": 0.5, "tokens/s": 5100.0},
            )
        view.warn("[odd] markup is text")
        picture = picture_of(view)
        assert "✓ base" in picture
        assert "reused" in picture
        assert "▸ zero" in picture
        assert "4/8" in picture
        assert "40 s to go" in picture
        assert "accuracy 0.400  length/mean 34.0  reflections 0.50  tokens/s 5,100" in picture
        assert "accuracy     ▁▃▆█" in picture
        assert "! [odd] markup is text" in picture
        view.finish("zero", False)
    assert "✓ zero" in stream.getvalue()
    assert stream.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def picture_of(view: LiveView) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120, color_system=None).print(view.picture())
    return stream.getvalue()


def test_the_terminal_is_given_back_after_an_error() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with suppress(KeyboardInterrupt), LiveView(console) as view:
        view.start("zero", "rl", 8)
        raise KeyboardInterrupt
    assert "\x1b[?25h" in stream.getvalue()


def test_a_resumed_stage_estimates_from_its_own_speed() -> None:
    clock = Clock()
    view = LiveView(clock=clock)
    view.start("zero", "rl", 100)
    clock.now = 50  # set-up is not speed
    view.update("zero", 90, 100, {})
    clock.now = 53
    view.update("zero", 91, 100, {})
    assert "27 s to go" in picture_of(view)


def test_which_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(make_view(), LiveView)
    assert isinstance(make_view(live=False), PlainView)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert isinstance(make_view(), PlainView)


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 9, ""),
        ([1.0], 9, "▁"),
        ([2.0, 2.0], 9, "▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 9, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
    ],
)
def test_sparkline(values: list[float], width: int, drawn: str) -> None:
    assert sparkline(values, width) == drawn


def test_a_long_sparkline_fits() -> None:
    assert len(sparkline([float(i) for i in range(1001)], 40)) == 40


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1:00"), (185, "3:05"), (7385, "2:03:05")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_bar_is_for_terminals_and_for_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bar("grading") as advance:
        assert advance is None
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("grading", after=3600) as advance:
        assert advance is not None
        advance(1, 2)
    assert terminal.getvalue() == ""
    with progress_bar("grading", after=0) as advance:
        assert advance is not None
        advance(1, 2)
    assert "grading" in terminal.getvalue()
