"""Calls that models write are read, answered and bounded; code of theirs runs in the sandbox or nowhere."""

import asyncio
import json
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.grade import sandbox
from liubai.serve import tools as house
from liubai.serve.tools import (
    MAX_CALL,
    MAX_OUTPUT,
    TOOLS,
    ToolError,
    Tools,
    ToolUse,
    described,
    read_call,
    use,
)

BOTH = ("calculator", "python")


def call(name: str, **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def answered(text: str, allowed: tuple[str, ...] = BOTH) -> ToolUse:
    return asyncio.run(use(text, allowed))


def sandboxed() -> None:
    try:
        sandbox.require()
    except UserError as missing:
        pytest.skip(str(missing))


# --- how calls are written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        call("calculator", expression="3 * 4"),
        f"<tool_call>\n{call('calculator', expression='3 * 4')}\n</tool_call>",
        f"<tool_call>{call('calculator', expression='3 * 4')}",  # cut off at the end of its tag
        f"so I ask <tool_call>{call('calculator', expression='3 * 4')}</tool_call> and",
        '{"name": "calculator", "parameters": {"expression": "3 * 4"}}',
        '{"name": "calculator", "arguments": "{\\"expression\\": \\"3 * 4\\"}"}',
        '{"name": "calculator", "arguments": "3 * 4"}',
        '{"name": "calculator", "arguments": {"input": "3 * 4"}}',
        "<tool> 3 * 4 </tool>",
        "<tool> 3 * 4 = </tool>",
        "3 * 4",
    ],
)
def test_ways_to_write_a_call(text: str) -> None:
    used = answered(text)
    assert (used.name, used.input, used.output, used.error) == ("calculator", "3 * 4", "12", False)


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("<tool> 3 . 11 or 3 . 8 </tool>", "3.8"),
        ("<tool> 3.11 还是 3.8 </tool>", "3.8"),
        (call("calculator", expression="123456789 * 987654321"), "121932631112635269"),
        (call("calculator", expression="12/25"), "0.48"),  # no date here
        (call("calculator", expression=7.5 * 2), "the calculator refuses: there is nothing to compute"),
        (call("calculator", expression="2^0.5"), "the calculator refuses: the root is no fraction, "
                                                 "so that it cannot be given exactly"),
        (call("calculator"), "'calculator' takes one argument, 'expression', a text"),
        (call("calculator", expression=["3"]), "'calculator' takes one argument, 'expression', a text"),
        (call("calculater", expression="3"), "there is no tool 'calculater'; there are: calculator, python"),
        ('{"arguments": {}}', 'a call is {"name": …, "arguments": {…}}, in JSON'),
        ("{" * 5000, 'a call is {"name": …, "arguments": {…}}, in JSON'),
        ('{"name":' + "[" * 9000, 'a call is {"name": …, "arguments": {…}}, in JSON'),
        ("<tool_call></tool_call>", "the call is empty"),
        ("", "the call is empty"),
        ("9" * (MAX_CALL + 1), f"the call is longer than {MAX_CALL} characters"),
    ],
)  # fmt: skip
def test_what_a_model_is_told(text: str, output: str) -> None:
    used = answered(text)
    assert used.output == output
    assert used.error == (not output[0].isdigit())
    assert len(used.input) <= MAX_OUTPUT + 60


def test_only_what_is_allowed_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: object, **__: object) -> None:
        raise AssertionError("the program was run")

    monkeypatch.setattr(sandbox, "run", ran)
    used = answered(call("python", code="print(1)"), ("calculator",))
    assert (used.name, used.output, used.error) == ("python", "'python' may not be used here", True)
    assert answered("1 + 1", ()).output == "'calculator' may not be used here"
    # a plain call is for the only tool that there is
    assert read_call("<tool> print(1) </tool>", ("python",)).name == "python"
    assert read_call("<tool> 1 + 1 </tool>", BOTH).name == "calculator"
    with pytest.raises(UserError, match="there is no tool 'pyton'; did you mean 'python'"):
        Tools(["pyton"])


def test_schemas() -> None:
    (first, second) = described(["python", "calculator"])
    assert [first["function"]["name"], second["function"]["name"]] == ["calculator", "python"]
    for tool in (first, second):
        assert tool["type"] == "function"
        parameters = tool["function"]["parameters"]
        (argument,) = parameters["properties"]
        assert parameters["required"] == [argument]
        assert TOOLS[tool["function"]["name"]].takes == argument
        assert json.loads(json.dumps(tool)) == tool
    assert described([]) == []
    with pytest.raises(UserError):
        described(["search"])


leaves = st.one_of(st.none(), st.booleans(), st.text(max_size=9))
keys = st.sampled_from(["name", "arguments", "expression"])
objects = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner)).map(json.dumps)


@settings(deadline=None)
@given(st.one_of(st.text(max_size=200), objects))
def test_no_text_raises(text: str) -> None:
    used = asyncio.run(use(text, ("calculator",)))
    assert used.output
    assert used.error or used.name == "calculator"


# --- limits of an answer ---------------------------------------------------------------------------------


