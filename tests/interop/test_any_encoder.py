"""Encoders of any kind, from folders made in place: engine, rows, batches, training, commands.

The expectation is sentence-transformers' own result for the folder, with PEFT where there are
adapters.
"""

import json
import shutil
import socket
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize
from tokenizers import normalizers
from torch import nn

import lora
from lora.batches import encode_batches
from lora.engine import ArrowEngine
from lora.errors import LoRAError, MissingPackageError, UnsupportedModelError
from lora.interop.peft import export_peft
from lora.models.any_encoder import PooledEncoder, open_encoder
from lora.models.encoder import InferenceCore
from lora.testing.plugin import requirement
from lora.training.data import Pairs
from lora.training.train import LoRATrainer, Settings
from tests.interop.test_encoder_folders import (
    TEXTS,
    VOCABULARY,
    bert_folder,
    change,
    dense,
    peer_of,
    plain_tokenizer,
    sentence_folder,
)
from tests.unit import letters

AGREEMENT = 1e-6

pytestmark = [  # what PEFT reads, and leaves open
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]

BERTS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERTS |= {"intermediate_size": 24, "max_position_embeddings": 70, "pad_token_id": 0}
KINDS = {
    "XLMRoberta": {**BERTS, "type_vocab_size": 1},
    "MPNet": BERTS,
    "ModernBert": {**BERTS, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3},
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "pad_token_id": 0},
    "DebertaV2": {**BERTS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
}
TARGETS = {"XLMRoberta": "query value", "MPNet": "q v", "ModernBert": "Wqkv", "T5": "q v"}
TARGETS |= {"DistilBert": "q_lin v_lin", "DebertaV2": "query_proj value_proj"}
EXTRAS = {
    "XLMRoberta": {"extra": (Normalize(),), "prompts": {"query": "the "}, "limit": 20},
    "MPNet": {"prompts": {"query": "the "}, "default_prompt_name": "query", "truncate_dim": 9},
    "ModernBert": {"pooling": "cls"},
    "DistilBert": {"extra": (dense(16, 12, nn.Tanh()), Normalize())},
    "DebertaV2": {"pooling": ("mean", "max")},
    "T5": {"pooling": "weightedmean"},
}


def random_folder(kind, folder, vocabulary=VOCABULARY, tokenizer=None, **options):
    """Save an encoder with random weights, each of which an embedding depends on."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": len(vocabulary), **KINDS[kind], **options}
    )
    model = transformers.AutoModel.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer = tokenizer or plain_tokenizer(normalizers.Lowercase(), model_max_length=64)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> a folder of sentence-transformers; its ``plain`` is one of transformers."""
    root, folders = tmp_path_factory.mktemp("encoders"), {}
    for kind in KINDS:
        plain = random_folder(kind, root / kind / "plain")
        folders[kind] = sentence_folder(plain, root / kind / "whole", **EXTRAS[kind])
    return folders


