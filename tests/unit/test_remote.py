"""A binding in another process: its answers are as in this one, and no fault of it is a refusal."""

import ast
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora.errors import ArgumentError
from lora.testing import remote, serve
from lora.testing.binding import Lacks, Term
from lora.testing.plugin import requirement, started
from lora.testing.remote import NoAnswer, RefusalError, RemoteBinding
from lora.testing.report import run_suite

CHILD = Path(__file__).with_name("binding_child.py")


def child(fault, notes):
    return shlex.join([sys.executable, str(CHILD), fault, str(notes)])


@requirement("R24.7")
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("prints", "said what is no JSON .*: 'Loading weights …'"),
        ("dies", "ended with status 3; it wrote: Segfault in layer 3"),
        ("is killed", "was killed by SIGKILL"),
        ("is silent", "gave no answer in 2 seconds"),
        ("half a line", 'ended with status 0, in the middle of the line \'{"id": 1, "o\''),
        ("an endless line", "said a line of more than 4 MiB"),
        ("closes its output", "closed its standard output"),
        ("no JSON", "said what is no JSON .*'{]'"),
        ("no text", "said what is no JSON .*utf-8"),
        ("no message", r"no answer to call 1: '\[1\]'"),
        ("too deep", "said what is no JSON .*recursion"),
        ("another id", 'no answer to call 1: \'{"id": 99'),
        ("NaN", "said what is no JSON .NaN is no JSON"),
        ("no outcome", "answered match_targets wrongly: KeyError.'ok'"),
        ("no kind", "answered match_targets wrongly: ValueError"),
        ("an unknown kind", "answered match_targets wrongly"),
        ("another type", "answered match_targets wrongly: TypeError.'a float"),
        ("an object", "answered match_targets wrongly: .*an object that stays in the process"),
        ("half a card", "answered match_targets wrongly: TypeError.*missing"),
        ("a shape that does not fit", r"the bytes of float32 \[2, 2\], found 4 bytes"),
        ("a negative shape", r"expected an array .*found float32 \[-1, -1\]"),
        ("an unknown dtype", "expected an array .*found object"),
        ("no base64", "answered match_targets wrongly: Error"),
        ("an unknown callback", "answered match_targets wrongly: KeyError.7"),
        # Before the next call, or in place of its answer.
        ("says more", "said what (nobody had asked for|is no JSON .*): 'done"),
    ],
)
def test_what_is_no_answer_is_told_with_its_cause_and_the_next_call_is_answered(
    fault, cause, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "LONGEST_LINE", 1 << 22)
    binding = RemoteBinding(child(fault, tmp_path / "notes"), call_seconds=2)
    assert not issubclass(NoAnswer, Exception)  # which every test for a refusal accepts
    if fault == "says more":
        binding.match_targets([], [])
    with pytest.raises(NoAnswer, match=cause):
        binding.match_targets(["a.b", "ab"], ["b"])
    assert binding.match_targets(["a.b", "ab"], ["b"]) == ["a.b"]
    binding.close()
    notes = (tmp_path / "notes").read_text()
    assert (notes.count("started"), notes[-7:]) == (2, "closed\n")


@requirement("R24.7")
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("dies at start", "ended with status 3; it wrote: Segfault in layer 3"),
        ("is silent at start", "gave no answer in 2 seconds"),
        ("prints at start", "said what is no JSON .*: 'Loading weights …'"),
        ("another protocol", "speaks protocol 2, not 1"),
        ("no name", "no hello of protocol 1: KeyError.'name'"),
        ("members are a number", "no hello of protocol 1: TypeError"),
        ("failures without reasons", "no hello of protocol 1: AttributeError"),
        ("domains are a number", "no hello of protocol 1: TypeError"),
    ],
)
def test_a_process_that_does_not_start_is_told_in_one_line(fault, cause, tmp_path):
    with pytest.raises(NoAnswer, match=cause):
        RemoteBinding(child(fault, tmp_path / "notes"), start_seconds=2)
    if fault != "is silent at start":
        with pytest.raises(ArgumentError, match=cause) as error:
            started(child(fault, tmp_path / "notes"), 60.0)
        assert "\n" not in str(error.value)


