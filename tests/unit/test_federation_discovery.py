"""Discovery over real multicast: arrivals, goodbyes, deaths, forgeries, floods, interfaces."""

import asyncio
import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import zeroconf

from lora.errors import ArgumentError, PeerError, StoreError
from lora.federation.discovery import SERVICE, Discovery, reachable
from lora.testing.plugin import requirement
from tests.unit.hostile import until

LOOPBACK = ["127.0.0.1"]
IDS = (f"t{os.getpid()}x{count}" for count in itertools.count())  # others may test on this link


def at(*ports):
    return [f"grpc://127.0.0.1:{port}" for port in ports]


class Nodes:
    """Addresses that answer with a node id as long as they are in `ids`."""

    def __init__(self):
        self.ids = {}

    def ask(self, uri):
        if uri not in self.ids:
            raise PeerError(uri, "an answer", "none")
        return self.ids[uri]

    def join(self, port, **options):
        """A node that serves at a port of loopback, and its discovery."""
        name = self.ids[f"grpc://127.0.0.1:{port}"] = next(IDS)
        options = {"interfaces": LOOPBACK, "interval": 0.3, **options}
        return Discovery(name, self.ask, port=port, addresses=LOOPBACK, **options)


@pytest.fixture
def nodes():
    return Nodes()


@contextmanager
def announcer(name, port, version="1.0", addresses=LOOPBACK):
    """A stranger that announces a node, on loopback."""
    record = zeroconf.ServiceInfo(
        SERVICE,
        f"{name}.{SERVICE}",
        port=port,
        properties={"format": version},
        server=f"{name}.local.",
        parsed_addresses=list(addresses),
    )
    with zeroconf.Zeroconf(interfaces=LOOPBACK) as stranger:
        stranger.register_service(record, cooperating_responders=True)
        yield lambda: stranger.unregister_service(record)


def see(discovery, expected, seconds=15):
    """The peers' URIs become exactly these."""
    until(lambda: sorted(peer.uri for peer in discovery.peers()) == expected, seconds)


