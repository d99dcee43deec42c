"""The tensors of a resume point: one safetensors file of one process, a file a rank of several.

Several ranks write by torch.distributed.checkpoint in its Hugging Face format: safetensors files, each with
the places of its parts in the whole tensors. Any number of processes reads what any number wrote, the file of
one included; there is no pickle beside it, which the library's other formats have.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from liubai import ranks

if TYPE_CHECKING:
    import torch

TENSORS = "tensors.safetensors"
ENDING = "*.safetensors"


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write ``tensors`` into ``folder``, rank 0's, by all ranks; the digest of what was written."""
    if ranks.world() > 1 and tensors:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter  # type: ignore[attr-defined]
        from torch.distributed.checkpoint.state_dict_saver import save

        folder = Path(ranks.gather(str(folder))[0])
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    elif ranks.is_main():
        _write_alone(folder / TENSORS, tensors)
    return _digest(folder)


def read(
    folder: Path, digest: str, into: Mapping[str, torch.Tensor] | None = None
) -> Mapping[str, torch.Tensor]:
    """What :func:`write` wrote. Several ranks need tensors to read it ``into``, shared out as they like; one
    process has them all on the CPU. Raises ``ValueError`` or ``OSError`` for what is damaged."""
    # the format notices a short file, not a flipped bit
    if _digest(folder) != digest:
        raise ValueError("its checksum differs")
    files = sorted(folder.glob(ENDING))
    if all(file.stat().st_size == 0 for file in files):
        return {}
    if ranks.world() == 1 and [file.name for file in files] == [TENSORS]:
        from safetensors.torch import load_file

        return load_file(files[0])
    import torch
    from torch.distributed.checkpoint import HuggingFaceStorageReader  # type: ignore[attr-defined]
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    if ranks.world() > 1:
        found = dict(into or {})
        load(found, storage_reader=reader)
        return found
    stored = reader.read_metadata().state_dict_metadata
    found = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in stored.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings(action="ignore"):  # that it is for one process
        load(found, storage_reader=reader, no_dist=True)
    return found


def _write_alone(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:  # a stage without tensors does not pay for importing torch
        path.write_bytes(b"")
        return
    from safetensors.torch import save_file

    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # the format refuses tensors that share memory: tied weights are written twice
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    save_file(ready, path)


def _digest(folder: Path) -> str:
    """Of one file its own, of several that of all of theirs; each rank reads some."""
    folder = Path(ranks.gather(str(folder))[0])
    files = sorted(folder.glob(ENDING))
    found = ranks.dealt(ranks.gather([_of_file(file) for file in ranks.own(files)]))
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
