"""A checkpoint's folder: a local one or, by the id of a Hugging Face repository, a fetched one."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from liubai.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: what a checkpoint is made of; nothing else is fetched, least of all code
PARTS = ["*.json", "*.safetensors", "*.jinja"]

SAMPLE = 4 << 20  #: bytes


def checkpoint_digest(folder: Path) -> str:
    """Of what a checkpoint holds; of weights, which may be large, only the size, the head and the tail."""
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(p for pattern in PARTS for p in folder.glob(pattern)):
        size = path.stat().st_size
        state.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            state.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            state.update(file.read(SAMPLE))
    return state.hexdigest()


def find_folder(path: str | Path) -> Path:
    """``path`` if it is a folder; the local copy of a hub repository, fetched if need be. Raises
    ``UserError`` when there is neither."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(path)):
        raise UserError(f"there is no checkpoint folder '{folder}'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=PARTS))
    except Exception as error:  # the library and its transports raise dozens of kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"there is no checkpoint folder '{folder}', and the hub gave no model of that name ({reason})"
        ) from error
