"""The pytest plugin: the ``requirement`` marker, the implementation under test, verdicts and their
report.

Load it with ``-p lora.testing.plugin``. The implementation is the reference unless ``--binding
package.module:NAME`` or ``LORA_BINDING`` names another.
"""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: two processes with two threads each are slower than one

import re
import signal
from collections.abc import Callable, Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from lora.errors import ArgumentError
from lora.testing.binding import Binding
from lora.testing.report import Outcome, read_statements, report_of, write_report

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
settings.register_profile(
    "quick",  # a verdict, not the smallest example
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("nightly", max_examples=5000, deadline=None, phases=tuple(Phase))

MEMBERS = frozenset(name for name in vars(Binding) if not name.startswith("_"))
"""What a test may use of a binding."""

_EXAMPLES = re.compile(r"- (\d+) passing, (\d+) failing")


class Hang(BaseException):
    """A test ran longer than it may; no Exception, so that nothing between here and pytest takes it
    for a result.
    """


class Subject:
    """The binding under test, as tests see it: what it says it lacks skips, what it lacks without a
    word fails when used.
    """

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.missing: dict[str, str] = dict(getattr(binding, "missing", {}))
        self.expected: dict[str, str] = dict(getattr(binding, "expected_failures", {}))

    def __getattr__(self, member: str) -> Any:
        if member not in MEMBERS:
            raise AttributeError(member)
        if member in self.missing:
            pytest.skip(f"{self.binding.name} lacks {member}: {self.missing[member]}")
        return getattr(self.binding, member, None) or _stub(self.binding, member)


def _stub(binding: Any, member: str) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError(
            f"binding {binding.name!r} has no {member!r} and does not declare it missing"
        )

    return fails


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("lora conformance")
    group.addoption(
        "--binding", default=None, help="implementation under test, package.module:NAME"
    )
    group.addoption(
        "--only", default=None, help="run the tests of one chapter (R4) or requirement (R4.9)"
    )
    group.addoption(
        "--neutral", action="store_true", help="only what any implementation can be held to"
    )
    group.addoption("--conformance-json", default=None, help="write verdicts here")
    group.addoption(
        "--conformance-timeout",
        type=float,
        default=300.0,
        help="seconds that one property may take",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker and choose the Hypothesis profile."""
    config.addinivalue_line(
        "markers", "requirement(*ids): the requirements that a test is evidence for"
    )
    settings.load_profile(profile())
    if chosen := config.getoption("--binding"):
        try:
            load_binding(chosen)
        except ArgumentError as error:
            raise pytest.UsageError(str(error)) from error


def profile() -> str:
    """The Hypothesis profile: LORA_PROFILE, or ci where CI is set, or dev."""
    return os.environ.get("LORA_PROFILE", "ci" if os.environ.get("CI") else "dev")


def load_binding(chosen: str | None) -> Any:
    """The object that ``package.module:NAME`` names; the reference by default.

    Raises:
        ArgumentError: If there is no such object, or it declares a failure of an unknown
            requirement.
    """
    path = chosen or os.environ.get("LORA_BINDING") or REFERENCE
    module, _, name = path.partition(":")
    try:
        binding = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(f"binding {path!r}", "package.module:NAME", error) from error
    unknown = set(getattr(binding, "expected_failures", {})) - set(read_statements())
    if unknown:
        raise ArgumentError(
            f"binding {path!r}: expected_failures", "known requirements", sorted(unknown)
        )
    return binding() if isinstance(binding, type) else binding


def requirement(*ids: str) -> pytest.MarkDecorator:
    """Mark a test as evidence for requirements, by their ids; ``"R1.4@2"`` for revision 2 alone."""
    return pytest.mark.requirement(*ids)


@pytest.fixture(scope="session")
def impl(request: pytest.FixtureRequest) -> Subject:
    """The implementation under test."""
    return Subject(load_binding(request.config.getoption("--binding")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--only``, keep the tests of that chapter or requirement; with ``--neutral``, those
    through a binding.
    """
    only, neutral = config.getoption("--only"), config.getoption("--neutral")
    kept = [
        item
        for item in items
        if (only is None or any(i == only or i.startswith(f"{only}.") for i in _ids(item)))
        and (not neutral or "impl" in getattr(item, "fixturenames", ()))
    ]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Stop a property through a binding that runs for too long."""
    if "impl" not in getattr(item, "fixturenames", ()):
        return (yield)

    def stop(_signal: int, _frame: Any) -> None:
        raise Hang(f"no verdict after {item.config.getoption('--conformance-timeout')} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, item.config.getoption("--conformance-timeout"))
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Note what a report needs on the item (it travels with xdist), and accept failures that the
    binding declares.
    """
    through = "impl" in getattr(item, "fixturenames", ())
    if call.when == "call" and through:
        found = _EXAMPLES.findall(getattr(item, "hypothesis_statistics", ""))
        item.user_properties.append(("requirements", list(_ids(item))))
        item.user_properties.append(("examples", sum(int(n) for pair in found for n in pair)))
        if call.excinfo is not None:
            item.user_properties.append(("falsified", _falsified(call.excinfo.value)))
    report: Any = yield
    subject = getattr(item, "funcargs", {}).get("impl")
    if call.when == "call" and report.failed and isinstance(subject, Subject):
        declared = [subject.expected[i] for i in _ids(item) if i in subject.expected]
        if declared:
            report.outcome, report.wasxfail = "skipped", declared[0]
    return report


class Collector:
    """Gathers outcomes where reports arrive: in the controlling process under xdist."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of a property through the binding."""
        notes: dict[str, Any] = dict(report.user_properties)
        if report.when == "call" and "requirements" in notes:
            verdict = (
                "expected failure" if getattr(report, "wasxfail", None) else str(report.outcome)
            )
            self.outcomes.append(
                Outcome(
                    report.nodeid.split("/")[-1],
                    tuple(str(i) for i in notes["requirements"]),
                    verdict,
                    int(notes.get("examples", 0)),
                    str(notes.get("falsified", "")) or _skip_reason(report),
                )
            )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Gather outcomes."""
    session.config.pluginmanager.register(Collector(), "lora-conformance-collector")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report, where one is asked for."""
    path = session.config.getoption("--conformance-json")
    if path is None or hasattr(session.config, "workerinput"):
        return
    collector: Any = session.config.pluginmanager.get_plugin("lora-conformance-collector")
    binding = load_binding(session.config.getoption("--binding"))
    given = session.config.getoption("--hypothesis-seed", None)
    seed = "derandomized" if settings.get_profile(profile()).derandomize else str(given or "random")
    write_report(report_of(binding, collector.outcomes, profile=profile(), seed=seed), Path(path))


def _ids(item: pytest.Item) -> tuple[str, ...]:
    return tuple(
        i.partition("@")[0] for marker in item.iter_markers("requirement") for i in marker.args
    )


def _skip_reason(report: pytest.TestReport) -> str:
    return (
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
    )


def _falsified(error: BaseException) -> str:
    """The error, and the falsifying example where there is one."""
    notes = [
        note
        for note in getattr(error, "__notes__", ())
        if "Failing test case" in note or "Falsifying example" in note
    ]
    return "\n".join([f"{type(error).__name__}: {error}"[:1000], *notes])[:2000]
