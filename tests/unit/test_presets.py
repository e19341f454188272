"""The five presets on real names and shapes; messages."""

import json
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from lora.errors import ArgumentError, TargetError
from lora.models.adapt import init_card, linears
from lora.models.encoder import EncoderConfig, InferenceCore
from lora.presets import PRESETS, CardInfo, LoRAConfig, Preset, cost_table, fit
from lora.testing.plugin import requirement

ATTENTION = {f"attention.self.{part}": (384, 384) for part in ("query", "key", "value")}
LAYER = ATTENTION | {"attention.output.dense": (384, 384)}
LAYER |= {"intermediate.dense": (384, 1536), "output.dense": (1536, 384)}
MINILM = {f"encoder.layer.{i}.{name}": shape for i in range(6) for name, shape in LAYER.items()}
MINILM["pooler.dense"] = (384, 384)

LAYER = {f"self_attn.{part}_proj": (2048, 2048 if part in "qo" else 512) for part in "qkvo"}
LAYER |= {f"mlp.{part}_proj": (2048, 8192) for part in ("gate", "up")}
LAYER |= {"mlp.down_proj": (8192, 2048)}
LLAMA = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
LLAMA["lm_head"] = (2048, 128256)

SETTINGS = {
    "coder": (16, 32.0, 0.05, ("code-gen", "refactoring", "syntax")),
    "researcher": (8, 16.0, 0.1, ("analysis", "research", "synthesis")),
    "security": (16, 32.0, 0.05, ("security", "vulnerabilities", "audit")),
    "architect": (12, 24.0, 0.05, ("architecture", "design", "patterns")),
    "reviewer": (8, 16.0, 0.1, ("review", "quality", "best-practices")),
}
FIELDS = "rank, alpha, dropout, target_modules, task_type, tags"
ENCODER = [
    "attention.output.dense key query value",
    "key query value",
    "intermediate.dense key output.dense query value",
    "intermediate.dense query value",
    "query value",
]
DECODER = [
    "k_proj o_proj q_proj v_proj",
    "k_proj q_proj v_proj",
    "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    "gate_proj q_proj up_proj v_proj",
    "q_proj v_proj",
]


@requirement("R21.1")
@pytest.mark.parametrize(
    ("shapes", "targets"), [(MINILM, ENCODER), (LLAMA, DECODER)], ids=["encoder", "decoder"]
)
def test_the_five_presets(shapes, targets):
    configs = [
        LoRAConfig(rank, alpha, dropout, tuple(names.split()), task, tags)
        for (task, (rank, alpha, dropout, tags)), names in zip(
            SETTINGS.items(), targets, strict=True
        )
    ]
    assert [fit(preset, shapes).config for preset in PRESETS] == configs


