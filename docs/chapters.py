"""Write the pages of the specification: a page a chapter with each requirement, its tests and what
implementations make of it, and tables of them all.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.testing.requirements import Requirement, read_spec

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "conformance"
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
from reference import FILTER, escaped, page_of_module  # noqa: E402 - beside this file, in no package

from tests.faults.test_faults import FAMILIES  # noqa: E402 - beside the tests, in no package
from tests.sharp.__main__ import LAST  # noqa: E402 - as above
from tests.trace import Evidence, read_code, read_tests  # noqa: E402 - as above

Report = Mapping[str, Any]

MARKS = {
    "passed": "✓",
    "failed": '<span class="broken">✗</span>',
    "broken": '<span class="broken">!</span>',
    "expected failure": '<span class="accepted">(✗)</span>',
    "skipped": "–",
    "unexpected pass": "?",
}
WORDS = {
    "skipped": "no such feature",
    "expected failure": "differs, as its binding declares",
}
"""What the pages say of a verdict, if not its name."""

IMPLEMENTATIONS = {
    "lora-cards": "this library",
    "PEFT": "the library of Hugging Face, as it is installed",
    "faulty: ScalingIgnored": "this library with a fault put in, so that the suite must fail",
    "numpy-only": "a second implementation, of NumPy alone",
}
"""What each binding of this repository tests."""

KINDS = {
    "P*": "property (any implementation)",
    "P": "property",
    "U": "test",
    "B": "benchmark",
    "D": "documentation",
}


@dataclass(frozen=True)
class Trace:
    """All that is known of the requirements: of whom which test proves what, and who passes it."""

    spec: Mapping[str, Requirement]
    tests: Sequence[Evidence]
    code: Mapping[str, Sequence[str]]
    reports: Sequence[Report]

    def chapters(self) -> dict[str, list[Requirement]]:
        """The requirements of each chapter, by its number."""
        chapters: dict[str, list[Requirement]] = {}
        for requirement in self.spec.values():
            chapters.setdefault(requirement.id.partition(".")[0], []).append(requirement)
        return chapters

    def evidence(self, id_: str) -> list[Evidence]:
        """The tests that prove a requirement."""
        return [evidence for evidence in self.tests if id_ in evidence.ids]

    def entries(self, id_: str) -> list[Report]:
        """What each implementation makes of a requirement; empty where it is not neutral."""
        return [report["requirements"].get(id_) or {} for report in self.reports]

    def examples(self, id_: str) -> int:
        """How many examples the properties of the reference drew."""
        ran = self.reports[0]["requirements"].get(id_, {"tests": []})
        return sum(test["examples"] for test in ran["tests"])


def read() -> Trace:
    """Read the specification, the tests, the package and the reports."""
    code = read_code(ROOT / "lora")
    return Trace(read_spec(ROOT / "spec"), read_tests(ROOT / "tests"), code, reports())


def reports() -> list[Report]:
    """What ``lora conformance`` found on each binding, the reference first."""
    verdicts = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(REPORTS.glob("*.json"))
    ]
    return sorted(
        verdicts,
        key=lambda report: (report["binding"]["name"] != "lora-cards", report["binding"]["name"]),
    )


def named(report: Report) -> str:
    """An implementation and its version."""
    return f"{report['binding']['name']} {report['binding']['version']}"


def link(id_: str) -> str:
    """A requirement's place on the page of its chapter."""
    return f"[{id_}]({id_.partition('.')[0]}.md#{id_})"


def killed(id_: str) -> list[str]:
    """The faults, seeded on purpose, that a requirement's properties find."""
    known = (fault for family in FAMILIES.values() for fault in family)
    return [fault.__name__ for fault in known if id_ in fault.turns_red]


