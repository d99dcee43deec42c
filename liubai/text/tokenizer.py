"""Tokenizers: the small world's own word-level one, one learned from texts, and any ``tokenizer.json``.

All are ``tokenizers.Tokenizer``; this wrapper adds the ids that the rest of the house needs by
name. Text is encoded once, on the way in; completions are decoded to grade and to show, and never
encoded again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from liubai.errors import UserError

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
BOS, EOS, UNKNOWN = "<|start|>", "<|end|>", "<|unknown|>"

#: Words, and numbers with the sign that says their role (``=7`` a result, ``:28`` a distance).
PIECES = r"</?[a-z]+>|<\|[a-z]+\|>|(?:->|=|:)(?:\d+|big|far)|\d+|\p{Han}+|[A-Za-z]+|\S"

#: What byte pairs may not be merged across, as in Llama 3: a word with the blank before it, three digits.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextTokenizer:
    """A ``tokenizers.Tokenizer`` with named special ids.

    An answer ends with any of ``eos_ids``; the first, ``eos``, is the one that is written. ``config`` is the
    tokenizer_config.json that came with it, kept for whoever opens our checkpoints. Raises ``UserError`` when
    the tokenizer has no end-of-text token: an engine could never stop.
    """

    def __init__(
        self,
        backend: Tokenizer,
        eos: str = EOS,
        bos: str | None = BOS,
        *,
        more_eos: Sequence[int] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            raise UserError(f"the tokenizer has no end token '{eos}'; name it in config.json")
        self.backend = backend
        self.eos, self.bos = eos, bos
        self.eos_id: int = eos_id
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((eos_id, *more_eos)))
        self.config = config
        self.bos_id: int | None = backend.token_to_id(bos) if bos is not None else None
        self.pad_id = self.eos_id  # safe: masks are carried, never inferred from ids

    @property
    def unknown_id(self) -> int | None:
        """What stands for words that it does not have; byte-level tokenizers have them all."""
        token = getattr(self.backend.model, "unk_token", None)
        return self.backend.token_to_id(token) if token else None

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ``ids``. Tags are kept; ``skip_special`` drops only start and end tokens."""
        if skip_special:
            ids = [i for i in ids if i not in (*self.eos_ids, self.bos_id)]
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def save(self, path: Path) -> None:
        self.backend.save(str(path))


def word_level(vocabulary: Iterable[str]) -> TextTokenizer:
    """The small world's tokenizer: one token a word, whole numbers as single tokens."""
    words = dict.fromkeys([UNKNOWN, BOS, EOS, *TAGS, *vocabulary])
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(PIECES), "isolated")]
    )
    backend.add_special_tokens([UNKNOWN, BOS, EOS])
    return TextTokenizer(backend)


def byte_level(texts: Iterable[str], vocabulary: int) -> TextTokenizer:
    """Byte pairs learned from ``texts``: at most ``vocabulary`` tokens, and no text that it cannot write.
    Words and numbers up to 999 that are frequent become single tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TAGS),
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # the tags are tokens of their own, so nothing is learned from their letters
    pieces = (piece for text in texts for piece in re.split("|".join(TAGS), text))
    backend.train_from_iterator(pieces, trainer)
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return TextTokenizer(backend)
