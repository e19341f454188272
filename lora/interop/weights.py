"""Weights in safetensors files, as a lazy mapping over one file, shards or a model's folder.

Requirements: R16.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora.card import DTYPES, Array
from lora.checks import parse_json
from lora.errors import CardNotFoundError, LoRAError, UnsupportedModelError, shown
from lora.extract import CONV1D
from lora.files import PathLike, as_path, hub_advice, os_errors

CONV1D_MODELS = frozenset({"gpt2", "imagegpt", "decision_transformer", "openai-gpt", "clvp"})
"""Model types of a config.json whose modules of `lora.extract.CONV1D` are a Conv1D."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsWeights(Mapping[str, Array]):
    """The tensors of one or several safetensors files by name; each access reads the file again.

    Args:
        path: A ``*.safetensors`` file, an index of shards, or a folder that holds
            ``model.safetensors`` or such an index.

    Attributes:
        files: The file of each tensor.
        configs: The folder's ``config.json`` and each object in it; empty without one.
        conv1d: Names of the modules that the folder's ``config.json`` makes a Conv1D, whose weights
            are ``(in, out)``; None without a ``config.json``.

    Raises:
        UnsupportedModelError: A file is malformed; or, on access, NumPy lacks the tensor's dtype.

    Examples:
        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"query.weight": np.eye(2)}, f"{folder}/model.safetensors")
        ...     SafetensorsWeights(folder)["query.weight"].shape
        (2, 2)
    """

    def __init__(self, path: PathLike) -> None:
        file = as_path(path)
        with os_errors(file):
            if file.is_dir():
                file = file / (INDEX if (file / INDEX).is_file() else SINGLE)
        if file.name.endswith(".json"):
            self.files = read_index(file)
            names = {shard: set(_names(shard)) for shard in set(self.files.values())}
            if absent := [name for name, shard in self.files.items() if name not in names[shard]]:
                expected = "tensors that are in their shards"
                raise UnsupportedModelError(str(file), expected, f"none of {absent[:5]}")
        else:
            self.files = dict.fromkeys(_names(file), file)
        self.configs = _configs(file.parent / "config.json")
        self.conv1d = _conv1d(self.configs, self.files)

    def __getitem__(self, name: str) -> Array:
        path = self.files[name]
        with open_safetensors(path) as file:
            try:
                array: Array = file.get_tensor(name)
            except (SafetensorError, TypeError, AttributeError) as error:
                expected, hint = f"a tensor of {', '.join(DTYPES)}", "dequantise the model first"
                raise UnsupportedModelError(f"{path}: {name!r}", expected, error, hint) from error
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@contextmanager
def open_safetensors(
    path: Path, error: type[LoRAError] = UnsupportedModelError, framework: str = "np"
) -> Iterator[Any]:
    """Open a safetensors file, or raise `error` if it is malformed."""
    try:
        with os_errors(path):
            if not path.is_file():
                raise CardNotFoundError(str(path), "a safetensors file", "none", hub_advice(path))
            with safe_open(path, framework=framework) as file:
                yield file
    except SafetensorError as problem:
        broken = "one that is broken or cut off; fetch it or save it again"
        raise error(str(path), "a safetensors file", broken) from problem


def _names(path: Path) -> list[str]:
    with open_safetensors(path) as file:
        return list(file.keys())


def read_index(path: Path) -> dict[str, Path]:
    """Return the file of each tensor that an index of shards names; shards lie beside the index."""
    with os_errors(path):
        index = parse_json(path.read_bytes(), str(path), dict, UnsupportedModelError)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or any(
        not isinstance(shard, str) or Path(shard).name != shard for shard in shards.values()
    ):
        expected = "an index whose weight_map names files beside it"
        raise UnsupportedModelError(str(path), expected, shown(shards))
    return {name: path.parent / shard for name, shard in shards.items()}


def _configs(path: Path) -> list[dict[str, Any]]:
    """Return a model's configuration and, as of a model of several parts, those of its parts."""
    if not path.is_file():
        return []
    with os_errors(path):
        configs = [parse_json(path.read_bytes(), str(path), dict, UnsupportedModelError)]
    for config in configs:
        configs += [part for part in config.values() if isinstance(part, dict)]
    return configs


def _conv1d(configs: Sequence[dict[str, Any]], names: Iterable[str]) -> frozenset[str] | None:
    """Return the modules that are a Conv1D by a model's configuration; None if there is none."""
    if not configs:
        return None
    if CONV1D_MODELS.isdisjoint(str(config.get("model_type")) for config in configs):
        return frozenset()
    modules = (name.removesuffix(".weight") for name in names)
    return frozenset(module for module in modules if module.rpartition(".")[2] in CONV1D)
