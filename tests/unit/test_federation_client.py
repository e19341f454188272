"""The client against real servers, honest and hostile: typed errors, bounded time, a cache that stays as it was."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from pyarrow import flight

import lora
from lora.card import LoRACard, LowRank
from lora.errors import (
    AbsurdNormError,
    ArgumentError,
    BadNameError,
    BaseModelError,
    CardFileError,
    ManifestError,
    MismatchError,
    NonFiniteError,
    OlderVersionError,
    PeerError,
    RefusedError,
    SignatureError,
    StoreError,
    UnknownCardError,
    UnknownSignerError,
    UnsignedError,
)
from lora.federation import cache as cache_module
from lora.federation.access import Credentials
from lora.federation.cache import CardCache
from lora.federation.client import MAX_MESSAGE, LoRAFlightClient
from lora.federation.manifest import Manifest, Signature
from lora.federation.server import LoRAFlightServer
from lora.federation.trust import Policy, public_key, waived
from lora.testing.plugin import requirement
from lora.testing.vectors import vectors_folder
from tests.unit.hostile import (
    AUTHOR,
    STRANGER,
    Authority,
    Liar,
    Line,
    announced,
    listening,
    made,
    saved,
)

TRUSTING = Policy(frozenset({public_key(AUTHOR)}))
ANY = Policy(allow_unsigned=True)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cards"
    path.mkdir()
    return path


@pytest.fixture
def cache(tmp_path):
    return CardCache(tmp_path / "cache")


@pytest.fixture
def liar():
    with Liar() as server:
        yield server


def contents(cache):
    """Everything in the cache but the versions that it has seen."""
    return sorted(
        str(path.relative_to(cache.root))
        for path in cache.root.rglob("*")
        if "versions" not in path.parts
    )


def refused(liar, cache, error, match=None, policy=TRUSTING, **options):
    """That fetching the liar's card ends with the error and leaves the cache as it was."""
    before = contents(cache)
    with (
        LoRAFlightClient(liar.uri, cache, policy, timeout=5, **options) as client,
        pytest.raises(error, match=match) as caught,
    ):
        client.fetch_skill("docs")
    assert contents(cache) == before
    return caught.value


@requirement("R12.1")
def test_what_a_peer_offers_is_listed_by_name(folder, cache):
    for name in ("law", "docs", "food"):
        saved(made(name, base_model="minilm" if name == "law" else None), folder)
    with LoRAFlightServer(folder) as server, LoRAFlightClient(server.uri, cache) as client:
        assert [skill.name for skill in client.list_remote_skills()] == ["docs", "food", "law"]
        assert [skill.name for skill in client.list_remote_skills("d")] == ["docs"]
        assert [skill.name for skill in client.list_remote_skills(base_model="minilm")] == ["law"]
        with pytest.raises(UnknownCardError, match="nothing"):
            client.fetch_skill("nothing")


@requirement("R12.1")
def test_a_list_is_bounded_and_what_is_malformed_in_it_is_left_out(
    liar, cache, tmp_path, monkeypatch
):
    good = announced(made(), tmp_path / "a")
    liar.manifests = [b"{", good, b"x" * 70000, b'{"name":1,"digest":"0","size":1}']
    with LoRAFlightClient(liar.uri, cache) as client:
        assert client.list_remote_skills() == [good]
        assert client.metrics.snapshot()["manifests_refused"] == 3
        monkeypatch.setattr("lora.federation.client.MAX_CARDS", 3)
        with pytest.raises(PeerError, match="at most 3 cards"):
            client.list_remote_skills()


