"""How hard does a question look? Multinomial logistic regression on hashed n-grams and a few named features.

Small enough to be read: an n-gram of words or characters has a bucket, a bucket has one weight a way, and
the file of weights says which n-grams of the examples fell into it. Trained by FISTA (Beck and Teboulle 2009)
with an L1 penalty, so that most buckets are empty; calibrated by one temperature (Guo et al. 2017, arXiv
1706.04599) on folds that the weights have not seen. Deterministic: no random numbers, no batches.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liubai.errors import UserError

Way = Literal["fast", "think", "tool"]
WAYS: tuple[Way, ...] = ("fast", "think", "tool")

BUCKETS = 4096
LONGEST = 4000  #: characters that are read: the first half of them and the last
L1, L2 = 1e-4, 1e-4  #: penalties on the weights, per example; by cross-validation
ROUNDS = 600  #: of FISTA
FOLDS = 5
BEFORE = 0.5  #: weight of the words of an earlier question
SHORT = 40  #: a question of so many characters leans on the earlier one

_LATIN = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+(?:\.[0-9]+)?|[\u3400-\u9fff]+|[^\sa-z0-9]")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|[零一二三四五六七八九十百千万]+(?=[个只加减乘除的分])")
_SIGN = re.compile(r"[+*/^=×÷<>%]|(?<=[0-9)]) ?- ?(?=[0-9(])")
_UNKNOWN = re.compile(r"(?<![a-z])[a-z](?![a-z])")
_CODE = re.compile(r"```|\bdef |\bclass |[{};]\s*$|=>|\bimport |\(\)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Example:
    """A question, the one before it ("" for none), and the way that is right for it."""

    text: str
    way: Way
    before: str = ""


@dataclass(frozen=True, slots=True)
class Reason:
    """How much a feature speaks for a way: its value times its weight (nats), against the ways' mean."""

    feature: str
    says: float


def named(text: str) -> dict[str, float]:
    """The features that have names: all between 0 and 1."""
    words = _LATIN.findall(text)
    han = sum(len(w) for w in words if w[0] >= "\u3400")
    numbers = len(_NUMBER.findall(text))
    length = sum(w[0].isascii() and w[0].isalpha() for w in words) + han / 2
    return {
        "length": min(1.0, math.log1p(length) / math.log(300)),
        "numbers": min(1.0, numbers / 4),
        "numbers per word": min(1.0, numbers / (1 + length)),
        "signs": min(1.0, len(_SIGN.findall(text)) / 4),
        "an unknown": float(bool(_UNKNOWN.search(text.replace(" a ", " ")))),
        "code": float(bool(_CODE.search(text))),
        "sentences": min(1.0, len(re.findall(r"[.!?。！？](?:\s|$)", text)) / 4),
        "a question mark": float("?" in text or "？" in text),
        "chinese": float(han > 0),
    }


def grams(text: str) -> list[str]:
    """N-grams in order, each once: words and pairs of words, three letters of a word, one to three Han
    characters. Digits are one digit: which number it is matters to the calculator alone."""
    found: list[str] = []
    before = ""
    for word in _LATIN.findall(text):
        if word[0].isdigit():
            word = "0.0" if "." in word else "0" if len(word) == 1 else "00"
        if word[0] >= "\u3400":
            found += [word[i : i + n] for n in (1, 2, 3) for i in range(len(word) - n + 1)]
        else:
            found.append(word)
            padded = f"<{word}>"
            found += [f"…{padded[i : i + 3]}" for i in range(len(padded) - 2) if len(word) > 3]
            if before:
                found.append(f"{before} {word}")
        before = word if word[0] < "\u3400" else ""
    return list(dict.fromkeys(found))


def features(text: str, before: str = "") -> dict[str, float]:
    """By name. All n-grams together have length 1, so that a long question is not more certain for its
    length; those of the earlier question count less, and only for a question too short to stand alone."""
    text, before = _cut(text), _cut(before)
    own = grams(text)
    found = named(text)
    for gram in own:
        found[f"“{gram}”"] = 1 / math.sqrt(len(own))
    if before and len(text) <= SHORT:
        earlier = grams(before)
        for gram in earlier:
            found[f"before: “{gram}”"] = BEFORE / math.sqrt(len(earlier))
    return found


