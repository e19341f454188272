"""The server through plain pyarrow.flight: what any client in any language sees, and what none can do."""

import hashlib
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

import lora
from lora.errors import ArgumentError, CardNotFoundError, StoreError
from lora.federation.access import Credentials, check_location, is_loopback
from lora.federation.keys import generate_key, sign_file
from lora.federation.manifest import manifest_from_json
from lora.federation.server import CHUNK, MAX_BATCH, LoRAFlightServer
from lora.federation.streams import Limits, shut_down
from lora.federation.trust import Policy, check_signature, public_key
from lora.testing.plugin import requirement
from tests.unit.hostile import AUTHOR, Authority, Line, made, saved


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


@requirement("R11.1", "R11.2", "R11.3")
def test_a_card_is_read_with_plain_flight_and_its_factors_without_this_library(folder, plain):
    (info,) = [info for info in plain.list_flights() if info.descriptor.path == [b"docs"]]
    told = json.loads(info.app_metadata)
    assert (
        told["digest"]
        == lora.digest(folder / "docs.lora.arrow")
        == info.endpoints[0].ticket.ticket.decode()
    )
    assert told["size"] == info.total_bytes == (folder / "docs.lora.arrow").stat().st_size
    assert (told["rank"], told["alpha"], told["targets"], told["modules"]) == (2, 4.0, ["query"], 1)
    assert (told["description"], told["base_model"], told["version"]) == (
        "Python documentation",
        "minilm",
        "1.2.0",
    )
    assert told["base_fingerprint"] == "5" * 64
    assert info.total_records == 1
    assert info.schema.metadata[b"lora.name"] == b"docs"
    table = plain.do_get(info.endpoints[0].ticket).read_all()
    assert table.schema.equals(info.schema, check_metadata=True)
    (row,) = table.to_pylist()
    factor = np.array(row["A"]["data"], np.float32).reshape(row["A"]["shape"])
    assert np.array_equal(factor, made().weights["layer.0.query"].A)
    assert lora.table_to_card(table) == lora.load(folder / "docs.lora.arrow")


@requirement("R11.2")
def test_criteria_narrow_the_list(plain):
    assert names(plain) == ["docs", "law"]
    assert (
        names(plain, b'{"name_prefix":"do"}')
        == names(plain, b'{"base_model":"minilm"}')
        == ["docs"]
    )
    assert names(plain, b'{"name_prefix":"do","base_model":"other"}') == []


@requirement("R11.2", "R11.7")
@pytest.mark.parametrize(
    "criteria",
    [b"x", b"[]", b'{"a":1}', b'{"name_prefix":"a","name_prefix":"b"}', b"[" * 5000, b"\xff"],
)
def test_other_criteria_are_a_bad_request(plain, criteria):
    with pytest.raises(flight.FlightServerError, match=r"^bad request"):
        names(plain, criteria)


@requirement("R11.4")
def test_names_and_digests_are_described_alike(folder, plain):
    sha = lora.digest(folder / "law.lora.arrow")
    by_name = plain.get_flight_info(flight.FlightDescriptor.for_path("law"))
    by_digest = plain.get_flight_info(flight.FlightDescriptor.for_command(sha.encode()))
    assert by_name.app_metadata == by_digest.app_metadata
    assert json.loads(by_name.app_metadata)["digest"] == sha
    assert (
        plain.get_schema(flight.FlightDescriptor.for_path("law")).schema.metadata[b"lora.name"]
        == b"law"
    )


