"""Encode a stream of Arrow record batches, as a pure function that any engine can distribute.

Dask's ``bag.map_partitions`` wants a list of what it yields, Ray Data's ``map_batches`` a table,
and Spark's ``mapInArrow`` the embeddings cast to a list. Its arguments are paths and plain values,
so that they travel; each process opens the model and the cards once.

Requirements: R5.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from lora.card import Array
from lora.engine import ArrowEngine, Choice, describes_itself
from lora.errors import ArgumentError, DataError, UnknownCardError, shown
from lora.files import PathLike, load
from lora.routing import check_threshold

_TEXT_TYPES = ("string", "large_string", "string_view")


def encode_batches(
    batches: Iterable[pa.RecordBatch],
    *,
    cards: Sequence[PathLike] = (),
    adapter: str | None = None,
    adapter_column: str | None = None,
    route: bool = False,
    threshold: float = 0.3,
    column: str = "text",
    model: PathLike | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield each batch with two more columns, ``embedding`` and ``adapter``.

    ``embedding`` is a fixed-size list of float32; ``adapter`` names the card of each row and is
    null for the base model.

    Args:
        batches: Each has a column of texts; a null text has a null embedding.
        cards: Card files that rows may get.
        adapter: The name of one of them, for every row.
        adapter_column: The column that names each row's card; null for the base model.
        route: Choose each row's card by its text; none if none reaches `threshold`.
        threshold: As for `lora.routing.select`.
        column: The column of texts.
        model: A Hugging Face folder; None for the embedded default model.

    Raises:
        ArgumentError: More than one way to choose is given.
        UnknownCardError: A name is none of the cards'.
        DataError: A column is not there, holds no texts, or would be replaced.

    Examples:
        >>> batch = pa.record_batch({"text": ["read a file", None]})
        >>> (encoded,) = encode_batches([batch])
        >>> encoded.column_names, encoded["embedding"].is_valid().to_pylist()
        (['text', 'embedding', 'adapter'], [True, False])
    """
    if (adapter is not None) + (adapter_column is not None) + bool(route) > 1:
        raise ArgumentError("encode_batches", "one of adapter, adapter_column and route", "several")
    check_threshold(threshold)
    folder = None if model is None else str(model)
    engine = _engine(folder, tuple(str(Path(card).absolute()) for card in cards))
    known = sorted(engine.manager.list_cards())
    if adapter is not None and adapter not in known:
        raise UnknownCardError(f"adapter {adapter!r}", f"one of {known}", "none of that name")
    for batch in batches:
        texts = {row: text for row, text in enumerate(_texts(batch, column)) if text is not None}
        names: list[str | None] = [adapter] * len(texts)
        if route:
            routed = engine.router.select_many(list(texts.values()), 1, threshold)
            names = [routes[0].name if routes else None for routes in routed]
        elif adapter_column is not None:
            named = _texts(batch, adapter_column)
            names = [named[row] for row in texts]
        choices: list[Choice] = [{} if name is None else name for name in names]
        encoding = engine.encode_with_lora(list(texts.values()), choices)
        yield _with_columns(batch, list(texts), encoding.embeddings, names)


def _texts(batch: pa.RecordBatch, column: str) -> list[str | None]:
    names = batch.schema.names
    if column not in names or str(batch[column].type) not in _TEXT_TYPES:
        raise DataError("encode_batches", f"a column {shown(column)} of texts", f"{names}")
    texts: list[str | None] = batch[column].to_pylist()
    return texts


def _with_columns(
    batch: pa.RecordBatch, rows: list[int], embeddings: Array, names: list[str | None]
) -> pa.RecordBatch:
    """Append the embeddings and names of these rows; the others get nulls."""
    if taken := {"embedding", "adapter"} & set(batch.schema.names):
        raise DataError("encode_batches", "no column called embedding or adapter", sorted(taken))
    position = {row: index for index, row in enumerate(rows)}
    take = pa.array([position.get(row) for row in range(batch.num_rows)], pa.int64())
    flat, width = pa.array(embeddings.reshape(-1), pa.float32()), embeddings.shape[1]
    lists = pa.FixedSizeListArray.from_arrays(flat, width)
    batch = batch.append_column("embedding", lists.take(take))
    return batch.append_column("adapter", pa.array(names, pa.string()).take(take))


@lru_cache(1)
def _engine(model: str | None, cards: tuple[str, ...]) -> ArrowEngine:
    """Return the engine of this process, over the model and the cards in these files."""
    engine = ArrowEngine.from_pretrained(model)
    for card in map(load, cards):
        if describes_itself(card):
            engine.register_lora(card)
        else:
            engine.manager.add_card(card)
    return engine
