"""Commands on card files: inspect, convert, merge, extract, fold.

Requirements: R1, R16, R20, R23, R25, R26.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

import lora
from lora.cli.app import (
    CARD,
    Result,
    check_apart,
    check_output,
    check_weights,
    checks_done,
    command,
    details,
    present,
    progress_bar,
    shortened,
    table_of,
    waiting,
)
from lora.errors import ArgumentError, CardFileError, CardNotFoundError

if TYPE_CHECKING:
    from lora.card import LoRACard


@command("inspect docs.lora.arrow --verify 3b7e…")
def inspect(file: Path, *, verify: str | None = None, plot: Path | None = None) -> Result:
    """Show a card's contents. Its weights are loaded only to draw them.

    Args:
        file: A card file.
        verify: SHA-256 that the file must have.
        plot: Draw ΔW's norms, effective ranks and singular values here.
    """
    if plot is not None:
        from lora.drawing import FORMATS, draw_card

        check_output("--plot", plot, FORMATS)
    if verify is not None:
        lora.load(file, verify=verify)
    checks_done()
    digest, header = lora.digest(file), lora.inspect(file)
    if plot is not None:
        with waiting(f"drawing {plot}"):
            draw_card(lora.load(file), plot)
    facts = {
        "name": header.name,
        "digest": digest,
        "format": ".".join(map(str, header.format_version)),
        **{
            key: getattr(header, key)
            for key in ("rank", "alpha", "dtype", "base_model", "base_fingerprint")
        },
        "target_modules": list(header.target_modules),
        "parameters": header.num_params,
        "bytes": header.nbytes,
        "metadata": dict(header.metadata),
    }
    modules = dict(header.modules)  # shapes and scalings, as tuples
    said = {_LABELS.get(key, key): fact for key, fact in facts.items() if key != "metadata"}
    said["targets"] = [row["module"] for row in _grouped(dict.fromkeys(header.target_modules, ()))]
    metadata = {key: shortened(value) for key, value in header.metadata.items()}
    drawn: list[Any] = [details({"file": str(file), **said})]
    if metadata:
        drawn += [Text("metadata"), details(metadata, indent=2)]
    drawn += [Text(), table_of(_grouped(modules) or [{"module": "none"}])]
    if plot is not None:
        drawn.append(Text(f"drawn: {plot}"))
    return Result({**facts, "modules": modules, "extra": dict(header.extra)}, Group(*drawn))


_LABELS = {"base_model": "base", "base_fingerprint": "fingerprint", "target_modules": "targets"}
"""Fields of a card whose names leave no room for a whole digest."""


def _grouped(shapes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Make one row of the modules that differ in the numbers of their names alone."""
    groups: dict[Any, list[list[str]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        kind = (*shape, *(None if part.isdecimal() else part for part in parts))
        groups.setdefault(kind, []).append(parts)
    rows = []
    for kind, names in groups.items():
        name = ".".join(map(_span, zip(*names, strict=True)))
        columns = zip(("in", "rank", "out", "scaling"), kind, strict=False)
        rows.append({"module": name, "count": len(names), **dict(columns)})
    return rows


def _span(parts: Sequence[str]) -> str:
    """Write the parts of names that stand in one place.

    Examples:
        >>> _span(["query", "query"]), _span([*map(str, range(12))]), _span(["1", "5", "5"])
        ('query', '0…11', '1,5')
    """
    numbers = sorted(set(parts), key=lambda part: (len(part), part))
    is_run = numbers == [str(i) for i in range(len(numbers))]
    return f"0…{numbers[-1]}" if is_run and len(numbers) > 2 else ",".join(numbers)


def _about(
    *, base_model: str | None = None, description: str | None = None, tag: list[str] | None = None
) -> dict[str, Any]:
    """Take what a card says of itself.

    Description:
        base_model: Name of the base model that the card is for.
        description: What the card is for; the router goes by it.
        tag: Tag of the card, in place of the source's; may be repeated.
    """
    metadata = present(description=description, tags=tag or None)
    return present(base_model=base_model, metadata=metadata)


def _saying(card: "LoRACard", about: dict[str, Any]) -> "LoRACard":
    return replace(card, **{**about, "metadata": {**card.metadata, **about["metadata"]}})


@command("convert peft-adapter/ -o docs.lora.arrow", about=_about)
def convert(
    source: Path,
    *,
    out: Path,
    name: str | None = None,
    about: dict[str, Any],
    alpha: float | None = None,
    layout: str | None = None,
    part: str | None = None,
    overwrite: bool = False,
    exact: bool = False,
) -> Result:
    """Convert between a card, a PEFT folder and a safetensors file. The endings say which.

    Args:
        source: A card file, a .safetensors file, hf:org/name, or a folder of PEFT, mlx-lm or
            diffusers.
        out: *.arrow: a card; *.safetensors; else a PEFT folder. An existing file is replaced.
        name: Name of the card; the source's if omitted.
        alpha: Alpha, if the .safetensors file has none.
        layout: Of a .safetensors file that fits both: linear or matrix.
        part: Of a file of kohya or diffusers for several models: the one to read.
        overwrite: Replace a PEFT folder that is there.
        exact: Of a PEFT folder: write alpha_pattern and rank_pattern, and round nothing.
    """
    from lora.checks import choice, positive
    from lora.interop.peft import export_peft
    from lora.interop.safetensors import LAYOUTS, save_safetensors

    if alpha is not None:
        positive(alpha, "--alpha")
    if layout is not None:
        choice(layout, "--layout", LAYOUTS)
    ending = out.suffix.lower()
    is_file = ending in (".arrow", ".safetensors")
    if (overwrite or exact) and is_file:
        option, hint = "--exact" if exact else "--overwrite", "leave it out: a file is replaced"
        raise ArgumentError(option, "a PEFT folder as --out", str(out), hint)
    if ending[1:].isalpha() and not is_file:  # a slip, or the form of another program
        raise ArgumentError(f"--out {out}", "*.arrow, *.safetensors or a folder's name", ending)
    checks_done()
    check_apart(out, source)
    with progress_bar(f"converting {source}") as progress:
        card = _read_card(source, name, **present(alpha=alpha, layout=layout, part=part))
        card = _saying(card, about)
        progress(1, 2)
        if ending == ".arrow":
            lora.save(card, out)
        elif ending == ".safetensors":
            save_safetensors(card, out)
        else:
            export_peft(card, out, overwrite=overwrite, exact=exact)
        progress(2, 2)
    facts = {"file": str(out), "name": card.name, "rank": card.rank, "modules": len(card.weights)}
    where = out if is_file else f"{out}/"
    return Result(
        facts, f"{where}: card {card.name}, {len(card.weights)} modules, rank {card.rank}"
    )


@command("merge docs.lora.arrow law.lora.arrow -o both.lora.arrow", inputs=["cards"], about=_about)
def merge(
    cards: list[Path],
    *,
    out: Path,
    strategy: str = "average",
    weight: list[float] | None = None,
    rank: int | None = None,
    name: str = "merged",
    about: dict[str, Any],
    density: float | None = None,
    elect: str | None = None,
    seed: int | None = None,
    t: float | None = None,
    normalize: bool | None = None,
) -> Result:
    """Merge cards into one, by what they do to the weights.

    Metadata that all cards share is kept. Where the cards' base has several names or
    revisions, --base-model names it.

    Args:
        cards: Card files, PEFT folders, or what else convert reads.
        strategy: average, weighted, slerp, ties, dare, task_arithmetic or cat.
        weight: Weight of a card, 1 if omitted; repeat once per card, in order.
        rank: Largest rank. If omitted: exact; for ties and dare, the parents' largest.

    Strategies:
        density: Of ties and dare: the share of entries kept. [default: 0.5]
        elect: Of ties: signs by 'mass' or by 'count'. [default: mass]
        seed: Of dare: seed of what is dropped. [default: 0]
        t: Of slerp: how far from the first card to the second. [default: 0.5]
        normalize: Of weighted: divide the weights by their sum.
    """
    from lora.checks import choice, integer
    from lora.merging import STRATEGIES

    check_output("--out", out, CARD)
    choice(strategy, "--strategy", STRATEGIES)
    kind = STRATEGIES[strategy]
    options = present(density=density, elect=elect, seed=seed, t=t, normalize=normalize)
    for option in options:
        if not hasattr(kind, option):
            takers = ", ".join(n for n, rule in STRATEGIES.items() if hasattr(rule, option))
            hint = f"it is for {takers}"
            raise ArgumentError(f"--{option}", f"none for {strategy}", options[option], hint)
    rule = kind(**options)
    check_weights(weight, len(cards))
    if weight and strategy in ("average", "slerp"):
        raise ArgumentError("--weight", f"none for {strategy}", weight, "weighted takes them")
    if strategy == "slerp" and len(cards) != 2:
        raise ArgumentError("--strategy slerp", "two cards", len(cards))
    if rank is not None:
        integer(rank, "--rank", 1)
    checks_done()
    check_apart(out, *cards)
    with progress_bar("merging") as progress:
        parents = [_read_card(path) for path in cards]
        merged = lora.merge(
            parents,
            rule,
            weight,
            rank,
            name,
            base_model=about.get("base_model"),
            on_module=lambda _, done, total: progress(done, total),
        )
    card = _saying(merged, about)
    digest = lora.save(card, out)
    record = card.metadata["merge"]
    cut = {key: record[key] for key in ("kept", "rank_90") if key in record}
    facts = {"file": str(out), "digest": digest, "rank": card.rank, "modules": len(card.weights)}
    facts |= {"error": dict(record["error"]), **cut}
    quality = f"which keeps {cut['kept']:.1%} of ΔW's squares" if cut else "exact"
    text = f"{out}: {len(card.weights)} modules, rank {card.rank}, {quality}"
    if "rank_90" in cut and cut["kept"] < 0.9:
        text += f" (90 % would take --rank {cut['rank_90']})"
    if "description" not in card.metadata and any("description" in c.metadata for c in parents):
        text += "\nno description, since the cards' differ: --description sets one"
    return Result(facts, text)


@command(
    "extract tuned/ --base base/ -o tuned.lora.arrow --rank 8",
    inputs=["tuned", "base"],
    about=_about,
)
def extract(
    tuned: Path,
    *,
    out: Path,
    base: Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    target: list[str] | None = None,
    method: str = "full",
    seed: int = 0,
    name: str | None = None,
    about: dict[str, Any],
) -> Result:
    """Make a card from what fine-tuning changed. Without --base: from the weights themselves.

    Args:
        tuned: Weights: a .safetensors file, an index of shards, or a model's folder.
        base: The weights tuned from; without them the model is compressed.
        rank: Rank of each module; 8 if no rule is set.
        energy: Instead of --rank: the share of ΔW's squares to hold.
        error: Instead of --rank: the largest relative error.
        target: Target module; all Linears if omitted.
        method: 'full', or 'randomized' for large matrices.
        name: Name of the card; the output file's if omitted.
    """
    from lora.checks import choice, integer
    from lora.extract import METHODS
    from lora.interop.weights import SafetensorsWeights

    check_output("--out", out, CARD)
    choice(method, "--method", METHODS)
    integer(seed, "--seed", 0)
    if rank is not None:
        integer(rank, "--rank", 1)
    rules: list[Any] = [] if rank is None else [rank]
    if energy is not None:
        rules.append(lora.MinEnergy(energy))
    if error is not None:
        rules.append(lora.MaxError(error))
    if len(rules) > 1:
        expected = "one of --rank, --energy, --error"
        raise ArgumentError("lora extract", expected, f"{len(rules)} of them")
    checks_done()
    check_apart(out, tuned, base or tuned)
    weights = SafetensorsWeights(tuned)
    with progress_bar(f"extracting {tuned}") as progress:
        options: dict[str, Any] = {
            "target_modules": target or "all-linear",
            "method": method,
            "seed": seed,
            "name": out.name.removesuffix(".lora.arrow") if name is None else name,
            "on_module": lambda _, done, total: progress(done, total),
        }
        rule = rules[0] if rules else 8
        if base is None:
            card = lora.extract_direct(weights, rule, **options)
        else:
            card = lora.extract_delta(SafetensorsWeights(base), weights, rule, **options)
    digest = lora.save(_saying(card, about), out)
    record = card.metadata["extract"]
    worst = max(figures["error"] for figures in record["modules"].values())
    facts = {"file": str(out), "digest": digest, "rank": card.rank, "modules": record["modules"]}
    facts |= {key: record[key] for key in ("held", "left_out") if key in record}
    text = (
        f"{out}: {len(card.weights)} modules, rank {card.rank}, largest relative error {worst:.3g}"
    )
    if left_out := record.get("left_out"):
        text += (
            f"\nThe card holds {record['held']:.1%} of the squares of the change. Not in it are:"
        )
        for key, figures in sorted(left_out.items(), key=lambda item: -item[1]["norm"]):
            text += f"\n  {key}: norm {figures['norm']:.3g}, {figures['share']:.1%}"
    return Result(facts, text)


@command("fold model/ docs.lora.arrow --weight 0.5 -o merged/")
def fold(
    base: Path,
    cards: list[Path],
    *,
    out: Path,
    weight: list[float] | None = None,
    strict: bool = False,
    overwrite: bool = False,
    allow: list[str] | None = None,
) -> Result:
    """Write a model's folder with cards merged into its weights.

    Args:
        base: A model's folder, with safetensors files.
        out: The folder to write, new or empty unless --overwrite is given.
        cards: Card files, PEFT folders, or what else convert reads.
        weight: Weight of a card, 1 if omitted; repeat once per card, in order.
        strict: Refuse a card that names anything the base does not have.
        overwrite: Replace a checkpoint that is there; any other file in its folder is an error.
        allow: Waive a refusal: other_base, of a card whose fingerprint is another base's.
    """
    from lora.checks import choice

    for refusal in allow or ():
        choice(refusal, "--allow", ["other_base"])
    check_weights(weight, len(cards))
    checks_done()
    check_apart(out, base, *cards)
    adapters = [_read_card(path) for path in cards]
    with progress_bar(f"folding into {base}") as progress:
        folded = lora.fold_checkpoint(
            base,
            adapters,
            out,
            weight,
            strict=strict,
            overwrite=overwrite,
            check_base=not allow,
            progress=progress,
        )
    facts = {
        "folder": str(out),
        "tensors": len(folded.tensors),
        "cards": {name: len(injection.bound) for name, injection in folded.injections.items()},
        "left_out": folded.left_out,
    }
    text = f"{out}: {len(folded.tensors)} tensors changed"
    if folded.left_out:
        text += f"\nleft out: {', '.join(folded.left_out)}"
    return Result(facts, text)


def _read_card(source: Path, name: str | None = None, **options: Any) -> "LoRACard":
    """Read a card file, a safetensors file, or a folder that holds one, on disk or of the Hub."""
    from lora.files import hub_advice
    from lora.interop import hub
    from lora.interop.peft import import_peft
    from lora.interop.safetensors import load_safetensors

    origin, default_name = source, source.absolute().name
    if str(source).startswith(hub.PREFIX) and not source.exists():
        default_name = Path(str(source).removeprefix(hub.PREFIX).partition("@")[0]).name
        source = hub.download(str(source))
    elif not source.exists() and len(source.parts) == 2 and not source.suffix:
        hint = hub_advice(source) or f"an adapter on the Hub is {hub.PREFIX}{source}"
        raise CardNotFoundError(str(source), "a card file or a folder", "none", hint)
    adapters = [file for file in hub.FILES[1:] if (source / file).is_file()]
    if len(adapters) > 1:
        hint = "name the file"
        raise CardFileError(str(source), "a folder with one adapter", ", ".join(adapters), hint)
    if adapters and adapters[0] in hub.SINGLES:
        source, name = source / adapters[0], name or default_name
    if source.suffix.lower() == ".safetensors" and not source.is_dir():
        return load_safetensors(source, name=name, **options)
    for option in options:
        raise ArgumentError(f"--{option}", "a .safetensors file as the source", str(origin))
    card = import_peft(source, name=name) if source.is_dir() else lora.load(source)
    if name is None and source != origin and card.name == source.name:
        name = default_name  # in the cache, the folder's name is a commit
    return card if name is None else replace(card, name=name)