def _cut(text: str) -> str:
    text = text.casefold()
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} {text[-LONGEST // 2 :]}"


def bucket(name: str) -> int:
    """Of an n-gram: the same on every machine."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % BUCKETS


NAMED = tuple(named(""))


class Classifier:
    """``weights[key]`` are the weights of the ways, in the order of ``WAYS``; the key is a named feature, the
    number of a bucket, or ``bias``."""

    def __init__(self, weights: Mapping[str, Sequence[float]], temperature: float = 1.0) -> None:
        self.weights = {key: tuple(map(float, row)) for key, row in weights.items()}
        self.temperature = temperature

    def logits(self, found: Mapping[str, float]) -> list[float]:
        sums = list(self.weights.get("bias", (0.0,) * len(WAYS)))
        for name, value in found.items():
            row = self.weights.get(_key(name))
            if row is not None:
                for i, weight in enumerate(row):
                    sums[i] += value * weight
        return sums

    def probabilities(self, text: str, before: str = "") -> dict[Way, float]:
        """Of each way being the right one; they add up to 1. Never raises for any text."""
        scaled = [logit / self.temperature for logit in self.logits(features(text, before))]
        highest = max(scaled)
        powers = [math.exp(logit - highest) for logit in scaled]
        return {way: power / sum(powers) for way, power in zip(WAYS, powers, strict=True)}

    def reasons(self, text: str, way: Way, before: str = "", most: int = 6) -> tuple[Reason, ...]:
        """The features that speak loudest for and against ``way``."""
        at = WAYS.index(way)
        found = []
        for name, value in features(text, before).items():
            row = self.weights.get(_key(name))
            if row is not None and value:
                found.append(Reason(name, value * (row[at] - sum(row) / len(row)) / self.temperature))
        return tuple(sorted(found, key=lambda reason: -abs(reason.says))[:most])


def _key(name: str) -> str:
    return name if name in NAMED else str(bucket(name))


# ---- training ----


def train(examples: Sequence[Example]) -> Classifier:
    """Weights by all of ``examples``, the temperature by folds that are held out in turn.

    Raises ``UserError`` where one of the ways has no example."""
    for way in WAYS:
        if not any(example.way == way for example in examples):
            raise UserError(f"there is no example for '{way}'; a classifier needs some for each way")
    unseen: list[tuple[list[float], Way]] = []
    for fold in range(FOLDS):
        rest = [example for i, example in enumerate(examples) if i % FOLDS != fold]
        fitted = Classifier(_fit(rest))
        unseen += [
            (fitted.logits(features(example.text, example.before)), example.way)
            for i, example in enumerate(examples)
            if i % FOLDS == fold
        ]
    return Classifier(_fit(examples), _temperature(unseen))


def _fit(examples: Sequence[Example]) -> dict[str, list[float]]:
    """FISTA with a constant step: rows of one weight a way, those that are zero left out."""
    found = [features(example.text, example.before) for example in examples]
    keys = sorted({_key(name) for one in found for name in one})
    column = {key: i for i, key in enumerate(keys)}
    x_NF = np.zeros((len(examples), len(keys) + 1))
    x_NF[:, -1] = 1.0  # the bias
    for row, one in enumerate(found):
        for name, value in one.items():
            x_NF[row, column[_key(name)]] += value
    y_NW = np.array([[float(example.way == way) for way in WAYS] for example in examples])
    # half the largest eigenvalue bounds the curvature of the softmax (Böhning 1992)
    step = 1 / (0.5 * float(np.linalg.norm(x_NF, 2)) ** 2 / len(examples) + L2)
    w_FW = np.zeros((len(keys) + 1, len(WAYS)))
    ahead_FW, momentum = w_FW, 1.0
    for _ in range(ROUNDS):
        gradient_FW = x_NF.T @ (_softmax(x_NF @ ahead_FW) - y_NW) / len(examples) + L2 * ahead_FW
        next_FW = ahead_FW - step * gradient_FW
        next_FW[:-1] = np.sign(next_FW[:-1]) * np.maximum(np.abs(next_FW[:-1]) - step * L1, 0)
        faster = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead_FW = next_FW + (momentum - 1) / faster * (next_FW - w_FW)
        w_FW, momentum = next_FW, faster
    rows = {key: [round(float(w), 3) for w in w_FW[i]] for key, i in column.items()}
    return {**{k: row for k, row in rows.items() if any(row)}, "bias": [round(float(w), 3) for w in w_FW[-1]]}


def _softmax(logits_NW: NDArray[np.float64]) -> NDArray[np.float64]:
    powers_NW = np.exp(logits_NW - logits_NW.max(1, keepdims=True))
    return np.asarray(powers_NW / powers_NW.sum(1, keepdims=True))


def _temperature(unseen: Sequence[tuple[Sequence[float], Way]]) -> float:
    """The one with the least surprise, on a grid from 0.2 to 5."""
    logits_NW = np.array([logits for logits, _ in unseen])
    right_N = np.array([WAYS.index(way) for _, way in unseen])
    rows_N = np.arange(len(right_N))

    def surprise(temperature: float) -> float:
        return -float(np.log(_softmax(logits_NW / temperature)[rows_N, right_N] + 1e-12).mean())

    return min((round(0.2 * 1.05**i, 3) for i in range(66)), key=surprise)


def calibration_error(judged: Sequence[tuple[float, bool]], bins: int = 10) -> float:
    """Expected calibration error: how far confidence and share of right ones are apart, over equal bins."""
    total = 0.0
    for i in range(bins):
        inside = [(p, right) for p, right in judged if i / bins < p <= (i + 1) / bins or (i == 0 and p == 0)]
        if inside:
            mean = sum(p for p, _ in inside) / len(inside)
            total += len(inside) / len(judged) * abs(mean - sum(right for _, right in inside) / len(inside))
    return total


# ---- files ----


def read_examples(path: Path) -> list[Example]:
    """Lines of JSON: ``text``, ``way``, and ``before`` where there is an earlier question. Raises
    ``UserError`` for any other line."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"'{path}' cannot be read: {reason}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = Example(row["text"], row["way"], row.get("before", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"line {number} of '{path}' is no example: give it 'text' and 'way'") from None
        if (
            example.way not in WAYS
            or not isinstance(example.text, str)
            or not isinstance(example.before, str)
        ):
            raise UserError(f"line {number} of '{path}': 'way' is one of {', '.join(WAYS)}, texts are texts")
        found.append(example)
    return found


def save(
    classifier: Classifier, examples: Sequence[Example], path: Path, notes: Mapping[str, object]
) -> None:
    """As JSON that can be read: beside the weights of a bucket stand the n-grams that fell into it."""
    inside: dict[str, list[str]] = {}
    for example in examples:
        for name in features(example.text, example.before):
            if name not in NAMED and name not in inside.setdefault(_key(name), []):
                inside[_key(name)].append(name)
    weights = classifier.weights
    rows = {key: json.dumps(list(weights[key])) for key in ("bias", *NAMED) if key in weights}
    buckets = {
        key: json.dumps({"of": inside.get(key, [])[:4], "weights": weights[key]}, ensure_ascii=False)
        for key in sorted((key for key in weights if key.isdigit()), key=int)
    }
    head = {"ways": list(WAYS), "temperature": classifier.temperature, "notes": notes}
    parts = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    for key, part in (("named", rows), ("buckets", buckets)):
        lines = ",\n".join(f'  "{name}": {text}' for name, text in part.items())
        parts.append(f'"{key}": {{\n{lines}\n}}')
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    path.write_text(text, encoding="utf-8")


def load(path: Path) -> Classifier:
    """Raises ``UserError`` for a file that is none of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        weights = {**found["named"], **{key: row["weights"] for key, row in found["buckets"].items()}}
        classifier = Classifier(weights, float(found["temperature"]))
        if found["ways"] != list(WAYS) or any(len(row) != len(WAYS) for row in classifier.weights.values()):
            raise ValueError("ways")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{path}' is no router's file; make one with python -m liubai.serve.router train"
        ) from error
    return classifier