def keep_seeing(discovery, expected, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert [peer.uri for peer in discovery.peers()] == expected
        time.sleep(0.05)


@requirement("R13.1", "R13.2", "R13.3", "R13.6")
def test_nodes_find_each_other_and_not_themselves_and_see_goodbyes_and_silent_deaths(nodes):
    with nodes.join(5001) as a, nodes.join(5002) as b:
        see(a, at(5002))
        see(b, at(5001))
        c = nodes.join(5003)
        see(a, at(5002, 5003))
        del nodes.ids["grpc://127.0.0.1:5003"]
        c.close()
        see(a, at(5002))
        del nodes.ids["grpc://127.0.0.1:5002"]  # it is dead, and has said nothing
        see(a, [])
        assert at(5001)[0] in [peer.uri for peer in b.peers()]


@requirement("R13.1")
def test_an_announcement_states_node_id_format_version_and_port(nodes):
    with nodes.join(5006), zeroconf.Zeroconf(interfaces=LOOPBACK) as reader:
        name = nodes.ids["grpc://127.0.0.1:5006"]
        record = reader.get_service_info("_lora-card._tcp.local.", f"{name}.{SERVICE}", 5000)
        assert record.decoded_properties == {"id": name, "format": "1.0", "tls": "0"}
        assert (record.port, record.parsed_addresses()) == (5006, LOOPBACK)


@requirement("R13.4")
def test_forged_goodbyes_and_redirects_move_nobody_who_answers(nodes):
    with nodes.join(5011) as a, nodes.join(5012):
        see(a, at(5012))
        nodes.ids["grpc://127.0.0.1:6666"] = "forger"
        with announcer(a.peers()[0].key, 6666, "1.0") as say_goodbye:
            say_goodbye()
            keep_seeing(a, at(5012), 1.5)


@requirement("R13.4")
def test_a_flood_of_fake_peers_neither_fills_the_book_nor_displaces_who_answers(nodes):
    with nodes.join(5021, cap=12) as a, nodes.join(5022):
        see(a, at(5022))
        for number in range(2000):
            added = zeroconf.ServiceStateChange.Added
            a._on_announcement(name=f"fake{number}.{SERVICE}", state_change=added)
        assert len(a._book.peers) == 12
        keep_seeing(a, at(5022), 0.5)
        with nodes.join(5023):
            see(a, at(5022, 5023), 30)


@requirement("R13.4")
def test_a_node_of_another_format_is_not_asked(nodes):
    """And nobody forgets why, nor why another does not answer."""
    name, other = next(IDS), next(IDS)
    nodes.ids["grpc://127.0.0.1:5042"] = name
    with nodes.join(5041) as a, announcer(name, 5042, "2.0"), announcer(other, 5043):
        keep_seeing(a, [], 1)
        until(lambda: not a._book.peers)
        assert "format 1 of cards, found 2.0" in str(a.errors()[name])
        assert a.errors()[other].where == "grpc://127.0.0.1:5043"


BLACK_HOLES = [f"10.255.255.{host}" for host in range(1, 20)]


@requirement("R13.1", "R13.6")
@pytest.mark.parametrize("good", ["127.0.0.1", "::1"])
def test_every_address_that_a_peer_announces_is_tried_and_none_waits_for_another(nodes, good):
    """A machine with bridges of containers has many, of both families; few can be reached."""
    tried, name = set(), next(IDS)
    uri = f"grpc://{f'[{good}]' if ':' in good else good}:5051"

    def ask(asked):
        tried.add(asked)
        if asked == uri:
            until(lambda: len(tried) == 1 + len(BLACK_HOLES), 5)
            return name
        time.sleep(0.2)
        raise PeerError(asked, "an answer", "none")

    with Discovery(next(IDS), ask, interfaces=LOOPBACK) as a:
        with announcer(name, 5051, addresses=[*BLACK_HOLES, good]):
            see(a, [uri])


@requirement("R7.8", "R13.5")
def test_a_peer_that_does_not_answer_has_the_reason(nodes):
    nodes.ids["grpc://a:1"] = "one"
    with Discovery("me", nodes.ask, interfaces=(), static=["grpc://a:1", "grpc://b:2"]) as a:
        until(lambda: a.errors() and a.peers())
        ((uri, error),) = a.errors().items()
        assert uri == error.where == "grpc://b:2"
        nodes.ids["grpc://b:2"] = "two"
        until(lambda: not a.errors())


@requirement("R7.8", "R13.4")
def test_the_reasons_that_are_kept_are_the_latest(nodes):
    """Else the names of a flood would hide for ever why anyone else does not answer."""

    def ask(uri):
        if uri == "grpc://late:1":
            until(discovery.errors)
        return nodes.ask(uri)

    static = ["grpc://first:1", "grpc://late:1"]
    with Discovery("me", ask, interfaces=(), static=static, cap=1, interval=60) as discovery:
        until(lambda: list(discovery.errors()) == static[1:])


@requirement("R13.4")
def test_a_goodbye_of_someone_unknown_adds_nobody(nodes):
    with nodes.join(5061) as a:
        for number in range(20):
            name = f"unknown{number}.{SERVICE}"
            a._on_announcement(name=name, state_change=zeroconf.ServiceStateChange.Removed)
        assert dict(a._book.peers) == {}


@requirement("R13.1")
def test_in_a_running_event_loop_nodes_find_each_other_and_the_loop_goes_on(nodes):
    async def cell():
        with nodes.join(5071) as a, nodes.join(5072) as b:
            for _ in range(100):
                await asyncio.sleep(0.05)
                if a.peers() and b.peers():
                    break
            return len(a.peers()), len(b.peers())

    assert asyncio.run(cell()) == (1, 1)


@requirement("R13.5")
def test_static_peers_need_no_multicast_and_come_back_when_they_answer_again(nodes):
    nodes.ids["grpc://a:1"] = "one"
    static = ["grpc://a:1", "grpc://b:2"]
    with Discovery("me", nodes.ask, interfaces=(), static=static, interval=0.1) as discovery:
        see(discovery, static[:1])
        nodes.ids["grpc://b:2"] = ""
        see(discovery, static)
        del nodes.ids["grpc://a:1"]
        see(discovery, static[1:])
        nodes.ids["grpc://a:1"] = "one"
        see(discovery, static)


@requirement("R13.4")
def test_a_peer_whose_answer_breaks_the_asking_ends_no_thread(caplog):
    def ask(uri):
        return {"grpc://good:1": "good"}[uri]

    static = ["grpc://bad:1", "grpc://good:1"]
    with Discovery("me", ask, interfaces=(), static=static, interval=0.1) as discovery:
        see(discovery, static[1:])
    assert "KeyError" in caplog.text


@requirement("R13.6")
def test_a_wildcard_is_never_announced():
    assert reachable(["127.0.0.1"]) == ["127.0.0.1"]
    assert reachable(["::1%1"]) == ["::1"]
    assert reachable(["0.0.0.0", "::"], ["192.0.2.1"]) == ["192.0.2.1"]
    for wild in (["0.0.0.0"], ["::"], []):
        addresses = reachable(wild)
        assert addresses
        assert not {"0.0.0.0", "::"} & set(addresses)


@requirement("R7.8")
@pytest.mark.parametrize("name", ["", "a" * 64, "a.b", "a b", "é", "a\n"])
def test_a_node_id_is_a_dns_label(name):
    with pytest.raises(ArgumentError, match="node_id"):
        Discovery(name, str, interfaces=())


@requirement("R13.2")
def test_it_ends_with_its_threads(nodes):
    def threads():
        return sum(thread.name.startswith("lora-") for thread in threading.enumerate())

    before = threads()
    with nodes.join(5031) as discovery:
        discovery.wait(0.1)
        assert threads() > before
    assert threads() == before


PEER = """
import sys, time
from lora.federation.discovery import Discovery
name, other, port, address = sys.argv[1:]
where = {"addresses": [address], "interfaces": [address]}
with Discovery(name, lambda uri: other, port=int(port), **where) as discovery:
    for line in sys.stdin:
        discovery.wait(10, 1)
        print(*[peer.uri for peer in discovery.peers()], flush=True)
"""


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, check=check).returncode


