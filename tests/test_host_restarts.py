"""When a model's process dies: what is waited for, what is told, and what is not started again."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model

from liubai.errors import UserError
from liubai.grade.judge import GradeItem
from liubai.grade.pool import GraderPool
from liubai.model.checkpoint import save_checkpoint
from liubai.rollout.engine import Request
from liubai.serve import host as host_module
from liubai.serve import process as process_module
from liubai.serve.host import FIRST_PAUSE, LONGEST_PAUSE, SETTLED, SOONEST, Host
from liubai.serve.inside import Inside, Settings
from liubai.serve.load import HostDied
from liubai.serve.process import Process
from liubai.serve.wire import NOTE, PIECES, Frames, note, unpack
from liubai.text.template import BARE
from liubai.text.tokenizer import word_level

ASK = Request(id=0, prompt_ids=(5, 6), max_tokens=4, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "checkpoint"
    words = word_level(["a", "b", "c", "try", "wait", "1", "2"])
    config = tiny_config(vocab_size=words.vocab_size, eos_token_id=words.eos_id, bos_token_id=words.bos_id)
    save_checkpoint(path, tiny_model(1, config), words, BARE)
    return path


class Dead:
    """A process that is no more."""

    stuck, linked = False, True

    def __init__(self, ends: Callable[[], str] = lambda: "its process was ended by signal 9") -> None:
        self.ends = ends

    async def end(self) -> str:
        return self.ends()


class Fragile:
    """A host whose launches are played: each is an error, or ``None`` for one that works. ``slept`` are the
    seconds that it waited, ``said`` what it told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.said, self.slept = list[str](), list[float]()
        self.host = Host("tiny", folder, device="cpu", threads=1, said=self.said.append, **options)
        self.launches = list[BaseException | None]()
        self.lived = 0.0
        sleep = asyncio.sleep

        async def nap(seconds: float) -> None:
            self.slept.append(seconds)
            await sleep(0)

        async def launch() -> None:
            self.host.state = "loading"
            if (error := self.launches.pop(0)) is not None:
                raise error
            self.ready()

        monkeypatch.setattr(host_module.asyncio, "sleep", nap)
        monkeypatch.setattr(self.host, "_launch", launch)
        self.ready()

    def ready(self) -> None:
        self.host.state, self.host._trouble = "ready", None
        self.host._started = time.monotonic()

    async def dies(
        self, *launches: BaseException | None, after: float = 0.0, dead: Any = None
    ) -> list[float]:
        """The process ends ``after`` so many seconds; the pauses before the launches that follow."""
        self.launches, self.slept[:] = list(launches), []
        self.host._started = time.monotonic() - after
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        self.host._died(dead or Dead(), done)
        assert self.host._keeper is not None
        await self.host._keeper
        return list(self.slept)


