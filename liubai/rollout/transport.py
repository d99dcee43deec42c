"""How new weights reach an engine that is not this process's own model. An engine's ``load`` is a transfer.

``folder`` is a Hugging Face folder on a disk that both sides see, and always works; ``lora`` is a folder
with the adapter alone, under a name of its own for each version, so that nothing can mistake an old one for
it. Both write into a folder that nobody else writes into (:func:`own_folder`). ``native`` is vLLM's
weight-transfer API, of which ``vllm_engine`` knows the one side and :class:`Receiver` the other.

Left out on purpose: durability. A folder of weights is for the engine, not for the next day, so nothing
waits for the disk; resume points are the stage's business.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from liubai.errors import UserError
from liubai.files import naming_full_disk, remove_folder, write_json, write_text
from liubai.model.checkpoint import INDEX, WEIGHTS, to_hf_name
from liubai.model.lora import PREFIX, LoraConfig, merge, write_adapter

#: Written last: a folder with it is whole. What else says so, a rename, does not reach every kind of shared
#: disk.
STABLE = "STABLE"
#: Adapters of ours, in the folder and in the engine.
POLICY = re.compile(r"policy-v\d+")
#: What a version is in, and what is left of one that was being written or removed when the run was killed.
VERSION = re.compile(rf"(step-\d{{6,}}|{POLICY.pattern})|\.(step-\d{{6,}}|{POLICY.pattern})\..+")
#: Says in a stage's folder where its weights are.
PLACE = "place.txt"
#: What tensors are called in the format's header.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Value = TypeVar("Value")


class Receiver(Protocol):
    """The engine's side of a transfer. The last four are vLLM's own protocol for trainers."""

    def reload(self, folder: Path) -> None:
        """Read the weights of a Hugging Face folder in the place of the old ones."""

    def load_adapter(self, name: str, number: int, folder: Path) -> None:
        """From now on, answers are written with this adapter."""

    def unload_adapter(self, name: str, number: int) -> None: ...

    def adapters(self) -> list[str]:
        """The names of those that are loaded."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class Transport(Protocol):
    def send(self, weights: Mapping[str, Tensor], version: int, receiver: Receiver) -> None:
        """Returns when the weights are in use. Raises ``UserError`` when they cannot be brought there."""

    def close(self) -> None:
        """Leave nothing behind."""


class FolderTransport:
    """``root/step-000017`` holds the weights of version 17, and the small files of the checkpoint
    ``about``."""

    def __init__(self, root: Path, about: Path, lora: LoraConfig | None = None) -> None:
        self.root, self.about, self.lora = root, about, lora

    def send(self, weights: Mapping[str, Tensor], version: int, receiver: Receiver) -> None:
        folder = self.root / f"step-{version:06}"
        with naming_full_disk(folder):
            write_folder(folder, weights, self.about, version, self.lora)
        receiver.reload(folder)
        _only(self.root, folder)

    def close(self) -> None:
        _only(self.root, None)


class LoraTransport:
    """``root/policy-v17`` holds the adapter of version 17, and that is its name. ``base`` is the checkpoint
    that it belongs to; ``used``: the engine may have had other weights, and is given these first. It may
    have adapters, too: those that a killed run left under our names are unloaded, for no name is taken
    twice."""

    def __init__(self, root: Path, base: Path, lora: LoraConfig, *, used: bool = False) -> None:
        self.root, self.base, self.lora, self._used = root, base, lora, used
        self._last: Callable[[], None] | None = None  # unloads the adapter in use

    def send(self, weights: Mapping[str, Tensor], version: int, receiver: Receiver) -> None:
        name, number = f"policy-v{version}", version + 1  # numbers begin at 1
        tensors = {
            f"{PREFIX}{to_hf_name(own[:-1])}{own[-1].upper()}.weight": tensor.detach().cpu().contiguous()
            for own, tensor in weights.items()
            if own.endswith((".lora_a", ".lora_b"))
        }
        write_adapter(self.root / name, tensors, self.lora, str(self.base))
        write_json(self.root / name / STABLE, {"version": version})
        if self._used:
            for left in filter(POLICY.fullmatch, receiver.adapters()):
                receiver.unload_adapter(left, 0)
            receiver.reload(self.base)
            self._used = False
        receiver.load_adapter(name, number, self.root / name)
        if self._last:  # nobody writes with it any more: all answers were called back
            self._last()
        self._last = partial(receiver.unload_adapter, name, number)
        _only(self.root, self.root / name)

    def close(self) -> None:
        if self._last:
            with suppress(UserError):  # the engine may be why the run ends
                self._last()
        _only(self.root, None)


