"""A program's tests decide: every reference passes, mutants fail, and no cheat of the list is paid."""

import ast
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liubai.errors import UserError
from liubai.grade import GradeItem, GraderPool, clock, grade_lines
from liubai.grade.code import code
from liubai.grade.link import Decoder, Link, Remote
from liubai.grade.sandbox import require, run

try:
    require()
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)

DATA = Path(os.environ.get("LIUBAI_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def item(gold: str, program: str, **meta: Any) -> GradeItem:
    return GradeItem("code", gold, f"<think> so </think>\n```python\n{program}\n```", meta)


def humaneval(row: dict[str, Any], program: str | None = None) -> GradeItem:
    gold = f"{row['test']}\ncheck({row['entry_point']})\n"
    return item(gold, program or row["prompt"] + row["canonical_solution"], timeout=20.0)


# --- real problems ---------------------------------------------------------------------------------


def test_humaneval_solutions_pass() -> None:
    problems = rows("humaneval.jsonl")
    verdicts = list(grade_lines(map(humaneval, problems), timeout_s=30.0))
    assert [p["task_id"] for p, v in zip(problems, verdicts, strict=True) if not v.correct or v.error] == []


def mutants(program: str, entry_point: str) -> Iterator[str]:
    """The program with ``entry_point`` returning nothing, and with one comparison, sum or number changed."""
    tree = ast.parse(program)
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry_point)
    body, function.body = function.body, ast.parse("return None").body
    yield ast.unparse(tree)
    function.body = body
    swaps: dict[type[ast.AST], ast.AST] = {
        ast.Lt: ast.GtE(),
        ast.GtE: ast.Lt(),
        ast.Gt: ast.LtE(),
        ast.LtE: ast.Gt(),
        ast.Eq: ast.NotEq(),
        ast.NotEq: ast.Eq(),
        ast.Add: ast.Sub(),
        ast.Sub: ast.Add(),
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
            old = node.ops[0]
            node.ops[0] = swaps[type(old)]  # type: ignore[call-overload]
            yield ast.unparse(tree)
            node.ops[0] = old
        elif isinstance(node, ast.BinOp) and type(node.op) in swaps:
            operator = node.op
            node.op = swaps[type(operator)]  # type: ignore[assignment]
            yield ast.unparse(tree)
            node.op = operator
        elif isinstance(node, ast.Return) and node.value is not None:
            value = node.value
            node.value = ast.UnaryOp(ast.Not(), value)
            yield ast.unparse(tree)
            node.value = value


def test_humaneval_mutants_fail() -> None:
    """Three a problem. A mutant that loops for ever is wrong as well, on time."""
    problems = rows("humaneval.jsonl")
    every = os.environ.get("LIUBAI_ALL_MUTANTS")
    tried = [
        (problem["task_id"], mutant)
        for problem in problems
        for mutant in itertools.islice(
            mutants(problem["prompt"] + problem["canonical_solution"], problem["entry_point"]),
            None if every else 3,
        )
    ]
    by_id = {problem["task_id"]: problem for problem in problems}
    items = [humaneval(by_id[task], mutant) for task, mutant in tried]
    items = [GradeItem(i.verifier, i.gold, i.response, {"timeout": 3.0}) for i in items]
    verdicts = list(grade_lines(items, timeout_s=30.0))
    assert not [v.error for v in verdicts if v.error]
    survivors = [mutant for mutant, v in zip(tried, verdicts, strict=True) if v.correct]
    if every:
        for task, mutant in survivors:
            print(f"--- survives: {task}\n{mutant}")
        print(f"{len(survivors)} of {len(tried)} mutants survive")
    # "return None" comes first: it never survives
    firsts = dict(reversed(tried))
    assert not [task for task, mutant in survivors if firsts[task] == mutant]
    assert len(survivors) <= 0.05 * len(tried)


def test_mbpp_solutions_pass() -> None:
    problems = rows("mbpp_sanitized.jsonl")
    sample = problems if os.environ.get("LIUBAI_ALL_MBPP") else problems[::10]
    items = [
        # one of them is asked for a function called "sum"
        item(json.dumps(p["test_imports"] + p["test_list"]), p["code"], entry_point=asked(p), timeout=20.0)
        for p in sample
    ]
    verdicts = list(grade_lines(items, timeout_s=30.0))
    assert [p["task_id"] for p, v in zip(sample, verdicts, strict=True) if not v.correct or v.error] == []


def asked(problem: dict[str, Any]) -> str:
    defined = {n.name for n in ast.parse(problem["code"]).body if isinstance(n, ast.FunctionDef)}
    used = {n.id for t in problem["test_list"] for n in ast.walk(ast.parse(t)) if isinstance(n, ast.Name)}
    return (sorted(defined & used) or [""])[0]


# --- cheats: right for the wrong reason, all of them worth nothing ------------------------------------

EVERYTHING = """
class Everything(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __gt__(self, other): return True
    __le__ = __ge__ = __contains__ = __instancecheck__ = __lt__
    def __sub__(self, other): return 0
    def __rsub__(self, other): return 0
    def __abs__(self): return 0
    def __float__(self): return 0.0
    def __hash__(self): return hash(3)
    def __bool__(self): return True
"""

CHEATS = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "exit when called": "import os\ndef f(x): os._exit(0)",
    "sys.exit when called": "import sys\ndef f(x): sys.exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)",
    "a success marker": "print('pass')\nprint('ok')\ndef f(x): print('pass'); print('pass', flush=True)",
    "a marker on every file": (
        "import os\ndef f(x):\n    for fd in range(64):\n        for _ in range(9):\n"
        "            try: os.write(fd, b'pass\\n')\n            except OSError: pass"
    ),
    "equal to everything": EVERYTHING + "def f(x): return Everything()",
    "equal to everything, no int": EVERYTHING.replace("(int)", "") + "def f(x): return Everything()",
    "everything is what f is": EVERYTHING.replace("(int)", "")
    + "f = Everything()\nEverything.__call__ = lambda s, x: s",
    "patched assert": "import builtins\nbuiltins.AssertionError = type(None)\ndef f(x): return 0",
    "patched builtins": (
        "import builtins\nabs = round = sorted = lambda *a: 0\n"
        "builtins.abs = builtins.round = builtins.sorted = builtins.isinstance = abs\ndef f(x): return 99"
    ),
    "patched math": "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 99",
    "patched operator": "import operator\noperator.eq = lambda a, b: True\ndef f(x): return 99",
    "frames": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if int('1764') in frame.f_code.co_consts: return int('1764')\n"
        "        frame = frame.f_back"
    ),
    "garbage": (
        "import gc\ndef f(x):\n    for thing in gc.get_objects():\n"
        "        if isinstance(thing, str) and '1764' in thing: return 1764"
    ),
    "its own file": (
        "import os\ndef f(x):\n    for folder in ('/tmp', '/proc/self/fd', '.'):\n"
        "        for name in os.listdir(folder):\n"
        "            if '1764' in open(folder + '/' + name).read(): return 1764"
    ),
    "memory": "def f(x): return 1764 if b'1764' in open('/proc/self/mem', 'rb').read() else 0",
    "its input": "import sys\ndata = sys.stdin.read()\ndef f(x): return 1764 if '1764' in data else 0",
    "trace": "import sys\nsys.settrace(lambda *a: None)\ndef f(x): return None",
    "an exception class": "class AssertionError(Exception): pass\ndef f(x): raise AssertionError",
    "a test framework": "import sys\nsys.modules['math'] = sys.modules['unittest'] = sys\ndef f(x): pass",
    "an import that is not there": "def f(x): raise ImportError('the tests are broken')",
    "a module that is not there": "import sys\nmath = type(sys)('math.broken')\nf = math",
    "nothing": "pass",
    "no Python": "def f(x) return",
    "an infinite answer": "import itertools\ndef f(x): return itertools.count()",
    "a cycle": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "depth": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "a big answer": "def f(x): return 'x' * (200 << 20)",
}

