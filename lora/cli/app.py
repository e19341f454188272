"""What all commands share: the application, common options, output, errors and progress.

Errors are one line on stderr and exit status 1. A command line that is wrong whatever the files
hold exits with 2: what typer refuses, and one of `OF_USAGE` before the command's `checks_done`.
An interrupt exits with 130.

Requirements: R25.
"""

import gc
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from copy import copy
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich import box
from rich.console import Console, Group
from rich.status import Status
from rich.table import Column, Table
from rich.text import Text

import lora
from lora.errors import (
    ArgumentError,
    BadNameError,
    BaseModelError,
    CardError,
    CardFileError,
    CardNotFoundError,
    DataError,
    LoRAError,
    ShapeError,
    StoreError,
    TargetError,
)
from lora.progress import progress_bar as progress_bar  # noqa: PLC0414 - for the commands

NOTHING_TO_SERVE = 3
"""Exit status of a command that worked but made nothing worth serving."""

OF_USAGE = (ArgumentError, CardError, BadNameError)
"""Errors of a command line, unless they name a file or come from the work itself."""

CARD = (".arrow",)
"""How the name of a card file ends."""

INPUTS: dict[str, tuple[str, ...]] = {}
"""Commands that may be jobs of a skill factory -> the parameters that are paths they read."""

app = typer.Typer(
    name="lora",
    help="LoRA adapters as Arrow cards: read, route, encode, train, merge, extract, serve.",
    epilog="Example: lora demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    Path | None, typer.Option(help="Folder of a sentence encoder; the embedded MiniLM if omitted.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
_JSON = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)


class Result(NamedTuple):
    """What a command gives back.

    Args:
        facts: Printed with `--json`.
        text: Printed otherwise: a string, or something that rich draws.
        status: The exit status.
        failure: A line for stderr after the output; it makes the exit status 1.
    """

    facts: Any
    text: Any = None
    status: int = 0
    failure: str = ""


class GroupedCommand(typer.core.TyperCommand):
    """A command whose help lists options by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a list for each group."""
        groups: dict[str, Any] = {}
        for parameter in ctx.command.get_params(ctx):
            kind = f"{parameter.param_type_name}s".title()
            title = parameter.rich_help_panel or kind
            groups.setdefault(title, []).append(parameter.get_help_record(ctx))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class ChecksPassed(Exception):  # noqa: N818 - not an error
    """Ends a command that was run only to check its command line."""


checking: ContextVar[bool] = ContextVar("checking", default=False)
"""Whether the command line is only checked."""

working: ContextVar[bool] = ContextVar("working", default=False)
"""Whether the command line is checked and the work has begun."""


def checks_done() -> None:
    """Mark the point of a command where its arguments are checked and its work begins."""
    if checking.get():
        raise ChecksPassed
    working.set(True)


def command(
    example: str,
    *,
    group: typer.Typer = app,
    name: str | None = None,
    inputs: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    **composed: Callable[..., Any],
) -> Callable[[Callable[..., Result | None]], Callable[..., Any]]:
    """Add a function as a command: positional parameters are arguments, keyword-only ones options.

    The help is the docstring, whose sections are the groups. Every command has `--json`.

    Args:
        inputs: For a command that may be a job: its parameters that are paths it reads.
        composed: Parameter -> a function that makes its value from options of its own.
    """

    def register(function: Callable[..., Result | None]) -> Callable[..., Any]:
        parameters = _parameters(function, **composed)
        shared = "as_json" not in inspect.signature(function).parameters
        if shared:
            parameters.append(_JSON)

        @wraps(function)
        def run(**options: Any) -> int:
            working.set(False)
            as_json = options.pop("as_json") if shared else options["as_json"]
            for key, part in composed.items():
                options[key] = part(**{p.name: options.pop(p.name) for p in _parameters(part)})
            try:
                result = function(**options)
            except LoRAError as error:
                error.where = _PLACES.get(error.where, error.where)
                words = partial(in_options, allows="allow" in options)
                error.expected, error.hint = map(words, (error.expected, error.hint))
                is_of_base = isinstance(error, BaseModelError | ShapeError | TargetError)
                if is_of_base and options.get("model", "") is None and "--model" not in error.hint:
                    hints = error.hint, "if the card is for another encoder, name it by --model"
                    error.hint = "; ".join(filter(None, hints))
                raise
            return 0 if result is None else show(result, as_json=as_json)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # for typer
        if inputs:
            INPUTS[function.__name__] = tuple(inputs)
        group.command(
            name=name,
            cls=GroupedCommand,
            help=(inspect.getdoc(function) or "").partition("\n\nArgs:")[0],
            epilog=f"Example: lora {example}",
            context_settings=settings,
        )(run)
        return run

    return register


