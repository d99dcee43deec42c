"""OpenAI's interface: what is asked, what is honoured, what is refused; and real clients on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, tiny_model
from serving import (
    QWEN3,
    Running,
    ScriptedWriter,
    call,
    chat,
    collected,
    house_of,
    http,
    raw,
    running,
    says,
    tokenizer,
)
from typer.testing import CliRunner

from liubai.cli import app as cli
from liubai.errors import UserError
from liubai.model.checkpoint import load, save_checkpoint
from liubai.problems import world_vocabulary
from liubai.rollout import paths as ways
from liubai.rollout.engine import Request
from liubai.rollout.local import LocalWriter, run
from liubai.rollout.thinking import Ask
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.serve import shapes
from liubai.serve.answering import answer
from liubai.serve.app import create_app
from liubai.serve.host import Host
from liubai.serve.house import House, Served, names_of
from liubai.serve.limits import Limits
from liubai.serve.metrics import Counter, Histogram
from liubai.serve.router import Router
from liubai.serve.schema import ChatRequest, CompletionRequest, read
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import word_level

THOUGHT = "Let me think.</think>\n\nIt is 42."


def ask(writer: ScriptedWriter, **fields: Any) -> dict[str, Any]:
    answer = chat(create_app(house_of(writer)), **fields)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    shapes.ChatCompletion.model_validate(found)
    return found


def requests_of(fields: dict[str, Any], *, answer: str = THOUGHT) -> list[Request]:
    writer = says(answer)
    ask(writer, **fields)
    return writer.requests


# ---- a whole answer ----


def test_a_whole_answer() -> None:
    writer = says(THOUGHT)
    found = ask(writer, model="qwen", user="u", store=True, metadata={"a": "b"}, service_tier="auto")
    (choice,) = found["choices"]
    message = choice["message"]
    assert message["content"] == "It is 42."
    assert message["reasoning_content"] == message["reasoning"] == "Let me think."
    assert choice["finish_reason"] == "stop"
    assert (found["model"], found["object"], found["system_fingerprint"]) == (
        "qwen",
        "chat.completion",
        "liubai-0123456789ab",
    )
    thought = len(writer.tokenizer.encode("Let me think."))
    whole = len(writer.tokenizer.encode(THOUGHT)) + 1  # and the end
    assert found["usage"] == {
        "prompt_tokens": len(writer.requests[0].prompt_ids),
        "completion_tokens": whole,
        "total_tokens": len(writer.requests[0].prompt_ids) + whole,
        "completion_tokens_details": {"reasoning_tokens": thought},
    }
    paths = found["liubai"]["paths"]
    assert (paths["kind"], paths["chosen"], paths["tokens"]) == ("sample", 0, whole)
    assert found["liubai"]["thinking"]["tokens"] == thought
    assert not found["liubai"]["thinking"]["forced"]


def test_the_conversation_is_what_the_template_makes_of_it() -> None:
    writer = says(THOUGHT)
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "r", "liubai": {"anything": 1}},
        {"role": "user", "content": "d"},
    ]
    answer = call(create_app(house_of(writer)), "POST", "/v1/chat/completions", {"messages": messages})
    assert answer.status == 200
    template = Template(writer.tokenizer, QWEN3)
    turns = [("system", "be short"), ("user", "ab"), ("assistant", "c"), ("user", "d")]
    expected = template.chat_ids([{"role": role, "content": text} for role, text in turns])
    assert list(writer.requests[0].prompt_ids) == expected


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"thinking": False}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"route": "fast"}, False),
        ({"route": "think", "thinking": False}, True),
    ],
)
def test_deep_think_is_switched(fields: dict[str, Any], thinks: bool) -> None:
    (request,) = requests_of(fields, answer="x</think>y" if thinks else "y")
    prompt = tokenizer().decode(request.prompt_ids)
    assert prompt.endswith("assistant\n<think>\n" if thinks else "<think>\n\n</think>\n\n")


def test_a_template_that_always_thinks_has_its_thought_closed_at_once() -> None:
    writer = says("the answer")
    house = house_of(writer, template="{{ messages[-1].content }}<think>\n")
    found = chat(create_app(house), thinking=False).json()
    assert found["choices"][0]["message"]["content"] == "the answer"
    assert writer.tokenizer.decode(writer.requests[0].prompt_ids).endswith("<think>\n</think>\n\n")
    assert found["liubai"]["thinking"] == {"tokens": 0, "seconds": 0.0, "forced": False}
    assert found["usage"]["completion_tokens"] == len(writer.tokenizer.encode("the answer")) + 1
    # a budget that nobody asked for does not stand in a search's way
    beams = chat(create_app(house), thinking=False, paths="beam:2")
    assert beams.status == 200, beams.body
    assert beams.json()["choices"][0]["message"]["content"] == "the answer"


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"thinking_budget": 7}, 7),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 9),
        ({"thinking_budget": 7, "reasoning_effort": "low"}, 7),
        ({"reasoning_effort": "low"}, 4096 // 16),
        ({"reasoning_effort": "medium"}, 4096 // 4),
        ({"reasoning_effort": "minimal"}, 4096 // 64),
    ],
)
def test_a_budget_bounds_the_thought(fields: dict[str, Any], budget: int) -> None:
    writer = says("on and on " * 2000, "so it is 42")
    found = ask(writer, **fields)
    assert writer.requests[0].max_tokens == budget
    assert found["liubai"]["thinking"]["forced"]
    assert found["choices"][0]["message"]["content"] == "so it is 42"
    assert budget <= found["liubai"]["thinking"]["tokens"] <= budget + 8


def test_think_longer() -> None:
    writer = says("short</think>", " and more, and more, and more</think>42")
    found = ask(writer, think_at_least=len(writer.tokenizer.encode("short")) + 3)
    message = found["choices"][0]["message"]
    assert "Wait," in message["reasoning_content"] or "wait" in message["reasoning_content"].lower()
    assert message["content"] == "42"


def test_what_samples_goes_to_the_engine() -> None:
    (request,) = requests_of({"temperature": 0.3, "top_p": 0.7, "max_tokens": 50, "seed": 5})
    assert (request.temperature, request.top_p, request.max_tokens) == (0.3, 0.7, 50)
    (same,) = requests_of({"temperature": 0.3, "top_p": 0.7, "max_completion_tokens": 50, "seed": 5})
    assert same.seed == request.seed
    assert requests_of({"seed": 6})[0].seed != request.seed
    assert requests_of({})[0].seed != requests_of({})[0].seed
    assert requests_of({"max_tokens": 10**6})[0].max_tokens == 4096 - len(
        request.prompt_ids
    )  # what there is room for
    assert requests_of({"paths": "greedy"})[0].temperature == 0
    assert requests_of({"top_p": 0})[0].top_p > 0


def test_choices_have_seeds_of_their_own() -> None:
    writer = says(THOUGHT)
    found = ask(writer, n=4, seed=1)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert len({request.seed for request in writer.requests}) == 4
    assert {r.seed for r in writer.requests} > {requests_of({"n": 1, "seed": 1})[0].seed}
    assert found["usage"]["completion_tokens"] == 4 * (len(writer.tokenizer.encode(THOUGHT)) + 1)


def test_a_cut_off_answer_says_so() -> None:
    found = ask(says(THOUGHT), max_tokens=3)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 3
    assert found["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("kind", ["vote", "best", "beam", "tree"])
def test_paths(kind: str) -> None:
    texts = ["a</think>\\boxed{1}", "b</think>\\boxed{2}", "c</think>\\boxed{2}"]
    writer = says(*texts, scores=lambda question, response: float("boxed{1}" in response))
    found = ask(writer, paths={"kind": kind, "n": 3}, content="which?")
    paths = found["liubai"]["paths"]
    assert paths["kind"] == kind
    assert len(found["choices"]) == 1
    best = paths["list"][paths["chosen"]]
    assert best["content"] == found["choices"][0]["message"]["content"]
    if kind == "vote":
        assert (best["answer"], best["votes"]) == ("2", 2)
    if kind == "best":
        assert (best["answer"], best["score"]) == ("1", 1.0)
    assert found["usage"]["completion_tokens"] == paths["tokens"]
    tokens = [one["tokens"] for one in paths["list"]]
    if kind == "beam":  # each token has a log-probability of −0.5
        assert [one["score"] for one in paths["list"]] == [-0.5 * count for count in tokens]
        assert best["score"] == max(one["score"] for one in paths["list"])
        assert paths["tokens"] == 3 * max(tokens)
        assert len(writer.requests) == 3
    if kind == "tree":  # every one of its simulations ends in some path, or on the way to one
        assert best["votes"] == max(one["votes"] or 0 for one in paths["list"])
        assert 1 <= best["votes"] <= 3


# ---- the router ----


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


def test_the_command_names_the_models_of_both_ways(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    async def serve(hosts: Any, door: Any, limits: Any, **more: Any) -> int:
        told.update(more, names=[one.name for one in hosts])
        return 0

    monkeypatch.setattr("liubai.serve.server.serve", serve)
    folder = str(host.folder)
    asked = ["serve", folder, folder, "--name", "a", "--name", "b", "--fast", "a", "--think", "b"]
    result = CliRunner().invoke(cli, [*asked, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert (told["names"], told["fast"], told["think"]) == (["a", "b"], "a", "b")


# ---- what is refused, and how ----


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
        ({"paths": 3}, "paths", "must be an object"),
        ({"paths": "best"}, "paths", "--reward-model DIR"),
        ({"paths": {"kind": "tree", "judge": "process"}}, "paths.judge", "has no process model; the server"),
        ({"paths": "beam", "thinking_budget": 3}, "paths", "beam search has no"),
        ({"paths": "vote", "temperature": 0}, "temperature", "one and the same"),
        ({"paths": "vote", "n": 2}, "n", "leave 'n' out"),
        ({"n": 16, "paths": "greedy"}, "n", "4 answers at once"),
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
    form = call(app, "POST", "/v1/chat/completions", b"a=b", content_type="application/x-www-form-urlencoded")
    assert form.status == 415
    assert call(app, "POST", "/v1/chat/completions", b"{}", content_encoding="gzip").status == 415


# ---- bare completions ----


def complete(writer: ScriptedWriter, **fields: Any) -> dict[str, Any]:
    answer = call(create_app(house_of(writer)), "POST", "/v1/completions", fields)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    shapes.Completion.model_validate(found)
    return found


def test_a_bare_completion() -> None:
    writer = says(" <think>and</think> so")
    found = complete(writer, prompt="we wait", max_tokens=50, logprobs=2)
    (choice,) = found["choices"]
    assert choice["text"] == " <think>and</think> so"
    assert list(writer.requests[0].prompt_ids) == writer.tokenizer.encode("we wait")
    columns = choice["logprobs"]
    assert "".join(columns["tokens"]) == choice["text"]
    assert columns["text_offset"] == [
        len("".join(columns["tokens"][:i])) for i in range(len(columns["tokens"]))
    ]
    assert columns["token_logprobs"] == [-0.5] * len(columns["tokens"])
    assert all(len(likely) == 2 for likely in columns["top_logprobs"])
    assert complete(says("x " * 99), prompt="a")["usage"]["completion_tokens"] == 16  # OpenAI's default


def test_prompts_of_every_form_and_their_echo() -> None:
    ids = tokenizer().encode("we wait")
    for prompt in ("we wait", ["we wait"], ids, [ids]):
        found = complete(says(" so"), prompt=prompt, echo=True)
        assert [choice["text"] for choice in found["choices"]] == ["we wait so"]
    found = complete(says(" so"), prompt=["a", "b"], n=2, echo=True, stop=["o"])
    assert [(c["index"], c["text"]) for c in found["choices"]] == [
        (0, "a s"),
        (1, "a s"),
        (2, "b s"),
        (3, "b s"),
    ]


def test_a_bare_completion_streams() -> None:
    fields = {"prompt": "a", "stream": True, "logprobs": 0, "stream_options": {"include_usage": True}}
    chunks = call(create_app(house_of(says(" so it is"))), "POST", "/v1/completions", fields).chunks()
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == " so it is"
    offsets = [offset for c in choices if c["logprobs"] for offset in c["logprobs"]["text_offset"]]
    assert offsets == sorted(set(offsets))
    assert choices[-1]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": ["x"] * 9, "n": 8}, "n"),
    ],
)
def test_bare_completions_that_cannot_be(fields: dict[str, Any], param: str | None) -> None:
    answer = call(create_app(house_of(says("x"))), "POST", "/v1/completions", fields)
    if param is None:  # nothing but the start of a text
        assert answer.status == 200
    else:
        assert (answer.status, answer.error["param"]) == (400, param)


# ---- what else there is ----


def test_models_health_and_the_description_of_itself() -> None:
    app = create_app(house_of(says("x", scores=lambda q, r: 0.0), limits=Limits(max_tokens=77)))
    listed = call(app, "GET", "/v1/models").json()
    shapes.ModelList.model_validate(listed)
    (model,) = listed["data"]
    assert model["id"] == "qwen"
    assert model["liubai"] == {
        "thinking": True,
        "max_length": 4096,
        "judges": ["preference"],
        "paths": ["greedy", "sample", "beam", "vote", "best", "tree"],
        "tools": ["calculator", "python"],
        "routes": ["auto", "fast", "think", "tool"],
        "functions": True,
    }
    assert call(app, "GET", "/v1/models/qwen").json() == model
    assert call(app, "GET", "/health").json() == {"status": "ok", "models": {"qwen": "ready"}}
    described = call(app, "GET", "/openapi.json").json()
    schemas = described["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 77
    parts = json.dumps(described).split("#/components/schemas/")[1:]
    references = {part.split('"')[0] for part in parts}
    assert references <= set(schemas)
    assert chat(app, max_tokens=78).error["param"] == "max_tokens"


def test_metrics() -> None:
    app = create_app(house_of(says(THOUGHT)))
    chat(app)
    chat(app, n=99)
    chat(app, "1+1", route="auto")
    call(app, "GET", "/somewhere/else")
    text = call(app, "GET", "/metrics").body.decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['liubai_requests_total{path="/v1/chat/completions",status="200"}'] == "2"
    assert lines['liubai_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert lines['liubai_requests_total{path="other",status="404"}'] == "1"
    assert lines['liubai_routed_total{way="tool"}'] == "1"
    thought = len(tokenizer().encode("Let me think."))
    assert lines['liubai_tokens_total{kind="reasoning",model="qwen"}'] == str(thought)
    assert lines['liubai_answer_seconds_count{model="qwen"}'] == "2"
    assert lines['liubai_first_token_seconds_bucket{model="qwen",le="+Inf"}'] == "2"
    assert lines["liubai_requests_in_flight"] == "0"


def test_a_histogram_is_cumulative_and_labels_are_escaped() -> None:
    histogram = Histogram("h", "x", (1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 9.0):
        histogram.add(seconds)
    assert list(histogram.lines())[2:] == [
        'h_bucket{le="1"} 2',
        'h_bucket{le="2"} 3',
        'h_bucket{le="+Inf"} 4',
        "h_sum 12",
        "h_count 4",
    ]
    counter = Counter("c", "x")
    counter.add(name='a"b\\c\nd')
    assert list(counter.lines())[-1] == 'c{name="a\\"b\\\\c\\nd"} 1'


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/mine/16-r1/checkpoint"], ["r1"]),
        (["runs/a/1-base/checkpoint", "runs/b/1-base/checkpoint"], ["a-base", "b-base"]),
        (["models/Qwen3 0.6B"], ["Qwen3-0.6B"]),
        (["hub/models--Qwen--Qwen3-0.6B/snapshots/abc"], ["Qwen3-0.6B"]),
        (["x/same", "x/same"], ["x-same", "x-same-2"]),
    ],
)
def test_a_model_is_called_by_its_folder(folders: list[str], names: list[str], monkeypatch: Any) -> None:
    found = names_of([Path("/") / folder for folder in folders])
    assert len(set(found)) == len(found)
    assert [name.removeprefix("-") for name in found] == names


# ---- real clients, a real socket, a real model ----


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The small world's words and a tiny model that has learned nothing."""
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    words = word_level(world_vocabulary())
    config = tiny_config(
        vocab_size=words.vocab_size,
        max_position_embeddings=512,
        bos_token_id=words.bos_id,
        eos_token_id=words.eos_id,
    )
    save_checkpoint(folder, tiny_model(0, config, scale=2.5), words, BARE)
    return Host("tiny", folder, slots=16, waiting=16, device="cpu", threads=1)


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[Running]:
    with running(
        lambda: House([Served.by(host)], router=Router.load()), before=host.start, after=host.stop
    ) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    openai = pytest.importorskip("openai", reason="needs the OpenAI client: install liubai[dev]")
    return openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)


