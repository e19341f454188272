"""The import lines that the example of a docstring needs, shown at its head in the reference.

A docstring of the package says nothing of what its module imports. The reference adds it, so that a
reader can paste an example as it stands; `griffe_extension.py` does so while the site is built.
"""

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator

PACKAGES = ("lora", "lora.training", "lora.federation", "lora.evolution")
"""What users import from, the first one first."""


def with_imports(text: str, module: str) -> str:
    """Add import lines above the first example of a docstring of a module."""
    lines = import_lines(text, module)
    return re.sub(
        r"^( *)(?=>>> )",
        lambda indent: "".join(f"{indent[1]}>>> {line}\n" for line in lines) + indent[1],
        text,
        count=1,
        flags=re.MULTILINE,
    )


def import_lines(text: str, module: str) -> list[str]:
    """Return the imports that the examples of a docstring need beside their own, in order.

    Args:
        text: The docstring.
        module: The module whose names the examples use.
    """
    source = "".join(example.source for example in doctest.DocTestParser().get_examples(text))
    nodes = list(ast.walk(ast.parse(source)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    needed = (used - set(_bound(nodes))) & vars(importlib.import_module(module)).keys()
    origins = [_origin(name, module) for name in sorted(needed)]
    lines = [f"import {alias}" for package, alias in origins if not package]
    for package in sorted({package for package, _ in origins if package}):
        lines += [f"from {package} import {', '.join(n for p, n in origins if p == package)}"]
    return sorted(lines, key=lambda line: (" lora" in line, line.startswith("from")))


def _bound(nodes: list[ast.AST]) -> Iterator[str]:
    """The names that code binds."""
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)


def _origin(name: str, module: str) -> tuple[str, str]:
    """Where users import a name of a module from, and as what; as the module itself does."""
    own = importlib.import_module(module)
    for package in map(importlib.import_module, PACKAGES):
        if name in package.__all__ and getattr(package, name) is vars(own)[name]:
            return package.__name__, name
    for node in ast.walk(ast.parse(inspect.getsource(own))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                    return source, ast.unparse(alias)
    return module, name
