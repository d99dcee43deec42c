"""Rules against planted faults, in two languages; the wide world's facts exactly; HHEM's weights without its
code; a judge that may be asked so many times and no more; the labels, where they are at hand."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.grade import GradeItem, grade, remote
from liubai.grade.faithful import MAX_PASSAGE, SUPPORTED, Passage, faithful, judge, word_count
from liubai.grade.options import check_options
from liubai.grade.prose import related, stem, tokens
from liubai.measure.faithful import HHEM_PROMPT, Judge, scorer
from liubai.problems.lexicon import COLOURS, LANGUAGES, NAMES, THINGS, translate
from liubai.problems.passage import Passage as Family

ENGLISH = (
    "Anna Smith joined Acme Corp. in March 2019 as chief engineer. She led twenty-five people and cut costs "
    "by 15%. Without outside help the team shipped version 3.2 on 4 June 2020 for $1,500 a seat. Rain is "
    "rare in the valley, and farmers there do not plant rice."
)
CHINESE = (
    "2022年8月31日，张伟在北京以二十五万元买下了一辆红色汽车。他没有告诉妻子李娜。"
    "公司去年利润增长了12%，员工约三百名。"
)
SUMMARISED = [
    (ENGLISH, "Anna Smith led 25 people at Acme."),
    (ENGLISH, "Acme cut costs by 15 percent."),
    (ENGLISH, "Version 3.2 shipped on June 4th, 2020 for 1500 dollars a seat."),
    (ENGLISH, "Farmers in the valley don't plant rice."),
    (CHINESE, "张伟在北京买下汽车，花了25万元。"),
    (CHINESE, "公司利润增长12%，有员工300名。"),
    (CHINESE, "张伟于2022-08-31买下汽车。"),
]
FAULTS = [
    (ENGLISH, "Anna Smith led 30 people at Acme.", "number"),
    (ENGLISH, "Version 3.2 shipped on June 5th, 2020.", "date"),
    (ENGLISH, "Version 3.2 shipped in July 2020.", "date"),
    (ENGLISH, "Bob Smith led 25 people at Acme.", "name"),
    (ENGLISH, "The team at Globex cut costs.", "name"),
    (ENGLISH, "Anna Smith never joined Acme.", "negation"),
    (ENGLISH, "The team shipped version 3.2 with outside help.", "affirmed"),
    (ENGLISH, "Farmers in the valley plant rice.", "affirmed"),
    (ENGLISH, "Only Anna joined Acme.", "limit"),
    (ENGLISH, "Anna increased costs by 15%.", "opposite"),
    (ENGLISH, "Rain is common in the valley.", "opposite"),
    (ENGLISH, "Rain is rare since 2019 in the valley.", "relation"),
    (CHINESE, "张伟花了26万元买下汽车。", "number"),
    (CHINESE, "张伟于8月30日买下汽车。", "date"),
    (CHINESE, "王强买下了汽车。", "name"),
    (CHINESE, "张伟告诉了妻子。", "affirmed"),
    (CHINESE, "公司利润下降了12%。", "opposite"),
    (CHINESE, "公司没有利润。", "negation"),
]


@pytest.mark.parametrize(("passage", "summary"), SUMMARISED)
def test_what_the_passage_says_in_other_words_is_supported(passage: str, summary: str) -> None:
    found = judge(passage, summary)
    assert found.findings == ()
    assert found.supported
    assert found.score == 1.0


@pytest.mark.parametrize(("passage", "summary", "kind"), FAULTS)
def test_a_planted_fault_is_found_and_named(passage: str, summary: str, kind: str) -> None:
    found = judge(passage, summary)
    assert kind in {finding.kind for finding in found.findings}, found.findings
    assert found.score < 1.0


@pytest.mark.parametrize("passage", [ENGLISH, CHINESE])
def test_a_passage_supports_its_own_sentences_and_all_of_itself(passage: str) -> None:
    for part in [passage, *(p for p in re.split(r"(?<=[.。])\s*(?=[A-Z\u3400-\u9fff])", passage) if p)]:
        assert judge(passage, part).findings == (), part
    assert judge(passage, passage).told == 1.0


def test_more_that_is_unsupported_never_scores_higher() -> None:
    said = "Anna Smith led 25 people."
    scores = [judge(ENGLISH, said).score]
    for more in (
        " Purple dragons sang.",
        " In 1850 she met Napoleon.",
        " She never slept.",
        " It cost 99 euros.",
    ):
        said += more
        scores.append(judge(ENGLISH, said).score)
    assert all(a >= b for a, b in pairwise(scores))
    assert scores[-1] < 0.05


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("twenty five, twenty-five, 25, 25.0", ["25"] * 4),
        ("1,500 and three thousand, 2.5 million", ["1500", "3000", "2500000"]),
        ("二十五 二〇二二 一万二千 三百零五 25万", ["25", "2022", "12000", "305", "250000"]),
        ("the third and the 3rd", ["3", "3"]),
        ("一起三思", []),
    ],
)
def test_numbers_are_one_whatever_their_spelling(text: str, values: list[str]) -> None:
    assert [token.stem for token in tokens(text) if token.kind == "number"] == values


def test_months_of_both_languages_are_one_and_may_is_a_word_too() -> None:
    found = [
        [t.stem for t in tokens(text) if t.kind == "month"] for text in ("In May, 5月", "he may march on")
    ]
    assert found == [["month:5", "month:5"], []]


def test_words_of_a_family_are_related_and_others_are_not() -> None:
    assert related(stem("optimization"), stem("optimize"))
    assert related(stem("policies"), stem("policy"))
    assert not related(stem("contract"), stem("contrast"))
    assert not related(stem("plan"), stem("plane") + "tary")


# --- the wide world -------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), keep=st.integers(1, 3))
def test_of_a_list_of_facts_a_summary_may_leave_out_and_nothing_else(seed: int, keep: int) -> None:
    rng = random.Random(seed)
    names = rng.sample(list(NAMES), 3)
    facts = [(name, rng.randint(2, 9), rng.choice(list(THINGS))) for name in names]
    colours = [rng.choice(list(COLOURS)) for _ in facts]
    prompt = Family().problem(facts, colours, rng.choice(LANGUAGES)).prompt

    def said(chosen: list[tuple[str, int, str]]) -> str:
        return translate(" , ".join(f"{a} {n} {thing}" for a, n, thing in chosen), rng.choice(LANGUAGES))

    some = rng.sample(facts, keep)
    right = judge(prompt, said(some))
    assert (right.score, right.supported, right.told) == (1.0, True, pytest.approx(keep / 3))
    name, number, thing = some[0]
    spoilt = [(name, number % 9 + 1 if number < 9 else 2, thing), *some[1:]]
    wrong = judge(prompt, said(spoilt))
    assert not wrong.supported
    assert wrong.score == pytest.approx((keep - 1) / keep)
    assert [finding.kind for finding in wrong.findings] == ["number"]


def test_a_colour_may_be_said_if_it_is_the_right_one() -> None:
    passage = "anna has 3 red cups . ben has 5 blue hats . summarise"
    assert judge(passage, "anna 3 red cups").supported
    assert not judge(passage, "anna 3 blue cups").supported
    assert not judge(passage, "anna 3 cups uh").supported
    assert judge(passage, "").score == 0.0


# --- the verifier ---------------------------------------------------------------------------------


def test_as_a_verifier_it_scores_between_0_and_1() -> None:
    def score(answer: str, **meta: object) -> float:
        verdict = grade(GradeItem("faithful", ENGLISH, f"<think> hm </think><answer>{answer}</answer>", meta))
        assert verdict.error is None, verdict.error
        return verdict.parts["correct"]

    assert score("Anna Smith led 25 people at Acme.") == 1.0
    assert 0 < score("Anna Smith led 30 people at Acme.") < SUPPORTED
    for empty in ("", "...", "the of and", "—"):
        assert score(empty) == 0.0


def test_copying_costs_and_saying_little_can_be_made_to() -> None:
    short, whole = "Anna Smith led 25 people.", ENGLISH
    assert faithful(ENGLISH, short, {}) == 1.0
    assert faithful(ENGLISH, whole, {}) == pytest.approx(0.75)
    told = judge(ENGLISH, short).told
    assert faithful(ENGLISH, short, {"covers": 0.5}) == pytest.approx(told / 0.5)
    assert faithful(ENGLISH, whole, {"covers": 0.5, "words": 100}) == 1.0
    assert faithful(ENGLISH, whole, {"words": 10}) == pytest.approx(10 / word_count(whole))
    assert faithful(ENGLISH, short, {"words": 10}) == 1.0


@pytest.mark.parametrize(
    "meta", [{"covers": 2}, {"covers": "x"}, {"covers": True}, {"words": -1}, {"words": 1.5}]
)
def test_options_that_make_no_sense_are_the_problems_fault(meta: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="meta '"):
        check_options("faithful", ENGLISH, meta)


def test_a_passage_that_is_none_is_the_problems_fault() -> None:
    for passage in ("", " \n", "a" * (MAX_PASSAGE + 1)):
        with pytest.raises(ValueError, match="a passage has"):
            judge(passage, "x")


@given(st.text(max_size=300), st.text(min_size=1, max_size=300))
def test_no_text_makes_it_raise(summary: str, passage: str) -> None:
    if passage.strip():
        found = judge(passage, summary)
        assert 0.0 <= found.score <= 1.0
        assert 0.0 <= found.told <= 1.0


def test_where_a_passage_has_a_word() -> None:
    passage = Passage("It optimises costs. The cost fell.")
    assert [passage.tokens[i].text for i in passage.places(stem("costs"))] == ["costs", "cost"]
    assert passage.places(stem("optimisation")) == [1]


# --- HHEM -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hhem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in HHEM's format, beside code that must not run."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("hhem")
    words = ["<pad>", "the", "hypothesis", "is", "premise?", "Premise:", "Hypothesis:", "a", "b", "c"]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*words, "<unk>"])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, num_labels=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = transformers.T5ForTokenClassification(config).train(False)
    tensors = {f"t5.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    tensors.pop("t5.transformer.encoder.embed_tokens.weight", None)  # tied, and so stored once
    save_file(tensors, folder / "model.safetensors")
    trap = f"open({str(folder / 'RAN')!r}, 'w').close()\nraise SystemExit\n"
    (folder / "modeling_hhem_v2.py").write_text(trap)
    kept = {"model_type": "HHEMv2", "auto_map": {"AutoConfig": "modeling_hhem_v2.X"}}
    (folder / "config.json").write_text(json.dumps(kept))
    (folder / "reference").mkdir()
    config.save_pretrained(folder / "reference")
    torch.save(model.state_dict(), folder / "reference" / "state.pt")
    return folder


def test_hhem_is_its_weights_and_not_its_code(hhem: Path) -> None:
    import transformers
    from tokenizers import Tokenizer

    pairs = [("a b c a b", "b a"), ("c", "a b c c c c c")]
    scores = scorer("hhem", hhem=hhem)(pairs)
    config = transformers.T5Config.from_pretrained(hhem / "reference", num_labels=2)
    model = transformers.T5ForTokenClassification(config).train(False)
    model.load_state_dict(torch.load(hhem / "reference" / "state.pt", weights_only=True))
    tokenizer = Tokenizer.from_file(str(hhem / "tokenizer.json"))
    for score, pair in zip(scores, pairs, strict=True):  # one by one: no padding
        ids = torch.tensor([tokenizer.encode(HHEM_PROMPT.format(*pair)).ids])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, 0].softmax(-1)[1].item()
        assert score.value == pytest.approx(expected, abs=1e-6)
        assert score.supported is (expected >= 0.5)
    assert not (hhem / "RAN").exists()


def test_a_folder_without_hhem_gets_a_sentence(hhem: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--hhem DIR"):
        scorer("hhem")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        scorer("hhem", hhem=tmp_path)
    (tmp_path / "model.safetensors").write_bytes((hhem / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="flan-t5-base"):
        scorer("hhem", hhem=tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((hhem / "tokenizer.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(UserError, match="does not hold HHEM"):
        scorer("hhem", hhem=tmp_path)
    with pytest.raises(UserError, match="no scorer 'ruls'"):
        scorer("ruls")


# --- a judge --------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A judge that calls a summary with "moon" in it unsupported; the prompts that it was sent."""
    monkeypatch.setenv("LIUBAI_JUDGE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("LIUBAI_JUDGE_MODEL", "m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)
    sent: list[str] = []

    def complete(endpoint: remote.Endpoint, system: str, prompt: str, deadline: float) -> str:
        sent.append(prompt)
        if "flaky" in prompt and len(sent) < 3:
            raise remote._FailedError("the endpoint answered 503")
        nonce = re.findall(r"VERDICT: (\w+) SUPPORTED", prompt)[-1]
        summary = json.loads(re.findall(r"Summary: (.*)", prompt)[0])
        return f"hm\nVERDICT: {nonce} {'UNSUPPORTED' if 'moon' in summary else 'SUPPORTED'}"

    monkeypatch.setattr(remote, "_complete", complete)
    return sent