ASKED: list[Any] = [{"role": "user", "content": "3 7 8 ->13"}]


def test_the_openai_client_asks_a_real_model(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    options: Any = {
        "model": "tiny",
        "messages": ASKED,
        "seed": 3,
        "max_tokens": 60,
        "extra_body": {"thinking_budget": 20},
    }
    one = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    again = client.chat.completions.create(**options)
    message = one.choices[0].message
    assert (message.content, message.reasoning_content) == (
        again.choices[0].message.content,
        again.choices[0].message.reasoning_content,
    )
    assert message.reasoning_content
    assert one.usage.completion_tokens_details.reasoning_tokens <= 20
    entries = one.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries).strip() == message.content
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    texts = {"content": "", "reasoning_content": ""}
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            for name in texts:
                texts[name] += getattr(choice.delta, name, None) or ""
        usage = chunk.usage
    assert texts == {"content": message.content, "reasoning_content": message.reasoning_content}
    assert usage == again.usage
    other = client.chat.completions.create(**{**options, "seed": 4})
    assert other.choices[0].message.reasoning_content != message.reasoning_content


def test_the_openai_client_completes_and_is_refused(client: Any) -> None:
    import openai

    found = client.completions.create(model="tiny", prompt="3 + 4", max_tokens=8, n=2, seed=1, logprobs=1)
    assert len({choice.text for choice in found.choices}) == 2
    assert all(len(choice.logprobs.tokens) == 8 for choice in found.choices)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=ASKED, logit_bias={"1": 5})
    assert bad.value.param == "logit_bias"


