"""The report: one HTML file that opens offline, with nothing inside it that loads anything.

The text of the page is in ``page.html``, its look in ``page.css``, the pointer's values in
``page.js``; all three are written into the one file. Jinja escapes every value by default.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from liubai.files import write_text
from liubai.report.answers import probe_questions
from liubai.report.charts import panel_charts, pass_chart, pretrain_charts, story_charts
from liubai.report.examples import example_charts, sample_table
from liubai.report.instruments import sections
from liubai.report.read import IMITATING, JUDGING, Run, Stage, number, read_run
from liubai.report.section import Section
from liubai.report.stages import origin, pipeline_sentence, stage_charts, stage_table
from liubai.report.story import (
    Evaluated,
    columns,
    evaluations,
    is_pipeline,
    pair,
    sentence,
    show,
    take_off,
)

PACKAGES = ("liubai", "torch", "numpy", "tokenizers", "safetensors")


def write_report(run: Path) -> Path:
    """Write ``run/report.html`` atomically and return its path.

    A run that has not finished gives a report of what is there, which says what is missing. Raises
    ``UserError`` when ``run`` is not a run folder.
    """
    html = render(read_run(run))
    path = run / "report.html"
    write_text(path, html)
    return path


def render(run: Run) -> str:
    """The whole page as text."""
    here = Path(__file__).parent
    parts = sections(run)
    scripts = [(here / "page.js").read_text(encoding="utf-8"), *(p.script for p in parts if p.script)]
    environment = Environment(
        loader=PackageLoader("liubai.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    reinforced = [s for s in run.of_kind("rl") if s.rows]
    evaluated = evaluations(run)
    many = is_pipeline(evaluated)
    return environment.get_template("page.html").render(
        run=run,
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        script_hashes=[_hash(script) for script in scripts],
        sentence=pipeline_sentence(run) or sentence(run) or _found(parts),
        has={kind: bool(run.of_kind(kind)) for kind in ("eval", "rl", "pretrain")},
        facts=_facts(run, reinforced),
        missing=_missing(run, reinforced),
        evaluated=evaluated,
        hero=(evaluated[0], evaluated[-1]) if many else pair(run),
        pair=pair(run) if len(evaluated) == 2 else None,
        protocol=_protocol(evaluated),
        columns=columns(evaluated),
        meanings=_meanings(evaluated),
        whence=lambda e: origin(run, e) if many else "after" if e.after else "before",
        staged=stage_table(run),
        stage_charts=stage_charts(run),
        show=show,
        change=_change,
        stderr=_stderr,
        story=story_charts(reinforced),
        pass_chart=pass_chart(run),
        probes=[(s, q) for s in reinforced if (q := probe_questions(s))],
        panels_by=panel_charts(reinforced),
        pretrain=pretrain_charts([s for s in run.of_kind("pretrain") if s.rows]),
        taught=bool(run.of_kind(*IMITATING, *JUDGING, "sample")),
        examples=example_charts(run),
        kept=sample_table(run),
        instruments=parts,
        take_offs=[(s, take_off(s.curve("reflections"))) for s in reinforced],
        warnings=[(s.name, w) for s in run.stages for w in s.warnings],
        clock=clock,
        dict=dict,
        environment=_environment(run),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _found(parts: Sequence[Section]) -> str:
    """The title of a run that tells no story of its own: what its first instrument found."""
    if parts:
        return f"{parts[0].title}: {parts[0].finding}"
    return "This run has no result yet: what is here so far is shown below."


def _hash(script: str) -> str:
    """By what the page's policy knows a script: base64 of its SHA-256."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def clock(seconds: float | None) -> str:
    """Seconds as a person reads them: 43 s, 7 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _facts(run: Run, reinforced: list[Stage]) -> list[tuple[str, str]]:
    """The strip under the title: how much work the result took."""
    facts = []
    read = [t for s in run.of_kind("pretrain") if s.rows and (t := number(s.rows[-1].get("tokens")))]
    if read:
        facts.append((_count(sum(read)), "tokens read"))
    if reinforced:
        facts.append((f"{sum(s.steps for s in reinforced):,}", "steps of RL"))
    written = [t for s in reinforced if (t := number(s.rows[-1].get("tokens")))]
    if written:
        facts.append((_count(sum(written)), "tokens written"))
    seconds = [t for s in run.stages if (t := s.seconds) is not None]
    if seconds:
        facts.append((clock(sum(seconds)), "in all"))
    return facts


def _count(tokens: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if tokens >= size:
            return f"{tokens / size:.1f}{unit}"
    return f"{tokens:.0f}"


def _missing(run: Run, reinforced: list[Stage]) -> list[str]:
    """What a reader would look for and not find, most important first."""
    notes = list(run.notes)
    evaluated = evaluations(run)
    if run.of_kind("rl") and evaluated and pair(run) is None:
        lacking = "before" if any(e.after for e in evaluated) else "after"
        notes.append(f"No evaluation {lacking} reinforcement learning: there is no before and after.")
    notes += [f"“{s.name}” has no probe samples." for s in reinforced if not probe_questions(s)]
    return notes


def _change(before: float | None, after: float | None, form: str) -> tuple[str, str]:
    """The difference with its sign, in percentage points or as a count, and the factor of a count."""
    if before is None or after is None:
        return "–", ""
    sign = "" if after == before else "+" if after > before else "−"
    if form == "%":
        return f"{sign}{abs(100 * (after - before)):.1f} pt", ""
    factor = f"×{after / before:.1f}" if before > 0 and after > 0 else ""
    return f"{sign}{abs(after - before):,.{form}f}", factor


def _protocol(evaluated: list[Evaluated]) -> str:
    """On how many problems and answers the numbers rest, once when it is the same for all."""
    said: dict[str, list[str]] = {}
    for e in evaluated:
        result = e.stage.result or {}
        n, which, each = (result.get(key, "?") for key in ("n_problems", "problems", "samples"))
        which = ", ".join(map(str, which)) if isinstance(which, dict | list) else which
        said.setdefault(f"{n} held-out problems ({which}) × {each} answers", []).append(e.label)
    if len(said) == 1:
        return f"{next(iter(said))} per checkpoint."
    return " ".join(f"{', '.join(labels)}: {text}." for text, labels in said.items())


def _meanings(evaluated: list[Evaluated]) -> str:
    """What those measures say that were taken and do not explain themselves."""
    texts = {
        "language": "Language is the share of the thought's words that are in the question's language.",
        "readable": "Readable are the answers that pass the readability filter.",
        "unsound": "Unsound are right answers whose thought has a wrong step, as a share of the right ones.",
        "win_rate": "Win rate is the share of answers preferred to those of the checkpoint named.",
    }
    return "".join(f" {t}" for key, t in texts.items() if any(e.value(key) is not None for e in evaluated))


def _stderr(key: str, stage: Stage) -> str:
    error = number((stage.result or {}).get("stderr"))
    return f"± {100 * error:.1f}" if key == "pass@1" and error is not None else ""


def _environment(run: Run) -> tuple[str, list[tuple[str, str]]]:
    """Whose environment it is, and its facts: the run's own record, or this machine's as a stand-in."""
    if run.environment is not None:
        return "recorded by the run", [(str(k), _flat(v)) for k, v in run.environment.items()]
    facts = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            facts.append((package, version(package)))
        except PackageNotFoundError:
            facts.append((package, "not installed"))
    facts.append(("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"))
    facts.append(("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")))
    return "of the machine that wrote this page; the run recorded none", facts


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
