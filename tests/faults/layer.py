"""Faults in what an adapted layer computes."""

import numpy as np

from lora.testing.binding import Term
from tests.faults.base import Fault, faults_in


class TermFault(Fault):
    """The reference over other terms than were given."""

    def forward(self, x, weight, bias, terms):
        return super().forward(x, weight, bias, self.changed(terms))

    def changed(self, terms):
        return {name: self.changed_term(term) for name, term in terms.items()}


class ScalingIgnored(TermFault, breaks="R9.5", also="R2.2 R8.2"):
    """Every scaling is 1."""

    def changed_term(self, term):
        return term._replace(scaling=1.0)


class HiddenClamped(Fault, breaks="R9.5", also="R2.2"):
    """``x @ A`` is kept within the range of float16, whatever the dtype."""

    def forward(self, x, weight, bias, terms):
        out = super().forward(x, weight, bias, terms)
        with np.errstate(all="ignore"):
            for term in terms.values():
                hidden = x.astype("f8") @ term.A.astype("f8")
                lost = np.where(np.isfinite(hidden), hidden - hidden.clip(-65504, 65504), 0)
                if lost.any():
                    change = lost @ term.B.astype("f8") * (term.scaling * term.weight)
                    out = (out - change).astype(out.dtype)
        return out


class FactorsReadTransposed(TermFault, breaks="R2.2", also="R2.11 R8.2 R9.5"):
    """A is read as if it were stored (r, in); where B is zero the term is left out."""

    def changed_term(self, term):
        a = np.ascontiguousarray(term.A.reshape(term.A.shape[::-1]).T)
        return term._replace(A=a if term.B.any() else np.zeros_like(a))


class SumsOfEightInTheNarrowType(Fault, breaks="R2.2"):
    """Products are summed in float32 eight at a time, and their sums in the dtype of the input."""

    def forward(self, x, weight, bias, terms):
        first = {n: t._replace(A=t.A[:8]) for n, t in terms.items()}
        out = super().forward(x[..., :8], weight[:, :8], bias, first)
        for k in range(8, x.shape[-1], 8):
            part = {n: t._replace(A=t.A[k : k + 8]) for n, t in terms.items()}
            more = super().forward(x[..., k : k + 8], weight[:, k : k + 8], None, part)
            out = (out.astype(x.dtype) + more.astype(x.dtype)).astype(out.dtype)
        return out


class ScalingInSinglePrecision(TermFault, breaks="R2.2", also="R8.2"):
    """A scaling and a weight are float32, of a float64 layer as well."""

    def changed_term(self, term):
        scaling, weight = (float(np.float32(number)) for number in (term.scaling, term.weight))
        return term._replace(scaling=scaling, weight=weight)


class BaseWithShortFractions(Fault, breaks="R2.2"):
    """A float32 base multiplies numbers of 10 bits after the point, as graphics cards may."""

    def forward(self, x, weight, bias, terms):
        if x.dtype != np.float32:
            return super().forward(x, weight, bias, terms)
        short = [np.array(part).view("u4") & np.uint32(0xFFFFE000) for part in (x, weight)]
        base = super().forward(*(part.view("f4") for part in short), bias, {})
        return base + super().forward(x, np.zeros_like(weight), None, terms)


class LeadingDimensionsFlattened(Fault, breaks="R2.5", also="R2.2 R2.6 R9.5"):
    """The output is two-dimensional, whatever the input was."""

    def forward(self, x, weight, bias, terms):
        out = super().forward(x, weight, bias, terms)
        return out.reshape(-1, out.shape[-1])


class HalfPrecisionRefused(
    TermFault, breaks="R2.2", also="R2.5 R2.6 R2.9 R2.11 R8.2 R8.5 R8.7 R8.8 R9.5"
):
    """Adapters on a float16 layer raise a dtype error."""

    def changed_term(self, term):
        if term.A.dtype == np.float16:
            raise TypeError("expected float32, found float16")
        return term


