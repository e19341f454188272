"""A job of the skill factory is a command line of `lora`: it is checked here when it is added.

Its inputs become absolute paths, and its outputs are names in the job's folder, where it will run.

Requirements: R19.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from lora.cli.app import INPUTS, ChecksPassed, app, checking
from lora.errors import ArgumentError, shown
from lora.evolution.queue import Job
from lora.evolution.worker import content_id
from lora.files import load

OUTPUTS: dict[str, Any] = {
    "out": "card.lora.arrow",
    "checkpoint": "checkpoint.safetensors",
    "as_json": True,
}
"""Parameters that the factory sets."""

REFUSED = (*OUTPUTS, "plot", "ask", "key_file", "dry_run")
"""Parameters that a job may not have: other outputs, and what needs a secret."""


def job_of(arguments: Sequence[str], **limits: Any) -> Job:
    """Check a command line and make a job of it; `limits` are those of `Job.of`."""
    if not isinstance(arguments, list | tuple) or {*map(type, arguments)} - {str}:
        raise ArgumentError("job", "a list of the words of a command line", shown(arguments))
    command, *words = arguments or [""]
    if command not in INPUTS:
        raise ArgumentError("job", f"one of the commands {', '.join(INPUTS)}", shown(command))
    group: Any = typer.main.get_command(app)
    parser = group.commands[command]
    values = _checked(parser, command, words)
    for parameter in parser.params:
        is_refused = parameter.name in REFUSED
        if is_refused and values[parameter.name] not in (None, False, Path(OUTPUTS["out"])):
            expected = "no secret" if parameter.name in ("ask", "key_file") else "no output"
            raise ArgumentError(f"job: {command}", expected, parameter.opts[0], "leave it out")
    values |= OUTPUTS
    if values["name"] is None:
        raise ArgumentError(f"job: {command}", "--name, the name of the skill", "none")
    line, inputs = [command], {}
    for parameter in parser.params:
        value = values.get(parameter.name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if parameter.name in INPUTS[command] and item not in (None, "stdlib"):
                path = str(Path(item).absolute())
                inputs[path] = content_id(path)
                line += _words(parameter, path)
            elif item != parameter.default:
                line += _words(parameter, item)
    return Job.of(line, values["name"], inputs, base=_base(values), **limits)


def _base(values: Mapping[str, Any]) -> str:
    """Tell the base model of a job, or the one that a merge's cards are for."""
    path: Path | None = values.get("model") or values.get("base") or values.get("tuned")
    if isinstance(values.get("cards"), list | tuple):
        path = values["cards"][0]
        if path.is_file() and path.suffix.lower() != ".safetensors":
            card = load(path)
            return card.base_fingerprint or card.base_model or ""
    return "embedded" if path is None else str(path.resolve())


def _checked(parser: Any, command: str, words: list[str]) -> dict[str, Any]:
    """Run a command up to its `checks_done`; returns the values of its parameters."""
    checking.set(True)
    try:
        context = parser.make_context(
            command, ["--out", OUTPUTS["out"], *words], help_option_names=[]
        )
        with suppress(ChecksPassed):
            parser.invoke(context)
        return dict(context.params)
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:
            raise
        message = error.format_message()  # type: ignore[attr-defined]
        raise ArgumentError(f"lora {command}", "arguments that it takes", message) from error
    finally:
        checking.set(False)


def _words(parameter: Any, value: Any) -> list[str]:
    """Write a parameter with its value as words of a command line."""
    if parameter.param_type_name == "argument":
        return [str(value)]
    if isinstance(value, bool):
        return [(parameter.opts if value else parameter.secondary_opts)[0]]
    return [parameter.opts[0], str(value)]
