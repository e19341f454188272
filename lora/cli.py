"""The command line: thin commands over the public API.

Errors are one line on stderr and exit 1 (2 for usage). Torch is imported only by commands that run
a model, NumPy and Arrow by none that only help or complete.

Requirements: R5, R6, R11, R12, R13, R14, R15, R16, R17, R18, R19, R20, R21, R23, R24, R25.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

import lora
from lora.errors import ArgumentError, DataError, LoRAError, PeerError

PARQUET_ROWS = 1024
"""Rows of a Parquet file that are encoded at a time."""

SHOWN = (
    "id",
    "kind",
    "name",
    "state",
    "attempt",
    "error",
    "at",
    "what",
    "note",
    "version",
    "live",
    "digest",
    "refused",
)
"""Columns of a factory's tables that are shown on a terminal."""

app = typer.Typer(
    name="lora",
    help="LoRA adapters as Arrow cards: read, route, encode, train, merge, extract, serve.",
    epilog="Example: lora demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
Model = Annotated[
    Path | None,
    typer.Option(help="Hugging Face folder of a BERT encoder; the embedded MiniLM if omitted."),
]


def main() -> None:
    """Run the command line; the entry point of the ``lora`` script."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except LoRAError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except (
        OSError
    ) as error:  # standard output is closed, or on a full disk: what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _fail(str(error), 1)
        sys.exit(1)
    except Exception as error:
        if usage := getattr(error, "exit_code", None):
            if len(sys.argv) < 2:
                error.show()  # type: ignore[attr-defined] # the help
                sys.exit(usage)
            _fail(f"{error.format_message()} (--help shows the usage)", usage)  # type: ignore[attr-defined]
        if os.environ.get("LORA_DEBUG"):
            raise
        _fail(f"internal error: {type(error).__name__}: {error} (LORA_DEBUG=1 shows where)", 1)
    else:
        _end(code)


def _version(*, wanted: bool) -> None:
    if wanted:
        print(f"lora-cards {lora.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda value: _version(wanted=value),
            is_eager=True,
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """What comes before a command."""


@app.command(epilog="Example: lora inspect docs.lora.arrow --verify 3b7e…")
def inspect(
    file: Annotated[Path, typer.Argument(help="A card file.")],
    verify: Annotated[str | None, typer.Option(help="SHA-256 that the file must have.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw ΔW's norms, effective ranks and singular values here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a card file says of itself. Its weights are not loaded, but to draw them."""
    found = lora.digest(file)
    if verify is not None:
        lora.load(file, verify=verify)
    header = lora.inspect(file)
    if plot is not None:
        from lora.drawing import draw_card  # noqa: PLC0415 - only where it is asked for

        draw_card(lora.load(file), plot)
    facts: dict[str, Any] = {
        "name": header.name,
        "digest": found,
        "format": ".".join(map(str, header.format_version)),
        "rank": header.rank,
        "alpha": header.alpha,
        "dtype": header.dtype,
        "target_modules": list(header.target_modules),
        "parameters": header.num_params,
        "bytes": header.nbytes,
        "base_model": header.base_model,
        "base_fingerprint": header.base_fingerprint,
        "metadata": dict(header.metadata),
    }
    if as_json:
        modules = {
            name: [m.in_features, m.rank, m.out_features, m.scaling]
            for name, m in header.modules.items()
        }
        print(
            json.dumps(
                {**facts, "modules": modules, "extra": dict(header.extra)}, ensure_ascii=False
            )
        )
        return
    table = Table(
        "field", Column("value", overflow="fold"), title=Text(str(file)), title_justify="left"
    )
    for key, value in facts.items():
        table.add_row(
            key, Text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        )
    modules_table = Table("module", "in", "rank", "out", "scaling")
    for name, module in header.modules.items():
        shape = (module.in_features, module.rank, module.out_features, module.scaling)
        modules_table.add_row(Text(name), *(f"{number:g}" for number in shape))
    console = Console()
    console.print(table, modules_table)


@app.command(
    epilog="Example: lora encode 'read a file' --card docs.lora.arrow --out embeddings.npy"
)
def encode(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; lines of standard input if omitted.")
    ] = None,
    card: Annotated[
        list[Path] | None, typer.Option(help="A card to apply; may be repeated.")
    ] = None,
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write a NumPy .npy file instead of printing."),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(help="Encode this file's column of texts into --out, a Parquet file."),
    ] = None,
    column: Annotated[str, typer.Option(help="The column of texts of --parquet.")] = "text",
    adapter: Annotated[
        str | None,
        typer.Option(
            help="With --parquet: the name of the one card to apply to every row; none if omitted."
        ),
    ] = None,
    route: Annotated[
        bool, typer.Option("--route", help="With --parquet: choose each row's card by its text.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Encode texts, with cards applied if any are given. A Parquet file is streamed in bounded
    memory.
    """
    if parquet is not None:
        if texts or out is None:
            raise ArgumentError("--parquet", "--out and no texts", "texts" if texts else "no --out")
        _encode_parquet(
            parquet,
            out,
            as_json,
            column=column,
            adapter=adapter,
            route=route,
            cards=card or [],
            model=model,
        )
        return
    if adapter is not None or route:
        raise ArgumentError("--adapter, --route", "--parquet", "none")
    engine = lora.ArrowEngine.from_pretrained(model)
    for path in card or []:
        engine.load_lora(path)
    lines = texts or [line.rstrip("\n") for line in sys.stdin]
    rows = engine.encode(lines)
    if out is not None:
        import numpy as np  # noqa: PLC0415 - not needed to print

        from lora.store import replacing  # noqa: PLC0415 - it imports Arrow

        with replacing(out) as file:
            np.save(file, rows)
        _say(
            {"file": str(out), "shape": list(rows.shape)},
            as_json,
            f"{out}: {rows.shape[0]} × {rows.shape[1]}",
        )
    elif as_json:
        print(json.dumps(rows.tolist()))
    else:
        for row in rows:
            print(" ".join(f"{number:.6f}" for number in row))


@app.command(
    epilog="Example: lora route 'how do I open a file' --card docs.lora.arrow --threshold 0.3"
)
def route(
    query: Annotated[str, typer.Argument(help="What to find a card for.")],
    card: Annotated[
        list[Path], typer.Option(help="A candidate card file with a description; may be repeated.")
    ],
    top_k: Annotated[int, typer.Option(help="How many at most.")] = 3,
    threshold: Annotated[float | None, typer.Option(help="Least score, in [-1, 1].")] = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Rank cards for a query by their descriptions. Nothing is printed if none reaches the
    threshold.
    """
    engine = lora.ArrowEngine.from_pretrained(model)
    for path in card:
        engine.router.register_card(lora.load(path))
    routes = engine.router.select(query, top_k, threshold)
    if as_json:
        print(json.dumps([{"name": found.name, "score": found.score} for found in routes]))
        return
    for found in routes:
        print(f"{found.score:.6f}  {found.name}")
    if not routes:
        Console(stderr=True).print("no card fits")


@app.command(
    epilog="Example: lora merge docs.lora.arrow law.lora.arrow -o both.lora.arrow --strategy ties --density 0.3"
)
def merge(
    cards: Annotated[
        list[Path], typer.Argument(help="Card files, PEFT folders, or what else convert reads.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the merged card.")],
    strategy: Annotated[
        str, typer.Option(help="average, weighted, slerp, ties, dare, task_arithmetic or cat.")
    ] = "average",
    weight: Annotated[
        list[float] | None, typer.Option(help="Of a card; once for each, in their order.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Largest rank. If omitted: exact; for ties and dare, the parents' largest."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the merged card.")] = "merged",
    density: Annotated[
        float | None, typer.Option(help="Of ties and dare: the share of entries kept.")
    ] = None,
    elect: Annotated[
        str | None, typer.Option(help="Of ties: signs by 'mass' or by 'count'.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare: seed of what is dropped.")] = None,
    t: Annotated[
        float | None, typer.Option(help="Of slerp: how far from the first card to the second.")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Of weighted: divide the weights by their sum.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge cards into one, by what they do to the weights."""
    _check_file("--out", out)
    options = {"density": density, "elect": elect, "seed": seed, "t": t, "normalize": normalize}
    how = _strategy(strategy, {key: value for key, value in options.items() if value is not None})
    card = lora.merge([_read_card(path) for path in cards], how, weight, rank, name)
    found = lora.save(card, out)
    errors: dict[str, float] = card.metadata["merge"]["error"]
    worst = max(errors.values(), default=0.0)
    facts = {
        "file": str(out),
        "digest": found,
        "rank": card.rank,
        "modules": len(card.weights),
        "error": dict(errors),
    }
    _say(
        facts,
        as_json,
        f"{out}: {len(card.weights)} modules, rank {card.rank}, largest truncation error {worst:.3g}",
    )


@app.command(epilog="Example: lora extract tuned/ --base base/ -o tuned.lora.arrow --rank 8")
def extract(
    tuned: Annotated[
        Path,
        typer.Argument(
            help="Weights: a .safetensors file, an index of shards, or a model's folder."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the card.")],
    base: Annotated[
        Path | None,
        typer.Option(help="The weights tuned from; without them the model is compressed."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of each module; 8 if nothing else is said.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead of --rank: the share of ΔW's squares to hold.")
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead of --rank: the largest relative error.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Target module; may be repeated. All Linears if omitted."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="'full', or 'randomized' for large matrices.")
    ] = "full",
    seed: Annotated[int, typer.Option(help="Seed of the randomized method.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Name of the card; the output file's if omitted.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a card from a fine-tuned model. Singular value decomposition of what changed, or of the
    weights themselves.
    """
    from lora.weights import SafetensorsWeights  # noqa: PLC0415 - only here

    _check_file("--out", out)
    given = [rule for rule in (rank, energy, error) if rule is not None]
    if len(given) > 1:
        raise ArgumentError(
            "lora extract", "one of --rank, --energy, --error", f"{len(given)} of them"
        )
    fixed = 8 if rank is None else rank
    rule = (
        lora.MinEnergy(energy)
        if energy is not None
        else lora.MaxError(error)
        if error is not None
        else fixed
    )
    options: dict[str, Any] = {
        "target_modules": target or "all-linear",
        "method": method,
        "seed": seed,
    }
    options["name"] = out.name.removesuffix(".lora.arrow") if name is None else name
    weights = SafetensorsWeights(tuned)
    with progress_bar(f"extracting {tuned}") as progress:
        options["on_module"] = lambda _, done, total: progress(done, total, None)
        if base is None:
            card = lora.extract_direct(weights, rule, **options)
        else:
            card = lora.extract_delta(SafetensorsWeights(base), weights, rule, **options)
    found = lora.save(card, out)
    told: dict[str, Any] = card.metadata["extract"]["modules"]
    worst = max((module["error"] for module in told.values()), default=0.0)
    facts = {
        "file": str(out),
        "digest": found,
        "rank": card.rank,
        "modules": {key: dict(told[key]) for key in told},
    }
    _say(
        facts,
        as_json,
        f"{out}: {len(told)} modules, rank {card.rank}, largest relative error {worst:.3g}",
    )


@app.command(
    epilog="Example: lora probe sentences.txt, or lora probe --base base/ --tuned tuned/ --rank 8"
)
def probe(
    texts: Annotated[
        Path | None, typer.Argument(help="A text a line; standard input if omitted.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Instead of texts: weights, to compare with --tuned.")
    ] = None,
    tuned: Annotated[Path | None, typer.Option(help="With --base: the weights made of it.")] = None,
    rank: Annotated[int, typer.Option(help="With --base: the rank that a card would have.")] = 8,
    share: Annotated[
        float, typer.Option(help="The share of block influence that makes a block hot.")
    ] = 0.5,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Rank a model's layers. By what they do to texts, or by how far they moved between two models."""
    from lora.evolution.probe import SCORES, WeightMapProbe, changes, hot_zones, scores_of  # noqa: PLC0415 - imports torch
    from lora.weights import SafetensorsWeights  # noqa: PLC0415 - only here

    if (base is None) != (tuned is None):
        raise ArgumentError("lora probe", "--base and --tuned together", "one of them")
    if base is not None and (texts is not None or model is not None):
        raise ArgumentError("lora probe", "either two models' weights or texts", "both")
    if base is not None and tuned is not None:
        with progress_bar("comparing") as progress:
            step = lambda _, done, total: progress(done, total, None)  # noqa: E731 - as short as the callback is
            moved = changes(SafetensorsWeights(base), SafetensorsWeights(tuned), rank, on_step=step)
        rows = [{"name": layer.name, "change": layer.change, "held": layer.held} for layer in moved]
        _say_rows(rows, as_json)
        return
    hot_zones({}, share)  # which is refused now, not after all the work
    lines = _lines(texts)
    with progress_bar("probing") as progress:
        engine = lora.ArrowEngine.from_pretrained(model)
        found = WeightMapProbe(
            engine.base, on_step=lambda _, done, total: progress(done, total, None)
        ).probe(lines)
    hot = hot_zones(scores_of(found.blocks, "influence"), share)
    if as_json:
        print(
            json.dumps(
                {"rows": found.table().to_pylist(), "correlations": found.correlations, "hot": hot}
            )
        )
        return
    _say_rows(
        [{"name": block.name, **{s: getattr(block, s) for s in SCORES}} for block in found.blocks],
        as_json,
    )
    told = ", ".join(
        f"{score} {value:+.2f}" for score, value in found.correlations.items() if value is not None
    )
    print(f"rank correlation with ablation: {told}\nhot by influence: {', '.join(hot)}")


@app.command(epilog="Example: lora convert peft-adapter/ -o docs.lora.arrow")
def convert(
    source: Annotated[
        Path, typer.Argument(help="A card file, a PEFT folder, or a .safetensors file.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="*.arrow: a card; *.safetensors; else a PEFT folder."),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the card; the source's if omitted.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Of a .safetensors file that does not say it.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a PEFT folder that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert between a card, a PEFT folder and a safetensors file. The endings say which."""
    from lora.interop.peft import export_peft  # noqa: PLC0415 - only here
    from lora.interop.safetensors import save_safetensors  # noqa: PLC0415 - only here

    card = _read_card(source, name, alpha)
    if (kind := out.suffix.lower()) == ".arrow":
        lora.save(card, out)
    elif kind == ".safetensors":
        save_safetensors(card, out)
    else:
        export_peft(card, out, overwrite=overwrite)
    facts = {"file": str(out), "name": card.name, "rank": card.rank, "modules": len(card.weights)}
    _say(facts, as_json, f"{out}: card {card.name}, {len(card.weights)} modules, rank {card.rank}")


@app.command(
    epilog="Example: lora train pairs.jsonl --name docs --out docs.lora.arrow --preset quick"
)
def train(
    data: Annotated[
        str,
        typer.Argument(
            help="Pairs as .jsonl, .parquet or .arrow; 'stdlib' for Python's own docstrings."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the card.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the card.")],
    description: Annotated[
        str, typer.Option(help="What the card is for; the router goes by it.")
    ] = "",
    preset: Annotated[
        str | None,
        typer.Option(
            help="How long: quick, stable; or what for: coder, researcher, security, architect, reviewer."
        ),
    ] = None,
    loss: Annotated[str | None, typer.Option(help="contrastive, cosine or triplet.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, linear, cosine, exponential, step or one-cycle.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps that warm up.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps at most.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank; the preset's or 8.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Alpha; the preset's or 16.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Target module; may be repeated. The preset's, or query and value."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Go on from this file after an interruption.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the history as .svg or .png.")] = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Train a card on pairs and save it."""
    from lora.evolution import train as training  # noqa: PLC0415 - imports torch
    from lora.evolution.data import Pairs, docstring_pairs  # noqa: PLC0415 - as above
    from lora.presets import PRESETS, LoRAConfig, fit  # noqa: PLC0415 - only here
    from lora.rewrite import linears  # noqa: PLC0415 - as above

    _check_file("--out", out)
    pairs = docstring_pairs() if data == "stdlib" else Pairs.load(data)
    if preset not in (None, *training.PRESETS, *PRESETS):
        raise ArgumentError(
            "--preset", f"one of {', '.join((*training.PRESETS, *PRESETS))}", repr(preset)
        )
    engine, config = lora.ArrowEngine.from_pretrained(model), LoRAConfig()
    if preset in PRESETS:
        shapes = {
            module: (linear.in_features, linear.out_features)
            for module, linear in linears(engine.base).items()
        }
        config = fit(str(preset), shapes).config
    told = {"loss": loss, "schedule": schedule, "warmup": warmup, "dropout": config.dropout or None}
    given: dict[str, Any] = {key: value for key, value in told.items() if value is not None}
    trainer = training.LoRATrainer(
        engine,
        rank=config.rank if rank is None else rank,
        alpha=config.alpha if alpha is None else alpha,
        target_modules=tuple(target or config.target_modules),
        seed=seed,
        settings=replace(training.PRESETS.get(preset or "", training.Settings()), **given),
    )
    about = {"description": description, "task_type": config.task_type, "tags": list(config.tags)}
    metadata = {key: value for key, value in about.items() if value}
    with progress_bar(f"training {name}") as progress:
        result = trainer.train(
            pairs,
            name=name,
            metadata=metadata,
            max_steps=steps,
            checkpoint=checkpoint,
            progress=progress,
        )
    found = lora.save(result.card, out)
    if plot is not None:
        result.plot(plot)
    before, after = result.metrics["before"], result.metrics["after"]
    facts = {
        "file": str(out),
        "digest": found,
        "before": vars(before),
        "after": vars(after),
        "steps": len(result.history),
    }
    _say(
        facts,
        as_json,
        f"{out}: validation MRR {before.mrr:.3f} -> {after.mrr:.3f} in {len(result.history)} steps",
    )


@app.command(
    epilog="Example: lora conformance --binding my_package.binding:BINDING --only R4 --json verdicts.json"
)
def conformance(
    binding: Annotated[
        str | None, typer.Option(help="package.module:NAME; this library itself if omitted.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="One chapter (R4) or requirement (R4.9).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the verdicts to this file.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that one property may take.", min=1)
    ] = 300.0,
) -> None:
    """Hold an implementation to the specification. Exit 1 if a requirement fails undeclared."""
    from lora.testing.report import red, run_suite, write_report  # noqa: PLC0415 - needs the test extra

    if json_file is not None:
        _check_file("--json", json_file)
    report = run_suite(binding, only=only, junit=junit, timeout=timeout)
    if json_file is not None:
        write_report(report, json_file)
    table = Table(
        "requirement", Column("statement", ratio=1), "verdict", Column("examples", justify="right")
    )
    for name, entry in report["requirements"].items():
        examples = sum(test["examples"] for test in entry["tests"])
        table.add_row(
            name,
            Text(entry["statement"]),
            Text(f"{entry['verdict']} {entry['reason']}".strip()),
            f"{examples}",
        )
    Console().print(table)
    if failed := red(report):
        _fail(
            f"{len(failed)} of {len(report['requirements'])} requirements failed: {', '.join(failed)}",
            1,
        )


@app.command(epilog="Example: lora bench --quick --only routing")
def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="forward, lifecycle, routing, throughput, merge_extract, training, fetching, growth, commands; repeatable."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds and smaller sizes: it works, no more.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of each measured process.", min=1)] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the figures to this JSON file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this library beside its peers. In one process each, in shuffled rounds."""
    from lora.store import replacing  # noqa: PLC0415 - it imports Arrow
    from lora.testing.bench import SCRIPTS, run_bench, shown  # noqa: PLC0415 - only here

    if out is not None:
        _check_file("--out", out)
    wanted, parts = only or list(SCRIPTS), []
    with progress_bar("measuring") as progress:
        for done, part in enumerate(run_bench(wanted, quick=quick, threads=threads), 1):
            parts.append(part)
            progress(done, len(wanted), None)
    report = {part.name: {"machine": part.machine, "rows": part.rows} for part in parts}
    if out is not None:
        with replacing(out) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")
    if as_json:
        print(json.dumps(report))
        return
    table = Table("what", "figure", "interval", "target", "met")
    for part in parts:
        for row in part.rows:
            table.add_row(*shown(row))
    console = Console()
    console.width = max(
        console.width, 0 if console.is_terminal else 160
    )  # a file has no edge to wrap at
    console.print(table)


Peer = Annotated[
    list[str] | None,
    typer.Option("--peer", help="host:port or grpc+tls://… of a peer; may be repeated."),
]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the bearer token.")]
Certificate = Annotated[Path | None, typer.Option("--cert", help="PEM certificate of this side.")]
Key = Annotated[Path | None, typer.Option("--key", help="PEM private key of that certificate.")]
Authority = Annotated[
    Path | None, typer.Option("--ca", help="PEM authority of the other side's certificate.")
]
ClearToken = Annotated[
    bool, typer.Option("--insecure-token", help="Let the token travel in clear beyond loopback.")
]
Wait = Annotated[float, typer.Option(help="Seconds to look for peers on the network.", min=0)]


@app.command(epilog="Example: lora serve ./cards --port 8815")
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of *.lora.arrow files.")],
    port: Annotated[int, typer.Option(help="Port; 0 for a free one.", min=0, max=65535)] = 8815,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 127.0.0.1 for this machine alone.")
    ] = "0.0.0.0",  # noqa: S104 - a LAN's node serves it
    announce: Annotated[
        bool, typer.Option(help="Announce this server on the network by zeroconf.")
    ] = True,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics on this port of loopback.")
    ] = None,
    token_file: TokenFile = None,
    cert: Certificate = None,
    key: Key = None,
    ca: Authority = None,
    insecure_token: ClearToken = False,
    as_json: Json = False,
) -> None:
    """Serve a folder of cards to other nodes. It is read-only, and ends when interrupted."""
    import signal  # noqa: PLC0415 - only here
    import threading  # noqa: PLC0415 - only here

    from lora.federation.cache import default_cache  # noqa: PLC0415 - only for federation
    from lora.federation.node import Node  # noqa: PLC0415 - as above
    from lora.metrics import serving  # noqa: PLC0415 - as above

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    credentials = _credentials(token_file, cert, key, ca, insecure_token)
    interfaces = None if announce else ()
    with ExitStack() as opened:
        node = opened.enter_context(
            Node(
                default_cache(),
                folder,
                host=host,
                port=port,
                interfaces=interfaces,
                credentials=credentials,
            )
        )
        count = len(node.server.catalog.cards)  # type: ignore[union-attr]
        facts: dict[str, Any] = {"cards": count, "uri": node.server.uri}  # type: ignore[union-attr]
        told = f"serving {count} {'card' if count == 1 else 'cards'} at {facts['uri']}"
        if metrics_port is not None:
            facts["metrics"] = (
                f"http://127.0.0.1:{opened.enter_context(serving(node.metrics, metrics_port))}/metrics"
            )
            told += f"\nmetrics at {facts['metrics']}"
        _say(facts, as_json, told)
        sys.stdout.flush()
        ended.wait()


@app.command(name="list", epilog="Example: lora list --peer 192.0.2.7:8815 --json")
def list_cards(
    peer: Peer = None,
    wait: Wait = 3.0,
    peers: Annotated[
        bool, typer.Option("--peers", help="List the peers instead of their cards.")
    ] = False,
    token_file: TokenFile = None,
    cert: Certificate = None,
    key: Key = None,
    ca: Authority = None,
    insecure_token: ClearToken = False,
    as_json: Json = False,
) -> None:
    """List the cards that peers offer. Those named by --peer, or all that are found on the network."""
    with _visitor(peer, wait, _credentials(token_file, cert, key, ca, insecure_token)) as node:
        if peers:
            rows = [{"peer": found.uri, "node": found.node_id} for found in node.peers()]
        else:
            rows = [
                _offered(offer) for _, offers in sorted(node.sync().items()) for offer in offers
            ]
    if not rows and not as_json:
        print("nothing found", file=sys.stderr)
        return
    _say_rows(rows, as_json)


@app.command(epilog="Example: lora fetch docs --peer 192.0.2.7:8815 --pin 3b7e… -o docs.lora.arrow")
def fetch(
    name: Annotated[str, typer.Argument(help="Name of a card that a peer offers.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the card here.")
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option(help="Accept the card of this digest alone; it needs no signature."),
    ] = None,
    trust: Annotated[
        list[Path] | None, typer.Option(help="PEM public key to trust; may be repeated.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Waive one refusal: unsigned, older, other_base …; may be repeated."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Refuse cards for another base model.")
    ] = None,
    peer: Peer = None,
    wait: Wait = 3.0,
    cache: Annotated[Path | None, typer.Option(help="Folder for fetched cards.")] = None,
    token_file: TokenFile = None,
    cert: Certificate = None,
    key: Key = None,
    ca: Authority = None,
    insecure_token: ClearToken = False,
    as_json: Json = False,
) -> None:
    """Fetch a card, verify it, and keep it in the cache."""
    from lora.federation.keys import load_public_key  # noqa: PLC0415 - only for federation
    from lora.federation.trust import Policy, waived  # noqa: PLC0415 - as above
    from lora.store import replacing  # noqa: PLC0415 - as above

    policy = waived(
        Policy(frozenset(map(load_public_key, trust or [])), base_model=base_model), allow or []
    )
    credentials = _credentials(token_file, cert, key, ca, insecure_token)
    with (
        _visitor(peer, wait, credentials, policy, cache) as node,
        progress_bar(f"fetching {name}") as progress,
    ):
        node.sync()
        found = node.fetch(
            name, digest=pin, progress=lambda done, total: progress(done, total, None)
        )
    file = out or node.cache.path(found.digest)
    if out is not None:
        with replacing(out) as copy:
            copy.write(node.cache.path(found.digest).read_bytes())
    facts = {"name": found.card.name, "digest": found.digest, "file": str(file)}
    _say(facts, as_json, f"{file}: card {found.card.name}, {found.digest}")


@app.command(epilog="Example: lora keygen me.pem")
def keygen(
    file: Annotated[
        Path, typer.Argument(help="New file for the private key; the public one goes to FILE.pub.")
    ],
    as_json: Json = False,
) -> None:
    """Make an Ed25519 key to sign cards with."""
    from lora.federation.keys import generate_key  # noqa: PLC0415 - only for federation

    public = generate_key(file)
    facts = {"private": str(file), "public": f"{file}.pub", "public_key": public}
    _say(facts, as_json, f"{file} (keep it secret), {file}.pub: {public}")


@app.command(name="sign", epilog="Example: lora sign docs.lora.arrow --key me.pem")
def sign_card(
    card: Annotated[Path, typer.Argument(help="A card file.")],
    key: Annotated[Path, typer.Option(help="PEM private key, of `lora keygen`.")],
    as_json: Json = False,
) -> None:
    """Sign a card. Its signature is written beside it, and served with it."""
    from lora.federation.keys import sign_file, signature_path  # noqa: PLC0415 - only for federation

    manifest = sign_file(card, key)
    where = str(signature_path(card))
    facts = {"file": where, "name": manifest.name, "digest": manifest.digest}
    _say(facts, as_json, f"{where}: {manifest.name} {manifest.digest}")


@app.command(epilog="Example: lora evolve --documents ./handbook --out skills --steps 60")
def evolve(
    documents: Annotated[Path, typer.Option(help="Folder of Python files and prose to learn.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for accepted cards.")] = Path(
        "skills"
    ),
    queries: Annotated[
        Path | None,
        typer.Option(help="What users asked, a line each; the documents' own if omitted."),
    ] = None,
    card: Annotated[
        list[Path] | None, typer.Option(help="A card that is there already; may be repeated.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps at most, for each task.", min=1)
    ] = None,
    ask: Annotated[
        str | None,
        typer.Option(
            help="HOST:documents or HOST:queries: what may be sent to the teacher at that host."
        ),
    ] = None,
    teacher_model: Annotated[str | None, typer.Option(help="The teacher's name there.")] = None,
    teacher_url: Annotated[
        str, typer.Option(help="An OpenAI-compatible server.")
    ] = "https://api.openai.com/v1",
    key_file: Annotated[Path | None, typer.Option(help="File with the teacher's key.")] = None,
    budget: Annotated[
        int, typer.Option(help="Tokens that the teacher may cost in all.", min=1)
    ] = 100_000,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be learned; send, train and keep nothing."),
    ] = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Learn what the engine does not know of some documents. What measurably helps is kept."""
    from lora.evolving import outcomes, watching  # noqa: PLC0415 - imports torch
    from lora.store import os_errors  # noqa: PLC0415 - imports Arrow

    teacher = (
        None
        if ask is None or dry_run
        else _teacher(ask, teacher_model, teacher_url, key_file, out, budget)
    )
    asked = [] if queries is None else _lines(queries)
    engine, cards = (
        lora.ArrowEngine.from_pretrained(model),
        [lora.load(path) for path in card or []],
    )
    if not dry_run:
        with os_errors(out):
            out.mkdir(exist_ok=True)
    options: dict[str, Any] = {
        "max_steps": steps,
        "teacher": teacher,
        "store": None if dry_run else out,
    }
    distiller = watching(engine, documents, cards=cards, queries=asked, **options)
    if dry_run:
        rows = [
            {
                "task": task.name,
                "queries": len(task.queries),
                **distiller.gather(task.name).figures["pairs"],
            }
            for task in distiller.tasks
        ]
        _say_rows(rows if rows or as_json else [{"task": "nothing is unknown"}], as_json)
        return
    with progress_bar(f"learning {documents.name}") as progress:
        found = list(outcomes(distiller, progress=progress))
    told = [
        {"task": done.task, "accepted": done.accepted, "figures": dict(done.figures)}
        for done in found
    ]
    if as_json:
        print(json.dumps(told, default=str))
        return
    for done in found:
        gain = (
            ""
            if done.verdict is None
            else f"MRR {done.verdict.gain.before:.3f} -> {done.verdict.gain.after:.3f}"
        )
        print(
            f"{'accepted' if done.accepted else 'discarded'}: {done.task}: {gain or done.figures.get('reason')}"
        )
    if not found:
        print("nothing is unknown")


factory = typer.Typer(
    help="Long work as durable jobs: add, run, status, rollback.", no_args_is_help=True
)
app.add_typer(factory, name="factory", epilog="Example: lora factory status")

Root = Annotated[Path, typer.Option("--root", help="Folder of the factory.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@factory.command(
    name="add",
    epilog="Example: lora factory add train docs --with data=pairs.jsonl --with preset=quick",
)
def factory_add(
    kind: Annotated[str, typer.Argument(help="train, extract, merge or distil.")],
    name: Annotated[str, typer.Argument(help="Name of the skill.")],
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="key=value; JSON where it is JSON, else text. May be repeated."
        ),
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher runs first.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Queue it again if it is dead.")] = False,
    root: Root = Path("factory"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Queue a job."""
    from lora.evolution.factory import SkillFactory  # noqa: PLC0415 - only here

    parameters = {"name": name, **dict(map(_setting, given or []))}
    if kind in ("train", "distil"):
        from lora.engine import default_model  # noqa: PLC0415 - imports torch

        parameters.setdefault("model", str(default_model()))
    with SkillFactory(root) as opened:
        job = opened.add(kind, parameters, priority=priority, dry_run=dry_run)
        if again and job.state == "dead" and not dry_run:
            job = opened.retry(job.id)
    facts = {"id": job.id, "kind": job.kind, "name": name, "state": job.state, "dry_run": dry_run}
    _say(
        facts, as_json, f"{'would queue' if dry_run else job.state}: {kind} {name} ({job.id[:12]})"
    )


@factory.command(name="run", epilog="Example: lora factory run --at 02:00")
def factory_run(
    at: Annotated[
        str | None,
        typer.Option(help="Run every night at this local time, HH:MM; now and once if omitted."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="tcp://host:port of a Dask scheduler to run on.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Jobs at a time.", min=1)] = 1,
    root: Root = Path("factory"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run what is queued; exit 1 if a job is dead."""
    import signal  # noqa: PLC0415 - only here
    import threading  # noqa: PLC0415 - as above

    from lora.evolution.factory import SkillFactory, cluster  # noqa: PLC0415 - as above

    stop = threading.Event()
    with ExitStack() as opened:
        executor = opened.enter_context(cluster(scheduler)) if scheduler else None
        told = Console(stderr=True, markup=False, quiet=as_json)
        shop = opened.enter_context(
            SkillFactory(
                root,
                executor=executor,
                workers=workers,
                on_event=lambda job: told.print(
                    f"{job.state}: {job.kind} {job.parameters['name']}"
                ),
            )
        )
        if dry_run:
            waiting = {job.id for job in shop.queue.jobs("queued")}
            _say_jobs([row for row in shop.status().to_pylist() if row["id"] in waiting], as_json)
            return
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        table = shop.run(at=at, stop=stop)
    rows = table.to_pylist()
    _say_jobs(rows, as_json)
    if dead := [row["id"][:12] for row in rows if row["state"] == "dead"]:
        _fail(f"dead jobs: {', '.join(dead)}; `lora factory status --history` says why", 1)


@factory.command(name="status", epilog="Example: lora factory status --history --json")
def factory_status(
    history: Annotated[
        bool, typer.Option("--history", help="What happened, instead of the jobs.")
    ] = False,
    skills: Annotated[
        bool, typer.Option("--skills", help="The versions of each skill, instead of the jobs.")
    ] = False,
    root: Root = Path("factory"),
    as_json: Json = False,
) -> None:
    """Show the jobs, or what happened, or the skills."""
    from lora.evolution.factory import SkillFactory  # noqa: PLC0415 - only here

    with SkillFactory(root) as opened:
        table = opened.history() if history else opened.skills() if skills else opened.status()
    _say_jobs(table.to_pylist(), as_json)


@factory.command(name="rollback", epilog="Example: lora factory rollback docs --version 2")
def factory_rollback(
    name: Annotated[str, typer.Argument(help="Name of the skill.")],
    version: Annotated[
        int | None, typer.Option(help="Which; the one before the live one if omitted.")
    ] = None,
    root: Root = Path("factory"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Put an earlier version of a skill into service."""
    from lora.evolution.factory import SkillFactory  # noqa: PLC0415 - only here

    with SkillFactory(root) as opened:
        found = opened.rollback(name, version, dry_run=dry_run)
    facts = {"name": name, "version": found.version, "digest": found.digest, "dry_run": dry_run}
    _say(
        facts,
        as_json,
        f"{'would serve' if dry_run else 'live'}: {name} version {found.version}, {found.digest}",
    )


@app.command(epilog="Example: lora demo --steps 20 --out demo-output")
def demo(
    steps: Annotated[
        int, typer.Option(help="Training steps; fewer are quicker and teach less.", min=1)
    ] = 60,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for what the demo makes.")
    ] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """Run the whole story on the real MiniLM.

    Train a card on Python's own documentation, save it, map it, apply it, route to it, remove it.
    """
    from lora.demo import run  # noqa: PLC0415 - imports torch

    summary = run(
        out, steps=steps, console=Console(quiet=as_json, markup=False), progress_bar=progress_bar
    )
    if as_json:
        print(json.dumps(summary))


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, float | None], None]]:
    """A bar on stderr, as a callback of step, steps and loss (None where there is none)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, loss="")
        try:
            yield lambda step, total, loss: bar.update(
                task, completed=step, total=total, loss="" if loss is None else f"loss {loss:.3f}"
            )
        except BaseException:
            bar.live.transient, bar.console.quiet = (
                True,
                not bar.console.is_terminal,
            )  # all that is left is the error
            raise


def _read_card(
    source: Path, name: str | None = None, alpha: float | None = None
) -> "lora.LoRACard":
    """The card in a card file, a PEFT directory, or a safetensors file, to which alone an alpha can
    be given.
    """
    from lora.interop.peft import import_peft  # noqa: PLC0415 - not needed by most commands
    from lora.interop.safetensors import load_safetensors  # noqa: PLC0415 - as above

    if source.suffix.lower() == ".safetensors" and not source.is_dir():
        return load_safetensors(source, name=name, alpha=alpha)
    if alpha is not None:
        raise ArgumentError("--alpha", "a .safetensors file as the source", str(source))
    if source.is_dir():
        return import_peft(source, name=name)
    card = lora.load(source)
    return card if name is None else replace(card, name=name)


def _lines(path: Path | None) -> list[str]:
    """The lines of a file, or of standard input, that hold something."""
    try:
        text = path.read_text("utf-8") if path else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path or "standard input"), "text in UTF-8", error) from error
    return [line for line in text.splitlines() if line.strip()]


def _check_file(option: str, path: Path) -> None:
    """Refuse a file that could not be written once the work is done."""
    if path.is_dir() or not path.parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ArgumentError(f"{option} {path}", "a file in an existing folder", found)
    if path.suffix.lower() == ".safetensors":
        raise ArgumentError(
            f"{option} {path}",
            "another ending",
            ".safetensors",
            "lora convert makes such a file of a card",
        )


def _teacher(
    ask: str, name: str | None, url: str, key_file: Path | None, folder: Path, budget: int
) -> Any:
    """The teacher behind a server, and what may be sent to it."""
    from lora.evolution.cloud import CloudDistiller, Consent, Ledger, OpenAITeacher  # noqa: PLC0415 - only for evolve
    from lora.federation.keys import read_small  # noqa: PLC0415 - as above
    from lora.store import os_errors  # noqa: PLC0415 - as above

    if name is None or key_file is None:
        raise ArgumentError("--ask", "--teacher-model and --key-file beside it", "not both")
    host, _, data = ask.partition(":")
    with os_errors(folder):
        folder.mkdir(exist_ok=True)
    key = read_small(key_file).decode("ascii", "replace").strip()
    teacher = OpenAITeacher(
        name,
        Ledger(folder / "ledger.sqlite", budget),
        api_key=key,
        base_url=url,
        cache=folder / "asked",
    )
    return CloudDistiller(teacher, consent=Consent(host, [data]))


def _setting(text: str) -> tuple[str, Any]:
    """The key and the value in ``key=value``."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ArgumentError("--with", "key=value", text)
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _say_jobs(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows of a factory's tables: all columns as JSON, those that a terminal has room for else."""
    told = [{key: _printable(value) for key, value in row.items()} for row in rows]
    if not as_json:
        told = [{key: row[key] for key in SHOWN if key in row} for row in told]
        told = [
            {**row, **{key: row[key][:12] for key in ("id", "job", "digest") if row.get(key)}}
            for row in told
        ]
    _say_rows(told if told or as_json else [{"state": "nothing"}], as_json)


def _printable(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def _encode_parquet(source: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Stream a Parquet file through `encode_batches` into another."""
    import pyarrow as pa  # noqa: PLC0415 - only here
    from pyarrow import parquet  # noqa: PLC0415 - as above

    from lora.batches import encode_batches  # noqa: PLC0415 - imports torch
    from lora.store import replacing  # noqa: PLC0415 - only here

    rows = 0
    try:
        with (
            parquet.ParquetFile(source) as file,
            replacing(out) as written,
            progress_bar(f"encoding {source}") as progress,
        ):
            writer = None
            for batch in encode_batches(file.iter_batches(PARQUET_ROWS), **options):
                writer = writer or parquet.ParquetWriter(written, batch.schema)
                writer.write_batch(batch)
                rows += batch.num_rows
                progress(rows, file.metadata.num_rows, None)
            if writer is None:
                raise DataError(f"--parquet {source}", "at least one row", "none")
            writer.close()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, LoRAError):
            raise
        raise DataError(f"--parquet {source}", "a Parquet file", error) from error
    _say({"file": str(out), "rows": rows}, as_json, f"{out}: {rows} rows")


def _credentials(
    token: Path | None, cert: Path | None, key: Path | None, ca: Path | None, insecure: bool
) -> Any:
    """The credentials in files."""
    from lora.federation.access import Credentials  # noqa: PLC0415 - only for federation
    from lora.federation.keys import read_small  # noqa: PLC0415 - as above

    certificate, private, authority = (
        None if path is None else read_small(path) for path in (cert, key, ca)
    )
    text = None if token is None else read_small(token).decode("ascii", "replace").strip()
    return Credentials(text, certificate, private, authority, insecure)


@contextmanager
def _visitor(
    peers: list[str] | None,
    wait: float,
    credentials: Any,
    policy: Any = None,
    cache: Path | None = None,
) -> Iterator[Any]:
    """A node that serves nothing, once it has found the peers that are named, or waited for those
    that are not.
    """
    from lora.federation.cache import default_cache  # noqa: PLC0415 - only for federation
    from lora.federation.node import Node, uri_of  # noqa: PLC0415 - as above
    from lora.federation.trust import Policy  # noqa: PLC0415 - as above

    named = list(dict.fromkeys(uri_of(peer) for peer in peers or []))
    with Node(
        cache or default_cache(),
        peers=named,
        interfaces=() if named else None,
        policy=policy or Policy(),
        credentials=credentials,
    ) as node:
        node.discovery.wait(wait, len(named) or None)
        missing = sorted(set(named) - {peer.uri for peer in node.peers()})
        if named and not node.peers():
            raise PeerError(", ".join(missing), f"an answer within {wait:g} s", "none")
        for uri in missing:
            print(f"no answer: {uri}", file=sys.stderr)
        yield node


def _offered(offer: Any) -> dict[str, Any]:
    """A row of `lora list`."""
    manifest = offer.manifest
    signer = manifest.signature.public_key if manifest.signature else None
    told = {
        "name": manifest.name,
        "version": manifest.version,
        "rank": manifest.rank,
        "size": manifest.size,
    }
    about = {
        "description": manifest.description,
        "base_model": manifest.base_model,
        "signer": signer,
    }
    return {**told, "digest": manifest.digest, **about, "peers": list(offer.uris)}


def _strategy(name: str, options: dict[str, Any]) -> Any:
    """The merge strategy of that name, with its own options."""
    from lora.merging import STRATEGIES  # noqa: PLC0415 - only for merge

    if name not in STRATEGIES:
        raise ArgumentError("--strategy", f"one of {', '.join(STRATEGIES)}", name)
    known = [field.name for field in fields(STRATEGIES[name])]
    for option in options:
        if option not in known:
            raise ArgumentError(
                f"--{option}", f"an option of {name}: {known or 'it has none'}", option
            )
    return STRATEGIES[name](**options)


def _say_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *(
                Text(f"{value:.4g}" if isinstance(value, float) else _plain(value))
                for value in row.values()
            )
        )
    Console().print(table)


def _say(facts: dict[str, Any], as_json: bool, line: str) -> None:
    print(json.dumps(facts) if as_json else line)


def _plain(value: object) -> str:
    """A value as text without what a terminal would obey."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "�" for letter in f"{value}"
    )


def _end(code: object) -> None:
    """End as typer says: with nothing, with a status, or with 130 after an interrupt."""
    if code == 130:
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"lora: {_plain(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


for _command in (
    *app.registered_commands,
    *factory.registered_commands,
):  # ids are for those who read the code
    _command.help = cleandoc(_command.callback.__doc__ or "").partition("\n\nRequirements:")[0]


if __name__ == "__main__":
    main()
