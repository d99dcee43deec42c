"""The page in a real browser: a reader asks, watches, stops, retries, copies, and looks at tokens."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: install liubai[dev]")
pytest.register_assert_rewrite("reader")
pytest.importorskip("uvicorn", reason="the page is tested against a server: install liubai[serve]")

from playwright.sync_api import Page, expect  # noqa: E402
from reader import ask, finished, heard, visit, wait_until  # noqa: E402
from scripted_server import DONE, MODEL, Delta, Extra, Gate, Refuse, ScriptedServer, Step, simple, usage, vote  # noqa: E402

pytest_plugins = ["reader"]


def test_ask_and_watch_the_thought_open_stream_and_fold(page: Page, server: ScriptedServer) -> None:
    lines = "".join(f"line {i}\n" for i in range(80))
    figures = Extra({"liubai": {"thinking": {"tokens": 321, "seconds": 4.5, "forced": True}}})
    server.plan.append(
        [
            Gate("first"),
            Delta(reasoning="Let me see. "),
            Gate("long"),
            Delta(reasoning=lines),
            Gate("more"),
            Delta(reasoning=lines),
            Gate("answer"),
            Delta(content="It is "),
            Delta(content="42."),
            Gate("end"),
            *(Delta(finish="stop"), figures, usage(330), DONE),
        ]
    )
    turn = ask(page, "how many?")
    thought, body = turn.locator("details"), turn.locator("details .body")
    expect(turn.get_by_text("Waiting for the first word")).to_be_visible()
    expect(thought).to_be_hidden()
    expect(page.locator("#stop")).to_be_visible()
    server.open("first")
    expect(thought).to_have_attribute("open", "")
    expect(body).to_have_text("Let me see.")
    expect(turn.locator("summary")).to_contain_text(re.compile(r"Thinking.*\d\.\d s.*about \d+ tokens"))

    server.open("long")
    expect(body).to_contain_text("line 79")
    at_end = "(el) => el.scrollHeight - el.clientHeight - el.scrollTop < 8"
    assert body.evaluate(at_end)  # followed by itself
    body.evaluate("(el) => { el.scrollTop = 40; }")
    page.wait_for_timeout(50)  # the scroll event comes with the next frame
    server.open("more")
    wait_until(
        page, "() => document.querySelector('.thought-text').textContent.match(/line 79/g)?.length === 2"
    )
    assert body.evaluate("(el) => el.scrollTop") == 40  # the reader scrolled away, and stays there

    turn.locator("summary").click()
    expect(thought).not_to_have_attribute("open", "")
    server.open("answer")
    expect(turn.locator(".answer-text")).to_have_text("It is 42.")
    expect(thought).not_to_have_attribute("open", "")
    server.open("end")
    finished(turn)
    expect(turn.locator("summary")).to_contain_text(
        re.compile(r"Thought.*4\.5 s.*321 tokens.*ended by the budget")
    )
    expect(turn.locator(".stats")).to_contain_text("330 tokens")
    assert server.asked[0]["messages"] == [{"role": "user", "content": "how many?"}]
    assert page.evaluate("JSON.parse(localStorage.liubai).folded")  # the next thought begins folded, too


def test_history_goes_back_without_the_thoughts(page: Page, server: ScriptedServer) -> None:
    server.plan += [simple("first", thought="secret"), Refuse(400, "bad luck"), simple("third")]
    for question in ("one", "two", "three"):
        finished(ask(page, question))
    assert server.asked[2]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "three"},  # the second got no answer
    ]
    assert "secret" not in json.dumps(server.asked)
    page.click("#new")
    expect(page.locator("#hero")).to_be_visible()
    finished(ask(page, "four"))
    assert len(server.asked[3]["messages"]) == 1


def test_the_settings_are_sent_and_kept(page: Page, server: ScriptedServer) -> None:
    page.click("#options-button")
    page.click("#longer")
    for name, value in (("budget", "300"), ("atLeast", "120"), ("maxTokens", "900"), ("temperature", "0.7")):
        page.fill(f"[data-number={name}]", value)
    page.select_option("#route", "think")
    page.check("[data-tool][value=calculator]")
    page.check("#ink")
    finished(ask(page, "with all"))
    sent = server.asked[0]
    assert {k: v for k, v in sent.items() if k not in ("messages", "seed")} == {
        "model": "liubai-small",
        "stream": True,
        "stream_options": {"include_usage": True},
        "thinking_budget": 300,
        "think_at_least": 120,
        "max_tokens": 900,
        "temperature": 0.7,
        "route": "think",
        "use_tools": ["calculator"],
        "logprobs": True,
        "top_logprobs": 5,
    }
    visit(page, server)  # a later visit
    expect(page.locator("[data-number=budget]")).to_have_value("300")
    expect(page.locator("#route")).to_have_value("think")
    page.click("#think")
    expect(page.locator("#longer")).to_be_hidden()
    finished(ask(page, "without thought"))
    assert server.asked[1]["thinking"] is False
    assert {"thinking_budget", "think_at_least", "route"}.isdisjoint(server.asked[1])


def test_only_what_the_model_can_do_is_offered(page: Page, server: ScriptedServer) -> None:
    plain = MODEL | {"thinking": False, "paths": ["sample", "vote"], "tools": [], "routes": ["fast"]}
    server.offered = [{"id": "plain", "liubai": plain}, {"id": "other"}]
    page.evaluate(
        "localStorage.liubai = JSON.stringify("
        "{kind: 'tree', n: 1e9, theme: 7, route: 'tool', tools: ['python'], model: 'plain'})"
    )
    visit(page, server)
    expect(page.locator("#think")).to_be_disabled()
    expect(page.locator("#kind")).to_have_value("sample")
    assert page.locator("#kind option:not([disabled])").evaluate_all("(all) => all.map((o) => o.value)") == [
        "sample",
        "vote",
    ]
    finished(ask(page, "hello"))
    assert {"thinking", "paths", "route", "use_tools"}.isdisjoint(server.asked[0])
    page.select_option("#model", "other")  # a server that says nothing of itself: everything is offered
    expect(page.locator("#think")).to_be_enabled()
    expect(page.locator("#kind option:not([disabled])")).to_have_count(6)


def test_a_vote_of_five_grows_side_by_side(page: Page, server: ScriptedServer) -> None:
    steps = vote(5)
    server.plan.append([*steps[:12], Gate("half"), *steps[12:]])
    page.select_option("#kind", "vote")
    turn = ask(page, "make 9 6 4 ->33")
    lanes = turn.locator(".path")
    expect(lanes).to_have_count(5)
    expect(turn.locator(".path .thought-text")).to_have_text(
        ["We need 9, 6 and 4"] * 2 + ["We need 9, 6 and 4"] * 3
    )
    tops = lanes.evaluate_all("(all) => all.map((el) => el.getBoundingClientRect().top)")
    assert len(set(tops)) == 1  # one row on a wide screen
    expect(lanes.first.locator(".state")).to_have_text("thinking")
    server.open("half")
    finished(turn)
    assert server.asked[0]["paths"] == {"kind": "vote", "n": 5}
    expect(turn.locator(".path.chosen h3")).to_have_text(["Path 1"])
    expect(lanes.nth(1).locator(".figures")).to_have_text("( 9 - 6 ) * 4agrees with 1 other103 tokens")
    expect(turn.locator(".tally li")).to_have_text(["6 * 4 + 93 of 5", "( 9 - 6 ) * 42 of 5"])
    assert turn.locator(".tally li.won .on").count() == 3
    expect(turn.locator("details")).not_to_have_attribute("open", "")  # its thought was already seen above
    expect(turn.locator("strong")).to_have_text("6 * 4 + 9")


def test_scores_beams_and_paths_that_were_never_streamed(page: Page, server: ScriptedServer) -> None:
    def path(i: int, **more: Any) -> dict[str, Any]:
        return {
            "index": i,
            "reasoning": f"r{i}",
            "content": f"c{i}",
            "answer": None,
            "votes": None,
            "score": None,
        } | more

    listed = [
        path(0, score=-0.25),
        path(1, score=1.5, answer="7"),
        path(2, score=0.5, finish_reason="length"),
    ]
    summary = Extra({"liubai": {"paths": {"kind": "beam", "chosen": 1, "tokens": 9, "list": listed}}})
    server.plan.append([Delta(content="7"), Delta(finish="stop"), summary, DONE])
    page.select_option("#kind", "beam")
    page.click("#more")
    page.click("#fewer")
    page.click("#fewer")
    turn = finished(ask(page, "beams"))
    assert server.asked[0]["paths"] == {"kind": "beam", "width": 4}
    expect(turn.locator(".path")).to_have_count(3)  # four were expected, three there are
    expect(turn.locator(".path .body")).to_have_text(["r0c0", "r1c1", "r2c2"])
    expect(turn.locator(".path .figures")).to_have_text(
        ["no answerscore −0.25", "7score 1.50", "no answerscore 0.50"]
    )
    expect(turn.locator(".path .state")).to_have_text(["", "chosen", "cut off"])
    expect(turn.locator(".tally li")).to_have_count(0)


@pytest.mark.parametrize("kind", ["vote", "best", "beam", "tree"])
def test_one_answer_has_no_paths_beside_it(page: Page, server: ScriptedServer, kind: str) -> None:
    def summary(kind: str) -> Extra:
        only = {"index": 0, "reasoning": "hm", "content": "12", "answer": "12", "votes": None, "tokens": 0}
        return Extra({"liubai": {"paths": {"kind": kind, "chosen": 0, "tokens": 0, "list": [only]}}})

    route = Extra({"liubai": {"route": {"way": "tool", "why": "a calculation"}}})
    server.plan += [
        [route, Gate("calculated"), Delta(content="12"), summary("greedy"), DONE],
        [
            Extra({"liubai": {"path": 0, "reasoning": "hm"}}),
            Delta(reasoning="hm"),
            Delta("12"),
            summary(kind),
            DONE,
        ],
    ]
    page.select_option("#kind", kind)
    turn = ask(page, "3 * 4")
    expect(turn.locator(".route b")).to_have_text("Calculator")
    expect(turn.locator(".paths")).to_be_hidden()
    server.open("calculated")
    expect(finished(turn).locator(".paths")).to_be_hidden()
    turn = finished(ask(page, "a search that found one path"))
    expect(turn.locator(".paths")).to_be_hidden()
    expect(turn.locator(".thought-text")).to_be_visible()  # which stands nowhere else


def test_a_search_shows_that_it_lives_and_what_it_visited(page: Page, server: ScriptedServer) -> None:
    listed = [
        {"index": i, "reasoning": "r", "content": "c", "answer": str(i), "votes": 5 - i, "score": 0.5}
        for i in range(2)
    ]
    summary = Extra({"liubai": {"paths": {"kind": "tree", "chosen": 0, "tokens": 9, "list": listed}}})
    server.plan.append([Gate("found"), Delta(content="0"), summary, DONE])
    page.select_option("#kind", "tree")
    turn = ask(page, "search")
    expect(turn.locator(".wait")).to_have_text(
        re.compile(r"^Searching: the paths are shown at the end[1-9] s$")
    )
    assert heard(page)[-1] == "Searching: the paths are shown at the end"  # and no second is read aloud
    server.open("found")
    finished(turn)
    expect(turn.locator(".figures")).to_have_text(["05 visitsscore 0.50", "14 visitsscore 0.50"])


def test_route_and_tools_are_shown(page: Page, server: ScriptedServer) -> None:
    route = {"way": "tool", "why": "a product of large numbers"}
    used = [
        {"name": "calculator", "input": "3 * 4", "output": "12"},
        {"name": "python", "input": "print(1)\nprint(2)", "output": "1\n2"},
    ]
    gated: list[Step] = [
        Extra({"liubai": {"route": route}}),
        Gate("route"),
        Delta(content="12"),
        Delta(finish="stop"),
    ]
    server.plan.append([*gated, Extra({"liubai": {"tools": used}}), DONE])
    turn = ask(page, "3 * 4")
    expect(turn.locator(".route")).to_have_text("Calculatora product of large numbers")
    server.open("route")
    finished(turn)
    expect(turn.locator(".tools li")).to_have_text(
        ["calculator3 * 4→12", "Python, in a sandboxprint(1) print(2)→1 2"]
    )


def test_stop_frees_the_server_and_retry_takes_a_new_seed(page: Page, server: ScriptedServer) -> None:
    server.plan.append([Delta(reasoning="So far "), Delta(content="half an"), Gate("never"), DONE])
    turn = ask(page, "stop me")
    expect(turn.locator(".answer-text")).to_have_text("half an")
    page.keyboard.press("Escape")
    finished(turn)
    expect(turn.locator(".note")).to_have_text("Stopped. What had come is kept.")
    expect(turn.locator(".answer-text")).to_have_text("half an")
    for _ in range(200):
        if server.left:
            break
        page.wait_for_timeout(10)
    assert server.left == 1  # the server saw the client go
    server.plan.append(simple("whole"))
    turn.get_by_role("button", name="Retry").click()
    finished(page.locator(".turn.last"))
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator(".answer-text")).to_have_text("whole")
    first, second = server.asked
    assert first["messages"] == second["messages"]
    assert first["seed"] != second["seed"]
    expect(page.locator(".stats")).to_contain_text(f"seed {second['seed']}")


def test_the_stop_button_and_a_new_chat_while_it_writes(page: Page, server: ScriptedServer) -> None:
    server.plan += [
        [Delta(content="x"), Gate("a"), DONE],
        [Delta(content="y"), Gate("b"), DONE],
        simple("fresh"),
    ]
    ask(page, "one")
    page.click("#stop")
    finished(page.locator(".turn.last"))
    expect(page.locator("#question")).to_be_focused()
    ask(page, "two")
    expect(page.locator(".turn.last .answer-text")).to_have_text("y")
    page.click("#new")
    finished(ask(page, "three"))
    expect(page.locator(".turn")).to_have_count(1)
    assert server.asked[2]["messages"] == [{"role": "user", "content": "three"}]


def test_copy_and_edit(page: Page, server: ScriptedServer) -> None:
    server.plan.append(simple("**Bold** answer", thought="a thought"))
    turn = finished(ask(page, "copy me"))
    turn.get_by_role("button", name="Copy", exact=True).click()
    expect(turn.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "**Bold** answer"
    turn.get_by_role("button", name="Copy with thought").click()
    wait_until(page, "async () => (await navigator.clipboard.readText()).includes('thought')")
    assert (
        page.evaluate("navigator.clipboard.readText()") == "<think>\na thought\n</think>\n\n**Bold** answer"
    )
    turn.get_by_role("button", name="Edit").click()
    expect(page.locator("#question")).to_have_value("copy me")
    expect(page.locator(".turn")).to_have_count(0)
