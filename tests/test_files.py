"""Writes are whole or not there, whatever fails in the middle."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_stage import kill_at_call

from liubai import files
from liubai.errors import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_bytes_and_json_are_written_and_replaced(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "留白\n")
    files.write_text(tmp_path / "a", "second")
    files.write_bytes(tmp_path / "b", b"\0\xff")
    files.write_json(tmp_path / "c.json", {"name": "留白", "x": [1, None]})
    assert (tmp_path / "a").read_text(encoding="utf-8") == "second"
    assert (tmp_path / "b").read_bytes() == b"\0\xff"
    assert files.read_json(tmp_path / "c.json") == {"name": "留白", "x": [1, None]}
    assert names(tmp_path) == {"a", "b", "c.json"}


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a", {"x": float("nan")})
    assert files.read_json(tmp_path / "a") == {"x": 1}
    with pytest.raises(ValueError, match="not a JSON object"):
        files.write_text(tmp_path / "a", "[1]") or files.read_json(tmp_path / "a")


def test_content_is_on_the_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def recording(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            target = arguments[0]
            if name == "fsync":
                kind = os.readlink(f"/proc/self/fd/{target}")
                calls.append("sync folder" if os.path.isdir(kind) else "sync file")
            else:
                calls.append(name)
            return real(*arguments)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, recording(name, getattr(os, name)))
    files.write_text(tmp_path / "a", "x")
    assert calls == ["sync file", "replace", "sync folder"]
    calls.clear()
    with files.atomic_folder(tmp_path / "d") as new:
        (new / "one").write_text("1")
    assert calls == ["sync file", "sync folder", "rename", "sync folder"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    files.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"no space left on '.*' \(writing a\); nothing was lost"):
        files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with files.atomic_folder(tmp_path / "d") as new:
        (new / "x").write_text("old")
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        # only the last rename fails: the old folder has stepped aside already
        real = os.rename
        monkeypatch.setattr(
            os,
            "rename",
            lambda a, b: full() if Path(b).name == "d" and ".liubai-tmp" in str(a) else real(a, b),
        )
    with pytest.raises(UserError, match="no space left"), files.atomic_folder(tmp_path / "d") as new:
        (new / "x").write_text("new")
    assert (tmp_path / "d" / "x").read_text() == "old"
    assert names(tmp_path) == {"d"}


def test_a_library_that_wraps_the_full_disk_is_understood(tmp_path: Path) -> None:
    wrapped = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="no space left"), files.atomic_folder(tmp_path / "d"):
        raise wrapped
    assert names(tmp_path) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_appending_to_a_device_that_is_really_full() -> None:
    with pytest.raises(UserError, match=r"no space left on '/dev' \(writing full\)"):
        files.append(Path("/dev/full"), "line\n")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "nowhere" / "a", "x")
    with pytest.raises(KeyError), files.atomic_folder(tmp_path / "d"):
        raise KeyError("a bug")
    assert names(tmp_path) == set()


def test_append_and_its_length(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert files.sync_file(path) == 0
    files.append(path, "一\n")
    files.append(path, "b\n")
    assert path.read_text(encoding="utf-8") == "一\nb\n"
    assert files.sync_file(path) == 6


def test_a_folder_is_replaced_with_all_that_was_in_it(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "deep" / "d") as new:
        (new / "old").write_text("1")
    with files.atomic_folder(tmp_path / "deep" / "d") as new:
        (new / "sub").mkdir()
        (new / "sub" / "new").write_text("2")
    assert names(tmp_path / "deep") == {"d"}
    assert names(tmp_path / "deep" / "d") == {"sub"}


def test_sweep_puts_back_what_stepped_aside_and_removes_the_rest(tmp_path: Path) -> None:
    (tmp_path / f".gone{files.OLD}").mkdir()
    (tmp_path / f".gone{files.OLD}" / "x").write_text("whole")
    (tmp_path / "here").mkdir()
    (tmp_path / f".here{files.OLD}").mkdir()
    (tmp_path / f".new.12345678{files.TEMPORARY}").mkdir()
    (tmp_path / f".file.12345678{files.TEMPORARY}").write_text("half")
    (tmp_path / ".hidden").write_text("the user's")
    files.sweep(tmp_path)
    assert names(tmp_path) == {"gone", "here", ".hidden"}
    assert (tmp_path / "gone" / "x").read_text() == "whole"


def test_killed_at_every_step_of_a_replacement_one_whole_folder_is_found(tmp_path: Path) -> None:
    """A child replaces a folder and kills itself at its n-th call; then the parent looks."""

    def replace(target: Path, content: str) -> None:
        with files.atomic_folder(target) as new:
            (new / "a").write_text(content)
            (new / "b").write_text(content)

    seen, at = [], 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        replace(folder / "d", "old")
        child = os.fork()
        if child == 0:
            kill_at_call(at)
            replace(folder / "d", "new")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        files.sweep(folder)
        found = (folder / "d" / "a").read_text()
        assert (folder / "d" / "b").read_text() == found
        assert names(folder) == {"d"}
        seen.append(found)
        if not os.WIFSIGNALED(status):
            break
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)  # old, old, … new: never back
    assert at > 8


def test_what_steps_aside_comes_back_or_goes(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "a").write_text("old")
    files.set_aside(here)
    assert not here.exists()
    assert files.aside(tmp_path) == [here]
    here.mkdir()
    (here / "b").write_text("new")
    files.put_back(here)
    assert {path.name: path.read_text() for path in here.iterdir()} == {"a": "old"}
    files.put_back(here)  # nothing waits
    files.set_aside(here)
    here.mkdir()
    files.let_go(here)
    files.put_back(here)
    assert names(tmp_path) == {"here"}
    assert names(here) == set()


@pytest.mark.parametrize("end", ["put_back", "let_go"])
def test_killed_between_stepping_aside_and_coming_back(end: str, tmp_path: Path) -> None:
    """Under the name, or beside it, the old one is whole until the end; then it is not half there."""
    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        here = folder / "here"
        here.mkdir(parents=True)
        for name in "abc":
            (here / name).write_text("old")
        child = os.fork()
        if child == 0:
            kill_at_call(at)
            files.set_aside(here)
            here.mkdir()
            getattr(files, end)(here)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if here in files.aside(folder):
            files.put_back(here)
        files.sweep(folder)
        assert names(folder) == {"here"}
        assert names(here) == set("abc") or (end == "let_go" and names(here) == set())
        if not os.WIFSIGNALED(status):
            break
    assert at > 3


@pytest.mark.parametrize("writer", [files.atomic_file, files.atomic_folder])
def test_the_first_error_is_the_one_that_is_told(
    writer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        if path.name.endswith(files.TEMPORARY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "_remove", broken)
    with pytest.raises(RuntimeError, match="the first"), writer(tmp_path / "a"):
        raise RuntimeError("the first")