def test_each_pause_is_twice_the_last_until_it_has_lived(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragile = Fragile(folder, monkeypatch)

    async def story() -> None:
        assert await fragile.dies(OSError("x"), HostDied("x", 1.0), None) == [FIRST_PAUSE, 1.0, 2.0]
        assert (fragile.host.state, fragile.host.figures().restarts) == ("ready", 3)
        assert await fragile.dies(None, after=SETTLED - 1) == [4.0]  # it did not live for long
        assert await fragile.dies(None, after=SETTLED + 1) == [FIRST_PAUSE]
        many = await fragile.dies(*[UserError("x")] * 9, None, after=SETTLED + 1)
        assert many == [0.5, 1, 2, 4, 8, 16, *[LONGEST_PAUSE] * 4]

    asyncio.run(story())


def test_when_to_come_back_is_told_by_the_pause_that_follows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process that lived for long: not by the pause that was reached long ago."""
    fragile = Fragile(folder, monkeypatch)

    async def story() -> float:
        fragile.host._pause = LONGEST_PAUSE
        waits = asyncio.create_task(fragile.host._ask(host_module._Open(host_module._future()), ["write"]))
        fragile.host._process = _Deaf()  # type: ignore[assignment]
        await asyncio.wait([waits], timeout=0.01)
        await fragile.dies(None, after=SETTLED + 1)
        with pytest.raises(HostDied) as died:
            await waits
        return died.value.retry_after_s

    assert asyncio.run(story()) == SOONEST


class _Deaf:
    def tell(self, command: list[Any]) -> None:
        pass

    async def end(self) -> str:
        return ""


def test_deaths_and_restarts_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fragile = Fragile(folder, monkeypatch, patience_s=7.0)

    async def story() -> None:
        broken = UserError(f"'{folder.absolute()}/model.safetensors' is corrupt")
        await fragile.dies(broken, TimeoutError(), KeyError("sesame"), None)
        silent = Dead()
        silent.stuck = True
        await fragile.dies(None, after=SETTLED + 1, dead=silent)

    asyncio.run(story())
    assert fragile.said[:3] == [
        "tiny: its process was ended by signal 9; starting again in 0.5 s",
        "tiny: 'checkpoint/model.safetensors' is corrupt; trying again in 1 s",
        "tiny: its process was not ready in time; trying again in 2 s",
    ]
    assert fragile.said[3].startswith("tiny: unexpected KeyError in ")
    assert fragile.said[3].endswith("; trying again in 4 s")
    assert fragile.said[4:] == [
        "tiny: ready again",
        "tiny: it was silent for 7 s, and its process was ended by signal 9; starting again in 0.5 s",
        "tiny: ready again",
    ]
    assert str(folder.parent) not in "".join(fragile.said)
    assert "sesame" not in "".join(fragile.said)


def test_a_dead_process_that_cannot_be_reaped_is_no_end_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread() -> str:
        raise RuntimeError("can't start new thread")

    fragile = Fragile(folder, monkeypatch)
    assert asyncio.run(fragile.dies(None, dead=Dead(no_thread))) == [FIRST_PAUSE]
    assert fragile.host.state == "ready"
    assert fragile.said[0].startswith("tiny: unexpected RuntimeError in ")


def test_a_restart_that_hangs_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fragile = Fragile(folder, monkeypatch, patience_s=0.05)
    tried = 0

    async def launch() -> None:
        nonlocal tried
        tried += 1
        if tried == 1:
            await asyncio.Event().wait()
        fragile.ready()

    monkeypatch.setattr(fragile.host, "_launch", launch)
    assert asyncio.run(asyncio.wait_for(fragile.dies(), 10)) == [FIRST_PAUSE, 2 * FIRST_PAUSE]
    assert "tiny: its process was not ready in time; trying again in 1 s" in fragile.said


def test_other_weights_are_not_served_under_the_old_fingerprint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    fragile = Fragile(mine, monkeypatch)
    weights = mine / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    seen = list[str | None]()

    async def nap(seconds: float) -> None:
        seen.append(fragile.host.figures().trouble)
        if len(seen) == 3:
            weights.write_bytes(before)

    monkeypatch.setattr(host_module.asyncio, "sleep", nap)
    asyncio.run(fragile.dies(None))
    assert len(seen) == 3
    assert all("its checkpoint has changed since the server was started" in (text or "") for text in seen[1:])
    assert fragile.host.state == "ready"
    assert fragile.launches == []


def test_a_process_that_hangs_in_the_kernel_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "REAP_S", 0.1)

    async def story() -> str:
        process = Process({"threads": 1}, lambda kind, body: None, lambda: None)
        with monkeypatch.context() as patch:
            patch.setattr(Process, "_kill", lambda self: None)
            os.kill(process.pid, signal.SIGSTOP)
            said = await process.end()
        await process.end()
        return said

    assert asyncio.run(story()) == "its process does not end"


def test_what_lies_in_the_current_folder_is_not_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "json", "torch"):
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.chdir(tmp_path)

    async def story() -> None:
        host = Host("tiny", folder, device="cpu", threads=1)
        await host.start()
        try:
            assert (await host.write(ASK)).completion_ids
        finally:
            await host.stop()

    asyncio.run(story())
    with GraderPool(workers=1) as pool:
        (verdict,) = pool.gather(pool.submit([GradeItem("operator:contains", "abc", "<answer> a </answer>")]))
    assert "takes 2" in (verdict.error or "") or "expected 2" in (verdict.error or "")  # it was called


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_no_memory_for_a_step_fails_those_who_are_written_and_nobody_else(
    folder: Path, error: RuntimeError, capfd: pytest.CaptureFixture[str]
) -> None:
    notes, ended = played(folder, error)
    assert [one[:2] for one in notes] == [["broken", 1]]
    assert ended == [2]
    assert "liubai: unexpected " in capfd.readouterr().err


def test_an_error_that_nobody_knows_ends_the_process(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"):
        played(folder, RuntimeError("something else"))


def played(folder: Path, error: RuntimeError) -> tuple[list[list[Any]], list[int]]:
    """Two requests to a process's loop, here, whose first step fails: the notes, and which answers ended."""
    ours, theirs = socket.socketpair()
    raised: list[BaseException] = []
    with ours, theirs:
        inside = Inside(theirs, Settings(str(folder), 2, 99, "cpu", 1))
        step, failing = inside.engine.step, [error]

        def fails_once() -> Any:
            if failing:
                raise failing.pop()
            return step()

        inside.engine.step = fails_once  # type: ignore[method-assign]

        def work() -> None:
            try:
                inside.run()
            except BaseException as unexpected:
                raised.append(unexpected)
                theirs.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=work)
        thread.start()
        frames, notes, ended = Frames(), list[list[Any]](), list[int]()
        ours.settimeout(30)

        def ask(stream: int) -> None:
            ours.sendall(note([["write", stream, True, [5, 6, 7], 9, 0, 1.0, 1.0, [], 0]]))

        ask(1)
        while not ended and (data := ours.recv(1 << 16)):
            for kind, body in frames.feed(data):
                if kind == NOTE:
                    notes.append(json.loads(body))
                    ask(2)
                elif kind == PIECES:
                    ended += [stream for stream, _ in unpack(body).ended]
        ours.shutdown(socket.SHUT_WR)
        thread.join(30)
    if raised:
        raise raised[0]
    return notes, ended
