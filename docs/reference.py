"""Write the reference: a table of the names that users import, a page for each of them, and pages
of the modules.
"""

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

FEDERATION = (
    "server client node discovery peer_table trust manifest credentials keys cache catalog follow"
)
MODELS = (
    "twins layers rows folding adapt checkpoint manager registry encoder encoder_folder any_encoder"
)
TRAINING = "data retrieval synthetic losses schedules ewc train online_adapter"
EVOLUTION = (
    "probe documents novelty acceptance exam distill teacher queue database nights worker factory"
)
TESTING = "bench binding domains remote serve reference plugin tolerance strategies report"
FILTER = '<input class="filter" type="search" hidden placeholder="{}" aria-label="Filter the rows">'
"""A box that filter.js shows, and that hides the rows of a page's tables."""

REFERENCE = {
    "Cards": ["card", "arrow_format", "files", "ipc_check", "checks", "errors"],
    "Algebra and targets": [
        *("factors", "blas"),
        "targets",
        "experts",
        "merging",
        "extract",
        "presets",
        "drawing",
    ],
    "Interop": [
        *("interop.peft", "interop.safetensors", "interop.foreign_names", "interop.hub"),
        *("interop.factor_files", "interop.weights"),
    ],
    "Models": [f"models.{name}" for name in MODELS.split()],
    "Routing": ["routing", "router"],
    "Engine": ["engine", "state", "batches", "metrics"],
    "Federation": [f"federation.{name}" for name in f"{FEDERATION} stream_limits fork".split()],
    "Training": [*(f"training.{name}" for name in TRAINING.split()), "progress"],
    "Evolution": [*(f"evolution.{name}" for name in EVOLUTION.split()), "learning"],
    "Testing": [f"testing.{name}" for name in f"{TESTING} requirements".split()],
}

PACKAGES = ("lora", "lora.training", "lora.federation", "lora.evolution")
ALSO = {
    "engine": "default_model",
    "factors": "delta spectrum",
    "merging": "Average Weighted Slerp TaskArithmetic Cat Ties Dare",
    "interop.peft": "import_peft export_peft",
    "interop.safetensors": "save_safetensors load_safetensors",
    "models.adapt": "init_card injections linears",
    "models.any_encoder": "PooledEncoder",
    "federation.keys": "generate_key sign_file",
    "training.train": "Settings",
    "training.data": "docstring_pairs",
    "training.synthetic": "synthetic_pairs",
    "testing.binding": "Binding PlainCard PlainPair",
}
"""Whose names have pages: all of these packages', and those of these modules that guides use."""


@dataclass(frozen=True)
class Name:
    """A name that users import.

    Args:
        path: As users write it, such as `lora.adapt`.
        home: Where it is defined, such as `lora.models.adapt`.
        chapter: The title of the page of its module.
        sentence: The first of its docstring.
    """

    path: str
    home: str
    chapter: str
    sentence: str

    @property
    def defined(self) -> str:
        """Its path in the module that defines it."""
        return f"{self.home}.{self.path.rpartition('.')[2]}"


def names() -> list[Name]:
    """Return every name that has a page, by chapter; of several paths the first one."""
    chapters = {f"lora.{module}": title for title, part in REFERENCE.items() for module in part}
    offered = [f"{p}.{name}" for p in PACKAGES for name in importlib.import_module(p).__all__]
    also = [f"lora.{module}.{name}" for module, part in ALSO.items() for name in part.split()]
    by_definition: dict[str, Name] = {}
    for path in [*offered, *also]:
        package, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(package), name)
        if not inspect.ismodule(value):
            entry = Name(path, value.__module__, chapters[value.__module__], sentence_of(value))
            by_definition.setdefault(entry.defined, entry)
    return sorted(by_definition.values(), key=lambda entry: list(REFERENCE).index(entry.chapter))


