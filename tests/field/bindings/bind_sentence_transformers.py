"""sentence-transformers' `util.semantic_search` over all texts, the best of each candidate."""

from importlib.metadata import version

import numpy as np
import torch
from declared import failures
from routing import LENGTHS, Conventional
from sentence_transformers.util import semantic_search
from torched import all_but

FAILURES = failures(
    "test_r04_router.py",
    (
        "candidates of one score stand in the order in which torch.topk finds them",
        "util/retrieval.py:241",
        """
        R4.1 the_order_and_repetition_of_a_candidates_examples_change_nothing
        R4.8 a_zero_vector_scores_zero_on_either_side
        R4.9 candidates_that_mean_the_same_tie_wherever_the_score_falls_and_are_ordered_by_name
        R4.9 the_order_of_registration_changes_nothing
        """,
    ),
    (
        "vectors shorter than 1e-12 are divided by 1e-12",
        "util/tensor.py:131",
        """
        R4.8 scaling_by_powers_of_two_changes_no_bit
        R4.9 a_cosine_that_is_a_short_decimal_is_scored_as_that_decimal
        """,
    ),
    (
        "scores are not rounded, and a product of many rows differs in the last digits from one",
        "util/retrieval.py:236",
        """
        R4.9 scores_have_six_decimals_and_equal_ones_are_ordered_by_name
        R4.10 many_queries_are_routed_as_each_alone
        """,
    ),
)


class Router:
    """A register in Python, ranked by the library."""

    def __init__(self, embed):
        self.embed, self.rows = embed, {}

    def vectors(self, texts):
        return torch.tensor(np.asarray(self.embed(list(texts)), float))

    def register(self, name, texts, *, virtual=False):
        self.rows[name] = self.vectors(texts)

    def unregister(self, name):
        self.rows.pop(name, None)

    def select_many(self, queries, top_k, threshold):
        """The first hit of each candidate, best first."""
        asked = self.vectors(queries) if queries else []
        if not self.rows or not queries:
            return [[] for _ in queries]
        owners = [name for name, rows in self.rows.items() for _ in rows]
        everything = torch.cat(list(self.rows.values()))
        answers = []
        for hits in semantic_search(asked, everything, top_k=len(owners)):
            best = {}
            for hit in hits:
                best.setdefault(owners[hit["corpus_id"]], hit["score"])
            routes = [route for route in best.items() if threshold is None or route[1] >= threshold]
            answers.append(routes[:top_k])
        return answers

    def select(self, query, top_k, threshold):
        return self.select_many([query], top_k, threshold)[0]


class SentenceTransformers:
    """Scores and order as the library gives them."""

    name, version = "sentence-transformers", version("sentence-transformers")
    missing = all_but("make_router", "used as a router only")
    expected_failures = FAILURES

    def make_router(self, embed):
        return Router(embed)


class WithConventions(SentenceTransformers):
    """The same with the specification's decimals and ties."""

    name = "sentence-transformers, with conventions"
    domains, expected_failures = LENGTHS, {}

    def make_router(self, embed):
        return Conventional(Router(embed))


BINDING, CONVENTIONS = SentenceTransformers(), WithConventions()
