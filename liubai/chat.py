"""Questions to a checkpoint in the terminal, every one of them on its own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from liubai.model.checkpoint import load
from liubai.rollout.engine import Engine, Request
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.stages.config import Compute
from liubai.text.template import template_for
from liubai.text.tokenizer import TextTokenizer


def talk(
    checkpoint: Path, compute: Compute, temperature: float, max_tokens: int, seed: int, show_thinking: bool
) -> None:
    """Until Ctrl-D or Ctrl-C. Raises ``UserError`` for a bad checkpoint."""
    model, tokenizer = load(checkpoint, dtype=compute.dtype(), device=compute.where())
    template = template_for(tokenizer, checkpoint)
    room = min(model.config.max_position_embeddings, max_tokens + 2048)
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=1, max_length=room)
    engine.load(model.state_dict(), version=0)
    turn = 0
    try:
        while True:
            question = input("> ").strip()
            prompt = tuple(template.prompt_ids(question)) if question else ()
            if not prompt:
                continue
            if len(prompt) >= room:
                print(f"the question has {len(prompt)} tokens, the model takes {room}", file=sys.stderr)
                continue
            budget = min(max_tokens, room - len(prompt))
            request = Request(
                id=turn,
                prompt_ids=prompt,
                max_tokens=budget,
                seed=derive(seed, "chat", turn),
                temperature=temperature,
            )
            show(texts(engine, tokenizer, request), template.prefilled, show_thinking)
            turn += 1
    except (EOFError, KeyboardInterrupt):
        print()


def texts(engine: Engine, tokenizer: TextTokenizer, request: Request) -> Iterator[tuple[str, bool]]:
    """The whole text so far after every token, and whether it is complete."""
    engine.submit([request])
    while engine.pending:
        ended = engine.step()
        ids = ended[0][1].completion_ids if ended else engine.partials()[0].completion_ids
        yield tokenizer.decode(ids, skip_special=True), bool(ended)


def show(grown: Iterable[tuple[str, bool]], prefilled: str, show_thinking: bool) -> None:
    """Print an answer as it grows: the thought dimmed (or not at all), then the answer."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    shown = ["", ""]  # of the thought, of the answer
    if not show_thinking and dim:
        print(f"{dim}thinking…{plain}", flush=True)
    for text, complete in grown:
        for i, part in enumerate(split_thought(text, prefilled, complete)):
            # a longer text never takes back what a shorter one said
            fresh = part[len(shown[i]) :]
            if not fresh or (i == 0 and not show_thinking):
                continue
            gap = "\n" if i == 1 and not shown[1] and shown[0] else ""
            print(gap + (dim + fresh + plain if i == 0 else fresh), end="", flush=True)
            shown[i] = part
    print()


def split_thought(text: str, prefilled: str, complete: bool) -> tuple[str, str]:
    """``text`` as (thought, answer), without the tags.

    While it is not ``complete``, an ending that may become a tag or a character is held back.
    """
    begin, end = "<think>", "</think>"
    if not complete:
        text = text.rstrip("\ufffd")
        longest = max((n for n in range(1, len(end)) if text.endswith((begin[:n], end[:n]))), default=0)
        text = text[: len(text) - longest]
    if prefilled != begin:
        if not text.lstrip().startswith(begin):
            return "", text.strip() if complete else text.lstrip()
        text = text.lstrip().removeprefix(begin)
    thought, _, answer = text.partition(end)
    return thought.lstrip(), answer.lstrip()