GOLD = """
import math
for x in (42, 43):
    value = f(x)
    assert value == x * x
    assert abs(value - x * x) < 1e-6 and math.isclose(value, x * x) and sorted([value, 1764])[0] == 1764
assert f(42) == 1764
"""


def test_the_gold_of_the_cheats_has_a_solution() -> None:
    assert code(GOLD, "def f(x): return x * x", {}) == 1.0


#: Golds that these cheats would pass if tests and program shared a process.
FOOLED = {
    "sys.exit": GOLD,
    "os._exit": GOLD,
    "exit when called": GOLD,
    "sys.exit when called": GOLD,
    "atexit": GOLD,
    "equal to everything": "assert f(42) == 1764",
    "equal to everything, no int": "assert f(42) == 1764 and abs(f(42) - 1764) < 1e-6 and 5 in [f(1)]",
    "everything is what f is": "assert abs(f - 1764) < 1e-6",
    "patched builtins": "assert abs(f(42) - 1764) < 1e-6",
    "patched math": "import math\nassert math.isclose(f(42), 1764)",
    "patched operator": "import operator\nassert operator.eq(f(42), 1764)",
    "frames": "assert f(42) == 1764",
}


@pytest.mark.parametrize("name", FOOLED)
def test_cheat_that_one_process_would_pay(name: str) -> None:
    assert run(f"{CHEATS[name]}\n{FOOLED[name]}").why == "ok"
    assert code(FOOLED[name], CHEATS[name], {}) == 0.0


