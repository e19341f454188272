"""Faults in which modules a card adapts."""

import numpy as np

from tests.faults.base import Fault, faults_in


class EndswithWithoutTheDot(Fault, breaks="R3.11"):
    """``1.query`` matches ``layer.11.query`` too."""

    def match_targets(self, names, targets):
        if "all-linear" in targets:
            return super().match_targets(names, targets)
        return [name for name in names if any(name.endswith(target) for target in targets)]


class Substring(Fault, breaks="R3.11"):
    """A target matches wherever it occurs."""

    def match_targets(self, names, targets):
        if "all-linear" in targets:
            return super().match_targets(names, targets)
        return [name for name in names if any(target in name for target in targets)]


class OutputHeadAdapted(Fault, breaks="R3.11"):
    """The output head is taken along with whatever else is adapted, by ``all-linear`` too."""

    def match_targets(self, names, targets):
        matched = super().match_targets(names, targets)
        return [
            name for name in names if name in matched or (targets and "lm_head" in name.split("."))
        ]

    def bind(self, card, shapes):
        targets = self.match_targets(list(shapes), card.target_modules)
        return super().bind(card._replace(target_modules=tuple(targets)), shapes)


class HeadOnlyAtTheEnd(Fault, breaks="R3.11"):
    """An output head is known by the last part of its name, so what lies in one is adapted."""

    def match_targets(self, names, targets):
        plain = {name: name.rpartition(".")[2] for name in names}
        ends = super().match_targets(sorted(set(plain.values())), ["all-linear"])
        taken = ends if "all-linear" in targets else []
        named = super().match_targets(names, targets)
        return [name for name in names if name in named or plain[name] in taken]


class NoTargetsMeansAll(Fault, breaks="R3.11"):
    """Empty targets match everything."""

    def match_targets(self, names, targets):
        return super().match_targets(names, targets) if targets else list(names)


class AllLinearAmongKeys(Fault, breaks="R3.11"):
    """A weight called ``all-linear`` binds to the last targeted module that no other one fits."""

    def bind(self, card, shapes):
        bound = super().bind(card, shapes)
        free = set(self.match_targets(list(shapes), card.target_modules)) - bound.keys()
        return bound | ({max(free): "all-linear"} if free and "all-linear" in card.weights else {})


class WeightsBindWithoutATarget(Fault, breaks="R3.11"):
    """A weight binds wherever it fits, whether its module is targeted or not."""

    def bind(self, card, shapes):
        return super().bind(card._replace(target_modules=tuple(shapes)), shapes)


class KeysBindAnywhere(Fault, breaks="R3.11"):
    """A weight binds wherever its key occurs in a name: ``1.query`` to ``layer.11.query`` too."""

    def bind(self, card, shapes):
        reached = super().match_targets(list(shapes), card.target_modules)
        pairs = {
            name: pair for name in reached for key, pair in card.weights.items() if key in name
        }
        return super().bind(card._replace(weights=pairs), shapes)


class KeysEndInWeight(Fault, breaks="R3.11", also="R7.2"):
    """Keys are taken for names of parameters, so that none is a module's and nothing is bound."""

    def bind(self, card, shapes):
        return super().bind(
            card._replace(weights={f"{key}.weight": pair for key, pair in card.weights.items()}),
            shapes,
        )


class FirstOfAmbiguousModules(Fault, breaks="R3.11"):
    """A weight that fits two modules is given to one of them."""

    def bind(self, card, shapes):
        try:
            return super().bind(card, shapes)
        except LookupError:
            return {}


class LargerFactorsAreCut(Fault, breaks="R7.2"):
    """Factors that are larger than their module are cut to its size."""

    def bind(self, card, shapes):
        def cut(key, pair):
            for name, (rows, columns) in shapes.items():
                fits = rows <= len(pair.A) and columns <= pair.B.shape[1]
                if fits and (name == key or name.endswith("." + key)):
                    return pair._replace(A=pair.A[:rows], B=pair.B[:, :columns])
            return pair

        weights = {k: cut(k, pair) for k, pair in card.weights.items()}
        return super().bind(card._replace(weights=weights), shapes)


class TransposedFits(Fault, breaks="R7.2"):
    """Factors of a transposed module are taken for those of a Conv1D and turned."""

    def bind(self, card, shapes):
        pairs = {
            key: pair._replace(A=pair.B.T, B=pair.A.T)
            if shapes.get(key) == (pair.B.shape[1], len(pair.A))
            else pair
            for key, pair in card.weights.items()
        }
        return super().bind(card._replace(weights=pairs), shapes)


class RanksBroadcast(Fault, breaks="R7.2"):
    """Where the two factors of a pair disagree in rank, the smaller is repeated."""

    def bind(self, card, shapes):
        ranks = {key: (pair.A.shape[1], pair.B.shape[0]) for key, pair in card.weights.items()}
        pairs = {
            key: pair._replace(
                A=np.resize(pair.A, (len(pair.A), max(ranks[key]))),
                B=np.resize(pair.B, (max(ranks[key]), pair.B.shape[1])),
            )
            for key, pair in card.weights.items()
        }
        largest = max(map(max, ranks.values()), default=card.rank)
        return super().bind(card._replace(weights=pairs, rank=largest), shapes)


TARGET_FAULTS = faults_in(globals())
