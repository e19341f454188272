"""The pytest plugin: the ``requirement`` mark, the implementation under test, and the report.

Load it with ``-p lora.testing.plugin``. The implementation under test is this library, unless
``--binding package.module:NAME`` or the variable ``LORA_BINDING`` names another, or
``--binding-command "node binding.mjs"`` starts one in a process of its own.

Requirements: R9, R24.
"""

import os

# Before torch is imported: two processes with two threads each are slower than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
import signal
import sys
from collections.abc import Callable, Generator
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, reject, settings
from hypothesis.errors import FailedHealthCheck, InvalidArgument, Unsatisfiable

from lora.errors import ArgumentError
from lora.testing.binding import Binding, Lacks
from lora.testing.domains import DECLARED, smoke, within
from lora.testing.remote import NoAnswer, RemoteBinding
from lora.testing.report import BROKEN, Outcome, check_declared, report_of, write_report

REFERENCE = "lora.testing.reference:BINDING"

_REPRODUCIBLE: dict[str, Any] = {"derandomize": True, "database": None}

_ALL = settings(deadline=None, print_blob=True)
settings.register_profile("dev", _ALL, max_examples=50)
settings.register_profile(
    "ci", _ALL, max_examples=100, suppress_health_check=[HealthCheck.too_slow], **_REPRODUCIBLE
)
settings.register_profile(  # a verdict, without the smallest failing example
    "quick",
    _ALL,
    max_examples=30,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    **_REPRODUCIBLE,
)
settings.register_profile("nightly", _ALL, max_examples=5000, phases=tuple(Phase))

MEMBERS = frozenset(name for name in vars(Binding) if not name.startswith("_"))
"""What a test may use of a binding."""

OUTSIDE_ENOUGH = 30
"""A property is skipped when so many examples, and no others, lay outside of the domains."""

_BINDING = pytest.StashKey[Any]()

_EXAMPLES = re.compile(r"- (\d+) passing, (\d+) failing")


class Hang(BaseException):
    """A test ran for too long. Not an Exception, so that no handler takes it for a refusal."""


class BrokenBinding(NoAnswer):
    """A member does not take the simplest legal input, so that no property of it says anything."""


class Subject:
    """The binding under test as tests see it.

    A member that the binding declares missing skips the test; one that is missing without a
    declaration fails where it is used. Before its first use a member is tried once.
    """

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.missing: dict[str, str] = dict(getattr(binding, "missing", {}))
        self.expected = getattr(binding, "expected_failures", {})
        self.domains = getattr(binding, "domains", {})
        self._broken: dict[str, str] = {}
        """Each member that was tried, and what is wrong with it, if anything."""

    def __getattr__(self, member: str) -> Any:
        if member not in MEMBERS:
            raise AttributeError(member)
        if member in self.missing:
            pytest.skip(f"{self.binding.name} lacks {member}: {self.missing[member]}")
        if not hasattr(self.binding, member):
            message = f"binding {self.binding.name!r} has no {member!r} and does not declare it"
            raise NoAnswer(message)  # no Exception, which a test for a refusal would accept
        function, limits = getattr(self.binding, member), self.domains.get(member, {})
        if limits:
            function = within(member, function, limits)
        if member not in self._broken:
            self._broken[member] = ""
            try:
                smoke(self.binding, member, function)
            except Lacks:
                pass
            except (Exception, NoAnswer, Hang) as error:  # noqa: BLE001 - however it fails
                answer = "refuses" if isinstance(error, Exception) else "gives no answer to"
                problem = f"{answer} the simplest legal input: {_falsified(error)}"
                self._broken[member] = f"{BROKEN}member {member} {problem}"
        if self._broken[member]:
            raise BrokenBinding(self._broken[member])
        return function


