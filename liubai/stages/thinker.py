"""Small models for the report itself: quantised, with all that a page needs to think with them.

``from`` names the stages whose checkpoints think side by side, in that order. What is written, thinker.json,
is read by ``report/thinker.js``; how far 8 bits change what a model says is measured here, and written with
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from liubai.errors import UserError
from liubai.files import write_json
from liubai.grade import GradeItem, grade, is_bounded
from liubai.model.checkpoint import load, read_config
from liubai.model.config import ModelConfig
from liubai.model.quantise import dequantised, name_of, packed
from liubai.model.transformer import Transformer, rope_slowing
from liubai.problems.family import distinct_problems
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.stages.config import FamilyName, Shares, StageConfig
from liubai.stages.context import Context
from liubai.stages.evaluate import held_out_of
from liubai.text.template import Template, template_for, text_of
from liubai.text.tokenizer import TextTokenizer, word_level
from liubai.types import Problem, Sample, Stop

RESULT = "thinker.json"
DRAWN = 24  #: held-out problems of a family among which an example in each language is looked for


class Config(StageConfig):
    problems: FamilyName | Shares = "countdown"
    #: stage name -> what the report calls its model
    labels: dict[str, str] = {}
    examples: int = Field(2, gt=0, description="problems of each family that can be clicked")
    limit: int = Field(60, gt=0, description="held-out problems that the models answer before and after")
    max_tokens: int = Field(320, gt=0, description="the longest answer")
    at_most: int = Field(2_000_000, gt=0, description="parameters of a model that a page may carry")


def run(config: Config, context: Context) -> None:
    folders = {name: at for name, f in context.inputs.items() if (at := f / "checkpoint").exists()}
    if not folders:
        raise UserError(
            f"stage '{context.stage}' needs the checkpoint of at least one earlier stage, to think in the "
            "report; its 'from' names none that wrote one"
        )
    if unknown := sorted(config.labels.keys() - folders.keys()):
        raise UserError(
            f"stage '{context.stage}': labels names '{unknown[0]}', which is no checkpoint in its 'from'; "
            f"those are {', '.join(folders)}"
        )
    labels = {name: config.labels.get(name) or name for name in folders}
    seed = derive(context.seed, "eval")
    problems = held_out_of(config.problems, config.limit, seed)
    names = [config.problems] if isinstance(config.problems, str) else list(config.problems)
    told: dict[str, Any] = {
        "examples": [_example(p) for name in names for p in examples(name, config.examples, seed)],
        "max_tokens": config.max_tokens,
        "readers": [],
        "models": [],
        "tensors": {},
    }
    for done, (name, folder) in enumerate(folders.items(), 1):
        model = thinker(folder, labels[name], problems, config.max_tokens, config.at_most, told)
        same = model["same"]
        context.log(done, len(folders), {"problems": same["problems"], "same": same["tokens"]})
    write_json(context.folder / RESULT, told)


def examples(name: str, count: int, seed: int) -> list[Problem]:
    """``count`` held-out problems of a family, in turn from each language that it asks in."""
    from liubai.problems import family

    drawn = distinct_problems(family(name), "eval", seed, max(DRAWN, count))
    by_language: dict[str, list[Problem]] = {}
    for problem in drawn:
        by_language.setdefault(problem.language, []).append(problem)
    queues = [by_language[language] for language in sorted(by_language)]
    turns = [queue[i] for i in range(count) for queue in queues if i < len(queue)]
    return turns[:count]


def _example(problem: Problem) -> dict[str, str]:
    return {
        "prompt": problem.prompt,
        "gold": problem.gold,
        "verifier": problem.verifier,
        "language": problem.language,
    }


def thinker(
    folder: Path,
    label: str,
    problems: Sequence[Problem],
    max_tokens: int,
    at_most: int,
    told: dict[str, Any],
) -> dict[str, Any]:
    """The checkpoint ``folder`` as one more of ``told["models"]``, which is returned; its tokenizer and its
    tensors join those that are there, or are found among them. Raises ``UserError`` for a model that a page
    cannot carry: too large, of another architecture, or with another tokenizer than :func:`word_level`'s."""
    config = read_config(folder)
    if config.crate:
        raise UserError(
            f"'{folder}' is a {config.architecture}; the report's page computes Llama, Qwen2 and Qwen3: "
            "leave its stage out of 'from'"
        )
    with torch.device("meta"):
        parameters = Transformer(config).count_parameters()
    if parameters > at_most:
        raise UserError(
            f"'{folder}' has {parameters:,} parameters, and a page carries at most {at_most:,}: leave its "
            "stage out of 'from', or raise at_most"
        )
    model, tokenizer = load(folder)
    template = template_for(tokenizer, folder)
    reader = _reader(folder, tokenizer, template, problems)
    if reader not in told["readers"]:
        told["readers"].append(reader)
    weights = {}
    for name, tensor in model.state_dict().items():
        value = packed(tensor)
        told["tensors"].setdefault(name_of(value), value)
        weights[name] = name_of(value)
    values = (told["tensors"][name] for name in weights.values())
    made = {
        "label": label,
        "parameters": parameters,
        "bytes": sum(len(v["data"]) + len(v.get("scale", "")) for v in values),
        "reader": told["readers"].index(reader),
        "config": _shape(config),
        "weights": weights,
        "same": compared(model, tokenizer, template, problems, max_tokens),
    }
    told["models"].append(made)
    return made


