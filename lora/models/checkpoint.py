"""Write a merged checkpoint: a model's folder with the ΔW of cards in its weights.

The safetensors files are written in their own order. What no card touches is copied as bytes; a
weight that one touches goes through memory in blocks: the sum is formed in float32 (float64 for
float64) and rounded once. The folder appears under its name when all of it is on the disk.

Requirements: R26.
"""

import errno
import fcntl
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from lora.card import AdapterSet, LoRACard
from lora.checks import parse_json
from lora.errors import (
    ArgumentError,
    CardNotFoundError,
    ConflictError,
    StateError,
    TargetError,
    UnsupportedModelError,
)
from lora.experts import TRANSPOSED, Part, Place, expert_places, named
from lora.extract import EMBEDDING
from lora.factors import check_finite
from lora.files import PathLike, as_path, hub_advice, os_errors
from lora.interop.weights import INDEX, SINGLE, SafetensorsWeights, open_safetensors, read_index
from lora.models.folding import Update, add_products, updates_of
from lora.models.layers import check_sums, warn_unbound
from lora.targets import (
    Injection,
    Site,
    check_fingerprint,
    fingerprint_of,
    listed,
    plan,
    require_bound,
)

BLOCK = 4 << 20
"""Bytes of a tensor that are in memory at a time."""

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".onnx_data", ".ot", ".npz", ".pb", ".tflite", ".index.json"),
)
"""Endings of files that hold weights, or say where weights are."""

_QUANTISED = ("quantization_config", "compression_config")
_TIED_HEADS = ("lm_head", "embed_out")

_NO_RANGE_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""What a file system answers that can't copy from file to file by itself."""


class FoldedCheckpoint(NamedTuple):
    """What `fold_checkpoint` did.

    Args:
        injections: What each card bound to, by its name.
        tensors: The tensors that changed.
        left_out: Files of the base that hold its weights in another form, and hidden folders.
    """

    injections: Mapping[str, Injection]
    tensors: tuple[str, ...]
    left_out: tuple[str, ...]


