"""Discovery over real multicast: arrivals, goodbyes, silent deaths, forgeries, floods, chosen interfaces."""

import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import zeroconf

from lora.errors import ArgumentError, PeerError, StoreError
from lora.federation.discovery import SERVICE, Discovery, reachable
from lora.testing.plugin import requirement

LOOPBACK = ["127.0.0.1"]
IDS = (f"t{os.getpid()}x{count}" for count in itertools.count())  # others may test on this link


class Nodes:
    """Ports that answer with a node id, until they are told not to."""

    def __init__(self):
        self.ids, self.asked = {}, []

    def ask(self, uri):
        self.asked.append(uri)
        if uri not in self.ids:
            raise PeerError(uri, "an answer", "none")
        return self.ids[uri]

    def join(self, port, **options):
        """A node that serves at a port of loopback, and its discovery."""
        name = next(IDS)
        self.ids[f"grpc://127.0.0.1:{port}"] = name
        options = {"interfaces": LOOPBACK, "interval": 0.3, **options}
        return Discovery(name, self.ask, port=port, addresses=LOOPBACK, **options)


@pytest.fixture
def nodes():
    return Nodes()


def uris(discovery, wanted, seconds=15):
    """The peers' URIs among the wanted ports', as soon as they are all and only those that are wanted."""
    end = time.monotonic() + seconds
    while (
        found := sorted(peer.uri for peer in discovery.peers())
    ) != wanted and time.monotonic() < end:
        time.sleep(0.02)
    return found


@requirement("R13.1", "R13.2", "R13.3", "R13.6")
def test_nodes_find_each_other_and_not_themselves_and_see_goodbyes_and_silent_deaths(nodes):
    with nodes.join(5001) as a, nodes.join(5002) as b:
        assert uris(a, ["grpc://127.0.0.1:5002"]) == ["grpc://127.0.0.1:5002"]
        assert uris(b, ["grpc://127.0.0.1:5001"]) == ["grpc://127.0.0.1:5001"]
        c = nodes.join(5003)
        both = ["grpc://127.0.0.1:5002", "grpc://127.0.0.1:5003"]
        assert uris(a, both) == both
        del nodes.ids["grpc://127.0.0.1:5003"]
        c.close()
        assert uris(a, both[:1]) == both[:1]
        del nodes.ids["grpc://127.0.0.1:5002"]  # it is dead, and has said nothing
        assert uris(a, []) == []
        nodes.ids["grpc://127.0.0.1:5002"] = "back"
        assert "grpc://127.0.0.1:5001" in [peer.uri for peer in b.peers()]


@requirement("R13.1")
def test_an_announcement_states_node_id_format_version_and_port(nodes):
    with nodes.join(5006) as node, zeroconf.Zeroconf(interfaces=LOOPBACK) as reader:
        name = nodes.ids["grpc://127.0.0.1:5006"]
        record = reader.get_service_info("_lora-card._tcp.local.", f"{name}.{SERVICE}", 5000)
        assert record.decoded_properties == {"id": name, "format": "1.0", "tls": "0"}
        assert (record.port, record.parsed_addresses()) == (5006, LOOPBACK)
        assert node.peers() == ()


@requirement("R13.4")
def test_forged_goodbyes_and_redirects_move_nobody_who_answers(nodes):
    with nodes.join(5011) as a, nodes.join(5012), zeroconf.Zeroconf(interfaces=LOOPBACK) as forger:
        mine = ["grpc://127.0.0.1:5012"]
        assert uris(a, mine) == mine
        victim = a.peers()[0].key
        forged = zeroconf.ServiceInfo(
            SERVICE,
            f"{victim}.{SERVICE}",
            port=6666,
            properties={"format": "1.0"},
            server=f"{victim}.local.",
            parsed_addresses=LOOPBACK,
        )
        nodes.ids["grpc://127.0.0.1:6666"] = "forger"
        forger.register_service(forged, cooperating_responders=True)
        forger.unregister_service(forged)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert [peer.uri for peer in a.peers()] == mine
            time.sleep(0.05)


@requirement("R13.4")
def test_a_flood_of_fake_peers_neither_fills_the_book_nor_displaces_who_answers(nodes):
    with nodes.join(5021, cap=32) as a, nodes.join(5022):
        mine = ["grpc://127.0.0.1:5022"]
        assert uris(a, mine) == mine
        for number in range(2000):
            a._heard(name=f"fake{number}.{SERVICE}", state_change=zeroconf.ServiceStateChange.Added)
        assert len(a._book.peers) == 32
        for _ in range(20):
            assert [peer.uri for peer in a.peers()] == mine
            time.sleep(0.05)
        with nodes.join(5023):
            both = [*mine, "grpc://127.0.0.1:5023"]
            assert uris(a, both, 30) == both


