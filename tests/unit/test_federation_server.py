"""The server through plain pyarrow.flight: what any client sees, and what none can do."""

import ast
import inspect
import itertools
import json
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

import lora
from lora.errors import ArgumentError, CardNotFoundError, StoreError
from lora.federation.credentials import Credentials, check_location, is_loopback
from lora.federation.keys import generate_key, sign_file
from lora.federation.manifest import manifest_from_json
from lora.federation.server import CHUNK, LoRAFlightServer, file_pieces, table_pieces
from lora.federation.stream_limits import Limits, shut_down
from lora.federation.trust import Policy, check_signature
from lora.testing.plugin import requirement
from tests.unit.hostile import Authority, Line, made, saved, serving_process, until

by_name, by_digest = flight.FlightDescriptor.for_path, flight.FlightDescriptor.for_command
CUT = (flight.FlightUnavailableError, flight.FlightCancelledError)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cards"
    path.mkdir()
    docs = made("docs", description="Python documentation", base_model="minilm", version="1.2.0")
    saved(replace(docs, base_fingerprint="5" * 64), path)
    saved(made("law", size=8), path)
    return path


@pytest.fixture
def server(folder):
    with LoRAFlightServer(folder, node_id="n1") as server:
        yield server


@pytest.fixture
def plain(server):
    with flight.connect(server.uri) as client:
        yield client


def names(client, criteria=b""):
    return sorted(info.descriptor.path[0].decode() for info in client.list_flights(criteria))


def action(client, kind, body=b""):
    return [result.body.to_pybytes() for result in client.do_action(flight.Action(kind, body))]


def batches(client, ticket):
    return [chunk.data for chunk in client.do_get(flight.Ticket(ticket))]


def manifest(client, name):
    return manifest_from_json(client.get_flight_info(by_name(name)).app_metadata)


@requirement("R11.1", "R11.2", "R11.3")
def test_a_card_is_read_with_plain_flight_and_its_factors_without_this_library(folder, plain):
    path = folder / "docs.lora.arrow"
    (info,) = [info for info in plain.list_flights() if info.descriptor.path == [b"docs"]]
    assert json.loads(info.app_metadata) == {
        "name": "docs",
        "digest": lora.digest(path),
        "size": path.stat().st_size,
        "rank": 2,
        "alpha": 4.0,
        "targets": ["query"],
        "modules": 1,
        "description": "Python documentation",
        "base_model": "minilm",
        "base_fingerprint": "5" * 64,
        "version": "1.2.0",
        "signature": None,
    }
    assert info.endpoints[0].ticket.ticket.decode() == lora.digest(path)
    assert (info.total_bytes, info.total_records) == (path.stat().st_size, 1)
    assert info.schema.metadata[b"lora.name"] == b"docs"
    table = plain.do_get(info.endpoints[0].ticket).read_all()
    assert table.schema.equals(info.schema, check_metadata=True)
    (row,) = table.to_pylist()
    factor = np.array(row["A"]["data"], np.float32).reshape(row["A"]["shape"])
    assert np.array_equal(factor, made().weights["layer.0.query"].A)
    assert lora.table_to_card(table) == lora.load(path)


@requirement("R11.2", "R11.7")
def test_criteria_narrow_the_list_and_others_are_a_bad_request(plain):
    assert names(plain) == ["docs", "law"]
    for criteria in (b'{"name_prefix":"do"}', b'{"base_model":"minilm"}'):
        assert names(plain, criteria) == ["docs"]
    for criteria in (b'{"name_prefix":"oc"}', b'{"name_prefix":"do","base_model":"other"}'):
        assert names(plain, criteria) == []
    twice = b'{"name_prefix":"a","name_prefix":"b"}'
    for criteria in (b"x", b"[]", b'{"a":1}', b'{"base_model":1}', twice, b"[" * 5000, b"\xff"):
        with pytest.raises(flight.FlightServerError, match=r"^bad request"):
            names(plain, criteria)


