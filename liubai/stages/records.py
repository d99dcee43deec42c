"""What stages hand to each other beside checkpoints: answers as JSON lines, with their scores.

``examples.jsonl`` are answers to imitate; ``graded.jsonl`` are all the answers that were sampled, from which
preferences are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from liubai.errors import UserError
from liubai.files import write_text
from liubai.learn.packing import Sequence1
from liubai.text.template import Template
from liubai.text.tokenizer import END_THINK, THINK
from liubai.types import Problem

EXAMPLES, GRADED = "examples.jsonl", "graded.jsonl"


@dataclass(frozen=True, slots=True)
class Example:
    """A question and what is to be written: ``response`` is what follows the template's prompt. ``score`` is
    what the answer is worth, 0 to 1; ``gold`` and ``verifier`` are the problem's."""

    prompt: str
    response: str
    family: str = ""
    language: str = "en"
    score: float = 1.0
    gold: str = ""
    verifier: str = ""
    ended: bool = True  #: by the model itself; what was cut off must not be taught an end

    def problem(self) -> Problem:
        return Problem(self.prompt, self.gold, self.verifier, self.family, self.language)


def example_of(problem: Problem, response: str, score: float = 1.0, ended: bool = True) -> Example:
    p = problem
    return Example(p.prompt, response, p.family, p.language, score, p.gold, p.verifier, ended)


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """One line each, atomically."""
    write_text(path, "".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in examples))


def read_examples(path: Path) -> list[Example]:
    """Raises ``UserError`` with file and line for what is no example."""
    found = []
    # not splitlines: an answer may hold other line ends than ours
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            found.append(Example(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: not an example ({error}); run its stage again") from error
    return found


def encoded(template: Template, example: Example) -> Sequence1:
    """Prompt and response with the end token; ``<think>`` once, by the template or by the answer."""
    tokenizer = template.tokenizer
    prompt = template.prompt_ids(example.prompt)
    response = example.response
    if template.prefilled.endswith(THINK):
        response = response.removeprefix(THINK)
    elif not template.prefilled and END_THINK in response and THINK not in response:
        response = THINK + response
    answer = tokenizer.encode(response)
    if example.ended:
        answer.append(tokenizer.eos_id)
    return Sequence1([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
