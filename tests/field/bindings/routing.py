"""What the bindings of routing libraries share: the specification's conventions, put on around."""

EVERYTHING = 10**6
LENGTHS = {"make_router": {"lengths": [1e-12, 1e150]}}
"""Vectors whose squares neither vanish nor overflow, as a plain dot product needs them."""


class Conventional:
    """A router with six decimals and ties by name, compared with the threshold when rounded."""

    def __init__(self, router):
        self.router = router
        self.register, self.unregister = router.register, router.unregister

    def select(self, query, top_k, threshold):
        """The library's routes, rounded, ordered and cut."""
        routes = self.router.select(query, EVERYTHING, None)
        rounded = [(name, round(score, 6) + 0.0) for name, score in routes]
        ordered = sorted(rounded, key=lambda route: (-route[1], route[0]))
        return [route for route in ordered if threshold is None or route[1] >= threshold][:top_k]

    def select_many(self, queries, top_k, threshold):
        """Each query by itself."""
        return [self.select(query, top_k, threshold) for query in queries]
