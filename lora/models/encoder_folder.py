"""Read the files of a BERT encoder's folder: everything in them that decides about an embedding.

Each key is read, or may have only the values that this implementation computes, or is known to
change no embedding. Any other key or value is refused by name, because a reader that skips it
returns other vectors than sentence-transformers does.

Requirements: R5.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tokenizers import Tokenizer, normalizers

from lora.checks import parse_json
from lora.errors import UnsupportedModelError, shown
from lora.files import os_errors

HINT = (
    "open the folder with sentence_transformers.SentenceTransformer (pip install "
    "sentence-transformers) and pass that model to ArrowEngine"
)

POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of sentence-transformers' older files, in the order in which their vectors are joined."""

SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["intermediate_size", "max_position_embeddings", "type_vocab_size"]

MODEL_VALUES = {
    "add_cross_attention": [False],
    "auto_map": [None],
    "is_decoder": [False],
    "is_encoder_decoder": [False],
    "model_type": ["bert"],
    "position_embedding_type": ["absolute"],
    "pruned_heads": [None, {}],
    "quantization_config": [None],
    "return_dict": [True],
    "use_return_dict": [True],
}
MODEL_HARMLESS = [
    "_name_or_path",
    "attention_probs_dropout_prob",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "directionality",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "problem_type",
    "sentence_transformers",
    "tie_word_embeddings",
    "torchscript",
    "transformers_version",
    "use_cache",
]
"""Keys of dropout, training, heads, generation and origin."""

SENTENCE_FILES = ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"]
"""Old names are ``sentence_NAME_config.json``; the first that is not empty counts."""
SENTENCE_VALUES: Mapping[str, list[Any]] = {
    **{f"{name}_args": [{}] for name in ("model", "tokenizer", "config")},
    **{f"{name}_kwargs": [{}] for name in ("model", "processor", "config")},
    "processing_kwargs": [{}, None],
    "transformer_task": ["feature-extraction"],
    "modality_config": [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}],
    "module_output_name": ["token_embeddings"],
    "query_expansion": [None],
    "tokenizer_name_or_path": [None],
}

