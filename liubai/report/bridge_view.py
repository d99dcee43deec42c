"""Where thoughts fork, and some thoughts step by step, as safe HTML.

Model text is untrusted: every piece of it is escaped by the format that it is put into.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup

from liubai.report.bridge_charts import Found, bits, label
from liubai.report.read import number
from liubai.report.story import show

#: Bits from which on a step's colour deepens.
LEVELS = (0.1, 1.0, 3.0, 8.0)
WORDS = 8  #: that are named of those that fork


def tables(found: Sequence[Found]) -> Markup:
    """Where each checkpoint's thoughts fork."""
    each = []
    for told in found:
        forks = told.get("forks") or {}
        rows = Markup("").join(
            Markup('<tr><th scope="row">{}</th><td>{}</td><td>{}</td><td>{}</td></tr>').format(
                str(word.get("word", "")).strip() or "␣",
                word.get("forking"),
                word.get("written"),
                bits(number(word.get("entropy")) or 0.0),
            )
            for word in forks.get("words", [])[:WORDS]
        )
        carry, least = number(forks.get("carry")), number(forks.get("threshold"))
        if rows and carry is not None and least is not None:
            each.append(
                Markup(
                    '<div class="scroll"><table class="numbers small forks">'
                    "<caption>{}: a fifth of the tokens carry {} of the entropy</caption>"
                    '<thead><tr><th scope="col">word</th><th scope="col">as a fork</th>'
                    '<th scope="col">in all</th><th scope="col">bits, mean</th></tr></thead>'
                    "<tbody>{}</tbody></table>"
                    '<p class="note">Forks: tokens drawn from at least {} bits.</p></div>'
                ).format(label(told), show(carry, "%", 0), rows, bits(least))
            )
    return Markup('<div class="tables">{}</div>').format(Markup("").join(each)) if each else Markup("")


def level(gain: float) -> str:
    """The style of a step that bought so many bits."""
    depth = sum(abs(gain) >= least for least in LEVELS)
    return f"{'gain' if gain > 0 else 'cost'}{depth}" if depth else "even"


def _scale() -> Markup:
    """The legend of the colours, from the greatest cost to the greatest gain."""
    names = [*(f"{a:g} to {b:g}" for a, b in pairwise(LEVELS)), f"over {LEVELS[-1]:g}"]
    keys = [(f"cost{i}", f"costs {name}") for i, name in enumerate(names, 1)][::-1]
    keys += [("even", f"under {LEVELS[0]:g}"), *((f"gain{i}", f"buys {n}") for i, n in enumerate(names, 1))]
    spans = Markup("").join(Markup('<span class="bought {}">{}</span>').format(*key) for key in keys)
    return Markup('<p class="scale"><span>Bits of the right answer:</span>{}</p>').format(spans)


def thoughts(found: Sequence[Found]) -> Markup:
    """The same problems at every checkpoint, each thought step by step."""
    by_prompt: dict[str, list[Markup]] = {}
    for told in found:
        for row in told.get("shown", []):
            by_prompt.setdefault(str(row.get("prompt", "")), []).append(_thought(label(told), row))
    if not by_prompt:
        return Markup("")
    articles = Markup("").join(
        Markup(
            "<article><h4><span>question {}</span> <code>{}</code></h4>"
            '<div class="columns">{}</div></article>'
        ).format(i, prompt, Markup("").join(answers))
        for i, (prompt, answers) in enumerate(by_prompt.items(), 1)
    )
    return Markup(
        '<h3 class="whose">What each step bought</h3>{}<div class="probes">{}</div>'
        '<p class="note">The first thought about each of the first problems: nobody has chosen them. Point '
        "at a step, or tab to it, for its bits. ✗ is a step that is wrong by the rules of its family.</p>"
    ).format(_scale(), articles)


def _thought(name: str, row: Found) -> Markup:
    curve = [cost for cost in map(number, row.get("curve", [])) if cost is not None]
    steps = row.get("steps", [])
    if len(curve) != len(steps) + 1:
        return Markup("")
    entropy = [number(value) for value in row.get("entropy", [])]
    lines = []
    for i, step in enumerate(steps):
        gain = curve[i] - curve[i + 1]
        after = entropy[i + 1] if i + 1 < len(entropy) else None
        said = (
            f"{'+' if gain >= 0 else ''}{bits(gain)} bits: a right answer costs {bits(curve[i + 1])} after it"
        )
        said += f", the entropy of the answer is {bits(after)}" if after is not None else ""
        wrong = " ✗" if step.get("right") is False else ""
        lines.append(
            Markup(
                '<li><span class="bought {}" tabindex="0">{}{}<span class="bits"> {}</span></span></li>'
            ).format(level(gain), str(step.get("text", "")), wrong, said)
        )
    right, answer = row.get("right") is True, row.get("answer")
    return Markup(
        '<div class="answer {}"><p class="when">{}</p><p class="verdict"><b>{}</b> {}</p>'
        '<div class="steps"><ol>{}</ol></div>'
        '<p class="note">A right answer costs {} bits before the thought and {} after it.</p></div>'
    ).format(
        "right" if right else "wrong",
        name,
        "✓ right" if right else "✗ wrong",
        "no answer" if answer is None else Markup("<code>{}</code>").format(answer),
        Markup("").join(lines),
        bits(curve[0]),
        bits(curve[-1]),
    )
