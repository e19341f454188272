"""The client against real servers, honest and hostile: typed errors, deadlines, an intact cache."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
from pyarrow import flight

import lora
from lora import errors
from lora.card import LoRACard, LowRank
from lora.federation import cache as cache_module
from lora.federation.cache import CardCache
from lora.federation.client import MAX_MESSAGE, LoRAFlightClient
from lora.federation.credentials import Credentials
from lora.federation.manifest import Manifest
from lora.federation.server import LoRAFlightServer
from lora.federation.trust import Policy, public_key, sign, waived
from lora.testing import folder_of
from lora.testing.plugin import requirement
from tests.unit import hostile
from tests.unit.hostile import (
    ANY,
    AUTHOR,
    STRANGER,
    TRUSTING,
    Authority,
    announced,
    emptied,
    listening,
    made,
    saved,
    until,
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cards"
    path.mkdir()
    return path


@pytest.fixture
def cache(tmp_path):
    return CardCache(tmp_path / "cache")


@pytest.fixture
def server(folder):
    with LoRAFlightServer(folder) as server:
        yield server


@pytest.fixture
def client(server, cache):
    """A client of an honest server, which accepts any card."""
    with LoRAFlightClient(server.uri, cache, ANY) as client:
        yield client


@pytest.fixture
def liar(tmp_path):
    """A server that lies, with a function that makes it offer a card's file."""
    with hostile.Liar() as server:

        def offer(card, key=None, **changes):
            manifest = replace(announced(card, tmp_path / "a"), **changes)
            manifest = manifest if key is None else sign(manifest, key)
            server.manifests, server.data = [manifest], (tmp_path / "a").read_bytes()
            return manifest

        server.offer = offer
        yield server


def fetch(liar, cache, policy=TRUSTING, name="docs", *, digest=None, **options):
    """Fetch the liar's card with a client of its own."""
    with LoRAFlightClient(liar.uri, cache, policy, **{"timeout": 5, **options}) as client:
        return client.fetch_skill(name, digest=digest)


def contents(cache):
    """Everything in the cache."""
    return sorted(str(path.relative_to(cache.root)) for path in cache.root.rglob("*"))


