"""The Rust form: two layouts, a header that says which, and files that don't say."""

import hashlib
import json
import struct
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora.card import LoRACard, LowRank
from lora.errors import ArgumentError, CardFileError, CardNotFoundError, StoreError
from lora.files import load
from lora.interop import weights
from lora.interop.factor_files import CONFIG
from lora.interop.peft import import_peft
from lora.interop.safetensors import load_safetensors, save_safetensors
from lora.testing.plugin import requirement

RNG = np.random.default_rng(0)


def pair(rows=5, rank=2, columns=3, scaling=None):
    factors = RNG.normal(size=(rows, rank)), RNG.normal(size=(rank, columns))
    return LowRank(*(factor.astype(np.float32) for factor in factors), scaling)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "docs.safetensors"


def tensors(pairs, layout, suffix=""):
    """What Rust code would write."""
    arrays = {}
    for name, each in pairs.items():
        for factor, array in (("a", each.A), ("b", each.B)):
            stored = array.T if layout == "linear" else array
            arrays[f"{name}.lora_{factor}{suffix}"] = np.ascontiguousarray(stored)
    return arrays


def refused(path, kind=CardFileError, **options):
    with pytest.raises(kind) as caught:
        load_safetensors(path, **options)
    return str(caught.value)


@requirement("R23.5")
@pytest.mark.parametrize("layout", ["linear", "matrix"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_a_file_without_a_header_says_its_layout_by_its_shapes(path, layout, suffix):
    pairs = {"a.q": pair(), "a.square": pair(7, 2, 7)}
    save_file(tensors(pairs, layout, suffix), path)
    card = load_safetensors(path, alpha=8)
    assert (card.name, card.rank, card.alpha) == ("docs", 2, 8.0)
    assert card.target_modules == ("a.q", "a.square")
    assert card.weights == {name: LowRank(each.A, each.B, 4.0) for name, each in pairs.items()}
    assert load_safetensors(path, alpha=8, layout=layout).weights == card.weights
    assert load_safetensors(path, alpha=8, name="law").name == "law"


@requirement("R23.5")
def test_a_layout_is_refused_that_contradicts_the_header(path):
    square = tensors({"q": pair(4, 4, 4)}, "linear")
    save_file(square, path, metadata={"lora.layout": "linear"})
    assert load_safetensors(path, alpha=8, layout="linear")
    assert "linear, as the file states" in refused(path, alpha=8, layout="matrix")


@requirement("R23.5")
def test_the_layout_that_the_shapes_contradict_is_refused(path):
    save_file(tensors({"q": pair()}, "linear"), path)
    assert "matrix" in refused(path, alpha=8, layout="matrix")
    save_file({"q.lora_a": np.ones((2, 5)), "q.lora_b": np.ones((3, 4))}, path)
    assert "(2, 5)" in refused(path, alpha=8)
    save_file({**tensors({"q": pair()}, "linear"), **tensors({"k": pair()}, "matrix")}, path)
    assert "factors" in refused(path, alpha=8)


@requirement("R23.5")
@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 1, 1)])
def test_square_factors_are_never_guessed(path, here, sizes):
    square = pair(*sizes)
    save_file(tensors({"q": square}, "linear"), path)
    assert "layout=" in refused(path, alpha=8)
    save_file(tensors({"q": square}, "linear"), path, metadata={"rank": str(sizes[1])})
    assert "layout=" in refused(path, alpha=8)
    for layout, factor in (("linear", square.A), ("matrix", square.A.T)):
        read = load_safetensors(path, alpha=8, layout=layout).weights["q"].A
        assert read.tobytes() == np.ascontiguousarray(factor).tobytes()
        line = ("convert", path, "-o", path.with_name("x.arrow"), "--alpha", 8)
        status, _, problem = here(*line)
        assert status == 1
        assert "lora convert --layout, one of ('linear', 'matrix')" in problem
        assert here(*line, "--layout", layout)[0] == 0
        assert load(path.with_name("x.arrow")).weights["q"].A.tobytes() == read.tobytes()


