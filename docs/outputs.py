"""Keep what the documentation's examples print below them, as they print it.

An example is a block of Python or of commands; the block `text` right below it is its output. The
tests that run the examples give what was printed to `compare`, so that nothing runs twice. Where
``LORA_OUTPUTS=write`` is in the environment, as `make outputs` sets it, the page is written anew.

What takes minutes, or needs a process that serves another, is recorded by this file, run by itself:
with a digest of the block and its output, which the tests compare. A slow test runs it again, but
for what other tests run.
"""

import difflib
import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path

from lora.evolution.queue import JobQueue

ROOT = Path(__file__).parents[1]

RECORDED = (
    "docs/index.md",
    "docs/how-to/share.md",
    "docs/how-to/factory.md",
    "docs/how-to/learn-and-serve.md",
    "docs/how-to/merge.md",
    "docs/federation.md",
    "docs/evolution.md",
    "docs/performance.md",
)
"""Pages with commands that are only recorded."""

LONG = ("index.md", "evolution.md", "performance.md")
"""Pages that show what takes minutes; elsewhere it is only named."""

WIDTH = 80
"""Columns of a listing."""

DIGESTS = ("3b7e…", "c902…", "f41d…", "90ab…")
"""What stands for the first digest of an output, the second …"""

BEGINNINGS = ("3b7e51c09a2f", "c902d4a61e83", "f41d27b80c56", "90abe6135d7f")
"""What stands for the first beginning of a digest, such as the id of a job, the second …"""

