"""How an engine learns: data, training, what it does not know and who teaches it, work unattended,
where its layers work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.evolution.cloud import CloudDistiller, Consent, Ledger, MockTeacher, OpenAITeacher
    from lora.evolution.data import Pairs
    from lora.evolution.distill import SkillDistiller
    from lora.evolution.factory import SkillFactory
    from lora.evolution.probe import WeightMapProbe
    from lora.evolution.train import LoRATrainer

_HOMES = {
    "CloudDistiller": "cloud",
    "Consent": "cloud",
    "Ledger": "cloud",
    "LoRATrainer": "train",
    "MockTeacher": "cloud",
    "OpenAITeacher": "cloud",
    "Pairs": "data",
    "SkillDistiller": "distill",
    "SkillFactory": "factory",
    "WeightMapProbe": "probe",
}

__all__ = [
    "CloudDistiller",
    "Consent",
    "Ledger",
    "LoRATrainer",
    "MockTeacher",
    "OpenAITeacher",
    "Pairs",
    "SkillDistiller",
    "SkillFactory",
    "WeightMapProbe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora.evolution' has no attribute {name!r}")
    return getattr(import_module(f"lora.evolution.{_HOMES[name]}"), name)
