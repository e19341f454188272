"""The algebra of factor pairs: examples, edges, messages."""

import numpy as np
import pytest

from lora.card import DTYPES, LoRACard, LowRank
from lora.errors import ArgumentError, ShapeError
from lora.factors import apply, concat, delta, initial, is_finite, spectrum
from lora.federation.trust import norm_bound, norm_of
from lora.interop.peft import export_peft, import_peft
from lora.testing.plugin import requirement

PAIR = LowRank(np.array([[1.0], [2.0], [0.0]]), np.array([[3.0, -1.0]]), 0.5)


@requirement("R2.2")
def test_delta_has_the_shape_of_a_linears_weight():
    assert np.array_equal(delta(PAIR), [[1.5, 3.0, 0.0], [-0.5, -1.0, 0.0]])
    assert np.array_equal(delta(LowRank(PAIR.A, PAIR.B)), 2 * delta(PAIR))  # scaling None is 1


@requirement("R8.2", "R8.7")
def test_stacking_puts_factors_side_by_side_and_weights_and_scalings_into_b():
    stacked = concat([(PAIR, 2.0), (LowRank(-PAIR.A, PAIR.B, 1.0), -1.0)])
    assert np.array_equal(stacked.A, [[1, -1], [2, -2], [0, 0]])
    assert np.array_equal(stacked.B, [[3, -1], [-3, 1]])
    assert stacked.scaling == 1.0
    assert not stacked.A.flags.writeable


@requirement("R8.7")
def test_a_pair_of_weight_zero_is_left_out_even_if_it_holds_nan():
    bad = LowRank(np.full((3, 2), np.nan), np.full((2, 2), np.nan), 1.0)
    assert np.array_equal(concat([(bad, 0.0), (PAIR, 1.0)]).A, PAIR.A)
    assert not delta(concat([(bad, 0.0)])).any()


@requirement("R14.2", "R23.5")
@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 0x7F81), ("float32", 0x7F800001)])
def test_a_signalling_nan_is_a_nan_and_warns_of_nothing(name, bits, tmp_path):
    unsigned = f"u{DTYPES[name].itemsize}"
    pair = LowRank(*np.full((2, 1, 1), bits, unsigned).view(DTYPES[name]), 5e-324)
    assert np.isnan(delta(concat([(pair, 1.0)], dtype=np.float64))).all()
    assert not is_finite(pair)
    assert not min(norm_bound(pair), norm_of(pair)) < np.inf
    with pytest.raises(ArgumentError, match="finite factors"):
        spectrum(pair)
    card = LoRACard("a", 1, 1.0, ("m", "n"), {"m": pair, "n": LowRank(pair.A, pair.B, 1.0)})
    export_peft(card, tmp_path / "peft")
    assert not is_finite(import_peft(tmp_path / "peft").weights["m"])


@requirement("R7.2", "R8.5")
def test_pairs_for_different_layers_and_no_pairs_do_not_stack():
    expected = "concat: expected at least one factor pair, found none"
    with pytest.raises(ArgumentError, match=expected):
        concat([])
    other = LowRank(np.ones((4, 1)), np.ones((1, 2)))
    with pytest.raises(ShapeError, match="expected in -> out of 3 -> 2, found 4 -> 2"):
        concat([(PAIR, 1.0), (other, 1.0)])


@requirement("R2.5", "R7.2")
@pytest.mark.parametrize("shape", [(2,), (3, 2), ()])
def test_an_input_of_another_width_is_refused(shape):
    with pytest.raises(ShapeError, match="last dimension 3"):
        apply(np.ones(shape), [(PAIR, 1.0)])


@requirement("R2.10")
def test_a_fresh_a_fills_its_range_evenly():
    """A mean strays by 6 standard errors about once in a billion seeds."""
    a = initial(4096, 4, 8, np.random.default_rng(7)).A * np.sqrt(4096)
    standard_error = 1 / np.sqrt(3 * a.size)
    assert 0.999 < abs(a).max() <= 1
    assert abs(a.mean()) < 6 * standard_error
    assert abs((a**2).mean() - 1 / 3) < 6 * np.sqrt(4 / 45 / a.size)
    shares = np.histogram(a, bins=4, range=(-1, 1))[0] / a.size
    assert (abs(shares - 0.25) < 6 * np.sqrt(0.25 * 0.75 / a.size)).all()
