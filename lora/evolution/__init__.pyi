import lora.training

from .teacher import (
    CloudDistiller as CloudDistiller,
    Consent as Consent,
    Ledger as Ledger,
    MockTeacher as MockTeacher,
    OpenAITeacher as OpenAITeacher,
)
from .distill import SkillDistiller as SkillDistiller
from .factory import SkillFactory as SkillFactory
from .probe import WeightMapProbe as WeightMapProbe

LearningEvent = lora.training.LearningEvent
LoRATrainer = lora.training.LoRATrainer
Pairs = lora.training.Pairs
