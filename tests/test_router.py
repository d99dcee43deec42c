"""Where questions go and why; and that the classifier is what its file and its docstring say."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.serve import classifier as learned
from liubai.serve import router as routing
from liubai.serve.classifier import (
    WAYS,
    Classifier,
    Example,
    calibration_error,
    features,
    named,
    read_examples,
)
from liubai.serve.router import (
    EXAMPLES,
    ROUTES,
    RULES,
    Decision,
    Router,
    Rule,
    all_examples,
    held_out,
    last_question,
)

ROUTER = Router.load()


def user(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


# --- the policy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "way", "rule"),
    [
        ("what is 123456789 * 987654321?", "tool", "calculation"),
        ("3.11 和 3.8 哪个大", "tool", "calculation"),
        ("9.11 or 9.9", "tool", "calculation"),
        ("45.09 还是 45.1", "tool", "calculation"),
        ("   ", "fast", "empty"),
        ("Don't think, just say hello", "fast", "told to hurry"),
        ("不用思考，直接回答：法国的首都", "fast", "told to hurry"),
        ("Prove that 2 is the only even prime", "think", "told to think"),
        ("请一步一步思考", "think", "told to think"),
        ("solve 3 * x + 4 = 19", "think", "equation"),
        ("解 3 * x + 4 = 19", "think", "equation"),
        ("What is y if 2y - 1 = 7", "think", "equation"),
        ("```python\nprint(1)\n```", "think", "program"),
        ("make 1 4 3 ->7", "think", "classifier"),
        ("求和 甲 3 乙 7 丙 2 丁 9", "think", "classifier"),
        ("anna has 3 red cups . ben has 5 blue hats . summarise", "fast", "classifier"),
        ("carl 有 2 绿 钢笔 . 概括", "fast", "classifier"),
        ("Tom has 3 apples, buys 4 more and gives 2 away. How many apples are left?", "think", "classifier"),
        ("version 3.11 or 3.8, which is newer?", "think", "classifier"),
    ],
)
def test_where_questions_go(question: str, way: str, rule: str) -> None:
    decision = ROUTER.route(question)
    assert (decision.way, decision.rule) == (way, rule)
    assert decision.why
    assert (decision.calculation is not None) == (way == "tool")
    assert ROUTER.route(user(question)) == decision


def test_a_calculation_comes_with_its_answer() -> None:
    decision = ROUTER.route("What is 17% of 250?")
    assert decision.calculation is not None
    assert decision.calculation.answer == "42.5"
    assert decision.why == "a calculation: 17% of 250"
    without = ROUTER.route("What is 17% of 250?", tools=())
    assert (without.way, without.calculation) == ("think", None)


def test_what_is_asked_for_is_done() -> None:
    for route in ("fast", "think"):
        assert ROUTER.route("2 + 2", route=route) == Decision(route, f"'{route}' was asked for", rule="asked")
    assert ROUTER.route("12/25", route="tool").calculation is not None  # for a calculator it is no date
    refused = ROUTER.route("Prove that 1/0 is not defined", route="tool")
    assert refused.way == "think"
    assert refused.why.startswith("a tool was asked for, but the calculator refuses (")
    assert refused.why.endswith("so: the question asks for steps or for a proof")
    missing = ROUTER.route("2 + 2", route="tool", tools=["python"])
    assert missing.calculation is None
    assert "there is no calculator here" in missing.why
    with pytest.raises(UserError, match="did you mean 'think'"):
        ROUTER.route("2 + 2", route="thnk")  # type: ignore[arg-type]


def fixed(fast: float, think: float, tool: float) -> Classifier:
    return Classifier({"bias": [math.log(p) for p in (fast, think, tool)]})


def test_it_thinks_in_doubt() -> None:
    for p, way in [(0.76, "fast"), (0.74, "think"), (0.5, "think")]:
        decision = Router(fixed(p, 1 - p - 0.01, 0.01)).route("so what")
        assert decision.way == way
        assert decision.confidence == pytest.approx(p if way == "fast" else 1 - p)
    assert "not sure (74%, asked for is 75%)" in Router(fixed(0.74, 0.2, 0.06)).route("so what").why
    assert "think about (90%)" in Router(fixed(0.05, 0.9, 0.05)).route("so what").why
    calculation = Router(fixed(0.1, 0.2, 0.7)).route("so what")
    assert calculation.way == "think"  # there is nothing that the calculator could do
    assert "not one that the calculator reads" in calculation.why
    assert Router(fixed(0.6, 0.3, 0.1), haste=1).route("so what").way == "fast"


def test_rules_are_asked_in_order() -> None:
    both = "Don't think: prove that 2 = 2"
    assert ROUTER.route(both).rule == "told to hurry"
    assert Router(ROUTER.classifier, RULES[::-1]).route(both).rule == "told to think"


def test_the_last_question_decides_and_earlier_ones_are_context() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        *user("Hello", "Prove that 2 is even"),
        {"role": "assistant", "content": "1 + 1"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "17 * 3"}, {"type": "image_url", "image_url": {}}],
        },
        {"role": "assistant", "content": None},
    ]
    assert last_question(chat) == ("17 * 3", "Prove that 2 is even")
    assert ROUTER.route(chat).way == "tool"
    assert last_question([]) == ("", "")
    after_proof = ROUTER.route(user("Prove that the sum of two even numbers is even.", "And of four?"))
    after_joke = ROUTER.route(user("Tell me a joke.", "And of four?"))
    assert after_proof.rule == after_joke.rule == "classifier"  # "prove" was said earlier, not now
    chances = [
        ROUTER.classifier.probabilities("Again", before)["fast"] for before in ("Prove it", "Tell me a joke")
    ]
    assert chances[0] < chances[1]
    long = "a question that is long enough to be understood on its own, without the others"
    assert features(long, "Prove it") == features(long)


parts = st.dictionaries(st.sampled_from(["text", "type"]), st.one_of(st.none(), st.text()))
messy = st.one_of(
    st.none(), st.text(max_size=60), st.integers(), st.lists(st.one_of(st.text(), parts), max_size=2)
)


@settings(deadline=None)
@given(st.text(max_size=300), st.lists(messy, max_size=3), st.sampled_from(ROUTES))
def test_no_text_raises(text: str, contents: list, route: str) -> None:
    decision = ROUTER.route(text, route=route)
    assert decision.way in WAYS
    assert 0 <= decision.confidence <= 1
    assert decision.way != "tool" or decision.calculation is not None
    chat = [{"role": "user", "content": content} for content in contents]
    assert ROUTER.route(chat, route=route).way in WAYS
    assert ROUTER.explain(text)


LONG = [
    "a" * 200_000,
    "= " * 50_000,
    "x=" * 50_000,
    "3 x " * 50_000,
    "\ud800" * 99,
    "好" * 100_000,
    "x + " * 50_000,
    "\n" * 1_000_000,
    " \n\t" * 300_000,
    "def " * 250_000,
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_long_texts_cost_little(text: str) -> None:
    started = time.process_time()
    assert ROUTER.route(text).way in ("fast", "think")
    assert time.process_time() - started < 1  # a few hundredths; minutes, where it is their square


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("text", ["\n", " \n\t", "def ", "def\n", "x", "= ", "x=", "3 x ", "不", "step "])
def test_no_rule_costs_the_square_of_a_text(rule: Rule, text: str) -> None:
    started = time.process_time()
    rule.found(text * 200_000)
    assert time.process_time() - started < 2


def test_rules_read_the_beginning_and_the_end_of_a_long_text() -> None:
    read: list[str] = []
    spy = Rule("spy", "think", "", read.append)
    text = f"{'a' * 2000}{'b' * 100_000}{'c' * 2000}"
    Router(ROUTER.classifier, [spy]).route(text)
    Router(ROUTER.classifier, [spy]).route("short")
    assert read == [f"{'a' * 2000}\n{'c' * 2000}", "short"]
    filler = "so it goes on and on " * 1000
    for question in (f"def f(x): {filler}", f"{filler}\n\n \tdef f(x):"):
        assert ROUTER.route(question).rule == "program"
    assert ROUTER.route(f"{filler}\n, as we def\nine: it {filler}").rule == "classifier"


def test_it_explains_itself() -> None:
    said = ROUTER.explain("Summarise this article about bread")
    assert "calculation: no, the calculator refuses" in said
    assert all(f"{rule.name}: no" in said for rule in RULES)
    assert "-> fast: it looks like a question that needs no thought" in said
    assert "told to think: yes, the question asks for steps" in ROUTER.explain("prove it")


# --- the classifier ------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_file() -> None:
    """Softmax of the sums of value times weight, over the temperature, written out."""
    file = json.loads(routing.WEIGHTS.read_text(encoding="utf-8"))
    for text, before in [
        ("Summarise this article.", ""),
        ("再来一个", "讲个笑话"),
        ("How many ways are there?", ""),
    ]:
        sums = list(file["named"]["bias"])
        for name, value in features(text, before).items():
            if name in named(""):
                row = file["named"].get(name, [0, 0, 0])
            else:
                row = file["buckets"].get(str(learned.bucket(name)), {"weights": [0, 0, 0]})["weights"]
            sums = [total + value * weight for total, weight in zip(sums, row, strict=True)]
        powers = [math.exp(total / file["temperature"]) for total in sums]
        got = ROUTER.classifier.probabilities(text, before)
        assert [got[way] for way in WAYS] == pytest.approx([p / sum(powers) for p in powers])


def test_reasons_add_up_to_the_difference_from_the_mean() -> None:
    text, before = "Make it shorter, please.", "Summarise this."
    for way in WAYS:
        told = ROUTER.classifier.reasons(text, way, before, most=10**6)
        bias = ROUTER.classifier.weights["bias"]
        logits = ROUTER.classifier.logits(features(text, before))
        at = WAYS.index(way)
        difference = logits[at] - sum(logits) / 3 - (bias[at] - sum(bias) / 3)
        assert sum(r.says for r in told) * ROUTER.classifier.temperature == pytest.approx(difference)
        assert [abs(r.says) for r in told] == sorted((abs(r.says) for r in told), reverse=True)


FEW = [
    Example(text, way)  # type: ignore[arg-type]
    for way, texts in {
        "fast": ["name a colour", "summarise this", "say hello", "say red", "name a fruit"],
        "think": [
            "prove this now",
            "prove that too",
            "solve that riddle",
            "solve this riddle",
            "why prove it",
        ],
        "tool": ["add 3 and 4", "add 5 and 6", "3 times 4", "7 times 8", "9 plus 9"],
    }.items()
    for text in texts
]


def test_training_finds_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conditions of optimality with L1 and L2, in float64 loops: at a weight that is not 0 the loss
    falls as steeply as the penalty rises, at one that is 0 no more steeply."""
    monkeypatch.setattr(learned, "ROUNDS", 6000)
    monkeypatch.setattr(learned, "L1", 0.01)
    monkeypatch.setattr(learned, "L2", 0.02)
    weights = learned._fit(FEW)
    found = Classifier(weights)
    gradient: dict[tuple[str, int], float] = {}
    for example in FEW:
        values = features(example.text)
        chances = found.probabilities(example.text)
        for i, way in enumerate(WAYS):
            error = (chances[way] - (example.way == way)) / len(FEW)
            gradient["bias", i] = gradient.get(("bias", i), 0.0) + error
            for name, value in values.items():
                key = learned._key(name), i
                gradient[key] = gradient.get(key, 0.0) + error * value
    zeros = 0
    for (key, i), slope in gradient.items():
        weight = weights.get(key, [0.0] * 3)[i]
        slope += 0.02 * weight
        if key == "bias":
            assert slope == pytest.approx(0, abs=1e-3)
        elif abs(weight) > 1e-3:
            assert slope == pytest.approx(-math.copysign(0.01, weight), abs=1e-3)
        else:
            zeros += 1
            assert abs(slope) < 0.011
    assert zeros > len(gradient) / 3  # which is what the L1 penalty is for


