"""Domains: what a binding declares that it offers is drawn within, asked for alone, and checked."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

from lora.errors import ArgumentError
from lora.testing import domains
from lora.testing.binding import Lacks, PlainCard, PlainPair, Term
from lora.testing.domains import VOCABULARY, within
from lora.testing.plugin import (
    MEMBERS,
    OUTSIDE_ENOUGH,
    BrokenBinding,
    Subject,
    _reached,
    load_binding,
    requirement,
)
from lora.testing.remote import NoAnswer
from lora.testing.report import lines_of, red
from lora.testing.strategies import layers
from tests.bindings.numpy_only import NumpyOnly
from tests.properties import test_r04_router as r04
from tests.properties import test_r08_several_adapters as r08
from tests.properties import test_r20_merging as r20

ONE = np.ones((1, 1), np.float32)
TERM = Term(ONE, ONE, 1.0, 1.0)


def forward(x=ONE, **terms):
    return "forward", (x, ONE, None, terms)


def card(name="a", module="m", dtype=np.float32, rank=1, scaling=1.0):
    pair = PlainPair(np.ones((2, rank), dtype), np.ones((rank, 3), dtype), scaling)
    return PlainCard(name, rank, 1.0, (module,), {module: pair}, {}, {})


def merge(*cards, strategy="average", **options):
    return "merge", (list(cards), strategy, options, None, None)


@requirement("R24.11")
@pytest.mark.parametrize(
    ("limits", "inside", "outside", "reason"),
    [
        ({"dtypes": ["float32"]}, forward(), forward(ONE.astype("f8")), "float64"),
        ({"terms": 1}, forward(a=TERM), forward(a=TERM, b=TERM), "2 adapters in a layer"),
        ({"dimensions": 2}, forward(), forward(ONE[0]), "x of 1 dimensions"),
        (
            {"scaling": "nonzero"},
            forward(a=TERM._replace(weight=0.0)),
            forward(a=TERM, b=TERM._replace(scaling=0.0)),
            "a scaling of 0",
        ),
        ({"rules": ["rank"]}, ("extract", ({}, {}, 1, None, None)), None, ""),
        (
            {"rules": ["rank", "error"]},
            ("extract", ({}, {}, None, None, 0.5)),
            ("extract", ({}, {}, None, 0.5, None)),
            "a rank by energy",
        ),
        ({"strategies": {"cat": {}}}, merge(strategy="cat"), merge(), "average"),
        # What no implementation has is asked for, so that it is refused.
        ({"strategies": {"cat": {}}}, merge(strategy="linear"), merge(strategy="slerp"), "slerp"),
        (
            {"strategies": {"ties": {"elect": ["mass"]}}},
            merge(strategy="ties", elect="median"),
            merge(strategy="ties", elect="count", density=0.25),
            "ties with elect = 'count'",
        ),
        (
            {"strategies": {"ties": {"elect": ["count"]}}},
            merge(strategy="ties", elect="count", density=0.25),
            merge(strategy="ties"),
            "ties with elect = 'mass'",
        ),
        *[
            ({"cards": "alike"}, merge(card(), card("b")), merge(card(), other), "or of other")
            for other in (
                card(),
                card("b", module="n"),
                card("b", dtype=np.float64),
                card("b", rank=2),
                card("b", scaling=2.0),
            )
        ],
    ],
)
def test_a_call_outside_of_a_domain_is_never_made(limits, inside, outside, reason):
    calls = []
    member, arguments = inside
    within(member, lambda *values: calls.append(values), limits)(*arguments)
    assert calls == [arguments]
    if outside:
        with pytest.raises(Lacks, match=f"{member} is declared without .*{reason}"):
            within(member, lambda *values: calls.append(values), limits)(*outside[1])
    assert len(calls) == 1
    assert not issubclass(Lacks, Exception)  # which every test for a refusal accepts


@requirement("R24.11")
@pytest.mark.parametrize("vector", [[0.0, 0.0], [-0.0, 1e-200], [1e200, 0.0], [4.0, 4.0]])
def test_a_router_meets_no_vector_of_another_length(vector):
    meanings = {"short": [1.0, 0.0], "long": [3.0, 4.0], "outside": vector}
    given_embed = within("make_router", lambda embed: embed, {"lengths": [1.0, 5.0]})
    embed = given_embed(lambda texts: np.array([meanings[text] for text in texts]))
    assert embed(["short", "long"]).tolist() == [[1.0, 0.0], [3.0, 4.0]]
    with pytest.raises(Lacks, match="vectors of lengths 1 to 5"):
        embed(["short", "outside"])


@requirement("R24.11")
def test_strategies_draw_within_the_domains_where_they_can(monkeypatch):
    limits = {
        "forward": {"dtypes": ["float16"], "terms": 3, "dimensions": 3, "scaling": "nonzero"},
        "make_router": {"lengths": [1.0, 1e9]},
        "merge": {"cards": "alike", "strategies": {"weighted": {"normalize": [True]}}},
    }
    monkeypatch.setattr(domains, "DECLARED", limits)
    inside = within("merge", lambda *_: None, limits["merge"])
    layer_of = within("forward", lambda *_: None, limits["forward"])

    @settings(max_examples=60, derandomize=True, database=None, deadline=None)
    @given(
        layer=layers(),
        more=st.tuples(r08.several(), layers(min_terms=4, max_terms=4)),
        register=r04.registers(),
        cards=r20.several(least=2, dtype=None, everywhere=False),
        data=st.data(),
    )
    def check(layer, more, register, cards, data):
        layer_of(*layer)
        several, four = (len(terms) for *_, terms in more)
        assert several in (2, 3)
        assert four == 4  # drawn all the same, and then not called
        assert all(1 <= math.hypot(*vector) <= 1e9 for vector in register[1].values())
        options, *_ = r20.choose(data, cards, "weighted")
        assert options == {"normalize": True}
        inside(cards, "weighted", options, None, None)

    check()


@requirement("R24.11")
@pytest.mark.parametrize(
    ("declared", "where"),
    [
        (3, "domains: expected a map, found 3"),
        ({"route": {}}, "domains: expected one of forward, .*, found 'route'"),
        ({"forward": []}, r"domains: forward: expected a map, found \[\]"),
        ({"forward": {"ranks": 4}}, "forward: expected one of dtypes, terms, .*, found 'ranks'"),
        *[
            ({member: {name: value}}, f"domains: {member}: {name}: expected .*, found ")
            for member, name, values in (
                (
                    "forward",
                    "dtypes",
                    [[], "float32", ["float8"], ["float32", "float8"], [[]], None],
                ),
                ("forward", "terms", [0, 1.0, True, "1", None]),
                ("forward", "dimensions", [0, None]),
                ("forward", "scaling", ["zero", True]),
                ("extract", "rules", [["size"], ["rank", "size"], []]),
                ("merge", "cards", ["any", 1]),
                ("merge", "strategies", [{}, ["ties"], {"linear": {}}, {"ties": {"elect": []}}]),
                ("merge", "strategies", [{"ties": {"t": [1]}}, {"ties": {"elect": ["median"]}}]),
                ("make_router", "lengths", [[1], [2, 1], [-1, 1], ["0", "1"], 3, [math.nan, 1]]),
            )
            for value in values
        ],
    ],
)
def test_an_unknown_domain_or_value_is_refused_by_name(declared, where, monkeypatch):
    name = "lora.testing.reference.Reference.domains"
    monkeypatch.setattr(name, declared, raising=False)
    with pytest.raises(ArgumentError, match=where):
        load_binding(None)


@requirement("R24.12")
def test_the_simplest_call_lies_within_any_domain():
    limits = {
        "forward": {"dtypes": ["bfloat16"], "terms": 1, "dimensions": 3, "scaling": "nonzero"},
        "merge": {"cards": "alike", "strategies": {"ties": {"elect": ["count"]}}},
        "extract": {"rules": ["error"]},
        "make_router": {"lengths": [2.0, 3.0]},
    }
    assert set(limits) == set(VOCABULARY)
    for declared in ({}, limits):
        calls = []

        class Noting(NumpyOnly):
            domains = declared

            def forward(self, *arguments, calls=calls):
                calls.append(arguments)
                return super().forward(*arguments)

        subject = Subject(Noting())
        for member in MEMBERS:
            assert callable(getattr(subject, member))
            assert callable(getattr(subject, member))
        assert len(calls) == 1


@requirement("R24.12")
@pytest.mark.parametrize("error", [ValueError("not today"), NoAnswer("the process ended")])
def test_a_broken_member_is_no_refusal_and_is_tried_once(error):
    calls = []

    def select(*_):
        calls.append(1)
        raise error

    router = SimpleNamespace(register=lambda *_: None, select=select)
    subject = Subject(SimpleNamespace(make_router=lambda _: router))
    for _ in "12":
        with pytest.raises(BrokenBinding, match=f"^binding broken: member make_router .*{error}"):
            subject.make_router(len)
    assert len(calls) == 1
    assert not issubclass(BrokenBinding, Exception)


OWN = """
import pytest
from hypothesis import given, strategies as st
from lora.testing.strategies import layers


