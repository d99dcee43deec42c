"""From a question to prompt ids: the checkpoint's own chat template, and what it prefilled.

Every checkpoint carries a Jinja chat template, ours as well as Qwen's or Llama's, so there is one
way in. The template object also says what it wrote at the start of the assistant's turn; the format
grader reads the same object, so a prefilled ``<think>`` is never held against the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from liubai.errors import UserError
from liubai.text.tokenizer import END_THINK, THINK, TextTokenizer
from liubai.types import Sample, Stop

#: The small world's: nothing but the question and the blank.
BARE = (
    "{{ bos_token }} {{ messages[-1].content }}"
    "{% if add_generation_prompt %} <think>{% if thinking is defined and not thinking %} </think>{% endif %}"
    "{% endif %}"
)

#: For base models that have no template: think first, then answer. It asks for a structure only,
#: never for reflection or a method (R1 paper, table 1, in our own words).
THINK_ANSWER = (
    "A user asks a question and an assistant solves it. The assistant first works the problem out in "
    "private, between <think> and </think>, and then gives the user the result, between <answer> and "
    "</answer>.\n"
    "{% for message in messages %}"
    "{{ 'User' if message.role == 'user' else 'Assistant' }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: <think>"
    # an expression: the newline right after a block would be trimmed
    "{% if thinking is defined and not thinking %}{{ '\\n' }}</think>{% endif %}{% endif %}"
)


#: what to do about a template that does not do
MEND = "mend the model's chat_template.jinja (or chat_template in its tokenizer_config.json)"


#: what ``strftime_now`` of a template says: the same in every run, so that a run can be repeated
TODAY = date(2025, 1, 20)


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``, in which transformers finds what the assistant said. Our
    masks come with the tokens: here the block is only what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Objection(TemplateError):
    """What a template itself has against a conversation."""


def _refuse(message: str) -> None:
    """``raise_exception`` of a template, which transformers defines, too."""
    raise Objection(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own writes ``<`` as ``\\u003c``, which no model has seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Template:
    """``prompt_ids(question)``, ``chat_ids(messages)`` and ``prefilled``, for thinking on or off.

    ``prefilled`` is what the template already wrote of the answer: ``""``, ``"<think>"``, or an empty
    thought. Raises ``UserError`` when the template does not parse, does not render, or leaves the question
    out.
    """

    def __init__(self, tokenizer: TextTokenizer, source: str, *, thinking: bool = True) -> None:
        self.tokenizer, self.source, self.thinking = tokenizer, source, thinking
        try:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
            )
            environment.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
            environment.filters["tojson"] = _tojson
            self._compiled = environment.from_string(source)  # milliseconds: once, not per prompt
        except TemplateError as error:
            raise UserError(f"the chat template does not parse: {error}; {MEND}") from error
        mark = "\x00"
        tail = self.render(mark).rpartition(mark)[2].rstrip()
        if self.render("a") == self.render("b"):
            raise UserError(f"the chat template writes the same prompt for different questions; {MEND}")
        self.prefilled = THINK if tail.endswith(THINK) else ""
        if tail.endswith(END_THINK):
            self.prefilled = f"{THINK} {END_THINK}"

    def render(self, question: str) -> str:
        """The prompt as text."""
        return self.render_chat([{"role": "user", "content": question}])

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The prompt of a conversation, as text. Messages are Hugging Face's: ``role`` and ``content``, of an
        assistant also ``tool_calls`` and ``reasoning_content``; ``tools`` are OpenAI's functions. Raises
        ``UserError``, caused by an :class:`Objection` where it is the template that does not want them."""
        try:
            return self._compiled.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=True,
                bos_token=self.tokenizer.bos or "",
                eos_token=self.tokenizer.eos,
                thinking=self.thinking,
                enable_thinking=self.thinking,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(f"the chat template does not work: {error}; {MEND}") from error

    def prompt_ids(self, question: str) -> list[int]:
        return self.tokenizer.encode(self.render(question))

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        return self.tokenizer.encode(self.render_chat(messages, tools))

    @cached_property
    def takes_tools(self) -> bool:
        """Does it show the model which functions there are?"""
        messages = [{"role": "user", "content": "a"}]
        function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
        try:
            with_tools = self.render_chat(messages, [{"type": "function", "function": function}])
        except UserError:
            return False
        return with_tools != self.render_chat(messages)


def template_for(tokenizer: TextTokenizer, folder: Path, *, thinking: bool = True) -> Template:
    """The template of a checkpoint folder; :data:`THINK_ANSWER` when it has none (a base model)."""
    return Template(tokenizer, template_source(folder) or THINK_ANSWER, thinking=thinking)


def template_source(folder: Path) -> str | None:
    """What a checkpoint folder says, in either place where Hugging Face keeps it."""
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"'{path}' is not UTF-8 text") from error
    if not config.exists():
        return None
    kept = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(kept, list):  # several, by name
        kept = {entry["name"]: entry["template"] for entry in kept}.get("default")
    return kept or None


def require_readable(template: Template, questions: Sequence[str]) -> None:
    """Raises ``UserError`` when the tokenizer has no tokens for most of ``questions``: what the model would
    be asked is a row of unknowns, though every log shows the clean text."""
    unknown = template.tokenizer.unknown_id
    if unknown is None:
        return
    ids = [i for text in questions for i in template.tokenizer.encode(text)]
    share = ids.count(unknown) / max(1, len(ids))
    if share > 0.5:
        raise UserError(
            f"this model cannot read these questions: {share:.0%} of their tokens are unknown to its "
            "tokenizer. Bring a model with a vocabulary for them, or make one from your own texts "
            "(docs/your-domain.md)"
        )


def text_of(template: Template, sample: Sample) -> str:
    """An answer as text, without its end token. For grading and showing only."""
    ids = sample.completion_ids
    return template.tokenizer.decode(ids[:-1] if sample.stop is Stop.EOS else ids)
