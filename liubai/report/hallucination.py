"""What summaries say that their passage does not, from hallucination.json: rates, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from liubai.measure.hallucination import compare
from liubai.report.bridge_draw import Series, Spread, Spreads, spread, style
from liubai.report.read import Curve, Run, Stage, number
from liubai.report.section import Section
from liubai.report.story import show
from liubai.report.svg import Chart, Line

RATE, NONE, WITHOUT, WORDS = (0, 0), (1, 0), (1, 2), (3, 0)  #: (ink, dash) of the lines
SHOWN = 4  #: unsupported summaries that are shown, a checkpoint
FOUND = {
    "number": "a number", "date": "a date", "name": "a name", "relation": "a value with the wrong thing",
    "count": "a count", "negation": "denied", "affirmed": "affirmed", "limit": "limited",
    "opposite": "the contrary", "word": "words",
}  # fmt: skip


def section(run: Run) -> Section | None:
    """``None`` when no stage has looked."""
    found = [(stage, told) for stage in run.of_kind("hallucination") if (told := stage.result)]
    if not found:
        return None
    results = [each for _, each in found]
    body = style() + _table(results) + Markup("").join(_examples(stage, each) for stage, each in found)
    title = "What the passage does not say"
    return Section("hallucination", title, "无中生有", _finding(results), _charts(results), body)


def _finding(told: Sequence[dict[str, Any]]) -> str:
    """What a gate said comes first; then where it began and ended, which steps were no chance, and what the
    last one says without a thought."""
    stopped = [f"{each['label']} did not pass its gate: {each['gate']}." for each in told if each.get("gate")]
    known = [
        (each, str(each.get("label", "")), rate)
        for each in _thinking(told)
        if (rate := number(each.get("rate"))) is not None
    ]
    if not known:
        said = "No summary could be judged."
    elif len(known) == 1 or max(rate for *_, rate in known) == 0:
        _, last, rate = known[-1]
        said = f"{_percent(rate)} of {last}'s summaries say what the passage does not."
    else:
        (before, first, began), (after, last, ended) = known[0], known[-1]
        sign, grounds = _apart(before, after)
        way = {-1: "fewer than", 0: "within the noise of", 1: "more than"}[sign]
        said = f"{_percent(ended)} of {last}'s summaries say what the passage does not, {way} {first}'s "
        said += f"{_percent(began)}{grounds}."
    return " ".join(sentence for sentence in (*stopped, said, _steps(told), _without(told)) if sentence)


def _thinking(told: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Those with a thought; all of them where there are none."""
    return [each for each in told if each.get("thinking", True)] or told


def _apart(before: dict[str, Any], after: dict[str, Any]) -> tuple[int, str]:
    """1 when ``after`` says too much more often than ``before``, beyond chance, −1 when less often, 0 when
    that is not known: by the paired interval over the documents that both answered; where no verdicts of the
    same were kept, by whether the two rates' own intervals meet. And the paired interval in words, for the
    rates' own may meet where it tells the two apart."""
    ours, theirs = after.get("verdicts"), before.get("verdicts")
    same = all(after.get(key) == before.get(key) for key in ("documents_digest", "scorer", "temperature"))
    low: float | None
    grounds = ""
    if same and isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        ours, theirs = ([v if isinstance(v, bool) else None for v in some] for some in (ours, theirs))
        paired = compare(ours, theirs)
        low, high = paired["interval"] or (None, None)
        if low is not None and high is not None:
            grounds = (
                f" (on the same documents {_points(paired['worse'])}, {_points(low)} to {_points(high)})"
            )
    else:
        (a, b), (c, d) = (_ends(each.get("interval")) for each in (before, after))
        known = None not in (a, b, c, d)
        low, high = (c - b, d - a) if known else (None, None)  # type: ignore[operator]
    if low is None or high is None:
        return 0, ""
    return 1 if low > 0 else -1 if high < 0 else 0, grounds


def _ends(interval: object) -> tuple[float | None, float | None]:
    if not isinstance(interval, list) or len(interval) != 2:
        return None, None
    return number(interval[0]), number(interval[1])


def _steps(told: Sequence[dict[str, Any]]) -> str:
    """The comparisons whose interval leaves 0 out; "" where nothing was compared."""
    rose, fell, any_compared = [], [], False
    for each in _thinking(told):
        against = each.get("compared") or {}
        change, interval = number(against.get("worse")), against.get("interval") or []
        if change is None or len(interval) != 2:
            continue
        any_compared = True
        named = f"{each.get('label', '')} (over {against['label']}, {_points(change)})"
        if interval[0] > 0:
            rose.append(named)
        elif interval[1] < 0:
            fell.append(named)
    if not any_compared:
        return ""
    if not rose and not fell:
        return "No step up or down is beyond chance."
    parts = [f"it {way} with {', '.join(names)}" for way, names in (("rose", rose), ("fell", fell)) if names]
    return f"Beyond chance {' and '.join(parts)}."


def _without(told: Sequence[dict[str, Any]]) -> str:
    """What the last checkpoint that was asked both ways says without a thought."""
    thinking = {str(e.get("label", "")): e for e in told if e.get("thinking", True)}
    for each in reversed(told):
        both = thinking.get(str(each.get("label", "")))
        if each.get("thinking", True) or both is None:
            continue
        rate, other = number(each.get("rate")), number(both.get("rate"))
        if rate is not None and other is not None:
            said = f"Without a thought {each['label']} does so in {_percent(rate)}"
            return f"{said}, with one in {_percent(other)}."
    return ""


