"""Tell and draw what ``benchmarks/results.json`` holds: the page of all figures, charts, and the
table of the README; and tell what ``benchmarks/model_matrix.json`` holds, as a table.

Run by itself, it writes that table into ``README.md`` anew; given a file of `lora bench`, it first
puts what that measured in the place of what was known of the same scripts.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from lora.testing.bench import shown

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]
import claims  # noqa: E402 - beside this file, in no package
from code_digests import digests  # noqa: E402 - of a folder that is no package
from diagrams import Colours, Draw, picture, write  # noqa: E402 - beside this file, in no package
from reference import FILTER  # noqa: E402 - as above

RESULTS = ROOT / "benchmarks" / "results.json"
MODELS = ROOT / "benchmarks" / "model_matrix.json"
START, END = "<!-- figures -->\n", "<!-- end of figures -->\n"

Row = Mapping[str, Any]
Report = Mapping[str, Any]


COMPARED: Sequence[tuple[str, str, str, str, str]] = (
    (
        "lifecycle",
        "load a card, r8 q,v",
        "lora.load",
        "PEFT load_adapter",
        "load a card of 12 modules",
    ),
    ("lifecycle", "swap, r8 q,v", "swap", "PEFT set_adapter", "switch to prepared adapters"),
    (
        "throughput",
        "encode 2,000 sentences",
        "engine.encode",
        "sentence-transformers",
        "encode 2,000 sentences",
    ),
    (
        "merge_extract",
        "merge 3 cards of rank 16, 768 x 768",
        "merge",
        "PEFT svd",
        "merge three cards of rank 16",
    ),
    (
        "training",
        "a step of 64 pairs",
        "LoRATrainer",
        "PEFT in a loop",
        "training step of 64 pairs of texts",
    ),
    (
        "models",
        "a merged checkpoint of 2.0 GB, r16 all Linears",
        "fold_checkpoint",
        "copytree",
        "fold a card into a checkpoint of 2 GB",
    ),
    (
        "forward",
        "one card, r8 q,v, 128 tokens",
        "LoRALinear",
        "PEFT",
        "forward of 128 tokens, rank 8 on query and value",
    ),
    (
        "models",
        "generate for 32 rows with 8 adapters, greedy, shuffled",
        "ours",
        "PEFT",
        "generate for 32 prompts, 8 adapters",
    ),
)
"""What the README tells: script, figure, side, peer, and its name there."""
MEASURED_MODELS = (
    "The model is all-MiniLM-L6-v2; only the merge (one Linear of 768 × 768), the prompts (a small "
    "Llama) and the checkpoints have random weights. *r8 q,v* is rank 8 on query and value. "
    "*Undecided*: the interval holds 1, or two intervals overlap."
)
SHARE = {
    "ratio": lambda value: value,
    "times faster": lambda value: 1 / value,
    "overhead": lambda value: 1 + value,
}
"""What each kind of figure says of the time, as a share of the other's."""

ADAPTED = {"LoRALinear", "folded", "ours", "three", "three folded"}
"""The ways in which this library runs cards."""

OWN = {"one adapter", "its imports"}
"""What stands beside a figure and is this library, too."""

LESS = {
    "copy": "which only copies",
    "copytree": "which only copies",
    "import numpy": "which only imports it",
    "rows @ query": "the bare product",
    "raw TCP": "which only receives",
    "received and hashed alone": "without a file and checks",
    "SHA-256 alone": "of bytes in memory",
}
"""What stands beside a figure and does less."""

REPEATED = {"received and hashed alone", "SHA-256 alone"}
"""What a download stands beside on the page of all figures alone; in the README it is raw TCP."""

QUESTIONS = {
    "forward": "What does a card add to a forward pass, beside PEFT?",
    "lifecycle": "How long do loading, applying, swapping and removing a card take, beside PEFT?",
    "routing": "How long does it take to choose a card?",
    "throughput": "How fast are texts encoded, beside sentence-transformers?",
    "merge_extract": "How long does a merge take beside PEFT, an extraction beside SVD?",
    "training": "How long does a training step take, beside PEFT?",
    "fetching": "How long does it take to fetch a card, over loopback?",
    "growth": "How do time and memory grow with rank, layers, parameters, rows and cards?",
    "commands": "How long does a command take to start, and a cycle of learning to run?",
    "models": "What do adapters for each row cost in any model, and a folded checkpoint?",
}
"""What each script's figures answer: the headings of the page."""


