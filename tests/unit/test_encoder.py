"""InferenceCore: what it loads and refuses, mapped weights, and how texts become batches."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import lora
from lora.errors import ArgumentError, CardNotFoundError, ShapeError, UnsupportedModelError
from lora.models import encoder
from lora.models.adapt import linears
from lora.models.encoder import EncoderConfig, InferenceCore, batches, pad
from lora.models.encoder_folder import SIZES, read_folder
from lora.testing.plugin import requirement
from lora.testing.tolerance import gamma

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ascii_lowercase]
VOCABULARY = {token: i for i, token in enumerate(TOKENS)}
CONFIG = EncoderConfig(len(VOCABULARY), 8, 2, 2, 12, 16)


def word_tokenizer():
    """A tokenizer that knows one-letter words."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def core_of(config=CONFIG):
    torch.manual_seed(0)
    return InferenceCore(config, word_tokenizer()).eval().requires_grad_(requires_grad=False)


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_config(folder, **changes):
    """Write the configuration; a value of `...` leaves the key out."""
    sizes = {key: getattr(CONFIG, key) for key in [*SIZES, "layer_norm_eps", "hidden_act"]}
    config = {"model_type": "bert", **sizes, **changes}
    write_json(folder / "config.json", {key: x for key, x in config.items() if x is not ...})


def add_modules(folder, **pooling):
    """Write ``modules.json`` and the configuration of its Pooling; return the modules."""
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_N")]
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 8, **pooling})
    return modules


def refused(folder, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        InferenceCore.from_pretrained(folder)
    return caught.value


@pytest.fixture
def folder(tmp_path):
    """A small model as a Hugging Face directory, without sentence-transformers' files."""
    core = core_of()
    write_config(tmp_path)
    save_file(core.state_dict(), tmp_path / "model.safetensors")
    core.tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@requirement("R5.7")
def test_a_folder_is_loaded_as_it_was_saved(folder):
    expected, core = core_of(), InferenceCore.from_pretrained(str(folder))
    state = core.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    expected.tokenizer.enable_truncation(CONFIG.max_position_embeddings)
    texts = ["a b c", "", "a " * 40, "é A"]
    assert np.array_equal(core.encode(texts), expected.encode(texts))
    assert not core.training
    assert not any(parameter.requires_grad for parameter in core.parameters())


def addresses(name):
    """Where a file is mapped into this process."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    return [[int(number, 16) for number in line.split()[0].split("-")] for line in lines]


@requirement("R5.7", "R6.4")
def test_every_weight_lies_inside_the_mapped_file(model_folder):
    core = InferenceCore.from_pretrained(model_folder)
    spans = addresses(str((model_folder / "model.safetensors").resolve()))
    assert core.state_dict()
    for name, tensor in core.state_dict().items():
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(low <= start and stop <= high for low, high in spans), name


@requirement("R5.7")
def test_a_write_to_mapped_weights_never_reaches_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    core = InferenceCore.from_pretrained(folder)
    core.embeddings.word_embeddings.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@requirement("R5.7")
def test_a_saved_model_with_a_head_a_prefix_and_no_pooler_is_loaded(folder):
    weights = {f"bert.{name}": tensor for name, tensor in core_of().state_dict().items()}
    more = {"cls.predictions.bias": torch.zeros(3)}
    more["bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file({**weights, **more}, folder / "model.safetensors")
    assert not hasattr(InferenceCore.from_pretrained(folder), "pooler")
    pooler = {"bert.pooler.dense.weight": torch.ones(8, 8), "bert.pooler.dense.bias": torch.ones(8)}
    save_file({**weights, **more, **pooler}, folder / "model.safetensors")
    core = InferenceCore.from_pretrained(folder)
    assert core.pooler.dense.weight.eq(1).all()
    assert np.array_equal(core.encode(["a"]), core_of().encode(["a"]))


@requirement("R5.7")
def test_sentence_transformers_files_decide_on_length_pooling_and_normalisation(folder):
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 5})
    modules = add_modules(folder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    config, tokenizer = read_folder(folder)
    assert tokenizer.truncation["max_length"] == 5
    assert (config.pooling, config.normalize) == (("cls",), True)
    core = InferenceCore.from_pretrained(folder)
    assert core.tokenize(["a b c d e f", "a"]) == [[2, 4, 5, 6, 3], [2, 4, 3]]
    length = np.linalg.norm(core.encode(["a b"]))
    assert abs(length - 1) <= gamma(16, np.dtype(np.float32))
    add_modules(folder, pooling_mode="mean")
    write_json(folder / "modules.json", modules[:2])
    config, _ = read_folder(folder)
    assert (config.pooling, config.normalize) == (("mean",), False)


@requirement("R5.7")
def test_a_text_with_more_tokens_than_positions_is_refused(folder):
    """Where the folder's limit is higher than the number of positions, the peer raises."""
    add_modules(folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 10**30})
    core = InferenceCore.from_pretrained(folder)
    assert len(core.tokenize(["a " * 14])[0]) == 16
    for work in (core.tokenize, core.encode, core.embed):
        with pytest.raises(ArgumentError, match="texts: expected at most 16 tokens each"):
            work(["a", "a " * 15])