@requirement("R21.2")
def test_the_published_page_states_parameters_and_bytes_on_both_models(monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])  # the script adds folders to it
    path = Path(__file__).parents[2] / "docs" / "generate.py"
    spec = spec_from_file_location("docs_generate", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.presets()
    assert "| all-MiniLM-L6-v2 | reviewer | 8 | 16 | 12 | 73,728 | 294,912 |" in page
    assert "| Llama 3.1 8B | reviewer | 8 | 16 | 64 | 3,407,872 | 13,631,488 |" in page
    assert sum(line.startswith("| ") for line in page.splitlines()) == 1 + 2 * len(PRESETS)


@requirement("R21.2")
@pytest.mark.parametrize(("dtype", "nbytes"), [("float16", "147,456"), ("float64", "589,824")])
def test_a_table_has_the_bytes_of_the_dtype_that_it_names(dtype, nbytes):
    head, _, *rows = cost_table({"MiniLM": MINILM}, dtype=dtype).splitlines()
    assert head.endswith(f"| parameters | bytes ({dtype}) |")
    assert rows[-1] == f"| MiniLM | reviewer | 8 | 16 | 12 | 73,728 | {nbytes} |"


@requirement("R21.1", "R21.2")
@pytest.mark.parametrize("task", list(PRESETS))
def test_a_preset_is_what_a_fresh_card_of_the_real_encoder_has(task):
    core = InferenceCore(EncoderConfig(30, 8, 2, 2, 16, 12, pooler=True))
    shapes = {name: (site.in_features, site.out_features) for name, site in linears(core).items()}
    fitted = fit(task, shapes)
    config = fitted.config
    options = {"rank": config.rank, "alpha": config.alpha, "target_modules": config.target_modules}
    card = init_card(core, task, **options, seed=0)
    assert set(card.weights) == set(fitted.modules)
    assert (card.num_params, card.nbytes) == (fitted.num_params, fitted.nbytes)


@requirement("R21.1")
def test_a_model_without_the_roles_is_refused():
    message = r"preset 'coder': .*o_proj.*found none that is a output; name the target"
    with pytest.raises(TargetError, match=message):
        fit("coder", {name: shape for name, shape in LLAMA.items() if "o_proj" not in name})
    with pytest.raises(TargetError, match="none that is a query or value"):
        fit("reviewer", {"0": (4, 4), "2": (4, 4)})


@requirement("R21.1")
def test_modules_that_no_suffix_tells_apart_are_refused():
    down = Preset("down", 4, 4.0, 0.0, ("down",), ())
    assert fit(down, MINILM).config.target_modules == tuple(f"{i}.output.dense" for i in range(6))
    message = "module 'output.dense': .*found 'attention.output.dense', which has another role"
    with pytest.raises(TargetError, match=message):
        fit(down, {"output.dense": (4, 4), "attention.output.dense": (4, 4)})


@requirement("R21.1", "R21.2", "R7.8")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (partial(fit, preset, MINILM), f"one of {', '.join(SETTINGS)}, found")
            for preset in ("cook", "", None, 3, ["coder"])
        ),
        *(
            (partial(fit, "coder", MINILM, dtype=dtype), "dtype: expected one of float16, float32")
            for dtype in ("int8", ["float32"])
        ),
        (partial(LoRAConfig.from_dict, {"lora_alpha": 16}), f"{FIELDS}, found .*'lora_alpha'"),
        (partial(LoRAConfig.from_dict, []), f"{FIELDS}, found .*must be a mapping"),
        (partial(CardInfo.from_metadata, None), "a mapping of metadata"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


@requirement("R21.3")
def test_a_single_text_is_one_target_and_one_tag():
    config = LoRAConfig(target_modules="query", tags="python")
    assert (config.target_modules, config.tags) == (("query",), ("python",))


@requirement("R21.3", "R21.7", "R7.8")
@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (LoRAConfig, "dropout", [1.0, -1e-9]),
        (CardInfo, "version", ["1.0.0\n", "1.0.0-", "1.0.0+", "1.0", "1.0.0.0", "v1.0.0"]),
        (
            CardInfo,
            "created",
            ["2026-01-01T00:00:00Z\n", "2026-01-01T00:00:00Z+1", "2026-1-01T0:00:00Z"],
        ),
        (
            CardInfo,
            "modified",
            [f"{d}T00:00:00Z" for d in ("2026-02-29", "1900-02-29", "2026-04-31")],
        ),
        (CardInfo, "quality", [1.0000001, -1e-9]),
    ],
)
def test_just_beyond_what_is_allowed_is_refused(kind, field, values):
    for value in values:
        with pytest.raises(ArgumentError, match=field):
            kind(**{field: value})


@requirement("R21.3", "R21.7")
def test_the_ends_of_the_ranges_are_allowed():
    assert LoRAConfig(dropout=0).dropout == 0.0
    assert [CardInfo(quality=quality).quality for quality in (0, 1, None)] == [0.0, 1.0, None]
    assert CardInfo("1.0.0-alpha.1+001").version == "1.0.0-alpha.1+001"
    assert CardInfo(created="2024-02-29T23:59:59Z").created == "2024-02-29T23:59:59Z"


@requirement("R21.1", "R7.8")
def test_sizes_may_be_integers_of_numpy():
    name, sizes = "0.attention.self.query", (np.int64(4), np.int32(6))
    shapes = {name: sizes, name.replace("query", "value"): sizes}
    assert json.loads(json.dumps(dict(fit("reviewer", shapes).modules)))[name] == 8 * 10
    assert LoRAConfig(rank=np.int64(4)).to_dict()["rank"] == 4


@requirement("R21.1", "R7.8")
@pytest.mark.parametrize(
    "shapes",
    [
        *(None, ["query"], {1: (4, 4)}),
        *({"query": shape} for shape in (4, "44", (4,), (4, 0), (4, True), (4.0, 4), (4, 4, 4))),
    ],
)
def test_what_is_no_shape_of_a_linear_is_refused(shapes):
    with pytest.raises(ArgumentError, match="shape"):
        fit("reviewer", shapes)
    with pytest.raises(ArgumentError, match=r"shape|models"):
        cost_table(shapes if shapes is None else {"model": shapes})