@requirement("R12.2", "R12.9")
def test_a_second_call_does_no_network_io_and_progress_is_told(folder, cache):
    card = made(size=100_000, rank=4)
    sha = saved(card, folder)
    seen = []
    with LoRAFlightServer(folder) as server, LoRAFlightClient(server.uri, cache, ANY) as client:
        assert (
            client.fetch_skill("docs", progress=lambda done, total: seen.append((done, total)))
            == card
        )
        requests = dict(server.metrics.snapshot())
        assert client.fetch_skill("docs") == card
        assert dict(server.metrics.snapshot()) == requests
        size = cache.path(sha).stat().st_size
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert (len(seen) > 2, seen[-1]) == (True, (size, size))
        assert client.metrics.snapshot()["fetched_bytes"] == size
        assert client.metrics.snapshot()["cache_hits"] == 1
    assert contents(cache) == [f"{sha}.lora.arrow"]
    assert cache.path(sha).stat().st_mode & 0o777 == 0o444


@requirement("R12.2")
def test_refresh_asks_again_what_a_name_stands_for(folder, cache):
    saved(made(), folder)
    with LoRAFlightServer(folder) as server, LoRAFlightClient(server.uri, cache, ANY) as client:
        assert client.fetch_skill("docs").weights
        saved(made(size=8), folder)
        assert client.fetch_skill("docs") == made()
        assert client.fetch_skill("docs", refresh=True) == made(size=8)


@requirement("R12.2")
def test_a_digest_pins_a_card_and_needs_no_signature(folder, cache):
    sha = saved(made(), folder)
    with LoRAFlightServer(folder) as server, LoRAFlightClient(server.uri, cache) as client:
        with pytest.raises(UnsignedError, match=f"pin {sha}"):
            client.fetch_skill("docs")
        assert client.fetch_skill("docs", digest=sha) == made()
        with pytest.raises(UnknownCardError):
            client.fetch_skill("docs", digest="0" * 64)


@requirement("R12.3")
def test_a_truncation_at_every_4_kib_is_noticed(liar, cache, tmp_path):
    manifest = announced(made(size=2000, rank=4), tmp_path / "a", AUTHOR)
    liar.manifests, data = [manifest], (tmp_path / "a").read_bytes()
    for end in range(0, len(data), 4096):
        liar.data = data[:end]
        refused(liar, cache, MismatchError, f"bytes received: expected {len(data)}, found {end}")


@requirement("R12.3")
@pytest.mark.parametrize("size", [0, -1, 2**31 + 1, 2**62])
def test_a_size_that_is_absurd_is_refused_before_a_byte_is_asked_for(liar, cache, tmp_path, size):
    told = (
        announced(made(), tmp_path / "a", AUTHOR)
        .to_json()
        .replace(b'"size":', b'"size":%d,"was":' % size)
    )
    liar.manifests, liar.data = [told], lambda: pytest.fail("asked for")
    refused(liar, cache, (MismatchError, ManifestError), "size")


@requirement("R12.3", "R12.5")
def test_an_endless_stream_ends_with_the_announced_size(liar, cache, tmp_path):
    liar.manifests = [announced(made(), tmp_path / "a", AUTHOR)]
    sent = []

    def endless():
        while True:
            sent.append(1)
            yield bytes(2**20)

    liar.data = endless
    refused(liar, cache, MismatchError, "or more")
    assert len(sent) < 64


@requirement("R12.3", "R12.5")
def test_a_message_of_any_size_is_not_buffered(liar, cache, tmp_path):
    liar.manifests, liar.data = (
        [announced(made(), tmp_path / "a", AUTHOR)],
        lambda: iter([bytes(MAX_MESSAGE + 1)]),
    )
    refused(liar, cache, PeerError)


INVALID = sorted(vectors_folder().glob("*/*/invalid/*.arrow"))


@requirement("R12.3", "R7.9")
@pytest.mark.parametrize("vector", INVALID, ids=lambda path: path.stem)
def test_a_correctly_signed_file_that_is_no_card_is_refused(liar, cache, tmp_path, vector):
    """Mutated IPC, compressed bodies, overlapping buffers and the like: all that the frozen vectors hold."""
    data = vector.read_bytes()
    path = tmp_path / "a"
    path.write_bytes(data)
    bare = Manifest("docs", lora.digest(path), len(data))
    liar.manifests, liar.data = [lora.federation.trust.sign(bare, AUTHOR)], data
    refused(liar, cache, CardFileError if data else MismatchError)


