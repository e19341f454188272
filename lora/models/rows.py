"""A model in which each row of a batch has adapters of its own.

Rows of one adapter set that are neighbours are a segment; a layer adds the terms of a set to its
segments, so that a batch takes one forward.

Requirements: R5.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lora.models.layers import Terms, _Adapted, add_low_rank, stacked
from lora.models.twins import Twins

Segments = tuple[tuple[int, int, int], ...]
"""Runs of rows of one batch: (start, stop, index of the adapter set)."""


class SegmentedLinear(_Adapted):
    """A Linear in which each run of rows of a batch has the terms of one of several sets."""

    def __init__(self, base: nn.Module, sets: Sequence[Terms], memo: Twins | None = None) -> None:
        super().__init__(base, memo)
        for index, terms in enumerate(sets):
            for name, factor in zip("AB", stacked(terms, self), strict=True):
                self.register_buffer(f"lora_{name}{index}", factor, persistent=False)

    def forward(self, x: Tensor, segments: Segments = ()) -> Tensor:
        """Apply each segment's terms to its rows, counted in the first dimension of `x`."""
        out = self.base_output(x)
        for start, stop, index in segments:
            a, b = getattr(self, f"lora_A{index}"), getattr(self, f"lora_B{index}")
            if a.numel():
                out[start:stop] = add_low_rank(out[start:stop], x[start:stop], a, b)
        return out
