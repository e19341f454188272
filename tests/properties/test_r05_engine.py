"""R5: an encoder with adapters computes what its base would with W + ΔW written into the weights,
text by text.
"""

from copy import deepcopy
from string import ascii_lowercase

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from lora.card import DTYPES, AdapterSet, LoRACard, LowRank
from lora.engine import ArrowEngine
from lora.models.adapt import adapt, adapt_rows
from lora.models.encoder import ACTIVATIONS, EncoderConfig, InferenceCore
from lora.models.manager import LoRAManager
from lora.models.rows import rows as rows_of_sets
from lora.testing.plugin import requirement
from lora.testing.tolerance import gamma, roundoff

LONGEST = 9
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = {
    token: i
    for i, token in enumerate([*SPECIAL, *ascii_lowercase, *map("##".__add__, ascii_lowercase)])
}


def tokenizer():
    """A word-piece tokenizer of letters."""
    made = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_truncation(LONGEST)
    return made


TOKENIZER = tokenizer()


@st.composite
def cores(draw):
    """A small float64 encoder of any kind, its weights, biases and norms random."""
    config = EncoderConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=4,
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=draw(st.sampled_from([1, 2, 4])),
        intermediate_size=draw(st.integers(1, 6)),
        max_position_embeddings=LONGEST,
        hidden_act=draw(st.sampled_from(sorted(ACTIVATIONS))),
        pooling=draw(st.sampled_from(["mean", "cls"])),
        normalize=draw(st.booleans()),
        pooler=draw(st.booleans()),
    )
    core = InferenceCore(config, TOKENIZER).double().eval().requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    for name, parameter in core.named_parameters():
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
        )
        if name.endswith("LayerNorm.weight"):
            parameter.add_(1)
    return core


@st.composite
def cards(draw, core, name):
    """A card for some of the encoder's Linears: any rank, any dtype, by full names or by common
    ones.
    """
    linears = {key: module for key, module in core.named_modules() if isinstance(module, nn.Linear)}
    chosen = draw(st.lists(st.sampled_from(sorted(linears)), min_size=1, unique=True))
    dtype = draw(st.sampled_from([np.dtype(np.float64), *DTYPES.values()]))
    # Narrow factors are scaled before they are widened; a power of two keeps that exact.
    scaling = draw(
        st.sampled_from([1.0, 2.0, -0.5]) | (st.floats(-2, 2) if dtype == F64 else st.nothing())
    )
    rng, rank = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.integers(1, 3))
    weights = {
        key: LowRank(
            rng.normal(0, 1, (linears[key].in_features, rank)).astype(dtype),
            rng.normal(
                0, draw(st.sampled_from([0, 0.1, 1])), (rank, linears[key].out_features)
            ).astype(dtype),
            scaling,
        )
        for key in chosen
    }
    targets = chosen if draw(st.booleans()) else ["query", "key", "value", "dense"]
    return LoRACard(name, rank, 1.0, targets, weights)


@st.composite
def adapter_sets(draw, core, letters):
    weights = st.sampled_from([1.0, 0.5, -1.0, 0.0, 2.0])
    return AdapterSet(
        {
            name: (draw(cards(core, name)), draw(weights))
            for name in draw(st.sets(st.sampled_from(letters)))
        }
    )


rows_of_ids = st.lists(
    st.lists(st.integers(0, len(VOCABULARY) - 1), min_size=1, max_size=LONGEST),
    min_size=1,
    max_size=3,
)


