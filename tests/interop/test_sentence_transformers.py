"""InferenceCore beside sentence-transformers and BertModel: one set of weights, one computation."""

import ast
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from lora.card import AdapterSet, LoRACard, LowRank
from lora.engine import ArrowEngine
from lora.models.adapt import adapt, injections
from lora.models.encoder import ACTIVATIONS, EncoderConfig, InferenceCore
from lora.testing.plugin import requirement

AGREEMENT = 1e-5
"""What R5.7 asks for."""

MODULES = "argparse asyncio/base_events collections/__init__ difflib json/decoder pathlib textwrap"

ODD = ["", " ", " \t\n\r ", "\x00", "\x00\x01\x7f\x1b[0m", "a\x00b", "\u200b\ufeff\u202e"]
ODD += ["naïve café, e\u0301 and é", "注意 日本語 한국어 עברית العربية", "\U0010ffff \ue000"]
ODD += ["👩\u200d👩\u200d👧 😀🏳️\u200d🌈", "[CLS] [SEP] [MASK] [PAD] [UNK] <s>"]
ODD += ["HTTP/2 (RFC 7540) §4.1 -- $1,000.00 @ 5%", "x" * 300, "é" * 300]


def sentences():
    """The shorter paragraphs of real docstrings, from the standard library's source."""
    folder, found = Path(sysconfig.get_paths()["stdlib"]), []
    for module in MODULES.split():
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                found += [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return [text for text in dict.fromkeys(found) if len(text) < 150]


@pytest.fixture(scope="module")
def core(model_folder):
    return InferenceCore.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def peer(model_folder):
    return SentenceTransformer(str(model_folder), device="cpu")


def strong(model, name, seed, *, everywhere=False):
    """A card that turns embeddings far round; its keys bind in any model that holds a BertModel."""
    rng = np.random.default_rng(seed)
    weights = {}
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (everywhere or key.endswith(("query", "value"))):
            shapes = (module.in_features, 4), (4, module.out_features)
            factors = (rng.normal(0, 0.15, shape).astype(np.float32) for shape in shapes)
            weights[key] = LowRank(*factors)
    return LoRACard(name, 4, 2.0 if everywhere else 8.0, ["all-linear"], weights)


def bits_of(module):
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.clone() for name, tensor in tensors}


def same_bits(bits, before):
    return bits.keys() == before.keys() and all(torch.equal(bits[k], before[k]) for k in bits)


@requirement("R5.7")
def test_real_sentences_mean_the_same_to_both(core, peer):
    texts = sentences()[:300]
    assert len(texts) == 300
    expected = peer.encode(texts)
    assert np.abs(core.encode(texts) - expected).max() <= AGREEMENT
    far = expected[1:] - expected[:-1]
    assert np.abs(far).max(1).min() > 100 * AGREEMENT  # the sentences do differ


@requirement("R5.7")
def test_odd_texts_mean_the_same_to_both(core, peer):
    alone = np.concatenate([core.encode([text]) for text in ODD])
    expected = np.concatenate([peer.encode([text]) for text in ODD])
    assert np.abs(alone - expected).max() <= AGREEMENT
    assert np.abs(core.encode(ODD) - peer.encode(ODD)).max() <= AGREEMENT


@requirement("R5.7")
def test_texts_of_any_length_are_cut_at_the_same_token(core, peer):
    words = ["a", "list", "of", "words", "that", "is", "far", "too", "long"] * 40
    counts = [1, 2, 3, 17, 100, 253, 254, 255, 256, 257, 300]
    texts = [" ".join(words[:count]) for count in counts]
    assert [len(ids) for ids in core.tokenize(texts)] == [min(n + 2, 256) for n in counts]
    found = core.encode(texts)
    assert np.abs(found - peer.encode(texts)).max() <= AGREEMENT
    assert np.abs(found[-1] - found[-2]).max() <= AGREEMENT
    assert np.abs(found[5] - found[6]).max() > 100 * AGREEMENT


@requirement("R5.7")
def test_both_see_the_same_tokens(core, peer):
    texts = [*sentences()[:100], *ODD]
    theirs = peer.tokenizer(texts, truncation=True, max_length=peer.max_seq_length)["input_ids"]
    assert core.tokenize(texts) == theirs


@requirement("R5.7")
def test_state_dict_and_names_of_linears_are_those_of_a_bert_model(core, peer):
    (bert,) = [module for module in peer.modules() if isinstance(module, BertModel)]
    assert same_bits(core.state_dict(), bert.state_dict())
    names, expected = (
        {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        for model in (core, bert)
    )
    assert names == expected
    assert len(names) == 6 * 6 + 1


@st.composite
def small_berts(draw):
    """A BertModel of any kind that the core takes, with random weights, in float64."""
    heads = draw(st.sampled_from([1, 2, 4]))
    config = BertConfig(
        vocab_size=20,
        hidden_size=4 * heads,
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 9)),
        max_position_embeddings=8,
        type_vocab_size=draw(st.integers(1, 2)),
        hidden_act=draw(st.sampled_from(sorted(ACTIVATIONS))),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 0.1])),
    )
    torch.manual_seed(draw(st.integers(0, 2**32)))
    model = BertModel(config).double().eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.5)
    return config, model


