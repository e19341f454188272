"""Write the documentation pages that are made from data: what the specification, the tests, the
code and a card say.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

import lora
from lora.models.adapt import linears
from lora.presets import cost_table

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "generated"
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import chapters  # noqa: E402 - beside this file, in no package
import command_pages  # noqa: E402 - as above
import diagrams  # noqa: E402 - as above
import field_table  # noqa: E402 - as above
import figures  # noqa: E402 - as above
import reference  # noqa: E402 - as above


def presets() -> str:
    """What each preset costs on the embedded encoder, and on a decoder of Llama 3.1 8B's shapes."""
    engine = lora.ArrowEngine.from_pretrained(None)
    encoder = {
        name: (site.in_features, site.out_features) for name, site in linears(engine.base).items()
    }
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    decoder = {
        f"model.layers.{i}.self_attn.{part}_proj": shape
        for i in range(32)
        for part, shape in shapes.items()
    }
    for i in range(32):
        decoder |= {f"model.layers.{i}.mlp.{part}_proj": (4096, 14336) for part in ("gate", "up")}
        decoder[f"model.layers.{i}.mlp.down_proj"] = (14336, 4096)
    table = cost_table({"all-MiniLM-L6-v2": encoder, "Llama 3.1 8B": decoder})
    source = "Derived from the models' real module names and shapes by `lora.presets.fit`."
    return f"# Presets\n\n{source}\n\n{table}\n"


def reference_pages(trace: chapters.Trace) -> dict[str, str]:
    """Every page of the reference by its file."""
    names = reference.names()
    pages = {"reference.md": reference.overview(names)}
    for title in reference.REFERENCE:
        pages[reference.page_of(title)] = reference.modules(title, names)
    for entry in names:
        path = f"{entry.home.removeprefix('lora.').replace('.', '/')}.py"
        held = [
            f"[{chapter[0].chapter}]({number}.md)"
            for number, chapter in trace.chapters().items()
            if path in trace.code.get(number, [])
        ]
        pages[f"{entry.path}.md"] = reference.page(entry, held)
    return pages


@dataclass(frozen=True)
class Span:
    """Some bytes of a file, and what they are."""

    start: int
    end: int
    meaning: str


def tiny() -> lora.LoRACard:
    """The card that is dumped: one module of 2 inputs and 3 outputs, rank 1."""
    pair = lora.LowRank(np.array([[1], [2]], np.float32), np.array([[3, 4, 5]], np.float32))
    return lora.LoRACard("tiny", 1, 2.0, ["proj"], {"proj": pair}, {"description": "A card"})


def spans(data: bytes) -> list[Span]:
    """The parts of a card file, without a gap; the positions of buffers are those that Arrow maps
    them from.
    """
    whole = pa.py_buffer(data)
    batch = pa.ipc.open_file(whole).get_batch(0)
    meanings: dict[int, tuple[int, str]] = {}  # start -> end and meaning
    for name, buffers in _buffers(batch).items():
        for kind, buffer in zip(_KINDS[name], buffers, strict=True):
            if buffer is not None and buffer.size:
                start = buffer.address - whole.address
                meanings[start] = start + buffer.size, f"{name}: {kind}"
    footer = len(data) - 10 - int.from_bytes(data[-10:-6], "little")
    schema, message = 8, 16 + int.from_bytes(data[12:16], "little")
    body = message + 8 + int.from_bytes(data[message + 4 : message + 8], "little")
    meanings |= {0: (6, "magic ARROW1"), 6: (8, "padding to 8 bytes")}
    for at, what in ((schema, "schema"), (message, "record batch")):
        meanings |= {
            at: (at + 4, "continuation marker"),
            at + 4: (at + 8, f"length of the {what} message that follows"),
        }
        meanings[at + 8] = (message if at == schema else body, f"the {what} message, a FlatBuffer")
    meanings |= {
        footer - 8: (footer, "end of stream: a continuation marker and length 0"),
        footer: (
            len(data) - 10,
            "the footer, a FlatBuffer: the schema again, and where the record batch lies",
        ),
        len(data) - 10: (len(data) - 6, "length of the footer"),
        len(data) - 6: (len(data), "magic ARROW1"),
    }
    parts = [Span(start, end, what) for start, (end, what) in sorted(meanings.items())]
    gaps = [
        Span(one.end, two.start, "padding to 8 bytes")
        for one, two in pairwise(parts)
        if one.end < two.start
    ]
    return sorted([*parts, *gaps], key=lambda span: span.start)


_KINDS = {
    "module": ("", "int32 offsets into the text", "the names, UTF-8"),
    "scaling": ("", "float64, alpha / rank"),
    "A.data": ("", "int32 offsets of the lists", "float32, row-major, (in, rank)"),
    "A.shape": ("int32, in and rank",),
    "B.data": ("", "int32 offsets of the lists", "float32, row-major, (rank, out)"),
    "B.shape": ("int32, rank and out",),
}


