"""The weights in safetensors files as a lazy mapping: of one file, of shards, or of a model's
folder.

Requirements: R16.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora.card import DTYPES, Array
from lora.errors import ArgumentError, CardNotFoundError, UnsupportedModelError
from lora.store import PathLike, as_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsWeights(Mapping[str, Array]):
    """Name -> array over one or several safetensors files; nothing that was read is kept.

    Args:
        path: A ``*.safetensors`` file, an index of shards, or a folder with ``model.safetensors``
            or such an index.

    Raises:
        CardNotFoundError: If there is no such file.
        UnsupportedModelError: If a file is not well formed; on reading, if a tensor is of a dtype
            that NumPy lacks.

    Examples:
        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"query.weight": np.eye(2)}, f"{folder}/model.safetensors")
        ...     SafetensorsWeights(folder)["query.weight"].shape
        (2, 2)
    """

    def __init__(self, path: PathLike) -> None:
        self.path = as_path(path)
        file = self.path
        if file.is_dir():
            file = file / (INDEX if (file / INDEX).is_file() else SINGLE)
        if not file.is_file():
            raise CardNotFoundError(
                str(path), f"a safetensors file, or a folder with {SINGLE} or {INDEX}", "none"
            )
        self._files = (
            _index(file) if file.name.endswith(".json") else dict.fromkeys(_names(file), file)
        )

    def __getitem__(self, name: str) -> Array:
        file = self._files[name]
        try:
            with safe_open(file, framework="numpy") as opened:
                array: Array = opened.get_tensor(name)
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            expected = f"a tensor of {', '.join(DTYPES)}"
            raise UnsupportedModelError(
                f"{file}: {name!r}", expected, error, "dequantise the model first"
            ) from error
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UnsupportedModelError(str(file), "a safetensors file", error) from error


def _index(file: Path) -> dict[str, Path]:
    """The shard of each tensor; shards lie beside their index."""
    try:
        shards = {
            str(name): str(shard)
            for name, shard in json.loads(file.read_text("utf-8"))["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(str(file), "an index with a weight_map", error) from error
    held: dict[str, Path] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise ArgumentError(
                f"{file}: shard", "the name of a file beside the index", repr(shard)
            )
        if not (path := file.parent / shard).is_file():
            raise CardNotFoundError(str(path), "a shard that the index names", "none")
        inside = set(_names(path))
        mine = [name for name, where in shards.items() if where == shard]
        if missing := [name for name in mine if name not in inside]:
            raise UnsupportedModelError(
                str(path), "the tensors that the index names", f"none of {missing[:5]}"
            )
        held |= dict.fromkeys(mine, path)
    return held