FAULTS = {
    "no file": (None, r"b\.py: expected a file NAME\.py; give the path"),
    "no package": (
        "import os\nimport no_such_package",
        r"b\.py:2: ModuleNotFoundError: No module named 'no_such_package'; install it for /",
    ),
    "no syntax": ("x = (\n", r"b\.py:1: SyntaxError: '\(' was never closed; LORA_DEBUG=1 shows"),
    "an error": ("\n\nint('x')", r"b\.py:3: ValueError: invalid literal .*; LORA_DEBUG=1 shows"),
    "an error within": ("import json\njson.loads('{')", r"b\.py:2: JSONDecodeError: Expecting"),
    "no object": ("BINDUNG = 1", r"b\.py: AttributeError: module 'b' has no attribute 'BINDING'"),
    "no version": (
        "class BINDING:\n    name = 'b'",
        r"b\.py: AttributeError: 'BINDING' object has no attribute 'version'",
    ),
    "a constructor": (
        "class BINDING:\n    def __init__(self):\n        1 / 0",
        r"b\.py:3: ZeroDivisionError: division by zero",
    ),
    "no JSON": (
        "class BINDING:\n    name, version, missing = 'b', 1, {'bind': {1}}",
        r"b\.py: TypeError: Object of type set is not JSON",
    ),
    "a long text": ("raise ValueError('x' * 9999)", r"b\.py:1: ValueError: x{1000}; LORA"),
    "two lines": ("raise ValueError('one\\n two')", r"b\.py:1: ValueError: one two; LORA"),
}


@requirement("R24.7")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_binding_that_can_not_be_served_is_told_with_its_place_and_no_traceback(fault, tmp_path):
    source, cause = FAULTS[fault]
    if source is not None:
        (tmp_path / "b.py").write_text(source)
    command = shlex.join([sys.executable, serve.__file__, str(tmp_path / "b.py")])
    with pytest.raises(ArgumentError, match=cause) as error:
        started(command, 60.0)
    assert "one that did not start: the process ended with status 1; it wrote: " in str(error.value)
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


