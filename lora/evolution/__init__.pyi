from .cloud import (
    CloudDistiller as CloudDistiller,
    Consent as Consent,
    Ledger as Ledger,
    MockTeacher as MockTeacher,
    OpenAITeacher as OpenAITeacher,
)
from .data import Pairs as Pairs
from .distill import SkillDistiller as SkillDistiller
from .factory import SkillFactory as SkillFactory
from .probe import WeightMapProbe as WeightMapProbe
from .train import LoRATrainer as LoRATrainer
