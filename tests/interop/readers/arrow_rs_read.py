"""Read card files with arrow-rs alone (through arro3) and print, as JSON, what is in each."""

import json
import sys

for other in ("lora", "pyarrow"):
    sys.modules[other] = None  # to import it is an error from here on

from arro3.core import list_flatten, list_offsets, struct_field  # noqa: E402
from arro3.io import read_ipc  # noqa: E402

FIELDS = (
    "format",
    "name",
    "rank",
    "alpha",
    "targets",
    "dtype",
    "metadata",
    "base_model",
    "base_fingerprint",
)


def factors(column):
    """Shape and bytes of each row's factor."""
    data, shapes = struct_field(column, [0]), struct_field(column, [1])
    elements, offsets = list_flatten(data).to_numpy(), list_offsets(data).to_pylist()
    return [
        [list(shape), elements[start:stop].tobytes().hex()]
        for shape, start, stop in zip(shapes.to_pylist(), offsets, offsets[1:], strict=False)
    ]


def read(path):
    """What a card file holds."""
    (batch,) = read_ipc(path)
    metadata = batch.schema.metadata_str
    own = {field: metadata.pop(f"lora.{field}", None) for field in FIELDS}
    names, scalings = batch.column("module").to_pylist(), batch.column("scaling").to_pylist()
    rows = zip(names, scalings, factors(batch.column("A")), factors(batch.column("B")), strict=True)
    tensors = [batch.schema.field(name) for name in ("A", "B")]
    return {
        "name": own["name"],
        "rank": int(own["rank"]),
        "alpha": float(own["alpha"]),
        "target_modules": json.loads(own["targets"]),
        "dtype": own["dtype"],
        "metadata": json.loads(own["metadata"]),
        "extra": metadata,
        "modules": {name: {"scaling": scaling, "A": a, "B": b} for name, scaling, a, b in rows},
        "extensions": [field.metadata_str.get("ARROW:extension:name") for field in tensors],
        "stored": [
            str(list_flatten(struct_field(batch.column(name), [0])).to_numpy().dtype)
            for name in ("A", "B")
        ],
    }


sys.stdout.write(json.dumps([read(path) for path in sys.argv[1:]]))