class Pair:
    """A binding that reads the cards that another writes; all else is missing.

    Raises:
        ArgumentError: The one writes no cards, or the other reads none.
    """

    def __init__(self, writer: Any, reader: Any) -> None:
        self.parts = {"write_card": writer, "read_card": reader}
        self.name = f"{writer.name} writes, {reader.name} reads"
        self.version = f"{writer.version} and {reader.version}"
        alone = "a pair writes and reads cards, and no more"
        self.missing = dict.fromkeys(MEMBERS - self.parts.keys(), alone)
        self.expected_failures: dict[str, dict[str, Any]] = {}
        for member, part in self.parts.items():
            if member in getattr(part, "missing", {}) or not hasattr(part, member):
                raise ArgumentError(f"binding {part.name!r} of a pair", member, "none")
            setattr(self, member, getattr(part, member))
            for name, failures in getattr(part, "expected_failures", {}).items():
                self.expected_failures.setdefault(name, {}).update(failures)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    add = parser.getgroup("lora conformance").addoption
    add("--binding", help="implementation under test, package.module:NAME")
    add("--binding-command", help="program that serves an implementation, and its arguments")
    add("--binding-writer", help="binding or program that writes the cards that the other reads")
    tests = "run the tests of a chapter (R4) or requirement (R4.9); repeatable"
    add("--only", action="append", help=tests)
    add(
        "--neutral",
        action="store_true",
        help="only properties through a binding, as --binding does",
    )
    add("--conformance-json", help="write verdicts here")
    seconds = "seconds that one property may take"
    add("--conformance-timeout", type=float, default=300.0, help=seconds)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark, choose the Hypothesis profile, and gather outcomes."""
    mark = "requirement(*ids): the requirements that a test is evidence for"
    for line in (mark, "slow: takes long"):
        config.addinivalue_line("markers", line)
    try:
        settings.load_profile(profile())
    except InvalidArgument as error:
        problem = ArgumentError("LORA_PROFILE", "ci, dev, nightly or quick", repr(profile()))
        raise pytest.UsageError(str(problem)) from error
    config.pluginmanager.register(Collector(), "lora-conformance-collector")
    if _is_foreign(config):
        sys.path.insert(0, str(config.invocation_params.dir))
        try:
            binding_of(config)
        except ArgumentError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the processes of bindings."""
    binding = config.stash.get(_BINDING, None)
    for part in binding.parts.values() if isinstance(binding, Pair) else [binding]:
        if isinstance(part, RemoteBinding):
            part.close()


def _is_foreign(config: pytest.Config) -> bool:
    names = ("--binding", "--binding-command", "--binding-writer")
    return any(config.getoption(name) is not None for name in names)


def binding_of(config: pytest.Config) -> Any:
    """Return the implementation under test, which is loaded or started once a run."""
    if _BINDING not in config.stash:
        path, command = config.getoption("--binding"), config.getoption("--binding-command")
        if None not in (path, command):
            raise ArgumentError("binding", "either --binding or --binding-command", "both")
        seconds = config.getoption("--conformance-timeout")
        binding = load_binding(path) if command is None else started(command, seconds)
        if (writer := config.getoption("--binding-writer")) is not None:
            is_path = re.fullmatch(r"[\w.]+:\w+", writer)
            binding = Pair(load_binding(writer) if is_path else started(writer, seconds), binding)
        config.stash[_BINDING] = binding
        DECLARED.update(getattr(binding, "domains", {}))
    return config.stash[_BINDING]


def started(command: str, seconds: float) -> RemoteBinding:
    """Return the binding that a command serves.

    Raises:
        ArgumentError: It does not start, or declares failures of unknown properties.
    """
    where = f"binding {command!r}"
    try:
        binding = RemoteBinding(command, call_seconds=min(60.0, seconds))
    except (NoAnswer, ValueError) as error:
        problem = f"one that did not start: {' '.join(str(error).split())}"
        raise ArgumentError(where, "a process that says hello", problem) from error
    check_declared(binding, where)
    return binding


def profile() -> str:
    """Return the Hypothesis profile: LORA_PROFILE, or ci where CI is set, or dev."""
    return os.environ.get("LORA_PROFILE", "ci" if os.environ.get("CI") else "dev")


def load_binding(path: str | None) -> Any:
    """Return the object that ``package.module:NAME`` names; by default this library's binding.

    Raises:
        ArgumentError: There is no such object, it has no member of a `Binding`, or it declares
            failures of unknown properties.
    """
    path = os.environ.get("LORA_BINDING") or REFERENCE if path is None else path
    module, _, name = path.partition(":")
    try:
        binding = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(f"binding {path!r}", "package.module:NAME", error) from error
    check_declared(binding, f"binding {path!r}")
    binding = binding() if isinstance(binding, type) else binding
    if not any(hasattr(binding, member) for member in (*MEMBERS, "expected_failures")):
        expected = f"a member such as {', '.join(sorted(MEMBERS)[:3])}"
        raise ArgumentError(f"binding {path!r}", expected, "none", "see lora.testing.binding")
    return binding


def requirement(*ids: str, kind: str = "") -> pytest.MarkDecorator:
    """Mark a test as evidence for requirements, by their ids; ``"R1.4@2"`` for revision 2 alone.

    Args:
        kind: The class of a property through a binding, one of `lora.testing.report.CLASSES`.
    """
    return pytest.mark.requirement(*ids, kind=kind)