def holding(a=0.1, **fields):
    """A card with these values in its factors."""
    pair = LowRank(np.full((4, 1), a, np.float32), np.full((1, 4), a, np.float32))
    return LoRACard(
        **{
            "name": "docs",
            "rank": 1,
            "alpha": 1.0,
            "target_modules": ("q",),
            "weights": {"q": pair},
            **fields,
        }
    )


def unfit(card):
    raise BaseModelError("fits", "this", "that")


REFUSALS = {
    "unsigned": (holding(), None, UnsignedError, TRUSTING, {}),
    "unknown_signers": (holding(), STRANGER, UnknownSignerError, TRUSTING, {}),
    "nonfinite": (holding(float("nan")), AUTHOR, NonFiniteError, TRUSTING, {}),
    "any_norm": (holding(1e9), AUTHOR, AbsurdNormError, TRUSTING, {}),
    "other_base": (
        holding(base_model="x"),
        AUTHOR,
        BaseModelError,
        Policy(TRUSTING.trusted, base_model="y"),
        {},
    ),
    "any_name": (holding(name="../x"), AUTHOR, BadNameError, TRUSTING, {}),
}


@requirement("R14.2")
@pytest.mark.parametrize("optout", REFUSALS)
def test_each_refusal_has_an_error_and_an_opt_out_of_its_own(liar, cache, tmp_path, optout):
    card, key, error, policy, options = REFUSALS[optout]
    manifest = announced(card, tmp_path / "a", key)
    liar.manifests, liar.data = [manifest], (tmp_path / "a").read_bytes()
    for other in REFUSALS:
        if other != optout:
            with (
                LoRAFlightClient(liar.uri, cache, waived(policy, [other]), **options) as client,
                pytest.raises(error),
            ):
                client.fetch_skill(card.name)
    assert contents(cache) == []
    with LoRAFlightClient(liar.uri, cache, waived(policy, [optout]), **options) as client:
        assert client.fetch_skill(card.name).name == card.name
    assert cache.digests() == [manifest.digest]


@requirement("R14.2")
def test_other_bytes_than_announced_are_kept_under_their_own_digest_if_one_insists(
    liar, cache, tmp_path
):
    liar.manifests = [announced(made(), tmp_path / "a", AUTHOR)]
    sha = lora.save(made(size=8), tmp_path / "b")
    liar.data = (tmp_path / "b").read_bytes()
    refused(liar, cache, MismatchError)
    with LoRAFlightClient(liar.uri, cache, waived(TRUSTING, ["mismatch"])) as client:
        assert client.fetch_skill("docs") == made(size=8)
    assert cache.digests() == [sha]
    with pytest.raises(ArgumentError, match="one of unsigned"):
        waived(TRUSTING, ["everything"])


@requirement("R14.2")
def test_an_older_version_than_one_seen_is_refused_across_clients(liar, cache, tmp_path):
    versions = {}
    for version in ("1.2.0", "1.10.0", ""):
        card = made(version=version) if version else made()
        path = tmp_path / f"v{version}"
        versions[version] = (announced(card, path, AUTHOR), path.read_bytes())
    for version in ("1.2.0", "1.10.0"):
        liar.manifests, liar.data = [versions[version][0]], versions[version][1]
        with LoRAFlightClient(liar.uri, cache, TRUSTING) as client:
            assert client.fetch_skill("docs").metadata["version"] == version
    for version in ("1.2.0", ""):
        liar.manifests, liar.data = [versions[version][0]], versions[version][1]
        refused(liar, cache, OlderVersionError, "1.10.0 or newer")
        with LoRAFlightClient(liar.uri, cache, waived(TRUSTING, ["older"])) as client:
            assert client.fetch_skill("docs").name == "docs"
        with LoRAFlightClient(liar.uri, cache, TRUSTING) as client:
            assert client.fetch_skill("docs", digest=versions[version][0].digest).name == "docs"
    assert cache.highest_version("docs", public_key(AUTHOR)) == "1.10.0"
    assert cache.highest_version("docs", public_key(STRANGER)) == ""