@requirement("R23.5")
@pytest.mark.parametrize("layout", ["linear", "matrix"])
def test_a_module_with_one_reading_decides_for_square_ones(path, layout):
    pairs = {"q": pair(4, 4, 4), "v": pair(6, 4, 5)}
    save_file(tensors(pairs, layout), path)
    card = load_safetensors(path, alpha=4)
    assert card.weights["q"].A.tobytes() == pairs["q"].A.tobytes()


@requirement("R23.5")
def test_two_readings_are_told_apart_by_the_rank_or_not_at_all(path):
    """A (2, 5), B (5, 2): rank 2 over 5 -> 5, or rank 5 over 2 -> 2; the header's rank decides."""
    wide = pair(5, 2, 5)
    for rank, shape in ((None, (5, 2)), ("2", (5, 2)), ("5", (2, 5))):
        save_file(tensors({"q": wide}, "linear"), path, metadata={"rank": rank} if rank else None)
        assert load_safetensors(path, alpha=1).weights["q"].A.shape == shape
    save_file(tensors({"q": wide, "v": pair(2, 5, 2)}, "linear"), path)
    assert "layout=" in refused(path, alpha=1)


@requirement("R23.5")
def test_alpha_and_rank_of_the_file_are_honoured(path):
    save_file(tensors({"q": pair()}, "linear"), path)
    assert "alpha=" in refused(path)
    for keys in ({"alpha": "3", "rank": "2"}, {"lora.alpha": "3", "lora.rank": "2"}):
        save_file(tensors({"q": pair()}, "linear"), path, metadata=keys)
        card = load_safetensors(path)
        assert (card.alpha, card.weights["q"].scaling) == (3.0, 1.5)
        assert load_safetensors(path, alpha=3.0) == card
        assert "alpha" in refused(path, alpha=4)
    for wrong in ("x", "0", "-1", "nan", "inf", ""):
        save_file(tensors({"q": pair()}, "linear"), path, metadata={"alpha": wrong})
        assert "alpha" in refused(path)
    for wrong in ("3", "0", "-2", "2.0", "", "9" * 99):
        save_file(tensors({"q": pair()}, "linear"), path, metadata={"alpha": "1", "rank": wrong})
        assert str(path) in refused(path)


@requirement("R23.5")
def test_unequal_ranks_need_their_scalings(path):
    pairs = {"q": pair(), "v": pair(rank=1)}
    save_file(tensors(pairs, "linear"), path)
    assert "scaling" in refused(path, alpha=8)
    save_file(tensors(pairs, "linear"), path, metadata={"lora.scalings": '{"v": 0.5, "q": 3}'})
    assert [each.scaling for each in load_safetensors(path, alpha=8).weights.values()] == [3.0, 0.5]


MALFORMED = {
    "lora.layout": ["rows", "matrix"],
    "lora.scalings": ["{", '{"q": "1"}', '{"q": NaN}', "[" * 100_000],
    "lora.targets": ['"q"', "[1]"],
    "lora.metadata": ["[]", '{"a": NaN}'],
    "lora.extra": ['{"lora.rank": "1"}'],
    "lora.base_fingerprint": ["abc"],
    "lora.name": ["a\nb"],
}


@requirement("R23.5")
@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in MALFORMED.items() for value in values]
)
def test_a_header_that_is_malformed_or_contradicts_the_tensors_is_refused(path, key, value):
    save_file(tensors({"q": pair()}, "linear"), path, metadata={key: value})
    assert str(path) in refused(path, alpha=8)


@requirement("R23.5")
def test_tensors_that_are_no_pairs_are_refused(path):
    good = tensors({"q": pair()}, "linear")
    for wrong, says in [
        ({"q.lora_a": good["q.lora_a"]}, "found ['A']"),
        ({**good, "q.bias": np.ones(3)}, "q.bias"),
        ({**good, "q.lora_a.weight": good["q.lora_a"]}, "two"),
        ({**good, "q.lora_a": np.ones((2, 5), np.int64)}, "I64"),
        ({**good, "q.lora_a": np.ones(5, np.float32)}, "[5]"),
        ({**good, "q.lora_a": np.ones((2, 5), np.float64)}, "dtype"),
        ({**good, "xlora_a": good["q.lora_a"]}, "xlora_a"),
    ]:
        save_file(wrong, path)
        assert says in refused(path, alpha=8)


