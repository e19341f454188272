"""Read the files of a BERT encoder's folder: everything in them that decides about an embedding.

Each key of each file has a rule: the types or values that this implementation computes, or any
value where the key changes no embedding. Any other key or value is refused by name, because a
reader that skips it returns other vectors than sentence-transformers does. In ``config.json`` other
keys are left alone, as ``BertModel`` leaves them.

Requirements: R5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from lora.checks import parse_json
from lora.errors import UnsupportedModelError, shown
from lora.files import os_errors

HINT = (
    "ArrowEngine.from_pretrained opens the folder through sentence-transformers "
    "(pip install 'lora-cards[st]')"
)
"""The hint of every refusal of what is whole, and may be computed by others."""

POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of sentence-transformers' older files, in the order in which their vectors are joined."""

ANY = ()
"""The rule of a key that changes no embedding; other rules list types, values, or both."""
Rules = Mapping[str, tuple[Any, ...]]

SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["intermediate_size", "max_position_embeddings", "type_vocab_size"]
MODEL: Rules = {
    "model_type": ("bert",),
    **dict.fromkeys(SIZES, (int,)),
    "layer_norm_eps": (float,),
    "hidden_act": (str,),
    "architectures": (list, None),
    **dict.fromkeys(["dtype", "torch_dtype"], (str, None)),
    **dict.fromkeys(["auto_map", "quantization_config"], (None,)),
    **dict.fromkeys(["add_cross_attention", "is_decoder", "is_encoder_decoder"], (False,)),
    "position_embedding_type": ("absolute",),
    "pruned_heads": (None, {}),
    **dict.fromkeys(["return_dict", "use_return_dict"], (True,)),
}

MODULE: Rules = {**dict.fromkeys(["type", "path", "name"], (str,)), "idx": ANY, "kwargs": ANY}
POOLING: Rules = {
    **dict.fromkeys(["word_embedding_dimension", "embedding_dimension"], (int,)),
    "pooling_mode": (str, list),
    **dict.fromkeys([*POOLINGS, "include_prompt"], (bool,)),
}
NORMALIZE: Rules = {
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding", None),
}
DENSE: Rules = {
    **NORMALIZE,
    **dict.fromkeys(["in_features", "out_features"], (int,)),
    "bias": (bool,),
    "activation_function": (str,),
    "use_residual": (False,),
}

SENTENCE_FILES = ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"]
"""Old names are ``sentence_NAME_config.json``; the first that is not empty counts."""
SENTENCE: Rules = {
    "max_seq_length": (int, None),
    "do_lower_case": (bool,),
    **{f"{name}_args": ({},) for name in ("model", "tokenizer", "config")},
    **{f"{name}_kwargs": ({},) for name in ("model", "processor", "config")},
    "processing_kwargs": ({}, None),
    "transformer_task": ("feature-extraction",),
    "modality_config": (
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    ),
    "module_output_name": ("token_embeddings",),
    **dict.fromkeys(["query_expansion", "tokenizer_name_or_path"], (None,)),
    **dict.fromkeys(["unpad_inputs", "query_length", "document_length"], ANY),
}
PROMPTS: Rules = {
    "prompts": (dict,),
    "default_prompt_name": (str, None),
    "truncate_dim": (int, None),
    "model_type": ("SentenceTransformer",),
    **dict.fromkeys(["__version__", "similarity_fn_name", "requirements"], ANY),
}

TOKENS = [f"{name}_token" for name in ("unk", "sep", "pad", "cls", "mask", "bos", "eos")]
TOKEN_LISTS = ["additional_special_tokens", "extra_special_tokens"]
TOKENIZER: Rules = {
    "model_max_length": (int, float),
    "model_input_names": (list,),
    "tokenizer_class": (str, None),
    **dict.fromkeys(["do_lower_case", "tokenize_chinese_chars"], (bool,)),
    "strip_accents": (bool, None),
    **dict.fromkeys(TOKENS, (str, dict, None)),
    **dict.fromkeys(TOKEN_LISTS, (list, None)),
    "added_tokens_decoder": (dict,),
    **dict.fromkeys(["add_bos_token", "add_eos_token", "split_special_tokens"], (False,)),
    "auto_map": (None,),
    "padding_side": ("right",),
    "truncation_side": ("right", "left"),
    "backend": ("tokenizers",),
    **dict.fromkeys(["clean_up_tokenization_spaces", "do_basic_tokenize", "never_split"], ANY),
    **dict.fromkeys(["is_local", "local_files_only", "name_or_path", "tokenizer_file"], ANY),
    **dict.fromkeys(["special_tokens_map_file", "pad_token_type_id", "pad_to_multiple_of"], ANY),
    **dict.fromkeys(["max_length", "stride", "truncation_strategy"], ANY),
}
"""Any value: keys of decoding, of Python tokenizers, of origin, and defaults of other calls."""