@requirement("R24.7")
def test_the_file_that_serves_says_how_it_is_called_and_that_numpy_is_missing(tmp_path):
    command = [sys.executable, serve.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "usage: serve.py FILE_OF_A_BINDING [NAME]\n")
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy here')")
    shutil.copy(serve.__file__, tmp_path / "serve.py")
    command = [sys.executable, str(tmp_path / "serve.py"), "b.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no numpy here; install NumPy for /" in done.stderr


@requirement("R24.7")
def test_the_suite_says_directly_that_a_command_did_not_start(tmp_path):
    for command, cause in (
        ("gone", "one that did not start: gone can't be started: No such file"),
        ("'' -x", "one that did not start: it names no program"),
        ("'x", "one that did not start: No closing quotation"),
    ):
        with pytest.raises(ArgumentError, match=cause) as error:
            run_suite(None, command=command, only=["R3.11"])
        assert str(error.value).startswith(f"binding {command!r}: expected a process that says")


@requirement("R24.7")
def test_a_process_that_starts_no_more_is_given_up(tmp_path):
    binding = RemoteBinding(child("dies", tmp_path / "notes"))
    with pytest.raises(NoAnswer, match="status 3"):
        binding.match_targets([], [])
    binding._command = [str(tmp_path / "gone")]
    for cause in [*["gone can't be started: No such file"] * remote.STARTS, "failed to start 3"]:
        with pytest.raises(NoAnswer, match=cause):
            binding.match_targets([], [])


@requirement("R24.7")
def test_a_process_that_dies_fails_that_property_and_the_others_have_their_verdicts(tmp_path):
    report = run_suite(None, command=child("dies at heads", tmp_path / "notes"), only=["R3.11"])
    tests = report["requirements"]["R3.11"]["tests"]
    failed = [test["falsified"] for test in tests if test["verdict"] == "failed"]
    assert len(failed) >= 2
    assert all("status 3; it wrote: Segfault in layer 3" in falsified for falsified in failed)
    assert {test["verdict"] for test in tests} == {"failed", "passed", "skipped"}
    starts = (tmp_path / "notes").read_text().count("started")
    assert starts in (len(failed), len(failed) + 1)  # it is not started for nothing
    assert report["binding"] == {"name": "child", "version": "1"}


CAUSES = {
    "prints": "said what is no JSON",
    "prints without end": "said what is no JSON",
    "dies": "ended with status 3; it wrote: Segfault in layer 3",
    "is silent": "no (verdict after|answer in) 9",
    "half a line": "ended with status 0, in the middle of the line",
    "an endless line": "said a line of more than 64 MiB|no verdict after 9",
    "no message": "no answer to call",
    "another type": "answered match_targets wrongly: TypeError",
}
FAULTY_TEST = """
import pytest


@pytest.mark.requirement("R3.11")
@pytest.mark.parametrize("fault", [f"{when}/{name}" for name in FAULTS for when in ("at", "after")])
def test_it(impl, fault):
    when, _, name = fault.partition("/")
    if when == "at":
        with pytest.raises(Exception):
            impl.match_targets([name], [])
    assert impl.match_targets(["a.b"], ["b"]) == ["a.b"]
"""


@requirement("R24.7", "R24.2")
def test_each_fault_of_a_process_has_its_verdict_and_the_next_property_runs(tmp_path):
    (tmp_path / "test_own.py").write_text(f"FAULTS = {list(CAUSES)}\n{FAULTY_TEST}")
    command = [sys.executable, "-m", "pytest", "-p", "lora.testing.plugin", "-c", os.devnull]
    command += ["--rootdir", ".", "--conformance-json", "report.json", "test_own.py"]
    command += ["--conformance-timeout", "9", "--binding-command", child("all", tmp_path / "notes")]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    entry = json.loads((tmp_path / "report.json").read_text())["requirements"]["R3.11"]
    tests = {test["test"]: test for test in entry["tests"]}
    assert len(tests) == 2 * len(CAUSES)
    for fault, cause in CAUSES.items():
        test = tests[f"test_own.py::test_it[at/{fault}]"]
        assert test["verdict"] == "failed"
        assert re.search(cause, test["falsified"])
        assert tests[f"test_own.py::test_it[after/{fault}]"]["verdict"] == "passed"


BINDING = r"""
import os

import numpy as np
from serve import Lacks, PlainCard, PlainPair


class Router:
    def __init__(self, embed):
        self.embed, self.known = embed, {}

    def register(self, name, texts, *, virtual=False):
        self.known[name] = (self.embed(texts), virtual)

    def select(self, query, top_k, threshold):
        return [(name, float(rows.sum())) for name, (rows, _) in self.known.items()]

    def select_many(self, queries, top_k, threshold):
        return [self.select(query, top_k, threshold) for query in queries]


class BINDING:
    name, version = "odd", 2.5
    missing = {"bind": "it plans nothing"}
    domains = {"forward": {"dtypes": ["float32"]}}
    expected_failures = {"R3.11": {"test_r03_manager.py::test_layer_1_is_never_layer_11": "ab"}}
    make_router = Router

    def bind(self):
        raise NotImplementedError

    def forward(self, x, weight, bias, terms):
        print("Loading weights")
        os.write(1, b"more\n")
        if x.dtype != np.float32:
            raise Lacks(f"{x.dtype} is not there")
        assert "int" not in terms, "no such term"
        return x

    def write_card(self, card):
        return card.name.encode()

    def read_card(self, data):
        pair = PlainPair(np.ones((1, 2), "f4")[::-1], np.ones((2, 1), ">f4"), float("-inf"))
        return PlainCard(data.decode(), 2, 1e300, ["q"], {"1": pair}, {"1": 1e6, "0": -0.0}, {})
"""


@pytest.fixture
def odd(tmp_path):
    (tmp_path / "odd-binding.py").write_text(BINDING)
    served = shlex.join([sys.executable, serve.__file__, str(tmp_path / "odd-binding.py")])
    binding = RemoteBinding(served, call_seconds=20)
    yield binding
    binding.close()


@requirement("R24.7")
def test_a_file_serves_what_its_binding_has_and_says(odd):
    assert (odd.name, odd.version, odd.missing) == ("odd", "2.5", {"bind": "it plans nothing"})
    assert odd.domains == {"forward": {"dtypes": ["float32"]}}
    assert [*odd.expected_failures["R3.11"].values()] == [("a", "b")]
    assert not hasattr(odd, "bind")
    assert not hasattr(odd, "merge")
    x = np.asfortranarray(np.array([[1, -0.0, np.nan], [np.inf, 5e-45, 2]], "f4"))
    answer = odd.forward(x, x, None, {})
    assert answer.dtype == x.dtype
    assert answer.tobytes() == x.tobytes()
    with pytest.raises(Lacks, match="float64 is not there"):
        odd.forward(x.astype("f8"), x, None, {})
    with pytest.raises(RefusalError, match="AssertionError: no such term") as refusal:
        odd.forward(x, x, None, {"int": 1})
    assert refusal.value.__notes__ == ["refused at odd-binding.py:37"]
    assert odd.write_card(odd.read_card("é".encode())) == "é".encode()
    card = odd.read_card(b"c")
    assert repr(card[:4]) == "('c', 2, 1e+300, ('q',))"
    assert repr(card.metadata) == "{'1': 1000000.0, '0': -0.0}"
    assert card.weights["1"].scaling == -np.inf
    assert card.weights["1"].B.tolist() == [[1], [1]]
    with pytest.raises(Lacks, match="a set can't be sent"):
        odd.write_card(card._replace(metadata={"a": {1}}))


@requirement("R24.7")
def test_routers_stay_in_the_process_and_call_back(odd):
    def embed(texts):
        return np.array([[len(texts), float(texts[0])]])

    first = odd.make_router(lambda texts: embed(texts) * 1)
    second = odd.make_router(lambda texts: embed(texts) * 2)
    first.register("a", ["1", "2"], virtual=True)
    second.register("a", ["1", "2"])
    assert first.select("x", 1, None) == [("a", 3.0)]
    assert second.select_many(["x", "y"], 1, None) == [[("a", 6.0)]] * 2
    with pytest.raises(RefusalError, match="could not convert string to float: 'text'"):
        first.register("b", ["text"])
    with pytest.raises(RefusalError, match="unregister"):
        first.unregister("a")
    handle, unneeded = first.handle, odd._process.unneeded
    del first
    gc.collect()  # the refusals' frames
    assert unneeded == [handle]
    assert len(odd._callbacks) == 1
    assert odd.make_router(embed).handle > handle
    odd._process._popen.kill()
    with pytest.raises(NoAnswer, match="SIGKILL"):
        second.select("x", 1, None)
    with pytest.raises(NoAnswer, match="that had this router has ended"):
        second.select("x", 1, None)
    assert odd.write_card(odd.read_card(b"c")) == b"c"


@requirement("R24.11")
def test_a_vector_that_a_router_in_a_process_does_not_take_is_no_refusal_and_ends_nothing(odd):
    def embed(texts):
        if texts == ["too long"]:
            raise Lacks("a vector of length 9")
        return np.ones((len(texts), 2))

    router, process = odd.make_router(embed), odd._process
    with pytest.raises(Lacks, match="of length 9"):
        router.register("a", ["too long"])
    router.register("b", ["short"])
    assert router.select("x", 1, None) == [("b", 2.0)]
    assert odd._process is process


@requirement("R24.7")
def test_the_session_on_the_page_is_what_both_sides_say(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/how-to/foreign-binding.md").read_text("utf-8")
    expected = re.findall(r"^    ([<>]) (.*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    shutil.copy(serve.__file__, tmp_path)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])  # noqa: S102 - our own page
    said, hear, say = [], remote._Process.hear, remote._Process.say

    def hears(process, *args):
        said.append(("<", hear(process, *args)))
        return said[-1][1]

    def says(process, message):
        said.append((">", message))
        say(process, message)

    monkeypatch.setattr(remote._Process, "hear", hears)
    monkeypatch.setattr(remote._Process, "say", says)
    binding = RemoteBinding(f"{shlex.quote(sys.executable)} serve.py my_binding.py")
    binding.match_targets(["layer.1.query", "layer.11.query"], ["1.query"])
    with pytest.raises(RefusalError):
        binding.match_targets(["query"], ["all-linear"])
    terms = {"a": Term(np.array([[1], [0]], "f4"), np.ones((1, 1), "f4"), 0.5, 1.0)}
    y = binding.forward(np.array([[1, 2]], "f4"), np.array([[3, 4]], "f4"), None, terms)
    assert y.tolist() == [[11.5]]
    with pytest.raises(Lacks):
        binding.forward(np.ones((1, 1)), np.ones((1, 1)), None, {})
    rows = {"open a file": [1.0, 0.0], "files": [0.6, 0.8]}
    router = binding.make_router(lambda texts: np.array([rows[text] for text in texts]))
    router.register("docs", ["open a file"])
    assert router.select("files", 1, None) == [("docs", 0.6)]
    del router
    binding.match_targets([], [])
    binding.close()
    assert said == [(side, json.loads(line)) for side, line in expected]


@requirement("R24.7")
def test_the_file_that_serves_a_binding_needs_numpy_alone():
    tree = ast.parse(Path(serve.__file__).read_text("utf-8"))
    nodes = list(ast.walk(tree))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [part.name for node in nodes if isinstance(node, ast.Import) for part in node.names]
    foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert foreign == {"numpy", "ml_dtypes"}
    alone = "import sys; sys.modules.update(dict.fromkeys(['lora', 'ml_dtypes']));"
    alone += f"import runpy; runpy.run_path({serve.__file__!r})['decode']"
    array = "({'array': {'dtype': 'bfloat16', 'shape': [1], 'data': 'gD8='}}, None)"
    command = [sys.executable, "-c", alone + array]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr.strip().endswith("Lacks: bfloat16 needs the package ml_dtypes")


LACKING = """
import pytest
from hypothesis import given, strategies as st
from lora.testing.binding import Lacks


class BINDING:
    name, version = "mine", "1"

    def match_targets(self, names, targets):
        if len(names) > 3:
            raise Lacks("at most 3 names")
        if names == targets and len(names) > 1:
            raise ValueError("no")
        return names


@pytest.mark.requirement("R3.11")
@given(st.integers(0, 6))
def test_some(impl, count):
    assert impl.match_targets(["a"] * count, ["b"]) == ["a"] * count


@pytest.mark.requirement("R4.1")
@given(st.integers(4, 9))
def test_none(impl, count):
    assert impl.match_targets(["a"] * count, []) == 1


@pytest.mark.requirement("R4.2")
@given(st.integers(2, 6))
def test_refused(impl, count):
    with pytest.raises(Exception):
        impl.match_targets(["a"] * count, ["a"] * count)


@pytest.mark.requirement("R4.3")
@given(st.integers(0, 6))
def test_wrong(impl, count):
    assert impl.match_targets(["a"] * count, ["b"]) == []


@pytest.mark.requirement("R4.4")
def test_one(impl):
    with pytest.raises(Exception):
        impl.match_targets(["a"] * 4, [])
"""


@requirement("R24.7", "R24.2")
@pytest.mark.parametrize("profile", ["quick", "ci"])
def test_an_example_that_an_implementation_lacks_is_neither_right_nor_wrong(tmp_path, profile):
    (tmp_path / "test_own.py").write_text(LACKING)
    command = [sys.executable, "-m", "pytest", "-p", "lora.testing.plugin", "-c", os.devnull]
    command += ["--rootdir", ".", "--binding", "test_own:BINDING", "test_own.py"]
    environment = {**os.environ, "LORA_PROFILE": profile}
    subprocess.run(
        [*command, "--conformance-json", "report.json"],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
    )
    entries = json.loads((tmp_path / "report.json").read_text())["requirements"]
    verdicts = {name: (entry["verdict"], entry["reason"]) for name, entry in entries.items()}
    assert verdicts == {
        "R3.11": ("passed", ""),
        "R4.1": ("skipped", "at most 3 names"),
        "R4.2": ("passed", ""),
        "R4.3": ("failed", ""),
        "R4.4": ("skipped", "at most 3 names"),
    }


@requirement("R24.7")
def test_a_large_message_to_a_process_that_does_not_read_ends_with_the_alarm(tmp_path):
    class Alarm(BaseException):
        pass

    def ring(*_):
        raise Alarm

    binding = RemoteBinding(child("does not read", tmp_path / "notes"))
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(Alarm):
            binding.match_targets(["x" * 10**6], [])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert binding.match_targets(["b"], ["b"]) == ["b"]
    binding.close()