def refused(liar, cache, error, match=None, policy=TRUSTING, **options):
    """Fetching the liar's card ends with the error and leaves the cache as it was."""
    before = sorted(cache.root.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        fetch(liar, cache, policy, **options)
    assert sorted(cache.root.rglob("*")) == before
    return caught.value


@requirement("R12.1")
def test_what_a_peer_offers_is_listed_by_name(folder, client):
    for name in ("law", "docs", "food"):
        saved(made(name, base_model="minilm" if name == "law" else None), folder)

    def names(*args, **options):
        return [skill.name for skill in client.list_remote_skills(*args, **options)]

    assert names() == ["docs", "food", "law"]
    assert names("d") == ["docs"]
    assert names(base_model="minilm") == ["law"]
    with pytest.raises(errors.UnknownCardError, match="nothing"):
        client.fetch_skill("nothing")


@requirement("R12.2")
def test_a_digest_pins_a_card_and_refresh_asks_again_what_a_name_stands_for(folder, server, cache):
    sha = saved(made(), folder)
    with LoRAFlightClient(server.uri, cache) as client:
        with pytest.raises(errors.UnsignedError, match=f"`pin` {sha}"):
            client.fetch_skill("docs")
        assert client.fetch_skill("docs", digest=sha) == made()
        with pytest.raises(errors.UnknownCardError):
            client.fetch_skill("docs", digest="0" * 64)
        with pytest.raises(errors.UnknownCardError, match="'law'"):
            client.fetch_skill("law", digest=sha)
        client.policy = ANY
        assert client.fetch_skill("docs") == made()
        saved(made(size=8), folder)
        assert client.fetch_skill("docs") == made()
        assert client.fetch_skill("docs", refresh=True) == made(size=8)


@requirement("R12.1")
def test_a_list_is_bounded_and_what_is_malformed_in_it_is_left_out(liar, cache, monkeypatch):
    good = liar.offer(made())
    liar.manifests = [b"{", good, b"x" * 70000, b'{"name":1,"digest":"0","size":1}']
    with LoRAFlightClient(liar.uri, cache) as client:
        assert client.list_remote_skills() == [good]
        assert client.metrics.snapshot()["manifests_refused"] == 3
        monkeypatch.setattr("lora.federation.client.MAX_CARDS", 3)
        with pytest.raises(errors.PeerError, match="at most 3 cards"):
            client.list_remote_skills()


@requirement("R12.2", "R12.9")
def test_a_second_call_does_no_network_io_and_progress_is_reported(folder, server, client):
    card, seen = made(size=100_000, rank=4), []
    sha = saved(card, folder)
    assert client.fetch_skill("docs", progress=lambda *progress: seen.append(progress)) == card
    requests = dict(server.metrics.snapshot())
    assert client.fetch_skill("docs") == card
    assert dict(server.metrics.snapshot()) == requests
    size = client.cache.path(sha).stat().st_size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (len(seen) > 2, seen[-1]) == (True, (size, size))
    assert {total for _, total in seen} == {size}
    counts = client.metrics.snapshot()
    assert (counts["fetched_bytes"], counts["cache_hits"]) == (size, 1)
    assert contents(client.cache) == [f"{sha}.lora.arrow"]
    assert client.cache.path(sha).stat().st_mode & 0o777 == 0o444


BAD_NAMES = ["../x", "/etc/passwd", "a\0b", "a" * 300, "", ".x", "a\\b", "a\nb", "\u202eabc"]


@requirement("R12.3", "R14.2")
@pytest.mark.parametrize(
    ("field", "value"),
    [*(("size", size) for size in (0, -1, 2**31 + 1, 2**62)), *(("name", n) for n in BAD_NAMES)],
)
def test_an_absurd_size_or_name_is_refused_before_a_byte_is_requested(liar, cache, field, value):
    manifest = json.loads(liar.offer(made(), AUTHOR).to_json()) | {field: value}
    liar.manifests, liar.data = [json.dumps(manifest).encode()], lambda: pytest.fail("requested")
    kinds = {"size": errors.MismatchError, "name": errors.BadNameError}
    malformed = value == -1
    error, where = (errors.UnknownCardError, "docs") if malformed else (kinds[field], field)
    refused(liar, cache, error, where, name=manifest["name"])


def drip(data):
    for at in range(0, len(data), 1000):
        time.sleep(0.1)
        yield data[at : at + 1000]


def endless(data):
    while True:
        yield bytes(2**20)


def one_message(data):
    yield bytes(MAX_MESSAGE + 1)


@requirement("R12.3", "R12.5")
@pytest.mark.parametrize("sent", [drip, endless, one_message])
def test_a_drip_an_endless_stream_and_a_huge_message_end_soon(liar, cache, sent):
    """With the minimum rate, the announced size, and before the message is buffered."""
    error = errors.MismatchError if sent is endless else errors.PeerError
    liar.offer(made(size=20_000, rank=4), AUTHOR)
    data, start = liar.data, time.monotonic()
    liar.data = lambda: sent(data)
    options = {"timeout": 1, "min_rate": 1e6}
    refused(liar, cache, error, "or more" if sent is endless else None, **options)
    liar.manifests = sent(data)
    with LoRAFlightClient(liar.uri, cache, timeout=0.5) as client, pytest.raises(errors.PeerError):
        client.list_remote_skills()
    assert time.monotonic() - start < 6


@requirement("R12.5")
def test_a_download_that_receives_nothing_is_cut_long_before_its_deadline(liar, cache):
    ended = threading.Event()
    liar.offer(made(size=20_000, rank=4), AUTHOR)
    data = liar.data

    def stalling():
        yield data[:1000]
        ended.wait(30)

    def slow():  # but never as long as `stall` without a byte
        for at in range(0, len(data), 2**16):
            time.sleep(0.1)
            yield data[at : at + 2**16]

    liar.data = stalling
    start = time.monotonic()
    error = refused(liar, cache, errors.PeerError, "some bytes in 0.5 s", stall=0.5, timeout=60)
    assert "`stall`" in error.hint
    assert 0.5 <= time.monotonic() - start < 5
    ended.set()
    liar.data, start = slow, time.monotonic()
    assert fetch(liar, cache, stall=0.5).name == "docs"
    assert time.monotonic() - start > 0.5


INVALID = sorted((folder_of("spec") / "vectors").glob("*/*/invalid/*.arrow"))


@requirement("R12.3", "R7.9")
@pytest.mark.parametrize("vector", INVALID, ids=lambda path: path.stem)
def test_a_correctly_signed_file_that_is_no_card_is_refused(liar, cache, vector):
    """Mutated IPC, compressed bodies, overlapping buffers and the like."""
    liar.data = vector.read_bytes()
    manifest = Manifest("docs", lora.digest(vector), len(liar.data))
    liar.manifests = [sign(manifest, AUTHOR)]
    refused(liar, cache, errors.CardFileError if liar.data else errors.MismatchError)


def holding(a=0.1, name="docs", base_model=None):
    """A card with these values in its factors."""
    pair = LowRank(np.full((4, 1), a, np.float32), np.full((1, 4), a, np.float32))
    return LoRACard(name, 1, 1.0, ("q",), {"q": pair}, base_model=base_model)


BASE = Policy(TRUSTING.trusted, base_model="y")
REFUSALS = {
    "unsigned": (holding(), None, errors.UnsignedError, TRUSTING),
    "unknown_signers": (holding(), STRANGER, errors.UnknownSignerError, TRUSTING),
    "nonfinite": (holding(float("nan")), AUTHOR, errors.NonFiniteError, TRUSTING),
    "any_norm": (holding(1e9), AUTHOR, errors.AbsurdNormError, TRUSTING),
    "other_base": (holding(base_model="x"), AUTHOR, errors.BaseModelError, BASE),
    "any_name": (holding(name="../x"), AUTHOR, errors.BadNameError, TRUSTING),
}


@requirement("R14.2")
@pytest.mark.parametrize("option", REFUSALS)
def test_each_refusal_has_an_error_and_an_opt_out_of_its_own(liar, cache, option):
    card, key, error, policy = REFUSALS[option]
    manifest = liar.offer(card, key)
    for other in REFUSALS.keys() - {option}:
        refused(liar, cache, error, None, waived(policy, [other]), name=card.name)
    assert fetch(liar, cache, waived(policy, [option]), card.name).name == card.name
    assert cache.digests() == [manifest.digest]


@requirement("R14.2")
def test_other_bytes_than_announced_are_kept_if_one_insists(liar, cache, tmp_path):
    liar.offer(made(), AUTHOR)
    sha = lora.save(made(size=8), tmp_path / "b")
    liar.data = (tmp_path / "b").read_bytes()
    refused(liar, cache, errors.MismatchError)
    assert fetch(liar, cache, waived(TRUSTING, ["mismatch"])) == made(size=8)
    assert cache.digests() == [sha]
    with pytest.raises(errors.ArgumentError, match="one of unsigned"):
        waived(TRUSTING, ["everything"])


@requirement("R14.2")
def test_an_older_version_than_one_seen_is_refused_across_clients(liar, cache):
    cards = {version: made(version=version) for version in ("1.2.0", "1.10.0")} | {"": made()}
    for version in ("1.2.0", "1.10.0"):
        liar.offer(cards[version], AUTHOR)
        assert fetch(liar, cache).metadata["version"] == version
    for version in ("1.2.0", ""):
        manifest = liar.offer(cards[version], AUTHOR)
        refused(liar, cache, errors.OlderVersionError, "1.10.0 or newer")
        assert fetch(liar, cache, waived(TRUSTING, ["older"])) == cards[version]
        assert fetch(liar, cache, digest=manifest.digest) == cards[version]
    assert cache.highest_version("docs", public_key(AUTHOR)) == "1.10.0"
    assert cache.highest_version("docs", public_key(STRANGER)) == ""


@requirement("R12.1", "R12.3")
def test_another_card_than_requested_and_one_that_the_callers_check_refuses(liar, cache):
    def unfit(_):
        raise errors.BaseModelError("fits", "this", "that")

    liar.offer(made("law"))
    refused(liar, cache, errors.UnknownCardError)
    liar.offer(made(), AUTHOR)
    refused(liar, cache, errors.BaseModelError, "fits", check=unfit)


FORGED = {"name": "x", "rank": 3, "description": "x", "targets": ("key",), "version": "9.0.0"}


@requirement("R12.3")
def test_an_announcement_that_is_not_of_the_card_is_refused(liar, cache):
    for field, value in FORGED.items():
        manifest = liar.offer(made(), AUTHOR, **{field: value})
        refused(liar, cache, errors.MismatchError, field, name=manifest.name)


@requirement("R12.5")
@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(range(256)) * 64, b"\x16\x03\x01"]
)
def test_a_silent_listener_and_a_garbage_server_end_with_the_deadline(cache, answer):
    with listening(answer) as uri:
        for secure in (uri, uri.replace("grpc:", "grpc+tls:")):
            start = time.monotonic()
            with LoRAFlightClient(secure, cache, ANY, timeout=0.3) as client:
                for call in (client.list_remote_skills, client.health):
                    with pytest.raises(errors.PeerError):
                        call()
                with pytest.raises(errors.PeerError):
                    client.fetch_skill("docs")
            assert time.monotonic() - start < 6
    with LoRAFlightClient(uri, cache, ANY, timeout=0.3) as client, pytest.raises(errors.PeerError):
        client.list_remote_skills()  # nobody listens any more


