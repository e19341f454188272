"""Routing over a thousand and a hundred thousand exemplars, beside the one matrix-vector product
that it can't do without.

    OMP_NUM_THREADS=2 python benchmarks/routing.py [--quick] [--json FILE]

Embeddings are random unit vectors of width 384. Ours gives float64 scores of the three best cards
that reach a threshold, each by its nearest exemplar; the peer is ``rows @ query`` alone, as NumPy's
BLAS does it.
"""

from collections.abc import Iterable, Iterator
from types import MappingProxyType

import numpy as np
from pairs import Row, figure_row, median_with_interval, ratio_row, rounds, run

import lora
from lora.models.adapt import init_card
from lora.routing import Index, candidate_of, select, unit

WIDTH = 384


def scoring(*, quick: bool) -> Iterator[Row]:
    """Cards with one exemplar each, and with a hundred."""
    rng = np.random.default_rng(0)
    for cards, each in ((1000, 1),) if quick else ((1000, 1), (1000, 100), (100_000, 1)):
        rows = rng.standard_normal((cards * each, WIDTH))
        candidates = {
            f"card-{i:06}": candidate_of(f"card-{i:06}", rows[i * each : (i + 1) * each])
            for i in range(cards)
        }
        index = Index(MappingProxyType(candidates))
        matrix, query = index.rows, unit(rng.standard_normal((1, WIDTH)))[0]
        select(query, index, top_k=3)
        sides = {
            "select": lambda index=index, query=query: select(query, index, top_k=3, threshold=0.1)
        }
        sides["rows @ query"] = lambda matrix=matrix, query=query: matrix @ query
        times = rounds(sides, 5 if quick else 40)
        what = f"route over {cards * each:,} exemplars of {cards:,} cards"
        yield ratio_row("routing", what, times, "select", "rows @ query", target=1.5, ids=["R6.8"])


def intent(*, quick: bool) -> Iterator[Row]:
    """What ``intent_query=`` adds to a call that names its card."""
    engine = lora.ArrowEngine.from_pretrained()
    for name in ("docs", "law", "music"):
        card = init_card(
            engine.base, name, rank=8, alpha=16.0, target_modules=["query", "value"], seed=0
        )
        engine.register_lora(card, f"questions about {name}")
    texts = [f"a sentence about the {i}th question of law, read twice" for i in range(32)]
    sides = {
        "named": lambda: engine.encode_with_lora(texts, "law"),
        "by intent_query": lambda: engine.encode_with_lora(
            texts, intent_query="questions about law"
        ),
        "the query alone": lambda: engine.encode(["questions about law"]),
    }
    times = rounds(sides, 5 if quick else 30)
    what = "encode 32 sentences with the card that fits"
    yield ratio_row("routing", what, times, "by intent_query", "named", overhead=True, ids=["R6.8"])
    middle, low, high = median_with_interval([1e3 * s for s in times["the query alone"]])
    yield figure_row(
        "routing", "of which: to embed the query", middle, "ms", interval=[low, high], ids=["R6.8"]
    )


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    return (part(quick=quick) for part in (scoring, intent))


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
