"""What the bindings of torch libraries share: arrays as tensors, a plain layer, a frame."""

import ml_dtypes
import numpy as np
import torch
from torch import nn

torch.set_num_threads(1)

MEMBERS = "write_card read_card forward match_targets bind extract make_router merge"


def all_but(members, reason):
    """What a binding with these members alone lacks, for this reason."""
    return {name: reason for name in MEMBERS.split() if name not in members.split()}


def tensor_of(array):
    """A tensor with the bits of an array; torch takes no bfloat16 from NumPy."""
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def array_of(tensor):
    """An array with the bits of a tensor."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def put(parameter, array):
    """Set a parameter, whose shape must be the array's."""
    parameter.data.copy_(tensor_of(np.ascontiguousarray(array)))


def linear_of(weight, bias):
    """A plain Linear with this weight (out, in) and bias."""
    dtype = tensor_of(weight[:0]).dtype
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=dtype)
    put(linear.weight, weight)
    if bias is not None:
        put(linear.bias, bias)
    return linear


class LayerBinding:
    """A library that has a layer of one adapter."""

    missing = all_but("forward", "a layer only")
    domains = {"forward": {"terms": 1}}

    def forward(self, x, weight, bias, terms):
        """The output of `layer`, in its own dtype."""
        with torch.no_grad():
            output = self.layer(weight, bias, list(terms.values()))(tensor_of(x))
        return array_of(output)


def lora_layer(kind, weight, bias, terms, **options):
    """A layer with ``r`` and ``lora_alpha``, whose factors are ``(r, in)`` and ``(out, r)``."""
    rank, alpha = 0, 1
    for term in terms:
        rank = term.A.shape[1]
        alpha = term.scaling * term.weight * rank
    sizes = {"r": rank, "lora_alpha": alpha, "bias": bias is not None}
    layer = kind(*weight.shape[::-1], **sizes, **options).to(tensor_of(weight[:0]).dtype)
    linear = getattr(layer, "linear", layer)
    put(linear.weight, weight)
    if bias is not None:
        put(linear.bias, bias)
    for term in terms:
        put(layer.lora_A, term.A.T)
        put(layer.lora_B, term.B.T)
    return layer
