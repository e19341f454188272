"""Faults in which modules a card adapts."""

from tests.faults.base import Fault


class EndswithWithoutTheDot(Fault):
    """``1.query`` matches ``layer.11.query`` too."""

    breaks = "R3.11"

    def match_targets(self, names, targets):
        if "all-linear" in targets:
            return super().match_targets(names, targets)
        return [name for name in names if any(name.endswith(target) for target in targets)]


class Substring(Fault):
    """A target matches wherever it occurs."""

    breaks = "R3.11"

    def match_targets(self, names, targets):
        if "all-linear" in targets:
            return super().match_targets(names, targets)
        return [name for name in names if any(target in name for target in targets)]


class OutputHeadAdapted(Fault):
    """``all-linear`` takes the output head along."""

    breaks = "R3.11"

    def match_targets(self, names, targets):
        return list(names) if "all-linear" in targets else super().match_targets(names, targets)


class NoTargetsMeansAll(Fault):
    """Empty targets match everything."""

    breaks = "R3.11"

    def match_targets(self, names, targets):
        return super().match_targets(names, targets) if targets else list(names)


class WeightsBindWithoutATarget(Fault):
    """A weight binds wherever it fits, whether its module is targeted or not."""

    breaks = "R3.11"

    def bind(self, card, shapes):
        return super().bind(card._replace(target_modules=tuple(shapes)), shapes)


class FirstOfAmbiguousModules(Fault):
    """A weight that fits two modules is given to one of them."""

    breaks = "R3.11"

    def bind(self, card, shapes):
        try:
            return super().bind(card, shapes)
        except LookupError:
            return {}


class ShapesUnchecked(Fault):
    """Factors that do not fit a module are left out without a word."""

    breaks = "R7.2"

    def bind(self, card, shapes):
        fitting = {
            key: pair
            for key, pair in card.weights.items()
            if all(
                (pair.A.shape[0], pair.B.shape[1]) == shape
                for name, shape in shapes.items()
                if name == key or name.endswith("." + key)
            )
        }
        if len(fitting) < len(card.weights):
            return {}
        return super().bind(card, shapes)


TARGET_FAULTS = [value for value in list(globals().values()) if isinstance(value, type) and issubclass(value, Fault)][
    1:
]