def test_the_temperature_is_the_least_surprised() -> None:
    unseen = [([2.0, 0.0, 0.0], "fast"), ([2.0, 0.0, 0.0], "fast"), ([2.0, 0.0, 0.0], "think")]

    def surprise(temperature: float) -> float:
        e = math.exp(2.0 / temperature)
        return -2 * math.log(e / (e + 2)) - math.log(1 / (e + 2))

    found = learned._temperature(unseen)  # type: ignore[arg-type]
    # e / (e + 2) = 2/3 where the two that are right are as likely as they are frequent: e = 4
    assert found == pytest.approx(2 / math.log(4), rel=0.05)
    assert surprise(found) <= min(surprise(found * 1.06), surprise(found / 1.06))


def test_calibration_error_by_hand() -> None:
    judged = [(0.95, True), (0.95, False), (0.55, True), (0.55, True)]
    assert calibration_error(judged) == pytest.approx(0.5 * abs(0.95 - 0.5) + 0.5 * abs(0.55 - 1.0))
    assert calibration_error([(1.0, True), (0.0, False)]) == 0


def test_features_do_not_grow_with_length() -> None:
    for text in ("add 3 and 4", "summarise " * 3000, "概括" * 5000, "1 + " * 2000 + "1"):
        found = features(text)
        length = math.sqrt(sum(v * v for name, v in found.items() if name not in named("")))
        assert length == pytest.approx(1)
        assert all(0 <= v <= 1 for v in named(text).values())


