"""One number a position: what the trunk and one vector say, and transformers' folders of that kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import scramble, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_model import SHAPES, change_config, fit
from torch import Tensor

import liubai
import liubai.model.checkpoint
from liubai.errors import UserError
from liubai.learn.packing import Batch, Sequence1, micro_batches, pack
from liubai.learn.replicas import Replicas
from liubai.model.checkpoint import save_checkpoint
from liubai.model.config import ModelConfig
from liubai.model.export import export
from liubai.model.lora import LoraConfig, adapters, attach
from liubai.model.scorer import Scorer, load_scorer, save_scorer, scorer_from
from liubai.model.transformer import Transformer, causal
from liubai.text.template import BARE, THINK_ANSWER, template_source
from liubai.text.tokenizer import TextTokenizer

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def tiny_scorer(seed: int = 0, config: ModelConfig | None = None, scale: float = 1.5) -> Scorer:
    scorer = Scorer(config or tiny_config())
    scramble(scorer, seed, scale)
    return scorer.eval()


def scoring(family: str) -> str:
    return family.replace("CausalLM", "SequenceClassification")


def random_ids(seed: int, *shape: int, vocab: int = 60) -> Tensor:
    return torch.randint(2, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- what it computes ----


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_trunk_times_one_vector(family: str, tied: bool) -> None:
    """A language model whose every word has the same row gives that row's product as each of its logits."""
    scorer = tiny_scorer(1, tiny_config(family, tie_word_embeddings=tied)).double()
    model = Transformer(tiny_config(family, tie_word_embeddings=False)).double()
    trunk = {name: t for name, t in scorer.state_dict().items() if name != "score.weight"}
    model.load_state_dict(trunk | {"lm_head.weight": scorer.head_weight.expand(60, -1)})
    ids = random_ids(2, 3, 17)
    scores = scorer(ids)
    assert scores.shape == (3, 17)
    assert scores.std() > 0.5
    hidden = model.hidden(ids, torch.arange(17).expand(3, 17), causal())
    vector = scorer.head_weight[0].tolist()
    for b in range(3):
        for t in range(17):
            dot = sum(h * w for h, w in zip(hidden[b, t].tolist(), vector, strict=True))
            assert scores[b, t].item() == pytest.approx(dot, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(model(ids)[..., 7], scores, rtol=1e-12, atol=1e-12)
    apart = torch.arange(17).expand(3, 17) ** 2  # RoPE sees distances
    torch.testing.assert_close(model(ids, apart)[..., 7], scorer(ids, apart), rtol=1e-12, atol=1e-12)
    assert (scorer(ids, apart) - scores).abs().max() > 1e-2


@torch.no_grad()
def test_a_score_is_of_the_text_so_far() -> None:
    scorer, ids = tiny_scorer(1), random_ids(2, 1, 12)
    whole = scorer(ids)
    for t in (1, 5, 12):
        torch.testing.assert_close(scorer(ids[:, :t])[0, -1], whole[0, t - 1], rtol=1e-5, atol=1e-5)
    ids[0, 5] += 1
    other = scorer(ids)
    torch.testing.assert_close(other[:, :5], whole[:, :5])
    assert (other - whole)[0, 5:].abs().min() > 1e-4


@torch.no_grad()
def test_packed_documents_are_scored_as_if_alone() -> None:
    scorer = tiny_scorer(3)
    texts = [random_ids(n, n).tolist() for n in (9, 1, 7, 14)]
    batch = pack([Sequence1(ids, [False] * len(ids)) for ids in texts], 17, pad_id=5)
    assert batch.ids_BT.shape[0] < len(texts)
    packed = scorer(batch.ids_BT, batch.positions_BT, batch.attention_documents)
    for number, ids in enumerate(texts):
        alone = scorer(torch.tensor([ids]))[0]
        torch.testing.assert_close(packed[batch.documents_BT == number], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scores_of_a_16_bit_model_are_not_rounded() -> None:
    scorer, ids = tiny_scorer(3).bfloat16(), random_ids(0, 2, 40)
    hidden = scorer.hidden(ids, torch.arange(40).expand(2, 40), causal())
    assert hidden.dtype == torch.bfloat16
    scores = scorer(ids)
    assert scores.dtype == torch.float32
    wanted = (hidden.double() * scorer.head_weight.double()).sum(-1)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(scores, scores.bfloat16().float())


# ---- how it learns ----


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_the_slope(family: str, checkpointing: bool) -> None:
    """In every parameter, along a random direction, against a central difference in float64."""
    scorer = tiny_scorer(2, tiny_config(family)).double()
    scorer.checkpointing = checkpointing
    ids, generator = random_ids(4, 2, 9), torch.Generator().manual_seed(5)
    weights = torch.randn(2, 9, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return (weights * scorer(ids).tanh()).sum()

    loss().backward()
    for name, p in scorer.named_parameters():
        assert p.grad is not None, name
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p.add_(direction, alpha=step)
                ends.append(loss().item())
                p.sub_(direction, alpha=step)
        slope = (p.grad * direction).sum().item()
        assert abs(slope) > 1e-4, name
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7), name


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_replicas_learn_what_one_scorer_learns(checkpointing: bool) -> None:
    texts = [random_ids(n, n).tolist() for n in (11, 3, 8, 6, 12, 5, 9)]
    batches = micro_batches([Sequence1(ids, [False] * len(ids)) for ids in texts], 0, 24)
    assert len(batches) > 2

    def work(model: Transformer, share: Sequence[Batch]) -> list[float]:
        sums = []
        for batch in share:
            scores_BT = model(batch.ids_BT, batch.positions_BT, batch.attention_documents)
            loss = scores_BT[batch.documents_BT >= 0].square().sum()
            loss.backward()
            sums.append(loss.item())
        return sums

    alone, shared = tiny_scorer(1), tiny_scorer(1)
    shared.checkpointing = checkpointing
    wanted = work(alone, batches)
    replicas = Replicas(shared)
    assert [type(m) for m in replicas.models] == [Scorer, Scorer]
    for p, q in zip(*(m.parameters() for m in replicas.models), strict=True):
        assert p is not q
        assert p.data_ptr() == q.data_ptr()
    assert replicas.map(work, batches) == pytest.approx(wanted, rel=1e-5)
    for (name, p), q in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


# ---- from a language model ----


@pytest.mark.parametrize("tied", [True, False])
def test_a_scorer_has_the_trunk_of_a_model(tied: bool) -> None:
    """And its memory: a second copy of a large one would fit nowhere."""
    model = tiny_model(1, tiny_config("Qwen3ForCausalLM", tie_word_embeddings=tied))
    scorer = scorer_from(model, seed=3)
    assert scorer.config == model.config
    assert not scorer.training
    trunk = {name: t for name, t in model.state_dict().items() if not name.startswith("lm_head")}
    assert list(scorer.state_dict()) == [*trunk, "score.weight"]
    assert all(p.requires_grad and p.device.type == "cpu" for p in scorer.parameters())
    for name, tensor in trunk.items():
        assert scorer.state_dict()[name].data_ptr() == tensor.data_ptr()
    scorer(random_ids(0, 1, 5)).sum().backward()
    assert all(p.grad is not None for p in scorer.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_new_head_is_small_and_depends_on_the_seed_alone() -> None:
    config = tiny_config(hidden_size=4096, intermediate_size=8, num_hidden_layers=1)
    model = Transformer(config)
    first, same, other = (scorer_from(model, seed).head_weight for seed in (7, 7, 8))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(1 / 4097, rel=0.05)
    assert abs(first.mean().item()) < 4 / 4097 / 64
    assert scorer_from(model.bfloat16(), 7).head_weight.dtype == torch.bfloat16


@torch.no_grad()
def test_adapters_of_the_model_are_part_of_its_trunk() -> None:
    model, ids = tiny_model(1), random_ids(0, 2, 9)
    plain = scorer_from(model, seed=0)(ids)
    attach(model, LoraConfig(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapters(model):
        layer.lora_b.normal_(0.0, 0.1, generator=generator)
    scorer = scorer_from(model, seed=0)
    assert not next(adapters(scorer), None)
    assert all(p.requires_grad for p in scorer.parameters())
    positions = torch.arange(9).expand(2, 9)
    wanted = model.hidden(ids, positions, causal()) @ scorer.head_weight[0]
    torch.testing.assert_close(scorer(ids), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, plain, atol=1e-3)


# ---- transformers ----


def last_scores(theirs: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([theirs(torch.tensor([list(ids)])).logits for ids in texts])


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_folder_opens_in_transformers(shape: str, world: TextTokenizer, tmp_path: Path) -> None:
    """Also where the end token, which pads in the small world, is the text's last."""
    transformers = pytest.importorskip("transformers")
    scorer = tiny_scorer(5, fit(SHAPES[shape], world), scale=2.0)
    assert scorer.config.pad_token_id == world.eos_id
    save_scorer(tmp_path / "ours", scorer, world, BARE)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(theirs).__name__ == scoring(scorer.config.architecture)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert theirs.config.num_labels == 1
    texts = [random_ids(n, n, vocab=world.vocab_size).tolist() for n in (50, 7, 1)]
    texts += [[*ids, world.eos_id] for ids in texts]
    ours = [scorer(torch.tensor([ids]))[0] for ids in texts]
    assert torch.cat(ours).std() > 0.5
    got = last_scores(theirs, texts)
    assert got.shape == (6, 1)
    torch.testing.assert_close(got[:, 0], torch.stack([s[-1] for s in ours]), rtol=0, atol=1e-4)
    ids = torch.tensor([texts[0]])
    everywhere = theirs.score(theirs.model(ids).last_hidden_state)[..., 0]
    torch.testing.assert_close(scorer(ids), everywhere, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padded_batches_in_transformers(world: TextTokenizer, tmp_path: Path) -> None:
    """A pad token that ends nothing is kept, and texts of several lengths may stand in one batch there."""
    transformers = pytest.importorskip("transformers")
    config = replace(fit(tiny_config("Qwen2ForCausalLM"), world), pad_token_id=world.bos_id)
    scorer = tiny_scorer(5, config, scale=2.0)
    save_scorer(tmp_path / "ours", scorer, world, BARE)
    assert load_scorer(tmp_path / "ours")[0].config == config
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    texts = [[*range(40, 40 + n), world.eos_id] for n in (30, 7, 19)]
    width = max(map(len, texts))
    padded = torch.tensor([ids + [world.bos_id] * (width - len(ids)) for ids in texts])
    ours = torch.stack([scorer(torch.tensor([ids]))[0, -1] for ids in texts])
    torch.testing.assert_close(theirs(padded).logits[:, 0], ours, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_folder_of_transformers_opens_here(shape: str, world: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    wanted = fit(SHAPES[shape], world)
    hf = wanted.to_hf()
    named = set(ModelConfig.__dataclass_fields__) - {"architecture", "rope_theta", "rope_scaling", "dtype"}
    config = transformers.AutoConfig.for_model(
        hf["model_type"],
        **{name: hf[name] for name in named},
        rope_parameters=hf["rope_parameters"],
        num_labels=1,
    )
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    scramble(theirs, 6, scale=2.0)
    theirs.save_pretrained(tmp_path / "theirs")
    world.save(tmp_path / "theirs" / "tokenizer.json")
    scorer, tokenizer = load_scorer(tmp_path / "theirs")
    assert scorer.config == wanted
    assert not scorer.training
    assert tokenizer.eos_id == world.eos_id
    texts = [random_ids(n, n, vocab=world.vocab_size).tolist() for n in (50, 7)]
    assert all(ids[-1] != world.eos_id for ids in texts)
    ours = torch.stack([scorer(torch.tensor([ids]))[0, -1] for ids in texts])
    torch.testing.assert_close(last_scores(theirs, texts)[:, 0], ours, rtol=0, atol=1e-4)


# ---- our own folder ----


@pytest.fixture
def saved(world: TextTokenizer, tmp_path: Path) -> tuple[Scorer, Path]:
    scorer = tiny_scorer(0, fit(tiny_config("Qwen2ForCausalLM", tie_word_embeddings=False), world))
    save_scorer(tmp_path / "scorer", scorer, world, THINK_ANSWER)
    return scorer, tmp_path / "scorer"


def test_round_trip_keeps_every_bit(saved: tuple[Scorer, Path], tmp_path: Path) -> None:
    scorer, folder = saved
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert template_source(folder) == THINK_ANSWER
    weights = load_file(folder / "model.safetensors")
    assert {n for n in weights if not n.startswith("model.")} == {"score.weight"}
    again, tokenizer = load_scorer(folder)
    assert again.config == replace(scorer.config, pad_token_id=None)
    for (name, tensor), (same, other) in zip(
        scorer.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(tensor, other)
    ids = random_ids(0, 2, 30)
    assert torch.equal(again(ids), scorer(ids))
    save_scorer(tmp_path / "again", again, tokenizer, THINK_ANSWER)
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_bfloat16_stays_bfloat16_on_the_disk(world: TextTokenizer, tmp_path: Path) -> None:
    scorer = tiny_scorer(0, fit(tiny_config(dtype="bfloat16"), world))
    save_scorer(tmp_path / "c", scorer, world, None)
    assert {t.dtype for t in load_file(tmp_path / "c" / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in load_scorer(tmp_path / "c")[0].parameters()} == {torch.float32}
    assert {p.dtype for p in load_scorer(tmp_path / "c", dtype="auto")[0].parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_adapters_are_merged_into_the_folder(saved: tuple[Scorer, Path], world: TextTokenizer) -> None:
    scorer, folder = saved
    attach(scorer, LoraConfig(rank=2), seed=0)
    for _, layer in adapters(scorer):
        layer.lora_b.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    save_scorer(folder, scorer, world, None)
    ids = random_ids(0, 2, 9)
    torch.testing.assert_close(load_scorer(folder)[0](ids), scorer(ids), rtol=1e-4, atol=1e-4)


def test_shards_open_here(saved: tuple[Scorer, Path], world: TextTokenizer) -> None:
    scorer, folder = saved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(liubai.model.checkpoint, "SHARD", 9000)
        save_scorer(folder, scorer, world, None)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    for name, tensor in load_scorer(folder)[0].state_dict().items():
        assert torch.equal(tensor, scorer.state_dict()[name])


# ---- the wrong folder ----


@pytest.mark.parametrize("family", FAMILIES)
def test_one_kind_is_not_taken_for_the_other(family: str, world: TextTokenizer, tmp_path: Path) -> None:
    config = fit(tiny_config(family), world)
    save_checkpoint(tmp_path / "lm", tiny_model(0, config), world, BARE)
    save_scorer(tmp_path / "rm", tiny_scorer(0, config), world, BARE)
    with pytest.raises(UserError, match=rf"lm' is a language model \({family}\), not a model that scores"):
        load_scorer(tmp_path / "lm")
    refused = (
        rf"rm' is a model that scores texts \({scoring(family)}\), not a language model;.* a {family} here"
    )
    with pytest.raises(UserError, match=refused):
        liubai.load(tmp_path / "rm")
    with pytest.raises(UserError, match=refused):
        export(tmp_path / "rm", "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {n: t for n, t in weights.items() if n != name}


TWO = {"0": "bad", "1": "good"}
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "two labels": (lambda f: change_config(f, num_labels=2, id2label=TWO), r"config\.json has 2 labels"),
    "two labels, in names alone": (lambda f: change_config(f, num_labels=..., id2label=TWO), "2 labels"),
    "transformers' default": (lambda f: change_config(f, num_labels=..., id2label=...), "2 labels"),
    "another architecture": (
        lambda f: change_config(f, architectures=["BertForSequenceClassification"]),
        "'BertForSequenceClassification' is not supported; supported: LlamaForSequenceClassification, ",
    ),
    "no architecture": (lambda f: change_config(f, architectures=...), "architecture 'none named'"),
    "its own code": (
        lambda f: change_config(f, auto_map={"AutoModel": "x.Y"}),
        "brings model code of its own.*supported: LlamaForSequenceClassification",
    ),
    "no head": (lambda f: change_weights(f, without("score.weight")), r"lacks score\.weight"),
    "a vocabulary head": (
        lambda f: change_weights(f, lambda w: w | {"lm_head.weight": torch.zeros(1)}),
        r"unknown tensor lm_head\.weight",
    ),
    "a wide head": (
        lambda f: change_weights(f, lambda w: w | {"score.weight": torch.zeros(2, 32)}),
        r"score\.weight is \[2, 32\], config\.json says \[1, 32\]",
    ),
    "no folder": (lambda f: f.rename(f.parent / "gone"), "no checkpoint folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_folder_is_named(case: str, saved: tuple[Scorer, Path]) -> None:
    spoil, message = WRONG[case]
    spoil(saved[1])
    with pytest.raises(UserError, match=message):
        load_scorer(saved[1])


def test_either_way_of_writing_one_label_is_read(saved: tuple[Scorer, Path]) -> None:
    """transformers writes the names of labels, others their number."""
    scorer, folder = saved
    for change in ({"num_labels": ...}, {"num_labels": 1, "id2label": ..., "label2id": ...}):
        change_config(folder, **change)
        assert torch.equal(load_scorer(folder)[0].head_weight, scorer.head_weight)
