"""Adapted, rowwise and trainable layers: dropout, refusals, what each keeps and drops."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lora.card import AdapterSet, LoRACard, LowRank
from lora.errors import ArgumentError, ShapeError, UnsupportedModelError
from lora.models import layers as layer_module
from lora.models.adapt import adapt, fold, trainable
from lora.models.layers import LoRALinear, TrainableLinear
from lora.models.rows import RowLinear, rows
from lora.testing.plugin import requirement

PAIR = LowRank(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32), 0.5)
OTHER = LowRank(np.full((4, 1), 2, np.float32), np.ones((1, 3), np.float32), 1.0)
WRONG = LowRank(np.ones((4, 2), np.float32), np.ones((2, 5), np.float32), 0.5)
# Reading the state dict of an adapted model warns, which is tested on its own.
pytestmark = pytest.mark.filterwarnings("ignore:a state dict")

MAKERS = {
    "adapted": lambda base: LoRALinear(base, {"docs": (PAIR, 1.0)}),
    "rowwise": lambda base: RowLinear(base, [{"docs": (PAIR, 1.0)}]),
    "trainable": lambda base: TrainableLinear(base, PAIR),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own bytes


@pytest.fixture(autouse=True)
def one_row():
    with rows([0]):
        yield


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@requirement("R2.4")
def test_dropout_acts_in_training_only(base):
    card, x = LoRACard("docs", 2, 1.0, ["0"], {"0": PAIR}), torch.ones(64, 4)
    layer = trainable(nn.Sequential(base), card, dropout=0.5)[0]
    plain = TrainableLinear(base, PAIR)
    layer.eval()
    assert torch.equal(layer(x), plain(x))
    layer.train()
    torch.manual_seed(0)
    assert not torch.equal(layer(x), plain(x))


@requirement("R2.4")
def test_dropout_acts_on_the_low_rank_path_only(base):
    layer = TrainableLinear(base, LowRank(PAIR.A, np.zeros((2, 3), np.float32), 1.0), dropout=0.9)
    x = torch.ones(64, 4)
    assert layer.training
    assert torch.equal(layer(x), base(x))


@requirement("R2.4")
def test_dropout_drops_its_share_of_inputs_and_scales_up_the_rest():
    """Each output sums 4 inputs kept with probability 0.75 and scaled by 4/3: whole multiples of
    4/3, 4 on average.
    """
    silent = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(silent.weight)
    ones = LowRank(np.ones((4, 1), np.float32), np.ones((1, 1), np.float32), 1.0)
    layer = TrainableLinear(silent, ones, dropout=0.25)
    torch.manual_seed(0)
    kept = layer(torch.ones(4096, 4)).detach() * 0.75
    assert torch.allclose(kept, kept.round(), atol=8 * torch.finfo(torch.float32).eps)
    assert abs(kept.mean() - 3) < 6 * (4 * 0.75 * 0.25 / 4096) ** 0.5
    assert set(kept.round().flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}


@requirement("R2.4", "R7.8")
@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan"), "half"])
def test_dropout_is_a_probability(base, dropout):
    with pytest.raises(ArgumentError, match=r"dropout: expected a (finite |)number"):
        TrainableLinear(base, PAIR, dropout=dropout)


@requirement("R8.7")
def test_terms_of_weight_zero_cost_nothing_and_are_still_known(base):
    layer, x = LoRALinear(base, {"docs": (PAIR, 0.0), "law": (OTHER, 0.0)}), torch.ones(4)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 0), (0, 3))
    assert list(layer.terms) == ["docs", "law"]
    assert torch.equal(layer(x), base(x))


@pytest.fixture
def products(monkeypatch):
    """The factors A of every low-rank product that is computed."""
    add, factors = layer_module.add_low_rank, []

    def noted(out, x, a, b):
        factors.append(a)
        return add(out, x, a, b)

    monkeypatch.setattr(layer_module, "add_low_rank", noted)
    return factors


@requirement("R2.13")
def test_large_inputs_use_the_weight_in_inference_and_all_others_the_factors(base, products):
    """Large: a row has 4 + 3 elements of input and output, and twice the weight has 24."""
    layer = LoRALinear(base, {"docs": (PAIR, 1.0)})
    with torch.inference_mode():
        layer(torch.ones(3, 4))
        layer(torch.ones(4, 4))
    assert len(products) == 1
    layer(torch.ones(4, 4))
    assert len(products) == 2


@requirement("R8.6")
def test_three_terms_cost_the_products_of_one(base, products):
    LoRALinear(base, dict.fromkeys("abc", (PAIR, 1.0)))(torch.ones(4))
    assert [tuple(a.shape) for a in products] == [(4, 6)]


@requirement("R8.3", "R8.8")
def test_a_layer_lists_its_terms_by_name(base):
    layer = LoRALinear(base, {"law": (OTHER, 2.0), "docs": (PAIR, 1.0)})
    assert list(layer.terms.items()) == [("docs", (PAIR, 1.0)), ("law", (OTHER, 2.0))]
    assert np.array_equal(layer.lora_A.numpy(), np.hstack([PAIR.A, OTHER.A]))


class Float32Linear(nn.Linear):
    """Its output is float32 under autocast, too."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@requirement("R2.2", "R26.2", "R26.4")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Float32Linear])
