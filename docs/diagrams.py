"""Draw the documentation's pictures from what they show: imports, a manager's states, the schema, a
trained card.

Each is an SVG for the light theme and one for the dark theme, the same bytes on every run of one
installation.
"""

import ast
import io
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import nn

import lora
from lora.arrow_format import schema_of
from lora.drawing import card_facts
from lora.errors import StateError
from lora.routing import Calibration
from lora.training import LoRATrainer
from lora.training.data import docstring_pairs
from lora.training.synthetic import synthetic_pairs
from lora.training.train import Settings, Training

THEMES = {
    "light": {
        "ink": "#222222",
        "soft": "#888888",
        "fill": "#eef2fb",
        "first": "#3050a0",
        "second": "#b05010",
    },
    "dark": {
        "ink": "#e0e0e8",
        "soft": "#888890",
        "fill": "#2a2f42",
        "first": "#8fb0ff",
        "second": "#ffb070",
    },
}
"""Colours by theme; the background is the page's."""

Colours = Mapping[str, str]
Draw = Callable[[Any, Colours], None]

State = tuple[bool, bool]
"""Whether cards are active, and whether some are prepared."""

STATES = {
    (False, False): "base model",
    (True, False): "cards active",
    (False, True): "base model,\na set prepared",
    (True, True): "cards active,\na set prepared",
}
"""What is told apart of a manager's state: is a card active, is a set prepared."""


def write(folder: Path, name: str, size: tuple[float, float], draw: Draw) -> None:
    """Draw once for each theme, as ``NAME-light.svg`` and ``NAME-dark.svg``."""
    for theme, colours in THEMES.items():
        ink = dict.fromkeys(
            ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["ink"]
        )
        style = {"svg.hashsalt": name, "font.size": 10, "axes.edgecolor": colours["soft"], **ink}
        with rc_context(style):
            figure = Figure(figsize=size, dpi=72, layout="constrained")  # an SVG's own dpi
            draw(figure, colours)
            # arrows need to know where boxes end, and lie under them
            figure.draw_without_rendering()
            figure.savefig(
                folder / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None}
            )


def picture(name: str, caption: str, folder: str = "") -> str:
    """Markdown that shows the variant of a picture that fits the theme."""
    return "\n".join(f"![{caption}]({folder}{name}-{theme}.svg#only-{theme})" for theme in THEMES)


# ---- the whole


WHOLE = {
    "imports": (0.22, 0.93, "PEFT adapters,\nfine-tunes"),
    "card": (0.22, 0.61, "cards\nimmutable, mapped\nArrow IPC files"),
    "nodes": (0.22, 0.3, "other nodes"),
    "documents": (0.22, 0.05, "documents"),
    "texts": (0.78, 0.93, "texts"),
    "engine": (0.78, 0.61, "engine\nrouter, encoder,\nbase never touched"),
    "trainer": (0.78, 0.05, "trainer, gate"),
}
"""Place and name of each box, in two columns, so that a phone shows them legibly."""

FLOWS = [
    ("imports", "card", 0.0, (0.37, 0.78), "import,\nextract, merge"),
    ("nodes", "card", -0.3, (0.07, 0.44), "fetch,\nverify"),
    ("card", "nodes", -0.3, (0.35, 0.4), "sign,\nserve"),
    ("documents", "trainer", 0.0, (0.48, 0.08), "pairs"),
    ("trainer", "card", 0.0, (0.62, 0.33), "if held-out\ndata say so"),
    ("card", "engine", 0.0, (0.5, 0.665), "adapt,\nswap"),
    ("texts", "engine", 0.0, (0.9, 0.78), "which card\nfits?"),
    ("engine", "trainer", -0.1, (0.93, 0.33), "what it\ndoes not\nknow"),
]
"""From where to where, how far the arrow bends, where its name stands, and its name."""


def draw_whole(figure: Any, colours: Colours) -> None:
    """What there is, and what flows between."""
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    boxes = {name: _box(axes, place, text, colours) for name, (*place, text) in WHOLE.items()}
    for source, target, bow, place, label in FLOWS:
        _arrow(axes, boxes[source], boxes[target], colours["soft"], bow)
        axes.text(*place, label, ha="center", va="center", color=colours["second"], fontsize=8.5)


# ---- the import graph


def imports(house: Path) -> dict[str, set[str]]:
    """Each module or subpackage at the top of the package, and those of them that it imports."""
    names = {path.relative_to(house).with_suffix("").parts[0] for path in house.rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in sorted(names - {"__init__", "testing"})}
    for path in house.rglob("*.py"):
        room = path.relative_to(house).with_suffix("").parts[0]
        if room in graph:
            graph[room] |= {name for name in _imported(path) if name in graph and name != room}
    return graph