def read() -> Report:
    """What was measured, by script."""
    report: Report = json.loads(RESULTS.read_text(encoding="utf-8"))
    return report


def rows_of(report: Report, script: str, **wanted: Any) -> Iterator[Row]:
    """The figures of a script that have these fields."""
    for row in report[script]["rows"]:
        if all(row.get(key) == value for key, value in wanted.items()):
            yield row


def summary(report: Report) -> str:
    """The tables of the README and of the page on performance: one figure for each comparison, and
    every one in which this library takes longer but for REPEATED.
    """
    head = ["| what | measured | 95 % interval |", "|---|---|---|"]
    names = {(script, what, peer): name for script, what, _, peer, name in COMPARED}
    longer = [
        (script, *row, names.get((script, *row[::2]), "forward, " * (script == "forward") + row[0]))
        for script in report
        for row in slower(report, script)
        if row[2] not in REPEATED
    ]
    longer.sort(key=lambda row: row[3] in LESS)
    faster = [row for row in COMPARED if (*row[:4], row[4]) not in longer]
    parts = [
        "\n".join([*head, *(f"| {row[4]} | {' | '.join(compared(report, row))} |" for row in rows)])
        for rows in (faster, longer)
    ]
    between = "Where this library takes longer than what stands beside it:"
    return "\n\n".join([parts[0], between, parts[1], f"{MEASURED_MODELS} {machine(report)}\n"])


def slower(report: Report, script: str) -> Iterator[tuple[str, str, str]]:
    """What a script measured, side and peer, wherever this library takes longer."""
    for row in rows_of(report, script):
        what, side, value = row["what"], row.get("side", ""), row["value"]
        if side in ADAPTED and row["kind"] == "overhead":
            for peer in rows_of(report, script, what=what, kind="overhead"):
                if peer["side"] in ("PEFT", "PEFT, three") and value > peer["value"]:
                    yield what, side, peer["side"]
        elif (
            row["kind"] in ("ratio", "times faster")
            and not side.startswith(("PEFT", "received"))
            and row["beside"] not in OWN
            and SHARE[row["kind"]](value) > 1
        ):
            yield what, side, row["beside"]


def compared(report: Report, row: tuple[str, str, str, str, str]) -> tuple[str, str]:
    """What a comparison gave, in words, and its interval."""
    script, what, side, peer, _ = row
    if direct := list(rows_of(report, script, what=what, side=side, beside=peer)):
        share = SHARE[direct[0]["kind"]]
        middle, *ends = map(share, (direct[0]["value"], *direct[0]["interval"]))
        if middle <= 1:
            middle, *ends = (1 / value for value in (middle, *ends))
            words = f"{_times(middle)} × as fast as {peer}"
        else:
            words = f"{_times(middle)} × the time of {peer}"
        words += f", {LESS[peer]}" if peer in LESS else ""
        low, high = sorted(ends)
        unclear = low <= 1 <= high
        interval = f"{_times(low)} to {_times(high)} ×"
    else:  # each has its own base
        pair = [next(rows_of(report, script, what=what, side=which)) for which in (side, peer)]
        ours, theirs = (shown(each) for each in pair)
        words = f"{ours[1]} over the base model, {peer} {theirs[1]}"
        interval = f"{ours[2]}, {peer} {theirs[2]}".replace(" … ", " to ")
        one, two = sorted(each["interval"] for each in pair)
        unclear = two[0] <= one[1]
    return words, interval + ", undecided" * unclear


def _times(value: float) -> str:
    """A number of times, with as many digits as one reads."""
    return f"{value:.{2 if value < 2 else 1 if value < 10 else 0}f}"


def machine(report: Report) -> str:
    """What it was measured on, in a sentence."""
    host = next(iter(report.values()))["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    return (
        f"Measured on {host['cpu']}, {host['cores']} cores, "
        f"{host['threads']} threads, with {versions}."
    )


