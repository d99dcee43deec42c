"""A model in a process of its own: the answers are the engine's, whoever shares the batch, and whatever
happens to the process happens to it alone. The processes here are real, and so is their killing."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hosting import SLOTS, WAITING, alive, ask, assert_close, until
from hosting import folders as folders  # a fixture
from hosting import host as host  # a fixture
from hosting import long as long  # a fixture
from hosting import loop as loop  # a fixture
from hosting import offline as offline  # a fixture

from liubai.errors import UserError
from liubai.rollout.engine import Request
from liubai.rollout.writer import Piece
from liubai.serve import host as host_module
from liubai.serve.completing import _tokens
from liubai.serve.errors import Refused, refusal_of
from liubai.serve.host import PATIENCE, Host
from liubai.serve.house import Served
from liubai.serve.load import Busy, HostDied, Moving, Unavailable
from liubai.types import Sample, Stop

# ---- the same answers ----


def test_the_answers_are_the_engines_streamed_or_not_alone_or_in_company(
    host: Host, loop: asyncio.Runner, offline: Callable[[list[Request]], list[Sample]]
) -> None:
    requests = [ask(seed, top_p=0.8 if seed % 4 == 3 else 1.0) for seed in range(SLOTS + WAITING)]
    wanted = offline(requests)
    assert {s.stop for s in wanted} == {Stop.EOS, Stop.LENGTH}
    pieces: dict[int, list[Piece]] = {i: [] for i in range(0, len(requests), 2)}

    async def late(i: int) -> Sample:
        await asyncio.sleep(random.Random(i).random() * 0.05)  # they join and leave mid-flight
        return await host.write(requests[i], pieces[i].append if i in pieces else None)

    async def company() -> list[Sample]:
        return await asyncio.gather(*(late(i) for i in range(len(requests))))

    for got, want in zip(loop.run(company()), wanted, strict=True):
        assert_close(got, want)
    for i, heard in pieces.items():
        assert sum((p.ids for p in heard), ()) == wanted[i].completion_ids
        assert len(heard) > 1 or len(wanted[i].completion_ids) < 3  # not all at the end
        assert len(heard[0].ids) <= 2  # the first token did not wait
        assert all(p.alternatives == () for p in heard)
    for i in (0, 3):
        assert_close(loop.run(host.write(requests[i])), wanted[i])


def test_alternatives_and_stop_ids_come_through(
    host: Host, loop: asyncio.Runner, offline: Callable[[list[Request]], list[Sample]]
) -> None:
    (plain,) = offline([ask(3)])
    stop = plain.completion_ids[4]
    request = ask(3, stop_ids=(stop,), alternatives=3)
    pieces: list[Piece] = []

    async def both() -> list[Sample]:
        return await asyncio.gather(host.write(request, pieces.append), host.write(ask(3)))

    short, whole = loop.run(both())
    at = plain.completion_ids.index(stop) + 1
    assert (short.completion_ids, short.stop) == (plain.completion_ids[:at], Stop.EOS)
    assert_close(whole, plain)
    likely = [a for p in pieces for a in p.alternatives]
    assert len(likely) == at
    for alternatives, token, logprob in zip(likely, short.completion_ids, short.logprobs, strict=True):
        assert len(alternatives) == 3
        assert [p for _, p in alternatives] == sorted((p for _, p in alternatives), reverse=True)
        assert dict(alternatives).get(token, logprob) == pytest.approx(logprob, abs=1e-5)
        assert logprob <= alternatives[0][1] + 1e-5


def test_what_cannot_be_asked_is_refused_before_it_reaches_the_process(
    host: Host, loop: asyncio.Runner, offline: Callable[[list[Request]], list[Sample]]
) -> None:
    for bad, message in [
        (ask(0, max_tokens=host.max_length - 2), f"needs {host.max_length + 1} tokens"),
        (ask(2**63), "64 bits"),
        (ask(-(2**63) - 1), "64 bits"),
    ]:
        with pytest.raises(ValueError, match=message):
            loop.run(host.write(bad))
    for ids in ((5, host.config.vocab_size), (-1,)):  # which a request can bring about
        with pytest.raises(UserError, match="not one of the"):
            loop.run(host.write(ask(0, prompt_ids=ids)))
    # what float32 would make 0 or infinite of spoils nobody's step
    for temperature in (1e-40, 1e-320, 1e30):
        odd = ask(1, temperature=temperature, top_p=0.9)
        assert loop.run(host.write(odd)).completion_ids
    odd, plain = ask(2, top_p=1e-300), ask(2**63 - 1)
    assert loop.run(host.write(odd)).completion_ids == offline([ask(2, top_p=1e-6)])[0].completion_ids
    assert_close(loop.run(host.write(plain)), offline([plain])[0])
    assert host.figures().restarts == 0


# ---- leaving ----


def test_cancel_frees_the_slot_at_once_also_of_those_who_wait(
    host: Host, loop: asyncio.Runner, long: list[Request], offline: Callable[[list[Request]], list[Sample]]
) -> None:
    async def story() -> Sample:
        before = host.figures()
        tasks = [asyncio.create_task(host.write(r, lambda _: None)) for r in long[: SLOTS + 3]]
        await until(lambda: (host.figures().in_use, host.figures().waiting) == (SLOTS, 3))
        tasks[-1].cancel()  # one that waits
        await until(lambda: host.figures().waiting == 2)
        waits = asyncio.create_task(host.write(ask(5)))
        for task in tasks[:3]:
            task.cancel()
        sample = await waits  # long before the others could have ended
        assert host.figures().in_use == 3
        for task in tasks:
            task.cancel()
        assert {type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)} == {
            asyncio.CancelledError
        }
        await until(lambda: (host.figures().in_use, host.figures().open) == (0, 0))
        assert host.figures().cancelled - before.cancelled == len(tasks)
        assert host.figures().answers - before.answers == 1
        return sample

    assert_close(loop.run(story()), offline([ask(5)])[0])


def test_a_listener_who_raises_ends_its_own_answer_only(
    host: Host, loop: asyncio.Runner, long: list[Request], offline: Callable[[list[Request]], list[Sample]]
) -> None:
    def broken(_: Piece) -> None:
        raise ZeroDivisionError

    async def story() -> Sample:
        mine = asyncio.create_task(host.write(long[0], broken))
        other = asyncio.create_task(host.write(ask(6)))
        with pytest.raises(ZeroDivisionError):
            await mine
        sample = await other
        await until(lambda: host.figures().in_use == 0)
        return sample

    assert_close(loop.run(story()), offline([ask(6)])[0])


# ---- admission ----


def test_who_is_let_in_is_written_and_who_is_one_too_many_is_not(
    host: Host, loop: asyncio.Runner, long: list[Request]
) -> None:
    async def story() -> None:
        refused = host.figures().refused
        with host.admit(SLOTS + WAITING - 1) as writer:
            assert host.admit(1) is not None  # asking takes no place
            last = asyncio.create_task(host.write(long[0]))
            await asyncio.sleep(0)
            with pytest.raises(Busy, match="too many requests wait") as busy:
                await host.write(ask(1))
            assert 1 <= busy.value.retry_after_s <= 60
            assert host.figures().refused == refused + 1
            await writer.write(ask(1))  # its place was kept
            last.cancel()
            with pytest.raises(asyncio.CancelledError):
                await last
            await host.write(ask(1))
            with pytest.raises(Busy):
                host.admit(2)
        host.admit(SLOTS + WAITING)
        with pytest.raises(ValueError, match="more than the 16 allowed"):
            host.admit(SLOTS + WAITING + 1)

    loop.run(story())


def test_when_to_come_back_is_as_fast_as_answers_ended_lately(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    rate = Moving(lambda: now)
    now = 200.0
    monkeypatch.setattr(host, "_answer_rate", rate)
    assert host._until_free(3) == host_module.SOONEST  # nothing is known
    rate.add(20)
    assert rate.per_second() == 2.0
    assert host._until_free(10) == 5.0
    assert host._until_free(1) == host_module.SOONEST
    assert host._until_free(1000) == host_module.LATEST
    now = 209.5
    rate.add(5)
    assert rate.per_second() == 2.5
    now = 210.0
    assert rate.per_second() == 0.5  # the first twenty are ten seconds old


# ---- death ----


def test_signals_are_left_to_the_parent_and_an_idle_process_sleeps(
    host: Host, loop: asyncio.Runner, offline: Callable[[list[Request]], list[Sample]]
) -> None:
    assert host._process is not None
    pid = host._process.pid
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert_close(loop.run(host.write(ask(8))), offline([ask(8)])[0])

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(0.5)
    assert ticks() - before <= 5  # of 50


def test_a_killed_process_fails_its_answers_and_is_started_again(
    host: Host, loop: asyncio.Runner, long: list[Request], offline: Callable[[list[Request]], list[Sample]]
) -> None:
    async def story() -> Sample:
        assert host._process is not None
        heard: list[Piece] = []
        asked = long[: SLOTS + 2]
        tasks = [asyncio.create_task(host.write(r, heard.append)) for r in asked]
        await until(lambda: bool(heard) and host.figures().waiting == 2)
        os.kill(host._process.pid, signal.SIGKILL)
        died = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in died] == [HostDied] * len(asked)
        assert all("it is being started again" in str(error) for error in died)
        assert host.figures().state in ("down", "loading")
        assert (host.figures().in_use, host.figures().open) == (0, 0)
        with pytest.raises(HostDied, match="not there at the moment") as gone:
            await host.write(ask(1))
        assert gone.value.retry_after_s >= 1
        await until(lambda: "signal 9" in (host.figures().trouble or "") or host.state == "ready")
        await until(lambda: host.state == "ready")
        assert (host.figures().restarts, host.figures().trouble) == (1, None)
        assert host._places == 0
        return await host.write(ask(9))

    assert_close(loop.run(story()), offline([ask(9)])[0])


def test_a_process_that_lives_and_does_not_work_is_started_again(
    host: Host, loop: asyncio.Runner, long: list[Request], offline: Callable[[list[Request]], list[Sample]]
) -> None:
    """And only then: not one that nobody waits for, and not one that works for longer than it may be
    silent."""

    async def story(patience_s: float) -> Sample:
        first = host._process
        assert first is not None
        assert first._looking is not None
        first._looking.cancel()
        host.patience_s = patience_s
        first.watch(lambda: bool(host._open), patience_s)
        before = host.figures().restarts
        began = time.monotonic()
        while time.monotonic() - began < 1.5 * patience_s:
            await host.write(long[0])
        os.kill(first.pid, signal.SIGSTOP)
        await asyncio.sleep(1.5 * patience_s)
        os.kill(first.pid, signal.SIGCONT)
        assert (await host.write(ask(3))).completion_ids
        assert host._process is first
        os.kill(first.pid, signal.SIGSTOP)
        stuck = await asyncio.gather(*(host.write(ask(i)) for i in range(3)), return_exceptions=True)
        assert [type(error) for error in stuck] == [HostDied] * 3
        assert all("was silent for 2 s and was ended; it is being started again" in str(e) for e in stuck)
        await until(lambda: host.state == "ready")
        assert host._process is not first
        assert not alive(first.pid)
        assert host.figures().restarts == before + 1
        return await host.write(ask(9))

    try:
        assert_close(loop.run(story(2.0)), offline([ask(9)])[0])
    finally:
        host.patience_s = PATIENCE


def test_stop_lets_finish_what_it_can_and_fails_the_rest(
    host: Host, loop: asyncio.Runner, long: list[Request]
) -> None:
    """The last test with this host."""

    async def story() -> None:
        assert host._process is not None
        pid = host._process.pid
        tasks = [asyncio.create_task(host.write(r)) for r in long[:3]]
        short = asyncio.create_task(host.write(ask(1, max_tokens=1)))
        await until(lambda: host.figures().in_use > 0)
        stopping = asyncio.create_task(host.stop(grace_s=0.1))
        await asyncio.sleep(0)
        with pytest.raises(HostDied, match="stopped"):
            await host.write(ask(2))
        assert len((await short).completion_ids) == 1
        await stopping
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(ended, Sample):  # unless the machine was fast
                assert isinstance(ended, HostDied)
                assert "being shut down" in str(ended)
        assert not alive(pid)
        await host.stop()  # once more does no harm

    loop.run(story())


def test_a_broken_checkpoint_is_the_users_to_mend(
    folders: dict[str, Path], tmp_path: Path, loop: asyncio.Runner
) -> None:
    for path in folders["model"].iterdir():
        data = path.read_bytes()
        whole = path.name != "model.safetensors"
        (tmp_path / path.name).write_bytes(data if whole else data[: len(data) // 2])
    host = Host("broken", tmp_path, device="cpu", threads=1)  # the weights are looked at by the process
    with pytest.raises(UserError, match="corrupt or truncated"):
        loop.run(host.start())
    assert host.state == "stopped"
    assert host._process is None
    with pytest.raises(UserError, match="served without a preference model"):
        loop.run(host.judge("preference", [("a", "b")]))
    with pytest.raises(UserError, match="no checkpoint folder"):
        Host("none", tmp_path / "absent")
    with pytest.raises(UserError, match="max_length must be between 2 and the model's 2048"):
        Host("long", folders["model"], max_length=2049)


def test_a_fault_of_the_server_is_not_the_clients(
    host: Host, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process says of its own faults is 503 for whoever asked, and not 400."""

    async def story(what: str) -> Sample:
        ready = asyncio.get_running_loop().create_future()
        ready.set_result(None)
        asked = asyncio.create_task(host.write(ask(3)))
        await asyncio.sleep(0)
        (stream,) = host._open
        host._note(ready, what, stream, "in that place")
        return await asked

    monkeypatch.setattr(host, "state", "ready")
    monkeypatch.setattr(host, "_process", SimpleNamespace(tell=lambda command: None))
    with pytest.raises(Unavailable, match="cannot answer: in that place") as broken:
        loop.run(story("broken"))
    assert refusal_of(broken.value).status == 503
    assert int(refusal_of(broken.value).headers["Retry-After"]) >= 1
    with pytest.raises(UserError, match="in that place") as refused:
        loop.run(story("refused"))
    assert refusal_of(refused.value).status == 400


def test_a_token_that_only_the_tokenizer_has_is_the_clients_mistake(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host("small", folders["model"], device="cpu", threads=1)
    served = Served.by(host)
    assert _tokens(served, [6, 7]) == (6, 7)
    monkeypatch.setattr(host, "config", replace(host.config, vocab_size=7))  # fewer rows than tokens
    assert _tokens(served, [6]) == (6,)
    for prompt in ([6, 7], "make 1 4"):
        with pytest.raises(Refused, match="not one of the model's") as refused:
            _tokens(served, prompt)
        assert (refused.value.status, refused.value.param) == (400, "prompt")
