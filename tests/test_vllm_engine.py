"""The engine protocol over the real vLLM, on a CPU: in this process and as a server. ``make test-vllm``.

What is asked of it: every token has the trainer's log-probability under the weights that are said to have
written it, whichever way these came.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Silent, naive_logprobs, scramble, tiny_config, tiny_model
from families import prompts, save_family
from test_model import fit

from liubai.errors import UserError
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.lora import LoraConfig, attach
from liubai.model.transformer import Transformer
from liubai.rollout.canary import Canary, NotArrived
from liubai.rollout.engine import Request, StaleWeights, generate
from liubai.rollout.engines import EngineConfig, canary_for, engine_for
from liubai.rollout.outside import OutsideEngine
from liubai.rollout.server_engine import Server
from liubai.seeds import derive
from liubai.stages import rl
from liubai.stages.context import Context
from liubai.text.template import BARE
from liubai.text.tokenizer import TextTokenizer
from liubai.types import Sample, Stop

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

ROOM = 160
TEMPERATURE = 0.8
#: log-probabilities of two programs in float32 differ by a hundredth of this
CLOSE = 1e-4
LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(
    folder: Path, model: Transformer, stack: ExitStack, lora: LoraConfig | None = None, **keys: Any
) -> OutsideEngine:
    engine = engine_for(
        EngineConfig(kind="vllm", **keys),
        model,
        parent=folder,
        eos_ids=(),
        slots=16,
        max_length=ROOM,
        folder=folder.parent / "weights",
        lora=lora,
        stack=stack,
    )
    assert isinstance(engine, OutsideEngine)
    return engine


def asked(model: Transformer, tokens: int = 12, copies: int = 2) -> list[Request]:
    return [
        Request(id=i, prompt_ids=tuple(ids), max_tokens=tokens, seed=derive(0, i), temperature=TEMPERATURE)
        for i, ids in enumerate(prompts(model) * copies)
    ]


def gap(model: Transformer, sample: Sample) -> float:
    said = torch.tensor(sample.logprobs, dtype=torch.float64)
    return float((naive_logprobs(model, sample, TEMPERATURE) - said).abs().max())


def changed(model: Transformer, seed: int) -> None:
    """What a large update does, to what is trained."""
    if any(name.endswith("lora_b") for name, _ in model.named_parameters()):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if name.endswith("lora_b"):
                    p.normal_(0.0, 0.3, generator=generator)
    else:
        scramble(model, seed, 2.5)


@pytest.mark.parametrize(
    ("family", "transport", "lora"),
    [
        ("Qwen3-8B", "folder", None),
        ("Qwen3-0.6B", "folder", None),  # its head is the embedding
        ("Qwen3-0.6B", "native", None),
        ("Qwen2.5-7B", "native", None),  # with biases
        ("Llama-3.1-8B", "folder", LORA),  # merged on the way
        ("Qwen3-0.6B", "native", LORA),
        ("Qwen3-8B", "lora", LORA),
        ("Qwen3-0.6B", "lora", LORA),
    ],
)
def test_new_weights_arrive(
    family: str,
    transport: Any,
    lora: LoraConfig | None,
    tmp_path: Path,
    stack: ExitStack,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, _ = save_family(family, tmp_path / "c")
    if lora:
        attach(model, lora, seed=0)
        changed(model, 3)
    engine = opened(tmp_path / "c", model, stack, lora, transport=transport)
    with pytest.raises(StaleWeights, match="no weights yet"):
        engine.step()
    before: list[Sample] = []
    for version in range(3):
        if version:
            changed(model, 10 + version)
        engine.load(model.state_dict(), version)
        samples = generate(engine, asked(model))
        assert max(gap(model, s) for s in samples) < CLOSE
        assert {span.version for s in samples for span in s.versions} == {version}
        assert all(len(s.completion_ids) == 12 and s.stop is Stop.LENGTH for s in samples)
        assert [s.completion_ids for s in samples] != [s.completion_ids for s in before]
        before = samples
    with pytest.raises(StaleWeights, match="not newer"):
        engine.load(model.state_dict(), 2)
    stack.close()
    assert not (tmp_path / "weights").exists()
    said = capfd.readouterr()
    assert "it/s" not in said.out + said.err  # a bar for each transfer


def test_answers_go_on_under_new_weights(tmp_path: Path, stack: ExitStack) -> None:
    model, _ = save_family("Qwen3-0.6B", tmp_path / "c")
    policies = [copy.deepcopy(model)]
    engine = opened(tmp_path / "c", model, stack, transport="native")
    engine.load(model.state_dict(), 0)
    engine.submit(asked(model, tokens=40, copies=6))
    done: dict[int, Sample] = {}
    for version, steps in ((1, 9), (2, 36)):
        for _ in range(steps):
            done.update((r.id, s) for r, s in engine.step())
        changed(model, version)
        policies.append(copy.deepcopy(model))
        engine.load(model.state_dict(), version)
    while engine.pending:
        done.update((r.id, s) for r, s in engine.step())
    assert sorted(done) == list(range(24))
    seen = set()
    for s in done.values():
        seen.add(tuple(span.version for span in s.versions))
        at = 0
        for span in s.versions:
            wanted = naive_logprobs(policies[span.version], s, TEMPERATURE)[at : at + span.count].tolist()
            assert list(s.logprobs[at : at + span.count]) == pytest.approx(wanted, abs=CLOSE)
            at += span.count
        assert at == len(s.completion_ids) == 40
    assert seen == {(0, 1), (1, 2)}  # 16 slots, 24 answers


def test_ends_withdrawals_and_going_on(tmp_path: Path, stack: ExitStack) -> None:
    model, _ = save_family("Qwen3-8B", tmp_path / "c")
    engine = opened(tmp_path / "c", model, stack)
    engine.load(model.state_dict(), 0)
    first = generate(engine, asked(model, tokens=30))
    # the same again: its own seeds alone decide, and the fourth token ends it now
    ends = [s.completion_ids[3] for s in first]
    again = [
        Request(**{**_fields(r), "stop_ids": (end,)})
        for r, end in zip(asked(model, tokens=30), ends, strict=True)
    ]
    for sample, plain, end in zip(generate(engine, again), first, ends, strict=True):
        n = plain.completion_ids.index(end) + 1
        assert (sample.stop, sample.completion_ids) == (Stop.EOS, plain.completion_ids[:n])
    # fresh tokens are the answer's, in order, with their alternatives
    curious = [Request(**{**_fields(r), "alternatives": 3}) for r in asked(model, tokens=6)]
    engine.submit(curious)
    told: dict[int, list[Any]] = {r.id: [] for r in curious}
    done: dict[int, Sample] = {}
    while engine.pending:
        done.update((r.id, s) for r, s in engine.step())
        for token in engine.fresh():
            told[token.id].append(token)
    for id, sample in done.items():
        assert [t.token for t in told[id]] == list(sample.completion_ids)
        assert all(len(t.alternatives) == 3 for t in told[id])
        assert all(t.alternatives[0][1] >= t.logprob - 1e-6 for t in told[id])
    # withdrawn, and taken up by another engine's books
    engine.submit(asked(model, tokens=30))
    for _ in range(5):
        engine.step()
    gone = {r.id: s for r, s in engine.cancel([1, 2, 99])}
    assert set(gone) == {1, 2}
    assert all(s.stop is Stop.ABORT and s.completion_ids for s in gone.values())
    partials = engine.partials()
    assert {p.request.id for p in partials} == {0, 3, 4, 5, 6, 7}
    assert all(p.completion_ids for p in partials)
    engine.abort()
    assert engine.pending == 0
    engine.resume(partials)
    finished = {}
    while engine.pending:
        finished.update((r.id, s) for r, s in engine.step())
    for p in partials:
        s = finished[p.request.id]
        assert s.completion_ids[: len(p.completion_ids)] == p.completion_ids
        assert len(s.completion_ids) == 30
        assert gap(model, s) < CLOSE
    # greedy is greedy, at the log-probabilities of temperature 1
    greedy = [Request(**{**_fields(r), "temperature": 0.0}) for r in asked(model)]
    for s in generate(engine, greedy):
        wanted = naive_logprobs(model, s, 1.0).tolist()
        assert list(s.logprobs) == pytest.approx(wanted, abs=CLOSE)
    with pytest.raises(ValueError, match="top_p"):
        engine.submit([Request(**{**_fields(curious[0]), "top_p": 0.9})])
    with pytest.raises(ValueError, match="holds 160"):
        engine.submit([Request(**{**_fields(curious[0]), "max_tokens": 160})])


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__dataclass_fields__}


def watched(engine: OutsideEngine, model: Transformer, config: EngineConfig) -> Any:
    canary = canary_for(config, engine, model, prompts(model), temperature=TEMPERATURE, max_tokens=40, seed=0)
    assert canary is not None
    return canary


def test_the_canary_sees_what_is_wrong_with_vllm(tmp_path: Path, stack: ExitStack) -> None:
    """Both faults in the real thing: weights that are sent and do not arrive, and another meaning of
    log-probability."""
    model, _ = save_family("Qwen3-0.6B", tmp_path / "c")
    engine = opened(tmp_path / "c", model, stack)
    canary = watched(engine, model, EngineConfig(kind="vllm"))
    for version in range(3):
        changed(model, version)
        engine.load(model.state_dict(), version)
        canary.look(version)
        assert canary.gap < 1e-4
    # a small step, lost on the way: nearer than the bound, and no token of the engine's has changed
    canary.bound = 10.0
    engine.receiver.reload = lambda folder: None  # type: ignore[method-assign]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    engine.load(model.state_dict(), 3)
    with pytest.raises(NotArrived, match="still answers as with version 2"):
        canary.look(3)
    canary.bound = 1e-3
    changed(model, 9)
    engine.load(model.state_dict(), 4)
    with pytest.raises(NotArrived, match=r"did not reach|disagree"):
        canary.look(4)
    stack.close()
    raw = opened(tmp_path / "c", model, stack, options={"logprobs_mode": "raw_logprobs"})
    raw.load(model.state_dict(), 0)
    with pytest.raises(NotArrived, match="processed_logprobs"):
        watched(raw, model, EngineConfig(kind="vllm")).look(0)


def test_a_stage_learns_from_answers_of_vllm(world: TextTokenizer, tmp_path: Path) -> None:
    model = tiny_model(1, fit(tiny_config(head_dim=32), world), scale=2.5)  # vLLM has no smaller heads
    save_checkpoint(tmp_path / "c", model, world, BARE)
    config = rl.Config(
        model=str(tmp_path / "c"),
        steps=2,
        groups=4,
        samples=4,
        max_tokens=24,
        inflight=True,
        slots=16,
        eval_problems=4,
        eval_samples=1,
        save_every=1,
        precision="float32",
        device="cpu",
        engine=EngineConfig(kind="vllm", transport="native"),
    )
    rl.run(config, Context(tmp_path / "rl", 0, {}, Silent()))
    lines = (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()
    numbers = [json.loads(line) for line in lines]
    assert [n["step"] for n in numbers] == [0, 1, 2]
    assert all(n["logprob_gap/canary"] < 1e-4 for n in numbers[1:])
    assert (tmp_path / "rl" / "checkpoint" / "model.safetensors").exists()
    assert not (tmp_path / "rl" / "weights").exists()


# ---- the same over HTTP ----


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A checkpoint and the address of an unmodified server of it. (``vllm serve`` by its module: the CPU
    build has another name, and the command asks for that of the package.)"""
    folder = tmp_path_factory.mktemp("served")
    save_family("Qwen3-8B", folder / "c")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    switches = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "c")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(ROOM), "--max-num-seqs", "16", "--enable-lora", "--max-loras", "2"]
    command += ["--enable-scale-out", "--generation-config", "vllm"]
    command += ["--logprobs-mode", "processed_logprobs"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **switches}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(400):
            try:
                Server(url).call("GET", "/health", timeout=5)
                break
            except UserError:
                assert process.poll() is None, (folder / "log").read_text()[-4000:]
                time.sleep(0.5)
        yield folder, url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def connected(
    served: tuple[Path, str],
    model: Transformer,
    stack: ExitStack,
    lora: LoraConfig | None = None,
    **keys: Any,
) -> tuple[OutsideEngine, Canary]:
    folder, url = served
    config = EngineConfig(kind="server", url=url, timeout=60, **keys)
    engine = engine_for(
        config,
        model,
        parent=folder / "c",
        eos_ids=(),
        slots=16,
        max_length=ROOM,
        folder=folder / "weights",
        lora=lora,
        stack=stack,
    )
    assert isinstance(engine, OutsideEngine)
    return engine, watched(engine, model, config)


