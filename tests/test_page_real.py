"""The page and the server for which it was made, in a real browser: what the one sends the other takes, and
what the other streams the one shows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: install liubai[dev]")
pytest.register_assert_rewrite("reader")
pytest.importorskip("uvicorn", reason="the page is tested against a server: install liubai[serve]")

from playwright.sync_api import Page, expect  # noqa: E402
from reader import ask, finished, switch_colours  # noqa: E402
from serving import Running, ScriptedWriter, continues, house_of, running, tokenizer  # noqa: E402

from liubai.serve.app import HEAD_S  # noqa: E402

pytest_plugins = ["reader"]
THOUGHT = "Let me think.</think>\n\nIt is **42**, 留白."
SHOWN = "It is 42, 留白."


@pytest.fixture(scope="module")
def writer() -> ScriptedWriter:
    return ScriptedWriter(tokenizer(), lambda prompt, request: THOUGHT, scores=lambda q, r: float("{8}" in r))


@pytest.fixture(scope="module")
def real(writer: ScriptedWriter) -> Iterator[Running]:
    with running(house_of(writer)) as found:
        yield found


@pytest.fixture
def page(window: tuple[Page, list[str]], real: Running, writer: ScriptedWriter) -> Iterator[Page]:
    """At the first visit, with DeepThink pressed, so that no router decides. No script may fail, and the
    server's policy may never be hurt."""
    opened, wrong = window
    wrong.clear()
    writer.say = lambda prompt, request: THOUGHT
    writer.size, writer.held, writer.cancelled = 3, None, 0
    writer.requests.clear()
    visit(opened, real)
    opened.click("#think")
    yield opened
    opened.evaluate("localStorage.clear(); sessionStorage.clear()")
    assert not wrong


def visit(page: Page, server: Running) -> None:
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#model option")).to_have_text(["qwen"])


def in_turn(writer: ScriptedWriter, *texts: str) -> None:
    left = list(texts)
    writer.say = lambda prompt, request: left.pop(0)


def prompt(writer: ScriptedWriter, index: int) -> str:
    return writer.tokenizer.decode(writer.requests[index].prompt_ids)