@requirement("R11.4", "R11.7")
@pytest.mark.parametrize(
    "wanted",
    [
        "../secret",
        "/etc/passwd",
        "docs.lora.arrow",
        "",
        "a" * 300,
        "docs\0",
        "./docs",
        "0" * 64,
        "%2e%2e",
        "é",
    ],
)
def test_nothing_outside_the_folder_can_be_named(tmp_path, plain, wanted):
    saved(made("secret"), tmp_path)
    calls = [
        lambda: plain.do_get(flight.Ticket(wanted.encode())).read_all(),
        lambda: plain.do_get(flight.Ticket(wanted.encode() + b"/file")).read_all(),
        lambda: action(plain, "card", wanted.encode()),
        lambda: plain.get_flight_info(flight.FlightDescriptor.for_path(wanted)),
        lambda: plain.get_flight_info(flight.FlightDescriptor.for_command(wanted.encode())),
    ]
    for call in calls:
        with pytest.raises((flight.FlightError, pa.ArrowException), match="no such card") as caught:
            call()
        assert str(tmp_path) not in str(caught.value)
        assert "Traceback" not in str(caught.value)


@requirement("R11.4")
def test_links_hidden_files_and_what_is_no_card_are_not_served(tmp_path, folder, caplog):
    saved(made("outside"), tmp_path)
    (folder / "link.lora.arrow").symlink_to(tmp_path / "outside.lora.arrow")
    (folder / ".hidden.lora.arrow").write_bytes((tmp_path / "outside.lora.arrow").read_bytes())
    (folder / "outside.txt").write_bytes((tmp_path / "outside.lora.arrow").read_bytes())
    (folder / "broken.lora.arrow").write_bytes(b"ARROW1 and so on")
    os.mkfifo(folder / "pipe.lora.arrow")
    (folder / "folder.lora.arrow").mkdir()
    with LoRAFlightServer(folder) as server, flight.connect(server.uri) as client:
        assert names(client) == ["docs", "law"]
    assert [record.message[:30] for record in caplog.records] == [f"not served: {folder}"[:30]]


@requirement("R11.3")
def test_both_forms_come_in_pieces_and_are_the_card(folder):
    sha = saved(made("big", size=100_000, rank=4, modules=3), folder)
    data = (folder / "big.lora.arrow").read_bytes()
    with LoRAFlightServer(folder) as server, flight.connect(server.uri) as client:
        rows = [chunk.data for chunk in client.do_get(flight.Ticket(sha.encode()))]
        pieces = [
            chunk.data.column("bytes")[0].as_py()
            for chunk in client.do_get(flight.Ticket(f"{sha}/file"))
        ]
        acted = action(client, "card", sha.encode())
    assert [batch.num_rows for batch in rows] == [1, 1, 1]
    assert lora.table_to_card(pa.Table.from_batches(rows)) == lora.load(folder / "big.lora.arrow")
    assert b"".join(acted) == data
    assert {len(piece) for piece in pieces[:-1]} == {CHUNK}
    assert b"".join(pieces) == data
    assert hashlib.sha256(data).hexdigest() == sha


@requirement("R11.3")
def test_small_rows_share_a_batch_and_a_card_without_rows_is_one_empty_batch(folder):
    many = saved(made("many", size=20_000, rank=2, modules=20), folder)
    none = saved(lora.LoRACard("none", 1, 1.0, [], {}), folder)
    with LoRAFlightServer(folder) as server, flight.connect(server.uri) as client:
        rows = [chunk.data for chunk in client.do_get(flight.Ticket(many.encode()))]
        empty = client.do_get(flight.Ticket(none.encode())).read_all()
    assert 1 < len(rows) < 20
    assert all(1_000_000 <= batch.nbytes <= MAX_BATCH for batch in rows[:-1])
    assert lora.table_to_card(empty).name == "none"


@requirement("R11.5")
def test_serving_is_read_only(plain, folder):
    before = sorted(path.name for path in folder.iterdir())
    descriptor = flight.FlightDescriptor.for_path("new")
    with pytest.raises(flight.FlightUnauthorizedError, match=r"^read-only"):
        plain.do_put(descriptor, pa.schema([]))[0].close()
    with pytest.raises(flight.FlightUnauthorizedError, match=r"^read-only"):
        plain.do_exchange(descriptor)[1].read_chunk()
    with pytest.raises(flight.FlightServerError, match=r"^no such card"):
        action(plain, "delete", b"docs")
    assert sorted(path.name for path in folder.iterdir()) == before