def fold_checkpoint(
    base_folder: PathLike,
    cards: LoRACard | Iterable[LoRACard],
    out_folder: PathLike,
    weights: Sequence[float] | None = None,
    *,
    check_base: bool = True,
    strict: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FoldedCheckpoint:
    """Write a copy of a model's folder, with cards merged into its weights.

    The model is never in memory as a whole: only the cards and a few blocks of 4 MiB are.
    Configuration, tokenizer and other files are copied.

    Args:
        base_folder: A folder of transformers or sentence-transformers with ``config.json`` and
            ``model.safetensors``, or shards and their index.
        cards: One or several, of different names.
        out_folder: A new or empty folder outside the base folder.
        weights: A number for each card, default 1.
        check_base: Refuse a card whose base fingerprint is another model's.
        strict: Refuse a card that names anything the checkpoint does not have.
        overwrite: Replace an earlier checkpoint in `out_folder`: its weights, index and shards, and
            the files that the base has as well. Any other file there is an error.
        progress: Called with the MiB written so far, and the MiB in all.

    Warns:
        UnboundWarning: A card takes effect in part, or all weights are 0.

    Raises:
        UnsupportedModelError: The weights are malformed, quantised, or in another form.
        TargetError, ShapeError, BaseModelError: A card does not fit the base.

    Examples:
        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import load_file, save_file
        >>> from lora.card import LowRank
        >>> card = LoRACard("docs", 1, 1.0, ["q"], {"q": LowRank(np.ones((2, 1)), np.ones((1, 2)))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     os.mkdir(f"{folder}/base")
        ...     written = Path(f"{folder}/base/config.json").write_text("{}")
        ...     save_file({"q.weight": np.eye(2)}, f"{folder}/base/model.safetensors")
        ...     folded = fold_checkpoint(f"{folder}/base", card, f"{folder}/merged")
        ...     load_file(f"{folder}/merged/model.safetensors")["q.weight"].tolist()
        [[2.0, 1.0], [1.0, 2.0]]
    """
    base, out = as_path(base_folder), as_path(out_folder)
    adapters = _adapters(cards, weights)
    with os_errors(base):
        source = _Checkpoint(base)
        files, left_out = _other_files(base, source)
        injections = source.bind(adapters, check_base=check_base, strict=strict)
        updates = updates_of(source.places, adapters, injections)
        _check_tensors(source, updates)
        shards = sorted(source.shards)
        total = -(-sum(path.stat().st_size for path in (*shards, *files)) >> 20)
    rows = (source.tensor(name) for name in updates)
    widest = max((_DTYPES[row.dtype].itemsize * row.shape[-1] for row in rows), default=0)
    room = bytearray(3 * max(BLOCK, -(-widest // 8) * 8))
    written = 0

    def on_bytes(count: int) -> None:
        nonlocal written
        written += count
        if progress:
            progress(min(-(-written >> 20), total), total)

    names = {path.relative_to(base) for path in files}
    new = _new_folder(base, out, names, overwrite=overwrite)
    with os_errors(out), _one_thread(), new as folder:
        for path in (*shards, *files):
            target = folder / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb", 0) as original, target.open("xb", 0) as copy:
                tensors = source.shards.get(path, {})
                touched = {name: tensors[name] for name in updates if name in tensors}
                for name, tensor in sorted(touched.items(), key=lambda item: item[1].start):
                    _copy(original, copy, tensor.start, on_bytes)
                    _fold(original, copy, tensor, updates[name], room=room, on_bytes=on_bytes)
                _copy(original, copy, os.fstat(original.fileno()).st_size, on_bytes)
                os.fsync(copy.fileno())
    return FoldedCheckpoint(injections, tuple(sorted(updates)), tuple(left_out))


def _adapters(cards: LoRACard | Iterable[LoRACard], weights: Sequence[float] | None) -> AdapterSet:
    cards = [cards] if isinstance(cards, LoRACard) else list(cards)
    weights = [1.0] * len(cards) if weights is None else list(weights)
    if not cards or len(weights) != len(cards):
        expected = f"one for each of {len(cards)} cards"
        raise ArgumentError("weights" if cards else "cards", expected, len(weights))
    adapters = AdapterSet()
    for card, weight in zip(cards, weights, strict=True):
        entry = AdapterSet({getattr(card, "name", ""): (card, weight)})
        if not adapters.keys().isdisjoint(entry):
            raise ConflictError(f"card {card.name!r}", "one card of a name", "two", "rename one")
        adapters |= entry
    if not any(weights):
        warn_unbound(f"cards {listed(list(adapters))}: all weights are 0, so that nothing changes")
    return adapters


class _Tensor(NamedTuple):
    """A tensor of a safetensors file: what it is, and where in the file its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Checkpoint:
    def __init__(self, base: Path) -> None:
        self.module_folders = _module_folders(base)
        self.root = _weights_folder(base, self.module_folders)
        weights = SafetensorsWeights(self.root)
        if not weights.configs:
            raise CardNotFoundError(str(self.root / "config.json"), "a configuration", "none")
        for config in weights.configs:
            for key in _QUANTISED:
                if config.get(key):
                    hint = "fold the card into the model before it is quantised"
                    where, expected = f"{self.root / 'config.json'}", "weights as they were trained"
                    raise UnsupportedModelError(where, expected, key, hint)
        self.is_tied = any(config.get("tie_word_embeddings") is True for config in weights.configs)
        headers = {path: _header(path) for path in set(weights.files.values())}
        self.shards = {path: tensors for path, (tensors, _) in headers.items()}
        self.files = weights.files
        self.sites: dict[str, Site] = {}
        self.places: dict[str, Place] = {}
        self._survey(weights)
        for _, metadata in headers.values():
            for tied, kept in metadata.items():  # as safetensors.torch.save_model writes it
                owner = kept.removesuffix(".weight")
                if owner in self.sites:
                    self.sites.setdefault(tied.removesuffix(".weight"), self.sites[owner])

    def _survey(self, weights: SafetensorsWeights) -> None:
        shapes = {name: self.tensor(name).shape for name in self.files}
        kinds = {str(config.get("model_type")) for config in weights.configs}
        for tensor, shape in shapes.items():
            module = tensor.removesuffix(".weight")
            is_embedding = EMBEDDING.fullmatch(module.rpartition(".")[2])
            if module != tensor and len(shape) == 2 and not is_embedding:
                place = Place((Part(tensor, 0, shape[0]),), module in (weights.conv1d or ()))
                rows, columns = shape
                features = (rows, columns) if place.transposed else (columns, rows)
                self._add(module, place, Site(*features, owner=module))
        transposed = () if TRANSPOSED.isdisjoint(kinds) else shapes
        for name, place, site in expert_places(shapes, transposed):
            self._add(name, place, site)

    def tensor(self, name: str) -> _Tensor:
        return self.shards[self.files[name]][name]

    def _add(self, module: str, place: Place, site: Site) -> None:
        self.places[module] = place
        for name in named(module):
            self.sites.setdefault(name, site)

    def bind(self, adapters: AdapterSet, *, check_base: bool, strict: bool) -> dict[str, Injection]:
        """Decide what each card binds to; raise and warn as `lora.adapt` does."""
        injections = {}
        for name, (card, _) in adapters.items():
            injection = injections[name] = plan(self.sites, card, strict=strict)
            for key in card.weights:
                is_bound = key in injection.bound.values()
                if is_bound:
                    check_finite(card, key)
                if key.rpartition(".")[2] in _TIED_HEADS and (self.is_tied or not is_bound):
                    expected, problem = "a head with a weight of its own", "one that is tied"
                    hint = "untie it in the base first: the embedding would change, too"
                    raise TargetError(f"card {name!r}: {key!r}", expected, problem, hint)
            require_bound(self.sites, card, injection)
            if check_base and card.base_fingerprint is not None:
                check_fingerprint(card, injection, self._fingerprint(injection.bound))
        for name, injection in injections.items():
            if injection.unbound:
                warn_unbound(f"card {name!r} takes effect in part: {injection.unbound}")
        return injections

    def _fingerprint(self, bound: Mapping[str, str]) -> str:
        def entry(key: str, module: str) -> tuple[str, str, tuple[int, ...], Iterator[bytes]]:
            parts = self.places[module].parts
            tensor, *_ = (self.tensor(part.tensor) for part in parts)
            shape = sum(part.stop - part.start for part in parts), tensor.shape[-1]
            dtype = str(_DTYPES.get(tensor.dtype)).removeprefix("torch.")
            return key, dtype, shape, chain.from_iterable(map(self._bytes, parts))

        keys = sorted((key, name) for name, key in bound.items())
        return fingerprint_of(entry(key, name) for key, name in keys)

    def _bytes(self, part: Part) -> Iterator[bytes]:
        tensor = self.tensor(part.tensor)
        width = (tensor.stop - tensor.start) // math.prod(tensor.shape[:-1])
        start, stop = (tensor.start + row * width for row in (part.start, part.stop))
        with self.files[part.tensor].open("rb") as file:
            file.seek(start)
            for place in range(start, stop, BLOCK):
                yield file.read(min(BLOCK, stop - place))


def _check_tensors(source: _Checkpoint, names: Iterable[str]) -> None:
    for name in names:
        where, dtype = f"{source.files[name]}: {name!r}", source.tensor(name).dtype
        if dtype not in _DTYPES:
            expected = f"a weight of {', '.join(_DTYPES)}"
            raise UnsupportedModelError(where, expected, dtype, "dequantise the base first")
        holders = sorted(file.name for file, held in source.shards.items() if name in held)
        if len(holders) > 1:
            raise UnsupportedModelError(where, "a tensor of one shard", listed(holders))


def _header(path: Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    with open_safetensors(path), path.open("rb") as file:  # which checks the offsets and sizes
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, os.fstat(file.fileno()).st_size))
        header = parse_json(text, str(path), dict, UnsupportedModelError)
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = _Tensor(entry["dtype"], tuple(entry["shape"]), start, stop)
    return tensors, metadata


def _copy(original: FileIO, copy: FileIO, stop: int, on_bytes: Callable[[int], None]) -> None:
    """Copy bytes up to a place in the original, from where the copy ends."""
    by_range = hasattr(os, "copy_file_range")
    while (start := copy.tell()) < stop:
        count = 0
        if by_range:
            try:
                span = min(16 * BLOCK, stop - start)
                count = os.copy_file_range(original.fileno(), copy.fileno(), span, start)
            except OSError as error:
                if error.errno not in _NO_RANGE_COPY:
                    raise
                by_range = False
        if not count:
            room = memoryview(bytearray(min(BLOCK, stop - start)))
            count = _write(copy, _read(original, start, room))
        on_bytes(count)


def _fold(
    original: FileIO,
    copy: FileIO,
    tensor: _Tensor,
    updates: Sequence[Update],
    *,
    room: bytearray,
    on_bytes: Callable[[int], None],
) -> None:
    """Write a tensor with what is added to it, as many rows at a time as there is room for."""
    dtype, columns = _DTYPES[tensor.dtype], tensor.shape[-1]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    products = [update.factors(wide) for update in updates]
    width = columns * dtype.itemsize
    # The first third holds rows as they are stored, the rest their sums.
    step = max(1, len(room) // 3 // width)
    rows = torch.frombuffer(room, dtype=dtype, count=step * columns).view(step, columns)
    sums = rows
    if dtype is not wide:
        sums = torch.frombuffer(room, dtype=wide, count=step * columns, offset=len(room) // 3)
        sums = sums.view(step, columns)
    height = math.prod(tensor.shape[:-1])
    for low in range(0, height, step):
        high = min(low + step, height)
        data = memoryview(room)[: (high - low) * width]
        _read(original, tensor.start + low * width, data)
        stored, total = rows[: high - low], sums[: high - low]
        total.copy_(stored)
        add_products(total, low, products)
        stored.copy_(total)
        check_sums(stored, lambda: f"{original.name} with the cards: from row {low}")  # noqa: B023 - called here
        on_bytes(_write(copy, data))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: a block is too little work for several to wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read(file: FileIO, start: int, view: memoryview) -> memoryview:
    """Read bytes at a place; a file that ends before them has changed since it was opened."""
    done = 0
    while done < len(view):
        length = os.preadv(file.fileno(), [view[done:]], start + done)
        if length == 0:
            expected = f"{start + len(view)} bytes"
            raise UnsupportedModelError(str(file.name), expected, start + done)
        done += length
    return view


def _write(file: FileIO, data: memoryview) -> int:
    """Write all of the data, of which one call may take a part."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])
    return done


def _module_folders(base: Path) -> list[Path]:
    path = base / "modules.json"
    if not path.is_file():
        return []
    modules = parse_json(path.read_bytes(), str(path), list, UnsupportedModelError)
    names = [module.get("path") for module in modules if isinstance(module, dict)]
    folders = [base / name for name in names if isinstance(name, str)]
    return [folder for folder in folders if folder.resolve().is_relative_to(base.resolve())]


def _weights_folder(base: Path, module_folders: Sequence[Path]) -> Path:
    """Return the folder that holds the model's safetensors files: the base or its first module."""
    if not base.is_dir():
        advice = "a model on the Hub is downloaded first: hf download prints its folder"
        hint = hub_advice(base) or advice
        raise CardNotFoundError(str(base), "a model's folder", "none", hint)
    for folder in (base, *module_folders[:1]):
        forms = [name for name in (SINGLE, INDEX) if (folder / name).is_file()]
        if len(forms) > 1:
            raise UnsupportedModelError(str(folder), f"either {SINGLE} or {INDEX}", "both")
        if forms:
            return folder
    others = sorted(path.name for path in base.iterdir() if path.name.endswith(_WEIGHTS))
    hint = "transformers' save_pretrained writes them"
    raise UnsupportedModelError(str(base), f"{SINGLE} or {INDEX}", listed(others), hint)


def _weights_of(out: Path) -> set[Path]:
    """Return the files of an earlier checkpoint's weights, in its folder or its first module's."""
    for folder in (out, *_module_folders(out)[:1]):
        files = {folder / name for name in (SINGLE, INDEX) if (folder / name).is_file()}
        if folder / INDEX in files:
            files |= set(read_index(folder / INDEX).values())
        if files:
            return files
    return set()


def _other_files(base: Path, source: _Checkpoint) -> tuple[list[Path], list[str]]:
    """Return the files to copy as they are, and the names of what is left out."""
    files, left_out = [], []
    whole = [folder for folder in source.module_folders if folder not in (base, source.root)]

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(base, onerror=refuse):
        for name in sorted(subfolders):
            path = Path(folder, name)
            if name.startswith("."):
                subfolders.remove(name)
                left_out.append(f"{path.relative_to(base)}/")
            elif path.is_symlink():
                raise UnsupportedModelError(str(path), "a folder or a file", "a link to a folder")
        for name in sorted(names):
            path = Path(folder, name)
            _check_file(path, base)
            is_kept = path == source.root / INDEX or path.parent in whole
            if path in source.shards:  # which is written with the sums
                continue
            if name.endswith(_WEIGHTS) and not is_kept:
                left_out.append(str(path.relative_to(base)))
            else:
                files.append(path)
    return files, left_out


def _check_file(path: Path, base: Path) -> None:
    """Refuse what is no regular file, and a link that leads out of the folder.

    A link in a snapshot of huggingface_hub's cache may lead to the cache's own files.
    """
    target, home = path.resolve(strict=True), base.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(home) for home in homes):
        raise UnsupportedModelError(str(path), "a file of the folder", f"a link to {target}")
    if not target.is_file():
        raise UnsupportedModelError(str(path), "a regular file", "something else")


@contextmanager
def _new_folder(
    base: Path, out: Path, names: Collection[Path], *, overwrite: bool
) -> Iterator[Path]:
    """Make a folder that gets the name `out` when the block ends, and is removed when it raises.

    A killed process leaves it, as ``.<name>.lora-tmp``, to the next one, which takes it over; a
    lock keeps two that run at once apart.
    """
    inner, outer = (Path(os.path.realpath(path)) for path in (out, base))
    if out.is_symlink():
        raise ArgumentError(str(out), "a folder itself", "a link", f"name {inner}")
    if inner.is_mount():
        hint = "name a new folder in it"
        raise ArgumentError(str(out), "a folder that can be renamed", "a mount point", hint)
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ArgumentError(str(out), f"a folder apart from {base}", inner)
    weights = _weights_of(out) if overwrite else set[Path]()
    is_new = not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))
    if not is_new and not weights:
        expected = "a new or empty folder, or with `overwrite=True` one that holds a checkpoint"
        raise ArgumentError(str(out), expected, "a folder with files" if out.is_dir() else "a file")
    lost = [
        str(path.relative_to(out))
        for path in (() if is_new else out.rglob("*"))
        if path not in weights
        and path.relative_to(out) not in names
        and (path.is_symlink() or not path.is_dir())
    ]
    if lost:
        expected = "a checkpoint alone in the folder to replace"
        hint = "move what is not to be lost"
        raise ArgumentError(str(out), expected, f"also {listed(sorted(lost))}", hint)
    out = inner  # where "." has no name
    temporary, old = (out.with_name(f".{out.name}.{end}") for end in ("lora-tmp", "lora-old"))
    temporary.mkdir(exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        is_ours = False
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(lock), temporary.stat())
        if not is_ours:
            raise StateError(str(out), "one run that writes it", "another one")
        try:
            for path in temporary.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield temporary
            for path in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
                _sync(path)
            if not is_new:
                shutil.rmtree(old, ignore_errors=True)
                out.rename(old)
            temporary.rename(out)
            shutil.rmtree(old, ignore_errors=True)  # or what a kill between the renames left
            _sync(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