def matrix(trace: Trace) -> str:
    """Return the matrix: a row for each neutral requirement, a column for each binding."""
    heads = [f'<span class="column">{r["binding"]["name"]}</span>' for r in trace.reports]
    marks = ", ".join(f"{mark} {WORDS.get(verdict, verdict)}" for verdict, mark in MARKS.items())
    lines = [
        "# Conformance",
        "",
        "What each implementation in this repository makes of the properties of",
        "`lora conformance`, a test suite for LoRA code. A *card* is an adapter, kept as one",
        "object and one file. Each requirement is counted once, as its worst mark; a feature that",
        "an implementation lacks is no failure.",
        "",
        *totals(trace.reports),
        "",
        "## Every requirement",
        "",
        "A requirement leads to its sentence, its tests, and the reasons. It can have up to four",
        "kinds of test: laws, conventions, refusals, and the file format. If their results differ,",
        "each is shown.",
        "",
        f"{marks}.",
        "",
        FILTER.format("Filter: R4, router, threshold …"),
        "",
        f'| id | {" | ".join(heads)} | <span class="sentence">requirement</span> |',
        "|---" * (len(heads) + 2) + "|",
    ]
    ids_by_reason: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for requirement in trace.spec.values():
        entries = trace.entries(requirement.id)
        if any(entries):
            cells = [marked(entry) if entry else "" for entry in entries]
            sentence = f'<span class="sentence">{escaped(requirement.sentence)}</span>'
            lines.append(f"| {link(requirement.id)} | {' | '.join(cells)} | {sentence} |")
            for report, entry in zip(trace.reports, entries, strict=True):
                for lacks, reasons in ids_by_reason.items():
                    for reason in reasons_of(entry, lacks=lacks):
                        line = f"**{named(report)}**: {escaped(reason)}"
                        reasons.setdefault(line, []).append(link(requirement.id))
    first = trace.reports[0]
    titles = {
        True: "Features that an implementation lacks",
        False: "What an implementation does otherwise",
    }
    for lacks, reasons in ids_by_reason.items():
        lines += ["", f"## {titles[lacks]}", ""]
        lines += [f"- {reason} ({', '.join(ids)})" for reason, ids in reasons.items()]
    lines += [
        "",
        f"Profile `{first['profile']}`, seed {first['seed']}, suite {first['suite']},",
        f"specification {first['specification']}.",
    ]
    return "\n".join(lines) + "\n"


def totals(all_reports: Sequence[Report]) -> Iterator[str]:
    """A table of how many requirements each implementation passes, differs from, fails or lacks."""
    order = ("broken", "failed", "unexpected pass", "expected failure", "passed", "skipped")
    columns = {
        "passed": {"passed"},
        "(✗) differs": {"expected failure"},
        "✗ failed": {"broken", "failed", "unexpected pass"},
        "– no such feature": {"skipped"},
    }
    yield f"| implementation | {' | '.join(columns)} | what it is |"
    yield "|---|---|" + "---|" * len(columns)
    for report in all_reports:
        worst = [
            min(entry["classes"].values() or [entry["verdict"]], key=order.index)
            for entry in report["requirements"].values()
        ]
        counts = [sum(verdict in kinds for verdict in worst) for kinds in columns.values()]
        about = IMPLEMENTATIONS.get(report["binding"]["name"], "")
        yield f"| {named(report)} | {' | '.join(map(str, counts))} | {about} |"


def marked(entry: Report) -> str:
    """Return the mark of a verdict, or one for each class where they differ."""
    classes = entry["classes"]
    if len(set(classes.values())) < 2:
        why = escaped("; ".join(reasons_of(entry))).replace('"', "&quot;")
        mark = MARKS[entry["verdict"]]
        return f'<span title="{why}">{mark}</span>' if why else mark
    return " ".join(
        f'<span title="{kind}: {WORDS.get(verdict, verdict)}">{MARKS[verdict]}</span>'
        for kind, verdict in classes.items()
    )


def reasons_of(entry: Report, *, lacks: bool | None = None) -> list[str]:
    """Why a binding deviates, each reason once and without the example that shows it; where
    ``lacks`` is given, of what it lacks alone, or of the rest.
    """
    reasons = [
        test["reason"].partition("\nFailing")[0]
        for test in entry.get("tests", [])
        if lacks in (None, test["verdict"] == "skipped")
    ]
    return [reason for reason in dict.fromkeys(reasons) if reason]


