"""Which curves are drawn, and the sentence that says how to read each.

With one rl stage a chart's lines are told apart by colour. With several (controls), colour is the
stage and the pattern of the line is the measure, and charts of many lines come once a stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from liubai.report.read import Curve, Run, Stage
from liubai.report.story import TAKE_OFF_RULE, Evaluated, evaluations, is_pipeline, take_off
from liubai.report.svg import Chart, Line, Mark

#: Colours of the stages when there are several. Grey (2) is last: it is the colour of "before".
STAGE_INKS = (0, 1, 3, 4, 5, 2)
NEUTRAL = 6

Keys = Sequence[tuple[str, str]]  #: (metric, label) pairs


def style(place: int) -> tuple[int, int]:
    """(ink, dash) of the line at ``place``: the first three differ by colour alone, 12 in all differ."""
    return place % 6, 0 if place < 3 else 1 + (place - 3 + place // 6) % 3


def stage_style(place: int) -> tuple[int, int]:
    """The same for lines that are stages or checkpoints: grey comes last of the colours."""
    ink, dash = style(place)
    return STAGE_INKS[ink], dash


def story_charts(stages: Sequence[Stage]) -> list[Chart]:
    """The three curves: accuracy, length, reflections, with the take-off marked on each."""
    several = len(stages) > 1
    marks = []
    for i, stage in enumerate(stages):
        step = take_off(stage.curve("reflections"))
        if step is not None:
            name = f"{stage.name} · step {step}" if several else f"take-off · step {step}"
            marks.append(Mark(step, name, STAGE_INKS[i % 6] if several else NEUTRAL))
    charts = [
        _over_steps(
            "accuracy",
            "Accuracy",
            "Share of answers that are right: dots on held-out problems at each evaluation, the line on the "
            "problems being practised (faint: each step, strong: moving mean).",
            "answers that are right (%)",
            stages,
            [("eval/pass@1", "held-out problems"), ("accuracy", "rollouts")],
            percent=True,
            marks=marks,
        ),
        _over_steps(
            "length",
            "Length",
            "How much the model writes before it stops, for answers that turned out right and wrong "
            "(moving means over the faint steps).",
            "mean tokens per answer",
            stages,
            [("length/right", "right answers"), ("length/wrong", "wrong answers")]
            + ([] if several else [("length/mean", "all")]),
            marks=marks,
        ),
        _over_steps(
            "reflections",
            "Reflections",
            "Words of second thoughts (wait, but, check, 等等 …) in the thought of one answer. "
            + _moment(stages),
            "reflection words per answer",
            stages,
            [("reflections", "rollouts")],
            marks=marks,
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _moment(stages: Sequence[Stage]) -> str:
    without = [s.name for s in stages if s.curve("reflections") and take_off(s.curve("reflections")) is None]
    if without and len(stages) == 1:
        return f"There was no take-off in this run. {TAKE_OFF_RULE}"
    if without:
        return f"There was no take-off in {', '.join(without)}. {TAKE_OFF_RULE}"
    return TAKE_OFF_RULE


def pass_chart(run: Run) -> Chart | None:
    """pass@k of every evaluated checkpoint."""
    evaluated = evaluations(run)
    many = is_pipeline(evaluated)
    found = [(e, e.pass_curve) for e in evaluated if e.pass_curve]
    if not found:
        return None
    reinforced = [stage.name for stage in run.of_kind("rl") if stage.rows]
    lines = []
    for i, (e, points) in enumerate(found):
        made_by = e.stage.parent
        curve = Curve(tuple(float(k) for k, _ in points), tuple(v for _, v in points))
        place = reinforced.index(made_by) if made_by in reinforced else 0
        # in a pipeline, too, grey is what all began from
        ink, dash = (
            (stage_style(i - 1) if i else (2, 0)) if many else (STAGE_INKS[place % 6] if e.after else 2, 0)
        )
        lines.append(Line(e.label if many else _name(e), curve, ink, dash, dots=True))
    return Chart(
        "pass",
        "pass@k",
        "The chance that at least one of k answers is right: a curve that is higher at k = 1 and meets the "
        "old one at large k means that training sharpened what the model could already do.",
        "problems solved within k tries (%)",
        lines,
        x_label="k (answers per problem, log scale)",
        percent=True,
        log_x=True,
    )


def _name(evaluated: Evaluated) -> str:
    when = "after" if evaluated.after else "before"
    return evaluated.label if when in evaluated.label.lower() else f"{when}: {evaluated.label}"


def panel_charts(stages: Sequence[Stage]) -> dict[str, list[Chart]]:
    """Section id -> its charts, over the rl stages."""
    return {
        "exploration": _present(
            _split(
                "entropy", "Entropy",
                "How undecided the model is about its next token, in nats; a fall to zero means that it has "
                "stopped exploring.",
                "entropy (nats per token)", stages, [("entropy", "entropy")],
            ),
            _split(
                "format", "Format and cut-off answers",
                "Share of answers with well-formed tags, and share that ran out of tokens before they ended.",
                "share of answers (%)", stages, [("format", "well-formed"), ("truncated", "cut off")],
                percent=True,
            ),
            _split(
                "language", "Language and readability",
                "Share of the thought's words in the language of the question, and share of answers that "
                "pass the readability filter.",
                "share (%)", stages, [("language", "language"), ("readable", "readable")], percent=True,
            ),
            _split(
                "unsound", "Right answer, wrong reasoning",
                "Share of right answers whose thought has a wrong step: the price of rewarding outcomes "
                "alone.",
                "share of right answers (%)", stages, [("unsound", "unsound")], percent=True,
            ),
        ),
        "reward": _present(
            _split(
                "parts", "Reward parts",
                "Mean over the step's answers of each part of the reward, and of their total.{zero}",
                "mean reward per answer", stages, _reward_keys(stages), drop_zero=True,
            ),
            _split(
                "variance", "Groups without a lesson",
                "Share of problems whose answers all earned the same reward: they are dropped, for there is "
                "nothing to compare.",
                "share of groups (%)", stages,
                [("zero_variance", "either"), ("zero_variance/right", "all right"),
                 ("zero_variance/wrong", "all wrong")],
                percent=True,
            ),
            _split(
                "preference", "What the reward model says",
                "Mean score of the answers, in logits, before any weight: a rise that no held-out measure "
                "shares is a reward model that is being fooled.",
                "score (logits)", stages, [("preference/score", "score")],
            ),
            _split(
                "win", "Answers that win",
                "Share of comparisons that the step's answers win; half is no better than what they are "
                "compared with.",
                "comparisons won (%)", stages, [("win", "won")], percent=True,
            ),
        ),
        "update": _present(
            _split(
                "clip", "Clipped tokens",
                "Share of tokens whose probability ratio left the trust region on either side; a few per "
                "cent at most is healthy.",
                "share of tokens (%)", stages, [("clip/low", "below"), ("clip/high", "above")], percent=True,
            ),
            _split(
                "gap", "Sampler against trainer",
                "Mean absolute difference of a token's two log-probabilities: under the same weights it "
                "should stay near zero; answers that older weights wrote add to it.",
                "log-probability gap (nats)", stages,
                [("logprob_gap", "as learned from"), ("logprob_gap/fresh", "same weights")],
            ),
            _split(
                "kl", "KL to the reference",
                "How far the model has moved from its reference (refreshed now and then), in nats per token.",
                "KL (nats per token)", stages, [("kl", "KL")], drop_zero=True,
            ),
            _split(
                "ess", "Effective sample size",
                "How much of the batch would still count if each token were weighted by how far the policy "
                "moved since it was written; 100 % is fully on-policy.",
                "share of tokens (%)", stages, [("ess", "effective share")], percent=True, zero=False,
            ),
            _split(
                "grad", "Gradient norm",
                "The length of the gradient before clipping; steady is good, and a spike marks a step that "
                "was cut.",
                "gradient norm", stages, [("grad_norm", "norm")],
            ),
            _split(
                "staleness", "Staleness",
                "How many updates old the weights were that wrote the answers learned from.",
                "updates", stages, [("staleness", "staleness")], drop_zero=True,
            ),
        ),
        "speed": _present(
            _split(
                "throughput", "Throughput",
                "Completion tokens that a second of the whole loop yields: generating, grading and updating.",
                "tokens per second", stages, [("tokens/s", "tokens/s")],
            ),
            _split(
                "phases", "Where a step's time goes",
                "Seconds of each phase in one step; the tallest line is what to speed up. Where answers are "
                "written elsewhere, generate is the wait for them, and transfer brings new weights there.",
                "seconds per step", stages,
                [("seconds/generate", "generate"), ("seconds/update", "update"), ("seconds/grade", "grade"),
                 ("seconds/transfer", "transfer")],
            ),
        ),
    }  # fmt: skip


def pretrain_charts(stages: Sequence[Stage]) -> list[Chart]:
    """Loss against tokens read, and the speed of reading."""

    def over_tokens(id: str, title: str, caption: str, label: str, key: str, zero: bool) -> Chart | None:
        lines = []
        for i, stage in enumerate(stages):
            curve, tokens = stage.curve(key), stage.curve("tokens")
            by_tokens = bool(tokens) and all(t is not None for t in tokens.ys)
            xs = tuple(t or 0.0 for t in tokens.ys) if by_tokens else curve.xs
            rising = all(b >= a for a, b in pairwise(xs))
            curve = Curve(xs if rising else curve.xs, curve.ys)
            lines.append(Line(stage.name, curve, STAGE_INKS[i % 6], noisy=True))
        lines = [line for line in lines if line.curve]
        x_label = "tokens read" if any(s.curve("tokens") for s in stages) else "step"
        return Chart(id, title, caption, label, lines, x_label, zero=zero) if lines else None

    return _present(
        [over_tokens(
            "loss", "Pre-training loss",
            "Cross-entropy of the next token on the found text; it levels off where the rest is chance.",
            "loss (nats per token)", "loss", False,
        )],
        [over_tokens(
            "reading", "Pre-training speed",
            "Tokens of text learned from per second; steady is what to expect.",
            "tokens per second", "tokens/s", True,
        )],
    )  # fmt: skip


def _reward_keys(stages: Sequence[Stage]) -> Keys:
    found: dict[str, str] = {}
    for stage in stages:
        for key in stage.keys("reward/"):
            found[key] = key.removeprefix("reward/").replace("_", " ")
    return sorted(found.items(), key=lambda item: item[0] != "reward/total")


def _split(
    id: str, title: str, caption: str, y_label: str, stages: Sequence[Stage], keys: Keys,
    *, percent: bool = False, zero: bool = True, drop_zero: bool = False,
) -> list[Chart | None]:  # fmt: skip
    """One chart, or one a stage when stages × measures would be too many lines to tell apart."""
    caption_of = caption
    shown = list(keys)
    if drop_zero:
        shown = [(k, n) for k, n in keys if any(y for s in stages for _, y in s.curve(k).known)]
        silent = [n for k, n in keys if (k, n) not in shown and any(s.curve(k) for s in stages)]
        caption_of = caption.replace("{zero}", f" Zero throughout: {', '.join(silent)}." if silent else "")
    if len(stages) == 1 or len(shown) <= 2:
        return [_over_steps(id, title, caption_of, y_label, stages, shown, percent=percent, zero=zero)]
    return [
        _over_steps(f"{id}-{_slug(s.name)}", f"{title} · {s.name}", caption_of, y_label, [s], shown,
                    percent=percent, zero=zero)
        for s in stages
    ]  # fmt: skip


def _over_steps(
    id: str, title: str, caption: str, y_label: str, stages: Sequence[Stage], keys: Keys,
    *, percent: bool = False, zero: bool = True, marks: Sequence[Mark] = (),
) -> Chart | None:  # fmt: skip
    lines = []
    for i, stage in enumerate(stages):
        for j, (key, label) in enumerate(keys):
            sparse = key.startswith("eval/")
            curve = stage.curve(key, sparse=sparse)
            if not curve:
                continue
            if len(stages) > 1:
                name = f"{stage.name}: {label}" if len(keys) > 1 else stage.name
                ink, dash = STAGE_INKS[i % 6], j
            else:
                name, (ink, dash) = label, style(j)
            lines.append(Line(name, curve, ink, dash % 4, noisy=not sparse, dots=sparse))
    if not lines:
        return None
    legend = lines if len(stages) > 1 and len(lines) == 1 else []  # whose line is it?
    if len(stages) > 1 and len(keys) > 1:  # colour says which stage, the pattern which measure
        nothing = Curve((), ())
        legend = [
            Line(s.name, nothing, STAGE_INKS[i % 6])
            for i, s in enumerate(stages)
            if any(s.curve(k) for k, _ in keys)
        ]
        legend += [
            Line(n, nothing, NEUTRAL, j % 4, dots=k.startswith("eval/"))
            for j, (k, n) in enumerate(keys)
            if any(s.curve(k) for s in stages)
        ]
    return Chart(
        id, title, caption, y_label, lines, percent=percent, zero=zero, marks=marks, keys=legend
    )  # fmt: skip


def _present(*groups: Sequence[Chart | None]) -> list[Chart]:
    return [chart for group in groups for chart in group if chart is not None]


def _slug(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)