@dataclass(frozen=True)
class DenseConfig:
    """A projection of the pooled vector: a Linear and the name of an activation in torch.nn."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class EncoderConfig:
    """The settings in ``config.json`` and sentence-transformers' files that change the result."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pooling: str | tuple[str, ...] = "mean"
    normalize: bool = False
    pooler: bool = False
    include_prompt: bool = True
    dense: tuple[DenseConfig, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    dtype: str | None = None
    path: str = ""


def refusal(where: object, expected: object, actual: object) -> UnsupportedModelError:
    """Return the error for a setting that this implementation does not compute."""
    return UnsupportedModelError(str(where), str(expected), shown(actual), HINT)


def read_json(path: Path, kind: type, *, optional: bool = False) -> Any:
    """Return a JSON file's value; an optional file that is missing is an empty value."""
    if optional and not path.is_file():
        return kind()
    with os_errors(path):
        return parse_json(path.read_bytes(), str(path), kind, UnsupportedModelError)


def read_folder(folder: Path) -> tuple[EncoderConfig, Tokenizer]:
    """Read a folder of transformers, or of sentence-transformers if it has ``modules.json``."""
    modules, inner = folder / "modules.json", folder
    settings: dict[str, Any] = {}
    sentence: dict[str, Any] = {}
    if modules.is_file():
        path, settings = _read_modules(folder, read_json(modules, list))
        inner = folder / path
        paths = (inner / f"sentence_{name}_config.json" for name in SENTENCE_FILES)
        read = (_read(path, SENTENCE, optional=True) for path in paths)
        sentence = next(filter(None, read), {})
        settings |= {**_read_prompts(folder / "config_sentence_transformers.json"), "path": path}
    settings |= _read_model(inner)
    if settings.pop("pooled", settings["hidden_size"]) != settings["hidden_size"]:
        raise refusal(modules, "a Pooling of the model's hidden size", "another size")
    config = EncoderConfig(**settings)
    return config, _read_tokenizer(inner, config.max_position_embeddings, sentence)


def _read(path: Path, rules: Rules, *, optional: bool = False) -> dict[str, Any]:
    return _check(path, read_json(path, dict, optional=optional), rules)


def _check(path: Path, values: dict[str, Any], rules: Rules) -> dict[str, Any]:
    for key, value in values.items():
        if key not in rules:
            raise refusal(path, "keys that are known not to change an embedding", {key: value})
        rule = rules[key]
        same = (type(value) is type(other) and value == other for other in rule)
        if rule and type(value) not in rule and not any(same):
            names = (x.__name__ if isinstance(x, type) else repr(x) for x in rule)
            raise refusal(path, f"{key} {' or '.join(names)}", value)
    return values


def _read_model(folder: Path) -> dict[str, Any]:
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    values: dict[str, Any] = {"model_type": None, "type_vocab_size": 2}
    values |= read_json(path, dict)
    values = _check(path, {key: values[key] for key in MODEL if key in values}, MODEL)
    if adapter.exists():
        raise refusal(adapter, "a model without an adapter in its folder", "one of PEFT")
    sizes = {key: values.get(key, 0) for key in SIZES}
    if min(sizes.values()) < 1 or sizes["hidden_size"] % sizes["num_attention_heads"]:
        expected = (
            "positive sizes of a BERT model, and a hidden_size that num_attention_heads divides"
        )
        raise refusal(path, expected, sizes)
    architectures = values.get("architectures") or [""]
    if str(architectures[0]).endswith("ForCausalLM"):
        raise refusal(path, "an encoder", architectures)
    settings: dict[str, Any] = {**sizes, "dtype": values.get("dtype") or values.get("torch_dtype")}
    return settings | {
        key: values[key] for key in ("hidden_act", "layer_norm_eps") if key in values
    }


def _read_modules(folder: Path, modules: list[Any]) -> tuple[str, dict[str, Any]]:
    path = folder / "modules.json"
    entries = [_read_module(path, module) for module in modules]
    entries = [(kind, inner) for kind, inner in entries if kind != "Dropout"]
    kinds = [kind for kind, _ in entries]
    normalize = kinds[-1:] == ["Normalize"]
    middle = entries[2 : len(entries) - normalize]
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind, _ in middle):
        raise refusal(path, "Transformer, Pooling, any number of Dense, Normalize", kinds)
    settings = _read_pooling(folder / entries[1][1] / "config.json")
    if normalize and entries[-1][1]:
        _read(folder / entries[-1][1] / "config.json", NORMALIZE, optional=True)
    width = settings["pooled"] * len(settings["pooling"])
    layers = []
    for _, inner in middle:
        layers.append(_read_dense(folder, inner))
        if layers[-1].in_features != width:
            raise refusal(folder / inner, f"in_features {width}", layers[-1].in_features)
        width = layers[-1].out_features
    return entries[0][1], {**settings, "normalize": normalize, "dense": tuple(layers)}