def _charts(told: Sequence[dict[str, Any]]) -> list[Chart]:
    if len(told) < 2:
        return []
    pairs = [(str(each.get("label", "")), bool(each.get("thinking", True))) for each in told]
    both = len({thinking for _, thinking in pairs}) == 2 and len(set(pairs)) == len(pairs)
    if both:  # a checkpoint with a thought stands over the same one without
        names = list(dict.fromkeys(label for label, _ in pairs))
        by_pair = dict(zip(pairs, told, strict=True))
        kinds = (("with a thought", True, RATE), ("without a thought", False, WITHOUT))
        rows = [(kind, [by_pair.get((n, thinking)) for n in names], look) for kind, thinking, look in kinds]
    else:
        names = [label for label, _ in pairs]
        rows = [("of answered passages", list(told), RATE)]
    rates = [
        Series(kind, [_rate(each) for each in row], ink=look[0], hollow=look is WITHOUT)
        for kind, row, look in rows
    ]
    overall = [number(each.get("rate_all")) for each in told]
    if not both and overall != [number(each.get("rate")) for each in told]:  # else all were answered
        of_all = [None if y is None else Spread(y, y, y, sure=False) for y in overall]
        rates.append(Series("of all passages", of_all, ink=NONE[0], hollow=True))
    xs = tuple(float(i) for i in range(len(names)))
    lengths = [
        Line(
            kind if both else "words", Curve(xs, tuple(number((e or {}).get("words")) for e in row)),
            *(look if both else WORDS), dots=True,
        )
        for kind, row, look in rows
    ]  # fmt: skip
    return [
        Spreads(
            "hallucination-rate", "Summaries that say what the passage does not",
            "Share of the answered passages' summaries; the bars are 95 % intervals.",
            "share of summaries (%)", (), x_label="checkpoint", percent=True, x_names=names, series=rates,
        ),
        Chart(
            "hallucination-length", "How long the summaries are",
            "Silence and brevity look faithful: a rate that falls with the length has another cause.",
            "words a summary", lengths, x_label="checkpoint", x_names=names,
        ),
    ]  # fmt: skip


def _rate(each: dict[str, Any] | None) -> Spread | None:
    """With Wilson's interval, which does not lie evenly around it: at 0 of n it is all above."""
    told = each or {}
    interval = told.get("interval")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return spread({"mean": told.get("rate"), "low": low, "high": high})


def _points(change: float) -> str:
    return f"{100 * change:+.1f} pt".replace("-", "−")


def _table(told: Sequence[dict[str, Any]]) -> Markup:
    rows = []
    for each in told:
        interval = each.get("interval") or []
        between = f"{_percent(interval[0])} to {_percent(interval[1])}" if len(interval) == 2 else "–"
        against = each.get("compared") or {}
        change = number(against.get("worse"))
        compared = "–" if change is None else _points(change)
        over = f" <small>over {escape(against['label'])}</small>" if change is not None else ""
        judged = f"{escape(each.get('scorer', ''))}, T = {number(each.get('temperature')) or 0:g}"
        thought = "" if each.get("thinking", True) else ", no thought"
        rows.append(
            f'<tr><th scope="row">{escape(each.get("label", ""))} <small>{judged}{thought}</small></th>'
            f"<td>{_percent(each.get('answer_rate'))}</td><td>{_percent(each.get('rate'))} "
            f"<small>{between}</small></td><td>{_percent(each.get('rate_all'))}</td>"
            f"<td>{number(each.get('words')) or 0:.1f}</td><td>{_percent(each.get('told'))}</td>"
            f"<td>{_percent(each.get('copied'))}</td><td>{compared}{over}</td></tr>"
        )
    heads = ("checkpoint", "answered", "of the answered", "of all", "words", "told", "copied", "change")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    caption = "The same in numbers, with what was answered and how"
    return Markup(
        f'<div class="scroll"><table class="numbers small" id="summaries"><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _percent(value: object) -> str:
    share = number(value)
    return "–" if share is None else show(share, "%")


def _examples(stage: Stage, told: dict[str, Any]) -> Markup:
    """Some summaries with what was found in them."""
    wrong = [sample for sample in stage.samples if sample.get("hallucinated") is True][:SHOWN]
    if not wrong:
        return Markup("")
    items = "".join(
        f"<li><p>{escape(sample.get('passage', ''))}</p><p>→ {escape(sample.get('summary', ''))} "
        f"<small>({_found(sample)})</small></p></li>"
        for sample in wrong
    )
    label = escape(told.get("label", stage.name))
    thought = "" if told.get("thinking", True) else " without a thought"
    title = f"Some of {label}'s summaries{thought} that the passage does not support"
    return Markup(f"<details><summary>{title}</summary><ul>{items}</ul></details>")


def _found(sample: dict[str, Any]) -> str:
    pairs = [pair for pair in sample.get("findings", []) if isinstance(pair, list) and len(pair) == 2]
    return (
        "; ".join(f"{escape(FOUND.get(str(kind), str(kind)))}: {escape(text)}" for kind, text in pairs)
        or "unsupported"
    )