@requirement("R11.4")
def test_names_and_digests_are_described_alike(folder, plain):
    sha = lora.digest(folder / "law.lora.arrow")
    infos = [plain.get_flight_info(by_name("law")), plain.get_flight_info(by_digest(sha.encode()))]
    assert [json.loads(info.app_metadata)["digest"] for info in infos] == [sha, sha]
    assert plain.get_schema(by_name("law")).schema.metadata[b"lora.name"] == b"law"
    for call in (lambda: batches(plain, b"law"), lambda: action(plain, "card", b"law")):
        with pytest.raises(flight.FlightServerError, match="no such card"):
            call()  # a ticket is a digest and never a name


OUTSIDE = ["../secret", "/etc/passwd", "docs.lora.arrow", "", "a" * 300, "docs\0", "./docs", "é"]


@requirement("R11.4", "R11.7")
@pytest.mark.parametrize("name", [*OUTSIDE, "0" * 64, "%2e%2e"])
def test_nothing_outside_the_folder_can_be_named(tmp_path, plain, name):
    saved(made("secret"), tmp_path)
    data = name.encode()
    for call in (
        lambda: batches(plain, data),
        lambda: batches(plain, data + b"/file"),
        lambda: action(plain, "card", data),
        lambda: plain.get_flight_info(by_name(name)),
        lambda: plain.get_flight_info(by_digest(data)),
    ):
        with pytest.raises((flight.FlightError, pa.ArrowException), match="no such card") as caught:
            call()
        assert str(tmp_path) not in str(caught.value)
        assert "Traceback" not in str(caught.value)


@requirement("R11.4")
def test_links_hidden_files_and_what_is_no_card_are_not_served(tmp_path, folder, caplog):
    saved(made("outside"), tmp_path)
    outside = tmp_path / "outside.lora.arrow"
    (folder / "link.lora.arrow").symlink_to(outside)
    for name in (".hidden.lora.arrow", "outside.txt"):
        (folder / name).write_bytes(outside.read_bytes())
    (folder / "broken.lora.arrow").write_bytes(b"ARROW1 and so on")
    os.mkfifo(folder / "pipe.lora.arrow")
    (folder / "folder.lora.arrow").mkdir()
    with LoRAFlightServer(folder) as server, flight.connect(server.uri) as client:
        assert names(client) == ["docs", "law"]
    (record,) = caplog.records
    assert record.message.startswith(f"not served: {folder}/broken")


@requirement("R11.4")
def test_a_link_or_another_file_in_the_place_of_a_served_one_is_not_sent(tmp_path, folder, server):
    path = folder / "docs.lora.arrow"
    card = server.catalog.cards[lora.digest(path)]
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    for _ in range(2):
        for pieces in (file_pieces(card, CHUNK), table_pieces(card)):
            with pytest.raises(StoreError):
                next(pieces)
        path.unlink()
        saved(made("docs"), folder)


@requirement("R11.5")
def test_serving_is_read_only(plain, folder):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(flight.FlightUnauthorizedError, match=r"^read-only"):
        plain.do_put(by_name("new"), pa.schema([]))[0].close()
    with pytest.raises(flight.FlightUnauthorizedError, match=r"^read-only"):
        plain.do_exchange(by_name("new"))[1].read_chunk()
    with pytest.raises(flight.FlightServerError, match=r"^bad request"):
        action(plain, "delete", b"docs")
    assert sorted(path.name for path in folder.iterdir()) == before


@requirement("R11.5")
def test_a_server_has_the_actions_that_it_names_and_no_others():
    (function,) = ast.parse(dedent(inspect.getsource(LoRAFlightServer.do_action))).body
    patterns = [node for node in ast.walk(function) if isinstance(node, ast.match_case)]
    *actions, last = [ast.unparse(case.pattern).strip("'") for case in patterns]
    assert (sorted(actions), last) == (["card", "health", "list", "version"], "_")


