"""The tables of the page on the field, of what ``make field`` wrote to ``tests/field/results``."""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIELD = ROOT / "tests" / "field"

MARKS = {
    "law": ("✓", '<span class="broken">✗</span>'),
    "convention": ("✓", '<span class="different">≠</span>'),
    "refusal": ("✓", '<span class="accepted">○</span>'),
    "format": ("✓", '<span class="broken">✗</span>'),
}
"""For each class of properties: as specified, and otherwise."""

WORDS = {
    "law": ("hold", "broken", "broken"),
    "convention": ("alike", "different", "different"),
    "refusal": ("refused", "accepted", "accepted"),
    "format": ("kept", "broken", "broken"),
}
"""What the overview says of so many, and the colour of the second."""

CHAPTERS = {
    "Layers": ("R2.", "R8.", "R9."),
    "Targets": ("R3.", "R7.2"),
    "Merging": ("R20.",),
    "Extraction": ("R16.",),
    "Routing": ("R4.",),
    "Cards": ("R1.", "R7.6", "R24."),
}
"""Headings, and the requirements below each."""

Result = Mapping[str, Any]


def read() -> list[Result]:
    """Return the results of all rows in the order of ``rows.toml``; one without is not run.

    Each deviation has, under ``"seen"``, what a second reading found at its place in that version.
    """
    rows = tomllib.loads((FIELD / "rows.toml").read_text(encoding="utf-8"))
    readings = tomllib.loads((FIELD / "readings.toml").read_text(encoding="utf-8"))
    results = []
    for name, row in rows.items():
        path = FIELD / "results" / f"{name}.json"
        result = {"row": name, "state": "not run", "reason": "it was never measured"}
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
        reading = readings.get(row.get("environment", name), {})
        places = reading["places"] if reading.get("version") == result.get("version") else {}
        for deviation in result.get("deviations", []):
            deviation["seen"] = places.get(deviation["place"], {}).get("is", row.get("seen", ""))
        for place, seen in places.items() if "outside" in result else ():
            result["outside"] = result["outside"].replace(place, f"{place}; {seen['is']}")
        results.append(result)
    return results


def page(results: Sequence[Result]) -> str:
    """Return the overview, a table for each chapter, and why rows differ or were not run."""
    measured = [result for result in results if result["state"] != "not run"]
    lines = ["| library | version | laws | conventions | refusals | format | read again |"]
    lines += ["|---" * 7 + "|", *map(overview, measured), ""]
    idle = [result for result in results if result["state"] == "not run"]
    lines += [f"- *{result['row']}* was not run: {escaped(result['reason'])}" for result in idle]
    limits = [(result["row"], result["outside"]) for result in measured if result.get("outside")]
    lines += [f"- Outside of *{name}*: {escaped(outside)}." for name, outside in limits]
    for heading, prefixes in CHAPTERS.items():
        lines += chapter(measured, heading, prefixes)
    about = [f"profile {r['profile']}, suite {r['suite']}" for r in measured]
    about += [f"specification {r['specification']}" for r in measured]
    dates = sorted({result["date"] for result in measured})
    lines += ["", f"Measured on {', '.join(dates)}; {', '.join(dict.fromkeys(about))}."]
    return "\n".join(lines) + "\n"


def overview(result: Result) -> str:
    """Return a row's numbers of ids, class by class, and what a second reading found."""
    cells = []
    for kind, (well, *_) in WORDS.items():
        judged = [
            (well, "") if classes[kind] == "passed" else WORDS[colour_of(result, name, kind)][1:]
            for name, classes in result["verdicts"].items()
            if kind in classes
        ]
        counts = Counter(sorted(judged, key=lambda word: word[1]))
        cells.append(
            ", ".join(coloured(f"{n} {word}", c) for (word, c), n in counts.items()) or "–"
        )
    seen = Counter(deviation.get("seen") or "not yet" for deviation in result["deviations"])
    cells.append(", ".join(f"{n} {word}" for word, n in sorted(seen.items())) or "–")
    return "| " + " | ".join([result["row"], result["version"], *cells]) + " |"


def coloured(text: str, colour: str) -> str:
    """Return text in a colour of the site's style, if it has one."""
    return f'<span class="{colour}">{text}</span>' if colour else text


def colour_of(result: Result, name: str, kind: str) -> str:
    """Return the class as which a deviation is shown.

    A law is broken by a fault, and by what nobody has read again; what the library does on purpose
    or in float32 is different, as a convention is.
    """
    seen = {
        deviation.get("seen", "")
        for deviation in result["deviations"]
        if (deviation["requirement"], deviation["class"]) == (name, kind)
    }
    return "convention" if kind == "law" and seen and seen.isdisjoint({"", "fault"}) else kind


def chapter(measured: Sequence[Result], heading: str, prefixes: tuple[str, ...]) -> Iterator[str]:
    """Yield a heading, a table of requirements and the rows that reach them, and its notes."""
    known = {
        name for result in measured for name in result["verdicts"] if name.startswith(prefixes)
    }
    names = sorted(known, key=lambda name: [int(part) for part in name[1:].split(".")])
    if not names:
        return
    yield from ("", f"## {heading}", "")
    columns = [result for result in measured if known & result["verdicts"].keys()]
    notes: dict[str, int] = {}
    heads = [f'<span class="column">{result["row"]}</span>' for result in columns]
    yield f"| id | {' | '.join(heads)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in names:
        cells = [cell(result, name, notes) for result in columns]
        place = f"generated/{name.partition('.')[0]}.md#{name}"
        yield f"| [{name}]({place}) | {' | '.join(cells)} |"
    yield ""
    yield from (f"{number}. {note}" for note, number in notes.items())


def cell(result: Result, name: str, notes: dict[str, int]) -> str:
    """Return a mark for each class, and the numbers of the notes that say why."""
    classes = result["verdicts"].get(name, {})
    marks = [
        MARKS[kind][0] if verdict == "passed" else MARKS[colour_of(result, name, kind)][1]
        for kind, verdict in classes.items()
    ]
    numbers = []
    for deviation in result["deviations"]:
        if deviation["requirement"] == name:
            places = [deviation["place"], deviation.get("seen", "")]
            place = f" ({'; '.join(filter(None, places))})" if any(places) else ""
            note = f"**{result['row']}**: {escaped(deviation['reason'] + place)}"
            numbers.append(notes.setdefault(note, len(notes) + 1))
    text = " ".join(dict.fromkeys(marks)) or "–"
    references = ", ".join(str(number) for number in dict.fromkeys(numbers))
    return f"{text} <sup>{references}</sup>" if references else text


def escaped(text: str) -> str:
    """Text in a table or list of Markdown."""
    return re.sub(r"([|\[\]<*_`])", r"\\\1", text)
