"""Faults in how cards are merged; most were seen in code that is in use."""

import numpy as np

from lora.testing.binding import PlainPair
from tests.faults.base import Fault, faults_in


def change(pair):
    """ΔW of a factor pair, or 0 for none."""
    return 0.0 if pair is None else (pair.A.astype("f8") @ pair.B.astype("f8")).T * pair.scaling


def modules(cards):
    """Every module of any card."""
    return sorted({module for card in cards for module in card.weights})


def changes(cards, module):
    """ΔW of each card at a module."""
    whole = [change(card.weights.get(module)) for card in cards]
    shape = next(part.shape for part in whole if np.ndim(part))
    return [part + np.zeros(shape) for part in whole]


def promoted(cards):
    """The dtype that holds all of the cards' dtypes."""
    names = {pair.A.dtype.name for card in cards for pair in card.weights.values()}
    if len(names) == 1:
        return next(p.A.dtype for c in cards for p in c.weights.values())
    return np.dtype("float64" if "float64" in names else "float32")


def factors(whole, rank, dtype):
    """A pair of this ΔW, or of its best approximation."""
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    root = np.sqrt(s[:rank])
    return PlainPair((v[:rank].T * root).astype(dtype), (u[:, :rank] * root).T.astype(dtype), 1.0)


def with_rows(card, rows):
    """The card with these pairs, its rank the largest again."""
    return card._replace(weights=rows, rank=max((p.A.shape[1] for p in rows.values()), default=1))


def times(card, factor):
    """The card with a ΔW scaled by `factor`."""
    rows = {m: p._replace(scaling=p.scaling * factor) for m, p in card.weights.items()}
    return card._replace(weights=rows)


class NormalizeIgnored(Fault, breaks="R20.1", also="R20.3 R20.4 R20.9"):
    """Weights are never divided by their sum."""

    def merge(self, cards, strategy, options, weights, rank):
        ignored = {"normalize": False} if strategy == "weighted" else {}
        return super().merge(cards, strategy, options | ignored, weights, rank)


class NormalisedByMagnitudes(Fault, breaks="R20.1"):
    """Weights are divided by the sum of their magnitudes."""

    def merge(self, cards, strategy, options, weights, rank):
        if strategy == "weighted" and options.get("normalize") and weights is not None:
            super().merge(cards, strategy, options, weights, rank)  # refuses what it must
            weights = [weight / sum(map(abs, weights)) for weight in weights]
            options = {"normalize": False}
        return super().merge(cards, strategy, options, weights, rank)


class AlwaysElectedByMass(Fault, breaks="R20.1", also="R20.6"):
    """The way to elect signs is accepted and ignored."""

    def merge(self, cards, strategy, options, weights, rank):
        ignored = {"elect": "mass"} if strategy == "ties" else {}
        return super().merge(cards, strategy, options | ignored, weights, rank)


class UnknownStrategiesAverage(Fault, breaks="R20.1"):
    """A misspelt strategy is taken for the default."""

    def merge(self, cards, strategy, options, weights, rank):
        try:
            return super().merge(cards, strategy, options, weights, rank)
        except KeyError:
            return super().merge(cards, "average", {}, None, rank)


class SeedRunsOn(Fault, breaks="R20.1", also="R20.2 R20.3 R20.7 R20.9"):
    """The generator goes on where the last merge left it."""

    def __init__(self):
        self.merges = 0

    def merge(self, cards, strategy, options, weights, rank):
        self.merges += 1
        moved = {"seed": options.get("seed", 0) + self.merges} if strategy == "dare" else {}
        return super().merge(cards, strategy, options | moved, weights, rank)


