"""semantic-router's IndexedRouter, a route for each candidate, with the best of its utterances."""

from importlib.metadata import version
from typing import ClassVar

import numpy as np
from declared import failures
from routing import EVERYTHING, LENGTHS, Conventional
from semantic_router import IndexedRouter, Route
from semantic_router.encoders import DenseEncoder
from torched import all_but

FAILURES = failures(
    "test_r04_router.py",
    (
        "routes of one score stand in the order in which the index finds their utterances",
        "routers/base.py:124",
        """
        R4.9 candidates_that_mean_the_same_tie_wherever_the_score_falls_and_are_ordered_by_name
        R4.9 the_order_of_registration_changes_nothing
        """,
    ),
    (
        "scores are not rounded",
        "routers/base.py:127",
        "R4.9 scores_have_six_decimals_and_equal_ones_are_ordered_by_name",
    ),
)


class Encoder(DenseEncoder):
    """The embedding function of the suite."""

    embed: object = None

    def __call__(self, docs):
        return np.asarray(self.embed(list(docs)), float).tolist()


class Router:
    """The library's register and its routes."""

    def __init__(self, embed):
        encoder = Encoder(name="embed", embed=embed)
        self.router = IndexedRouter(encoder, aggregation="max", top_k=EVERYTHING)

    def register(self, name, texts, *, virtual=False):
        self.router.remove(name)
        self.router.add(Route(name=name, utterances=list(texts)))

    def unregister(self, name):
        self.router.remove(name)

    def select(self, query, top_k, threshold):
        if not len(self.router.index):
            self.router.encoder([query])
            return []
        choices = self.router(query, limit=None, threshold=threshold)
        return [(choice.name, choice.confidence) for choice in choices[:top_k]]

    def select_many(self, queries, top_k, threshold):
        return [self.select(query, top_k, threshold) for query in queries]


class SemanticRouter:
    """Scores and order as the library gives them; without a length a score is NaN, linear.py:18."""

    name, version = "semantic-router", version("semantic-router")
    missing = all_but("make_router", "a router only")
    domains, expected_failures = LENGTHS, FAILURES

    def make_router(self, embed):
        return Router(embed)


class WithConventions(SemanticRouter):
    """The same with the specification's decimals and ties."""

    name = "semantic-router, with conventions"
    expected_failures: ClassVar = {}

    def make_router(self, embed):
        return Conventional(Router(embed))


BINDING, CONVENTIONS = SemanticRouter(), WithConventions()
