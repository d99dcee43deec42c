"""The figures of the bridge: titles say what the intervals allow.

Two means are called different when their 95 % intervals do not meet, and never when one of them has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from liubai.report.bridge_draw import NOTHING, Series, Spread, Spreads, spread
from liubai.report.charts import NEUTRAL, stage_style
from liubai.report.read import number
from liubai.report.story import show
from liubai.report.svg import Line

#: What stands in the place of the thought, as short as an axis wants it.
PLACES = {
    "empty": "nothing",
    "own": "own",
    "another": "another",
    "shuffled": "mixed",
    "foreign": "foreign",
}
ALL, RIGHT, WRONG = 1, 3, 4  #: inks: black, and blue and ochre, which no common colour blindness confuses
PROBLEMS = "95 % intervals over problems."

Found = dict[str, Any]


def charts(found: Sequence[Found]) -> list[Spreads]:
    """Those for which something was measured."""
    each = (_path(found), _worth(found), _places(found), *_curves(found), _chance(found), _steps(found))
    return [chart for chart in each if chart is not None]


def label(told: Found) -> str:
    return str(told.get("label", ""))


def at(told: Found, *keys: str) -> Spread | None:
    value: Any = told
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return spread(value)


def bits(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def apart(a: Spread | None, b: Spread | None) -> int:
    """1 when ``b`` is above ``a`` beyond their intervals, −1 when below, 0 when they meet or one of these is
    not there."""
    if a is None or b is None or not (a.sure and b.sure):
        return 0
    return 1 if b.low > a.high else -1 if b.high < a.low else 0


def moved(found: Sequence[Found], *keys: str) -> int:
    return apart(at(found[0], *keys), at(found[-1], *keys))


def _thirds(found: Sequence[Found], *keys: str) -> list[Series]:
    """The figures of all, right and wrong answers, checkpoint by checkpoint."""

    def of(group: str) -> list[Spread | None]:
        return [at(told, keys[0], group, *keys[1:]) for told in found]

    return [
        Series("all thoughts", of("all"), ALL),
        Series("right answers", of("right"), RIGHT),
        Series("wrong answers", of("wrong"), WRONG, hollow=True),
    ]


def _path(found: Sequence[Found]) -> Spreads | None:
    """Does learning make thoughts less uncertain, and worth more? Only where checkpoints can be compared."""
    series: list[Series] = []
    keys: list[Line] = []
    for place, told in enumerate(found):
        ink = stage_style(place)[0]
        for group, hollow in (("right", False), ("wrong", True)):
            across, worth = at(told, "thought", group, "entropy"), at(told, "utility", group)
            if across and worth:
                name = f"{label(told)}, {group}"
                series.append(Series(name, [worth], ink, hollow, 0, (across.mean,), (across,)))
        keys.append(Line(label(told), NOTHING, ink))
    if len(found) < 2 or not series:
        return None
    first, last = label(found[0]), label(found[-1])
    paths = {
        -1: f"a narrower path than {first}",
        0: f"a path as wide as {first}'s",
        1: f"a wider path than {first}",
    }
    buys = {-1: "buys less", 0: "buys as much", 1: "buys more"}
    narrower, richer = moved(found, "thought", "right", "entropy"), moved(found, "utility", "right")
    keys += [Line("right answers", NOTHING, NEUTRAL), Line("wrong answers", NOTHING, NEUTRAL, 1)]
    return Spreads(
        "bridge-path",
        f"Where {last} is right, it takes {paths[narrower]} and {buys[richer]}",
        "Each point is a checkpoint. To the left: the words of its thoughts are less uncertain; higher "
        "up: the thoughts make a right answer likelier. That reinforcement learning finds the path of "
        f"low entropy would be a walk to the left and upwards. Bars: {PROBLEMS}",
        "bits that a thought buys",
        (),
        x_label="entropy of the thought (bits a token)",
        keys=keys,
        series=series,
    )


def _worth(found: Sequence[Found]) -> Spreads:
    first, last = found[0], found[-1]
    worth = at(last, "utility", "all")
    if len(found) > 1:
        said = {
            1: f"A thought buys {label(last)} more than {label(first)}",
            0: f"Thoughts buy {label(last)} as much as {label(first)}, within the noise",
            -1: f"A thought buys {label(last)} less than {label(first)}",
        }[moved(found, "utility", "all")]
    elif worth is None or not worth.sure:
        said = "What a thought buys"
    elif worth.low <= 0 <= worth.high:
        said = f"On average thoughts buy {label(last)} nothing, within the noise"
    else:
        verb = "buys" if worth.mean > 0 else "costs"
        said = f"A thought {verb} {label(last)} {bits(abs(worth.mean))} bits"
    return Spreads(
        "bridge-utility",
        said,
        "By how many bits a right answer gets likelier through the thought, where the answer that was "
        "then given was right and where it was wrong. One bit doubles the probability; below zero the "
        f"thought leads away. Bars: {PROBLEMS}",
        "bits bought",
        (),
        x_label="checkpoint",
        x_names=[label(told) for told in found],
        series=_thirds(found, "utility"),
    )


def _places(found: Sequence[Found]) -> Spreads:
    last = found[-1]
    cost = {name: at(last, "nll", "all", name) for name in PLACES}
    own, empty, mixed = cost["own"], cost["empty"], cost["shuffled"]
    title = "What a right answer costs after other thoughts"
    if own and empty and mixed and apart(own, empty) > 0:
        kept = (empty.mean - mixed.mean) / (empty.mean - own.mean)
        if apart(empty, mixed) > 0:
            title = f"In another order, {label(last)}'s steps are worse than none"
        elif apart(empty, mixed) < 0:
            title = f"In another order, {label(last)}'s steps keep {show(kept, '%', 0)} of what they buy"
        else:
            title = f"In another order, {label(last)}'s steps buy nothing, within the noise"
    elif own and mixed and apart(mixed, own) < 0:
        title = f"The order of its steps matters to {label(last)}"
    series = [
        Series(label(told), [at(told, "nll", "all", name) for name in PLACES], stage_style(i)[0], i % 2 == 1)
        for i, told in enumerate(found)
    ]
    return Spreads(
        "bridge-places",
        title,
        "Bits that a right answer costs when in the place of the thought stands nothing, the model's own "
        "one, another of its thoughts about the problem, its own with the steps mixed, or one about a "
        f"foreign problem. Lower is likelier. Bars: {PROBLEMS}",
        "bits that a right answer costs",
        (),
        x_label="in the place of the thought",
        x_names=list(PLACES.values()),
        series=series,
    )


def _over_steps(found: Sequence[Found], group: str, key: str) -> list[Series]:
    series = []
    for i, told in enumerate(found):
        curve = told.get("curve", {}).get(group, {})
        points = [spread(cell) for cell in curve.get(key, [])]
        xs = [x for x in map(number, curve.get("share", [])) if x is not None]
        if any(points) and len(xs) == len(points):
            series.append(Series(label(told), points, stage_style(i)[0], False, i % 4, [100 * x for x in xs]))
    return series


def _curves(found: Sequence[Found]) -> list[Spreads]:
    """The answer's entropy over the thought, of right and of wrong answers."""
    charts = []
    last = label(found[-1])
    for group in ("right", "wrong"):
        series = _over_steps(found, group, "entropy")
        if not series:
            continue
        title = f"{last}'s mind, where the answer is {group}"
        own = series[-1] if series[-1].label == last else None
        if group == "right" and own:
            title = _settled(last, own)
        elif own:
            ends = _over_steps(found[-1:], "right", "entropy")
            other = ends[0].points[-1] if ends else None
            title = {
                1: f"Wrong: {last} ends less sure than where it is right",
                0: f"Wrong: {last} ends as sure as where it is right",
                -1: f"Wrong: {last} ends surer than where it is right",
            }[apart(other, own.points[-1])]
        charts.append(
            Spreads(
                f"bridge-entropy-{group}",
                title,
                f"How open the answer is when the thought is closed after a part of its steps; {group} "
                "answers. At least so many bits (exact where an answer is one token); whether the answer "
                f"is right it does not say. Bands: {PROBLEMS}",
                "entropy of the answer (bits, at least)",
                (),
                x_label="steps done (%)",
                series=series,
                bands=True,
            )
        )
    return charts


