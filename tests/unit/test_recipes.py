"""What others build on this library as the documentation tells it: an endpoint, a notebook."""

import asyncio
import importlib.util
import io
import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from peft import PeftModel
from sentence_transformers import SentenceTransformer

import lora
from docs import outputs
from lora.interop.peft import export_peft
from lora.testing.plugin import requirement
from tests.unit.test_docs import ROOT, blocks_of, execute, skill

PAGE = ROOT / "docs/how-to/openai-embeddings.md"
TEXTS = ["open a file", "boil pasta", ""]


@contextmanager
def small_server(folder):
    """The least of an ASGI server: one message in, a start and a body out."""
    place = importlib.util.spec_from_file_location("embeddings", folder / "embeddings.py")
    place.loader.exec_module(module := importlib.util.module_from_spec(place))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            halves = [{"body": body[:9], "more_body": True}, {"body": body[9:]}]

            async def receive():
                return {"type": "http.request", **halves.pop(0)}

            async def send(message):
                if message["type"] == "http.response.start":
                    self.send_response(message["status"])
                    for header in message["headers"]:
                        self.send_header(*map(bytes.decode, header))
                    self.send_header("connection", "close")
                    self.end_headers()
                else:
                    self.wfile.write(message["body"])

            scope = {"type": "http", "method": "POST", "path": self.path}
            asyncio.run(module.app(scope, receive, send))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def uvicorn(folder):
    """The command of the page, on a free port."""
    options = ["embeddings:app", "--port", "0", "--app-dir", folder]
    command = [sys.executable, "-m", "uvicorn", *options]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            yield next(filter(None, (re.search(r"127\.0\.0\.1:(\d+)", line) for line in lines)))[1]
        finally:
            process.terminate()


@pytest.fixture(params=[small_server, pytest.param(uvicorn, marks=pytest.mark.foreign)])
def port(request, tmp_path, monkeypatch):
    """The page's server with the cards of its example."""
    (app,) = [block for block in blocks_of(PAGE) if block.info == "{.python .app}"]
    (tmp_path / "embeddings.py").write_text(app.text, "utf-8")
    (tmp_path / "cards").mkdir()
    lora.save(skill("docs", 1), tmp_path / "cards/docs.lora.arrow")
    monkeypatch.chdir(tmp_path)
    with request.param(tmp_path) as number:
        yield number


@pytest.fixture
def client(port):
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


@requirement("R10.7", "R10.11")
def test_the_client_of_the_page_prints_what_the_page_says(port):
    (block,) = [block for block in blocks_of(PAGE) if block.info == "{.python .client}"]
    with redirect_stdout(io.StringIO()) as printed:
        execute(block._replace(text=block.text.replace("8000", f"{port}")))
    outputs.compare(PAGE, block.text, printed.getvalue())


@requirement("R10.7")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}])  # it asks for base64 itself
def test_openais_client_is_given_what_the_two_peers_compute(client, model_folder, tmp_path, form):
    peer = SentenceTransformer(str(model_folder), device="cpu")
    expected = {"all-MiniLM-L6-v2": peer.encode(TEXTS)}
    export_peft(skill("docs", 1), tmp_path / "peft")
    peer[0].auto_model = PeftModel.from_pretrained(peer[0].auto_model, tmp_path / "peft").eval()
    expected["docs"] = peer.encode(TEXTS)
    assert np.abs(expected["docs"] - expected["all-MiniLM-L6-v2"]).max() > 1e-3
    for model, rows in expected.items():
        reply = client.embeddings.create(model=model, input=TEXTS, **form)
        assert [row.index for row in reply.data] == [0, 1, 2]
        assert np.allclose([row.embedding for row in reply.data], rows, atol=1e-5)
    lora.save(skill("law", 2), tmp_path / "cards/law.lora.arrow")  # while it serves
    assert client.embeddings.create(model="law", input="a contract").usage.prompt_tokens == 4


@requirement("R10.7")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"dimensions": 8}, "'dimensions'"), ({"input": [1, 2]}, "a sequence of str")],
)
def test_what_the_endpoint_has_not_is_refused_by_name(client, wrong, words):
    with pytest.raises(BadRequestError, match=words):
        client.embeddings.create(**{"model": "docs", "input": "a"} | wrong)


@requirement("R10.7", "R10.10")
def test_the_notebook_goes_from_peft_folders_to_a_card_that_is_routed_to(tmp_path, monkeypatch):
    text = (ROOT / "docs/examples/peft-to-routed.ipynb").read_text("utf-8")
    assert not re.search(r"/(root|work|home|tmp)/", text)
    assert "(examples/peft-to-routed.ipynb)" in (ROOT / "docs/tutorial.md").read_text("utf-8")
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)  # noqa: S102
    mrr, (ours, theirs, neither) = names["mrr"], names["routes"].values()
    for task in ("architect", "reviewer"):  # the merged card has both skills
        assert mrr["both"][task] > mrr["base"][task] + 0.05
    assert (ours, theirs, neither) == (["architect"], ["reviewer"], [])
    assert names["merged"].rank == 16
    names = {"both.lora.arrow", "peft-architect", "peft-reviewer", "peft-both"}
    assert {path.name for path in tmp_path.iterdir()} == names
