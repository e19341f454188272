"""Hypothesis strategies for cards, factors, names and module trees, drawn towards their edges."""

import operator
from collections.abc import Mapping
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import strategies as st

from lora.card import DTYPES, Array
from lora.testing.binding import PlainCard, PlainPair, Term
from lora.testing.domains import limit

_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}

dtypes = st.sampled_from(list(DTYPES.values()))
"""The dtypes of a card."""

ranks = st.integers(1, 5) | st.sampled_from([9, 17])
features = st.integers(1, 7)
_sizes = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 17])

wide_integers = st.sampled_from(
    [2**width + near for width in (8, 16, 31, 32, 53, 63, 64) for near in (-1, 0, 1)]
)
"""Integers about the widths at which machine numbers wrap and floats skip."""

_words = st.sampled_from(
    [
        "SelfAttention",  # the first is drawn most often
        "encoder",
        "layer",
        "0",
        "1",
        "11",
        "query",
        "value",
        "e\u0301",  # a letter and a combining accent, which NFC would join
        "lm_head",
        "a,b",
        "größe",
        "注意",
    ]
)
_characters = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
_text = st.one_of(
    st.text(_characters, min_size=1, max_size=6).filter(str.isprintable),
    # NFC and NFKC change these, strip() shortens these.
    st.sampled_from(["e\u0301", "\u212b", "\ufb01", " lead", "trail ", "two  blanks", " "]),
)

ALIKE = ["e\u0301", "\u00e9", "\u212b", "\u00c5", "\ufb01", "fi"]
ALIKE += [" fi", "fi ", "f i", "f.i", "f_i", "Fi", "fi.", "fi.x", "fix", "x.fi", "-"]
"""Names that NFC, NFKC, strip(), lower() or "_" for "." take for another, or that begin or end one.
"""

names = st.one_of(
    st.lists(_words, min_size=1, max_size=4).map(".".join), _text, st.just("a, b"), st.just("-1")
)
"""Names with dots, digits, commas, blanks, combining marks, other scripts."""

module_names = st.one_of(names, st.just(""))
"""Names of modules: the root's is empty."""

targets = st.lists(st.one_of(module_names, st.just("all-linear")), max_size=4, unique=True).map(
    tuple
)
"""Target modules, none included."""

free_text = st.text(max_size=6) | st.sampled_from(
    [
        "a\r\nb\rc\n",
        "\ufeffa",
        "a\x00b",
        "\u2028",
        "\\u0041",
        "null",
        "1e3",
        "x" * 300,
        "é" * 70_000,
    ]
)
"""Any text: ends of lines, control characters, what reads like JSON, and long ones."""

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | wide_integers
    | wide_integers.map(operator.neg)
    | st.floats(allow_nan=False, allow_infinity=False)
    | free_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)
"""Any JSON value."""

_FIELDS = ("name", "rank", "alpha", "lora.name", "lora.rank", "description", "version")

metadata = st.dictionaries(_text | st.sampled_from(_FIELDS), json_values, max_size=4)
"""JSON objects, keys that look like a card's own fields among them."""

extras = st.dictionaries(_text.map("x-".__add__), st.just("") | free_text, max_size=2)

scalings = st.floats(-8, 8, width=32) | st.sampled_from([0.0, 1.0, -0.0, 5e-324, 1e30])


def laid_out(array: Array, order: str) -> Array:
    """Return an equal array: by rows ("C"), columns ("F"), backwards ("A"), or with gaps ("S")."""
    if order == "A":
        return np.flip(laid_out(np.flip(array), "S"))
    if order == "S":
        return np.repeat(array, 2, -1)[..., ::2]
    return np.array(array, order=order)  # type: ignore[call-overload, no-any-return]


orders = st.sampled_from("CFAS")
"""Orders of an array's elements in memory; see `laid_out`."""