def sentence_of(value: Any) -> str:
    """Return the first sentence of a docstring, on one line."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\w\.|[)`]\.) (?=[A-Z])", text)[0].replace("``", "`")


def documented(module: str) -> list[str]:
    """Return the public names that a module defines and documents, in its own order."""
    source = inspect.getsource(importlib.import_module(module))
    body, listed = ast.parse(source).body, list[str]()
    for node, after in pairwise([*body, ast.Pass()]):
        match node, after:
            case (ast.ClassDef(name=name) | ast.FunctionDef(name=name), _):
                docstring = ast.get_docstring(node)
            case (
                ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str())),
            ):
                docstring = "a string below it"
            case _:
                continue
        if docstring and not name.startswith("_"):
            listed.append(name)
    return listed


def escaped(text: str) -> str:
    """Text for a cell of a table: no mark of a table, a link or HTML but in code."""
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(
        part if code else re.sub(r"[|\[\]<]", lambda mark: f"&#{ord(mark[0])};", part)
        for code, part in zip(itertools.cycle([False, True]), parts, strict=False)
    )


def page_of(title: str) -> str:
    """The file of the page of a chapter's modules."""
    return f"reference-{title.lower().replace(' ', '-')}.md"


def page_of_module(module: str) -> str:
    """The place of a module, such as `models.adapt`; empty where the reference has none."""
    titles = [title for title, part in REFERENCE.items() if module in part]
    return f"{page_of(titles[0])}#lora{module.replace('.', '')}" if titles else ""


def modules(title: str, own: Sequence[Name]) -> str:
    """A page that mkdocstrings fills: a chapter's modules, without the names that have pages."""
    lines = [f"# {title}: modules", "", "For those who read or extend the library itself.", ""]
    for module in REFERENCE[title]:
        path = f"lora.{module}"
        apart = [entry for entry in own if entry.home == path]
        lines += [f"## {path}", ""]
        if apart:
            links = [f'<span id="{e.defined}">[{e.path}]({e.path}.md)</span>' for e in apart]
            lines += [f"On pages of their own: {', '.join(links)}.", ""]
        elsewhere = {entry.defined for entry in apart}
        left = [name for name in documented(path) if f"{path}.{name}" not in elsewhere]
        lines += [f"::: {path}", "    options:", f"      members: {left}", ""]
    return "\n".join(lines)


def page(entry: Name, chapters: Sequence[str]) -> str:
    """The page of one name, which mkdocstrings fills; below it, where it is from and held to."""
    package, _, name = entry.path.rpartition(".")
    module = page_of_module(entry.home.removeprefix("lora."))
    lines = ["---", "search:", "  boost: 4", "---", "", f"::: {entry.path}", "    options:"]
    lines += ["      heading_level: 1", "      show_root_heading: true", "      show_bases: false"]
    lines += ["      show_root_full_path: true", "", "---", ""]
    lines += [f"`from {package} import {name}`, defined in [{entry.home}]({module})."]
    value = getattr(importlib.import_module(package), name)
    others = [p for p in PACKAGES if getattr(importlib.import_module(p), name, ...) is value]
    if also := [f"`{other}`" for other in others if other != package]:
        lines += [f"The same as in {', '.join(also)}."]
    if chapters:
        lines += ["", f"Requirements that hold for it: {', '.join(chapters)}."]
    return "\n".join([*lines, ""])


def overview(entries: Sequence[Name]) -> str:
    """The table of all names, by chapter, and the way to the modules."""
    lines = ["# Names", "", "Every name that you import, with what it is.", ""]
    lines += [FILTER.format("Filter: merge, rank, PEFT …"), ""]
    for title in REFERENCE:
        own = [entry for entry in entries if entry.chapter == title]
        lines += [f"## {title}", ""]
        if own:
            lines += ["| name | what it is |", "|---|---|"]
            lines += [f"| [`{e.path}`]({e.path}.md) | {escaped(e.sentence)} |" for e in own]
        lines += ["", f"[The modules of this chapter]({page_of(title)})", ""]
    return "\n".join(lines)
