"""The cache, the keys and the metrics."""

import hashlib
import json
import os
import threading
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

import lora
from lora.errors import ArgumentError, CardNotFoundError, ManifestError, StoreError
from lora.federation import cache as cache_module
from lora.federation.cache import STALE, CardCache, default_cache
from lora.federation.keys import (
    generate_key,
    load_private_key,
    load_public_key,
    read_signed,
    sign_file,
    signature_path,
)
from lora.federation.trust import Policy, check_signature, public_key
from lora.metrics import Metrics, prometheus_text, serving
from lora.testing.plugin import requirement
from tests.unit.hostile import made


@pytest.fixture
def cache(tmp_path):
    return CardCache(tmp_path / "cache")


def admitted(cache, card):
    with cache.arriving() as (path, _):
        sha = lora.save(card, path)
        cache.admit(path, sha)
    return sha


def refuse(*_, **__):
    raise OSError(28, "no space left")


def no_home():
    """What pathlib does for a user without an entry in the system's list."""
    raise RuntimeError("Could not determine home directory.")


def in_threads(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@requirement("R12.2")
def test_what_is_admitted_is_found_by_digest_read_only_and_written_once(cache):
    sha = admitted(cache, made())
    assert cache.digests() == [sha]
    assert lora.load(cache.path(sha), verify=sha) == made()
    first = cache.path(sha).stat()
    assert admitted(cache, made()) == sha
    assert cache.path(sha).stat().st_ino == first.st_ino
    assert first.st_mode & 0o222 == 0
    assert [path.name for path in cache.root.iterdir()] == [f"{sha}.lora.arrow"]


@requirement("R12.7")
def test_what_does_not_arrive_leaves_nothing_and_a_dead_process_nothing_after_a_day(cache):
    with pytest.raises(TypeError), cache.arriving() as (_, file):
        file.write("no bytes")
    assert list(cache.root.iterdir()) == []
    old, new = cache.root / ".a.part", cache.root / ".b.part"
    old.touch()
    new.touch()
    os.utime(old, (old.stat().st_mtime - STALE - 60,) * 2)
    CardCache(cache.root)
    assert [path.name for path in cache.root.iterdir()] == [".b.part"]


@requirement("R12.2")
def test_a_damaged_card_is_deleted_and_so_is_a_file_of_the_right_digest_that_is_no_card(cache):
    good, bad = admitted(cache, made("a")), admitted(cache, made("bb"))
    cache.path(bad).chmod(0o644)
    cache.path(bad).write_bytes(b"rotten")
    false = hashlib.sha256(b"no card").hexdigest()
    cache.path(false).write_bytes(b"no card")
    loaded = [cache.load(sha) for sha in (good, bad, false, "0" * 64)]
    assert loaded == [made("a"), None, None, None]
    assert [path.name[:64] for path in cache.root.iterdir()] == [good]


@requirement("R12.3")
def test_a_version_that_can_not_be_remembered_leaves_no_folder(cache, monkeypatch):
    cache.remember_version("law", "key", "1.0.0")
    before = sorted(cache.root.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.Path, "touch", refuse)
        for name in ("law", "docs"):
            with pytest.raises(StoreError):
                cache.remember_version(name, "key", "2.0.0")
        cache.remember_version("law", "key", "1.0.0")  # it is there: a read-only disk will do
    assert sorted(cache.root.rglob("*")) == before


@requirement("R14.2")
def test_versions_only_rise(cache):
    for version in ("1.2.0", "1.10.0", "1.3.0", ""):
        cache.remember_version("../docs", "key", version)
    assert cache.highest_version("../docs", "key") == "1.10.0"
    assert cache.highest_version("../docs", "other") == cache.highest_version("docs", "key") == ""


@requirement("R7.8")
def test_a_digest_is_a_digest_and_a_folder_a_folder(cache, tmp_path):
    for wrong in ("../x", "A" * 64, "", "0" * 63):
        with pytest.raises(ArgumentError, match="64 lower-case hex digits"):
            cache.path(wrong)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        CardCache(tmp_path / "file")


@requirement("R12.2")
def test_the_users_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "lora-cards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache().parts[-2:] == (".cache", "lora-cards")
    monkeypatch.setattr(cache_module.Path, "home", no_home)
    with pytest.raises(StoreError, match="XDG_CACHE_HOME"):
        default_cache()


@requirement("R14.1", "R11.2")
def test_a_key_is_made_once_is_private_and_signs(tmp_path):
    key, card = tmp_path / "me.pem", tmp_path / "docs.lora.arrow"
    public = generate_key(key)
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    with pytest.raises(StoreError):
        generate_key(key)
    assert key.read_bytes() == before
    assert load_public_key(key) == load_public_key(f"{key}.pub") == public
    assert public_key(load_private_key(key)) == public
    sha = lora.save(made(version="1.0.0"), card)
    signed = sign_file(card, key)
    assert read_signed(signature_path(card)) == signed
    assert (signed.digest, signed.size, signed.version) == (sha, card.stat().st_size, "1.0.0")
    check_signature(signed, Policy(frozenset({public})))
    names = list(json.loads(signed.to_json()))
    assert names == sorted(names)


@requirement("R14.1", "R7.8")
def test_what_is_no_key_is_named_without_being_quoted(tmp_path):
    path = tmp_path / "x.pem"
    with pytest.raises(CardNotFoundError):
        load_private_key(path)
    for text in (b"SECRET", b"-----BEGIN PRIVATE KEY-----\nU0VDUkVU\n-----END PRIVATE KEY-----\n"):
        path.write_bytes(text)
        for load in (load_private_key, load_public_key):
            with pytest.raises(ArgumentError, match="Ed25519") as caught:
                load(path)
            assert "SECRET" not in str(caught.value)
    path.write_bytes(b"x" * 70_000)
    with pytest.raises(StoreError, match="at most"):
        load_private_key(path)
    path.write_bytes(b"[1]")
    with pytest.raises(ManifestError, match="a JSON object"):
        read_signed(path)


@requirement("R5.16")
def test_sums_grow_from_any_thread_and_are_served_as_prometheus_text():
    metrics = Metrics()
    in_threads(4, lambda: [metrics.add("fetches") for _ in range(1000)])
    with pytest.raises(KeyError), metrics.timed("calls"):
        raise KeyError
    sums = metrics.snapshot()
    assert (sums["fetches"], sums["calls"], sums["calls_failed"]) == (4000, 1, 1)
    assert sums["calls_seconds"] >= 0
    metrics.add("fetches")
    assert sums["fetches"] == 4000
    assert "lora_fetches_total 4001.0" in prometheus_text(metrics)
    health = {"status": "ok"}
    with serving(metrics, 0, health=lambda: {**health, "cards": 1 / len(health)}) as port:

        def page(path):
            return urlopen(f"http://127.0.0.1:{port}{path}")

        with page("/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert b"lora_fetches_total 4001.0" in answer.read()
        with page("/healthz") as answer:
            assert json.loads(answer.read()) == {"status": "ok", "cards": 1}
        health.clear()
        with pytest.raises(HTTPError, match="503"):
            page("/healthz")
        with pytest.raises(HTTPError, match="404"):
            page("/")
        with pytest.raises(StoreError, match="Address already in use"), serving(metrics, port):
            pass