@pytest.mark.parametrize("name", CHEATS)
def test_cheat(name: str) -> None:
    assert code(GOLD, CHEATS[name], {"timeout": 2.0}) == 0.0


#: What a program writes to the tests' end instead of the answers of the link.
FORGED = {
    "success": b"pass\n" * 9,
    "an endless message": (1 << 40).to_bytes(8, "big") + b"x" * 100,
    "an endless list": (14).to_bytes(8, "big") + b"l99999999999999;"[:14],
    "nothing in a message": (0).to_bytes(8, "big"),
    "a return that was not asked for": (11).to_bytes(8, "big") + b"t1;s6;return" + b"\0" * 80,
    "a module that does not exist": (26).to_bytes(8, "big") + b"t2;s6;returnm" + b"math.nonsense;",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_messages(name: str) -> None:
    forge = (
        "import os, time\ndef f(x):\n    for fd in range(3, 64):\n"
        f"        try: os.write(fd, {FORGED[name]!r})\n        except OSError: pass\n"
    )
    assert code(GOLD, f"{forge}\nf(0); time.sleep(0.2)", {"timeout": 2.0}) == 0.0
    assert code(GOLD, forge, {"timeout": 2.0}) == 0.0


#: Golds in which a StopIteration would end the loop over the cases, without an assert being run or as true.
LOOPS = [
    "assert all(map(lambda c: f(c[0]) == c[1], [(1, 1), (2, 4)]))",
    "for got, want in zip(map(f, [1, 2]), [1, 4]): assert got == want\nassert f",
    "for got in iter(lambda: f(2), None): assert got == 4; break",
    "for got in map(len, [f(2)]): assert got == 4",
    "for got in map(str, [f(2)]): assert got == '4'",
    "for got in map(lambda x: f(x)[0], [2]): assert got == 4",
]


@pytest.mark.parametrize("gold", LOOPS)
@pytest.mark.parametrize(
    "error", ["StopIteration", "StopAsyncIteration", "__import__('builtins').StopIteration(3)"]
)
def test_a_program_does_not_end_the_loops_of_its_tests(gold: str, error: str) -> None:
    raises = f"def stop(*a): raise {error}\n"
    assert code(gold, f"{raises}f = stop", {}) == 0.0
    special = ("len", "str", "getitem", "iter", "bool", "repr", "getattr")
    methods = "".join(f"    __{name}__ = stop\n" for name in special)
    assert code(gold, f"{raises}class E:\n{methods}def f(x): return E()", {}) == 0.0


def test_an_iteration_ends_where_it_should() -> None:
    gold = (
        "assert list(f(3)) == [0, 1, 2] and list(zip(f(2), 'ab')) == [(0, 'a'), (1, 'b')]\n"
        "it = f(0)\ntry: next(it)\nexcept StopIteration: pass\nelse: assert False\n"
        "assert g(iter([7]).__next__) == [7]"
    )
    program = (
        "def f(n): yield from range(n)\ndef g(more):\n    found = []\n"
        "    try:\n        while True: found.append(more())\n    except StopIteration: return found"
    )
    assert code(gold, program, {}) == 1.0


FRAMEWORK = """
import unittest
class T(unittest.TestCase):
    def test(self): self.assertEqual(f(1), 2)
unittest.main()
"""

# --- what the tests may do with a program -------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "program"),
    [
        ("a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]", "def f(a): a.sort()"),
        ("a = {1: 2}\nf(a)\nassert a == {1: 2, 3: 4}", "def f(a): a[3] = 4"),
        ("a, b = [3, 1], {1: 2}\nf(a, m=b, a=1)\nassert a == [1, 3] and b == {}",
         "def f(x, *, m, a):\n    x.sort()\n    m.clear()"),
        ("a = [[2], [1]]\nf(a=a)\nassert a == [[1], [2]]", "def f(a): a.sort()"),
        ("assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0", "def f(n): yield from range(n)"),
        ("assert f(lambda x: x + 1, 3) == 4", "def f(g, x): return g(x)"),
        ("assert f(2)(3) == 5", "def f(a): return lambda b: a + b"),
        ("s = S()\ns.push(1)\nassert s.pop() == 1 and s.size == 0 and len(s) == 0 and not s",
         "class S:\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x)\n"
         "    def pop(self): return self.a.pop()\n    size = property(lambda self: len(self.a))\n"
         "    def __len__(self): return len(self.a)"),
        ("assert P(1) == P(1) and P(1) != P(2) and P(1) != 1",
         "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int"),
        ("try:\n    f(0)\n    assert False\nexcept ZeroDivisionError as e:\n    assert 'zero' in str(e)",
         "def f(x): return 1 / x"),
        ("assert f(x=1, y=2) == [1, 2] and f(*(3, 4)) == [3, 4]", "def f(x, y): return [x, y]"),
        ("assert N == 5 and math.pi > 3", "import math\nN = 5"),
        ("assert type(f()) is dict and f() == {'a': 2}",
         "from collections import Counter\ndef f(): return Counter('aa')"),
        ("assert f(F(1, 3)) == F(2, 3) and f(D('0.1')) == D('0.2')", "def f(x): return 2 * x\n"
         "from fractions import Fraction as F\nfrom decimal import Decimal as D"),
        ("assert sum(10, 15) == 6", "def sum(a, b): return 6"),
        (FRAMEWORK, "def f(x): return 2"),
    ],
)  # fmt: skip
def test_tests_that_pass(gold: str, program: str) -> None:
    assert code(gold, program, {"entry_point": "sum"}) == 1.0