def changed_since(sources: Mapping[str, str], commit: str = "") -> str:
    """Which of the sources that were measured have other code today."""
    now = digests(sources)
    changed = [f"`{name}`" for name, digest in sources.items() if digest != now[name]]
    when = "since it was measured" + (f" at commit `{commit}`" if commit else "")
    if not sources:
        return "Which sources were measured was not noted."
    if not changed:
        return f"Unchanged {when}: the code of all {len(sources)} source files that ran."
    same = len(sources) - len(changed)
    rest = f"; the other {same} source files that ran have the same code" if same else ""
    return f"Changed {when}: {', '.join(changed)}{rest}."


def noted(about: Row) -> str:
    """The same, of what is noted of a measurement."""
    return changed_since(about.get("sources", {}), about.get("commit", ""))


def models(results: Report) -> str:
    """What each operation gave for each architecture: short cells, and their reasons as notes."""
    table, notes = results["architectures"], dict[str, int]()
    operations = list(next(iter(table.values())))
    lines = [f"| model | {' | '.join(operations)} |", "|---|" + "---|" * len(operations)]
    for name, cells in table.items():
        row = [_model_cell(cells[operation], notes) for operation in operations]
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += ["", *(f"{number}. {note}" for note, number in notes.items())]
    about = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += ["", f"Made on {about['date']} with {versions}. {noted(about)}"]
    return "\n".join(lines) + "\n"


def _model_cell(cell: Row, notes: dict[str, int]) -> str:
    """Return a cell, with the number of its note; a new note is added to the others."""
    kind, note = cell["kind"], cell.get("reason", cell.get("warning", ""))
    if kind == "ran":
        zeros = re.compile("(?<=e-)0")
        text = zeros.sub("", f"{cell['difference']:.0e}") if "difference" in cell else "equal"
    elif kind == "not applicable":
        text, note = "n/a", f"not applicable: {note}"
    else:
        text = f'<span class="refused">{kind}</span>'
    if note:
        note = re.sub(r"([|\[\]<*_`])", r"\\\1", note)
        text += f" <sup>{notes.setdefault(note, len(notes) + 1)}</sup>"
    return text


def page(report: Report, answers: Mapping[str, str] | None = None) -> str:
    """Every figure, by script, after the answer to the script's question."""
    answers = answers or claims.answers(report)
    lines = [
        "# Benchmarks",
        "",
        "Made from `benchmarks/results.json`, which `make bench`",
        "writes. Each script runs in a process of its own; in it,",
        "this library and its peers take turns in shuffled rounds.",
        "Each round gives a ratio; the median is shown. Times are medians, too.",
        "Intervals are 95 %; with fewer than six rounds they are the smallest and the largest.",
        "*Overhead*: how much longer the model takes with a card than without one.",
        "*r8 q,v* is rank 8 on query and value, *r16 all Linears* rank 16 on every Linear.",
        "What the figures mean is told in [Performance](../performance.md).",
        "",
        machine(report),
        "",
        FILTER.format("Filter: PEFT, load, rank 16 …"),
    ]
    for script, part in report.items():
        met = [row["met"] for row in part["rows"] if row["met"] is not None]
        load = ", ".join(f"{value:g}" for value in part["machine"]["load"])
        lines += ["", f"## {QUESTIONS[script]} {{#{script}}}", ""]
        lines += [f"{answers[script]} Targets met: {sum(met)} of {len(met)}.", ""]
        if longer := list(slower(report, script)):
            lines += ["Where this library takes longer than what stands beside it:", ""]
            for what, side, peer in longer:
                words, interval = compared(report, (script, what, side, peer, ""))
                name = what if side == what else f"{what}, {side}"
                lines.append(f"- {name}: {words} ({interval})")
            lines.append("")
        about = (
            f"`benchmarks/{script}.py`. {noted(part['machine'])} Load of the machine at the start"
        )
        lines.append(f"<small>{about}, over 1, 5 and 15 minutes: {load}.</small>")
        for name, title in CHARTS.get(script, {}).items():
            lines += ["", picture(name, title)]
        lines += ["", "<details markdown>", f"<summary>All {len(part['rows'])} figures</summary>"]
        lines += ["", "| what | figure | 95 % interval | target | met |", "|---|---|---|---|---|"]
        for row in part["rows"]:
            what, *figures = shown(row)
            twice = f"{row['what']}: {row['what']} / "  # where the command is what is timed
            what = what.replace(twice, f"{row['what']} / ")
            figures = [re.sub(r"(\d) x$", r"\1 ×", figure) for figure in figures]
            lines.append(f"| {' | '.join([what, *figures])} |")
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