@requirement("R11.1", "R5.16")
def test_health_version_and_metrics(server, plain):
    assert {listed.type for listed in plain.list_actions()} == {"card", "list", "health", "version"}
    assert [
        json.loads(told)["name"] for told in action(plain, "list", b'{"name_prefix":"do"}')
    ] == ["docs"]
    (health,), (version,) = action(plain, "health"), action(plain, "version")
    assert json.loads(health) == {"status": "ok", "cards": 2, "streams": 0}
    assert json.loads(version) == {"server": "lora", "format": [1, 0], "node_id": "n1"}
    sha = next(iter(server.catalog.cards))
    sent = b"".join(action(plain, "card", sha.encode()))
    assert server.metrics.snapshot()["sent_bytes"] > len(sent)
    assert server.metrics.snapshot()["requests_do_action"] == 4


@requirement("R11.9")
def test_changes_in_the_folder_show_up_without_a_restart(folder, server, plain):
    saved(made("new"), folder)
    assert names(plain) == ["docs", "law", "new"]
    (folder / "law.lora.arrow").unlink()
    assert names(plain) == ["docs", "new"]
    old = lora.digest(folder / "docs.lora.arrow")
    sha = saved(made("docs", size=32, version="1.2.1"), folder)
    assert (
        json.loads(plain.get_flight_info(flight.FlightDescriptor.for_path("docs")).app_metadata)[
            "digest"
        ]
        == sha
    )
    with pytest.raises(flight.FlightServerError, match="no such card"):
        action(plain, "card", old.encode())
    catalog = server.catalog
    assert server.catalog is catalog


@requirement("R11.4")
def test_of_two_versions_a_name_is_the_higher(folder, plain):
    lora.save(made("docs", version="1.10.0"), folder / "a.lora.arrow")
    told = json.loads(plain.get_flight_info(flight.FlightDescriptor.for_path("docs")).app_metadata)
    assert told["version"] == "1.10.0"
    assert names(plain) == ["docs", "docs", "law"]


@requirement("R14.1")
def test_a_signature_beside_a_card_is_served_and_one_of_another_card_is_not(
    tmp_path, folder, server, plain, caplog
):
    public = generate_key(tmp_path / "me.pem")
    sign_file(folder / "docs.lora.arrow", tmp_path / "me.pem")
    told = manifest_from_json(
        plain.get_flight_info(flight.FlightDescriptor.for_path("docs")).app_metadata
    )
    check_signature(told, Policy(frozenset({public})))
    (folder / "docs.lora.arrow.sig.json").rename(folder / "law.lora.arrow.sig.json")
    told = manifest_from_json(
        plain.get_flight_info(flight.FlightDescriptor.for_path("law")).app_metadata
    )
    assert told.signature is None
    assert "another card" in caplog.text
    (folder / "law.lora.arrow.sig.json").write_bytes(b"{")
    assert names(plain) == ["docs", "law"]


@requirement("R11.6")
def test_without_the_token_nothing_is_told(folder):
    with (
        LoRAFlightServer(folder, credentials=Credentials("secret")) as server,
        flight.connect(server.uri) as client,
    ):
        for headers in ([], [(b"authorization", b"Bearer other")], [(b"authorization", b"secret")]):
            options = flight.FlightCallOptions(headers=headers)
            for call in (client.list_flights, lambda options: client.do_action("health", options)):
                with pytest.raises(
                    flight.FlightUnauthenticatedError, match="unauthenticated"
                ) as caught:
                    list(call(options=options))
                assert "secret" not in str(caught.value)
        options = flight.FlightCallOptions(headers=[(b"authorization", b"Bearer secret")])
        assert len(list(client.list_flights(options=options))) == 2


