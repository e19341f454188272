from . import (
    evolution as evolution,
    federation as federation,
    interop as interop,
    merging as merging,
    models as models,
    training as training,
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
from .errors import LoRAError as LoRAError, UnboundWarning as UnboundWarning
from .extract import (
    MaxError as MaxError,
    MinEnergy as MinEnergy,
    extract_delta as extract_delta,
    extract_direct as extract_direct,
)
from .models.encoder import InferenceCore as InferenceCore
from .models.manager import LoRAManager as LoRAManager
from .models.registry import AdapterRegistry as AdapterRegistry
from .router import LoRARouter as LoRARouter
from .models.layers import LoRALinear as LoRALinear
from .merging import merge as merge
from .presets import LoRAConfig as LoRAConfig
from .models.adapt import (
    adapt as adapt,
    adapt_rows as adapt_rows,
    fingerprint as fingerprint,
    fold as fold,
    uncalled as uncalled,
)
from .models.checkpoint import fold_checkpoint as fold_checkpoint
from .models.rows import rows as rows
from .routing import Calibration as Calibration, Route as Route, calibrate as calibrate
from .files import digest as digest, inspect as inspect, load as load, save as save
from .arrow_format import (
    Header as Header,
    card_to_table as card_to_table,
    table_to_card as table_to_card,
)
from .targets import Injection as Injection

__version__: str
