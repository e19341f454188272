"""The suite is sharp: each fault is found by the properties of the requirement that it breaks, and each [P*] has a fault."""

import inspect
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from hypothesis import HealthCheck, Phase, settings

from lora.testing.plugin import Subject, requirement
from lora.testing.report import read_statements, suite_folder
from tests.faults.card import CARD_FAULTS
from tests.faults.layer import LAYER_FAULTS
from tests.faults.routing import ROUTING_FAULTS
from tests.faults.targets import TARGET_FAULTS

FAULTS = [*CARD_FAULTS, *LAYER_FAULTS, *TARGET_FAULTS, *ROUTING_FAULTS]
settings.register_profile(
    "faults",  # finds a failure, does not shrink it
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="session")
def suite():
    """Every property through a binding with the ids it names, imported anew under the profile above."""
    before, found = settings.get_current_profile_name(), []
    settings.load_profile("faults")
    try:
        for path in sorted(suite_folder().glob("test_r*.py")):
            spec = spec_from_file_location(f"suite_{path.stem}", path)
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if name.startswith("test") and "impl" in inspect.signature(function).parameters:
                    found.append((function, ids_of(function)))
    finally:
        settings.load_profile(before)
    return found


def ids_of(function):
    return {i for mark in function.pytestmark if mark.name == "requirement" for i in mark.args}


def notices(function, fault):
    """Whether a property fails on a fault."""
    try:
        function(impl=Subject(fault()))
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - however it fails
        return True
    return False


@requirement("R24.3")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_by_the_properties_of_what_it_breaks(fault, suite):
    held = [function for function, ids in suite if fault.breaks in ids]
    assert any(notices(function, fault) for function in held)


@requirement("R24.3")
def test_every_neutral_requirement_has_a_fault():
    neutral = {r.id for r in read_statements().values() if r.evidence == "P*" and r.status == "built"}
    assert {fault.breaks for fault in FAULTS} == neutral
