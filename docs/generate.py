"""Write the documentation pages that are made from data: traceability, and the API reference, one page a module."""

import importlib
import re
from pathlib import Path

from lora.testing.trace import read_code, read_spec, read_tests

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "generated"
KINDS = {"P*": "property (any implementation)", "P": "property", "U": "test", "B": "benchmark", "D": "documentation"}

REFERENCE = {
    "Cards": ["card", "table", "store", "errors"],
    "Algebra and targets": ["lowrank", "targets"],
    "Models": ["layer", "rewrite", "inference.manager", "inference.encoder"],
    "Routing": ["routing", "inference.router"],
    "Engine": ["engine"],
    "Training": ["evolution.data", "evolution.train"],
    "Testing": ["testing.binding", "testing.tolerance", "testing.strategies", "testing.trace"],
}


def traceability() -> str:
    """A table for each chapter: requirement, kind, sentence, code, tests."""
    spec, tests, code = read_spec(ROOT / "spec"), read_tests(ROOT / "tests"), read_code(ROOT / "lora")
    lines = ["# Traceability", "", "Every requirement, the code that names it, and the tests that hold it.", ""]
    chapter = ""
    for requirement in spec.values():
        if requirement.chapter != chapter:
            chapter = requirement.chapter
            lines += [
                "",
                f"## {chapter}",
                "",
                "| id | evidence | requirement | code | tests |",
                "|---|---|---|---|---|",
            ]
        kind = KINDS[requirement.evidence] if requirement.status == "built" else "planned"
        where = "<br>".join(f"`{name}`" for name in code.get(requirement.id, []))
        found = "<br>".join(f"`{e.test.split('/')[-1]}` ({e.kind})" for e in tests if requirement.id in e.ids)
        sentence = re.sub(r"([|\[\]<])", r"\\\1", requirement.sentence)
        lines.append(f"| {requirement.id} | {kind} | {sentence} | {where} | {found} |")
    return "\n".join(lines) + "\n"


def reference(modules: list[str], title: str) -> str:
    """A page that mkdocstrings fills."""
    lines = [f"# {title}", ""]
    for name in modules:
        module = importlib.import_module(f"lora.{name}")
        lines += [f"## lora.{name}", "", (module.__doc__ or "").strip(), "", f"::: lora.{name}", ""]
    return "\n".join(lines)


def main() -> None:
    """Write every page."""
    OUT.mkdir(exist_ok=True)
    (OUT / "traceability.md").write_text(traceability(), encoding="utf-8")
    for title, modules in REFERENCE.items():
        page = OUT / f"reference-{title.lower().replace(' ', '-')}.md"
        page.write_text(reference(modules, title), encoding="utf-8")


if __name__ == "__main__":
    main()
