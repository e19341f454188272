"""Many clients at one server, and a soak with kills and partitions, on loopback.

OMP_NUM_THREADS=1 python benchmarks/federation.py [--gigabytes 20] [--soak 600] [--quick] [--json
FILE]

What one verified fetch takes is in ``fetching.py``. These two take as long as they are told to.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fetching import ANY, card_of, server_of
from pairs import Row

import lora
from lora.errors import LoRAError
from lora.federation.node import Node


def anonymous(pid: int) -> int:
    """Bytes of a process's own memory, without files that it maps."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def _reading(port: int, sha: str, gate: Any, count: int, told: Any) -> None:
    """Receive and hash the card so many times; nothing is written, so that the server is what is
    measured.
    """
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
    """A node that fetches all the time, while its two peers are killed, stopped and started again
    at random.
    """
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
    rows = many(1.6 if options.quick else options.gigabytes) if options.gigabytes else []
    print(*rows, sep="\n", flush=True)
    rows.append(soak(15 if options.quick else options.soak))
    print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