@requirement("R5.7")
@given(small_berts(), st.lists(st.integers(1, 8), min_size=1, max_size=3), st.booleans())
def test_a_bert_model_of_any_kind_computes_the_same(drawn, lengths, normalize):
    config, theirs = drawn
    names = EncoderConfig.__dataclass_fields__
    known = {name: getattr(config, name) for name in names if hasattr(config, name)}
    ids = torch.randint(0, 20, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    hidden = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    weights = mask[..., None].double()
    means = (hidden * weights).sum(1) / weights.sum(1)
    for pooling, expected in (("mean", means), ("cls", hidden[:, 0])):
        settings = {**known, "pooling": pooling, "normalize": normalize, "pooler": True}
        mine = InferenceCore(EncoderConfig(**settings)).double().eval()
        mine.load_state_dict(theirs.state_dict())
        if normalize:
            expected = torch.nn.functional.normalize(expected, dim=-1)  # noqa: PLW2901
        assert (mine(ids, mask) - expected).abs().max() <= AGREEMENT


@requirement("R5.5", "R5.10", "R3.9")
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_card_does_the_same_to_both(core, peer, everywhere):
    card, texts = strong(core, "docs", 0, everywhere=everywhere), [*sentences()[:40], *ODD]
    before = core.encode(texts)
    theirs = adapt(peer, card).encode(texts)
    assert np.abs(adapt(core, card).encode(texts) - theirs).max() <= AGREEMENT
    assert np.abs(theirs - before).max() > 100 * AGREEMENT
    for model in (core, peer):
        assert len(injections(model, card)["docs"].bound) == len(card.weights)


@requirement("R5.10", "R5.4", "R5.6")
def test_an_engine_over_a_sentence_transformer_answers_as_it_does(peer):
    texts, engine = [*sentences()[:20], *ODD], ArrowEngine(peer)
    assert engine.base is peer
    assert np.array_equal(engine.encode(texts), peer.encode(texts))
    assert engine.encode([]).shape[0] == 0


@requirement("R5.10", "R5.1", "R5.8")
@pytest.mark.parametrize("fold", [False, True, "auto"])
def test_an_engine_over_a_sentence_transformer_does_what_one_over_the_core_does(core, peer, fold):
    """Active cards, a call's own, one set a text, an intent; the caller's model keeps its bits."""
    texts, before = [*sentences()[:6], "", "😀"], bits_of(peer)
    expected, modes = peer.encode(texts), [module.training for module in peer.modules()]
    engines = [ArrowEngine(model, fold=fold) for model in (core, peer)]
    cards = [strong(core, name, seed) for seed, name in enumerate(["files", "sorting"])]

    def both(*arguments, **options):
        mine, theirs = (engine.encode_with_lora(texts, *arguments, **options) for engine in engines)
        assert np.abs(mine.embeddings - theirs.embeddings).max() <= AGREEMENT
        assert mine.adapters == theirs.adapters
        return theirs

    for engine in engines:
        engine.register_lora(cards[0], ["reading and writing files"])
        engine.register_lora(cards[1], ["sorting a list of numbers"])
        engine.manager.apply_card(cards[1])
    active = both().embeddings
    assert np.abs(active - expected).max() > 100 * AGREEMENT
    assert np.array_equal(both({}).embeddings, expected)
    both({"files": 0.5})
    chosen = both(intent_query="read a file")
    assert [route.name for route in chosen.routes] == ["files"]
    some = {"files": 0.5, "sorting": -1}
    several = ["sorting", "files"]
    choices = ["files", None, {}, some, cards[0], several, {}, AdapterSet(cards[1])]
    rows = both(choices).embeddings
    for row, text, choice in zip(rows, texts, choices, strict=True):
        own = tuple(choice) if isinstance(choice, list) else choice
        alone = engines[1].encode_with_lora([text], own).embeddings[0]
        assert np.abs(row - alone).max() <= AGREEMENT
    assert np.array_equal(engines[1].encode(texts), active)
    engines[1].manager.remove_card("sorting")
    assert engines[1].manager.model is peer
    assert same_bits(bits_of(peer), before)
    assert modes == [module.training for module in peer.modules()]
    assert all(part.requires_grad and part.grad is None for part in peer.parameters())
    assert np.array_equal(peer.encode(texts), expected)