@requirement("R11.6")
def test_a_token_travels_in_clear_on_loopback_alone_unless_the_caller_insists(folder):
    with pytest.raises(ArgumentError, match=r"TLS beyond loopback.*insecure_token=True"):
        LoRAFlightServer(folder, "grpc://0.0.0.0:0", credentials=Credentials("secret"))
    with LoRAFlightServer(
        folder, "grpc://0.0.0.0:0", credentials=Credentials("secret", insecure_token=True)
    ) as server:
        assert server.port
    assert not check_location("grpc://[::1]:5", Credentials("secret"))
    assert check_location("grpc+tls://cards.example:443", Credentials("secret"))
    assert "secret" not in repr(Credentials("secret", b"secret", b"secret"))
    assert [
        is_loopback(host) for host in ("localhost", "127.9.9.9", "::1", "10.0.0.1", "example.org")
    ] == [
        True,
        True,
        True,
        False,
        False,
    ]


@requirement("R11.6")
def test_mutual_tls_lets_in_only_the_authoritys_clients(folder):
    mine, other = Authority(), Authority()
    good = mine.credentials()
    bad = {
        "no certificate": Credentials(ca=mine.pem),
        "of another authority": other.credentials(ca=mine.pem),
        "expired": mine.credentials(days=(-9, -1)),
        "not yet valid": mine.credentials(days=(1, 9)),
        "trusts another authority": mine.credentials(ca=other.pem),
    }
    with LoRAFlightServer(folder, "grpc+tls://localhost:0", credentials=good) as server:

        def listed(c):
            options = flight.FlightCallOptions(timeout=5)
            with flight.connect(
                server.uri, tls_root_certs=c.ca, cert_chain=c.certificate, private_key=c.key
            ) as client:
                return len(list(client.list_flights(options=options)))

        assert listed(mine.credentials()) == 2
        for credentials in bad.values():
            with pytest.raises((flight.FlightUnavailableError, flight.FlightTimedOutError)):
                listed(credentials)
        assert listed(mine.credentials()) == 2