def test_a_wrong_program_fails_a_test_framework() -> None:
    assert code(FRAMEWORK, "def f(x): return 3", {}) == 0.0


def test_changes_in_place_are_seen_whatever_they_are() -> None:
    gold = "a = [3, 1]\nf(a=a)\nassert a == [1, 3]"
    assert code(gold, "def f(a): a.reverse()", {}) == 1.0
    assert code(gold, "def f(a): pass", {}) == 0.0
    assert code(gold, "def f(a): a.clear()", {}) == 0.0


CHECK = "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n"


@pytest.mark.parametrize("gold", [CHECK, json.dumps(["import math", CHECK]), CHECK + "check(f)"])
def test_check_is_called(gold: str) -> None:
    assert code(gold, "def f(x): return x * x", {"entry_point": "f"}) == 1.0
    assert code(gold, "def f(x): return x", {"entry_point": "f"}) == 0.0


def test_humaneval_as_it_is_published() -> None:
    problems = rows("humaneval.jsonl")[:5]
    for problem in problems:
        meta = {"entry_point": problem["entry_point"]}
        assert code(problem["test"], problem["prompt"] + problem["canonical_solution"], meta) == 1.0
        assert code(problem["test"], problem["prompt"] + "    return None", meta) == 0.0


#: What tests something when it is run, and what does not.
REACHED = [
    "if f(1) != 1: raise SystemExit('wrong')",
    "import sys\nsys.exit(f(1) != 1)",
    "def test_f(): assert f(1) == 1\ntest_f()",
    "def a(): assert f(1) == 1\ndef test_f(): a()\nfor test in [test_f]: test()",
    "def test_f(): assert f(1) == 1\nfor n, t in list(globals().items()):\n    if n[:5] == 'test_': t()",
    "class T:\n    def test(self): assert f(1) == 1\nT().test()",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 1)\n"
    "if __name__ == '__main__': unittest.main()",
    json.dumps(["def test_f(): assert f(1) == 1", "test_f()"]),
]
UNREACHED = [
    "f(1)",
    "def test_f(): assert f(1) == 1",
    "def a(): assert f(1) == 1\ndef test_f(): a()",
    "class T:\n    def test(self): assert f(1) == 1",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 1)",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 1)\n"
    "unittest.main(exit=False)",
    json.dumps(["def test_f(): assert f(1) == 1", "x = 1"]),
]


