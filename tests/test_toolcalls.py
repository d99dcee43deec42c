"""Functions that a client brings: shown to the model by its template, read from what it writes, and back."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from serving import QWEN3, call, chat, continues, house_of, running, says, tokenizer

from liubai.errors import UserError
from liubai.serve.app import create_app
from liubai.serve.errors import Refused
from liubai.serve.schema import ChatRequest, read
from liubai.serve.toolcalls import Call, begun, for_template, offered, parse_call
from liubai.text.template import Objection, Template

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "<now>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa\\u0072is, 巴黎"}}\n</tool_call>'


def request(**fields: Any) -> ChatRequest:
    return read(ChatRequest, {"messages": [{"role": "user", "content": "x"}], **fields})


# ---- reading a call ----


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        ('\n {"arguments": {"a": "留"}, "name": "f"} \n', '{"a": "留"}'),
        ('{"name": "f", "parameters": {"a": [1, {"b": null}]}}', '{"a": [1, {"b": null}]}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f"}', "{}"),
    ],
)
def test_a_call_is_read(text: str, arguments: str) -> None:
    assert parse_call(text, ["f", "g"]) == Call("f", arguments)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f(1)",
        '{"name": "h", "arguments": {}}',
        '{"name": ["f"], "arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "nothing"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {}} and more',
        "[" * 100_000,
        '["f"]',
    ],
)
def test_what_is_no_call_of_an_offered_function_is_text(text: str) -> None:
    assert parse_call(text, ["f", "g"]) is None


@given(st.text(max_size=40))
def test_no_text_can_break_the_reader(text: str) -> None:
    found = parse_call(text, ["f"])
    assert found is None or isinstance(json.loads(found.arguments), dict)


# ---- what is offered and demanded ----


@given(
    st.recursive(
        st.from_regex(r"-?[1-9][0-9]{0,3}(\.[0-9]{1,3})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
        | st.sampled_from(["1e999", "-1e999", "NaN", "Infinity", "null", '"a"']),
        lambda inner: st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
        max_leaves=6,
    )
)
@example("1e999")
def test_arguments_are_json_for_everybody(value: str) -> None:
    for arguments in (f'{{"a": {value}}}', json.dumps(f'{{"a": {value}}}')):
        found = parse_call(f'{{"name": "f", "arguments": {arguments}}}', ["f"])
        finite = not re.search("NaN|Infinity", value) and all(
            math.isfinite(float(number)) for number in re.findall(r"-?\d[\d.eE+-]*", value)
        )
        assert (found is not None) == finite
        if found is not None:
            json.loads(found.arguments, parse_constant=pytest.fail)


def test_what_the_template_is_shown() -> None:
    shown = offered(request(tools=[WEATHER, TIME]))
    assert [tool["function"]["name"] for tool in shown] == ["weather", "time"]
    assert shown[1]["function"]["parameters"] == {"type": "object", "properties": {}}
    named = {"type": "function", "function": {"name": "time"}}
    assert [t["function"]["name"] for t in offered(request(tools=[WEATHER, TIME], tool_choice=named))] == [
        "time"
    ]
    assert offered(request(tools=[WEATHER], tool_choice="none")) == []
    prompt = Template(tokenizer(), QWEN3).render_chat([{"role": "user", "content": "x"}], shown)
    assert json.dumps(WEATHER, ensure_ascii=False) in prompt  # as written: "<now>" not as \u003cnow\u003e


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [TIME, TIME]}, "tools"),
    ],
)
def test_a_demand_that_cannot_be_met_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        offered(request(**fields))
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_demanded_call_is_begun() -> None:
    named = {"type": "function", "function": {"name": "time"}}
    assert begun(request(tools=[TIME])) == ""
    assert begun(request(tools=[TIME], tool_choice="required")) == '<tool_call>\n{"name": "'
    assert begun(request(tools=[TIME], tool_choice=named)) == '<tool_call>\n{"name": "time", "arguments": '


# ---- a conversation with calls ----

CALLED: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}]},
    {"role": "user", "content": "rain?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "ask",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "wet"},
]


def test_calls_and_results_go_back_to_the_template() -> None:
    shown = for_template(request(messages=CALLED).messages)
    assert [m["role"] for m in shown] == ["system", "user", "assistant", "tool"]
    assert shown[0]["content"] == "be short"
    assert shown[2]["reasoning_content"] == "ask"
    assert shown[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    prompt = Template(tokenizer(), QWEN3).render_chat(shown)
    assert (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>' in prompt
    )
    assert "<tool_response>\nwet\n</tool_response>" in prompt


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (lambda m: m[3].update(tool_call_id="c2"), "messages[3].tool_call_id"),
        (
            lambda m: m[2]["tool_calls"][0]["function"].update(arguments="["),
            "messages[2].tool_calls[0].function.arguments",
        ),
        (
            lambda m: m[2]["tool_calls"][0]["function"].update(arguments="1"),
            "messages[2].tool_calls[0].function.arguments",
        ),
        *(
            (
                lambda m, arguments=arguments: m[2]["tool_calls"][0]["function"].update(arguments=arguments),
                "messages[2].tool_calls[0].function.arguments",
            )
            for arguments in (
                '{"a": "\\ud800"}',  # which JSON can write, and UTF-8 cannot
                '{"a": [{"\\udfff": 1}]}',
                '{"a": ' * 65 + "1" + "}" * 65,
                '{"a": 1e999}',
                '{"a": NaN}',
            )
        ),
    ],
)
def test_a_broken_conversation_is_refused_by_its_place(change: Any, param: str) -> None:
    messages = json.loads(json.dumps(CALLED))
    change(messages)
    with pytest.raises(Refused) as refused:
        for_template(request(messages=messages).messages)
    assert refused.value.param == param


def test_a_template_says_whether_it_takes_tools_and_what_it_objects_to() -> None:
    assert Template(tokenizer(), QWEN3).takes_tools
    plain = Template(tokenizer(), "{{ messages[-1].content }}<think>")
    assert not plain.takes_tools
    picky = Template(
        tokenizer(),
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ messages[-1].content }}",
    )
    with pytest.raises(UserError) as error:
        picky.render_chat([{"role": "system", "content": "s"}])
    assert isinstance(error.value.__cause__, Objection)


# ---- over the API ----


def test_half_a_surrogate_pair_in_arguments_is_the_clients_mistake() -> None:
    messages = json.loads(json.dumps(CALLED))
    messages[2]["tool_calls"][0]["function"]["arguments"] = '{"city": "x\\ud83d"}'
    answer = call(
        create_app(house_of(says("</think>hello"))), "POST", "/v1/chat/completions", {"messages": messages}
    )
    assert (answer.status, answer.error["param"]) == (400, "messages[2].tool_calls[0].function.arguments")
    assert "surrogate" in answer.error["message"]
    messages[2]["tool_calls"][0]["function"]["arguments"] = '{"city": "x\\ud83d\\ude42"}'
    answer = call(
        create_app(house_of(says("</think>hello"))), "POST", "/v1/chat/completions", {"messages": messages}
    )
    assert answer.status == 200


def test_a_call_is_apart_from_the_content() -> None:
    app = create_app(house_of(says(f"hm</think>\n\nLook: {CALL}\n")))
    found = chat(app, tools=[WEATHER]).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    message = found["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Look:")
    (called,) = message["tool_calls"]
    assert called["function"]["name"] == "weather"
    assert json.loads(called["function"]["arguments"]) == {"city": "Paris, 巴黎"}


def test_without_tools_or_with_another_name_a_call_is_text() -> None:
    app = create_app(house_of(says(f"</think>{CALL}")))
    for fields in ({}, {"tools": [TIME]}, {"tools": [WEATHER], "tool_choice": "none"}):
        found = chat(app, **fields).json()["choices"][0]
        assert found["message"]["content"] == CALL
        assert "tool_calls" not in found["message"]
        assert found["finish_reason"] == "stop"


def test_a_call_that_never_ends_is_text() -> None:
    app = create_app(house_of(says('</think>so <tool_call>\n{"name": "weather"')))
    message = chat(app, tools=[WEATHER]).json()["choices"][0]["message"]
    assert message["content"] == 'so <tool_call>\n{"name": "weather"'


def test_calls_stream_as_deltas() -> None:
    second = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    app = create_app(house_of(says(f"</think>{CALL}\n{second}", size=1)))
    chunks = chat(app, tools=[WEATHER, TIME], stream=True).chunks()
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for delta in (choice["delta"] for choice in chunk["choices"]):
            assert not delta.get("content")
            for part in delta.get("tool_calls", ()):
                entry = calls.setdefault(part["index"], {"arguments": "", "id": part.get("id", "")})
                entry["name"] = part["function"].get("name") or entry["name"]
                entry["arguments"] += part["function"].get("arguments") or ""
    assert {i: (c["name"], json.loads(c["arguments"])) for i, c in calls.items()} == {
        0: ("weather", {"city": "Paris, 巴黎"}),
        1: ("time", {}),
    }
    assert len({c["id"] for c in calls.values()}) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_most_where_parallel_calls_are_not_wanted(stream: bool) -> None:
    second = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    writer = says(f"</think>{CALL}{second} and on and on", size=2)
    app = create_app(house_of(writer))
    answer = chat(app, tools=[WEATHER, TIME], parallel_tool_calls=False, stream=stream)
    assert answer.body.decode().count('"name":"') == 1
    assert writer.cancelled == 1  # the rest is not written


@pytest.mark.parametrize("stream", [False, True])
def test_the_one_call_is_the_end_however_the_tokens_come(stream: bool) -> None:
    """Under load a piece may hold the call's end and the beginning of the next."""
    found = set()
    for size in (1, 2, 7, 1000):
        writer = says(f'</think>\n{CALL}\n<tool_call>\n{{"name": "time", "argum', size=size)
        options = {"stream_options": {"include_usage": True}} if stream else {}
        answer = chat(
            create_app(house_of(writer)),
            tools=[WEATHER, TIME],
            parallel_tool_calls=False,
            stream=stream,
            **options,
        )
        if stream:
            chunks = answer.chunks()
            deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
            content = "".join(delta.get("content") or "" for delta in deltas)
            calls = sum("id" in call for delta in deltas for call in delta.get("tool_calls", ()))
            finish, usage = chunks[-2]["choices"][0]["finish_reason"], chunks[-1]["usage"]
        else:
            (choice,) = answer.json()["choices"]
            content, calls = choice["message"]["content"], len(choice["message"]["tool_calls"])
            finish, usage = choice["finish_reason"], answer.json()["usage"]
        assert (content, calls, finish) == ("" if stream else None, 1, "tool_calls")
        found.add(json.dumps(usage))
    assert len(found) == 1


