"""The pytest plugin: the ``requirement`` marker, the implementation under test, and Hypothesis profiles.

Load it with ``-p lora.testing.plugin``. The implementation is the reference unless ``--binding package.module:NAME`` or
``LORA_BINDING`` names another.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two processes with two threads each are slower than one

from importlib import import_module

import pytest
from hypothesis import HealthCheck, Phase, settings

from lora.testing.binding import Binding

REFERENCE = "lora.testing.reference:BINDING"

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile(
    "ci",
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("nightly", max_examples=5000, deadline=None, phases=tuple(Phase))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--binding``."""
    parser.addoption("--binding", default=None, help="implementation under test, package.module:NAME")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker and choose the Hypothesis profile."""
    config.addinivalue_line("markers", "requirement(*ids): the requirements that a test is evidence for")
    settings.load_profile(os.environ.get("LORA_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def requirement(*ids: str) -> pytest.MarkDecorator:
    """Mark a test as evidence for requirements, by their ids."""
    return pytest.mark.requirement(*ids)


@pytest.fixture(scope="session")
def impl(request: pytest.FixtureRequest) -> Binding:
    """The implementation under test."""
    chosen = request.config.getoption("--binding") or os.environ.get("LORA_BINDING") or REFERENCE
    module, _, name = str(chosen).partition(":")
    binding: Binding = getattr(import_module(module), name)
    return binding
