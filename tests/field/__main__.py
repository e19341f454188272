"""Hold the conformance suite against libraries that people use: ``python -m tests.field [ROW …]``.

Each row of ``rows.toml`` is installed into a folder of its own from exact pins, without their
dependencies: torch, NumPy and what else the tests need are this environment's. Its binding is then
served by `lora.testing.serve` in a process that finds that folder first, and the suite is held
against it. What came out is a file in ``results/``; the page of the site is drawn from these.

A row that can't be installed or started, or takes too long, is *not run*, with the reason. The exit
status is 1 if a row fails in what its binding does not declare, or does not fail though it must.
"""

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path

from docs.outputs import examples
from lora.testing import serve

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
ROWS = tomllib.loads((HERE / "rows.toml").read_text("utf-8"))
READINGS = tomllib.loads((HERE / "readings.toml").read_text("utf-8"))
INSTALL_SECONDS, RUN_SECONDS = 120, 60


class NotRunError(Exception):
    """A row has no verdicts, for this reason."""


def run(command, seconds, *, writes=None, **variables):
    """Run a command, and what it starts, for at most so many seconds; return what it printed.

    Raises:
        NotRunError: It takes longer, or fails without the file that it `writes`.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, start_new_session=True, cwd=ROOT, env={**os.environ, **variables}, **pipes
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise NotRunError(f"it took more than {seconds:g} seconds") from None
    if process.returncode and not (writes and writes.exists()):
        lines = (errors or output).strip().splitlines() or [f"exit status {process.returncode}"]
        raise NotRunError(re.sub(r"(?<![\w.])/[\w./+-]*/", "…/", lines[-1])[-300:])
    return output


def installed(environment, folder, seconds):
    """Return the folder with an environment's pins, and the seconds that pip took for them."""
    pins, target = HERE / "pins" / f"{environment}.txt", folder / environment
    stamp = target / "installed.json"
    if not pins.exists():
        return target, 0.0
    text = pins.read_text("utf-8")
    if stamp.exists() and (last := json.loads(stamp.read_text("utf-8")))["pins"] == text:
        return target, last["seconds"]
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    start = time.monotonic()
    run([*pip, "--no-deps", "--target", str(target), "--requirement", str(pins)], seconds)
    took = round(time.monotonic() - start, 1)
    stamp.write_text(json.dumps({"pins": text, "seconds": took}), "utf-8")
    return target, took


def served(row, target):
    """Return the command that serves a row's binding; `-P` keeps serve.py's folder out of it."""
    if "command" in row:
        return row["command"]
    binding = next(
        path
        for path in (HERE / "bindings" / row["binding"], ROOT / row["binding"])
        if path.exists()
    )
    python = ["env", f"PYTHONPATH={target}{os.pathsep}{ROOT}", sys.executable, "-P"]
    return shlex.join([*python, serve.__file__, str(binding), row.get("object", "BINDING")])


def report_on(row, target, seconds, only):
    """Return the suite's report on a row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        suite = [sys.executable, "-m", "lora.cli", "conformance", "--json-file", str(path)]
        command = [*suite, "--command", served(row, target), *(["--only", only] if only else [])]
        variables = {"LORA_PROFILE": "quick", "OMP_NUM_THREADS": "1"}
        run(command, seconds, writes=path, PYTEST_ADDOPTS="-n 2", **variables)
        return json.loads(path.read_text("utf-8"))


def result_of(report, row):
    """Return what a row's file says of a report: verdicts by id and class, and what deviates.

    A requirement or a class of it that the row does not reach is left out.
    """
    requirements = report["requirements"]
    verdicts = {
        name: {kind: verdict for kind, verdict in entry["classes"].items() if verdict != "skipped"}
        for name, entry in requirements.items()
    }
    tests = {test["test"]: test for entry in requirements.values() for test in entry["tests"]}
    deviations = [
        {
            "requirement": name,
            "class": test["class"],
            "test": test["test"],
            "verdict": test["verdict"],
            "reason": reason_of(test, row),
            "place": test["place"] or row.get("place", ""),
        }
        for name, entry in requirements.items()
        for test in sorted(entry["tests"], key=lambda test: test["test"])
        if test["verdict"] not in ("passed", "skipped")
    ]
    undeclared = {deviation["verdict"] for deviation in deviations} - {"expected failure"}
    return {
        **report["binding"],
        "state": "red" if undeclared else "as declared",
        **{key: row[key] for key in ("outside",) if key in row},
        **{key: report[key] for key in ("suite", "specification", "profile")},
        "examples": sum(test["examples"] for test in tests.values()),
        "verdicts": {name: classes for name, classes in verdicts.items() if classes},
        "deviations": deviations,
    }


def reason_of(test, row):
    """Return why a property fails: as declared, as the row says, or how it failed."""
    return test["reason"] or row.get("red") or test["falsified"].partition("\n")[0][:200]


def measure(name, row, folder, patience=1.0, only=None):
    """Install and test a row; return what its file says."""
    processor = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {"row": name, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    try:
        target, installing = installed(
            row.get("environment", name), folder, patience * INSTALL_SECONDS
        )
        start = time.monotonic()
        result |= result_of(report_on(row, target, patience * RUN_SECONDS, only), row)
        check_page(name, target, patience * RUN_SECONDS)
        check_places(READINGS.get(target.name, {}).get("places", {}), target)
    except NotRunError as error:
        return result | {"state": "not run", "reason": str(error)}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - processor.ru_utime - processor.ru_stime
    result["seconds"] = {"install": installing, "run": round(time.monotonic() - start, 1)}
    return result | {"seconds": {**result["seconds"], "processor": round(seconds, 1)}}


def check_page(name, target, seconds):
    """Refuse a page on a fault whose script prints something else than the page says."""
    page = ROOT / "docs" / "field" / f"{name}.md"
    if page.exists():
        (script,) = examples(page.read_text("utf-8"))
        printed = run([sys.executable, "-P", "-c", script.code], seconds, PYTHONPATH=str(target))
        if printed != script.output:
            raise NotRunError(f"{page.relative_to(ROOT)} says otherwise than its script: {printed}")


def check_places(places, target):
    """Refuse a second reading of lines that do not stand in the installed library."""
    for place, reading in places.items():
        path, _, number = place.rpartition(":")
        texts = [file.read_text("utf-8").splitlines() for file in target.glob(f"**/{path}")]
        if not any(
            reading["line"] in line for text in texts for line in text[int(number) - 1 :][:1]
        ):
            raise NotRunError(f"{place} does not say {reading['line']!r}")


def main():
    """Measure rows, all if none is named; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.field", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--folder", type=Path, default=ROOT / ".field", help="where to install")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limits of time")
    parser.add_argument("--only", help="a chapter or requirement, where not all are wanted")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.rows} - {*ROWS}):
        parser.error(f"no row {', '.join(unknown)}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for name in arguments.rows or ROWS:
        row = ROWS[name]
        result = measure(name, row, arguments.folder, arguments.patience, arguments.only)
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        (arguments.results / f"{name}.json").write_text(text, "utf-8")
        is_wrong = (result["state"] == "red") != ("red" in row) and result["state"] != "not run"
        wrong += is_wrong
        print(
            name, result.get("version", ""), result["state"], result.get("reason", ""), flush=True
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
