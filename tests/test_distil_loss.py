"""Divergences from a teacher: the whole softmax in float64 against chunks of logits in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import liubai.learn.distil
import liubai.learn.logprobs
from liubai.errors import UserError
from liubai.learn.distil import forward_kl, reverse_kl

f64 = torch.float64
KINDS = (reverse_kl, forward_kl)
CHUNKS = (1 << 24, 120, 40, 1)  # all at once, three tokens, one token, and less than one

N, V, D, E = 8, 20, 5, 7


def inputs(seed: int, tokens: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states and projections of the student, then of a teacher that is wider."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, D), (V, D), (tokens, E), (V, E))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def plain(kind: Callable[..., Tensor], x: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Token by token and word by word in float64, on the student's tensors and a teacher without gradient."""
    student, weight, teacher, teacher_weight = (t.detach().double() for t in x)
    student.requires_grad_(), weight.requires_grad_()
    totals = []
    for n in range(len(student)):
        ours, theirs = weight @ student[n], teacher_weight @ teacher[n]
        p, q = ours.exp() / ours.exp().sum(), theirs.exp() / theirs.exp().sum()
        if kind is forward_kl:
            p, q = q, p
        totals.append(sum((p[v] * (p[v] / q[v]).log() for v in range(V)), torch.zeros((), dtype=f64)))
    return torch.stack(totals), [student, weight]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_divergence_and_gradient_equal_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[..., Tensor], chunk: int
) -> None:
    monkeypatch.setattr(liubai.learn.logprobs, "CHUNK_LOGITS", chunk)
    x = inputs(0)
    got = kind(*x)
    wanted, wide = plain(kind, x)
    assert got.dtype == torch.float32
    assert got.shape == (N,)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    cotangent = torch.linspace(-1, 2, N)
    gradients = torch.autograd.grad((got * cotangent).sum(), x, allow_unused=True)
    assert gradients[2] is gradients[3] is None  # the teacher learns nothing
    theirs = torch.autograd.grad((wanted * cotangent).sum(), wide)
    for mine, other in zip(gradients[:2], theirs, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


def test_divergences_of_worked_numbers() -> None:
    """A student of 1/2 and 1/2, a teacher of 1/4 and 3/4; the logits are the hidden states themselves."""
    x = torch.zeros(1, 2), torch.eye(2), torch.tensor([[0.25, 0.75]]).log(), torch.eye(2)
    assert reverse_kl(*x).item() == pytest.approx(0.5 * torch.tensor(4 / 3).log().item(), rel=1e-5)
    assert forward_kl(*x).item() == pytest.approx(0.130812, rel=1e-5)  # ¼ ln ½ + ¾ ln 3/2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_the_two_divergences_are_each_other_seen_from_the_other_side(seed: int) -> None:
    student, weight, teacher, teacher_weight = (t.detach() for t in inputs(seed))
    reverse = reverse_kl(student, weight, teacher, teacher_weight)
    torch.testing.assert_close(forward_kl(teacher, teacher_weight, student, weight), reverse)
    assert bool((reverse >= -1e-6).all())
    for kind in KINDS:
        assert float(kind(student, weight, student, weight).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_no_gradient(kind: Callable[..., Tensor]) -> None:
    student, weight, *_ = inputs(1)
    loss = kind(student, weight, student.detach(), weight.detach())
    for gradient in torch.autograd.grad(loss.sum(), [student, weight]):
        assert float(gradient.abs().max()) < 1e-5


def test_the_reverse_seeks_a_mode_and_the_forward_covers_all() -> None:
    """A teacher that says a or b, never c. A student of a alone costs little one way, much the other."""
    eye = torch.eye(3)
    teacher = torch.tensor([[0.4999, 0.4999, 0.0002]]).log()
    narrow, broad = torch.tensor([[0.9996, 0.0002, 0.0002], [0.3333, 0.3333, 0.3334]]).log().split(1)
    assert reverse_kl(narrow, eye, teacher, eye) < reverse_kl(broad, eye, teacher, eye)
    assert forward_kl(narrow, eye, teacher, eye) > forward_kl(broad, eye, teacher, eye)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, f64])
