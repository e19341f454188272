"""From requirement to evidence: the specification and the tests, read as text and joined by id.

A chapter of the specification is a Markdown file with one ``## Rn.m`` heading for each requirement;
a test names the requirements that it is evidence for by ``requirement("Rn.m", …)``, or ``"Rn.m@2"``
if it proves just that revision. Neither is imported. A lock keeps each revision's sentence, so that
none changes unnoticed.

Requirements: R9.
"""

import ast
import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora.errors import LoRAError

_ENTRY = re.compile(
    r"^## (?P<id>R\d+\.\d+)\n- revision: (?P<revision>\d+)\n- evidence: (?P<evidence>P\*|P|U|B|D)\n"
    r"- status: (?P<status>built|planned)\n\n(?P<sentence>.+?)(?=\n\n|\n*\Z)",
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^## (\S+)", re.MULTILINE)
_NAMED = re.compile(r"^Requirements: (R\d+(?:, R\d+)*)\.$", re.MULTILINE)


class SpecError(LoRAError, ValueError):
    """The specification, or a test's reference to it, is malformed."""


@dataclass(frozen=True)
class Requirement:
    """One numbered sentence of the specification."""

    id: str
    chapter: str
    revision: int
    evidence: str
    status: str
    sentence: str


@dataclass(frozen=True)
class Evidence:
    """One test that names requirements; `kind` is P* (a property through the binding), P (a
    property) or U.

    `pinned` holds the revisions that it insists on, by id.
    """

    ids: tuple[str, ...]
    test: str
    kind: str
    pinned: Mapping[str, int] = field(default_factory=dict)


def read_spec(folder: Path) -> dict[str, Requirement]:
    """Every requirement by id, in the order of the chapters.

    Raises:
        SpecError: If a heading is no well-formed entry, an id occurs twice, or stands in another
            chapter's file.
    """
    found: dict[str, Requirement] = {}
    for path in sorted(folder.glob("R[0-9][0-9]-*.md")):
        text = path.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        entries = list(_ENTRY.finditer(text))
        headings = _HEADING.findall(text)
        if [entry["id"] for entry in entries] != headings:
            raise SpecError(
                f"{path.name}",
                "well-formed entries",
                sorted(set(headings) ^ {e["id"] for e in entries}),
            )
        for entry in entries:
            if entry["id"] in found or not path.name.startswith(
                f"R{int(entry['id'][1:].split('.')[0]):02d}-"
            ):
                raise SpecError(
                    f"{path.name}: {entry['id']}", "each id once, in its chapter", "another place"
                )
            sentence = " ".join(entry["sentence"].split())
            found[entry["id"]] = Requirement(
                entry["id"],
                title,
                int(entry["revision"]),
                entry["evidence"],
                entry["status"],
                sentence,
            )
    return found


def read_tests(folder: Path) -> list[Evidence]:
    """Every test below a folder that names requirements."""
    return [
        evidence
        for path in sorted(folder.rglob("*.py"))
        for evidence in _evidence(
            ast.parse(path.read_text(encoding="utf-8")), path.relative_to(folder).as_posix()
        )
    ]


def read_code(folder: Path) -> dict[str, list[str]]:
    """Return, for each chapter, the modules whose docstring names it in a line "Requirements: …"."""
    modules: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for match in _NAMED.finditer(docstring):
            for chapter in match[1].split(", "):
                modules.setdefault(chapter, []).append(path.relative_to(folder).as_posix())
    return modules


def faults(
    spec: dict[str, Requirement], tests: list[Evidence], code: dict[str, list[str]]
) -> list[str]:
    """What breaks the trace: ids unknown to the specification, and built requirements without
    evidence of their kind.
    """
    wrong = [
        f"{e.test} names {i}, which is not in the specification"
        for e in tests
        for i in e.ids
        if i not in spec
    ]
    wrong += [
        f"{module} names {chapter}, which is no chapter of the specification"
        for chapter, modules in code.items()
        if not any(i.startswith(f"{chapter}.") for i in spec)
        for module in modules
    ]
    for requirement in spec.values():
        kinds = {evidence.kind for evidence in tests if requirement.id in evidence.ids}
        enough = {"P*": {"P*"}, "P": {"P", "P*"}}.get(requirement.evidence, {"U", "P", "P*"})
        if requirement.status == "built" and not kinds & enough:
            wrong.append(
                f"{requirement.id} is built but has no evidence of kind {requirement.evidence}"
            )
    for evidence in tests:
        for name, revision in evidence.pinned.items():
            if name in spec and spec[name].revision != revision:
                wrong.append(
                    f"{evidence.test} is outdated: {name} is at revision {spec[name].revision}, not {revision}"
                )
    return wrong


def sentence_digest(sentence: str) -> str:
    """SHA-256 of a sentence, whatever its line breaks and spaces."""
    return hashlib.sha256(" ".join(sentence.split()).encode()).hexdigest()


def read_lock(path: Path) -> dict[str, tuple[int, str]]:
    """Id -> revision and digest of its sentence, as they were locked."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: (entry["revision"], entry["sentence"]) for name, entry in entries.items()}


def lock_text(spec: dict[str, Requirement]) -> str:
    """A lock of the specification, as TOML."""
    lines = [
        f'"{r.id}" = {{ revision = {r.revision}, sentence = "{sentence_digest(r.sentence)}" }}'
        for r in spec.values()
    ]
    return "\n".join(
        ["# Id -> revision and SHA-256 of its sentence; written by spec/lock.py.", *lines, ""]
    )


def lock_faults(spec: dict[str, Requirement], lock: dict[str, tuple[int, str]]) -> list[str]:
    """What the specification does otherwise than its lock: a sentence changed under its revision,
    an id come or gone.
    """
    wrong = [f"{name} is locked but not in the specification" for name in lock if name not in spec]
    for name, requirement in spec.items():
        revision, digest = lock.get(name, (0, ""))
        changed = sentence_digest(requirement.sentence) != digest
        if requirement.revision == revision and changed:
            wrong.append(
                f"{name} says something else than its revision {revision} did: raise the revision"
            )
        elif requirement.revision != revision:
            wrong.append(
                f"{name} is at revision {requirement.revision}, locked at {revision}: run spec/lock.py"
            )
    return wrong


def _evidence(tree: ast.Module, file: str) -> Iterator[Evidence]:
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
    if ids and node.name.startswith("test"):
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