@requirement("R11.6", "R7.8")
@pytest.mark.parametrize(
    ("location", "credentials"),
    [
        ("http://x:1", {}),
        ("grpc://", {}),
        ("grpc://127.0.0.1:99999", {}),
        ("grpc+tls://127.0.0.1:0", {}),
        ("grpc://127.0.0.1:0", {"certificate": b"c", "key": b"k"}),
        ("grpc://127.0.0.1:0", {"ca": b"c"}),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder, location, credentials):
    with pytest.raises(ArgumentError):
        LoRAFlightServer(folder, location, credentials=Credentials(**credentials))


@requirement("R7.8")
def test_no_folder_and_a_taken_port_are_named(tmp_path, server, capfd):
    with pytest.raises(CardNotFoundError, match="nowhere"):
        LoRAFlightServer(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="an address that is free"):
        LoRAFlightServer(tmp_path, server.uri)
    capfd.readouterr()  # gRPC says so too
    for token in ("", "é", "a\nb"):
        with pytest.raises(ArgumentError, match="token"):
            Credentials(token)
    with pytest.raises(ArgumentError, match="certificate and key"):
        Credentials(certificate=b"c")


@requirement("R11.7")
def test_a_failure_inside_is_told_as_nothing_but_that(folder, server, plain, monkeypatch, caplog):
    sha = lora.digest(folder / "docs.lora.arrow")
    monkeypatch.setattr("lora.federation.server.file_pieces", lambda *_: (1 / 0 for _ in "x"))
    monkeypatch.setattr("lora.federation.server.table_pieces", lambda card: (1 / 0 for _ in "x"))
    for call in (
        lambda: action(plain, "card", sha.encode()),
        lambda: plain.do_get(flight.Ticket(sha)).read_all(),
    ):
        with pytest.raises(flight.FlightInternalError, match=r"^internal error") as caught:
            call()
        assert "division" not in str(caught.value)
    monkeypatch.setattr("lora.federation.server.scan", lambda *_: 1 / 0)
    with pytest.raises(flight.FlightInternalError, match=r"^internal error"):
        names(plain)
    assert "ZeroDivisionError" in caplog.text


@requirement("R11.7", "R11.8")
def test_a_request_of_200_mb_is_refused_and_the_server_lives(server, plain):
    huge = b"x" * 200_000_000
    with pytest.raises(flight.FlightServerError, match="bad request"):
        plain.do_get(flight.Ticket(huge)).read_all()
    with pytest.raises(flight.FlightServerError, match="bad request"):
        action(plain, "card", huge)
    assert names(plain) == ["docs", "law"]


def slowly(stream):
    for result in stream:
        time.sleep(0.1)
        yield result


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
def test_of_a_hundred_stalled_readers_some_are_refused_and_the_rest_cut_off_while_others_are_served(
    folder,
):
    sha = saved(made("big", size=500_000, rank=8), folder)
    readers, refused = [], 0
    with (
        LoRAFlightServer(folder, limits=Limits(streams=40)) as server,
        flight.connect(server.uri) as client,
    ):
        for _ in range(100):
            try:
                readers.append(stalled(server.uri, sha))
            except flight.FlightUnavailableError as error:
                refused += "busy" in str(error)
        assert refused > 30
        assert names(client) == ["big", "docs", "law"]
        server._streams.limits = Limits(streams=40, stall=0.5)
        end = time.monotonic() + 20
        while (
            streams := json.loads(action(client, "health")[0])["streams"]
        ) and time.monotonic() < end:
            assert streams <= 40
            time.sleep(0.1)
        assert streams == 0
        assert (
            sum(map(len, action(client, "card", sha.encode())))
            == (folder / "big.lora.arrow").stat().st_size
        )
        cut = server.metrics.snapshot()["streams_cut"]
        assert cut > 10
    ended = 0
    for reader, stream in readers:
        try:
            list(stream)
        except (flight.FlightUnavailableError, flight.FlightCancelledError):
            ended += 1
        reader.close()
    assert ended > 10


@requirement("R11.8")
def test_a_stream_that_never_ends_is_cut_off_and_shutdown_does_not_wait(folder):
    sha = saved(
        made("big", size=2_000_000, rank=8), folder
    )  # more than gRPC takes ahead of a slow reader
    with LoRAFlightServer(folder, limits=Limits(duration=0.5)) as server:
        client, stream = stalled(server.uri, sha)
        with pytest.raises((flight.FlightUnavailableError, flight.FlightCancelledError)):
            list(slowly(stream))
        client.close()
    server = LoRAFlightServer(folder)
    readers = [stalled(server.uri, sha) for _ in range(5)]
    start = time.monotonic()
    server.shutdown()
    assert time.monotonic() - start < 5
    for client, _ in readers:
        client.close()


@requirement("R11.8")
def test_only_the_connection_that_is_meant_is_shut_down(server):
    with (
        Line(server.port) as line,
        flight.connect(line.uri) as near,
        flight.connect(server.uri) as other,
    ):
        names(near)
        names(other)
        mine = line.pairs[0][1].getsockname()[1]
        assert shut_down(server.port, f"ipv4:127.0.0.1:{mine}") == 1
        assert shut_down(server.port + 1, f"ipv4:127.0.0.1:{mine}") == 0
        assert names(other) == ["docs", "law"]
    assert shut_down(server.port, "unix:/tmp/x") == shut_down(server.port, "ipv6:%5B::1%5D:1") == 0


@requirement("R11.3", "R11.8")
def test_file_descriptors_and_threads_come_back(folder):
    sha = saved(made("big", size=200_000, rank=8), folder)
    before = len(list(Path("/dev/fd").iterdir())), threading.active_count()
    for _ in range(3):
        with LoRAFlightServer(folder) as server, flight.connect(server.uri) as client:
            action(client, "card", sha.encode())
            client.do_get(flight.Ticket(sha)).read_all()
    time.sleep(0.5)
    assert len(list(Path("/dev/fd").iterdir())) <= before[0] + 8  # gRPC's own
    assert threading.active_count() <= before[1] + 1


@requirement("R14.1")
def test_the_authors_key_is_the_one_that_signs(tmp_path):
    assert len(public_key(AUTHOR)) == 64
