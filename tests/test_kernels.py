"""The compiled kernels, and the PyTorch code that they stand in for, against float64; doing without them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import Tensor

from liubai.learn.logprobs import token_logprobs
from liubai.model import kernels
from liubai.model.attention import SHORT, attention
from liubai.model.functions import rms_norm, rotate, swiglu
from liubai.model.transformer import rope_table
from liubai.rollout.engine import Request, generate
from liubai.rollout.sampling import sample
from liubai.rollout.torch_engine import TorchEngine

ABSENT = kernels.NoKernels("the test says so")
needs_kernels = pytest.mark.skipif(kernels.status() != "compiled", reason=f"kernels: {kernels.status()}")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=[pytest.param("compiled", marks=needs_kernels), "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways; the compiled one must have been gone."""
    called: list[str] = []
    real = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *a: (called.append(name), real(name, *a))[1])
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: ABSENT)
    yield
    assert bool(called) == (request.param == "compiled")


def close(got: Tensor, wanted: Tensor, factor: float = 1.0) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2e-5 * factor, atol=2e-6 * factor)


def same_gradients(
    f: Callable[..., Tensor], obvious: Callable[..., Tensor], inputs: list[Tensor], factor: float = 1.0
) -> None:
    """Values with and without gradients, and gradients, against ``obvious`` in float64."""
    narrow = [t.clone().requires_grad_() for t in inputs]
    wide = [t.double().requires_grad_() for t in inputs]
    got, wanted = f(*narrow), obvious(*wide)
    close(got, wanted, factor)
    with torch.no_grad():
        close(f(*narrow), wanted, factor)
    weights = randn(*got.shape, seed=99)
    mine = torch.autograd.grad(got, narrow, weights)
    theirs = torch.autograd.grad(wanted, wide, weights.double())
    for g, w in zip(mine, theirs, strict=True):
        close(g, w, factor * 5)


# ---- elementwise ----

