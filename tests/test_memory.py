"""What training needs memory for, and what happens when there is too little: never another result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from test_rl import config_of, metrics_of, run
from test_update import EOS, settings_of, some_groups
from torch import Tensor

import liubai.learn.logprobs
import liubai.learn.optim
import liubai.learn.update
import liubai.model.transformer
from liubai.errors import UserError, is_out_of_memory
from liubai.learn.logprobs import token_logprobs
from liubai.learn.memory import halved
from liubai.learn.optim import Optimizer
from liubai.learn.packing import Sequence1
from liubai.learn.prompts import SharedPrompt
from liubai.learn.update import UpdateConfig, batch_logprobs, lots, update
from liubai.model.transformer import Transformer, causal
from liubai.rollout.engine import Request
from liubai.rollout.torch_engine import TorchEngine


def updated(
    config: UpdateConfig, reference: Transformer | None = None
) -> tuple[Transformer, dict[str, float]]:
    model = tiny_model(0)
    # eps above the float noise of the gradients: a weight without one may not be thrown by ±lr
    optimizer = Optimizer(model, lr=3e-3, eps=1e-4)
    return model, update(model, optimizer, some_groups(), config, version=9, pad_id=EOS, reference=reference)


def only_up_to(tokens: int, error: Callable[[], RuntimeError]) -> Callable[..., Any]:
    """The real thing, on a machine whose memory ends at micro-batches of so many tokens."""

    def bounded(model: Transformer, batch: Any, *args: Any, **options: Any) -> Any:
        if batch.ids_BT.numel() > tokens:
            raise error()
        return batch_logprobs(model, batch, *args, **options)

    return bounded


def cpu_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    return caught.value


@pytest.mark.parametrize("error", [lambda: torch.OutOfMemoryError("CUDA out of memory"), cpu_error])
@pytest.mark.parametrize("share_from", [1, 1000])
@pytest.mark.parametrize("loss", [{}, {"importance": "truncate"}])
def test_out_of_memory_halves_micro_batches_and_changes_nothing(
    error: Callable[[], RuntimeError],
    share_from: int,
    loss: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Short rows come last, so there are gradients already when the long ones do not fit, or the reverse."""
    config = settings_of(share_from=share_from, tokens_per_microbatch=400, loss=loss)
    wanted, plain = updated(config)
    monkeypatch.setattr(liubai.learn.update, "batch_logprobs", only_up_to(130, error))
    found, metrics = updated(config)
    assert metrics.pop("halvings") == 2
    assert metrics == pytest.approx(plain, rel=1e-4, abs=1e-6)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_a_kl_in_the_reward_has_halved_is_learned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is read first, and of all answers, also where none of them teaches."""
    config = settings_of(loss={"kl": 0.1, "kl_estimator": "k1", "kl_in": "reward"}, tokens_per_microbatch=400)
    wanted, plain = updated(config, reference=tiny_model(2))
    monkeypatch.setattr(liubai.learn.update, "batch_logprobs", only_up_to(130, cpu_error))
    found, metrics = updated(config, reference=tiny_model(2))
    assert metrics.pop("halvings") == 2
    assert metrics == pytest.approx(plain, rel=1e-4, abs=1e-6)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    groups = [replace(g, rewards=(g.rewards[0],) * len(g.rewards)) for g in some_groups()]
    model = tiny_model(0)
    idle = update(
        model, Optimizer(model, lr=1e-2), groups, config, version=9, pad_id=EOS, reference=tiny_model(2)
    )
    assert (idle["zero_variance"], idle["halvings"]) == (1.0, 2)


def test_a_row_that_does_not_fit_is_said_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liubai.learn.update, "batch_logprobs", only_up_to(50, cpu_error))
    model = tiny_model(0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"not even one row of \d+ tokens fits the memory; set checkpointing"):
        update(model, Optimizer(model, lr=1e-2), some_groups(), settings_of(), version=9, pad_id=EOS)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(caught.value)
    assert is_out_of_memory(cpu_error())


def test_a_run_goes_on_with_smaller_micro_batches(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(steps=3, tokens_per_microbatch=256)
    wanted = metrics_of(run(config, tmp_path / "a", base))
    monkeypatch.setattr(liubai.learn.update, "batch_logprobs", only_up_to(100, cpu_error))
    folder = run(config, tmp_path / "b", base)
    found = metrics_of(folder)
    assert [row.pop("halvings", 0) for row in found] == [0, 2, 0, 0]  # learned once
    for row, plain in zip(found, wanted, strict=True):
        assert row == pytest.approx(plain, rel=1e-2, abs=1e-4)
    said = (folder / "warnings.jsonl").read_text()
    assert "step 1: memory ran out; micro-batches now have 64 tokens" in said


# ---- activations ----


def backward(model: Transformer, prompt: int) -> None:
    """Of rows that continue a prompt."""
    ids_BT = torch.randint(60, (3, 40), generator=torch.Generator().manual_seed(1))
    positions_BT = torch.arange(prompt, prompt + 40).expand_as(ids_BT)
    shared = SharedPrompt(model, range(prompt)) if prompt else None
    hidden = model.hidden(ids_BT, positions_BT, shared.attend if shared else causal())
    lp, _ = token_logprobs(hidden.flatten(0, 1), model.head_weight, ids_BT.flatten())
    lp.square().sum().backward()  # type: ignore[no-untyped-call]
    if shared:
        shared.backward()


def gradients(model: Transformer, prompt: int) -> tuple[dict[str, Tensor], int]:
    """Gradients of rows that continue a prompt, and the bytes that were kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        backward(model, prompt)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("prompt", [0, 30])
