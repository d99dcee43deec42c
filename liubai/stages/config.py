"""What every stage's configuration has in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from liubai.errors import UserError
from liubai.model.hub import HUB_ID, checkpoint_digest, find_folder
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

    def require_parents(self, kinds: Mapping[str, str]) -> None:
        """Can the stage begin from these earlier ones, name -> kind? Raises ``ValueError`` where the kind
        says that it cannot."""

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

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.questions and "problems" in self.model_fields_set:
            # a resolved recipe spells the default out
            default = type(self).model_fields["problems"].get_default()
            if getattr(self, "problems", default) != default:
                raise ValueError("'questions' and 'problems' are both set; a stage asks one or the other")
        return self

    def located(self, folder: Path) -> StageConfig:
        near = folder / self.model
        # what is no folder anywhere and no hub id was meant to be one here: the error says where
        lost = not HUB_ID.fullmatch(self.model) and not Path(self.model).is_dir()
        model = str(near.absolute()) if self.model and (near.is_dir() or lost) else self.model
        questions = self.questions.located(folder) if self.questions else None
        return self.model_copy(update={"model": model, "questions": questions})

    def families(self) -> Iterable[str]:
        """The families that it asks problems of, where it has no questions."""
        return ()

    def require_model(self, stage: str, parents: Sequence[str]) -> None:
        """Can the stage begin with what is named? ``parents`` are the stages that it is from. Raises
        ``UserError`` when ``model`` is not there or too small for what is asked, or when there is neither."""
        if not self.model and not parents:
            raise UserError(
                f"stage '{stage}' starts from the checkpoint of exactly one earlier stage; its 'from' names "
                "none. Or name a model"
            )
        if not self.model:
            return
        try:
            folder = find_folder(self.model)
        except UserError as error:
            near = Path(self.model).absolute()
            tried = "" if str(near) in str(error) else f"; no folder '{near}' either"
            raise UserError(f"stage '{stage}': {error}{tried}") from error
        self.require_room(stage, folder)

    def require_room(self, stage: str, checkpoint: Path) -> None:
        """Raises ``UserError`` when ``max_tokens`` or ``lora.rank`` cannot fit a model of the size that the
        checkpoint's config.json says. Prompts are not counted here: they need a tokenizer."""
        tokens, lora = getattr(self, "max_tokens", 0), getattr(self, "lora", None)
        if not tokens and not lora:
            return
        from liubai.model.checkpoint import read_config

        size = read_config(checkpoint)
        if tokens >= size.max_position_embeddings:
            raise UserError(
                f"stage '{stage}': max_tokens {tokens} and a prompt do not fit the model's "
                f"{size.max_position_embeddings} positions; lower max_tokens"
            )
        if lora:
            heads, keys = (n * size.head_dim for n in (size.num_attention_heads, size.num_key_value_heads))
            side = {"q_proj": heads, "k_proj": keys, "v_proj": keys, "o_proj": heads}
            least = min(min(size.hidden_size, side.get(t, size.intermediate_size)) for t in lora.targets)
            if lora.rank > least:
                raise UserError(
                    f"stage '{stage}': lora.rank {lora.rank} is more than the smallest side of the model's "
                    f"matrices, {least}: it would save nothing; lower it, or leave lora out"
                )

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


def _kind_name(name: str) -> str:
    from liubai.grade import is_ours

    return name if is_ours(name) or USERS_OWN in name else _family_name(name)


#: between the file and the function of a verifier that the user brings
USERS_OWN = ".py:"

FamilyName = Annotated[str, AfterValidator(_family_name)]
#: a family, or a verifier: what tells kinds of problems apart
KindName = Annotated[str, AfterValidator(_kind_name)]
WrittenFamilyName = Annotated[str, AfterValidator(_family_with_text)]
#: family name -> its share of a mixture (they need not add up to 1)
Shares = Annotated[dict[FamilyName, float], AfterValidator(_positive_shares)]
#: the same, of families that a base model can be pre-trained on
WrittenShares = Annotated[dict[WrittenFamilyName, float], AfterValidator(_positive_shares)]
