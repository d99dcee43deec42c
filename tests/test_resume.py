"""What a half-done stage goes on with: the settings that a message says to change, and nothing that it cannot
read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Silent
from safetensors.torch import load_file, save_file
from test_recipe import Heard
from test_smoke import without_times

from liubai import files
from liubai.errors import UserError
from liubai.grade import RewardWeights
from liubai.recipe import load_recipe, run
from liubai.recipe.marks import ENGINE_PLACE, PLACE, mark_of
from liubai.rollout.engines import EngineConfig
from liubai.stages import KINDS, policy, sampler, shards, stage_module
from liubai.stages.context import Context, read_meta
from liubai.stages.rl import Config

RECIPE = """
name = "half"
seed = 3
threads = 1
[stages.base]
kind = "pretrain"
steps = 8
tokens_per_step = 512
tokens_per_microbatch = 512
save_every = 2
precision = "bfloat16"
[stages.base.model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
[stages.after]
kind = "eval"
from = "base"
limit = 2
samples = 1
max_tokens = 8
"""


class Stopping(Heard):
    """Stops the run when the step is logged."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__()
        self.at = stage, step

    def update(self, stage: str, step: int, *_: Any) -> None:
        if (stage, step) == self.at:
            raise InterruptedError


CONFIG = policy.PolicyConfig(steps=1, groups=1, samples=2, max_tokens=16, eval_problems=2)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
    path = tmp_path / "half.toml"
    path.write_text(RECIPE)
    return path


def stopped(recipe: Path, out: Path, changes: Sequence[str] = ()) -> Path:
    with pytest.raises(InterruptedError):
        run(load_recipe(recipe, changes), out, Stopping("base", 5))
    return out


def test_a_stage_goes_on_with_smaller_micro_batches(recipe: Path, tmp_path: Path) -> None:
    """What it says when memory runs out may be followed: no step is learned again."""
    out, heard = stopped(recipe, tmp_path / "out"), Heard()
    fewer = ["base.tokens_per_microbatch=128", "base.checkpointing=true"]
    run(load_recipe(recipe, fewer), out, heard)
    assert heard.said[0] == (
        "base: continues after step 4, on another device or with other sizes than it began with: the last "
        "bits may differ"
    )
    run(load_recipe(recipe), tmp_path / "whole", Heard())
    rows, wanted = (
        without_times(folder / "1-base" / "metrics.jsonl") for folder in (out, tmp_path / "whole")
    )
    assert rows[:4] == wanted[:4]
    assert len(rows) == len(wanted) == 8
    for row, want in zip(rows, wanted, strict=True):
        assert row == pytest.approx(want, rel=2e-2)
    again = Heard()
    run(load_recipe(recipe, fewer), out, again)
    assert again.reused == {"base": True, "after": True}


def test_other_settings_begin_it_again(recipe: Path, tmp_path: Path) -> None:
    heard = Heard()
    run(load_recipe(recipe, ["base.lr=1e-3"]), stopped(recipe, tmp_path / "out"), heard)
    assert heard.said[0] == "base: was interrupted with other settings; begins again"


def test_a_stopped_stage_that_goes_on_has_the_bits_of_one_that_did_not(recipe: Path, tmp_path: Path) -> None:
    """In bfloat16, whose resume points hold float32."""
    out = stopped(recipe, tmp_path / "out")
    held = load_file(out / "1-base" / "state" / shards.TENSORS)
    assert {t.dtype for n, t in held.items() if n.startswith("model/")} == {
        held["optimizer/norm.weight/first"].dtype
    }
    assert not any(name.endswith("/master") for name in held)
    run(load_recipe(recipe), out, Heard())
    run(load_recipe(recipe), tmp_path / "whole", Heard())
    file = "1-base/checkpoint/model.safetensors"
    assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_resume_point_of_other_tensors_is_refused(recipe: Path, tmp_path: Path) -> None:
    """As an earlier version wrote them: masters beside the weights."""
    out = stopped(recipe, tmp_path / "out")
    state = out / "1-base" / "state"
    held = load_file(state / shards.TENSORS)
    save_file(
        held | {"optimizer/norm.weight/master": held["model/norm.weight"].clone()}, state / shards.TENSORS
    )
    meta = read_meta(state) | {"sha256": shards._digest([state / shards.TENSORS])}
    files.write_json(state / "meta.json", meta)
    with pytest.raises(UserError, match=r"holds other tensors .*norm.weight/master.* Delete the folder"):
        run(load_recipe(recipe), out, Heard())


def test_where_a_stage_computes_is_no_setting() -> None:
    def marks(**changes: Any) -> Any:
        server = {"kind": "server", "url": "http://127.0.0.1:8000"}
        config = Config(**{"steps": 1, "engine": server} | changes)
        return mark_of({"kind": "rl", "config": config.model_dump(mode="json")})

    usual = marks()
    moved = {
        "tokens_per_microbatch": 64, "checkpointing": True, "slots": 8, "device": "cpu", "compile": True,
        "grader_timeout": 9.0,
    }  # fmt: skip
    assert moved.keys() == PLACE
    elsewhere = {
        "url": "http://127.0.0.1:9000", "folder": "there", "address": "here", "timeout": 9.0,
        "gpu_memory_utilization": 0.4, "bound": 0.2,
    }  # fmt: skip
    assert elsewhere.keys() == ENGINE_PLACE
    for changes in ({key: value} for key, value in moved.items()):
        other = marks(**changes)
        assert other.fingerprint != usual.fingerprint
        assert other.settings == usual.settings
    assert marks(engine={"kind": "server"} | elsewhere).settings == usual.settings
    assert marks(engine={"kind": "server"} | elsewhere).fingerprint != usual.fingerprint
    for changes in (
        {"lr": 1e-2},
        {"max_tokens": 8},
        {"precision": "float32"},
        {"optimizer_state": "bfloat16"},
    ):
        assert marks(**changes).settings != usual.settings


def test_every_key_that_is_left_out_is_one() -> None:
    """None is left over from a key that has another name by now."""
    known = {name for kind in KINDS for name in stage_module(kind).Config.model_fields}
    assert known >= PLACE
    assert EngineConfig.model_fields.keys() >= ENGINE_PLACE


def test_the_state_says_with_which_settings_it_was_made(tmp_path: Path) -> None:
    context = Context(tmp_path / "s", 0, {}, Silent(), fingerprint="all", settings="most")
    context.save(1, {}, {})
    saved = json.loads((tmp_path / "s" / "state" / "meta.json").read_text())
    assert (saved["fingerprint"], saved["settings"]) == ("all", "most")


# ---- what a stage has opened ----


@pytest.mark.parametrize("fails", ["canary_for", "Elsewhere.rollouts"])
def test_an_engine_is_closed_when_something_else_fails(
    fails: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the stage's first step, too: nothing goes on in another process."""
    closed, made = list[str](), sampler.engine_for

    def opened(*args: Any, stack: ExitStack, **options: Any) -> Any:
        stack.callback(lambda: closed.append("engine"))
        return made(*args, stack=stack, **options)

    def failing(*args: Any, **options: Any) -> Any:
        assert not closed
        raise UserError("something else")

    monkeypatch.setattr(policy, "is_elsewhere", lambda *_: True)
    monkeypatch.setattr(sampler, "engine_for", opened)
    monkeypatch.setattr(f"liubai.stages.sampler.{fails}", failing)
    context = Context(tmp_path / "s", 0, {"base": base}, Silent())
    with pytest.raises(UserError, match="something else"), policy.Policy(CONFIG, context):
        raise AssertionError("it began")
    assert closed == ["engine"]


def test_what_does_not_fit_is_said_before_an_engine_is_opened(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: Any, **options: Any) -> Any:
        raise AssertionError("opened")

    monkeypatch.setattr(policy, "is_elsewhere", lambda *_: True)
    monkeypatch.setattr(sampler, "engine_for", opened)
    config = CONFIG.model_copy(update={"rewards": RewardWeights(faithful=1.0)})
    with pytest.raises(UserError, match="has no passages"):
        policy.Policy(config, Context(tmp_path / "s", 0, {"base": base}, Silent()))
