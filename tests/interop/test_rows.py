"""Rows with adapters of their own, in models that others made: each as it is alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora
from lora.card import LoRACard, LowRank
from lora.errors import ArgumentError, ShapeError, StateError, UnsupportedModelError
from lora.models.adapt import linears
from lora.testing.plugin import requirement

SIZES = {"vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": (
        lambda: LlamaForCausalLM(
            LlamaConfig(
                **SIZES,
                hidden_size=32,
                intermediate_size=64,
                num_key_value_heads=2,
                pad_token_id=0,  # whose embedding is zero, as the model is made
            )
        ),
        ["q_proj", "v_proj"],  # which see a row of padding alone as zero
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4)
        ),
        ["c_attn", "c_proj"],
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=100,
                d_model=32,
                d_ff=64,
                d_kv=8,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        ["q", "v", "wo"],
    ),
}


def card(model, name, targets, size=0.3):
    rng = np.random.default_rng(sum(map(ord, name)))
    weights = {
        key: LowRank(
            rng.normal(0, size, (site.in_features, 4)).astype(np.float32),
            rng.normal(0, size, (4, site.out_features)).astype(np.float32),
            1.0,
        )
        for key, site in linears(model).items()
        if key.rpartition(".")[2] in targets
    }
    return LoRACard(name, 4, 4.0, targets, weights)


# ---- generating


@requirement("R26.4")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)
def test_each_row_generates_what_it_generates_alone(make, targets, beams):
    torch.manual_seed(0)
    model = make().eval()
    cards = [card(model, name, targets) for name in ("docs", "law", "code")]
    rowwise = lora.adapt_rows(model, [{}, *cards])
    alone = [model, *(lora.adapt(model, each) for each in cards)]
    ids, sizes, sets = torch.randint(3, 100, (5, 7)), [7, 4, 6, 2, 5], [2, 0, 1, 3, 2]
    mask = torch.stack([(torch.arange(7) >= 7 - size).long() for size in sizes])
    options = {"num_beams": beams, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}

    def generated(model, rows):
        sequences = model.generate(
            input_ids=ids[rows] * mask[rows], attention_mask=mask[rows], do_sample=False, **options
        )
        return sequences[:, -8:]

    with lora.rows(sets):
        together = generated(rowwise, range(5))
    expected = torch.cat([generated(alone[own], [row]) for row, own in enumerate(sets)])
    assert torch.equal(together, expected)
    for other in alone:  # so that another row's adapters would be seen
        assert not torch.equal(generated(other, range(5)), expected)


# ---- encoding


WORDS = "open a file in python sort the list by its second key and write it to disk".split()


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size)) for size in rng.integers(1, 24, 40)]


@pytest.fixture(scope="module")
def peer(model_folder):
    prompts = {"query": "query: ", "passage": "a passage of a document: "}
    return SentenceTransformer(str(model_folder), device="cpu", prompts=prompts)


@pytest.fixture(scope="module")
def sides(peer, texts):
    """Cards, models with one each, and the base last."""
    cards = [card(peer, name, ["query", "value"], 0.1) for name in ("docs", "law", "code")]
    return cards, [*(lora.adapt(peer, each) for each in cards), peer]


@requirement("R26.4")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_name": "query"},
        {"prompt": "a question: "},
        {"batch_size": 3},
        {"convert_to_tensor": True},
    ],
)
def test_texts_keep_their_set_in_a_sentence_transformer(peer, sides, texts, options):
    cards, alone = sides
    rowwise, own = lora.adapt_rows(peer, [*cards, {}]), [row * 7 % 4 for row in range(len(texts))]
    with lora.rows(own):
        together = np.asarray(rowwise.encode(texts, **options))
    each = zip(texts, own, strict=True)
    expected = np.concatenate([np.asarray(alone[i].encode([t], **options)) for t, i in each])
    assert np.abs(together - expected).max() < 1e-6
    assert np.abs(np.asarray(peer.encode(texts, **options)) - expected).max() > 0.05
    with lora.rows([2]):
        assert np.abs(rowwise.encode(texts[0]) - alone[2].encode(texts[0])).max() < 1e-6
        batch = rowwise(rowwise.tokenize(texts[:1]))["sentence_embedding"].detach().numpy()
    assert np.abs(batch[0] - alone[2].encode(texts[0])).max() < 1e-6


@requirement("R5.8", "R5.10")
def test_the_engine_runs_the_rows_of_a_sentence_transformer_in_one_forward(
    peer, sides, texts, monkeypatch
):
    (cards, alone), sizes = sides, []
    forward = SentenceTransformer.forward
    engine = lora.ArrowEngine(peer)
    choices = [[*cards, {}][row * 7 % 4] for row in range(len(texts))]
    engine.encode_with_lora(texts, choices)  # and tries the model
    monkeypatch.setattr(
        SentenceTransformer,
        "forward",
        lambda self, features, **options: (
            sizes.append(len(features["input_ids"])),
            forward(self, features, **options),
        )[1],
    )
    together = engine.encode_with_lora(texts, choices).embeddings
    assert sizes == [32, 8]
    expected = [alone[row * 7 % 4].encode(text) for row, text in enumerate(texts)]
    assert np.abs(together - np.stack(expected)).max() < 1e-6


@requirement("R26.4")
def test_four_threads_name_rows_of_their_own(peer, sides, texts):
    cards, alone = sides
    rowwise, each = lora.adapt_rows(peer, [*cards, {}]), [model.encode(texts) for model in alone]
    start = threading.Barrier(4)

    def differences(shift):
        own = [(row * 7 + shift) % 4 for row in range(len(texts))]
        expected = np.stack([each[i][row] for row, i in enumerate(own)])
        start.wait()
        with lora.rows(own):
            return max(np.abs(rowwise.encode(texts) - expected).max() for _ in range(3))

    with ThreadPoolExecutor(4) as threads:
        assert max(threads.map(differences, range(4))) < 1e-6


class Letters(nn.Module):
    """An encoder of one's own; variants do what may lose the set of a text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.kept = nn.Linear(26, 5), {}

    def tokenize(self, texts):
        return torch.tensor([[float(text.count(chr(97 + i))) for i in range(26)] for text in texts])

    def run(self, features):
        return self.dense(features)

    def encode(self, texts):
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        result = self.run(self.tokenize([texts[row] for row in order]))
        return result[np.argsort(order)].numpy()


