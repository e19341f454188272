"""Faults in routing: a plain register of vectors, with one mistake in each subclass."""

import numpy as np

from tests.faults.base import Fault, faults_in


class RouterFault(Fault):
    """The reference, and a router that it makes; what the faults below override, they get wrong."""

    def __init__(self, embed=None):
        self.embed, self.vectors, self.virtual, self.known = embed, {}, set(), {}

    def make_router(self, embed):
        return type(self)(embed)

    def register(self, name, texts, *, virtual=False):
        self.unregister(name)
        self.vectors[name] = [self.unit(row) for row in self.embedded(texts)]
        if virtual:
            self.virtual.add(name)

    def unregister(self, name):
        self.vectors.pop(name, None)
        self.virtual.discard(name)

    def embedded(self, texts):
        return np.asarray(self.embed(list(texts)), float)

    def unit(self, row):
        largest = np.abs(row).max(initial=0.0)
        scaled = np.ldexp(row, -int(np.frexp(largest)[1]))
        return scaled / np.linalg.norm(scaled) if largest else scaled

    def similarity(self, vectors, query):
        return max((vector * query).sum() for vector in vectors)

    def rounded(self, score):
        return float(np.round(np.clip(score, -1, 1), 6)) + 0.0

    def asked(self, query):
        return self.unit(self.embedded([query])[0])

    def reached(self, score, threshold):
        return threshold is None or score >= threshold

    def order(self, route):
        return -route[1], route[0]

    def select(self, query, top_k, threshold):
        asked, routes = self.asked(query), []
        for name, vectors in self.vectors.items():
            score = self.rounded(self.similarity(vectors, asked))
            if self.reached(score, threshold):
                routes.append((name, score))
        return sorted(routes, key=self.order)[:top_k]

    def select_many(self, queries, top_k, threshold):
        return [self.select(query, top_k, threshold) for query in queries]


class NotNormalised(RouterFault, breaks="R4.8", also="R4.4 R4.5 R4.9"):
    """Scores are inner products."""

    def unit(self, row):
        return row

    def rounded(self, score):
        return float(score)


class ZeroIsNearestToAll(RouterFault, breaks="R4.8", also="R4.1 R4.4"):
    """A zero vector is divided by its length, and what is not a number compares as the best."""

    def unit(self, row):
        return super().unit(row) if row.any() else np.full_like(row, np.nan)

    def rounded(self, score):
        return 1.0 if np.isnan(score) else super().rounded(score)


class SmallLengthsAreZero(RouterFault, breaks="R4.8", also="R4.9"):
    """A vector shorter than 1e-12 counts as zero, lest its length be divided by."""

    def unit(self, row):
        return super().unit(row) if np.linalg.norm(row) >= 1e-12 else np.zeros_like(row)


class CentroidOfExamples(RouterFault, breaks="R4.1", also="R4.4"):
    """A card is the mean of its examples."""

    def similarity(self, vectors, query):
        return (self.unit(np.mean(vectors, axis=0)) * query).sum()


class EightExamplesAtMost(RouterFault, breaks="R4.1"):
    """The ninth example of a card is not looked at, nor any after it."""

    def similarity(self, vectors, query):
        return super().similarity(vectors[:8], query)


class DescriptionsEmbeddedWhenAsked(RouterFault, breaks="R4.2"):
    """Candidates keep their texts, and embed them anew for each query."""

    def register(self, name, texts, *, virtual=False):
        self.unregister(name)
        self.vectors[name] = texts

    def similarity(self, texts, query):
        return super().similarity([self.unit(row) for row in self.embedded(texts)], query)


class TiesByRegistration(RouterFault, breaks="R4.9", also="R4.8"):
    """Equal scores keep the order in which cards were registered."""

    def order(self, route):
        return -route[1]


class TiesByNameReversed(RouterFault, breaks="R4.9", also="R4.8"):
    """Equal scores are ordered by name, the wrong way."""

    def select(self, query, top_k, threshold):
        routes = super().select(query, len(self.vectors), threshold)
        return sorted(routes, reverse=True, key=lambda r: (r[1], r[0]))[:top_k]


class WorstFirst(RouterFault, breaks="R4.6", also="R4.9"):
    """The lowest score comes first."""

    def order(self, route):
        return route[1], route[0]


