"""The documentation's examples run in folders of their own and print what stands below them."""

import io
import shutil
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from pytest_markdown_docs._runners import DefaultRunner, register_runner

from lora.errors import LoRAError, UnboundWarning

collect_ignore = ["docs/griffe_extension.py"]  # what it imports comes with the docs alone


@register_runner(default=True)
class Compared(DefaultRunner):
    """Runs a block and holds what it printed, and what it raised, against its page."""

    def runtest(self, test, args, **options):
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT asks models for it
        with redirect_stdout(io.StringIO()) as printed:
            try:
                super().runtest(test, args, **options)
            except (LoRAError, UnboundWarning) as error:  # as Python shows them
                if test.source_path.name != "troubleshooting.md":
                    raise
                printed.write(f"{type(error).__module__}.{type(error).__name__}: {error}")
        if test.source_path.suffix == ".md":
            from docs import outputs  # mutants have no docs

            outputs.compare(test.source_path, test.source, printed.getvalue())


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(request, monkeypatch, tmp_path):
    if request.path.suffix == ".md":
        monkeypatch.chdir(tmp_path)
        shutil.copytree(Path(__file__).parent / "docs/examples", "docs/examples")
