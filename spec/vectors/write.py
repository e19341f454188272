"""Write the test vectors of format 1: card files, and what a reader must find in them or refuse.

Usage: ``python write.py``, once for a version. The files are frozen after that.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

import lora
from lora.arrow_format import one_batch
from lora.card import DTYPES

HERE = Path(__file__).parent
VERSION = "1"


def pair(
    dtype: str, rows: int, rank: int, columns: int, *, scaling: float | None = None, seed: int = 0
) -> lora.LowRank:
    """A pair of random finite factors."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))
    return lora.LowRank(a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype]), scaling)


def edge_pair(dtype: str) -> lora.LowRank:
    """A pair of NaN payloads, ±0, infinities and subnormals, which careless copies would change."""
    kind = DTYPES[dtype]
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[kind.itemsize]
    width = 8 * kind.itemsize
    inf = int(np.array(np.inf, kind).view(bits))
    sign = 1 << (width - 1)
    flat = np.array([0, sign, 1, sign + 1, inf, inf | sign, inf + 1, inf | sign | 5], bits)
    b = flat[::-1].reshape(2, 4).copy()
    return lora.LowRank(flat.reshape(4, 2).view(kind), b.view(kind), 1.0)


def valid_cards() -> dict[str, dict[str, lora.LoRACard]]:
    """Requirement -> name -> card."""
    two = {f"encoder.layer.{i}.query": pair("float32", 4, 2, 3, seed=i) for i in range(2)}
    odd = ("", "a,b", "größe.注意", "layer.1.query", "layer.11.query")
    names = {name: pair("float32", 2, 1, 2) for name in odd}
    mixed = {
        "a": pair("float64", 3, 3, 2, scaling=0.5),
        "b": pair("float64", 3, 1, 2, scaling=-2.0),
    }
    meta: dict[str, object] = {"name": "other", "rank": 99, "lora.name": "shadow"}
    meta["nested"] = {"list": [1, 2.5, None, True, "ü"]}
    extra = {"x-note": "kept", "lora.later": "2"}
    docs = lora.LoRACard("docs", 2, 4.0, ("query",), two)
    return {
        "R1.4": {
            "basic": lora.LoRACard("docs", 2, 4.0, ("query", "value"), two),
            "no-modules": lora.LoRACard("empty", 1, 1.0, (), {}),
            "names": lora.LoRACard("größe, a", 1, 16.0, ("a,b", "größe", ""), names),
        },
        "R1.3": {"metadata-that-looks-like-fields": replace(docs, metadata=meta)},
        "R1.7": {
            name: lora.LoRACard(name, 2, 1.0, ("m",), {"m": edge_pair(name)}) for name in DTYPES
        },
        "R1.8": {"mixed-ranks": lora.LoRACard("mixed", 3, 16.0, ("a", "b"), mixed)},
        "R1.10": {"unknown-keys": replace(docs, extra=extra)},
    }


def expectation(card: lora.LoRACard) -> dict[str, object]:
    """What a reader must find; elements as the hex of their little-endian bytes, row-major."""
    modules = {
        name: {
            "scaling": p.scaling,
            "A": [list(p.A.shape), p.A.tobytes().hex()],
            "B": [list(p.B.shape), p.B.tobytes().hex()],
        }
        for name, p in card.weights.items()
    }
    return {
        "name": card.name,
        "rank": card.rank,
        "alpha": card.alpha,
        "target_modules": list(card.target_modules),
        "dtype": card.dtype.name,
        "metadata": dict(card.metadata),
        "extra": dict(card.extra),
        "modules": modules,
    }


