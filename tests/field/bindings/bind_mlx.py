"""mlx-lm's LoRALinear on the CPU, with factors (in, r) and (r, out) and our scaling."""

from importlib.metadata import version

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.tuner.lora import LoRALinear

mx.set_default_device(mx.cpu)


def mlx_of(array):
    """MLX's array with the bits of NumPy's."""
    if array.dtype.name == "bfloat16":
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array, dtype=getattr(mx, array.dtype.name))


def array_of(output):
    """NumPy's array with the bits of MLX's."""
    if output.dtype == mx.bfloat16:
        return np.array(output.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(output)


class Mlx:
    """The low-rank term is computed beside the weight."""

    name, version = "mlx-lm", version("mlx-lm")
    missing = dict.fromkeys(
        "write_card read_card match_targets bind extract make_router merge".split(), "a layer only"
    )
    domains = {"forward": {"terms": 1}}

    def forward(self, x, weight, bias, terms):
        """The output of `layer`."""
        layer = nn.Linear(*weight.shape[::-1], bias=bias is not None)
        layer.weight = mlx_of(weight)
        if bias is not None:
            layer.bias = mlx_of(bias)
        for term in terms.values():
            layer = self.layer(layer, term)
        return array_of(layer(mlx_of(x)))

    def layer(self, linear, term):
        layer = LoRALinear.from_base(linear, r=term.A.shape[1], scale=term.scaling * term.weight)
        layer.lora_a, layer.lora_b = mlx_of(term.A), mlx_of(term.B)
        return layer


class Fused(Mlx):
    """The weight is W + ΔW."""

    name = "mlx-lm, fused"

    def layer(self, linear, term):
        return super().layer(linear, term).fuse()


BINDING, FUSED = Mlx(), Fused()
