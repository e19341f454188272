"""What every fault is: the reference with one mistake, what it was made to break, and all that
turns red with it.
"""

from collections.abc import Mapping
from typing import Any

from lora.testing.reference import Reference


class Fault(Reference):
    """A wrong implementation: `breaks` is what it was made for, `turns_red` all that fails on it,
    and nothing else does.
    """

    breaks: str
    turns_red: frozenset[str]

    def __init_subclass__(cls, breaks: str = "", also: str | frozenset[str] = "") -> None:
        cls.name = f"faulty: {cls.__name__}"
        if breaks:
            cls.breaks = breaks
            cls.turns_red = frozenset([breaks, *(also.split() if isinstance(also, str) else also)])


def faults_in(namespace: Mapping[str, Any]) -> list[type[Fault]]:
    """The faults among a module's names: what is only a base of others breaks nothing itself."""
    classes = [value for value in namespace.values() if isinstance(value, type)]
    return [c for c in classes if issubclass(c, Fault) and "breaks" in vars(c)]