class FactorsMergedApart(Fault, breaks="R20.2", also="R20.3 R20.4 R20.9"):
    """An average of As times an average of Bs, narrower ones filled with zeros: cross terms."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        if strategy != "average":
            return merged
        rows = dict(merged.weights)
        for module, pair in merged.weights.items():
            pairs = [card.weights.get(module) for card in cards]
            if None not in pairs and len(pairs) > 1:
                wide = max(p.A.shape[1] for p in pairs)
                a = np.zeros((len(pair.A), wide))
                b = np.zeros((wide, pair.B.shape[1]))
                for p in pairs:
                    a[:, : p.A.shape[1]] += p.A.astype("f8") / len(pairs)
                    b[: p.A.shape[1]] += p.B.astype("f8") * p.scaling / len(pairs)
                rows[module] = PlainPair(a.astype(pair.A.dtype), b.astype(pair.A.dtype), 1.0)
        return with_rows(merged, rows)


class LargestColumnsKept(Fault, breaks="R20.2", also="R20.6"):
    """A is trimmed as TIES trims ΔW: its smaller entries are set to 0, whatever B holds."""

    def merge(self, cards, strategy, options, weights, rank):
        if strategy == "ties" and options.get("density", 0.5) < 1:
            cards = [
                card._replace(weights={m: self.trimmed(p) for m, p in card.weights.items()})
                for card in cards
            ]
        return super().merge(cards, strategy, options, weights, rank)

    @staticmethod
    def trimmed(pair):
        size = abs(pair.A.astype("f8"))
        return pair._replace(A=np.where(size >= np.median(size), pair.A, np.zeros_like(pair.A)))


class AverageIsTheSum(Fault, breaks="R20.3", also="R20.4 R20.9"):
    """The average is not divided by the number of cards."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        return times(merged, len(cards)) if strategy == "average" else merged


class AddedToAFreshOne(Fault, breaks="R20.3", also="R20.1 R20.4 R20.6 R20.7 R20.8"):
    """Each card is added onto a start that already holds it: one card comes out twice."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        return times(merged, 2.0) if len(cards) == 1 else merged


class ScalingIgnored(Fault, breaks="R20.3", also="R20.1 R20.2 R20.4 R20.5 R20.6 R20.7 R20.8 R20.9"):
    """The product A @ B is merged without its scaling."""

    def merge(self, cards, strategy, options, weights, rank):
        bare = []
        for card in cards:
            rows = {m: p._replace(scaling=1.0) for m, p in card.weights.items()}
            bare.append(card._replace(weights=rows))
        return super().merge(bare, strategy, options, weights, rank)


class WeightsByName(Fault, breaks="R20.3", also="R20.1 R20.4 R20.6 R20.7 R20.8"):
    """Cards are sorted by name, weights are not."""

    def merge(self, cards, strategy, options, weights, rank):
        if weights is not None and len(cards) > 1:
            cards = sorted(cards, key=lambda card: card.name)
        return super().merge(cards, strategy, options, weights, rank)


class OneColumnUnlessARankIsAskedFor(Fault, breaks="R20.4", also="R20.1 R20.3 R20.8 R20.9"):
    """A linear merge is cut to rank 1 where none is given."""

    def merge(self, cards, strategy, options, weights, rank):
        if rank is None and strategy in {"average", "weighted", "task_arithmetic"}:
            rank = 1
        return super().merge(cards, strategy, options, weights, rank)


class FirstColumnsKept(Fault, breaks="R20.4", also="R20.1"):
    """A truncated merge keeps the first columns of the stacked factors."""

    def merge(self, cards, strategy, options, weights, rank):
        if rank is None or strategy not in {"average", "weighted", "task_arithmetic"}:
            return super().merge(cards, strategy, options, weights, rank)
        whole = super().merge(cards, strategy, options, weights, None)
        rows = {}
        for module, pair in whole.weights.items():
            last = np.argsort(-np.linalg.norm(pair.A.astype("f8"), axis=0))[::-1][:rank]
            rows[module] = PlainPair(pair.A[:, last], pair.B[last], pair.scaling)
        return with_rows(whole, rows)


class SmallDirectionsDropped(Fault, breaks="R20.4", also="R20.1 R20.6 R20.7"):
    """Directions below a thousandth of the largest are taken for noise."""

    def merge(self, cards, *how):
        merged = super().merge(cards, *how)
        rows = {}
        for module, pair in merged.weights.items():
            values = np.linalg.svd(change(pair), compute_uv=False)
            kept = max(1, int((values > values[0] / 1000).sum()))
            cut = kept < pair.A.shape[1]
            rows[module] = factors(change(pair), kept, pair.A.dtype) if cut else pair
        return with_rows(merged, rows)


class SlerpIsLinear(Fault, breaks="R20.5"):
    """SLERP is plain interpolation."""

    def merge(self, cards, strategy, options, weights, rank):
        if strategy == "slerp":
            super().merge(cards, strategy, options, weights, rank)  # what it refuses is refused
            t = options.get("t", 0.5)
            return super().merge(cards, "weighted", {}, [1 - t, t], rank)
        return super().merge(cards, strategy, options, weights, rank)


class SlerpOfTheLengthsAsTheyAre(Fault, breaks="R20.5"):
    """Directions are not brought to length 1, so cards of different length turn unevenly."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        if strategy != "slerp":
            return merged
        parts = [(changes(cards, module)) for module in modules(cards)]
        x, y = (np.concatenate([part[side].ravel() for part in parts]) for side in (0, 1))
        angle = np.arccos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))
        if angle < 1e-6:
            return merged
        t = options.get("t", 0.5)
        shares = [np.sin(p * angle) / np.sin(angle) for p in (1 - t, t)]
        return super().merge(cards, "weighted", {}, shares, rank)


