"""What the stages after R1-Zero learn is what they should: signs, places and means, against loops in float64.

That a weight differs says nothing: a stage that learns the opposite passes that, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import Silent, naive_logprobs, random_sample, scramble, tiny_config, tiny_model
from torch import Tensor

from liubai.learn.packing import Sequence1, micro_batches, stacked
from liubai.model.checkpoint import load, save_checkpoint
from liubai.model.transformer import Transformer
from liubai.problems import family, problem_at, world_vocabulary
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.stages import distill, dpo, ppo
from liubai.stages.context import Context
from liubai.stages.policy import Policy
from liubai.stages.records import GRADED, Example, encoded, write_examples
from liubai.text.template import BARE, Template, template_for
from liubai.text.tokenizer import TextTokenizer, word_level
from liubai.types import Group, Problem, Reward, Sample

PROBLEM = Problem("1", "1", "exact")


@pytest.fixture(autouse=True)
def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_tensorboard", lambda self, step, metrics: None)


@pytest.fixture(scope="module")
def wide() -> TextTokenizer:
    return word_level(world_vocabulary(["greater"]))


@pytest.fixture(scope="module")
def models(wide: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two stages whose models were drawn at random, and differently."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "other")):
        config = tiny_config(vocab_size=wide.vocab_size, eos_token_id=wide.eos_id)
        save_checkpoint(folder / name / "checkpoint", tiny_model(seed, config), wide, BARE)
    return folder


def model_of(folder: Path) -> Transformer:
    return load(folder / "checkpoint")[0]


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- DPO ----


def preferred(numbers: Sequence[int]) -> list[tuple[Example, Example]]:
    """Pairs that a word tells apart; of either kind is sometimes the longer one."""
    found = []
    for a in numbers:
        good, bad = 1 + a % 3, 1 + a % 2
        said = (f"{a} same" + " 3" * good, f"{a} wait" + " 3" * bad)
        answers = (f"{text} </think> <answer> {a} </answer>" for text in said)
        chosen, rejected = (
            Example(f"{a} or 3", t, score=s) for t, s in zip(answers, (1.0, 0.0), strict=True)
        )
        found.append((chosen, rejected))
    return found


def by_dpo(models: Path, folder: Path, **changes: Any) -> Path:
    (folder / "answers").mkdir(parents=True)
    write_examples(folder / "answers" / GRADED, [e for pair in preferred(range(10, 50)) for e in pair])
    options: dict[str, Any] = {"epochs": 4.0, "batch": 8, "lr": 3e-3, "tokens_per_microbatch": 64}
    config = dpo.Config(**options | {"pairs": {"balance": False}} | changes)
    inputs = {"one": models / "one", "answers": folder / "answers"}
    dpo.run(config, Context(folder / "dpo", 0, inputs, Silent()))
    return folder / "dpo"


@torch.no_grad()
def answer_logprobs(model: Transformer, template: Template, e: Example) -> Tensor:
    """Of each token of an answer, with its end, the text of it put together here."""
    tokenizer = template.tokenizer
    prompt = tokenizer.encode(f"<|start|> {e.prompt} <think>")
    answer = [*tokenizer.encode(e.response), tokenizer.eos_id]
    ids = torch.tensor([prompt + answer])
    logprobs = model(ids)[0].double().log_softmax(-1)
    return torch.stack([logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)])


def test_dpo_begins_at_ln_2_and_learns_what_was_preferred(models: Path, tmp_path: Path) -> None:
    folder = by_dpo(models, tmp_path)
    rows = rows_of(folder)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < math.log(2) / 2
    assert rows[-1]["accuracy"] > 0.9
    template = template_for(load(folder / "checkpoint")[1], folder / "checkpoint")
    began, ended = model_of(models / "one"), model_of(folder)
    gains = [
        [
            float((answer_logprobs(ended, template, e) - answer_logprobs(began, template, e)).sum())
            for e in pair
        ]
        for pair in preferred(range(50, 90))  # other questions than those that it learned from
    ]
    assert sum(chosen > rejected for chosen, rejected in gains) / len(gains) > 0.9
    # a whole number of nats apart, not by a rounding
    assert sum(chosen - rejected for chosen, rejected in gains) / len(gains) > 2


@pytest.mark.parametrize("beta", [0.1, 0.25])
def test_ipo_begins_at_the_square_of_its_aim(models: Path, tmp_path: Path, beta: float) -> None:
    rows = rows_of(by_dpo(models, tmp_path, loss={"kind": "ipo", "beta": beta}, epochs=0.4))
    assert rows[0]["loss"] == pytest.approx(1 / (4 * beta**2), rel=1e-4)
    assert rows[1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_dpo_adds_log_probabilities_up_and_ipo_takes_their_mean(
    models: Path, kind: Literal["dpo", "ipo"]
) -> None:
    """Of the answer's tokens alone; the reference's are those of the model that it begins with, in the pairs'
    order, however long they are."""
    path = models / "one" / "checkpoint"
    model, tokenizer = load(path)
    template = template_for(tokenizer, path)
    texts = preferred(range(10, 21))
    pairs = [(encoded(template, chosen), encoded(template, rejected)) for chosen, rejected in texts]
    config = dpo.Config(loss={"kind": kind}, batch=3)
    lesson = dpo.Pairs(config, 0, tokenizer.pad_id, pairs, model)
    each = [[answer_logprobs(model, template, e) for e in pair] for pair in texts]
    wanted_N2 = torch.stack(
        [torch.stack([t.sum() if kind == "dpo" else t.mean() for t in pair]) for pair in each]
    )
    torch.testing.assert_close(lesson.reference_N2.double(), wanted_N2, rtol=1e-4, atol=1e-4)
    batch = stacked([s for pair in pairs for s in pair], tokenizer.pad_id)
    got_B = lesson.logprobs(model, batch).detach().double()
    torch.testing.assert_close(got_B.view(-1, 2), wanted_N2, rtol=1e-4, atol=1e-4)


# ---- PPO ----


def critic_of(models: Path, folder: Path, **changes: Any) -> ppo.Critic:
    options: dict[str, Any] = {"steps": 1, "problems": {"greater": 1.0}, "max_tokens": 16, "slots": 4}
    config = ppo.Config(**options | {"eval_problems": 2, "tokens_per_microbatch": 40} | changes)
    policy = Policy(config, Context(folder, 0, {"one": models / "one"}, Silent()))
    return ppo.Critic(config, policy, derive(0, "critic"))


def groups_of(
    sizes: Sequence[int], seed: int = 0, totals: Sequence[float] = (), errors: Sequence[tuple[int, int]] = ()
) -> list[Group]:
    """Answers of 1 to 12 tokens, no two groups alike; ``totals`` are the rewards of whole groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for g, size in enumerate(sizes):
        samples = [
            random_sample(generator, prompt=3 + g, completion=1 + (5 * i + 3 * g) % 12) for i in range(size)
        ]
        earned = torch.randn(size, generator=generator).tolist()
        rewards = tuple(
            Reward({"error": 0.0}, 0.0)
            if (g, i) in errors
            else Reward({"correct": total}, totals[g] if totals else total)
            for i, total in enumerate(earned)
        )
        groups.append(Group(PROBLEM, tuple(samples), rewards))
    return groups


