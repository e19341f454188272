"""Which requirements turn red on which faults, where all faults meet the examples that the
reference drew.
"""

import copy
import inspect
import pickle
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from types import CodeType, SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.strategies import DataObject

from lora.testing import folder_of
from lora.testing.plugin import MEMBERS, Subject
from lora.testing.reference import Reference

EXAMPLES = 50
"""How many examples each property gets; a failure that is declared and has not shown by then gets
four times as many.
"""

settings.register_profile(
    "faults",
    max_examples=4 * EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


class Settled(BaseException):
    """No further example can change a verdict; no Exception, so that Hypothesis takes it for no
    failure.
    """


@dataclass(frozen=True)
class Property:
    """A property through the binding, the requirements that it names, its classes, the members of
    a binding that it may use, and the arguments that pytest gives it.
    """

    test: object
    ids: frozenset[str]
    kinds: tuple[str, ...]
    members: frozenset[str]
    arguments: dict[str, object]


def suite():
    """Every property through a binding, imported anew under the profile above; those of many
    requirements first.
    """
    before, properties = settings.get_current_profile_name(), []
    settings.load_profile("faults")
    try:
        for path in sorted(folder_of("tests/properties").glob("test_r*.py")):
            if "(impl" not in path.read_text(encoding="utf-8"):
                continue
            spec = spec_from_file_location(f"suite_{path.stem}", path)
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            for name, test in inspect.getmembers(module, inspect.isfunction):
                if name.startswith("test") and "impl" in inspect.signature(test).parameters:
                    marks = [mark for mark in test.pytestmark if mark.name == "requirement"]
                    ids = frozenset().union(*(mark.args for mark in marks))
                    kinds = tuple(mark.kwargs["kind"] for mark in marks)
                    members = MEMBERS & names_in(test.hypothesis.inner_test)
                    properties += [
                        Property(test, ids, kinds, members, arguments)
                        for arguments in arguments_of(test)
                    ]
    finally:
        settings.load_profile(before)
    return sorted(properties, key=lambda each: -len(each.ids))


def arguments_of(test):
    """What pytest gives a test, each time: nothing, or what it is parametrised by."""
    (parametrised,) = [m for m in test.pytestmark if m.name == "parametrize"] or [None]
    if parametrised is None:
        return [{}]
    name, values = parametrised.args
    return [{name: getattr(value, "values", [value])[0]} for value in values]  # or it has marks


def names_in(function, seen=frozenset()):
    """Every name that a function, or one of its module that it calls, may look up: more than it
    uses, never less.
    """
    names, codes = set(), [function.__code__]
    for code in codes:
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    values = [function.__globals__.get(name) for name in names]
    helpers = {value for value in values if callable(value)} - seen
    ours = {f for f in helpers if inspect.isfunction(f) and f.__module__ == function.__module__}
    return names.union(*(names_in(helper, seen | ours) for helper in ours))


def red_on(faults, properties):
    """Fault -> the requirements of the properties that fail on it."""
    red = {fault: set() for fault in faults}
    for each in properties:
        examine(each, red)
    return red


def examine(each, red):
    """Add the property's requirements to those of the faults that it fails on.

    A fault that overrides nothing that the property uses is the reference to it, and one for which
    all these requirements are red already has nothing to lose: neither is tried.
    """
    tried = {fault: Subject(fault()) for fault in red if overridden(fault) & each.members}
    inner, examples = each.test.hypothesis.inner_test, count()

    def open_at(example):
        late = example >= EXAMPLES
        still = [f for f in tried if not each.ids <= red[f]]
        return [f for f in still if not late or each.ids <= f.turns_red]

    @wraps(inner)
    def on_all(impl, **drawn):
        undecided, values = open_at(next(examples)), []
        inner(impl=impl, **given_anew(drawn, recording(values)))
        if not undecided:
            raise Settled  # only now: Hypothesis wants each example drawn to its end
        for fault in undecided:
            if fails(inner, impl=tried[fault], **given_anew(drawn, replaying(values))):
                red[fault] |= each.ids

    if open_at(0):
        each.test.hypothesis.inner_test = on_all
        try:
            with suppress(Settled):
                each.test(impl=Subject(Reference()), **each.arguments)
        finally:
            each.test.hypothesis.inner_test = inner


def overridden(fault):
    """The members of the binding in which a fault differs from the reference."""
    return {m for m in MEMBERS if getattr(fault, m) is not getattr(Reference, m)}


def given_anew(drawn, draw):
    """The arguments, copied, so that no user sees what another did to them; interactive draws go
    through `draw`.
    """
    values = {}
    for name, value in drawn.items():
        interactive = isinstance(value, DataObject)
        again = SimpleNamespace(draw=partial(draw, value)) if interactive else copy.deepcopy(value)
        values[name] = again
    return values


def recording(values):
    """Draws, and keeps what was drawn."""

    def draw(data, strategy, label=None):
        values.append(data.draw(strategy, label))
        return copy.deepcopy(values[-1])

    return draw


def replaying(values):
    """Gives what was drawn before; whoever asks for more has met no example."""
    rest = iter(copy.deepcopy(values))

    def draw(_data, _strategy, label=None):
        for value in rest:
            return value
        raise UnsatisfiedAssumption

    return draw


def remembered(function):
    """A method that only depends on its arguments, answering from memory where it has just been
    asked the same.
    """
    answers = {}

    @wraps(function)
    def answer(self, *arguments):
        key = pickle.dumps(arguments)
        if key not in answers:
            if len(answers) > 20:
                answers.clear()
            answers[key] = function(self, *arguments)
        return copy.deepcopy(answers[key])

    return answer


def fails(test, **arguments):
    """Whether a test fails; an example that it rejects says nothing."""
    try:
        test(**arguments)
    except UnsatisfiedAssumption:
        return False
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - however it fails
        return True
    return False
