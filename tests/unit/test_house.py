"""Imports point one way, the core imports no torch, pure modules import nothing with effects."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import lora
from lora.testing.plugin import requirement

HOUSE = Path(lora.__file__).parent

LAYERS = """
errors _renamed progress
metrics checks state blas
card
factors ipc_check
arrow_format targets routing
presets merging extract experts
files router
drawing interop federation
models
training
evolution
engine
batches learning
demo
cli
""".split("\n")
RANK = {name: position for position, layer in enumerate(LAYERS) for name in layer.split()}
PURE = """
errors checks card factors arrow_format targets routing presets merging extract ipc_check
models/twins models/layers models/adapt training/losses training/ewc evolution/novelty
evolution/acceptance federation/manifest federation/trust federation/peer_table
federation/credentials
""".split()
OUTSIDE = "time datetime os logging socket random secrets subprocess threading pathlib io".split()


def imports(path):
    """Modules that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def rooms():
    for path in sorted(HOUSE.rglob("*.py")):
        room = path.relative_to(HOUSE).with_suffix("").parts
        if room[0] not in ("__init__", "testing"):
            yield room, path


def test_imports_point_one_way():
    for room, path in rooms():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "lora" or len(parts) == 1 or parts[1] in (room[0], "testing"):
                continue
            assert RANK[parts[1]] < RANK[room[0]], f"{'/'.join(room)} imports {name}"


def test_no_module_imports_one_that_imports_it():
    graph = {
        ".".join(("lora", *room)): {name for name in imports(path) if name.startswith("lora.")}
        for room, path in rooms()
    }
    TopologicalSorter(graph).prepare()  # which raises a CycleError


def test_evolution_does_not_know_the_engine_and_only_the_command_line_knows_testing():
    for room, path in rooms():
        names = imports(path)
        assert room[0] not in ("evolution", "models", "training") or "lora.engine" not in names
        assert room[0] == "cli" or not any(name.startswith("lora.testing") for name in names)


def test_pure_modules_know_no_clock_no_environment_no_files_no_logging():
    for name in PURE:
        assert not imports(HOUSE / f"{name}.py") & set(OUTSIDE), name


@requirement("R1.12")
def test_the_core_is_usable_without_torch():
    names = "LoRACard LowRank AdapterSet save load inspect digest card_to_table calibrate".split()
    names += ["merge", "extract_delta", "LoRAConfig"]
    script = f"import sys, lora\nfor name in {names}: getattr(lora, name)"
    script += "\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_listed_and_can_be_had():
    assert sorted(lora.__all__) == lora.__all__
    for name in lora.__all__:
        assert getattr(lora, name).__doc__
    assert set(lora.__all__) <= set(dir(lora))


def test_nothing_unsafe_is_called():
    for _, path in rooms():
        assert not imports(path) & {"pickle", "marshal", "shelve", "dill"}, path.name
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert not {"eval", "exec", "torch.load", "yaml.load", "os.system"} & calls, path.name


def test_the_rooms_are_had_without_an_import_of_their_own():
    names = ["federation.Policy", "evolution.Pairs", "merging.Ties", "interop.peft.import_peft"]
    script = "\n".join(["import lora", *(f"lora.{name}" for name in names)])
    subprocess.run([sys.executable, "-c", script], check=True)
