"""Where a question goes: to the calculator, to the model at once, or to the model with its thought first.

    decision = Router.load().route("3.11 和 3.8 哪个大")
    decision.way, decision.why, decision.calculation.answer     # "tool", "a calculation: …", "3.8"

The policy can be read: :data:`RULES` in order, each with its name and its reason, and where none applies a
small classifier (:mod:`liubai.serve.classifier`) whose features say what moved it. A wrong haste costs more
than a needless thought, so it thinks in doubt (:data:`HASTE`). ``python -m liubai.serve.router train`` trains
it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liubai.errors import UserError, nearest
from liubai.problems import family
from liubai.problems.family import problem_at
from liubai.serve import classifier as learned
from liubai.serve.calculator import Calculation, understand
from liubai.serve.classifier import LONGEST, WAYS, Classifier, Example, Reason, Way
from liubai.serve.exact import Refused

Route = Literal["auto", "fast", "think", "tool"]
ROUTES: tuple[Route, ...] = ("auto", "fast", "think", "tool")
#: A wrong answer for want of thought counts as much as so many needless thoughts.
HASTE = 3.0
CALCULATOR = "calculator"

HERE = Path(__file__).parent
WEIGHTS, EXAMPLES = HERE / "router.json", HERE / "router_examples.jsonl"


@dataclass(frozen=True, slots=True)
class Decision:
    """``tool`` comes with a ``calculation``, and nothing else does. ``rule`` is the name of the rule that
    decided, or "classifier"; ``confidence`` is 1 for a rule, else the calibrated probability that the way is
    right; ``features`` are what moved the classifier most."""

    way: Way
    why: str
    confidence: float = 1.0
    rule: str = ""
    features: tuple[Reason, ...] = ()
    calculation: Calculation | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Applies where ``found`` finds something in the question, or in the beginning and the end of a long one
    (:func:`_cut`): its ``way``, for the reason ``why``."""

    name: str
    way: Way
    why: str
    found: Callable[[str], object]


def _pattern(english: str, chinese: str) -> Callable[[str], object]:
    return re.compile(rf"\b(?:{english})\b|{chinese}", re.IGNORECASE).search


#: After the calculator, which is asked first; the first that applies decides.
RULES: tuple[Rule, ...] = (
    Rule("empty", "fast", "there is nothing to think about", lambda text: not text.strip()),
    Rule(
        "told to hurry",
        "fast",
        "the question asks for an answer without thinking",
        _pattern(
            r"without (?:any )?thinking|(?:don't|do not) (?:over)?think|no thinking|no need to think",
            r"(?:不用|不要|不必|别|无需)(?:思考|多想|想太多)",
        ),
    ),
    Rule(
        "told to think",
        "think",
        "the question asks for steps or for a proof",
        _pattern(
            r"step[- ]by[- ]step|think (?:hard|carefully|it through|harder)|prove|proof|derive|show that",
            r"一步一步|一步步|逐步|仔细想|认真想|好好想|证明|推导|推理",
        ),
    ),
    Rule(
        "equation",
        "think",
        "there is an equation with an unknown",
        re.compile(
            r"(?<![a-z])[a-z] ?(?:[-+*/^] ?[0-9(][^=\n]{0,60})?=(?!=)"
            r"|[-+*/^0-9(] ?[a-z](?![a-z0-9])[^=\n]{0,60}=(?!=)",
            re.IGNORECASE | re.ASCII,
        ).search,
    ),
    Rule(
        "program",
        "think",
        "there is a program in it",
        re.compile(
            r"```|^[ \t]*(?:def|class|import|from|#include|public|function)\b.*[:;({]", re.MULTILINE
        ).search,
    ),
)


