"""Nodes together: alternatives, failover, partitions, an engine that fetches what a query needs."""

import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from lora import errors
from lora.card import LoRACard, LowRank
from lora.engine import ArrowEngine
from lora.federation.client import LoRAFlightClient
from lora.federation.node import Node, ranked
from lora.federation.server import LoRAFlightServer
from lora.federation.stream_limits import Limits
from lora.federation.trust import Policy, norm_of, sign
from lora.models.adapt import fingerprint
from lora.testing.plugin import requirement
from tests.unit.hostile import (
    ANY,
    AUTHOR,
    STRANGER,
    TRUSTING,
    Liar,
    Line,
    announced,
    emptied,
    made,
    saved,
    serving_process,
    until,
)


def joined(tmp_path, peers, policy=ANY, **options):
    """A node that serves nothing, once all its static peers have answered."""
    options = {"interfaces": (), "interval": 0.2, "timeout": 3, **options}
    node = Node(tmp_path / "cache", peers=peers, policy=policy, **options)
    node.discovery.wait(10, len(peers))
    return node


def folder_of(tmp_path, name, *cards):
    path = tmp_path / name
    path.mkdir()
    for card in cards:
        saved(card, path)
    return path


@requirement("R5.13", "R13.5", "R12.1", "R11.1", "R12.2")
def test_two_nodes_see_each_others_cards_and_one_without_a_cache_says_so(tmp_path):
    cards = folder_of(tmp_path, "a", made("docs"))
    with Node(None, cards, interfaces=()) as a, joined(tmp_path, [a.server.uri]) as b:
        assert [peer.node_id for peer in b.peers()] == [a.node_id]
        assert list(b.sync()) == ["docs"]
        assert b.offers["docs"][0].uris == (a.server.uri,)
        assert b.fetch("docs").card == made("docs")
        with pytest.raises(errors.UnknownCardError, match="one of 1"):
            b.fetch("law")
        with pytest.raises(errors.UnknownCardError):
            b.fetch("docs", digest="0" * 64)
        with LoRAFlightClient(a.server.uri, policy=ANY) as client:
            with pytest.raises(errors.StateError, match="a client with a cache"):
                client.fetch_skill("docs")


@requirement("R13.1", "R13.6")
def test_a_node_that_serves_announces_itself_where_it_was_told_to(tmp_path):
    loopback, cards = ["127.0.0.1"], folder_of(tmp_path, "cards", made("docs"))
    with Node(None, cards, interfaces=loopback) as a, Node(None, interfaces=loopback) as b:
        until(lambda: a.server.uri in [peer.uri for peer in b.peers()])


@requirement("R11.8")
def test_the_limits_of_a_node_are_those_of_its_server(tmp_path):
    cards = folder_of(tmp_path, "cards", made("docs"))
    with (
        Node(None, cards, interfaces=(), limits=Limits(streams=0)) as node,
        LoRAFlightClient(node.server.uri) as client,
        pytest.raises(errors.PeerError, match="busy"),
    ):
        client.list_remote_skills()


