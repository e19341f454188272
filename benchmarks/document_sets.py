"""Document sets that installed packages bring, as passages.

Nothing is downloaded. A passage is what a search over the documents would show: a paragraph under
its headings, or a definition's name with the start of its docstring.
"""

import ast
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

from lora.evolution.documents import Source

PACKAGES = Path(sysconfig.get_paths()["purelib"])
LIMIT = 300
"""Characters of a passage."""


@dataclass(frozen=True)
class Passage:
    """A text, its group, and where it stands: a dotted name, or the headings above it."""

    group: str
    where: str
    text: str

    @property
    def line(self) -> str:
        """What a gold answer's regular expression is searched in."""
        return f"{self.group} | {self.where} | {self.text}"


def docstrings(package: str) -> Iterator[Passage]:
    """Yield each public definition of an installed package: its name and its docstring's start."""
    root = PACKAGES / package
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if {"tests", "testing", "backends", "sphinxext", "projections"} & set(inner.parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # about escapes in the source
            tree = ast.parse(path.read_bytes())
        parts = [part for part in (package, *inner.with_suffix("").parts) if part != "__init__"]
        for name, node in _definitions(tree, ".".join(parts)):
            body = ast.get_docstring(node) or ""
            text = " ".join(re.split(r"\n(Parameters|Returns|Notes)\n-", body)[0].split())
            if len(text.split()) >= 3:
                yield Passage(str(inner), name, f"{name}: {text}"[:LIMIT])


def _definitions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(parent):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        if isinstance(node, kinds):
            name = f"{prefix}.{node.name}"
            if not node.name.startswith("_"):
                yield name, node
            if isinstance(node, ast.ClassDef):  # a private base class has public methods
                yield from _definitions(node, name)


def paragraphs(group: str, document: str) -> Iterator[Passage]:
    """Yield the paragraphs of a Markdown or reStructuredText document, code left out."""
    document = re.sub(r"```.*?(```|$)", "", document, flags=re.DOTALL)
    document = re.sub(r"^(.+)\n([*=\-~])\2{2,}$", r"# \1\n", document, flags=re.MULTILINE)
    heading = ""
    for block in document.split("\n\n"):
        lines = block.strip("\n").split("\n")
        while lines and lines[0].startswith("#"):
            heading = lines.pop(0).lstrip("# ")
        text = " ".join(" ".join(lines).split())
        if len(text.split()) >= 8 and not re.search("::=|^>>>", text):
            yield Passage(group, heading, text[:LIMIT])


def manual() -> dict[str, str]:
    """Return Python's own manual of the language, as ``help()`` shows it, by topic."""
    return {f"{name}.rst": text for name, text in topics.items()}


def linter() -> dict[str, str]:
    """Return the page of each of ruff's rules."""
    command = [str(Path(sys.executable).with_name("ruff")), "rule", "--all"]
    command += ["--output-format", "json"]
    listing = subprocess.run(command, capture_output=True, check=True)  # noqa: S603 - no input
    return {f"{rule['name']}.md": rule["explanation"] for rule in json.loads(listing.stdout)}


SETS: dict[str, tuple[str, Callable[[], dict[str, str] | Iterator[Passage]]]] = {
    "matplotlib": ("matplotlib", lambda: docstrings("matplotlib")),
    "ruff": ("ruff", linter),
    "manual": ("python", manual),
}
"""What each set comes from, and how it is read."""


def passages(name: str) -> list[Passage]:
    """Return a set's passages, each text once."""
    read = SETS[name][1]()
    if isinstance(read, dict):
        read = (part for group, text in read.items() for part in paragraphs(group, text))
    return list({passage.text: passage for passage in read}.values())


def source(name: str, parts: list[Passage]) -> dict[str, str]:
    """Name the version that a set was read from, and a digest of its passages."""
    package = SETS[name][0]
    digest = hashlib.sha256("\n".join(part.line for part in parts).encode()).hexdigest()
    of = sys.version.split()[0] if package == "python" else version(package)
    return {"package": package, "version": of, "sha256": digest}


def readmes() -> dict[str, str]:
    """Return the READMEs of the other installed packages, as their metadata hold them."""
    about = [part.metadata for part in distributions() if part.metadata["Name"] != "lora-cards"]
    texts = {f"{each['Name'].lower()}.md": str(each.json.get("description", "")) for each in about}
    return dict(sorted(texts.items()))


FOLDERS: dict[str, Callable[[], dict[str, str]] | None] = {
    "networkx": None,
    "sklearn": None,
    "ruff": linter,
    "manual": manual,
    "readmes": readmes,
}
"""Sets as folders of documents: installed packages, or texts that are written out."""


def material(name: str) -> Source:
    """Read a set as ``lora evolve`` reads a folder."""
    read = FOLDERS[name]
    if read is None:
        return Source.read(PACKAGES / name)
    with TemporaryDirectory() as folder:
        for file, text in read().items():
            Path(folder, file).write_text(text, encoding="utf-8")
        return Source.read(folder)
