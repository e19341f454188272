"""What docs/mutation.md says adds up: every mutant of the pure core that lives is listed there,
with a reason.
"""

import json
import operator
import os
import re
import tomllib
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora.testing.plugin import requirement
from tests.mutants import Runner, shares, silent

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/mutation.md").read_text("utf-8")
SCORES = re.findall(
    r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+\.\d) % \| `(\w{12})` \| (.+) \|$",
    PAGE,
    re.MULTILINE,
)
CORE = ["arrow_format", "card", "factors", "merging", "routing", "targets"]
SURVIVORS = re.findall(r"^\| `(\w+)\.([\w.]+)` \| (\d+(?:, \d+)*) \| (.+) \|$", PAGE, re.MULTILINE)


@requirement("R24.6")
def test_nine_mutants_in_ten_are_noticed_in_every_pure_module_and_each_of_the_others_has_a_reason(
    monkeypatch,
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    digest_of = import_module("code_digests").digest_of
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mutmut"]
    assert sorted(settings["only_mutate"]) == [f"lora/{module}.py" for module in CORE]
    assert sorted(module for module, *_ in SCORES) == CORE
    listed = [
        (module, name, int(number))
        for module, name, numbers, _ in SURVIVORS
        for number in numbers.split(", ")
    ]
    assert len(set(listed)) == len(listed)
    for module, name, *_ in SURVIVORS:
        assert callable(operator.attrgetter(name)(import_module(f"lora.{module}")))
    alive = Counter(module for module, *_ in listed)
    for module, *numbers, score, measured, state in SCORES:
        mutants, killed, left = map(int, numbers)
        assert (killed + left, alive[module]) == (mutants, left)
        assert score == f"{100 * killed / mutants:.1f}"
        assert killed >= 0.9 * mutants
        digest = digest_of((ROOT / f"lora/{module}.py").read_text("utf-8"))
        assert state == ("unchanged" if digest == measured else "changed since")


@requirement("R24.6")
def test_the_share_of_a_module_counts_what_was_run_and_names_what_lives(tmp_path):
    """A time-out (36) and a mutant that no test reaches (33) live; None was not run yet."""
    (tmp_path / "lora").mkdir()
    codes = {"lora.sums.x_add__mutmut_1": 1, "lora.sums.x_add__mutmut_2": 0}
    codes |= {"lora.sums.x_add__mutmut_3": 33, "lora.sums.x_add__mutmut_4": 36}
    codes |= {"lora.sums.x_add__mutmut_5": None, "lora.sums.x_add__mutmut_6": 3}
    meta = {"sums": codes, "other": {"lora.other.x_add__mutmut_1": None}}
    for module, verdicts in meta.items():
        text = json.dumps({"exit_code_by_key": verdicts})
        (tmp_path / "lora" / f"{module}.py.meta").write_text(text)
    alive = [f"    alive: lora.sums.x_add__mutmut_{number}" for number in (2, 3, 4)]
    assert shares(tmp_path) == ["lora/sums.py: 2 of 5 killed, 40.0 %; 1 not run", *alive]


class Properties:
    """Properties of a module with four mutants, of which each run of one is noted in a file."""

    def __init__(self, runner, notes):
        self.runner, self.notes, self.ihook = runner, notes, self
        runner.items = {name: self.named(name) for name in ("low", "high", "other")}
        runner.noted = {name: (0.01, ["lora.sums.x_add"]) for name in ("high", "low")}
        runner.noted["other"] = 0.0, []
        runner.digests = {"low": "1", "high": "2", "other": "3", "": "4"}

    def named(self, name):
        config = SimpleNamespace(option=SimpleNamespace())
        return SimpleNamespace(nodeid=name, ihook=self, config=config)

    def pytest_runtest_protocol(self, item, nextitem):
        mutant = os.environ["MUTANT_UNDER_TEST"].partition("__mutmut_")[2]
        with self.notes.open("a") as file:
            file.write(f"{mutant} {item.nodeid}\n")
        if mutant == "5":
            raise KeyboardInterrupt
        fails = (item.nodeid, mutant) in {("low", "1"), ("high", "2"), ("high", "3")}
        report = SimpleNamespace(failed=fails, nodeid=item.nodeid, longreprtext="")
        self.runner.pytest_runtest_logreport(report)


@requirement("R24.6")
def test_a_mutant_meets_the_properties_that_reach_it_until_one_fails_and_its_verdict_is_kept(
    tmp_path,
):
    name, notes, path = "lora.sums.x_add__mutmut_", tmp_path / "notes", tmp_path / "sums.py.meta"
    mutants = {f"{name}{number}": "a" for number in range(1, 6)} | {"lora.sums.x_new__mutmut_1": ""}

    def run(mutants, **digests):
        runner = Runner({})
        Properties(runner, notes)
        runner.digests |= digests
        notes.write_text("")
        runner.run_module(path, mutants)
        codes = json.loads(path.read_text())["exit_code_by_key"]
        return [codes[mutant] for mutant in mutants], notes.read_text().splitlines()

    codes, tried = run(mutants)
    assert codes == [1, 1, 1, 0, 0, 33]
    assert tried[:4] == ["1 high", "1 low", "2 low", "2 high"]  # that which killed comes first
    assert tried[4:] == ["3 high", "4 high", "4 low", "5 high"]
    assert run(mutants) == (codes, [])
    assert run(mutants, low="new") == (codes, ["1 high", "1 low"])
    assert run(mutants, low="new", **{"": "new"}) == (codes, ["4 high", "4 low", "5 high"])
    changed = mutants | {f"{name}2": "new"}
    assert run(changed, low="new", **{"": "new"})[1][-1] == "2 high"


@requirement("R24.6")
def test_what_an_error_says_is_not_mutated_but_when_it_is_raised_is():
    code = "def f(x={}):\n    require({}, 'x', {}, x)\n    return integer(x, {}, 1)"
    plain = ("1", "x > 0", "expected", "'x'")
    others = [("1", "x > 0", "'b'", "None"), ("2", *plain[1:]), ("1", "x >= 0", *plain[2:])]
    same = [silent(code.format(*parts)) == silent(code.format(*plain)) for parts in others]
    assert same == [True, False, False]


@requirement("R24.6")
def test_no_mutant_is_run_where_the_unchanged_code_fails():
    with pytest.raises(pytest.UsageError, match="fails on the unchanged code: why"):
        Runner({}).pytest_runtest_logreport(SimpleNamespace(failed=True, longreprtext="why"))