@requirement("R12.6")
@pytest.mark.parametrize(
    "error", [flight.FlightCancelledError, flight.FlightUnavailableError, KeyError, None]
)
def test_a_stream_that_breaks_off_is_an_error_in_the_calling_thread(liar, cache, error):
    liar.offer(made(size=200_000, rank=4), AUTHOR)
    kinds = []

    def broken():
        yield bytes(2**20)
        if error is not None:
            raise error("stop")

    def fetching():
        try:
            fetch(liar, cache)
        except BaseException as caught:  # noqa: BLE001 - what it is is the question
            kinds.append(type(caught))

    liar.data = broken
    thread = Thread(target=fetching)
    thread.start()
    try:
        thread.join(20)
    except KeyboardInterrupt:
        pytest.fail("the main thread was interrupted")
    assert kinds == [errors.PeerError if error else errors.MismatchError]
    assert contents(cache) == []


@requirement("R12.5", "R12.6")
def test_a_line_that_is_cut_or_silent_is_a_peer_error_and_heals(folder, server, cache):
    sha = saved(made(size=400_000, rank=4), folder)
    with ExitStack() as opened:
        line = opened.enter_context(hostile.Line(server.port))
        client = LoRAFlightClient(line.uri, cache, ANY, timeout=2, min_rate=1e7)
        opened.enter_context(client)
        for line.limit, line.silent in ((2_000_000, False), (None, True)):
            with pytest.raises(errors.PeerError):
                client.fetch_skill("docs")
        assert contents(cache) == []
        line.silent = False
        line.cut()

        def heals():
            with suppress(errors.PeerError):  # gRPC waits a second or two before it connects again
                return client.fetch_skill("docs")

        until(heals)
    assert cache.digests() == [sha]


