"""What a recipe asks for, as planning sees it: the models of its stages and the work of a step."""

from __future__ import annotations

from collections.abc import Iterator
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

#: kinds of stages that leave a checkpoint, and those that leave a model that judges
LEAVE_ONE = ("pretrain", "sft", "dpo", "rl", "ppo", "distill")
JUDGES = ("reward_model", "process")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model that is only read. ``dtype`` is that of the stage where it is None; ``shared``: ranks have a
    part each."""

    model: ModelConfig
    size: Sizes
    dtype: str | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage that trains. ``work`` is what stands in a step of one that learns from its own answers;
    ``critic`` learns beside it."""

    stage: str
    kind: str
    model: ModelConfig
    size: Sizes
    config: Trained
    work: Work | None
    frozen: tuple[Reader, ...] = ()  #: a KL's reference, a teacher, models that judge
    critic: Sizes | None = None

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
        lora, scores = getattr(config, "lora", None), plan.kind in JUDGES
        policy = config if isinstance(config, PolicyConfig) else None
        found.append(
            Job(
                stage=plan.name,
                kind=plan.kind,
                model=model,
                size=sizes(model, lora=lora, muon=plan.kind == "pretrain", scorer=scores),
                config=config,
                work=_work(policy, plan.kind, tokens, prompt) if policy else None,
                frozen=tuple(shapes.readers(plan, policy)) if policy else (),
                # all of it learns, whatever the policy's adapters
                critic=sizes(model, scorer=True) if plan.kind == "ppo" else None,
            )
        )
    if not found:
        raise UserError(f"no stage of '{recipe.name}' trains a model; there is nothing to plan")
    return found


def _work(config: PolicyConfig, kind: str, tokens: float | None, prompt: int) -> Work:
    if tokens is not None and tokens > config.max_tokens:
        raise UserError(f"--tokens {tokens:g} is more than max_tokens, {config.max_tokens}; lower it")
    loss: Any = getattr(config, "loss", None)
    return Work(
        groups=config.groups,
        samples=config.samples,
        prompt=prompt,
        tokens=tokens or config.max_tokens / 2,
        longest=config.max_tokens,
        forwards=float(loss is not None and (loss.importance != "none" or loss.top_entropy < 1)),
        alone=kind == "distill",
        checkpointing=config.checkpointing,
        moments=config.optimizer_state,
    )


class _Shapes:
    """The shape of each stage's model: its own, that of an earlier stage, or that of a checkpoint."""

    def __init__(self, recipe: Recipe, given: Path | None) -> None:
        self.plans = {plan.name: plan for plan in recipe.stages}
        self.given = read_shape(given) if given else None
        self.known: dict[str, ModelConfig] = {}

    def of(self, plan: StagePlan) -> ModelConfig:
        if plan.name not in self.known:
            self.known[plan.name] = self._found(plan)
        return self.known[plan.name]

    def readers(self, plan: StagePlan, config: PolicyConfig) -> Iterator[Reader]:
        """The models that a stage reads beside its own. Judges are loaded in float32, each the first of its
        kind (:mod:`liubai.stages.scoring`); where no stage left one, steps are checked by rule."""
        if getattr(getattr(config, "loss", None), "kl", 0):
            yield Reader(model=self.of(plan), size=sizes(self.of(plan)), shared=True)
        if plan.kind == "distill":
            teacher = self.of(self._teacher(plan, config))
            yield Reader(model=teacher, size=sizes(teacher))
        weights = [config.rewards, *config.rewards_of.values()]
        asked = (any(w.preference for w in weights), any(w.process for w in weights))
        for kind, wanted in zip(JUDGES, asked, strict=True):
            given = [name for name in plan.parents if self.plans[name].kind == kind]
            if wanted and given:
                shape = self.of(self.plans[given[0]])
                yield Reader(model=shape, size=sizes(shape, scorer=True), dtype="float32")

    def _teacher(self, plan: StagePlan, config: PolicyConfig) -> StagePlan:
        left = [self.plans[name] for name in plan.parents if self.plans[name].kind in LEAVE_ONE]
        others = left if config.model else left[1:]
        if not others:
            raise UserError(f"stage '{plan.name}' has no teacher; name the stage that leaves it in 'from'")
        return others[0]

    def _found(self, plan: StagePlan) -> ModelConfig:
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
