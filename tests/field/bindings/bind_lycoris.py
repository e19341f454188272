"""LyCORIS' LoCon on a Linear, a module for each term; the multiplier is its weight."""

from importlib.metadata import version

from lycoris.modules.locon import LoConModule
from torched import LayerBinding, linear_of, put, tensor_of


class Lycoris(LayerBinding):
    """The weight is rebuilt in each call."""

    name, version = "lycoris-lora", version("lycoris-lora")
    domains = {"forward": {"scaling": "nonzero"}}  # alpha 0 means the rank, locon.py:147
    is_bypass = False

    def layer(self, weight, bias, terms):
        linear = linear_of(weight, bias)
        for index, term in enumerate(terms):
            rank = term.A.shape[1]
            module = LoConModule(
                f"a{index}",
                linear,
                multiplier=term.weight,
                lora_dim=rank,
                alpha=term.scaling * rank,
                bypass_mode=self.is_bypass,
            ).to(tensor_of(weight[:0]).dtype)
            put(module.lora_down.weight, term.A.T)
            put(module.lora_up.weight, term.B.T)
            module.eval()
            module.apply_to()
        return linear


class Bypass(Lycoris):
    """The low-rank term is computed beside the weight."""

    name, is_bypass = "lycoris-lora, bypass", True


BINDING, BYPASS = Lycoris(), Bypass()
