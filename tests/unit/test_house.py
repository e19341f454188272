"""The house keeps its order: imports point one way, the core imports no torch, pure modules know no outside world."""

import ast
import subprocess
import sys
from pathlib import Path

import lora
from lora.testing.plugin import requirement

HOUSE = Path(lora.__file__).parent

LAYERS = [
    ["errors"],
    ["metrics", "checks"],
    ["card"],
    ["lowrank", "envelope"],
    ["table", "targets", "routing"],
    ["presets", "merging", "extract"],
    ["store"],
    ["weights"],
    ["drawing", "interop", "federation"],
    ["layer"],
    ["rewrite"],
    ["inference"],
    ["evolution"],
    ["engine"],
    ["batches", "evolving"],
    ["demo"],
    ["cli"],
]
RANK = {name: position for position, layer in enumerate(LAYERS) for name in layer}
PURE = [
    "errors",
    "checks",
    "card",
    "lowrank",
    "table",
    "targets",
    "routing",
    "presets",
    "merging",
    "extract",
    "envelope",
    "layer",
]
PURE += [
    "rewrite",
    "evolution/novelty",
    "evolution/gate",
    "evolution/losses",
    "evolution/ewc",
    "federation/manifest",
    "federation/trust",
    "federation/peers",
    "federation/access",
]
OUTSIDE = set(
    "time datetime os logging socket random secrets subprocess threading pathlib io".split()
)


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; only those at its top level unless `everywhere`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def rooms():
    for path in sorted(HOUSE.rglob("*.py")):
        room = path.relative_to(HOUSE).with_suffix("").parts
        if room[0] not in ("__init__", "testing"):
            yield room, path


@requirement("R9.7")
def test_imports_point_one_way():
    for room, path in rooms():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "lora" or len(parts) == 1 or parts[1] in (room[0], "testing"):
                continue
            assert RANK[parts[1]] < RANK[room[0]], f"{'/'.join(room)} imports {name}"


def test_evolution_does_not_know_the_engine_and_only_the_command_line_knows_testing():
    for room, path in rooms():
        names = imports(path)
        assert room[0] not in ("evolution", "inference") or "lora.engine" not in names
        assert room[0] == "cli" or not any(name.startswith("lora.testing") for name in names)


def test_pure_modules_know_no_clock_no_environment_no_files_no_logging():
    for name in PURE:
        assert not imports(HOUSE / f"{name}.py") & OUTSIDE, name


@requirement("R1.12")
def test_the_core_is_usable_without_torch():
    names = "LoRACard LowRank AdapterSet save load inspect digest card_to_table calibrate".split()
    names += ["merge", "extract_delta", "LoRAConfig"]
    script = f"import sys, lora\nfor name in {names}: getattr(lora, name)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_listed_and_can_be_had():
    assert sorted(lora.__all__) == lora.__all__
    for name in lora.__all__:
        assert getattr(lora, name).__doc__
    assert set(lora.__all__) <= set(dir(lora))


def test_nothing_unsafe_is_called():
    for _, path in rooms():
        assert not imports(path) & {"pickle", "marshal", "shelve", "dill"}, path.name
        calls = [
            ast.unparse(n.func)
            for n in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(n, ast.Call)
        ]
        assert not {"eval", "exec", "torch.load", "yaml.load", "os.system"} & set(calls), path.name


def test_the_rooms_are_had_without_an_import_of_their_own():
    script = "import lora; lora.federation.Policy; lora.evolution.Pairs; lora.merging.Ties; lora.interop.peft.import_peft"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
