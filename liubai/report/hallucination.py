"""What summaries say that their passage does not, from hallucination.json: rates, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from liubai.report.read import Curve, Run, Stage, number, read_object
from liubai.report.section import Section
from liubai.report.svg import Chart, Line

RATE, NONE, WORDS = (0, 0), (1, 0), (3, 0)  #: (ink, dash) of the lines
SHOWN = 4  #: unsupported summaries that are shown, a checkpoint
FOUND = {
    "number": "a number", "date": "a date", "name": "a name", "relation": "a value with the wrong thing",
    "count": "a count", "negation": "denied", "affirmed": "affirmed", "limit": "limited",
    "opposite": "the contrary", "word": "words",
}  # fmt: skip


def section(run: Run) -> Section | None:
    """``None`` when no stage has looked."""
    found = [
        (stage, told)
        for stage in run.of_kind("hallucination")
        if stage.folder and (told := read_object(stage.folder / "hallucination.json", run.notes))
    ]
    if not found:
        return None
    results = [each for _, each in found]
    body = _table(results) + Markup("").join(_examples(stage, each) for stage, each in found)
    title = "What the passage does not say"
    return Section("hallucination", title, "无中生有", _finding(results), _charts(results), body)


def _finding(told: Sequence[dict[str, Any]]) -> str:
    """Where it began and where it ended; what a gate said comes first."""
    stopped = [f"{each['label']} did not pass its gate: {each['gate']}." for each in told if each.get("gate")]
    known = [
        (str(each.get("label", "")), rate) for each in told if (rate := number(each.get("rate"))) is not None
    ]
    if not known:
        said = "No summary could be judged."
    elif len(known) == 1 or max(rate for _, rate in known) == 0:
        said = f"{known[-1][1]:.1%} of {known[-1][0]}'s summaries say what the passage does not."
    else:
        (first, began), (last, ended) = known[0], known[-1]
        way = "fewer than" if ended < began else "more than" if ended > began else "as many as"
        said = (
            f"{ended:.1%} of {last}'s summaries say what the passage does not, {way} {first}'s {began:.1%}."
        )
    return " ".join([*stopped, said])


def _charts(told: Sequence[dict[str, Any]]) -> list[Chart]:
    if len(told) < 2:
        return []
    names = [str(each.get("label", "")) for each in told]
    xs = tuple(float(i) for i in range(len(told)))
    rates = [number(each.get("rate")) for each in told]
    errors = [_half(each) for each in told]
    lines = [Line("of answered passages", Curve(xs, tuple(rates)), *RATE, dots=True, errors=errors)]
    overall = [number(each.get("rate_all")) for each in told]
    if overall != rates:  # else all were answered
        lines.append(Line("of all passages", Curve(xs, tuple(overall)), *NONE, dots=True))
    lengths = [Line("words", Curve(xs, tuple(number(e.get("words")) for e in told)), *WORDS, dots=True)]
    return [
        Chart(
            "hallucination-rate", "Summaries that say what the passage does not",
            "Share of the summaries; the bars are 95 % intervals of the rate among answered passages.",
            "share of summaries (%)", lines, x_label="checkpoint", percent=True, x_names=names,
        ),
        Chart(
            "hallucination-length", "How long the summaries are",
            "Silence and brevity look faithful: a rate that falls with the length has another cause.",
            "words a summary", lengths, x_label="checkpoint", x_names=names,
        ),
    ]  # fmt: skip


def _half(each: dict[str, Any]) -> float:
    """Half of the interval's length; not a number without one."""
    interval = each.get("interval")
    return (
        (interval[1] - interval[0]) / 2 if isinstance(interval, list) and len(interval) == 2 else float("nan")
    )


def _table(told: Sequence[dict[str, Any]]) -> Markup:
    rows = []
    for each in told:
        interval = each.get("interval") or []
        between = f"{_percent(interval[0])} to {_percent(interval[1])}" if len(interval) == 2 else "–"
        against = each.get("compared") or {}
        change = number(against.get("worse"))
        compared = "–" if change is None else f"{100 * change:+.1f} pt".replace("-", "−")
        over = f" <small>over {escape(against['label'])}</small>" if change is not None else ""
        judged = f"{escape(each.get('scorer', ''))}, T = {number(each.get('temperature')) or 0:g}"
        thought = "" if each.get("thinking", True) else ", no thought"
        rows.append(
            f'<tr><th scope="row">{escape(each.get("label", ""))}<small>{judged}{thought}</small></th>'
            f"<td>{_percent(each.get('answer_rate'))}</td><td>{_percent(each.get('rate'))} "
            f"<small>{between}</small></td><td>{_percent(each.get('rate_all'))}</td>"
            f"<td>{number(each.get('words')) or 0:.1f}</td><td>{_percent(each.get('told'))}</td>"
            f"<td>{_percent(each.get('copied'))}</td><td>{compared}{over}</td></tr>"
        )
    heads = ("checkpoint", "answered", "of the answered", "of all", "words", "told", "copied", "change")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    caption = "Summaries that say what the passage does not"
    return Markup(
        f'<div class="scroll"><table class="numbers small" id="summaries"><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _percent(value: object) -> str:
    share = number(value)
    return "–" if share is None else f"{share:.1%}"


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
    title = f"Some of {label}'s that the passage does not support"
    return Markup(f"<details><summary>{title}</summary><ul>{items}</ul></details>")


def _found(sample: dict[str, Any]) -> str:
    pairs = [pair for pair in sample.get("findings", []) if isinstance(pair, list) and len(pair) == 2]
    return (
        "; ".join(f"{escape(FOUND.get(str(kind), str(kind)))}: {escape(text)}" for kind, text in pairs)
        or "unsupported"
    )