_IN_COMMANDS = {
    "rename by dataclasses.replace(card, weights=...)": "leave one of the cards out",
    "by dataclasses.replace(card, name=...)": "by lora convert CARD -o FILE --name NAME",
    "drop it by dataclasses.replace(card, base_fingerprint=None)": "set it to None in Python",
    "pass description=": "lora convert CARD -o FILE --description TEXT sets one",
    "to load_safetensors or lora convert:": "by lora convert",
    "check_base=False waives this": "if the base is another one, name it by --model",
    "check_base=False adapts": "in Python the check can be left out, which adapts",
}
"""What a hint says for Python -> what it says on the command line."""

_PLACES = {
    "card 'config': alpha": "--alpha",
    "teacher: base_url": "--teacher-url",
    "peers": "--peer",
}
"""Where something is wrong, in Python -> the option that says it."""

_WITH_ALLOW = {
    "check_base=False waives this": "--allow other_base waives this",
    "check_base=False adapts": "--allow other_base adapts",
}
"""The same, for commands with --allow."""


def in_options(text: str, *, allows: bool = False) -> str:
    """Put options in the place of the keywords that stand in backticks in an error.

    Examples:
        >>> in_options("name it: `base_model=...`"), in_options("or `allow_older` waives this")
        ('name it: --base-model', 'or --allow older waives this')
    """
    for python, command_line in (_IN_COMMANDS | (_WITH_ALLOW if allows else {})).items():
        text = text.replace(python, command_line)

    def option(keyword: re.Match[str]) -> str:
        dashed = keyword[2].replace("_", "-")
        return f"--allow {keyword[2]}" if keyword[1] else f"--{dashed}"

    return re.sub(r"`(allow_)?(\w+)(=True|=\.\.\.)?`", option, text)


_COMMON = {
    "out": "The file to write; an existing one is replaced.",
    "name": "Name of the card.",
    "seed": "Seed of every random choice.",
}
"""The help of options that have none in their command's docstring."""


def _parameters(
    function: Callable[..., Any], **composed: Callable[..., Any]
) -> list[inspect.Parameter]:
    """Read a function's parameters for typer, with the help and the group in its docstring."""
    helps, group = dict[str, Any](), None
    entries = r"^(?!Args)([A-Z].*):$|^    (\w+): (.*(?:\n     .*)*)"
    for title, name, text in re.findall(entries, inspect.getdoc(function) or "", re.MULTILINE):
        group = title or group
        helps[name] = text, group
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in composed:
            parameters += _parameters(composed[name])
            continue
        annotation = parameter.annotation
        info = typer.Option(*(("--out", "-o") if name == "out" else ()))
        if hasattr(annotation, "__metadata__"):
            info, annotation = copy(annotation.__metadata__[0]), annotation.__origin__
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            info = typer.Argument()
        elif annotation is bool and parameter.default is False:  # without its --no-
            info = typer.Option(f"--{name.replace('_', '-')}")
        text, info.rich_help_panel = helps.get(name, (info.help or _COMMON.get(name, ""), None))
        info.help = " ".join(text.split())
        parameters.append(
            parameter.replace(
                annotation=Annotated[annotation, info], kind=inspect.Parameter.KEYWORD_ONLY
            )
        )
    return parameters


def show(result: Result, *, as_json: bool) -> int:
    """Print a result and return the exit status."""
    if as_json:
        print(json.dumps(result.facts, default=str))
    elif isinstance(result.text, str):
        print(result.text)
    elif result.text is not None:
        console = Console(emoji=False)  # its table of names would take 4 ms
        with console.capture() as drawn:
            console.print(result.text)
        print("\n".join(map(str.rstrip, drawn.get().splitlines())))
    if result.failure:
        fail(result.failure)
    return result.status


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Draw rows as a table, without the columns in which nothing stands.

    Examples:
        >>> rows = [{"name": "docs", "live": True, "error": None}, {"name": "law", "live": False}]
        >>> _ = show(Result(rows, table_of(rows)), as_json=False)
        name   live
        ───────────
        docs   yes
        law
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    columns = {key: cells for key, cells in columns.items() if any(map(_cell, cells))}
    for key, cells in columns.items():
        is_number = isinstance(cells[0], int | float) and not isinstance(cells[0], bool)
        table.add_column(key, justify="right" if is_number else "left", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(_cell(cell)) for cell in row))
    return table


def details(facts: Mapping[str, Any], indent: int = 0) -> Table:
    """Draw facts as lines of a name and a value, without those that have none."""
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for key, value in facts.items():
        if _cell(value):
            table.add_row(Text(" " * indent + printable(key)), Text(_cell(value)))
    return table


def blocks(rows: Sequence[Mapping[str, Any]], *heading: str) -> Group:
    """Draw each row as a heading of some of its values with the other ones below."""
    parts: list[Any] = []
    for row in rows:
        title = " ".join(filter(None, (_cell(row[key]) for key in heading)))
        others = {key: value for key, value in row.items() if key not in heading}
        parts += [Text(), Text(title, "bold"), details(others, indent=2)]
    return Group(*parts[1:])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "yes" if value else ""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return printable(", ".join(value))
    if isinstance(value, float):
        return f"{value:.4g}"
    is_text = isinstance(value, str) and "\n" not in value
    return printable(value if is_text else json.dumps(value, ensure_ascii=False, default=str))


