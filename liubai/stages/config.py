"""What every stage's configuration has in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from liubai.errors import UserError
from liubai.model.hub import checkpoint_digest, find_folder
from liubai.problems.questions import Questions, digests

#: a run stops after this many non-finite steps in a row
MAX_SKIPPED = 3


class StageConfig(BaseModel):
    """A small typed class next to the stage that it configures; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def filled(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """What was written, and the keys that a part of it stands for. Raises ``UserError``."""
        return raw

    def outside(self) -> dict[str, str]:
        """Digests of what the stage reads that is not an earlier stage's: part of its fingerprint."""
        return {}

    def located(self, folder: Path) -> StageConfig:
        """The same, with paths relative to ``folder``, where the recipe stands, made absolute."""
        return self


def _family_name(name: str) -> str:
    from liubai.problems import family  # families know nothing of stages

    try:
        return family(name).name
    except UserError as error:
        raise ValueError(str(error)) from None


def _positive_shares(shares: dict[str, float]) -> dict[str, float]:
    if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError("needs at least one family with a positive share")
    return shares


class Brought(StageConfig):
    """A stage that may begin with what the user brings: ``model``, a checkpoint folder or hub id, in the
    place of an earlier stage, and ``questions`` in the place of generated ones."""

    model: str = ""
    questions: Questions | None = None

    def located(self, folder: Path) -> StageConfig:
        near = folder / self.model
        model = str(near.absolute()) if self.model and near.is_dir() else self.model
        questions = self.questions.located(folder) if self.questions else None
        return self.model_copy(update={"model": model, "questions": questions})

    def outside(self) -> dict[str, str]:
        found = digests(self.questions) if self.questions else {}
        return found | ({"model": checkpoint_digest(find_folder(self.model))} if self.model else {})


FamilyName = Annotated[str, AfterValidator(_family_name)]
#: family name -> its share of a mixture (they need not add up to 1)
Shares = Annotated[dict[FamilyName, float], AfterValidator(_positive_shares)]
