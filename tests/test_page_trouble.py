"""The page when something goes wrong, and when a model writes what nobody should trust."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: install liubai[dev]")
pytest.register_assert_rewrite("reader")
pytest.importorskip("uvicorn", reason="the page is tested against a server: install liubai[serve]")

from playwright.sync_api import Page, expect  # noqa: E402
from reader import NOT_ISOLATED, ask, finished, heard, switch_colours, visit  # noqa: E402
from scripted_server import DONE, Break, Delta, Extra, Gate, Raw, Refuse, ScriptedServer, Step, simple  # noqa: E402

pytest_plugins = ["reader"]


def test_a_key_is_asked_for_and_kept_in_the_tab_only(page: Page, server: ScriptedServer) -> None:
    server.key = "right"
    server.keys.clear()
    page.goto(server.url)
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-why")).to_have_text("The server did not accept this key.")
    page.fill("#key", "right")
    page.click("#key-form button")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#question")).to_be_focused()
    finished(ask(page, "open?"))
    assert server.keys == [None, "Bearer wrong", "Bearer right", "Bearer right"]
    assert page.evaluate(
        "[JSON.stringify(localStorage).includes('right'), sessionStorage['liubai-key']]"
    ) == [False, "right"]
    # the key changes while the page is open: the question waits for the new one
    server.key = "newer"
    server.plan.append(simple("inside"))
    turn = ask(page, "and now?")
    expect(page.locator("#key")).to_be_focused()
    expect(turn.locator(".note")).to_contain_text("An API key is needed")
    page.keyboard.type("newer")
    page.keyboard.press("Enter")
    finished(page.locator(".turn.last"))
    expect(page.locator(".turn.last .answer-text")).to_have_text("inside")
    expect(page.locator(".turn")).to_have_count(2)


def test_a_key_that_cannot_be_sent_is_wrong(page: Page, server: ScriptedServer) -> None:
    server.key = "right"
    page.goto(server.url)
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator(".chooser")).to_be_hidden()  # there is nothing to choose yet
    page.fill("#question", "hello?")
    expect(page.locator("#send")).to_be_disabled()
    expect(page.locator("#send")).to_have_attribute("title", "The API key is needed first.")
    page.press("#question", "Enter")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("密钥")
    page.keyboard.press("Enter")
    expect(page.locator("#key-why")).to_have_text(
        "This key is wrong: a key has only Latin letters, digits and signs."
    )
    expect(page.locator("#trouble")).to_be_hidden()
    page.fill("#key", "right")
    page.click("#key-form button")
    expect(page.locator(".chooser")).to_be_visible()
    page.click("#send")
    expect(finished(page.locator(".turn.last")).locator(".answer-text")).to_have_text("fine")
    expect(page.locator("#send")).to_have_attribute("title", "Send")


def test_a_busy_server_is_waited_for(page: Page, server: ScriptedServer) -> None:
    server.plan += [
        Refuse(429, "full", {"Retry-After": "1"}),
        simple("in at last"),
        Refuse(429, "full", {"Retry-After": "60"}),
    ]
    turn = ask(page, "patience")
    expect(turn.locator(".note")).to_contain_text("The next try is in 1 s.")
    expect(finished(turn).locator(".answer-text")).to_have_text("in at last")
    assert len(server.asked) == 2
    assert server.asked[0] == server.asked[1]
    expect(turn.locator(".note")).to_be_hidden()
    turn = ask(page, "no patience")
    expect(turn.locator(".note")).to_contain_text("in 60 s")
    server.plan.append(simple("at once"))
    turn.get_by_role("button", name="Try now").click()
    expect(finished(turn).locator(".answer-text")).to_have_text("at once")
    server.plan.append(Refuse(429, "full", {"Retry-After": "60"}))
    turn = ask(page, "given up")
    expect(turn.locator(".note")).to_contain_text("in 60 s")
    page.keyboard.press("Escape")
    expect(finished(turn).locator(".note")).to_have_text("Stopped before the first word.")
    assert len(server.asked) == 5
    assert sum("Many are asking" in line for line in heard(page)) == 3  # not once a second


def test_retry_after_is_read_as_seconds_or_a_date(page: Page) -> None:
    waits = page.evaluate(
        """async () => {
          const { wait } = await import('./wire.js');
          const date = new Date(Date.now() + 9500).toUTCString();
          return ['7', null, 'soon', '0', '99999', date].map(wait);
        }"""
    )
    assert waits[:5] == [7, 5, 5, 1, 600]
    assert 8 <= waits[5] <= 10


@pytest.mark.parametrize("how", ["cut", "no end", "garbled"])
def test_a_broken_stream_keeps_what_came(page: Page, server: ScriptedServer, how: str) -> None:
    ends: dict[str, list[Step]] = {"cut": [Break()], "no end": [], "garbled": [Raw("data: {oh no\n\n")]}
    server.plan += [
        [Delta(reasoning="because"), Delta(content="It is fo"), Gate(how), *ends[how]],
        simple("It is four."),
    ]
    turn = ask(page, "2 + 2")
    expect(turn.locator(".answer-text")).to_have_text("It is fo")
    server.open(how)
    finished(turn)
    expect(turn.locator(".answer-text")).to_have_text("It is fo")
    expect(turn.locator(".thought-text")).to_have_text("because")
    expect(turn.locator(".note")).to_contain_text("The stream broke off before the end.")
    turn.get_by_role("button", name="Try again").click()
    expect(finished(page.locator(".turn.last")).locator(".answer-text")).to_have_text("It is four.")


def test_errors_are_sentences(page: Page, server: ScriptedServer) -> None:
    failing: list[Step] = [Delta(content="a"), Raw('data: {"error": {"message": "the model ended"}}\n\n')]
    server.plan += [
        Refuse(400, "At most 2048 tokens fit."),
        Refuse(500, ""),
        failing,
        simple("x", finish="length"),
        [Delta(reasoning="hm"), Delta(finish="length"), DONE],
        [Delta(reasoning="hm"), Delta(content="\n"), Delta(finish="stop"), DONE],
        [DONE],
    ]
    said = []
    for i in range(7):
        turn = finished(ask(page, str(i)))
        said.append(turn.locator(".note").inner_text().replace("\n", " ").removesuffix("Try again").strip())
    assert said == [
        "The server did not take the question. At most 2048 tokens fit.",
        "The server failed at this question.",
        "The server failed at this question. the model ended",
        "Cut off: it had written as many tokens as it may.",
        "Cut off before the answer: it had written as many tokens as it may.",
        "The model thought, but gave no answer.",
        "The model said nothing.",
    ]


def test_what_was_refused_can_be_edited_and_not_tried_again(page: Page, server: ScriptedServer) -> None:
    server.plan += [Refuse(400, "At most 2048 tokens fit."), Refuse(500, "")]
    turn = finished(ask(page, "too long"))
    expect(turn.get_by_role("button")).to_have_text(["Edit"])
    turn.get_by_role("button").click()
    expect(page.locator("#question")).to_have_value("too long")
    turn = finished(ask(page, "bad luck"))
    expect(turn.get_by_role("button")).to_have_text(["Try again", "Edit"])


@pytest.mark.parametrize("kind", ["sample", "vote", "tree"])
def test_stopped_before_anything_came(page: Page, server: ScriptedServer, kind: str) -> None:
    server.plan += [[Gate("never")], [Extra({"liubai": {"path": 1, "reasoning": "half"}}), Gate("never")]]
    page.select_option("#kind", kind)
    page.click("#think")  # without the router the places of the paths are there at once
    turn = ask(page, "stop me")
    expect(turn.locator(".wait")).to_be_visible()
    page.click("#stop")
    expect(finished(turn).locator(".note")).to_have_text("Stopped before the first word.")
    expect(turn.locator(".path")).to_have_count(0)
    turn = ask(page, "and here")
    expect(turn.locator(".thought-text", has_text="half")).to_be_visible()
    page.click("#stop")
    expect(finished(turn).locator(".note")).to_have_text("Stopped. What had come is kept.")
    expect(turn.locator(".path header")).to_have_text(["Path 2cut off"])
    expect(turn.locator(".paths .title")).to_have_text("1 path")


def test_a_server_that_is_gone(page: Page, server: ScriptedServer) -> None:
    page.route("**/v1/**", lambda route: route.abort())
    turn = finished(ask(page, "anybody?"))
    expect(turn.locator(".note")).to_contain_text("The server cannot be reached.")
    page.reload()
    expect(page.locator("#trouble-what")).to_have_text("The server cannot be reached. Is it still running?")
    expect(page.locator("#send")).to_be_disabled()
    page.unroute("**/v1/**")
    page.click("#trouble-again")
    expect(page.locator("#trouble")).to_be_hidden()
    finished(ask(page, "anybody?"))


# ---- text is text

EVIL = (
    "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script> "
    "[a](javascript:document.title='owned') <a href=javascript:alert(1)>b</a> <svg onload=alert(1)>"
)
OVERRIDE = "\u202egnp.exe"  # an override that is never closed: it must not turn what stands around it


def test_nothing_from_a_model_becomes_html(page: Page, server: ScriptedServer) -> None:
    listed = [
        {
            "index": i,
            "reasoning": EVIL,
            "content": EVIL,
            "answer": EVIL[:70],
            "votes": 1,
            "tokens": 3,
            "finish_reason": "stop",
        }
        for i in range(2)
    ]
    extra = {
        "route": {"way": EVIL, "why": EVIL},
        "tools": [{"name": EVIL, "input": EVIL, "output": {"html": EVIL}}],
        "paths": {"kind": "vote", "chosen": 0, "tokens": 6, "list": listed},
    }
    server.offered = [{"id": EVIL}]
    visit(page, server)
    token = (EVIL, 0.5, [(EVIL, 0.4)])
    answer = f"{EVIL}\n\n- {EVIL}\n- **{EVIL}**\n\n```{EVIL}\n{EVIL}\n```\n> {EVIL}\n# {EVIL}"
    start: list[Step] = [Delta(reasoning=EVIL), Delta(content=answer), Extra({"liubai": extra}), DONE]
    server.plan += [
        start,
        [Delta(content=EVIL, tokens=(token,)), Raw(f"data: {json.dumps({'error': {'message': EVIL}})}\n\n")],
    ]
    page.select_option("#kind", "vote")
    finished(ask(page, EVIL))
    switch_colours(page)
    turn = finished(ask(page, EVIL))
    turn.locator(".answer-text span").click()
    expect(page.locator("#tip")).to_contain_text("<script>")
    assert (
        page.locator("main :is(img, script, a, iframe, object, svg[onload]), #tip :is(img, script)").count()
        == 0
    )
    assert page.title() == "Liubai 留白"
    expect(page.locator(".turn").first.locator(".answer-text > p")).to_have_text(EVIL)
    assert server.fetched.count("x") == 0  # no image was asked for


def test_overrides_of_direction_stay_inside(page: Page, server: ScriptedServer) -> None:
    listed = [
        {"index": i, "content": OVERRIDE, "answer": OVERRIDE, "votes": 2 - i, "tokens": 3} for i in range(2)
    ]
    extra = {
        "route": {"way": "fast", "why": OVERRIDE},
        "tools": [{"name": OVERRIDE, "input": OVERRIDE, "output": OVERRIDE}],
    }
    extra |= {"paths": {"kind": "vote", "chosen": 0, "tokens": 6, "list": listed}}
    server.plan.append([Delta(content=f"See `{OVERRIDE}` here"), Extra({"liubai": extra}), DONE])
    page.select_option("#kind", "vote")
    turn = finished(ask(page, OVERRIDE))
    assert page.evaluate(NOT_ISOLATED) == []
    # and as it is laid out: "here" is right of "See", the votes right of their answer
    spans = turn.locator(".answer-text p").evaluate(
        """(p) => [p.firstChild, p.lastChild].map((node) => {
          const range = document.createRange();
          range.selectNodeContents(node);
          return range.getBoundingClientRect().left;
        })"""
    )
    assert spans[0] < spans[1]


def test_markdown_is_built_alike_however_it_is_cut(page: Page) -> None:
    source = (
        "# Title\nA *word*, **two words**, `co*d*e` and 2 * 3 * 4.\nsecond line\n\n"
        "1. one\n2. two\n   more\n\n3. three\n\n- a\n- b\n\n> said\n\n```py\nx = '<b>'\n\ny = 1\n```\n---\n"
        "Math $a*b*c$ and \\(x**2 + y**2\\).\n\n~~~\nopen"
    )
    html = page.evaluate(
        """async (source) => { const { Markdown } = await import('./markdown.js');
        const all = [];
        for (const size of [source.length, 1, 7]) {
          const box = document.createElement('div'), pen = new Markdown(box);
          for (let i = 0; i < source.length; i += size) pen.push(source.slice(i, i + size));
          pen.end();
          all.push(box.innerHTML);
        }
        return all; }""",
        source,
    )
    assert html[0] == html[1] == html[2]
    plain = re.sub(r' (dir|tabindex|start)="[^"]*"', "", html[0]).replace("<bdi>", "").replace("</bdi>", "")
    assert plain == (
        "<h3>Title</h3>"
        "<p>A <em>word</em>, <strong>two words</strong>, <code>co*d*e</code> and 2 * 3 * 4.\nsecond line</p>"
        "<ol><li>one</li><li>two\nmore</li><li>three</li></ol><ul><li>a</li><li>b</li></ul>"
        "<blockquote>said</blockquote><pre><code>x = '&lt;b&gt;'\n\ny = 1</code></pre><hr>"
        "<p>Math $a*b*c$ and \\(x**2 + y**2\\).</p><pre><code>open</code></pre>"
    )


def test_ten_thousand_tokens_and_words_without_end(page: Page, server: ScriptedServer) -> None:
    words = "".join(f"word{i}" + ("\n" if i % 40 == 0 else " ") for i in range(10_000))
    pieces: list[Step] = [Delta(reasoning=words[i : i + 60]) for i in range(0, len(words), 60)]
    endless = "x" * 20_000
    hostile = "**" * 4000 + "`" * 3001 + "\\(" * 4000 + "$" * 3001  # openings that never close
    server.plan.append(
        [*pieces, Delta(content=endless), Delta(content=f"\n\n{hostile}"), Delta(finish="stop"), DONE]
    )
    page.evaluate(
        """() => {
          window.changes = window.painted = 0;
          const inThought = (one) => one.target.parentElement?.closest('.thought-text') ? 1 : 0;
          const count = (list) => list.forEach((one) => { window.changes += inThought(one); });
          const all = {subtree: true, childList: true, characterData: true};
          new MutationObserver(count).observe(document.getElementById('turns'), all);
          const tick = () => { window.painted += 1; requestAnimationFrame(tick); };
          tick();
        }"""
    )
    turn = finished(ask(page, "long"))
    assert turn.locator(".thought-text").evaluate("(el) => el.textContent.length") == len(words)
    changes, frames = page.evaluate("[window.changes, window.painted]")
    assert changes < 2 * frames + 100  # a frame's work, not a token's: there were 1,700 pieces
    assert (
        turn.locator(".thought-text > div").count() > 10
    )  # in blocks, so that the old ones are not laid out again
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#talk").evaluate("(el) => el.scrollWidth <= el.clientWidth")
