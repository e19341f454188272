"""Faults in extraction."""

import numpy as np

from lora.testing.binding import PlainPair
from tests.faults.base import Fault, faults_in


class ExtractionFault(Fault):
    """A fault in `extract`: what it does to each pair, given its ΔW and (rank, energy, error),
    under some of these rules.
    """

    rules = (0, 1, 2)

    def extract(self, base, tuned, *rule):
        card = super().extract(base, tuned, *rule)
        if all(rule[place] is None for place in self.rules):
            return card
        rows = {}
        for module, pair in card.weights.items():
            before, after = (model[f"{module}.weight"].astype("f8") for model in (base, tuned))
            rows[module] = self.spoilt(after - before, pair, rule, card.rank)
        largest = max(pair.A.shape[1] for pair in rows.values())
        return card._replace(weights=rows, rank=largest, alpha=float(largest))


def pair_of(matrix, rank, order=slice(None)):
    """The pair of some of the matrix's singular directions, scaling 1."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    u, s, v = u[:, order][:, :rank], s[order][:rank], v[order][:rank]
    return PlainPair(v.T * np.sqrt(s), np.sqrt(s)[:, None] * u.T, 1.0)


class AppliedTwice(ExtractionFault, breaks="R16.3", also="R16.1 R16.2"):
    """The scaling is alpha / rank = 2, and the factors know nothing of it."""

    def spoilt(self, matrix, pair, *_):
        return pair._replace(scaling=2.0)


class KeysOfWeights(Fault, breaks="R16.3", also="R16.1 R16.2 R16.5"):
    """Rows are called after weights, not modules, so that none of them binds."""

    def extract(self, *arguments):
        card = super().extract(*arguments)
        rows = {f"{module}.weight": pair for module, pair in card.weights.items()}
        return card._replace(weights=rows)


class SmallestSingularValues(ExtractionFault, breaks="R16.1", also="R16.2 R16.3"):
    """Singular values are taken from the wrong end."""

    def spoilt(self, matrix, pair, *_):
        return pair_of(matrix, pair.A.shape[1], slice(None, None, -1))


class FirstColumnsInsteadOfTheBest(ExtractionFault, breaks="R16.2", also="R16.1 R16.3"):
    """ΔW's first r input columns as they are: of that rank, exact for none but them."""

    def spoilt(self, matrix, pair, *_):
        rank = pair.A.shape[1]
        b = np.ascontiguousarray(matrix[:, :rank].T)
        return PlainPair(np.eye(matrix.shape[1], rank), b, 1.0)


class SmallDirectionsAreNoise(ExtractionFault, breaks="R16.2", also="R16.1 R16.3 R16.5"):
    """Singular values below a twentieth of the largest are left out."""

    def spoilt(self, matrix, pair, *_):
        values = np.linalg.svd(matrix, compute_uv=False)
        kept = int((values > 0.05 * values[0]).sum())
        return pair if kept >= pair.A.shape[1] else pair_of(matrix, kept)


class RowsAreCentred(ExtractionFault, breaks="R16.2", also="R16.1 R16.3"):
    """A principal component analysis: the mean over rows is taken away and lost."""

    def spoilt(self, matrix, pair, *_):
        return pair_of(matrix - matrix.mean(axis=0), pair.A.shape[1])


class FactorsOfHalfPrecision(ExtractionFault, breaks="R16.1", also="R16.2 R16.3"):
    """Singular values are computed from ΔW rounded to float16's precision, in every case."""

    def spoilt(self, matrix, pair, *_):
        mantissa, exponent = np.frexp(matrix)
        return pair_of(np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent), pair.A.shape[1])


class SubspaceOfOneLook(ExtractionFault, breaks="R16.1", also="R16.3"):
    """The image of as many random vectors as the rank, not sharpened: exact where the rank
    suffices, not the best.
    """

    def spoilt(self, matrix, pair, *_):
        looks = np.random.default_rng(0).standard_normal((matrix.shape[1], pair.A.shape[1]))
        basis = np.linalg.qr(matrix @ looks)[0]
        return PlainPair((basis.T @ matrix).T, basis.T.copy(), 1.0)


class CloseIsEqual(Fault, breaks="R16.2", also="R16.1 R16.3 R16.5"):
    """Weights that ``numpy.allclose`` takes for equal count as equal."""

    def extract(self, base, tuned, *rule):
        close = {key for key in base if np.allclose(*(m[key].astype("f8") for m in (base, tuned)))}
        return super().extract(base, {k: (base if k in close else tuned)[k] for k in base}, *rule)


class RankAboveTheMatrix(ExtractionFault, breaks="R16.5"):
    """A fixed rank is kept where min(in, out) is less, the rest filled with zeros."""

    rules = (0,)

    def spoilt(self, matrix, pair, rule, _):
        more = max(0, min(rule[0], 40) - pair.A.shape[1])
        a, b = np.pad(pair.A, ((0, 0), (0, more))), np.pad(pair.B, ((0, more), (0, 0)))
        return pair._replace(A=a, B=b)


class EnergyOfValuesNotSquares(ExtractionFault, breaks="R16.5"):
    """The share is counted on singular values instead of on their squares."""

    rules = (1,)

    def spoilt(self, matrix, pair, rule, _):
        sums = np.cumsum(np.linalg.svd(matrix, compute_uv=False))
        return pair_of(matrix, int(np.searchsorted(sums, rule[1] * sums[-1])) + 1)


class ErrorOfSquares(ExtractionFault, breaks="R16.5"):
    """The error bound is held against the share of squares that is lost: its root is larger."""

    rules = (2,)

    def spoilt(self, matrix, pair, rule, _):
        lost = np.cumsum((np.linalg.svd(matrix, compute_uv=False) ** 2)[::-1])[::-1]
        fits = (k for k in range(1, len(lost)) if lost[k] <= lost[0] * rule[2])
        return pair_of(matrix, next(fits, len(lost)))


class ShareOffByAHair(ExtractionFault, breaks="R16.5"):
    """0.05 % less than the share will do."""

    rules = (1,)

    def spoilt(self, matrix, pair, rule, _):
        sums = np.cumsum(np.linalg.svd(matrix, compute_uv=False) ** 2)
        return pair_of(matrix, int(np.searchsorted(sums, rule[1] * 0.9995 * sums[-1])) + 1)


class ErrorOfTheLargestValueLost(ExtractionFault, breaks="R16.5"):
    """The bound is held against the largest singular value of the rest, not against their norm."""

    rules = (2,)

    def spoilt(self, matrix, pair, rule, _):
        values = np.linalg.svd(matrix, compute_uv=False)
        fits = values <= np.linalg.norm(values) * rule[2]
        return pair_of(matrix, max(1, int(fits.argmax()) if fits.any() else len(values)))


class RankOf16Bits(Fault, breaks="R16.1"):
    """A rank is taken modulo 2**16."""

    def extract(self, base, tuned, rank, energy, error):
        rank = rank if rank is None else rank % 2**16 or 1
        return super().extract(base, tuned, rank, energy, error)


class OneRankForAllModules(ExtractionFault, breaks="R16.5"):
    """The largest rank that any module needs is every module's."""

    rules = (1, 2)

    def spoilt(self, matrix, pair, rule, largest):
        return pair_of(matrix, largest)


class OneDirectionTooMany(ExtractionFault, breaks="R16.5"):
    """The rank that suffices is counted from 0 and another added."""

    rules = (1, 2)

    def spoilt(self, matrix, pair, *_):
        return pair_of(matrix, pair.A.shape[1] + 1)


EXTRACT_FAULTS = faults_in(globals())