@st.composite
def bits(draw: st.DrawFn, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """An array, in any memory order, of any bits: NaN payloads, infinities, signed zeros."""
    sign = 1 << (dtype.itemsize * 8 - 1)
    edges = [0, 1, sign, 2 * sign - 1, sign - 1, sign + 1]
    elements = st.one_of(st.integers(0, 2 * sign - 1), st.sampled_from(edges))
    array = draw(hnp.arrays(_BITS[dtype.itemsize], shape, elements=elements)).view(dtype)
    return laid_out(array, draw(orders))


def numbers(
    dtype: np.dtype[Any], shape: tuple[int, ...], *, largest: float = 4.0
) -> st.SearchStrategy[Array]:
    """An array of finite numbers of `dtype`, zeros of both signs among them."""
    elements = st.floats(-largest, largest, width=16) | st.sampled_from([0.0, -0.0, 1.0])
    return hnp.arrays(float, shape, elements=elements).map(lambda array: array.astype(dtype))


def integers(
    dtype: np.dtype[Any], shape: tuple[int, ...], *, largest: int = 3
) -> st.SearchStrategy[Array]:
    """An array of small integers of `dtype`: sums and products of them are exact."""
    whole = st.integers(-largest, largest)
    return hnp.arrays(int, shape, elements=whole).map(lambda array: array.astype(dtype))


@st.composite
def plain_cards(
    draw: st.DrawFn,
    *,
    dtype: np.dtype[Any] | None = None,
    max_modules: int = 3,
    with_extra: bool = True,
) -> PlainCard:
    """A valid card with factors of any bits: no module, one, several; equal and unequal ranks."""
    dtype = draw(dtypes) if dtype is None else dtype
    modules = draw(st.lists(module_names, max_size=max_modules, unique=True))
    rank, mixed = draw(ranks), draw(st.booleans())
    weights: dict[str, PlainPair] = {}
    for index, module in enumerate(modules):
        inner = rank if index == 0 or not mixed else draw(st.integers(1, rank))
        rows, columns = draw(features), draw(features)
        scaling = draw(scalings) if inner != rank else draw(st.none() | scalings)
        a, b = draw(bits(dtype, (rows, inner))), draw(bits(dtype, (inner, columns)))
        weights[module] = PlainPair(a, b, scaling)
    alpha = draw(st.floats(1e-3, 1e3) | st.sampled_from([1.0, 16.0, 5e-324, 1.7e308]))
    extra = draw(extras) if with_extra else {}
    return PlainCard(draw(names), rank, alpha, draw(targets), weights, draw(metadata), extra)


@st.composite
def layer_dtypes(draw: st.DrawFn) -> np.dtype[Any]:
    """A dtype of the layers that the binding under test has."""
    return draw(st.sampled_from([DTYPES[name] for name in limit("forward", "dtypes", DTYPES)]))


@st.composite
def leading_shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Leading dimensions of an input: none, several, seldom one of size zero."""
    sizes = st.sampled_from([1, 2, 3, 1, 2, 3, 1, 2, 3, 0])
    least = limit("forward", "dimensions", 1) - 1
    return tuple(draw(st.lists(sizes, min_size=least, max_size=max(least, 3))))


def powers(dtype: np.dtype[Any]) -> st.SearchStrategy[float]:
    """Powers of two by which factors and inputs are scaled, so that products of two stay finite."""
    most = {"float16": 6, "float64": 400}.get(dtype.name, 40)
    return st.sampled_from([1.0, 2.0**most, 1.0, 2.0**-most])


@st.composite
def layers(
    draw: st.DrawFn,
    *,
    min_terms: int = 0,
    max_terms: int = 3,
    whole: bool = False,
    dtype: np.dtype[Any] | None = None,
) -> tuple[Array, Array, Array | None, Mapping[str, Term]]:
    """Input, weight, bias and named terms of one layer, of one dtype; small integers if `whole`.

    The ΔW of a term is small, but A may be huge and B tiny, or the other way round. Within the
    domains of the binding under test, but for at least `min_terms` terms.
    """
    dtype = draw(layer_dtypes()) if dtype is None else dtype
    max_terms = max(min_terms, min(max_terms, limit("forward", "terms", max_terms)))
    scales = st.sampled_from([1.0, 2.0, -1.0, 3.0]) if whole else st.floats(-4, 4, width=16)
    if limit("forward", "scaling", None):
        scales = scales.filter(bool)
    rows, columns = draw(_sizes), draw(_sizes)
    elements = integers if whole else numbers
    x = draw(elements(dtype, (*draw(leading_shapes()), rows)))
    weight = draw(elements(dtype, (columns, rows)))
    bias = draw(st.none() | elements(dtype, (columns,)))
    terms: dict[str, Term] = {}
    for name in draw(st.lists(names, min_size=min_terms, max_size=max_terms, unique=True)):
        rank = draw(ranks | st.just(min(rows, columns)))
        scale = draw(scales)
        weighted = draw(
            st.sampled_from([1.0, 0.0, 2.0, -1.0]) if whole else st.floats(-2, 2, width=16)
        )
        a, b = draw(elements(dtype, (rows, rank))), draw(elements(dtype, (rank, columns)))
        power = draw(powers(dtype))
        terms[name] = Term(a * dtype.type(power), b * dtype.type(1 / power), scale, weighted)
    if not whole and dtype != np.float16:
        x = x * dtype.type(draw(powers(dtype)))
    return x, weight, bias, terms
