"""What each command prints with `--json`: its keys, each with a meaning.

`python docs/json_keys.py` runs the commands and says which of their keys the tables lack.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora.engine import default_model

ROOT = Path(__file__).parents[1]

FILE = "The file that was written."
DIGEST = "SHA-256 of the card's file, as 64 hex digits."
RANK = "The largest rank of a module."
SCORES = "`recall_at_1`, `recall_at_10`, `mrr` and the number of `queries`"
TIME = "as text, UTC; null if it has not happened"

FORMS = {
    "lora encode": "A list with a list of numbers for each text. With `--out`, an object:",
    "lora route": "A list, the best card first, empty if none fits. Each entry is an object:",
    "lora list": "A list with an object for each card and signer that peers offer:",
    "lora evolve": "One object; with `--dry-run` another one, which counts rows, groups and pairs:",
    "lora factory run": "A list with an object for each job:",
    "lora factory status": "A list with an object for each job, and other keys for events and "
    "versions:",
    "lora bench": "An object with a key for each part that ran, such as `routing`. Its value has:",
}
"""Command -> what is printed, where it is not one object."""

KEYS: dict[str, dict[str, str]] = {
    "lora inspect": {
        "name": "Name of the card.",
        "digest": DIGEST,
        "format": "Version of the file format.",
        "rank": "The card's rank; a module may have another.",
        "alpha": "The card's alpha.",
        "dtype": "Type of the factors, such as `float32`.",
        "base_model": "Name of the base model; null if the card names none.",
        "base_fingerprint": "Fingerprint of the base's weights; null if the card holds none.",
        "target_modules": "The targets, as in PEFT's `target_modules`.",
        "parameters": "Number of elements of all factors.",
        "bytes": "Bytes of all factors.",
        "metadata": "What the card says of itself, such as `description` and `tags`.",
        "modules": "Module → a list of in, rank, out and scaling.",
        "extra": "Metadata of the Arrow schema that this version does not know.",
    },
    "lora convert": {
        "file": "The file or folder that was written.",
        "name": "Name of the card.",
        "rank": RANK,
        "modules": "Number of modules.",
    },
    "lora merge": {
        "file": FILE,
        "digest": DIGEST,
        "rank": RANK,
        "modules": "Number of modules.",
        "error": "Module → share of ΔW that was cut off, as a ratio of norms; 0 if exact.",
        "kept": "Share of ΔW's squares that is kept, if the rank was limited.",
        "rank_90": "The rank that keeps 90 % of ΔW's squares, if the rank was limited.",
    },
    "lora extract": {
        "file": FILE,
        "digest": DIGEST,
        "rank": RANK,
        "modules": "Module → its `rank`, the `energy` that this holds and the relative `error`.",
        "held": "With `--base`: share of the squares of the whole change that the card holds.",
        "left_out": "With `--base`: changed weight that is not in the card → its `norm` and `share`"
        " of the squares.",
    },
    "lora fold": {
        "folder": "The folder that was written.",
        "tensors": "Number of tensors that changed.",
        "cards": "Card → number of its modules that the base has.",
        "left_out": "Files of the base that hold its weights in another form, and hidden folders.",
    },
    "lora encode": {
        "file": FILE,
        "shape": "Texts and dimensions, with `--out` alone.",
        "rows": "Number of rows, with `--parquet`.",
    },
    "lora route": {
        "name": "With `--card`: name of the card.",
        "score": "With `--card`: its cosine to the query.",
        "kind": "With `--cards`: `routes`, `unsure` or `unknown`; only a first `routes` answers.",
        "best": "With `--cards`: `name` and `score` of the card, and whether it is `virtual`.",
        "unknown": "With `--cards`: below this score the card does not know the query.",
        "routes": "With `--cards`: from this score on, the card answers.",
    },
    "lora probe": {
        "rows": "A list: each layer and block with its `kind`, `name` and scores; null if not "
        "measured. With `--base` this list alone is printed, of `name`, `change` and `held`.",
        "correlations": "Score → its rank correlation with ablation.",
        "hot": "Names of the blocks that hold the share of influence.",
    },
    "lora train": {
        "file": FILE,
        "digest": DIGEST,
        "steps": "Number of steps that were taken.",
        "before": f"The base model on held-out pairs: {SCORES}.",
        "after": "The card on the same pairs, with the same keys.",
        "reason": "Only with exit status 3: why the card is not worth serving.",
    },
    "lora eval": {
        "queries": "Number of pairs.",
        "base": "`mrr` and `recall_at_1` of the base model.",
        "cards": "A list: each card's `file`, `name`, `mrr`, `recall_at_1`, and its `gain` in MRR "
        "between the bounds `lower` and `upper`.",
    },
    "lora serve": {
        "cards": "Number of cards.",
        "uri": "Where they are served. This line is printed at the start.",
        "metrics": "Address of the metrics, with `--metrics-port`.",
    },
    "lora list": {
        "name": "Name of the card.",
        "version": "Version of the card.",
        "rank": "The card's rank.",
        "size": "Bytes of its file.",
        "digest": DIGEST,
        "description": "What the card is for.",
        "base_model": "Name of the base model.",
        "signer": "Public key that signed it; null if it is unsigned.",
        "peers": "A list of the peers that offer it.",
        "peer": "With `--peers`: address of a peer.",
        "node": "With `--peers`: its identity.",
    },
    "lora fetch": {"name": "Name of the card.", "digest": DIGEST, "file": "Where the card is now."},
    "lora keygen": {
        "private": "File of the private key.",
        "public": "File of the public key.",
        "public_key": "The public key, as 64 hex digits.",
    },
    "lora sign": {"file": "File of the signature.", "name": "Name of the card.", "digest": DIGEST},
    "lora evolve": {
        "name": "Name of the skill.",
        "verdict": "`skill`, `format`, `nothing` or `can't tell`: what the exam found.",
        "live": "Whether the card is served now.",
        "reason": "Why it is not; null if it is.",
        "file": "File of the live card, or null.",
        "exam": "File of the held-out sample that is kept beside it, or null.",
        "candidate": "File of a card that is a skill but was refused, or null.",
        "digest": "SHA-256 of the live card's file, or null.",
        "version": "Version of the card, or null.",
        "figures": "All measurements, as the card's `provenance` holds them.",
        "text": "What is printed without `--json`.",
    },
    "lora factory add": {
        "id": "Identity of the job, a SHA-256 of what it is to do.",
        "kind": "Its command, such as `merge`.",
        "name": "Name of the skill.",
        "state": "`queued`, `running`, `done`, `rejected` or `dead`.",
    },
    "lora factory rollback": {
        "name": "Name of the skill.",
        "version": "The version that is live now.",
        "digest": DIGEST,
    },
    "lora conformance": {
        "schema_version": "Version of this report's form.",
        "suite": "Version of this library.",
        "specification": "Digest of the sentences that were tested.",
        "binding": "`name` and `version` of the implementation.",
        "profile": "How many examples a property gets.",
        "seed": "Seed of the examples.",
        "requirements": "Requirement → its `statement`, `verdict`, `reason` and `tests`.",
    },
    "lora bench": {
        "machine": "Processor, cores, threads, load, versions and commit.",
        "rows": "A list: `what` was measured, `value`, `unit` or `kind`, `interval`, `target`, and "
        "whether it was `met`.",
    },
    "lora demo": {
        "base": f"The base model on held-out pairs: {SCORES}.",
        "card": "The trained card on the same pairs, with the same keys.",
        "digest": DIGEST,
        "mapped_equal": "Whether the mapped card equals the trained one.",
        "routes": "Query → names of the cards that it is routed to.",
        "restored": "Whether the base answers as before once the card is removed.",
        "files": "A list of the files that were written.",
    },
}
"""Command -> key -> meaning."""

JOB = {
    **KEYS["lora factory add"],
    "base": "Base model that the job is for.",
    "priority": "Higher runs first.",
    "attempts": "Attempts that have begun.",
    "failures": "Attempts that failed.",
    "max_failures": "Failures after which the job is dead.",
    "created": f"When it was queued, {TIME}.",
    "started": f"When its last attempt began, {TIME}.",
    "ended": f"When it ended, {TIME}.",
    "digest": "SHA-256 of the card that it made, or null.",
    "version": "Version of that card while it is kept, or null.",
    "live": "Whether that card is served.",
    "error": "Why the last attempt failed or was rejected, or null.",
}
KEYS["lora factory run"] = JOB
KEYS["lora factory status"] = {
    **JOB,
    "event": "With `--history`: number of the event.",
    "at": "With `--history`: when it happened, as text, UTC.",
    "what": "With `--history`: what happened, such as `add`, `claim` or `accept`.",
    "job": "With `--history`: identity of the job.",
    "attempt": "With `--history`: number of the attempt.",
    "note": "With `--history`: what was said of it, or null.",
}


def section(name: str) -> list[str]:
    """The part of a command's page on what it prints with `--json`."""
    lines = ["## Keys with `--json`", "", FORMS.get(name, "One object:"), ""]
    rows = [f"| `{key}` | {meaning} |" for key, meaning in KEYS[name].items()]
    return [*lines, "| key | what it is |", "|---|---|", *rows, ""]


