"""Every error is a LoRAError and a built-in, and says where and what is wrong."""

import copy
import pickle
import traceback

import pytest

from lora import errors
from lora.errors import LoRAError, shown
from lora.testing.plugin import requirement

BUILT_INS = {
    ValueError: "CardError CardFileError ShapeError BaseModelError ConflictError ArgumentError "
    "DataError RefusedError ManifestError BadNameError MismatchError UnsignedError SignatureError "
    "UnknownSignerError OlderVersionError NonFiniteError AbsurdNormError",
    FileNotFoundError: "CardNotFoundError",
    OSError: "StoreError",
    LookupError: "TargetError",
    TypeError: "UnsupportedModelError",
    KeyError: "UnknownCardError",
    RuntimeError: "StateError RegistryFull",
    ImportError: "MissingPackageError",
    ConnectionError: "PeerError",
}
KINDS = {name: built_in for built_in, names in BUILT_INS.items() for name in names.split()}


@requirement("R7.8")
def test_every_kind_is_listed_here():
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    kinds = {name for name, kind in kinds.items() if issubclass(kind, LoRAError)}
    assert kinds == {*KINDS, "LoRAError"}


@requirement("R7.8")
@pytest.mark.parametrize("name", KINDS)
def test_an_error_is_its_built_in_prints_one_line_and_survives_copying(name):
    kind = getattr(errors, name)
    assert kind.__doc__
    assert issubclass(kind, KINDS[name])
    parts = ("card 'docs': rank", "an integer >= 1", "-1", "see the manual")
    line = "card 'docs': rank: expected an integer >= 1, found -1; see the manual"
    error = kind(*parts)
    for again in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(again) is kind
        assert (again.where, again.expected, again.found, again.hint) == parts
        assert str(again) == line
        assert traceback.format_exception_only(again) == [f"lora.errors.{name}: {line}\n"]


@requirement("R7.8")
def test_no_part_of_an_error_is_ever_empty():
    error = errors.CardFileError("card file", "", ValueError())
    assert (error.expected, error.found) == ("''", "ValueError()")
    assert str(error) == "card file: expected '', found ValueError()"


class Sullen:
    """Has no repr."""

    def __repr__(self):
        raise RuntimeError("no")


@requirement("R7.8")
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ("docs", "'docs'"),
        pytest.param(10**5000, "an int without a repr", id="huge"),
        (Sullen(), "a Sullen without a repr"),
        ("x" * 1000, "'" + "x" * 199 + "…"),
    ],
)
def test_any_value_can_be_shown(value, text):
    assert shown(value) == text
