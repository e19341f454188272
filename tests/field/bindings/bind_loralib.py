"""loralib's Linear, whose factors are (r, in) and (out, r) and whose scaling is alpha / r."""

from importlib.metadata import version

import loralib
from torched import LayerBinding, put, tensor_of


class Loralib(LayerBinding):
    """Training mode: the low-rank term is computed beside the weight."""

    name, version = "loralib", version("loralib")

    def layer(self, weight, bias, terms):
        rank, alpha = 0, 1
        for term in terms:
            rank = term.A.shape[1]
            alpha = term.scaling * term.weight * rank
        layer = loralib.Linear(
            *weight.shape[::-1],
            r=rank,
            lora_alpha=alpha,
            bias=bias is not None,
            dtype=tensor_of(weight[:0]).dtype,
        )
        put(layer.weight, weight)
        if bias is not None:
            put(layer.bias, bias)
        for term in terms:
            put(layer.lora_A, term.A.T)
            put(layer.lora_B, term.B.T)
        return layer


class Merged(Loralib):
    """Evaluation mode: the weight is W + ΔW."""

    name = "loralib, merged"

    def layer(self, weight, bias, terms):
        layer = super().layer(weight, bias, terms)
        layer.eval()  # whose `train` returns None, layers.py:126
        return layer


BINDING, MERGED = Loralib(), Merged()
