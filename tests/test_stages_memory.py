"""Where memory runs out, numbers are not finite or nothing was graded, a stage goes on, says so, and learns
what it would have learned; what cannot go on ends in one sentence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import Killed, Silent, tiny_config, tiny_model
from pydantic import ValidationError
from safetensors.torch import load_file
from test_memory import cpu_error
from test_stages import HABITS, POLICY, SHAPE, metrics_of, run
from torch import Tensor

from liubai.errors import Diverged, UserError
from liubai.learn.packing import Batch, Sequence1, micro_batches
from liubai.model.checkpoint import load
from liubai.model.transformer import Transformer, causal
from liubai.seeds import derive
from liubai.stages import distill, ppo, pretrain, sft
from liubai.stages.context import TENSORS, Context
from liubai.stages.policy import Policy
from liubai.stages.records import write_examples
from liubai.stages.rollouts import GradedGroup
from liubai.stages.supervised import pair_batches, require_room
from liubai.types import Group, Reward

#: their texts are short
FAMILIES = {"greater": 2.0, "errand": 1.0}


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models, and answers to learn from, right and wrong."""
    folder = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)
        for name, steps in (("base", 40), ("small", 10)):
            config = pretrain.Config(
                steps=steps, tokens_per_step=1024, model=SHAPE, families=FAMILIES, habits=HABITS
            )
            pretrain.run(config, Context(folder / name, 0, {}, Silent()))
    (folder / "answers").mkdir()
    examples = sft.careful(FAMILIES, 40, 0)
    spoilt = [
        replace(e, response=e.response.replace("<answer> ", "<answer> 9 "), score=0.0) for e in examples
    ]
    write_examples(folder / "answers" / "examples.jsonl", {e.prompt: e for e in examples}.values())
    write_examples(folder / "answers" / "graded.jsonl", [*examples, *spoilt])
    return folder


def memory_of(
    monkeypatch: pytest.MonkeyPatch, tokens: int, *, reading: bool, first: Literal["any", "gradient"] = "any"
) -> list[int]:
    """A machine whose memory ends at micro-batches of so many tokens, after a first larger one, or after the
    first larger one with a gradient, which must not stay. Engines are let alone, and without ``reading`` all
    that has no gradient. Returns the sizes that were asked for."""
    hidden, asked, full = Transformer.hidden, list[int](), False

    def bounded(self: Transformer, ids: Tensor, *args: Any) -> Tensor:
        nonlocal full
        learns = torch.is_grad_enabled()
        if not torch.is_inference_mode_enabled() and (reading or learns):
            asked.append(ids.numel())
            if ids.numel() > tokens:
                if full:
                    raise cpu_error()
                full = learns or first == "any"
        return hidden(self, ids, *args)

    monkeypatch.setattr(Transformer, "hidden", bounded)
    return asked


def weights_of(folder: Path) -> dict[str, Tensor]:
    (path,) = [p for p in folder.rglob("model.safetensors") if "state" not in p.parts]
    return load_file(path)


def warnings_of(folder: Path) -> list[str]:
    path = folder / "warnings.jsonl"
    return [json.loads(line)["message"] for line in path.read_text().splitlines()] if path.exists() else []


SUPERVISED = ("sft", "sft with lora", "reward model", "safety model", "process model", "dpo")