class SlerpOfSmallAnglesIsLinear(Fault, breaks="R20.5"):
    """Cards within 10° of each other are interpolated linearly."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        if strategy != "slerp":
            return merged
        parts = [changes(cards, module) for module in modules(cards)]
        x, y = (np.concatenate([part[side].ravel() for part in parts]) for side in (0, 1))
        if x @ y < np.cos(np.pi / 18) * np.linalg.norm(x) * np.linalg.norm(y):
            return merged
        t = options.get("t", 0.5)
        return super().merge(cards, "weighted", {}, [1 - t, t], rank)


class SlerpFromTheWrongEnd(Fault, breaks="R20.5"):
    """At t = 0 stands the second card."""

    def merge(self, cards, strategy, options, weights, rank):
        cards = cards[::-1] if strategy == "slerp" else cards
        return super().merge(cards, strategy, options, weights, rank)


class SlerpOfOppositesIsLinear(Fault, breaks="R20.5"):
    """Where there is no shortest arc, some other card is returned."""

    def merge(self, cards, strategy, options, weights, rank):
        try:
            return super().merge(cards, strategy, options, weights, rank)
        except ValueError:
            if strategy != "slerp" or len(cards) != 2 or not 0 <= options.get("t", 0.5) <= 1:
                raise
            return super().merge(cards, "average", {}, None, rank)


class _Ties(Fault):
    """TIES in parts that can be got wrong one by one."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        if strategy != "ties":
            return merged
        rows = {}
        for module in modules(cards):
            shares = weights or [1.0] * len(cards)
            trimmed = self.trim(changes(cards, module), options.get("density", 0.5))
            parts = np.array([part * weight for part, weight in zip(trimmed, shares, strict=True)])
            votes = parts if options.get("elect", "mass") == "mass" else np.sign(parts)
            sign = self.elect(votes, trimmed)
            agrees = (np.sign(parts) == sign) & (sign != 0)
            share = self.share(agrees, np.array(shares))
            whole = (parts * agrees).sum(0) / np.where(share > 0, share, 1)
            limit = rank or max(c.weights[module].A.shape[1] for c in cards if module in c.weights)
            rows[module] = factors(whole, limit, promoted(cards))
        return with_rows(merged, rows)

    def trim(self, parts, density):
        return [self.largest(part.ravel(), density).reshape(part.shape) for part in parts]

    def largest(self, part, density):
        order = np.argsort(-abs(part), kind="stable")[: max(1, round(density * part.size))]
        return np.where(np.isin(np.arange(part.size), order), part, 0.0)

    def elect(self, votes, trimmed):
        return np.sign(votes.sum(0))

    def share(self, agrees, weights):
        return (agrees * abs(weights)[:, None, None]).sum(0)


class TiesDividesByTheNumberOfCards(_Ties, breaks="R20.6", also="R20.1"):
    """The mean is over all cards, not over those that agree."""

    def share(self, agrees, weights):
        return (np.ones_like(agrees) * abs(weights)[:, None, None]).sum(0)


class TiesDividesByCount(_Ties, breaks="R20.6", also="R20.3"):
    """The mean counts the cards that agree and forgets their weights."""

    def share(self, agrees, weights):
        return agrees.sum(0)


