from .cache import CardCache as CardCache
from .client import LoRAFlightClient as LoRAFlightClient
from .discovery import Discovery as Discovery
from .node import Node as Node
from .server import LoRAFlightServer as LoRAFlightServer
from .trust import Policy as Policy
