"""Commands by which an engine learns: evolve, and the skill factory.

Requirements: R5, R18, R19, R25.
"""

import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group

import lora
from lora.cli.app import (
    NOTHING_TO_SERVE,
    Model,
    Result,
    app,
    blocks,
    check_input,
    checks_done,
    command,
    details,
    progress_bar,
    shortened,
    table_of,
    waiting,
)
from lora.errors import ArgumentError

SHOWN = ("at", "what", "id", "kind", "name", "state", "attempt", "version", "live")
"""Columns of a factory's tables that are shown to a person."""


@command(
    "evolve ./handbook --out skills --documents-only",
    inputs=["documents", "questions", "answers", "model"],
)
def evolve(
    documents: Path,
    *,
    out: Path = Path("skills"),
    name: str | None = None,
    cards: Path | None = None,
    questions: Path | None = None,
    answers: Path | None = None,
    documents_only: bool = False,
    share_exam: bool = False,
    share_questions: bool = False,
    max_taken: float = 0.05,
    steps: Annotated[int, typer.Option(min=1)] = 40,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    alpha: float = 16.0,
    weight: float = 1.0,
    seed: int = 0,
    placebos: Path | None = None,
    ask: str | None = None,
    teacher_model: str | None = None,
    teacher_url: str = "https://api.openai.com/v1",
    key_file: Path | None = None,
    budget: Annotated[int, typer.Option(min=1)] = 100000,
    max_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    insecure_http: bool = False,
    dry_run: bool = False,
    model: Model = None,
) -> Result:
    """Train a card from documents. It goes live if it beats every alternative; exit 3 if not.

    Args:
        documents: Folder of Python files and prose; or a file of logged pairs.
        out: Folder of live cards.
        name: Name of the skill; if omitted, the folder's and the word that tells it best.
        dry_run: Say what there is to learn from; send, train and keep nothing.

    Training:
        steps: Training steps.
        rank: Rank of the card.
        alpha: Alpha of the card.
        weight: Multiplies what the card changes; less is safer where no real questions are logged.

    Acceptance:
        cards: Folder of the skills that it must not harm; --out if omitted.
        questions: Routing checks, JSONL: query, and skill (null: none) if another should answer.
        answers: What users asked and were answered, JSONL: half is learned, half may veto.
        documents_only: Let it go live though no users' questions spoke for it.
        max_taken: Share of another skill's questions that it may take over.
        placebos: Folder for the cards that it is compared with; the user's cache if omitted.

    Privacy:
        share_exam: Put held-out pairs of the documents into the card.
        share_questions: Let users' questions be examples in the card.

    Teacher:
        ask: HOST:documents or HOST:queries: what may be sent to the teacher at that host.
        teacher_model: The teacher's name there.
        teacher_url: An OpenAI-compatible server.
        key_file: File with the teacher's key.
        budget: Tokens that the teacher may cost in all.
        max_tokens: Tokens of one answer; a model that reasons first needs more.
        insecure_http: Allow http:// to another machine; the key can be read on the way.
    """
    from lora import learning
    from lora.evolution.exam import Terms, divided
    from lora.evolution.queue import check_skill_name
    from lora.evolution.teacher import KINDS, Consent, teacher_host
    from lora.files import os_errors
    from lora.presets import LoRAConfig

    terms = Terms(
        steps=steps,
        rank=rank,
        alpha=alpha,
        weight=weight,
        seed=seed,
        max_taken=max_taken,
        documents_only=documents_only,
        share_exam=share_exam,
        share_questions=share_questions,
        placebos=placebos,
    )
    LoRAConfig(rank, alpha)
    if ask is not None:
        if None in (teacher_model, key_file):
            raise ArgumentError("--ask", "--teacher-model and --key-file beside it", "not both")
        host = teacher_host(teacher_url, insecure=insecure_http)
        allowed, _, kind = ask.rpartition(":")
        if kind not in KINDS:
            raise ArgumentError("--ask", " or ".join(f"HOST:{each}" for each in KINDS), ask)
        if allowed != host:
            raise ArgumentError("--ask", f"the host of --teacher-url, {host}", ask)
    if name is not None:
        check_skill_name(name)
    checks_done()
    check_input(documents, "a folder of documents, or a file of logged pairs")
    check_input(cards, "a folder of live cards", folder=True)
    check_input(questions, "a file of routing checks")
    check_input(answers, "a file of answers")
    if dry_run:
        with waiting(f"reading {documents}"):
            source = learning.material(documents)
        training, held_out = divided(source.pairs, seed)
        row = source.pairs.statistics() | {"training": len(training), "held_out": len(held_out)}
        shown = ("rows", "groups", "training", "held_out")
        return Result(row, table_of([{key: row[key] for key in shown}]))
    teacher = None
    if ask is not None:
        # What was sent and answered is not kept in the folder that is served.
        with os_errors(out):
            folder = out.resolve()
            folder = folder.with_name(f"{folder.name}.teacher")
            folder.mkdir(0o700, parents=True, exist_ok=True)
        teacher = _teacher(
            Consent(host, [kind]),
            key_file,
            folder,
            budget,
            model=teacher_model,
            base_url=teacher_url,
            max_tokens=max_tokens,
            insecure_http=insecure_http,
        )
    with progress_bar(f"learning {documents.name}") as progress:
        evolved = learning.evolve(
            lora.ArrowEngine.from_pretrained(model),
            documents,
            out,
            name=name,
            cards=cards,
            questions=questions,
            answers=answers,
            teacher=teacher,
            terms=terms,
            progress=progress,
        )
    status = 0 if evolved.lesson.live else NOTHING_TO_SERVE
    return Result(dict(evolved.facts), evolved.facts["text"], status)


