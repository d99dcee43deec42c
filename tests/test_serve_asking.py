"""What is asked of a model: paths as everywhere else, and nothing that costs more than it may."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from serving import Answer, ScriptedWriter, call, chat, house_of, says

from liubai.rollout.paths import PathsConfig
from liubai.rollout.writer import Judge
from liubai.serve import asking, replies
from liubai.serve.app import create_app
from liubai.serve.errors import Refused
from liubai.serve.limits import Limits
from liubai.serve.router import ROUTES
from liubai.serve.schema import ChatRequest, CompletionRequest, read
from liubai.serve.streams import Token
from liubai.serve.tools import TOOLS

SHORT = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("asked", "config"),
    [
        ("vote:8", PathsConfig(kind="vote", n=8)),
        ("tree:16:rollouts", PathsConfig(kind="tree", simulations=16, value="rollouts")),
        ("best:3:process", PathsConfig(kind="best", n=3, judge="process")),
        ("greedy", PathsConfig(kind="greedy")),
        (None, PathsConfig(kind="sample")),
        ({"kind": "vote", "n": 5}, PathsConfig(kind="vote", n=5)),
        ({"kind": "vote", "n": 5.0}, PathsConfig(kind="vote", n=5)),  # an integer, by JSON Schema
        ({"kind": "tree", "n": 5}, PathsConfig(kind="tree", simulations=5)),
        ({"kind": "beam", "n": 5}, PathsConfig(kind="beam", width=5)),
        ({"kind": "beam", "n": 2, "width": 2}, PathsConfig(kind="beam", width=2)),
        ({"kind": "beam", "n": None, "width": None}, PathsConfig(kind="beam")),
        ({"kind": "greedy", "n": 1}, PathsConfig(kind="greedy")),
        ({"kind": "beam", "width": 2, "alpha": 1}, PathsConfig(kind="beam", width=2, alpha=1.0)),
        (
            {"kind": "tree", "simulations": 9, "branch": 2, "c_puct": 0.5, "step_tokens": 7, "tokens": 99},
            PathsConfig(kind="tree", simulations=9, branch=2, c_puct=0.5, step_tokens=7, tokens=99),
        ),
    ],
)
def test_paths_are_asked_for_as_everywhere_else(asked: Any, config: PathsConfig) -> None:
    assert read(ChatRequest, {"messages": [SHORT], "paths": asked}).way_of_paths() == config


def test_paths_are_described_as_what_they_are() -> None:
    described = call(create_app(house_of(says("x"))), "GET", "/openapi.json").json()["components"]["schemas"]
    fields = described["ChatRequest"]["properties"]
    forms = fields["paths"]["anyOf"]
    assert set(described["PathsConfig"]["properties"]) == set(PathsConfig.model_fields)
    (pattern,) = [form["pattern"] for form in forms if form.get("type") == "string"]
    for text in ("vote:8", "greedy", "tree:16:rollouts", "best:3:process"):
        assert re.search(pattern, text)
    assert not re.search(pattern, "votes:8")
    assert fields["route"]["anyOf"][0]["enum"] == list(ROUTES)
    assert fields["use_tools"]["anyOf"][0]["items"]["enum"] == list(TOOLS)


def test_beams_that_there_is_no_memory_for_are_refused_before_they_are_begun() -> None:
    writer = says("</think>x")
    house = house_of(writer)
    served = house.find(None)
    served.token_bytes = 1 << 20
    fits = asking.BEAMS // (4 << 20)
    assert fits < served.max_length
    refused = chat(create_app(house), paths="beam:4", max_tokens=fits)
    assert (refused.status, refused.error["param"]) == (400, "paths")
    assert writer.requests == []
    assert chat(create_app(house), paths="beam:4").status == 200  # as many as fit, where nobody said how many
    assert {len(r.prompt_ids) + r.max_tokens for r in writer.requests} == {fits}
    assert chat(create_app(house), paths="vote:4", max_tokens=fits).status == 200


def test_as_many_logprobs_are_shown_as_can_be_made_while_others_wait() -> None:
    writer = says("</think>x")
    app = create_app(house_of(writer, limits=Limits(answers=64), max_length=16384))
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 20}
    for way in ({"n": 16, "max_tokens": 1000}, {"paths": "vote:16", "max_tokens": 1000}):
        refused = chat(app, **asked, **way)
        assert (refused.status, refused.error["param"]) == (400, "top_logprobs")
        assert (
            f"{asking.SHOWN} log-probabilities at most, and 16 answers of 1000 tokens"
            in refused.error["message"]
        )
        assert chat(app, **{**asked, "top_logprobs": 5}, **way).status == 200
        assert chat(app, **way).status == 200
    writer.requests.clear()
    assert chat(app, **asked, n=16).status == 200  # as many as fit, where nobody said how many
    assert {r.max_tokens for r in writer.requests} == {asking.SHOWN // (16 * 21)}

    def complete(**fields: Any) -> Answer:
        return call(app, "POST", "/v1/completions", {"prompt": ["x"] * 8, "n": 8, **fields})

    refused = complete(max_tokens=1000, logprobs=5)
    assert (refused.status, refused.error["param"]) == (400, "logprobs")
    assert complete(max_tokens=300, logprobs=5).status == 200
    assert complete(max_tokens=1000).status == 200


def test_a_tree_has_a_bound_on_all_that_it_writes() -> None:
    writer = says("</think>x")
    app = create_app(house_of(writer, limits=Limits(answers=8)))
    for wide in (
        {"kind": "tree", "simulations": 22, "value": "rollouts"},
        {"kind": "tree", "simulations": 17, "branch": 4, "value": "rollouts", "rollouts": 4},
    ):
        refused = chat(app, paths=wide)
        assert (refused.status, refused.error["param"]) == (400, "paths")
        assert "128 answers and steps of one tree at most" in refused.error["message"]
        assert writer.requests == []
    assert chat(app, paths={"kind": "tree", "simulations": 21, "value": "rollouts"}).status == 200


def test_a_spelling_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = says("</think>" + "wait " * 40)
    decoded = list[int]()
    decode = type(writer.tokenizer).decode

    def counted(self: Any, ids: Any, *more: Any) -> str:
        decoded.append(len(ids))
        return decode(self, ids, *more)

    house = house_of(writer)
    served = house.find(None)
    token = Token(served.tokenizer.encode("wait")[0], -0.5, tuple((i, -1.0) for i in range(20)))
    first = replies.entry(served.tokenizer, token)
    monkeypatch.setattr(type(writer.tokenizer), "decode", counted)
    assert replies.entry(served.tokenizer, token) == first
    assert decoded == []


# ---- what it costs ----

CALLED = {"id": "1", "function": {"name": "f", "arguments": json.dumps({"a": "b" * 21000})}}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": "留白 " * 7000}}]},
        {"messages": [SHORT, {"role": "assistant", "content": None, "tool_calls": [CALLED]}]},
        {"messages": [SHORT, {"role": "assistant", "content": "y", "reasoning": "z" * 21000}, SHORT]},
    ],
)
def test_whatever_is_long_is_encoded_beside_the_loop(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = []
    in_thread = asyncio.to_thread

    async def counted(work: Any) -> Any:
        beside.append(work)
        return await in_thread(work)

    monkeypatch.setattr(asking.asyncio, "to_thread", counted)
    app = create_app(house_of(says("</think>x"), max_length=1 << 20))
    assert chat(app, "short").status == 200
    assert beside == []
    body = {"messages": [{"role": "user", "content": "x"}], **more}
    assert call(app, "POST", "/v1/chat/completions", body).status == 200
    assert len(beside) == 1


MANY: dict[str, Any] = dict.fromkeys(map(str, range(3000)))


@pytest.mark.parametrize(
    ("kind", "body", "most"),
    [
        (ChatRequest, {"messages": [1] * 3000}, 1),
        (ChatRequest, {"messages": [SHORT] * 5000}, 1),
        (ChatRequest, {"messages": [SHORT | MANY]}, 1),
        (ChatRequest, {"messages": [SHORT | {"content": [None] * 3000}]}, 2),
        (ChatRequest, {"messages": [SHORT], **MANY}, 1),
        (ChatRequest, {"messages": [SHORT], "paths": MANY}, 1),
        (ChatRequest, {"messages": [SHORT], "tools": [0] * 3000, "stop": [0] * 3000}, 3),
        (CompletionRequest, {"prompt": [None] * 3000}, 4),
        (CompletionRequest, {"prompt": [[None] * 3000] * 9}, 4),
    ],
)
def test_of_many_mistakes_the_first_is_enough(kind: Any, body: dict[str, Any], most: int) -> None:
    """However many there are in a body: each would cost time in which nobody else is answered."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    assert 1 <= found.value.error_count() <= most
    with pytest.raises(Refused):
        read(kind, body)


# ---- who judges ----


class Judged(ScriptedWriter):
    """Has both judges, or one of them."""

    there: ClassVar[frozenset[Judge]] = frozenset()
    asked: ClassVar[list[Judge]] = []

    async def judge(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> list[float]:
        self.asked.append(judge)
        return [0.0] * len(answers)

    def judges(self) -> frozenset[Judge]:
        return self.there


@pytest.mark.parametrize(
    ("there", "question", "judge"),
    [
        ({"preference", "process"}, "make 1 4 3 ->7", "process"),
        ({"preference", "process"}, "What is the capital of France?", "preference"),
        ({"process"}, "What is the capital of France?", None),
    ],
)
def test_a_process_model_judges_what_has_steps(
    there: set[Judge], question: str, judge: Judge | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judged, "there", frozenset(there))
    monkeypatch.setattr(Judged, "asked", [])
    writer = says("</think>Paris")
    writer.__class__ = Judged
    answer = chat(create_app(house_of(writer)), question, paths="best:2")
    assert answer.status == (400 if judge is None else 200), answer.body
    assert Judged.asked == ([] if judge is None else [judge])
    assert (writer.requests == []) == (judge is None)