@pytest.mark.parametrize(
    "paths", ["greedy", {"kind": "vote", "n": 3}, {"kind": "beam", "width": 2}, "tree:2:rollouts"]
)
def test_paths_of_a_real_model(client: Any, host: Host, paths: Any) -> None:
    """They are the very paths that the same model writes in this process."""
    found = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=24, seed=1, extra_body={"paths": paths}
    )
    told = found.model_extra["liubai"]["paths"]
    model, words = load(host.folder)
    engine = TorchEngine(model, eos_ids=words.eos_ids, slots=16, max_length=host.max_length)
    engine.load(model.state_dict(), 0)
    writer = LocalWriter(engine, eos_ids=words.eos_ids)
    ask = Ask(
        question=ASKED[0]["content"],
        template=host.template,
        prompt_ids=tuple(host.template.prompt_ids(ASKED[0]["content"])),
        max_tokens=24,
        seed=derive(1, "choice", 0),
    )
    config = read(ChatRequest, {"messages": ASKED, "paths": paths}).way_of_paths()
    [wanted] = run(writer, [ways.answer(writer, ask, config)])
    assert (told["kind"], told["chosen"], told["tokens"]) == (
        config.kind,
        wanted.chosen,
        wanted.spent.written,
    )
    assert [(one["reasoning"], one["content"], one["answer"], one["votes"]) for one in told["list"]] == [
        (path.thought, path.content, path.answer, path.votes) for path in wanted.paths
    ]
    assert [one["score"] for one in told["list"]] == [
        path.score if path.score is None else pytest.approx(path.score, abs=1e-4) for path in wanted.paths
    ]
    message = found.choices[0].message
    assert ((message.reasoning_content or ""), message.content) == (wanted.best.thought, wanted.best.content)