@pytest.fixture
def offline(monkeypatch):
    """Any connection is an error."""

    def refuse(*_):
        pytest.fail("a request was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def of_card(engine, seed=0, *, name="docs", **options):
    """A card that turns embeddings far round, for the default targets."""
    card = LoRATrainer(engine, rank=2, seed=seed, **options).initial
    rng, weights = np.random.default_rng(seed), {}
    for key, pair in card.weights.items():
        b = rng.normal(0, 0.5, pair.B.shape).astype(np.float32)
        weights[key] = lora.LowRank(pair.A, b, pair.scaling)
    examples = {"description": f"{name} of a file"}
    return lora.LoRACard(name, 2, 16.0, card.target_modules, weights, examples)


def with_peft(folder, card, place):
    """The peer with the card as an adapter of PEFT."""
    export_peft(card, place)
    peer = peer_of(folder)
    peer.load_adapter(str(place))
    return peer.double().eval()


@requirement("R26.10", "R5.7", "R5.10")
@pytest.mark.parametrize("form", ["whole", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_folder_gives_what_sentence_transformers_gives(folders, offline, kind, form):
    folder = folders[kind].with_name(form)
    engine, peer = ArrowEngine.from_pretrained(folder), peer_of(folder)
    expected = peer.encode(TEXTS)
    assert np.array_equal(engine.encode(TEXTS), expected)
    assert np.abs(expected[1:] - expected[0]).max(axis=1).min() > 100 * AGREEMENT
    assert np.array_equal(engine.encode(TEXTS[0], prompt="a "), peer.encode(TEXTS[0], prompt="a "))
    assert engine.encode([]).shape == (0, expected.shape[1])
    with pytest.raises(LoRAError, match="half of a surrogate pair"):
        engine.encode("\ud800")
    assert not any(parameter.requires_grad for parameter in engine.base.parameters())


@requirement("R26.10", "R5.10", "R17.1")
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_does_what_it_does_in_peft(folders, tmp_path, kind):
    """Loaded, for one call, for each row and by the router; it has the names that PEFT knows."""
    folder = folders[kind]
    engine = ArrowEngine(open_encoder(folder).double())  # so that no rounding is amplified
    docs, food = of_card(engine), of_card(engine, seed=1, name="food")
    assert docs.target_modules == tuple(TARGETS[kind].split())
    base, bound = engine.encode(TEXTS), AGREEMENT * np.abs(engine.encode(TEXTS)).max()
    docs_expected, food_expected = (
        with_peft(folder, card, tmp_path / card.name).encode(TEXTS) for card in (docs, food)
    )
    assert np.abs(docs_expected - base).max() > 1e4 * bound
    lora.save(docs, tmp_path / "docs.lora.arrow")
    engine.register_lora(food)
    engine.load_lora(tmp_path / "docs.lora.arrow", strict=True)
    assert np.abs(engine.encode(TEXTS) - docs_expected).max() <= bound
    choices = (["docs", "food", {}] * len(TEXTS))[: len(TEXTS)]
    rows = engine.encode_with_lora(TEXTS, choices).embeddings
    for start, expected in enumerate((docs_expected, food_expected, base)):
        assert np.abs(rows - expected)[start::3].max() <= bound
    encoding = engine.encode_with_lora(TEXTS, intent_query="food of a file")
    assert [route.name for route in encoding.routes] == ["food"]
    assert np.abs(encoding.embeddings - food_expected).max() <= bound


@requirement("R26.10", "R5.12")
def test_batches_of_any_folder(folders, tmp_path):
    folder = folders["MPNet"]
    engine = ArrowEngine.from_pretrained(folder)
    card = of_card(engine)
    lora.save(card, tmp_path / "docs.lora.arrow")
    parts = [
        pa.record_batch({"text": part}, pa.schema({"text": pa.string()}))
        for part in (TEXTS[:3], [None, None], [], TEXTS[3:])
    ]
    cards = [tmp_path / "docs.lora.arrow"]
    encoded = list(encode_batches(parts, model=folder, cards=cards, adapter="docs"))
    assert len({batch.schema for batch in encoded}) == 1
    rows = pa.Table.from_batches(encoded)["embedding"].to_pylist()
    expected = engine.encode_with_lora(TEXTS, card).embeddings
    assert rows[3:5] == [None, None]
    assert np.abs(np.array(rows[:3] + rows[5:]) - expected).max() <= AGREEMENT


@requirement("R5.7", "R26.10")
def test_a_bert_folder_stays_with_the_core_unless_it_does_not_compute_it(tmp_path):
    folder = bert_folder(tmp_path / "bert")
    assert type(open_encoder(folder)) is InferenceCore
    change(folder / "config.json", hidden_act="silu")
    assert np.array_equal(
        ArrowEngine.from_pretrained(folder).encode(TEXTS), peer_of(folder).encode(TEXTS)
    )


def without_weights(*names):
    def damage(folder):
        path = folder / "model.safetensors"
        kept = {k: v for k, v in load_file(path).items() if not k.endswith(names)}
        save_file(kept, path, {"format": "pt"})

    return damage


def sentence(**values):
    return lambda folder: change(folder / "config_sentence_transformers.json", **values)


def with_code(file):
    return lambda folder: change(folder / file, auto_map={"AutoModel": "own.Model"})


def with_foreign_module(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[-1]["type"] = "own.Module"
    (folder / "modules.json").write_text(json.dumps(modules))


def with_foreign_activation(folder):
    change(folder / "2_Dense/config.json", activation_function="own.Gelu")


def without_vocabulary(folder):
    change(folder / "tokenizer_config.json", tokenizer_class="DistilBertTokenizer")
    (folder / "tokenizer.json").unlink()


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_shard(folder):
    names = load_file(folder / "model.safetensors")
    index = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")


@requirement("R5.7", "R26.10")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights("1.attention.q_lin.bias"), "none of 'transformer.layer.1.attention"),
        (with_code("config.json"), "auto_map: expected a model that installed code computes"),
        (with_code("tokenizer_config.json"), "auto_map.*if you trust its code"),
        (with_foreign_module, "trust_remote_code"),
        (with_foreign_activation, "2_Dense.*activation_function.*'own.Gelu'"),
        (as_pickle, "weights as safetensors"),
        (lambda folder: as_pickle(folder / "2_Dense"), "2_Dense: expected weights as safetensors"),
        (
            sentence(model_type="SparseEncoder"),
            "model_type: expected SentenceTransformer, found 'SparseEncoder'",
        ),
        (sentence(truncate_dim=0), "expected a truncate_dim of at least 1, found 0"),
        (sentence(truncate_dim="9"), "sentence-transformers opens.*TypeError: slice indices"),
        pytest.param(
            lambda folder: change(
                folder / "config.json",
                quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
            ),
            "sentence-transformers opens.*AttributeError",
            marks=pytest.mark.slow,
        ),
        (without_a_shard, "sentence-transformers opens.*model-2.safetensors"),
        (without_vocabulary, "expected the vocabulary of its tokenizer.*'tokenizer.json'"),
        (lambda folder: change(folder / "config.json", model_type="unheard-of"), "unheard-of"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "sentence-transformers"),
    ],
)
def test_what_cannot_be_opened_soundly_is_refused_by_name(
    folders, tmp_path, offline, damage, message
):
    folder = shutil.copytree(folders["DistilBert"], tmp_path / "folder")
    damage(folder)
    with pytest.raises(UnsupportedModelError, match=message):
        open_encoder(folder)


@requirement("R5.7")
def test_weights_that_no_embedding_needs_may_be_missing(folders, tmp_path):
    folder = shutil.copytree(folders["XLMRoberta"], tmp_path / "folder")
    without_weights("pooler.dense.weight", "pooler.dense.bias")(folder)
    (folder / "labels_config.json").write_text("[]")  # which nothing reads
    expected = ArrowEngine.from_pretrained(folders["XLMRoberta"]).encode(TEXTS)
    assert np.array_equal(ArrowEngine.from_pretrained(folder).encode(TEXTS), expected)


@requirement("R5.7", "R26.10")
def test_what_is_broken_is_not_opened_in_another_way(tmp_path, offline):
    folder = bert_folder(tmp_path / "bert")
    without_weights("1.attention.self.query.bias")(folder)
    with pytest.raises(UnsupportedModelError, match="the weights that config"):
        open_encoder(folder)
    with pytest.raises(LoRAError, match="expected an existing path"):
        open_encoder("sentence-transformers/all-mpnet-base-v2")


@requirement("R5.7", "R25.3")
def test_without_sentence_transformers_the_error_says_how_to_install_it(folders, monkeypatch, here):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingPackageError, match=r"model_type 'bert'.*'mpnet'.*cards\[st\]"):
        open_encoder(folders["MPNet"])
    code, out, err = here("encode", "a file", "--model", folders["MPNet"])
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "pip install 'lora-cards[st]'" in err


