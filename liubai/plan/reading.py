"""What a recipe asks for, as planning sees it: the models of its stages and the work of a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liubai.errors import UserError
from liubai.files import read_json
from liubai.model.config import ModelConfig
from liubai.model.hub import HUB_ID
from liubai.model.lora import LoraConfig
from liubai.plan.memory import Sizes, sizes
from liubai.plan.roofline import Work
from liubai.recipe import Recipe
from liubai.recipe.recipe import StagePlan
from liubai.stages.config import Trained
from liubai.stages.policy import PolicyConfig

#: kinds of stages that leave a checkpoint
LEAVE_ONE = ("pretrain", "sft", "dpo", "rl", "ppo", "distill")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage that trains. ``work`` is what stands in a step of one that learns from its own answers."""

    stage: str
    kind: str
    model: ModelConfig
    size: Sizes
    config: Trained
    work: Work | None
    frozen: int = 0  #: models that are only read: a KL's reference, a teacher, models that judge

    @property
    def lora(self) -> LoraConfig | None:
        return getattr(self.config, "lora", None)


def jobs(
    recipe: Recipe, *, given: Path | None = None, tokens: float | None = None, prompt: int = 128
) -> list[Job]:
    """The stages of ``recipe`` that train, in order. ``given`` is the config.json of models that stages
    bring; ``tokens`` the mean length of an answer, half of max_tokens unless said. Raises ``UserError`` where
    a model's shape is not known."""
    shapes = _Shapes(recipe, given)
    found = []
    for plan in recipe.stages:
        config = plan.config
        if not isinstance(config, Trained):
            continue
        model = shapes.of(plan)
        size = sizes(model, lora=getattr(config, "lora", None), muon=plan.kind == "pretrain")
        work, frozen = None, 0
        if isinstance(config, PolicyConfig):
            work, frozen = _work(config, plan.kind, tokens, prompt)
        elif plan.kind == "dpo":
            frozen = 1
        found.append(
            Job(
                stage=plan.name,
                kind=plan.kind,
                model=model,
                size=size,
                config=config,
                work=work,
                frozen=frozen,
            )
        )
    if not found:
        raise UserError(f"no stage of '{recipe.name}' trains a model; there is nothing to plan")
    return found


def _work(config: PolicyConfig, kind: str, tokens: float | None, prompt: int) -> tuple[Work, int]:
    if tokens is not None and tokens > config.max_tokens:
        raise UserError(f"--tokens {tokens:g} is more than max_tokens, {config.max_tokens}; lower it")
    loss: Any = getattr(config, "loss", None)
    forwards, frozen = 0, 0
    if loss is not None:
        forwards += loss.importance != "none" or loss.top_entropy < 1
        frozen += loss.kl > 0
    frozen += kind == "distill"
    weights = [config.rewards, *config.rewards_of.values()]
    frozen += any(w.preference for w in weights) + any(w.process for w in weights)
    work = Work(
        groups=config.groups,
        samples=config.samples,
        prompt=prompt,
        tokens=tokens or config.max_tokens / 2,
        longest=config.max_tokens,
        forwards=forwards + frozen,
        learners=2 if kind == "ppo" else 1,
        checkpointing=config.checkpointing,
        moments=config.optimizer_state,
    )
    return work, frozen


class _Shapes:
    """The shape of each stage's model: its own, that of an earlier stage, or that of a checkpoint."""

    def __init__(self, recipe: Recipe, given: Path | None) -> None:
        self.plans = {plan.name: plan for plan in recipe.stages}
        self.given = read_shape(given) if given else None

    def of(self, plan: StagePlan) -> ModelConfig:
        from liubai.stages import pretrain

        config = plan.config
        if isinstance(config, pretrain.Config):
            tokenizer = (pretrain.read(config.texts) if config.texts else pretrain.invent(config))[0]
            return pretrain.model_config(config.model, tokenizer)
        if brought := getattr(config, "model", ""):
            return self.given or _brought(plan.name, brought)
        for name in plan.parents:
            if self.plans[name].kind in LEAVE_ONE:
                return self.of(self.plans[name])
        raise UserError(
            f"stage '{plan.name}' starts from the checkpoint of an earlier stage, and its 'from' names none; "
            "name a stage, or a model"
        )


def read_shape(path: Path) -> ModelConfig:
    """Of a config.json, or of the folder in which it is."""
    file = path / "config.json" if path.is_dir() else path
    try:
        return ModelConfig.from_hf(read_json(file))
    except OSError as error:
        raise UserError(f"cannot read the model's shape from '{file}' ({error.strerror})") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"'{file}' is not a config.json of a model ({error})") from error


def _brought(stage: str, model: str) -> ModelConfig:
    """Of a folder, or of a hub id: only its config.json is fetched."""
    if Path(model).is_dir() or not HUB_ID.fullmatch(model):
        return read_shape(Path(model))
    from huggingface_hub import hf_hub_download

    try:
        return read_shape(Path(hf_hub_download(model, "config.json")))
    except UserError:
        raise
    except Exception as error:  # the library and its transports raise dozens of kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"stage '{stage}': the shape of '{model}' is not at hand, and the hub did not give its "
            f"config.json ({reason}); name one with --model-config FILE"
        ) from error