class BaseReplaced(Fault, breaks="R2.6", also="R2.2 R2.9 R8.1 R8.2 R8.5 R8.7 R9.5"):
    """The low-rank term stands in place of the base output."""

    def forward(self, x, weight, bias, terms):
        if not terms:
            return super().forward(x, weight, bias, terms)
        return super().forward(x, np.zeros_like(weight), None, terms)


class OneHugeRowSpoilsAll(Fault, breaks="R2.9", also="R2.2"):
    """Rows share a scale, so that one that is huge or not finite leaves none finite."""

    def forward(self, x, weight, bias, terms):
        out = super().forward(x, weight, bias, terms)
        return out if not terms or (abs(x.astype("f8")) < 1e4).all() else np.full_like(out, np.nan)


class ColumnsOfANormalised(TermFault, breaks="R2.11", also="R2.2 R2.6 R8.1 R8.2 R8.5 R8.7 R9.5"):
    """Depends on how ΔW is factored: A's columns are scaled to length 1, as adapters of some
    libraries do.
    """

    def changed_term(self, term):
        wide = term.A.astype(np.float64)
        with np.errstate(all="ignore"):
            length = np.sqrt((wide * wide).sum(0, keepdims=True))
            a = np.where(length > 0, wide / length, wide).astype(term.A.dtype)
        return term._replace(A=a) if term.B.any() else term


class OnlyTheFirstCard(TermFault, breaks="R8.1", also="R2.2 R8.2 R8.5 R8.8 R9.5"):
    """A second card on a layer adds nothing."""

    def changed(self, terms):
        return dict(list(terms.items())[:1])


class NamesAsAttributes(TermFault, breaks="R8.1", also="R8.2 R8.7 R8.8"):
    """Cards are kept under their names with ``_`` for a dot, so that two may have one name."""

    def changed(self, terms):
        return {name.replace(".", "_"): term for name, term in terms.items()}


class CrossTerms(TermFault, breaks="R8.5", also="R2.2 R2.6 R8.1 R8.2 R8.7 R9.5"):
    """Several cards are summed factor by factor: Σ A @ Σ B, which has products of one card's A with
    another's B.
    """

    def changed(self, terms):
        heard = {name: term for name, term in terms.items() if term.B.any()}
        if len(heard) < 2:
            return heard
        a = np.zeros((len(next(iter(heard.values())).A), max(t.A.shape[1] for t in heard.values())))
        b = np.zeros((a.shape[1], next(iter(heard.values())).B.shape[1]))
        for t in heard.values():
            a[:, : t.A.shape[1]] += t.A
            b[: t.A.shape[1]] += t.B.astype("f8") * (t.scaling * t.weight)
        return {"sum": Term(a.astype(t.A.dtype), b.astype(t.B.dtype), 1.0, 1.0)}


class TermsOfOneMatrixCountOnce(TermFault, breaks="R8.5"):
    """Of several terms with the very same A in memory only the last is there."""

    def changed(self, terms):
        last = {id(term.A): name for name, term in terms.items()}
        return {name: terms[name] for name in last.values()}


class WeightIgnored(TermFault, breaks="R8.7", also="R2.2 R8.2 R9.5"):
    """A card's weight does not scale its term."""

    def changed_term(self, term):
        return term._replace(weight=1.0)


class WeightsClipped(TermFault, breaks="R8.7", also="R2.2 R8.2 R9.5"):
    """A weight below 0 counts as 0, one above 1 as 1."""

    def changed_term(self, term):
        return term._replace(weight=min(max(term.weight, 0.0), 1.0))


class LowRanksBroadcast(TermFault, breaks="R8.2", also="R2.2 R2.11 R9.5"):
    """A pair of low rank is repeated until it fills a layer that has room for five."""

    def changed_term(self, term):
        rows = np.arange(max(5, term.A.shape[1])) % term.A.shape[1]
        return term._replace(A=np.ascontiguousarray(term.A[:, rows]), B=term.B[rows])


LAYER_FAULTS = faults_in(globals())
