"""Every example in a docstring runs as the reference shows it, and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import lora
from docs.example_imports import with_imports

MODULES = sorted(module.name for module in pkgutil.walk_packages(lora.__path__, "lora."))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run_with_nothing_but_the_imports_that_the_reference_shows(name):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for found in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        shown = with_imports(found.docstring, name)
        runner.run(doctest.DocTestParser().get_doctest(shown, {}, found.name, name, 0))
    assert runner.summarize().failed == 0
    assert runner.tries or ">>> " not in inspect.getsource(importlib.import_module(name))


def test_there_are_examples():
    texts = [path.read_text("utf-8") for path in Path(lora.__path__[0]).rglob("*.py")]
    assert sum(text.count("Examples:\n") for text in texts) > 100