@makers
def test_under_autocast_a_layer_has_the_dtype_of_its_base(make, kind, inference):
    base, x = kind(4, 3).requires_grad_(False), torch.ones(1, 4)  # the product, 4, is exact
    with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        out = base(x)
        assert torch.equal(make(base)(x), (out.double() + 4).to(out.dtype))


@requirement("R2.9")
def test_with_b_zero_the_rounding_is_that_of_the_base():
    torch.manual_seed(0)
    base, x = nn.Linear(256, 64).requires_grad_(False), torch.randn(8, 256)
    zero = LowRank(np.ones((256, 2), np.float32), np.zeros((2, 64), np.float32), 1.0)
    assert torch.equal(LoRALinear(base, {"docs": (zero, 1.0)})(x), base(x))


@requirement("R2.3")
def test_terms_are_added_and_replaced_one_by_one(base):
    layer, x = LoRALinear(base), torch.ones(4)
    layer.load_weights(PAIR, name="docs")
    layer.load_weights(OTHER, name="law", weight=0.5)
    assert torch.equal(layer(x), LoRALinear(base, {"docs": (PAIR, 1.0), "law": (OTHER, 0.5)})(x))
    layer.load_weights(OTHER, name="docs")
    assert torch.equal(layer(x), LoRALinear(base, {"docs": (OTHER, 1.0), "law": (OTHER, 0.5)})(x))


@requirement("R7.2", "R7.7", "R2.3")
def test_factors_that_do_not_fit_are_refused_and_change_nothing(base):
    layer, x = LoRALinear(base, {"docs": (PAIR, 1.0)}), torch.ones(4)
    before = layer(x)
    expected = "factors 'law' of a layer: expected in -> out of 4 -> 3, found 4 -> 5"
    with pytest.raises(ShapeError, match=expected):
        layer.load_weights(WRONG, name="law")
    assert list(layer.terms) == ["docs"]
    assert torch.equal(layer(x), before)
    for make in (
        lambda: LoRALinear(base, {"docs": (WRONG, 1.0)}),
        lambda: TrainableLinear(base, WRONG),
    ):
        with pytest.raises(ShapeError, match="4 -> 5"):
            make()


UNSUITABLE = {
    "a bilinear layer": lambda: nn.Bilinear(4, 4, 3),
    "a trainable layer": lambda: TrainableLinear(nn.Linear(4, 3), PAIR),
    "a layer for rows": lambda: RowLinear(nn.Linear(4, 3), []),
    "no module": lambda: "linear",
}


@requirement("R3.14")
@makers
@pytest.mark.parametrize("unsuitable", UNSUITABLE.values(), ids=UNSUITABLE)
def test_what_is_no_linear_or_has_factors_of_another_kind_is_refused(make, unsuitable):
    with pytest.raises(UnsupportedModelError, match="module 'base': expected a Linear"):
        make(unsuitable())


