"""Checkpoints are Hugging Face folders: config.json, model.safetensors, tokenizer.json,
generation_config.json, tokenizer_config.json, chat_template.jinja. Nothing is pickled.

The one place where our parameter names meet Hugging Face's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from liubai.errors import UserError
from liubai.files import atomic_folder
from liubai.model.config import ModelConfig
from liubai.model.transformer import Transformer
from liubai.text.tokenizer import TextTokenizer


def to_hf_name(name: str) -> str:
    """``layers.0.mlp.up_proj.weight`` -> ``model.layers.0.mlp.up_proj.weight``."""
    return name if name.startswith("lm_head") else f"model.{name}"


def save_checkpoint(folder: Path, model: Transformer, tokenizer: TextTokenizer, template: str) -> None:
    """Write a complete checkpoint, atomically: the folder appears whole or not at all."""
    c = model.config
    tensors = {to_hf_name(n): t.detach().contiguous() for n, t in model.state_dict().items()}
    with atomic_folder(folder) as new:
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(new / "tokenizer.json")
        (new / "chat_template.jinja").write_text(template, encoding="utf-8")
        special = {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id}
        _write_json(new / "config.json", c.to_hf())
        _write_json(new / "generation_config.json", {**special, "pad_token_id": c.pad_token_id})
        _write_json(
            new / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": tokenizer.bos,
                "eos_token": tokenizer.eos,
                "pad_token": tokenizer.eos,
                "model_max_length": c.max_position_embeddings,
                "clean_up_tokenization_spaces": False,
            },
        )


def load(path: str | Path) -> tuple[Transformer, TextTokenizer]:
    """A model (float32, on the CPU) and its tokenizer from a Hugging Face folder.

    Raises ``UserError`` for a folder that is not one, an unsupported architecture, a corrupt or
    truncated file, and missing, extra or misshapen weights: each with the name of what is wrong.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder '{folder}'")
    config = ModelConfig.from_hf(_read_json(folder / "config.json"))
    model = Transformer(config)
    load_weights(model, read_weights(folder), folder)
    return model.eval(), load_tokenizer(folder, config)


def read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    if not path.exists():
        raise UserError(f"'{folder}' has no model.safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is corrupt or truncated ({error}); write or copy it again") from error


def load_weights(model: Transformer, weights: Mapping[str, Tensor], source: Path) -> None:
    """Fill ``model`` from Hugging Face names; every tensor must be there, fit, and be wanted."""
    own = model.state_dict()
    wanted = {to_hf_name(name): name for name in own}
    # some exporters write the tied head once more; it is the embedding
    spare = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(wanted.keys() - weights.keys())
    extra = sorted(weights.keys() - wanted.keys() - spare)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
        raise UserError(f"the checkpoint '{source}' {what}, which its config.json does not allow")
    with torch.no_grad():
        for theirs, ours in wanted.items():
            if weights[theirs].shape != own[ours].shape:
                raise UserError(
                    f"'{source}': {theirs} is {list(weights[theirs].shape)}, "
                    f"config.json says {list(own[ours].shape)}"
                )
            own[ours].copy_(weights[theirs])


def load_tokenizer(folder: Path, config: ModelConfig) -> TextTokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"'{folder}' has no tokenizer.json")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"'{path}' is not a tokenizer ({error})") from error
    if config.eos_token_id is None:
        raise UserError(f"'{folder}/config.json' names no eos_token_id: answers could never end")
    eos = backend.id_to_token(config.eos_token_id)
    if eos is None:
        raise UserError(f"eos_token_id {config.eos_token_id} of '{folder}' is not in its tokenizer.json")
    bos = backend.id_to_token(config.bos_token_id) if config.bos_token_id is not None else None
    return TextTokenizer(backend, eos=eos, bos=bos)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path.parent}' is not a checkpoint: it has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise UserError(f"'{path}' must hold a JSON object")
    return raw


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