@pytest.fixture(scope="session")
def impl(request: pytest.FixtureRequest) -> Subject:
    """The implementation under test."""
    return Subject(binding_of(request.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that ``--only``, ``--neutral`` and ``--binding`` ask for."""
    only = config.getoption("--only")
    neutral = config.getoption("--neutral") or _is_foreign(config)
    kept = [
        item
        for item in items
        if (
            only is None or any(f"{i}.".startswith(f"{name}.") for i in _ids(item) for name in only)
        )
        and (not neutral or _uses_binding(item))
    ]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Stop a property that runs for too long; skip one that the implementation does not reach."""
    if not _uses_binding(item):
        return (yield)
    lacks: list[str] = []
    test = getattr(getattr(item, "obj", None), "hypothesis", None)
    inner_test: Any = getattr(test, "inner_test", None)
    if test is not None:
        test.inner_test = _reached(inner_test, lacks)
    seconds = item.config.getoption("--conformance-timeout")

    def stop(_signal: int, _frame: Any) -> None:
        raise Hang(f"no verdict after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    except Lacks as error:
        pytest.skip(str(error))
    except (FailedHealthCheck, Unsatisfiable):  # no example is left, or hardly any
        if lacks:
            pytest.skip(lacks[0])
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if test is not None:
            test.inner_test = inner_test


def _reached(test: Callable[..., Any], lacks: list[str]) -> Callable[..., Any]:
    """Return a test that rejects the examples that the implementation does not reach.

    Where it reached none of the first `OUTSIDE_ENOUGH`, no more are drawn.
    """
    is_reached = False

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_reached
        try:
            result = test(*args, **kwargs)
        except Lacks as error:
            lacks.append(str(error))
        else:
            is_reached = True
            return result
        if not is_reached and len(lacks) == OUTSIDE_ENOUGH:
            pytest.skip(lacks[0])
        return reject()

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Note on the item what a report needs, and accept failures that the binding declares.

    The notes stand in `user_properties`, which travel between the processes of xdist.
    """
    broken = call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception)
    if _uses_binding(item) and (call.when == "call" or broken):  # a fixture may fail, too
        counts = _EXAMPLES.findall(getattr(item, "hypothesis_statistics", ""))
        item.user_properties.append(("property", _name(item)))
        item.user_properties.append(("requirements", list(_ids(item))))
        kinds = [mark.kwargs.get("kind", "") for mark in item.iter_markers("requirement")]
        item.user_properties.append(("class", min(kinds, default="")))
        item.user_properties.append(("examples", sum(int(n) for pair in counts for n in pair)))
        if call.excinfo is not None and broken:
            error = call.excinfo.value
            text = str(error) if isinstance(error, BrokenBinding) else _falsified(error)
            item.user_properties.append(("falsified", text))
    report: Any = yield
    subject = getattr(item, "funcargs", {}).get("impl")
    if call.when == "call" and report.failed and isinstance(subject, Subject):
        declared = [subject.expected.get(i, {}).get(_name(item)) for i in _ids(item)]
        is_broken = call.excinfo is not None and call.excinfo.errisinstance(BrokenBinding)
        if all(declared) and not is_broken:  # for each requirement that the test names
            report.outcome, report.wasxfail = "skipped", declared[0][0]
    return report


class Collector:
    """Gathers outcomes where reports arrive: under xdist in the controlling process."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of a property through the binding."""
        notes: dict[str, Any] = dict(report.user_properties)
        if "requirements" not in notes or not (report.when == "call" or report.failed):
            return
        verdict: str = "failed" if hasattr(report, "wasxfail") else report.outcome
        reason = str(notes.get("falsified", ""))
        if not reason and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith(BROKEN):
            verdict = "broken"
        test, ids = str(notes["property"]), tuple(notes["requirements"])
        examples, kind = notes.get("examples", 0), str(notes["class"])
        self.outcomes.append(Outcome(test, ids, verdict, examples, reason, kind))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report where one is asked for."""
    config = session.config
    path = config.getoption("--conformance-json")
    if path is None or hasattr(config, "workerinput"):
        return
    collector: Any = config.pluginmanager.get_plugin("lora-conformance-collector")
    seed = str(config.getoption("--hypothesis-seed", None) or "random")
    if settings.get_profile(profile()).derandomize:
        seed = "derandomized"
    binding = binding_of(config)
    write_report(report_of(binding, collector.outcomes, profile=profile(), seed=seed), Path(path))


def _uses_binding(item: pytest.Item) -> bool:
    return "impl" in getattr(item, "fixturenames", ())


def _ids(item: pytest.Item) -> tuple[str, ...]:
    marks = item.iter_markers("requirement")
    return tuple(i.partition("@")[0] for mark in marks for i in mark.args)


def _name(item: pytest.Item) -> str:
    return f"{item.path.name}::{item.name}"


def _falsified(error: BaseException) -> str:
    """Return the error, and what to paste above the test so that it fails like this again."""
    if isinstance(error, BaseExceptionGroup):  # Hypothesis found several
        return "\n".join(map(_falsified, error.exceptions))[:8000]
    text = "\n".join(getattr(error, "__notes__", ()))
    text = re.sub(
        r"^ +(#|impl=).*\n|  # or any other generated value", "", text, flags=re.MULTILINE
    )
    text = re.sub(r"(Failing test case|Falsifying example): \w+\(", "@example(", text)
    text = f"{type(error).__name__}: {error}"[:1000] + f"\n{text}"[:3000].rstrip()
    return text.encode("utf-8", "backslashreplace").decode()  # an error may hold lone surrogates
