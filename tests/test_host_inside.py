"""Inside a model's process: its loop, what breaks there and what is said of it, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosting import QUESTION, alive
from hosting import folders as folders  # a fixture

from liubai.errors import UserError
from liubai.rollout.beam import BeamSearch
from liubai.serve.inside import Inside, Settings
from liubai.serve.process import Process
from liubai.serve.wire import NOTE, PIECES, Frames, note, unpack

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
