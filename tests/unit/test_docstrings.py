"""Every example in a docstring runs as the reference shows it, and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import lora
from docs.example_imports import with_imports

MODULES = sorted(module.name for module in pkgutil.walk_packages(lora.__path__, "lora."))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run_with_nothing_but_the_imports_that_the_reference_shows(name):
    module, runner = (
        importlib.import_module(name),
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS),
    )
    for found in doctest.DocTestFinder(exclude_empty=True).find(module):
        shown = with_imports(found.docstring, name)
        runner.run(doctest.DocTestParser().get_doctest(shown, {}, found.name, name, 0))
    assert runner.summarize().failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        if test.examples
    ]
    assert len(found) > 15