@pytest.mark.parametrize("gold", REACHED)
def test_tests_that_are_run(gold: str) -> None:
    assert code(gold, "def f(x): return x", {}) == 1.0
    assert code(gold, "def f(x): return 0", {}) == 0.0


@pytest.mark.parametrize("gold", UNREACHED)
def test_tests_that_nothing_runs_are_an_error(gold: str) -> None:
    with pytest.raises(ValueError, match="test nothing"):
        code(gold, "def f(x): return x", {"entry_point": "f"})


def test_the_score_is_the_share_of_asserts_that_pass() -> None:
    gold = json.dumps(
        ["import math", "assert f(1) == 1", "assert f(2) == 4", "assert f(math.inf) == math.inf"]
    )
    assert code(gold, "def f(x): return x", {}) == pytest.approx(2 / 3)
    assert code(gold, "def f(x): return x * x", {}) == 1.0
    hangs = "def f(x):\n    while x == 2: pass\n    return x"
    assert code(gold, hangs, {"timeout": 1.0}) == pytest.approx(1 / 3)  # what came before counts
    assert code(gold, "import os\ndef f(x): return x if x < 2 else os._exit(0)", {}) == pytest.approx(1 / 3)


PAIRS = json.dumps([["1 2\n", "3\n"], ["10 -3\n", "7"], ["x", "no number\n"]])
ADD = "try:\n    print(sum(map(int, input().split())))\nexcept ValueError:\n    print('no number')"


@pytest.mark.parametrize(
    ("program", "score"),
    [
        (ADD, 1.0),
        (ADD.replace("))\n", "), '  ')\n").replace("'no number'", "'no number\\n\\n'"), 1.0),
        ("print(3)", 1 / 3),
        (f"{ADD}\nraise SystemExit(1)", 0.0),
        ("import sys\nprint(len(sys.stdin.read()))", 0.0),
        ("while True: pass", 0.0),
        ("while True: print(3)", 0.0),
        ("print(' 3')", 0.0),
        ("print(3); print(3)", 0.0),
        ("", 0.0),
    ],
)
def test_stdio(program: str, score: float) -> None:
    assert code(PAIRS, program, {"kind": "stdio", "timeout": 1.0}) == pytest.approx(score)


