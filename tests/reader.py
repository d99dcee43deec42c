"""A reader of the page: a real browser, what a reader does with it, and what the tests look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from scripted_server import ScriptedServer

expect.set_options(timeout=10_000)
CHROMIUM = shutil.which("chromium")

#: Luminance by WCAG 2.2 of what an element's text and the ground below it are, and their contrast.
CONTRAST = """
() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1]; };
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const lum = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(c[i]), 0);
  const ground = (el) => {
    for (; el; el = el.parentElement) {
      const c = parse(getComputedStyle(el).backgroundColor);
      if (c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const el = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    const apart = '[disabled], option, script, .hidden, noscript, svg';
    if (!text || el.closest(apart) || !el.checkVisibility()) continue;
    const [a, b] = [lum(parse(getComputedStyle(el).color)), lum(ground(el))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text.slice(0, 40), el.className || el.tagName]);
  }
  return found;
}
"""

#: Every control with its name as the accessibility tree computes it from label, aria-label, text or title.
CONTROLS = """
() => [...document.querySelectorAll('button, input, select, textarea, summary, [tabindex="0"]')]
  .filter((el) => el.checkVisibility() && !el.closest('[hidden]')).map((el) => {
    const label = el.labels && [...el.labels].map((l) => l.textContent).join(' ');
    const name = el.getAttribute('aria-label') || label || el.textContent;
    const target = (el.type === 'checkbox' ? el.closest('label') : el).getBoundingClientRect();
    return { tag: el.tagName, id: el.id, name: name.trim(), width: target.width, height: target.height,
             left: target.left, right: target.right };
  })
"""


#: Where a text with an override of direction is not isolated from what stands around it.
NOT_ISOLATED = """
() => {
  const bad = [], fine = (el) => /isolate|plaintext/.test(getComputedStyle(el).unicodeBidi);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    if (!walk.currentNode.data.includes('\\u202e')) continue;
    let el = walk.currentNode.parentElement;
    while (el && getComputedStyle(el).display === 'inline' && !fine(el)) el = el.parentElement;
    if (!fine(el)) bad.push(el.outerHTML.slice(0, 90));
  }
  return bad;
}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("the page is tested in chromium, which is not installed here")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def window(browser: Browser) -> Iterator[tuple[Page, list[str]]]:
    """One window for all tests of a module, and what went wrong in it."""
    made = browser.new_context(viewport={"width": 1280, "height": 860}, locale="en-US", color_scheme="light")
    made.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = made.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    opened.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
    yield opened, wrong
    made.close()


@pytest.fixture
def page(window: tuple[Page, list[str]], server: ScriptedServer) -> Iterator[Page]:
    """The page as at the first visit. No script may fail, and the policy may never be hurt."""
    opened, wrong = window
    wrong.clear()
    server.reset()
    visit(opened, server)
    yield opened
    opened.evaluate("localStorage.clear(); sessionStorage.clear()")
    assert not wrong


def visit(page: Page, server: ScriptedServer) -> None:
    page.goto(server.url)
    expect(page.locator("#model option")).to_have_count(len(server.offered))


def ask(page: Page, question: str) -> Locator:
    """Types and sends; the turn that was begun."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    return page.locator(".turn.last")


def finished(turn: Locator) -> Locator:
    expect(turn).to_have_attribute("aria-busy", "false")
    return turn


def switch_colours(page: Page, on: bool = True) -> None:
    """Tokens by their probability, on or off; the options are closed again."""
    page.click("#options-button")
    page.set_checked("#ink", on)
    page.click("#options-button")


def heard(page: Page) -> list[str]:
    return page.locator("#voice p").all_text_contents()


def wait_until(page: Page, condition: str, argument: Any = None) -> None:
    page.wait_for_function(condition, arg=argument, timeout=10_000)