class BINDING:
    name, version = "mine", "1"
    domains = {"forward": {"terms": 1}}
    expected_failures = {
        "R3.11": {"test_r03_manager.py::test_layer_1_is_never_layer_11": ("why", "where")}
    }

    def forward(self, x, weight, bias, terms):
        return len(terms)

    def match_targets(self, names, targets):
        raise ValueError("not today")


@pytest.mark.requirement("R2.2")
@given(layers())
def test_inside(impl, layer):
    assert len(layer[-1]) <= 1
    assert impl.forward(*layer) <= 1


@pytest.mark.requirement("R8.1")
@given(layers(min_terms=2))
def test_outside(impl, layer):
    assert impl.forward(*layer) == 0


@pytest.mark.requirement("R2.5")
@given(layers(max_terms=1), layers(min_terms=2), st.booleans())
def test_both(impl, layer, several, which):
    assert impl.forward(*(several if which else layer)) <= 1


@pytest.mark.requirement("R2.6")
@given(layers())
def test_wrong(impl, layer):
    assert impl.forward(*layer) == 7


@pytest.mark.requirement("R3.11")
def test_layer_1_is_never_layer_11(impl):
    assert impl.match_targets(["11"], ["1"]) == []


@pytest.mark.requirement("R7.2")
def test_refused(impl):
    with pytest.raises(Exception):
        impl.match_targets([], [])