def test_runs_of_one_problem_do_not_know_of_each_other() -> None:
    counts = "import os\nprint(len(os.listdir('/tmp')))\nopen('/tmp/seen', 'w').close()"
    assert code(json.dumps([["", "0"]] * 3), counts, {"kind": "stdio"}) == 1.0


# --- golds and options that are the problem's fault ----------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "meta", "message"),
    [
        ("assert (", {}, "not Python"),
        ("import numpy\nassert f(1)", {}, "numpy"),
        (json.dumps(["import math"]), {}, "no assert"),
        (CHECK, {}, "entry_point"),
        (CHECK, {"entry_point": "f(1); x"}, "entry_point"),
        (json.dumps(["assert 1", 2]), {}, "strings"),
        (json.dumps(["assert 1"] * 2000), {}, "more than"),
        ("[]", {"kind": "stdio"}, "pairs"),
        ("1", {"kind": "stdio"}, "pairs"),
        ('[["1"]]', {"kind": "stdio"}, "not a pair"),
        ("assert 1", {"kind": "java"}, "kind"),
        ("assert 1", {"timeout": 0}, "timeout"),
        ("assert 1", {"timeout": float("nan")}, "timeout"),
        ("assert 1", {"timeout": True}, "timeout"),
        ("assert 1", {"memory_mb": "512"}, "memory_mb"),
        ("assert 1", {"entry_point": 1}, "entry_point"),
    ],
)
def test_unusable_problems_are_errors(gold: str, meta: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code(gold, "f = print", meta)


# --- in the pool --------------------------------------------------------------------------------------


def test_a_hang_is_wrong_and_no_error_whatever_its_own_limit() -> None:
    hang = "while True: pass"
    items = [
        item("assert f(1) == 1", hang),
        item(PAIRS, hang, kind="stdio", timeout=60.0),
        item("assert f(1) == 1", "def f(x): return x"),
        item("assert (", "def f(x): return x"),
    ]
    with GraderPool(workers=1, timeout_s=2.0) as pool:
        pool.gather(pool.submit([items[2]]))
        started = time.monotonic()
        verdicts = pool.gather(pool.submit(items))
    assert time.monotonic() - started < 2 * (2.0 + 0.5) + 3
    assert [(v.correct, v.error is None) for v in verdicts] == [
        (False, True),
        (False, True),
        (True, True),
        (False, False),
    ]


def test_memory_is_the_sandboxs_own() -> None:
    big = "x = bytearray(300 << 20)\ndef f(x): return x"
    with GraderPool(workers=1, timeout_s=10.0) as pool:
        items = [item("assert f(1) == 1", big, memory_mb=mb) for mb in (600, 200)]
        assert [v.correct for v in pool.gather(pool.submit(items))] == [True, False]


def test_no_program_no_sandbox() -> None:
    with GraderPool(workers=1) as pool:
        (verdict,) = pool.gather(pool.submit([GradeItem("code", "assert f(1)", "def f(x): return 1", {})]))
    assert (verdict.answer, verdict.correct, verdict.error) == (None, False, None)


def test_the_clock_is_the_pools() -> None:
    assert clock.left() == float("inf")


# --- the wire -----------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False) | st.integers(10**400, 10**401) | st.characters(categories=["Cs"]),
    lambda inner: st.lists(inner) | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers(), inner) | st.sets(st.integers()) | st.frozensets(st.text()),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_plain_values_come_over_as_they_are(value: object) -> None:
    link = Link(0, 0, open_all=False)
    back = Decoder(link, link.encode(value)).value()
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, dict | set | frozenset | list | tuple)


@settings(max_examples=500)
@given(st.binary() | st.text("NTFifcsbBldtSZoyqm0123456789;-").map(str.encode))
def test_any_bytes_are_a_built_in_value_or_refused(data: bytes) -> None:
    try:
        value = Decoder(Link(0, 0, open_all=False), data).value()
    except Exception:
        return
    assert type(value).__module__ in ("builtins", "fractions", "decimal") or type(value) is Remote
