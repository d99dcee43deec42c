"""A model in a process of its own: the answers are the engine's, whoever shares the batch, and whatever
happens to the process happens to it alone. The processes here are real, and so is their killing."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.scorer import save_scorer, scorer_from
from liubai.problems import FAMILIES
from liubai.problems.family import CAREFUL, Audited, Habits
from liubai.rollout.beam import BeamSearch
from liubai.rollout.engine import Fresh, Request, generate
from liubai.rollout.paths import PathsConfig
from liubai.rollout.torch_engine import TorchEngine
from liubai.rollout.writer import Judge, Piece
from liubai.seeds import stream
from liubai.serve import host as host_module
from liubai.serve.completing import _tokens
from liubai.serve.errors import Refused, refusal_of
from liubai.serve.host import PATIENCE, Host
from liubai.serve.house import Served
from liubai.serve.inside import LONGEST, REPORT, Inside, Outbox, Settings
from liubai.serve.load import Busy, HostDied, Moving, Unavailable
from liubai.serve.process import Process
from liubai.serve.wire import NOTE, PIECES, Frames, Pieces, Written, note, pack, unpack
from liubai.stages import by_paths
from liubai.stages.by_paths import settled
from liubai.stages.scoring import CALIBRATION, Preference, problem_of
from liubai.stages.scoring import Process as ProcessModel
from liubai.text.template import BARE
from liubai.text.tokenizer import word_level
from liubai.types import Problem, Sample, Stop

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


Run = Callable[[Awaitable[object]], object]


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


# ---- judges and beams ----


def test_judges_say_what_they_say_in_this_process(
    host: Host, loop: asyncio.Runner, folders: dict[str, Path], long: list[Request]
) -> None:
    problem = problem_of(QUESTION)
    hasty = Habits(blind=0.0, stop=0.6)
    thoughts = [FAMILIES["make"].document(problem, stream(i, "t"), hasty) for i in range(11)]
    answers = [(QUESTION, thought) for thought in thoughts]
    pairs = [(problem, thought) for thought in thoughts]
    device = torch.device("cpu")

    async def story() -> tuple[list[float], list[float]]:
        busy = asyncio.create_task(host.write(long[0]))  # they go on beside the writing
        found = await asyncio.gather(host.judge("preference", answers), host.judge("process", answers))
        assert not busy.done()
        busy.cancel()
        assert await host.judge("process", []) == []
        return found[0], found[1]

    liked, checked = loop.run(story())
    assert len(set(liked)) > 1
    assert len(set(checked)) > 1
    assert liked == pytest.approx(Preference(folders["preference"], device)(pairs), abs=1e-4)
    assert checked == pytest.approx(ProcessModel(folders["process"], device)(pairs), abs=1e-4)
    assert host.judges() == {"preference", "process"}
    # more than the socket takes at once; a thought is nothing to a reward model
    thought = "1 " * 500_000
    (same,) = loop.run(host.judge("preference", [(QUESTION, f"{thought}</think> <answer> 7 </answer>")]))
    (wanted,) = loop.run(host.judge("preference", [(QUESTION, "</think> <answer> 7 </answer>")]))
    assert same == pytest.approx(wanted, abs=1e-5)


def test_the_process_model_judges_only_where_it_finds_steps(
    host: Host, loop: asyncio.Runner, folders: dict[str, Path]
) -> None:
    """Where it can find none all answers would have the same score, and the best of them be any."""
    assert host._process is not None
    pid, france = host._process.pid, "What is the capital of France?"
    told = "so it is </think> <answer> 7 </answer>"
    with pytest.raises(UserError, match=r"finds no steps .* let a reward model judge"):
        loop.run(host.judge("process", [(france, told), (france, "")]))
    (liked,) = loop.run(host.judge("preference", [(france, told)]))
    (wanted,) = Preference(folders["preference"], torch.device("cpu"))([(problem_of(france), told)])
    assert liked == pytest.approx(wanted, abs=1e-5)
    # a thought without a step, of a question that has some, has not shown any that is right
    assert loop.run(host.judge("process", [(QUESTION, "</think> <answer> 7 </answer>")])) == [0.0]
    assert (host._process.pid, host.figures().restarts) == (pid, 0)


@pytest.mark.parametrize(
    ("asked", "judges", "question", "settled_as"),
    [
        ("best:4", ("preference", "process"), QUESTION, "best:4"),
        ("best:4", ("preference", "process"), "hello", "best:4:preference"),
        ("best:4", ("process",), "hello", None),
        ("best:4", ("preference",), "hello", "best:4"),
        ("best:4", (), "hello", "best:4"),  # which is refused elsewhere
        ("best:4:process", ("preference", "process"), "hello", None),
        ("best:4:process", ("preference", "process"), QUESTION, "best:4:process"),
        ("best:4:preference", ("preference", "process"), "hello", "best:4:preference"),
        ("tree:8", ("process",), QUESTION, "tree:8"),
        ("tree:8", ("process",), "hello", "tree:8:rollouts"),
        ("tree:8", (), "hello", "tree:8"),
        ("tree:8:rollouts", ("process",), "hello", "tree:8:rollouts"),
        ("tree:8:process", ("process",), "hello", None),
        ("vote:3", ("process",), "hello", "vote:3"),
    ],
)
def test_who_judges_where_nobody_said(
    asked: str, judges: tuple[Judge, ...], question: str, settled_as: str | None
) -> None:
    config = PathsConfig.parse(asked)
    if settled_as is None:
        with pytest.raises(UserError, match="finds no steps"):
            settled(config, judges, question)
    else:
        assert settled(config, judges, question).name == settled_as


def test_judges_of_known_problems_are_asked_about_these() -> None:
    """A family says whether its steps can be found."""
    made = [
        Problem("3.11 or 3.8", "3.8", "number", "greater", "en"),
        Problem("please greet ben", "", "", "errand"),
    ]
    read: list[Problem] = []

    class Spy:
        def __init__(self, folder: Path, device: torch.device) -> None:
            assert folder == Path("p")

        def __call__(self, answers: list[tuple[Problem, str]]) -> list[float]:
            read.extend(problem for problem, _ in answers)
            return [float(len(response)) for _, response in answers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_paths, "Process", Spy)
        judging = by_paths.judges_of({"process": Path("p")}, made, torch.device("cpu"))["process"]
    assert judging([(made[0].prompt, "a"), (made[0].prompt, "bc")]) == [1.0, 2.0]
    assert read == [made[0], made[0]]
    with pytest.raises(UserError, match="finds no steps"):
        judging([(made[0].prompt, "a"), (made[1].prompt, "b")])


def test_beams_are_those_of_beam_search(
    host: Host, loop: asyncio.Runner, folders: dict[str, Path], long: list[Request]
) -> None:
    model, tokenizer = load(folders["model"])
    widths = (1, 2, 3, 4, 2, 2)  # of which one goes on at a time
    requests = [ask(i, max_tokens=12 + i) for i in range(len(widths))]

    async def story() -> list[list[Sample]]:
        with host.admit(15) as writer:
            busy = asyncio.create_task(writer.write(long[0]))
            given_up = asyncio.create_task(writer.beams(long[1], 3))
            both = [writer.beams(r, width) for r, width in zip(requests, widths, strict=True)]
            found = await asyncio.gather(*both)
            assert not busy.done()
            for task in (busy, given_up):
                task.cancel()
            for width in (0, SLOTS + WAITING + 1):
                with pytest.raises(ValueError, match="between 1 and 16"):
                    await writer.beams(ask(1), width)
        return found

    for request, width, found in zip(requests, widths, loop.run(story()), strict=True):
        search = BeamSearch(model, request, width, eos_ids=tokenizer.eos_ids)
        while search.step():
            pass
        wanted = search.best()
        assert len(found) == len(wanted) == width
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if isinstance(f, Audited)])
def test_a_question_finds_the_family_that_checks_its_steps(name: str) -> None:
    family = FAMILIES[name]
    assert isinstance(family, Audited)
    for i in range(30):
        rng = stream(i, name)
        problem = family.sample(rng)
        thought = family.document(problem, rng, CAREFUL).partition("</think>")[0].removeprefix("<think>")
        found = problem_of(problem.prompt)
        assert found.family == name
        assert family.steps(found, thought) == family.steps(problem, thought)
    assert problem_of("What is the capital of France?").family == ""
    assert problem_of("").family == ""


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


ORPHAN = """
import socket, subprocess, sys
from liubai.serve.wire import note

