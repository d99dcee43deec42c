"""The RL stage end to end on a model of a few thousand weights: reproducible, resumable, upright."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Killed, Silent

import liubai.stages.rl as rl
from liubai.errors import Diverged
from liubai.grade import RewardWeights
from liubai.learn.update import update
from liubai.model.checkpoint import load
from liubai.model.lora import load_adapter, merged
from liubai.rollout.engine import Request
from liubai.rollout.torch_engine import TorchEngine
from liubai.stages.context import Context
from liubai.stages.policy import lr_scale
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Group, Sample

#: An untrained model is never right: the length is what its answers differ in.
REWARDS = RewardWeights(overlong=-0.5, overlong_from=0.0)


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


def config_of(**changes: Any) -> rl.Config:
    plain: dict[str, Any] = {
        "groups": 3,
        "samples": 4,
        "max_tokens": 24,
        "slots": 8,
        "lr": 3e-3,
        "eval_every": 2,
        "eval_problems": 3,
        "eval_samples": 2,
        "probes": 2,
        "save_every": 2,
        "rewards": REWARDS,
    }
    return rl.Config(**rl.Config.filled(plain | changes))


def run(config: rl.Config, folder: Path, base: Path, *, seed: int = 0, kill_at: int | None = None) -> Path:
    context = Context(folder, seed, {"base": base}, Silent(kill_at), stage="zero")
    try:
        rl.run(config, context)
    finally:
        context.close()
    return folder


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """Without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = re.compile(r"time|tokens/s|seconds/.*")
    return [{n: v for n, v in row.items() if not clock.fullmatch(n)} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics_of(a) == metrics_of(b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    for path in (a / "checkpoint").iterdir():
        assert path.read_bytes() == (b / "checkpoint" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("inflight", [False, True])
def test_same_seed_same_metrics(inflight: bool, base: Path, tmp_path: Path) -> None:
    config = config_of(steps=2, inflight=inflight)
    first, same = (run(config, tmp_path / name, base) for name in ("first", "same"))
    assert_same_run(first, same)
    rows = metrics_of(first)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["grad_norm"] > 0 and row["update_tokens"] > 0 for row in rows[1:])
    before, after = (load(f / "checkpoint")[0].head_weight for f in (base, first))
    assert not torch.equal(before, after)
    assert metrics_of(run(config, tmp_path / "other", base, seed=1)) != rows


def test_lora_leaves_an_adapter_and_a_merged_checkpoint(base: Path, tmp_path: Path) -> None:
    folder = run(config_of(steps=2, lora={"rank": 3, "targets": ["q_proj", "up_proj"]}), tmp_path / "a", base)
    began, ended = load(base / "checkpoint")[0], load(folder / "checkpoint")[0]
    changed = {
        name
        for (name, p), q in zip(began.named_parameters(), ended.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert {name.rsplit(".", 2)[-2] for name in changed} == {"q_proj", "up_proj"}
    assert load_adapter(folder / "adapter", began).rank == 3
    for name, tensor in merged(began).items():
        assert torch.equal(tensor, ended.state_dict()[name])


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"tokens_per_microbatch": 64},
    "inflight": {"inflight": True},
    "everything": {
        "inflight": True,
        "minibatches": 2,
        "warmup": 3,
        "decay": 0.5,
        "shuffle_rewards": True,
        "reference_every": 3,
        "loss": {"aggregation": "sequence-mean", "kl": 0.05, "importance": "truncate"},
    },
    "sixteen bits": {
        "precision": "bfloat16",
        "optimizer_state": "bfloat16",
        "checkpointing": True,
        "tokens_per_microbatch": 64,
        "inflight": True,
    },
    "menu": {
        "preset": "reinforce++",
        "refills": 2,
        "lora": {"rank": 2},
        "loss": {"entropy_bonus": 0.01, "top_entropy": 0.5},
    },
}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("way", "threads"), [*((way, 1) for way in WAYS), ("plain", 3)], indirect=["threads"]
)
@pytest.mark.usefixtures("threads")
def test_resume_is_bit_exact(way: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first save, right after one, in the middle of a step, and again."""
    config = config_of(steps=7, **WAYS[way])
    whole = run(config, tmp_path / "whole", base)
    folder = tmp_path / "killed"
    for kill_at in (1, 3, 6):  # nothing is saved yet; step 2 is saved; logged, but not yet saved
        with pytest.raises(Killed):
            run(config, folder, base, kill_at=kill_at)

    calls = 0

    def dies(*arguments: Any, **options: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 2:  # answers are written and graded, nothing is learned yet
            raise Killed
        return update(*arguments, **options)

    monkeypatch.setattr(rl, "update", dies)
    with pytest.raises(Killed):
        run(config, folder, base)
    monkeypatch.setattr(rl, "update", update)
    assert json.loads((folder / "state" / "meta.json").read_text())["step"] == 4
    run(config, folder, base)
    assert_same_run(folder, whole)
    assert metrics_of(folder)[-1]["tokens"] == sum(row["step_tokens"] for row in metrics_of(whole)[1:])


@pytest.mark.parametrize("inflight", [False, True])
def test_no_completion_is_ever_retokenised(
    inflight: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are all that is ever encoded, and learning gets the very samples that were written."""
    encode, step = TextTokenizer.encode, TorchEngine.step
    written: dict[int, Sample] = {}
    learned: list[Sample] = []

    def only_prompts(self: TextTokenizer, text: str) -> list[int]:
        # bare questions, too: to see that the tokenizer can read them
        assert re.fullmatch(r"(<\|start\|> )?\d \d \d ->\d+( <think>)?", text), f"encoded: {text!r}"
        return encode(self, text)

    def never(self: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
        raise AssertionError("encoded a batch of texts")

    def stepping(self: TorchEngine) -> list[tuple[Request, Sample]]:
        finished = step(self)
        written.update((id(sample), sample) for _, sample in finished)
        return finished

    def learning(model: Any, optimizer: Any, groups: Sequence[Group], *a: Any, **b: Any) -> dict[str, float]:
        learned.extend(s for g in groups for s in g.samples)
        return update(model, optimizer, groups, *a, **b)

    monkeypatch.setattr(TextTokenizer, "encode", only_prompts)
    monkeypatch.setattr(TorchEngine, "step", stepping)
    monkeypatch.setattr(rl, "update", learning)
    run(config_of(steps=2, inflight=inflight), tmp_path / "run", base)
    assert len(learned) == 2 * 3 * 4
    assert all(written.get(id(s)) is s for s in learned)


def test_without_the_blank_the_prompt_closes_the_thought(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, texts = TextTokenizer.encode, list[str]()

    def noting(self: TextTokenizer, text: str) -> list[int]:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(TextTokenizer, "encode", noting)
    run(config_of(steps=1, blank=False), tmp_path / "run", base)
    prompts = [text for text in texts if text.startswith("<|start|>")]
    assert prompts
    assert all(text.endswith(" <think> </think>") for text in prompts)


def test_three_nonfinite_steps_in_a_row_stop_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = iter([1, 1, 0, 1, 1, 1])

    def learning(*arguments: Any, **options: Any) -> dict[str, float]:
        return update(*arguments, **options) | {"skipped": next(skipped)}

    monkeypatch.setattr(rl, "update", learning)
    view = Silent()
    context = Context(tmp_path / "run", 0, {"base": base}, view, stage="zero")
    with pytest.raises(Diverged, match="3 steps in a row"):
        rl.run(config_of(steps=9), context)
    assert next(skipped, None) is None
    assert len(view.warnings) == 5
    assert "step 1: 1 of 1 gradients were not finite" in view.warnings[0]


def test_learning_rate_rises_and_falls() -> None:
    config = config_of(steps=8, warmup=3, decay=0.25)
    assert [lr_scale(config, step) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5]
    assert [lr_scale(config_of(steps=3), step) for step in range(3)] == [1.0] * 3


def test_rl_raises_the_reward(base: Path, tmp_path: Path) -> None:
    """The sign of everything at once: where only brevity pays, answers become short."""
    config = config_of(steps=14, groups=6, samples=8, lr=1e-2, slots=48, eval_every=100)
    rows = metrics_of(run(config, tmp_path / "run", base))[1:]
    assert rows[-1]["reward/overlong"] > rows[0]["reward/overlong"] + 0.1
    assert rows[-1]["length/mean"] < 0.6 * rows[0]["length/mean"]