def _settled(name: str, curve: Series) -> str:
    """When half of the entropy that there was at the beginning is surely gone, if ever."""
    begin, end = curve.points[0], curve.points[-1]
    for x, point in zip(curve.xs, curve.points, strict=True):
        if begin and point and begin.sure and point.sure and point.high < begin.low / 2:
            when = "only with its last step" if x >= 100 else f"after {x:.0f} % of the thought"
            return f"Right: {name} has half made up its mind {when}"
    if apart(begin, end) < 0:
        return f"Right: {name} ends surer than it began"
    return f"Right: {name}'s answer stays open to the end, within the noise"


def _chance(found: Sequence[Found]) -> Spreads | None:
    series = _over_steps(found, "all", "chance")
    if not series:
        return None
    last = series[-1]
    middle, end = last.points[len(last.points) // 2], last.points[-1]
    title = "The chance of a right answer"
    if middle and end and apart(middle, end):
        title = (
            f"Half-way, {last.label} would be right {show(middle.mean, '%', 0)} of the time, at the end "
            f"{show(end.mean, '%', 0)}"
        )
    elif middle and end:
        title = f"Half-way, {last.label} would be right as often as at the end, within the noise"
    return Spreads(
        "bridge-chance",
        title,
        "Probability of a right answer when the thought is closed after a part of its steps; all thoughts. "
        f"Bands: {PROBLEMS}",
        "probability of a right answer (%)",
        (),
        x_label="steps done (%)",
        percent=True,
        series=series,
        bands=True,
    )


def _steps(found: Sequence[Found]) -> Spreads | None:
    """Right steps and wrong steps, where the family's rules tell them apart."""
    series = [
        Series(f"{word} steps", [at(told, "gain", f"{word}_step") for told in found], ink, word == "wrong")
        for word, ink in (("right", RIGHT), ("wrong", WRONG))
    ]
    if not any(p for s in series for p in s.points):
        return None
    good, bad = series[0].points[-1], series[1].points[-1]
    title = {
        1: "Right steps buy more than wrong ones",
        0: "Right steps buy no more than wrong ones, within the noise",
        -1: "Wrong steps buy more than right ones",
    }[apart(bad, good)]
    return Spreads(
        "bridge-steps",
        f"{title} ({label(found[-1])})" if len(found) > 1 else title,
        "By how many bits a step makes a right answer likelier, of steps that are right and of steps "
        f"that are wrong by the rules of the family. Bars: {PROBLEMS}",
        "bits that a step buys",
        (),
        x_label="checkpoint",
        x_names=[label(told) for told in found],
        series=series,
    )