def _read_module(path: Path, module: Any) -> tuple[str, str]:
    if not isinstance(module, dict):
        raise refusal(path, "a list of objects", module)
    _check(path, module, MODULE)
    package, _, kind = str(module.get("type")).rpartition(".")
    if package.split(".")[0] != "sentence_transformers":
        raise refusal(path, "modules of sentence_transformers", module)
    inner = PurePosixPath(module.get("path", ""))
    if inner.is_absolute() or ".." in inner.parts:
        raise refusal(path, "a path inside the folder", str(inner))
    return kind, str(inner) if inner.parts else ""


def _read_pooling(path: Path) -> dict[str, Any]:
    values = _read(path, POOLING)
    flags = [mode for flag, mode in POOLINGS.items() if values.get(flag)]
    modes = values.get("pooling_mode", flags or ["mean"])
    width = values.get("embedding_dimension", values.get("word_embedding_dimension"))
    if width is None:
        raise refusal(path, "an embedding_dimension", values)
    return {
        "pooling": (modes,) if isinstance(modes, str) else tuple(modes),
        "pooled": width,
        "include_prompt": values.get("include_prompt", True),
    }


def _read_dense(folder: Path, inner: str) -> DenseConfig:
    path = folder / inner / "config.json"
    values = _read(path, DENSE)
    package, _, activation = values.get("activation_function", "torch.nn.Tanh").rpartition(".")
    if package not in ("torch.nn", "torch.nn.modules.activation", "torch.nn.modules.linear"):
        raise refusal(path, "an activation_function of torch.nn", values["activation_function"])
    sizes = values.get("in_features", 0), values.get("out_features", 0)
    if min(sizes) < 1:
        raise refusal(path, "positive in_features and out_features", values)
    return DenseConfig(inner, *sizes, values.get("bias", True), activation)


def _read_prompts(path: Path) -> dict[str, Any]:
    values = _read(path, PROMPTS, optional=True)
    prompts = {"query": "", "document": ""} | values.get("prompts", {})
    prompts = {name: "" if prompt is None else prompt for name, prompt in prompts.items()}
    if not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise refusal(path, "prompts that are strings", prompts)
    name, size = values.get("default_prompt_name"), values.get("truncate_dim")
    if name is not None and name not in prompts:
        raise refusal(path, f"a default_prompt_name of {sorted(prompts)}", name)
    if size is not None and size < 1:
        raise refusal(path, "a truncate_dim of at least 1", size)
    return {"prompts": prompts, "default_prompt_name": name, "truncate_dim": size}