def test_langchain_asks_a_real_model(server: Running) -> None:
    models = pytest.importorskip("langchain_openai", reason="needs langchain-openai: install liubai[dev]")
    model = models.ChatOpenAI(
        model="tiny", base_url=server.url, api_key="any", max_retries=0, seed=3, max_tokens=40,
        extra_body={"thinking_budget": 8}, stream_usage=True,
    )  # fmt: skip
    said = model.invoke("3 7 8 ->13")
    assert said.usage_metadata["output_tokens"] > 0
    assert "".join(part.content for part in model.stream("3 7 8 ->13")) == said.content


def test_many_clients_at_once_get_their_own_answers(server: Running, host: Host) -> None:
    """More than there are slots, each the answer that it gets alone. (The seeds are not among the few for
    which the rounding of a bigger batch decides.)"""
    httpx = pytest.importorskip("httpx")

    async def one(client: Any, seed: int) -> str:
        body = {"messages": ASKED, "seed": seed, "max_tokens": 30, "stream": True}
        text = ""
        async with client.stream("POST", f"{server.url}/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        text += choice["delta"].get("reasoning") or choice["delta"].get("content") or ""
        return text

    async def all_of_them() -> tuple[list[str], list[str]]:
        async with httpx.AsyncClient(timeout=60) as client:
            alone = [await one(client, 10 + seed) for seed in range(4)]
            together = await asyncio.gather(*(one(client, 10 + seed % 4) for seed in range(28)))
        return alone, list(together)

    alone, together = asyncio.run(all_of_them())
    assert together == [alone[seed % 4] for seed in range(28)]
    assert len(set(alone)) == 4
    server.run(_until(lambda: (host.figures().in_use, host.figures().open, host._places) == (0, 0, 0)))


def test_who_is_too_many_is_told_when_to_come_back(server: Running, host: Host) -> None:
    places = server.run(_admitted(host, 31))
    try:
        link = raw(server.port, http("/v1/chat/completions", {"messages": ASKED, "n": 2}))
        answer = b""
        while b'"error"' not in answer:
            answer += link.recv(1 << 16)
    finally:
        server.run(_left(places))
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"retry-after: " in answer
    assert b'"rate_limit_error"' in answer


async def _admitted(host: Host, answers: int) -> Any:
    places = host.admit(answers)
    places.__enter__()
    return places


async def _left(places: Any) -> None:
    places.__exit__(None, None, None)


@pytest.mark.parametrize("more", [b"", b"x", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20])
def test_a_client_that_leaves_frees_its_slot_at_once(server: Running, host: Host, more: bytes) -> None:
    """In the middle of a stream, and while it waits for a whole answer; whatever it sent behind its
    request."""
    for stream in (True, False):
        before = host.figures().cancelled
        body = {"messages": ASKED, "n": 4, "max_tokens": 480, "stream": stream, "think_at_least": 400}
        link = raw(server.port, http("/v1/chat/completions", body))
        if stream:
            assert b"200 OK" in link.recv(100)
        server.run(_until(lambda: host.figures().in_use == 4))
        if more:
            link.sendall(more)
            server.run(asyncio.sleep(0.05))
        link.close()
        server.run(_until(lambda: host.figures().open == 0 and host.figures().in_use == 0))
        assert host.figures().cancelled > before
        assert host._places == 0


def test_who_sends_on_and_on_while_it_waits_is_cut_off(server: Running, host: Host) -> None:
    before = host.figures().cancelled
    body = {"messages": ASKED, "max_tokens": 480, "think_at_least": 400}
    with raw(server.port, http("/v1/chat/completions", body)) as link:
        server.run(_until(lambda: host.figures().in_use == 1))
        with suppress(ConnectionError):
            for _ in range(16):
                link.sendall(b"x" * 4096)
                server.run(asyncio.sleep(0.001))
        server.run(_until(lambda: host.figures().in_use == 0))
        with suppress(ConnectionError):
            assert link.recv(1) == b""
    assert host.figures().cancelled > before


def test_what_comes_behind_a_request_is_answered_after_it(server: Running) -> None:
    body = {"messages": ASKED, "max_tokens": 20}
    with raw(server.port, http("/v1/chat/completions", body) * 3) as link:
        got = b""
        while got.count(b'"object":"chat.completion"') < 3:
            got += (more := link.recv(1 << 16))
            assert more


async def _until(true: Any) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to be")


# ---- the core by itself ----


def test_closing_the_events_withdraws_the_answer() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    writer = says(THOUGHT, held=forever)

    async def work() -> None:
        house = house_of(writer)
        events = answer(house, read(ChatRequest, {"messages": ASKED, "n": 3}))
        for _ in range(2):
            await anext(events)
        assert writer.in_use == 3
        await events.aclose()
        assert (writer.in_use, writer.cancelled) == (0, 3)

    asyncio.run(work())


def test_one_error_ends_all_choices() -> None:
    calls = []

    def say(prompt: str, request: Request) -> str:
        calls.append(request)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return "x " * 100

    writer = ScriptedWriter(tokenizer(), say)

    async def work() -> None:
        with pytest.raises(RuntimeError, match="broken"):
            await collected(answer(house_of(writer), read(ChatRequest, {"messages": ASKED, "n": 5})))
        assert writer.in_use == 0

    asyncio.run(work())


def test_a_request_is_read_the_same_in_all_its_forms() -> None:
    one = read(CompletionRequest, {"prompt": [1, 2], "stop": "a"})
    assert (one.prompts(), one.stops()) == ([[1, 2]], ("a",))
    assert read(CompletionRequest, {"prompt": [[1], [2]]}).prompts() == [[1], [2]]
    assert read(ChatRequest, {"messages": ASKED, "n": 2.0}).n == 2  # an integer, by JSON Schema
