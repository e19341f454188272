"""A verified fetch beside raw TCP, on loopback.

    OMP_NUM_THREADS=2 python benchmarks/fetching.py [--quick] [--json FILE]

The fetch receives a card of 50 MB over Flight, hashes it, writes it, and checks its structure and
values; raw TCP is ``sendall`` of the same bytes from one process to another, which throws them
away.
"""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pairs import Row, figure_row, median_with_interval, ratio_row, reported_seconds, run, timed

import lora
from lora.card import LoRACard, LowRank
from lora.federation.cache import CardCache
from lora.federation.client import LoRAFlightClient
from lora.federation.trust import Policy

ANY = Policy(allow_unsigned=True)

SERVER = """
import sys, threading
from lora.federation.server import LoRAFlightServer
with LoRAFlightServer(sys.argv[1], sys.argv[2]) as server:
    print(server.port, flush=True)
    threading.Event().wait()
"""


def card_of(megabytes: int, name: str = "big") -> LoRACard:
    """A card of rank 16 and 24 modules of about so many bytes."""
    rng = np.random.default_rng(0)
    modules, rank = 24, 16
    size = megabytes * 1_000_000 // (modules * 2 * rank * 4)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(size**-0.5)

    weights = {
        f"layer.{i}.query": LowRank(draw(size, rank), draw(rank, size)) for i in range(modules)
    }
    return LoRACard(name, rank, 16.0, ("query",), weights)


def server_of(folder: str, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    """A server in a process of its own, and its port."""
    command = [sys.executable, "-c", SERVER, folder, f"grpc://127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this interpreter
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    return process, int(process.stdout.readline())


def raw(data: bytes) -> float:
    """Seconds in which `sendall` brings the bytes from another process to this one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            try:
                with socket.create_connection(listener.getsockname()) as connection:
                    connection.recv(1)
                    connection.sendall(data)
            finally:
                os._exit(0)
        listener.settimeout(10)
        connection, _ = listener.accept()
        with connection:
            buffer = bytearray(2**20)
            start = time.perf_counter()
            connection.sendall(b"x")
            received = 0
            while count := connection.recv_into(buffer):
                received += count
            seconds = time.perf_counter() - start
        os.waitpid(child, 0)
        assert received == len(data)  # noqa: S101 - or it was no comparison
        return seconds


def fetching(*, quick: bool) -> Iterator[Row]:
    """A card of 50 MB by a client in a process of its own, and what its hash alone takes.

    The floor is what hash, TCP and gRPC take: the same pieces by the same thread are hashed, and
    neither written nor checked.
    """
    with tempfile.TemporaryDirectory() as folder:
        sha = lora.save(card_of(50), f"{folder}/big.lora.arrow")
        data = Path(f"{folder}/big.lora.arrow").read_bytes()
        server, port = server_of(folder)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        client = context.Process(target=_fetching, args=(there, port, sha), daemon=True)
        client.start()
        here.recv()

        def asked(what: str) -> float:
            here.send(what)
            return float(here.recv())

        sides = {
            "verified fetch": lambda: asked("fetch"),
            "received and hashed alone": lambda: asked("floor"),
            "raw TCP": lambda: raw(data),
            "SHA-256 alone": lambda: timed(lambda: hashlib.sha256(data)),
        }
        times = reported_seconds(sides, 5 if quick else 40)
        here.send("stop")
        client.join()
        server.kill()
    what = "fetch a card of 50 MB"
    middle, low, high = median_with_interval(times["verified fetch"])
    interval = [low * 1e3, high * 1e3]
    yield figure_row(
        "fetching", what, middle * 1e3, "ms", below=100, ids=["R6.8"], interval=interval
    )
    for side, beside, target in (
        ("verified fetch", "raw TCP", 2.5),
        ("verified fetch", "received and hashed alone", None),
        ("received and hashed alone", "raw TCP", None),
        ("verified fetch", "SHA-256 alone", None),
    ):
        yield ratio_row("fetching", what, times, side, beside, target=target, ids=["R6.8"])


def _fetching(pipe: Any, port: int, sha: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        LoRAFlightClient(f"grpc://127.0.0.1:{port}", cache := CardCache(folder), ANY) as client,
    ):
        client.fetch_skill(sha)
        (manifest,) = client.list_remote_skills()
        pipe.send("ready")
        while (asked := pipe.recv()) != "stop":
            if asked == "fetch":
                cache.path(sha).unlink()
            start = time.perf_counter()
            if asked == "fetch":
                client.fetch_skill(sha)
            else:
                digest = hashlib.sha256()
                for piece in client._pieces("floor", manifest):  # noqa: SLF001 - what `fetch` does
                    digest.update(piece)
            pipe.send(time.perf_counter() - start)


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All of it."""
    yield fetching(quick=quick)


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