@torch.no_grad()
def values_of(critic: ppo.Critic, sample: Sample) -> list[float]:
    """What is expected before each token of the answer, of one sequence alone."""
    values = critic.scorer(torch.tensor([sample.prompt_ids + sample.completion_ids]))[0].double()
    first = len(sample.prompt_ids) - 1
    return [float(values[first + i]) for i in range(len(sample.completion_ids))]


def advantages(values: Sequence[float], total: float, gamma: float, lam: float) -> list[float]:
    """GAE, arXiv 1506.02438 eq. 16, as a sum over all later tokens; the reward is at the last."""
    n = len(values)
    delta = [
        (total if t == n - 1 else 0.0) + gamma * (values[t + 1] if t < n - 1 else 0.0) - values[t]
        for t in range(n)
    ]
    return [sum((gamma * lam) ** (later - t) * delta[later] for later in range(t, n)) for t in range(n)]


def whitened(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    return [[(x - mean) / (deviation + 1e-6) for x in row] for row in rows]


def test_without_expectations_each_token_earns_what_its_answer_did(models: Path, tmp_path: Path) -> None:
    groups = groups_of([4, 3, 5])
    judged, batches = critic_of(models, tmp_path).judge(groups)
    assert len(batches) > 2
    listed = [(s, r.total) for g in groups for s, r in zip(g.samples, g.rewards, strict=True)]
    wanted = whitened([[total] * len(s.completion_ids) for s, total in listed])
    assert [len(row) for row in judged] == [4, 3, 5]
    got = [answer for row in judged for answer in row]
    for (sample, advantage), (asked, _), row in zip(got, listed, wanted, strict=True):
        assert sample is asked
        assert list(advantage) == pytest.approx(row, abs=1e-4)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.9), (0.95, 0.5), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_are_those_of_gae(models: Path, tmp_path: Path, gamma: float, lam: float) -> None:
    critic = critic_of(models, tmp_path, gamma=gamma, lam=lam)
    scramble(critic.scorer, 3)
    groups = groups_of([4, 3, 5], seed=1)
    judged, _ = critic.judge(groups)
    listed = [(s, r.total) for g in groups for s, r in zip(g.samples, g.rewards, strict=True)]
    values = [values_of(critic, s) for s, _ in listed]
    wanted = whitened([advantages(v, t, gamma, lam) for v, (_, t) in zip(values, listed, strict=True)])
    assert max(abs(x) for v in values for x in v) > 0.5  # the critic has something to say
    got = [list(advantage) for row in judged for _, advantage in row]
    assert got == [pytest.approx(row, abs=2e-4) for row in wanted]


