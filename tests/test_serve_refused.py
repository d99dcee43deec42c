"""What the server cannot honour is refused, and how; what changes nothing is let pass."""

from __future__ import annotations

from typing import Any

import pytest
from serving import THOUGHT, ask, call, chat, house_of, says

from liubai.serve.app import create_app
from liubai.serve.limits import Limits


@pytest.mark.parametrize(
    ("fields", "param", "says_"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias", "cannot bias"),
        ({"presence_penalty": 0.5}, "presence_penalty", "no penalties"),
        ({"frequency_penalty": -1}, "frequency_penalty", "no penalties"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "cannot promise"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, None, "cannot promise"),
        ({"audio": {"voice": "x"}}, "audio", "text only"),
        ({"modalities": ["audio"]}, None, "text only"),
        ({"functions": [{}]}, "functions", "'tools'"),
        ({"top_k": 5}, "top_k", "top_p"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"temperature": 2.5}, "temperature", "must be 2 or less"),
        ({"temperature": "1"}, "temperature", "must be a number"),
        ({"n": True}, "n", "must be a whole number"),
        ({"n": 0}, "n", "must be 1 or more"),
        ({"max_tokens": 0}, "max_tokens", "must be 1 or more"),
        ({"stop": [""]}, "stop[0]", "must not be empty"),
        ({"stop": list("abcde")}, "stop", "4 entries at most"),
        ({"top_logprobs": 3}, "top_logprobs", "needs 'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be 20 or less"),
        ({"paths": {"kind": "vote", "n": 2, "judge": "process"}}, "paths", "'judge' means nothing to vote"),
        ({"paths": {"kind": "vote", "width": 2}}, "paths", "'width' means nothing to vote"),
        ({"paths": {"kind": "greedy", "n": 2}}, "paths", "'n' means nothing to greedy"),
        ({"paths": {"kind": "vote", "n": True}}, "paths.n", "must be a whole number"),
        ({"paths": {"kind": "vote", "n": 65}}, "paths", "'n' is 64 at most"),
        ({"paths": "tree:65"}, "paths", "'simulations' is 64 at most"),
        ({"paths": {"kind": "vote", "many": 2}}, "paths.many", "unknown parameter"),
        ({"paths": {"kind": "vite"}}, "paths.kind", "'vote'"),
        ({"paths": "vite"}, "paths", "did you mean 'vote'?"),
        ({"paths": "vote:" + "9" * 100}, "paths", "write KIND, KIND:N"),
        ({"paths": 3}, "paths", "must be a text such as 'vote:8', or an object"),
        ({"paths": "best"}, "paths", "--reward-model DIR"),
        ({"paths": {"kind": "tree", "judge": "process"}}, "paths.judge", "has no process model; the server"),
        ({"paths": "beam", "thinking_budget": 3}, "paths", "beam search has no"),
        ({"paths": "vote", "temperature": 0}, "temperature", "one and the same"),
        ({"paths": "vote", "n": 2}, "n", "leave 'n' out"),
        ({"n": 16, "paths": "greedy"}, "n", "4 answers at once"),
        ({"paths": "best:4:process"}, "paths", "needs a process model (a stage of kind process); name one"),
        ({"paths": {"kind": "tree", "simulations": 2, "n": 3}}, "paths", "'n' means nothing to tree"),
        ({"tool_choice": "weather"}, "tool_choice", "'required' or {'type': 'function'"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "two numbers for one thing"),
        ({"think_at_least": 9, "thinking_budget": 8}, None, "'think_at_least' 9 is more than"),
        ({"think_at_least": 9, "thinking": {"type": "enabled", "budget_tokens": 8}}, None, "of a thought, 8"),
        ({"foo": 1}, "foo", "unknown parameter 'foo'"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"thinking": {"type": "maybe"}}, "thinking.type", "'enabled' or 'disabled'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], param: str | None, says_: str) -> None:
    writer = says(THOUGHT)
    answer = chat(
        create_app(house_of(writer, limits=Limits(answers=4 if "paths" in fields else 16))), **fields
    )
    assert answer.status == 400
    assert says_ in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"
    if param is not None:
        assert answer.error["param"] == param
    assert writer.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "top_k": -1, "min_p": 0},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "functions": []},
        {"seed": None, "stop": None, "n": None, "tools": None, "stream": None, "max_tokens": None},
        {
            "prediction": {"type": "content", "content": "x"},
            "safety_identifier": "x",
            "prompt_cache_key": "y",
        },
    ],
)
def test_what_changes_nothing_is_let_pass(fields: dict[str, Any]) -> None:
    assert ask(says(THOUGHT), **fields)["choices"][0]["message"]["content"] == "It is 42."


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ("hello", "messages"),
    ],
)
def test_messages_that_are_none(messages: Any, param: str) -> None:
    answer = call(create_app(house_of(says("x"))), "POST", "/v1/chat/completions", {"messages": messages})
    assert (answer.status, answer.error["param"]) == (400, param)


def test_a_question_too_long_is_refused_before_it_is_asked() -> None:
    answer = chat(create_app(house_of(says("x"), max_length=40)), "留白" * 40)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    long = chat(create_app(house_of(says("</think>x"), max_length=1 << 20)), "wait and think " * 4000)
    assert long.status == 200  # encoded beside the loop


def test_an_objection_of_the_template_is_the_clients_to_mend() -> None:
    template = (
        "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    app = create_app(house_of(says("x"), template=template))
    two = [{"role": "user", "content": "secret"}] * 2
    answer = call(app, "POST", "/v1/chat/completions", {"messages": two})
    assert answer.status == 400
    assert answer.error["message"].endswith("does not take these messages: one at a time")
    broken = create_app(
        house_of(says("x"), template="{{ messages[0].content }}{{ 1 // (messages | length - 2) }}")
    )
    answer = call(broken, "POST", "/v1/chat/completions", {"messages": two})
    assert answer.error["message"].endswith("does not take these messages")


def test_errors_have_openais_statuses() -> None:
    app = create_app(house_of(says("x")))
    assert chat(app, model="gpt-5").error["code"] == "model_not_found"
    assert chat(app, model="gpt-5").status == 404
    assert call(app, "GET", "/v1/models/gpt-5").status == 404
    assert call(app, "GET", "/v1/nothing").error["code"] == "not_found"
    wrong = call(app, "GET", "/v1/chat/completions")
    assert (wrong.status, wrong.error["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert "for POST only" in wrong.error["message"]
    for path in ("/", "/health", "/v1/models"):  # who watches a server asks for heads alone
        assert call(app, "HEAD", path).status == 200
    assert call(app, "HEAD", "/v1/chat/completions").status == 405
    form = call(app, "POST", "/v1/chat/completions", b"a=b", content_type="application/x-www-form-urlencoded")
    assert form.status == 415
    assert call(app, "POST", "/v1/chat/completions", b"{}", content_encoding="gzip").status == 415
