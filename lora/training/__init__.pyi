from .data import Pairs as Pairs
from .online_adapter import LearningEvent as LearningEvent
from .online_adapter import OnlineAdapter as OnlineAdapter
from .train import LoRATrainer as LoRATrainer