@requirement("R12.4")
def test_a_peer_that_lies_truncates_or_is_refused_is_left_and_the_next_is_tried(tmp_path):
    card = made("docs", version="1.0.0")
    good = announced(card, tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    lies = [
        (good, data[:-100]),
        (good, data[:-1] + b"x"),
        (replace(good, version="9.0.0"), data),
        (replace(good, size=2**40), data),
        (good, b""),
    ]
    with ExitStack() as opened:
        liars = [opened.enter_context(Liar([manifest], content)).uri for manifest, content in lies]
        honest = LoRAFlightServer(folder_of(tmp_path, "honest", card), "grpc://localhost:0")
        opened.enter_context(honest)  # peers are tried in the order of their URIs: it is the last
        with joined(tmp_path, [*liars, honest.uri]) as node:
            node.sync()
            assert node.fetch("docs") == (card, good.digest)
            assert node.cache.digests() == [good.digest]
            assert node.metrics.snapshot()["refusals_MismatchError"] == 4
        with joined(tmp_path, liars) as alone:
            alone.sync()
            emptied(alone.cache)
            with pytest.raises(errors.MismatchError) as caught:
                alone.fetch("docs")
            assert len(caught.value.__notes__) == 4
            assert alone.cache.digests() == []


@requirement("R12.4", "R12.5")
@pytest.mark.parametrize("limit", [{"stall": 0.5, "timeout": 60}, {"stall": 60, "timeout": 1}])
def test_a_peer_that_stalls_is_left_after_stall_or_deadline_and_the_next_is_tried(tmp_path, limit):
    folder = folder_of(tmp_path, "cards", made("docs"))
    manifest, ended = announced(made("docs"), tmp_path / "a"), threading.Event()

    def stall():
        yield (tmp_path / "a").read_bytes()[:100]
        ended.wait(30)

    # Peers are tried in the order of their URIs: "127.0.0.1" comes before "localhost".
    with Liar([manifest], stall) as liar, LoRAFlightServer(folder, "grpc://localhost:0") as server:
        with joined(tmp_path, [liar.uri, server.uri], **limit) as node:
            assert node.sync()["docs"][0].uris == (liar.uri, server.uri)
            start = time.monotonic()
            assert node.fetch("docs").card == made("docs")
            assert 0.5 <= time.monotonic() - start < 5
            assert node.metrics.snapshot()["refusals_PeerError"] == 1
        ended.set()


@requirement("R12.4", "R12.5")
def test_a_peer_that_drips_its_list_costs_its_cards_and_nothing_else(tmp_path):
    """It tells who it is, and then a manifest now and then."""
    manifest = announced(made("law"), tmp_path / "a")

    def drip():
        while True:
            yield manifest
            time.sleep(0.1)

    folder = folder_of(tmp_path, "cards", made("docs"))
    with Liar() as liar, LoRAFlightServer(folder) as server:
        liar.manifests = drip()
        with joined(tmp_path, [liar.uri, server.uri], timeout=1) as node:
            start = time.monotonic()
            assert list(node.sync()) == ["docs"]
            assert time.monotonic() - start < 5
            assert list(node.failures) == [liar.uri]
            assert isinstance(node.failures[liar.uri], errors.PeerError)


@requirement("R13.2", "R11.8")
def test_a_node_that_closes_serves_nobody_while_it_says_goodbye(tmp_path, monkeypatch):
    cards = folder_of(tmp_path, "cards", made("docs"))
    node, served = Node(None, cards, interfaces=()), []
    closing = node.discovery.close

    def close():
        with LoRAFlightClient(node.server.uri, timeout=1) as client:
            try:
                served.append(client.list_remote_skills())
            except errors.PeerError as error:
                served.append(type(error))
        closing()

    monkeypatch.setattr(node.discovery, "close", close)
    node.close()
    assert served == [errors.PeerError]


@requirement("R12.4", "R14.2")
def test_offers_for_another_base_come_last_unless_a_fingerprint_may_decide(tmp_path):
    policy = replace(ANY, base_model="minilm")
    bases = {"1.0.0": "owner/minilm", "2.0.0": "bert", "3.0.0": None}
    cards = [made("docs", version=version, base_model=base) for version, base in bases.items()]
    other = made("docs", version="0.1.0", base_model="bert")
    cards.append(replace(other, base_fingerprint="5" * 64))
    manifests = [announced(card, tmp_path / "a") for card in cards]
    offers = ranked({"grpc://a:1": manifests}, policy)["docs"]
    assert [offer.manifest.version for offer in offers] == ["3.0.0", "1.0.0", "0.1.0", "2.0.0"]


@requirement("R12.4", "R14.2")
def test_what_is_vouched_for_comes_first_then_the_higher_version(tmp_path):
    versions = ("1.2.0", "1.10.0")
    old, new = (announced(made("docs", version=v), tmp_path / v) for v in versions)
    signed, strange = sign(old, AUTHOR), sign(new, STRANGER)
    listings = {"grpc://b:1": [old, new], "grpc://a:1": [strange, signed, old]}
    offers = ranked(listings, TRUSTING)["docs"]
    assert offers[0].manifest == signed
    assert [offer.manifest.version for offer in offers[1:]] == ["1.10.0", "1.10.0", "1.2.0"]
    assert offers[-1].uris == ("grpc://a:1", "grpc://b:1")
    assert ranked(dict(reversed(listings.items())), TRUSTING)["docs"] == offers
    assert ranked(listings, TRUSTING.pinned(old.digest))["docs"][0].manifest.digest == old.digest
    pinned = ranked({"grpc://a:1": [new, old]}, TRUSTING.pinned(old.digest))
    assert pinned["docs"][0].manifest == old


@requirement("R12.4", "R12.9", "R13.2")
def test_a_server_killed_in_mid_stream_is_replaced_by_another_with_the_same_digest(tmp_path):
    card, killed = made("docs", size=800_000, rank=4), []
    cards = folder_of(tmp_path, "cards", card)
    with serving_process(cards) as one, serving_process(cards) as other:
        (first, first_uri), (_, second_uri) = sorted([one, other], key=lambda server: server[1])
        with joined(tmp_path, [first_uri, second_uri]) as node:
            (offer,) = node.sync()["docs"]
            assert offer.uris == (first_uri, second_uri)

            def progress(done, total):
                if done > total / 4 and not killed:
                    killed.append(done)
                    first.kill()

            assert node.fetch("docs", progress=progress) == (card, offer.manifest.digest)
            assert killed
            assert node.cache.digests() == [offer.manifest.digest]
            until(lambda: [peer.uri for peer in node.peers()] == [second_uri])


@pytest.mark.slow
@requirement("R13.2", "R12.4", "R13.5")
def test_a_partition_heals(tmp_path):
    """Through a TCP proxy, as through any load balancer."""
    cards = folder_of(tmp_path, "a", made("docs"))
    with ExitStack() as opened:
        line = opened.enter_context(Line(opened.enter_context(LoRAFlightServer(cards)).port))
        node = opened.enter_context(joined(tmp_path, [line.uri]))
        assert list(node.sync()) == ["docs"]
        line.silent = True
        line.cut()
        until(lambda: not node.peers())
        assert node.sync() == {}
        line.silent = False
        node.discovery.wait(40, 1)
        assert list(node.sync()) == ["docs"]
        assert node.fetch("docs").card == made("docs")


# ---- the engine


@pytest.fixture(scope="module")
def engine():
    return ArrowEngine.from_pretrained(None)


QUERY, DESCRIPTION = "how do I write a file in Python", "Python: reading and writing files"
MODULE = "encoder.layer.0.attention.self.query"


def skill(name="docs", description=DESCRIPTION, size=384, module=MODULE, **fields):
    """A card of MiniLM's shapes that changes every embedding."""
    rng = np.random.default_rng(1)
    a, b = (rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((size, 2), (2, size)))
    weights = {module: LowRank(a, b, 1.0)}
    return LoRACard(name, 2, 2.0, ("query",), weights, {"description": description}, **fields)


@pytest.fixture
def remote(tmp_path):
    """A server of two skills, one without a description."""
    with LoRAFlightServer(folder_of(tmp_path, "remote", skill(), skill("mute", ""))) as server:
        yield server


@pytest.fixture
def node(engine, remote, tmp_path):
    options = {"cache": tmp_path / "mine", "policy": ANY, "interfaces": (), "timeout": 3}
    with engine.start_federation(peers=[remote.uri.removeprefix("grpc://")], **options) as node:
        node.discovery.wait(10, 1)
        yield node
    engine.stop_federation()


@requirement("R5.13", "R5.11", "R4.7")
def test_a_remote_skill_is_routed_to_fetched_and_applied_for_that_request_alone(engine, node):
    texts = ["reading files", "cooking rice"]
    base = engine.encode(texts)
    assert engine.sync_remote_skills() == ("docs",)
    encoding = engine.encode_with_lora(texts, intent_query=QUERY)
    assert [(route.name, route.virtual) for route in encoding.routes] == [("docs", True)]
    assert dict(encoding.failures) == {}
    assert np.array_equal(encoding, engine.encode_with_lora(texts, skill()))
    assert not np.allclose(encoding, base)
    assert np.array_equal(engine.encode(texts), base)
    assert dict(engine.manager.list_cards()) == {}
    assert len(node.cache.digests()) == 1
    away = engine.encode_with_lora(texts, intent_query="the price of tea in China")
    assert away.routes == ()
    assert np.array_equal(away, base)


@requirement("R5.13")
def test_cards_here_go_before_remote_ones_and_what_is_gone_is_forgotten(engine, node, tmp_path):
    engine.register_lora(skill("docs", "something else entirely"))
    assert engine.sync_remote_skills() == ()
    engine.remove_lora("docs")
    assert engine.sync_remote_skills() == ("docs",)
    (tmp_path / "remote" / "docs.lora.arrow").unlink()
    assert engine.sync_remote_skills() == ()
    assert dict(engine.router.candidates) == {}


@requirement("R5.11", "R5.13")
def test_a_peer_that_is_gone_costs_the_request_its_skill_and_nothing_else(engine, node, remote):
    engine.sync_remote_skills()
    remote.shutdown()
    encoding = engine.encode_with_lora(["a"], intent_query=QUERY)
    assert encoding.routes == ()
    assert isinstance(encoding.failures["docs"], errors.PeerError)
    assert np.array_equal(encoding, engine.encode(["a"]))


@requirement("R5.13", "R14.2")
def test_a_card_that_does_not_fit_the_model_is_refused_before_it_is_cached(engine, node, tmp_path):
    for card, error in (
        (skill(size=8), (errors.ShapeError, errors.TargetError)),
        (skill(module="decoder.nothing"), errors.TargetError),
        (skill(base_fingerprint="0" * 64), errors.BaseModelError),
    ):
        saved(card, tmp_path / "remote")
        engine.sync_remote_skills()
        encoding = engine.encode_with_lora(["a"], intent_query=QUERY)
        assert isinstance(encoding.failures["docs"], error)
        assert node.cache.digests() == []


@requirement("R5.13", "R14.2")
def test_an_engine_believes_nobody_by_default(engine, remote, tmp_path):
    node = engine.start_federation(peers=[remote.uri], cache=tmp_path / "mine", interfaces=())
    try:
        with pytest.raises(errors.StateError, match="stop_federation"):
            engine.start_federation(interfaces=())
        node.discovery.wait(10, 1)
        assert engine.sync_remote_skills() == ()
        assert engine.encode_with_lora(["a"], intent_query=QUERY).routes == ()
        with pytest.raises(errors.UnsignedError):
            node.fetch("docs")
    finally:
        engine.stop_federation()
    assert engine.node is None
    assert dict(engine.router.candidates) == {}
    with pytest.raises(errors.StateError, match="start_federation"):
        engine.sync_remote_skills()
    engine.stop_federation()


@requirement("R5.13", "R14.2")
def test_an_engine_refuses_another_base_where_no_fingerprint_decides(engine, node, tmp_path):
    """The policy of the node says no base model: the engine knows its own."""
    fits = skill()
    own = fingerprint(engine.base, fits)
    for base, digest, accepted in (
        ("bert-base", None, False),
        ("other/all-MiniLM-L6-v2", None, True),
        (None, None, True),
        ("bert-base", own, True),
    ):
        card = replace(fits, base_model=base, base_fingerprint=digest)
        saved(card, tmp_path / "remote")
        emptied(node.cache)
        routable = engine.sync_remote_skills()
        assert routable == (("docs",) if accepted else ())
        if accepted:
            assert dict(engine.encode_with_lora(["a"], intent_query=QUERY).failures) == {}
        else:
            with pytest.raises(errors.BaseModelError, match=r"all-MiniLM-L6-v2.*bert-base"):
                node.fetch("docs")
            assert node.cache.digests() == []


@requirement("R5.13", "R11.1")
def test_an_engine_can_serve(engine, tmp_path):
    cards = folder_of(tmp_path, "mine", made("docs"))
    with engine.start_federation(root=cards, cache=tmp_path / "c", interfaces=()) as node:
        with LoRAFlightClient(node.server.uri, tmp_path / "c2") as client:
            assert [skill.name for skill in client.list_remote_skills()] == ["docs"]
    engine.stop_federation()


@requirement("R12.4", "R14.2")
def test_what_a_peer_says_of_itself_hides_and_breaks_nothing(tmp_path):
    """A lone surrogate, and a card for another model of a higher version."""
    cards = {"1.0.0": "mine", "9.0.0": "other"}
    manifests, data = [], {}
    for version, base_model in cards.items():
        path, card = tmp_path / version, made("docs", version=version, base_model=base_model)
        # Whether a fingerprint is the base's shows when the card is here.
        card = replace(card, base_fingerprint="5" * 64 if version > "1.0.0" else None)
        manifests.append(announced(card, path))
        data[manifests[-1].digest] = path.read_bytes()
    forged = manifests[0].to_json().replace(b'"description":""', b'"description":"\\ud800"')
    policy = Policy(base_model="mine", allow_unsigned=True)
    with Liar([forged, *manifests], data) as liar, joined(tmp_path, [liar.uri], policy) as node:
        assert [offer.manifest.version for offer in node.sync()["docs"]] == ["9.0.0", "1.0.0"]
        assert node.fetch("docs").digest == manifests[0].digest


@requirement("R5.11", "R5.13")
def test_a_request_tries_few_cards_that_can_not_be_had(engine, node, tmp_path, monkeypatch):
    for number in range(12):
        saved(skill(f"docs{number:02}", "reading and writing files in Python"), tmp_path / "remote")
    assert len(engine.sync_remote_skills()) == 13
    tried = []

    def fetch(name):
        tried.append(name)
        raise errors.PeerError(name, "a card", "none")

    monkeypatch.setattr(node, "fetch", fetch)
    encoding = engine.encode_with_lora(["a"], intent_query=QUERY)
    assert encoding.routes == ()
    assert 1 < len(tried) < 6
    assert set(encoding.failures) == set(tried)


@requirement("R14.2")
def test_a_wide_pair_is_measured_without_a_matrix_larger_than_itself():
    row = np.full((1, 60_000), 0.01, np.float32)
    assert norm_of(LowRank(row, row.T, 1.0)) == pytest.approx(6.0, rel=1e-4)
