"""What tests of several paths to one answer share: words, a question, and a tiny model that writes."""

from __future__ import annotations

from typing import Any

from conftest import tiny_config, tiny_model

from liubai.rollout.local import LocalWriter, run
from liubai.rollout.paths import Outcome, PathsConfig, answer
from liubai.rollout.thinking import Ask
from liubai.rollout.torch_engine import TorchEngine
from liubai.rollout.writer import Judge, Piece
from liubai.text.template import BARE, Template
from liubai.text.tokenizer import word_level

WORDS = word_level(["a", "b", "c", "try", "wait", "等等", "1", "2", "3", "4"])
TEMPLATE = Template(WORDS, BARE)


def ask(seed: int = 7, max_tokens: int = 40, **more: Any) -> Ask:
    prompt = tuple(TEMPLATE.prompt_ids("a b"))
    return Ask(question="a b", template=TEMPLATE, prompt_ids=prompt, max_tokens=max_tokens, seed=seed, **more)


def engine_of(slots: int = 8) -> TorchEngine:
    model = tiny_model(9, tiny_config(vocab_size=WORDS.vocab_size, eos_token_id=WORDS.eos_id))
    engine = TorchEngine(model, eos_ids=WORDS.eos_ids, slots=slots, max_length=90, lot=1)
    engine.load(model.state_dict(), 0)
    return engine


def local(judges: dict[Judge, Any] | None = None) -> LocalWriter:
    return LocalWriter(engine_of(), eos_ids=WORDS.eos_ids, judges=judges)


def outcome(
    name: str, asked: Ask, writer: LocalWriter | None = None
) -> tuple[Outcome, dict[int, list[Piece]]]:
    writer, told = writer or local(), dict[int, list[Piece]]()

    def heard(i: int, piece: Piece) -> None:
        told.setdefault(i, []).append(piece)

    [found] = run(writer, [answer(writer, asked, PathsConfig.parse(name), heard)])
    return found, told