def traceability(trace: Trace) -> str:
    """Return a table of chapters beside implementations, and a folded table of each chapter."""
    names = [each["binding"]["name"] for each in trace.reports]
    heads = [
        f'<span class="column">{head}</span>'
        for head in ("requirements", "tests", "for any implementation", *names)
    ]
    lines = [
        "# Traceability",
        "",
        "Each requirement leads to its sentence and to the tests that hold it.",
        "",
        *violations(),
        "How many requirements of each chapter have properties for any implementation, and how",
        "many of these each implementation passes:",
        "",
        f"| chapter | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for number, chapter in trace.chapters().items():
        ids = [requirement.id for requirement in chapter]
        tests = sum(not set(ids).isdisjoint(evidence.ids) for evidence in trace.tests)
        entries = [list(filter(None, row)) for row in zip(*map(trace.entries, ids), strict=True)]
        neutral = len(entries[0]) if entries else 0
        passed = [sum(entry["verdict"] == "passed" for entry in row) for row in entries]
        cells = [len(ids), tests, *([neutral, *passed] if neutral else [""] * (1 + len(names)))]
        lines.append(f"| [{chapter[0].chapter}]({number}.md) | {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "## Every requirement",
        "",
        "What shows that it holds, how many tests do so, how many examples their properties drew",
        "for this library, and how many faults, seeded on purpose, they found.",
        "",
        FILTER.format("Filter: R4, property, hot swap …"),
    ]
    for chapter in trace.chapters().values():
        lines += ["", "<details markdown>", f"<summary>{chapter[0].chapter}</summary>", ""]
        head = "id | shown by | tests | examples | faults"
        lines += [f'| {head} | <span class="sentence">requirement</span> |', "|---" * 6 + "|"]
        lines += [_traced(trace, requirement) for requirement in chapter]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _traced(trace: Trace, requirement: Requirement) -> str:
    """A requirement's row, with the number of its tests."""
    id_ = requirement.id
    cells = (
        f'<span id="{id_}">{link(id_)}</span>',
        KINDS[requirement.evidence].partition(" (")[0],
        f"{len(trace.evidence(id_))}",
        f"{trace.examples(id_):,}" if trace.examples(id_) else "",
        f"{len(killed(id_))}" if killed(id_) else "",
        f'<span class="sentence">{escaped(requirement.sentence)}</span>',
    )
    return f"| {' | '.join(cells)} |"


def violations() -> list[str]:
    """What the last whole run of `make sharp` found, if there was one."""
    if not LAST.exists():
        return []
    last = json.loads(LAST.read_text(encoding="utf-8"))
    return [
        "Each requirement was broken on purpose:",
        f"{last['red']} of {last['all']} violations turned a test of their requirement red",
        f"(`make sharp` at {last['commit']}, {last['date']}, {last['seconds'] / 60:.0f} minutes).",
        "",
    ]


def specification(trace: Trace) -> str:
    """Every chapter with its requirements, as `spec/` has them."""
    lines = ["# Requirements", ""]
    lines += [f"{len(trace.spec)} sentences, each with what shows that it holds.", ""]
    lines += [FILTER.format("Filter: R4, merge, scaling …")]
    for chapter in trace.chapters().values():
        lines += ["", f"## {chapter[0].chapter}", "", "| id | requirement |", "|---|---|"]
        for requirement in chapter:
            sentence = escaped(requirement.sentence)
            lines.append(f"| {link(requirement.id)} | {sentence}<br>*{kind_of(requirement)}* |")
    return "\n".join(lines) + "\n"


def kind_of(requirement: Requirement) -> str:
    """What shows that it holds, and whether it is built."""
    return KINDS[requirement.evidence] + ("" if requirement.status == "built" else ", planned")


def pages(trace: Trace) -> dict[str, str]:
    """Every page by its file."""
    texts = {
        "traceability.md": traceability(trace),
        "conformance.md": matrix(trace),
        "specification.md": specification(trace),
    }
    for number, chapter in trace.chapters().items():
        texts[f"{number}.md"] = "\n".join(_chapter(trace, number, chapter)) + "\n"
    return texts


def _chapter(trace: Trace, number: str, chapter: Sequence[Requirement]) -> Iterator[str]:
    """Yield the page of a chapter: its code, then a section for each requirement."""
    modules = [path.removesuffix(".py").replace("/", ".") for path in trace.code.get(number, [])]
    places = [page_of_module(module) for module in modules]
    links = [
        f"[lora.{module}]({place})" if place else f"`lora.{module}`"
        for module, place in zip(modules, places, strict=True)
    ]
    yield from (f"# {chapter[0].chapter}", "", f"Code: {', '.join(links) or 'none'}.")
    for requirement in chapter:
        id_ = requirement.id
        yield from ("", f"## {id_} {{#{id_}}}", "", escaped(requirement.sentence), "")
        facts = [f"Shown by: {kind_of(requirement)}"]
        facts += [f"{trace.examples(id_):,} examples"] if trace.examples(id_) else []
        faults = ", ".join(f"`{name}`" for name in killed(id_))
        facts += [f"faults found: {faults}"] if faults else []
        yield "; ".join(facts) + "."
        if any(entries := trace.entries(id_)):
            yield from ("", "| implementation | verdict |", "|---|---|")
            for report, entry in zip(trace.reports, entries, strict=True):
                yield f"| {named(report)} | {_verdict(entry)} |"
        neutral = {"P*": " (any implementation)"}
        tests = [f"- `{e.test}`{neutral.get(e.kind, '')}" for e in trace.evidence(id_)]
        yield from ("", *tests)


def _verdict(entry: Report) -> str:
    """What an implementation makes of a requirement in words, and why."""
    if not entry:
        return ""
    verdicts = list(dict.fromkeys(entry["classes"].values())) or [entry["verdict"]]
    if len(verdicts) > 1:
        words = ", ".join(f"{kind}: {WORDS.get(v, v)}" for kind, v in entry["classes"].items())
    else:
        words = WORDS.get(verdicts[0], verdicts[0])
    marks = " ".join(MARKS[verdict] for verdict in verdicts)
    reasons = ";<br>".join(escaped(reason) for reason in reasons_of(entry))
    return f"{marks} {words}{f':<br>{reasons}' if reasons else ''}"