@pytest.mark.parametrize("lora", [None, LORA], ids=["folder", "lora"])
def test_a_server_gets_new_weights_in_flight(
    served: tuple[Path, str], lora: LoraConfig | None, stack: ExitStack
) -> None:
    model, _ = load(served[0] / "c")
    if lora:
        attach(model, lora, seed=0)
        changed(model, 3)
    engine, canary = connected(served, model, stack, lora, transport="lora" if lora else "folder")
    policies = [copy.deepcopy(model)]
    engine.load(model.state_dict(), 0)
    canary.look(0)
    assert canary.gap < 1e-4
    requests = asked(model, tokens=88, copies=6)
    ends = {r.id: s.completion_ids[4] for r, s in zip(requests, generate(engine, requests), strict=True)}
    # the first four have an end of their own, early
    engine.submit(Request(**{**_fields(r), "stop_ids": (ends[r.id],) if r.id < 4 else ()}) for r in requests)
    done: dict[int, Sample] = {}
    while len(done) < 4:
        done.update((r.id, s) for r, s in engine.step())
    assert {done[i].stop for i in range(4)} == {Stop.EOS}
    assert len(engine.partials()) == 20  # which calls them back, and they go on
    changed(model, 21)
    policies.append(copy.deepcopy(model))
    engine.load(model.state_dict(), 1)
    canary.look(1)
    done.update((r.id, s) for r, s in engine.cancel([23]))
    while engine.pending:
        done.update((r.id, s) for r, s in engine.step())
    assert done.keys() | {23} == set(range(24))
    kinds = set()
    for s in done.values():
        at = 0
        kinds.add(tuple(span.version for span in s.versions))
        for span in s.versions:
            wanted = naive_logprobs(policies[span.version], s, TEMPERATURE)[at : at + span.count].tolist()
            assert list(s.logprobs[at : at + span.count]) == pytest.approx(wanted, abs=CLOSE)
            at += span.count
        assert s.stop is not Stop.LENGTH or at == 88
    assert kinds >= {(0,), (0, 1)}


def test_a_server_that_is_given_weights_by_somebody_else(served: tuple[Path, str], stack: ExitStack) -> None:
    model, _ = load(served[0] / "c")
    engine, canary = connected(served, model, stack)
    engine.load(model.state_dict(), 0)
    canary.look(0)
    url = served[1]
    Server(url).call("POST", "/update_weight_version", {"new_version": "another's"})
    with pytest.raises(UserError, match="another's"):
        generate(engine, asked(model))
