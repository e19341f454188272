"""Cards that version 0.1 wrote are read as the same values, and written again as the same bytes."""

import hashlib
import json
from pathlib import Path

import pytest

import lora
from lora.testing.plugin import requirement

FOLDER = Path(__file__).parents[1] / "data" / "cards-0.1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


def sha256(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


@requirement("R1.7", "R1.10")
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_card_of_version_0_1_is_read_as_the_same_value(name):
    expected = EXPECTED[name]
    card = lora.load(FOLDER / f"{name}.lora.arrow", verify=expected["digest"])
    weights = {
        module: {
            "A": sha256(pair.A),
            "A_shape": list(pair.A.shape),
            "B": sha256(pair.B),
            "B_shape": list(pair.B.shape),
            "scaling": pair.scaling,
        }
        for module, pair in card.weights.items()
    }
    assert weights == expected["weights"]
    for field in ("name", "rank", "alpha", "base_model", "base_fingerprint"):
        assert getattr(card, field) == expected[field], field
    assert list(card.target_modules) == expected["target_modules"]
    assert str(card.dtype) == expected["dtype"]
    assert dict(card.metadata) == expected["metadata"]
    assert dict(card.extra) == expected["extra"]


@requirement("R1.11")
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_card_of_version_0_1_is_written_as_the_same_card(name, tmp_path):
    card = lora.load(FOLDER / f"{name}.lora.arrow")
    lora.save(card, tmp_path / "again.lora.arrow")
    assert lora.load(tmp_path / "again.lora.arrow") == card


def test_all_files_are_expected():
    files = {path.name for path in FOLDER.glob("*.lora.arrow")}
    assert files == {f"{name}.lora.arrow" for name in EXPECTED}