def test_checkpointing_changes_no_bit_and_keeps_little(prompt: int) -> None:
    model = tiny_model(0)
    wanted, plain = gradients(model, prompt)
    model.checkpointing = True
    found, little = gradients(model, prompt)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert little < plain / 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_large_vocabulary_learns_the_same_by_rows(
    tied: bool, dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three backward passes, two of them behind a prompt; in 16 bits by way of the optimizer."""
    norms, after = [], []
    for many in (1 << 60, 1):
        monkeypatch.setattr(liubai.model.transformer, "MANY", many)
        model = tiny_model(0, tiny_config(tie_word_embeddings=tied)).to(dtype)
        model.checkpointing = checkpointing
        optimizer = Optimizer(model, lr=1e-2, eps=1.0)  # linear in the gradient
        for prompt in (0, 30, 30):
            backward(model, prompt)
        norms.append(optimizer.step())
        after.append(optimizer.state["embed_tokens.weight/first"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-4)


def test_chunks_of_a_sixteen_bit_head_come_together_in_thirty_two(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = (torch.randn(n, 16, generator=generator).bfloat16() for n in (512, 40))
    targets_N = torch.randint(40, (512,), generator=generator)
    found = []
    for numbers in (1 << 24, 40):  # all tokens at once, one at a time
        monkeypatch.setattr(liubai.learn.logprobs, "CHUNK_LOGITS", numbers)
        leaf = weight_VD.clone().requires_grad_()
        token_logprobs(hidden_ND, leaf, targets_N)[0].sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        found.append(leaf.grad.float())
    assert (found[0] - found[1]).norm() < 0.005 * found[0].norm()  # 4.5 % if added up in 16 bits


def test_the_half_of_what_is_attended_to() -> None:
    """A long row alone must not hide short rows that continue a far longer prompt."""
    alone = lots([Sequence1(list(range(600)), [False] + [True] * 599)], settings_of(), EOS)
    prompt = [Sequence1([5] * 8010, [False] * 8000 + [True] * 10) for _ in range(50)]
    many = lots(prompt, settings_of(tokens_per_microbatch=10**6), EOS)
    assert [len(b.ids_BT) for b in many[0].batches] == [50]
    smaller = halved(alone + many)
    assert [len(b.ids_BT) for lot in smaller for b in lot.batches] == [1, 25, 25]


def test_a_gradient_of_rows_alone_reaches_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No head took part: what the embedding learned is sparse."""
    after = []
    for many in (1 << 60, 1):
        monkeypatch.setattr(liubai.model.transformer, "MANY", many)
        model = tiny_model(0)
        ids_BT = torch.arange(12).view(2, 6)
        hidden = model.hidden(ids_BT, torch.arange(6).expand(2, 6), causal())
        hidden.square().mul(torch.arange(hidden.shape[-1])).sum().backward()  # type: ignore[no-untyped-call]
        Optimizer(model, lr=1e-2).step()
        after.append(model.embed_tokens.weight.detach())
    assert torch.equal(*after)


# ---- the optimizer ----


def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    after = []
    for block in (1 << 20, 7):
        monkeypatch.setattr(liubai.learn.optim, "BLOCK", block)
        after.append(updated(settings_of(minibatches=2))[0].state_dict())
    assert all(torch.equal(after[0][n], after[1][n]) for n in after[0])


def test_sixteen_bits_keep_small_steps() -> None:
    """A step of 1e-4 from 1.0 is lost in bfloat16; a master copy adds them up."""
    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = Optimizer(model, lr=1e-4)
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    torch.testing.assert_close(model.weight.float(), torch.full((4, 4), 0.99), atol=4e-3, rtol=0)
    torch.testing.assert_close(optimizer.state["weight/master"], torch.full((4, 4), 0.99), atol=1e-4, rtol=0)


def test_gradients_of_sixteen_bits_come_together_in_thirty_two() -> None:
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = Optimizer(model, lr=1.0, max_norm=1e9)
    for _ in range(1000):  # in bfloat16 the sum would end at 256
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert optimizer.step() == 1000
    assert model.weight.grad is None
    assert optimizer.step() == 0  # and none is left


def test_a_checkpoint_holds_the_masters() -> None:
    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    optimizer = Optimizer(model, lr=1e-5)
    before = model.weight.detach().float()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    optimizer.widen_parameters()
    assert model.weight.dtype == torch.float32
    torch.testing.assert_close(model.weight.detach(), before - 1e-5, rtol=0, atol=1e-8)


def test_small_moments_find_nearly_the_same_weights() -> None:
    wide, narrow = (tiny_model(0) for _ in range(2))
    optimizers = [Optimizer(wide, lr=1e-2), Optimizer(narrow, lr=1e-2, moments=torch.bfloat16)]
    start = copy.deepcopy(wide.state_dict())
    for step in range(20):
        for model, optimizer in zip((wide, narrow), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator) + 0.3
            optimizer.step()
    assert {t.dtype for n, t in optimizers[1].state.items()} == {torch.bfloat16}
    moved = torch.cat([(p - start[n]).flatten() for n, p in wide.named_parameters()])
    apart = torch.cat(
        [(p - q).flatten() for p, q in zip(wide.parameters(), narrow.parameters(), strict=True)]
    )
    assert apart.norm() < 0.02 * moved.norm()


# ---- the engine ----


def test_an_engine_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(0)
    engine = TorchEngine(model, eos_ids=[EOS], slots=8, max_length=64)
    engine.load(model.state_dict(), version=0)
    engine.submit([Request(id=0, prompt_ids=(5, 6), max_tokens=4, seed=0)])

    real = torch.zeros

    def full(*shape: Any, **options: Any) -> Tensor:
        if isinstance(shape[0], tuple) and len(shape[0]) == 5:  # the cache
            raise cpu_error()
        return real(*shape, **options)

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(UserError, match=r"keys and values of 1 answers of up to 64 tokens.*lower slots"):
        engine.step()
