"""Every real family, in its own proportions: what Liubai computes is what transformers computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import naive_logprobs
from families import FAMILIES, greedy, prompts, save_family
from test_model import sharded

from liubai.model.checkpoint import load
from liubai.model.transformer import Transformer
from liubai.rollout.engine import Request, generate
from liubai.rollout.torch_engine import TorchEngine
from liubai.text.template import Template, template_for
from liubai.text.tokenizer import TextTokenizer

transformers = pytest.importorskip("transformers")


class Case(NamedTuple):
    ours: Transformer
    theirs: Any
    tokenizer: TextTokenizer
    folder: Path


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("family") / request.param
    save_family(request.param, folder)
    sharded(folder)  # as the large ones come
    ours, tokenizer = load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    # an end token would end their answers
    theirs.generation_config.eos_token_id = theirs.config.eos_token_id = None
    return Case(ours, theirs, tokenizer, folder)


@torch.no_grad()
def test_logits(case: Case) -> None:
    ids = torch.randint(0, case.ours.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
    ours = case.ours(ids)
    assert ours.std() > 1
    torch.testing.assert_close(ours, case.theirs(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_text(case: Case) -> None:
    """All prompts in one left-padded batch of theirs; ours knows no padding."""
    asked = prompts(case.ours)
    width = max(map(len, asked))
    pad = [[0] * (width - len(ids)) for ids in asked]
    said = case.theirs.generate(
        torch.tensor([p + ids for p, ids in zip(pad, asked, strict=True)]),
        attention_mask=torch.tensor(
            [[0] * len(p) + [1] * len(ids) for p, ids in zip(pad, asked, strict=True)]
        ),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
    )
    answers = greedy(case.ours, asked)
    assert said[:, width:].tolist() == answers
    backend = transformers.AutoTokenizer.from_pretrained(case.folder)
    for answer in answers:
        # beyond its tokens a model's rows mean nothing, and transformers gives Qwen2's class one more
        ids = [i for i in answer if i < case.tokenizer.vocab_size]
        assert backend.decode(ids) == case.tokenizer.decode(ids)


@torch.no_grad()
def test_left_padded_logits(case: Case) -> None:
    """Positions count what is there, not what stands before it."""
    asked = [ids for ids in prompts(case.ours) if len(ids) > 1]
    width = max(map(len, asked))
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in asked])
    padded = torch.tensor([[5] * (width - len(ids)) + ids for ids in asked])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = case.theirs(padded, attention_mask=mask, position_ids=positions).logits
    for row, ids in enumerate(asked):
        ours = case.ours(torch.tensor([ids]))[0]
        torch.testing.assert_close(ours, theirs[row, width - len(ids) :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cache_equals_the_full_pass(case: Case) -> None:
    """Sampled answers to prompts with a common beginning, more than there are slots."""
    model, asked = case.ours, prompts(case.ours)
    asked += [[*asked[3][:40], i] for i in range(4)]
    engine = TorchEngine(model, eos_ids=(), slots=5, max_length=256)
    engine.load(model.state_dict(), version=0)
    requests = [Request(id=i, prompt_ids=tuple(ids), max_tokens=70, seed=i) for i, ids in enumerate(asked)]
    for sample in generate(engine, requests):
        torch.testing.assert_close(
            torch.tensor(sample.logprobs, dtype=torch.float64),
            naive_logprobs(model, sample),
            rtol=0,
            atol=1e-4,
        )


@torch.no_grad()
def test_far_positions(case: Case) -> None:
    """Two pieces of a row stand far apart: distances that no test has the time to fill with text."""
    config, ids = case.ours.config, torch.tensor([prompts(case.ours)[2]])
    positions = torch.cat([torch.arange(14), torch.arange(3000, 3016)])[None]
    ours = case.ours(ids, positions)
    # the mask says that there is one document: transformers would take the gap for the end of one
    theirs = case.theirs(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    # their angles are float32: 3000 is known to 1e-4 only
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
    assert (ours - case.ours(ids))[:, 14:].abs().max() > 0.1
    if config.rope_scaling:
        plain = Transformer(replace(config, rope_scaling=None))
        plain.load_state_dict(case.ours.state_dict())
        assert (ours - plain(ids, positions)).abs().max() > 0.1


def test_chat_template_and_tokenizer(case: Case) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(case.folder)
    template = template_for(case.tokenizer, case.folder)
    question = "I'll have 1234 等等\n\n of them, WE'VE <think> 7 </think>"
    chat = [{"role": "user", "content": question}]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert template.prompt_ids(question) == ids
    assert (theirs.bos_token, theirs.eos_token) == (case.tokenizer.bos, case.tokenizer.eos)


# ---- what real tokenizers and templates lack or have ----


@pytest.mark.parametrize("name", FAMILIES)
def test_tags_are_text_where_the_tokenizer_has_none(name: str) -> None:
    """No family has <answer>, and only some have <think>: they are spelt out, and come back whole."""
    tokenizer = FAMILIES[name].tokenizer()
    assert tokenizer.id_of("<answer>") is None
    said = "<think> 3 + 4 = 7 </think> <answer> 7 </answer>"
    assert tokenizer.decode(tokenizer.encode(said)) == said
    template = Template(tokenizer, FAMILIES[name].template)
    assert template.prefilled == ("<think>" if FAMILIES[name].tokens == "r1" else "")