def test_what_could_not_be_graded_is_left_out(models: Path, tmp_path: Path) -> None:
    """Neither it nor its reward of 0 is part of the mean, and nobody else takes its place."""
    errors = [(0, 1), (2, 0), (2, 4)]
    groups = groups_of([4, 3, 5], errors=errors)
    judged, batches = critic_of(models, tmp_path).judge(groups)
    listed = [
        (s, r.total)
        for g, group in enumerate(groups)
        for i, (s, r) in enumerate(zip(group.samples, group.rewards, strict=True))
        if (g, i) not in errors
    ]
    wanted = whitened([[total] * len(s.completion_ids) for s, total in listed])
    assert [id(s) for row in judged for s, _ in row] == [id(s) for s, _ in listed]
    got = [list(advantage) for row in judged for _, advantage in row]
    assert got == [pytest.approx(row, abs=1e-4) for row in wanted]
    assert sum(int(b.mask_BT.sum()) for b in batches) == sum(len(s.completion_ids) for s, _ in listed)


def test_the_critic_comes_to_expect_what_is_always_earned(models: Path, tmp_path: Path) -> None:
    critic = critic_of(models, tmp_path, critic_lr=1e-2)
    groups = groups_of([4, 3], totals=[0.8, 0.8])
    logged = [critic.learn(critic.judge(groups)[1], 1.0) for _ in range(30)]
    assert logged[0]["critic/loss"] == pytest.approx(0.8**2 / 2)
    assert logged[0]["critic/value"] == 0
    assert logged[-1]["critic/value"] == pytest.approx(0.8, abs=0.1)
    for group in groups:
        for sample in group.samples:
            assert values_of(critic, sample) == pytest.approx([0.8] * len(sample.completion_ids), abs=0.15)


def test_the_critic_comes_to_know_which_question_pays(models: Path, tmp_path: Path) -> None:
    critic = critic_of(models, tmp_path, critic_lr=1e-2)
    groups = groups_of([4, 4], totals=[1.0, -1.0])
    explained = [critic.learn(critic.judge(groups)[1], 1.0)["critic/explained"] for _ in range(40)]
    assert explained[0] == pytest.approx(0, abs=1e-6)
    assert explained[-1] > 0.9
    for group, total in zip(groups, (1.0, -1.0), strict=True):
        values = [v for s in group.samples for v in values_of(critic, s)]
        assert sum(values) / len(values) == pytest.approx(total, abs=0.2)


