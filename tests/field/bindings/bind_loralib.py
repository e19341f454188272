"""loralib's Linear, whose factors are (r, in) and (out, r) and whose scaling is alpha / r."""

from importlib.metadata import version

import loralib
from torched import LayerBinding, lora_layer


class Loralib(LayerBinding):
    """Training mode: the low-rank term is computed beside the weight."""

    name, version = "loralib", version("loralib")

    def layer(self, weight, bias, terms):
        return lora_layer(loralib.Linear, weight, bias, terms)


class Merged(Loralib):
    """Evaluation mode: the weight is W + ΔW."""

    name = "loralib, merged"

    def layer(self, weight, bias, terms):
        layer = super().layer(weight, bias, terms)
        layer.eval()  # whose `train` returns None, layers.py:126
        return layer


BINDING, MERGED = Loralib(), Merged()
