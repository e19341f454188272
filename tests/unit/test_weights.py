"""Safetensors files as lazy mappings: one file, shards, folders; what is wrong with them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora.errors import CardNotFoundError, StoreError, UnsupportedModelError
from lora.extract import extract_delta
from lora.interop.weights import INDEX, SINGLE, SafetensorsWeights
from lora.testing.plugin import requirement

RNG = np.random.default_rng(0)
NAMES = [f"layer.{index}.query.weight" for index in range(3)]
BASE, TUNED = ({name: RNG.normal(size=(6, 5)).astype("f4") for name in NAMES} for _ in range(2))


def sharded(folder, weights):
    """A folder with a shard for each weight, and their index."""
    folder.mkdir()
    shards = {key: f"model-{index:05}.safetensors" for index, key in enumerate(weights)}
    for key, shard in shards.items():
        save_file({key: weights[key]}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


@requirement("R16.6", "R16.9")
def test_files_folders_and_shards_give_the_card_that_arrays_give(tmp_path):
    save_file(BASE, tmp_path / SINGLE)
    tuned = sharded(tmp_path / "tuned", TUNED)
    expected = extract_delta(BASE, TUNED, 2)
    for base in (tmp_path, tmp_path / SINGLE):
        for other in (tuned, tuned / INDEX):
            weights = SafetensorsWeights(base), SafetensorsWeights(str(other))
            assert extract_delta(*weights, 2) == expected


def test_it_is_a_mapping(tmp_path):
    weights = SafetensorsWeights(sharded(tmp_path / "model", BASE))
    assert dict(weights).keys() == BASE.keys()
    assert len(weights) == 3
    assert all(np.array_equal(weights[key], BASE[key]) for key in BASE)
    assert weights[next(iter(BASE))] is not weights[next(iter(BASE))]
    with pytest.raises(KeyError):
        weights["layer.9.query.weight"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_dtype_of_a_card_is_read(tmp_path, dtype):
    array = np.array([[1.5, -2.0]]).astype(dtype)
    save_file({"q.weight": array}, tmp_path / SINGLE)
    read = SafetensorsWeights(tmp_path)["q.weight"]
    assert read.dtype == dtype
    assert np.array_equal(read, array)


@requirement("R7.8")
def test_what_is_not_there_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CardNotFoundError, match=r"model.safetensors: expected .* found none"):
            SafetensorsWeights(path)
    folder = sharded(tmp_path / "model", BASE)
    (folder / "model-00001.safetensors").unlink()
    with pytest.raises(CardNotFoundError, match=r"model-00001.safetensors: expected"):
        SafetensorsWeights(folder)


@requirement("R7.8")
def test_a_malformed_index_is_refused(tmp_path):
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\\"):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(UnsupportedModelError, match=INDEX):
            SafetensorsWeights(tmp_path)


@requirement("R7.8")
def test_an_index_reaches_nothing_outside_its_folder(tmp_path):
    save_file(BASE, tmp_path / SINGLE)
    inside = tmp_path / "inside"
    inside.mkdir()
    for shard in (f"../{SINGLE}", str(tmp_path / SINGLE)):
        (inside / INDEX).write_text(json.dumps({"weight_map": {next(iter(BASE)): shard}}))
        with pytest.raises(UnsupportedModelError, match="names files beside it"):
            SafetensorsWeights(inside)
    for shard, error in (("x" * 300, StoreError), ("a\0b", CardNotFoundError)):
        (inside / INDEX).write_text(json.dumps({"weight_map": {next(iter(BASE)): shard}}))
        with pytest.raises(error, match=r"inside/(x|a)"):
            SafetensorsWeights(inside)


@requirement("R7.8")
def test_a_shard_without_its_tensors_and_a_file_that_is_none_are_refused(tmp_path):
    folder = sharded(tmp_path / "model", BASE)
    save_file({"other": BASE["layer.0.query.weight"]}, folder / "model-00000.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"none of \['layer.0.query.weight'\]"):
        SafetensorsWeights(folder)
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UnsupportedModelError, match="expected a safetensors file"):
        SafetensorsWeights(tmp_path / "bad.safetensors")


@requirement("R7.8")
def test_a_tensor_that_has_gone_is_named(tmp_path):
    save_file(BASE, tmp_path / SINGLE)
    weights = SafetensorsWeights(tmp_path)
    save_file({"other": BASE["layer.0.query.weight"]}, tmp_path / SINGLE)
    with pytest.raises(UnsupportedModelError, match=rf"'{NAMES[0]}': expected a tensor of float16"):
        weights[NAMES[0]]
