"""The table of models: what is measured anew is what it says, and a wrong result fills no cell."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from lora.models import layers
from lora.testing.plugin import requirement

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks/model_matrix.json").read_text("utf-8"))["architectures"]
SOME = ["BERT", "GPT-2 (Conv1D)", "Mixtral, experts", "torch, TransformerEncoder"]
REST = [pytest.param(name, marks=pytest.mark.slow) for name in RESULTS if name not in SOME]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers; ours are in the cells


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("model_matrix")


def kinds(cells):
    return {operation: (cell["kind"], cell.get("reason")) for operation, cell in cells.items()}


@requirement("R26.1", "R26.2", "R26.4", "R26.5", "R26.7", "R23.1", "R2.1")
@pytest.mark.parametrize("name", [*SOME, *REST])
def test_the_cells_of_a_model_are_those_of_the_table(models, name):
    """The script itself fails at a difference that is more than rounding."""
    ((_, cells),) = models.run([name])
    assert kinds(cells) == kinds(RESULTS[name])
    figures = [cell for cell in cells.values() if "difference" in cell]
    assert figures
    for cell in figures:
        assert cell["difference"] <= cell["allowed"] <= cell["effect"] / 100


def test_the_table_has_a_row_for_each_architecture_and_a_cell_for_each_operation(models):
    assert list(RESULTS) == list(models.ARCHITECTURES)
    operations = ["adapt", "rows", "fold", "extract", "import", "export", "generate"]
    assert all(list(cells) == operations for cells in RESULTS.values())


def doubled(models, monkeypatch):
    stacked = layers.stacked

    def twice(*arguments):
        a, b = stacked(*arguments)
        return a, 2 * b

    monkeypatch.setattr(layers, "stacked", twice)


def shifted(models, monkeypatch):
    rows = models.lora.rows
    monkeypatch.setattr(models.lora, "rows", lambda sets: rows([*sets[1:], sets[0]]))


def changing(models, monkeypatch):
    def change(subject):
        with torch.no_grad():
            next(subject.base.parameters()).add_(1)
        raise models.NotApplicableError

    monkeypatch.setitem(models.OPERATIONS, "generate", change)


def crashing(models, monkeypatch):
    monkeypatch.setattr(models.lora, "fold", lambda model: model.nothing)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (doubled, "BERT, adapt: .* from PEFT, and rounding allows"),
        (shifted, "BERT, rows: .* from PEFT, each row alone"),
        (changing, "BERT: the base computes something else"),
        (crashing, "BERT, fold: .* no attribute 'nothing'"),
    ],
)
def test_a_wrong_result_fills_no_cell(models, fault, message, monkeypatch):
    fault(models, monkeypatch)
    with pytest.raises(models.WrongError, match=message):
        list(models.run(["BERT"]))