@pytest.mark.parametrize("name", SUPERVISED)
def test_examples_are_learned_in_halves_where_memory_runs_out(
    name: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bits of a run that was told so from the start; and a resume point knows what it was told."""
    changes: dict[str, Any] = {"batch": 32, "epochs": 3.0, "save_every": 1}
    small = run(name, few, tmp_path / "small", tokens_per_microbatch=160, **changes)
    with monkeypatch.context() as patch:
        memory_of(patch, 200, reading=name not in ("reward model", "safety model", "process model"))
        halved = run(name, few, tmp_path / "halved", tokens_per_microbatch=320, **changes)
        with pytest.raises(Killed):
            run(name, few, tmp_path / "killed", kill_at=2, tokens_per_microbatch=320, **changes)
    run(name, few, tmp_path / "killed", tokens_per_microbatch=320, **changes)
    wanted, found = weights_of(small), weights_of(halved)
    for key in wanted:
        # DPO's reference is read in other parts, and may differ in the last bit
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-4 if name == "dpo" else 0)
    assert warnings_of(small) == []
    assert warnings_of(halved) == [
        "step 1: memory ran out; micro-batches now have 160 tokens. Nothing was lost"
    ]
    assert weights_of(tmp_path / "killed").keys() == found.keys()
    assert all(torch.equal(t, found[key]) for key, t in weights_of(tmp_path / "killed").items())


def test_a_base_is_made_in_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"steps": 3, "tokens_per_step": 512, "model": SHAPE, "families": FAMILIES}
    small, halved = (pretrain.Config(**options, tokens_per_microbatch=tokens) for tokens in (64, 256))
    pretrain.run(small, Context(tmp_path / "small", 0, {}, Silent()))
    memory_of(monkeypatch, 80, reading=True)
    pretrain.run(halved, Context(tmp_path / "halved", 0, {}, Silent()))
    wanted = weights_of(tmp_path / "small")
    assert all(torch.equal(t, wanted[n]) for n, t in weights_of(tmp_path / "halved").items())


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_an_example_that_does_not_fit_is_said(
    name: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_of(monkeypatch, 8, reading=False)
    with pytest.raises(UserError, match="not even one example alone fits the memory; set checkpointing"):
        run(name, few, tmp_path / "s")


def test_a_resume_point_with_lora_holds_adapters_alone(few: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run("sft with lora", few, tmp_path / "s", kill_at=2)
    saved = load_file(tmp_path / "s" / "state" / TENSORS)
    assert {n.rpartition(".")[2] for n in saved if n.startswith("model/")} == {"lora_a", "lora_b"}


def test_pairs_are_whole_and_the_longest_come_first() -> None:
    pairs = [
        (Sequence1([i] * a, [True] * a), Sequence1([i + 50] * b, [True] * b))
        for i, (a, b) in enumerate([(3, 4), (9, 2), (5, 5), (1, 9), (2, 2), (30, 1)])
    ]
    found = pair_batches(pairs, 0, 36)
    assert [lot for lot, _ in found] == [[5], [1, 3], [2, 0, 4]]
    for lot, batch in found:
        assert batch.ids_BT[:, 0].tolist() == [n for i in lot for n in (i, i + 50)]
    assert pair_batches([], 0, 36) == []


def test_the_reference_of_dpo_is_read_in_micro_batches(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = memory_of(monkeypatch, 10**9, reading=True)
    folder = run("dpo", few, tmp_path / "s", tokens_per_microbatch=200)
    assert max(asked) <= 200
    rows = metrics_of(folder)
    measured = [row["step"] for row in rows if "eval/accuracy" in row]
    assert measured == sorted({*range(2, len(rows) + 1, 2), len(rows)})


def test_dpo_comes_to_like_the_right_one_of_held_out_pairs(few: Path, tmp_path: Path) -> None:
    folder = run("dpo", few, tmp_path / "s", epochs=6.0, lr=3e-3)
    assert metrics_of(folder)[-1]["eval/accuracy"] >= 0.8


# ---- answers ----


@pytest.mark.parametrize("first", ["any", "gradient"])
@pytest.mark.parametrize("name", ["ppo", "distill"])
def test_answers_are_learned_in_halves_where_memory_runs_out(
    name: str,
    first: Literal["any", "gradient"],
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: dict[str, Any] = {"steps": 2, "groups": 4, "lr": 1e-4}
    if name == "ppo":
        changes |= {"critic_warmup": 0, "critic_lr": 1e-4}
    small = run(name, few, tmp_path / "small", tokens_per_microbatch=64, **changes)
    memory_of(monkeypatch, 90, reading=True, first=first)
    halved = run(name, few, tmp_path / "halved", tokens_per_microbatch=256, **changes)
    wanted = weights_of(small)
    for key, tensor in weights_of(halved).items():
        torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=2e-5)
    rows = metrics_of(halved)
    assert [row.pop("halvings", 0) for row in rows] == [0, 2, 0]
    for row, plain in zip(rows, metrics_of(small), strict=True):
        assert row == pytest.approx(plain, rel=1e-2, abs=1e-4)
    assert warnings_of(halved) == [
        "step 1: memory ran out; micro-batches now have 64 tokens. Nothing was lost"
    ]


def ungraded(groups: list[GradedGroup]) -> list[GradedGroup]:
    def without(group: Group) -> Group:
        return replace(group, rewards=tuple(Reward({"error": 0.0}, 0.0) for _ in group.rewards))

    return [replace(g, group=without(g.group)) for g in groups]


def test_a_step_without_a_verdict_teaches_nothing(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, before, after = Policy.write, list[Tensor](), list[Tensor]()

    def failing(self: Policy, step: int, *args: Any) -> list[GradedGroup]:
        (before if step == 1 else after).append(self.model.head_weight.detach().clone())
        graded = write(self, step, *args)
        return ungraded(graded) if step == 1 else graded

    monkeypatch.setattr(Policy, "write", failing)
    rows = metrics_of(run("ppo", few, tmp_path / "s", steps=3, critic_warmup=0))
    assert ["critic/loss" in row for row in rows] == [False, True, False, True]
    assert ["loss" in row for row in rows] == [False, True, False, True]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(before[0], after[1])


def critic_of(few: Path, folder: Path, **changes: Any) -> tuple[ppo.Critic, list[GradedGroup]]:
    """One, and answers for it to read."""
    policy = Policy(ppo.Config(**POLICY | changes), Context(folder, 0, {"base": few / "base"}, Silent()))
    with policy:
        return ppo.Critic(policy.config, policy, derive(0, "critic")), policy.write(0)  # type: ignore[arg-type]


def test_what_is_not_finite_changes_no_critic(few: Path, tmp_path: Path) -> None:
    critic, graded = critic_of(few, tmp_path / "s", critic_epochs=3)
    groups = [g.group for g in graded]
    critic.learn(critic.judge(groups)[1], 1.0)
    _, good = critic.judge(groups)
    bad = [*good[:-1], spoiled(good[-1])]
    kept = [p.detach().clone() for p in critic.scorer.parameters()]
    for _ in range(2):
        assert math.isnan(critic.learn(bad, 1.0)["critic/grad_norm"])
    assert all(torch.equal(p, q) for p, q in zip(kept, critic.scorer.parameters(), strict=True))
    critic.learn(good, 1.0)  # in a row, it says
    assert not all(torch.equal(p, q) for p, q in zip(kept, critic.scorer.parameters(), strict=True))
    critic.learn(bad, 1.0)
    critic.learn(bad, 1.0)
    with pytest.raises(Diverged, match=r"the critic had 3 steps in a row .* lower critic_lr"):
        critic.learn(bad, 1.0)
    assert len(warnings_of(tmp_path / "s")) == 5


def spoiled(batch: Batch) -> Batch:
    returns_BT = batch.values["returns"].clone()
    returns_BT[batch.mask_BT] = math.nan
    return replace(batch, values={**batch.values, "returns": returns_BT})


def test_a_critic_that_diverges_is_named(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed on the way, it is counted on."""
    made = ppo.scorer_from

    def broken(*args: Any) -> Any:
        scorer = made(*args)
        torch.nn.init.constant_(scorer.norm.weight, math.nan)
        return scorer

    monkeypatch.setattr(ppo, "scorer_from", broken)
    with pytest.raises(Killed):
        run("ppo", few, tmp_path / "s", kill_at=2, save_every=1)
    with pytest.raises(Diverged, match="lower critic_lr"):
        run("ppo", few, tmp_path / "s", save_every=1)
    assert len(metrics_of(tmp_path / "s")) == 3  # a look, and two steps


def test_a_critic_saves_memory_as_it_is_told(few: Path, tmp_path: Path) -> None:
    critic, _ = critic_of(few, tmp_path / "s", checkpointing=True, optimizer_state="bfloat16")
    assert critic.scorer.checkpointing
    assert {t.dtype for n, t in critic.optimizer.state.items()} == {torch.bfloat16}


def test_a_divergence_that_is_not_finite_changes_nothing(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reverse_kl = distill.reverse_kl
    monkeypatch.setattr(distill, "reverse_kl", lambda *x: reverse_kl(*x) * math.nan)
    with pytest.raises(Diverged, match="3 steps in a row had no finite gradient"):
        run("distill", few, tmp_path / "s", save_every=1)
    saved = load_file(tmp_path / "s" / "state" / TENSORS)
    began = load(few / "small" / "checkpoint")[0]
    assert all(torch.equal(p, saved[f"model/{n}"]) for n, p in began.named_parameters())
    assert [row["skipped"] for row in metrics_of(tmp_path / "s")[1:]] == [1, 1]


def test_a_divergence_that_was_not_finite_is_forgotten(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, reverse_kl = distill.learn, distill.reverse_kl

    def learned(
        policy: Policy, imitation: Any, batches: list[Batch], shares: int, step: int
    ) -> dict[str, float]:
        if step == 1:
            imitation.kl = lambda *x: reverse_kl(*x) * math.nan
        return learn(policy, imitation, batches, shares, step)

    monkeypatch.setattr(distill, "learn", learned)
    rows = metrics_of(run("distill", few, tmp_path / "s", steps=3))
    assert [row["skipped"] for row in rows[1:]] == [0, 1, 0]
    assert warnings_of(tmp_path / "s") == ["step 2: 1 of 1 gradients were not finite; those changed nothing"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_rows_of_no_token_are_not_compared(tied: bool, kl: Literal["reverse", "forward"]) -> None:
    """Of either model, and even if the student wrote one."""
    config = tiny_config(tie_word_embeddings=tied)
    student, teacher = tiny_model(0, config), tiny_model(1, config)
    sequences = [
        Sequence1([*range(5, 5 + n)], [False] * 3 + [True] * (n - 3), {"weights": [0.1] * n}) for n in (9, 6)
    ]
    batches = micro_batches(sequences, 0, 64)
    wanted = distill.Imitation(teacher, kl).learn(student, batches)
    for one, other in ((student, padded(teacher)), (padded(student), teacher)):
        one.zero_grad()
        assert distill.Imitation(other, kl).learn(one, batches) == pytest.approx(wanted, rel=1e-5)
        gradient = one.head_weight.grad
        assert gradient is not None
        assert gradient[:60].abs().sum() > 0
        assert gradient[60:].abs().sum() == 0
    odd = micro_batches([Sequence1([5, 6, 63, 7], [False, True, True, True], {"weights": [1.0] * 4})], 0, 64)
    assert math.isfinite(distill.Imitation(teacher, kl).learn(padded(student), odd)[0])


def padded(model: Transformer) -> Transformer:
    """The same with four more rows."""
    wide = tiny_model(2, replace(model.config, vocab_size=64))
    with torch.no_grad():
        for p, q in zip(wide.parameters(), model.parameters(), strict=True):
            p[: len(q)] = q
    return wide


# ---- what does not fit together ----


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ppo.Config(steps=1, loss={"aggregation": "token-mean", "kl": 0.1}), "ppo has no reference"),
        (lambda: distill.Config(steps=1, minibatches=2), "one optimizer step"),
    ],
)
def test_what_would_be_ignored_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        make()


@pytest.mark.parametrize("name", ["sft", "reward model", "process model", "dpo"])
def test_examples_longer_than_the_model_are_refused(name: str, few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "few")
    path = tmp_path / "few" / "base" / "checkpoint" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    with pytest.raises(UserError, match=r"an example has \d+ tokens, and the model 16 positions"):
        run(name, tmp_path / "few", tmp_path / "s")
    model = tiny_model(0)
    room = model.config.max_position_embeddings
    require_room(model, [Sequence1([1] * room, [True] * room)])
    require_room(model, [])


# ---- threads ----


class Raced(Transformer):
    """Another thread puts its shorter table in the place of every one that is made."""

    @property
    def _rope(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 8), torch.zeros(1, 8)

    @_rope.setter
    def _rope(self, table: tuple[Tensor, Tensor]) -> None: ...


def test_a_thread_turns_by_the_table_that_it_made() -> None:
    plain = tiny_model(0)
    raced = Raced(plain.config)
    raced.load_state_dict(plain.state_dict())
    ids_BT = torch.arange(30)[None]
    positions_BT = torch.arange(30)[None]
    assert torch.equal(
        raced.hidden(ids_BT, positions_BT, causal()), plain.hidden(ids_BT, positions_BT, causal())
    )