@requirement("R13.5")
def test_static_peers_need_no_multicast_and_come_back_when_they_answer_again(nodes):
    nodes.ids["grpc://a:1"] = "one"
    with Discovery(
        "me", nodes.ask, interfaces=(), static=["grpc://a:1", "grpc://b:2"], interval=0.1
    ) as found:
        assert uris(found, ["grpc://a:1"]) == ["grpc://a:1"]
        nodes.ids["grpc://b:2"] = ""
        assert uris(found, ["grpc://a:1", "grpc://b:2"]) == ["grpc://a:1", "grpc://b:2"]
        del nodes.ids["grpc://a:1"]
        assert uris(found, ["grpc://b:2"]) == ["grpc://b:2"]
        nodes.ids["grpc://a:1"] = "one"
        assert uris(found, ["grpc://a:1", "grpc://b:2"]) == ["grpc://a:1", "grpc://b:2"]


@requirement("R13.3")
def test_a_static_peer_that_is_this_node_is_not_listed(nodes):
    nodes.ids |= {"grpc://me:1": "me", "grpc://you:1": "you"}
    with Discovery("me", nodes.ask, interfaces=(), static=["grpc://me:1", "grpc://you:1"]) as found:
        assert uris(found, ["grpc://you:1"]) == ["grpc://you:1"]


@requirement("R13.4")
def test_a_peer_whose_answer_breaks_the_asking_ends_no_thread(nodes, caplog):
    def ask(uri):
        if "bad" in uri:
            raise RuntimeError("broken")
        return "good"

    with Discovery(
        "me", ask, interfaces=(), static=["grpc://bad:1", "grpc://good:1"], interval=0.1
    ) as found:
        assert uris(found, ["grpc://good:1"]) == ["grpc://good:1"]
    assert "broken" in caplog.text


@requirement("R13.6")
def test_a_wildcard_is_never_announced():
    assert reachable(["127.0.0.1"]) == ["127.0.0.1"]
    assert reachable(["::1%1"]) == ["::1"]
    for wild in (["0.0.0.0"], ["::"], []):
        found = reachable(wild)
        assert found
        assert not {"0.0.0.0", "::"} & set(found)


@requirement("R7.8")
@pytest.mark.parametrize("name", ["", "a" * 64, "a.b", "a b", "é"])
def test_a_node_id_is_a_dns_label(name):
    with pytest.raises(ArgumentError, match="node_id"):
        Discovery(name, str, interfaces=())


@requirement("R13.2")
def test_it_ends_with_its_threads(nodes):
    def mine():
        return sum(thread.name.startswith("lora-") for thread in threading.enumerate())

    before = mine()
    with nodes.join(5031) as found:
        found.wait(0.1)
        assert mine() > before
    assert mine() == before


PEER = """
import sys, time
from lora.federation.discovery import Discovery
name, other, port, address = sys.argv[1:]
with Discovery(name, lambda uri: other, port=int(port), addresses=[address], interfaces=[address]) as found:
    for line in sys.stdin:
        found.wait(10, 1)
        print(*[peer.uri for peer in found.peers()], flush=True)
"""


def may_make_networks():
    if os.geteuid() or not shutil.which("ip"):
        return False
    probe = f"lora-probe{os.getpid()}"  # others may be probing, too
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return made.returncode == 0


@requirement("R13.6", "R13.1")
@pytest.mark.skipif(not may_make_networks(), reason="network namespaces need root and iproute2")
@pytest.mark.parametrize("network", ["10.99.0.", "fd99::"])
def test_nodes_on_a_network_of_their_own_find_each_other_over_ipv4_and_ipv6(network):
    spaces = [f"lora{os.getpid()}{side}" for side in "ab"]
    bits = "64" if ":" in network else "24"
    try:
        for space in spaces:
            subprocess.run(["ip", "netns", "add", space], check=True)
        a, b = spaces
        subprocess.run(
            [
                "ip",
                "link",
                "add",
                "v0",
                "netns",
                a,
                "type",
                "veth",
                "peer",
                "name",
                "v0",
                "netns",
                b,
            ],
            check=True,
        )
        for number, space in enumerate(spaces, 1):
            ip = ["ip", "-n", space]
            subprocess.run([*ip, "link", "set", "v0", "up"], check=True)
            more = ["nodad"] if ":" in network else []
            subprocess.run(
                [*ip, "addr", "add", f"{network}{number}/{bits}", "dev", "v0", *more], check=True
            )
        time.sleep(2)  # for the link-local address
        processes = [
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    space,
                    sys.executable,
                    "-c",
                    PEER,
                    f"n{i}",
                    f"n{3 - i}",
                    f"500{i}",
                    f"{network}{i}",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i, space in enumerate(spaces, 1)
        ]
        for process in processes:
            process.stdin.write("who\n")
            process.stdin.flush()
        lines = [process.stdout.readline().strip() for process in processes]
        host = "[{}]" if ":" in network else "{}"
        assert lines == [f"grpc://{host.format(network + str(3 - i))}:500{3 - i}" for i in (1, 2)]
        for process in processes:
            process.communicate()
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)


@requirement("R13.6")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # zeroconf leaves a socket to the collector
def test_interfaces_that_are_not_there_are_named():
    with pytest.raises(StoreError, match="interfaces"):
        Discovery("me", str, interfaces=["192.0.2.250"])
    gc.collect()
