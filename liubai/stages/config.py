"""What every stage's configuration has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StageConfig(BaseModel):
    """A small typed class next to the stage that it configures; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
