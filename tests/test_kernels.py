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

from liubai.errors import Diverged
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


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were called."""
    names: list[str] = []
    real = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *a: (names.append(name), real(name, *a))[1])
    return names


@pytest.fixture(
    params=[
        pytest.param(1, marks=needs_kernels, id="compiled"),
        pytest.param(3, marks=needs_kernels, id="compiled, three threads"),
        pytest.param(0, id="torch"),
    ]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Both ways; 0 threads are PyTorch's code."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or 1)
    if not request.param:
        monkeypatch.setattr(kernels, "library", lambda: ABSENT)
    yield request.param
    torch.set_num_threads(before)


def close(got: Tensor, wanted: Tensor, factor: float = 1.0) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2e-5 * factor, atol=2e-6 * factor)


def same_gradients(
    f: Callable[..., Tensor], obvious: Callable[..., Tensor], inputs: list[Tensor], factor: float = 1.0
) -> None:
    """Values with and without gradients, and gradients twice, against ``obvious`` in float64; from a plain
    cotangent, one of stride 0, and a transposed one."""
    narrow = [t.clone().requires_grad_() for t in inputs]
    wide = [t.double().requires_grad_() for t in inputs]
    got, wanted = f(*narrow), obvious(*wide)
    close(got, wanted, factor)
    with torch.no_grad():
        close(f(*narrow), wanted, factor)
    weights = randn(*got.shape, seed=99)
    turned = weights.transpose(0, -1).contiguous().transpose(0, -1)
    for cotangent in (weights, torch.ones(()).expand(got.shape), turned, weights):
        mine = torch.autograd.grad(got, narrow, cotangent, retain_graph=True)
        theirs = torch.autograd.grad(wanted, wide, cotangent.double(), retain_graph=True)
        for g, w in zip(mine, theirs, strict=True):
            close(g, w, factor * 5)
    frozen = [t.clone().requires_grad_(i == 0) for i, t in enumerate(inputs)]
    (alone,) = torch.autograd.grad(f(*frozen), frozen[0], weights)
    close(alone, torch.autograd.grad(wanted, wide[0], weights.double())[0], factor * 5)


# ---- elementwise ----

SIZES = [(1, 8), (3, 7), (2, 5, 33), (300, 40)]  #: the last is worth sharing among threads


def went(way: int, called: list[str], *names: str) -> None:
    """Forward and backward, by these kernels and no other; or by none."""
    assert set(called) == (set(names) if way else set())


@pytest.mark.parametrize("shape", SIZES)
def test_rms_norm(shape: tuple[int, ...], way: int, called: list[str]) -> None:
    def obvious(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    inputs = [randn(*shape), randn(shape[-1], seed=1)]
    same_gradients(lambda x, w: rms_norm(x, w, 1e-5), obvious, inputs)
    went(way, called, "rms_norm", "rms_norm_backward")


@pytest.mark.parametrize("shape", SIZES)
def test_swiglu(shape: tuple[int, ...], way: int, called: list[str]) -> None:
    inputs = [3 * randn(*shape), randn(*shape, seed=1)]
    same_gradients(swiglu, lambda gate, up: gate / (1 + torch.exp(-gate)) * up, inputs)
    went(way, called, "swiglu", "swiglu_backward")


@pytest.mark.usefixtures("way")
def test_swiglu_at_the_ends_of_float() -> None:
    gate = torch.tensor(
        [-1e30, -200.0, -89.0, -87.0, -20.0, 0.0, 20.0, 89.0, 1e30, float("nan"), float("inf")]
    )
    got = swiglu(gate, torch.ones_like(gate))
    wanted = torch.nn.functional.silu(gate.double()).float()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("lead", [(5,), (2, 5), (40, 30)])
@pytest.mark.parametrize("strided", [False, True])
def test_rotate(lead: tuple[int, ...], strided: bool, way: int, called: list[str]) -> None:
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
    went(way, called, "rotate")


@pytest.mark.usefixtures("way")
def test_rotate_by_angles_that_rows_share() -> None:
    """A kernel that took one angle a row would read past the table."""
    cos, sin = (t[:5] for t in rope_table(64, 16, 100.0))
    x = randn(2, 5, 3, 16)
    whole = rotate(x, cos, sin)
    for row in range(2):
        close(whole[row], rotate(x[row], cos, sin))


@needs_kernels
def test_other_defaults_than_float32_change_nothing() -> None:
    cos, sin = rope_table(5, 16, 100.0)
    x = randn(5, 3, 16)
    wanted = rotate(x, cos, sin)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(rotate(x, cos, sin), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


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
    (70, 0, 4, 2, 16),
]


@pytest.mark.parametrize(("T", "lead", "H", "K", "E"), ROWS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_equals_a_loop(
    T: int, lead: int, H: int, K: int, E: int, scale: float, way: int, called: list[str]
) -> None:
    S = lead + T
    inputs = [scale * randn(2, T, H, E), randn(2, S, K, E, seed=1), randn(2, S, K, E, seed=2)]
    same_gradients(attention, one_by_one, inputs, factor=scale)
    went(way, called, "attention", "attention_backward")


@needs_kernels
def test_long_rows_go_to_pytorch(called: list[str]) -> None:
    for S, wanted in ((SHORT, ["attention"]), (SHORT + 1, [])):
        called.clear()
        with torch.no_grad():
            q, k = randn(1, 2, 2, 8), randn(1, S, 1, 8, seed=1)
            close(attention(q, k, k), one_by_one(q.double(), k.double(), k.double()))
        assert called == wanted


# ---- log-probabilities, sampling ----


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 3), (7, 33), (40, 423)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(
    tokens: int, vocabulary: int, temperature: float, way: int, called: list[str]
) -> None:
    targets = torch.arange(tokens) * 5 % vocabulary

    def obvious(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T / temperature).log_softmax(-1)[torch.arange(tokens), targets]

    inputs = [randn(tokens, 6), 5 * randn(vocabulary, 6, seed=1)]
    same_gradients(lambda h, w: token_logprobs(h, w, targets, temperature)[0], obvious, inputs, factor=3)
    entropy = token_logprobs(inputs[0], inputs[1], targets, temperature)[1]
    full = (inputs[0].double() @ inputs[1].double().T / temperature).log_softmax(-1)
    close(entropy, -(full.exp() * full).sum(-1), factor=3)
    went(way, called, "token_logprobs", "token_logprobs_backward")


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


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_have_no_next_token(temperature: float, broken: float) -> None:
    logits = randn(3, 5)
    logits[1, 2] = broken
    with pytest.raises(Diverged, match="not numbers"):
        sample(logits, torch.full((3,), 0.5, dtype=torch.float64), torch.full((3,), temperature))


@needs_kernels
@pytest.mark.parametrize("target", [-100, 5])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    with pytest.raises(kernels.BadValue):
        token_logprobs(randn(2, 3), randn(5, 3), torch.tensor([0, target]))


def misfits() -> dict[str, Callable[[], object]]:
    """Each would have C read or write past an end."""
    x, long = torch.ones(4, 8), torch.zeros(4, dtype=torch.long)
    q, k = torch.ones(2, 3, 4, 8), torch.ones(1, 3, 2, 8)
    cache, half = torch.ones(2, 2, 5, 8), torch.ones(4, dtype=torch.float64)
    row = torch.ones(2, 4, 8)
    return {
        "norm": lambda: kernels.rms_norm(x, torch.ones(7), 1e-5),
        "gate": lambda: kernels.swiglu(x, x[:2]),
        "batch": lambda: kernels.attention(q, k, k),
        "heads": lambda: kernels.attention(q, torch.ones(2, 3, 3, 8), torch.ones(2, 3, 3, 8)),
        "fewer keys": lambda: kernels.attention(q, torch.ones(2, 2, 2, 8), torch.ones(2, 2, 2, 8)),
        "draws": lambda: kernels.sample(x, half[:3], torch.ones(4)),
        "narrow draws": lambda: kernels.sample(x, torch.ones(4), torch.ones(4)),
        "strided draws": lambda: kernels.sample(x, half.repeat(2)[::2], torch.ones(4)),
        "narrow targets": lambda: kernels.token_logprobs(x, long.int(), 1.0),
        "few targets": lambda: kernels.token_logprobs(x, long[:3], 1.0),
        "few gradients": lambda: kernels.token_logprobs_backward(half[:3].float(), x, long, 1.0),
        "cache": lambda: kernels.decode_attention(
            row, row[:, :2], row[:, :2], long[:2], cache, cache[:1], row
        ),
        "places": lambda: kernels.decode_attention(row, row[:, :2], row[:, :2], long[:1], cache, cache, row),
    }


@needs_kernels
@pytest.mark.parametrize("case", misfits())
def test_tensors_that_do_not_fit_never_reach_c(case: str) -> None:
    with pytest.raises(ValueError, match="do not go together"):
        misfits()[case]()


@needs_kernels
@pytest.mark.parametrize("place", [-1, 5])
def test_a_place_outside_the_cache_is_refused(place: int) -> None:
    row, cache = torch.ones(1, 2, 8), torch.ones(1, 2, 5, 8)
    with pytest.raises(kernels.BadValue):
        kernels.decode_attention(row, row, row, torch.tensor([place]), cache, cache, row.clone())


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
@pytest.mark.parametrize("head", [8, 32, 64, 128, 256, 258])
def test_an_engine_writes_the_same_with_and_without(
    monkeypatch: pytest.MonkeyPatch, head: int, called: list[str]
) -> None:
    """Ragged answers through two bands; 32, 64 and 128 are sizes that the kernel knows, 258 is too large."""
    compiled = written(head)
    assert ("decode_attention" in called) == (head <= kernels.LARGEST_HEAD)
    assert "sample" in called
    torch.set_num_threads(3)
    assert [ids for ids, _ in written(head)] == [ids for ids, _ in compiled]
    torch.set_num_threads(1)
    monkeypatch.setattr(kernels, "library", lambda: ABSENT)
    plain = written(head)
    assert [ids for ids, _ in compiled] == [ids for ids, _ in plain]
    assert max(len(ids) for ids, _ in plain) > 70
    for (_, a), (_, b) in zip(compiled, plain, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_results_do_not_depend_on_neighbours_or_threads() -> None:
    x, gate, logits, weight = (
        randn(300, 64),
        randn(300, 64, seed=1),
        randn(300, 64, seed=2),
        randn(64, seed=5),
    )
    q, k = randn(300, 20, 4, 16, seed=3), randn(300, 20, 2, 16, seed=4)
    u = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cos, sin = (t[torch.arange(300) % 50] for t in rope_table(50, 16, 100.0))
    targets = torch.arange(300) % 64

    def everything(n: int) -> list[Tensor]:
        """The first n rows alone."""
        out, scale = kernels.rms_norm(x[:n], weight, 1e-5)
        attended, lse = kernels.attention(q[:n], k[:n], k[:n])
        probs = logits[:n].clone()
        cache = k[:n].transpose(1, 2).contiguous()
        decoded = torch.empty(n, 4, 16)
        kernels.decode_attention(q[:n, 0].contiguous(), k[:n, 0].contiguous(), k[:n, 1].contiguous(),
                                 torch.arange(300)[:n] % 20, cache, cache.clone(), decoded)  # fmt: skip
        return [
            out,
            kernels.rms_norm_backward(gate[:n], x[:n], scale, weight)[0],
            kernels.swiglu(gate[:n], x[:n]),
            *kernels.swiglu_backward(x[:n], gate[:n], x[:n]),
            kernels.rotate(q[:n, 0], cos[:n], sin[:n], 1),
            attended,
            *kernels.attention_backward(q[:n], q[:n], k[:n], k[:n], attended, lse),
            decoded,
            *kernels.token_logprobs(probs, targets[:n], 0.7),
            kernels.token_logprobs_backward(x[:n, 0].contiguous(), probs, targets[:n], 0.7),
            *kernels.sample(logits[:n], u[:n], torch.ones(n)),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        whole = everything(300)
        torch.set_num_threads(1)
        alone, part = everything(300), everything(7)
    finally:
        torch.set_num_threads(before)
    for w, a, p in zip(whole, alone, part, strict=True):
        assert torch.equal(w, a)
        assert torch.equal(w[:7], p)


@needs_kernels
def test_a_gradient_summed_by_threads_repeats() -> None:
    x, grad, weight = randn(999, 64), randn(999, 64, seed=1), randn(64, seed=2)
    scale = kernels.rms_norm(x, weight, 1e-5)[1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        sums = [kernels.rms_norm_backward(grad, x, scale, weight)[1] for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(s, sums[0]) for s in sums)
    close(sums[0], (grad.double() * x.double() * scale.double()).sum(0))


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


def test_where_there_is_gcc_the_kernels_compile() -> None:
    """A mistake in kernels.c would otherwise only make everything slower, and skip its tests."""
    assert "failed" not in kernels.status()


@needs_kernels
def test_it_is_built_once_and_shares_pytorchs_threads(tmp_path: Path) -> None:
    assert fresh_process(tmp_path) == ["True", "compiled", "1"]
    (built,) = (tmp_path / "cache" / "liubai").iterdir()
    stamp = built.stat().st_mtime_ns
    assert fresh_process(tmp_path)[1] == "compiled"
    assert built.stat().st_mtime_ns == stamp
    built.write_bytes(b"")  # a power cut
    assert fresh_process(tmp_path) == ["True", "compiled", "1"]
    built.parent.chmod(0o777)
    assert "not ours alone" in fresh_process(tmp_path)[1]


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
