"""Serve a binding to the conformance suite, one JSON message a line on standard input and output.

This file needs Python 3.10 and NumPy, nothing else. Copy it into any environment, and start it with
the file of a binding and the name of its object, if that is not ``BINDING``::

    lora conformance --command "/path/to/python serve.py my_binding.py"

``my_binding.py`` may say ``from serve import Lacks, PlainCard, PlainPair``; what it prints goes to
standard error. The suite's side of the conversation is `lora.testing.remote`.

Requirements: R24.7.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import numpy as np
    import numpy.typing as npt
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"serve.py: {error}; install NumPy for {sys.executable}")

with contextlib.suppress(ImportError):
    import ml_dtypes  # noqa: F401 - makes the name bfloat16 known to NumPy

PROTOCOL = 1
DTYPES = "float16 bfloat16 float32 float64 bool int8 int16 int32 int64".split()  # noqa: SIM905
DTYPES += ["uint8", "uint16", "uint32", "uint64"]

Array = npt.NDArray[Any]


class PlainPair(NamedTuple):
    """Factors ``(in, r)`` and ``(r, out)``; a scaling of None means alpha / rank of the card.

    Examples:
        >>> PlainPair(np.ones((4, 1)), np.ones((1, 3)), 0.5).scaling
        0.5
    """

    A: Array
    B: Array
    scaling: float | None = None


class PlainCard(NamedTuple):
    """A card as plain values, which mean what a `LoRACard`'s do.

    Examples:
        >>> pair = PlainPair(np.ones((4, 1)), np.ones((1, 3)))
        >>> PlainCard("docs", 1, 2.0, ("query",), {"query": pair}, {}, {}).rank
        1
    """

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    weights: Mapping[str, PlainPair]
    metadata: Mapping[str, Any]
    extra: Mapping[str, str]


class Term(NamedTuple):
    """One adapter's part in a layer: its factors, resolved scaling, and weight."""

    A: Array
    B: Array
    scaling: float
    weight: float


class Lacks(BaseException):
    """What is asked for lies outside what the implementation offers.

    This is no refusal, and therefore no `Exception`: the example does not count, and a property
    without another is skipped with this reason.
    """


RECORDS: dict[str, Any] = {"card": PlainCard, "pair": PlainPair, "term": Term}


def encode(value: Any, refer: Callable[[Any], dict[str, int]]) -> Any:
    """Return a value as JSON in which every object has one key, its kind.

    Args:
        refer: Numbers what stays on this side of the line: ``{"callback": 1}``.
    """
    if isinstance(value, np.generic):
        return encode(value.item(), refer)
    if isinstance(value, list) or type(value) is tuple:
        return [encode(item, refer) for item in value]
    is_plain = value is None or isinstance(value, bool | str | int)
    if is_plain or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _object_of(value, refer)


def _object_of(value: Any, refer: Callable[[Any], dict[str, int]]) -> dict[str, Any]:
    kinds = [kind for kind, record in RECORDS.items() if type(value).__name__ == record.__name__]
    content: Any
    if isinstance(value, float):
        kind, content = "float", repr(value)
    elif isinstance(value, bytes | bytearray | memoryview):
        kind, content = "bytes", base64.b64encode(value).decode()
    elif isinstance(value, np.ndarray) and value.dtype.name in DTYPES:
        raw = value.astype(value.dtype.newbyteorder("<")).tobytes()  # in row-major order
        content = {"dtype": value.dtype.name, "shape": list(value.shape)}
        kind, content["data"] = "array", base64.b64encode(raw).decode()
    elif kinds:
        content = {name: encode(field, refer) for name, field in value._asdict().items()}
        kind = kinds[0]
        if kind == "card" and (text := _json_object(value.metadata)):
            content["metadata"] = {"json": text}
    elif isinstance(value, Mapping) and not callable(value):
        kind, content = "map", [[encode(k, refer), encode(value[k], refer)] for k in value]
    else:
        return refer(value)
    return {kind: content}


def _json_object(value: Any) -> str:
    """Return a JSON object as text, else "": some languages have no integers, or reorder keys."""
    try:
        text = json.dumps(value, allow_nan=False)
        return text if isinstance(value, dict) and json.loads(text) == value else ""
    except (TypeError, ValueError, RecursionError):
        return ""