CHARTS = {
    "forward": {
        "overhead": "Overhead of one card against tokens: folded, as LoRALinear, and PEFT",
        "rows": "Overhead of a batch whose rows have adapters of their own: ours and PEFT's",
    },
    "lifecycle": {
        "lifecycle": "Loading, applying, swapping and removing as a share of the peer's time",
        "present": "Loading, applying and swapping with "
        "1 to 1,000 cards present, and PEFT with up to 32",
    },
    **{
        script: {f"{script}_times": f"{what}: time beside another way's, with its 95 % interval"}
        for script, what in {
            "routing": "Routing",
            "throughput": "Encoding",
            "merge_extract": "Merging, extracting and reading what PEFT wrote",
            "training": "Training",
            "fetching": "Fetching",
            "commands": "Commands",
            "models": "Any model",
        }.items()
    },
    "growth": {
        "growth": "How time grows with rank, layers, parameters, adapters, rows and cards",
        "memory": "How memory grows with rank, layers, parameters, adapters and rows",
    },
}
"""The charts of a script's figures, with what they show; each 5 inches wide, which a phone shows
legibly."""


def draw_overhead(report: Report) -> Draw:
    """A panel for each kind of card, a line for each side."""

    def draw(figure: Any, colours: Colours) -> None:
        kinds = sorted(
            {row["adapter"] for row in rows_of(report, "forward", side="folded")}, reverse=True
        )
        for axes, kind in zip(
            figure.subplots(len(kinds), 1, sharex=True, sharey=True), kinds, strict=True
        ):
            for side, colour, mark in (
                ("PEFT", "second", "s-"),
                ("LoRALinear", "first", "o--"),
                ("folded", "first", "o-"),
            ):
                measured = [
                    row
                    for row in rows_of(report, "forward", side=side, adapter=kind)
                    if row["what"].startswith("one")
                ]
                places = [row["tokens"] for row in measured]
                axes.plot(
                    places,
                    [100 * row["value"] for row in measured],
                    mark,
                    color=colours[colour],
                    label=side,
                )
                ends = [[100 * row["interval"][end] for row in measured] for end in (0, 1)]
                axes.fill_between(places, *ends, color=colours[colour], alpha=0.15, linewidth=0)
            axes.axhline(0, color=colours["soft"], linewidth=0.8)
            axes.set(xscale="log", title=kind)
            axes.set_xticks(places, [f"{place:,}" for place in places], minor=False)
            axes.minorticks_off()
        figure.axes[-1].set(xlabel="tokens")
        figure.supylabel("overhead over the base model, %", fontsize=10)
        figure.axes[0].legend(frameon=False)

    return draw


def draw_rows(report: Report) -> Draw:
    """Two bars for each batch."""
    measured = list(rows_of(report, "forward", group="rows", kind="overhead"))
    names = list(dict.fromkeys(row["what"] for row in measured))

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.subplots()
        for shift, side, colour in ((0.2, "ours", "first"), (-0.1, "PEFT", "second")):
            values = [
                100 * row["value"]
                for name in names
                for row in measured
                if (row["what"], row["side"]) == (name, side)
            ]
            places = [len(names) - i + shift for i in range(len(names))]
            axes.barh(places, values, 0.28, color=colours[colour], label=side)
            ends = [
                row["interval"]
                for name in names
                for row in measured
                if (row["what"], row["side"]) == (name, side)
            ]
            for place, (low, high), value in zip(places, ends, values, strict=True):
                axes.plot([100 * low, 100 * high], [place] * 2, color=colours["ink"], linewidth=1)
                label, at = f"{value:+.0f} %", 100 * max(high, 0)
                axes.text(at, place, f" {label}", va="center", color=colours["ink"])
        axes.set_yticks([])
        axes.set_ylim(0.6, len(names) + 0.8)
        for i, name in enumerate(names):
            _above(axes, len(names) - i + 0.42, name)
        axes.set(xlabel="overhead over the base model, %")
        axes.set_xlim(right=125 * max(row["interval"][1] for row in measured))
        figure.legend(frameon=False, loc="outside upper right", ncols=2)

    return draw