@requirement("R23.5")
def test_files_that_are_missing_or_malformed_are_named(tmp_path):
    assert "gone" in refused(tmp_path / "gone", CardNotFoundError)
    assert str(tmp_path) in refused(tmp_path, CardNotFoundError)
    header = b'{"q.lora_a":{"dtype":"F32","shape":[1000000000,1000000000],'
    header += b'"data_offsets":[0,4000000000000000000]}}'
    huge = len(header).to_bytes(8, "little") + header
    for content in (b"", b"garbage that is long enough", huge, b"\xff" * 8):
        (tmp_path / "x").write_bytes(content)
        assert "a safetensors file" in refused(tmp_path / "x", alpha=1)
    for options in ({"alpha": "x"}, {"alpha": float("nan")}, {"layout": "rows"}, {"layout": []}):
        refused(tmp_path / "x", ArgumentError, **options)
    refused(5, ArgumentError)


@requirement("R23.5")
@pytest.mark.parametrize(("layout", "shape"), [("linear", (2, 5)), ("matrix", (5, 2))])
def test_what_is_saved_is_a_plain_safetensors_file(path, layout, shape):
    weights = {"a.q": pair(), "": pair(rank=1, scaling=0.5)}
    metadata = {"description": "größe"}
    card = LoRACard("docs", 2, 8.0, ["q"], weights, metadata, base_model="some/base")
    digest = save_safetensors(card, path, layout=layout)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    arrays = load_file(path)
    assert sorted(arrays) == ["a.q.lora_a", "a.q.lora_b", "lora_a", "lora_b"]
    assert arrays["a.q.lora_a"].shape == shape
    with safe_open(path, framework="np") as file:
        header = file.metadata()
    assert (header["lora.name"], header["lora.rank"], header["lora.alpha"]) == ("docs", "2", "8.0")
    assert json.loads(header["lora.scalings"]) == {"": 0.5, "a.q": 4.0}
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    assert size % 8 == 0
    keys = list(json.loads(content[8 : 8 + size])["__metadata__"])
    assert keys == sorted(keys)  # safetensors' own writer orders them anew in every process


@requirement("R23.5")
def test_what_the_operating_system_refuses_is_named(path, monkeypatch):
    path.touch()
    monkeypatch.setattr(weights, "safe_open", Mock(side_effect=OSError("no")))
    assert str(path) in refused(path, StoreError, alpha=1)


@requirement("R23.5")
def test_saving_refuses_what_it_cannot_write(tmp_path):
    card = LoRACard("docs", 1, 1.0, [], {})
    with pytest.raises(ArgumentError):
        save_safetensors(card, tmp_path / "x", layout="rows")
    with pytest.raises(ArgumentError):
        save_safetensors("docs", tmp_path / "x")
    with pytest.raises(CardNotFoundError):
        save_safetensors(card, tmp_path / "nowhere" / "x")
    assert not list(tmp_path.iterdir())


FOREIGN = {
    "kohya": ["lora_unet_down_blocks_0_to_q.lora_down.weight", "lora_te1_q.alpha"],
    "diffusers": ["unet.down.0.to_q_lora.down.weight", "text_encoder.q.lora_A.bias"],
    "LoHa": ["lora_unet_q.hada_w1_a", "base_model.model.q.hada_w2_b"],
    "LoKr": ["lycoris_q.lokr_w1", "base_model.model.q.lokr_w2_a"],
    "DoRA": ["q.lora_magnitude_vector", "lora_unet_q.dora_scale", "model.q_proj.m"],
    "VeRA": ["base_model.model.q.vera_lambda_b"],
    "IA³": ["base_model.model.q.ia3_l"],
    "prompt tuning": ["prompt_embeddings"],
    "import its folder": ["base_model.model.q.lora_A.weight", "q.lora_B.default.weight"],
}


@requirement("R23.1")
@pytest.mark.parametrize(
    ("form", "name"), [(form, name) for form, names in FOREIGN.items() for name in names]
)
@pytest.mark.parametrize("beside", [False, True])
def test_another_format_is_refused_by_its_name(path, form, name, beside):
    tensors_beside = tensors({"zz": pair()}, "linear") if beside else {}
    save_file({name: np.ones((2, 2), np.float32), **tensors_beside}, path)
    assert form in refused(path, alpha=8)


