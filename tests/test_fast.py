"""The fast ways of computing what has an obvious way: products, attention, replicas."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from torch.nn import functional as F

import liubai.learn.replicas
import liubai.model.attention
import liubai.model.matmul
from liubai.learn.replicas import Replicas
from liubai.model.attention import attention
from liubai.model.matmul import Linear, linear, outer_product, prefers_onednn, product
from liubai.model.transformer import Transformer


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- matrix products ----


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both libraries on every machine: oneDNN computes everywhere, it is only not faster everywhere."""
    monkeypatch.setattr(liubai.model.matmul, "prefers_onednn", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 7), (3, 64, 16), (70, 9, 33), (33, 70, 128)])
def test_products_in_any_layout(library: bool, m: int, n: int, k: int) -> None:
    a, b = randn(m, k), randn(n, k, seed=1)
    wanted = a.double() @ b.double().T
    for x, y in itertools.product((a, a.T.contiguous().T), (b, b.T.contiguous().T)):
        torch.testing.assert_close(product(x, y).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        outer_product(a.T.contiguous(), b.T.contiguous()).double(), wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 5, 4)])
def test_linear_is_that_of_torch(library: bool, bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = Linear(4, 6, bias=bias), randn(*shape).requires_grad_()
    with torch.no_grad():
        for number, p in enumerate(layer.parameters()):
            p.copy_(randn(*p.shape, seed=number))
        plain = layer(x)
    wide = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    wanted, got = F.linear(*wide), layer(x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.detach(), plain, rtol=1e-5, atol=1e-6)
    weights = randn(*got.shape, seed=9)
    got.backward(weights)
    wanted.backward(weights.double())
    for mine, theirs in zip((x, *layer.parameters()), wide, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_leaves_other_types_to_torch(library: bool, dtype: torch.dtype) -> None:
    x, weight = randn(3, 4, dtype=dtype), randn(6, 4, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert linear(x[:0], weight).shape == (0, 6)


def test_the_library_is_chosen_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus: dict[str, Callable[[], str]] = {name: lambda name=name: name for name in ("AVX2", "DEFAULT")}
    for capability in cpus.values():
        prefers_onednn.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", capability)
        assert not prefers_onednn()
    prefers_onednn.cache_clear()


# ---- attention ----


def obvious(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """One query after another."""
    (B, T, H, E), (S, K) = q.shape, k.shape[1:3]
    rows = []
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        g = h * K // H
        seen = [s for s in range(S - T + t + 1) if hidden is None or not hidden[b, s]]
        weights = torch.softmax(k[b, seen, g] @ q[b, t, h] / E**0.5, 0)
        rows.append(weights @ v[b, seen, g])
    return torch.stack(rows).view(B, T, H, E)


ATTENTION: list[tuple[int, int, int, int, bool]] = [
    # queries, lead, query heads, key heads, hidden
    (1, 0, 2, 1, False),
    (5, 0, 4, 2, False),
    (9, 3, 4, 2, True),
    (8, 4, 6, 2, False),
    (13, 1, 3, 3, True),
]


@pytest.mark.parametrize("way", ["blocks", "torch"])
@pytest.mark.parametrize(("T", "lead", "H", "K", "hide"), ATTENTION)
def test_attention_equals_a_loop(
    monkeypatch: pytest.MonkeyPatch, way: str, T: int, lead: int, H: int, K: int, hide: bool
) -> None:
    monkeypatch.setattr(liubai.model.attention, "BLOCK", 4)
    monkeypatch.setattr(liubai.model.attention, "SHORT", 99 if way == "blocks" else 0)
    hidden = None
    if hide:
        hidden = torch.zeros(2, lead + T, dtype=torch.bool)
        hidden[0, 0] = hidden[1, lead - 1] = True
    shapes = [(2, T, H, 8), (2, lead + T, K, 8), (2, lead + T, K, 8)]
    inputs = [
        randn(*s, seed=i, dtype=torch.float64).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for i, s in enumerate(shapes)
    ]
    got, wanted = attention(*inputs, hidden), obvious(*inputs, hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(attention(*inputs, hidden), wanted, rtol=1e-10, atol=1e-12)
    weights = randn(*got.shape, seed=7, dtype=torch.float64)
    gradients = [torch.autograd.grad(x, inputs, weights) for x in (got, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


# ---- replicas ----


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def squares(model: Transformer, items: Sequence[int]) -> list[tuple[int, Any]]:
    for i in items:
        (model(torch.tensor([[i, i + 1, 3]])) ** 2).mean().backward()
    return [(i, model) for i in items]


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("three_threads")
def test_replicas_have_the_gradient_of_one_model_and_the_same_one_every_time() -> None:
    items = list(range(10, 21))
    alone = tiny_model(1)
    squares(alone, items)
    sums = []
    for _ in range(3):
        model = tiny_model(1)
        replicas = Replicas(model)
        results = replicas.map(squares, items)
        assert [i for i, _ in results] == items
        assert len({id(m) for _, m in results}) == 3
        sums.append(gradients(model))
        assert torch.get_num_threads() == 3
        assert all(p.grad is None for m in replicas.models[1:] for p in m.parameters())
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(sums[0][name], gradient, rtol=1e-4, atol=1e-6)
        assert torch.equal(sums[0][name], sums[1][name])
        assert torch.equal(sums[0][name], sums[2][name])


@pytest.mark.usefixtures("three_threads")
def test_replicas_see_every_change_of_the_weights() -> None:
    model = tiny_model(1)
    replicas = Replicas(model)
    other = copy.deepcopy(tiny_model(2).state_dict())
    model.load_state_dict(other)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    for replica in replicas.models[1:]:
        for p, q in zip(model.parameters(), replica.parameters(), strict=True):
            assert p is not q
            assert p.data_ptr() == q.data_ptr()
    assert len(replicas.models) == 3


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_replica_is_raised_and_the_threads_are_given_back() -> None:
    def fails(model: Transformer, items: Sequence[int]) -> list[int]:
        if 5 in items:
            raise ArithmeticError("the second share")
        return list(items)

    with pytest.raises(ArithmeticError, match="the second share"):
        Replicas(tiny_model(1)).map(fails, [4, 5, 6])
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_a_large_model_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(1)
    monkeypatch.setattr(liubai.learn.replicas, "LARGEST", model.count_parameters())
    assert len(Replicas(model).models) == 3
    monkeypatch.setattr(liubai.learn.replicas, "LARGEST", model.count_parameters() - 1)
    replicas = Replicas(model)
    assert [m is model for _, m in replicas.map(squares, [1, 2, 3])] == [True] * 3
