"""A tokenizer.json in llama.cpp's words: its tokens, their types, its merges and its pre-tokenizer's name.

llama.cpp knows pre-tokenizers by name only and falls back in silence, so one that is not recognised by its
pattern is refused: text would be cut otherwise than in training. Left out on purpose: SentencePiece
vocabularies, and normalisation (llama.cpp has no NFC: text must come composed, as nearly all text does).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from liubai.errors import UserError
from liubai.model.config import ModelConfig
from liubai.text.tokenizer import PIECES, TextTokenizer


class TokenType(IntEnum):
    """``llama_token_type`` of llama.h."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocab:
    """``tokens`` and ``types`` by id, as many as the model has rows; ``caveat`` is for the user."""

    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    unknown_id: int | None = None
    caveat: str | None = None


#: (what cuts text before BPE, does a whole word in the vocabulary skip the merges?) -> llama.cpp's name
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[str, bool], str] = {
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, False): "dbrx",
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
    ("gpt-2", False): "gpt-2",
    ("digits gpt-2", False): "smollm",
}
#: its tokenizer cuts as Qwen2's does and has a name of its own
DEEPSEEK_END = "<｜end▁of▁sentence｜>"


def vocab_of(tokenizer: TextTokenizer, config: ModelConfig) -> Vocab:
    """Raises ``UserError`` for a tokenizer that llama.cpp would not follow."""
    raw: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    kind = raw["model"].get("type")
    if kind == "WordLevel" and _pattern(raw) == PIECES:
        return _small_world(tokenizer, config, raw)
    if kind != "BPE":
        raise _refused(f"is of type {kind}, not byte-level BPE")
    tokens, types = _tokens(tokenizer, config)
    for added in raw["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise _refused(f"has a token '{added['content']}' that swallows what stands beside it")
        # some models forget to call theirs special; llama.cpp goes by their look, too
        looks = added["content"].startswith(("<|", "<｜")) and added["content"].endswith(("|>", "｜>"))
        special = added["special"] or looks
        types[added["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    return Vocab(pre=_pre(raw, tokenizer), tokens=tokens, types=types, merges=merges)


def _pre(raw: dict[str, Any], tokenizer: TextTokenizer) -> str:
    model = raw["model"]
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"sets {key}")
    normalizer = raw.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise _refused(f"changes text before it cuts it ({normalizer['type']})")
    pattern = _pattern(raw)
    name = PRE_TOKENIZERS.get((pattern or "", bool(model.get("ignore_merges"))))
    if name is None:
        raise _refused("cuts text by a pattern that is none of " + ", ".join(PRE_TOKENIZERS.values()))
    return "deepseek-r1-qwen" if name == "qwen2" and tokenizer.id_of(DEEPSEEK_END) is not None else name


def _pattern(raw: dict[str, Any]) -> str | None:
    """What cuts text: a regular expression, or a name for GPT-2's own; None for anything else."""
    outer = raw.get("pre_tokenizer") or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    match [step.get("type") for step in steps]:
        case ["WhitespaceSplit", "Split"] if _isolates(steps[1]):
            return _regex(steps[1])
        case ["Split", "ByteLevel"] if _isolates(steps[0]) and _plain(steps[1], use_regex=False):
            return _regex(steps[0])
        case ["ByteLevel"] if _plain(steps[0], use_regex=True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and _plain(steps[1], use_regex=True):
            return "digits gpt-2"
    return None


def _isolates(split: dict[str, Any]) -> bool:
    return split["behavior"] == "Isolated" and not split["invert"]


def _regex(split: dict[str, Any]) -> str | None:
    regex = split["pattern"].get("Regex")
    return regex if isinstance(regex, str) else None


def _plain(byte_level: dict[str, Any], *, use_regex: bool) -> bool:
    return not byte_level["add_prefix_space"] and byte_level.get("use_regex", True) is use_regex


def _tokens(tokenizer: TextTokenizer, config: ModelConfig) -> tuple[list[str], list[TokenType]]:
    """Models often have more rows than their tokenizer has tokens; the rest gets names that no text has."""
    names = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    rows = range(config.vocab_size)
    types = [TokenType.NORMAL if i in names else TokenType.UNUSED for i in rows]
    return [names.get(i, f"[PAD{i}]") for i in rows], types


def _small_world(tokenizer: TextTokenizer, config: ModelConfig, raw: dict[str, Any]) -> Vocab:
    """llama.cpp has no word-level tokenizer, but it finds USER_DEFINED tokens in any text, the longest
    first. With the space before it in each word, that is right for text whose words all have one, which is
    what the template writes, and answers read as they should."""
    tokens, types = _tokens(tokenizer, config)
    special = {added["id"] for added in raw["added_tokens"]}
    for i, kind in enumerate(types):
        if i in special:
            types[i] = TokenType.CONTROL
        elif kind is TokenType.NORMAL:
            tokens[i], types[i] = f" {tokens[i]}", TokenType.USER_DEFINED
    return Vocab(
        pre="gpt-2",
        tokens=tokens,
        types=types,
        merges=["\u0120 \u0120"],  # the key must be there, and an empty array has no type; none is ever used
        unknown_id=tokenizer.id_of(raw["model"]["unk_token"]),
        caveat="llama.cpp has no word-level tokenizer: it reads what the chat template writes, words of this "
        "vocabulary with one space before each; tokenise any other text with the checkpoint's tokenizer.json",
    )


def _refused(why: str) -> UserError:
    return UserError(
        f"the tokenizer {why}, and llama.cpp would cut text otherwise than in training; "
        "use --to hf, which transformers and vLLM open"
    )