def own_folder(shared: Path, home: Path, stack: ExitStack) -> Path:
    """A name in the folder ``shared`` that no other run has. It is noted in ``home``, the stage's own
    folder, until ``stack`` is left: a run that was killed finds what it wrote, and removes it."""
    note = home / PLACE
    stack.callback(_forget, note)
    with suppress(OSError):
        place = Path(note.read_text(encoding="utf-8"))
        if place.parent == shared:
            return place
        _only(place, None)  # the recipe has another ``shared`` by now
    place = shared / f"liubai-{home.parent.name}-{secrets.token_hex(8)}"
    home.mkdir(parents=True, exist_ok=True)
    write_text(note, str(place))
    return place


def _forget(note: Path) -> None:
    with suppress(OSError):
        note.unlink()
        note.parent.rmdir()


def plain(weights: Mapping[str, Tensor], lora: LoraConfig | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a plain model under Hugging Face's names, one at a time: adapters are merged."""
    for name, tensor in weights.items():
        if name.endswith((".lora_a", ".lora_b")):
            continue
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_a" in weights:
            assert lora is not None
            a, b = weights[f"{stem}.lora_a"], weights[f"{stem}.lora_b"]
            tensor = merge(tensor, a, b, lora.alpha / lora.rank)
        yield to_hf_name(name), tensor


def write_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    about: Path,
    version: int,
    lora: LoraConfig | None = None,
) -> None:
    """A Hugging Face folder with these weights in their own precision, and what else the folder ``about``
    holds. The mark :data:`STABLE` is written last."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    for old in (temporary, folder):
        if old.exists():
            remove_folder(old)
    temporary.mkdir(parents=True)
    for file in (*about.glob("*.json"), *about.glob("*.jinja")):
        if file.name != INDEX:  # the weights are one file here
            shutil.copyfile(file, temporary / file.name)
    write_tensors(temporary / WEIGHTS, weights, lora)
    temporary.rename(folder)
    write_json(folder / STABLE, {"version": version})


def write_tensors(path: Path, weights: Mapping[str, Tensor], lora: LoraConfig | None = None) -> None:
    """A safetensors file, one tensor after the other: no second copy of the model is made on the way, as the
    library's ``save_file`` makes one. https://huggingface.co/docs/safetensors says the format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in weights.items():
        if not name.endswith((".lora_a", ".lora_b")):  # merging changes neither shape nor precision
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[to_hf_name(name)] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in plain(weights, lora):
            whole = tensor.detach().to("cpu").contiguous()
            file.write(whole.view(-1).view(torch.uint8).numpy().data)


def within(seconds: float, what: str, work: Callable[[], Value]) -> Value:
    """What ``work`` returns. Raises ``UserError`` when it has not after so many seconds; it cannot be
    stopped and is left alone then."""
    found: list[Value] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise UserError(f'{what} has not ended after {seconds:.0f} s; transport = "folder" needs no network')
    return found[0]


def _only(root: Path, kept: Path | None) -> None:
    """Remove what earlier versions left in a folder of our own."""
    if not root.is_dir():
        return
    for folder in list(root.iterdir()):
        if folder != kept and VERSION.fullmatch(folder.name):
            remove_folder(folder)
    if kept is None:
        with suppress(OSError):  # it may have been there before, with other things in it
            root.rmdir()
