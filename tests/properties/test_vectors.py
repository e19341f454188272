"""The frozen vectors of the file format: what a reader must find in a file, or must refuse."""

import hashlib
import json
import tomllib

import ml_dtypes
import numpy as np
import pytest

from lora.testing import folder_of
from lora.testing.plugin import requirement

FOLDER = folder_of("spec") / "vectors" / "1"
MANIFEST = (FOLDER / "manifest.toml").read_bytes()
VECTORS = tomllib.loads(MANIFEST.decode())["vector"]
FROZEN = "ebc0edb76457ef7ac014928fd0e831155de44c1c0309cffa8e662c755e8e11f8"


def those(*, valid):
    return [
        pytest.param(vector, id=vector["path"]) for vector in VECTORS if vector["valid"] is valid
    ]


def expectation(vector):
    return (FOLDER / vector["path"].replace(".lora.arrow", ".json")).read_bytes()


@requirement("R24.4")
def test_the_vectors_are_frozen_and_the_manifest_names_them_all():
    assert hashlib.sha256(MANIFEST).hexdigest() == FROZEN
    for vector in VECTORS:
        data = (FOLDER / vector["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == vector["sha256"]
        assert hashlib.sha256(expectation(vector)).hexdigest() == vector["expectation_sha256"]
    files = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.lora.arrow")}
    assert files == {vector["path"] for vector in VECTORS}


@requirement("R1.9", kind="format")
@pytest.mark.parametrize("vector", those(valid=True))
def test_a_valid_vector_holds_what_its_expectation_says(impl, vector):
    card = impl.read_card((FOLDER / vector["path"]).read_bytes())
    expectations = json.loads(expectation(vector))
    for field in ("name", "rank", "alpha", "metadata", "extra"):
        assert getattr(card, field) == expectations[field]
    assert list(card.target_modules) == expectations["target_modules"]
    assert sorted(card.weights) == sorted(expectations["modules"])
    dtype = ml_dtypes.bfloat16 if expectations["dtype"] == "bfloat16" else expectations["dtype"]
    for module, pair in card.weights.items():
        expected = expectations["modules"][module]
        assert pair.scaling == expected["scaling"]
        for factor, (shape, elements) in ((pair.A, expected["A"]), (pair.B, expected["B"])):
            assert factor.dtype == np.dtype(dtype)
            assert list(factor.shape) == shape
            assert np.ascontiguousarray(factor).tobytes().hex() == elements


@requirement("R24.4", kind="refusal")
@pytest.mark.parametrize("vector", those(valid=False))
def test_an_invalid_vector_is_refused(impl, vector):
    with pytest.raises(Exception):  # noqa: B017, PT011 - how, is for the implementation to say
        impl.read_card((FOLDER / vector["path"]).read_bytes())
