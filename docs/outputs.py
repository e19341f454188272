"""Keep what the documentation's examples print below them, as they print it.

An example is a block of Python or of commands; the block `text` right below it is its output. The
tests that run the examples give what was printed to `compare`, so that nothing runs twice. Where
``LORA_OUTPUTS=write`` is in the environment, as `make outputs` sets it, the page is written anew.
"""

import difflib
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WIDTH = 80
"""Columns of a listing."""

VARIES = (
    (r"\b[0-9a-f]{64}\b", "3b7e…"),  # a digest, here in a table
    (r"│ [0-9a-f]{57} │\n│( +)│ [0-9a-f]{7} +│\n", f"│ {'3b7e…':57} │\n"),
    (r"\b[0-9a-f]{12}\b", "3b7e51c09a2f"),  # the beginning of one
    (r"/\S*/(?=test_\w+\.py)", "…/"),
    (r"\b\d{4}-\d\d-\d\d\b", "2026-11-29"),
    (r"\b\d\d:\d\d:\d\d\.\d{6}\b", "02:00:00.000000"),
    (r"(grpc(\+tls)?://[\w.]+):\d+", r"\1:8815"),
    (r"\b\d+(\.\d+)? (ms|s|seconds)\b", r"0.1 \2"),
)
"""What no two runs or machines have alike, and the text that stands for it."""

EXAMPLE = re.compile(
    r"^```(?P<info>\S[^\n]*)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
DECIMAL = re.compile(r"-?\d+\.(\d*)(?:e([-+]?\d+))?")


@dataclass(frozen=True)
class Example:
    """A block of a page, what stands below it, and where both are."""

    info: str
    code: str
    output: str
    span: tuple[int, int]


def examples(text: str) -> Iterator[Example]:
    """The blocks of a page; what a block `text` says below another is that one's output."""
    for match in EXAMPLE.finditer(text):
        yield Example(match["info"].strip(), match["code"], match["output"] or "", match.span())


def steady(printed: str) -> str:
    """The text without what varies, in lines that fit."""
    for pattern, fixed in VARIES:
        printed = re.sub(pattern, fixed, printed)
    lines = []
    for line in map(str.rstrip, printed.strip("\n").splitlines()):
        indent = line[: len(line) - len(line.lstrip())]
        further = {"initial_indent": indent, "subsequent_indent": f"{indent}  "}
        lines += textwrap.wrap(line.lstrip(), WIDTH, break_on_hyphens=False, **further) or [""]
    return "".join(f"{line}\n" for line in lines)


def agree(stated: str, printed: str) -> bool:
    """Whether two outputs are the same; decimal numbers to a thousandth or in all but a digit."""
    if DECIMAL.sub("", stated) != DECIMAL.sub("", printed):
        return False
    for ours, theirs in zip(DECIMAL.finditer(stated), DECIMAL.finditer(printed), strict=True):
        last = 10.0 ** (int(ours[2] or 0) - len(ours[1]))
        if abs(float(ours[0]) - float(theirs[0])) > max(2.5 * last, 1e-3 * abs(float(ours[0]))):
            return False
    return True


def compare(page: Path, code: str, printed: str) -> None:
    """Hold what an example printed against the page, or write it into the page.

    Raises:
        AssertionError: The page says something else.
    """
    text, printed = page.read_text(encoding="utf-8"), steady(printed)
    (example,) = [one for one in examples(text) if one.code.strip() == code.strip()]
    if agree(example.output, printed):
        return
    if os.environ.get("LORA_OUTPUTS") != "write":
        difference = difflib.ndiff(example.output.splitlines(), printed.splitlines())
        raise AssertionError("\n".join([f"`make outputs` changes {page.name}:", *difference]))
    shown = f"\n```text\n{printed}```\n" if printed else ""
    block = f"```{example.info}\n{example.code}```\n{shown}"
    start, end = example.span
    page.write_text(f"{text[:start]}{block}{text[end:]}", encoding="utf-8")