def test_a_question_is_thought_about_and_answered(page: Page, writer: ScriptedWriter) -> None:
    turn = finished(ask(page, "how many?"))
    expect(turn.locator(".note")).to_be_hidden()
    expect(turn.locator(".thought-text")).to_have_text("Let me think.")
    expect(turn.locator(".answer-text")).to_have_text(SHOWN)
    expect(turn.locator(".answer-text strong")).to_have_text("42")
    thought = len(writer.tokenizer.encode("Let me think."))
    whole = len(writer.tokenizer.encode(THOUGHT)) + 1  # and the end
    expect(turn.locator("summary")).to_contain_text(f"{thought} tokens")
    expect(turn.locator("summary")).not_to_contain_text("about")
    expect(turn.locator(".stats")).to_contain_text(f"{whole} tokens")
    assert prompt(writer, 0).endswith("how many?<|im_end|>\n<|im_start|>assistant\n<think>\n")

    page.click("#think")  # and now without
    in_turn(writer, "At once.")
    turn = finished(ask(page, "and then?"))
    expect(turn.locator(".answer-text")).to_have_text("At once.")
    expect(turn.locator("details")).to_be_hidden()
    said = prompt(writer, 1)
    assert said.endswith("and then?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "how many?<|im_end|>\n<|im_start|>assistant\nIt is **42**, 留白.<|im_end|>" in said
    assert "Let me" not in said


def test_a_vote_is_counted(page: Page, writer: ScriptedWriter) -> None:
    in_turn(writer, *(f"path {i}</think>It is \\boxed{{{n}}}." for i, n in enumerate((7, 8, 8, 7, 7))))
    page.select_option("#kind", "vote")
    turn = finished(ask(page, "which?"))
    expect(turn.locator(".note")).to_be_hidden()
    expect(turn.locator(".path .thought-text")).to_have_text([f"path {i}" for i in range(5)])
    expect(turn.locator(".path .answer-text")).to_have_text(
        [f"It is \\boxed{{{n}}}." for n in (7, 8, 8, 7, 7)]
    )
    expect(turn.locator(".tally li")).to_have_text(["73 of 5", "82 of 5"])
    expect(turn.locator(".path.chosen .figures b")).to_have_text(["7"])
    expect(turn.locator(":scope > .answer-text")).to_contain_text("7")
    assert len({request.seed for request in writer.requests}) == 5


@pytest.mark.parametrize(
    ("kind", "written"), [("sample", 1), ("greedy", 1), ("best", 3), ("beam", 3), ("tree", None)]
)
def test_every_kind_of_paths_that_is_offered_is_taken(
    page: Page, writer: ScriptedWriter, kind: str, written: int | None
) -> None:
    in_turn(writer, *("a</think>\\boxed{7}", "b</think>\\boxed{8}", *["c</think>\\boxed{9}"] * 30))
    page.select_option("#kind", kind)
    if kind not in ("sample", "greedy"):
        page.click("#fewer")
        page.click("#fewer")
    turn = finished(ask(page, "which?"))
    expect(turn.locator(".note")).to_be_hidden()
    expect(turn.locator(":scope > .answer-text")).to_contain_text("boxed{")
    if written is not None:
        assert len(writer.requests) == written
    if written == 3:
        expect(turn.locator(".path")).to_have_count(3)
        expect(turn.locator(".path.chosen")).to_have_count(1)
    if kind == "best":
        expect(turn.locator(".path.chosen .figures")).to_contain_text("score 1.00")
        expect(turn.locator(":scope > .answer-text")).to_contain_text("8")


def test_every_option_is_taken(page: Page, writer: ScriptedWriter) -> None:
    writer.say = continues(THOUGHT).say
    page.click("#options-button")
    page.click("#longer")
    for name, value in (("budget", "300"), ("atLeast", "2"), ("maxTokens", "900"), ("temperature", "0.7")):
        page.fill(f"[data-number={name}]", value)
    page.select_option("#route", "auto")
    page.check("[data-tool][value=calculator]")
    page.check("[data-tool][value=python]")
    page.check("#ink")
    page.click("#options-button")
    turn = finished(ask(page, "Prove that there are infinitely many primes."))
    expect(turn.locator(".note")).to_be_hidden()
    expect(turn.locator(".route b")).to_have_text("With thought")
    request = writer.requests[0]
    assert (request.max_tokens, request.temperature, request.alternatives) == (300, 0.7, 5)
    assert "calculator" in prompt(writer, 0)
    assert "python" in prompt(writer, 0)
    inked = turn.locator(".answer-text")
    assert inked.evaluate("(el) => el.textContent").strip() == "It is **42**, 留白."
    assert inked.locator("span").count() > 3
    inked.locator("span").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("61 % · ln p −0.50")


@pytest.mark.parametrize("kind", ["sample", "vote"])
@pytest.mark.parametrize(("example", "answer"), [("3.11 or 3.8", "3.8"), ("123456789", "121932631112635269")])
def test_the_calculator_answers_the_examples(
    page: Page, writer: ScriptedWriter, real: Running, kind: str, example: str, answer: str
) -> None:
    page.evaluate("localStorage.clear()")
    visit(page, real)  # as the page is at first
    page.select_option("#kind", kind)
    page.click(f"#examples button >> text={example}")
    page.click("#send")
    turn = finished(page.locator(".turn.last"))
    expect(turn.locator(".route b")).to_have_text("Calculator")
    expect(turn.locator(".tools li")).to_contain_text("calculator")
    expect(turn.locator(":scope > .answer-text")).to_contain_text(answer)
    expect(turn.locator(".paths")).to_be_hidden()
    assert writer.requests == []


def test_stop_frees_the_slot_and_retry_asks_anew(page: Page, writer: ScriptedWriter, real: Running) -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    writer.say = lambda prompt, request: "So far.</think>half an answer and more"
    writer.size, writer.held = len(writer.tokenizer.encode("So far.</think>half an answer")), forever
    turn = ask(page, "stop me")
    expect(turn.locator(".answer-text")).to_contain_text("half an")
    assert (writer.in_use, real.server.gate.inside) == (1, 1)
    page.keyboard.press("Escape")
    finished(turn)
    expect(turn.locator(".note")).to_have_text("Stopped. What had come is kept.")
    expect(turn.locator(".answer-text")).to_contain_text("half an")
    for _ in range(1000):
        if not writer.in_use and not real.server.gate.inside:
            break
        page.wait_for_timeout(10)
    assert (writer.in_use, writer.cancelled, real.server.gate.inside) == (0, 1, 0)
    writer.held = None
    turn.get_by_role("button", name="Retry").click()
    turn = finished(page.locator(".turn.last"))
    expect(turn.locator(".answer-text")).to_have_text("half an answer and more")
    first, second = writer.requests
    assert first.prompt_ids == second.prompt_ids
    assert first.seed != second.seed


def test_a_failure_in_the_middle_and_a_server_that_is_busy(
    page: Page, writer: ScriptedWriter, real: Running
) -> None:
    async def broken() -> None:
        await asyncio.sleep(2 * HEAD_S)  # until the first words are sent
        raise RuntimeError("secret of the house")

    writer.size, writer.held = 30, broken
    turn = finished(ask(page, "fail"))
    expect(turn.locator(".note")).to_contain_text("The server failed at this question.")
    expect(turn.locator(".note")).not_to_contain_text("secret")
    expect(turn.locator(".thought-text")).to_have_text("Let me think.")
    writer.held = None
    real.server.gate.closing = True
    try:
        turn.get_by_role("button", name="Try again").click()
        turn = page.locator(".turn.last")
        expect(turn.locator(".note")).to_contain_text("Many are asking at once. The next try is in")
    finally:
        real.server.gate.closing = False
    turn.get_by_role("button", name="Try now").click()
    expect(finished(turn).locator(".answer-text")).to_have_text(SHOWN)


def test_colours_of_characters_that_are_several_tokens(page: Page, writer: ScriptedWriter) -> None:
    in_turn(writer, "</think>🙂 et 留白")
    switch_colours(page)
    turn = finished(ask(page, "colours?"))
    assert turn.locator(".answer-text").evaluate("(el) => el.textContent") == "🙂 et 留白"


def test_a_server_with_a_key(page: Page, writer: ScriptedWriter) -> None:
    with running(house_of(writer), keys=["secret"]) as server:
        page.goto(f"http://127.0.0.1:{server.port}/")
        for key in ("wrong", "secret"):
            expect(page.locator("#key-form")).to_be_visible()
            page.fill("#key", key)
            page.get_by_role("button", name="Use key").click()
        expect(page.locator("#model option")).to_have_text(["qwen"])
        expect(page.locator("#key-form")).to_be_hidden()
        page.click("#think")
        turn = finished(ask(page, "how many?"))
        expect(turn.locator(".answer-text")).to_have_text(SHOWN)
        page.evaluate("localStorage.clear(); sessionStorage.clear()")
