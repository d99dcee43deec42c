"""Scaling fits over the stages that this one is ``from`` (:mod:`liubai.measure.scaling`)."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from liubai.files import write_json
from liubai.measure.scaling import DRAWS
from liubai.measure.scaling_points import CURVED, damaged, of_runs
from liubai.measure.scaling_verdict import analyse, as_json
from liubai.seeds import derive
from liubai.stages.config import StageConfig
from liubai.stages.context import Context

RESULT = "scaling.json"


class Config(StageConfig):
    draws: int = Field(DRAWS, ge=20, description="bootstrap samples")

    def require_parents(self, kinds: Mapping[str, str]) -> None:
        if not kinds:
            raise ValueError("scaling reads the stages that its 'from' names, and it names none")
        for name, kind in kinds.items():
            if kind not in CURVED:
                raise ValueError(
                    f"stage '{name}' ({kind}) has no curve; scaling reads stages of the kinds "
                    f"{', '.join(CURVED)}"
                )


def run(config: Config, context: Context) -> None:
    for lost in damaged([context.folder.parent], context.inputs):
        context.warn(lost)
    points = of_runs([context.folder.parent], context.inputs)
    found = analyse(points, config.draws, derive(context.seed, "scaling"))
    write_json(context.folder / RESULT, {"series": [as_json(series) for series in found]})
    context.log(1, 1, {"series": len(found), "fits": sum(len(series.fits) for series in found)})