def _teacher(
    consent: "lora.evolution.Consent", key_file: Any, folder: Path, budget: int, **options: Any
) -> "lora.evolution.CloudDistiller":
    from lora.evolution.teacher import CloudDistiller, Ledger, OpenAITeacher
    from lora.federation.keys import read_small

    key = read_small(key_file).decode("ascii", "replace").strip()
    ledger = Ledger(folder / "ledger.sqlite", budget)
    teacher = OpenAITeacher(ledger=ledger, api_key=key, cache=folder / "asked", **options)
    return CloudDistiller(teacher, consent=consent)


factory = typer.Typer(
    help="Long work as durable jobs: add, run, status, rollback.", no_args_is_help=True
)
app.add_typer(factory, name="factory", epilog="Example: lora factory status")

Root = Annotated[Path, typer.Option("--root", help="Folder of the factory.")]


@command(
    "factory add -- train pairs.jsonl --name docs --preset quick",
    group=factory,
    name="add",
    settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def factory_add(
    arguments: list[str],
    *,
    priority: int = 0,
    seconds: float = 8 * 3600.0,
    memory: int | None = None,
    max_failures: int = 3,
    again: bool = False,
    root: Root = Path("factory"),
) -> Result:
    """Queue a job: after --, a command line of train, extract, merge or evolve without outputs.

    Args:
        arguments: The command line, with --name; what it reads must be there.
        priority: Higher runs first.
        seconds: Limit of one attempt.
        memory: Limit of one attempt, in bytes; none if omitted.
        max_failures: Failed attempts after which the job is dead.
        again: Queue it again if it is dead.
    """
    from lora.evolution.factory import SkillFactory

    shop = SkillFactory(root)
    limits = {"seconds": seconds, "memory": memory, "max_failures": max_failures}
    job = shop.add(arguments, priority=priority, **limits)
    if again and job.state == "dead":
        job = shop.retry(job.id, priority=priority, **limits)
    facts = {"id": job.id, "kind": job.kind, "name": job.name, "state": job.state}
    return Result(facts, f"{job.state}: {job.kind} {job.name} ({job.id[:12]})")


@command("factory run --at 02:00", group=factory, name="run")
def factory_run(
    *,
    at: str | None = None,
    scheduler: str | None = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    keep: Annotated[int, typer.Option(min=1)] = 3,
    root: Root = Path("factory"),
) -> Result:
    """Run what is queued; exit 1 if a job is dead.

    Args:
        at: Run every night at this local time, HH:MM; once if omitted.
        scheduler: tcp://host:port of a Dask scheduler to run on; this machine if omitted.
        workers: How many jobs run at a time.
        keep: Versions of each skill to keep, beside the one that was live.
    """
    from lora.evolution.factory import SkillFactory, cluster
    from lora.evolution.nights import parse_at

    if at is not None:
        parse_at(at)
    if scheduler and ":" not in scheduler:
        raise ArgumentError("--scheduler", "tcp://HOST:PORT", scheduler)
    checks_done()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    console = Console(stderr=True, markup=False)

    def report(job: Any) -> None:
        reason = f": {job.error}" if job.error else ""
        console.print(f"{job.state}: {job.kind} {job.name}{reason}", soft_wrap=True)

    with cluster(scheduler) if scheduler else nullcontext() as executor:
        shop = SkillFactory(root, executor=executor, workers=workers, keep=keep, on_event=report)
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
    if not (root / "queue.sqlite").is_file():
        return Result([], f"no factory in {root}: `lora factory add` makes one")
    from lora.evolution.factory import SkillFactory

    shop = SkillFactory(root)
    table = shop.history() if history else shop.skills() if skills else shop.status()
    rows = table.to_pylist()
    if skills and not history and rows:
        shown = ("name", "version", "live", "digest", "id")
        return Result(rows, blocks([{key: row[key] for key in shown} for row in rows], *shown[:2]))
    return _jobs(rows, "history" if history else "skills" if skills else "jobs")


@command("factory rollback docs --version 0.2.0", group=factory, name="rollback")
def factory_rollback(
    name: str, *, version: str | None = None, root: Root = Path("factory")
) -> Result:
    """Put an earlier version of a skill into service.

    Args:
        name: Name of the skill.
        version: Which; the one before the live one if omitted.
    """
    from lora.evolution.factory import SkillFactory

    live = SkillFactory(root).rollback(name, version)
    facts = {"name": name, "version": live.version, "digest": live.digest}
    return Result(facts, f"live: {name} version {live.version}, {live.digest}")


def _jobs(rows: list[dict[str, Any]], what: str = "jobs") -> Result:
    """Draw some columns of a factory's table, and below it what was said of a row."""
    if not rows:
        return Result(rows, f"no {what} yet")
    short, notes = [], []
    for row in rows:
        short.append({key: row[key] for key in SHOWN if key in row})
        if "at" in row:
            short[-1]["at"] = f"{row['at']:%Y-%m-%d %H:%M:%S}"
        else:
            short[-1]["id"] = row["id"][:12]
        if note := row.get("error") or shortened(row.get("note")):
            notes.append({next(iter(short[-1].values())): note})
    return Result(rows, Group(table_of(short), *map(details, notes)))
