"""hf:org/name on a server that answers as the Hub does, and what is never asked there."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from lora.card import LoRACard, LowRank
from lora.errors import CardNotFoundError
from lora.files import load
from lora.interop.peft import export_peft
from lora.interop.weights import SafetensorsWeights
from lora.models.any_encoder import open_encoder
from lora.models.checkpoint import fold_checkpoint
from lora.testing.plugin import requirement

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_not_to_be_shown"  # noqa: S105 - no real one

PAIR = LowRank(np.ones((4, 1), np.float32), np.ones((1, 3), np.float32))
CARD = LoRACard("law", 1, 2.0, ["q"], {"layer.0.q": PAIR})


class Hub(BaseHTTPRequestHandler):
    """One repository, org/law, of which the revisions main and v1 are one commit."""

    def do_GET(self):
        self.server.requests.append(self.path.partition("?")[0])
        files, parts = self.server.files, self.path.partition("?")[0].strip("/").split("/")
        body, status, headers = b"{}", 404, {"X-Error-Code": "RepoNotFound"}
        if parts[:4] == ["api", "models", "org", "law"]:
            if parts[4] == "revision" and parts[5] not in ("main", "v1"):
                headers = {"X-Error-Code": "RevisionNotFound"}
            elif parts[4] == "revision":
                body, status = json.dumps({"id": "org/law", "sha": COMMIT}).encode(), 200
            elif parts[4:6] == ["tree", COMMIT]:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": f"{index:040}"}
                    for index, (name, data) in enumerate(files.items())
                ]
                body, status = json.dumps(tree).encode(), 200
        elif parts[:4] == ["org", "law", "resolve", COMMIT]:
            body, status = files[parts[4]], 200
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{[*files].index(parts[4]):040}"'}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the standard library's name

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """The server, and a command line whose Hub it is."""
    export_peft(CARD, tmp_path / "law")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "law").iterdir()}
    server.files |= {"adapter_model.bin": b"a pickle", "README.md": b"# Law"}
    server.requests = []
    Thread(target=server.serve_forever).start()

    def run(source, out="out.lora.arrow", **environment):
        server.requests.clear()
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": SECRET,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        ended = subprocess.run(
            [sys.executable, "-m", "lora.cli", "convert", source, "-o", tmp_path / out],
            env={**os.environ, **settings, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert SECRET not in ended.stdout + ended.stderr
        return ended.returncode, ended.stderr, list(server.requests)

    yield run
    server.shutdown()
    server.server_close()


@requirement("R26.8")
def test_an_adapter_of_the_hub_is_converted_from_the_files_that_are_read_and_from_the_cache(
    hub, tmp_path
):
    status, problem, requests = hub("hf:org/law")
    assert status == 0, problem
    card = load(tmp_path / "out.lora.arrow")
    assert (card.name, card.weights) == ("law", CARD.weights)
    names = {path.rpartition("/")[2] for path in requests if "resolve" in path}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    status, _, requests = hub("hf:org/law@v1", "again.lora.arrow")
    assert (status, load(tmp_path / "again.lora.arrow").weights) == (0, CARD.weights)
    assert [path for path in requests if "org/law" in path] == ["/api/models/org/law/revision/v1"]
    assert hub("hf:org/law", HF_HUB_OFFLINE="1")[::2] == (0, [])


@requirement("R26.8")
@pytest.mark.parametrize(
    ("source", "offline", "says"),
    [
        ("hf:org/other", "0", "RepositoryNotFoundError"),
        ("hf:org/law@v9", "0", "RevisionNotFoundError"),
        ("hf:a/b/c", "0", "expected hf:org/name or hf:org/name@revision, found 'a/b/c'"),
        ("hf:hf:org/law", "0", "found 'hf:org/law'; of a folder in it: hf download org/name"),
        ("hf:org/law", "1", "LocalEntryNotFoundError"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub, source, offline, says):
    status, problem, _ = hub(source, HF_HUB_OFFLINE=offline)
    assert status == 1
    assert problem.startswith(f"lora: {source}: ")
    assert says in problem
    assert problem.count("\n") == 1


@requirement("R26.8")
@pytest.mark.parametrize(
    "source", ["org/law", "HF:org/law", "law.lora.arrow", "org/law.safetensors", "nowhere"]
)
def test_a_path_that_does_not_exist_is_never_a_request(hub, source):
    status, problem, requests = hub(source)
    assert (status, requests) == (1, [])
    assert source in problem
    assert ("hf:org/law" in problem) is source.endswith("org/law")
    assert "hf:HF:" not in problem


@requirement("R26.8", "R7.8")
@pytest.mark.parametrize(
    "read",
    [open_encoder, SafetensorsWeights, lambda folder: fold_checkpoint(folder, CARD, "merged")],
)
def test_a_model_on_the_hub_is_to_be_downloaded_first(read):
    with pytest.raises(CardNotFoundError, match="hf download org/law prints its folder"):
        read("hf:org/law")
