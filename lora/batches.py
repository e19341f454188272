"""Encode a stream of Arrow batches or tables, as a pure function that any engine distributes.

Dask's ``bag.map_partitions`` and Spark's ``mapInArrow`` call it with an iterator of record batches
(Spark's schemas have no lists of fixed size: pass ``fixed_size=False``), Ray Data's ``map_batches``
with ``batch_format="pyarrow"`` with one table. Its arguments are paths and plain values, so that
they travel. A process opens the model once, and the cards again when the content of a file changes.

Requirements: R5.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import pyarrow as pa

from lora.card import Array
from lora.engine import ArrowEngine, Choice
from lora.errors import ArgumentError, ConflictError, DataError, UnknownCardError, shown
from lora.files import PathLike, as_path, digest, load
from lora.routing import check_threshold

Batch: TypeAlias = pa.RecordBatch | pa.Table

_TEXT_TYPES = ("string", "large_string", "string_view")


def encode_batches(
    batches: Batch | Iterable[Batch],
    *,
    cards: Sequence[PathLike] = (),
    adapter: str | None = None,
    adapter_column: str | None = None,
    route: bool = False,
    threshold: float | None = None,
    column: str = "text",
    model: PathLike | None = None,
    fixed_size: bool = True,
) -> Iterator[Batch]:
    """Yield each batch or table with two more columns, ``embedding`` and ``adapter``.

    ``embedding`` is a list of float32; ``adapter`` names the card of each row and is null for the
    base model.

    Args:
        batches: Record batches or tables, or a single one. Each has a column of texts; a null text
            has a null embedding.
        cards: Card files to choose from, by one of the next three arguments.
        adapter: The name of one of them, for every row.
        adapter_column: The column that names each row's card; null for the base model.
        route: Choose each row's card by its text; see `lora.routing.decide`.
        threshold: The score that every card needs; None: each card's own.
        model: An encoder's folder; None for the embedded default model.
        fixed_size: Make ``embedding`` a list of fixed size; else a list of any size.

    Raises:
        ArgumentError: More than one way to choose is given, or cards and no way to choose.
        ConflictError: Two cards with different contents have one name.
        TargetError: A card binds to nothing in the model.
        UnknownCardError: No card has a name that is asked for.
        DataError: A column is not there, holds no texts, or would be replaced.

    Examples:
        >>> batch = pa.record_batch({"text": ["read a file", None]})
        >>> (encoded,) = encode_batches([batch])
        >>> encoded.column_names, encoded["embedding"].is_valid().to_pylist()
        (['text', 'embedding', 'adapter'], [True, False])
    """
    ways = (adapter is not None) + (adapter_column is not None) + bool(route)
    if ways != 1 and (ways or cards):
        expected = "one of adapter, adapter_column and route"
        raise ArgumentError("encode_batches", expected, "several" if ways else "cards and none")
    check_threshold(threshold)
    paths = [as_path(card).absolute() for card in cards]
    files = tuple((str(path), digest(path)) for path in paths)
    engine = _engine(None if model is None else str(model), files)
    known = sorted(engine.manager.list_cards())
    if adapter is not None and adapter not in known:
        raise UnknownCardError(f"adapter {adapter!r}", f"one of {known}", "none of that name")
    if route:
        for name, card in engine.manager.list_cards().items():
            if name not in engine.router.candidates:
                engine.router.register_card(card)
    for batch in [batches] if isinstance(batches, Batch) else batches:
        if not isinstance(batch, Batch):
            raise ArgumentError("encode_batches", "record batches or tables", shown(batch))
        texts = {row: text for row, text in enumerate(_texts(batch, column)) if text is not None}
        names: list[str | None] = [adapter] * len(texts)
        if route:
            decisions = engine.router.decide_many(list(texts.values()), threshold)
            names = [
                each.best.name if each and each.kind == "routes" else None for each in decisions
            ]
        elif adapter_column is not None:
            named = _texts(batch, adapter_column)
            names = [named[row] for row in texts]
        choices: list[Choice] = [{} if name is None else name for name in names]
        encoding = engine.encode_with_lora(list(texts.values()), choices)
        yield _with_columns(batch, list(texts), encoding.embeddings, names, fixed_size)


def _texts(batch: Batch, column: str) -> list[str | None]:
    names = batch.schema.names
    if column not in names or str(batch[column].type) not in _TEXT_TYPES:
        raise DataError("encode_batches", f"a column {shown(column)} of texts", f"{names}")
    texts: list[str | None] = batch[column].to_pylist()
    return texts


def _with_columns(
    batch: Batch,
    rows: list[int],
    embeddings: Array,
    names: list[str | None],
    fixed_size: bool,  # noqa: FBT001 - private
) -> Batch:
    if taken := {"embedding", "adapter"} & set(batch.schema.names):
        raise DataError("encode_batches", "no column called embedding or adapter", sorted(taken))
    position = {row: index for index, row in enumerate(rows)}
    take = pa.array([position.get(row) for row in range(batch.num_rows)], pa.int64())
    flat, width = pa.array(embeddings.reshape(-1), pa.float32()), embeddings.shape[1]
    lists = pa.FixedSizeListArray.from_arrays(flat, width).take(take)
    lists = lists if fixed_size else lists.cast(pa.list_(pa.float32()))
    batch = batch.append_column("embedding", lists)
    return batch.append_column("adapter", pa.array(names, pa.string()).take(take))


@lru_cache(1)
def _engine(model: str | None, files: tuple[tuple[str, str], ...]) -> ArrowEngine:
    engine = ArrowEngine(_base(model).base)
    for path, verify in files:
        card = load(path, verify)
        known = engine.manager.list_cards().get(card.name)
        if known not in (None, card):
            where = f"encode_batches: card {card.name!r} of {path!r}"
            raise ConflictError(where, "one card of a name", "another content", "rename one")
        engine.manager.add_card(card)
    return engine


@lru_cache(1)
def _base(model: str | None) -> ArrowEngine:
    return ArrowEngine.from_pretrained(model)
