"""OpenAI's interface: what is asked and what is honoured, in a conversation and of a bare text."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serving import (
    ASKED,
    QWEN3,
    THOUGHT,
    ScriptedWriter,
    ask,
    call,
    chat,
    collected,
    house_of,
    says,
    tokenizer,
)

from liubai.rollout.engine import Request
from liubai.serve import shapes
from liubai.serve.answering import answer
from liubai.serve.app import create_app
from liubai.serve.schema import ChatRequest, CompletionRequest, read
from liubai.text.template import Template


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