@requirement("R12.3")
@pytest.mark.parametrize(
    ("step", "number"),
    [("link", 13), ("chmod", 1), ("write", 28), ("open", 5), ("touch", 28), ("mkdir", 28)],
)
def test_a_disk_that_refuses_leaves_the_cache_as_it_was(folder, client, monkeypatch, step, number):
    """The record of versions, which `touch` and `mkdir` write, included."""
    saved(made(version="1.0.0"), folder)

    def refuse(*_, **__):
        raise OSError(number, "refused")

    with monkeypatch.context() as patch:
        if step == "write":
            full_disk = partial(Path.open, Path("/dev/full"), "wb")
            patch.setattr(Path, "open", lambda *_, **__: full_disk())
        else:
            patch.setattr(cache_module.os if step == "link" else Path, step, refuse)
        with pytest.raises(errors.StoreError):
            client.fetch_skill("docs")
    assert list(client.cache.root.iterdir()) == []
    assert client.fetch_skill("docs") == made(version="1.0.0")


@requirement("R12.2")
def test_a_cached_file_that_is_corrupted_later_is_fetched_again(folder, client):
    path = client.cache.path(saved(made(), folder))
    client.fetch_skill("docs")
    data = bytearray(path.read_bytes())
    data[data.index(made().weights["layer.0.query"].A.tobytes())] ^= 1  # a number of a factor
    path.chmod(0o644)
    path.write_bytes(data)
    assert client.fetch_skill("docs") == made()
    assert client.cache.digests() == [lora.digest(path)]
    assert client.metrics.snapshot()["fetches"] == 2