SIZES = [(1, 8), (3, 7), (2, 5, 33), (300, 40)]  #: the last is shared among threads


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SIZES)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    def obvious(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    inputs = [randn(*shape), randn(shape[-1], seed=1)]
    same_gradients(lambda x, w: rms_norm(x, w, 1e-5), obvious, inputs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SIZES)
def test_swiglu(shape: tuple[int, ...]) -> None:
    inputs = [3 * randn(*shape), randn(*shape, seed=1)]
    same_gradients(swiglu, lambda gate, up: gate / (1 + torch.exp(-gate)) * up, inputs)


@pytest.mark.usefixtures("way")
def test_swiglu_at_the_ends_of_float() -> None:
    gate = torch.tensor(
        [-1e30, -200.0, -89.0, -87.0, -20.0, 0.0, 20.0, 89.0, 1e30, float("nan"), float("inf")]
    )
    got = swiglu(gate, torch.ones_like(gate))
    wanted = torch.nn.functional.silu(gate.double()).float()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("lead", [(5,), (2, 5), (40, 30)])
@pytest.mark.parametrize("strided", [False, True])
def test_rotate(lead: tuple[int, ...], strided: bool) -> None:
    cos, sin = (t[torch.arange(64) % 7][: lead[-1]].expand(*lead, 1, 16) for t in rope_table(64, 16, 100.0))
    cos, sin = cos.contiguous(), sin.contiguous()
    x = randn(*lead, 3, 16)
    if strided:  # as the gradient of keys comes from attention, heads first
        x = x.transpose(-2, -3).contiguous().transpose(-2, -3)

    def obvious(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, s = cos.double()[..., :8], sin.double()[..., 8:]
        return torch.cat([a * c - b * s, a * s + b * c], -1)

    same_gradients(lambda x: rotate(x, cos, sin), obvious, [x])


# ---- attention ----


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query after another."""
    (B, T, H, E), (S, K) = q.shape, k.shape[1:3]
    rows = []
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        g = h * K // H
        seen = S - T + t + 1
        weights = torch.softmax(k[b, :seen, g] @ q[b, t, h] / E**0.5, 0)
        rows.append(weights @ v[b, :seen, g])
    return torch.stack(rows).view(B, T, H, E)


#: T, lead, query heads, key heads, head size; tiles are 8 queries × 32 keys
ROWS = [
    (1, 0, 2, 1, 8),
    (5, 0, 4, 2, 8),
    (9, 3, 4, 2, 32),
    (8, 24, 6, 2, 20),
    (33, 1, 3, 3, 16),
    (40, 30, 2, 1, 40),
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("T", "lead", "H", "K", "E"), ROWS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_equals_a_loop(T: int, lead: int, H: int, K: int, E: int, scale: float) -> None:
    S = lead + T
    inputs = [scale * randn(2, T, H, E), randn(2, S, K, E, seed=1), randn(2, S, K, E, seed=2)]
    same_gradients(attention, one_by_one, inputs, factor=scale)


@needs_kernels
def test_long_rows_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    real = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *a: (called.append(name), real(name, *a))[1])
    for S, wanted in ((SHORT, ["attention"]), (SHORT + 1, [])):
        called.clear()
        with torch.no_grad():
            q, k = randn(1, 2, 2, 8), randn(1, S, 1, 8, seed=1)
            close(attention(q, k, k), one_by_one(q.double(), k.double(), k.double()))
        assert called == wanted


# ---- log-probabilities, sampling ----


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 3), (7, 33), (40, 423)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(tokens: int, vocabulary: int, temperature: float) -> None:
    targets = torch.arange(tokens) * 5 % vocabulary

    def obvious(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T / temperature).log_softmax(-1)[torch.arange(tokens), targets]

    inputs = [randn(tokens, 6), 5 * randn(vocabulary, 6, seed=1)]
    same_gradients(lambda h, w: token_logprobs(h, w, targets, temperature)[0], obvious, inputs, factor=3)
    entropy = token_logprobs(inputs[0], inputs[1], targets, temperature)[1]
    full = (inputs[0].double() @ inputs[1].double().T / temperature).log_softmax(-1)
    close(entropy, -(full.exp() * full).sum(-1), factor=3)


@pytest.mark.usefixtures("way")
def test_an_impossible_token_has_a_finite_surprise_and_a_broken_one_is_seen() -> None:
    hidden, weight = torch.tensor([[1.0], [float("nan")]]), torch.tensor([[0.0], [500.0]])
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([0, 0]))
    assert logprobs[0].item() == -500.0
    assert logprobs[1].isnan()  # else a step that must be skipped would be taken


@pytest.mark.usefixtures("way")
def test_sampling_inverts_the_cumulative_distribution() -> None:
    logits = 2 * randn(200, 57)
    u = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    temperatures = torch.tensor([1.0, 0.5, 0.0, 2.0]).repeat(50)
    ids, logprobs = sample(logits, u, temperatures)
    for row in range(200):
        t = float(temperatures[row])
        full = (logits[row].double() / (t or 1.0)).log_softmax(-1)
        cdf = full.exp().cumsum(-1)
        wanted = int(logits[row].argmax()) if t == 0 else int((cdf <= u[row]).sum())
        assert int(ids[row]) == wanted
        assert abs(float(logprobs[row]) - float(full[wanted])) < 1e-5


@pytest.mark.usefixtures("way")
def test_a_token_of_probability_0_is_never_sampled() -> None:
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 1:4] = 0.0
    u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, u, torch.ones(3))[0].tolist() == [1, 2, 3]


# ---- decoding ----


def written(head: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    model = tiny_model(5, tiny_config(head_dim=head, vocab_size=400))
    engine = TorchEngine(model, eos_ids=[1], slots=16, max_length=160)
    engine.load(model.state_dict(), version=0)
    requests = [
        Request(id=i, prompt_ids=tuple(range(2, 3 + i % 5)), max_tokens=10 + 5 * i, seed=i) for i in range(20)
    ]
    return [(s.completion_ids, s.logprobs) for s in generate(engine, requests)]


@needs_kernels
@pytest.mark.parametrize("head", [8, 32, 64, 128])
def test_an_engine_writes_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch, head: int) -> None:
    """Ragged answers through three bands; 64 and 128 are sizes that the kernel knows."""
    compiled = written(head)
    monkeypatch.setattr(kernels, "library", lambda: ABSENT)
    plain = written(head)
    assert [ids for ids, _ in compiled] == [ids for ids, _ in plain]
    assert max(len(ids) for ids, _ in plain) > 70
    for (_, a), (_, b) in zip(compiled, plain, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_results_do_not_depend_on_neighbours_or_threads() -> None:
    x, gate, logits, q, k = (
        randn(300, 64),
        randn(300, 64, seed=1),
        randn(300, 64, seed=2),
        randn(40, 20, 4, 16, seed=3),
        randn(40, 20, 2, 16, seed=4),
    )
    u = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def everything(a: int, b: int) -> list[Tensor]:
        rows = slice(a, b)
        one = torch.ones(b - a)
        return [
            rms_norm(x[rows], gate[0], 1e-5),
            swiglu(gate[rows], x[rows]),
            *sample(logits[rows], u[rows], one),
            *(
                t[:2]
                for t in kernels.attention(
                    q[a // 10 : b // 10 + 1], k[a // 10 : b // 10 + 1], k[a // 10 : b // 10 + 1]
                )
            ),
        ]

    before = torch.get_num_threads()
    with torch.no_grad():
        whole = everything(0, 300)
        torch.set_num_threads(1)
        alone = everything(0, 300)
        torch.set_num_threads(before)
        part = everything(0, 7)
    for w, a in zip(whole, alone, strict=True):
        assert torch.equal(w, a)
    for w, p in zip(whole[:4], part[:4], strict=True):
        assert torch.equal(w[:7], p)


# ---- where it cannot be built ----

PROGRAM = """
import torch
from liubai.model import kernels
from liubai.model.functions import swiglu
print(swiglu(torch.ones(3), torch.ones(3)).sum().item() > 2)
print(kernels.status())
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""


def fresh_process(tmp_path: Path, **environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("CC", "LIUBAI_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**clean, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_kernels
def test_it_is_built_once_and_shares_pytorchs_threads(tmp_path: Path) -> None:
    assert fresh_process(tmp_path) == ["True", "compiled", "1"]
    (built,) = (tmp_path / "cache" / "liubai").iterdir()
    stamp = built.stat().st_mtime_ns
    assert fresh_process(tmp_path)[1] == "compiled"
    assert built.stat().st_mtime_ns == stamp


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="elsewhere another reason comes first")
def test_every_reason_for_doing_without_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho out of luck >&2; exit 1\n')
    broken.chmod(0o755)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    told = {
        "LIUBAI_KERNELS=off": fresh_process(tmp_path, LIUBAI_KERNELS="off"),
        "no C compiler": fresh_process(tmp_path, CC="no-such-compiler"),
        "out of luck": fresh_process(tmp_path, CC=str(broken)),
        "no cache folder": fresh_process(tmp_path, XDG_CACHE_HOME=str(blocked)),
    }
    for reason, (works, status, _) in told.items():
        assert works == "True"
        assert status.startswith("none (")
        assert reason in status


def test_other_precisions_are_left_to_pytorch() -> None:
    assert not kernels.ready(torch.ones(2, dtype=torch.float64))
    assert not kernels.ready(torch.ones(2, dtype=torch.bfloat16))
    assert not kernels.ready(torch.ones(4, 2).T)
    model = tiny_model(1).double()
    assert model(torch.tensor([[1, 2]])).dtype == torch.float64