def mlx(folder, rank=2, sizes=(5, 3), **config):
    """A folder of mlx-lm, which computes y + scale · (x @ lora_a) @ lora_b."""
    pairs = {f"model.layers.{i}.self_attn.q_proj": pair(sizes[0], rank, sizes[1]) for i in range(2)}
    save_file(tensors(pairs, "matrix"), folder / "adapters.safetensors")
    parameters = {"rank": rank, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, **config}
    (folder / CONFIG).write_text(json.dumps(config))
    return pairs


@requirement("R23.1", "R23.5")
@pytest.mark.parametrize("sizes", [(5, 3), (2, 2), (2, 7)])
def test_mlx_lm_states_a_scale_and_no_alpha(tmp_path, here, sizes):
    pairs, file = mlx(tmp_path, sizes=sizes), tmp_path / "adapters.safetensors"
    x = RNG.normal(size=(4, sizes[0]))
    for card in (load_safetensors(file), load_safetensors(file, alpha=40.0)):
        for name, each in card.weights.items():
            theirs = 20.0 * (x @ pairs[name].A.astype("f8")) @ pairs[name].B.astype("f8")
            change = each.scaling * (x @ each.A.astype("f8") @ each.B.astype("f8"))
            assert np.allclose(change, theirs, rtol=1e-12, atol=0)
    assert "40.0" in refused(file, alpha=20)  # its scale is taken for an alpha
    cases = (file, (), ""), (file, ("--alpha", "20"), "40.0"), (tmp_path, (), "")
    for source, options, says in cases:
        status, _, problem = here("convert", source, "-o", tmp_path / "x.arrow", *options)
        assert (status, says in problem) == (bool(says), True)
    with pytest.raises(CardFileError, match="mlx-lm"):
        import_peft(tmp_path)


@requirement("R23.1")
@pytest.mark.parametrize(
    "config",
    [
        {"fine_tune_type": "dora"},
        {"lora_parameters": {"scale": 20.0}},
        {"lora_parameters": {"rank": 8, "scale": 20.0}},
        {"lora_parameters": {"rank": 2, "scale": "20"}},
        {"lora_parameters": 5},
        {"lora_parameters": {"rank": 2, "alpha": 16, "scale": 10.0}},
    ],
)
def test_mlx_lm_whose_scale_is_not_known_is_refused(tmp_path, config):
    mlx(tmp_path, **config)
    assert "adapters.safetensors" in refused(tmp_path / "adapters.safetensors")


@requirement("R26.8")
@pytest.mark.parametrize("name", ["model.embed_tokens", "wte", "model.word_embeddings"])
def test_an_embedding_of_mlx_lm_is_not_taken_for_a_linear(tmp_path, name):
    pairs, file = mlx(tmp_path), tmp_path / "adapters.safetensors"
    for extra, is_refused in ((name, True), ("model.embed_out", False)):
        save_file(tensors({**pairs, extra: pair()}, "matrix"), file)
        if is_refused:
            assert f"module '{name}': expected factors of a Linear" in refused(file)
        else:
            assert extra in load_safetensors(file).weights


@requirement("R23.1")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("adapters.npz", "mlx-lm"),
        ("pytorch_lora_weights.safetensors", "diffusers"),
        ("head_config.json", "AdapterHub"),
        ("lora-f16.gguf", "GGUF"),
        ("law/adapter_config.json", "subfolders"),
        (".adapter_config.json.tmp", "killed"),
    ],
)
def test_a_folder_without_a_peft_configuration_is_named_by_its_files(tmp_path, name, form):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(CardNotFoundError, match=form):
        import_peft(tmp_path)


@requirement("R23.1")
def test_adapterhub_is_told_by_its_configuration(tmp_path):
    config = {"config": {"architecture": "lora", "r": 8}, "model_class": "BertAdapterModel"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CardFileError, match="AdapterHub"):
        import_peft(tmp_path)


@requirement("R23.1")
@pytest.mark.parametrize(
    ("start", "form"), [(b"GGUF", "GGUF"), (b"PK\x03\x04", "pickle"), (b"x", "64 bytes")]
)
def test_a_file_that_is_no_card_is_told_by_its_first_bytes(path, start, form):
    path.write_bytes(start.ljust(64, b"\0"))
    with pytest.raises(CardFileError, match=form):
        load(path)