@requirement("R12.2", "R14.2")
def test_a_cached_card_that_the_policy_refuses_counts_as_no_use_of_the_cache(folder, client):
    saved(made(), folder)
    (manifest,) = client.list_remote_skills()
    client.fetch(manifest)
    with pytest.raises(errors.UnsignedError):
        client.fetch(manifest, Policy())
    assert "cache_hits" not in client.metrics.snapshot()
    client.fetch(manifest)
    assert client.metrics.snapshot()["cache_hits"] == 1


@requirement("R12.2")
@pytest.mark.parametrize("number", [1, 2])
def test_a_card_that_is_deleted_at_any_moment_is_fetched_again(folder, client, monkeypatch, number):
    """Its file goes just before it is opened, whoever opens it."""
    saved(made(), folder)
    client.fetch_skill("docs")
    opened = []

    def open_deleted(path, *args, **options):
        if str(path).startswith(str(client.cache.root)):
            opened.append(path)
            if len(opened) == number:
                emptied(client.cache)
        return os.open(path, *args, **options)

    monkeypatch.setattr("lora.files.os", SimpleNamespace(**{**vars(os), "open": open_deleted}))
    assert client.fetch_skill("docs") == made()
    assert opened


@requirement("R7.8", "R12.5")
@pytest.mark.parametrize("version", [[], [b""], [b"[1]"], [b"\xff"]])
def test_an_answer_that_says_nothing_is_a_fault_of_the_peer(liar, cache, version):
    liar.version = version
    with LoRAFlightClient(liar.uri, cache) as client, pytest.raises(errors.PeerError):
        client.health()


@requirement("R14.2")
def test_records_of_versions_that_can_not_be_read_refuse_the_card(folder, client):
    saved(made(version="1.0.0"), folder)
    (client.cache.root / "versions").write_bytes(b"")
    with pytest.raises(errors.StoreError):
        client.fetch_skill("docs")
    assert client.cache.digests() == []


BASES = {
    "owner/minilm": True,
    "minilm/": True,
    "/hub/models--owner--minilm/snapshots/1f3a": True,
    "other/minilm": True,
    "owner/minilm-v2": False,
    "snapshots/minilm/owner": False,
    None: False,
}


