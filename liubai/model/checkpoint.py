"""Checkpoints are Hugging Face folders: config.json, model.safetensors (or shards and their index),
tokenizer.json, generation_config.json, tokenizer_config.json, chat_template.jinja. Nothing is pickled.

The one place where our parameter names meet Hugging Face's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from liubai import ranks
from liubai.errors import UserError
from liubai.files import atomic_folder
from liubai.model.config import ARCHITECTURES, SCORERS, ModelConfig
from liubai.model.hub import find_folder
from liubai.model.transformer import Transformer
from liubai.text.tokenizer import TextTokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Weights of more bytes than this are written as shards.
SHARD = 5 << 30
#: What weights may be stored as, in the names of safetensors.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

Model = TypeVar("Model", bound=Transformer)


def to_hf_name(name: str) -> str:
    """``layers.0.mlp.up_proj.weight`` -> ``model.layers.0.mlp.up_proj.weight``."""
    return name if name.startswith(("lm_head.", "score.")) else f"model.{name}"


# ---- writing ----


def save_checkpoint(
    folder: Path,
    model: Transformer,
    tokenizer: TextTokenizer,
    template: str | None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a complete checkpoint in ``model.config.dtype``, atomically: the folder appears whole or not at
    all. ``weights`` are the model's, unless others of the same names are given (merged adapters); each is
    asked for once, a shard's at a time. A base model may have no ``template``. All ranks call this, and the
    first one writes."""
    described = model.config.to_hf()
    special = {name: described[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    about = {"config.json": described, "generation_config.json": special}
    save_described(folder, model, tokenizer, template, about, weights)


def save_described(
    folder: Path,
    model: Transformer,
    tokenizer: TextTokenizer,
    template: str | None,
    about: Mapping[str, object],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """:func:`save_checkpoint` for a model of any kind: ``about`` holds the JSON files that say of which."""
    state = model.state_dict()
    given = state if weights is None else weights
    if not ranks.is_main():
        for name in given:
            ranks.whole(given[name])  # the first one gathers it
        return
    with atomic_folder(folder) as new:
        _save_tensors(new, state, given, getattr(torch, model.config.dtype))
        tokenizer.save(new / "tokenizer.json")
        if template is not None:
            (new / "chat_template.jinja").write_text(template, encoding="utf-8")
        for name, value in about.items():
            _write_json(new / name, value)
        _write_json(new / "tokenizer_config.json", _tokenizer_config(tokenizer, model.config))


def _save_tensors(
    folder: Path, shapes: Mapping[str, Tensor], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in weights:
        nbytes = shapes[name].numel() * dtype.itemsize
        size, total = size + nbytes, total + nbytes
        if shards[-1] and size > SHARD:
            shards.append([])
            size = nbytes
        shards[-1].append(name)
    home: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {to_hf_name(n): ranks.whole(weights[n].detach()).to("cpu", dtype).contiguous() for n in names}
        (folder / file).touch()  # as others write: safetensors' own files can be read by their owner alone
        mode = (folder / file).stat().st_mode
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
        home |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": home})


def _tokenizer_config(tokenizer: TextTokenizer, config: ModelConfig) -> dict[str, Any]:
    if tokenizer.config is not None:
        return {k: v for k, v in tokenizer.config.items() if k != "chat_template"}  # it has a file of its own
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos,
        "eos_token": tokenizer.eos,
        "pad_token": tokenizer.eos,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }


# ---- reading ----


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto", "stored"] = torch.float32,
    device: str | torch.device = "cpu",
    mapped: bool = False,
) -> tuple[Transformer, TextTokenizer]:
    """A model and its tokenizer from a Hugging Face folder or, where there is a network, a hub id.

    ``dtype="auto"`` is that of its config.json, ``"stored"`` leaves each tensor in that of its file.
    ``mapped``: weights that are in this dtype and stay on the CPU are the file's own pages; what is never
    looked at takes no memory. Nobody may write into the file.

    Raises ``UserError`` for a folder that is not one, an unsupported architecture, a corrupt or truncated
    file, and missing, extra or misshapen weights: each with the name of what is wrong.
    """
    folder = find_folder(path)
    return load_as(Transformer, folder, read_config(folder), dtype, device, mapped)


def load_as(
    kind: Callable[[ModelConfig], Model],
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype | Literal["auto", "stored"],
    device: str | torch.device,
    mapped: bool = False,
) -> tuple[Model, TextTokenizer]:
    """:func:`load` for a model of any ``kind``."""
    with torch.device("meta"):  # shapes alone; the weights come straight from the file
        model = kind(config)
    wanted = (
        {"auto": getattr(torch, config.dtype), "stored": None}[dtype] if isinstance(dtype, str) else dtype
    )
    weights = read_weights(folder, model, wanted, torch.device(device), mapped)
    model.load_state_dict(weights, assign=True)
    return model.eval(), load_tokenizer(folder, config)


def read_config(folder: Path, *, scorer: bool = False) -> ModelConfig:
    """config.json of a language model or a ``scorer``, whichever is wanted: the other is refused. More tokens
    that end an answer may stand in generation_config.json."""
    raw = _read_json(folder / "config.json")
    name = (raw.get("architectures") or [None])[0]
    if scorer and name in ARCHITECTURES:
        raise UserError(
            f"'{folder}' is a language model ({name}), not a model that scores texts; train a reward or "
            "process model from it first and name that one here"
        )
    if not scorer and name in SCORERS:
        raise UserError(
            f"'{folder}' is a model that scores texts ({name}), not a language model; name it where a reward "
            f"or process model is wanted, and a {SCORERS[name]} here"
        )
    generation = folder / "generation_config.json"
    if generation.exists():
        more = _ids(_read_json(generation).get("eos_token_id"))
        raw["eos_token_id"] = list(dict.fromkeys([*_ids(raw.get("eos_token_id")), *more])) or None
        if raw["eos_token_id"] and len(raw["eos_token_id"]) == 1:
            raw["eos_token_id"] = raw["eos_token_id"][0]
    return ModelConfig.from_hf(raw, scorer=scorer)


def _ids(value: object) -> list[int]:
    return [i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int)]


def read_weights(
    folder: Path, model: Transformer, dtype: torch.dtype | None, device: torch.device, mapped: bool = False
) -> dict[str, Tensor]:
    """The state of ``model`` (of which only the shapes are looked at), in ``dtype`` or in the file's; every
    tensor must be there, fit, and be wanted. One tensor is converted at a time: the peak is one copy of the
    weights."""
    with stored_weights(folder, model) as stored:
        tensors = ((name, read()) for name, read in stored.items())
        # a copy even where nothing changes: the file may be replaced while the model lives
        return {name: t.to(device, dtype or t.dtype, copy=not mapped) for name, t in tensors}


@contextmanager
def stored_weights(folder: Path, model: Transformer) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Parameter name -> what reads it from the open file, in the file's dtype. Raises ``UserError`` unless
    ``folder`` holds exactly the tensors of ``model``, whose shapes alone are looked at, in floating point."""
    own = model.state_dict()
    wanted = {to_hf_name(name): name for name in own}
    # some exporters write the tied head once more; it is the embedding
    spare = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    with _tensors(folder) as home:
        missing = sorted(wanted.keys() - home.keys())
        extra = sorted(
            n for n in home.keys() - wanted.keys() - spare if not n.endswith(".rotary_emb.inv_freq")
        )
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
            raise UserError(f"the checkpoint '{folder}' {what}, which its config.json does not allow")
        for theirs, ours in wanted.items():
            stored = home[theirs].get_slice(theirs)
            if stored.get_dtype() not in FLOATS:
                raise UserError(
                    f"'{folder}': {theirs} is stored as {stored.get_dtype()}, not in floating point; "
                    "quantised weights are not supported: bring the checkpoint that they were made of"
                )
            shape = list(stored.get_shape())
            if shape != list(own[ours].shape):
                raise UserError(f"'{folder}': {theirs} is {shape}, config.json says {list(own[ours].shape)}")
        yield {ours: partial(home[theirs].get_tensor, theirs) for theirs, ours in wanted.items()}


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> the open file that holds it."""
    with ExitStack() as stack:
        files = {name: _open(stack, folder / name) for name in _files(folder)}
        yield {tensor: file for file in files.values() for tensor in file.keys()}  # noqa: SIM118


def _files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if (folder / INDEX).exists():
        home = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(home, dict) or not home:
            raise UserError(f"'{folder / INDEX}' has no weight_map")
        names = sorted({str(name) for name in home.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).exists():
                raise UserError(f"'{folder}' lacks its shard {name}; write or copy it again")
        return names
    if pickled := sorted(folder.glob("*.bin")):
        raise UserError(
            f"'{folder}' has its weights in {pickled[0].name}, a pickle, which may run code and is "
            "never opened; convert it to safetensors"
        )
    raise UserError(f"'{folder}' has no {WEIGHTS}")


def _open(stack: ExitStack, path: Path) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is corrupt or truncated ({error}); write or copy it again") from error


def load_tokenizer(folder: Path, config: ModelConfig) -> TextTokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"'{folder}' has no tokenizer.json")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"'{path}' is not a tokenizer ({error})") from error
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= config.vocab_size:
        raise UserError(f"'{path}' has token id {largest}, config.json only {config.vocab_size} tokens")
    ends = _ids(config.eos_token_id)
    if not ends:
        raise UserError(f"'{folder}/config.json' names no eos_token_id: answers could never end")
    eos = [backend.id_to_token(i) for i in ends]
    if None in eos:
        raise UserError(f"eos_token_id {ends[eos.index(None)]} of '{folder}' is not in its tokenizer.json")
    kept = folder / "tokenizer_config.json"
    about = _read_json(kept) if kept.exists() else None
    if about is not None and "bos_token" in about:
        bos = about["bos_token"]  # Qwen names a bos_token_id in config.json and never writes it
        bos = bos.get("content") if isinstance(bos, dict) else bos
    else:
        bos = backend.id_to_token(config.bos_token_id) if config.bos_token_id is not None else None
    return TextTokenizer(backend, eos=str(eos[0]), bos=bos, more_eos=ends, config=about)


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