def decode(value: Any, resolve: Callable[[int], Any]) -> Any:
    """Return the value that `encode` made this JSON of.

    Args:
        resolve: Returns the callback, or the handle, of a number.

    Raises:
        KeyError, TypeError, ValueError: It is not such JSON.
        Lacks: NumPy has no such dtype here.
    """
    if isinstance(value, list):
        return [decode(item, resolve) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    decoded: Any
    match kind, content:
        case "array", {"dtype": str(name), "shape": [*shape], "data": str(data)}:
            decoded = _array_of(name, shape, base64.b64decode(data, validate=True))
        case "float", "nan" | "inf" | "-inf" | "-0.0":
            decoded = float(content)
        case "bytes", str(data):
            decoded = base64.b64decode(data, validate=True)
        case "json", str(text):
            decoded = json.loads(text)
        case "map", [*pairs]:
            decoded = {decode(key, resolve): decode(item, resolve) for key, item in pairs}
        case "callback" | "handle", int(number):
            decoded = resolve(number)
        case _:
            fields = {name: decode(field, resolve) for name, field in content.items()}
            if kind == "card":
                fields["target_modules"] = tuple(fields["target_modules"])
            decoded = RECORDS[kind](**fields)
    return decoded


def _array_of(name: str, shape: list[Any], raw: bytes) -> Array:
    if name not in DTYPES or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"expected an array of a known dtype and shape, found {name} {shape}")
    try:
        dtype = np.dtype(name)
    except TypeError:
        raise Lacks(f"{name} needs the package ml_dtypes") from None
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"expected the bytes of {name} {shape}, found {len(raw)} bytes")
    return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


class Server:
    """Answers the calls that arrive, one a line, until there are no more."""

    def __init__(self, binding: Any, lines: IO[str], out: IO[str]) -> None:
        self._lines, self._out = lines, out
        self._objects: dict[int, Any] = {0: binding}
        """The binding, and the routers that it made."""

    def say_hello(self) -> None:
        """Say what the binding is, and what it has."""
        binding = self._objects[0]
        names = [name for name in dir(binding) if not name.startswith("_")]
        about = {"protocol": PROTOCOL, "name": binding.name, "version": str(binding.version)}
        about["members"] = [name for name in names if callable(getattr(binding, name))]
        for name in ("missing", "domains", "expected_failures"):
            about[name] = getattr(binding, name, {})
        self._say({"hello": about})

    def run(self) -> None:
        """Answer."""
        for line in self._lines:
            call = json.loads(line)
            for handle in call["free"]:
                self._objects.pop(handle, None)
            try:
                outcome = self._answer(**call)
            except Lacks as error:
                outcome = {"lacks": str(error)}
            self._say({"id": call["id"], **outcome})

    def _answer(self, call: str, on: int, args: dict[str, Any], **_: Any) -> dict[str, Any]:
        arguments = {name: decode(value, self._callback) for name, value in args.items()}
        keywords = {name: arguments.pop(name) for name in ("virtual",) if name in arguments}
        try:
            result = getattr(self._objects[on], call)(*arguments.values(), **keywords)
        except Exception as error:  # noqa: BLE001 - any exception is a refusal
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            return {"refused": f"{type(error).__name__}: {error}"[:1000], "place": place}
        return {"ok": encode(result, self._handle)}

    def _handle(self, value: Any) -> dict[str, int]:
        handle = max(self._objects) + 1
        self._objects[handle] = value
        return {"handle": handle}

    def _callback(self, number: int) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            values = encode(list(arguments), self._handle)
            self._say({"callback": number, "args": values})
            reply = json.loads(self._lines.readline())
            if "refused" in reply:
                raise ValueError(reply["refused"])
            return decode(reply["ok"], self._callback)

        return ask

    def _say(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message, allow_nan=False) + "\n")
        self._out.flush()


def main(file: str, name: str = "BINDING") -> None:
    """Load the binding of a file, and serve it on the standard streams."""
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the implementation prints is no message
    path = Path(file).absolute()
    for own_name in ("serve", "lora.testing.serve"):  # one Lacks, however a binding imports it
        sys.modules[own_name] = sys.modules[__name__]
    sys.path.insert(0, str(path.parent))
    if not path.is_file() or path.suffixes != [".py"]:
        sys.exit(f"{path}: expected a file NAME.py; give the path of a binding's file")
    try:
        binding = getattr(importlib.import_module(path.stem), name)
        server = Server(binding() if isinstance(binding, type) else binding, lines, out)
        server.say_hello()
    except (Exception, Lacks) as error:
        if os.environ.get("LORA_DEBUG"):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        places = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            places = [error.lineno]
        is_missing = isinstance(error, ModuleNotFoundError)
        hint = f"install it for {sys.executable}" if is_missing else "LORA_DEBUG=1 shows where"
        place = ":".join(map(str, (path.name, *places[-1:])))
        text = str(error.msg if isinstance(error, SyntaxError) else error)[:1000]
        sys.exit(" ".join(f"{place}: {type(error).__name__}: {text}; {hint}".split()))
    server.run()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: serve.py FILE_OF_A_BINDING [NAME]")
    main(*sys.argv[1:])