class Stripping(Letters):
    """Its texts are made anew."""

    def tokenize(self, texts):
        return super().tokenize([text.strip() for text in texts])

    def encode(self, texts):
        return super().encode([text.strip() for text in texts])


class Hiding(Letters):
    """It sorts, and tokenises by what can't be seen."""

    tokenize = None

    def encode(self, texts):
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        features = Letters.tokenize(self, [texts[row] for row in order])
        return self.run(features)[np.argsort(order)].numpy()


class Ahead(Letters):
    """It tokenises a batch before the forward of the last one."""

    def encode(self, texts):
        batches = [self.tokenize(texts[row : row + 4]) for row in range(0, len(texts), 4)]
        return torch.cat([self.run(batch) for batch in batches]).numpy()


class OneByOne(Letters):
    """It joins batches after they are tokenised."""

    def encode(self, texts):
        return self.run(torch.cat([self.tokenize([text]) for text in texts])).numpy()


class Keeping(Letters):
    """It computes each text once."""

    def encode(self, texts):
        for text in dict.fromkeys(texts):
            if text not in self.kept:
                self.kept[text] = self.run(self.tokenize([text]))[0]
        return torch.stack([self.kept[text] for text in texts]).numpy()


class Threaded(Letters):
    """Its forward runs in a thread."""

    def run(self, features):
        with ThreadPoolExecutor(1) as thread, torch.inference_mode():
            return thread.submit(super().run, features).result().clone()


@requirement("R5.8", "R5.10")
@pytest.mark.parametrize("kind", [Letters, Stripping, Hiding, Ahead, OneByOne, Keeping, Threaded])
def test_an_encoder_that_loses_the_set_of_a_text_runs_once_for_each_set(kind, caplog):
    model = kind()
    cards = [card(model, name, ["dense"]) for name in ("docs", "law")]
    texts = ["abc", "a longer one", "b", "dd", "abc", "eee efe", "ab", "xyz and zyx", "q"]
    choices = [[*cards, {}][row % 3] for row in range(len(texts))]
    together = lora.ArrowEngine(model).encode_with_lora(texts, choices).embeddings
    alone = [lora.adapt(kind(), choice or ()) for choice in choices]
    with torch.inference_mode():
        expected = [each.encode([text])[0] for text, each in zip(texts, alone, strict=True)]
    assert np.abs(together - np.stack(expected)).max() < 1e-5
    assert ("runs once for each adapter set" in caplog.text) == (kind is not Letters)


class Experts(Letters):
    """It adds what one of its fused experts computes."""

    batches: ClassVar = []

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.randn(2, 5, 26))

    def run(self, features):
        self.batches.append(len(features))
        return super().run(features) + features @ self.experts.down_proj[0].T


@requirement("R5.8", "R5.10")
def test_a_card_for_experts_leaves_the_others_their_one_forward():
    model, rng, texts = Experts(), np.random.default_rng(0), ["abc", "b", "dd", "eee"]
    pair = LowRank(rng.normal(0, 1, (26, 1)), rng.normal(0, 1, (1, 5)), 1.0)
    expert = LoRACard("expert", 1, 1.0, ["down_proj"], {"experts.0.down_proj": pair})
    cards = [card(model, name, ["dense"]) for name in ("docs", "law")]
    with pytest.raises(UnsupportedModelError, match="for fused experts; adapt a model with this"):
        lora.adapt_rows(model, [{}, expert])
    engine = lora.ArrowEngine(model)
    apart, at_once = ([expert, {}] * 2, [2, 2]), (cards * 2, [4])
    for choices, batches in (apart, at_once, apart):
        engine.encode_with_lora(texts, choices)  # and tries the model
        Experts.batches.clear()
        together = engine.encode_with_lora(texts, choices).embeddings
        assert Experts.batches == batches
        alone = [
            lora.adapt(Experts(), each or ()).encode([t])[0]
            for t, each in zip(texts, choices, strict=True)
        ]
        assert np.abs(together - np.stack(alone)).max() < 1e-5