def names_in(facts: Any) -> set[str]:
    """The keys of an object, or of the objects in a list."""
    rows = facts if isinstance(facts, list) else [facts]
    return {key for row in rows if isinstance(row, dict) for key in row}


def started(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """Start a command of this checkout in a folder."""
    command = [sys.executable, "-m", "lora.cli", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)  # noqa: S603 - our own commands


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, Any]]:
    """Serve the cards of the folder `live` and give what the command printed."""
    options = "--host 127.0.0.1 --port 0 --no-announce --metrics-port 0 --json"
    with started(folder, ["serve", "live", *options.split()]) as server:
        try:
            yield json.loads(server.stdout.readline() if server.stdout else "")
        finally:
            server.terminate()


def runs(folder: Path) -> Iterator[tuple[str, Any]]:
    """Run every command but evolve, which takes minutes; yield its name and what it printed."""

    def run(name: str, line: str) -> tuple[str, Any]:
        printed, problem = started(
            folder, [*name.split()[1:], "--json", *line.split()]
        ).communicate()
        if not printed:
            raise RuntimeError(f"{name} {line}: {problem}")
        return name, json.loads(printed)

    pairs = [
        {"query": f"question {n} on {n % 7}", "positive": f"answer {n}", "group": f"{n % 12}"}
        for n in range(48)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "texts.txt").write_text("A text.\nAnother sentence.\nThe third one.\n")
    model, live = default_model(), folder / "live"
    live.mkdir()
    peft = ROOT / "docs/examples/peft-adapter"
    yield run("lora convert", f"{peft} -o live/docs.lora.arrow --name docs --description docs")
    card = "live/docs.lora.arrow"
    yield run("lora inspect", card)
    yield run("lora merge", f"{card} {card} -o both.lora.arrow --strategy ties --rank 2")
    yield run("lora fold", f"{model} {card} -o merged")
    yield run("lora extract", f"merged --base {model} -o x.lora.arrow --rank 2 --target query")
    yield run("lora encode", "text --out vectors.npy")
    yield run("lora route", f"text --card {card}")
    yield run("lora route", "text --cards live")
    yield run("lora probe", "texts.txt")
    yield run("lora train", "pairs.jsonl --name new -o new.lora.arrow --steps 2")
    yield run("lora eval", f"{card} --pairs pairs.jsonl")
    yield run("lora keygen", "me.pem")
    yield run("lora sign", f"{card} --key me.pem")
    with serving(folder) as facts:
        yield "lora serve", facts
        yield run("lora list", f"--peer {facts['uri']}")
        yield run("lora list", f"--peers --peer {facts['uri']}")
        yield run("lora fetch", f"docs --trust me.pem.pub --cache cache --peer {facts['uri']}")
    line = f"merge {card} new.lora.arrow --name both"
    yield run("lora factory add", f"-- {line}")
    yield run("lora factory run", "")
    for option in ("", "--history", "--skills"):
        yield run("lora factory status", option)
    yield run("lora conformance", "--only R4.4")
    yield "lora bench", next(iter(run("lora bench", "--quick --only routing")[1].values()))
    yield run("lora demo", "--steps 2")


def main() -> None:
    """Compare what the commands print with the tables."""
    with tempfile.TemporaryDirectory() as folder:
        differing = 0
        for name, facts in runs(Path(folder)):
            unknown = names_in(facts) - KEYS[name].keys()
            differing += bool(unknown)
            sys.stdout.write(f"{name}: {', '.join(sorted(unknown)) or 'as in the table'}\n")
            sys.stdout.flush()
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
