"""What the reference adds to docstrings: the imports of examples, and links to other names.

mkdocs.yml names this file to mkdocstrings, whose reader of Python code, griffe, hands over each
docstring.
"""

import importlib
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import griffe

sys.path[:0] = [str(Path(__file__).parent)]
import example_imports  # noqa: E402 - beside this file, in no package
import reference  # noqa: E402 - as above

NAME = re.compile(r"(?<![`\[])`([A-Za-z_]\w*)`(?!`)")


class Docstrings(griffe.Extension):
    """Changes each docstring that the reference shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Add to the docstring of an object."""
        if obj.docstring:
            own = {obj.name, *(each.name for each in getattr(obj, "parameters", ()))}
            text = linked(obj.docstring.value, obj.module.path, own)
            if ">>> " in text:
                text = example_imports.with_imports(text, obj.module.path)
            obj.docstring.value = text


def linked(text: str, module: str, own: set[str]) -> str:
    """Make links of the names in backticks, but in examples.

    Args:
        text: The docstring.
        module: The module that it is of.
        own: Names that mean the object itself, or its parameters.
    """
    known = places(module)

    def link(name: re.Match[str]) -> str:
        is_other = name[1] in known and name[1] not in own
        return f"[{name[0]}][{known[name[1]]}]" if is_other else name[0]

    parts = re.split(r"(^ *>>> (?:.*\n?)*?(?=\s*\n|\Z))", text, flags=re.MULTILINE)
    return "".join(part if ">>> " in part else NAME.sub(link, part) for part in parts)


@cache
def places(module: str) -> dict[str, str]:
    """Names that a module defines or imports, and classes that have pages -> their anchors."""
    own = vars(importlib.import_module(module))
    listed = [f"lora.{name}" for part in reference.REFERENCE.values() for name in part]
    names = reference.documented(module) if module in listed else []
    known = {name: f"{module}.{name}" for name in names}
    for entry in reference.names():
        package, _, name = entry.path.rpartition(".")
        is_imported = own.get(name) is getattr(importlib.import_module(package), name)
        if is_imported or (name[0].isupper() and name not in own):
            known[name] = entry.path
    return known