def test_an_answer_has_so_many_calls() -> None:
    async def work() -> None:
        mine, other = Tools(BOTH, calls=2), Tools(BOTH)
        assert await mine.answer("1 + 1") == "2"
        assert "refuses" in await mine.answer("nonsense")
        assert await mine.answer("1 + 1") == "no more than 2 calls; answer now"
        assert await other.answer("1 + 1") == "2"
        assert [used.error for used in mine.used] == [False, True, True]

    asyncio.run(work())


def test_an_answer_has_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def slow(source: str, *, limits: sandbox.Limits) -> sandbox.Result:
        given.append(limits.seconds)
        time.sleep(0.06)
        return sandbox.Result(0, b"done\n", b"", "ok", 0.06)

    monkeypatch.setattr(sandbox, "run", slow)

    async def work() -> None:
        mine = Tools(BOTH, seconds=0.1)
        assert await mine.answer(call("python", code="1")) == "done"
        assert await mine.answer(call("python", code="1")) == "done"
        assert await mine.answer(call("python", code="1")) == "the time for tools is used up; answer now"

    asyncio.run(work())
    assert given[0] == pytest.approx(0.1)
    assert 0 < given[1] < 0.05  # no program may run for longer than is left


# --- python -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "output", "error"),
    [
        ("print(sum(range(10)))", "45", False),
        ("```python\nprint(2 ** 10)\n```", "1024", False),
        ("x = 1", "(the program printed nothing; use print)", False),
        ("print(1)\n1/0", "1\nZeroDivisionError: division by zero", True),
        ("import socket; socket.socket()", "PermissionError: [Errno 1] Operation not permitted", True),
        ("import liubai", "ModuleNotFoundError: No module named 'liubai'", True),
        ("print('留白')", "留白", False),
        ("\ud800", "SyntaxError: invalid syntax", True),
    ],
)
def test_python(code: str, output: str, error: bool) -> None:
    sandboxed()
    used = answered(json.dumps({"name": "python", "arguments": {"code": code}}))
    assert (used.output, used.error) == (output, error)


def test_output_of_a_program_is_bounded() -> None:
    sandboxed()
    used = answered(call("python", code="print('a' * 30000 + 'z')"))
    assert len(used.output) < MAX_OUTPUT + 60
    assert used.output.startswith("aaa")
    assert used.output.endswith("z")
    assert "28001 characters left out" in used.output
    flood = answered(call("python", code="while True: print('x' * 1000)"))
    assert flood.error
    assert flood.output.endswith("the program printed too much")
    assert len(flood.output) < MAX_OUTPUT + 60


def test_a_program_that_hangs_does_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    sandboxed()
    monkeypatch.setattr(house, "PYTHON", sandbox.Limits(seconds=1.0))

    async def work() -> tuple[ToolUse, int]:
        hanging = asyncio.create_task(use(call("python", code="while True: pass"), BOTH))
        turns = 0
        while not hanging.done():
            assert (await use("6 * 7", BOTH)).output == "42"  # others are answered meanwhile
            await asyncio.sleep(0.01)
            turns += 1
        return hanging.result(), turns

    used, turns = asyncio.run(work())
    assert (used.output, used.error) == ("the program was stopped after 1 seconds", True)
    assert turns > 10


def test_withdrawing_an_answer_does_not_wait_for_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    sandboxed()
    monkeypatch.setattr(house, "PYTHON", sandbox.Limits(seconds=1.5))

    async def work() -> float:
        hanging = asyncio.create_task(use(call("python", code="import time; time.sleep(60)"), BOTH))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        return time.monotonic() - started

    assert asyncio.run(work()) < 1.0


def test_where_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise UserError("programs are run in a sandbox: install the Debian package bubblewrap (Linux)")

    monkeypatch.setattr(sandbox, "run", missing)
    monkeypatch.setattr(house, "_warned", False)
    with pytest.warns(UserWarning, match="out of use: .*install the Debian package bubblewrap"):
        used = answered(call("python", code="open('ran', 'w')"))
    assert used == ToolUse(
        "python", "open('ran', 'w')", "Python is not available here; go on without it", True, used.seconds
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        assert answered(call("python", code="1")).output == used.output


def test_a_sandbox_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the sandbox did not start (secret path)")

    monkeypatch.setattr(sandbox, "run", broken)
    used = answered(call("python", code="1"))
    assert used.error
    assert "could not be started" in used.output
    assert "secret" not in used.output


def test_when_all_programs_hang_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(source: str, *, limits: sandbox.Limits) -> sandbox.Result:
        time.sleep(0.4)
        return sandbox.Result(0, b"late\n", b"", "ok", 0.4)

    monkeypatch.setattr(sandbox, "run", slow)
    monkeypatch.setattr(house, "GRACE_S", 0.1)

    async def work() -> list[str]:
        one = call("python", code="1")
        many = [use(one, BOTH, left_s=5.0) for _ in range(house.PROGRAMS)]
        return [used.output for used in await asyncio.gather(*many, use(one, BOTH, left_s=0.1))]

    assert asyncio.run(work()) == ["late"] * house.PROGRAMS + ["Python is busy; go on without it"]


def test_a_tool_error_is_no_bug() -> None:
    with pytest.raises(ToolError):
        read_call("", BOTH)