PAIRS = [(f"a {a} file {b}", f"the {b} quick {a}") for a in "bcd" for b in "one two three".split()]


def trained_by_peers(folder, trainer, pairs, steps, lr):
    """PEFT's adapter and sentence-transformers' loss on the same pairs: factors and losses."""
    peer, card = peer_of(folder), trainer.initial
    options = {"r": card.rank, "lora_alpha": card.alpha, "target_modules": [*card.target_modules]}
    peer.add_adapter(LoraConfig(**options))
    factors = {n: p for n, p in peer.transformers_model.named_parameters() if "lora_" in n}
    for key, pair in card.weights.items():
        factors[f"{key}.lora_A.default.weight"].data = torch.tensor(pair.A.T.copy())
    loss = MultipleNegativesRankingLoss(
        peer.eval(), directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    optimizer = torch.optim.AdamW(factors.values(), lr=lr, weight_decay=0.0)
    losses, prompt = [], peer.prompts.get(peer.default_prompt_name)
    for _ in range(steps):
        sides = [peer.preprocess(side, prompt=prompt) for side in (pairs.queries, pairs.positives)]
        value = loss(sides, None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return {key: factors[f"{key}.lora_B.default.weight"].detach().T for key in card.weights}, losses


@requirement("R17.1", "R26.10")
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_sentence_transformers_and_peft(folders, tmp_path, kind):
    plain = folders[kind].with_name("plain")
    prompts = {"prompts": {"query": "the "}, "default_prompt_name": "query"}
    folder = sentence_folder(plain, tmp_path / "mean", **prompts)
    settings = Settings(epochs=4, lr=1e-3, batch_size=7, share=0.8)
    trainer = LoRATrainer(ArrowEngine.from_pretrained(folder), rank=2, settings=settings)
    pairs, _ = Pairs.of(PAIRS).split(0.8)
    result = trainer.train(PAIRS, name="docs")
    expected, losses = trained_by_peers(folder, trainer, pairs, 4, 1e-3)
    assert result.history["loss"].to_pylist() == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    for key, factor in expected.items():
        assert (
            np.abs(result.card.weights[key].B - factor.numpy()).max() <= 0.02 * factor.abs().max()
        )


@requirement("R17.1", "R5.10")
def test_a_transformers_encoder_is_trained_with_the_pooling_that_it_is_given(folders, tmp_path):
    plain = folders["XLMRoberta"].with_name("plain")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain)
    model = transformers.AutoModel.from_pretrained(plain)
    for pooling in ("mean", ("cls", "max")):
        folder = sentence_folder(plain, tmp_path / str(pooling), pooling=pooling)
        engines = (
            ArrowEngine(PooledEncoder(model, tokenizer, pooling)),
            ArrowEngine(peer_of(folder)),
        )
        mine, theirs = (engine.encode(TEXTS) for engine in engines)
        assert np.abs(mine - theirs).max() <= AGREEMENT * np.abs(theirs).max()
        settings = Settings(epochs=2, batch_size=4, checkpointing=True)
        cards = [LoRATrainer(e, settings=settings).train(PAIRS, name="docs").card for e in engines]
        assert cards[0].base_fingerprint == cards[1].base_fingerprint
        for key, pair in cards[1].weights.items():
            assert np.abs(cards[0].weights[key].B - pair.B).max() <= 1e-3 * np.abs(pair.B).max()
    normal = PooledEncoder(model, tokenizer, normalize=True).encode(TEXTS)
    assert np.allclose(np.linalg.norm(normal, axis=1), 1)
    assert PooledEncoder(model, tokenizer).encode([]).shape == (0, 16)
    with pytest.raises(LoRAError, match="pooling: expected one of cls, max"):
        PooledEncoder(model, tokenizer, "median")


@requirement("R17.1", "R3.9")
@pytest.mark.parametrize("loss", ["cosine", "triplet"])
def test_a_card_trained_through_sentence_transformers_is_one_of_the_core(tmp_path, loss):
    """All losses, sources of pairs and options; the encoder that is trained on stays as it is."""
    folder = bert_folder(tmp_path / "bert", hidden_dropout_prob=0.5)
    peer, cards = peer_of(folder), []
    before, modes = peer.encode(TEXTS), [module.training for module in peer.modules()]
    settings = Settings(epochs=3, batch_size=4, loss=loss, accumulate=2, validate_every=1)
    for encoder, pairs in ((peer, Pairs.of(PAIRS).table), (open_encoder(folder), PAIRS)):
        trainer = LoRATrainer(ArrowEngine(encoder), rank=2, settings=settings)
        cards.append(trainer.train(pairs, name="docs").card)
    assert cards[0].base_fingerprint == cards[1].base_fingerprint
    for key, pair in cards[1].weights.items():
        assert np.abs(pair.B).max() > 0
        assert np.abs(cards[0].weights[key].B - pair.B).max() <= 1e-3 * np.abs(pair.B).max()
    assert np.array_equal(peer.encode(TEXTS), before)
    assert modes == [module.training for module in peer.modules()]
    assert all(parameter.requires_grad for parameter in peer.parameters())


@requirement("R17.1")
def test_an_encoder_without_gradients_is_refused_by_name(folders):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = open_encoder(folders["XLMRoberta"])

        def encode(self, texts):
            return self.inner.encode(texts)

    with pytest.raises(UnsupportedModelError, match=r"embed\(texts\), found Frozen; .*PooledEnc"):
        LoRATrainer(ArrowEngine(Frozen()))
    Frozen.embed = lambda self, texts: torch.tensor(self.encode(texts))
    with pytest.raises(UnsupportedModelError, match="Frozen: expected embeddings that gradients"):
        LoRATrainer(ArrowEngine(Frozen())).train(PAIRS, name="docs")


@pytest.fixture(scope="module")
def letter_folder(tmp_path_factory):
    """An encoder for the language of `letters`, in which something can be learned."""
    root = tmp_path_factory.mktemp("letters")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters.core().tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    vocabulary = tokenizer.get_vocab()
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    random_folder("MPNet", root / "plain", vocabulary, tokenizer, **sizes)
    return sentence_folder(root / "plain", root / "whole", limit=16)


@requirement("R26.10", "R25.2", "R15.4")
def test_every_command_that_runs_a_model_takes_the_folder(letter_folder, tmp_path, here):
    data, held_out = letters.combined("abcd").split(0.7)
    data.save(tmp_path / "pairs.jsonl")
    held_out.save(tmp_path / "held-out.jsonl")
    peer, model = peer_of(letter_folder), ("--model", letter_folder, "--json")

    def run(*words, status=0):
        code, out, err = here(*words, *model)
        assert code == status, err
        return json.loads(out)

    texts = held_out.queries[:4]
    assert np.abs(np.array(run("encode", *texts)) - peer.encode(texts)).max() <= AGREEMENT
    card = tmp_path / "docs.lora.arrow"
    trained = ("train", tmp_path / "pairs.jsonl", "--name", "docs", "--description", "ea gc")
    facts = run(*trained, "--out", card, "--steps", 12, "--loss", "triplet", "--rank", 4)
    assert facts["after"]["mrr"] > facts["before"]["mrr"]
    lora_card = lora.load(card)
    adapted = with_peft(letter_folder, lora_card, tmp_path / "peft")
    encoded = np.array(run("encode", *texts, "--card", card))
    assert np.abs(encoded - adapted.encode(texts)).max() <= 10 * AGREEMENT
    (route,) = run("route", "ea gc", "--card", card)
    assert route["name"] == "docs"
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert len(run("probe", tmp_path / "texts.txt")["hot"]) == 1
    figures = run("eval", card, card, "--pairs", tmp_path / "held-out.jsonl")
    expected = [reciprocal(model, held_out) for model in (peer, adapted)]
    assert figures["queries"] == len(held_out)
    for shown, shares in zip((figures["base"], figures["cards"][1]), expected, strict=True):
        assert shown["mrr"] == pytest.approx(shares.mean(), abs=0.01)
        assert shown["recall_at_1"] == pytest.approx((shares == 1).mean(), abs=0.02)
    gain = figures["cards"][0]
    assert gain["gain"] == pytest.approx(gain["mrr"] - figures["base"]["mrr"])
    assert gain["lower"] < gain["gain"] < gain["upper"]
    code, out, _ = here("eval", card, "--pairs", tmp_path / "held-out.jsonl", *model[:2])
    assert code == 0
    assert "(base)" in out
    assert f"{gain['gain']:+.3f}" in out


def reciprocal(model, pairs):
    """Reciprocal ranks, written out."""
    answers = sorted(set(pairs.positives))
    queries, found = (model.encode(texts).astype(float) for texts in (pairs.queries, answers))
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(found, axis=1)
    scores = queries @ found.T / lengths
    own = [row[answers.index(text)] for row, text in zip(scores, pairs.positives, strict=True)]
    return 1 / (scores >= np.array(own)[:, None]).sum(axis=1)


@pytest.mark.slow
@requirement("R26.10", "R18.3")
def test_a_cycle_of_learning_runs_on_the_folder(letter_folder, tmp_path, here):
    documents = letters.write_documents(tmp_path / "notes", "abcd")
    words = ("evolve", documents, "--out", tmp_path / "skills", "--name", "notes", "--steps", 8)
    words += ("--documents-only", "--placebos", tmp_path / "placebos", "--json")
    code, out, err = here(*words, "--model", letter_folder)
    assert code in (0, 3), err
    facts = json.loads(out)
    base = facts["figures"]["changes"]["base"]
    assert base["queries"] >= 128
    assert {"base"} < set(facts["figures"]["changes"])
    if facts["live"]:
        encoded = here("encode", "ea gc", "--card", facts["file"], "--model", letter_folder)
        assert encoded[0] == 0