@requirement("R14.2")
@pytest.mark.parametrize("base", BASES)
def test_one_base_may_be_spelled_in_several_ways_and_another_is_refused(liar, cache, base):
    policy = replace(TRUSTING, base_model="someone/minilm")
    liar.offer(holding(base_model=base), AUTHOR)
    if BASES[base]:
        assert fetch(liar, cache, policy).base_model == base
        return
    refused(liar, cache, errors.BaseModelError, "someone/minilm", policy)
    assert fetch(liar, cache, waived(policy, ["other_base"])).base_model == base
    emptied(cache)
    # The caller's check has compared the weights: names do not matter.
    assert fetch(liar, cache, policy, check=lambda _: True).base_model == base


@requirement("R11.6")
def test_a_proxy_of_the_environment_sees_neither_the_token_nor_anything(folder, cache, monkeypatch):
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    secret = Credentials("secret")
    with LoRAFlightServer(folder, credentials=secret) as server:
        with hostile.Line(server.port, connect=True) as proxy:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
            options = flight.FlightCallOptions(headers=[(b"authorization", b"Bearer secret")])
            with flight.connect(server.uri) as other:  # a client that is not told
                assert list(other.list_flights(options=options)) == []
            assert b"secret" in proxy.seen
            with LoRAFlightClient(server.uri, cache, credentials=secret) as client:
                assert client.list_remote_skills() == []
            assert len(proxy.pairs) == 1  # the other client's


def shown(authority, **options):
    """Credentials of a client or a server, with a token."""
    return authority.credentials(**{"token": "secret", **options})


AUTHORITY, OTHER = Authority(), Authority()
TLS = shown(AUTHORITY)
# What a server has, what a client has -> what the client's error and its hint name.
CAUSES = {
    "no token": (TLS, shown(AUTHORITY, token=None), "nauthenticated", "token"),
    "another token": (TLS, shown(AUTHORITY, token="x"), "nauthenticated", "token"),
    "another authority": (TLS, replace(TLS, ca=OTHER.pem), "certificate", "authority in `ca`"),
    "expired": (shown(AUTHORITY, days=(-9, -1)), TLS, "certificate has expired", "valid"),
    "another name": (shown(AUTHORITY, hosts=["x"]), TLS, "not in peer certificate", "must name"),
    "no certificate": (TLS, Credentials("secret", ca=AUTHORITY.pem), "closed", "certificate"),
    "not the authority's": (TLS, shown(OTHER, ca=AUTHORITY.pem), "closed", "certificate"),
    "expired here": (TLS, shown(AUTHORITY, days=(-9, -1)), "closed", "certificate"),
    "not yet valid here": (TLS, shown(AUTHORITY, days=(1, 9)), "closed", "certificate"),
    "no TLS here": (TLS, Credentials("secret"), "closed", r"grpc\+tls"),
    "no TLS there": (Credentials(), TLS, "wrong version number", "without TLS"),
}


@requirement("R7.8", "R11.6")
@pytest.mark.parametrize("cause", CAUSES)
def test_why_a_peer_does_not_answer_is_told_and_one_answers(folder, cache, cause, capfd):
    theirs, own, text, hint = CAUSES[cause]
    scheme = "grpc+tls" if theirs.certificate else "grpc"
    with LoRAFlightServer(folder, f"{scheme}://localhost:0", credentials=theirs) as server:
        scheme = "grpc" if cause == "no TLS here" else "grpc+tls"
        uri = f"{scheme}://localhost:{server.port}"
        with LoRAFlightClient(uri, cache, credentials=own, timeout=5) as client:
            with pytest.raises(errors.PeerError, match=text) as caught:
                client.health()
        if theirs is TLS:
            with LoRAFlightClient(server.uri, cache, credentials=TLS) as client:
                assert client.list_remote_skills() == []
    assert re.search(hint, caught.value.hint)
    assert "secret" not in str(caught.value)
    with pytest.raises(errors.ArgumentError, match="TLS beyond loopback"):
        LoRAFlightClient("grpc://192.0.2.1:5", credentials=TLS)
    capfd.readouterr()  # gRPC says so too