ours, theirs = socket.socketpair()
command = [sys.executable, "-m", "liubai.serve.inside", str(theirs.fileno())]
process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
theirs.close()
settings = {"checkpoint": sys.argv[1], "slots": 2, "max_length": 99, "device": "cpu", "threads": 1}
ours.sendall(note(settings))
assert b"ready" in ours.recv(99)
print(process.pid, flush=True)
process.wait()
"""


def test_a_process_dies_with_its_parent(folders: dict[str, Path]) -> None:
    """The parent here is a bare one, that it may start sooner."""
    command = [sys.executable, "-c", ORPHAN, str(folders["model"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    deadline = time.monotonic() + 60
    try:
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_nothing_is_left_of_what_ended_or_was_withdrawn(folders: dict[str, Path]) -> None:
    """The loop of the process, in this one."""
    ours, theirs = socket.socketpair()
    judges = {"preference": str(folders["preference"])}
    with ours, theirs:
        inside = Inside(theirs, Settings(str(folders["model"]), 2, 99, "cpu", 1, judges))
        fields = [[5, 6, 7], 9, 0, 1.0, 1.0, [], 2]
        for start in (0, 10):
            for stream in range(start, start + 4):
                inside._obey("write", stream, stream % 2 == 0, *fields)
            for stream in range(start + 4, start + 6):
                inside._obey("beams", stream, 2, *fields)
            inside._obey("judge", start + 6, "preference", [[QUESTION, "7"]])
            inside.outbox.pass_on(inside.engine, inside._step())
            inside._search()
        assert inside.outbox.streams()
        for stream in range(10, 20):
            inside._obey("cancel", stream)
        while inside.engine.pending or inside.asked or inside.search or inside.judging:
            inside.outbox.pass_on(inside.engine, inside._step())
            inside._search()
            inside._judge()
        box = inside.outbox
        assert not any((box.streams(), box._heard, box._new, box._curious))
        said = Frames().feed(ours.recv(1 << 20))
        ended = [stream for kind, body in said if kind == PIECES for stream, _ in unpack(body).ended]
        notes = [json.loads(body)[:2] for kind, body in said if kind == NOTE]
        assert sorted(ended) == [0, 1, 2, 3]
        assert sorted(notes) == [["beams", 4], ["beams", 5], ["scores", 6]]


def inside_here(link: socket.socket, folders: dict[str, Path]) -> Inside:
    judges = {judge: str(folders[judge]) for judge in ("preference", "process")}
    return Inside(link, Settings(str(folders["model"]), 2, 99, "cpu", 1, judges))  # type: ignore[arg-type]


FIELDS = [[5, 6, 7], 9, 0, 1.0, 1.0, [], 0]


def test_one_search_at_a_time(folders: dict[str, Path]) -> None:
    """Each holds the keys and values of all its beginnings."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inside = inside_here(theirs, folders)
        for stream in range(4):
            inside._obey("beams", stream, 2, *FIELDS)
        began = []
        while inside.asked or inside.search:
            inside._search()
            if inside.search is not None and inside.search[0] not in began:
                began.append(inside.search[0])
                assert [request.id for request, _ in inside.asked] == list(range(1 + began[-1], 4))
                if began[-1] == 1:
                    inside._obey("cancel", 1)
                    assert inside.search is None
        notes = [json.loads(body)[:2] for _, body in Frames().feed(ours.recv(1 << 20))]
    assert (began, notes) == ([0, 1, 2, 3], [["beams", 0], ["beams", 2], ["beams", 3]])