def test_other_precisions_give_float32(kind: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = inputs(2, dtype=dtype)
    got = kind(*x)
    assert got.dtype == torch.float32
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.double(), plain(kind, x)[0], rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(got.sum(), x[0])
    assert gradient.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind: Callable[..., Tensor]) -> None:
    x = [t.detach() * 100 for t in inputs(3)]
    x[0].requires_grad_()
    loss = kind(*x)
    assert bool(loss.isfinite().all())
    assert bool(torch.autograd.grad(loss.sum(), x[0])[0].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_at_all(kind: Callable[..., Tensor]) -> None:
    x = inputs(4, tokens=0)
    got = kind(*x)
    assert got.shape == (0,)
    assert torch.autograd.grad(got.sum(), x[0])[0].shape == (0, D)


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more logits at a time than asked for, those of both models counted; and none are kept."""
    monkeypatch.setattr(liubai.learn.logprobs, "CHUNK_LOGITS", 10 * V)
    sizes: list[int] = []
    linear = liubai.learn.distil.linear

    def watched(*args: Any) -> Tensor:
        sizes.append((logits := linear(*args)).numel())
        return logits

    monkeypatch.setattr(liubai.learn.distil, "linear", watched)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x = inputs(5, tokens=64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = reverse_kl(*x).sum()
    assert max(sizes) == 5 * V  # two models
    assert len(sizes) == 2 * 13
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept}
    assert sum(storages.values()) <= sum(t.numel() for t in x) + 64 < 64 * V
    loss.backward()
    assert len(sizes) == 4 * 13  # computed again on the way back, as small
    assert max(sizes) == 5 * V
    sizes.clear()
    monkeypatch.setattr(liubai.learn.logprobs, "CHUNK_LOGITS", 1 << 24)
    reverse_kl(*x).sum().backward()
    assert len(sizes) == 2  # one chunk is small enough to keep


@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies_of_two_sizes_are_refused(kind: Callable[..., Tensor]) -> None:
    student, weight, teacher, teacher_weight = inputs(6)
    with pytest.raises(UserError, match=r"has 20 tokens, the teacher's 19: take a teacher with"):
        kind(student, weight, teacher, teacher_weight[:19])


@pytest.mark.parametrize(("kind", "beta"), [(forward_kl, 0), (reverse_kl, 1)])
def test_divergence_and_gradient_equal_trl(kind: Callable[..., Tensor], beta: int) -> None:
    """TRL's generalised Jensen–Shannon divergence (GKD) is one of the two at its ends."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl.experimental.gkd import GKDTrainer

    x = inputs(7)
    student, weight, teacher, teacher_weight = x
    logits = (student @ weight.T)[None], (teacher @ teacher_weight.T)[None].detach()
    wanted = GKDTrainer.generalized_jsd_loss(*logits, beta=beta, reduction="sum")
    got = kind(*x).sum()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    for mine, other in zip(*(torch.autograd.grad(t, x[:2]) for t in (got, wanted)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_a_sixteen_bit_head_come_together_in_thirty_two(
    kind: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liubai.learn.logprobs, "CHUNK_LOGITS", 2 * V)  # one token at a time
    x = [t.detach() for t in inputs(8, tokens=512, dtype=torch.bfloat16)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        weight_VD = x[1].to(dtype).requires_grad_()
        kind(x[0].to(dtype), weight_VD, x[2].to(dtype), x[3].to(dtype)).sum().backward()  # type: ignore[no-untyped-call]
        assert weight_VD.grad is not None
        assert weight_VD.grad.dtype == dtype
        found.append(weight_VD.grad.float())
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()