def _read_tokenizer(folder: Path, positions: int, sentence: dict[str, Any]) -> Tokenizer:
    """Read the tokenizer; ``tokenizer_config.json`` decides on the casing, as in transformers."""
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    with os_errors(path):
        data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UnsupportedModelError(str(path), "a tokenizer", error) from error
    settings = _read_tokenizer_config(settings_path, tokenizer)
    if "attention_mask" not in settings.get("model_input_names", ["attention_mask"]):
        raise refusal(settings_path, "attention_mask in model_input_names", settings)
    padding, truncation = (
        settings.get(name, (part or {}).get("direction", "right"))
        for name, part in (
            ("padding_side", tokenizer.padding),
            ("truncation_side", tokenizer.truncation),
        )
    )
    if padding != "right":
        raise refusal(path, "padding on the right", padding)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    kind = settings.get("tokenizer_class")
    if kind in (None, "BertTokenizer", "BertTokenizerFast"):
        _use_bert_casing(path, tokenizer, settings)
    elif kind not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        raise refusal(settings_path, "a tokenizer_class of BERT", kind)
    if sentence.get("do_lower_case") and "Lowercase" not in str(tokenizer.normalizer):
        steps = [normalizers.Lowercase(), tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([step for step in steps if step])
    if any(tokenizer.encode("a").type_ids):
        raise refusal(path, "token type 0 in a single text", "another")

    limit = sentence.get("max_seq_length")
    if limit is None:
        limit = min(settings.get("model_max_length", positions), positions)
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if limit <= special:
        raise refusal(folder, f"a maximum length over {special}", limit)
    # One token too many is left, so that `InferenceCore.tokenize` sees and refuses such a text.
    tokenizer.enable_truncation(int(min(limit, positions + 1)), direction=truncation)
    return tokenizer


def _read_tokenizer_config(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings; refuse a token that transformers would add to ``tokenizer.json``'s."""
    settings = _read(path, TOKENIZER, optional=True)
    stored = tokenizer.get_added_tokens_decoder()
    ids = {token.content: index for index, token in stored.items()}
    files, decoder = [settings], settings.get("added_tokens_decoder")
    if decoder is None:
        older, more = (
            path.with_name(f"{name}.json") for name in ("special_tokens_map", "added_tokens")
        )
        files.append(_read(older, TOKENIZER, optional=True))
        added = read_json(more, dict, optional=True)
        if any(ids.get(name) != index for name, index in added.items()):
            raise refusal(more, "the tokens of tokenizer.json", added)
    elif decoder != {str(index): token.__getstate__() for index, token in stored.items()}:
        raise refusal(path, "the added tokens of tokenizer.json", decoder)
    for values in files:
        listed = [values.get(name) for name in TOKENS]
        for name in TOKEN_LISTS:
            listed += values.get(name) or []
        for token in listed:
            if token is not None and _content(token) not in list(ids):
                raise refusal(path, f"added tokens of tokenizer.json {sorted(ids)}", token)
    return {**settings, **files[-1]}


def _content(token: Any) -> Any:
    """Return the text of a special token, which a file holds as a string or as an object."""
    return str(token.get("content")) if isinstance(token, dict) else token


def _use_bert_casing(path: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Set BERT's normalizer as transformers does; the other parts must be its defaults."""
    model, normalizer, splitter = tokenizer.model, tokenizer.normalizer, tokenizer.pre_tokenizer
    if not (
        isinstance(model, models.WordPiece)
        and (model.continuing_subword_prefix, model.max_input_chars_per_word) == ("##", 100)
        and isinstance(normalizer, normalizers.BertNormalizer)
        and normalizer.clean_text
        and isinstance(splitter, pre_tokenizers.BertPreTokenizer)
    ):
        expected = "BERT's WordPiece (prefix ##, words of 100), BertNormalizer and BertPreTokenizer"
        raise refusal(path, expected, [model, normalizer, splitter])
    cls, sep, unknown = (
        _content(settings.get(f"{name}_token") or f"[{name.upper()}]")
        for name in ("cls", "sep", "unk")
    )
    around = tokenizer.encode("").tokens
    if around != [cls, sep]:
        raise refusal(path, "a text between cls_token and sep_token", around)
    if model.unk_token != unknown:
        raise refusal(path, "the unk_token of tokenizer_config.json", model.unk_token)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
