"""Keras' Dense with `enable_lora`, on torch: kernels and factors are (in, out), as ours."""

import os

os.environ["KERAS_BACKEND"] = "torch"

from importlib.metadata import version

import keras
import numpy as np
from torched import LayerBinding, tensor_of


class Keras(LayerBinding):
    """One `enable_lora` a layer; its factors are float32, dense.py:281."""

    name, version = "keras", version("keras")
    domains = {
        "forward": {"terms": 1, "dimensions": 2, "dtypes": ["float32", "float16", "bfloat16"]}
    }

    def layer(self, weight, bias, terms):
        dtype = tensor_of(weight[:0]).dtype
        layer = keras.layers.Dense(
            weight.shape[0], use_bias=bias is not None, dtype=str(dtype).removeprefix("torch.")
        )
        layer.build((None, weight.shape[1]))
        layer._kernel.assign(tensor_of(np.ascontiguousarray(weight.T)))
        if bias is not None:
            layer.bias.assign(tensor_of(bias))
        for term in terms:
            rank = term.A.shape[1]
            layer.enable_lora(rank, lora_alpha=term.scaling * term.weight * rank)
            layer.lora_kernel_a.assign(tensor_of(term.A))
            layer.lora_kernel_b.assign(tensor_of(term.B))
        return layer


BINDING = Keras()
