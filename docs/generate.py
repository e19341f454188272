"""Write the documentation pages that are made from data: traceability, the conformance matrix, the API reference."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import lora
from lora.presets import cost_table
from lora.rewrite import linears
from lora.testing.trace import read_code, read_spec, read_tests

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "generated"
REPORTS = ROOT / "conformance"
MARKS = {
    "passed": ":white_check_mark:",
    "failed": ":x:",
    "expected failure": ":warning:",
    "skipped": ":heavy_minus_sign:",
    "unexpected pass": ":grey_question:",
}
sys.path.insert(0, str(ROOT))
from tests.faults.test_faults import FAMILIES  # noqa: E402 - beside the tests, in no package

KINDS = {"P*": "property (any implementation)", "P": "property", "U": "test", "B": "benchmark", "D": "documentation"}

FEDERATION = [
    "server",
    "client",
    "node",
    "discovery",
    "peers",
    "trust",
    "manifest",
    "access",
    "keys",
    "cache",
    "streams",
]
TRAINING = ["data", "synthetic", "losses", "schedules", "ewc", "train", "online", "probe"]
EVOLUTION = ["novelty", "gate", "distill", "cloud", "queue", "nights", "work", "factory"]
REFERENCE = {
    "Cards": ["card", "table", "store", "errors"],
    "Algebra and targets": ["lowrank", "targets", "merging", "extract", "weights", "presets", "drawing"],
    "Interop": ["interop.peft", "interop.safetensors"],
    "Models": ["layer", "rewrite", "inference.manager", "inference.registry", "inference.encoder"],
    "Routing": ["routing", "inference.router"],
    "Engine": ["engine", "batches", "metrics"],
    "Federation": [f"federation.{name}" for name in FEDERATION],
    "Training": [f"evolution.{name}" for name in TRAINING],
    "Evolution": [*(f"evolution.{name}" for name in EVOLUTION), "evolving"],
    "Testing": ["testing.binding", "testing.tolerance", "testing.strategies", "testing.report", "testing.trace"],
}


def reports() -> list[dict[str, Any]]:
    """What ``lora conformance`` found on each binding, the reference first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(REPORTS.glob("*.json"))]
    return sorted(found, key=lambda report: (report["binding"]["name"] != "lora-cards", report["binding"]["name"]))


def matrix() -> str:
    """A row for each requirement that any implementation can be held to, a column for each binding."""
    columns, spec = reports(), read_spec(ROOT / "spec")
    names = [f"{report['binding']['name']} {report['binding']['version']}" for report in columns]
    lines = [
        "# Conformance",
        "",
        "The properties of `lora conformance`, held against each binding of this repository.",
        "",
    ]
    lines += [", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items()) + ".", ""]
    lines += ["| id | requirement | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    told: dict[str, set[str]] = {}
    for requirement in spec.values():
        entries = [report["requirements"].get(requirement.id) for report in columns]
        if any(entries):
            cells = [MARKS[entry["verdict"]] if entry else "" for entry in entries]
            lines.append(f"| {requirement.id} | {escaped(requirement.sentence)} | {' | '.join(cells)} |")
        for name, entry in zip(names, entries, strict=True):
            if entry and entry["reason"]:
                told.setdefault(f"**{name}**: {escaped(entry['reason'])}", set()).add(requirement.id)
    lines += ["", "## What a binding does otherwise, or lacks, and why", ""]
    lines += [f"- {reason} ({', '.join(sorted(ids))})" for reason, ids in told.items()]
    lines += ["", f"Profile `{columns[0]['profile']}`, seed {columns[0]['seed']}, suite {columns[0]['suite']}."]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return re.sub(r"([|\[\]<])", r"\\\1", text)


def traceability() -> str:
    """A table for each chapter: requirement, kind, sentence, code, tests, examples run, faults found."""
    spec, tests, code = read_spec(ROOT / "spec"), read_tests(ROOT / "tests"), read_code(ROOT / "lora")
    ran = reports()[0]["requirements"]
    lines = ["# Traceability", "", "Every requirement, the code that names it, and the tests that hold it.", ""]
    chapter = ""
    for requirement in spec.values():
        if requirement.chapter != chapter:
            chapter = requirement.chapter
            lines += [
                "",
                f"## {chapter}",
                "",
                "| id | evidence | requirement | code | tests | examples | faults found |",
                "|---|---|---|---|---|---|---|",
            ]
        kind = KINDS[requirement.evidence] if requirement.status == "built" else "planned"
        where = "<br>".join(f"`{name}`" for name in code.get(requirement.id, []))
        found = "<br>".join(f"`{e.test.split('/')[-1]}` ({e.kind})" for e in tests if requirement.id in e.ids)
        examples = sum(test["examples"] for test in ran.get(requirement.id, {"tests": []})["tests"]) or ""
        killed = "<br>".join(
            f"`{fault.__name__}`"
            for family in FAMILIES.values()
            for fault in family
            if requirement.id in fault.turns_red
        )
        row = (requirement.id, kind, escaped(requirement.sentence), where, found, examples, killed)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def presets() -> str:
    """What each preset costs on the embedded encoder, and on a decoder of Llama 3.1 8B's shapes."""
    engine = lora.ArrowEngine.from_pretrained(None)
    encoder = {name: (site.in_features, site.out_features) for name, site in linears(engine.base).items()}
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    decoder = {f"model.layers.{i}.self_attn.{part}_proj": shape for i in range(32) for part, shape in shapes.items()}
    for i in range(32):
        decoder |= {f"model.layers.{i}.mlp.{part}_proj": (4096, 14336) for part in ("gate", "up")}
        decoder[f"model.layers.{i}.mlp.down_proj"] = (14336, 4096)
    table = cost_table({"all-MiniLM-L6-v2": encoder, "Llama 3.1 8B": decoder})
    told = "Derived from the models' real module names and shapes by `lora.presets.fit`."
    return f"# Presets\n\n{told}\n\n{table}\n"


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
    (OUT / "presets.md").write_text(presets(), encoding="utf-8")
    (OUT / "conformance.md").write_text(matrix(), encoding="utf-8")
    for title, modules in REFERENCE.items():
        page = OUT / f"reference-{title.lower().replace(' ', '-')}.md"
        page.write_text(reference(modules, title), encoding="utf-8")


if __name__ == "__main__":
    main()