TOKENS = [f"{name}_token" for name in ("unk", "sep", "pad", "cls", "mask", "bos", "eos")]
TOKENIZER_VALUES = {
    "add_bos_token": [False],
    "add_eos_token": [False],
    "auto_map": [None],
    "padding_side": ["right"],
    "split_special_tokens": [False],
    "truncation_side": ["right", "left"],
    "backend": ["tokenizers"],
}
TOKENIZER_HARMLESS = [
    "clean_up_tokenization_spaces",
    "do_basic_tokenize",
    "is_local",
    "max_length",
    "name_or_path",
    "never_split",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "special_tokens_map_file",
    "stride",
    "tokenizer_file",
    "truncation_strategy",
    "local_files_only",
]
"""Keys of decoding, of tokenizers in pure Python, of origin, and defaults that a call overrides."""


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
    pad_token_id: int = 0
    max_seq_length: int = 512
    pooling: str | tuple[str, ...] = "mean"
    normalize: bool = False
    pooler: bool = False
    include_prompt: bool = True
    dense: tuple[DenseConfig, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    dtype: str | None = None
    do_lower_case: bool = False
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


def read_config(folder: Path) -> EncoderConfig:
    """Read a folder of transformers, or of sentence-transformers if it has ``modules.json``."""
    modules, inner = folder / "modules.json", ""
    settings: dict[str, Any] = {}
    sentence: dict[str, Any] = {}
    if modules.is_file():
        inner, settings = _read_modules(folder, read_json(modules, list))
        sentence = _read_sentence(folder / inner)
        settings |= _read_prompts(folder / "config_sentence_transformers.json")
    settings |= _read_model(folder / inner)
    if not modules.is_file():
        settings["pooling"] = "mean"
    elif settings.pop("pooled") != settings["hidden_size"]:
        raise refusal(modules, "a Pooling of the model's hidden size", "another size")
    tokenizer = read_json(folder / inner / "tokenizer_config.json", dict, optional=True)
    limit = settings["max_position_embeddings"]
    stated = sentence.get("max_seq_length")
    if stated is None:
        stated = tokenizer.get("model_max_length", limit)
    if type(stated) not in (int, float) or stated < 1:
        raise refusal(folder / inner, "a maximum length of at least 1", stated)
    settings["max_seq_length"] = int(min(limit, stated))
    settings["do_lower_case"] = sentence.get("do_lower_case", False)
    return EncoderConfig(**settings, path=inner)


def _check(
    path: Path,
    values: Mapping[str, Any],
    kinds: Mapping[str, tuple[type, ...]],
    fixed: Mapping[str, Any],
    harmless: Collection[str] = (),
) -> dict[str, Any]:
    """Return the values of the keys that are read, of the right types; refuse unknown keys."""
    for key, value in values.items():
        if key in kinds:
            if type(value) not in kinds[key]:
                names = " or ".join(kind.__name__ for kind in kinds[key])
                raise refusal(path, f"{key} of type {names}", value)
        elif key in fixed:
            if not any(type(value) is type(other) and value == other for other in fixed[key]):
                raise refusal(path, f"{key} {' or '.join(map(repr, fixed[key]))}", value)
        elif key not in harmless:
            raise refusal(path, "keys that are known not to change an embedding", {key: value})
    return {key: value for key, value in values.items() if key in kinds}


def _read_model(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    values = read_json(path, dict)
    if (kind := values.get("model_type")) != "bert":
        raise refusal(path, "model_type 'bert'", kind)
    if (folder / "adapter_config.json").exists():
        raise refusal(
            folder / "adapter_config.json",
            "a model without an adapter in its folder",
            "one of PEFT",
        )
    nothing = type(None)
    kinds = {
        **dict.fromkeys(SIZES, (int,)),
        "architectures": (list, nothing),
        "hidden_act": (str,),
        "layer_norm_eps": (float,),
        "pad_token_id": (int, nothing),
        **dict.fromkeys(["dtype", "torch_dtype"], (str, nothing)),
    }
    settings = _check(path, values, kinds, MODEL_VALUES, MODEL_HARMLESS)
    if missing := [key for key in SIZES if key not in settings and key != "type_vocab_size"]:
        raise refusal(path, "the fields of a BERT model", f"no {missing}")
    if any(settings.get(key, 1) < 1 for key in SIZES):
        raise refusal(path, "positive sizes", {key: settings.get(key) for key in SIZES})
    if settings["hidden_size"] % settings["num_attention_heads"]:
        raise refusal(path, "a hidden_size that num_attention_heads divides", values)
    settings["pad_token_id"] = padding = settings.get("pad_token_id", 0) or 0
    if not 0 <= padding < settings["vocab_size"]:
        raise refusal(path, "a pad_token_id in the vocabulary", padding)
    old = settings.pop("torch_dtype", None)
    settings["dtype"] = settings.get("dtype") or old
    architectures = settings.pop("architectures", None) or [""]
    if str(architectures[0]).endswith("ForCausalLM"):
        raise refusal(path, "an encoder", architectures)
    return settings


def _read_modules(folder: Path, modules: list[Any]) -> tuple[str, dict[str, Any]]:
    """Return the Transformer's folder, and the settings of the modules after it."""
    path = folder / "modules.json"
    kinds: list[str] = []
    folders: list[str] = []
    for module in modules:
        kind, inner = _read_module(path, module)
        if kind != "Dropout":
            kinds.append(kind)
            folders.append(inner)
    middle = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(middle) - {"Dense"}:
        raise refusal(path, "Transformer, Pooling, any number of Dense, Normalize", kinds)
    settings = _read_pooling(folder / folders[1] / "config.json")
    settings["normalize"] = kinds[-1] == "Normalize"
    if settings["normalize"]:
        config = read_json(folder / folders[-1] / "config.json", dict, optional=True)
        name = "sentence_embedding"
        fixed = {"module_input_name": [name], "module_output_name": [name, None]}
        if folders[-1]:
            _check(folder / folders[-1] / "config.json", config, {}, fixed)
    width = settings["pooled"] * len(settings["pooling"])
    layers = []
    for inner in folders[2 : 2 + len(middle)]:
        layers.append(_read_dense(folder, inner))
        if layers[-1].in_features != width:
            raise refusal(folder / inner, f"in_features {width}", layers[-1].in_features)
        width = layers[-1].out_features
    return folders[0], {**settings, "dense": tuple(layers)}


def _read_module(path: Path, module: Any) -> tuple[str, str]:
    """Return the class name and the folder of an entry of ``modules.json``."""
    if not isinstance(module, dict):
        raise refusal(path, "a list of objects", module)
    strings = dict.fromkeys(["type", "path", "name"], (str,))
    _check(path, module, strings, {}, ["idx", "kwargs"])
    package, _, kind = str(module.get("type")).rpartition(".")
    if package.split(".")[0] != "sentence_transformers":
        raise refusal(path, "modules of sentence_transformers", module)
    inner = PurePosixPath(module.get("path", ""))
    if inner.is_absolute() or ".." in inner.parts:
        raise refusal(path, "a path inside the folder", str(inner))
    return kind, str(inner) if inner.parts else ""


def _read_pooling(path: Path) -> dict[str, Any]:
    sizes = dict.fromkeys(["word_embedding_dimension", "embedding_dimension"], (int,))
    kinds = {**sizes, "pooling_mode": (str, list), "include_prompt": (bool,)}
    values = _check(path, read_json(path, dict), {**kinds, **dict.fromkeys(POOLINGS, (bool,))}, {})
    modes = values.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in POOLINGS.items() if values.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not modes or any(mode not in POOLINGS.values() for mode in modes):
        raise refusal(path, f"poolings of {list(POOLINGS.values())}", modes)
    width = values.get("embedding_dimension", values.get("word_embedding_dimension"))
    if width is None:
        raise refusal(path, "an embedding_dimension", values)
    return {
        "pooling": tuple(modes),
        "pooled": width,
        "include_prompt": values.get("include_prompt", True),
    }


def _read_dense(folder: Path, inner: str) -> DenseConfig:
    path, name = folder / inner / "config.json", "sentence_embedding"
    kinds = {"in_features": (int,), "out_features": (int,), "bias": (bool,)}
    fixed = {
        "module_input_name": [name],
        "module_output_name": [name, None],
        "use_residual": [False],
    }
    kinds |= {"activation_function": (str,)}
    values = _check(path, read_json(path, dict), kinds, fixed)
    package, _, activation = values.get("activation_function", "torch.nn.Tanh").rpartition(".")
    if package not in ("torch.nn", "torch.nn.modules.activation", "torch.nn.modules.linear"):
        raise refusal(path, "an activation_function of torch.nn", values["activation_function"])
    sizes = values.get("in_features", 0), values.get("out_features", 0)
    if min(sizes) < 1:
        raise refusal(path, "positive in_features and out_features", values)
    return DenseConfig(inner, *sizes, values.get("bias", True), activation)


def _read_sentence(folder: Path) -> dict[str, Any]:
    kinds = {"max_seq_length": (int, type(None)), "do_lower_case": (bool,)}
    harmless = ["unpad_inputs", "query_length", "document_length"]
    for name in SENTENCE_FILES:
        path = folder / f"sentence_{name}_config.json"
        if values := read_json(path, dict, optional=True):
            return _check(path, values, kinds, SENTENCE_VALUES, harmless)
    return {}


def _read_prompts(path: Path) -> dict[str, Any]:
    nothing = type(None)
    kinds = {
        "prompts": (dict,),
        "default_prompt_name": (str, nothing),
        "truncate_dim": (int, nothing),
    }
    values = read_json(path, dict, optional=True)
    fixed = {"model_type": ["SentenceTransformer"]}
    harmless = ["__version__", "similarity_fn_name", "requirements"]
    settings = _check(path, values, kinds, fixed, harmless)
    prompts = {"query": "", "document": ""} | settings.get("prompts", {})
    prompts = {name: "" if prompt is None else prompt for name, prompt in prompts.items()}
    if not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise refusal(path, "prompts that are strings", prompts)
    if (name := settings.get("default_prompt_name")) is not None and name not in prompts:
        raise refusal(path, f"a default_prompt_name of {sorted(prompts)}", name)
    if (size := settings.get("truncate_dim")) is not None and size < 1:
        raise refusal(path, "a truncate_dim of at least 1", size)
    return {**settings, "prompts": prompts}


def read_tokenizer(folder: Path, config: EncoderConfig) -> Tokenizer:
    """Read the tokenizer; ``tokenizer_config.json`` decides on the casing, as in transformers."""
    inner = folder / config.path
    path, settings_path = inner / "tokenizer.json", inner / "tokenizer_config.json"
    tokenizer, description = _load_tokenizer(path)
    settings, side = _read_tokenizer_config(settings_path, description)
    _check_tokens(settings_path, settings, description, inner)
    kind = settings.get("tokenizer_class")
    if kind in (None, "BertTokenizer", "BertTokenizerFast"):
        _use_bert_casing(path, tokenizer, settings, description)
    elif kind not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        raise refusal(settings_path, "a tokenizer_class of BERT", kind)
    if config.do_lower_case and "Lowercase" not in str(description.get("normalizer")):
        steps = [normalizers.Lowercase(), tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([step for step in steps if step])
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if config.max_seq_length <= special:
        raise refusal(path, f"a maximum length over {special}", config.max_seq_length)
    if any(tokenizer.encode("a").type_ids):
        raise refusal(path, "token type 0 in a single text", "another")
    tokenizer.enable_truncation(config.max_seq_length, direction=side)
    return tokenizer


def _load_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return a tokenizer that neither cuts nor pads, and the JSON that describes it."""
    with os_errors(path):
        data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UnsupportedModelError(str(path), "a tokenizer", error) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    description = parse_json(data, str(path), dict, UnsupportedModelError)
    return tokenizer, description


def _read_tokenizer_config(path: Path, description: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the settings that are read, and the side on which a long text is cut."""
    nothing = type(None)
    kinds = {
        "model_max_length": (int, float),
        "model_input_names": (list,),
        "tokenizer_class": (str, nothing),
        **dict.fromkeys(["do_lower_case", "tokenize_chinese_chars"], (bool,)),
        "strip_accents": (bool, nothing),
        **dict.fromkeys(TOKENS, (str, dict, nothing)),
        "added_tokens_decoder": (dict,),
        **dict.fromkeys(["additional_special_tokens", "extra_special_tokens"], (list, nothing)),
    }
    values = read_json(path, dict, optional=True)
    settings = _check(path, values, kinds, TOKENIZER_VALUES, TOKENIZER_HARMLESS)
    if "attention_mask" not in settings.get("model_input_names", ["attention_mask"]):
        raise refusal(path, "attention_mask in model_input_names", values)
    for part, side in (("padding", "padding_side"), ("truncation", "truncation_side")):
        stored = (description.get(part) or {}).get("direction", "right").lower()
        if part == "padding" and values.get(side, stored) != "right":
            raise refusal(path, "padding on the right", stored)
    return settings, values.get("truncation_side", stored)


def _check_tokens(
    path: Path, settings: dict[str, Any], description: dict[str, Any], folder: Path
) -> None:
    """Refuse special tokens that ``tokenizer.json`` does not have: transformers would add them."""
    stored = {
        token["id"]: {key: value for key, value in token.items() if key != "id"}
        for token in description.get("added_tokens", [])
    }
    names = {token["content"] for token in stored.values()}
    decoder = settings.get("added_tokens_decoder")
    if decoder is None:
        legacy = read_json(folder / "special_tokens_map.json", dict, optional=True)
        settings = {**legacy, **settings}
        if (folder / "added_tokens.json").is_file():
            added = read_json(folder / "added_tokens.json", dict)
            if any(stored.get(index, {}).get("content") != name for name, index in added.items()):
                raise refusal(folder / "added_tokens.json", "the tokens of tokenizer.json", added)
    elif decoder != {str(index): token for index, token in stored.items()}:
        raise refusal(path, "the added tokens of tokenizer.json", decoder)
    listed = [settings.get(name) for name in TOKENS]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed += settings.get(name) or []
    for token in listed:
        if token is not None and _content(token) not in names:
            raise refusal(path, f"added tokens of tokenizer.json {sorted(names)}", token)


def _content(token: Any) -> Any:
    """Return the text of a special token, which a file holds as a string or as an object."""
    return str(token.get("content")) if isinstance(token, dict) else token


def _use_bert_casing(
    path: Path, tokenizer: Tokenizer, settings: dict[str, Any], description: dict[str, Any]
) -> None:
    """Set BERT's normalizer as transformers does; the other parts must be its defaults."""
    normalizer, splitter = (
        part if isinstance(part := description.get(name), dict) else {}
        for name in ("normalizer", "pre_tokenizer")
    )
    model = description["model"]
    parts = {
        "normalizer": (normalizer.get("type"), normalizer.get("clean_text", True)),
        "pre_tokenizer": splitter.get("type"),
        "model": (model.get("continuing_subword_prefix"), model.get("max_input_chars_per_word")),
    }
    ordinary = {
        "normalizer": ("BertNormalizer", True),
        "pre_tokenizer": "BertPreTokenizer",
        "model": ("##", 100),
    }
    if parts != ordinary:
        raise refusal(path, f"a BERT tokenizer {ordinary}", parts)

    cls, sep, unknown = (
        _content(settings.get(f"{name}_token") or f"[{name.upper()}]")
        for name in ("cls", "sep", "unk")
    )
    around = tokenizer.encode("").tokens
    if [*around[:1], *around[-1:]] != [cls, sep]:
        raise refusal(path, "a text between cls_token and sep_token", around)
    if model.get("unk_token") != unknown:
        raise refusal(path, "the unk_token of tokenizer_config.json", model.get("unk_token"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
