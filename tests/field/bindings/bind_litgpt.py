"""LitGPT's LoRALinear, whose factors are (r, in) and (out, r) and whose scaling is alpha / r."""

from importlib.metadata import version

from litgpt.lora import LoRALinear
from torched import LayerBinding, lora_layer


class Litgpt(LayerBinding):
    """The low-rank term is computed beside the weight."""

    name, version = "litgpt", version("litgpt")

    def layer(self, weight, bias, terms):
        return lora_layer(LoRALinear, weight, bias, terms)


class Merged(Litgpt):
    """The weight is W + ΔW."""

    name = "litgpt, merged"

    def layer(self, weight, bias, terms):
        layer = super().layer(weight, bias, terms)
        layer.merge()
        return layer


BINDING, MERGED = Litgpt(), Merged()