@requirement("R7.8")
@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("grpc://127.0.0.1:1", "Connection refused; nothing serves"),
        ("grpc://nowhere.invalid:1", "nowhere.invalid.*no machine"),
    ],
)
def test_a_wrong_address_is_told(cache, uri, text):
    with LoRAFlightClient(uri, cache) as client, pytest.raises(errors.PeerError, match=text):
        client.list_remote_skills()


FORKED = """
import os, sys, tempfile
from lora.errors import StateError
from lora.federation import LoRAFlightClient, LoRAFlightServer, Node
cards, cache = sys.argv[1:]
node = Node(cache, cards, interfaces=["127.0.0.1"])
uri = node.server.uri
client = LoRAFlightClient(uri, cache)
client.list_remote_skills()

def tried(work):
    try:
        work()
    except StateError as error:
        return "spawn" in str(error)

child = os.fork()
if not child:
    calls = [client.list_remote_skills, client.health, lambda: client.fetch_skill("docs")]
    calls += [lambda: LoRAFlightClient(uri, cache), lambda: LoRAFlightServer(cards), node.sync]
    refusals = [tried(call) for call in calls]
    client.close()
    node.close()
    sys.exit(not all(refusals))  # which must not wait for threads of the parent either
status = os.waitpid(child, 0)[1]
print(status, [skill.name for skill in client.list_remote_skills()])
client.close()
node.close()
"""


@requirement("R12.5")
def test_a_fork_of_a_process_that_uses_flight_is_told_so_and_harms_no_parent(folder, tmp_path):
    saved(made(), folder)
    command = [sys.executable, "-c", FORKED, folder, tmp_path / "cache"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "0 ['docs']\n"


# A process that has never used gRPC itself: for each line of its input it forks a client.
ZYGOTE = """
import os, sys
import lora, numpy
from lora.federation.cache import CardCache
from lora.federation.client import LoRAFlightClient
from lora.federation.trust import Policy
uri, root = sys.argv[1:]
children = []
for line in sys.stdin:
    child = os.fork()
    if child:
        children.append(child)
        print(child, flush=True)
        continue
    with LoRAFlightClient(uri, root, Policy(allow_unsigned=True), timeout=60) as client:
        client.fetch_skill("docs")
    os._exit(0)
print({os.waitpid(child, 0)[1] for child in children}, flush=True)
"""


@pytest.fixture
def zygote(folder, server, tmp_path):
    """A function that starts a client process, and the digest of the card that it fetches."""
    sha = saved(made(size=250_000, rank=8), folder)
    command = [sys.executable, "-c", ZYGOTE, server.uri, str(tmp_path / "cache")]
    environment = {name: os.environ[name] for name in os.environ if "COVERAGE" not in name}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:

        def start():
            process.stdin.write("go\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        start.sha, start.process = sha, process
        yield start
        process.kill()


def whole(cache, sha):
    """All that is visible is the whole card."""
    visible = cache.digests()
    assert visible in ([], [sha])
    assert all(lora.digest(cache.path(digest)) == digest for digest in visible)
    return bool(visible)


@requirement("R12.7")
def test_killed_at_any_moment_a_client_leaves_no_partial_card_visible(zygote, cache):
    rng = np.random.default_rng(0)
    for _ in range(int(os.environ.get("LORA_KILLS", "25"))):
        child = zygote()
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        whole(cache, zygote.sha)
        emptied(cache)
    assert list(cache.root.glob("*.part"))  # some were killed while they wrote


@requirement("R12.8")
def test_thirty_two_processes_that_fetch_one_digest_end_with_one_entry(zygote, cache):
    children = [zygote() for _ in range(32)]

    def ended():
        whole(cache, zygote.sha)
        return not any(Path(f"/proc/{child}/exe").exists() for child in children)

    until(ended, 120)
    assert whole(cache, zygote.sha)
    assert contents(cache) == [f"{zygote.sha}.lora.arrow"]
    zygote.process.stdin.close()
    assert zygote.process.stdout.readline() == "{0}\n"  # all have fetched it
