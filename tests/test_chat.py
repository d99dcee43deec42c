"""The terminal: what can be set, how an answer grows on the screen, and how one leaves."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_model
from serving import ScriptedWriter, house_of, says, tokenizer

from liubai import chat as terminal
from liubai import cli
from liubai.chat import HELP, SLOTS, Screen, Settings, Terminal
from liubai.errors import UserError
from liubai.grade import sandbox
from liubai.model.checkpoint import save_checkpoint
from liubai.problems import world_vocabulary
from liubai.rollout.engine import Request
from liubai.rollout.paths import PathsConfig
from liubai.serve.events import ChoiceSaid, Ended, Event, PathSaid, Started
from liubai.serve.house import House
from liubai.text.template import BARE
from liubai.text.tokenizer import word_level

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Served(ScriptedWriter):
    async def serve(self) -> None:
        await asyncio.Event().wait()


def talk(
    monkeypatch: pytest.MonkeyPatch,
    lines: Sequence[str | type[BaseException]],
    writer: ScriptedWriter | None = None,
    house: House | None = None,
    *,
    person: bool = True,
) -> tuple[Terminal, ScriptedWriter]:
    """Type these lines (``person``: at a terminal); what is a kind of exception is raised at the prompt."""
    left = list(lines)

    def ask(prompt: str) -> str:
        print(prompt, end="")
        line = left.pop(0) if left else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: person, raising=False)
    found = writer or says("hm</think>hello")
    found.__class__ = Served
    house = house or terminal.house_of(house_of(found).find(None))
    chat = Terminal(house, found, Settings())  # type: ignore[arg-type]
    chat.run()
    return chat, found


# ---- what can be set ----


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("think off", "think", False),
        ("budget 20", "budget", 20),
        ("budget none", "budget", None),
        ("atleast 5", "at_least", 5),
        ("paths vote:3", "paths", "vote:3"),
        ("route auto", "route", "auto"),
        ("route none", "route", None),
        ("tools calculator, python", "tools", ("calculator", "python")),
        ("tools none", "tools", ()),
        ("temperature 0.25", "temperature", 0.25),
        ("tokens 9", "max_tokens", 9),
        ("seed 7", "seed", 7),
        ("show off", "show", False),
        ("keep on", "keep", True),
    ],
)
def test_a_command_sets(line: str, field: str, value: Any) -> None:
    settings = Settings()
    name, _, text = line.partition(" ")
    assert settings.set(name, text) is None
    assert getattr(settings, field) == value
    assert name in HELP
    assert f"/{name} " in settings.described()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("think maybe", "say /think on, or /think off"),
        ("budget many", "'many' is no whole number"),
        ("paths vote:x", "paths 'vote:x'"),
        ("paths vite", "did you mean 'vote'?"),
        (f"paths vote:{SLOTS + 1}", f"'n' is {SLOTS} at most"),
        ("route fst", "say one of auto, fast, think, tool, none"),
        ("tools calcluator", "did you mean 'calculator'?"),
        ("temperature hot", "from 0 to 2"),
        ("seed -1", "'-1' is no whole number"),
        ("temperature nan", "from 0 to 2"),
        ("thnik on", "there is no command /thnik"),
    ],
)
def test_a_wrong_command_changes_nothing_and_says_why(line: str, said: str) -> None:
    settings = Settings()
    name, _, text = line.partition(" ")
    wrong = settings.set(name, text)
    assert wrong is not None
    assert said in wrong
    assert settings == Settings()


def test_the_settings_are_those_of_the_api() -> None:
    asked = [{"role": "user", "content": "x"}]
    settings = Settings(
        think=False, budget=7, at_least=3, tools=("calculator",), route="think", temperature=0.5, max_tokens=9
    )
    request = settings.request(asked, 0)
    assert (request.thinks(), request.budget(100), request.think_at_least) == (False, 7, 3)
    assert (request.route, request.use_tools) == ("think", ["calculator"])
    assert (request.temperature, request.max_tokens) == (0.5, 9)
    assert request.seed != settings.request(asked, 1).seed
    assert request.seed != Settings(seed=1).request(asked, 0).seed
    plain = Settings().request(asked, 0)
    assert (plain.thinks(), plain.budget(100), plain.think_at_least) == (True, None, None)
    assert (plain.route, plain.use_tools) == (None, None)


@pytest.mark.parametrize(
    "text",
    [
        *("greedy", "sample", "sample:3", "beam:7", "vote", f"vote:{SLOTS}"),
        *("best:3:process", "best:2:preference", "tree:16", "tree:16:rollouts", "tree:8:process"),
    ],
)
def test_paths_are_asked_for_as_they_were_set(text: str) -> None:
    settings = Settings()
    assert settings.set("paths", text) is None
    request = settings.request([{"role": "user", "content": "x"}], 0)
    assert request.way_of_paths() == PathsConfig.parse(text)


def test_as_many_paths_are_written_as_there_are_slots(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = says("hm</think>hello")
    house = terminal.house_of(house_of(writer).find(None))
    talk(monkeypatch, [f"/paths vote:{SLOTS}", "x"], writer, house)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "hello" in printed.out
    assert len(writer.requests) == SLOTS


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["/paths best"], "let the answers vote; start with --judge DIR"),
        (["/paths tree:8:process"], "has no process model; start with --judge DIR"),
        (["/temperature 0", "/paths vote:3"], "several answers at temperature 0 are one and the same"),
        (["/paths vote:3", "/temperature 0"], "several answers at temperature 0 are one and the same"),
        (["/budget 5", "/paths beam:2"], "a beam search has no thinking budget"),
    ],
)
def test_what_no_question_could_be_answered_with_is_refused_at_once(
    lines: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, writer = talk(monkeypatch, lines)
    alone, _ = talk(monkeypatch, lines[:-1])
    assert writer.requests == []
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert chat.settings == alone.settings
    talk(monkeypatch, [*lines, "x"])
    assert "hello" in capsys.readouterr().out


def test_a_program_that_asks_is_stopped_by_a_command_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows would be answered otherwise than it was meant."""
    with pytest.raises(UserError, match=r"^/paths best: the best of several answers needs a model"):
        talk(monkeypatch, ["one", "/paths best", "two"], person=False)
    assert capsys.readouterr().out == "hm\nhello\n"