class SignsElectedBeforeWeights(_Ties, breaks="R20.6", also="R20.1"):
    """The election does not know the weights."""

    def elect(self, votes, trimmed):
        return np.sign(np.sum(trimmed, axis=0))


class ZeroSumElectsPlus(_Ties, breaks="R20.6"):
    """Where signs balance, the positive ones win."""

    def elect(self, votes, trimmed):
        return np.where(votes.sum(0) >= 0, 1.0, -1.0)


class TrimmedAcrossCards(_Ties, breaks="R20.6"):
    """One threshold for all cards: a small card is trimmed away.

    All entries of the threshold's size are kept, so that the order of the cards changes nothing.
    """

    def trim(self, parts, density):
        sizes = np.sort(abs(np.concatenate([part.ravel() for part in parts])))
        least = sizes[-max(1, round(density * sizes.size))]
        return [np.where(abs(part) >= least, part, 0.0) for part in parts]


class TrimmedByThreshold(_Ties, breaks="R20.6"):
    """Every entry as large as the smallest that is kept is kept too."""

    def largest(self, part, density):
        least = np.sort(abs(part))[::-1][max(1, round(density * part.size)) - 1]
        return np.where(abs(part) >= least, part, 0.0)


class LastOfEqualsKept(_Ties, breaks="R20.6"):
    """Of entries of one magnitude the last ones are kept."""

    def largest(self, part, density):
        return super().largest(part[::-1], density)[::-1]


class CountRoundedDown(_Ties, breaks="R20.6"):
    """The share is cut to a whole number of entries, which may be none."""

    def largest(self, part, density):
        order = np.argsort(-abs(part), kind="stable")[: int(density * part.size)]
        return np.where(np.isin(np.arange(part.size), order), part, 0.0)


class DensityIsTheShareDropped(Fault, breaks="R20.7"):
    """DARE's density is its paper's drop rate."""

    def merge(self, cards, strategy, options, weights, rank):
        density = options.get("density", 0.5)
        other = {"density": 1 - density} if strategy == "dare" and 0 < density < 1 else {}
        return super().merge(cards, strategy, options | other, weights, rank)


class DareNotRescaled(Fault, breaks="R20.7"):
    """What is kept is kept as it is, so the merge is too small."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        return times(merged, options.get("density", 0.5)) if strategy == "dare" else merged


class DareMasksByPosition(Fault, breaks="R20.7", also="R20.3"):
    """A mask belongs to a place in the list, not to a card."""

    def merge(self, cards, strategy, options, weights, rank):
        if strategy == "dare":
            super().merge(cards, strategy, options, weights, rank)
            cards = [card._replace(name=f"card {place}") for place, card in enumerate(cards)]
        return super().merge(cards, strategy, options, weights, rank)


class DareMasksAllModulesAlike(Fault, breaks="R20.7"):
    """One mask serves every module of a shape."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        if strategy != "dare":
            return merged
        rows = {}
        for module in merged.weights:
            alike, used = [], None if weights is None else []
            for place, card in enumerate(cards):
                if pair := card.weights.get(module):
                    weights_alone = {self.known_as(module): pair}
                    alike.append(card._replace(weights=weights_alone, rank=pair.A.shape[1]))
                    if weights is not None:
                        used.append(weights[place])
            alone = super().merge(alike, strategy, options, used, rank)
            dtype = merged.weights[module].A.dtype
            pair = alone.weights.get(self.known_as(module), merged.weights[module])
            rows[module] = PlainPair(pair.A.astype(dtype), pair.B.astype(dtype), pair.scaling)
        return with_rows(merged, rows)

    def known_as(self, module):
        return "m"


class DareMasksByLastComponent(DareMasksAllModulesAlike, breaks="R20.7"):
    """Modules whose names end alike share a mask."""

    def known_as(self, module):
        return module.rpartition(".")[2]


class DareSeedOf16Bits(Fault, breaks="R20.7"):
    """The seed is taken modulo 2**16."""

    def merge(self, cards, strategy, options, weights, rank):
        seed = {"seed": self.narrowed(options["seed"])} if "seed" in options else {}
        return super().merge(cards, strategy, {**options, **seed}, weights, rank)

    def narrowed(self, seed):
        return seed % 2**16


