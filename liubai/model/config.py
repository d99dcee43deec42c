"""The shape of a model, in Hugging Face's words, for the architectures that one class covers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from liubai.errors import UserError

#: architecture name in config.json -> (model_type, q/k norm, qkv bias)
ARCHITECTURES: dict[str, tuple[str, bool, bool]] = {
    "LlamaForCausalLM": ("llama", False, False),
    "Qwen2ForCausalLM": ("qwen2", False, True),
    "Qwen3ForCausalLM": ("qwen3", True, False),
    "CrateForCausalLM": ("liubai_crate", False, False),
    "CrateAlphaForCausalLM": ("liubai_crate", False, False),
}
#: those that no other program knows (:mod:`liubai.model.crate`)
OWN = ("CrateForCausalLM", "CrateAlphaForCausalLM")
#: what gives a text one number (:mod:`liubai.model.scorer`) -> the language model of the same trunk
SCORERS = {name.replace("ForCausalLM", "ForSequenceClassification"): name for name in ARCHITECTURES}
#: in config.json's words; others are refused, never rounded to
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """How Llama 3.1 and later stretch RoPE beyond the ``original_max_position_embeddings`` of pre-training:
    long wavelengths by ``factor``, short ones not at all, those between by degrees."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Fields carry config.json's names, so a checkpoint reads without a glossary. ``dtype`` is that of the
    saved weights; several ``eos_token_id`` end an answer alike."""

    architecture: str = "Qwen3ForCausalLM"
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise _unsupported(f"architecture '{self.architecture}'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.crate and self.num_key_value_heads != self.num_attention_heads:
            raise UserError(
                f"{self.architecture} has one projection for queries, keys and values: num_key_value_heads "
                f"({self.num_key_value_heads}) must be num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs")

    @property
    def crate(self) -> bool:
        return self.architecture in OWN

    @property
    def qk_norm(self) -> bool:
        return ARCHITECTURES[self.architecture][1]

    @property
    def qkv_bias(self) -> bool:
        return ARCHITECTURES[self.architecture][2]

    def to_hf(self, *, scorer: bool = False) -> dict[str, Any]:
        """config.json, as transformers writes it: of the language model or the ``scorer`` of this trunk."""
        fields = asdict(self)
        architecture = fields.pop("architecture")
        theta, stretch, dtype = fields.pop("rope_theta"), fields.pop("rope_scaling"), fields.pop("dtype")
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        scaling = {"rope_type": "llama3", **stretch} if stretch else None
        name, labels = architecture, dict[str, Any]()
        if scorer:
            name = next(scoring for scoring, lm in SCORERS.items() if lm == architecture)
            labels = {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
            ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
            if self.pad_token_id in ends:
                # for transformers a text ends before its padding: there an end token must not be any
                fields["pad_token_id"] = None
        return {
            "architectures": [name],
            "model_type": ARCHITECTURES[architecture][0],
            **fields,
            **labels,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "relu" if self.crate else "silu",
            "initializer_range": 0.02,
            "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta},
            "rope_theta": theta,
            "rope_scaling": scaling,
            "use_cache": True,
            "torch_dtype": dtype,
            "dtype": dtype,
        }

    @classmethod
    def from_hf(cls, raw: dict[str, Any], *, scorer: bool = False) -> ModelConfig:
        """Read config.json of transformers (either generation of the rope and dtype keys), a language model's
        or a ``scorer``'s.

        Raises ``UserError`` for what this class does not cover: it is better to refuse than to
        compute something else.
        """
        names = raw.get("architectures") or ["none named"]
        known = SCORERS if scorer else {name: name for name in ARCHITECTURES}
        if raw.get("auto_map"):
            raise _unsupported(
                f"'{names[0]}' brings model code of its own (auto_map), which is never run; it", known
            )
        if names[0] not in known:
            raise _unsupported(f"architecture '{names[0]}'", known)
        if scorer and (labels := _labels(raw)) != 1:
            raise UserError(f"config.json has {labels} labels (num_labels), which is not supported; 1 is")
        act = "relu" if known[names[0]] in OWN else "silu"
        if raw.get("hidden_act", act) != act:
            raise UserError(f"hidden_act '{raw['hidden_act']}' is not supported (only {act} is)")
        for key in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
            if raw.get(key):
                raise UserError(f"config.json sets {key}, which is not supported")
        if raw.get("partial_rotary_factor", 1) != 1:
            raise UserError("config.json sets partial_rotary_factor, which is not supported")
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise UserError(f"dtype '{dtype}' is not supported; supported: {', '.join(DTYPES)}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        heads = _whole(raw, "num_attention_heads")
        hidden = _whole(raw, "hidden_size")
        eos = raw.get("eos_token_id")
        return cls(
            architecture=known[names[0]],
            vocab_size=_whole(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(raw, "intermediate_size"),
            num_hidden_layers=_whole(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_whole(raw, "num_key_value_heads", heads),
            head_dim=_whole(raw, "head_dim", hidden // heads),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
            rope_scaling=_scaling(rope),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            max_position_embeddings=_whole(raw, "max_position_embeddings", 2048),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=raw.get("pad_token_id"),
            dtype=dtype,
        )


def _unsupported(what: str, known: Iterable[str] = ARCHITECTURES) -> UserError:
    return UserError(f"{what} is not supported; supported: " + ", ".join(known))


def _labels(raw: dict[str, Any]) -> object:
    """How many numbers a classifier gives; transformers does not write down its default."""
    names = raw.get("id2label")
    return len(names) if isinstance(names, dict) else raw.get("num_labels", 2)


def _scaling(rope: dict[str, Any]) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rope scaling '{kind}' is not supported; supported: none, llama3")
    numbers: dict[str, Any] = {}
    for name in Llama3Rope.__dataclass_fields__:
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"config.json: rope scaling llama3 needs {name}, a number above 0, not {value!r}")
        numbers[name] = value
    return Llama3Rope(**numbers)


def _whole(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    """A size from config.json; ``null`` is the same as leaving it out."""
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json lacks {name}")
    if type(value) is not int or value < 1:
        raise UserError(f"config.json: {name} must be a whole number above 0, not {value!r}")
    return value
