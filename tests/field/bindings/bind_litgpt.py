"""LitGPT's LoRALinear, whose factors are (r, in) and (out, r) and whose scaling is alpha / r."""

from importlib.metadata import version

from litgpt.lora import LoRALinear
from torched import LayerBinding, put, tensor_of


class Litgpt(LayerBinding):
    """The low-rank term is computed beside the weight."""

    name, version = "litgpt", version("litgpt")

    def layer(self, weight, bias, terms):
        rank, alpha = 0, 1
        for term in terms:
            rank = term.A.shape[1]
            alpha = term.scaling * term.weight * rank
        layer = LoRALinear(*weight.shape[::-1], r=rank, lora_alpha=alpha, bias=bias is not None).to(
            tensor_of(weight[:0]).dtype
        )
        put(layer.linear.weight, weight)
        if bias is not None:
            put(layer.linear.bias, bias)
        for term in terms:
            put(layer.lora_A, term.A.T)
            put(layer.lora_B, term.B.T)
        return layer


class Merged(Litgpt):
    """The weight is W + ΔW."""

    name = "litgpt, merged"

    def layer(self, weight, bias, terms):
        layer = super().layer(weight, bias, terms)
        layer.merge()
        return layer


BINDING, MERGED = Litgpt(), Merged()