def test_a_judges_verdict_is_asked_for_once_and_kept(endpoint: list[str]) -> None:
    pairs = [("it rains", 'rain, "and"\nSummary: "x"'), ("it rains", "the moon")]
    judges = scorer("judge", calls=4)
    assert [(s.value, s.supported, s.error) for s in judges(pairs)] == [(1.0, True, None), (0.0, False, None)]
    assert len(endpoint) == 2
    judges(pairs)
    assert len(endpoint) == 2  # known


def test_a_judge_is_asked_so_often_and_no_more(endpoint: list[str]) -> None:
    with pytest.raises(UserError, match="3 summaries need as many calls"):
        scorer("judge", calls=2)([("p", "a"), ("p", "b"), ("p", "c")])
    assert endpoint == []
    # what does not answer is asked again, and that counts
    (score,) = scorer("judge", calls=2)([("p", "flaky")])
    assert "all 2 calls" in (score.error or "")
    assert len(endpoint) == 2
    endpoint.clear()
    tried = scorer("judge", calls=3)
    assert isinstance(tried, Judge)
    (score,) = tried([("p", "flaky twice")])
    assert (score.supported, tried.used) == (True, 3)


# --- people's labels ------------------------------------------------------------------------------

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "faithfulness_begin.jsonl").is_file(), reason="the labels are not at hand")
def test_on_documents_that_nothing_was_fitted_on_the_rules_agree_with_people() -> None:
    import numpy as np

    from bench.faithful import auc, read

    rows = [row for row in read(SHARED) if row.held_out]
    floors = {"begin": 0.88, "sales_call": 0.78, "sales_email": 0.73, "scitldr": 0.5}
    for domain, floor in floors.items():
        some = [row for row in rows if row.domain == domain]
        scores = np.array([judge(row.passage, row.summary).score for row in some])
        assert auc(scores, np.array([row.consistent for row in some])) > floor, domain
