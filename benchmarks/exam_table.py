"""Whom the exam lets through: real skills, and candidates that it must refuse.

    OMP_NUM_THREADS=1 nice python benchmarks/exam_table.py [--only SET …] [--equally-long]

Five sets of documents come from installed packages (`document_sets.py`), each split three times by
file. In the place of each real card come candidates that learned nothing of its documents: the
weights of every other set's card, placebos with other seeds, and, for one split, a card that was
trained on the same pairs with their answers shuffled. All are described by the real card's
examples, so that they would answer the same queries. Cards and placebos are trained for 40 steps as
`learn` trains them, and examined by `lora.evolution.exam.examined`; both in float32, as there.

Results go to ``questions/exams.json``, exam by exam; the table of ``docs/learning.md`` is made
from them. Cards are kept in the user's cache, so that a run can be continued. On one core
without AVX-512 all of it took 70 minutes; it is about two thirds without the placebos that are not
equally long, or have other seeds, and without shuffled answers.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pairs
from code_digests import digests
from document_sets import FOLDERS, material
from scipy.stats import beta

import lora
from lora.card import LoRACard
from lora.evolution.documents import Source, standard_library
from lora.evolution.exam import (
    EXAMPLES,
    SHORT,
    Base,
    Service,
    Terms,
    description,
    digest,
    divided,
    examined,
)
from lora.federation.cache import default_cache
from lora.training.data import Pairs

RESULTS = Path(__file__).with_name("questions") / "exams.json"
PAGE = RESULTS.parents[2] / "docs" / "learning.md"
START, END = "<!-- exams -->", "<!-- end of exams -->"
SEEDS = (0, 1, 2)
ROUNDS = [*product(("real",), SEEDS), *product(("others",), SEEDS), ("shuffled", 0)]
"""Kinds of exams, each with the seed of the split."""

STANDARD = cache(standard_library)


class Cards:
    """Trains cards, each once, and keeps them in a folder."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.seconds = dict[str, float]()

    def trained(self, name: str, pairs: Pairs, *, seed: int = 0, steps: int = 40) -> LoRACard:
        """Return the card that some pairs give after so many steps."""
        path = self.folder / f"{name}-{digest(pairs)[:16]}-{seed}-{steps}.lora.arrow"
        if not path.is_file():
            trainer = Terms(seed=seed, steps=steps).trainer(self.engine)
            started = time.process_time()
            card = trainer.train(pairs, name=name, max_steps=steps).card
            self.seconds[name] = time.process_time() - started
            self.folder.mkdir(parents=True, exist_ok=True)
            lora.save(card, path)
        return lora.load(path)

    def placebo(self, form: str, seed: int = 0, steps: int = 40) -> LoRACard:
        """Return a card that was trained on the standard library."""
        return self.trained(f"placebo-{form}", STANDARD(form), seed=seed, steps=steps)


def shuffled(pairs: Pairs) -> Pairs:
    """Give each query the answer of another one."""
    order = np.random.default_rng(0).permutation(len(pairs))
    rows = pairs.table.to_pylist()
    return Pairs.of(
        {**row, "positive": rows[other]["positive"]} for row, other in zip(rows, order, strict=True)
    )


def exams(
    cards: Cards,
    sources: Mapping[str, Source],
    name: str,
    seed: int,
    kind: str,
    *,
    equally_long: bool = False,
) -> list[dict[str, Any]]:
    """Examine candidates of a kind in the place of a set's card."""
    training, held_out = divided(sources[name].pairs, seed)
    base, forms = Base(cards.engine.base), sources[name].forms
    placebos = {form: cards.placebo(form) for form in forms}
    placebos["short"] = cards.placebo("names", steps=SHORT)
    again = {
        f"{form}, seed {other}": cards.placebo(form, other)
        for form, other in product(forms, () if equally_long else SEEDS[1:])
    }
    if kind == "real":
        candidates = {"real": cards.trained(name, training)}
        placebos |= again
        if not equally_long:
            placebos[f"prose, {SHORT} steps"] = cards.placebo("prose", steps=SHORT)
    elif kind == "others":
        candidates = {f"placebo {key}": card for key, card in again.items()}
        for other in sources.keys() - {name}:
            # It has seen no document of this set, whichever its own split.
            foreign = divided(sources[other].pairs, SEEDS[0])[0]
            candidates[f"foreign {other}"] = cards.trained(other, foreign)
    else:
        candidates = {"shuffled": cards.trained(f"{name}-shuffled", shuffled(training))}
    results = []
    metadata = description(base, training.sample(EXAMPLES, seed))
    for candidate, card in candidates.items():
        service = Service(base, {})
        service.add(replace(card, name="own", metadata=metadata))
        verdict, answered = examined(service, "own", placebos, held_out, seed)
        changes = {
            key: [round(each.mean, 4), round(each.lower, 4), round(each.before, 4)]
            for key, each in verdict.changes.items()
        }
        about = {"set": name, "seed": seed, "candidate": candidate, "pairs": len(held_out)}
        results.append(about | {"answered": round(answered, 3), "changes": changes})
    return results