def test_a_named_function_is_called() -> None:
    writer = says('{"city": "Rome"}}\n</tool_call>')
    app = create_app(house_of(writer))
    named = {"type": "function", "function": {"name": "weather"}}
    found = chat(app, tools=[WEATHER, TIME], tool_choice=named).json()["choices"][0]
    (called,) = found["message"]["tool_calls"]
    assert (called["function"]["name"], json.loads(called["function"]["arguments"])) == (
        "weather",
        {"city": "Rome"},
    )
    assert found["message"]["content"] is None
    prompt = writer.tokenizer.decode(writer.requests[0].prompt_ids)
    assert prompt.endswith('<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": ')
    assert "time" not in prompt


def test_a_required_call_is_begun_and_chosen_by_the_model() -> None:
    app = create_app(house_of(says('time", "arguments": {}}\n</tool_call>')))
    found = chat(app, tools=[WEATHER, TIME], tool_choice="required").json()["choices"][0]
    assert [c["function"]["name"] for c in found["message"]["tool_calls"]] == ["time"]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_are_refused_where_the_template_hides_them(choice: str) -> None:
    app = create_app(house_of(says("x"), template="{{ messages[-1].content }}<think>"))
    answer = chat(app, tools=[TIME], tool_choice=choice)
    assert (answer.status, answer.error["code"]) == (400, "tools_unsupported")
    assert chat(app, tools=[TIME], tool_choice="none").status == 200


