"""Folders of encoders, saved by the installed libraries or changed by hand.

The expectation is always sentence-transformers' own result for the same folder.
"""

import json
import shutil
import warnings
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedTokenizerFast

from lora.errors import ArgumentError, LoRAError, UnsupportedModelError
from lora.models import encoder
from lora.models.encoder import InferenceCore
from lora.testing.plugin import requirement

AGREEMENT = 1e-5
MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
TEXTS = ["Read a file", "The QUICK Brown Fox", "é à ü naïve Café e\u0301", "", "   a    b  "]
TEXTS += [
    "query: what is Python?",
    "a [SEP] b [MASK] c [CLS] [PAD]",
    "日本語 テキスト 🙂",
    "\x00\n",
]
TEXTS += ["one two three four five six seven eight nine ten " * 9, "x" * 120]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "read a file the quick brown fox cafe query what is python b c one two three four Read The Café"
)
CHARACTERS = [chr(code) for code in range(33, 127)] + list("éàüï日本語")
TOKENS = [*SPECIAL, *WORDS.split(), *CHARACTERS, *("##" + letter for letter in CHARACTERS)]
VOCABULARY = {token: index for index, token in enumerate(dict.fromkeys(TOKENS))}
NAMES = dict(
    zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], SPECIAL, strict=True)
)


def bert_folder(folder, tokenizer=None, **config):
    """Save a tiny BertModel and a tokenizer with transformers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    model = BertModel(BertConfig(**{**sizes, "initializer_range": 0.4, **config})).eval()
    model.save_pretrained(folder)
    (tokenizer or bert_tokenizer()).save_pretrained(folder)
    return folder


def bert_tokenizer(**options):
    return BertTokenizer(vocab=VOCABULARY, **NAMES, **options)


def plain_tokenizer(normalizer, template="[CLS] $A [SEP]", **options):
    """A tokenizer that is not of BERT's class: tokenizer.json decides on everything."""
    backend = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES, **options)


def sentence_folder(source, folder, *, pooling="mean", extra=(), limit=None, **options):
    """Save a folder of sentence-transformers over one of transformers."""
    transformer = Transformer(str(source), max_seq_length=limit)
    width = transformer.get_embedding_dimension()
    include = options.pop("include_prompt", True)
    modules = [transformer, Pooling(width, pooling, include_prompt=include), *extra]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder))
    return folder


