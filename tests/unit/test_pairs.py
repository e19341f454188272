"""Pairs: one binding reads the cards that another writes."""

import shlex
import sys
from types import SimpleNamespace

import pytest

from lora.errors import ArgumentError
from lora.testing import serve
from lora.testing.plugin import MEMBERS, Pair, Subject, requirement
from lora.testing.report import run_suite
from tests.bindings import numpy_only
from tests.bindings.numpy_only import BINDING as NUMPY

WHY = {"test_x.py::test_y": ("why", "where")}
OTHER = {"test_x.py::test_z": ("why not", "there")}


def part(name, member, **attributes):
    return SimpleNamespace(name=name, version="1", **{member: name.encode}, **attributes)


@requirement("R24.13")
def test_a_pair_has_the_writer_of_one_and_the_reader_of_the_other_and_nothing_else():
    writer = part("a", "write_card", forward=print, expected_failures={"R1.1": WHY, "R1.2": WHY})
    reader = part("b", "read_card", write_card=print, expected_failures={"R1.1": OTHER})
    pair = Pair(writer, reader)
    assert (pair.name, pair.version) == ("a writes, b reads", "1 and 1")
    assert (pair.write_card(), pair.read_card()) == (b"a", b"b")
    assert pair.expected_failures == {"R1.1": WHY | OTHER, "R1.2": WHY}
    assert writer.expected_failures == {"R1.1": WHY, "R1.2": WHY}
    assert reader.expected_failures == {"R1.1": OTHER}
    assert set(pair.missing) == MEMBERS - {"write_card", "read_card"}
    with pytest.raises(pytest.skip.Exception, match="a pair writes and reads cards"):
        Subject(pair).forward()


@requirement("R24.13")
def test_a_pair_without_writer_or_reader_is_refused_by_name():
    one, nothing = part("a", "write_card"), part("b", "bind")
    declared = part("c", "read_card", missing={"read_card": "it only writes"})
    for writer, reader, name in ((nothing, NUMPY, "b"), (one, nothing, "b"), (one, declared, "c")):
        with pytest.raises(ArgumentError, match=rf"binding '{name}' of a pair: expected .*_card"):
            Pair(writer, reader)
    with pytest.raises(ArgumentError, match="'nowhere:BINDING'"):
        run_suite(None, writer="nowhere:BINDING", only=["R1.3"])


@requirement("R24.13")
def test_what_a_wrong_writer_writes_is_read_as_it_is(monkeypatch):
    monkeypatch.setenv("LORA_PROFILE", "quick")
    writer = "tests.faults.card:FactorsInTheOrderOfMemory"
    reader = "tests.bindings.numpy_only:BINDING"
    report = run_suite(reader, writer=writer, only=["R1.2", "R4.1"])
    assert report["binding"]["name"] == "faulty: FactorsInTheOrderOfMemory writes, numpy-only reads"
    verdicts = {name: entry["verdict"] for name, entry in report["requirements"].items()}
    assert verdicts == {"R1.2": "failed", "R4.1": "skipped"}


@requirement("R24.13")
def test_a_process_writes_what_this_library_reads(monkeypatch):
    monkeypatch.setenv("LORA_PROFILE", "quick")
    writer = shlex.join([sys.executable, serve.__file__, numpy_only.__file__])
    report = run_suite(None, writer=writer, only=["R1.2", "R1.16"])
    assert report["binding"]["name"] == "numpy-only writes, lora-cards reads"
    verdicts = {name: entry["verdict"] for name, entry in report["requirements"].items()}
    assert verdicts == {"R1.2": "passed", "R1.16": "passed"}
