"""Run the mutants of the pure core, or those of one module, and tell which share of them is killed.

    python -m tests.mutants                    the modules that pyproject.toml lists
    python -m tests.mutants lora/factors.py    one module

mutmut keeps in ``mutants/`` what was run: a run that was stopped goes on where it was, and of a
module that changed it runs again what changed. The others' verdicts stay.
"""

import json
import sys
from pathlib import Path

KILLED = {1, 3}
"""Exit statuses of pytest by which a mutant is noticed; a time-out is none of them."""


def shares(folder: Path) -> list[str]:
    """Return for each module how many of its mutants are killed, and those that live by name."""
    lines = []
    for path in sorted(folder.rglob("*.py.meta")):
        codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        run = {name: code for name, code in codes.items() if code is not None}
        alive = [name for name, code in run.items() if code not in KILLED]
        if run:
            killed = len(run) - len(alive)
            module = path.relative_to(folder).as_posix().removesuffix(".meta")
            share = f"{killed} of {len(run)} killed, {100 * killed / len(run):.1f} %"
            left = len(codes) - len(run)
            lines += [f"{module}: {share}" + (f"; {left} not run" if left else "")]
            lines += [f"    alive: {name}" for name in sorted(alive)]
    return lines


def main(modules: list[str]) -> None:
    """Run mutmut on these modules and print the share of each that was ever run."""
    from mutmut.__main__ import _run  # installed by make mutants alone
    from mutmut.configuration import config

    config().only_mutate = modules or config().only_mutate
    _run([], 1)
    sys.stdout.write("\n".join(shares(Path("mutants"))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
