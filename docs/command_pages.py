"""Write the reference of the command line: a table of the commands, and a page for each of them."""

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import json_keys
import typer
from reference import FILTER, escaped

from docs import outputs
from lora.cli.app import app

DOCS = Path(__file__).parent

MODULES = [f"lora.cli.{name}" for name in ["cards", "models", "federation", "evolution", "suite"]]
"""What defines the commands, in the order of the page."""

KINDS = {int: "integer", float: "number", str: "text", Path: "path"}
"""What the value of an option is called."""

DEFAULT = re.compile(r" ?\[default: (.+)\]")
"""How a help text says the default of a field."""

STATUSES = {
    0: "the command did its work",
    1: "the command failed; one line on standard error, which begins with `lora:`, says why",
    2: "the command line is wrong, such as an option that does not exist; nothing was done",
    130: "it was interrupted",
}
"""Exit status -> when, for every command."""

MORE_STATUSES: dict[str, dict[int, str | None]] = {
    "lora conformance": {
        1: "also if a requirement could not be tested, or failed and is not declared to fail"
    },
    "lora evolve": {3: "the card that it trained did not go live; the output says why"},
    "lora factory run": {1: "also if a job is dead: it failed for good, or as often as it may"},
    "lora list": {0: "also if no peer was found and none was named"},
    "lora route": {0: "also if no card fits; then standard output is empty"},
    "lora serve": {0: "also if it was interrupted", 130: None},
    "lora train": {3: "the card is written, but it is no better than the base model"},
}
"""Command -> status -> what is said of it beside that; None if it has no such status."""


def commands(command: Any = None, name: str = "lora") -> Iterator[tuple[str, Any]]:
    """Every command of the command line with its full name, groups before what is in them."""
    command = typer.main.get_command(app) if command is None else command
    yield name, command
    for part, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {part}")


def is_group(command: Any) -> bool:
    """Whether it has commands of its own."""
    return hasattr(command, "commands")


def file_of(name: str) -> str:
    """The file of a command's page."""
    return f"{name.replace(' ', '-')}.md"