# ---- distillation ----


def distilled(models: Path, folder: Path, student: str, teacher: str, **changes: Any) -> Path:
    options: dict[str, Any] = {"steps": 6, "groups": 16, "samples": 4, "max_tokens": 12, "slots": 64}
    options |= {"problems": {"greater": 1.0}, "eval_problems": 2, "eval_every": 100, "lr": 1e-2}
    inputs = {"student": models / student}
    inputs |= {"teacher": models / teacher}
    distill.run(distill.Config(**options | changes), Context(folder, 0, inputs, Silent()))
    return folder


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if "loss" in row]


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(models: Path, tmp_path: Path, kl: str) -> None:
    """Loss and gradient are those of a rounding. The step is short: AdamW makes any gradient a long one."""
    folder = distilled(models, tmp_path / "d", "one", "one", kl=kl, lr=1e-8)
    rows = [row for row in rows_of(folder) if "loss" in row]
    assert len(rows) == 6
    assert all(abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-5 for row in rows)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_a_student_comes_to_say_what_the_teacher_would(models: Path, tmp_path: Path, kl: str) -> None:
    kept = (models / "other" / "checkpoint" / "model.safetensors").read_bytes()
    folder = distilled(models, tmp_path / "d", "one", "other", kl=kl)
    losses = losses_of(folder)
    assert len(losses) == 6
    assert losses[5] < 0.8 * losses[0]
    assert (models / "other" / "checkpoint" / "model.safetensors").read_bytes() == kept
    teacher, tokenizer = load(models / "other" / "checkpoint")
    engine = TorchEngine(teacher, eos_ids=tokenizer.eos_ids, slots=20, max_length=64)
    engine.load(teacher.state_dict(), version=0)
    template = Template(tokenizer, BARE)
    prompts = [problem_at(family("greater"), "eval", 0, i).prompt for i in range(20)]
    requests = [
        Request(id=i, prompt_ids=tuple(template.prompt_ids(text)), max_tokens=12, seed=i)
        for i, text in enumerate(prompts)
    ]
    said = generate(engine, requests)
    before, after = (
        float(torch.cat([naive_logprobs(model_of(path), s) for s in said]).mean())
        for path in (models / "one", folder)
    )
    assert after > before + 0.3


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_the_loss_is_the_mean_divergence_and_the_teacher_stays(
    models: Path, kl: Literal["reverse", "forward"]
) -> None:
    """Over the answers' tokens alone, of both whole vocabularies, in nats; only the student has gradients."""
    student, teacher = model_of(models / "one"), model_of(models / "other")
    began = [p.detach().clone() for p in teacher.parameters()]
    samples = [s for g in groups_of([4, 3]) for s in g.samples]
    tokens = sum(len(s.completion_ids) for s in samples)
    sequences = [
        Sequence1(
            s.prompt_ids + s.completion_ids,
            [False] * len(s.prompt_ids) + [True] * len(s.completion_ids),
            {"weights": [1 / tokens] * len(s.prompt_ids + s.completion_ids)},
        )
        for s in samples
    ]
    found = distill.Imitation(teacher, kl).learn(student, micro_batches(sequences, 0, 40))
    wanted = 0.0
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        with torch.no_grad():
            own_TV, their_TV = (m(ids)[0].double().log_softmax(-1) for m in (student, teacher))
        p_TV, q_TV = (own_TV, their_TV) if kl == "reverse" else (their_TV, own_TV)
        for t in range(len(s.prompt_ids) - 1, len(s.prompt_ids + s.completion_ids) - 1):
            wanted += float((p_TV[t].exp() * (p_TV[t] - q_TV[t])).sum()) / tokens
    assert sum(found) == pytest.approx(wanted, rel=1e-4)
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(torch.equal(p, q) for p, q in zip(began, teacher.parameters(), strict=True))