def padded(rows):
    """Ids padded with anything, and the mask that hides it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *range(longest - len(row))] for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
    return ids, mask


def written(core, adapters):
    """A copy with W + ΔW in its weights, and Σ|A||B| of what was added to each Linear."""
    result, added = deepcopy(core), {}
    for card, weight in adapters.values():
        for key, pair in card.weights.items():
            a, b = torch.tensor(pair.A.astype(np.float64)), torch.tensor(pair.B.astype(np.float64))
            scale = pair.scaling * weight
            result.get_submodule(key).weight += (a @ b).T * scale
            added[key] = added.get(key, 0) + (a.abs() @ b.abs()).T * abs(scale)
    return result, added


def bound(core, adapters, ids, mask):
    """How far two float64 computations of the same embeddings may lie apart, to first order.

    A computed output of a Linear or LayerNorm is off by at most γ_N of the sum of its terms'
    magnitudes, with N more than all roundings from the output before it: a relative rounding of a
    softmax's weight, an activation or a residual is one of the next product's inputs, or of the
    LayerNorm's. Such an error moves an embedding by the derivative with respect to that output, so
    the sum of |derivative| · local error bounds it. Twice, for the two computations; twice again
    for what is of second order.
    """
    model, added = written(core, adapters)
    names = {module: name for name, module in model.named_modules()}
    outputs, locals_ = [], []

    def note(module, inputs, output):
        x = inputs[0].detach().abs()
        if isinstance(module, nn.Linear):
            origin = core.get_submodule(names[module]).weight.abs() + added.get(names[module], 0)
            local = x @ origin.T + module.bias.abs()
        else:
            spread = (inputs[0].var(-1, keepdim=True, correction=0) + module.eps).sqrt()
            local = (
                x + x.mean(-1, keepdim=True)
            ) / spread * module.weight.abs() + module.bias.abs()
            local = (
                local + output.abs() * (x**2).mean(-1, keepdim=True) / spread**2
            )  # the variance's own error
        outputs.append(output)
        locals_.append(local.detach())

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.register_forward_hook(note)
    model.requires_grad_(requires_grad=True)
    embedded = model(ids, mask)
    total = torch.zeros(embedded.numel(), dtype=torch.float64)
    for index, number in enumerate(embedded.flatten()):
        slopes = torch.autograd.grad(number, outputs, retain_graph=True)
        total[index] = sum(
            (slope.abs() * local).sum() for slope, local in zip(slopes, locals_, strict=True)
        )
    config, ranks = core.config, sum(card.rank for card, _ in adapters.values())
    n = config.hidden_size + config.intermediate_size + ids.shape[1] + ranks + 64
    return 4 * gamma(n, F64) * (total.reshape(embedded.shape) + embedded.detach().abs())


@requirement("R5.5")
@given(st.data(), rows_of_ids)
def test_embeddings_with_active_cards_are_those_of_the_weights_plus_delta(data, rows):
    core = data.draw(cores())
    adapters = data.draw(adapter_sets(core, "abc"))
    ids, mask = padded(rows)
    expected = written(core, adapters)[0](ids, mask)
    tolerance = bound(core, adapters, ids, mask)
    for fold in (False, True):
        manager = LoRAManager(core, fold=fold)
        for name in data.draw(st.permutations(list(adapters))):
            manager.apply_card(adapters[name][0], weight=adapters.weight(name))
        assert manager.active == adapters
        assert ((manager.model(ids, mask) - expected).abs() <= tolerance).all()
    with rows_of_sets([1] * len(rows)):
        rowwise = adapt_rows(core, [{}, adapters], probe=False)(ids, mask)
    assert ((rowwise - expected).abs() <= tolerance).all()


@requirement("R5.5", "R5.8")
@given(st.data(), rows_of_ids)
def test_each_row_of_a_batch_gets_what_its_own_set_would_give_it_alone(data, rows):
    base = data.draw(cores())
    before = data.draw(adapter_sets(base, "xy"))
    core = adapt(base, before)
    sets = [data.draw(adapter_sets(base, "ab")) for _ in range(3)]
    which = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    with rows_of_sets(which):
        together = adapt_rows(core, sets, probe=False)(*padded(rows))
    for row, index, found in zip(rows, which, together, strict=True):
        ids = torch.tensor([row])
        alone = adapt(core, sets[index])(ids)[0]
        assert ((found - alone).abs() <= bound(base, before | sets[index], *padded([row]))[0]).all()


texts_of_letters = st.lists(st.text("abcxyz ", max_size=12), min_size=1, max_size=4)


@st.composite
def choices(draw, active, known, core):
    """What one text may ask for, in any form, and the set that it means."""
    names = draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=2))
    weights = {name: draw(st.sampled_from([1.0, 0.5, -1.0])) for name in names}
    plain = AdapterSet([known[name] for name in names])
    weighted = AdapterSet({name: (known[name], weight) for name, weight in weights.items()})
    stranger = draw(cards(core, "stranger"))
    forms = [
        (None, active),
        ({}, AdapterSet()),
        (names, plain),
        (tuple(names), plain),
        (frozenset(names), plain),
    ]
    forms += [(weights, weighted), (weighted, weighted), (stranger, AdapterSet(stranger))]
    forms += [(name, AdapterSet(known[name])) for name in names[:1]]
    return draw(st.sampled_from(forms))


@requirement("R5.8")
@given(st.data(), texts_of_letters)
def test_one_call_takes_a_choice_for_each_text_and_gives_each_what_it_would_get_alone(data, texts):
    core = data.draw(cores())
    known = {name: data.draw(cards(core, name)) for name in "abc"}
    engine = ArrowEngine(core, fold=data.draw(st.booleans()))
    for name in data.draw(st.sets(st.sampled_from("ab"))):
        engine.manager.apply_card(known[name])
    for card in known.values():
        engine.manager.add_card(card)
    one = st.shared(choices(engine.manager.active, known, core), key="duplicated")
    asked = [data.draw(one | choices(engine.manager.active, known, core)) for _ in texts]
    found = engine.encode_with_lora(texts, [choice for choice, _ in asked])
    assert found.adapters == tuple(meant for _, meant in asked)
    for text, (choice, meant), row in zip(texts, asked, found.embeddings, strict=True):
        alone = engine.encode_with_lora(
            [text], tuple(choice) if isinstance(choice, list) else choice
        )
        assert alone.adapters == (meant,)
        ids, mask = padded(core.tokenize([text]))
        exact = written(core, meant)[0](ids, mask)[0]
        # Computed in float64 and then rounded once to float32.
        near = (
            bound(core, meant, ids, mask)[0]
            + roundoff(F32) * exact.abs()
            + np.finfo(F32).smallest_subnormal
        )
        for result in (row, alone.embeddings[0]):
            assert ((torch.from_numpy(result).double() - exact).abs() <= near).all()


@requirement("R5.6")
@given(st.data(), texts_of_letters)
def test_with_no_card_active_the_base_answers_bit_for_bit(data, texts):
    core = data.draw(cores())
    before = {name: tensor.clone() for name, tensor in core.state_dict().items()}
    expected, engine = core.encode(texts), ArrowEngine(core, fold=data.draw(st.booleans()))
    adapters = data.draw(adapter_sets(core, "abc"))
    assert np.array_equal(engine.encode(texts), expected)
    for name, (card, weight) in adapters.items():
        engine.manager.apply_card(card, weight=weight)
        engine.encode_with_lora(texts, [{name: 0.5}] * len(texts))
    assert np.array_equal(engine.encode_with_lora(texts, {}).embeddings, expected)
    for name in data.draw(st.permutations(list(adapters))):
        engine.manager.remove_card(name)
    assert np.array_equal(engine.encode(texts), expected)
    assert np.array_equal(core.encode(texts), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in core.state_dict().items())
