"""A verified fetch beside raw TCP, many clients at one server, and a soak with kills and partitions, on loopback.

    OMP_NUM_THREADS=1 python benchmarks/federation.py [--gigabytes 20] [--soak 600] [--quick] [--json FILE]

The fetch receives a card of 50 MB over Flight, hashes it, writes and flushes it, and checks its structure and values; raw
TCP is ``sendall`` of the same bytes from one process to another, which throws them away. Pairs are shuffled; what is
reported is the median of the pairs' ratios with its quartiles.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from pairs import Row, timed

import lora
from lora.card import LoRACard, LowRank
from lora.errors import LoRAError
from lora.federation.client import LoRAFlightClient
from lora.federation.node import Node
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

    weights = {f"layer.{i}.query": LowRank(draw(size, rank), draw(rank, size)) for i in range(modules)}
    return LoRACard(name, rank, 16.0, ("query",), weights)


def server_of(folder: str, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    """A server in a process of its own, and its port."""
    command = [sys.executable, "-c", SERVER, folder, f"grpc://127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this interpreter
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    return process, int(process.stdout.readline())


def anonymous(pid: int) -> int:
    """Bytes of a process's own memory, without files that it maps."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def raw(data: bytes) -> float:
    """Seconds in which `sendall` brings the bytes from another process to this one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            with socket.create_connection(listener.getsockname()) as connection:
                connection.recv(1)
                connection.sendall(data)
            os._exit(0)
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


def beside_tcp(rounds: int) -> Row:
    """A verified fetch of 50 MB in a process of its own, beside raw TCP."""
    with tempfile.TemporaryDirectory() as folder:
        sha = lora.save(card_of(50), f"{folder}/big.lora.arrow")
        data = Path(f"{folder}/big.lora.arrow").read_bytes()
        server, port = server_of(folder)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        client = context.Process(target=_fetching, args=(there, port, sha))
        client.start()
        here.recv()
        times: dict[str, list[float]] = {"fetch": [], "raw": []}
        shuffled = random.Random(0)  # noqa: S311 - an order, not a secret
        for _ in range(rounds):
            for side in shuffled.sample(["fetch", "raw"], 2):
                if side == "raw":
                    times[side].append(raw(data))
                else:
                    here.send("go")
                    times[side].append(here.recv())
        here.send("stop")
        client.join()
        server.kill()
    ratios = [b / a for a, b in zip(times["fetch"], times["raw"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "what": "verified fetch of 50 MB; raw TCP",
        "fetch_ms": statistics.median(times["fetch"]) * 1e3,
        "raw_ms": statistics.median(times["raw"]) * 1e3,
        "sha256_ms": 1e3 * min(timed(lambda: hashlib.sha256(data)) for _ in range(3)),
        "of_raw": middle,
        "quartiles": [low, high],
        "target": ">= 0.6, < 100 ms",
    }


def _fetching(pipe: Any, port: int, sha: str) -> None:
    with tempfile.TemporaryDirectory() as cache, LoRAFlightClient(f"grpc://127.0.0.1:{port}", cache, ANY) as client:
        client.fetch_skill(sha)
        pipe.send("ready")
        while pipe.recv() == "go":
            client.cache.evict(0)
            start = time.perf_counter()
            client.fetch_skill(sha)
            pipe.send(time.perf_counter() - start)


def _reading(port: int, sha: str, gate: Any, count: int, told: Any) -> None:
    """Receive and hash the card so many times; nothing is written, so that the server is what is measured."""
    from pyarrow import flight  # noqa: PLC0415 - in the child

    client, bad, size = flight.connect(f"grpc://127.0.0.1:{port}"), 0, 0
    gate.wait()
    start = time.perf_counter()
    for _ in range(count):
        found = hashlib.sha256()
        for result in client.do_action(flight.Action("card", sha.encode())):
            found.update(result.body)
            size += result.body.size
        bad += found.hexdigest() != sha
    told.put((size, time.perf_counter() - start, bad))


def many(gigabytes: float, clients: int = 32) -> list[Row]:
    """One client, then many, at one server."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        sha = lora.save(card_of(50), f"{folder}/big.lora.arrow")
        server, port = server_of(folder)
        context = multiprocessing.get_context("spawn")
        before, peak, watching = anonymous(server.pid), [0], threading.Event()

        def watch() -> None:
            while not watching.wait(0.05):
                peak[0] = max(peak[0], anonymous(server.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        for number in (1, clients):
            count = max(1, round(gigabytes * 1e9 / 50e6 / clients))
            gate, told = context.Barrier(number + 1), context.Queue()
            args = (port, sha, gate, count, told)
            processes = [context.Process(target=_reading, args=args) for _ in range(number)]
            for process in processes:
                process.start()
            gate.wait()
            start = time.perf_counter()
            found = [told.get() for _ in processes]
            seconds = time.perf_counter() - start
            for process in processes:
                process.join()
            rates = [size / taken for size, taken, _ in found]
            total = sum(size for size, _, _ in found)
            rows.append(
                {
                    "what": f"{number} clients at one server",
                    "gigabytes": total / 1e9,
                    "GB_per_s": total / seconds / 1e9,
                    "bad_digests": sum(bad for _, _, bad in found),
                    "slowest_of_fastest": min(rates) / max(rates),
                    "server_growth_MB": (peak[0] - before) / 1e6,
                }
            )
        watching.set()
        watcher.join()
        server.kill()
    rows[1]["of_one_client"] = rows[1]["GB_per_s"] / rows[0]["GB_per_s"]
    rows[1]["target"] = "0 bad, growth < 64 MB, >= 0.7 of one client, slowest >= 0.5 of fastest"
    return rows


def soak(seconds: float) -> Row:
    """A node that fetches all the time, while its two peers are killed, stopped and started again at random."""
    rng = random.Random(0)  # noqa: S311 - a script, not a secret
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        lora.save(card_of(8), f"{folder}/big.lora.arrow")
        servers = [server_of(folder) for _ in range(2)]
        uris = [f"grpc://127.0.0.1:{port}" for _, port in servers]
        counts = {"fetched": 0, "failed": 0, "kills": 0, "partitions": 0}
        levels: list[tuple[int, int]] = []
        with Node(cache, peers=uris, policy=ANY, interfaces=(), interval=0.5, timeout=2) as node:
            end, next_event = time.monotonic() + seconds, time.monotonic() + 2
            while time.monotonic() < end:
                try:
                    node.sync()
                    node.fetch("big")
                    counts["fetched"] += 1
                except LoRAError:
                    counts["failed"] += 1
                    time.sleep(0.05)
                node.cache.evict(0)
                time.sleep(0.05)
                levels.append((len(list(Path("/dev/fd").iterdir())), threading.active_count()))
                if time.monotonic() > next_event:
                    next_event = time.monotonic() + 3
                    which = rng.randrange(2)
                    process, port = servers[which]
                    if rng.random() < 0.5:
                        process.kill()
                        process.wait()
                        servers[which] = server_of(folder, port)
                        counts["kills"] += 1
                    else:  # it is there and says nothing, as behind a line that is cut
                        process.send_signal(signal.SIGSTOP)
                        threading.Timer(2.5, process.send_signal, [signal.SIGCONT]).start()
                        counts["partitions"] += 1
        for process, _ in servers:
            process.kill()
    half = len(levels) // 2
    first, last = levels[: half or 1], levels[half:]
    return {
        "what": f"soak of {seconds:g} s",
        **counts,
        "descriptors_max": [max(fd for fd, _ in part) for part in (first, last)],
        "threads_max": [max(threads for _, threads in part) for part in (first, last)],
        "target": "descriptors and threads flat",
    }


def main() -> None:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=20, help="0 for the soak alone")
    parser.add_argument("--soak", type=float, default=600)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [beside_tcp(8 if options.quick else 40)] if options.gigabytes else []
    rows += many(1.6 if options.quick else options.gigabytes) if options.gigabytes else []
    print(*rows, sep="\n", flush=True)
    rows.append(soak(15 if options.quick else options.soak))
    print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