def shortened(value: Any, limit: int = 240) -> str:
    """Write a value in a line of at most so many characters."""
    text = _cell(value)
    if len(text) <= limit:
        return text
    quotes = 0 if text == value else re.sub(r"\\.", "", text[:limit]).count('"')
    quote = '"' * (quotes % 2)
    return f"{text[:limit]}{quote}… (whole with --json)"


def printable(text: str) -> str:
    """Replace the characters that a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)


def fail(message: str, status: int = 1) -> None:
    """Print an error as one line and exit."""
    print(f"lora: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Run the command line; the entry point of the `lora` script."""
    gc.set_threshold(20_000)  # what a command imports is many objects and no garbage
    warnings.formatwarning = lambda message, *_, **__: f"lora: {in_options(str(message))}\n"
    try:
        status = app(_as_renamed(sys.argv[1:]), standalone_mode=False)
        sys.stdout.flush()
    except LoRAError as error:
        of_usage = isinstance(error, OF_USAGE) and not isinstance(error, CardFileError)
        fail(str(error), 2 if of_usage and not working.get() else 1)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except OSError as error:  # standard output is closed or cannot be written: drop the rest of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            fail(error.strerror or str(error))
        sys.exit(1)
    except Exception as error:
        usage = getattr(error, "exit_code", 0)
        if usage and len(sys.argv) < 2:
            error.show()  # type: ignore[attr-defined] # the help
            sys.exit(usage)
        if usage:
            fail(usage_problem(error), usage)
        if os.environ.get("LORA_DEBUG"):
            raise
        fail(f"internal error: {type(error).__name__}: {error} (LORA_DEBUG=1 shows where)")
    if status == 130:  # typer's own handling of an interrupt
        fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def usage_problem(error: Any) -> str:
    """Tell what is wrong with a command line; typer leaves out the value."""
    rule = error.message.partition("Input should be ")[2]
    if not rule:
        return f"{error.format_message()} (--help shows the usage)"
    expected = re.sub("valid |, unable.*", "", rule.replace("valid integer", "whole number"))
    expected = re.sub("^(?=greater|less)", "a number ", expected)
    problem = error.__cause__.errors()[0]
    return f"{error.param.opts[0]}: expected {expected}, found {problem['input']!r}"


def _as_renamed(words: list[str]) -> list[str]:
    """Take `conformance --json FILE`, which is --json-file now, for one version more."""
    words = [part for word in words for part in re.split("(?<=^--json)=", word)]
    place = words.index("--json") if words[:1] == ["conformance"] and "--json" in words else -1
    if 0 < place < len(words) - 1 and not words[place + 1].startswith("-"):
        print("lora: --json FILE is --json-file FILE now, and ends with 1.0", file=sys.stderr)
        words[place] = "--json-file"
    return words


def _version(value: bool) -> None:
    if value:
        print(f"lora-cards {lora.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Accept the options that come before a command."""


def waiting(what: str) -> Status:
    """Show on a terminal what is waited for; nothing is left of it."""
    return Console(stderr=True).status(what)


def check_input(path: Path | None, expected: str, *, folder: bool = False) -> None:
    """Refuse a file or folder that is not there, before the work begins."""
    if path is not None and not (path.is_dir() if folder else path.exists()):
        raise CardNotFoundError(str(path), expected, "none")


def check_output(option: str, path: Path | None, endings: Sequence[str] = ()) -> None:
    """Refuse a file that could not be written once the work is done."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        problem = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise StoreError(f"{option} {path}", "a file in an existing folder", problem)
    if endings and path.suffix.lower() not in endings:
        expected = f"a file that ends in {' or '.join(endings)}"
        hint = "lora convert makes PEFT folders of cards" if endings == CARD else ""
        raise ArgumentError(f"{option} {path}", expected, path.suffix or "no ending", hint)


def check_apart(out: Path, *inputs: Path) -> None:
    """Refuse an output that would replace what is read."""
    if out.resolve() in [path.resolve() for path in inputs]:
        expected, hint = "another place than the inputs'", "it would be overwritten"
        raise ArgumentError(f"--out {out}", expected, "the place of an input", hint)


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Refuse weights that are not one finite number for each card."""
    if weights is not None and len(weights) != count:
        raise ArgumentError("--weight", f"one for each of {count} cards", str(len(weights)))
    from lora.checks import finite

    for weight in weights or ():
        finite(weight, "--weight", ArgumentError)


def present(**options: Any) -> dict[str, Any]:
    """Keep the options that were passed."""
    return {name: value for name, value in options.items() if value is not None}


def read_lines(path: Path | None) -> list[str]:
    """Read the lines of a file, or of standard input, that are not blank."""
    try:
        text = path.read_text("utf-8") if path else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path or "standard input"), "text in UTF-8", error) from error
    return [line for line in text.splitlines() if line.strip()]
