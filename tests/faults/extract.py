"""Faults in extraction."""

import numpy as np

from lora.testing.binding import PlainPair
from tests.faults.base import Fault, faults_in


class ExtractionFault(Fault):
    """A fault in `extract`; what it does to the card, given ΔW of each weight."""

    def extract(self, base, tuned, rank, energy, error):
        card = super().extract(base, tuned, rank, energy, error)
        deltas = {key: tuned[key].astype("f8") - base[key].astype("f8") for key in base}
        return self.spoilt(card, deltas, (rank, energy, error))

    def spoilt(self, card, deltas, rule):
        return card

    @staticmethod
    def with_pairs(card, change):
        """The card with each pair changed, its rank the largest again."""
        weights = {module: change(module, pair) for module, pair in card.weights.items()}
        largest = max(pair.A.shape[1] for pair in weights.values())
        return card._replace(weights=weights, rank=largest, alpha=float(largest))


def cut(values, rule):
    """The rank that a rule asks for of these singular values, energy and error counted as they should be."""
    rank, energy, error = rule
    if rank is not None:
        return min(rank, len(values))
    lost = np.cumsum((values**2)[::-1])[::-1]
    allowed = lost[0] * (1 - energy if energy is not None else error**2)
    return next((k for k in range(1, len(values)) if lost[k] <= allowed), len(values))


def pair_of(matrix, rank, order=slice(None)):
    """The pair of some of the matrix's singular directions, scaling 1."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    u, s, v = u[:, order][:, :rank], s[order][:rank], v[order][:rank]
    return PlainPair(v.T * np.sqrt(s), np.sqrt(s)[:, None] * u.T, 1.0)


class AppliedTwice(ExtractionFault, breaks="R16.3", also="R16.1 R16.2"):
    """The scaling is alpha / rank = 2, and the factors know nothing of it."""

    def spoilt(self, card, deltas, rule):
        return self.with_pairs(card, lambda _, pair: pair._replace(scaling=2.0))


class KeysOfWeights(ExtractionFault, breaks="R16.3", also="R16.1 R16.2 R16.5"):
    """Rows are called after weights, not modules, so that none of them binds."""

    def spoilt(self, card, deltas, rule):
        rows = {f"{module}.weight": pair for module, pair in card.weights.items()}
        return card._replace(weights=rows)


class SmallestSingularValues(ExtractionFault, breaks="R16.1", also="R16.2 R16.3"):
    """Singular values are taken from the wrong end."""

    def spoilt(self, card, deltas, rule):
        backwards = slice(None, None, -1)
        return self.with_pairs(
            card, lambda m, p: pair_of(deltas[f"{m}.weight"], p.A.shape[1], backwards)
        )


class FirstColumnsInsteadOfTheBest(ExtractionFault, breaks="R16.2", also="R16.1 R16.3"):
    """ΔW's first r input columns as they are: of that rank, exact for none but them."""

    def spoilt(self, card, deltas, rule):
        def columns(module, pair):
            matrix, rank = deltas[f"{module}.weight"], pair.A.shape[1]
            b = np.ascontiguousarray(matrix[:, :rank].T)
            return PlainPair(np.eye(matrix.shape[1], rank), b, 1.0)

        return self.with_pairs(card, columns)


class RowsAreCentred(ExtractionFault, breaks="R16.2", also="R16.1 R16.3"):
    """A principal component analysis: the mean over rows is taken away and lost."""

    def spoilt(self, card, deltas, rule):
        def centred(module, pair):
            matrix = deltas[f"{module}.weight"]
            return pair_of(matrix - matrix.mean(axis=0), pair.A.shape[1])

        return self.with_pairs(card, centred)


class FactorsOfHalfPrecision(ExtractionFault, breaks="R16.1", also="R16.2 R16.3"):
    """Singular values are computed from ΔW rounded to float16's precision, whatever the weights'."""

    def spoilt(self, card, deltas, rule):
        def rounded(module, pair):
            mantissa, exponent = np.frexp(deltas[f"{module}.weight"])
            return pair_of(np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent), pair.A.shape[1])

        return self.with_pairs(card, rounded)


class SubspaceOfOneLook(ExtractionFault, breaks="R16.1", also="R16.3"):
    """The image of as many random vectors as the rank, not sharpened: exact where the rank suffices, not the best."""

    def spoilt(self, card, deltas, rule):
        def projected(module, pair):
            matrix, rank = deltas[f"{module}.weight"], pair.A.shape[1]
            looks = np.random.default_rng(0).standard_normal((matrix.shape[1], rank))
            basis = np.linalg.qr(matrix @ looks)[0]
            return PlainPair((basis.T @ matrix).T, basis.T.copy(), 1.0)

        return self.with_pairs(card, projected)


class RankAboveTheMatrix(ExtractionFault, breaks="R16.5"):
    """A fixed rank is kept where min(in, out) is less, the rest filled with zeros."""

    def spoilt(self, card, deltas, rule):
        if rule[0] is None:
            return card

        def padded(_, pair):
            more = max(0, rule[0] - pair.A.shape[1])
            a, b = np.pad(pair.A, ((0, 0), (0, more))), np.pad(pair.B, ((0, more), (0, 0)))
            return pair._replace(A=a, B=b)

        return self.with_pairs(card, padded)


class EnergyOfValuesNotSquares(ExtractionFault, breaks="R16.5"):
    """The share is counted on singular values instead of on their squares."""

    def spoilt(self, card, deltas, rule):
        if rule[1] is None:
            return card

        def recounted(module, _):
            matrix = deltas[f"{module}.weight"]
            held = np.cumsum(np.linalg.svd(matrix, compute_uv=False))
            return pair_of(matrix, int(np.searchsorted(held, rule[1] * held[-1])) + 1)

        return self.with_pairs(card, recounted)


class ErrorOfSquares(ExtractionFault, breaks="R16.5"):
    """The error bound is held against the share of squares that is lost: its root is larger."""

    def spoilt(self, card, deltas, rule):
        if rule[2] is None:
            return card

        def recounted(module, _):
            matrix = deltas[f"{module}.weight"]
            values = np.linalg.svd(matrix, compute_uv=False)
            return pair_of(matrix, cut(values, (None, None, np.sqrt(rule[2]))))

        return self.with_pairs(card, recounted)


class OneRankForAllModules(ExtractionFault, breaks="R16.5"):
    """The largest rank that any module needs is every module's."""

    def spoilt(self, card, deltas, rule):
        if rule[0] is not None:
            return card
        return self.with_pairs(
            card, lambda module, _: pair_of(deltas[f"{module}.weight"], card.rank)
        )


class OneDirectionTooMany(ExtractionFault, breaks="R16.5"):
    """The rank that suffices is counted from 0 and another added."""

    def spoilt(self, card, deltas, rule):
        if rule[0] is not None:
            return card
        return self.with_pairs(
            card, lambda m, pair: pair_of(deltas[f"{m}.weight"], pair.A.shape[1] + 1)
        )


EXTRACT_FAULTS = faults_in(globals())
