"""Draw a terminal after commands were run in it, as an SVG of text that needs no other file.

A test runs the commands and gives what they printed to `compare`; where ``LORA_OUTPUTS=write`` is
in the environment, as `make outputs` sets it, the picture is drawn anew.
"""

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from docs import outputs

PICTURE = outputs.ROOT / "docs" / "terminal.svg"
COMMANDS = (
    "lora convert docs/examples/peft-adapter \\\n  -o docs.lora.arrow",
    (
        "# peft-law/ is another folder that PEFT wrote\n"
        "lora merge docs.lora.arrow peft-law/ \\\n  -o both.lora.arrow"
    ),
    "lora convert both.lora.arrow -o peft-both/",
)
COLUMNS = 50
"""So few that a phone shows them legibly."""

CHARACTER, LINE, EDGE, BAR = 8.4, 19, 20, 34
"""Width and height of a character of 14 pixels, the edge, and the bar of the window."""

STYLE = """\
.terminal { --paper: #fbfcff; --frame: #c5cee3; --ink: #1f2a44; --prompt: #3050a0;
  max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) { .terminal {
  --paper: #141a2a; --frame: #3a4668; --ink: #d5dcf0; --prompt: #8fb0ff } }
.terminal rect { fill: var(--paper); stroke: var(--frame) }
.terminal circle { fill: var(--frame) }
.terminal text { fill: var(--ink); white-space: pre; font: 14px ui-monospace, SFMono-Regular,
  Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace }
.terminal .prompt { fill: var(--prompt); user-select: none }
.terminal .typed { fill: var(--prompt); font-weight: 600 }
"""


def drawn(runs: Sequence[tuple[str, str]]) -> str:
    """The picture of commands and what they printed."""
    lines = list[str]()

    def add(kind: str, text: str, column: int = 0) -> None:
        indent = len(text) - len(text := text.lstrip())
        x, y = EDGE + (column + indent) * CHARACTER, BAR + EDGE + row * LINE
        place = f'x="{x:.1f}" y="{y:.1f}" textLength="{len(text) * CHARACTER:.1f}"'
        lines.append(f'<text {place} class="{kind}">{escape(text, quote=False)}</text>')

    row = 0
    for command, printed in runs:
        prompt = "$"
        for line in command.splitlines():
            add("prompt", prompt)
            add("typed", line, column=2)
            prompt = ">" if line.endswith("\\") else "$"
            row += 1
        for line in printed.splitlines():
            if line:
                add("shown", line)
            row += 1
        row += 0.6
    width, height = round(COLUMNS * CHARACTER) + 2 * EDGE, BAR + EDGE + round((row - 0.6) * LINE)
    buttons = [f'<circle cx="{EDGE + 18 * i}" cy="{BAR / 2 + 2:g}" r="5"/>' for i in range(3)]
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    window = f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" class="terminal" {size}>']
    parts += [f"<style>\n{STYLE}</style>", window, *buttons, *lines, "</svg>"]
    return "\n".join(parts) + "\n"


def compare(printed: Sequence[str], picture: Path = PICTURE) -> None:
    """Hold what the commands printed against the picture, or draw it anew.

    Raises:
        AssertionError: The picture shows something else.
    """
    whole = [re.sub(r"\b([0-9a-f]{30,})\n +([0-9a-f]+)\b", r"\1\2", text) for text in printed]
    steady = [outputs.steady(text, width=COLUMNS) for text in whole]
    shown = drawn(list(zip(COMMANDS, steady, strict=True)))
    if os.environ.get("LORA_OUTPUTS") == "write":
        picture.write_text(shown, encoding="utf-8")
    elif not outputs.agree(picture.read_text(encoding="utf-8"), shown):
        raise AssertionError(f"`make outputs` changes {picture.name}")
