"""Tokens by their probability, as the page shows them in a real browser."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: install liubai[dev]")
pytest.register_assert_rewrite("reader")
pytest.importorskip("uvicorn", reason="the page is tested against a server: install liubai[serve]")

from playwright.sync_api import Page, expect  # noqa: E402
from reader import ask, finished, heard, switch_colours  # noqa: E402
from scripted_server import DONE, Delta, Extra, Gate, ScriptedServer, Step, simple, usage  # noqa: E402

pytest_plugins = ["reader"]


def test_tokens_are_coloured_and_explained(page: Page, server: ScriptedServer) -> None:
    sure, unsure = ("It", 0.97, [("So", 0.02)]), (" is", 0.05, [(" was", 0.8), ("\n", 0.1)])
    server.plan.append(
        [
            Delta(reasoning="hm", tokens=(("hm", 0.5, []),)),
            Delta(content="It is", tokens=(sure, unsure)),
            DONE,
        ]
    )
    switch_colours(page)
    turn = finished(ask(page, "probable?"))
    spans = turn.locator(".answer-text span")
    expect(spans).to_have_text(["It", " is"])
    assert [span.get_attribute("class") for span in spans.all()] == ["wash0", "wash4"]
    expect(turn.locator(".thought-text .wash2")).to_have_text("hm")
    expect(turn.locator(".legend")).to_contain_text("≥ 90 %")
    spans.nth(1).hover()
    expect(page.get_by_role("tooltip")).to_contain_text("5.0 % · ln p −3.00")
    expect(page.locator("#tip tr")).to_have_text(["␣is5.0 %", "␣was80 %", "↵10 %"])
    page.mouse.move(5, 400)
    expect(page.get_by_role("tooltip")).to_be_hidden()

    page.focus("#question")  # and by the keyboard: back from the composer to the text
    turn.get_by_role("button", name="Copy", exact=True).focus()
    page.keyboard.press("Shift+Tab")
    expect(page.locator("#tip")).to_contain_text("97 %")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_contain_text("5.0 %")
    assert heard(page)[-1] == "␣is: 5.0 %. ␣was 80 %, ↵ 10 %"
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()

    page.click("#options-button")
    page.uncheck("#ink")
    expect(turn.locator(".answer-text p")).to_have_text("It is")  # Markdown again
    page.check("#ink")
    expect(spans).to_have_text(["It", " is"])


def test_tokens_without_white_space_or_with_half_characters(page: Page, server: ScriptedServer) -> None:
    half = {"token": "�", "logprob": -0.1, "bytes": [0xE7, 0x95], "top_logprobs": []}
    rest = {"token": "�", "logprob": -2.0, "bytes": [0x99], "top_logprobs": []}
    chunk = {"choices": [{"index": 0, "delta": {"content": "留"}, "logprobs": {"content": [half, rest]}}]}
    words = (("6", 0.5, []), ("*", 0.95, []), ("4", 0.2, []))
    server.plan.append([Extra(chunk), Delta(content=" 6 * 4", tokens=words), DONE])
    switch_colours(page)
    turn = finished(ask(page, "half"))
    expect(turn.locator(".answer-text span")).to_have_text(["留", " 6", " *", " 4"], use_inner_text=False)
    assert turn.locator(".answer-text").evaluate("(el) => el.textContent") == "留 6 * 4"


def test_a_token_that_is_sure_has_no_negative_nothing(page: Page, server: ScriptedServer) -> None:
    server.plan.append([Delta(content="It", tokens=(("It", 0.9999, []),)), DONE])
    switch_colours(page)
    finished(ask(page, "sure?")).locator(".answer-text span").hover()
    expect(page.get_by_role("tooltip")).to_contain_text("100 % · ln p 0.00")


def test_an_answer_without_probabilities_says_so(page: Page, server: ScriptedServer) -> None:
    sums: list[Step] = [Extra({"liubai": {"route": {"way": "tool", "why": "a sum"}}}), Delta(content="2")]
    server.plan += [simple("earlier"), [*sums, usage(0), DONE], [Gate("never")], simple("plain")]
    legends = [
        "No probabilities came with this answer.",
        "The calculator's answers have no probabilities.",
        None,  # and of what was never written there are none
        "No probabilities came with this answer. Retry to see them.",
    ]
    for i in range(4):
        turn = ask(page, str(i))
        if i == 2:
            expect(turn.get_by_text("Waiting")).to_be_visible()
            page.click("#stop")
        finished(turn)
    switch_colours(page)
    for turn, legend in zip(page.locator(".turn").all(), legends, strict=True):
        if legend is None:
            expect(turn.locator("[data-part=legend]")).to_be_hidden()
        else:
            expect(turn.locator(".legend")).to_have_text(legend, use_inner_text=True)
    finished(ask(page, "and now with colours"))  # which a server without probabilities was asked for
    expect(page.locator(".turn.last .legend")).to_have_text(legends[0] or "", use_inner_text=True)
    expect(page.locator(".turn").nth(3).locator(".legend")).to_have_text(
        legends[0] or "", use_inner_text=True
    )
