"""Trace each requirement to its evidence: read the specification and the tests, and join them by
id.

A test names the requirements that it proves by ``requirement("Rn.m", …)``, or ``"Rn.m@2"`` for one
revision. Tests are read as text, not imported; one that may be skipped proves nothing. A lock
holds the digest of each requirement's sentence, so that none changes without a new revision.
"""

import ast
import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora.testing.requirements import Requirement, SpecError

_CHAPTERS = re.compile(r"^Requirements: (R\d+(?:, R\d+)*)\.$", re.MULTILINE)


@dataclass(frozen=True)
class Evidence:
    """One test that names requirements.

    Args:
        kind: "P*" for a property through the binding, "P" for another property, else "U".
        pinned: Id -> the revision that the test proves, where it names one.
    """

    ids: tuple[str, ...]
    test: str
    kind: str
    pinned: Mapping[str, int] = field(default_factory=dict)


def read_tests(folder: Path) -> list[Evidence]:
    """Return every test below a folder that names requirements."""
    return [
        evidence
        for path in sorted(folder.rglob("*.py"))
        for evidence in _evidence(
            ast.parse(path.read_text(encoding="utf-8")), path.relative_to(folder).as_posix()
        )
    ]


def read_code(folder: Path) -> dict[str, list[str]]:
    """Return, for each chapter, the modules that name it in a line "Requirements: …"."""
    modules: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for match in _CHAPTERS.finditer(docstring):
            for chapter in match[1].split(", "):
                modules.setdefault(chapter, []).append(path.relative_to(folder).as_posix())
    return modules


def faults(
    spec: dict[str, Requirement], tests: list[Evidence], code: dict[str, list[str]]
) -> list[str]:
    """Return what breaks the trace: unknown ids, and built requirements without evidence."""
    wrong = [
        f"{e.test} names {i}, which is not in spec/" for e in tests for i in e.ids if i not in spec
    ]
    chapters = {i.partition(".")[0] for i in spec}
    wrong += [
        f"{', '.join(modules)} names {chapter}, which is no chapter of spec/"
        for chapter, modules in code.items()
        if chapter not in chapters
    ]
    for requirement in spec.values():
        kinds = {evidence.kind for evidence in tests if requirement.id in evidence.ids}
        enough = {"P*": {"P*"}, "P": {"P", "P*"}}.get(requirement.evidence, {"U", "P", "P*"})
        if requirement.status == "built" and not kinds & enough:
            kind = requirement.evidence
            wrong.append(f"{requirement.id} is built but has no evidence of kind {kind}")
    for evidence in tests:
        for i, revision in evidence.pinned.items():
            if i in spec and spec[i].revision != revision:
                now = spec[i].revision
                wrong.append(
                    f"{evidence.test} is outdated: {i} is at revision {now}, not {revision}"
                )
    return wrong


def sentence_digest(sentence: str) -> str:
    """Return the SHA-256 of a sentence, without regard to line breaks and repeated blanks."""
    return hashlib.sha256(" ".join(sentence.split()).encode()).hexdigest()


def read_lock(path: Path) -> dict[str, tuple[int, str]]:
    """Return id -> (revision, digest of its sentence) as they were locked."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: (entry["revision"], entry["sentence"]) for name, entry in entries.items()}


def lock_text(spec: dict[str, Requirement]) -> str:
    """Return the lock of a specification, as TOML."""
    lines = ["# Id -> revision and SHA-256 of its sentence; written by spec/lock.py."]
    for r in spec.values():
        digest = sentence_digest(r.sentence)
        lines.append(f'"{r.id}" = {{ revision = {r.revision}, sentence = "{digest}" }}')
    return "\n".join([*lines, ""])


def lock_faults(spec: dict[str, Requirement], lock: dict[str, tuple[int, str]]) -> list[str]:
    """Return where the specification differs from its lock without a new revision."""
    wrong = [f"{name} is locked but not in the specification" for name in lock if name not in spec]
    for name, requirement in spec.items():
        locked, digest = lock.get(name, (0, ""))
        now = requirement.revision
        if now != locked:
            wrong.append(f"{name} is at revision {now}, locked at {locked}: run spec/lock.py")
        elif sentence_digest(requirement.sentence) != digest:
            wrong.append(f"{name} has another sentence than revision {now}: raise the revision")
    return wrong


def _evidence(tree: ast.Module, file: str) -> Iterator[Evidence]:
    marks = [node for node in tree.body if ast.unparse(node).startswith("pytestmark")]
    if "mark.skip" in "".join(map(ast.unparse, marks)):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield from _of_function(node, file, ())
        elif isinstance(node, ast.ClassDef):
            ids = tuple(i for decorator in node.decorator_list for i in _ids(decorator))
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    yield from _of_function(item, f"{file}::{node.name}", ids)
        elif isinstance(node, ast.Assign | ast.Expr):  # TestX = requirement(…)(Machine.TestCase)
            ids = tuple(i for part in ast.walk(node) for i in _ids(part))
            if ids:
                name = node.targets[0] if isinstance(node, ast.Assign) else node.value
                yield _named(ids, f"{file}::{ast.unparse(name)}", "P")


def _of_function(node: ast.FunctionDef, file: str, outer: tuple[str, ...]) -> Iterator[Evidence]:
    ids = outer + tuple(i for decorator in node.decorator_list for i in _ids(decorator))
    skipped = any("mark.skip" in ast.unparse(decorator) for decorator in node.decorator_list)
    if ids and node.name.startswith("test") and not skipped:
        drawn = any(
            isinstance(d, ast.Call) and ast.unparse(d.func).split(".")[-1] == "given"
            for d in node.decorator_list
        )
        through = any(argument.arg == "impl" for argument in node.args.args)
        yield _named(ids, f"{file}::{node.name}", ("P*" if through else "P") if drawn else "U")


def _named(ids: Iterable[str], test: str, kind: str) -> Evidence:
    parts = [i.partition("@") for i in ids]
    pinned = {name: int(revision) for name, _, revision in parts if revision}
    return Evidence(tuple(name for name, _, _ in parts), test, kind, pinned)


def _ids(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "requirement":
        for argument in node.args:
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise SpecError(ast.unparse(node), "literal ids", ast.unparse(argument))
            yield argument.value
