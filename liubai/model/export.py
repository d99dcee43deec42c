"""``liubai export``: a checkpoint or an adapter as one plain folder or file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from liubai.errors import UserError
from liubai.model import lora
from liubai.model.checkpoint import load_tokenizer, read_config, save_checkpoint, stored_weights
from liubai.model.config import Dtype, ModelConfig
from liubai.model.gguf import write_gguf
from liubai.model.hub import find_folder
from liubai.model.transformer import Transformer
from liubai.text.template import Template, template_source
from liubai.text.tokenizer import TextTokenizer


class Lazy(Mapping[str, Tensor]):
    """Parameter name -> tensor, read when it is asked for and not kept. Raises ``UserError`` for one that
    ``dtype`` cannot hold."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]], dtype: str) -> None:
        self._readers, self._dtype = readers, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._readers[name]()
        if not tensor.to(getattr(torch, self._dtype)).isfinite().all():
            raise UserError(f"{name} has values that are not finite in {self._dtype}; name another --dtype")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint without its weights in memory: ``model`` is shapes on the meta device."""

    model: Transformer
    weights: Mapping[str, Tensor]
    tokenizer: TextTokenizer
    template: str | None


def export(
    path: str | Path, to: Literal["gguf", "hf"], out: Path, dtype: Dtype | None = None
) -> dict[str, Any]:
    """Write the checkpoint or adapter ``path`` to ``out`` and say what was written.

    An adapter is merged into its model. Raises ``UserError`` when ``out`` is there already and for
    whatever is wrong with ``path``; then nothing is written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"'{out}' is there already; name a new {'file' if to == 'gguf' else 'folder'}")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder '{out.parent}' to write '{out.name}' in; make it first")
    with opened(find_folder(path), dtype) as source:
        config = source.model.config
        caveats: list[str] = []
        if to == "gguf":
            shapes = source.model.state_dict()
            caveats = write_gguf(
                out, config, source.weights, shapes, source.tokenizer, source.template, name=out.stem
            )
        else:
            save_checkpoint(out, source.model, source.tokenizer, source.template, source.weights)
            if config.crate:
                caveats = [
                    f"{config.architecture} is a format of Liubai's own: transformers and vLLM cannot read it"
                ]
    files = [out] if out.is_file() else list(out.iterdir())
    return {
        "path": str(out),
        "to": to,
        "architecture": config.architecture,
        "parameters": source.model.count_parameters(),
        "dtype": config.dtype,
        "bytes": sum(file.stat().st_size for file in files),
        "caveats": caveats,
    }


@contextmanager
def opened(folder: Path, dtype: Dtype | None) -> Iterator[Opened]:
    """A checkpoint's parts in ``dtype`` (its own by default); an adapter is merged as it is read."""
    adapter = folder if (folder / lora.CONFIG).is_file() else None
    base = find_folder(lora.base_of(folder)) if adapter else folder
    config = read_config(base)
    config = replace(config, dtype=dtype or config.dtype)
    tokenizer = load_tokenizer(base, config)
    template = template_source(base)
    if template is not None:
        Template(tokenizer, template)  # one that does not work is found out here, not by the next program
    model, shapes = _shapes(config), _shapes(config)
    with stored_weights(base, shapes) as stored:
        readers: dict[str, Callable[[], Tensor]] = dict(stored)
        if adapter:
            lora.load_adapter(adapter, model)
            for name, layer in lora.adapters(model):
                readers[f"{name}.weight"] = partial(_merged, layer, stored[f"{name}.weight"])
        yield Opened(shapes, Lazy(readers, config.dtype), tokenizer, template)


def _merged(layer: lora.LoraLinear, read: Callable[[], Tensor]) -> Tensor:
    return layer.merged(read().float())


def _shapes(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)
