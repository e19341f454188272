"""Commands by which an engine learns: evolve, and the skill factory.

Requirements: R5, R18, R19, R25.
"""

import json
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import lora
from lora.cli.app import Model, Result, app, command, progress_bar, read_lines, table_of
from lora.errors import ArgumentError

SHOWN = ["id", "kind", "name", "state", "attempt", "error", "at", "what", "note"]
SHOWN += ["version", "live", "digest", "refused"]
"""Columns of a factory's tables that are shown on a terminal."""

Steps = Annotated[int | None, typer.Option(help="Training steps at most, for each task.", min=1)]


@command("evolve --documents ./handbook --out skills --steps 60")
def evolve(
    *,
    documents: Path,
    out: Path = Path("skills"),
    queries: Path | None = None,
    card: list[Path] | None = None,
    steps: Steps = None,
    ask: str | None = None,
    teacher_model: str | None = None,
    teacher_url: str = "https://api.openai.com/v1",
    key_file: Path | None = None,
    budget: Annotated[int, typer.Option(min=1)] = 100000,
    dry_run: bool = False,
    model: Model = None,
) -> Result:
    """Learn what the engine does not know of some documents. What measurably helps is kept.

    Args:
        documents: Folder of Python files and prose to learn.
        out: Folder for accepted cards.
        queries: What users asked, a line each; the documents' own if omitted.
        card: A card that is there already; may be repeated.
        ask: HOST:documents or HOST:queries: what may be sent to the teacher at that host.
        teacher_model: The teacher's name there.
        teacher_url: An OpenAI-compatible server.
        key_file: File with the teacher's key.
        budget: Tokens that the teacher may cost in all.
        dry_run: Say what would be learned; send, train and keep nothing.
    """
    from lora.evolving import outcomes, watching
    from lora.store import os_errors

    asked, cards = read_lines(queries) if queries else [], [lora.load(path) for path in card or []]
    if ask is not None and None in (teacher_model, key_file):
        raise ArgumentError("--ask", "--teacher-model and --key-file beside it", "not both")
    teacher = None
    if not dry_run:
        with os_errors(out):
            out.mkdir(exist_ok=True)
        if ask is not None:
            teacher = _teacher(ask, teacher_model, teacher_url, key_file, out, budget)
    engine, store = lora.ArrowEngine.from_pretrained(model), None if dry_run else out
    options: dict[str, Any] = {"max_steps": steps, "teacher": teacher, "store": store}
    distiller = watching(engine, documents, cards=cards, queries=asked, **options)
    if dry_run:
        rows = [
            {"task": task.name, "queries": len(task.queries)}
            | distiller.gather(task.name).figures["pairs"]
            for task in distiller.tasks
        ]
        return Result(rows, table_of(rows or [{"task": "nothing is unknown"}]))
    with progress_bar(f"learning {documents.name}") as progress:
        results = list(outcomes(distiller, progress=progress))
    facts = [
        {"task": result.task, "accepted": result.accepted, "figures": dict(result.figures)}
        for result in results
    ]
    return Result(facts, "\n".join(map(_line, results)) or "nothing is unknown")


def _line(outcome: Any) -> str:
    """A line about a task that was worked on."""
    verdict, reason = outcome.verdict, outcome.figures.get("reason")
    if verdict is not None:
        reason = f"MRR {verdict.gain.before:.3f} -> {verdict.gain.after:.3f}"
    return f"{'accepted' if outcome.accepted else 'discarded'}: {outcome.task}: {reason}"


def _teacher(ask: str, name: Any, url: str, key_file: Any, folder: Path, budget: int) -> Any:
    """The teacher behind a server, and what may be sent to it."""
    from lora.evolution.cloud import CloudDistiller, Consent, Ledger, OpenAITeacher
    from lora.federation.keys import read_small

    host, _, data = ask.partition(":")
    key = read_small(key_file).decode("ascii", "replace").strip()
    ledger = Ledger(folder / "ledger.sqlite", budget)
    teacher = OpenAITeacher(name, ledger, api_key=key, base_url=url, cache=folder / "asked")
    return CloudDistiller(teacher, consent=Consent(host, [data]))


factory = typer.Typer(
    help="Long work as durable jobs: add, run, status, rollback.", no_args_is_help=True
)
app.add_typer(factory, name="factory", epilog="Example: lora factory status")

