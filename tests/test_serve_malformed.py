"""Requests with something wrong in them are refused, and none is an error of the server's."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from serving import ANSWER, CHAT, Answer, call_async, house_of, running, says

from liubai.serve import shapes
from liubai.serve.app import create_app
from liubai.serve.errors import Refused
from liubai.serve.limits import DEPTH, read_json

# ---- JSON that is none, or means two things ----


@pytest.mark.parametrize(
    ("body", "says_"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "more than 40 digits"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "stands twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": [{"b": "x\\ud83d"}]}', "surrogate"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "nested deeper"),
        (b"[" * 200_000, "nested deeper"),
        (b'{"a":' * 200_000, "nested deeper"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
    ],
)
def test_what_is_no_json_of_one_meaning(body: bytes, says_: str) -> None:
    with pytest.raises(Refused) as refused:
        read_json(body)
    assert refused.value.status == 400
    assert says_ in refused.value.message


def test_what_is_json_is_read() -> None:
    text = '{"a": [1, -2.5, 1e10, true, null, "\\ud83d\\ude42 \\u0000 留"], "": {}}'
    assert read_json(text.encode()) == json.loads(text)
    deep: Any = 1
    for _ in range(DEPTH - 1):
        deep = {"a": deep}
    assert read_json(json.dumps(deep).encode()) == deep


def mutants(seed: int, count: int) -> list[bytes]:
    """Requests with something wrong in them, most of them hardly."""
    draw = random.Random(seed)
    values = [
        None,
        True,
        -1,
        0,
        1e308,
        "",
        "x",
        [],
        {},
        [[]],
        "\u0000",
        2**70,
        "留",
        [None],
        {"a": {"b": []}},
    ]
    base: dict[str, Any] = {
        "model": "qwen",
        "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}],
        "temperature": 0.5, "n": 1, "stop": ["x"], "logprobs": True, "top_logprobs": 1, "seed": 1,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto",
        "thinking": {"type": "enabled", "budget_tokens": 5}, "paths": {"kind": "sample", "n": 1},
        "stream_options": {"include_usage": True}, "use_tools": ["calculator"], "max_tokens": 5,
    }  # fmt: skip

    def change(value: Any) -> Any:
        if draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
            return draw.choice(values)
        if isinstance(value, dict):
            key = draw.choice(list(value))
            return {**value, draw.choice([key, key, key, "é", "__class__", key + "x"]): change(value[key])}
        at = draw.randrange(len(value))
        return [*value[:at], change(value[at]), *value[at + 1 :]]

    found = []
    for _ in range(count):
        body = json.dumps(change(base), allow_nan=True).encode()
        kind = draw.random()
        if kind < 0.5:
            at = draw.randrange(len(body))
            cut = draw.choice([b"", b'"', b"\xff", b"{", b"]", b"\\", b"\x00", b"NaN", b",", b"9" * 50])
            body = body[:at] + cut + body[at + draw.randrange(3) :]
        elif kind < 0.6:
            body = body[: draw.randrange(len(body))]
        elif kind < 0.65:
            body = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        found.append(body)
    return found


def test_no_malformed_body_is_more_than_refused() -> None:
    """Whatever is sent: an answer, or a 4xx of OpenAI's shape. (bench/malformed.py sends ten thousand.)"""
    app = create_app(house_of(says(ANSWER)))

    async def work() -> list[tuple[bytes, Answer]]:
        return [
            (body, await call_async(app, "POST", path, body))
            for path, seed in ((CHAT, 1), ("/v1/completions", 2))
            for body in mutants(seed, 500)
        ]

    statuses: dict[int, int] = {}
    for body, answer in asyncio.run(work()):
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        if answer.status != 200:
            assert 400 <= answer.status < 500, (body, answer)
            assert answer.status != 422
            shapes.Problem.model_validate(answer.json())
            assert "Traceback" not in answer.body.decode()
    assert statuses[400] > 500


# ---- the description of itself ----


def test_schemathesis_finds_no_error_of_the_server() -> None:
    """Requests made from the description, right and wrong ones: no 5xx, and answers of the shapes
    described."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: install liubai[dev]")
    answered: Counter[str] = Counter()
    refused: dict[str, set[str]] = defaultdict(set)
    with running(house_of(says(ANSWER))) as server:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        checks = [
            schemathesis.checks.not_a_server_error,
            *map(
                schemathesis.checks.CHECKS.get_one,
                ("status_code_conformance", "content_type_conformance", "response_schema_conformance"),
            ),
        ]
        for found in schema.get_all_operations():
            for mode in schemathesis.GenerationMode:

                @settings(
                    max_examples=60 if found.ok().method == "post" else 5,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(found.ok().as_strategy(generation_mode=mode))
                def one(case: Any) -> None:
                    status = case.call_and_validate(checks=checks).status_code
                    answered[case.path] += status == 200
                    if status == 400:
                        refused[case.path].add(repr(case.body))

                try:
                    one()
                except Unsatisfiable:  # nothing can be wrong with a request that has no parts
                    assert found.ok().method == "get"
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert answered[path] >= 10
        assert len(refused[path]) >= 20
