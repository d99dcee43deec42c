"""The router in the server: what the calculator answers, and which model answers on which way."""

from __future__ import annotations

from typing import Any

import pytest
from serving import QWEN3, THOUGHT, ask, chat, house_of, says

from liubai.errors import UserError
from liubai.serve.app import create_app
from liubai.serve.house import House, Served
from liubai.serve.limits import Limits
from liubai.serve.router import Router
from liubai.text.template import Template


def test_the_calculator_answers_without_a_model() -> None:
    writer = says(THOUGHT)
    found = ask(writer, content="What is 123456789 * 987654321?", route="auto", n=2)
    assert writer.requests == []
    assert "121932631112635269" in found["choices"][1]["message"]["content"]
    assert found["liubai"]["route"]["way"] == "tool"
    assert found["liubai"]["tools"][0]["name"] == "calculator"
    assert found["usage"]["completion_tokens"] == 0


def test_the_calculators_answer_obeys_the_request() -> None:
    app = create_app(house_of(says("</think>x"), limits=Limits(answers=2)))
    sum_of: dict[str, Any] = {"content": "What is 12 + 30?", "route": "auto"}
    whole = chat(app, **sum_of).json()
    assert whole["choices"][0]["message"]["content"] == "12 + 30 = 42"
    listed = whole["liubai"]["paths"]["list"]
    assert [(one["answer"], one["tokens"], one["finish_reason"]) for one in listed] == [("42", 0, "stop")]
    assert whole["liubai"]["tools"] == [{"name": "calculator", "input": "12 + 30", "output": "42"}]
    stopped = chat(app, **sum_of, stop=[" ="]).json()
    assert stopped["choices"][0]["message"]["content"] == "12 + 30"
    refused = chat(app, **sum_of, n=3)
    assert (refused.status, refused.error["param"]) == (400, "n")
    assert chat(app, **sum_of, top_logprobs=2).error["param"] == "top_logprobs"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("route", ["auto", "tool"])
def test_a_call_that_is_demanded_comes_before_the_calculator(choice: Any, route: str) -> None:
    writer = says('weather", "arguments": {"city": "Paris"}}\n</tool_call>')
    if choice != "required":
        writer = says('{"city": "Paris"}}\n</tool_call>')
    tools = [{"type": "function", "function": {"name": "weather"}}]
    app = create_app(house_of(writer))
    found = chat(app, "What is 12 + 30?", route=route, tools=tools, tool_choice=choice).json()
    assert found["choices"][0]["finish_reason"] == "tool_calls"
    assert found["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert found["liubai"]["route"]["way"] != "tool"
    # a function that may be called, or not, is not in its way
    assert chat(app, "What is 12 + 30?", route=route, tools=tools).json()["liubai"]["route"]["way"] == "tool"


def test_the_first_chunk_says_the_way() -> None:
    app = create_app(house_of(says(THOUGHT)))
    chunks = chat(app, "Prove that there are infinitely many primes.", route="auto", stream=True).chunks()
    assert chunks[0]["liubai"]["route"]["way"] == "think"
    assert chunks[0]["liubai"]["route"]["why"]
    assert chunks[-1]["liubai"]["route"] == chunks[0]["liubai"]["route"]


def test_the_fast_way_may_lead_to_another_model() -> None:
    slow, quick = says(THOUGHT), says("Paris")
    models = [
        Served(name, writer, writer.tokenizer, Template(writer.tokenizer, QWEN3), 4096)
        for name, writer in (("slow", slow), ("quick", quick))
    ]
    app = create_app(House(models, router=Router.load(), fast="quick"))
    found = chat(app, "x", route="fast").json()
    assert (found["model"], found["choices"][0]["message"]["content"]) == ("quick", "Paris")
    assert chat(app, "x", route="think").json()["model"] == "slow"
    both = create_app(House(models, router=Router.load(), fast="quick", think="slow"))
    for route, name in (("fast", "quick"), ("think", "slow")):
        assert {chat(both, "x", route=route, model=asked).json()["model"] for asked in ("slow", "quick")} == {
            name
        }
    assert chat(both, "x", model="quick").json()["model"] == "quick"  # nobody asked for a way
    for way in ("fast", "think"):
        with pytest.raises(UserError, match=f"no model 'nope' here for --{way}"):
            House(models, **{way: "nope"})