class DareSeedOfADouble(DareSeedOf16Bits, breaks="R20.7"):
    """The seed passes through float64, which has no odd integers beyond 2**53."""

    def narrowed(self, seed):
        return int(float(seed))


class DareNamesRunTogether(Fault, breaks="R20.7"):
    """A mask is keyed by the names of module and card with nothing between them."""

    def merge(self, cards, strategy, options, weights, rank):
        if strategy != "dare" or len(cards) != 1:
            return super().merge(cards, strategy, options, weights, rank)
        (card,) = cards
        rows = {f"{module}{card.name}": pair for module, pair in card.weights.items()}
        joined = card._replace(name="joined", weights=rows)
        merged = super().merge([joined], strategy, options, weights, rank)
        parts = {m.removesuffix(card.name): pair for m, pair in merged.weights.items()}
        return merged._replace(weights=parts)


class NegativeWeightsClipped(Fault, breaks="R20.8"):
    """A weight below 0 counts as 0."""

    def merge(self, cards, strategy, options, weights, rank):
        if strategy == "task_arithmetic" and weights is not None:
            weights = [max(weight, 0.0) for weight in weights]
        return super().merge(cards, strategy, options, weights, rank)


class TaskArithmeticNormalised(Fault, breaks="R20.8", also="R20.3 R20.4 R20.9"):
    """Weights are divided by their sum, which for 1 and -1 is 0."""

    def merge(self, cards, strategy, options, weights, rank):
        if strategy == "task_arithmetic":
            return super().merge(cards, "weighted", {"normalize": True}, weights, rank)
        return super().merge(cards, strategy, options, weights, rank)


class OnlyModulesOfTheFirstCard(Fault, breaks="R20.9", also="R20.3 R20.4 R20.5 R20.6 R20.7 R20.8"):
    """What the first card lacks is left out."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        rows = {m: pair for m, pair in merged.weights.items() if m in cards[0].weights}
        return with_rows(merged, rows)


class AveragedOverThoseThatHaveIt(Fault, breaks="R20.9", also="R20.4"):
    """A module that a card lacks does not count as 0."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        if strategy != "average":
            return merged
        rows = {}
        for module, pair in merged.weights.items():
            share = sum(module in card.weights for card in cards) / len(cards)
            rows[module] = pair._replace(scaling=pair.scaling / share)
        return merged._replace(weights=rows)


class DtypeOfTheFirstCard(Fault, breaks="R20.9", also="R20.3"):
    """The merged card has the first card's dtype, whatever the others hold."""

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        dtype = next((pair.A.dtype for card in cards for pair in card.weights.values()), None)
        rows = {
            module: PlainPair(pair.A.astype(dtype), pair.B.astype(dtype), pair.scaling)
            for module, pair in merged.weights.items()
        }
        return merged._replace(weights=rows)


class HalfHoldsBfloat16(Fault, breaks="R20.9"):
    """float16 and bfloat16 are promoted to float16."""

    def merge(self, cards, *how):
        merged = super().merge(cards, *how)
        names = {pair.A.dtype.name for card in cards for pair in card.weights.values()}
        if names != {"float16", "bfloat16"}:
            return merged
        rows = {
            module: pair._replace(A=pair.A.astype("f2"), B=pair.B.astype("f2"))
            for module, pair in merged.weights.items()
        }
        return merged._replace(weights=rows)


class OneRankForAll(Fault, breaks="R20.9", also="R20.1 R20.2 R20.3 R20.4 R20.5 R20.6 R20.7 R20.8"):
    """Cards of another rank than the first's are refused."""

    def merge(self, cards, strategy, options, weights, rank):
        if len({card.rank for card in cards}) > 1:
            raise ValueError([card.rank for card in cards])
        return super().merge(cards, strategy, options, weights, rank)


class TargetsOfTheFirstCard(Fault, breaks="R20.9"):
    """The merged card targets what the first card targets, so the others' modules are never
    adapted.
    """

    def merge(self, cards, strategy, options, weights, rank):
        merged = super().merge(cards, strategy, options, weights, rank)
        return merged._replace(target_modules=cards[0].target_modules)


MERGING_FAULTS = faults_in(globals())