@requirement("R11.1", "R5.16")
def test_health_version_and_metrics(server, plain):
    assert {listed.type for listed in plain.list_actions()} == {"card", "list", "health", "version"}
    (listed,) = action(plain, "list", b'{"name_prefix":"do"}')
    (health,), (version,) = action(plain, "health"), action(plain, "version")
    assert json.loads(listed)["name"] == "docs"
    assert json.loads(health) == {"status": "ok", "cards": 2, "streams": 0}
    assert json.loads(version) == {"server": "lora", "format": [1, 0], "node_id": "n1"}
    sha = next(iter(server.catalog.cards))
    sent = b"".join(action(plain, "card", sha.encode()))
    counts = server.metrics.snapshot()
    assert counts["sent_bytes"] > len(sent)
    assert counts["requests_do_action"] == 4


@requirement("R11.9", "R11.4")
def test_changes_in_the_folder_show_up_without_a_restart(folder, server, plain):
    saved(made("new"), folder)
    assert names(plain) == ["docs", "law", "new"]
    (folder / "law.lora.arrow").unlink()
    assert names(plain) == ["docs", "new"]
    old = lora.digest(folder / "docs.lora.arrow")
    sha = saved(made("docs", size=32, version="1.2.1"), folder)
    assert manifest(plain, "docs").digest == sha
    with pytest.raises(flight.FlightServerError, match="no such card"):
        action(plain, "card", old.encode())
    path = folder / "docs.lora.arrow"
    lora.save(made("docs", size=32, version="1.2.2"), folder / "as large")
    assert (folder / "as large").stat().st_size == path.stat().st_size
    path.write_bytes((folder / "as large").read_bytes())  # in place
    assert manifest(plain, "docs").version == "1.2.2"
    catalog = server.catalog
    assert server.catalog is catalog
    lora.save(made("docs", version="1.10.0"), folder / "a.lora.arrow")
    assert names(plain) == ["docs", "docs", "new"]
    assert manifest(plain, "docs").version == "1.10.0"  # the higher one


@requirement("R14.1", "R11.9")
def test_a_cards_signature_is_served_and_one_of_another_is_not(tmp_path, folder, plain, caplog):
    public = generate_key(tmp_path / "me.pem")
    sign_file(folder / "docs.lora.arrow", tmp_path / "me.pem")
    check_signature(manifest(plain, "docs"), Policy(frozenset({public})))
    (folder / "docs.lora.arrow.sig.json").rename(folder / "law.lora.arrow.sig.json")
    assert manifest(plain, "law").signature is None
    assert "another card" in caplog.text
    (folder / "law.lora.arrow.sig.json").write_bytes(b"{")
    assert names(plain) == ["docs", "law"]


@requirement("R11.6")
def test_without_the_token_nothing_is_told(folder):
    server = LoRAFlightServer(folder, credentials=Credentials("secret"))
    with server, flight.connect(server.uri) as client:

        def calls(*headers):
            sent = [(b"authorization", header) for header in headers]
            options = flight.FlightCallOptions(headers=sent)
            yield lambda: list(client.list_flights(options=options))
            yield lambda: list(client.do_action("health", options))

        for headers in ((), (b"Bearer other",), (b"secret",), (b"Bearer secret", b"Bearer x")):
            for call in calls(*headers):
                with pytest.raises(flight.FlightUnauthenticatedError, match="unauth") as caught:
                    call()
                assert "secret" not in str(caught.value)
        assert [len(call()) for call in calls(b"Bearer secret")] == [2, 1]


