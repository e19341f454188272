"""lora-pytorch's LoRA around a Linear, whose factors are (in, r) and (r, out) as ours."""

from importlib.metadata import version

from lora_pytorch import LoRA
from lora_pytorch.modules.linear import LinearLoRAModule
from torched import LayerBinding, linear_of, put, tensor_of


class LoraPytorch(LayerBinding):
    """Weights that were trained elsewhere, with their alpha."""

    name, version = "lora-pytorch", version("lora-pytorch")

    def layer(self, weight, bias, terms):
        layer = linear_of(weight, bias)
        for term in terms:
            rank = term.A.shape[1]
            alpha = term.scaling * term.weight * rank
            dtype = tensor_of(weight[:0]).dtype
            module = LinearLoRAModule(*weight.shape[::-1], rank, alpha=alpha, dtype=dtype)
            put(module.in_proj, term.A)
            put(module.out_proj, term.B)
            layer = LoRA(layer, module)
        return layer


BINDING = LoraPytorch()
