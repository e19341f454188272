"""Encode a stream of Arrow record batches: a pure function of its arguments, for any engine that
runs such functions.

It runs in a plain loop as it is; Dask's ``bag.map_partitions`` wants a list of what it yields, Ray
Data's ``map_batches`` a table, and Spark's ``mapInArrow``, which has no fixed-size lists, the
embeddings cast to a list. Its arguments are paths and plain values, so that they travel; each
process opens the model and the cards once. Their files are mapped: processes of one machine share
their pages.

Requirements: R5.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from lora.card import Array
from lora.engine import ArrowEngine, Choice
from lora.errors import ArgumentError, DataError, UnknownCardError, shown
from lora.routing import check_threshold
from lora.store import PathLike, load


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
    """Each batch with two columns more: ``embedding`` and ``adapter``, the card of each row (null
    for the base model).

    Args:
        batches: Any number, each with a column of texts; a null text has a null embedding.
        cards: Card files that rows may get.
        adapter: The name of one of them, for every row.
        adapter_column: The column that names each row's; null for the base model.
        route: Choose each row's by its text; none if none reaches `threshold`.
        threshold: As `lora.routing.select`'s.
        column: The column of texts.
        model: A Hugging Face folder; None for the embedded default model.

    Yields:
        The columns that were there, ``embedding`` (fixed-size list of float32) and ``adapter``
        (string).

    Raises:
        ArgumentError: If more than one way to choose is given.
        UnknownCardError: If a name is none of the cards'.
        DataError: If there is no such column, it holds no texts, or ``embedding`` or ``adapter`` is
            there already.

    Examples:
        >>> batch = pa.record_batch({"text": ["read a file", None]})
        >>> (encoded,) = encode_batches([batch])
        >>> encoded.column_names, encoded["embedding"].is_valid().to_pylist()
        (['text', 'embedding', 'adapter'], [True, False])
    """
    if (adapter is not None) + (adapter_column is not None) + bool(route) > 1:
        raise ArgumentError("encode_batches", "one of adapter, adapter_column and route", "several")
    check_threshold(threshold)
    engine = _engine(
        None if model is None else str(model), tuple(str(Path(card).absolute()) for card in cards)
    )
    if adapter is not None and adapter not in engine.manager.list_cards():
        raise UnknownCardError(
            f"adapter {adapter!r}",
            f"one of {sorted(engine.manager.list_cards())}",
            "none of that name",
        )
    for batch in batches:
        texts = _texts(batch, column)
        there = {row: text for row, text in enumerate(texts) if text is not None}
        rows, wanted = list(there), list(there.values())
        if route:
            names = [
                found[0].name if found else None
                for found in engine.router.select_many(wanted, 1, threshold)
            ]
        else:
            given = (
                [adapter] * len(texts) if adapter_column is None else _texts(batch, adapter_column)
            )
            names = [given[row] for row in rows]
        choices: list[Choice] = [{} if name is None else name for name in names]
        yield _with_columns(batch, rows, engine.encode_with_lora(wanted, choices).embeddings, names)


def _texts(batch: pa.RecordBatch, column: str) -> list[str | None]:
    if column not in batch.schema.names or not _is_text(batch.schema.field(column).type):
        raise DataError(
            "encode_batches", f"a column {shown(column)} of texts", f"{batch.schema.names}"
        )
    texts: list[str | None] = batch[column].to_pylist()
    return texts


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _with_columns(
    batch: pa.RecordBatch, rows: list[int], embeddings: Array, names: list[str | None]
) -> pa.RecordBatch:
    """The batch with the embeddings and names of those rows; null in the others."""
    if taken := {"embedding", "adapter"} & set(batch.schema.names):
        raise DataError("encode_batches", "no column called embedding or adapter", sorted(taken))
    place: dict[int, int] = {row: index for index, row in enumerate(rows)}
    where = pa.array([place.get(row) for row in range(batch.num_rows)], pa.int64())
    listed = pa.FixedSizeListArray.from_arrays(
        pa.array(embeddings.reshape(-1), pa.float32()), embeddings.shape[1]
    )
    columns = {"embedding": listed.take(where), "adapter": pa.array(names, pa.string()).take(where)}
    for name, values in columns.items():
        batch = batch.append_column(name, values)
    return batch


@lru_cache(1)
def _engine(model: str | None, cards: tuple[str, ...]) -> ArrowEngine:
    """The engine of this process, over the model and the cards in these files."""
    engine = ArrowEngine.from_pretrained(model)
    for path in cards:
        card = load(path)
        described = card.metadata.get("description") or card.metadata.get("examples")
        if described:
            engine.register_lora(card)
        else:
            engine.manager.add_card(card)
    return engine