def draw_lifecycle(report: Report) -> Draw:
    """A point for each ratio on a log axis, a tick where its target is."""
    ratios = [
        row for row in rows_of(report, "lifecycle", kind="ratio") if row["target"] is not None
    ]

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.subplots()
        for i, row in enumerate(reversed(ratios)):
            axes.plot(row["interval"], [i, i], color=colours["first"], linewidth=3)
            axes.plot(row["value"], i, "o", color=colours["first"])
            axes.plot(
                row["target"], i, "|", color=colours["second"], markersize=10, markeredgewidth=2
            )
            _above(axes, i + 0.2, f"{row['what']}, beside {row['beside'].split()[0]}")
        axes.set_yticks([])
        axes.set_ylim(-0.5, len(ratios) - 0.3)
        axes.axvline(1, color=colours["soft"], linewidth=0.8)
        axes.set(xscale="log", xlabel="share of the peer's time; less is faster (tick: target)")
        axes.xaxis.set_major_formatter("{x:g} ×")

    return draw


def _above(axes: Any, height: float, name: str) -> None:
    """Write what a row of a chart is about above it, at the left, which leaves it the width."""
    axes.text(0.01, height, name, transform=axes.get_yaxis_transform(), fontsize=9, va="bottom")


def draw_present(report: Report) -> Draw:
    """A line for each operation."""
    lines = {"load": "o-", "apply": "s-", "swap": "^-", "PEFT add_adapter": "D--"}

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.subplots()
        for of, mark in lines.items():
            points = list(rows_of(report, "lifecycle", of=of, unit="ms"))
            colour = colours["second" if of.startswith("PEFT") else "first"]
            axes.plot(
                [row["present"] for row in points],
                [row["value"] for row in points],
                mark,
                color=colour,
                label=of,
            )
        axes.set(xscale="log", yscale="log", xlabel="cards present", ylabel="milliseconds")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        figure.legend(frameon=False, loc="outside upper right", ncols=2)

    return draw


def times(report: Report, script: str) -> dict[str, list[tuple[str, list[float], float | None]]]:
    """For each thing measured: sides, low end, middle and high end of the share of the peer's
    time, and its target.
    """
    panels: dict[str, list[tuple[str, list[float], float | None]]] = {}
    for row in report[script]["rows"]:
        if row["kind"] in SHARE and "interval" in row:
            of = SHARE[row["kind"]]
            ends = sorted(map(of, row["interval"]))
            target = None if row["target"] is None else of(row["target"])
            points = [ends[0], of(row["value"]), ends[1]]
            panels.setdefault(row["what"], []).append(
                (f"{row['side']} / {row['beside']}", points, target)
            )
    return panels


def height_of(panels: Mapping[str, Sequence[Any]]) -> float:
    """The height in inches of a panel for each, with a line for each of its sides."""
    return 0.6 + sum(0.5 + 0.34 * len(sides) for sides in panels.values())


def draw_times(panels: Mapping[str, Sequence[tuple[str, list[float], float | None]]]) -> Draw:
    """A panel for each thing measured: a point and its interval for each side, on one axis."""

    def draw(figure: Any, colours: Colours) -> None:
        heights = [len(sides) + 0.6 for sides in panels.values()]
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, (what, sides) in zip(grid[:, 0], panels.items(), strict=True):
            for i, (side, (low, middle, high), target) in enumerate(reversed(sides)):
                colour = colours["second" if side.startswith("PEFT") else "first"]
                axes.plot([low, high], [i, i], color=colour, linewidth=3)
                axes.plot(middle, i, "o", color=colour)
                if target is not None:
                    axes.plot(target, i, "|", color=colours["ink"], markersize=12)
            axes.axvline(1, color=colours["soft"], linewidth=0.8)
            names = [
                "\n".join(wrap(side, 25, break_long_words=False)) for side, _, _ in reversed(sides)
            ]
            axes.set_yticks(range(len(sides)), names, fontsize=8.5)
            axes.set_ylim(-0.6, len(sides) - 0.4)
            axes.set_title("\n".join(wrap(what, 36)), fontsize=10, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xscale("log")
        ends = [end for sides in panels.values() for _, points, _ in sides for end in points]
        low, high = min(*ends, 1), max(*ends, 1)
        steps = [1] if high > 50 * low else [1, 2, 5]
        ticks = [step * power for power in (0.01, 0.1, 1, 10) for step in steps]
        axes.set_xticks([tick for tick in ticks if low / 1.5 <= tick <= high * 1.5])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g} ×")
        axes.set_xlabel("share of the other's time (tick: target)", fontsize=9)

    return draw


