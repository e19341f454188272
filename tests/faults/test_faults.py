"""The suite is sharp: on each fault exactly the requirements turn red that it declares, and each
[P*] has a fault.
"""

import os

import pytest

from lora.testing.plugin import MEMBERS, requirement
from lora.testing.reference import Reference
from lora.testing.report import CLASSES, read_statements, run_suite
from tests.faults.card import CARD_FAULTS
from tests.faults.examine import red_on, remembered, suite
from tests.faults.extract import EXTRACT_FAULTS
from tests.faults.layer import LAYER_FAULTS
from tests.faults.merging import MERGING_FAULTS
from tests.faults.routing import ROUTING_FAULTS, ThresholdExclusive
from tests.faults.targets import TARGET_FAULTS

FAMILIES = {
    "card": CARD_FAULTS,
    "layer": LAYER_FAULTS,
    "targets": TARGET_FAULTS,
    "routing": ROUTING_FAULTS,
    "extract": EXTRACT_FAULTS,
    "merging": MERGING_FAULTS[::2],
    "merging, the others": MERGING_FAULTS[1::2],
}
"""Faults in the same members of the binding, which are examined together, as many at a time as take
two or three minutes.
"""


@pytest.fixture(scope="session")
def properties():
    return suite()


@requirement("R24.2")
def test_a_property_is_of_one_class_proves_one_requirement_and_uses_one_capability(properties):
    """So that a verdict says what failed, and a declared failure excuses no more than it names."""
    capabilities = [{member} for member in MEMBERS - {"read_card", "write_card"}]
    for each in properties:
        (kind,) = each.kinds
        assert kind in CLASSES
        assert len(each.ids) == 1, each
        used = each.members - {"name", "version"}
        assert used <= {"read_card", "write_card"} or used in capabilities, each
    assert {kind for each in properties for kind in each.kinds} == set(CLASSES)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # forty faults meet a hundred properties
@requirement("R24.3")
@pytest.mark.parametrize("faults", FAMILIES.values(), ids=FAMILIES)
def test_on_each_fault_exactly_what_it_declares_turns_red(faults, properties, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # these files need not outlive the machine
    for member in MEMBERS - {"make_router"}:
        monkeypatch.setattr(Reference, member, remembered(getattr(Reference, member)))
    red = red_on(faults, properties)
    declared = {f.__name__: sorted(f.turns_red) for f in faults}
    assert {f.__name__: sorted(red[f]) for f in faults} == declared


@requirement("R24.3")
def test_every_neutral_requirement_has_a_fault_that_was_made_for_it():
    faults = [fault for family in FAMILIES.values() for fault in family]
    built = [r for r in read_statements().values() if r.status == "built"]
    neutral = {r.id for r in built if r.evidence == "P*"}
    assert {fault.breaks for fault in faults} == neutral
    assert all(fault.breaks in fault.turns_red for fault in faults)


@pytest.mark.slow
@requirement("R24.3", "R24.1")
def test_the_report_on_a_fault_says_what_it_declares(monkeypatch):
    monkeypatch.setenv("LORA_PROFILE", "dev")
    report = run_suite("tests.faults.routing:ThresholdExclusive", only=["R4"])["requirements"]
    verdicts = {name: requirement["verdict"] for name, requirement in report.items()}
    failed = {name for name, verdict in verdicts.items() if verdict == "failed"}
    assert failed == ThresholdExclusive.turns_red
    assert set(verdicts.values()) == {"failed", "passed"}