class Router:
    """See the module. ``classifier``, ``rules`` and ``haste`` may be one's own. "fast" is taken where it is
    likelier than ``sure``: p · 1 > (1 − p) · haste."""

    def __init__(
        self, classifier: Classifier, rules: Sequence[Rule] = RULES, *, haste: float = HASTE
    ) -> None:
        self.classifier, self.rules = classifier, tuple(rules)
        self.sure = haste / (1 + haste)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Router:
        """Raises ``UserError`` for a file that is no router's."""
        return cls(learned.load(path))

    def route(
        self,
        asked: str | Sequence[Mapping[str, Any]],
        *,
        route: Route = "auto",
        tools: Collection[str] = (CALCULATOR,),
    ) -> Decision:
        """``asked`` is a question or a conversation, of which the last message of the user decides; ``tools``
        are those that are at hand. Never raises for any text; ``UserError`` for an unknown ``route``."""
        if route not in ROUTES:
            raise UserError(f"route: unknown '{route}'; {nearest(str(route), ROUTES)}")
        if route in ("fast", "think"):
            return Decision(route, f"'{route}' was asked for", rule="asked")
        text, before = last_question(asked)
        calculation, refusal = _calculated(text, tools, asked=route == "tool")
        if calculation is not None:
            why = f"a calculation: {_short(calculation.understood)}"
            return Decision(
                "tool", why, rule="asked" if route == "tool" else "calculation", calculation=calculation
            )
        if route == "tool":
            decided = self._by_text(text, before)
            why = f"a tool was asked for, but {refusal}; so: {decided.why}"
            return Decision(decided.way, why, decided.confidence, decided.rule, decided.features)
        return self._by_text(text, before)

    def explain(self, asked: str | Sequence[Mapping[str, Any]], *, most: int = 8) -> str:
        """Lines for a reader: whether each rule applies, what the classifier would say, and why."""
        text, before = last_question(asked)
        calculation, refusal = _calculated(text, (CALCULATOR,))
        lines = [f"calculation: {_short(calculation.text) if calculation else f'no, {refusal}'}"]
        read = _cut(text)
        lines += [f"{rule.name}: {'yes, ' + rule.why if rule.found(read) else 'no'}" for rule in self.rules]
        chances = self.classifier.probabilities(text, before)
        lines.append(f"classifier: {', '.join(f'{way} {p:.2f}' for way, p in chances.items())}")
        way = likeliest(chances)
        for reason in self.classifier.reasons(text, way, before, most):
            lines.append(f"  {reason.says:+.2f} for {way}: {reason.feature}")
        decision = self.route(asked)
        return "\n".join([*lines, f"-> {decision.way}: {decision.why}"])

    def _by_text(self, text: str, before: str) -> Decision:
        read = _cut(text)
        for rule in self.rules:
            if rule.found(read):
                return Decision(rule.way, rule.why, rule=rule.name)
        chances = self.classifier.probabilities(text, before)
        fast = chances["fast"]
        way: Way = "fast" if fast > self.sure else "think"
        if way == "fast":
            why = f"it looks like a question that needs no thought ({fast:.0%})"
        elif fast > max(chances["think"], chances["tool"]):
            why = f"it may need no thought, but that is not sure ({fast:.0%}, asked for is {self.sure:.0%})"
        elif chances["tool"] > chances["think"]:
            why = (
                f"it looks like a calculation ({chances['tool']:.0%}), but not one that the calculator reads"
            )
        else:
            why = f"it looks like a question to think about ({chances['think']:.0%})"
        confidence = fast if way == "fast" else 1 - fast
        reasons = self.classifier.reasons(text, way, before)
        return Decision(way, why, confidence, "classifier", reasons)


def _cut(text: str) -> str:
    """As much of it as the classifier reads."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}\n{text[-LONGEST // 2 :]}"


def _calculated(text: str, tools: Collection[str], *, asked: bool = False) -> tuple[Calculation | None, str]:
    """The calculation, or why there is none."""
    if CALCULATOR not in tools:
        return None, "there is no calculator here"
    try:
        return understand(text, asked=asked), ""
    except Refused as error:
        return None, f"the calculator refuses ({error})"


def likeliest(chances: Mapping[Way, float]) -> Way:
    return max(WAYS, key=lambda way: chances[way])


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def last_question(asked: str | Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What the user said last, and before that ("" for nothing). Parts of a message that are no text count
    for nothing."""
    if isinstance(asked, str):
        return asked, ""
    said = [_text(message.get("content")) for message in asked if message.get("role") == "user"]
    return (said[-1] if said else ""), (said[-2] if len(said) > 1 else "")


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "\n".join(part for part in parts if isinstance(part, str))


