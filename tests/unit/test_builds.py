"""What the Makefile and the workflows are there for is in them."""

import re
from pathlib import Path

from lora.testing.plugin import requirement

ROOT = Path(__file__).parents[2]


@requirement("R1.9")
def test_a_workflow_runs_the_readers_in_other_languages():
    workflow = (ROOT / ".github/workflows/tests.yml").read_text("utf-8")
    assert re.search(r"- run: make (\w+ )*test-all$", workflow, re.MULTILINE)


@requirement("R24.5")
def test_the_matrix_is_made_of_four_reports():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (names,) = re.findall(r"^REPORTS := .*conformance/,(.*)\)$", makefile, re.MULTILINE)
    assert names.split() == ["reference.json", "numpy-only.json", "peft.json", "faulty.json"]
    for name in names.replace(".json", "").split():
        assert f"\nBINDING_{name} := " in makefile
