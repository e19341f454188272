"""R14: signatures hold for what was signed alone, versions have one order, manifests survive."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lora import errors
from lora.checks import version_order
from lora.federation.manifest import Manifest, check_name, manifest_from_json
from lora.federation.trust import (
    Policy,
    check_declared,
    check_signature,
    check_version,
    public_key,
    sign,
)
from lora.testing.plugin import requirement

KEYS = st.binary(min_size=32, max_size=32).map(Ed25519PrivateKey.from_private_bytes)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
SEMVER = r"(0|[1-9][0-9]?)\.(0|[1-9])\.(0|[1-9])(-(rc|[0-9]|a)(\.(rc|[0-9]|b))?)?"
VERSIONS = st.from_regex(SEMVER, fullmatch=True) | st.just("")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MANIFESTS = st.builds(
    Manifest,
    name=TEXTS,
    digest=DIGESTS,
    size=st.integers(0, 2**40),
    version=VERSIONS,
    rank=st.integers(0, 512),
    alpha=st.floats(0.1, 100),
    targets=st.lists(TEXTS, max_size=3).map(tuple),
    modules=st.integers(0, 1000),
    description=TEXTS,
    base_model=st.none() | TEXTS,
    base_fingerprint=st.none() | DIGESTS,
)


FIELDS = sorted(set(Manifest.__dataclass_fields__) - {"signature"})


@requirement("R14.1")
@given(MANIFESTS, KEYS, MANIFESTS)
def test_a_signature_holds_for_what_was_signed_and_for_nothing_else(manifest, key, other):
    signed, policy = sign(manifest, key), Policy(frozenset({public_key(key)}))
    check_signature(signed, policy)
    for field in FIELDS:
        if (value := getattr(other, field)) != getattr(manifest, field):
            with pytest.raises(errors.SignatureError):
                check_signature(replace(signed, **{field: value}), policy)


def verdict(check, *args):
    """The kind of the refusal, or None."""
    try:
        check(*args)
    except errors.RefusedError as error:
        return type(error)
    return None


@requirement("R14.1", "R14.2")
@given(MANIFESTS, KEYS, KEYS, st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_who_is_believed_is_what_the_policy_says(manifest, key, other, choices):
    pinned, unsigned, unknown = choices
    pins = frozenset({manifest.digest}) if pinned else frozenset()
    options = {"allow_unsigned": unsigned, "allow_unknown_signers": unknown}
    policy = Policy(frozenset({public_key(other)}), pins, **options)
    stranger = public_key(key) != public_key(other) and not (pinned or unknown)
    expected = {
        manifest: None if pinned or unsigned else errors.UnsignedError,
        sign(manifest, other): None,
        sign(manifest, key): errors.UnknownSignerError if stranger else None,
    }
    for candidate, error in expected.items():
        assert verdict(check_signature, candidate, policy) is error


@requirement("R11.2", "R12.1")
@given(MANIFESTS, KEYS, st.dictionaries(st.text("xyz", min_size=1), st.integers(), max_size=2))
def test_a_manifest_survives_the_wire_with_what_later_versions_add(manifest, key, more):
    for sent in (manifest, sign(manifest, key)):
        data = sent.to_json()
        assert manifest_from_json(data) == sent
        extra = "".join(f'"{name}":{value},' for name, value in more.items()).encode()
        assert manifest_from_json(b"{" + extra + data[1:]) == sent


@requirement("R12.3", "R7.8")
@given(MANIFESTS, st.data())
def test_a_manifest_that_is_cut_or_changed_is_one_or_is_refused(manifest, data):
    sent = manifest.to_json()
    at, cut = data.draw(st.integers(0, len(sent) - 1)), data.draw(st.booleans())
    rest = b"" if cut else bytes([data.draw(st.integers(0, 255))]) + sent[at + 1 :]
    try:
        parsed = manifest_from_json(sent[:at] + rest)
    except errors.ManifestError:
        return
    assert isinstance(parsed, Manifest)
    assert not cut


@requirement("R14.2")
@given(st.lists(VERSIONS, min_size=3, max_size=3))
def test_versions_have_one_order(versions):
    a, b, c = map(version_order, versions)
    assert sum([a < b, b < a, a == b]) == 1
    assert not (a < b < c) or a < c
    assert version_order("") <= a


@requirement("R14.2")
@given(MANIFESTS, VERSIONS, st.booleans(), st.booleans())
def test_no_older_version_than_one_seen_is_accepted_unless_one_insists(
    manifest, seen, pinned, allowed
):
    policy = Policy(pins=frozenset({manifest.digest} if pinned else ()), allow_older=allowed)
    older = version_order(manifest.version) < version_order(seen)
    refused = older and not pinned and not allowed
    assert verdict(check_version, manifest, seen, policy) is (
        errors.OlderVersionError if refused else None
    )


BAD = ["../x", "/x", "x\\y", ".x", "x\0", "x\n", "\u202ex", "x" * 129]


@requirement("R14.2")
@given(TEXTS | st.sampled_from(BAD), MANIFESTS)
def test_a_name_from_outside_is_printable_short_and_no_path(name, manifest):
    sound = 0 < len(name) <= 128 and name.isprintable() and not set(name) & {"/", "\\"}
    sound = sound and name[0] != "."
    assert verdict(check_name, name) is (None if sound else errors.BadNameError)
    declared = replace(manifest, name=name, size=1)
    assert verdict(check_declared, declared, Policy()) is (None if sound else errors.BadNameError)