"""


def ends_of(examples):
    """How each example ends, where a false one lies outside of the domains."""

    def example(is_inside):
        if not is_inside:
            raise Lacks("forward is declared without float64")

    run, ends = _reached(example, []), []
    for is_inside in examples:
        try:
            run(is_inside)
            ends.append("reached")
        except UnsatisfiedAssumption:
            ends.append("outside")
        except pytest.skip.Exception as skipped:
            ends.append(skipped.msg)
    return ends


@requirement("R24.11")
@pytest.mark.filterwarnings("ignore:Using `reject` outside")
def test_no_more_is_drawn_where_the_first_examples_all_lay_outside():
    outside = ["outside"] * (OUTSIDE_ENOUGH - 1)
    assert ends_of([False] * OUTSIDE_ENOUGH) == [*outside, "forward is declared without float64"]
    assert ends_of([True] + [False] * 99) == ["reached"] + ["outside"] * 99


@requirement("R24.11", "R24.12")
def test_a_report_tells_what_lies_outside_and_once_what_is_broken(tmp_path):
    (tmp_path / "test_r03_manager.py").write_text(OWN)
    command = [sys.executable, "-m", "pytest", "-p", "lora.testing.plugin", "-c", os.devnull]
    command += ["--rootdir", ".", "--conformance-json", "report.json", "test_r03_manager.py"]
    command += ["--binding", "test_r03_manager:BINDING"]
    environment = {**os.environ, "LORA_PROFILE": "quick"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text())
    entries = report["requirements"]
    cause = "binding broken: member match_targets refuses the simplest legal input"
    cause += ": ValueError: not today"
    assert {name: (entry["verdict"], entry["reason"]) for name, entry in entries.items()} == {
        "R2.2": ("passed", ""),
        "R8.1": ("skipped", "forward is declared without 2 adapters in a layer"),
        "R2.5": ("passed", ""),
        "R2.6": ("failed", ""),
        "R3.11": ("broken", cause),
        "R7.2": ("broken", cause),
    }
    assert (done.returncode, red(report)) == (1, ["R2.6", "R3.11", "R7.2"])
    text = "\n".join(lines_of(report))
    assert text.startswith(f"{cause}\n  not tested: R3.11, R7.2\nR2.6 failed: ")
    assert text.count("not today") == 1