@requirement("R14.1", "R14.2")
def test_a_card_that_was_altered_after_signing_is_refused(liar, cache, tmp_path):
    signed = announced(made(), tmp_path / "a", AUTHOR)
    other = announced(made(size=8), tmp_path / "b")
    forged = lora.federation.trust.replace(other, signature=signed.signature)
    liar.manifests, liar.data = [forged], (tmp_path / "b").read_bytes()
    refused(liar, cache, SignatureError)
    stranger = lora.federation.trust.sign(other, STRANGER)
    claimed = Signature(public_key(AUTHOR), stranger.signature.value)
    liar.manifests = [lora.federation.trust.replace(stranger, signature=claimed)]
    refused(liar, cache, SignatureError)


@requirement("R14.2")
@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a\0b", "a" * 300, "", ".hidden", "a\\b", "a\nb", "\u202eabc"]
)
def test_a_bad_name_is_refused_before_a_byte_is_asked_for(liar, cache, name):
    liar.manifests, liar.data = [Manifest(name, "0" * 64, 10)], lambda: pytest.fail("asked for")
    with (
        LoRAFlightClient(liar.uri, cache, ANY) as client,
        pytest.raises((BadNameError, MismatchError)),
    ):
        client.fetch(liar.manifests[0])
    assert contents(cache) == []


@requirement("R12.3")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "other"),
        ("rank", 3),
        ("description", "nicer"),
        ("targets", ("key",)),
        ("version", "9.0.0"),
    ],
)
def test_an_announcement_that_is_not_of_the_card_is_refused(liar, cache, tmp_path, field, value):
    manifest = lora.federation.trust.replace(announced(made(), tmp_path / "a"), **{field: value})
    liar.manifests, liar.data = [manifest], (tmp_path / "a").read_bytes()
    with (
        LoRAFlightClient(liar.uri, cache, ANY) as client,
        pytest.raises(MismatchError, match=field),
    ):
        client.fetch(manifest)
    assert contents(cache) == []


@requirement("R12.1")
def test_an_answer_about_another_card_is_refused(liar, cache, tmp_path):
    liar.manifests = [announced(made("law"), tmp_path / "a")]
    refused(liar, cache, MismatchError)


@requirement("R12.3")
def test_the_callers_own_check_is_the_last(liar, cache, tmp_path):
    liar.manifests, liar.data = [announced(made(), tmp_path / "a", AUTHOR)], b""
    liar.data = (tmp_path / "a").read_bytes()
    refused(liar, cache, BaseModelError, "fits", check=unfit)


@requirement("R12.5")
@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(range(256)) * 64, b"\x16\x03\x01"]
)
def test_a_silent_listener_and_a_garbage_server_end_with_the_deadline(cache, answer):
    with listening(answer) as uri:
        for secure in (uri, uri.replace("grpc:", "grpc+tls:")):
            start = time.monotonic()
            with LoRAFlightClient(secure, cache, ANY, timeout=0.5) as client:
                for call in (
                    client.list_remote_skills,
                    client.health,
                    lambda c=client: c.fetch_skill("docs"),
                ):
                    with pytest.raises(PeerError):
                        call()
            assert time.monotonic() - start < 6
    with (
        LoRAFlightClient(uri, cache, ANY, timeout=0.5) as client,
        pytest.raises(PeerError),
    ):  # nobody listens any more
        client.list_remote_skills()


@requirement("R12.5")
def test_a_slow_drip_ends_with_the_minimum_rate(liar, cache, tmp_path):
    manifest = announced(made(size=20_000, rank=4), tmp_path / "a", AUTHOR)
    data = (tmp_path / "a").read_bytes()

    def drip():
        for at in range(0, len(data), 1000):
            time.sleep(0.1)
            yield data[at : at + 1000]

    liar.manifests, liar.data = [manifest], drip
    start = time.monotonic()
    with (
        LoRAFlightClient(liar.uri, cache, TRUSTING, timeout=1, min_rate=1e6) as client,
        pytest.raises(PeerError),
    ):
        client.fetch_skill("docs")
    assert time.monotonic() - start < 1 + len(data) / 1e6 + 3
    assert contents(cache) == []


