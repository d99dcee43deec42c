"""Rejection sampling: many answers a problem, and the good ones kept as examples.

Right by the problem's verifier (a rule, or a judge model that sees answer and gold: ``verifier = "judge"``),
in one language, readable, no repetition, each text once: R1's filters (arXiv 2501.12948v2, §3 and B.3.3).
``rewrite`` carries the thoughts into the question's language first, as R1's authors had a larger model do
for the cold start; here it is the wide world's dictionary. All sampled answers stay in ``graded.jsonl``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

from pydantic import Field

from liubai.errors import UserError
from liubai.files import write_json
from liubai.grade import GraderPool
from liubai.grade.language import require_known
from liubai.grade.readable import ReadableConfig, unreadable
from liubai.measure.audit import is_sound, steps_of
from liubai.measure.reflection import thought_span
from liubai.model.checkpoint import load
from liubai.problems import WIDE
from liubai.problems.lexicon import plain, translate
from liubai.problems.source import source_of
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.stages.config import Brought, Compute, Shares
from liubai.stages.context import Context
from liubai.stages.evaluate import evaluate
from liubai.stages.records import EXAMPLES, GRADED, Example, example_of, write_examples
from liubai.stages.rollouts import thought
from liubai.text.template import require_readable, template_for
from liubai.types import Problem, Stop

#: Problems between two resume points.
LOT = 64


class Config(Brought, Compute):
    problems: Shares = {"countdown": 1.0}
    prompts: int = Field(gt=0, description="training problems asked")
    samples: int = Field(4, gt=0, description="answers a problem")
    keep: int = Field(1, gt=0, description="answers kept a problem, at most")
    least: float = Field(1.0, gt=0, le=1, description="the score that an answer must reach")
    enough: int = Field(0, ge=0, description="stop when so many are kept; 0: ask all")
    max_tokens: int = Field(320, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    slots: int = Field(256, gt=0)
    grader_timeout: float = Field(5.0, gt=0, description="seconds a verdict may take")
    readable: ReadableConfig = ReadableConfig()
    #: carry thoughts into the language of their question, and leave out words that say nothing
    rewrite: bool = False
    #: drop right answers whose steps are wrong, where steps can be checked
    sound: bool = False

    def families(self) -> Iterable[str]:
        return self.problems


def run(config: Config, context: Context) -> None:
    parent = context.parent_checkpoint(config.model)
    model, tokenizer = load(parent, dtype=config.dtype(), device=config.where())
    template = template_for(tokenizer, parent)
    source = source_of(config.problems, config.questions)
    asked = [source.train(derive(context.seed, "sampled"), i) for i in range(config.prompts)]
    require_readable(template, [p.prompt for p in asked[:LOT]])
    if config.readable.consistency or config.rewrite:
        require_known(p.language for p in asked)
    wide = {f.name for f in WIDE}
    if config.rewrite and (config.questions or not set(config.problems) <= wide):
        raise UserError(
            f"stage '{context.stage}': rewrite = true carries words over by the wide world's dictionary, for "
            f"the families {', '.join(sorted(wide))} only"
        )
    longest = config.max_tokens + max(len(template.prompt_ids(p.prompt)) for p in asked)
    if longest > model.config.max_position_embeddings:
        raise UserError(f"max_tokens {config.max_tokens} and the prompts do not fit the model; lower it")
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=config.slots, max_length=longest)
    engine.load(model.state_dict(), version=0)
    kept: list[Example] = []
    graded: list[Example] = []
    dropped: Counter[str] = Counter()
    first = 0
    if state := context.restore():
        kept, graded = ([Example(*row) for row in state.meta[name]] for name in ("kept", "graded"))
        dropped, first = Counter(state.meta["dropped"]), state.step
    seen = {(e.prompt, e.response) for e in kept}
    mine = Counter(e.prompt for e in kept)  # a problem may be asked more than once
    lots = -(-len(asked) // LOT)
    with GraderPool(timeout_s=config.grader_timeout) as pool:
        for lot in range(first, lots):
            if config.enough and len(kept) >= config.enough:
                break
            begun = time.perf_counter()
            result = evaluate(
                engine,
                template,
                asked[lot * LOT : (lot + 1) * LOT],
                samples=config.samples,
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=derive(context.seed, "sample", lot),
                pool=pool,
            )
            for i, problem in enumerate(result.problems):
                answers = zip(
                    result.samples[i], result.responses[i], result.scores[i], result.verdicts[i], strict=True
                )
                for sample, response, score, verdict in answers:
                    if verdict.error is not None:  # nothing is known of it: neither good nor bad
                        dropped["not graded"] += 1
                        continue
                    ended = sample.stop is Stop.EOS
                    graded.append(example_of(problem, response, score, ended))
                    if config.rewrite:
                        response = rewritten(response, problem.language)
                    why = faults(problem, response, score, config) if ended else "cut off"
                    if not why and mine[problem.prompt] >= config.keep:
                        why = "enough of this problem"
                    if not why and (problem.prompt, response) in seen:
                        why = "duplicate"
                    if why:
                        dropped[why] += 1
                        continue
                    mine[problem.prompt] += 1
                    seen.add((problem.prompt, response))
                    kept.append(example_of(problem, response, score))
            written = sum(len(s.completion_ids) for row in result.samples for s in row)
            done = min((lot + 1) * LOT, len(asked))
            numbers = {"kept": len(kept), "asked": done * config.samples}
            speed = written / (time.perf_counter() - begun)
            context.log(lot + 1, lots, {**numbers, "accuracy": right_share(result.scores), "tokens/s": speed})
            if lot + 1 < lots:
                context.save(lot + 1, {}, {"kept": rows(kept), "graded": rows(graded), "dropped": dropped})
    if config.enough:
        kept = kept[: config.enough]
    if not kept:
        raise UserError(
            f"stage '{context.stage}' kept none of {len(graded)} answers "
            f"({', '.join(f'{n} {why}' for why, n in dropped.most_common(3))}); ask more, or filter less"
        )
    write_examples(context.folder / GRADED, graded)
    write_examples(context.folder / EXAMPLES, kept)
    told = {"asked": len(graded) + dropped["not graded"], "kept": len(kept), "dropped": dropped}
    write_json(context.folder / "sample.json", told)


def faults(problem: Problem, response: str, score: float, config: Config) -> str:
    """Why an answer is no example, the first reason; "" when it is one."""
    if score < config.least:
        return "wrong"
    if found := unreadable(thought(response), problem.language, config.readable):
        return found[0]
    steps = steps_of(problem, response) if config.sound else None
    return "unsound" if steps and not is_sound(steps) else ""


def rewritten(response: str, language: str) -> str:
    """The same with its thought in ``language``, and without fillers."""
    start, end = thought_span(response)
    words = translate(" ".join(plain(response[start:end])[0]), language)
    return f"{response[:start]} {words} {response[end:]}".strip()


def right_share(scores: list[list[float]]) -> float:
    flat = [score >= 1 for row in scores for score in row]
    return sum(flat) / len(flat)


def rows(examples: list[Example]) -> list[list[Any]]:
    return [list(astuple(e)) for e in examples]
