"""What an engine, its parts and adapted layers say of themselves, in one line."""

import numpy as np
from torch import nn

import lora
from lora.models.adapt import adapt_rows
from lora.models.layers import TrainableLinear
from lora.models.manager import LoRAManager
from lora.router import LoRARouter
from tests.unit.letters import engine

QUERY = "encoder.layer.0.attention.self.query"


def card_of(name, module=QUERY, size=32, rank=2):
    pair = lora.LowRank(np.ones((size, rank), "f4"), np.ones((rank, size), "f4"))
    return lora.LoRACard(name, rank, 2.0, [module], {module: pair})


def test_an_engine_says_its_base_the_active_and_the_known_cards_and_the_threshold():
    serving = engine()
    start = "ArrowEngine(base='InferenceCore', active=AdapterSet("
    assert repr(serving) == f"{start}), known=[none], threshold=None)"
    serving.manager.apply_card(card_of("docs"), weight=0.5)
    serving.manager.add_card(card_of("law"))
    serving.threshold = 0.3
    known = "known=['docs', 'law']"
    assert repr(serving) == f"{start}'docs': 0.5), {known}, threshold=0.3)"
    parts = "base='InferenceCore', active=AdapterSet('docs': 0.5)"
    assert repr(serving.manager) == f"LoRAManager({parts}, {known})"
    named = lora.ArrowEngine(serving.base, base_model="models/tiny")
    assert repr(named).startswith("ArrowEngine(base='models/tiny', ")


def test_a_manager_of_many_cards_stays_short():
    manager = LoRAManager(nn.Sequential(nn.Linear(4, 4)))
    for number in range(99):
        manager.add_card(card_of(f"card-{number:02}", "0", 4))
    assert "'card-09' and 89 more" in repr(manager)
    assert len(repr(manager)) < 300


def test_a_router_says_its_candidates():
    router = LoRARouter(lambda texts: np.ones((len(texts), 2)))
    assert repr(router) == "LoRARouter([none])"
    router.register_virtual_candidate("docs", "how to open files")
    assert repr(router) == "LoRARouter(['docs'])"


def test_an_adapted_layer_says_its_shape_and_its_cards():
    model = nn.Sequential(nn.Linear(4, 4))
    cards = {"docs": (card_of("docs", "0", 4), 0.5), "law": (card_of("law", "0", 4, 3), 1.0)}
    layer = lora.adapt(model, lora.AdapterSet(cards))[0]
    assert repr(layer) == "LoRALinear(4 -> 4, 'docs': rank 2 x 0.5, 'law': rank 3 x 1)"
    pair = card_of("docs", "0", 4).weights["0"]
    assert repr(TrainableLinear(model[0], pair)) == "TrainableLinear(4 -> 4, rank 2, in training)"
    sets = [lora.AdapterSet(cards), lora.AdapterSet()]
    rows = adapt_rows(model, sets, probe=False)
    assert repr(rows[0]) == "RowLinear(4 -> 4, 2 sets of adapters)"
    assert repr(nn.Sequential(layer)).count("\n") == 2