# ---- models that mix rows, and bad input


class TimeMajor(nn.Module):
    """Its Linear sees tokens in the first dimension, rows in the second."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x):
        return self.dense(x.transpose(0, 1)).transpose(0, 1)


class Routed(TimeMajor):
    """Tokens are flattened and sorted by an expert, as many as there were."""

    def forward(self, x):
        flat = x.reshape(-1, 8)
        order = flat[:, 0].argsort()
        return self.dense(flat[order])[order.argsort()].reshape(x.shape)


class Flattened(TimeMajor):
    """All tokens of a row are neighbours."""

    def forward(self, x):
        return self.dense(x.reshape(-1, 8)).reshape(x.shape)


class InAThread(TimeMajor):
    """Its Linear runs in a thread."""

    def forward(self, x):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self.dense, x).result()


@requirement("R26.4")
@pytest.mark.parametrize("tokens", [5, 6])
@pytest.mark.parametrize("kind", [TimeMajor, Routed, InAThread, Flattened])
def test_a_model_that_mixes_rows_is_refused(kind, tokens):
    model, probe = kind(), {"x": torch.randn(3, tokens, 8)}
    sets = [{}, card(model, "docs", ["dense"])]
    if kind is not Flattened:
        with pytest.raises(UnsupportedModelError, match=rf"rows of {kind.__name__}: .*probe=False"):
            lora.adapt_rows(model, sets, probe=probe)
        lora.adapt_rows(model, sets, probe=False)
        return
    with lora.rows([1, 0, 1]):
        result = lora.adapt_rows(model, sets, probe=probe)(**probe)
    change = lora.adapt(model, sets[1])(**probe) - model(**probe)
    assert torch.allclose(result - model(**probe), change * torch.tensor([1, 0, 1])[:, None, None])


@requirement("R26.4")
@pytest.mark.parametrize("shape", [(0, 2), (0, 3, 2), (0, 2, 5, 2), (2, 0, 2)])
def test_a_batch_without_rows_or_tokens_gives_what_the_base_gives(shape):
    model = nn.Sequential(nn.Linear(2, 3))
    rowwise = lora.adapt_rows(model, [{}, card(model, "docs", ["0"])], probe=False)
    x, own = torch.ones(shape), [1, 0][: shape[0]]
    for mode in (torch.inference_mode, nullcontext):
        with lora.rows(own), mode():
            result = rowwise(x)
        assert result.shape == (*shape[:-1], 3)
        assert torch.equal(result, model(x))
    with lora.rows([]), pytest.raises(ShapeError, match="a vector"):
        rowwise(torch.ones(2))


@requirement("R26.4", "R7.8")
@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ([0, 1], ShapeError, "expected 2 rows, as named by lora.rows, .* found 3"),
        ([0, 1, 2, 0], ShapeError, "expected 4 rows"),
        ([], ShapeError, "expected 0 rows"),
        ([0, 1, 2], ArgumentError, "expected sets from 0 to 1, found 2"),
        ([0, 1, -1], ArgumentError, "expected an integer >= 0, found -1"),
        ([0, 1, 0.5], ArgumentError, "expected an integer"),
        (1, ArgumentError, "the index of a set for each row, found 1"),
        (None, StateError, r"found none; call the model within `with lora.rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(own, error, message):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="inputs to try the model with"):
        lora.adapt_rows(model, [{}, card(model, "docs", ["0"])])
    for probe in (torch.ones(3, 2), True, [torch.ones(3, 2)]):
        with pytest.raises(ArgumentError, match="probe: expected keywords of the model's forward"):
            lora.adapt_rows(model, [{}, card(model, "docs", ["0"])], probe=probe)
    rowwise = lora.adapt_rows(model, [{}, card(model, "docs", ["0"])], probe=False)
    x = torch.ones(3, 2)
    named = nullcontext if own is None else lora.rows
    with pytest.raises(error, match=message), named(own):
        rowwise(x)
    with lora.rows([0]):
        for vector in (x[0], x[:0, 0]):
            with pytest.raises(ShapeError, match=r"expected rows, .* found a vector .*; add .*row"):
                rowwise(vector)
        with lora.rows([0, 1, 0]):
            assert torch.equal(rowwise(x)[0], model(x)[0])
        with ThreadPoolExecutor(1) as thread, pytest.raises(StateError):
            thread.submit(rowwise, x).result()
    for sets in ([], card(model, "docs", ["0"])):
        with pytest.raises(ArgumentError, match="a list of adapter sets"):
            lora.adapt_rows(model, sets)
    for use in (lambda m: lora.adapt(m, card(model, "law", ["0"])), lora.fold, lora.uncalled):
        with pytest.raises(UnsupportedModelError):
            use(rowwise)