def accepted(exam: Mapping[str, Any], forms: Sequence[str], label: str = "") -> bool:
    """Tell whether a candidate beat what it has to, or what the row says."""
    against = ["base", "placebo short", *(f"placebo {form}" for form in forms)]
    if label == "real, without the short placebo":
        against.remove("placebo short")
    elif label == "real, against the base alone":
        against = ["base"]
    elif label == "real, against every placebo":
        against = exam["changes"]
    return all(exam["changes"][key][1] > 0 for key in against)


def interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Clopper and Pearson 1934)."""
    low = beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


ROWS = {
    "real": ("real",),
    "real, without the short placebo": ("real",),
    "real, against the base alone": ("real",),
    "real, against every placebo": ("real",),
    "another set's card": ("foreign",),
    "a placebo with another seed": ("placebo",),
    "shuffled answers": ("shuffled",),
    "all that must be refused": ("foreign", "placebo", "shuffled"),
}
"""Rows of the table, with the kinds of candidates that they are about."""


def table(results: Mapping[str, Any]) -> str:
    """Return who passed, as a table for the site."""
    every = [each for exam in results["exams"].values() for each in exam]
    forms = {name: source["forms"] for name, source in results["sources"].items()}
    lines = [f"| candidate | accepted | {' | '.join(forms)} |", "|---|---|" + "---|" * len(forms)]
    for label, kinds in ROWS.items():
        passed = {name: list[bool]() for name in forms}
        for exam in every:
            own = forms[exam["set"]]
            is_whole = label != "real, against every placebo" or len(exam["changes"]) > 2 + len(own)
            if exam["candidate"].startswith(kinds) and is_whole:
                passed[exam["set"]].append(accepted(exam, own, label))
        total = list(chain(*passed.values()))
        low, high = interval(sum(total), len(total))
        cells = [_share(total) + f" [{low:.0%}, {high:.0%}]", *map(_share, passed.values())]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for label, key in (
        ("the base", "base"),
        ("the equally long placebo", "placebo {}"),
        ("the short placebo", "placebo short"),
    ):
        means = {
            name: [
                exam["changes"][key.format(forms[name][0])][0]
                for exam in every
                if (exam["candidate"], exam["set"]) == ("real", name)
            ]
            for name in forms
        }
        cells = [f"{np.mean(list(chain(*means.values()))):+.3f}"]
        cells += [f"{np.mean(each):+.3f}" if each else "–" for each in means.values()]
        lines.append(f"| gain of real over {label}, MRR | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(passed: Sequence[bool]) -> str:
    return f"{sum(passed)} of {len(passed)}" if passed else "–"


def page(results: Mapping[str, Any], text: str) -> str:
    """Return a page with the table between its marks renewed."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Hold the exams, write what they found, and renew the table of the site."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=Path, default=default_cache() / "exam-table")
    parser.add_argument("--only", nargs="*", choices=FOLDERS, default=list(FOLDERS))
    parser.add_argument("--equally-long", action="store_true", help="no other placebos")
    options = parser.parse_args()
    cards = Cards(lora.ArrowEngine.from_pretrained(None), options.cards)
    sources = {name: material(name) for name in options.only}
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"exams": {}}
    others, before = bool(results["exams"]), results.pop("measured", None)
    results.setdefault("sources", {}).update(
        {
            name: {"pairs": len(each.pairs), "forms": each.forms, "sha256": digest(each.pairs)}
            for name, each in sources.items()
        }
    )
    packages = ("lora-cards", "torch", "numpy", "networkx", "scikit-learn", "ruff")
    results["versions"] = {package: version(package) for package in packages}
    alone = options.equally_long
    for (kind, seed), name in product(ROUNDS, sources):
        if alone and kind == "shuffled":
            continue
        started = time.process_time()
        key = f"{kind} {name} {seed}" + ", equally long" * (alone and kind == "others")
        results["exams"][key] = exams(cards, sources, name, seed, kind, equally_long=alone)
        RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
        print(f"{kind} {name} {seed}: {time.process_time() - started:.0f} s", flush=True)
    measured = digests(pairs.sources())
    if not others or before == measured:  # else some are of other sources
        results["measured"] = measured
        RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
    PAGE.write_text(page(results, PAGE.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
