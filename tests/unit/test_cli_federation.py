"""The commands of a federation: one process serves, others list and fetch."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

import lora
from lora.evolution import SkillFactory
from lora.testing.plugin import requirement
from tests.unit.hostile import Authority, Liar, announced, made, saved
from tests.unit.test_cli import shell, watched


def ran(*argv, code=0, **options):
    """What a command prints, by its exit code; an error is one line."""
    done = shell(*argv, **options)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stdout == ""
        assert len([line for line in done.stderr.splitlines() if line.startswith("lora:")]) == 1
        assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1] if code else done.stdout


class Serving:
    """`lora serve` while the block runs."""

    def __init__(self, *argv):
        command = [sys.executable, "-m", "lora.cli", "serve", *map(str, argv)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def __enter__(self):
        self.line = self.process.stdout.readline().strip()
        self.uri = self.line.split()[-1] if self.line else ""
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.output = self.process.communicate(timeout=20)


LOCAL = ("--host", "127.0.0.1", "--port", 0, "--no-announce", "--metrics-port", 0)


@requirement("R25.3")
@pytest.mark.parametrize("pin", ["3b7e", "", "A" * 64])
def test_a_pin_that_is_no_digest_is_refused_by_name_before_a_peer_is_asked(here, pin):
    code, out, err = here("fetch", "docs", "--peer", "127.0.0.1:1", "--pin", pin)
    expected = "expected a SHA-256 as 64 lower-case hex digits"
    hint = "lora list shows the digests"
    assert (code, out, err) == (2, "", f"lora: --pin: {expected}, found {pin!r}; {hint}\n")


@pytest.fixture
def cards(tmp_path):
    path = tmp_path / "cards"
    path.mkdir()
    saved(made("docs", description="Python documentation", version="1.0.0"), path)
    return path


@requirement("R25.2", "R11.1", "R12.1", "R12.2", "R12.9", "R14.1", "R14.2", "R5.16")
def test_one_signs_and_serves_another_lists_and_fetches(cards, tmp_path):
    key, cache = tmp_path / "me.pem", tmp_path / "cache"
    public = json.loads(ran("keygen", key, "--json"))["public_key"]
    ran("sign", cards / "docs.lora.arrow", "--key", key)
    sha = lora.digest(cards / "docs.lora.arrow")
    with Serving(cards, *LOCAL) as server:
        assert server.line.startswith("serving 1 card at grpc://127.0.0.1:")
        assert server.process.stdout.readline().startswith("metrics at http://127.0.0.1:")
        (row,) = json.loads(ran("list", "--peer", server.uri, "--json"))
        assert (row["name"], row["digest"], row["signer"]) == ("docs", sha, public)
        assert "docs" in ran("list", "--peer", "127.0.0.1:1", "--peer", server.uri)
        (peer,) = json.loads(ran("list", "--peers", "--peer", server.uri, "--json"))
        assert peer["peer"] == server.uri
        fetch = ["fetch", "docs", "--peer", server.uri, "--cache", cache]
        assert "--trust that key, or --allow unknown_signers" in ran(*fetch, code=1)
        assert "64 lower-case" in ran(*fetch, "--pin", "x", code=2)
        allowed = ("--allow", "unsigned", "--allow", "everything")
        assert "one of unsigned" in ran(*fetch, *allowed, code=2)
        assert "other" in ran(*fetch, "--trust", f"{key}.pub", "--base-model", "other", code=1)
        both = ("--base-model", "other", "--allow", "unknown_signers", "--allow", "other_base")
        assert "docs" in ran(*fetch, *both, "--cache", tmp_path / "waived")
        assert not list(cache.glob("*.arrow"))
        out = tmp_path / "out.lora.arrow"
        other = tmp_path / "other.pem"
        ran("keygen", other)
        trusted = ("--trust", f"{other}.pub", "--trust", f"{key}.pub")
        done = shell(*fetch, *trusted, "-o", out, "--json")
        size = (cards / "docs.lora.arrow").stat().st_size
        assert json.loads(done.stdout) == {"name": "docs", "digest": sha, "file": str(out)}
        assert f"{size}/{size}" in done.stderr  # the bar of progress
        assert lora.digest(out) == sha
        assert ran(*fetch, "--pin", sha).startswith(f"{cache / sha}.lora.arrow: card docs")
        assert "one of 1" in ran("fetch", "law", "--peer", server.uri, "--cache", cache, code=1)
    assert server.process.returncode == 0
    assert server.output[1] == ""
    assert "Connection refused" in ran("list", "--peer", server.uri, "--wait", "0.5", code=1)


@requirement("R25.2", "R11.6")
def test_token_certificates_and_metrics_are_options(cards, tmp_path):
    authority = Authority()
    shown = authority.credentials()
    files = {"--cert": shown.certificate, "--key": shown.key, "--ca": authority.pem}
    options = []
    for option, data in {**files, "--token-file": b"secret\n"}.items():
        (tmp_path / option).write_bytes(data)
        options += [option, tmp_path / option]
    with Serving(cards, "--host", "localhost", "--port", 0, "--no-announce", *options) as server:
        assert server.uri.startswith("grpc+tls://localhost:")
        listing = ["list", "--peer", server.uri]
        assert len(json.loads(ran(*listing, *options, "--json"))) == 1
        # Without the token, the hint is in the words of the command line.
        assert "nauthenticated" in ran(*listing, *options[:-2], "--wait", "1", code=1)
        name = ["list", "--peer", server.uri.replace("localhost", "127.0.0.1")]
        assert "must name" in ran(*name, *options, "--wait", "1", code=1)
    with Serving(cards, *options[-2:]) as refused:
        assert refused.line == ""
    assert "TLS beyond loopback" in refused.output[1]
    assert "secret" not in refused.output[1]
    insecure = ("--port", 0, "--no-announce", *options[-2:], "--insecure-token")
    with Serving(cards, *insecure) as insisted:
        assert insisted.line.startswith("serving 1 card at grpc://0.0.0.0:")


@requirement("R25.2", "R11.1", "R5.16")
def test_a_server_says_as_json_where_it_and_its_metrics_are(cards):
    with Serving(cards, *LOCAL, "--json") as server:
        facts = json.loads(server.line)
        assert facts["cards"] == 1
        (row,) = json.loads(ran("list", "--peer", facts["uri"], "--json"))
        assert row["name"] == "docs"
        with urlopen(facts["metrics"]) as answer:  # noqa: S310 - on loopback
            assert b"lora_requests_do_action_total" in answer.read()
        healthz = facts["metrics"].replace("/metrics", "/healthz")
        with urlopen(healthz) as answer:  # noqa: S310 - as above
            assert json.loads(answer.read()) == {"status": "ok", "cards": 1, "streams": 0}
        shutil.rmtree(cards)
        with pytest.raises(HTTPError, match="503"):
            urlopen(healthz)  # noqa: S310 - as above


@requirement("R19.5", "R11.9", "R25.2")
def test_a_running_server_shows_what_is_live_in_a_factory_and_a_roll_back(cards, tmp_path):
    factory, job = SkillFactory(tmp_path / "factory"), ["merge", cards / "docs.lora.arrow"]

    def made():
        factory.add([*map(str, job), "--name", "docs"])
        factory.run()

    def listed(server):
        return [
            (row["name"], row["version"], row["digest"] == lora.digest(factory.live()["docs"]))
            for row in json.loads(ran("list", "--peer", server.uri, "--json"))
        ]

    made()
    with Serving("--live", factory.root, *LOCAL) as server:
        assert listed(server) == [("docs", "0.1.0", True)]
        job.append(str(cards / "docs.lora.arrow"))
        made()
        assert listed(server) == [("docs", "0.2.0", True)]
        ran("factory", "rollback", "docs", "--root", factory.root)
        assert listed(server) == [("docs", "0.1.0", True)]
    both = ["serve", cards, "--live", factory.root]
    assert "expected a folder or --live, found both" in ran(*both, code=2)
    assert "expected a folder or --live, found neither" in ran("serve", code=2)
    assert "nowhere" in ran("serve", "--live", "nowhere", code=1)


@requirement("R25.2", "R11.1", "R12.1", "R13.5")
def test_serving_and_listing_every_version_need_no_home(cards, tmp_path, monkeypatch):
    """As in a container with a file system that is read-only."""
    lora.save(made("docs", version="0.9.0"), cards / "old.lora.arrow")
    (tmp_path / "home").touch()
    env = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": ""}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with Serving(cards, *LOCAL) as server:
        assert server.line.startswith("serving 2 cards at grpc://127.0.0.1:")
        rows = json.loads(ran("list", "--peer", server.uri, "--json", env=env))
        assert sorted(row["version"] for row in rows) == ["0.9.0", "1.0.0"]
        fetch = ["fetch", "docs", "--peer", server.uri]
        assert str(tmp_path / "home") in ran(*fetch, env=env, code=1)


@requirement("R25.2", "R12.5", "R7.8")
def test_a_slow_line_is_given_the_time_that_the_options_say(tmp_path):
    manifest = announced(made("docs", size=20_000), tmp_path / "a")
    data, ended = (tmp_path / "a").read_bytes(), threading.Event()

    def slow():
        for at in range(0, len(data), 2**16):
            ended.wait(0.2)
            yield data[at : at + 2**16]

    def stalling():
        yield data[:100]
        ended.wait(20)

    with Liar([manifest], slow) as liar:
        fetch = ["fetch", "docs", "--peer", liar.uri, "--allow", "unsigned", "--cache", tmp_path]
        hasty = ["--timeout", "0.3", "--min-rate", 1e7]
        assert "--timeout and --min-rate" in ran(*fetch, *hasty, code=1)
        assert "docs" in ran(*fetch, "--timeout", "0.3", "--min-rate", 1e5)
        liar.data = stalling
        (tmp_path / f"{manifest.digest}.lora.arrow").unlink()
        stalled = ran(*fetch, "--stall", "0.5", code=1)
        assert "some bytes in 0.5 s" in stalled
        assert "--stall says" in stalled
        ended.set()


@requirement("R13.1", "R25.2")
@pytest.mark.parametrize(("option", "interfaces"), [((), None), (("--no-announce",), ())])
def test_a_server_announces_itself_unless_told_not_to(here, cards, monkeypatch, option, interfaces):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    calls = watched(monkeypatch, "lora.federation.node.Node")
    here("serve", cards, "--port", 8816, "--host", "192.0.2.7", *option)
    (((cache, folder), options),) = calls
    assert (cache, folder, options["interfaces"]) == (None, cards, interfaces)
    assert (options["host"], options["port"]) == ("192.0.2.7", 8816)


@requirement("R25.3", "R7.1")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "nowhere"], "nowhere"),
        (["keygen", "nowhere/me.pem"], "nowhere"),
        (["sign", "nowhere.lora.arrow", "--key", "x"], "nowhere"),
        (["list", "--peer", "127.0.0.1:1", "--wait", "0.3"], "127.0.0.1:1"),
        (["list", "--peer", "http://x"], "--peer: expected grpc://host:port"),
        (["fetch", "docs", "--peer", "127.0.0.1:1", "--trust", "nowhere.pem"], "nowhere.pem"),
    ],
)
def test_errors_are_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in ran(*argv, code=2 if "http://x" in argv else 1)
    assert list(tmp_path.iterdir()) == []