def _imported(path: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            first, *rest = module.split(".")
            if first == "lora" and rest:
                yield rest[0]


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph less the edges that a longer path implies."""

    def reach(start: str) -> set[str]:
        return (
            graph[start].union(*(reach(other) for other in graph[start])) if graph[start] else set()
        )

    return {
        name: {one for one in ones if not any(one in reach(other) for other in ones - {one})}
        for name, ones in graph.items()
    }


def depths(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The longest way from each module down to one that imports nothing."""
    levels: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in levels:
            levels[name] = 1 + max((depth(other) for other in graph[name]), default=-1)
        return levels[name]

    for name in sorted(graph):
        depth(name)
    return levels


def rows_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The modules by depth, the deepest first; within a row, each below those that import it."""
    level, less = depths(graph), reduced(graph)
    rows: list[list[str]] = []
    place: dict[str, float] = {}

    def above(name: str) -> tuple[float, str]:
        places = [place[other] for other, ones in less.items() if name in ones]
        return (sum(places) / len(places) if places else 0.5), name

    for depth in range(max(level.values()), -1, -1):
        row = sorted((name for name in graph if level[name] == depth), key=above)
        place.update({name: (i + 0.5) / len(row) for i, name in enumerate(row)})
        rows.append(row)
    return rows[::-1]


def draw_imports(graph: Mapping[str, set[str]]) -> Draw:
    """A row for each depth, an arrow from importer to imported."""
    rows, level = rows_of(graph), depths(graph)
    where = {
        name: ((i + 0.5) / len(row), float(y))
        for y, row in enumerate(rows)
        for i, name in enumerate(row)
    }

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(-0.5, len(rows) - 0.5))
        axes.axis("off")
        boxes = {name: _box(axes, place, name, colours) for name, place in where.items()}
        for name, others in reduced(graph).items():
            for other in sorted(others):
                bow = 0.15 if level[name] - level[other] > 1 else 0.0
                _arrow(axes, boxes[name], boxes[other], colours["soft"], bow)

    return draw


# ---- the manager


def transitions() -> dict[tuple[State, State], set[str]]:
    """From state to state, the calls that lead there: found by making them, on a real manager, in
    every order of four.
    """
    base = nn.ModuleDict({"proj": nn.Linear(2, 2)})
    pair = lora.LowRank(np.ones((2, 1), np.float32), np.ones((1, 2), np.float32))
    card = lora.LoRACard("docs", 1, 1.0, ["proj"], {"proj": pair})
    calls: dict[str, Callable[[Any], Any]] = {
        "apply_card": lambda manager: manager.apply_card(card),
        "remove_card": lambda manager: manager.remove_card("docs"),
        "prepare": lambda manager: manager.prepare([card]),
        "swap": lambda manager: manager.swap(),
        "rollback": lambda manager: manager.rollback(),
    }
    calls_of: dict[tuple[State, State], set[str]] = {}
    manager = lora.LoRAManager(base)
    frontier = [manager.state]
    for _ in range(4):
        reached = []
        for state in frontier:
            for name, call in calls.items():
                manager.reference.value = state  # a state is a value: this is how to begin from it
                try:
                    call(manager)
                except StateError:  # nothing to swap to, or to go back to
                    continue
                edge = _has(state), _has(manager.state)
                reached.append(manager.state)
                if edge[0] != edge[1]:
                    calls_of.setdefault(edge, set()).add(name)
        frontier = reached
    return calls_of


def _has(state: Any) -> State:
    """Tell whether a state has active cards, and whether it has prepared ones."""
    return bool(state.active.adapters), state.prepared is not None


def draw_states(steps: Mapping[tuple[State, State], set[str]]) -> Draw:
    """A box for each state, an arrow for each step between two."""
    where = {state: (0.18 + 0.64 * state[0], 0.8 - 0.6 * state[1]) for state in STATES}

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.axis("off")
        boxes = {state: _box(axes, place, STATES[state], colours) for state, place in where.items()}
        for (source, target), calls in sorted(steps.items()):
            (x, y), (far, low) = where[source], where[target]
            across, down = (far - x) * figure.get_figwidth(), (low - y) * figure.get_figheight()
            bow = -BOW if across and down else BOW  # a diagonal keeps away from the row below
            _arrow(axes, boxes[source], boxes[target], colours["soft"], bow)
            away = bow / 2 + (
                0.06 if across else 0.14
            )  # its bow and room, as a share of its length
            label = (
                (x + far) / 2 + away * down / figure.get_figwidth(),
                (y + low) / 2 - away * across / figure.get_figheight(),
            )
            style = {"ha": "center", "va": "center", "color": colours["second"], "fontsize": 9}
            axes.text(*label, "\n".join(sorted(calls)), **style)

    return draw


# ---- the schema


def draw_schema(schema: pa.Schema) -> Draw:
    """A bar for each field, its children to the right of it."""

    def leaves(kind: pa.DataType) -> int:
        return sum(leaves(kind.field(i).type) for i in range(kind.num_fields)) or 1

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.subplots()
        total = sum(leaves(field.type) for field in schema)
        axes.set(xlim=(0, 3), ylim=(total, 0))
        axes.axis("off")

        def bar(field: pa.Field, x: int, y: int) -> None:
            kind = field.type
            style = {"facecolor": colours["fill"], "edgecolor": colours["first"]}
            axes.add_patch(Rectangle((x + 0.02, y + 0.06), 0.96, leaves(kind) - 0.12, **style))
            named = (
                "fixed_size_list[2]"
                if pa.types.is_fixed_size_list(kind)
                else str(kind).split("<")[0]
            )
            label = f"{field.name}\n{named}" + (
                "" if field.nullable else "\nnot null" if x == 0 else ""
            )
            axes.text(x + 0.5, y + leaves(kind) / 2, label, ha="center", va="center", fontsize=9)
            for i in range(kind.num_fields):
                bar(kind.field(i), x + 1, y + sum(leaves(kind.field(k).type) for k in range(i)))

        for i, field in enumerate(schema):
            bar(field, 0, sum(leaves(other.type) for other in list(schema)[:i]))

    return draw


# ---- plots of what was measured


def trained(engine: lora.ArrowEngine, steps: int = 20) -> Training:
    """A card that learns a synthetic task, on the embedded encoder."""
    settings = Settings(epochs=100, batch_size=32, validate_every=4, validation_size=32)
    trainer = LoRATrainer(engine, rank=8, settings=settings)
    return trainer.train(synthetic_pairs("architect", 160), name="architect", max_steps=steps)


def taught() -> Training:
    """What the tutorial trains: its steps up to there are run."""
    docs, names = Path(__file__).parent, dict[str, Any]()
    page = (docs / "tutorial.md").read_text(encoding="utf-8")
    steps = re.findall(r"```\{\.python \.step\}\n(.*?)```", page, re.DOTALL)
    with chdir(docs.parent), redirect_stdout(io.StringIO()):
        while "training" not in names:
            exec(steps.pop(0), names)  # noqa: S102 - a page of this repository, as the tests run it
    result: Training = names["training"]
    return result


def draw_training(training: Training) -> Draw:
    """Loss at each step, MRR on held-out pairs at each validation."""
    rows = training.history.to_pylist()
    scores = [(0, training.metrics["before"].mrr)] + [
        (r["step"], r["val_mrr"]) for r in rows if r["val_mrr"] is not None
    ]

    def draw(figure: Any, colours: Colours) -> None:
        left = figure.subplots()
        right = left.twinx()
        left.plot(
            [row["step"] for row in rows], [row["loss"] for row in rows], color=colours["first"]
        )
        right.plot(*zip(*scores, strict=True), "o-", color=colours["second"])
        left.set(xlabel="step", ylim=(0, None))
        left.set_ylabel("training loss", color=colours["first"])
        right.set_ylabel("MRR on held-out pairs", color=colours["second"])

    return draw


def draw_spectrum(training: Training) -> Draw:
    """The singular values of each module's ΔW."""
    facts = card_facts(training.card)

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.subplots()
        for part, colour in (("query", "first"), ("value", "second")):
            for module, module_facts in facts.items():
                if module.endswith(part):
                    axes.plot(
                        range(1, len(module_facts.spectrum) + 1),
                        module_facts.spectrum,
                        ".-",
                        color=colours[colour],
                        alpha=0.6,
                    )
            axes.plot([], [], color=colours[colour], label=f"{part}, layers 0 to 5")
        axes.set(xlabel="index", ylabel="singular value of ΔW", ylim=(0, None))
        axes.legend(frameon=False)

    return draw


def routed(
    engine: lora.ArrowEngine, size: int = 240
) -> tuple[list[float], list[float], Calibration]:
    """Best scores of queries about modules that a skill does not hold, of queries about other
    things, and a threshold.
    """
    pairs = docstring_pairs()
    known, rest = pairs.split(0.6, seed=0)
    fitting, fresh = rest.split(0.5, seed=0)
    skill = lora.LoRARouter(engine.encode)
    skill.register_virtual_candidate("python-docs", _some(known.queries, 400))

    def scores(queries: list[str]) -> list[float]:
        return [routes[0].score for routes in skill.select_many(queries, 1, -1.0)]

    by_group: dict[str, list[float]] = {}
    sample = fitting.take(list(range(0, len(fitting), max(1, len(fitting) // (2 * size)))))
    for group, score in zip(sample.table["group"].to_pylist(), scores(sample.queries), strict=True):
        by_group.setdefault(group, []).append(score)
    foreign = synthetic_pairs("researcher", size).queries
    return scores(_some(fresh.queries, size)), scores(foreign), lora.calibrate(by_group, 0.1)


def _some(texts: list[str], count: int) -> list[str]:
    return texts[:: max(1, len(texts) // count)][:count]


def draw_routing(known: list[float], unknown: list[float], threshold: float) -> Draw:
    """Two histograms and a line."""

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.subplots()
        bins = np.linspace(min(known + unknown), 1.0, 40)
        axes.hist(
            known,
            bins,
            color=colours["first"],
            alpha=0.7,
            label="known: unseen modules of the library",
        )
        axes.hist(
            unknown,
            bins,
            color=colours["second"],
            alpha=0.7,
            label="unknown: questions about other things",
        )
        axes.axvline(
            threshold,
            color=colours["ink"],
            linestyle="--",
            label=f"calibrated threshold {threshold:.2f}",
        )
        axes.set(xlabel="cosine similarity to the nearest example", ylabel="queries")
        figure.legend(frameon=False, loc="outside upper left")

    return draw


BOW = 0.16
"""How far an arrow between two states bends, so that the one back does not hide it."""


def _box(axes: Any, place: tuple[float, float], text: str, colours: Colours) -> Any:
    style = {
        "boxstyle": "round,pad=0.4",
        "facecolor": colours["fill"],
        "edgecolor": colours["first"],
    }
    return axes.text(*place, text, ha="center", va="center", bbox=style, zorder=2)


def _arrow(axes: Any, start: Any, end: Any, colour: str, bow: float) -> None:
    """From the edge of one box to that of another."""
    ends = {
        "patchA": start.get_bbox_patch(),
        "patchB": end.get_bbox_patch(),
        "shrinkA": 1,
        "shrinkB": 1,
    }
    line = {
        "arrowstyle": "-|>",
        "mutation_scale": 9,
        "linewidth": 0.9,
        "color": colour,
        "zorder": 1,
    }
    style = f"arc3,rad={bow}"
    places = start.get_position(), end.get_position()
    axes.add_patch(FancyArrowPatch(*places, connectionstyle=style, **ends, **line))


def draw_card(path: Path) -> None:
    """Write what is shown where a page is shared: the logo and what the library is for."""
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="#22376b")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 120), ylim=(0, 63))
    axes.axis("off")
    bars = [
        ((8, 17), 5, 21, "#ffffff"),
        ((15, 40), 21, 5, "#ffb070"),
        ((15, 17), 21, 21, "#7a88ac"),
    ]
    for place, width, height, colour in bars:
        box = FancyBboxPatch(place, width, height, "round,pad=0,rounding_size=0.8", lw=0, fc=colour)
        axes.add_patch(box)
    axes.text(46, 40, "lora", color="#ffffff", size=64, weight="bold", va="center")
    about = "Load, merge, hot-swap and route", "LoRA adapters. Reads PEFT folders."
    about = "\n".join([*about, "Never modifies the base model."])
    axes.text(46, 24, about, color="#e0e6f8", size=27, va="center", linespacing=1.4)
    figure.savefig(path, metadata={"Software": None})


def draw_all(folder: Path) -> None:
    """Write every picture."""
    draw_card(folder / "social.png")
    write(folder, "imports", (5.6, 8), draw_imports(imports(Path(lora.__file__).parent)))
    write(folder, "states", (5.0, 4.2), draw_states(transitions()))
    write(folder, "schema", (5.0, 4.5), draw_schema(schema_of("float32")))
    engine = lora.ArrowEngine.from_pretrained(None)
    write(folder, "training", (5.0, 3.4), draw_training(taught()))
    write(folder, "spectrum", (5.0, 3.6), draw_spectrum(trained(engine)))
    known, unknown, calibration = routed(engine)
    write(folder, "routing", (5.0, 4.0), draw_routing(known, unknown, calibration.threshold))


if __name__ == "__main__":
    write(
        Path(__file__).parent, "picture", (5.0, 4.6), draw_whole
    )  # the README's, which lies in the repository
