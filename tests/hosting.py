"""A model in a process of its own, for tests: its folders, the host, and what is written without one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model

from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.scorer import save_scorer, scorer_from
from liubai.problems import FAMILIES
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.serve.host import Host
from liubai.stages.scoring import CALIBRATION
from liubai.text.template import BARE
from liubai.text.tokenizer import word_level
from liubai.types import Sample, Stop

SLOTS, WAITING = 4, 12
QUESTION = "make 1 4 3 ->7"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and two that judge."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = word_level(FAMILIES["make"].vocabulary)
    config = tiny_config(
        vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id
    )
    model = tiny_model(1, config)
    save_checkpoint(folder / "model", model, tokenizer, BARE)
    for i, judge in enumerate(("preference", "process")):
        scorer = scorer_from(tiny_model(7 + i, config), i)
        with torch.no_grad():
            scorer.score.weight *= 8
        save_scorer(folder / judge, scorer, tokenizer, BARE)
    (folder / "preference" / CALIBRATION).write_text(json.dumps({"mean": 0.1, "spread": 2.0}))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def host(folders: dict[str, Path], loop: asyncio.Runner) -> Iterator[Host]:
    found = Host(
        "tiny",
        folders["model"],
        reward_model=folders["preference"],
        process_model=folders["process"],
        slots=SLOTS,
        waiting=WAITING,
        device="cpu",
        threads=1,
    )
    loop.run(found.start())
    yield found
    loop.run(found.stop())


@pytest.fixture(scope="module")
def offline(folders: dict[str, Path]) -> Callable[[list[Request]], list[Sample]]:
    """What the engine writes in this process."""
    model, tokenizer = load(folders["model"])

    def write(requests: list[Request]) -> list[Sample]:
        engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=64, max_length=2048)
        engine.load(model.state_dict(), 0)
        return generate(engine, [replace(request, id=i) for i, request in enumerate(requests)])

    return write


def ask(seed: int, **options: object) -> Request:
    """All with the same id: a host tells its answers apart by itself."""
    given = {"prompt_ids": (5, 6, 7 + seed % 20), "max_tokens": 60, "seed": seed, **options}
    return Request(id=0, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def long(offline: Callable[[list[Request]], list[Sample]]) -> list[Request]:
    """Requests whose answers go on for 1500 tokens."""
    asked = [ask(seed, prompt_ids=(5, seed), max_tokens=1500, temperature=0.0) for seed in range(6, 26)]
    ends = offline(asked)
    found = [r for r, s in zip(asked, ends, strict=True) if s.stop is Stop.LENGTH]
    assert len(found) >= 8
    return found


async def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def assert_close(got: Sample, wanted: Sample) -> None:
    assert (got.prompt_ids, got.completion_ids) == (wanted.prompt_ids, wanted.completion_ids)
    assert (got.stop, got.versions) == (wanted.stop, wanted.versions)
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
