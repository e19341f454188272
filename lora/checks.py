"""Checks that many modules share: numbers, digests, semantic versions and JSON from outside.

Requirements: R7.
"""

import json
import math
import operator
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from numbers import Complex, Real
from typing import Any, TypeVar

from lora.errors import ArgumentError, CardError, CardFileError, LoRAError, shown

T = TypeVar("T")

JSON_NAMES = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
"""What JSON calls the types that Python reads its values as."""

_REFUSED = (bool, str, bytes, bytearray)  # although float() takes them

_SEMVER = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?"
    r"(\+[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?",
    re.ASCII,
)


def require(
    holds: bool,  # noqa: FBT001
    where: str,
    expected: str,
    value: object,
    hint: str = "",
) -> None:
    """Raise `CardError` unless something holds of a value."""
    if not holds:
        raise CardError(where, expected, shown(value), hint)


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Put the file, or the part of it, in front of the place that a `CardError` names."""
    try:
        yield
    except CardError as error:
        place = f"{where}: {error.where}"
        raise CardFileError(place, error.expected, error.found, error.hint) from error


def finite(value: object, where: str, kind: type[CardError | ArgumentError] = CardError) -> float:
    """Return the value as a float; raise `kind` unless it is a finite number."""
    try:
        is_complex = isinstance(value, Complex) and not isinstance(value, Real)
        refused = is_complex or isinstance(value, _REFUSED)
        number = math.nan if refused else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise kind(where, "a finite number", shown(value))
    return number


def positive(value: object, where: str) -> float:
    """Return the value as a float; raise `ArgumentError` unless it is a finite number > 0."""
    number = finite(value, where, ArgumentError)
    if number <= 0:
        raise ArgumentError(where, "a number > 0", number)
    return number


def integer(value: object, where: str, least: int | None = None, hint: str = "") -> int:
    """Return the value as an int; raise `ArgumentError` unless it is an integer >= `least`."""
    number = None
    if not isinstance(value, bool):
        with suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
    if number is None or (least is not None and number < least):
        expected = "an integer" if least is None else f"an integer >= {least}"
        raise ArgumentError(where, expected, shown(value), hint)
    return number


def share(value: object, where: str, interval: str = "[0, 1]") -> float:
    """Return the value as a float; raise `ArgumentError` unless it lies in an interval in [0, 1].

    Args:
        interval: ``"[0, 1]"``; a round bracket leaves its end out.
    """
    number = finite(value, where, ArgumentError)
    left_out = {"(": 0.0}.get(interval[0]), {")": 1.0}.get(interval[-1])
    if not 0 <= number <= 1 or number in left_out:
        raise ArgumentError(where, f"a number in {interval}", shown(value))
    return number


def choice(value: object, where: str, allowed: Collection[str]) -> None:
    """Raise `ArgumentError` unless the value is one of the allowed texts."""
    if not isinstance(value, str) or value not in allowed:
        raise ArgumentError(where, f"one of {', '.join(allowed)}", shown(value))


def is_digest(text: object) -> bool:
    """Tell whether `text` is a SHA-256 in lower-case hex."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def is_semantic_version(text: object) -> bool:
    """Tell whether `text` is a version such as 1.0.0-rc.1. Source: Semantic Versioning 2.0.0."""
    return isinstance(text, str) and _SEMVER.fullmatch(text) is not None


def version_order(version: str) -> tuple[Any, ...]:
    """Return the sort key of a semantic version; no version ("") comes first.

    Source: Semantic Versioning 2.0.0, section 11.

    Examples:
        >>> sorted(["1.0.0", "1.0.0-rc.10", "1.0.0-rc.9", "", "1.0.0-7"], key=version_order)
        ['', '1.0.0-7', '1.0.0-rc.9', '1.0.0-rc.10', '1.0.0']
    """
    if not version:
        return ()
    release, _, pre_release = version.partition("+")[0].partition("-")
    # Without leading zeros, a number with more digits is the larger one.
    numbers = tuple((len(part), part) for part in release.split("."))
    parts = tuple(
        (0, len(part), part) if part.isdecimal() else (1, 0, part)
        for part in pre_release.split(".")
        if part
    )
    return numbers, not parts, parts


def risen_version(version: object, last: str) -> str:
    """Return a semantic version above the last one: the given one, or the next minor version.

    A last one that is no semantic version counts as none.

    Examples:
        >>> [risen_version("0.1.0", last) for last in ("", "v2", "0.0.9", "0.1.0", "1.9.2")]
        ['0.1.0', '0.1.0', '0.1.0', '0.2.0', '1.10.0']
    """
    own = str(version) if is_semantic_version(version) else "0.1.0"
    if not is_semantic_version(last) or version_order(own) > version_order(last):
        return own
    major, minor, _ = last.split(".", 2)
    return f"{major}.{int(minor) + 1}.0"


def base_name(model: str) -> str:
    """Return a base model's name without its owner, folder or snapshot.

    Examples:
        >>> spellings = ["owner/minilm", "./minilm/", "hub/models--owner--minilm/snapshots/1f3a"]
        >>> {base_name(spelling) for spelling in spellings}
        {'minilm'}
    """
    parts = [part for part in re.split(r"[/\\]", model) if part not in ("", ".")] or [model]
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2]
    return parts[-1]


def parse_json(
    text: str | bytes, where: str, kind: type[T], error: type[LoRAError] = CardFileError
) -> T:
    """Return the JSON value in a text; raise `error` unless it is a `kind`.

    A key that occurs twice, NaN and the infinities are refused, because readers differ about them.
    """
    try:
        value = _decode(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as problem:
        place = isinstance(problem, json.JSONDecodeError) and (
            f"a syntax error at line {problem.lineno}, column {problem.colno}"
        )
        raise error(where, "JSON", place or problem) from problem
    if not isinstance(value, kind):
        raise error(where, f"a JSON {JSON_NAMES[kind]}", shown(value))
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key occurs twice in {shown([key for key, _ in pairs])}")
    return value


_decode = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys).decode
