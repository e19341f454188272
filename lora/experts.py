"""Where the weights of single experts lie, which cards name: ``….experts.3.w1``.

A mixture of experts holds a Linear for each expert and projection, or one parameter ``(experts,
out, in)`` for each projection, or for two of them joined, ``gate_up_proj``. A `Place` says which
rows of which tensors are the weight that a card's module stands for.

Requirements: R26.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from typing import NamedTuple

from lora.card import Array
from lora.checks import require
from lora.targets import Site

TRANSPOSED = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""Model types of a config.json whose fused experts are ``(experts, in, out)``."""

_RENAMED = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_RENAMED |= {new: old for old, new in _RENAMED.items()}
"""Parts of the names of Mixtral's modules in one release of transformers and in another."""

_FUSED = re.compile(r"((?:.+\.)?experts)\.(\w+)")
_SINGLE = re.compile(r"((?:.+\.)?experts\.\d+)\.(gate_proj|w1)\.weight")


class Part(NamedTuple):
    """Rows of a tensor, of which all dimensions but the last one count as rows."""

    tensor: str
    start: int
    stop: int


class Place(NamedTuple):
    """Where a weight ``(out, in)`` lies: its parts in their order; ``(in, out)`` if transposed."""

    parts: tuple[Part, ...]
    transposed: bool = False


def named(module: str) -> list[str]:
    """Return a module's name and those that it has in other releases of transformers.

    Examples:
        >>> named("0.block_sparse_moe.experts.1.w2")[-1], named("0.mlp.up_proj")
        ('0.mlp.experts.1.down_proj', ['0.mlp.up_proj'])
    """
    if "experts" not in module and not module.endswith(".gate"):
        return [module]
    parts = [[part, _RENAMED[part]] if part in _RENAMED else [part] for part in module.split(".")]
    if sum(map(len, parts)) > len(parts) + 4:  # no model's name, and it would stand for very many
        return [module]
    return [".".join(name) for name in product(*parts)]


def expert_places(
    shapes: Mapping[str, tuple[int, ...]], transposed: Collection[str] = ()
) -> Iterator[tuple[str, Place, Site]]:
    """Yield the name, place and site of what a card may name in fused experts.

    Single experts whose ``gate_up_proj`` is two matrices have a place of two parts.

    Args:
        shapes: Of all tensors of the model, by name.
        transposed: Names of fused parameters that are ``(experts, in, out)``.
    """

    def entry(name: str, place: Place, columns: int) -> tuple[str, Place, Site]:
        rows = sum(part.stop - part.start for part in place.parts)
        features = (rows, columns) if place.transposed else (columns, rows)
        return name, place, Site(*features, owner=name)

    for tensor, shape in shapes.items():
        if len(shape) == 3 and all(shape) and (match := _FUSED.fullmatch(tensor)):
            module, leaf = match.groups()
            count, rows, columns = shape
            down = shapes.get(f"{module}.down_proj", ())
            whole = tensor in transposed
            is_joined = leaf == "gate_up_proj" and down == (count, columns, rows // 2)
            for index in range(count):
                start, stop = index * rows, (index + 1) * rows
                name = f"{module}.{index}.{leaf}"
                yield entry(name, Place((Part(tensor, start, stop),), whole), columns)
                if is_joined and not whole:
                    middle = start + rows // 2
                    halves = {"gate_proj": (start, middle), "up_proj": (middle, stop)}
                    for half, run in halves.items():
                        place = Place((Part(tensor, *run),))
                        yield entry(f"{module}.{index}.{half}", place, columns)
        elif len(shape) == 2 and (match := _SINGLE.fullmatch(tensor)):
            module, leaf = match.groups()
            other = f"{module}.{'w3' if leaf == 'w1' else 'up_proj'}.weight"
            if shapes.get(other) == shape:
                parts = Part(tensor, 0, shape[0]), Part(other, 0, shape[0])
                yield entry(f"{module}.gate_up_proj", Place(parts), shape[1])


def by_expert(parameter: str, rank: int, a: Array, b: Array) -> dict[str, tuple[Array, Array]]:
    """Return the factors (in, r), (r, out) of each expert in those that PEFT has for a parameter.

    PEFT stacks them as ``(experts · r, in)`` and, with the rank outside, ``(out, r · experts)``.
    """
    module, _, leaf = parameter.rpartition(".")
    require(rank > 0, f"rank of {parameter}", "at least 1", rank)
    experts, rest = divmod(len(a), rank)
    shapes = f"shapes {a.shape}, {b.shape}"
    require(b.shape[1] == len(a) and not rest, parameter, f"factors of rank {rank}", shapes)
    if leaf == "weight":  # of one matrix, such as a router's
        require(experts == 1, parameter, f"factors of rank {rank}", shapes)
        return {module: (a.T, b.T)}
    a, b = a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts)
    return {f"{module}.{i}.{leaf}": (a[i].T, b[:, :, i].T) for i in range(experts)}