VARIES = (
    (r"/\S*/_CodeFence\w+/", ""),
    (r"/\S*/(?=test_\w+\.py)", "…/"),
    (r"\b\d{4}-\d\d-\d\d\b", "2026-11-29"),
    (r"\b\d\d:\d\d:\d\d\b", "02:00:00"),
    (r"grpc://(?!127\.|0\.0)(\d+(\.\d+){3}|\[[\w:%.]+\])", "grpc://192.0.2.7"),
    (r"(grpc(\+tls)?://[\w.]+):\d+", r"\1:8815"),
    (r"\b\d+(\.\d+)? (ms|s|seconds)\b", r"0.1 \2"),
    (r"(\.\d{6})\d{6,}", r"\1…"),  # the last digits of a float64
    (r"\S*… \(whole", "… (whole"),  # which also move where a text is cut off
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


def steady(printed: str, varies: Iterable[tuple[str, str]] = VARIES, width: int = WIDTH) -> str:
    """The text without what varies, in lines that fit."""
    for length, stand_ins in ((64, DIGESTS), (12, BEGINNINGS)):
        values = dict.fromkeys(re.findall(rf"\b[0-9a-f]{{{length}}}\b", printed))
        if len(values) > len(stand_ins):
            raise ValueError(f"{len(values)} digests, but {len(stand_ins)} that stand for one")
        for value, fixed in zip(values, stand_ins, strict=False):
            printed = printed.replace(value, fixed)
    for pattern, fixed in varies:
        printed = re.sub(pattern, fixed, printed)
    lines = []
    for line in map(str.rstrip, printed.strip("\n").splitlines()):
        indent = line[: len(line) - len(line.lstrip())]
        further = {"initial_indent": indent, "subsequent_indent": f"{indent}  "}
        lines += textwrap.wrap(line.lstrip(), width, break_on_hyphens=False, **further) or [""]
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


class Session:
    """Runs the commands of a page, each in a process, in the order in which they stand.

    What serves runs until another does, or to the end. A port and addresses of this machine stand
    in for those of the page, and the digest that was printed last for its beginning.

    Args:
        folder: Where the commands run; it has what the examples name.
        lines: The commands, as lists of words.
    """

    def __init__(self, folder: Path, lines: list[list[str]]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = f"{free.getsockname()[1]}"
        self.folder, self.servers = folder, ExitStack()
        self.digest = hashlib.sha256((folder / "docs.lora.arrow").read_bytes()).hexdigest()
        self.environment = {**os.environ, "HOME": f"{folder}", "COLUMNS": f"{WIDTH}"}
        self.environment |= {"PYTHONPATH": f"{ROOT}", "XDG_CACHE_HOME": ""}
        names = [line[3] for line in lines if line[1:3] == ["factory", "rollback"]]
        for name in dict.fromkeys(names):
            for cards in (["docs"], ["docs", "law"]):  # two versions of it
                words = [f"{card}.lora.arrow" for card in cards]
                about = ["--name", name, "--description", "whom to ask for what"]
                self.run(["lora", "factory", "add", "merge", *words, *about])
                self.run(["lora", "factory", "run"])

    def run(self, words: list[str]) -> str:
        """Run a command; returns what it prints, or the first line of what goes on.

        Raises:
            RuntimeError: It fails.
        """
        here = [("192.0.2.7", "127.0.0.1"), ("8815", self.port), ("3b7e…", self.digest)]
        for shown, own in here:
            words = [word.replace(shown, own) for word in words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if words[1] == "serve":
            self.servers.close()
        line = [sys.executable, "-m", "lora.cli", *words[1:]]
        process = subprocess.Popen(line, env=self.environment, cwd=self.folder, **pipes)  # noqa: S603 - our own
        if words[1] == "serve":
            self.servers.callback(process.communicate)
            self.servers.callback(process.terminate)
            return process.stdout.readline()
        if "--at" in words:  # it waits for the night
            queue, until = JobQueue(self.folder / "factory/queue.sqlite"), time.monotonic() + 60
            while queue.night() is None and time.monotonic() < until:
                time.sleep(0.1)
            process.terminate()
        printed, notes = process.communicate()
        if "--at" in words:
            printed = ""  # a table of jobs, at its end
        if process.returncode not in (0, 3):
            raise RuntimeError(f"{' '.join(words)}: status {process.returncode}: {notes}")
        (self.digest,) = re.findall(r"\b[0-9a-f]{64}\b", printed)[-1:] or [self.digest]
        lines = [note for note in notes.splitlines(keepends=True) if "━" not in note]
        shown, own = here[0]
        return (printed + "".join(lines)).replace(own, shown)


def session(
    folder: Path, blocks: dict[str, list[list[str]]], is_run: Callable[[list[str]], bool]
) -> Iterator[tuple[str, str]]:
    """Run the blocks for a shell of one page in order.

    Args:
        folder: Has what the examples name.
        blocks: Text of a block -> its commands of ours.
        is_run: Whether a command is to be run.

    Yields:
        Each block of which every command was run, with what it printed.
    """
    lines = [line for commands in blocks.values() for line in commands]
    shell = Session(folder, list(filter(is_run, lines)))
    with shell.servers:
        for code, commands in blocks.items():
            if code.startswith(("openssl", "mkdir")):
                first, quiet = code.partition("\nlora ")[0], {"capture_output": True}
                command = ["/bin/bash", "-ec", first]
                subprocess.run(command, cwd=folder, check=True, **quiet)  # noqa: S603 - our own
            printed = list(map(shell.run, filter(is_run, commands)))
            if len(printed) == len(commands) > 0:
                output = "\n".join(filter(None, printed)).replace(f"{folder}", "~")
                yield code, steady(output, () if code.startswith("lora bench") else VARIES)


def record(page: Path) -> None:
    """Run the commands of a page in order and record those that no quick test runs."""
    from tests.unit import test_docs  # noqa: PLC0415 - it imports this module

    def is_run(words: list[str]) -> bool:
        is_long = page.name in LONG and "--scheduler" not in words
        return is_long or not test_docs.named_in(test_docs.ELSEWHERE, words)

    blocks = test_docs.commands_of(page.relative_to(ROOT).as_posix())
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        test_docs.prepared(Path(folder))
        for code, output in session(Path(folder), blocks, is_run):
            if all(map(test_docs.is_left_out, blocks[code])):
                (example,) = [one for one in examples(page.read_text("utf-8")) if one.code == code]
                write(page, example, output, f"\n<!-- recorded {digest(code, output)} -->\n")


def main() -> None:
    """Record what the pages given, or all of them, leave to this."""
    sys.path.insert(0, str(ROOT))
    for name in sys.argv[1:] or RECORDED:
        record(ROOT / name)


if __name__ == "__main__":
    main()