@requirement("R5.7", "R7.1")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CardNotFoundError, match=re.escape(str(folder / name))) as caught:
        InferenceCore.from_pretrained(folder)
    assert isinstance(caught.value, FileNotFoundError)


@requirement("R5.7")
@pytest.mark.parametrize(
    "change",
    [{"model_type": "roberta"}, {"model_type": None}, {"position_embedding_type": "relative_key"}],
)
def test_another_kind_of_model_is_refused_with_what_to_do_instead(folder, change):
    write_config(folder, **change)
    error = refused(
        folder, f"expected {next(iter(change))} '.*opens the folder through sentence-transformers"
    )
    assert str(next(iter(change.values()))) in str(error)
    assert isinstance(error, TypeError)


@requirement("R5.7")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16}, r"word_embeddings.weight.*\[30, 8\].*\[30, 16\]"),
        ({"vocab_size": 31}, r"word_embeddings.weight.*\[30, 8\].*\[31, 8\]"),
        ({"num_hidden_layers": 3}, r"Missing key.*encoder.layer.2"),
        ({"hidden_act": "swish"}, r"one of \['gelu', 'relu', 'gelu_new'\].*found 'swish"),
        ({"hidden_size": ...}, r"config.json: expected positive sizes of a BERT.*hidden_size.: 0"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(folder, change, message):
    write_config(folder, **change)
    refused(folder, message)


@requirement("R5.7")
def test_a_weight_of_another_shape_is_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    save_file({**weights, name: torch.zeros(8, 7)}, folder / "model.safetensors")
    refused(folder, rf"{name}.*\[8, 7\].*\[8, 8\]")


BROKEN = {
    "config.json": [b"{", b"\xff", b"[]", b"null"],
    "modules.json": [b"{}"],
    "sentence_bert_config.json": [b"[]"],
    "tokenizer.json": [b"{}", b""],
    "model.safetensors": [b"", b"\xff" * 9, 7, 100, -1],
}
"""What a file holds, or where it is cut."""


@requirement("R5.7", "R7.8")
@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name in BROKEN for content in BROKEN[name]]
)
def test_a_broken_file_is_named(folder, name, content):
    add_modules(folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    refused(folder, re.escape(str(path)))


@requirement("R5.7")
def test_a_module_that_is_not_known_is_refused(folder):
    write_json(folder / "modules.json", [{"type": "sentence_transformers.models.CNN", "path": ""}])
    refused(folder, "any number of Dense, Normalize, found .*CNN")


@requirement("R5.7")
def test_a_tokenizer_and_a_sequence_of_texts_are_asked_for():
    for texts in ({"one text"}, [1], ["a", None]):
        with pytest.raises(ArgumentError, match="texts: expected a sequence of str, found"):
            core_of().encode(texts)
    with pytest.raises(UnsupportedModelError, match="encoder: expected a tokenizer, found none"):
        InferenceCore(CONFIG).encode(["a"])


@requirement("R5.7")
def test_a_text_without_a_token_gets_the_zero_vector_and_the_others_what_they_get_alone():
    core = core_of()
    core.tokenizer.post_processor = processors.TemplateProcessing(single="$A")  # no special tokens
    rows = core.encode(["", "a b", " ", "c"])
    assert not rows[[0, 2]].any()
    assert np.array_equal(core.encode([""]), rows[:1])
    gap = np.abs(rows[[1, 3]] - core.encode(["a b", "c"])).max()
    assert gap <= gamma(1000, np.dtype(np.float32))
    assert (core.encode([]).shape, core.encode([]).dtype) == ((0, 8), np.float32)
    for texts in ([], ["a", ""]):
        with pytest.raises(ArgumentError, match="expected one or several, each of at least one"):
            core.embed(texts)


@requirement("R3.14")
def test_the_pooler_is_reported_as_never_called():
    core = core_of(replace(CONFIG, pooler=True))
    assert [name for name, site in linears(core).items() if site.bypassed] == ["pooler.dense"]
    calls = []
    core.pooler.dense.register_forward_hook(lambda *_: calls.append(1))
    core.encode(["a"])
    assert not calls


@requirement("R5.8")
def test_as_many_sets_as_texts_are_asked_for():
    expected = r"encode: expected 1 texts, as named by lora\.rows"
    with pytest.raises(ShapeError, match=expected), lora.rows([0]):
        lora.adapt_rows(core_of(), [{}]).encode(["a", "b"])


@requirement("R5.7")
def test_no_gradient_is_kept_while_encoding():
    core = core_of().requires_grad_(requires_grad=True)
    seen = []
    core.encoder.layer[0].register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    core.encode(["a"])
    assert seen == [False]


@requirement("R5.7")
def test_a_batch_of_many_lengths_comes_back_in_the_order_of_the_texts():
    core, rng = core_of().double(), np.random.default_rng(0)
    sizes = rng.integers(0, 14, 300)
    texts = [" ".join("abcdef"[i] for i in rng.integers(0, 6, size)) for size in sizes]
    alone = np.concatenate([core.encode([text]) for text in texts])
    atol = gamma(1000, np.dtype(np.float64))
    assert np.allclose(core.encode(texts), alone, rtol=2 * np.finfo(np.float32).eps, atol=atol)


lengths = st.lists(st.integers(0, 40), max_size=40)


@requirement("R5.7")
@given(lengths, st.integers(1, 100), st.integers(1, 100) | st.just(math.inf))
def test_batches_hold_every_text_once_and_are_as_large_as_the_budget_allows(drawn, budget, full):
    """Texts come in the order of their lengths, so that those of a batch are alike."""
    assert list(batches(drawn)) == list(batches(drawn, encoder.TOKEN_BUDGET, unpadded=math.inf))
    groups = list(batches(drawn, budget, unpadded=full))
    rows = [row for batch in groups for row in batch]
    assert sorted(rows) == [row for row, length in enumerate(drawn) if length]
    assert [drawn[row] for row in rows] == sorted(filter(None, drawn), reverse=True)
    for batch in groups:
        assert len(batch) == 1 or len(batch) * drawn[batch[0]] <= budget
    for batch, following in itertools.pairwise(groups):
        longest, next_length = drawn[batch[0]], drawn[following[0]]
        full_enough = len(batch) * longest >= full and next_length < longest
        assert full_enough or (len(batch) + 1) * longest > budget
    for batch in groups:  # what was full took no padding more
        for count, row in enumerate(batch):
            assert drawn[row] == drawn[batch[0]] or count * drawn[batch[0]] < full


@requirement("R5.7")
def test_the_encoder_pads_no_batch_that_is_large_enough(monkeypatch):
    core, forward, sizes = core_of(), InferenceCore.forward, []

    def counted(self, ids, *others):
        sizes.append(tuple(ids.shape))
        return forward(self, ids, *others)

    monkeypatch.setattr(InferenceCore, "forward", counted)
    core.encode(["a b c d"] * 200 + ["a b c"] * 200)  # with a token before and one behind
    core.encode(["a b c d"] * 20 + ["a b c"] * 20)
    assert sizes == [(200, 6), (200, 5), (40, 6)]


rows_of_ids = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=6), min_size=1, max_size=6)


@requirement("R5.7")
@given(rows_of_ids)
def test_padding_keeps_every_token_and_the_mask_says_which(rows):
    ids, mask = pad(rows, torch.device("cpu"))
    assert (mask is None) == (len({len(row) for row in rows}) == 1)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    assert [ids[i][seen[i]].tolist() for i in range(len(rows))] == rows
    assert ids[~seen].eq(0).all()
    assert ids.shape == (len(rows), max(map(len, rows)))