class Named(nn.Linear):
    """A Linear with attributes of names that a layer might take for its own."""

    def __init__(self, name):
        super().__init__(4, 3)
        self.own = name
        setattr(self, name, 3.0)

    def forward(self, x):
        return super().forward(x) * getattr(self, self.own)


@requirement("R3.14")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        ("adapted", "terms"),
        ("adapted", "lora_A"),
        ("adapted", "load_weights"),
        ("adapted", "base_output"),
        ("rowwise", "ranks"),
        ("trainable", "scaling"),
        ("trainable", "dropout"),
    ],
)
def test_a_name_that_a_layer_needs_is_not_taken_from_its_base(make, name):
    message = rf"expected a Linear with no attribute '{name}'.*; rename it in Named"
    with pytest.raises(UnsupportedModelError, match=message):
        MAKERS[make](Named(name))
    layer = MAKERS[make](Named("its_own"))
    assert layer.its_own == 3.0


class Sealed(type):
    """A class of classes that none is derived from without its consent."""

    def __new__(cls, name, bases, members, *, consent):
        return super().__new__(cls, name, bases, members)

    def __init__(cls, *arguments, **_):
        super().__init__(*arguments)


class Own(nn.Linear, metaclass=Sealed, consent=True):
    """A Linear of such a class."""


@requirement("R3.14", "R7.8")
@makers
def test_a_class_that_none_can_be_derived_from_is_refused(make):
    with pytest.raises(UnsupportedModelError, match=r"Own: expected a class to derive .*consent"):
        make(Own(4, 3))


@requirement("R2.12", "R26.5", "R7.8")
@pytest.mark.parametrize("name", ["dense", "experts.1.down_proj"])
def test_sums_that_their_dtype_does_not_hold_are_refused(name):
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "experts": nn.Module()})
    model.experts.down_proj = nn.Parameter(torch.zeros(2, 2, 2))
    for parameter in model.parameters():
        parameter.data.fill_(5e4)
    model.half()
    pair = LowRank(np.ones((2, 1), np.float16), np.ones((1, 2), np.float16), 1.5e4)
    card = LoRACard("docs", 1, 1.5e4, [name.rpartition(".")[2]], {name: pair})
    leaf = name.replace(".1.", ".*")
    assert fold(adapt(model, AdapterSet(card)), narrow=True)  # 65,000 is in its range
    with pytest.raises(UnsupportedModelError, match=f"{leaf}.*expected sums that float16 holds"):
        fold(adapt(model, 2 * AdapterSet(card)), narrow=True)


@requirement("R2.1", "R2.12")
@makers
def test_loading_a_state_dict_gives_the_layer_storage_of_its_own(base, make):
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    layer = make(base)
    state = layer.state_dict()
    layer.load_state_dict({key: torch.full_like(tensor, 7) for key, tensor in state.items()})
    assert all((tensor == 7).all() for tensor in layer.state_dict().values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


@requirement("R2.1", "R3.9")
@makers
@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_layer_can_be_copied_and_the_copy_loaded(base, make, way):
    layer, x = make(base), torch.ones(2, 4)
    twin = way(layer)
    assert torch.equal(twin(x), layer(x))
    state = twin.state_dict()
    twin.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in state.items()})
    assert torch.equal(layer(x), make(base)(x))
    assert not twin.weight.any()


@requirement("R2.5")
@pytest.mark.parametrize("lead", [(), (2,), (0,), (1, 2, 3), (2, 0, 1)])
@pytest.mark.parametrize("kind", ["adapted", "trainable"])
def test_a_layer_takes_any_leading_dimensions_in_training_too(base, kind, lead):
    x = torch.ones(*lead, 4)
    out = MAKERS[kind](base)(x)
    assert out.shape == (*lead, 3)
    assert torch.allclose(out, base(x) + 4)  # 0.5 · (1 1 1 1) A B


@requirement("R2.7", "R2.8")
def test_training_a_layer_moves_its_factors_and_leaves_the_base_alone(base):
    before, layer = base.weight.detach().clone(), TrainableLinear(base, PAIR)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    learned = layer.learned()
    assert learned != PAIR
    assert learned.scaling == PAIR.scaling
    assert torch.equal(base.weight, before)
    layer.lora_A.data.zero_()
    assert learned.A.any()