def _buffers(batch: pa.RecordBatch) -> dict[str, list[pa.Buffer | None]]:
    """The buffers of each column, those of a factor's data and shape apart."""
    buffers = {name: batch[name].buffers() for name in ("module", "scaling")}
    for name in ("A", "B"):
        column = getattr(batch[name], "storage", batch[name])
        data = column.field("data")
        buffers[f"{name}.data"] = [*data.buffers()[:2], data.values.buffers()[1]]
        buffers[f"{name}.shape"] = [column.field("shape").values.buffers()[1]]
    return buffers


def entries(data: bytes, span: Span) -> list[Span]:
    """The key and value texts in a FlatBuffer: each has its length before it and a zero byte behind
    it.
    """
    schema = pa.ipc.open_file(pa.py_buffer(data)).schema
    texts = [text for pair in schema.metadata.items() for text in pair] + [
        name.encode() for name in schema.names
    ]
    places = []
    for text in texts:
        stored = len(text).to_bytes(4, "little") + text + b"\0"
        at = data.index(stored, span.start, span.end)
        places.append(Span(at, at + len(stored), text.decode()))
    return sorted(places, key=lambda entry: entry.start)


def dumped(data: bytes, start: int, end: int) -> list[str]:
    """Lines of 8 bytes: offset, hexadecimal, text."""
    lines = []
    for at in range(start, end, 8):
        row = data[at : min(at + 8, end)]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:04x}  {row.hex(' '):23}  {text}")
    return lines


def hexdump() -> str:
    """A card file byte for byte, each part with what it is."""
    with tempfile.TemporaryDirectory() as folder:
        digest = lora.save(tiny(), f"{folder}/tiny.lora.arrow")
        data = Path(f"{folder}/tiny.lora.arrow").read_bytes()
    lines = [
        "# A card file, byte by byte",
        "",
        "The card `tiny` has one module, `proj`, of 2 inputs and",
        f"3 outputs; rank 1, alpha 2. Its file has {len(data)}",
        f"bytes and the SHA-256 `{digest}`. Numbers are little-endian.",
        "",
        diagrams.picture(
            "schema", "The schema: module, scaling, and for A and B a struct of data and shape"
        ),
        "",
        "## Part by part",
        "",
        "Of the schema message and the footer the texts are shown,",
        "each after its length and before a zero byte; the rest",
        "of them is vtables, offsets and types, as Arrow's",
        "`Schema.fbs` and `File.fbs` define them. The record batch",
        "message holds the number of rows, then for each buffer",
        "its offset from the end of the message and its length,",
        "then for each field its length and number of nulls (`Message.fbs`).",
        "",
        "```text",
    ]
    for span in spans(data):
        lines.append(f"; {span.start} to {span.end - 1}: {span.meaning}")
        if "schema" in span.meaning and span.end - span.start > 16:
            lines += [*dumped(data, span.start, span.start + 8), "…"]
            if "footer" not in span.meaning:
                lines += [
                    line
                    for entry in entries(data, span)
                    for line in dumped(data, entry.start, entry.end)
                ]
        else:
            lines += dumped(data, span.start, span.end)
    lines += ["```", "", "## All of it", "", "```text", *dumped(data, 0, len(data)), "```", ""]
    return "\n".join(lines)


def architecture() -> str:
    """The import graph, as a picture and as a table."""
    graph = diagrams.imports(Path(lora.__file__).parent)
    level = diagrams.depths(graph)
    lines = [
        "# Imports point one way",
        "",
        "Drawn from the import statements of the package: an arrow",
        "goes from a module to one that it imports. Arrows that",
        "follow from others are left out. `tests/unit/test_house.py` fails if one points up.",
        "",
        diagrams.picture("imports", "The import graph, from cli down to errors; as a table below"),
        "",
        "| module | imports |",
        "|---|---|",
    ]
    order = sorted(graph, key=lambda name: (-level[name], name))
    lines += [
        f"| `{name}` | {', '.join(f'`{other}`' for other in sorted(graph[name]))} |"
        for name in order
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write every page and every picture."""
    OUT.mkdir(exist_ok=True)
    pages = {
        "presets": presets,
        "hexdump": hexdump,
        "architecture": architecture,
        "benchmarks": lambda: figures.page(figures.read()),
        "summary": lambda: figures.summary(figures.read()),
        "field": lambda: field_table.page(field_table.read()),
        "models": lambda: figures.models(json.loads(figures.MODELS.read_text(encoding="utf-8"))),
    }
    for name, page in pages.items():
        (OUT / f"{name}.md").write_text(page(), encoding="utf-8")
    trace = chapters.read()
    texts = reference_pages(trace) | chapters.pages(trace) | command_pages.pages()
    for name, text in texts.items():
        (OUT / name).write_text(text, encoding="utf-8")
    diagrams.draw_all(OUT)
    figures.draw_all(OUT, figures.read())


if __name__ == "__main__":
    main()
