"""The models themselves in the report, from thinker.json: a reader types a problem and watches them think.

The page's side is ``thinker.js`` (the model) and ``thinker_view.js`` (the controls): together one script.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from liubai.report.read import Run, number
from liubai.report.section import Section

HERE = Path(__file__).parent


def section(run: Run) -> Section | None:
    """``None`` when no stage has brought a model."""
    brought = [told for stage in run.of_kind("thinker") if (told := stage.result)]
    found = [told for told in brought if isinstance(told.get("models"), list) and told["models"]]
    if not found:
        return None
    style = Markup("<style>{}</style>").format(_text("thinker.css"))
    body = style + Markup("").join(_body(place, told) for place, told in enumerate(found))
    script = f"{_text('thinker.js')}\n{_text('thinker_view.js')}"
    return Section("thinker", "Watch them think", "看它们想", _finding(found[0]), body=body, script=script)


def _text(name: str) -> Markup:
    """A file of ours, which is trusted."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _finding(told: dict[str, Any]) -> str:
    names = [str(model.get("label", "")) for model in told["models"]]
    who = f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"
    them = "them" if len(names) > 1 else "it"
    return f"{who} in this file, weights and all. Type a problem, and watch {them} think, offline."


def _size(model: dict[str, Any]) -> str:
    parameters, size = number(model.get("parameters")) or 0, number(model.get("bytes")) or 0
    return f"{parameters / 1e6:.2f} M parameters in {size / 1e6:.2f} MB"


def as_json(value: Any) -> Markup:
    """JSON for a data block of a page: no text in it can end the block or begin another one."""
    return Markup(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c"))


def _faithful(told: dict[str, Any]) -> str:
    """What 8 bits changed, measured."""
    parts = []
    for model in told["models"]:
        same = model.get("same") or {}
        text = f"{model.get('label', '')} on {same.get('tokens', '?')} of {same.get('problems', '?')}"
        right = same.get("right")
        if isinstance(right, list) and len(right) == 2:
            text += f" (right: {right[0]} before, {right[1]} after)"
        parts.append(text)
    return "; ".join(parts)


def _body(place: int, told: dict[str, Any]) -> Markup:
    data = told | {"models": [model | {"size": _size(model)} for model in told["models"]]}
    return _text("thinker.html").format(place=place, data=as_json(data), faithful=_faithful(told))
