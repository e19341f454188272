"""Commands that test, measure and show the library: conformance, bench, demo.

Requirements: R6, R24, R25.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lora.cli.app import Json, Result, check_output, command, printable, progress_bar
from lora.errors import StoreError


@command("conformance --binding my_package.binding:BINDING --only R4")
def conformance(
    *,
    binding: str | None = None,
    command: str | None = None,
    writer: str | None = None,
    only: list[str] | None = None,
    json_file: Path | None = None,
    junit: Path | None = None,
    timeout: Annotated[float, typer.Option(min=1)] = 300.0,
) -> Result:
    """Hold an implementation to the specification. Exit 1 if a requirement fails undeclared.

    Args:
        binding: package.module:NAME; this library itself if omitted.
        command: Program that serves an implementation in any language, such as "node binding.mjs".
        writer: A binding or a program that writes the cards which the other reads.
        only: A chapter (R4) or a requirement (R4.9); repeatable; all if omitted.
        json_file: Write the verdicts to this file.
        junit: Write JUnit XML to this file.
        timeout: Seconds that one property may take.
    """
    from lora.testing.report import lines_of, red, run_suite, write_report

    texts = [("--binding", binding), ("--command", command), ("--writer", writer)]
    for option, text in texts + [("--only", name) for name in only or ()]:
        if text is not None and not text.strip():
            raise typer.BadParameter("it is empty", param_hint=option)
    if binding is not None and command is not None:
        raise typer.BadParameter("it can't go with --command", param_hint="--binding")
    check_output("--json-file", json_file)
    check_output("--junit", junit)
    with progress_bar("checking") as progress:
        report = run_suite(
            binding,
            command=command,
            writer=writer,
            only=only or (),
            junit=junit,
            timeout=timeout,
            progress=progress,
        )
    if json_file is not None:
        write_report(report, json_file)
    total, failed = len(report["requirements"]), red(report)
    failure = f"{len(failed)} of {total} requirements failed: {', '.join(failed)}"
    return Result(report, printable("\n".join(lines_of(report))), failure=failure if failed else "")


@command("bench --quick --only routing")
def bench(
    *,
    only: list[str] | None = None,
    quick: bool = False,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Path | None = None,
) -> Result:
    """Measure this library beside its peers. In one process each, in shuffled rounds.

    Args:
        only: forward, lifecycle, routing, throughput, merge_extract, training, fetching, growth,
            commands, models; repeatable; all if omitted.
        quick: Fewer rounds and smaller sizes: it works, no more.
        threads: Threads of each measured process.
    """
    from lora.files import replacing
    from lora.testing.bench import SCRIPTS, run_bench, shown

    check_output("--out", out)
    names, parts = only or list(SCRIPTS), []
    with progress_bar("measuring") as progress:
        for done, part in enumerate(run_bench(names, quick=quick, threads=threads), 1):
            parts.append(part)
            progress(done, len(names))
    report = {part.name: {"machine": part.machine, "rows": part.rows} for part in parts}
    if out is not None:
        with replacing(out) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")
    table = Table("what", "figure", "interval", "target", "met")
    for part in parts:
        for row in part.rows:
            table.add_row(*shown(row))
    return Result(report, table)


@command("demo --steps 20 --out demo-output")
def demo(
    *,
    steps: Annotated[int, typer.Option(min=1)] = 60,
    out: Path = Path("demo-output"),
    as_json: Json = False,
) -> Result:
    """Run the whole story on the real MiniLM.

    Train a card on Python's own documentation, save it, map it, apply it, route to it, remove it.

    Args:
        out: Folder to write into.
        steps: Training steps; fewer are quicker and teach less.
    """
    from lora.demo import run

    if out.is_file():
        raise StoreError(f"--out {out}", "a folder", "a file")
    console = Console(quiet=as_json, markup=False)
    return Result(run(out, steps=steps, console=console, progress_bar=progress_bar))