def test_what_breaks_in_the_process_breaks_for_one_and_is_no_ones_request(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[float]:
        raise ZeroDivisionError("sesame")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        inside = inside_here(theirs, folders)
        inside.judges["process"] = broken
        monkeypatch.setattr(BeamSearch, "step", broken)
        inside._obey("judge", 1, "process", [[QUESTION, "7"]])
        inside._obey("judge", 2, "preference", [[QUESTION, "7"]])
        inside._obey("judge", 3, "process", [])
        inside._obey("beams", 4, 2, *FIELDS)
        inside._obey("beams", 5, 0, *FIELDS)
        inside._obey("write", 6, True, *FIELDS)
        while inside.judging or inside.asked or inside.search:
            inside._judge()
            inside._search()
        inside._fail_all(UserError("no memory for sesame"))
        assert not inside.outbox.streams()
        notes = [json.loads(body) for kind, body in Frames().feed(ours.recv(1 << 20)) if kind == NOTE]
    assert {stream: what for what, stream, _ in notes} == {
        1: "broken", 2: "scores", 3: "scores", 4: "broken", 5: "broken", 6: "broken",
    }  # fmt: skip
    logged = capfd.readouterr().err
    assert "liubai: unexpected ZeroDivisionError in inside._judge, line " in logged
    assert "sesame" not in logged
    assert "sesame" not in json.dumps(notes)


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


CRASH = """
import os, sys
from liubai.serve import inside

class Broken:
    def __init__(self, link, settings):
        raise KeyError("sesame")

inside.Inside = Broken
os._exit(inside.main(int(sys.argv[1])))
"""


def test_a_crash_is_logged_by_its_kind_and_place() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(note({"checkpoint": "x", "slots": 2, "max_length": 99, "device": "cpu", "threads": 1}))
        command = [sys.executable, "-c", CRASH, str(theirs.fileno())]
        ended = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, text=True)
    assert ended.returncode == 1
    assert re.fullmatch(r"liubai: unexpected KeyError in inside\.main, line \d+\n", ended.stderr)
    assert ended.stdout == ""


