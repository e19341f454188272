"""Read the specification: one file a chapter, one heading ``## Rn.m`` for each requirement.

Requirements: R9.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from lora.errors import LoRAError

_ENTRY = re.compile(
    r"^## (?P<id>R\d+\.\d+)\n- revision: (?P<revision>\d+)\n- evidence: (?P<evidence>P\*|P|U|B|D)\n"
    r"- status: (?P<status>built|planned)\n\n(?P<sentence>.+?)(?=\n\n|\n*\Z)",
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^## (\S+)", re.MULTILINE)


class SpecError(LoRAError, ValueError):
    """The specification, or a test's reference to it, is malformed."""


@dataclass(frozen=True)
class Requirement:
    """One numbered sentence of the specification."""

    id: str
    chapter: str
    revision: int
    evidence: str
    status: str
    sentence: str


def read_spec(folder: Path) -> dict[str, Requirement]:
    """Return every requirement by id, in the order of the chapters.

    Raises:
        SpecError: An entry is malformed, or an id occurs twice or in another chapter's file.
    """
    spec: dict[str, Requirement] = {}
    for path in sorted(folder.glob("R[0-9][0-9]-*.md")):
        text = path.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        entries = list(_ENTRY.finditer(text))
        ids, headings = [entry["id"] for entry in entries], _HEADING.findall(text)
        if ids != headings:
            raise SpecError(path.name, "well-formed entries", sorted(set(headings) ^ set(ids)))
        for entry in entries:
            chapter = f"R{int(entry['id'][1:].split('.')[0]):02d}-"
            if entry["id"] in spec or not path.name.startswith(chapter):
                where = f"{path.name}: {entry['id']}"
                raise SpecError(where, "each id once, in its chapter", "another place")
            spec[entry["id"]] = Requirement(
                entry["id"],
                title,
                int(entry["revision"]),
                entry["evidence"],
                entry["status"],
                " ".join(entry["sentence"].split()),
            )
    return spec
