"""Import paths of version 0.1 give the modules that are at their new paths, and warn."""

import subprocess
import sys
import warnings
from importlib import import_module

import pytest

import lora
from lora._renamed import MODULES


@pytest.mark.parametrize("old", MODULES)
def test_an_old_path_gives_the_module_of_the_new_one_and_warns(old, monkeypatch):
    for name in [old, *(name for name in MODULES if old.startswith(f"{name}."))]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = import_module(old)
    assert module is import_module(MODULES[old])
    texts = [str(warning.message) for warning in caught]
    assert f"{old} is {MODULES[old]} now; the old path ends with version 1.0" in texts


def test_the_warning_points_at_the_line_that_imports():
    script = "import lora\nfrom lora.store import save\nassert save is lora.save"
    command = [sys.executable, "-W", "always", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("<string>:2: DeprecationWarning: lora.store is lora.files now")


@pytest.mark.parametrize(("old", "new"), [("Energy", "MinEnergy"), ("Error", "MaxError")])
def test_an_old_name_of_a_rank_rule_gives_the_new_one_and_warns(old, new):
    with pytest.warns(DeprecationWarning, match=f"lora.{new} now"):
        assert getattr(lora, old) is getattr(lora, new)