class ThresholdExclusive(RouterFault, breaks="R4.5", also="R4.6 R4.8"):
    """A card at the threshold is left out."""

    def reached(self, score, threshold):
        return threshold is None or score > threshold


class NoThreshold(RouterFault, breaks="R4.5", also="R4.6"):
    """Something is always chosen."""

    def reached(self, score, threshold):
        return True


class OneTooMany(RouterFault, breaks="R4.4"):
    """Returns one more than asked for."""

    def select(self, query, top_k, threshold):
        return super().select(query, top_k + 1, threshold)


class VirtualLeftOut(RouterFault, breaks="R4.7", also="R4.12"):
    """Cards whose weights are elsewhere are not found."""

    def select(self, query, top_k, threshold):
        routes = super().select(query, len(self.vectors), threshold)
        return [route for route in routes if route[0] not in self.virtual][:top_k]


class FirstQueryForAll(RouterFault, breaks="R4.10"):
    """Every query of a batch gets the first one's routes."""

    def select_many(self, queries, top_k, threshold):
        return [self.select(queries[0], top_k, threshold) for _ in queries]


class BatchOf64(RouterFault, breaks="R4.10"):
    """Queries beyond a batch get no routes."""

    def select_many(self, queries, top_k, threshold):
        routes = super().select_many(queries[:64], top_k, threshold)
        return [*routes, *([] for _ in queries[64:])]


class UnregisteredByPrefix(RouterFault, breaks="R4.12"):
    """What begins with the name is unregistered too."""

    def unregister(self, name):
        for other in [known for known in self.vectors if known.startswith(name)]:
            super().unregister(other)

    def register(self, name, texts, *, virtual=False):
        RouterFault.unregister(self, name)
        self.vectors[name] = [self.unit(row) for row in self.embedded(texts)]
        if virtual:
            self.virtual.add(name)


class RegisteredTwice(RouterFault, breaks="R4.12"):
    """A card registered again is found twice."""

    def __init__(self, embed=None):
        super().__init__(embed)
        self.times = {}

    def register(self, name, texts, *, virtual=False):
        times = self.times.get(name, 0)
        super().register(name, texts, virtual=virtual)
        self.times[name] = times + 1

    def unregister(self, name):
        super().unregister(name)
        self.times.pop(name, None)

    def select(self, query, top_k, threshold):
        routes = super().select(query, top_k, threshold)
        return [route for route in routes for _ in range(self.times[route[0]])][:top_k]


class UnregisteredStays(RouterFault, breaks="R4.12"):
    """Unregistering does nothing."""

    def unregister(self, name):
        pass

    def register(self, name, texts, *, virtual=False):
        RouterFault.unregister(self, name)
        super().register(name, texts, virtual=virtual)


class UnregisteringTwiceFails(RouterFault, breaks="R4.12"):
    """Unregistering what is not there raises."""

    def unregister(self, name):
        del self.vectors[name]

    def register(self, name, texts, *, virtual=False):
        if name in self.vectors:
            self.unregister(name)
        self.vectors[name] = [self.unit(row) for row in self.embedded(texts)]


class QueriesSortedByLength(RouterFault, breaks="R4.10"):
    """Queries are embedded in the order of their length and put back by the same order again."""

    def select_many(self, queries, top_k, threshold):
        order = sorted(range(len(queries)), key=lambda row: len(queries[row]))
        routes = super().select_many([queries[row] for row in order], top_k, threshold)
        return [routes[row] for row in order]


class RoundedTooCoarsely(RouterFault, breaks="R4.4"):
    """Scores are rounded to 1e-4."""

    def rounded(self, score):
        return float(np.round(np.clip(score, -1, 1), 4)) + 0.0


class QueriesRemembered(RouterFault, breaks="R4.3"):
    """A query is embedded the first time that it is asked."""

    def asked(self, query):
        return self.known.setdefault(query, super().asked(query))


class QueryTurnedRound(RouterFault, breaks="R4.4", also="R4.9"):
    """The query's embedding changes its sign."""

    def similarity(self, vectors, query):
        return super().similarity(vectors, -query)


ROUTING_FAULTS = faults_in(globals())