@requirement("R11.6")
def test_a_token_travels_in_clear_on_loopback_alone_unless_the_caller_insists(folder):
    with pytest.raises(ArgumentError, match=r"TLS beyond loopback.*insecure_token=True"):
        LoRAFlightServer(folder, "grpc://0.0.0.0:0", credentials=Credentials("secret"))
    insecure = Credentials("secret", insecure_token=True)
    with LoRAFlightServer(folder, "grpc://0.0.0.0:0", credentials=insecure) as server:
        assert server.port
    assert check_location("grpc://[::1]:5", Credentials("secret")) == (False, "::1", 5)
    uri = "grpc+tls://Cards.example:443"
    assert check_location(uri, Credentials("secret")) == (True, "cards.example", 443)
    assert "secret" not in repr(Credentials("secret"))
    assert all(map(is_loopback, ("localhost", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("10.0.0.1", "example.org")))


@requirement("R7.8")
@pytest.mark.parametrize(
    "location",
    [
        "http://x:1",
        "grpc://",
        "grpc://127.0.0.1",
        "grpc://127.0.0.1:99999",
        "grpc://127.0.0.1:1/cards",
        "grpc://user:word@127.0.0.1:1",
    ],
)
def test_what_is_no_location_is_refused_and_no_part_of_it_ignored(location):
    with pytest.raises(ArgumentError, match="expected grpc://host:port"):
        check_location(location, Credentials())


@requirement("R11.6", "R7.8")
def test_parts_that_do_not_fit_no_folder_and_a_taken_port_are_refused(tmp_path, server, capfd):
    with pytest.raises(ArgumentError, match="a certificate with grpc"):
        LoRAFlightServer(tmp_path, "grpc+tls://127.0.0.1:0")
    shown = Authority().credentials()
    for credentials in (shown, replace(shown, certificate=None, key=None)):
        with pytest.raises(ArgumentError, match="a certificate with grpc"):
            LoRAFlightServer(tmp_path, credentials=credentials)
    with pytest.raises(CardNotFoundError, match="nowhere"):
        LoRAFlightServer(tmp_path / "nowhere")
    for location, problem in (
        (server.uri, "address already in use"),
        ("grpc://192.0.2.1:0", "cannot assign requested address"),
        ("grpc://nowhere.invalid:0", "name or service not known|name resolution"),
    ):
        with pytest.raises(StoreError, match=f"({problem}).*a free address"):
            LoRAFlightServer(tmp_path, location)
    capfd.readouterr()  # gRPC says so too
    for token in ("", "é", "a\nb"):
        with pytest.raises(ArgumentError, match="token"):
            Credentials(token)
    with pytest.raises(ArgumentError, match="certificate and key"):
        Credentials(certificate=b"c")


@requirement("R7.8", "R11.6")
def test_a_certificate_and_key_that_do_not_belong_together_are_told_as_that():
    a, b = Authority().credentials(), Authority().credentials()
    for parts, problem in (
        ({"certificate": a.certificate, "key": b.key}, "that of another one"),
        ({"certificate": b"SECRET", "key": b.key}, "in PEM"),
        ({"certificate": a.certificate, "key": b"SECRET"}, "in PEM"),
        ({"ca": b"SECRET"}, "in PEM"),
    ):
        with pytest.raises(ArgumentError, match=problem) as caught:
            Credentials(**parts)
        assert "SECRET" not in str(caught.value)


@requirement("R11.7")
def test_a_failure_inside_is_told_as_nothing_but_that(folder, plain, monkeypatch, caplog):
    sha = lora.digest(folder / "docs.lora.arrow")

    def failing(*_):
        yield 1 / 0

    monkeypatch.setattr("lora.federation.server.file_pieces", failing)
    monkeypatch.setattr("lora.federation.server.table_pieces", failing)
    for call in (lambda: action(plain, "card", sha.encode()), lambda: batches(plain, sha)):
        with pytest.raises(flight.FlightInternalError, match=r"^internal error") as caught:
            call()
        assert "division" not in str(caught.value)
    for failure in (lambda *_: 1 / 0, lambda *_: {}["no such key"]):
        monkeypatch.setattr("lora.federation.server.scan", failure)
        for call in (lambda: names(plain), lambda: batches(plain, sha)):
            with pytest.raises(flight.FlightInternalError, match=r"^internal error"):
                call()
    assert "ZeroDivisionError" in caplog.text
    assert "KeyError" in caplog.text


@requirement("R11.1")
def test_what_needs_no_card_does_not_look_at_the_folder(folder, plain, monkeypatch):
    """Every peer asks for the version, every few seconds."""
    monkeypatch.setattr("lora.federation.server.scan", lambda *_: pytest.fail("looked"))
    assert json.loads(action(plain, "version")[0])["server"] == "lora"
    with pytest.raises(flight.FlightServerError, match="bad request"):
        action(plain, "no such action")


@requirement("R11.4")
def test_a_card_whose_name_is_too_long_for_a_signature_beside_it_is_served(folder, plain):
    name = "n" * (255 - len(".lora.arrow"))
    lora.save(made("long"), folder / f"{name}.lora.arrow")
    assert names(plain) == ["docs", "law", "long"]


@requirement("R11.1", "R11.9")
def test_files_that_a_function_names_are_served_as_they_are_at_that_moment(tmp_path, folder):
    files = [folder / "law.lora.arrow"]
    with LoRAFlightServer(lambda: files) as server, flight.connect(server.uri) as client:
        assert names(client) == ["law"]
        lora.save(made("other"), tmp_path / "any name")
        files[:] = [tmp_path / "any name", tmp_path / "gone"]
        assert names(client) == ["other"]


@requirement("R11.7", "R11.8")
def test_a_request_of_200_mb_is_refused_and_the_server_lives(plain):
    huge = b"x" * 200_000_000
    for call in (lambda: batches(plain, huge), lambda: action(plain, "card", huge)):
        with pytest.raises(flight.FlightServerError, match="bad request"):
            call()
    assert names(plain) == ["docs", "law"]


def slowly(stream):
    for _ in stream:
        time.sleep(0.1)


ROWS = {
    "tiny": [1000] * 50,
    "mixed": [100_000, 4_100_000, 2_000_000, 1_900_000, 300_000, 12_000_000, 1000, 4_190_000],
    "large": [5_000_000] * 3,
    "alternating": [3_900_000, 100_000] * 4,
    "none": [],
}


@requirement("R11.3")
@pytest.mark.parametrize("form", ["", "/file"])
@pytest.mark.parametrize("rows", ROWS)
def test_no_batch_of_rows_is_over_4_mb_and_no_two_neighbours_fit_into_it(folder, plain, rows, form):
    """And what is sent is the card, in either form and by the action."""
    weights = {
        f"m{number}": lora.LowRank(np.ones((size // 8, 1), "f4"), np.ones((1, size // 8), "f4"))
        for number, size in enumerate(ROWS[rows])
    }
    card = lora.LoRACard("rows", 1, 1.0, ("m",) if weights else (), weights)
    sha = saved(card, folder)
    sent = batches(plain, sha + form)
    one_row = 0 if form else 1  # a part of a file is no row
    assert all(batch.nbytes <= 4 * 2**20 or batch.num_rows == one_row for batch in sent)
    assert all(a.nbytes + b.nbytes > 4 * 2**20 for a, b in itertools.pairwise(sent))
    if not form:
        assert lora.table_to_card(pa.Table.from_batches(sent)) == card
        return
    data = b"".join(batch.column("bytes")[0].as_py() for batch in sent)
    assert data == b"".join(action(plain, "card", sha.encode()))
    assert data == (folder / "rows.lora.arrow").read_bytes()


FORMS = {
    "table": lambda client, sha: client.do_get(flight.Ticket(sha)),
    "file": lambda client, sha: client.do_get(flight.Ticket(f"{sha}/file")),
    "card": lambda client, sha: client.do_action(flight.Action("card", sha.encode())),
}


@requirement("R11.3")
@pytest.mark.parametrize("form", FORMS)
def test_a_servers_memory_does_not_hold_a_copy_of_the_card_for_each_client(folder, form):
    """Anonymous memory: the pages of the card's file are shared, and can be dropped."""
    sha = saved(made("big", size=250_000, rank=4, modules=6), folder)
    size, clients, opened = (folder / "big.lora.arrow").stat().st_size, 8, FORMS[form]
    with serving_process(folder) as (process, uri):

        def memory():
            status = Path(f"/proc/{process.pid}/status").read_text()
            return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

        with flight.connect(uri) as client:
            for _ in opened(client, sha):
                pass
        before, readers = memory(), []
        for _ in range(clients):
            own = [("grpc.use_local_subchannel_pool", 1)]
            readers.append(flight.connect(uri, generic_options=own))
        streams = [opened(reader, sha) for reader in readers]
        for stream in streams:
            next(stream)
        time.sleep(0.5)  # as much as the server sends ahead of them
        grown = memory() - before
        assert size > 45_000_000
        assert grown < clients * size / 2
    for reader in readers:
        reader.close()


def stalled(uri, sha):
    """A client that has taken one piece and takes no more."""
    client = flight.connect(uri)
    stream = client.do_action(flight.Action("card", sha.encode()))
    try:
        next(stream)
    except flight.FlightError:
        client.close()
        raise
    return client, stream


@requirement("R11.8")
def test_of_a_hundred_stalled_readers_some_are_refused_the_rest_cut_off_and_others_served(folder):
    sha = saved(made("big", size=500_000, rank=8), folder)
    readers, refused, ended = [], 0, 0
    server = LoRAFlightServer(folder, limits=Limits(streams=40))
    with server, flight.connect(server.uri) as client:
        for _ in range(100):
            try:
                readers.append(stalled(server.uri, sha))
            except flight.FlightUnavailableError as error:
                refused += "busy" in str(error)
        assert refused > 30
        assert names(client) == ["big", "docs", "law"]
        assert len(server._streams.open) <= 40
        server._streams.limits = Limits(streams=40, stall=0.5)
        until(lambda: json.loads(action(client, "health")[0])["streams"] == 0)
        size = sum(map(len, action(client, "card", sha.encode())))
        assert size == (folder / "big.lora.arrow").stat().st_size
        assert server.metrics.snapshot()["streams_cut"] > 10
    for reader, stream in readers:
        try:
            list(stream)
        except CUT:
            ended += 1
        reader.close()
    assert ended > 10


@requirement("R11.8")
def test_a_stream_that_never_ends_is_cut_off_and_shutdown_does_not_wait(folder):
    # More than gRPC takes ahead of a slow reader.
    sha = saved(made("big", size=2_000_000, rank=8), folder)
    with LoRAFlightServer(folder, limits=Limits(duration=0.5)) as server:
        client, stream = stalled(server.uri, sha)
        with pytest.raises(CUT):
            slowly(stream)
        client.close()
    server = LoRAFlightServer(folder)
    readers = [stalled(server.uri, sha) for _ in range(5)]
    start = time.monotonic()
    server.shutdown()
    assert time.monotonic() - start < 5
    for client, _ in readers:
        client.close()


@requirement("R11.8")
def test_only_the_connection_that_is_meant_is_shut_down(server, plain):
    with Line(server.port) as line, flight.connect(line.uri) as near:
        names(near)
        names(plain)
        peer = f"ipv4:127.0.0.1:{line.pairs[0][1].getsockname()[1]}"
        assert shut_down(server.port, peer) == 1
        assert shut_down(server.port + 1, peer) == 0
        assert names(plain) == ["docs", "law"]
    assert shut_down(server.port, "unix:/tmp/x") == shut_down(server.port, "ipv6:%5B::1%5D:1") == 0


@requirement("R11.8")
@pytest.mark.parametrize("host", ["[::1]", "[::]"])
def test_a_stalling_reader_over_ipv6_is_cut_off(folder, host):
    sha = saved(made("big", size=500_000, rank=8), folder)
    with LoRAFlightServer(folder, f"grpc://{host}:0", limits=Limits(stall=0.3)) as server:
        near = "[::1]" if host == "[::1]" else "127.0.0.1"
        client, _ = stalled(f"grpc://{near}:{server.port}", sha)
        until(lambda: server.metrics.snapshot().get("streams_cut"))
        client.close()


@requirement("R11.3", "R11.8")
def test_file_descriptors_and_threads_come_back(folder):
    sha = saved(made("big", size=200_000, rank=8), folder)
    descriptors, threads = len(list(Path("/dev/fd").iterdir())), threading.active_count()
    for _ in range(3):
        with LoRAFlightServer(folder) as server, flight.connect(server.uri) as client:
            action(client, "card", sha.encode())
            batches(client, sha)
            shut_down(server.port + 1, None)
    time.sleep(0.5)
    assert len(list(Path("/dev/fd").iterdir())) <= descriptors + 8  # gRPC's own
    assert threading.active_count() <= threads + 1