def compared(
    model: Transformer,
    tokenizer: TextTokenizer,
    template: Template,
    problems: Sequence[Problem],
    max_tokens: int,
) -> dict[str, Any]:
    """On how many of ``problems`` greedy answers stay the same, token for token, when the weights go through
    8 bits; and how many are right, before and after, where a rule can tell. ``model`` is left with 8 bits."""
    prompts = [tuple(template.prompt_ids(p.prompt)) for p in problems]
    longest, room = max(map(len, prompts)) + max_tokens, model.config.max_position_embeddings
    if longest > room:
        raise UserError(
            f"max_tokens {max_tokens} and the prompt need {longest} positions; the model has {room}: lower it"
        )
    requests = [
        Request(id=i, prompt_ids=ids, max_tokens=max_tokens, seed=0, temperature=0.0)
        for i, ids in enumerate(prompts)
    ]

    def answers(weights: Mapping[str, torch.Tensor]) -> list[Sample]:
        engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, max_length=longest)
        engine.load(weights, version=0)
        return generate(engine, requests)

    before = answers(model.state_dict())
    after = answers(dequantised(model.state_dict()))
    figures: dict[str, Any] = {
        "problems": len(problems),
        "tokens": sum(a.completion_ids == b.completion_ids for a, b in zip(before, after, strict=True)),
    }
    if all(is_bounded(p.verifier) for p in problems):
        figures["right"] = [_right(template, problems, samples) for samples in (before, after)]
    return figures


def _right(template: Template, problems: Sequence[Problem], samples: Iterable[Sample]) -> int:
    meta = {"prefilled": template.prefilled}
    return sum(
        s.stop is Stop.EOS
        and grade(GradeItem(p.verifier, p.gold, text_of(template, s), {**p.meta, **meta})).correct
        for p, s in zip(problems, samples, strict=True)
    )


def _shape(config: ModelConfig) -> dict[str, Any]:
    """The numbers that the forward pass needs; ``turns`` are RoPE's radians a position, one a pair."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    turns = config.rope_theta**-pairs
    if config.rope_scaling:
        turns = turns / rope_slowing(config.head_dim, config.rope_theta, config.rope_scaling)
    return {
        "architecture": config.architecture,
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_size": config.head_dim,
        "epsilon": config.rms_norm_eps,
        "positions": config.max_position_embeddings,
        "turns": turns.tolist(),
    }


def _reader(
    folder: Path, tokenizer: TextTokenizer, template: Template, problems: Iterable[Problem]
) -> dict[str, Any]:
    """Tokenizer and template as the page needs them: words by id, and what stands around a question."""
    own, ours = (json.loads(t.backend.to_str()) for t in (tokenizer, word_level(())))
    plain = {k: v for k, v in own.items() if k not in ("model", "added_tokens")}
    wanted = {k: v for k, v in ours.items() if k not in ("model", "added_tokens")}
    special = [{entry["content"] for entry in raw["added_tokens"]} for raw in (own, ours)]
    if own["model"]["type"] != "WordLevel" or plain != wanted or special[0] != special[1]:
        raise UserError(
            f"'{folder}' has another tokenizer than the small world's, which has one token a word; the "
            "report's page reads with that alone: leave its stage out of 'from'"
        )
    mark = "\x00"
    before, _, after = template.render(mark).partition(mark)
    for problem in problems:
        if template.prompt_ids(problem.prompt) != tokenizer.encode(before + problem.prompt + after):
            raise UserError(
                f"the chat template of '{folder}' does more than to write something before and after a "
                "question; the report's page cannot: leave its stage out of 'from'"
            )
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    words = [""] * (max(vocabulary.values()) + 1)
    for word, id in vocabulary.items():
        words[id] = word
    return {
        "words": words,
        "unknown": tokenizer.unknown_id,
        "ends": list(tokenizer.eos_ids),
        "before": before,
        "after": after,
    }