# ---- training ----

#: Families of the wide world, which way is right for them, and how many of their problems are learned from.
FAMILIES: dict[str, Way] = {
    "passage": "fast", "errand": "fast", "make": "think", "total": "think", "solve": "think",
    "greater": "tool",
}  # fmt: skip
EACH = 16
HELD_OUT = 0.2  #: of the examples, by a hash of their text


def all_examples(given: Sequence[Example]) -> list[Example]:
    """Those, and some training problems of our own families."""
    generated = [
        Example(problem_at(family(name), "train", 0, i).prompt, way)
        for name, way in FAMILIES.items()
        for i in range(EACH)
    ]
    return list(dict.fromkeys([*given, *generated]))


def held_out(example: Example) -> bool:
    """Is it for measuring? Questions that differ in their numbers alone are on one side."""
    text = re.sub(r"[0-9.]+", "0", f"{example.before}/{example.text}".casefold())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") < HELD_OUT * 2**32


def measured(classifier: Classifier, examples: Sequence[Example]) -> dict[str, Any]:
    """How the classifier alone, and how the whole policy, do on ``examples``."""
    guesses = [classifier.probabilities(example.text, example.before) for example in examples]
    chosen = [likeliest(guess) for guess in guesses]
    judged = [(g[way], way == e.way) for g, way, e in zip(guesses, chosen, examples, strict=True)]
    router = Router(classifier)
    routed = [router.route(_conversation(example)).way for example in examples]
    # a calculation that the calculator does not read is thought about, which is right, if slow
    confusion = Counter(f"{e.way} -> {way}" for e, way in zip(examples, routed, strict=True))
    return {
        "examples": len(examples),
        "classifier accuracy": round(sum(right for _, right in judged) / len(judged), 3),
        "calibration error": round(learned.calibration_error(judged), 3),
        "policy accuracy": round(
            sum(e.way == w for e, w in zip(examples, routed, strict=True)) / len(routed), 3
        ),
        "hasty": sum(e.way != "fast" and way == "fast" for e, way in zip(examples, routed, strict=True)),
        "policy": dict(sorted(confusion.items())),
    }


def _conversation(example: Example) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in (example.before, example.text) if text]


def train(examples: Path = EXAMPLES, out: Path = WEIGHTS) -> dict[str, Any]:
    """Learn from four fifths of the examples, measure on the rest, write ``out``."""
    given = learned.read_examples(examples)
    if not given:
        raise UserError(f"there is no example in '{examples}'; write lines of JSON with 'text' and 'way'")
    everything = all_examples(given)
    seen = [example for example in everything if not held_out(example)]
    unseen = [example for example in everything if held_out(example)]
    if not unseen:
        raise UserError(f"'{examples}' leaves no example to measure with; add some more")
    classifier = learned.train(seen)
    notes = {"learned from": len(seen), "held out": measured(classifier, unseen)}
    learned.save(classifier, seen, out, notes)
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m liubai.serve.router", description="Train or ask the router."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    teach = commands.add_parser("train", help="learn from examples, print how well that went")
    teach.add_argument("--examples", type=Path, default=EXAMPLES, help="lines of JSON: text, way, before")
    teach.add_argument("--out", type=Path, default=WEIGHTS)
    ask = commands.add_parser("explain", help="which way a question goes, and why")
    ask.add_argument("question")
    ask.add_argument("--weights", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    try:
        if options.command == "train":
            print(json.dumps(train(options.examples, options.out), indent=1, ensure_ascii=False))
        else:
            print(Router.load(options.weights).explain(options.question))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