def test_the_models_own_tools_are_used_in_its_thought() -> None:
    writer = continues(
        'I compute <tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>',
        " so it is 42</think>42",
    )
    app = create_app(house_of(writer))
    answer = chat(app, use_tools=["calculator"]).json()
    assert answer["choices"][0]["message"]["content"] == "42"
    assert answer["liubai"]["tools"] == [{"name": "calculator", "input": "6*7", "output": "42"}]
    prompts = [writer.tokenizer.decode(request.prompt_ids) for request in writer.requests]
    assert '"calculator"' in prompts[0]  # it was told that there is one
    assert prompts[-1].endswith("<tool_response>\n42\n</tool_response>\n")


def test_own_calls_in_an_answer_do_not_leak_and_the_clients_go_to_the_client() -> None:
    own = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
    app = create_app(house_of(continues(f"</think>Well {own}", f" it is {CALL}")))
    found = chat(app, tools=[WEATHER], use_tools=["calculator"]).json()["choices"][0]
    assert found["message"]["content"] == "Well it is"
    assert [c["function"]["name"] for c in found["message"]["tool_calls"]] == ["weather"]


# ---- real clients ----


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_calls_a_function_and_comes_back(stream: bool) -> None:
    openai = pytest.importorskip("openai", reason="needs the OpenAI client: install liubai[dev]")
    writer = says(f"I need the weather.</think>{CALL}", "wet, it says</think>Take an umbrella.")
    with running(house_of(writer)) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
        messages: list[Any] = [{"role": "user", "content": "rain?"}]
        if stream:
            with client.chat.completions.stream(model="qwen", messages=messages, tools=[WEATHER]) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = (
                client.chat.completions.create(model="qwen", messages=messages, tools=[WEATHER])
                .choices[0]
                .message
            )
        (called,) = message.tool_calls
        assert json.loads(called.function.arguments) == {"city": "Paris, 巴黎"}
        messages += [message, {"role": "tool", "tool_call_id": called.id, "content": "wet"}]
        answer = client.chat.completions.create(model="qwen", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "Take an umbrella."
    prompt = writer.tokenizer.decode(writer.requests[-1].prompt_ids)
    assert "<tool_response>\nwet\n</tool_response>" in prompt


def test_langchain_binds_tools_and_streams() -> None:
    chat_models = pytest.importorskip(
        "langchain_openai", reason="needs langchain-openai: install liubai[dev]"
    )
    messages = pytest.importorskip("langchain_core.messages")
    writer = says(f"hm</think>{CALL}", "so</think>Take an umbrella.", "so</think>Take an umbrella.")
    with running(house_of(writer)) as server:
        model = chat_models.ChatOpenAI(model="qwen", base_url=server.url, api_key="any", max_retries=0)
        bound = model.bind_tools([WEATHER])
        said = bound.invoke("rain?")
        assert said.tool_calls[0]["args"] == {"city": "Paris, 巴黎"}
        told = messages.ToolMessage("wet", tool_call_id=said.tool_calls[0]["id"])
        talk = [messages.HumanMessage("rain?"), said, told]
        assert bound.invoke(talk).content == "Take an umbrella."
        assert "".join(part.content for part in bound.stream(talk)) == "Take an umbrella."


def test_a_bad_call_of_the_api_says_where(tmp_path: Any) -> None:
    app = create_app(house_of(says("x")))
    answer = call(app, "POST", "/v1/chat/completions", {"messages": [CALLED[3]]})
    assert (answer.status, answer.error["param"]) == (400, "messages[0].tool_call_id")
