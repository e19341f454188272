"""Say which results were measured on other sources than those checked out, and which pages tell
figures that are not of these results.

``make release-check`` runs this before a release. It is no test: between two releases sources
change, results age, and the pages say of each which sources have changed since.
"""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks"), str(ROOT)]
import figures  # noqa: E402 - beside this file, in no package
from code_digests import digest_of  # noqa: E402 - of a folder that is no package

SCORE = re.compile(r"^\| `(\w+)` \|(?: [\d.]+ %? ?\|){4} `(\w{12})` \|", re.MULTILINE)
"""A row of the table of scores: module, and the digest of what was measured."""


def aged_results(root: Path) -> Iterator[str]:
    """Yield the parts of each file of results that other sources made, or unknown ones."""
    for path in sorted((root / "benchmarks").rglob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        whole = {"all": results} if "machine" in results else results
        parts = {name: part for name, part in whole.items() if "machine" in part}
        measured = {name: part["machine"].get("sources", {}) for name, part in parts.items()}
        for name, sources in (measured or {"all": results.get("measured", {})}).items():
            state = figures.changed_since(sources)
            if not state.startswith("Unchanged"):
                yield f"{path.relative_to(root)}: {name}: {state}"


def aged_scores(root: Path) -> Iterator[str]:
    """Yield the modules that changed since their mutants were run."""
    for module, digest in SCORE.findall((root / "docs/mutation.md").read_text(encoding="utf-8")):
        (path,) = [*root.glob(f"lora/{module}.py"), *root.glob(f"lora/*/{module}.py")]
        if digest_of(path.read_text(encoding="utf-8")) != digest:
            again = f"make mutants MODULE={path.relative_to(root)}"
            yield f"docs/mutation.md: {module}: changed since; {again}"


def aged_violations(root: Path) -> Iterator[str]:
    """Yield what is wrong with the last whole run of all violations."""
    path = root / "tests/sharp/last.json"
    if not path.is_file():
        yield f"{path.relative_to(root)}: no whole run is noted; make sharp"
        return
    last = json.loads(path.read_text(encoding="utf-8"))
    if last["red"] != last["all"]:
        yield f"{path.relative_to(root)}: {last['red']} of {last['all']} turned a test red"
    command = ["git", "diff", "--name-only", last["commit"], "--", "lora", "spec", "tests"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603 - git
    changed = [name for name in run.stdout.split() if name != "tests/sharp/last.json"]
    if run.returncode:
        yield f"{path.relative_to(root)}: {run.stderr.strip()}"
    elif changed:
        yield f"{path.relative_to(root)}: changed since {last['commit']}: {', '.join(changed)}"


def other_figures(root: Path) -> Iterator[str]:
    """Yield the pages whose figures are not those of the results beside them."""
    table = figures.summary(figures.read())
    if table not in (root / "README.md").read_text(encoding="utf-8"):
        yield "README.md: its table is not of benchmarks/results.json; python docs/figures.py"
    page = (root / "docs/learning.md").read_text(encoding="utf-8")
    for name in ("questions", "exam_table"):
        script = importlib.import_module(name)
        if script.page(json.loads(script.RESULTS.read_text(encoding="utf-8")), page) != page:
            yield f"docs/learning.md: a table is not of {script.RESULTS.relative_to(ROOT)}"


CHECKS = (aged_results, aged_scores, aged_violations, other_figures)


def main(root: Path = ROOT) -> int:
    """Print what is aged or differs; return 1 if anything does."""
    lines = [line for check in CHECKS for line in check(root)]
    well = ["Every result is of these sources, and every page tells these results."]
    sys.stdout.write("\n".join(lines or well) + "\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
