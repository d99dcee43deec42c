"""What the server says of itself: models and their names, health, its description, metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving import THOUGHT, call, chat, house_of, says, tokenizer

from liubai.serve import shapes
from liubai.serve.app import create_app
from liubai.serve.house import names_of
from liubai.serve.limits import Limits
from liubai.serve.metrics import Counter, Histogram


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