Root = Annotated[Path, typer.Option("--root", help="Folder of the factory.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@command(
    "factory add train docs --with data=pairs.jsonl --with preset=quick", group=factory, name="add"
)
def factory_add(
    kind: str,
    name: str,
    *,
    given: Annotated[list[str] | None, typer.Option("--with")] = None,
    priority: int = 0,
    again: bool = False,
    root: Root = Path("factory"),
    dry_run: DryRun = False,
) -> Result:
    """Queue a job.

    Args:
        kind: train, extract, merge or distil.
        name: Name of the skill.
        given: key=value; JSON where it is JSON, else text. May be repeated.
        priority: Higher runs first.
        again: Queue it again if it is dead.
    """
    from lora.evolution.factory import SkillFactory

    parameters = {"name": name, **dict(map(_setting, given or []))}
    if kind in ("train", "distil"):
        from lora.engine import default_model

        parameters.setdefault("model", str(default_model()))
    with SkillFactory(root) as opened:
        job = opened.add(kind, parameters, priority=priority, dry_run=dry_run)
        if again and job.state == "dead" and not dry_run:
            job = opened.retry(job.id)
    facts = {"id": job.id, "kind": job.kind, "name": name, "state": job.state, "dry_run": dry_run}
    return Result(
        facts, f"{'would queue' if dry_run else job.state}: {kind} {name} ({job.id[:12]})"
    )


@command("factory run --at 02:00", group=factory, name="run")
def factory_run(
    *,
    at: str | None = None,
    scheduler: str | None = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    root: Root = Path("factory"),
    dry_run: DryRun = False,
) -> Result:
    """Run what is queued; exit 1 if a job is dead.

    Args:
        at: Run every night at this local time, HH:MM; now and once if omitted.
        scheduler: tcp://host:port of a Dask scheduler to run on.
        workers: Jobs at a time.
    """
    from lora.evolution.factory import SkillFactory, cluster

    stop = threading.Event()
    console = Console(stderr=True, markup=False)
    with ExitStack() as stack:
        executor = stack.enter_context(cluster(scheduler)) if scheduler else None
        shop = stack.enter_context(
            SkillFactory(
                root,
                executor=executor,
                workers=workers,
                on_event=lambda job: console.print(f"{job.state}: {job.kind} {job.name}"),
            )
        )
        if dry_run:
            waiting = {job.id for job in shop.queue.jobs("queued")}
            return _jobs([row for row in shop.status().to_pylist() if row["id"] in waiting])
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        rows = shop.run(at=at, stop=stop).to_pylist()
    dead = ", ".join(row["id"][:12] for row in rows if row["state"] == "dead")
    failure = f"dead jobs: {dead}; `lora factory status --history` says why" if dead else ""
    return _jobs(rows)._replace(failure=failure)


@command("factory status --history --json", group=factory, name="status")
def factory_status(
    *, history: bool = False, skills: bool = False, root: Root = Path("factory")
) -> Result:
    """Show the jobs, or what happened, or the skills.

    Args:
        history: What happened, instead of the jobs.
        skills: The versions of each skill, instead of the jobs.
    """
    from lora.evolution.factory import SkillFactory

    with SkillFactory(root) as shop:
        table = shop.history() if history else shop.skills() if skills else shop.status()
    return _jobs(table.to_pylist())


@command("factory rollback docs --version 2", group=factory, name="rollback")
def factory_rollback(
    name: str, *, version: int | None = None, root: Root = Path("factory"), dry_run: DryRun = False
) -> Result:
    """Put an earlier version of a skill into service.

    Args:
        name: Name of the skill.
        version: Which; the one before the live one if omitted.
    """
    from lora.evolution.factory import SkillFactory

    with SkillFactory(root) as shop:
        live = shop.rollback(name, version, dry_run=dry_run)
    facts = {"name": name, "version": live.version, "digest": live.digest, "dry_run": dry_run}
    verb = "would serve" if dry_run else "live"
    return Result(facts, f"{verb}: {name} version {live.version}, {live.digest}")


def _setting(text: str) -> tuple[str, Any]:
    """The key and the value in ``key=value``."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ArgumentError("--with", "key=value", text)
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _jobs(rows: list[dict[str, Any]]) -> Result:
    """Rows of a factory's table: on a terminal, the columns that there is room for."""
    short = [{key: row[key] for key in SHOWN if key in row} for row in rows]
    for row in short:
        row |= {key: row[key][:12] for key in ("id", "digest") if row.get(key)}
    return Result(rows, table_of(short or [{"state": "nothing"}]))