def test_a_number_that_is_free_again_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    kill = os.killpg

    def spy(number: int, sign: int) -> None:
        killed.append(number)
        kill(number, sign)

    async def story() -> list[str]:
        process = Process({"threads": 1}, lambda kind, body: None, lambda: None)
        return [await process.end(), await process.end()]

    monkeypatch.setattr(os, "killpg", spy)
    assert asyncio.run(story()) == ["its process was ended by signal 9"] * 2
    assert len(killed) == 1


# ---- the wire ----

numbers = st.integers(0, 2**31 - 1)
logprobs = st.floats(-1e4, 0, width=32)


@st.composite
def written(draw: st.DrawFn) -> Written:
    ids = draw(st.lists(numbers, min_size=1, max_size=5))
    likely = draw(st.integers(0, 3))
    return Written(
        draw(st.integers(0, 2**62)),
        ids,
        draw(st.lists(logprobs, min_size=len(ids), max_size=len(ids))),
        [
            tuple(draw(st.lists(st.tuples(numbers, logprobs), min_size=likely, max_size=likely)))
            for _ in ids
            if likely
        ],
    )


frames = st.one_of(
    st.builds(
        Pieces,
        numbers,
        numbers,
        st.integers(0, 2**62),
        st.lists(written(), max_size=6),
        st.lists(st.tuples(st.integers(0, 2**62), st.sampled_from(Stop)), max_size=4),
    ),
    st.lists(st.text(), max_size=3),
)


@given(st.lists(frames, max_size=5), st.randoms(use_true_random=False))
def test_what_is_packed_is_unpacked_however_it_is_cut(sent: list[object], rng: random.Random) -> None:
    data = b"".join(pack(x) if isinstance(x, Pieces) else note(x) for x in sent)
    got: list[object] = []
    reader = Frames()
    while data:
        cut = rng.randint(1, len(data))
        for kind, body in reader.feed(data[:cut]):
            assert kind in (NOTE, PIECES)
            got.append(unpack(body) if kind == PIECES else json.loads(body))
        data = data[cut:]
    assert got == sent


class Script:
    """An engine that writes what it is told."""

    in_use = pending = 7

    def __init__(self) -> None:
        self.now: list[Fresh] = []

    def fresh(self) -> list[Fresh]:
        return self.now


def outbox() -> tuple[Callable[..., list[Pieces]], Outbox, Callable[[float], None]]:
    """``step(tokens, ended)`` -> what was sent; the box; its clock."""
    sent: list[bytes] = []
    now = [0.0]
    engine, box = Script(), Outbox(sent.append, lambda: now[0])

    def step(*streams: int, ended: tuple[int, ...] = ()) -> list[Pieces]:
        sent.clear()
        engine.now = [Fresh(stream, 40 + stream, -0.5) for stream in streams]
        box.pass_on(engine, [(stream, Stop.EOS) for stream in ended])  # type: ignore[arg-type]
        return [unpack(body) for frame in sent for _, body in Frames().feed(frame)]

    def tick(seconds: float) -> None:
        now[0] += seconds

    return step, box, tick


def heard(sent: list[Pieces]) -> dict[int, int]:
    """Tokens by stream of the one frame that was sent."""
    (pieces,) = sent or [Pieces(0, 0, 0, [], [])]
    return {w.stream: len(w.ids) for w in pieces.written}


def test_first_tokens_and_ends_go_at_once_and_the_rest_together() -> None:
    step, box, tick = outbox()
    for i in range(200):
        box.open(i, True, False)
    assert heard(step(*range(199))) == dict.fromkeys(range(199), 1)
    tick(0.01)
    assert step(*range(199)) == []
    tick(0.01)
    assert heard(step(*range(200))) == {199: 1}  # its first; the others go on waiting
    tick(0.01)
    (frame,) = step(*range(200), ended=(3, 199))
    assert {w.stream: len(w.ids) for w in frame.written} == {3: 3, 199: 1}
    assert frame.ended == [(3, Stop.EOS), (199, Stop.EOS)]
    assert frame.tokens == 199 + 199 + 200 + 200
    tick(LONGEST)
    everybody = heard(step(*range(3), *range(4, 199)))
    assert everybody == {i: 4 for i in range(199) if i != 3}


def test_few_listeners_hear_every_token_and_the_silent_ones_only_the_end() -> None:
    step, box, tick = outbox()
    box.open(1, True, False)
    box.open(2, False, False)
    for _ in range(3):
        tick(0.002)
        assert heard(step(1, 2)) == {1: 1}
    tick(0.002)
    assert heard(step(1, 2, ended=(2,))) == {1: 1, 2: 4}
    box.close(1)
    box.open(5, False, False)
    assert step(5) == []
    tick(REPORT)
    assert step(5)[0].tokens == 10  # the load is told all the same
    box.close(5)
    tick(0.1)
    assert step(5) == []  # nobody is there to hear it
