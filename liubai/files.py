"""Files that are whole or not there: every write in the house goes through this module.

A file is written under a temporary name in its own folder, forced to the disk, and renamed; the
rename is the only moment that a reader can see. A killed process leaves the old content or the new,
and perhaps a temporary leftover that :func:`sweep` removes.

Left out on purpose: locking (the runner's business) and platforms without ``os.fsync`` on folders.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from liubai.errors import UserError

#: Endings of our own leftovers: unfinished content, and a folder that was about to be replaced.
TEMPORARY, OLD = ".liubai-tmp", ".liubai-old"


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` atomically and durably. Raises ``UserError`` when the disk is full."""
    with atomic_file(path) as temporary, open(temporary, "xb") as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file under; on success it takes ``path``'s place, on error it goes.

    Raises ``UserError`` when the disk is full.
    """
    with naming_full_disk(path):
        temporary = _temporary(path)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what has to be told
                _remove(temporary)
            raise
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` with UTF-8 text; see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replace ``path`` with indented JSON; see :func:`write_bytes`. NaN is a ``ValueError``."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ``ValueError`` for anything else, ``OSError`` as usual."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def append(path: Path, text: str) -> None:
    """Add UTF-8 text to a log in one write, so that a kill cannot interleave or reorder lines.

    Raises ``UserError`` when the disk is full. Not forced to the disk: whoever needs that calls
    :func:`sync_file`.
    """
    with naming_full_disk(path), open(path, "ab", buffering=0) as file:
        data = memoryview(text.encode("utf-8"))
        while data:
            data = data[file.write(data) :]


def sync_file(path: Path) -> int:
    """Force ``path`` to the disk; its length in bytes (0 when there is no such file)."""
    if not path.exists():
        return 0
    _sync(path)
    return path.stat().st_size


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to fill; on success it takes ``path``'s place, on error it goes.

    Portable renames cannot swap two folders, so the old one steps aside under a name of its own
    first. Whatever the moment of a kill, the old or the new folder is whole under one of the two
    names, and :func:`sweep` of the parent puts it back. Raises ``UserError`` when the disk is full.
    """
    with naming_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            old = _old(path)
            _remove(old)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                _remove(temporary)
            with suppress(OSError):
                recover(path)
            raise
        _sync(path.parent)
        _remove(old)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill never leaves half of it under its own name."""
    if path.exists():
        doomed = _temporary(path)
        os.rename(path, doomed)
        _remove(doomed)
    _remove(_old(path))


def set_aside(path: Path) -> None:
    """Make room in the place of the folder ``path``, whose content waits for :func:`put_back` or
    :func:`let_go`. A kill leaves it whole under one of two names; after one, :func:`aside` finds it."""
    let_go(path)
    os.rename(path, _old(path))


def put_back(path: Path) -> None:
    """What was set aside takes its place again; what is there by now goes. Nothing, if nothing waits."""
    if not _old(path).exists():
        return
    doomed = _temporary(path)
    if path.exists():
        os.rename(path, doomed)
    os.rename(_old(path), path)
    _remove(doomed)


def let_go(path: Path) -> None:
    """Delete what was set aside, so that a kill never leaves half of it to be put back."""
    if _old(path).exists():
        doomed = _temporary(path)
        os.rename(_old(path), doomed)
        _remove(doomed)


def aside(folder: Path) -> list[Path]:
    """The paths in ``folder`` whose old content stands aside."""
    return sorted(folder / old.name[1 : -len(OLD)] for old in folder.glob(f".*{OLD}"))


def recover(path: Path) -> None:
    """Finish what a killed :func:`atomic_folder` left: put the old ``path`` back if it stepped aside."""
    old = _old(path)
    if old.exists() and not path.exists():
        os.rename(old, path)


def sweep(folder: Path) -> None:
    """Put back what stepped aside in ``folder`` and remove the leftovers of killed writers."""
    for leftover in list(folder.glob(f".*{OLD}")):
        recover(folder / leftover.name[1 : -len(OLD)])
        _remove(leftover)
    for leftover in list(folder.glob(f".*{TEMPORARY}")):
        _remove(leftover)


def is_leftover(path: Path) -> bool:
    """Is this a temporary name of this module's?"""
    return path.name.startswith(".") and path.name.endswith((TEMPORARY, OLD))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}{OLD}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """The error of a full disk, raw or wrapped by a library, becomes a ``UserError`` of one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        where = path.parent
        with suppress(OSError):
            where = where.resolve()
        raise UserError(
            f"no space left on '{where}' (writing {path.name}); nothing was lost: what was there "
            "before is whole. Free some space and give the same command again"
        ) from error


def _is_full(error: Exception) -> bool:
    # safetensors raises its own error with the system's words in it
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)
