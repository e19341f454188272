"""Faults in what an adapted layer computes."""

import numpy as np

from tests.faults.base import Fault


class AlphaInsteadOfAlphaOverRank(Fault):
    """The scaling is not divided by the rank."""

    breaks = "R2.2"

    def forward(self, x, weight, bias, terms):
        return super().forward(
            x, weight, bias, {n: t._replace(scaling=t.scaling * t.A.shape[1]) for n, t in terms.items()}
        )


class ScalingIgnored(Fault):
    """Every scaling is 1."""

    breaks = "R9.5"

    def forward(self, x, weight, bias, terms):
        return super().forward(x, weight, bias, {n: t._replace(scaling=1.0) for n, t in terms.items()})


class FactorsReadTransposed(Fault):
    """A is read as if it were stored (r, in)."""

    breaks = "R2.2"

    def forward(self, x, weight, bias, terms):
        turned = {n: t._replace(A=np.ascontiguousarray(t.A.reshape(t.A.shape[::-1]).T)) for n, t in terms.items()}
        return super().forward(x, weight, bias, turned)


class LeadingDimensionsFlattened(Fault):
    """The output is two-dimensional, whatever the input was."""

    breaks = "R2.5"

    def forward(self, x, weight, bias, terms):
        out = super().forward(x, weight, bias, terms)
        return out.reshape(-1, out.shape[-1])


class BaseReplaced(Fault):
    """The low-rank term stands in place of the base output."""

    breaks = "R2.6"

    def forward(self, x, weight, bias, terms):
        if not terms:
            return super().forward(x, weight, bias, terms)
        return super().forward(x, np.zeros_like(weight), None, terms)


class ZeroBIsNotZero(Fault):
    """A fresh adapter changes the output a little."""

    breaks = "R2.9"

    def forward(self, x, weight, bias, terms):
        noisy = {n: t if t.B.any() else t._replace(B=np.full_like(t.B, 1)) for n, t in terms.items()}
        return super().forward(x, weight, bias, noisy)


class ColumnsOfANormalised(Fault):
    """Depends on how ΔW is factored: A's columns are scaled to length 1, as adapters of some libraries do."""

    breaks = "R2.11"

    def forward(self, x, weight, bias, terms):
        def scaled(a):
            wide = a.astype(np.float64)
            with np.errstate(all="ignore"):
                length = np.sqrt((wide * wide).sum(0, keepdims=True))
                return np.where(length > 0, wide / length, wide).astype(a.dtype)

        return super().forward(x, weight, bias, {n: t._replace(A=scaled(t.A)) for n, t in terms.items()})


class OnlyTheLastCard(Fault):
    """A second card on a layer replaces the first."""

    breaks = "R8.1"

    def forward(self, x, weight, bias, terms):
        return super().forward(x, weight, bias, dict(sorted(terms.items())[-1:]))


class CrossTerms(Fault):
    """Several cards are summed factor by factor: Σ A @ Σ B, which has products of one card's A with another's B."""

    breaks = "R8.5"

    def forward(self, x, weight, bias, terms):
        same = {t.A.shape[1] for t in terms.values()}
        if len(terms) < 2 or len(same) > 1:
            return super().forward(x, weight, bias, terms)
        first = next(iter(terms.values()))
        a = sum(t.A.astype("f8") for t in terms.values()).astype(first.A.dtype)
        b = sum(t.B.astype("f8") * t.scaling * t.weight for t in terms.values()).astype(first.B.dtype)
        return super().forward(x, weight, bias, {"sum": first._replace(A=a, B=b, scaling=1.0, weight=1.0)})


class WeightIgnored(Fault):
    """A card's weight does not scale its term."""

    breaks = "R8.7"

    def forward(self, x, weight, bias, terms):
        return super().forward(x, weight, bias, {n: t._replace(weight=1.0) for n, t in terms.items()})


class NegativeWeightsClipped(Fault):
    """A weight below 0 counts as 0."""

    breaks = "R8.7"

    def forward(self, x, weight, bias, terms):
        return super().forward(x, weight, bias, {n: t._replace(weight=max(t.weight, 0.0)) for n, t in terms.items()})


class RankOneBroadcast(Fault):
    """A rank-1 pair is broadcast into a layer that has room for more."""

    breaks = "R8.2"

    def forward(self, x, weight, bias, terms):
        wide = {
            n: t if t.A.shape[1] > 1 else t._replace(A=np.repeat(t.A, 2, axis=1), B=np.repeat(t.B, 2, axis=0))
            for n, t in terms.items()
        }
        return super().forward(x, weight, bias, wide)


LAYER_FAULTS = [value for value in list(globals().values()) if isinstance(value, type) and issubclass(value, Fault)][1:]
