from . import (
    evolution as evolution,
    federation as federation,
    inference as inference,
    interop as interop,
    merging as merging,
)
from .batches import encode_batches as encode_batches
from .card import (
    AdapterSet as AdapterSet,
    FrozenJSON as FrozenJSON,
    LoRACard as LoRACard,
    LowRank as LowRank,
    interpolate as interpolate,
)
from .engine import ArrowEngine as ArrowEngine, Encoding as Encoding
from .errors import LoRAError as LoRAError
from .extract import (
    MaxError as MaxError,
    MinEnergy as MinEnergy,
    extract_delta as extract_delta,
    extract_direct as extract_direct,
)
from .inference.encoder import InferenceCore as InferenceCore
from .inference.manager import LoRAManager as LoRAManager
from .inference.registry import AdapterRegistry as AdapterRegistry
from .inference.router import LoRARouter as LoRARouter
from .layer import LoRALinear as LoRALinear
from .merging import merge as merge
from .presets import LoRAConfig as LoRAConfig
from .rewrite import adapt as adapt, fingerprint as fingerprint, fold as fold, uncalled as uncalled
from .routing import Calibration as Calibration, Route as Route, calibrate as calibrate
from .store import digest as digest, inspect as inspect, load as load, save as save
from .table import Header as Header, card_to_table as card_to_table, table_to_card as table_to_card
from .targets import Injection as Injection

__version__: str
