"""R12: what a card must pass, and in which order, against a real server that sends anything."""

import hashlib
import itertools
import math
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora
from lora import errors
from lora.card import DTYPES, LoRACard, LowRank
from lora.factors import delta
from lora.federation.cache import CardCache
from lora.federation.client import LoRAFlightClient
from lora.federation.manifest import Signature, manifest_of
from lora.federation.trust import Policy, check_contents, norm_bound, norm_of, public_key, sign
from lora.testing.plugin import requirement
from tests.unit.hostile import AUTHOR, TRUSTING, Liar

POLICY = Policy(TRUSTING.trusted, max_bytes=100_000)


@pytest.fixture(scope="module")
def wire():
    """A function that fetches a manifest's card, and says what it left in the cache."""
    with tempfile.TemporaryDirectory() as folder, Liar() as server:
        cache = CardCache(folder)
        with LoRAFlightClient(server.uri, cache, POLICY) as client:

            def fetch(manifest, data):
                server.data = lambda: (data[at : at + 1000] for at in range(0, len(data), 1000))
                try:
                    return client.fetch(manifest).card
                except errors.LoRAError as error:
                    return error
                finally:
                    fetch.left = sorted(path.name for path in Path(folder).rglob("*"))
                    for sha in cache.digests():
                        cache.path(sha).unlink()
                    shutil.rmtree(Path(folder) / "versions", ignore_errors=True)

            yield fetch


def file_of(card):
    """The card's bytes, and the manifest that goes with them."""
    with tempfile.NamedTemporaryFile() as file:
        sha = lora.save(card, file.name)
        data = Path(file.name).read_bytes()
        return data, manifest_of(card, sha, len(data))


def holding(value=0.5, name="docs"):
    pair = LowRank(np.full((8, 2), value, np.float32), np.full((2, 8), 0.25, np.float32))
    return LoRACard(name, 2, 4.0, ("q",), {"q": pair}, {"version": "1.0.0"})


DATA, GOOD = file_of(holding())
SIGNED = sign(GOOD, AUTHOR)


@requirement("R12.3")
@given(st.data())
def test_no_change_of_the_bytes_passes_and_none_leaves_a_trace(wire, data):
    at, bit = data.draw(st.integers(0, len(DATA) - 1)), data.draw(st.integers(0, 7))
    more = data.draw(st.binary(min_size=1, max_size=3000))
    flipped = DATA[:at] + bytes([DATA[at] ^ (1 << bit)]) + DATA[at + 1 :]
    sent = data.draw(
        st.sampled_from([flipped, DATA[:at], DATA + more, DATA[at:] + DATA[:at], DATA])
    )
    outcome = wire(SIGNED, sent)
    if sent == DATA:
        assert outcome == holding()
        assert {f"{GOOD.digest}.lora.arrow", "1.0.0"} < set(wire.left)
    else:
        assert isinstance(outcome, errors.MismatchError)
        assert wire.left == []


ERRORS = {
    "name": (errors.BadNameError, "name"),
    "size": (errors.MismatchError, "declared size"),
    "bytes": (errors.MismatchError, "bytes received"),
    "digest": (errors.MismatchError, "SHA-256"),
    "signature": (errors.SignatureError, "signature"),
    "parse": (errors.CardFileError, ""),
    "announcement": (errors.MismatchError, "rank"),
    "values": (errors.NonFiniteError, "finite"),
}


FAULTS = [pair for count in (0, 1, 2) for pair in itertools.combinations(ERRORS, count)]


@requirement("R12.3", "R14.2")
@pytest.mark.parametrize("faults", FAULTS, ids=" and ".join)
def test_of_several_faults_the_first_stages_is_named_and_the_cache_stays_as_it_was(wire, faults):
    """Declared size → bytes received → SHA-256 → signature → Arrow parse → structure → values."""
    value = float("nan") if "values" in faults else 0.5
    card = holding(value, "../x" if "name" in faults else "docs")
    data, manifest = file_of(card)
    if "parse" in faults:
        data = data[:8] + bytes(len(data) - 8)
        manifest = replace(manifest, digest=hashlib.sha256(data).hexdigest())
    changes = {"announcement": {"rank": 7}, "size": {"size": POLICY.max_bytes + 1}}
    changes["digest"] = {"digest": "0" * 64}
    for fault in changes.keys() & set(faults):
        manifest = replace(manifest, **changes[fault])
    manifest = sign(manifest, AUTHOR)
    if "signature" in faults:
        manifest = replace(manifest, signature=Signature(public_key(AUTHOR), "0" * 128))
    outcome = wire(manifest, data[:-1] if "bytes" in faults else data)
    first = next((stage for stage in ERRORS if stage in faults), None)
    if first is None:
        assert outcome == card
        return
    kind, text = ERRORS[first]
    assert isinstance(outcome, kind)
    assert text in str(outcome)
    assert wire.left == []


@requirement("R14.2")
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 9)),
    exponents=st.tuples(st.integers(-45, 38), st.integers(-45, 38)),
    special=st.none() | st.sampled_from([math.nan, math.inf, 1e308, 1e-320, 0.0]),
    scaling=st.floats(-1e9, 1e9),
)
def test_a_bound_on_a_norm_is_never_below_it(dtype, sizes, exponents, special, scaling):
    rows, rank, columns = sizes
    with np.errstate(all="ignore"):
        a, b = (
            (np.random.default_rng(seed).normal(size=shape) * 10.0**exponent).astype(DTYPES[dtype])
            for seed, (shape, exponent) in enumerate(
                zip(((rows, rank), (rank, columns)), exponents, strict=True)
            )
        )
        a[0, 0] = a[0, 0] if special is None else special
        exact = np.linalg.norm(a.astype(float) @ b.astype(float)) * abs(scaling)
    bound = norm_bound(LowRank(a, b, scaling))
    assert not bound < exact * (1 - 1e-9)
    if not (np.isfinite(a.astype(float)).all() and np.isfinite(b.astype(float)).all()):
        assert not math.isfinite(bound)


@requirement("R14.2")
@given(st.sampled_from([1e-30, 0.5, 1e4, 1e18, 3e38]), st.floats(1e-3, 1e6))
def test_a_norm_is_refused_exactly_when_it_is_beyond_the_policys(wire, value, limit):
    card = holding(value)
    exact = np.linalg.norm(delta(card.weights["q"], dtype=np.float64))
    # Below 1e-18, float32 underflows.
    assert norm_of(card.weights["q"]) == pytest.approx(exact, rel=1e-5, abs=1e-18)
    with suppress(errors.RefusedError):
        check_contents(card, manifest_of(card, GOOD.digest, 1), Policy(max_norm=limit))
        assert exact <= limit * 1.0001
        return
    assert exact >= limit * 0.9999
