"""The fast ways of computing what has an obvious way: products, replicas."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from torch.nn import functional as F

import liubai.learn.replicas
import liubai.model.matmul
from liubai.learn.replicas import Replicas
from liubai.model.matmul import Linear, linear, outer_product, prefers_onednn, product
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- matrix products ----


@pytest.fixture(params=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both libraries on every machine: oneDNN computes everywhere, it is only not faster everywhere."""
    asked: list[int] = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(liubai.model.matmul, "prefers_onednn", lambda: request.param == "onednn")
    monkeypatch.setattr(
        liubai.model.matmul, "_onednn", lambda *args: (asked.append(1), real(*args, "none", [], ""))[1]
    )
    yield
    assert bool(asked) == (request.param == "onednn")


@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 7), (3, 64, 16), (70, 9, 33), (33, 70, 128)])
@pytest.mark.usefixtures("library")
def test_products_in_any_layout(m: int, n: int, k: int) -> None:
    a, b = randn(m, k), randn(n, k, seed=1)
    wanted = a.double() @ b.double().T
    for x, y in itertools.product((a, a.T.contiguous().T), (b, b.T.contiguous().T)):
        torch.testing.assert_close(product(x, y).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        outer_product(a.T.contiguous(), b.T.contiguous()).double(), wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2, 5, 4)])
@pytest.mark.usefixtures("library")
def test_linear_is_that_of_torch(bias: bool, shape: tuple[int, ...]) -> None:
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
def test_linear_leaves_other_types_to_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(liubai.model.matmul, "prefers_onednn", lambda: True)
    x, weight = randn(3, 4, dtype=dtype), randn(6, 4, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_linear_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liubai.model.matmul, "prefers_onednn", lambda: True)
    x, weight = randn(0, 4).requires_grad_(), randn(6, 4).requires_grad_()
    out = linear(x, weight)
    assert out.shape == (0, 6)
    out.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("capability", "vendor", "wanted"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX512", None, False),
        ("AVX2", "AuthenticAMD", False),
    ],
)
def test_the_library_is_chosen_by_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: str, vendor: str | None, wanted: bool
) -> None:
    info = tmp_path / "cpuinfo"
    if vendor:
        info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(liubai.model.matmul, "CPUINFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    prefers_onednn.cache_clear()
    assert prefers_onednn() is wanted
    prefers_onednn.cache_clear()


@torch.no_grad()
def test_onednn_sees_few_numbers_of_rows_while_a_batch_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles a product for each."""
    rows: set[int] = set()
    real = torch.ops.mkldnn._linear_pointwise

    def counted(x: Tensor, *others: Any) -> Tensor:
        rows.add(x.shape[0])
        out: Tensor = real(x, *others, "none", [], "")
        return out

    monkeypatch.setattr(liubai.model.matmul, "prefers_onednn", lambda: True)
    monkeypatch.setattr(liubai.model.matmul, "_onednn", counted)
    engine = TorchEngine(tiny_model(1), eos_ids=[99], slots=40, max_length=64)
    engine.load(tiny_model(1).state_dict(), version=0)
    requests = [Request(id=i, prompt_ids=(5,), max_tokens=1 + i, seed=i) for i in range(40)]
    assert [len(s.completion_ids) for s in generate(engine, requests)] == list(range(1, 41))
    assert {32, 64} <= rows
    assert rows <= {1, 32, 64}  # 1: the prompt


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
def test_half_a_gradient_does_not_outlive_an_error() -> None:
    def fails(model: Transformer, items: Sequence[int]) -> list[tuple[int, Any]]:
        found = squares(model, items)
        if 5 in items:
            raise ArithmeticError
        return found

    replicas = Replicas(tiny_model(1))
    with pytest.raises(ArithmeticError):
        replicas.map(fails, [4, 5, 6])
    assert all(p.grad is None for m in replicas.models for p in m.parameters())


@pytest.mark.usefixtures("three_threads")
def test_what_is_frozen_stays_frozen_in_replicas() -> None:
    model = tiny_model(1)
    model.embed_tokens.weight.requires_grad_(False)
    Replicas(model).map(squares, [1, 2, 3])
    assert model.embed_tokens.weight.grad is None
    assert model.norm.weight.grad is not None


@pytest.mark.usefixtures("three_threads")
def test_a_large_model_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(1)
    for fit in (5, 2):
        monkeypatch.setattr(liubai.learn.replicas, "LARGEST", fit * model.count_parameters())
        assert len(Replicas(model).models) == min(fit, 3)
    monkeypatch.setattr(liubai.learn.replicas, "LARGEST", model.count_parameters() - 1)
    replicas = Replicas(model)
    assert [m is model for _, m in replicas.map(squares, [1, 2, 3])] == [True] * 3
