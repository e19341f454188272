"""Old import paths: each still works until version 1.0, with a warning that names the new path."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "lora.lowrank": "lora.factors",
    "lora.table": "lora.arrow_format",
    "lora.envelope": "lora.ipc_check",
    "lora.store": "lora.files",
    "lora.layer": "lora.models.layers",
    "lora.rewrite": "lora.models.adapt",
    "lora.weights": "lora.interop.weights",
    "lora.evolving": "lora.learning",
    "lora.inference": "lora.models",
    "lora.inference.encoder": "lora.models.encoder",
    "lora.inference.manager": "lora.models.manager",
    "lora.inference.registry": "lora.models.registry",
    "lora.inference.router": "lora.router",
    "lora.evolution.data": "lora.training.data",
    "lora.evolution.synthetic": "lora.training.synthetic",
    "lora.evolution.losses": "lora.training.losses",
    "lora.evolution.schedules": "lora.training.schedules",
    "lora.evolution.ewc": "lora.training.ewc",
    "lora.evolution.train": "lora.training.train",
    "lora.evolution.online": "lora.training.online_adapter",
    "lora.evolution.gate": "lora.evolution.acceptance",
    "lora.evolution.cloud": "lora.evolution.teacher",
    "lora.evolution.work": "lora.evolution.worker",
    "lora.federation.access": "lora.federation.credentials",
    "lora.federation.peers": "lora.federation.peer_table",
    "lora.federation.streams": "lora.federation.stream_limits",
}
"""Old path -> new path."""


class _OldPaths(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new path in the place of the old one."""
        old, new = module.__name__, MODULES[module.__name__]
        message = f"{old} is {new} now; the old path ends with version 1.0"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


def install() -> None:
    """Let the import system know the old paths."""
    sys.meta_path.insert(0, _OldPaths())
