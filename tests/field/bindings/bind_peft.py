"""PEFT, whose binding is `tests.bindings.peft`; a file of that name would hide the library."""

from tests.bindings.peft import BINDING

__all__ = ["BINDING"]