@requirement("R12.5")
def test_a_list_that_drips_ends_with_the_deadline(liar, cache, tmp_path):
    manifest = announced(made(), tmp_path / "a").to_json()

    def drip():
        for _ in range(100):
            time.sleep(0.1)
            yield manifest

    liar.manifests = drip()
    start = time.monotonic()
    with LoRAFlightClient(liar.uri, cache, timeout=0.5) as client, pytest.raises(PeerError):
        client.list_remote_skills()
    assert time.monotonic() - start < 4


@requirement("R12.6")
@pytest.mark.parametrize(
    "error", [flight.FlightCancelledError, flight.FlightUnavailableError, KeyError, SystemExit]
)
def test_a_stream_that_breaks_off_is_a_peer_error_in_the_calling_thread(
    liar, cache, tmp_path, error
):
    liar.manifests = [announced(made(size=200_000, rank=4), tmp_path / "a", AUTHOR)]

    def broken():
        yield bytes(2**20)
        raise error("stop")

    liar.data = broken if error is not SystemExit else lambda: iter([bytes(2**20)])
    found = []

    def fetching():
        with LoRAFlightClient(liar.uri, cache, TRUSTING) as client:
            try:
                client.fetch_skill("docs")
            except BaseException as caught:  # noqa: BLE001 - what it is is the question
                found.append(caught)

    thread = threading.Thread(target=fetching)
    thread.start()
    thread.join(20)
    assert [type(caught) for caught in found] == [
        MismatchError if error is SystemExit else PeerError
    ]
    assert contents(cache) == []


@requirement("R12.5", "R12.6")
def test_a_line_that_is_cut_or_silent_is_a_peer_error_and_heals(folder, cache):
    sha = saved(made(size=400_000, rank=4), folder)
    with ExitStack() as opened:
        line = opened.enter_context(Line(opened.enter_context(LoRAFlightServer(folder)).port))
        client = opened.enter_context(
            LoRAFlightClient(line.uri, cache, ANY, timeout=2, min_rate=1e7)
        )
        line.limit = 2_000_000
        with pytest.raises(PeerError):
            client.fetch_skill("docs")
        line.limit, line.silent = None, True
        with pytest.raises(PeerError):
            client.fetch_skill("docs")
        assert contents(cache) == []
        line.silent = False
        line.cut()
        end = time.monotonic() + 20
        while not cache.digests() and time.monotonic() < end:
            with suppress(PeerError):  # gRPC waits a second or two before it connects again
                client.fetch_skill("docs")
    assert cache.digests() == [sha]


@requirement("R12.3")
@pytest.mark.parametrize("step", ["link", "chmod", "write", "open"])
def test_a_disk_that_refuses_leaves_the_cache_as_it_was(folder, cache, monkeypatch, step):
    saved(made(), folder)

    def refuse(*_, **__):
        raise OSError({"link": 13, "chmod": 1, "write": 28, "open": 5}[step], "refused")

    with LoRAFlightServer(folder) as server, LoRAFlightClient(server.uri, cache, ANY) as client:
        with monkeypatch.context() as patch:
            if step == "write":
                patch.setattr("lora.federation.client._write_all", refuse)
            elif step in ("chmod", "open"):
                patch.setattr(Path, step, refuse)
            else:
                patch.setattr(cache_module.os, step, refuse)
            with pytest.raises(StoreError):
                client.fetch_skill("docs")
        assert contents(cache) == []
        assert client.fetch_skill("docs") == made()


@requirement("R12.2")
def test_a_cached_file_that_is_corrupted_later_is_put_aside_and_fetched_again(folder, cache):
    sha = saved(made(), folder)
    with LoRAFlightServer(folder) as server, LoRAFlightClient(server.uri, cache, ANY) as client:
        client.fetch_skill("docs")
        cache.path(sha).chmod(0o644)
        data = bytearray(cache.path(sha).read_bytes())
        data[-500] ^= 1
        cache.path(sha).write_bytes(data)
        assert client.fetch_skill("docs") == made()
        assert lora.digest(cache.path(sha)) == sha
        assert len(list((cache.root / "quarantine").iterdir())) == 1
        assert client.metrics.snapshot()["fetches"] == 2