def test_an_answer_longer_than_the_room_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room is made at the start; the answer would be cut to it, and nobody told."""
    chat, writer = talk(monkeypatch, ["/tokens 4095", "/tokens 4096", "/tokens 99999", "x"])
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in told] == [
        "there is room for 4096 tokens, with the question"
    ] * 2
    assert "--max-tokens 99999" in told[1]
    assert chat.settings.max_tokens == 4095
    assert len(writer.requests) == 1


def test_python_is_refused_where_no_sandbox_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere() -> None:
        raise UserError("no sandbox works here")

    monkeypatch.setattr(sandbox, "require", nowhere)
    chat, _ = talk(monkeypatch, ["/tools calculator", "/tools python"])
    assert capsys.readouterr().err == "no sandbox works here\n"
    assert chat.settings.tools == ("calculator",)


def test_what_was_wrong_from_the_start_is_told_before_the_first_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = word_level(world_vocabulary())
    config = tiny_config(vocab_size=words.vocab_size, max_position_embeddings=256, eos_token_id=words.eos_id)
    save_checkpoint(tmp_path / "checkpoint", tiny_model(0, config), words, BARE)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("it asks for a question"))
    line = ["liubai", "chat", str(tmp_path / "checkpoint"), "--paths", "best:4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", line)
    assert cli.main() == 2
    printed = capsys.readouterr()
    assert "needs a model that judges" in printed.err
    assert printed.err.count("\n") == 1


def test_a_seed_begins_the_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    _, writer = talk(monkeypatch, ["x", "x", "/seed 5", "x", "x", "/seed 0", "x"])
    first, second, third, fourth, fifth = [request.seed for request in writer.requests]
    assert len({first, second, third, fourth}) == 4
    assert fifth == first


# ---- a talk ----


def test_questions_stand_alone_unless_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one", "two", "/keep on", "three", "four", "/keep on", "five", "/settings", "/help", "/nope"]
    chat, writer = talk(monkeypatch, lines)
    prompts = [writer.tokenizer.decode(request.prompt_ids) for request in writer.requests]
    asked = [
        [word for word in ("one", "two", "three", "four", "five") if word in prompt] for prompt in prompts
    ]
    assert asked == [["one"], ["two"], ["three"], ["three", "four"], ["five"]]
    assert "hello" in prompts[3]  # its own answer
    assert len({request.seed for request in writer.requests}) == 5
    printed = capsys.readouterr()
    assert printed.out.count("hm\nhello\n") == 5
    assert "/keep on" in printed.out
    assert printed.out.count("a conversation begins with the next question") == 2
    assert HELP in printed.out
    assert printed.err == "there is no command /nope; /help lists them\n"
    assert "> " not in printed.out  # the answers alone, for another program
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    talk(monkeypatch, [])
    assert capsys.readouterr().out == "> \n"
    assert chat.turn == 5


def test_the_calculator_and_a_switched_off_thought(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = says("plain")
    talk(
        monkeypatch,
        ["/route auto", "what is 6 * 7?", "/route none", "/think off", "x", "/quit", "never"],
        writer,
    )
    (request,) = writer.requests
    assert writer.tokenizer.decode(request.prompt_ids).endswith("</think>\n\n")
    out = capsys.readouterr().out
    assert "6 × 7 = 42\n" in out
    assert "plain\n" in out


def test_what_cannot_be_asked_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, ["/paths best", "x", "/paths sample", "long " * 5000, "y"])
    printed = capsys.readouterr()
    first, second = printed.err.splitlines()
    assert "needs a model that judges" in first
    assert second.startswith("the question has ")
    assert "hello" in printed.out  # and it goes on


def test_ctrl_c_stops_an_answer_and_twice_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    writer = says("hm</think>hello", held=interrupted, size=1)
    chat, _ = talk(monkeypatch, ["x", KeyboardInterrupt, "never"], writer)
    assert len(writer.requests) == 1
    assert chat.turn == 0
    assert writer.in_use == 0
    talk(monkeypatch, [KeyboardInterrupt, "y", KeyboardInterrupt, KeyboardInterrupt, "never"])
    printed = capsys.readouterr()
    assert printed.err.count("Ctrl-C again, or Ctrl-D, leaves") == 2
    assert "hello" in printed.out


# ---- the screen ----


def shown(events: Sequence[Event], *, thought: bool = True, tty: bool = True) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
        screen = Screen(thought, lambda: 0.0)
        for event in events:
            screen.show(event)


SUMMARY: dict[str, Any] = {
    "thinking": {"tokens": 12, "seconds": 1.25, "forced": True},
    "paths": {"chosen": 0, "tokens": 20, "list": [{}]},
    "tools": [{"name": "calculator", "input": "6*7", "output": "42"}],
}
GROWN = [
    ChoiceSaid(0, "reasoning", "try"),
    ChoiceSaid(0, "reasoning", " 3"),
    ChoiceSaid(0, "content", "it is"),
    ChoiceSaid(0, "content", " 7"),
    Ended(0, "length", None, SUMMARY),
]


def test_a_thought_is_dimmed_with_its_length_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    shown(GROWN)
    assert capsys.readouterr().out == (
        f"{DIM}try{PLAIN}{DIM} 3{PLAIN}\nit is 7\n"
        f"{DIM}[calculator: 6*7 → 42]{PLAIN}\n"
        f"{DIM}[thought 12 tokens, 1.2 s, closed by its budget; cut off: it had no more tokens]{PLAIN}\n"
    )


def test_a_thought_may_be_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    shown(GROWN, thought=False)
    out = capsys.readouterr().out
    assert out.startswith(f"{DIM}[thinking…]{PLAIN}\nit is 7\n")
    assert "try" not in out


def test_another_program_gets_texts_only(capsys: pytest.CaptureFixture[str]) -> None:
    shown(GROWN, thought=False, tty=False)
    assert capsys.readouterr().out == "it is 7\n"
    shown([Ended(0, "stop", None, {})], tty=False)
    assert capsys.readouterr().out == "\n"
    shown(GROWN, tty=False)
    assert capsys.readouterr().out == "try 3\nit is 7\n"


HOSTILE = "a\x1b]0;name\x07b\rc\x9b2Jd\x7fe\n\tf"
HARMLESS = "a␛]0;name␇b␍c\ufffd2Jd␡e\n\tf"


def test_a_terminal_obeys_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in the thought, nor in the answer, nor in what a tool was told and said."""
    used = [{"name": "python", "input": "\x1b[2J", "output": "\x9b5n"}]
    events = [
        ChoiceSaid(0, "reasoning", HOSTILE),
        ChoiceSaid(0, "content", HOSTILE),
        Ended(0, "stop", None, {"thinking": {"tokens": 0}, "paths": {"list": []}, "tools": used}),
    ]
    shown(events)
    out = capsys.readouterr().out
    assert out == f"{DIM}{HARMLESS}{PLAIN}\n{HARMLESS}\n{DIM}[python: ␛[2J → \ufffd5n]{PLAIN}\n"
    shown(events, tty=False)
    assert capsys.readouterr().out == f"{HOSTILE}\n{HOSTILE}\n"  # another program gets what was written


