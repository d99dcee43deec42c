"""The page's settings: who decides whether it thinks, and numbers that cannot be sent."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: install liubai[dev]")
pytest.register_assert_rewrite("reader")
pytest.importorskip("uvicorn", reason="the page is tested against a server: install liubai[serve]")

from playwright.sync_api import Page, expect  # noqa: E402
from reader import ask, finished, visit  # noqa: E402
from scripted_server import MODEL, Refuse, ScriptedServer, simple  # noqa: E402

pytest_plugins = ["reader"]


def test_the_router_decides_until_the_switch_is_pressed(page: Page, server: ScriptedServer) -> None:
    think, route = page.locator("#think"), page.locator("#route")
    expect(think).to_have_text("DeepThink: auto")
    expect(think).to_have_attribute("aria-checked", "mixed")
    expect(think).to_have_attribute(
        "title", "The router decides for each question whether to think. Press to decide it yourself."
    )
    finished(ask(page, "as it comes"))
    assert server.asked[-1]["route"] == "auto"
    assert "thinking" not in server.asked[-1]
    page.click("#options-button")
    expect(
        page.get_by_text("The DeepThink switch, once pressed, decides instead of the router.")
    ).to_be_visible()
    for thinks in (True, False):
        think.click()
        expect(think).to_have_text("DeepThink")
        expect(think).to_have_attribute("aria-checked", str(thinks).lower())
        expect(route).to_have_value("none")
        finished(ask(page, "as I say"))
        assert server.asked[-1]["thinking"] is thinks
        assert "route" not in server.asked[-1]
    for way, shown in (("think", "true"), ("fast", "false"), ("tool", "mixed"), ("auto", "mixed")):
        route.select_option(way)  # the switch shows what will be
        expect(think).to_have_attribute("aria-checked", shown)
    route.select_option("fast")
    page.click("#think")  # and pressed, it says the other thing
    expect(think).to_have_attribute("aria-checked", "true")
    page.click("#language")
    route.select_option("auto")
    expect(think).to_have_text("深度思考：自动")


def test_without_a_router_the_switch_decides(page: Page, server: ScriptedServer) -> None:
    server.offered = [{"id": "plain", "liubai": MODEL | {"routes": []}}]
    visit(page, server)
    expect(page.locator("#think")).to_have_text("DeepThink")
    expect(page.locator("#think")).to_have_attribute("aria-checked", "true")
    finished(ask(page, "on"))
    page.click("#think")
    finished(ask(page, "off"))
    assert [asked["thinking"] for asked in server.asked] == [True, False]
    assert not any("route" in asked for asked in server.asked)


def test_numbers_that_cannot_be_sent(page: Page, server: ScriptedServer) -> None:
    server.plan += [Refuse(500, "")]
    turn = finished(ask(page, "first"))
    page.click("#options-button")
    budget, heat = page.locator("[data-number=budget]"), page.locator("[data-number=temperature]")
    whole = page.get_by_text("A whole number from 1 to 1,000,000, or nothing.")
    some = page.get_by_text("A number from 0 to 2, or nothing.")
    budget.fill("0")
    heat.fill("7")
    page.focus("#question")
    expect(whole.filter(visible=True)).to_have_count(1)
    expect(some).to_be_visible()
    page.click("#options-button")  # closed, as if it were done with
    page.fill("#question", "second")
    for send in (lambda: page.press("#question", "Enter"), lambda: page.click("#send")):
        send()
        expect(budget).to_be_focused()
        expect(budget).to_have_value("0")
        expect(budget).to_have_attribute("aria-invalid", "true")
        expect(budget).to_have_accessible_description("A whole number from 1 to 1,000,000, or nothing.")
        expect(page.locator("#question")).to_have_value("second")
    turn.get_by_role("button", name="Try again").click()
    expect(budget).to_be_focused()
    assert len(server.asked) == 1
    budget.fill("30")
    expect(whole.filter(visible=True)).to_have_count(0)
    expect(budget).to_have_attribute("aria-invalid", "false")
    page.press("#question", "Enter")
    expect(heat).to_be_focused()
    expect(heat).to_have_value("7")
    heat.fill("")
    server.plan.append(simple("sent at last"))
    page.press("#question", "Enter")
    finished(page.locator(".turn.last"))
    expect(page.locator(".turn.last .answer-text")).to_have_text("sent at last")
    assert server.asked[1]["thinking_budget"] == 30
    assert "temperature" not in server.asked[1]
