"""A job of the skill factory is a command line of `lora`: it is checked here when it is added.

Its paths become absolute, and its outputs are names in the job's folder, where it will run. What it
makes is judged here by the samples of the live skills, unless the command does so itself.

Requirements: R19.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from lora.card import AdapterSet
from lora.cli.app import INPUTS, ChecksPassed, app, checking, usage_problem
from lora.errors import ArgumentError, LoRAError, shown
from lora.evolution.queue import Job
from lora.evolution.worker import content_id
from lora.files import load

OUTPUTS: dict[str, Any] = {
    "out": "card.lora.arrow",
    "checkpoint": "checkpoint.safetensors",
    "as_json": True,
}
"""Parameters that the factory sets; of evolve also the folder of the live skills."""

REFUSED = ("plot", "ask", "key_file", "dry_run")
"""Parameters that a job may not have: other outputs, and what needs a secret."""


def job_of(arguments: Sequence[str], live: Path, **limits: Any) -> Job:
    """Check a command line and make a job of it.

    Args:
        live: Folder of the live skills.
        limits: Those of `Job.of`.
    """
    if not isinstance(arguments, list | tuple) or {*map(type, arguments)} - {str}:
        raise ArgumentError("job", "a list of the words of a command line", shown(arguments))
    command, *words = arguments or [""]
    if command not in INPUTS:
        raise ArgumentError("job", f"one of the commands {', '.join(INPUTS)}", shown(command))
    group: Any = typer.main.get_command(app)
    parser = group.commands[command]
    outputs = {**OUTPUTS, "out": ".", "cards": str(live)} if command == "evolve" else OUTPUTS
    values = _checked(parser, command, ["--out", outputs["out"], *words])
    for parameter in parser.params:
        is_refused = parameter.name in (*outputs, *REFUSED)
        if is_refused and values[parameter.name] not in (None, False, Path(outputs["out"])):
            expected = "no secret" if parameter.name in ("ask", "key_file") else "no output"
            raise ArgumentError(f"job: {command}", expected, parameter.opts[0], "leave it out")
    values |= outputs
    if values["name"] is None:
        raise ArgumentError(f"job: {command}", "--name, the name of the skill", "none")
    read, line, inputs = {*INPUTS[command]} - outputs.keys(), [command], {}
    for parameter in parser.params:
        value: Any = values.get(parameter.name)
        for item in value if isinstance(value, list | tuple) else [value]:
            is_input = parameter.name in read and item not in (None, "stdlib")
            is_path = is_input or isinstance(item, Path)
            word = str(Path(item).absolute()) if is_path else item
            if is_input:
                inputs[word] = content_id(word)
            if word != parameter.default:
                line += _words(parameter, word)
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
    checking.set(True)
    try:
        context = parser.make_context(command, words, help_option_names=[])
        with suppress(ChecksPassed):
            parser.invoke(context)
        return dict(context.params)
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:
            raise
        expected = "arguments that it takes"
        raise ArgumentError(f"lora {command}", expected, usage_problem(error)) from error
    finally:
        checking.set(False)


def harm(arguments: Sequence[str], file: Path, live: Path) -> tuple[str, dict[str, Any]]:
    """Judge a card by the samples of the live skills, as `evolve` itself does.

    Returns:
        Why it may not go live, or "", and the figures.
    """
    card = load(file)
    if arguments[0] == "evolve" or not list(live.glob("*.exam.jsonl")):
        return "", {}
    from lora.engine import ArrowEngine
    from lora.evolution.exam import sample_path
    from lora.learning import guard
    from lora.models.adapt import bindings

    model = arguments[arguments.index("--model") + 1] if "--model" in arguments else None
    try:
        engine = ArrowEngine.from_pretrained(model)
        bindings(engine.base, [AdapterSet(card)])
    except LoRAError as error:  # of another base model, which no option names
        reason = f"not examined: {error}"
        return reason if sample_path(live, card.name).exists() else "", {"guard": reason}
    judged = guard(engine, card, live)
    return judged.refused, {"guard": judged.figures}


def _words(parameter: Any, value: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [str(value)]
    if isinstance(value, bool):
        return [(parameter.opts if value else parameter.secondary_opts)[0]]
    return [parameter.opts[0], str(value)]
