"""Keep what the documentation's examples print below them, as they print it.

An example is a block of Python or of commands; the block `text` right below it is its output. The
tests that run the examples give what was printed to `compare`, so that nothing runs twice. Where
``LORA_OUTPUTS=write`` is in the environment, as `make outputs` sets it, the page is written anew.

What takes minutes, or one process that serves another, runs in no test. Run by itself, this file
records it: with a digest of the block and its output, which the tests compare.
"""

import difflib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

RECORDED = ("docs/index.md", "docs/how-to/share.md", "docs/federation.md")
"""Pages with commands that are only recorded."""

WIDTH = 80
"""Columns of a listing."""

DIGESTS = ("3b7e…", "c902…", "f41d…", "90ab…")
"""What stands for the first digest of an output, the second …"""

VARIES = (
    (r"\b[0-9a-f]{12}\b", "3b7e51c09a2f"),  # the beginning of one
    (r"/\S*/_CodeFence\w+/", ""),
    (r"/\S*/(?=test_\w+\.py)", "…/"),
    (r"\b\d{4}-\d\d-\d\d\b", "2026-11-29"),
    (r"\b\d\d:\d\d:\d\d\b", "02:00:00"),
    (r"(grpc(\+tls)?://[\w.]+):\d+", r"\1:8815"),
    (r"\b\d+(\.\d+)? (ms|s|seconds)\b", r"0.1 \2"),
)
"""What no two runs or machines have alike, and the text that stands for it."""

EXAMPLE = re.compile(
    r"^```(?P<info>\S[^\n]*)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?"
    r"(?:\n<!-- recorded (?P<digest>\w+) -->\n)?",
    re.MULTILINE | re.DOTALL,
)
DECIMAL = re.compile(r"-?\d+\.(\d*)(?:e([-+]?\d+))?")


@dataclass(frozen=True)
class Example:
    """A block of a page, what stands below it, and where both are."""

    info: str
    code: str
    output: str
    digest: str | None
    span: tuple[int, int]


def examples(text: str) -> Iterator[Example]:
    """The blocks of a page; what a block `text` says below another is that one's output."""
    for match in EXAMPLE.finditer(text):
        output = match["output"] or ""
        yield Example(match["info"].strip(), match["code"], output, match["digest"], match.span())


def digest(code: str, output: str) -> str:
    """What says that an output was recorded from this block."""
    return hashlib.sha256(f"{code}\n{output}".encode()).hexdigest()[:12]


def steady(printed: str) -> str:
    """The text without what varies, in lines that fit."""
    digests = list(dict.fromkeys(re.findall(r"\b[0-9a-f]{64}\b", printed)))
    for value, fixed in zip(digests, DIGESTS, strict=False):
        printed = printed.replace(value, fixed)
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
    write(page, example, printed)


def write(page: Path, example: Example, printed: str, note: str = "") -> None:
    """Put an output below its block."""
    text, (start, end) = page.read_text(encoding="utf-8"), example.span
    shown = f"\n```text\n{printed}```\n{note}" if printed else ""
    block = f"```{example.info}\n{example.code}```\n{shown}"
    page.write_text(f"{text[:start]}{block}{text[end:]}", encoding="utf-8")


def record(page: Path) -> None:
    """Run the commands of a page in order and record those that no test runs.

    What serves runs until another does, or to the end of the page.
    """
    from tests.unit import test_docs  # noqa: PLC0415 - it imports this module

    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        os.chdir(folder)
        test_docs.prepared(Path(folder))
        environment = {**os.environ, "HOME": folder, "COLUMNS": f"{WIDTH}", "PYTHONPATH": f"{ROOT}"}

        def answer(words: list[str]) -> str:
            line = [sys.executable, "-m", "lora.cli", *words[1:]]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            if words[1] == "serve":
                servers.close()
            process = subprocess.Popen(line, env=environment, **pipes)  # noqa: S603 - our own
            if words[1] == "serve":
                servers.callback(process.communicate)
                servers.callback(process.terminate)
                return process.stdout.readline()
            printed, notes = process.communicate()
            lines = [note for note in notes.splitlines(keepends=True) if "━" not in note]
            return printed + "".join(lines)

        for code in [one.code for one in examples(page.read_text("utf-8")) if one.info == "sh"]:
            commands = test_docs.lines_of(code)
            if code.startswith("openssl"):
                subprocess.run(["/bin/bash", "-ec", code], check=True, capture_output=True)  # noqa: S603
            answers = [answer(words) for words in commands]
            if commands and all(map(test_docs.reason_to_leave_out, commands)):
                output = steady("\n".join(filter(None, answers)).replace(folder, "~"))
                (example,) = [one for one in examples(page.read_text("utf-8")) if one.code == code]
                write(page, example, output, f"\n<!-- recorded {digest(code, output)} -->\n")


def main() -> None:
    """Record what the pages given, or all of them, leave to this."""
    sys.path.insert(0, str(ROOT))
    for name in sys.argv[1:] or RECORDED:
        record(ROOT / name)


if __name__ == "__main__":
    main()