def marked(text: str | None) -> str:
    """A help text, its options as code."""
    text = inspect.cleandoc(text or "").replace("``", "`")
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`{.option}", text)


def sentence_of(command: Any) -> str:
    """The first paragraph of its help, in a line."""
    return " ".join(marked(command.help).partition("\n\n")[0].split())


def pages() -> dict[str, str]:
    """Every page of the command line by its file."""
    by_name = dict(commands())
    root = by_name.pop("lora")
    texts = {file_of(name): page(name, command) for name, command in by_name.items()}
    return {"reference-command-line.md": overview(root, by_name), **texts}


def overview(root: Any, by_name: dict[str, Any]) -> str:
    """The table of all commands, by the modules that define them."""
    lines = ["# Command line", "", f"{sentence_of(root)} Every command has `--help` and `--json`."]
    lines += ["", FILTER.format("Filter: merge, card, serve …"), ""]
    rows: dict[str, list[str]] = {module: [] for module in MODULES}
    for name, command in by_name.items():
        inner = next((c for n, c in by_name.items() if n.startswith(f"{name} ")), command)
        link = f'<span id="{name.replace(" ", "-")}">[`{name}`]({file_of(name)})</span>'
        rows[inner.callback.__module__].append(f"| {link} | {escaped(sentence_of(command))} |")
    for module, part in rows.items():
        title = (sys.modules[module].__doc__ or "").partition(":")[0]
        lines += ["", f"## {title}", "", "| command | what it does |", "|---|---|", *part]
    lines += [
        "",
        "## lora",
        "",
        "These options stand before the name of a command:",
        "",
        *parameters(root),
    ]
    lines += ["## Exit statuses", "", *statuses("lora"), ""]
    lines += ["Where a status has a further meaning, the page of the command says so."]
    return "\n".join([*lines, ""])


def page(name: str, command: Any) -> str:
    """The page of a command: what it does, usage, options, a run, its statuses, its guides."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = [
        (f"{{{p.name}}}" if p.required else f"[{p.name}]") + "…" * (p.nargs == -1)
        for p in sorted(arguments, key=lambda p: not p.required)
    ]
    usage += ["COMMAND"] if is_group(command) else []
    lines = ["---", "search:", "  boost: 2", "---", "", f"# {name}", "", marked(command.help), ""]
    lines += ["```text", " ".join([name, "[OPTIONS]", *usage]), "```", ""]
    if is_group(command):
        lines += ["| command | what it does |", "|---|---|"]
        for part, inner in command.commands.items():
            link = f"[`{name} {part}`]({file_of(f'{name} {part}')})"
            lines.append(f"| {link} | {escaped(sentence_of(inner))} |")
        return "\n".join([*lines, ""])
    lines += ["## Arguments and options", "", *parameters(command), "## Example", ""]
    lines += [*run_of(name), "## Exit statuses", "", *statuses(name), ""]
    lines += json_keys.section(name)
    lines += ["## Guides that use it", ""]
    lines += [f"- [{title_of(path)}]({link_to(path)})" for path in guides(name)]
    return "\n".join([*lines, ""])


def parameters(command: Any) -> list[str]:
    """The tables of a command's arguments and options, one for each group of its help."""
    groups: dict[str, list[str]] = {"": []}
    for parameter in command.params:
        group = (getattr(parameter, "rich_help_panel", None) or "").replace("Arguments", "")
        if not parameter.hidden:
            groups.setdefault(group, []).append(_parameter(parameter))
    lines = []
    for group, rows in groups.items():
        heading = [f"### {group}", ""] if group else []
        lines += [*heading, "| option | what it is | default |", "|---|---|---|", *rows, ""]
    return lines


def _parameter(parameter: Any) -> str:
    """A row of a command's table."""
    opts = (*parameter.opts, *parameter.secondary_opts)
    names = ", ".join(f"`{name}`{{.option}}" for name in opts)
    if parameter.param_type_name == "option" and not parameter.is_flag:
        annotation = parameter.type_descriptor.annotation
        kind = KINDS[(get_args(annotation) or (annotation,))[0]]
        names += f" *{kind}*" + ", repeatable" * parameter.multiple
    text = re.sub(DEFAULT, "", marked(parameter.help))
    return f"| {names} | {escaped(text)} | {_default(parameter)} |"


def _default(parameter: Any) -> str:
    """What a parameter is without being given, as its cell says it."""
    value = parameter.default
    if said := re.search(DEFAULT, parameter.help):  # of a field of a class
        value = said[1]
    if parameter.required:
        return "required"
    if value is True:
        return f"`{parameter.opts[0]}`{{.option}}"
    if value is False or value in (None, ""):
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def statuses(name: str) -> list[str]:
    """The table of a command's exit statuses."""
    also = MORE_STATUSES.get(name, {})
    rows = [
        f"| {status} | {'; '.join(filter(None, (STATUSES.get(status), also.get(status))))} |"
        for status in sorted({*STATUSES, *also})
        if also.get(status, "") is not None
    ]
    return ["| status | when |", "|---|---|", *rows]


@cache
def command_blocks() -> list[tuple[Path, Any, list[str]]]:
    """Shell blocks of the pages: the page, the block, and its commands of lora."""
    written = [path for path in DOCS.rglob("*.md") if path.parent.name != "generated"]
    written.remove(DOCS / "how-to/troubleshooting.md")  # whose commands fail
    return [
        (path, block, re.findall(r"^lora (?:factory )?\w+", block.code, re.MULTILINE))
        for path in sorted(written)
        for block in outputs.examples(path.read_text(encoding="utf-8"))
        if block.info == "sh"
    ]


def guides(name: str) -> list[Path]:
    """The pages that use a command, how-to pages before others."""
    using = dict.fromkeys(path for path, _, names in command_blocks() if name in names)
    return sorted(using, key=lambda path: path.parent.name != "how-to")


def title_of(path: Path) -> str:
    """The title of a page."""
    title = re.findall("^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)[0]
    return {"lora": "Home"}.get(title, title)


def link_to(path: Path) -> str:
    """Where a page is, seen from a generated one."""
    return f"../{path.relative_to(DOCS).as_posix()}"


def run_of(name: str) -> list[str]:
    """A run of a command that a page shows, of those with the fewest others; below each of its
    commands what that prints.

    Raises:
        ValueError: No page shows one.
    """

    def sort_key(run: tuple[Path, Any, list[str]]) -> tuple[int, bool, int]:
        path, block, names = run
        others = sum(other != name for other in names)
        return others, path.parent.name != "how-to", len(block.code)

    runs = [run for run in command_blocks() if name in run[2] and run[1].output]
    if not runs:
        raise ValueError(f"no page of docs/ shows a run of {name} with what it prints")
    path, block, _ = min(runs, key=sort_key)
    commands = re.findall(r"(?:^(?!lora ).*\n)*^lora (?:.*\\\n)*.*\n", block.code, re.MULTILINE)
    printed = block.output.rstrip("\n").split("\n\n") if len(commands) > 1 else []
    if len(commands) != len(printed):  # one command, whose output may have empty lines
        commands, printed = [block.code], [block.output.rstrip("\n")]
    lines = [f"A run, from [{title_of(path)}]({link_to(path)}):", ""]
    for code, output in zip(commands, printed, strict=True):
        lines += [f"```sh\n{code}```", "", f"```text\n{output}\n```", ""]
    return lines