# --- training ------------------------------------------------------------------------------------------


def test_the_file_is_what_training_gives() -> None:
    """Retrained here: other machines add up in another order, so the last digit may differ."""
    examples = all_examples(read_examples(EXAMPLES))
    seen = [example for example in examples if not held_out(example)]
    unseen = [example for example in examples if held_out(example)]
    assert 60 <= len(unseen) <= 140
    again = learned._fit(seen)
    for key in again.keys() | ROUTER.classifier.weights.keys():
        a, b = again.get(key, [0.0] * 3), ROUTER.classifier.weights.get(key, (0.0,) * 3)
        assert a == pytest.approx(b, abs=0.02), key
    notes = json.loads(routing.WEIGHTS.read_text(encoding="utf-8"))["notes"]
    assert notes["learned from"] == len(seen)
    assert notes["held out"] == routing.measured(ROUTER.classifier, unseen)
    assert notes["held out"]["classifier accuracy"] >= 0.85
    assert notes["held out"]["hasty"] <= 0.03 * len(unseen)


def test_a_held_out_question_has_no_twin_to_learn_from() -> None:
    assert held_out(Example("what is 3 + 4", "tool")) == held_out(Example("What is 17.5 + 20", "tool"))
    a, b = Example("Why?", "think", "Prove it"), Example("Why?", "fast", "Tell me a joke")
    assert len({a, b}) == 2


