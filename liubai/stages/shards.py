"""The tensors of a resume point: one safetensors file of one process, a file a rank of several.

Several ranks write by torch.distributed.checkpoint in its Hugging Face format: safetensors files, each with
the places of its parts in the whole tensors. Any number of processes reads what any number wrote, the file of
one included; there is no pickle beside it, which the library's other formats have.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from liubai import ranks
from liubai.errors import UserError
from liubai.files import naming_full_disk

if TYPE_CHECKING:
    import torch

TENSORS = "tensors.safetensors"
ENDING = "*.safetensors"
#: Seconds in which a network's disk may still show a rank an old list of what is there.
LAG = 10.0


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write ``tensors`` into ``folder``, rank 0's, by all ranks; the digest of what was written. Raises
    ``UserError`` when the disk is full, or is not one that all ranks see."""
    folder = Path(ranks.gather(str(folder))[0])
    if ranks.world() > 1 and tensors:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter  # type: ignore[attr-defined]
        from torch.distributed.checkpoint.state_dict_saver import save

        with naming_full_disk(folder), _first_failure():
            save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    elif ranks.is_main():
        _write_alone(folder / TENSORS, tensors)
    return _digest(_files(folder))


def read(
    folder: Path, digest: str, into: Mapping[str, torch.Tensor] | None = None
) -> Mapping[str, torch.Tensor]:
    """What :func:`write` wrote. Several ranks need tensors to read it ``into``, shared out as they like; one
    process has them all on the CPU. Raises ``ValueError`` or ``OSError`` for what is damaged, ``UserError``
    for what is not of the names and shapes of ``into``."""
    files = _files(folder)
    # the format notices a short file, not a flipped bit
    if _digest(files) != digest:
        raise ValueError("its checksum differs")
    if all(file.stat().st_size == 0 for file in files):
        return {}
    if ranks.world() == 1 and [file.name for file in files] == [TENSORS]:
        from safetensors.torch import load_file

        alone = load_file(files[0])
        _require_same(folder, {n: t.shape for n, t in alone.items()}, into)
        return alone
    import torch
    from torch.distributed.checkpoint import HuggingFaceStorageReader  # type: ignore[attr-defined]
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    _require_same(folder, {n: m.size for n, m in stored.items()}, into)  # type: ignore[union-attr]
    with _first_failure():
        if ranks.world() > 1:
            found = dict(into or {})
            load(found, storage_reader=reader)
            return found
        found = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in stored.items()}  # type: ignore[union-attr]
        with warnings.catch_warnings(action="ignore"):  # that it is for one process
            load(found, storage_reader=reader, no_dist=True)
        return found


def _require_same(
    folder: Path, stored: Mapping[str, torch.Size], into: Mapping[str, torch.Tensor] | None
) -> None:
    if into is None:
        return
    wanted = {name: tensor.shape for name, tensor in into.items()}
    if odd := sorted(n for n in stored.keys() | wanted.keys() if stored.get(n) != wanted.get(n)):
        raise UserError(
            f"the saved state '{folder}' holds other tensors than this stage keeps ({odd[0]}); an earlier "
            f"version of liubai wrote it. Delete the folder '{folder}' to begin its stage again"
        )


@contextmanager
def _first_failure() -> Iterator[None]:
    """What failed on the first of the ranks where something did, in the place of the library's error: that is
    no ``Exception``, and passes by all who clean up after one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from error


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


def _files(folder: Path) -> list[Path]:
    """Those of a resume point, which all ranks must see. Raises ``UserError`` when one does not."""
    here = [file.name for file in folder.glob(ENDING)]
    names = sorted({name for seen in ranks.gather(here) for name in seen})
    files = [folder / name for name in names]
    missing = ranks.gather(_missing(files))
    for number, names in enumerate(missing):
        if names:
            raise UserError(
                f"rank {number} does not see '{folder / names[0]}', which another one does; the run folder "
                "must be on a disk that all machines see. Name one with --out"
            )
    return files


def _missing(files: Iterable[Path]) -> list[str]:
    end = time.monotonic() + LAG
    while missing := [file.name for file in files if not file.exists()]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return missing


def _digest(files: list[Path]) -> str:
    """Of one file its own, of several that of all of theirs; each rank reads some."""
    found = ranks.dealt(ranks.gather([_of_file(file) for file in ranks.own(files)]))
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