def may_make_networks():
    probe = f"lora-probe{os.getpid()}"  # others may be probing, too
    if os.geteuid() or not shutil.which("ip") or ip("netns", "add", probe, check=False):
        return False
    return ip("netns", "del", probe) == 0


@requirement("R13.6", "R13.1")
@pytest.mark.slow
@pytest.mark.skipif(not may_make_networks(), reason="network namespaces need root and iproute2")
@pytest.mark.parametrize("network", ["10.99.0.", "fd99::"])
def test_nodes_on_a_network_of_their_own_find_each_other_over_ipv4_and_ipv6(network):
    a, b = spaces = [f"lora{os.getpid()}{side}" for side in "ab"]
    mask, host = ("/64", "[{}]") if ":" in network else ("/24", "{}")
    with ExitStack() as opened:
        for space in spaces:
            ip("netns", "add", space)
            opened.callback(ip, "netns", "del", space, check=False)
        ip(*f"link add v0 netns {a} type veth peer name v0 netns {b}".split())
        for number, space in enumerate(spaces, 1):
            ip("-n", space, "link", "set", "v0", "up")
            nodad = ["nodad"] if ":" in network else []
            ip("-n", space, "addr", "add", f"{network}{number}{mask}", "dev", "v0", *nodad)
        time.sleep(2)  # for the link-local address
        processes = []
        for i, space in enumerate(spaces, 1):
            command = ["ip", "netns", "exec", space, sys.executable, "-c", PEER]
            command += [f"n{i}", f"n{3 - i}", f"500{i}", f"{network}{i}"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, **pipes))
        for process in processes:
            process.stdin.write("who\n")
            process.stdin.flush()
        lines = [process.stdout.readline().strip() for process in processes]
        assert lines == [f"grpc://{host.format(f'{network}{i}')}:500{i}" for i in (2, 1)]
        for process in processes:
            process.communicate()


@requirement("R13.6")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interfaces_that_are_not_there_are_named():
    with pytest.raises(StoreError, match="interfaces"):
        Discovery("me", str, interfaces=["192.0.2.250"])
    gc.collect()  # the socket that zeroconf leaves
