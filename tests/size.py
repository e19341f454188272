"""Count what a reader of the package has to read: lines, code tokens and words of docstring, by
area.

Run ``python -m tests.size``. Tokens are names, numbers, operators and strings as `tokenize` of
Python 3.11 gives them (later versions split f-strings), without comments and docstrings. Words are
those of every docstring, split at blanks.
"""

import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

AREAS = {
    "models, interop": ("layer", "rewrite", "inference", "models", "interop"),
    "training, evolution": ("training", "evolution", "evolving"),
    "federation": ("federation",),
    "engine": ("engine", "batches", "demo", "drawing"),
    "command line": ("cli",),
    "testing": ("testing",),
}
"""Files and folders of `lora/` by area; what no area names belongs to the core."""

COUNTED = frozenset({tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING})


@dataclass(frozen=True)
class Size:
    """Lines, code tokens and words of docstring."""

    lines: int = 0
    tokens: int = 0
    words: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.lines + other.lines, self.tokens + other.tokens, self.words + other.words)


def size_of(source: str) -> Size:
    """The size of one file."""
    docstrings, words = set(), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                docstrings.add(node.body[0].lineno)
                words += len(text.split())
    tokens = sum(
        token.type in COUNTED
        and not (token.type == tokenize.STRING and token.start[0] in docstrings)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
    )
    return Size(source.count("\n"), tokens, words)


def area_of(path: Path) -> str:
    """The area that a file of `lora/` belongs to."""
    first = path.relative_to(ROOT / "lora").with_suffix("").parts[0]
    return next((area for area, names in AREAS.items() if first in names), "core")


def sizes() -> dict[str, Size]:
    """The size of each area of `lora/`."""
    totals = {area: Size() for area in ("core", *AREAS)}
    for path in sorted((ROOT / "lora").rglob("*.py")):
        totals[area_of(path)] += size_of(path.read_text(encoding="utf-8"))
    return totals


def total() -> Size:
    """The size of `lora/`."""
    return sum(sizes().values(), Size())


def lines_of_tests() -> int:
    """Lines of everything in `tests/`."""
    return sum(
        path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py")
    )


def main() -> None:
    """Print a line for each area, the total, and the lines of the tests; or the files given."""
    files = {name: size_of(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]}
    rows = files or sizes()
    rows["total"] = sum(rows.values(), Size())
    for name, size in rows.items():
        print(f"{name:<32}{size.lines:>8,}{size.tokens:>10,}{size.words:>8,}")
    print(f"{'tests':<32}{lines_of_tests():>8,}")


if __name__ == "__main__":
    main()
