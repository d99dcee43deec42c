"""LoRA (Hu et al. 2021, arXiv 2106.09685): train two thin matrices beside each frozen one.

``attach`` turns chosen linear layers into ``W x + (alpha/r)·B A x``; ``merged`` gives the weights of a plain
model, which is what engines run and checkpoints hold. Adapters are read and written as PEFT's files.
Left out on purpose: dropout, DoRA, layers of their own ranks, trained embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from liubai import ranks
from liubai.errors import UserError
from liubai.files import atomic_folder, read_json
from liubai.model.checkpoint import to_hf_name
from liubai.model.matmul import Linear, linear
from liubai.model.transformer import Transformer
from liubai.seeds import derive

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: what PEFT puts before the names of the model that it wraps
PREFIX = "base_model.model."
#: settings of PEFT's that must be as they are here, or absent
PLAIN: dict[str, object] = {
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
ALL: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraConfig(BaseModel):
    """Its scale is ``alpha / rank``. All linear layers by default: attention alone learns worse."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    targets: tuple[Target, ...] = Field(ALL, min_length=1)


class LoraLinear(Linear):
    """A frozen linear layer and its two thin matrices, ``lora_a [r, in]`` and ``lora_b [out, r]``."""

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        a = torch.empty(rank, base.in_features)
        # Kaiming uniform with a = √5, PEFT's choice; b is 0, so the first step is the base model's
        a.uniform_(-(base.in_features**-0.5), base.in_features**-0.5, generator=generator)
        self.lora_a = nn.Parameter(a.to(base.weight.device, dtype))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + linear(linear(input, self.lora_a), self.lora_b) * self.scale

    def merged(self, weight: Tensor | None = None) -> Tensor:
        """The weight of a plain layer that computes the same, in float32 or wider on the way; ``weight``
        stands in for the layer's own where that is only a shape."""
        weight = ranks.whole(self.weight) if weight is None else weight
        return merge(weight, ranks.whole(self.lora_a), ranks.whole(self.lora_b), self.scale)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``weight`` with an adapter's two matrices in it."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + b.to(wide) @ a.to(wide) * scale).to(weight.dtype)


def attach(model: Transformer, config: LoraConfig, seed: int) -> None:
    """Freeze ``model`` and give its target layers adapters. Raises ``UserError`` if it has some."""
    if next(adapters(model), None):
        raise UserError("this model has an adapter already; merge it first")
    if model.config.crate:
        raise UserError(f"there are no adapters for {model.config.architecture}; leave lora out")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(derive(seed, "lora"))
    scale = config.alpha / config.rank
    for block in model.layers:
        for part in block.children():
            for name, layer in list(part.named_children()):
                if name in config.targets and isinstance(layer, nn.Linear):
                    setattr(part, name, LoraLinear(layer, config.rank, scale, generator, model.dtype))


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLinear))


def merged(model: Transformer) -> Mapping[str, Tensor]:
    """The state of a plain model that computes the same; ``model``'s own if it has no adapters. What is
    merged is so when it is asked for, and whole on every rank: all ask for the same, in the same order."""
    return _Merged(model)


class _Merged(Mapping[str, Tensor]):
    def __init__(self, model: Transformer) -> None:
        self._state = {n: t for n, t in model.state_dict().items() if not n.endswith((".lora_a", ".lora_b"))}
        self._layers = {f"{name}.weight": layer for name, layer in adapters(model)}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers.get(name)
        return layer.merged() if layer else self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What changes in training: all parameters, or those of the adapters."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def save_adapter(folder: Path, model: Transformer, config: LoraConfig, base: str) -> None:
    """Write the adapters as PEFT does; ``base`` names the model that they belong to."""
    tensors = {
        f"{PREFIX}{to_hf_name(name)}.lora_{letter.upper()}.weight": ranks.whole(
            getattr(layer, f"lora_{letter}").detach()
        ).contiguous()
        for name, layer in adapters(model)
        for letter in "ab"
    }
    if ranks.is_main():
        write_adapter(folder, tensors, config, base)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base: str) -> None:
    """The same from tensors under PEFT's names."""
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": sorted(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_folder(folder) as new:
        save_file(dict(tensors), new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: str | Path, model: Transformer) -> LoraConfig:
    """Attach the adapters of a PEFT folder. Raises ``UserError`` for what would be computed otherwise.

    They are real on the CPU even where ``model`` is only shapes (on the meta device).
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"'{folder}' is not an adapter: it has no {WEIGHTS}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{folder / WEIGHTS}' is corrupt or truncated ({error}); copy it again") from error
    attach(model, config, seed=0)
    wanted = {
        f"{PREFIX}{to_hf_name(name)}.lora_{letter.upper()}.weight": (layer, f"lora_{letter}")
        for name, layer in adapters(model)
        for letter in "ab"
    }
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        what = "lacks" if odd[0] in wanted else "has an unknown tensor"
        raise UserError(f"the adapter '{folder}' {what} {odd[0]}; is it for another model?")
    for name, (layer, letter) in wanted.items():
        old, new = getattr(layer, letter), tensors[name]
        if new.shape != old.shape:
            raise UserError(f"'{folder}': {name} is {list(new.shape)}, the model takes {list(old.shape)}")
        device = "cpu" if old.is_meta else old.device
        setattr(layer, letter, nn.Parameter(new.to(device, old.dtype)))
    return config


def base_of(folder: Path) -> str:
    """The folder or hub id of the model that the adapter in ``folder`` belongs to."""
    base = _read(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"'{folder / CONFIG}' does not say which model it is for (base_model_name_or_path)")
    return base


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / CONFIG)
    except FileNotFoundError:
        raise UserError(f"'{folder}' is not an adapter: it has no {CONFIG}") from None
    except ValueError as error:
        raise UserError(f"'{folder / CONFIG}' is not valid JSON ({error})") from error


def _read_config(folder: Path) -> LoraConfig:
    raw = _read(folder)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"'{folder}': adapters of type {raw.get('peft_type')} are not supported; LORA is")
    for key, plain in PLAIN.items():
        if raw.get(key) not in (plain, None):
            raise UserError(f"'{folder / CONFIG}' sets {key}, which is not supported")
    targets = raw.get("target_modules")
    known = [t for t in ALL if isinstance(targets, list) and t in targets]
    if not isinstance(targets, list) or len(known) != len(set(targets)):
        raise UserError(f"'{folder / CONFIG}': target_modules must be of {', '.join(ALL)}")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not alpha > 0:
        raise UserError(f"'{folder / CONFIG}' needs r and lora_alpha, numbers above 0")
    scale = alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank
    return LoraConfig(rank=rank, alpha=scale * rank, targets=tuple(known))
