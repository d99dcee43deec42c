"""The page in both languages and themes, on a phone, by keyboard and by ear; and its files."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: install liubai[dev]")
pytest.register_assert_rewrite("reader")
pytest.importorskip("uvicorn", reason="the page is tested against a server: install liubai[serve]")

from html_page import Page as Parsed  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402
from reader import CONTRAST, CONTROLS, ask, finished, visit  # noqa: E402
from scripted_server import (  # noqa: E402
    DONE,
    PAGE,
    POLICY,
    Delta,
    Extra,
    Gate,
    Raw,
    ScriptedServer,
    Step,
    simple,
    usage,
    vote,
)

pytest_plugins = ["reader"]


def test_language_and_theme_switch_everything(page: Page, server: ScriptedServer) -> None:
    server.plan += [vote(3), simple("x", thought="y", finish="length")]
    page.select_option("#kind", "vote")
    page.click("#options-button")
    finished(ask(page, "?"))
    finished(ask(page, "?"))
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#theme")
    page.click("#theme")
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: dark")
    assert page.evaluate(paper) != light
    page.click("#language")
    expect(page.locator("html")).to_have_attribute("lang", "zh")
    # no English is left: of what is said, by any element, no run of Latin letters but names
    said = page.evaluate(
        """() => [...document.querySelectorAll('[data-said]')].flatMap(
          (el) => [el.childElementCount ? '' : el.textContent, el.ariaLabel, el.title, el.placeholder])"""
    )
    names = {
        "Liubai",
        "English",
        "Switch",
        "to",
        "Enter",
        "Shift",
        "Esc",
        "API",
        "Python",
        "DeepThink",
        "JavaScript",
        "v1",
    }
    names |= {"liubai-small", "make"}
    told = [text for text in said if text]
    assert len(told) > 60
    assert {word for text in told for word in re.findall(r"[A-Za-z][A-Za-z0-9-]+", text)} <= names
    visit(page, server)  # kept, and there before the first paint
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.locator("#send")).to_have_attribute("aria-label", "发送")


def test_both_languages_say_the_same_things(page: Page) -> None:
    keys = page.evaluate(
        """async () => {
          const { languages } = await import('./words.js');
          const form = ([key, say]) => `${key}:${typeof say === 'function' ? say.length : 'text'}`;
          return Object.values(languages).map((words) => Object.entries(words).map(form).sort());
        }"""
    )
    assert keys[0] == keys[1]
    known = {key.split(":")[0] for key in keys[0]}
    used = set(re.findall(r'data-say(?:-\w+)?="(\w+)"', (PAGE / "index.html").read_text(encoding="utf-8")))
    for script in PAGE.glob("*.js"):
        text = script.read_text(encoding="utf-8")
        used |= set(re.findall(r'\bsay\((?:\w|[.$]|\((?:[^()]|\([^()]*\))*\))+, "(\w+)"', text))
        used |= set(re.findall(r'\b(?:words|Refusal)\("(\w+)"', text))
    assert len(used) > 70
    assert used - known == set()


def test_the_browsers_language_and_theme_are_taken(browser: Browser, server: ScriptedServer) -> None:
    server.reset()
    context = browser.new_context(locale="zh-CN", color_scheme="dark")
    page = context.new_page()
    visit(page, server)
    expect(page.locator(".lead")).to_have_text("留一处空白，让思考来填。")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 21, 19)"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_names_and_sizes_on_a_phone(browser: Browser, server: ScriptedServer, scheme: Any) -> None:
    server.reset()
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, locale="en-US", has_touch=True
    )
    page = context.new_page()
    visit(page, server)
    tokens = tuple((f"w{i} ", p, [("so", 0.01)]) for i, p in enumerate((0.95, 0.7, 0.4, 0.2, 0.01)))
    route = Extra(
        {
            "liubai": {
                "route": {"way": "think", "why": "hard"},
                "tools": [{"name": "python", "input": "1", "output": "1"}],
            }
        }
    )
    server.plan += [
        [
            route,
            Delta(reasoning="hm " * 300),
            Delta(content="".join(t[0] for t in tokens), tokens=tokens),
            DONE,
        ],
        [*vote(5)[:-2], usage(5), Raw('data: {"error": {"message": "ended"}}\n\n')],
        simple("```\n" + "wide " * 80 + "\n```\nand `code`, then\n> a quote", finish="length"),
    ]
    page.click("#options-button")
    page.check("#ink")
    finished(ask(page, "a" * 200))
    page.select_option("#kind", "vote")
    finished(ask(page, "vote"))
    finished(ask(page, "code"))
    for options in (True, False):
        assert page.locator("#options").is_visible() is options
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 60
        assert [line for line in contrasts if line[0] < 4.5] == []
        controls = page.evaluate(CONTROLS)
        assert len(controls) > 20
        assert [c for c in controls if not c["name"]] == []
        targets = [c for c in controls if c["tag"] in ("BUTTON", "INPUT", "SELECT", "TEXTAREA", "SUMMARY")]
        assert [
            c for c in targets if c["height"] < 39.5 or (c["tag"] == "BUTTON" and c["width"] < 39.5)
        ] == []
        assert [c for c in targets if c["left"] < 0 or c["right"] > 360] == []
        for scroller in ("html", "body", "#talk", ".bottom", ".top"):
            assert page.locator(scroller).evaluate("(el) => el.scrollWidth <= el.clientWidth"), scroller
        page.click("#options-button")
    lanes = page.locator(".lanes").nth(1)  # those of the vote
    assert (
        lanes.evaluate("(el) => el.scrollWidth > el.clientWidth && getComputedStyle(el).overflowX") == "auto"
    )  # swiped
    assert page.locator("h1").count() == 1
    context.close()


def test_the_chosen_path_is_in_sight_on_a_phone(browser: Browser, server: ScriptedServer) -> None:
    server.reset()
    context = browser.new_context(viewport={"width": 390, "height": 844}, locale="en-US", has_touch=True)
    page = context.new_page()
    visit(page, server)
    steps = vote(5)
    for step in steps:
        if isinstance(step, Extra) and "paths" in step.value.get("liubai", {}):
            step.value["liubai"]["paths"]["chosen"] = 3
    server.plan.append(steps)
    page.select_option("#kind", "vote")
    turn = finished(ask(page, "vote"))
    expect(turn.locator(".path.chosen h3")).to_have_text("Path 4")
    box = turn.locator(".path.chosen").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    context.close()


def test_the_keyboard_is_enough(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#question")).to_be_focused()  # ready to type
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.evaluate(
        """() => document.getElementById('question').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"""
    )
    assert server.asked == []  # that Enter chose a Chinese word
    server.plan += [
        [Delta(reasoning="hm"), Delta(content="well"), Gate("keyboard"), DONE],
        simple("again", thought="t"),
    ]
    page.keyboard.press("Enter")
    turn = page.locator(".turn.last")
    expect(turn.locator(".answer-text")).to_have_text("well")
    assert server.asked[0]["messages"][0]["content"] == "first line\nsecond"
    page.keyboard.press("Escape")
    finished(turn)

    def tab(back: bool = False) -> str:
        page.keyboard.press("Shift+Tab" if back else "Tab")
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        if page.evaluate("document.activeElement.id") != "question":  # whose frame shows it
            assert page.evaluate(outline) != "none", page.evaluate("document.activeElement.outerHTML")
        return page.evaluate(
            "((el) => el.id || el.textContent.trim() || el.ariaLabel)(document.activeElement)"
        )

    page.focus("#question")
    assert [tab() for _ in range(4)] == ["think", "longer", "kind", "options-button"]
    page.keyboard.press("Enter")
    expect(page.locator("#options-button")).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#options")).to_be_visible()
    page.focus("#think")
    for checked in ("true", "false"):
        page.keyboard.press("Space")
        expect(page.locator("#think")).to_have_attribute("aria-checked", checked)
    page.focus("#question")
    assert [tab(back=True) for _ in range(2)] == ["Edit", "Retry"]
    page.keyboard.press("Enter")
    finished(page.locator(".turn.last"))
    assert len(server.asked) == 2
    summary = page.locator(".turn.last summary")
    summary.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".turn.last details")).not_to_have_attribute("open", "")
    assert tab(back=True) == "talk"
    assert [tab(back=True) for _ in range(4)] == ["language", "theme", "new", "model"]
    tab(back=True)
    expect(page.locator(".skip")).to_be_focused()
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()


def test_those_who_listen_hear_sentences_not_tokens(page: Page, server: ScriptedServer) -> None:
    answer = "The sum is nine. " * 30 + "Done"
    pieces: list[Step] = [Delta(content=answer[i : i + 4]) for i in range(0, len(answer), 4)]
    server.plan.append([Delta(reasoning="quietly thought"), *pieces, Delta(finish="stop"), DONE])
    page.evaluate(
        """() => {
          window.spoken = [];
          const keep = (one) => one.addedNodes.forEach((node) => window.spoken.push(node.textContent));
          const voice = document.getElementById('voice');
          new MutationObserver((list) => list.forEach(keep)).observe(voice, {childList: true});
        }"""
    )
    turn = ask(page, "sum")
    finished(turn)
    spoken = page.evaluate("window.spoken")
    assert spoken[:3] == ["Waiting for the first word", "Thinking", "Writing the answer."]
    assert "".join(spoken[3:]) == answer
    assert len(spoken) < 12  # of 130 pieces
    assert not any("quietly" in line for line in spoken)
    expect(page.locator("#voice")).to_have_attribute("aria-live", "polite")
    live = page.locator("[aria-live], [role=log], [role=status], [role=alert]").evaluate_all(
        "(all) => all.map((el) => el.id)"
    )
    assert set(live) == {"voice", "trouble", "key-why"}  # the answer itself is no live region


def test_reduced_motion_is_respected(page: Page, server: ScriptedServer) -> None:
    page.emulate_media(reduced_motion="reduce")
    server.plan.append([Gate("still"), DONE])
    turn = ask(page, "wait")
    expect(turn.locator(".wait i")).to_be_visible()
    assert page.evaluate("document.getAnimations().length") == 0
    server.open("still")
    finished(turn)
    page.emulate_media(reduced_motion="no-preference")


def test_the_page_follows_until_the_reader_scrolls_away(page: Page, server: ScriptedServer) -> None:
    lines = "".join(f"paragraph {i}\n\n" for i in range(60))
    server.plan.append(
        [Delta(content=lines), Gate("a"), Delta(content=lines), Gate("b"), Delta(content="end"), DONE]
    )
    turn = ask(page, "long")
    expect(turn.locator("p", has_text="paragraph 59")).to_be_in_viewport()
    page.locator("#talk").evaluate("(el) => { el.scrollTop = 100; }")
    expect(page.locator("#to-end")).to_be_visible()
    server.open("a")
    expect(turn.locator("p", has_text="paragraph 59")).to_have_count(2)
    assert page.locator("#talk").evaluate("(el) => el.scrollTop") == 100
    page.click("#to-end")
    expect(page.locator("#to-end")).to_be_hidden()
    server.open("b")
    finished(turn)
    expect(turn.locator(".answer-text > :last-child")).to_be_in_viewport()


def test_files_load_nothing_from_outside_and_nothing_inline(page: Page, server: ScriptedServer) -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    shown = Parsed(re.sub(r"<svg.*?</svg>", "", html, flags=re.S))  # whose tags close themselves
    assert len(shown.ids) == len(set(shown.ids))
    assert all(not text.strip() for text in shown.scripts)
    for tag, attrs in shown.tags:
        assert tag != "style"
        assert not any(name == "style" or name.startswith("on") for name in attrs)
        for name in ("src", "href"):
            assert not re.match(r"[a-z]+://|//", attrs.get(name) or "")
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        outside = set(re.findall(r"https?://[^'\"\s)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, path.name
        if path.suffix == ".js":
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser",
                text,
            ), path.name
            assert len(text.splitlines()) <= 400
    assert set(server.fetched) - {""} <= {path.name for path in PAGE.iterdir()}
    assert (
        "require-trusted-types-for 'script'" in POLICY
    )  # so that every other test would fail on an HTML sink