def test_the_way_and_the_vote_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    served = house_of(says("x")).find(None)
    vote = {
        "thinking": {"tokens": 0},
        "paths": {
            "chosen": 1,
            "tokens": 30,
            "list": [{"votes": 1, "score": None}, {"votes": 2, "score": None}, {"votes": 2, "score": None}],
        },
    }
    events = [
        Started(served, 3, {"way": "think", "why": "it is hard"}),
        *[PathSaid(0, "content", "a")] * 9,
        PathSaid(2, "content", "b"),
        ChoiceSaid(0, "content", "b"),
        Ended(0, "stop", None, vote),
    ]
    shown(events)
    out = capsys.readouterr().out
    assert out.startswith(f"{DIM}[think: it is hard]{PLAIN}\n")
    assert f"\r{DIM}3 paths, 0.0 s{PLAIN}\nb\n" in out
    assert out.count("path, 0.0 s") == 1  # not at every token of each
    assert out.endswith(f"{DIM}[path 2 of 3, 2 votes, 30 tokens]{PLAIN}\n")


def test_a_scripted_writer_stops_where_it_is_told() -> None:
    """What these tests stand on."""
    writer = says("a b c")
    ids = writer.tokenizer.encode("a b c")
    request = Request(id=0, prompt_ids=(1,), max_tokens=50, seed=0, stop_ids=(ids[-1],))
    sample = asyncio.run(writer.write(request))
    assert list(sample.completion_ids) == ids
    assert tokenizer().decode(sample.completion_ids) == "a b c"