@requirement("R11.6", "R12.1")
def test_tokens_and_certificates_reach_through_the_client(folder, cache):
    saved(made(), folder)
    authority = Authority()
    both = authority.credentials(token="secret")
    with LoRAFlightServer(folder, "grpc+tls://localhost:0", credentials=both) as server:
        with LoRAFlightClient(server.uri, cache, ANY, credentials=both) as client:
            assert client.fetch_skill("docs") == made()
        for wrong in (
            authority.credentials(),
            authority.credentials(token="other"),
            Authority().credentials(token="secret"),
        ):
            with LoRAFlightClient(server.uri, cache, ANY, credentials=wrong, timeout=3) as client:
                with pytest.raises(PeerError) as caught:
                    client.list_remote_skills()
                assert "secret" not in str(caught.value)
    with pytest.raises(ArgumentError, match="TLS beyond loopback"):
        LoRAFlightClient("grpc://192.0.2.1:5", cache, credentials=Credentials("secret"))


ZYGOTE = """
import os, sys
import lora, numpy
from lora.federation.cache import CardCache
from lora.federation.client import LoRAFlightClient
from lora.federation.trust import Policy
uri, root = sys.argv[1:]
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        if line.strip() == "wait":
            os.waitpid(child, 0)
        continue
    if line.strip() == "wait":
        os._exit(0)
    with LoRAFlightClient(uri, root, Policy(allow_unsigned=True), timeout=60) as client:
        client.fetch_skill("docs")
    os._exit(0)
"""


@pytest.fixture
def zygote(folder, tmp_path):
    """A process that forks clients of a server, each on a line, before it has ever used gRPC itself."""
    sha = saved(made(size=250_000, rank=8), folder)
    with LoRAFlightServer(folder) as server:
        command = [sys.executable, "-c", ZYGOTE, server.uri, str(tmp_path / "cache")]
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")
        }
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:

            def start():
                process.stdin.write("go\n")
                process.stdin.flush()
                return int(process.stdout.readline())

            start.sha = sha
            yield start
            process.kill()


def whole(cache, sha):
    """That all that is visible is the whole card."""
    visible = cache.digests()
    assert visible in ([], [sha])
    for digest in visible:
        assert lora.digest(cache.path(digest)) == sha
    return bool(visible)


@requirement("R12.7")
def test_killed_at_any_moment_a_client_leaves_no_partial_card_visible(zygote, cache):
    rng, done = np.random.default_rng(0), 0
    for _ in range(int(os.environ.get("LORA_KILLS", "40"))):
        child = zygote()
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        done += whole(cache, zygote.sha)
        cache.evict(0)
    parts = [path for path in cache.root.iterdir() if path.name.endswith(".part")]
    for path in parts:
        os.utime(path, (0, 0))
    CardCache(cache.root)
    assert not [path for path in cache.root.iterdir() if path.name.endswith(".part")]
    assert parts  # some were killed while they wrote


@requirement("R12.8")
def test_thirty_two_processes_that_fetch_one_digest_end_with_one_entry(zygote, cache):
    children = [zygote() for _ in range(32)]
    end = time.monotonic() + 120
    while time.monotonic() < end and any(Path(f"/proc/{child}/exe").exists() for child in children):
        time.sleep(0.1)
        whole(cache, zygote.sha)
    assert whole(cache, zygote.sha)
    assert contents(cache) == [f"{zygote.sha}.lora.arrow"]


@requirement("R12.1", "R7.8")
def test_every_refusal_is_one_kind(liar, cache):
    for kind in (ManifestError, MismatchError, UnsignedError, OlderVersionError):
        assert issubclass(kind, RefusedError)
    liar.manifests = [b"[]"]
    refused(liar, cache, ManifestError, "a JSON object")