def change(path, **values):
    """Change keys of a JSON file; a value of `...` removes the key."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored = {key: value for key, value in {**stored, **values}.items() if value is not ...}
    path.write_text(json.dumps(stored))


def peer_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def gap(folder, **options):
    """The largest difference from the peer, alone and in a batch; without options, in training."""
    core, peer = InferenceCore.from_pretrained(folder), peer_of(folder)
    expected = np.stack([peer.encode(text, **options) for text in TEXTS])
    alone = np.stack([core.encode(text, **options) for text in TEXTS])
    together = core.encode(TEXTS, **options)
    assert alone.shape == together.shape == expected.shape
    assert np.abs(expected[0] - expected[1]).max() > 100 * AGREEMENT  # texts do differ
    results = [alone, together] if options else [alone, together, core.embed(TEXTS).numpy()]
    return max(np.abs(result - expected).max() for result in results)


def dense(inputs, outputs, activation, *, bias=True):
    torch.manual_seed(1)
    return Dense(inputs, outputs, bias=bias, activation_function=activation)


def old_layout(folder):
    """Version 1 and 2 of sentence-transformers: the model in a folder of its own, flags."""
    inner = folder / "0_Transformer"
    bert_folder(inner)
    change(inner / "sentence_bert_config.json", max_seq_length=20, do_lower_case=False)
    (folder / "1_Pooling").mkdir()
    flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    change(folder / "1_Pooling/config.json", word_embedding_dimension=16, **flags)
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (kind, path) in enumerate(
            [
                ("Transformer", "0_Transformer"),
                ("Pooling", "1_Pooling"),
                ("Normalize", "2_Normalize"),
            ]
        )
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def old_flags(*modes):
    def build(folder):
        old_layout(folder)
        names = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens"]
        names += ["weightedmean_tokens", "lasttoken"]
        flags = {f"pooling_mode_{name}": name in modes for name in names}
        change(folder / "1_Pooling/config.json", **flags)

    return build


def saved(source=None, **options):
    """A builder of a folder; `source` are the keywords of `bert_folder`."""

    def build(folder):
        arguments = {
            key: make() if callable(make) else make for key, make in (source or {}).items()
        }
        bert_folder(folder / "source", **arguments)
        extra = options.get("extra", list)()
        sentence_folder(folder / "source", folder, **{**options, "extra": extra})
        shutil.rmtree(folder / "source")

    return build


def plain(**source):
    return lambda folder: bert_folder(
        folder, **{k: v() if callable(v) else v for k, v in source.items()}
    )


FOLDERS = {f"pooling {mode}": saved(pooling=mode) for mode in MODES}
FOLDERS |= {
    f"poolings {first}, {second}": saved(pooling=(first, second), extra=lambda: [Normalize()])
    for first, second in [*pairwise(MODES), ("lasttoken", "cls"), ("mean", "mean")]
}
FOLDERS["every pooling"] = saved(pooling=tuple(MODES))
FOLDERS |= {f"limit {limit}": saved(limit=limit) for limit in (3, 4, 5, 17, 63, 64)}
FOLDERS |= {
    f"activation {kind}": saved(extra=lambda kind=kind: [dense(16, 9, getattr(torch.nn, kind)())])
    for kind in encoder.DENSE_ACTIVATIONS
}
FOLDERS["dense twice, normalised"] = saved(
    pooling=("cls", "mean"),
    extra=lambda: [dense(32, 7, torch.nn.ReLU()), dense(7, 5, None, bias=False), Normalize()],
)
PROMPTS = {"query": "query: ", "passage": "the "}
FOLDERS |= {
    f"default prompt {name}": saved(prompts=PROMPTS, default_prompt_name=name)
    for name in (None, "query", "passage")
}
FOLDERS |= {
    f"prompt left out of {mode}": saved(
        prompts=PROMPTS, default_prompt_name="query", include_prompt=False, pooling=mode
    )
    for mode in [*MODES, ("mean", "cls")]
}
FOLDERS["truncated after a normalisation"] = saved(truncate_dim=8, extra=lambda: [Normalize()])
FOLDERS |= {f"truncated to {size}": saved(truncate_dim=size) for size in (1, 8, 16, 99)}
FOLDERS |= {
    f"{name} {value}": plain(
        tokenizer=lambda name=name, value=value: bert_tokenizer(**{name: value})
    )
    for name, value in product(
        ["do_lower_case", "strip_accents", "tokenize_chinese_chars"], [True, False]
    )
}
FOLDERS |= {
    f"model_max_length {limit}": plain(
        tokenizer=lambda limit=limit: bert_tokenizer(model_max_length=limit)
    )
    for limit in (5, 30, 500)
}
FOLDERS["truncation on the left"] = saved(
    {"tokenizer": lambda: bert_tokenizer(truncation_side="left")}, limit=9
)
NORMALIZERS = {
    "none": lambda: None,
    "cased": lambda: normalizers.BertNormalizer(lowercase=False),
    "sequence": lambda: normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()]),
}
FOLDERS |= {
    f"normalizer {name}": plain(tokenizer=lambda make=make: plain_tokenizer(make()))
    for name, make in NORMALIZERS.items()
}
FOLDERS["no mark at the end"] = saved(
    {"tokenizer": lambda: plain_tokenizer(None, "[CLS] $A")},
    prompts=PROMPTS,
    default_prompt_name="query",
    include_prompt=False,
)
FOLDERS |= {f"activation {name}": plain(hidden_act=name) for name in encoder.ACTIVATIONS}
FOLDERS |= {
    f"{name} {value}": plain(**{name: value})
    for name, value in [
        ("layer_norm_eps", 0.1),
        ("type_vocab_size", 1),
        ("pad_token_id", 7),
        ("pad_token_id", None),
        ("num_attention_heads", 4),
        ("num_hidden_layers", 1),
        ("use_cache", False),
    ]
}
FOLDERS["old layout"] = old_layout


def old_name(folder):
    inner = old_layout(folder) / "0_Transformer"
    (inner / "sentence_bert_config.json").rename(inner / "sentence_xlnet_config.json")


FOLDERS["old layout, settings under an old name"] = old_name
FOLDERS |= {
    f"old flags {' '.join(modes)}": old_flags(*modes)
    for modes in [
        [],
        ["max_tokens"],
        ["lasttoken"],
        ["cls_token", "mean_tokens"],
        ["max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens"],
    ]
}


def lower_cased(folder):
    saved({"tokenizer": lambda: bert_tokenizer(do_lower_case=False)})(folder)
    change(folder / "sentence_bert_config.json", max_seq_length=30, do_lower_case=True)


FOLDERS["a lower-casing before a cased tokenizer"] = lower_cased
EVERY = sorted(FOLDERS)


@requirement("R5.7")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (i % 5 > 0)) for i, name in enumerate(EVERY)],
)
def test_a_saved_folder_gives_what_sentence_transformers_gives(tmp_path, name):
    FOLDERS[name](tmp_path)
    assert gap(tmp_path) <= AGREEMENT


VALUES = [..., None, True, False, 0, 1, -1, 5, 1.5, "", "a", "gelu", "[MASK]"]
VALUES += [[], ["a"], [["a"]], {}, {"a": 1}]
MUTATED = {
    "config.json": """
        hidden_act layer_norm_eps pad_token_id is_decoder add_cross_attention type_vocab_size
        position_embedding_type model_type quantization_config dtype hidden_size vocab_size
        num_attention_heads num_hidden_layers intermediate_size max_position_embeddings unknown
        auto_map pruned_heads is_encoder_decoder architectures chunk_size_feed_forward
        is_causal sliding_window attention_chunk_size output_hidden_states return_dict torchscript
        embedding_size layer_types _attn_implementation hidden_dropout_prob
    """,
    "sentence_bert_config.json": """
        max_seq_length do_lower_case transformer_task modality_config module_output_name
        processing_kwargs model_args tokenizer_args query_expansion unpad_inputs unknown
    """,
    "config_sentence_transformers.json": """
        prompts default_prompt_name truncate_dim similarity_fn_name model_type unknown
    """,
    "tokenizer_config.json": """
        model_max_length do_lower_case strip_accents tokenize_chinese_chars padding_side
        truncation_side tokenizer_class cls_token unk_token model_input_names
        split_special_tokens added_tokens_decoder extra_special_tokens unknown
    """,
    "special_tokens_map.json": "sep_token additional_special_tokens unknown",
    "added_tokens.json": "[MASK] new",
    "tokenizer.json": "normalizer pre_tokenizer post_processor truncation padding added_tokens",
    "1_Pooling/config.json": "pooling_mode embedding_dimension include_prompt unknown",
    "2_Dense/config.json": """
        in_features out_features bias activation_function module_input_name module_output_name
        use_residual unknown
    """,
}
MUTATIONS = [(file, key) for file, keys in MUTATED.items() for key in keys.split()]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    saved(extra=lambda: [dense(16, 9, torch.nn.Tanh())])(folder)
    return folder


@requirement("R5.7")
@pytest.mark.parametrize(
    ("file", "key"),
    [pytest.param(*m, marks=[pytest.mark.slow] * (i % 8 > 0)) for i, m in enumerate(MUTATIONS)],
)
def test_an_odd_value_of_a_key_gives_the_peers_result_or_a_named_refusal(
    tmp_path, original, file, key
):
    outcomes = set()
    for index, value in enumerate(VALUES):
        folder = shutil.copytree(original, tmp_path / str(index))
        change(folder / file, **{key: value})
        try:
            core = InferenceCore.from_pretrained(folder)
            result = core.encode(TEXTS)
        except LoRAError:
            outcomes.add("refused")
            continue
        try:
            expected = peer_of(folder).encode(TEXTS)
        except Exception:  # noqa: BLE001, S112 - whatever the peer raises, it has no other vector
            continue
        assert result.shape == expected.shape, value
        assert np.abs(result - expected).max() <= AGREEMENT, value
        outcomes.add("same")
    assert outcomes


REFUSED = [
    ("config.json", {"is_decoder": True}, "is_decoder False"),
    ("config.json", {"model_type": "roberta"}, "model_type 'bert'"),
    ("config.json", {"quantization_config": {"load_in_8bit": True}}, "quantization_config None"),
    ("config.json", {"dtype": "float16"}, "one dtype"),
    ("config.json", {"hidden_act": "swish"}, "hidden_act: expected one of .*'swish'"),
    ("adapter_config.json", {"peft_type": "LORA"}, "without an adapter"),
    ("sentence_bert_config.json", {"query_expansion": {"length": 3}}, "query_expansion None"),
    ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SentenceTransformer"),
    ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name of"),
    ("tokenizer_config.json", {"padding_side": "left"}, "padding_side 'right'"),
    ("tokenizer_config.json", {"sep_token": "[END]"}, "added tokens of tokenizer.json"),
    ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode: expected one of"),
    ("2_Dense/config.json", {"use_residual": True}, "use_residual False"),
    (
        "2_Dense/config.json",
        {"activation_function": "evil.Code"},
        "activation_function of torch.nn",
    ),
    (
        "2_Dense/config.json",
        {"activation_function": "torch.nn.Softmax"},
        "activation_function: expected",
    ),
]


@requirement("R5.7")
@pytest.mark.parametrize(("file", "values", "message"), REFUSED)
def test_what_is_not_computed_is_refused_by_name_with_the_way_out(
    tmp_path, original, file, values, message
):
    folder = shutil.copytree(original, tmp_path / "folder")
    change(folder / file, **values)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        InferenceCore.from_pretrained(folder)
    assert "pip install 'lora-cards[st]'" in str(caught.value)


@requirement("R5.7")
@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "the "},
        {"prompt": "", "prompt_name": "query"},
        {"prompt_name": "query"},
        {"prompt_name": "document"},
        {"normalize_embeddings": True},
        {"batch_size": 1},
        {"batch_size": 3, "prompt_name": "passage", "normalize_embeddings": True},
    ],
)
def test_keywords_of_encode_mean_what_they_mean_to_the_peer(tmp_path, options):
    saved(prompts=PROMPTS, default_prompt_name="passage", truncate_dim=9)(tmp_path)
    assert gap(tmp_path, **options) <= AGREEMENT


@requirement("R5.7")
def test_batch_size_is_the_largest_number_of_texts_in_a_forward_pass(original):
    core, sizes = InferenceCore.from_pretrained(original), []
    core.encoder.layer[0].register_forward_hook(lambda *args: sizes.append(len(args[2])))
    core.encode(["a"] * 7, batch_size=3)
    assert sizes == [3, 3, 1]
    for options in ({"batch_size": 0}, {"batch_size": True}, {"prompt": 3}, {"prompt_name": []}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            core.encode(["a"], **options)


@requirement("R5.7")
@pytest.mark.parametrize("texts", ["bad \ud83d text", ["fine", "bad \ud83d text"]])
def test_half_of_a_surrogate_pair_is_an_argument_error(original, texts):
    with pytest.raises(ArgumentError, match="texts: expected text that UTF-8 can hold"):
        InferenceCore.from_pretrained(original).encode(texts)
