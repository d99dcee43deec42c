"""A server as a recipe's engine: what may be written, and stages that learn from its answers."""

from __future__ import annotations

import json
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Killed, Silent
from connected import LORA
from connected import stack as stack  # a fixture
from scripted_vllm import Script, serving

from liubai.errors import UserError
from liubai.grade import RewardWeights
from liubai.model.checkpoint import load
from liubai.recipe import load_recipe
from liubai.recipe.runner import fingerprint
from liubai.rollout.canary import NotArrived
from liubai.rollout.engines import EngineConfig
from liubai.stages import rl
from liubai.stages.context import Context
from liubai.stages.policy import Policy


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "server"}, "needs its url"),
        ({"kind": "server", "url": "10.0.0.2:8000"}, "needs its url"),
        ({"kind": "server", "url": "http://h:abc"}, "needs its url, such as .*, not 'http://h:abc'"),
        ({"kind": "server", "url": "http://h:99999"}, "needs its url"),
        ({"kind": "server", "url": "http://[::1"}, "needs its url"),
        ({"kind": "vllm", "address": "host:abc"}, "address is HOST or HOST:PORT, not 'host:abc'"),
        ({"kind": "vllm", "address": "host:0"}, "address is HOST or HOST:PORT"),
        ({"kind": "vllm", "address": "http://host:29500"}, "address is HOST or HOST:PORT"),
        ({"kind": "torch", "url": "http://h:1"}, "url is not for an engine of kind 'torch'"),
        ({"kind": "vllm", "url": "http://h:1"}, "url is not for an engine of kind 'vllm'"),
        (
            {"kind": "server", "url": "http://h:1", "tensor_parallel": 2},
            "tensor_parallel is not for an engine of kind 'server'",
        ),
        ({"transport": "lora"}, "transport is not for an engine of kind 'torch'"),
    ],
)
def test_a_senseless_engine_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**keys)


RECIPE = """
[stages.zero]
kind = "rl"
model = "MODEL"
steps = 2
groups = 3
samples = 4
max_tokens = 12
eval_problems = 2
eval_samples = 1
save_every = 1
slots = 8
{more}
"""


def recipe(path: Path, model: Path, more: str) -> Any:
    file = path / "r.toml"
    file.write_text(RECIPE.replace("MODEL", str(model)).format(more=more))
    return load_recipe(file)


def test_the_usual_engine_leaves_no_trace_in_a_recipe(base: Path, tmp_path: Path) -> None:
    """What was computed before there were others keeps its fingerprint."""
    plain = recipe(tmp_path, base / "checkpoint", "")
    said = recipe(tmp_path, base / "checkpoint", 'engine = "torch"')
    other = recipe(tmp_path, base / "checkpoint", 'engine = "vllm"')
    marks = [fingerprint(r, r.stages[0], {}) for r in (plain, said, other)]
    assert marks[0] == marks[1] != marks[2]
    assert "engine" not in plain.to_toml()
    resolved = tomllib.loads(other.to_toml())["stages"]["zero"]["engine"]
    assert resolved["kind"] == "vllm"
    (tmp_path / "again.toml").write_text(other.to_toml())
    assert load_recipe(tmp_path / "again.toml") == other


def test_a_recipes_engine_is_checked_and_its_folder_found(base: Path, tmp_path: Path) -> None:
    table = '[stages.zero.engine]\nkind = "server"\nurl = "http://h:8000"\nfolder = "w"'
    engine = recipe(tmp_path, base / "checkpoint", table).stages[0].config.engine
    assert engine.folder == str(tmp_path / "w")
    with pytest.raises(UserError, match=r"'stages.zero.engine'.*did you mean 'vllm'"):
        recipe(tmp_path, base / "checkpoint", 'engine = "vlm"')
    wanted = recipe(tmp_path, base / "checkpoint", table + '\ntransport = "lora"').stages[0].config
    with pytest.raises(UserError, match="set lora, too"):
        wanted.require_model("zero", [])


def stage(base: Path, url: str, transport: Any = "folder", **keys: Any) -> rl.Config:
    """An untrained model is never right: the length is what its answers differ in."""
    return rl.Config(
        model=str(base / "checkpoint"),
        groups=3,
        samples=4,
        max_tokens=24,
        eval_problems=2,
        eval_samples=1,
        save_every=1,
        slots=8,
        lr=3e-3,
        rewards=RewardWeights(overlong=-0.5, overlong_from=0.0),
        engine=EngineConfig(kind="server", url=url, transport=transport),
        **keys,
    )


@pytest.mark.parametrize(
    ("transport", "keys"),
    [
        ("folder", {"inflight": False}),
        ("folder", {"inflight": True}),
        ("lora", {"inflight": True, "lora": LORA}),
    ],
)
def test_a_stage_learns_from_answers_of_a_server(
    transport: str,
    keys: dict[str, Any],
    base: Path,
    tmp_path: Path,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after its first step and taken up again: it goes on with exactly the answers that it had. The
    evaluations are the server's, too: before the first step, and with the weights of after the last."""
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
    monkeypatch.setattr("liubai.stages.sampler.TorchEngine", None)  # nobody writes here
    model, _ = load(base / "checkpoint")
    program, url = stack.enter_context(serving(Script(model, max_model_len=4096)))
    config = stage(base, url, transport, steps=3, **keys)
    folder = tmp_path / "1-zero"
    with pytest.raises(Killed):
        rl.run(config, Context(folder, 0, {}, Silent(kill_at=2)))
    rl.run(config, Context(folder, 0, {}, Silent()))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row["logprob_gap/canary"] < 1e-5
        assert row["logprob_gap/fresh"] < 1e-5
        assert row["grad_norm"] > 0
        assert row["seconds/transfer"] > 0
    assert [row["step"] for row in rows if "eval/pass@1" in row] == [0, 3]
    assert (program.label, program.paused, program.writing, program.adapters) == ("3", False, {}, {})
    assert not (folder / "weights").exists()


@pytest.mark.parametrize(("bound", "groups"), [(None, 6), (0, 3), (2, 9)])
def test_a_server_has_work_during_an_update(
    bound: int | None, groups: int, base: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """A step's groups, and those of as many steps as it may be ahead, whatever the slots."""
    model, _ = load(base / "checkpoint")
    _, url = stack.enter_context(serving(Script(model, max_model_len=4096)))
    config = stage(base, url, steps=1, inflight=True, max_staleness=bound)
    with Policy(config, Context(tmp_path / "1-zero", 0, {}, Silent())) as policy:
        policy.write(0)
        assert policy.rollouts.next_index == groups


def test_a_stage_stops_when_its_weights_do_not_arrive(
    base: Path, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
    model, _ = load(base / "checkpoint")
    _, url = stack.enter_context(serving(Script(model, max_model_len=4096, deaf=True)))
    folder = tmp_path / "1-zero"
    with pytest.raises(NotArrived, match="did not reach the engine"):
        rl.run(stage(base, url, steps=9), Context(folder, 0, {}, Silent()))
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2  # the first step was sound, and the second was not begun