def draw_growth(report: Report, unit: str) -> Draw:
    """A panel for each line: cost beside its first point, and what linear would be."""
    measured = [row for row in rows_of(report, "growth", unit=unit) if "size" in row]
    lines = list(dict.fromkeys((row["line"], row["against"]) for row in measured))

    def draw(figure: Any, colours: Colours) -> None:
        columns = 2
        panels = figure.subplots(math.ceil(len(lines) / columns), columns, squeeze=False).ravel()
        for axes in panels[len(lines) :]:
            axes.axis("off")
        for axes, (name, against) in zip(panels, lines, strict=False):
            points = [row for row in measured if (row["line"], row["against"]) == (name, against)]
            sizes = [row["size"] for row in points]
            axes.plot(sizes, [size / sizes[0] for size in sizes], ":", color=colours["soft"])
            axes.plot(
                sizes,
                [row["value"] / points[0]["value"] for row in points],
                "o-",
                color=colours["first"],
            )
            axes.set(xscale="log", yscale="log", xlabel=against)
            axes.minorticks_off()
            most, last = sizes[-1] / sizes[0], sizes[-1] / sizes[-2]
            is_near = math.log(last) < 0.17 * math.log(most)  # the numbers would overlap
            axes.xaxis.set_ticks([*sizes[: -1 - is_near], sizes[-1]])
            base = 4.0 if most <= 512 else 10.0
            axes.yaxis.set_ticks([base**power for power in range(6) if base**power <= most])
            thousands = "{x:,.0f}" if sizes[-1] < 10_000 else _thousands
            axes.xaxis.set_major_formatter(thousands)
            axes.yaxis.set_major_formatter("{x:,.0f} ×")
            axes.set_title("\n".join(wrap(f"{name}, by {against}", 26)), fontsize=9)
        what = {"ms": "time", "MiB": "memory"}[unit]
        figure.supylabel(f"times the first point's {what} (dotted: linear)", fontsize=10)

    return draw


def _thousands(value: float, _: int) -> str:
    """A number for an axis that has no room for zeros."""
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.0f}k"


def draw_all(folder: Path, report: Report) -> None:
    """Write every chart."""
    write(folder, "overhead", (5.0, 5.4), draw_overhead(report))
    write(folder, "rows", (5.0, 5.2), draw_rows(report))
    write(folder, "lifecycle", (5.0, 7.6), draw_lifecycle(report))
    for script, charts in CHARTS.items():
        if f"{script}_times" in charts:
            panels = times(report, script)
            size = (5.0, height_of(panels))
            write(folder, f"{script}_times", size, draw_times(panels))
    write(folder, "present", (5.0, 4.0), draw_present(report))
    write(folder, "growth", (5.0, 10.4), draw_growth(report, "ms"))
    write(folder, "memory", (5.0, 5.6), draw_growth(report, "MiB"))


def main(measured: Sequence[str] = ()) -> None:
    """Take what these files hold into the results, and put the table into the README."""
    report = dict(read())
    for path in measured:
        report |= json.loads(Path(path).read_text(encoding="utf-8"))
    if measured:
        text = json.dumps(report, indent=1, ensure_ascii=False)
        RESULTS.write_text(f"{text}\n", encoding="utf-8")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    _, after = rest.split(END)
    readme.write_text(f"{before}{START}{summary(read())}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