def test_one_can_train_on_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "ROUNDS", 60)
    monkeypatch.setattr(routing, "EACH", 2)
    rows = [{"text": f"{verb} the {noun}", "way": way, "before": "Hello"}
            for verb, way in (("water", "fast"), ("weigh", "think"), ("count", "tool"))
            for noun in ("rose", "apple", "bread", "stone", "river", "house", "cloud", "horse")]  # fmt: skip
    examples, out = tmp_path / "mine.jsonl", tmp_path / "mine.json"
    examples.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    arguments = ["router", "train", "--examples", str(examples), "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    routing.main()
    assert json.loads(capsys.readouterr().out)["held out"]["examples"] > 0
    mine = Router.load(out)
    chances = mine.classifier.probabilities("water the lawn", "Hello")
    assert max(chances, key=chances.__getitem__) == "fast"  # type: ignore[arg-type]
    monkeypatch.setattr("sys.argv", ["router", "explain", "water the lawn", "--weights", str(out)])
    routing.main()
    assert "“water”" in capsys.readouterr().out


BAD = ["{", "[]", '{"text": "a"}', '{"text": 1, "way": "fast"}', '{"text": "a", "way": "slow"}', "3"]


@pytest.mark.parametrize("line", BAD)
def test_bad_examples(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a", "way": "fast"}\n' + line, encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        learned.read_examples(path)


def test_without_examples_nothing_is_learned(tmp_path: Path) -> None:
    """Those of our own families alone would look like a good router."""
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="there is no example in"):
        routing.train(tmp_path / "empty.jsonl", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no example for 'think'"):
        learned.train([Example("a", "fast"), Example("3", "tool")])
    for text in ("{", "{}", '{"ways": [], "named": {}, "buckets": {}, "temperature": 1}', "[1]"):
        (tmp_path / "router.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"no router's file; .*router train"):
            Router.load(tmp_path / "router.json")
    with pytest.raises(UserError, match="cannot be read"):
        learned.read_examples(tmp_path / "none.jsonl")
