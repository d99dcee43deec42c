"""What every stage's configuration has in common."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from liubai.errors import UserError
from liubai.model.hub import checkpoint_digest, find_folder
from liubai.problems.gym import PREFIX as GYM
from liubai.problems.gym import version
from liubai.problems.questions import Questions, digests

if TYPE_CHECKING:
    import torch

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
        family(name)
    except UserError as error:
        raise ValueError(str(error)) from None
    return name


def _family_with_text(name: str) -> str:
    if name.startswith(GYM):
        raise ValueError(f"nobody wrote text about '{name[:80]}'; gym: families are for rl and eval")
    return _family_name(name)


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

    def families(self) -> Iterable[str]:
        """The families that it asks problems of, where it has no questions."""
        return ()

    def outside(self) -> dict[str, str]:
        found = digests(self.questions) if self.questions else {}
        if not self.questions and any(name.startswith(GYM) for name in self.families()):
            found["reasoning-gym"] = version()
        return found | ({"model": checkpoint_digest(find_folder(self.model))} if self.model else {})


class Compute(StageConfig):
    """Where a model runs, and in which precision: on a GPU if there is one, and there in bfloat16."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    #: decode by torch.compile; worth its half minute on a GPU
    compile: bool = False

    def where(self) -> torch.device:
        """Raises ``UserError`` where the device is not there."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = torch.device(self.device)
        if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f'device = "{self.device}": PyTorch sees {torch.cuda.device_count()} GPUs here; '
                'set device = "cpu", or install a build of PyTorch for this GPU'
            )
        return found

    def dtype(self) -> torch.dtype:
        import torch

        if self.precision == "auto":
            return torch.float32 if self.where().type == "cpu" else torch.bfloat16
        return torch.float32 if self.precision == "float32" else torch.bfloat16


class Trained(Compute):
    """What training needs memory for. The more of these are set, the larger a model fits."""

    #: micro-batches are halved where memory runs out; "auto" begins with many on a GPU
    tokens_per_microbatch: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    #: the moments of AdamW: 8 bytes a parameter, or 4
    optimizer_state: Literal["float32", "bfloat16"] = "float32"
    #: compute activations again in the backward pass instead of keeping them
    checkpointing: bool = False

    def microbatch(self) -> int:
        if self.tokens_per_microbatch == "auto":
            return 2048 if self.where().type == "cpu" else 65536
        return self.tokens_per_microbatch

    def moments(self) -> torch.dtype:
        import torch

        return torch.float32 if self.optimizer_state == "float32" else torch.bfloat16


FamilyName = Annotated[str, AfterValidator(_family_name)]
WrittenFamilyName = Annotated[str, AfterValidator(_family_with_text)]
#: family name -> its share of a mixture (they need not add up to 1)
Shares = Annotated[dict[FamilyName, float], AfterValidator(_positive_shares)]
#: the same, of families that a base model can be pre-trained on
WrittenShares = Annotated[dict[WrittenFamilyName, float], AfterValidator(_positive_shares)]
