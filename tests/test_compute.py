"""Where a model runs and how: another device, another precision, compiled."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator

import pytest
import torch
from conftest import naive_logprobs, tiny_model

from liubai.errors import UserError
from liubai.learn.logprobs import token_logprobs
from liubai.model.attention import fused
from liubai.model.transformer import Transformer, causal
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.stages.config import Compute
from liubai.types import Sample


def test_training_on_a_gpu_stays_there_and_waits_for_nothing() -> None:
    """On a device that only has shapes: a tensor left on the CPU, or a number that is asked for in the
    middle, is an error."""
    model = tiny_model(0).to("meta")
    ids_BT = torch.zeros(2, 20, dtype=torch.long, device="meta")
    hidden = model.hidden(ids_BT, torch.arange(20, device="meta").expand_as(ids_BT), causal())
    lp, entropy = token_logprobs(hidden.flatten(0, 1), model.head_weight, ids_BT.flatten(), 1.0, True)
    (lp.sum() + entropy.sum()).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said() -> None:
    assert (Compute().where(), Compute().dtype()) == (torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=r'device = "cuda:1": PyTorch sees 0 GPUs here; set device = "cpu"'):
        Compute(device="cuda:1").where()


def written(model: Transformer) -> list[Sample]:
    engine = TorchEngine(model, eos_ids=[1], slots=12, max_length=64)
    engine.load(model.state_dict(), version=0)
    return generate(
        engine,
        [Request(id=i, prompt_ids=tuple(range(5, 8 + i % 5)), max_tokens=5 + i, seed=i) for i in range(20)],
    )


@pytest.fixture
def _stance() -> Iterator[None]:
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.usefixtures("_stance")
def test_compiled_decoding_writes_the_same_with_one_compilation() -> None:
    """Of any number of rows, in any layer; and training computes what it did."""
    model = tiny_model(0)
    plain = written(model)
    ids_BT = torch.arange(12).view(2, 6)
    logits = model(ids_BT)
    model.compile_decoding()
    torch.compiler.set_stance("fail_on_recompile")
    compiled = written(model)
    assert torch.equal(model(ids_BT), logits)
    assert [s.completion_ids for s in compiled] == [s.completion_ids for s in plain]
    for a, b in zip(compiled, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert model._decoding is not None


@pytest.mark.usefixtures("_stance")
def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> object:
        raise RuntimeError("InvalidCxxCompiler: none of g++\nand a long traceback")

    monkeypatch.setattr(torch, "compile", lambda part, **options: broken)
    with pytest.raises(UserError, match=r"does not work here \(InvalidCxxCompiler: none of g\+\+\)"):
        tiny_model(0).compile_decoding()


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("lead", [0, 7])
def test_every_kernel_computes_the_formula(groups: bool, lead: int) -> None:
    """Those that know grouped heads and those that do not, at a row's beginning and behind a prompt."""
    generator = torch.Generator().manual_seed(0)
    B, T, H, K, E = 2, 5, 6, 2, 8
    q = torch.randn(B, T, H, E, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(B, lead + T, K, E, generator=generator, dtype=torch.float64) for _ in range(2))
    found = fused(q, k, v, groups)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        seen = slice(0, lead + t + 1)
        weights = torch.softmax(k[b, seen, h // 3] @ q[b, t, h] * E**-0.5, 0)
        torch.testing.assert_close(found[b, t, h], weights @ v[b, seen, h // 3])


def test_sixteen_bits_write_what_training_reads() -> None:
    """Decoding and training round differently, but no more than 16 bits do: also with large scores."""
    model = tiny_model(0)
    for block in model.layers:
        block.self_attn.q_proj.weight.data *= 4
    model.bfloat16()
    gaps = [
        (torch.tensor(s.logprobs) - naive_logprobs(model, s).float()).abs().mean()
        for s in written(model)
        if len(s.completion_ids) > 1
    ]
    assert 0 < torch.stack(gaps).mean() < 0.02