def file_of(*batches: pa.RecordBatch, compression: str | None = None) -> bytes:
    """An Arrow IPC file of these batches."""
    sink = io.BytesIO()
    with pa.ipc.new_file(
        sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def invalid_files() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, the rule that they break)."""
    weights = {name: pair("float32", 4, 2, 3) for name in ("query", "value")}
    card = lora.LoRACard("docs", 2, 4.0, ("query",), weights)
    batch = lora.card_to_table(card).to_batches()[0]
    whole = file_of(batch)

    def keys(**changes: str | None) -> bytes:
        metadata = {k.decode(): v.decode() for k, v in batch.schema.metadata.items()}
        for key, value in changes.items():
            metadata[f"lora.{key}"] = value or ""
            if value is None:
                del metadata[f"lora.{key}"]
        return file_of(batch.replace_schema_metadata(metadata))

    def column(
        name: str, change: Callable[[pa.Array], pa.Array], *, nullable: bool = False
    ) -> bytes:
        index = batch.schema.get_field_index(name)
        changed = change(batch.column(index))
        field = batch.schema.field(index).with_type(changed.type).with_nullable(nullable)
        return file_of(
            batch.set_column(index, field, changed).replace_schema_metadata(batch.schema.metadata)
        )

    def shapes(values: list[int]) -> Callable[[pa.Array], pa.Array]:
        def change(array: pa.Array) -> pa.Array:
            storage = array.storage if isinstance(array, pa.ExtensionArray) else array
            shape = pa.FixedSizeListArray.from_arrays(pa.array(values, pa.int32()), 2)
            return pa.StructArray.from_arrays([storage.field("data"), shape], ["data", "shape"])

        return change

    extra = batch.append_column("more", pa.array([1, 2]))
    return {
        "empty-file": (b"", "a file has bytes"),
        "not-arrow": (b"not an Arrow file, just text of some length " * 4, "the magic is ARROW1"),
        "truncated": (whole[: len(whole) // 2], "a file is whole"),
        "compressed": (file_of(batch, compression="zstd"), "buffers are not compressed"),
        "two-batches": (file_of(batch.slice(0, 1), batch.slice(1)), "there is one record batch"),
        "version-2": (keys(format="2.0"), "the major version is 1"),
        "no-version": (keys(format=None), "there is a version"),
        "no-name": (keys(name=None), "there is a name"),
        "empty-name": (keys(name=""), "the name is not empty"),
        "rank-0": (keys(rank="0"), "the rank is at least 1"),
        "rank-negative": (keys(rank="-1"), "the rank is at least 1"),
        "rank-fraction": (keys(rank="2.5"), "the rank is an integer"),
        "rank-not-the-largest": (keys(rank="3"), "the rank is the largest of any module"),
        "alpha-0": (keys(alpha="0.0"), "alpha is above 0"),
        "alpha-infinite": (keys(alpha="inf"), "alpha is finite"),
        "targets-not-a-list": (keys(targets='"query"'), "targets are a JSON list"),
        "metadata-not-an-object": (keys(metadata="[]"), "metadata are a JSON object"),
        "metadata-not-json": (keys(metadata="{"), "metadata are JSON"),
        "unknown-dtype": (keys(dtype="float8"), "the dtype is known"),
        "another-dtype": (keys(dtype="float64"), "the columns have the declared dtype"),
        "unknown-column": (file_of(extra), "there are four columns"),
        "missing-column": (
            file_of(batch.select(["module", "scaling", "A"])),
            "there are four columns",
        ),
        "duplicate-module": (
            column("module", lambda _: pa.array(["query", "query"])),
            "each module occurs once",
        ),
        "null-scaling": (
            column("scaling", lambda _: pa.array([None, 1.0]), nullable=True),
            "there are no nulls",
        ),
        "nan-scaling": (
            column("scaling", lambda _: pa.array([np.nan, 1.0])),
            "a scaling is finite",
        ),
        "scaling-as-float32": (
            column("scaling", lambda c: c.cast(pa.float32())),
            "scaling is float64",
        ),
        "shape-too-large": (
            column("A", shapes([4, 2, 4, 3])),
            "a shape's product is its data's length",
        ),
        "shape-negative": (column("A", shapes([4, 2, -4, -2])), "shapes are positive"),
        "ranks-differ": (column("A", shapes([4, 2, 8, 1])), "A and B have one rank"),
    }


def main() -> None:
    """Write every vector and the manifest."""
    folder = HERE / VERSION
    folder.mkdir()
    lines = [f"# Vectors of file format {VERSION}: frozen.", f'version = "{VERSION}"', ""]

    def put(
        path: str, data: bytes, expected: dict[str, object], requirement: str, *, valid: bool
    ) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        text = json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        target.with_name(target.name.replace(".lora.arrow", ".json")).write_text(
            text, encoding="utf-8"
        )
        lines.extend(["[[vector]]", f'path = "{path}"', f'requirement = "{requirement}"'])
        lines.append(f"valid = {str(valid).lower()}")
        lines.append(f'sha256 = "{hashlib.sha256(data).hexdigest()}"')
        lines.extend([f'expectation_sha256 = "{hashlib.sha256(text.encode()).hexdigest()}"', ""])

    for requirement, cards in valid_cards().items():
        for name, card in cards.items():
            data = file_of(one_batch(lora.card_to_table(card)))
            path = f"{requirement}/valid/{name}.lora.arrow"
            put(path, data, expectation(card), requirement, valid=True)
    for name, (data, rule) in invalid_files().items():
        put(f"R7.9/invalid/{name}.lora.arrow", data, {"rule": rule}, "R7.9", valid=False)
    (folder / "manifest.toml").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
