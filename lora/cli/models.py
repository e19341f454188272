"""Commands that run a model: encode, route, probe, train.

Requirements: R5, R15, R17, R21, R25.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.text import Text

import lora
from lora.cli.app import (
    CARD,
    NOTHING_TO_SERVE,
    Json,
    Model,
    Result,
    check_apart,
    check_input,
    check_output,
    checks_done,
    command,
    present,
    progress_bar,
    read_lines,
    table_of,
    waiting,
)
from lora.errors import ArgumentError, ConflictError, DataError, LoRAError

PARQUET_ROWS = 1024
"""Rows of a Parquet file that are encoded at a time."""

TEXTS = 256
"""Other texts that are encoded at a time; of more there is a bar."""


@command("encode 'read a file' --card docs.lora.arrow --out texts.npy")
def encode(
    texts: list[str] | None = None,
    *,
    card: list[Path] | None = None,
    model: Model = None,
    out: Path | None = None,
    parquet: Path | None = None,
    column: str = "text",
    adapter: str | None = None,
    route: bool = False,
) -> Result:
    """Encode texts, with cards applied. A Parquet file is streamed in bounded memory.

    Args:
        texts: Texts; lines of standard input if omitted.
        card: A card file; may be repeated.
        out: Write a NumPy .npy file instead of printing. An existing file is replaced.

    Parquet:
        parquet: Encode this file's column of texts into --out, a Parquet file.
        column: The column of texts.
        adapter: Name of the card to apply to every row; a single --card's.
        route: Choose each row's card by its text.
    """
    if parquet is not None:
        if texts or out is None:
            raise ArgumentError("--parquet", "--out and no texts", "texts" if texts else "no --out")
        cards = card or []
        if cards and adapter is None and not route:
            if len(cards) > 1:
                raise ArgumentError("several --card", "--adapter NAME or --route", "neither")
            adapter = lora.inspect(cards[0]).name
        check_output("--out", out)
        checks_done()
        check_apart(out, parquet)
        return _encode_parquet(
            parquet, out, cards=cards, column=column, adapter=adapter, route=route, model=model
        )
    if adapter is not None or route:
        raise ArgumentError("--adapter, --route", "--parquet", "none")
    check_output("--out", out)
    checks_done()
    import numpy as np

    logging.lastResort.setLevel("ERROR")  # type: ignore[union-attr] # the warnings say the same
    texts = texts or [line.rstrip("\n") for line in sys.stdin]
    engine = _engine(model, card or [])
    parts = []
    with progress_bar("encoding") if len(texts) > TEXTS else nullcontext() as progress:
        for start in range(0, max(1, len(texts)), TEXTS):
            parts.append(engine.encode(texts[start : start + TEXTS]))
            if progress:
                progress(min(start + TEXTS, len(texts)), len(texts))
    rows = np.concatenate(parts)
    if out is None:
        lines = [" ".join(f"{number:.6f}" for number in row) for row in rows]
        return Result(rows.tolist(), "\n".join(lines) if lines else None)
    from lora.files import replacing

    with replacing(out) as file:
        np.save(file, rows)
    facts = {"file": str(out), "shape": list(rows.shape)}
    return Result(facts, f"{out}: {rows.shape[0]} × {rows.shape[1]}")


def _engine(model: Path | None, cards: Sequence[Path] = ()) -> "lora.ArrowEngine":
    """Load a model and apply cards, which are looked at first: a model takes seconds."""
    for path in cards:
        lora.load(path)
    with waiting("loading the model"):
        engine = lora.ArrowEngine.from_pretrained(model)
    for path in cards:
        engine.load_lora(path)
    return engine


def _encode_parquet(source: Path, out: Path, **options: Any) -> Result:
    import pyarrow as pa
    from pyarrow import parquet

    from lora.batches import encode_batches
    from lora.files import replacing

    for path in options["cards"]:
        lora.load(path)
    rows, writer = 0, None
    try:
        with (
            parquet.ParquetFile(source) as file,
            replacing(out) as written,
            progress_bar(f"encoding {source}") as progress,
        ):
            for batch in encode_batches(file.iter_batches(PARQUET_ROWS), **options):
                writer = writer or parquet.ParquetWriter(written, batch.schema)
                writer.write_batch(batch)
                rows += batch.num_rows
                progress(rows, file.metadata.num_rows)
            if writer is None:
                raise DataError(f"--parquet {source}", "at least one row", "none")
            writer.close()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, LoRAError):
            raise
        raise DataError(f"--parquet {source}", "a Parquet file", error) from error
    return Result({"file": str(out), "rows": rows}, f"{out}: {rows} rows")


@command("route 'how do I open a file' --card docs.lora.arrow")
def route(
    query: str,
    *,
    card: list[Path] | None = None,
    cards: Path | None = None,
    top_k: int = 3,
    threshold: Annotated[float | None, typer.Option(min=-1, max=1)] = None,
    model: Model = None,
    as_json: Json = False,
) -> Result:
    """Find the cards whose descriptions match a query. Print nothing if none fits.

    Args:
        query: What to find a card for.
        card: A candidate card file with a description; may be repeated. The largest cosine counts.
        cards: Folder of live cards, of which the nearest answers if it knows such queries.
        top_k: How many at most.
        threshold: Least score, in [-1, 1]; none if omitted, but with --cards each card's own.
    """
    from lora.checks import integer
    from lora.routing import Index, decide, explained, nearest, unit

    integer(top_k, "top_k", 1)
    if (card is None) == (cards is None):
        raise ArgumentError("lora route", "--card or --cards", "both" if card else "none of them")
    checks_done()
    check_input(cards, "a folder of live cards", folder=True)
    candidates: dict[str, Any] = {}
    for path in card or ():
        candidate = lora.load(path)
        if candidate.name in candidates:
            where = f"--card {path}: {candidate.name!r}"
            raise ConflictError(where, "one card of a name", "another one", "rename one")
        candidates[candidate.name] = candidate
    engine = _engine(model)
    if cards is not None:
        engine.follow(cards)
    for candidate in candidates.values():
        engine.register_lora(candidate)
    if cards is None:
        ranked = engine.router.select(query, top_k)
        routes = [route for route in ranked if threshold is None or route.score >= threshold]
        facts = [{"name": route.name, "score": route.score} for route in routes]
        best = ranked[0]
        why = f"{best.name!r} scores {best.score:.6f}, below the threshold {threshold}"
    else:
        index = Index(engine.router.candidates)
        (vector,) = unit(engine.encode([query]))
        decisions = [decide(route, index, threshold) for route in nearest(vector, index, top_k)]
        facts = [asdict(each) for each in decisions]
        routes = [each.best for each in takewhile(lambda each: each.kind == "routes", decisions)]
        why = explained(decisions[0] if decisions else None)
    if not routes and not as_json:
        Console(stderr=True, soft_wrap=True).print(f"no card fits: {why}", markup=False)
    text = "\n".join(f"{route.score:.6f}  {route.name}" for route in routes)
    return Result(facts, text or None)


@command("probe sentences.txt")
def probe(
    texts: Path | None = None,
    *,
    base: Path | None = None,
    tuned: Path | None = None,
    rank: int = 8,
    share: float = 0.5,
    model: Model = None,
) -> Result:
    """Rank a model's layers by their effect on texts. With --base: by how far the weights moved.

    Args:
        texts: A text a line; standard input if omitted.
        base: Instead of texts: weights, to compare with --tuned.
        tuned: With --base: the weights made of it.
        rank: With --base: the rank that a card would have.
        share: The share of block influence that makes a block hot.
    """
    from lora.checks import integer
    from lora.evolution.probe import SCORES, WeightMapProbe, changes, hot_zones, scores_of
    from lora.interop.weights import SafetensorsWeights

    if (base is None) != (tuned is None):
        raise ArgumentError("lora probe", "--base and --tuned together", "one of them")
    if base is not None and tuned is not None:
        if texts is not None or model is not None:
            raise ArgumentError("lora probe", "either two models' weights or texts", "both")
        integer(rank, "--rank", 1)
        checks_done()
        weights = SafetensorsWeights(base), SafetensorsWeights(tuned)
        with progress_bar("comparing") as progress:
            moved = changes(*weights, rank, on_step=lambda _, *count: progress(*count))
        rows = [{k: getattr(layer, k) for k in ("name", "change", "held")} for layer in moved]
        return Result(rows, table_of(rows))
    hot_zones({}, share)  # refuses a wrong share
    checks_done()
    lines = read_lines(texts)
    with progress_bar("probing") as progress:
        core = lora.ArrowEngine.from_pretrained(model).base
        report = WeightMapProbe(core, on_step=lambda _, *count: progress(*count)).probe(lines)
    hot = hot_zones(scores_of(report.blocks, "influence"), share)
    correlations = report.correlations
    facts = {"rows": report.table().to_pylist(), "correlations": correlations, "hot": hot}
    blocks = [{key: getattr(block, key) for key in ("name", *SCORES)} for block in report.blocks]
    signs = ", ".join(f"{key} {value:+.2f}" for key, value in present(**correlations).items())
    tail = f"rank correlation with ablation: {signs}\nhot by influence: {', '.join(hot)}"
    return Result(facts, Group(table_of(blocks), Text(tail)))


@command("train pairs.jsonl --name new -o new.lora.arrow --preset quick", inputs=["data", "model"])
def train(
    data: str,
    *,
    name: str,
    out: Path,
    description: str = "",
    preset: str | None = None,
    loss: str | None = None,
    schedule: str | None = None,
    warmup: float | None = None,
    steps: int | None = None,
    rank: Annotated[int | None, typer.Option(min=1)] = None,
    alpha: float | None = None,
    target: list[str] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    plot: Path | None = None,
    model: Model = None,
) -> Result:
    """Train a card on pairs and save it. Exit 3 if no better than the base model.

    Args:
        data: Pairs as .jsonl, .parquet or .arrow; 'stdlib' for Python's docstrings.
        description: What the card is for; the router goes by it.
        checkpoint: Go on from this file after an interrupt.
        plot: Draw the history as .svg or .png.

    Training:
        preset: How long: quick, stable; or what for: coder, researcher, security, architect,
            reviewer.
        loss: contrastive, cosine or triplet. [default: contrastive]
        schedule: constant, linear, cosine, exponential, step or one-cycle; stable sets cosine.
            [default: constant]
        warmup: Share of steps that warm up. [default: 0.0]
        steps: Steps at most; the preset's passes over the pairs if omitted.

    Adapter:
        rank: Rank; presets set theirs. [default: 8]
        alpha: Alpha; presets set theirs. [default: 16.0]
        target: Target module; may be repeated. The preset's, or queries and values.
    """
    from lora.checks import integer
    from lora.drawing import FORMATS
    from lora.models.adapt import linears
    from lora.presets import PRESETS, LoRAConfig, fit
    from lora.training import train as training
    from lora.training.data import Pairs, docstring_pairs

    check_output("--out", out, CARD)
    check_output("--checkpoint", checkpoint)
    check_output("--plot", plot, FORMATS)
    known = (*training.PRESETS, *PRESETS)
    if preset not in (None, *known):
        raise ArgumentError("--preset", f"one of {', '.join(known)}", repr(preset))
    integer(seed, "seed", 0)
    if steps is not None:
        integer(steps, "max_steps", 1)
    shape = present(rank=rank, alpha=alpha, target_modules=target)
    config = LoRAConfig(**shape)
    settings = training.PRESETS.get(preset or "", training.Settings())
    settings = replace(settings, **present(loss=loss, schedule=schedule, warmup=warmup))
    checks_done()
    check_apart(out, Path(data))
    with waiting(f"reading {data}"):
        pairs = docstring_pairs() if data == "stdlib" else Pairs.load(data)
    engine = _engine(model)
    if preset in PRESETS:
        shapes = {key: (m.in_features, m.out_features) for key, m in linears(engine.base).items()}
        config = replace(fit(str(preset), shapes).config, **shape)
        settings = replace(settings, dropout=config.dropout)
    trainer = training.LoRATrainer(
        engine,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=target or (config.target_modules if preset in PRESETS else None),
        seed=seed,
        settings=settings,
    )
    about = present(
        description=description or None,
        task_type=config.task_type or None,
        tags=list(config.tags) or None,
    )
    with progress_bar(f"training {name}") as progress:
        result = trainer.train(
            pairs,
            name=name,
            metadata=about,
            max_steps=steps,
            checkpoint=checkpoint,
            progress=progress,
        )
    digest = lora.save(result.card, out)
    if plot is not None:
        result.plot(plot)
    before, after = result.metrics["before"], result.metrics["after"]
    taken = len(result.history)
    gain = f"validation MRR {before.mrr:.3f} -> {after.mrr:.3f} in {taken} steps"
    drawn = "" if plot is None else f"\ndrawn: {plot}"
    facts: dict[str, Any] = {"file": str(out), "digest": digest, "steps": taken}
    facts |= {"before": vars(before), "after": vars(after)}
    if after.mrr > before.mrr:
        return Result(facts, f"{out}: {gain}{drawn}")
    reason = f"no better than the base model: {gain}"
    return Result({**facts, "reason": reason}, f"{out}: {reason}{drawn}", NOTHING_TO_SERVE)


@command("eval docs.lora.arrow law.lora.arrow --pairs pairs.jsonl", name="eval")
def evaluate(cards: list[Path], *, pairs: Path, model: Model = None) -> Result:
    """Measure how well queries find their answers, with each card.

    Each card's difference to the base stands between bounds, each of 95 %.

    Args:
        cards: Card files, of which each is applied alone.
        pairs: Held-out pairs as .jsonl, .parquet or .arrow.
    """
    from lora.evolution.acceptance import LEAST, change
    from lora.training.data import Pairs
    from lora.training.train import ranks

    checks_done()
    data, loaded = Pairs.load(pairs), [lora.load(path) for path in cards]
    groups = data.table["group"].to_pylist()
    if len(data) < LEAST:
        raise DataError(str(pairs), f"at least {LEAST} pairs", len(data))
    rows: list[dict[str, Any]] = []
    with progress_bar("evaluating") as progress:
        base = lora.ArrowEngine.from_pretrained(model).base
        plain = ranks(base, data)
        for path, card in zip(cards, loaded, strict=True):
            progress(len(rows) + 1, len(loaded) + 1)
            shares = ranks(lora.adapt(base, card), data)
            gain = change(plain, shares, groups, where=f"--pairs {pairs}")
            rows.append({"file": str(path), "name": card.name, **_figures(shares)})
            rows[-1] |= {"gain": gain.mean, "lower": gain.lower, "upper": gain.upper}
        progress(len(loaded) + 1, len(loaded) + 1)
    facts = {"queries": len(data), "base": _figures(plain), "cards": rows}
    signs = {"mrr": "", "recall_at_1": "", "gain": "+", "lower": "+", "upper": "+"}
    lines = [{"name": "(base)", **_figures(plain)}, *rows]
    shown = [
        {k: f"{v:{signs[k]}.3f}" if k in signs else v for k, v in line.items() if k != "file"}
        for line in lines
    ]
    return Result(facts, table_of(shown))


def _figures(shares: Any) -> dict[str, float]:
    return {"mrr": float(shares.mean()), "recall_at_1": float((shares >= 1).mean())}
