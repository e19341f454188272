"""Write a card file for each expectation, a JSON file, with arrow-rs alone (through arro3)."""

import json
import sys
from pathlib import Path

import numpy as np

for other in ("lora", "pyarrow"):
    sys.modules[other] = None  # to import it is an error from here on

from arro3 import core  # noqa: E402
from arro3.io import write_ipc  # noqa: E402


def column(name, dims, pairs, dtype):
    """The field and the array of a column of factors."""
    parts = [np.frombuffer(bytes.fromhex(pair[name][1]), dtype) for pair in pairs]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, dtype), *parts])
    data = core.list_array(core.Array.from_numpy(offsets), core.Array.from_numpy(flat))
    shapes = np.array([pair[name][0] for pair in pairs], np.int32).reshape(-1)
    shape = core.fixed_size_list_array(core.Array.from_numpy(shapes), 2)
    fields = [core.Field("data", data.type), core.Field("shape", shape.type)]
    array = core.struct_array([data, shape], fields=fields)
    texts = {"ARROW:extension:name": "arrow.variable_shape_tensor"}
    texts["ARROW:extension:metadata"] = json.dumps({"dim_names": dims})
    return core.Field(name, array.type, nullable=False, metadata=texts), array


def batch_of(card):
    """The card as a record batch."""
    pairs, dtype = list(card["modules"].values()), card["dtype"].replace("bfloat16", "uint16")
    scalings = core.Array.from_numpy(np.array([pair["scaling"] for pair in pairs], float))
    names = core.Array(list(card["modules"]), core.DataType.utf8())
    factors = [("A", ["in", "rank"]), ("B", ["rank", "out"])]
    columns = [
        (core.Field("module", names.type, nullable=False), names),
        (core.Field("scaling", scalings.type, nullable=False), scalings),
        *(column(name, dims, pairs, dtype) for name, dims in factors),
    ]
    texts = {"format": "1.0", "name": card["name"], "dtype": card["dtype"]}
    texts |= {key: json.dumps(card[key]) for key in ("rank", "alpha", "metadata")}
    texts["targets"] = json.dumps(card["target_modules"])
    metadata = {f"lora.{key}": text for key, text in texts.items()} | card["extra"]
    schema = core.Schema([field for field, _ in columns], metadata=metadata)
    return core.RecordBatch.from_arrays([array for _, array in columns], schema=schema)


for index, path in enumerate(sys.argv[2:]):
    card = json.loads(Path(path).read_text("utf-8"))
    write_ipc(batch_of(card), f"{sys.argv[1]}/{index}.lora.arrow", compression=None)
