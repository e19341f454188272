"""What sentences say of the figures in ``benchmarks/results.json``: on pages written by hand, and
the answer to each question of the page of benchmarks.

A page quotes a figure as it is made here, rounding and all; ``tests/unit/test_docs.py`` compares.
Run by itself, it prints each sentence that its page does not hold, and each figure of the page on
performance that is neither made here nor listed as measured elsewhere.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.testing.bench import shown

ROOT = Path(__file__).parents[1]
PERFORMANCE = "docs/performance.md"
LEARNING = "docs/learning.md"
KINDS = ("r8 q,v", "r16 all Linears")
SIZES = ("768 x 768", "3072 x 768", "2048 x 2048")

ELSEWHERE = (
    "copy of the touched weights, 40.5 MiB for all Linears of MiniLM",  # a test computes it
    "6.3 % more arithmetic at rank 16",  # 110,592 of 1,769,472 products a layer and token
    "A card of 50 MB arrives over loopback",
    "3 % of what it computes is padding, where 15 % were before, and they take 0.89 of the time",
    "82 % of the time on one thread, at 85 of the core's GFLOP/s",
    "stayed at 300 to 313 MiB from the 12,500th on",
    "to lower the error by less than 0.001 %",  # a rule of the code
    "52 and 161 times as fast for linear merges, 22 times for extraction",
    "DARE took 65 ms at that size when it was profiled: 13 ms for random numbers",
    "the fetch took 4 to 4.5 times as long as `sendall`, and the lower bound was 3.4",
)
"""What the page on performance has of profiles, older runs, other machines, and arithmetic."""


class Figures:
    """The figures of a report by the names that the page of benchmarks gives them.

    A name may be cut where only one figure begins with it. Overheads are in percent.
    """

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.rows = {shown(row)[0]: row for part in report.values() for row in part["rows"]}

    def row(self, name: str) -> Mapping[str, Any]:
        """The only row of that name."""
        if name in self.rows:
            row: Mapping[str, Any] = self.rows[name]
        else:
            rows = [row for known, row in self.rows.items() if known.startswith(name)]
            if len(rows) != 1:
                raise KeyError(f"expected one figure named {name!r}, found {len(rows)}")
            row = rows[0]
        return row

    def __call__(self, name: str) -> float:
        """The median."""
        return self._form(name, self.row(name)["value"])

    def target(self, name: str) -> float:
        """The target."""
        return self._form(name, self.row(name)["target"])

    def ends(self, name: str) -> list[float]:
        """The two ends of the interval."""
        return [self._form(name, end) for end in self.row(name)["interval"]]

    def verdict(self, name: str) -> str:
        """Whether the target is met."""
        return "met" if self.row(name)["met"] else "missed"

    def range(self, *names: str) -> tuple[float, float]:
        """The smallest and the largest median."""
        values = [self(name) for name in names]
        return min(values), max(values)

    def _form(self, name: str, value: float) -> float:
        return 100 * value if self.row(name)["kind"] == "overhead" else value


def claims(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each sentence that quotes figures, with its page."""
    measured = Figures(report)
    for text in _performance(measured):
        yield PERFORMANCE, text
    merged = measured("merge 3 cards of rank 16, 768 x 768: merge / PEFT svd")
    dense = f"768 × 768 it is {merged:.0f} times as fast as PEFT's dense way"
    yield "docs/explanation/merging.md", dense
    for text in _learning((ROOT / LEARNING).read_text(encoding="utf-8")):
        yield LEARNING, text
    memory = measured("memory: each of 900 loaded cards")
    yield "docs/explanation/zero-copy.md", f"a loaded card of 40 kB takes {memory:.1f} kB of memory"


def _performance(measured: Figures) -> Iterator[str]:
    """Every sentence with figures of the page on performance."""
    yield from _forwards(measured)
    yield from _lifecycle(measured)
    faster = "encode 2,000 sentences: engine.encode / sentence-transformers"
    low, high = measured.ends(faster)
    longer = "encode 406 long docstrings and sources: engine.encode / sentence-transformers"
    yield (
        f"encoded {measured(faster):.1f} times as fast (target: {measured.target(faster):.1f} "
        f"times; 95 % interval {low:.1f} to {high:.1f}), 406 long docstrings and sources "
        f"{measured(longer):.2f} times as fast (target: {measured.target(longer):g} times, "
        f"{measured.verdict(longer)})"
    )
    for cards in ("1,000", "100,000"):
        share = measured(f"route over 100,000 exemplars of {cards} cards: select / rows @ query")
        yield f"{share:.1f} of the time of the float64 product over 100,000 exemplars"
    yield from _merges(measured)
    yield from _fetching(measured)
    yield from _growth(measured)


def _forwards(measured: Figures) -> Iterator[str]:
    few = [f"one card, r8 q,v, {count} tokens: LoRALinear / base" for count in (8, 16, 64)]
    low, high = measured.range(*few)
    more = measured("one card, r8 q,v, 128 tokens: LoRALinear / base")
    yield (
        f"a card of rank 8 on query and value adds {low:.0f} to {high:.0f} % at 8 to 64 tokens, "
        f"where {measured.target(few[0]):.0f} % is the target, and {more:.1f} % at 128 tokens"
    )
    three = measured("three cards, r16 all Linears, 128 tokens: overhead, of one's")
    yield f"not folded their overhead is {three:.1f} times that of one at 128 tokens"
    batches = [name for name in measured.rows if name.endswith(": ours / our base")]
    met = "All six" if [measured.row(name)["met"] for name in batches] == [True] * 6 else "Not all"
    closest = max(batches, key=lambda name: measured(name) / measured.target(name))
    batch = closest.partition(":")[0]
    theirs = measured(f"{batch}: PEFT / its base")
    yield (
        f"{met} cases meet it; the closest is {batch.replace(', r8 q,v', ' at rank 8')}: "
        f"they add {measured(closest):.1f} %, and PEFT's add {theirs:.1f} %"
    )


def _lifecycle(measured: Figures) -> Iterator[str]:
    few = measured("load a card, r8 q,v: lora.load / safetensors")
    many = measured("load a card, 224 modules: lora.load / safetensors")
    yield (
        f"a card of 12 modules takes {few:.2f} of safetensors' time, "
        f"and one of 224 modules {many:.2f}"
    )
    taken = measured("load a card, r8 q,v, after other work: lora.load / safetensors")
    cold = measured("load a card, r8 q,v, caches cold: lora.load / safetensors")
    yield (
        f"12 modules take {taken:.2f} times as long as with safetensors; "
        f"if the file is not in memory, {cold:.1f} times"
    )
    loads = [f"load a card, {kind}: lora.load / PEFT load_adapter" for kind in KINDS]
    low, high = measured.range(*loads)
    yield (
        f"`lora.load` takes {low:.2f} to {high:.2f} of the time, "
        f"where {measured.target(loads[0]):g} is the target"
    )
    applied = measured.target("apply to 12 layers, r8 q,v: apply / PEFT inject")
    yield f"The target of {applied:g} × its time can't be met"
    low, high = measured.range(*(f"remove, {kind}" for kind in KINDS))
    yield f"what takes time, {low:.2f} to {high:.2f} ms, is freeing the model that was"
    remove = "remove, r8 q,v: remove / PEFT delete_adapter"
    yield (
        f"the target of {measured.target(remove):g} × PEFT's `delete_adapter` was set then, "
        f"and is {measured.verdict(remove)}"
    )


def _merges(measured: Figures) -> Iterator[str]:
    missed: list[bool] = []
    for label, name, peer, form in (
        ("linear, times as fast", "merge", "svd", ".0f"),
        ("TIES, share of PEFT's time", "TIES of", "ties_svd", ".2f"),
        ("DARE, share of PEFT's time", "DARE of", "dare_linear_svd", ".2f"),
    ):
        names = [f"{name} 3 cards of rank 16, {size}: merge / PEFT {peer}" for size in SIZES]
        cells = [f"{measured(each):{form}} × ({measured.target(each):g} ×)" for each in names]
        yield f"| {label} | {' | '.join(cells)} |"
        missed.extend(measured.verdict(each) == "missed" for each in names)
    yield "No merge meets its target." if all(missed) else "Some merges meet their targets."
    noise, skill = (
        f"extract rank 16 of 768 x 3072, {what}: randomized / full SVD in float64"
        for what in ("noise", "skill and noise")
    )
    ends = ", ".join("{:.0f} to {:.0f}".format(*measured.ends(name)) for name in (noise, skill))
    yield (
        f"by the randomised method is {measured(noise):.0f} times as fast as a full SVD in float64 "
        f"where ΔW is noise alone, and {measured(skill):.0f} times where a skill is in it; "
        f"the target is {measured.target(noise):g} times, and the intervals of both "
        f"hold it or nearly so ({ends})"
    )


def _fetching(measured: Figures) -> Iterator[str]:
    card = "fetch a card of 50 MB"
    low, high = measured.ends(card)
    sent = f"{card}: verified fetch / raw TCP"
    yield (
        f"hashed and checked whole, in {measured(card):.0f} ms ({low:.0f} to {high:.0f}). "
        f"That is {measured(sent):.1f} times the time of `sendall` for the same bytes; "
        f"the target is {measured.target(sent):g} times, and is {measured.verdict(sent)}"
    )
    bound = measured(f"{card}: received and hashed alone / raw TCP")
    above = measured(f"{card}: verified fetch / received and hashed alone")
    yield (
        f"takes {bound:.1f} times as long as `sendall`, on two cores that the server shares. "
        f"This is the lower bound, and a fetch takes {above:.1f} times as long"
    )


def _growth(measured: Figures) -> Iterator[str]:
    wide = measured("factored forward, rank 512") / measured("factored forward, rank 1")
    yield f"as much time at 64 as at 1, {wide:.1f} times as much at 512"
    large = measured("adapt, million parameters 1,010")
    yield f"and no weight: {large:.0f} ms for a billion parameters"
    power = measured("factored forward: slope against million parameters")
    yield f"A forward grows as the {power:.2f}th power of the parameters"
    low, high = measured.range(
        *(
            f"factored forward of 128 tokens, {count} million parameters: factored / base"
            for count in ("11", "86", "304", "1,010")
        )
    )
    yield f"The card's share of it is between {low:.0f} and {high:.0f} %"
    some, most = (
        100 * (measured(f"256 rows of 8 tokens, adapters {count}") / one - 1)
        for one in [measured("256 rows of 8 tokens, adapters 1")]
        for count in (64, 256)
    )
    yield f"64 adapters over 256 rows cost {some:.0f} % more than one"
    yield f"which takes {most:.0f} % longer than one adapter"
    ten, thousand, most = (measured(f"select, cards {n}") for n in ("10", "1,000", "100,000"))
    yield f"{ten:.2f} ms for ten, {thousand:.2f} ms for a thousand, {most:.0f} ms for 100,000"
    card, sets = measured("memory: each of 900 loaded cards"), measured("memory: 64 request sets")
    yield (
        f"Each of 900 loaded cards takes {card:.1f} kB of memory; after 64 adapter sets "
        f"of requests an engine holds {sets:.1f} MiB more than after 16"
    )


def _answer_forward(measured: Figures) -> str:
    kinds = [f"one card, {kind}, 128 tokens" for kind in KINDS]
    ours, theirs, folded = (
        [measured(f"{kind}: {side} / base") for kind in kinds]
        for side in ("LoRALinear", "PEFT", "folded")
    )
    return (
        f"To a forward of 128 tokens, a card of rank 8 on query and value adds {ours[0]:.1f} % "
        f"(PEFT: {theirs[0]:.1f} %), one of rank 16 on every Linear {ours[1]:.1f} % (PEFT: "
        f"{theirs[1]:.1f} %); folded into the weights, {folded[0]:.1f} % and {folded[1]:.1f} %."
    )


def _answer_lifecycle(measured: Figures) -> str:
    shares = (
        "{:.2f} to {:.2f}".format(*measured.range(*names))
        for names in (
            [f"load a card, {kind}: lora.load / PEFT load_adapter" for kind in KINDS],
            [
                f"apply to {layers}: apply / PEFT inject"
                for layers in ("12 layers, r8 q,v", "37 layers, r16 all Linears")
            ],
            [f"swap, {kind}: swap / PEFT set_adapter" for kind in KINDS],
            [f"remove, {kind}: remove / PEFT delete_adapter" for kind in KINDS],
        )
    )
    load, apply, swap, remove = shares
    return (
        f"Loading takes {load} × PEFT's time, applying {apply} ×, "
        f"swapping to what is prepared {swap} ×, removing {remove} ×."
    )


def _answer_routing(measured: Figures) -> str:
    few = measured("route over 1,000 exemplars of 1,000 cards: select / rows @ query")
    many = measured("route over 100,000 exemplars of 1,000 cards: select / rows @ query")
    return (
        f"Choosing one of 1,000 cards takes {few:.1f} × the time of the bare product in "
        f"float64 if each has one example sentence, {many:.1f} × if each has 100."
    )


def _answer_throughput(measured: Figures) -> str:
    faster, longer = (
        measured(f"encode {what}: engine.encode / sentence-transformers")
        for what in ("2,000 sentences", "406 long docstrings and sources")
    )
    return (
        f"2,000 mixed sentences are encoded {faster:.1f} × as fast as by "
        f"sentence-transformers, 406 long docstrings and sources {longer:.2f} × as fast."
    )


def _answer_merge_extract(measured: Figures) -> str:
    low, high = measured.range(
        *(f"merge 3 cards of rank 16, {size}: merge / PEFT svd" for size in SIZES)
    )
    least, most = measured.range(
        *(
            f"extract rank 16 of 768 x 3072, {what}: randomized / full SVD in float64"
            for what in ("noise", "skill and noise")
        )
    )
    return (
        f"A linear merge of three cards of rank 16 is {low:.0f} to {high:.0f} × as fast as "
        "PEFT's, more where the Linear is larger; extracting rank 16 from 768 × 3072 is "
        f"{least:.0f} to {most:.0f} × as fast as a full SVD."
    )


def _answer_training(measured: Figures) -> str:
    mixed = measured("a step of 64 pairs: LoRATrainer / PEFT in a loop")
    alike = measured("64 pairs of texts of like length: LoRATrainer / PEFT in a loop")
    return (
        f"A step of 64 pairs of mixed lengths is {mixed:.1f} × as fast as one of PEFT in a "
        f"loop, and {alike:.2f} × as fast where all texts have one length."
    )


def _answer_fetching(measured: Figures) -> str:
    card = "fetch a card of 50 MB"
    return (
        f"A card of 50 MB is fetched, hashed and checked in {measured(card):.0f} ms, "
        f"{measured(f'{card}: verified fetch / raw TCP'):.1f} × the time in which its "
        "bytes alone arrive."
    )


def _answer_growth(measured: Figures) -> str:
    layers, parameters = (
        measured(f"factored forward: slope against {what}")
        for what in ("layers", "million parameters")
    )
    wide = measured("factored forward, rank 512") / measured("factored forward, rank 1")
    return (
        f"The time of a forward grows as the power {layers:.2f} of the layers and "
        f"{parameters:.2f} of the parameters, and {wide:.1f} times from rank 1 to rank 512; "
        f"choosing among 100,000 cards takes {measured('select, cards 100,000'):.1f} ms."
    )


def _answer_commands(measured: Figures) -> str:
    first, later = (
        measured(f"lora evolve on networkx, a {which} cycle") for which in ("first", "later")
    )
    return (
        f"`lora --help` takes {measured('lora --help'):.2f} s, `lora inspect` "
        f"{measured('lora inspect'):.2f} s; a first cycle of learning takes {first:.3g} s, "
        f"a later one {later:.3g} s."
    )


def _answer_models(measured: Figures) -> str:
    encode = measured("32 sentences with 8 adapters, encode: rows / one adapter")
    write = measured("generate for 32 rows with 8 adapters, greedy: shuffled / one adapter")
    folded_file = "a merged checkpoint of 2.0 GB, r16 all Linears: fold_checkpoint / "
    copied, theirs_file = measured(f"{folded_file}copytree"), measured(f"{folded_file}PEFT")
    return (
        f"Eight adapters over 32 rows take {encode:.2f} × the time of one adapter to encode, and "
        f"{write:.2f} × to generate; a checkpoint of 2 GB is folded in {copied:.1f} × the time of "
        f"copying it, and {theirs_file:.2f} × PEFT's."
    )


ANSWERS: Mapping[str, Callable[[Figures], str]] = {
    "forward": _answer_forward,
    "lifecycle": _answer_lifecycle,
    "routing": _answer_routing,
    "throughput": _answer_throughput,
    "merge_extract": _answer_merge_extract,
    "training": _answer_training,
    "fetching": _answer_fetching,
    "growth": _answer_growth,
    "commands": _answer_commands,
    "models": _answer_models,
}
"""What a script's figures say, in a sentence that answers the question of its heading."""


def _learning(page: str) -> Iterator[str]:
    """What the page on learning says of its own tables, which are made from their results."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([^|]+) \| (.+) \|$", page, re.MULTILINE)
    gains = {(trained, weight): (gain, each.split(" | ")) for trained, weight, gain, each in rows}
    counted = dict(re.findall(r"^\| ([^|]+?) \| (\d+ of \d+) ", page, re.MULTILINE))
    real, refused = counted["real"], counted["all that must be refused"].partition(" of ")
    share = "five of fifteen" if real == "5 of 15" else real
    yield f"A third of them: {share}, where 70 % were aimed at"
    yield f"Yes, in all {refused[2]} cases" if refused[0] == "0" else f"{refused[0]} were accepted"
    for name, what in (
        ("another set's card", "cards trained on other documents"),
        ("a placebo with another seed", "placebos trained with another seed"),
    ):
        yield f"{counted[name].removeprefix('0 of ')} {what}"
    documents, *ends = re.findall(r"[+-][\d.]+", gains["documents", "1.0"][0])
    yield (
        f"a card of documents changes the MRR by {documents}, and the interval, "
        f"{ends[0]} to {ends[1]}, includes 0"
    )
    for start, trained in (
        ("**, for 40 steps: ", "documents, 40 steps at a quarter of the rate"),
        ("- **Five steps**: ", "documents, 5 steps"),
    ):
        worst = min(gains[trained, "1.0"][1], key=float)
        yield (
            f"{start}{gains[trained, '0.5'][0]} over all. "
            f"At full weight the worst set changes by {worst}"
        )
    worst_of_penalties = (
        min(gains[f"documents, 40 steps, held with λ = {size}", "1.0"][1], key=float)
        for size in ("0.1", "1")
    )
    yield "λ = 0.1 the worst set changes by {} at full weight, with λ = 1 by {}".format(
        *worst_of_penalties
    )
    headings = float(gains["headings as questions", "1.0"][1][1])
    yield f"At full weight they harm ruff's pages by {-headings:.2f}"


def answers(report: Mapping[str, Any]) -> dict[str, str]:
    """The answer to each script's question."""
    measured = Figures(report)
    return {script: ANSWERS[script](measured) for script in report}


def missing(report: Mapping[str, Any]) -> list[str]:
    """Each sentence that its page does not hold, and each figure that nothing holds."""
    pages = dict[str, str]()
    lacking = []
    for page, sentence in claims(report):
        if page not in pages:
            text = (ROOT / page).read_text(encoding="utf-8").partition("\n## Measure here")[0]
            pages[page] = " ".join(text.split())
        if sentence not in pages[page]:
            lacking.append(f"{page}: {sentence}")
    rest = pages[PERFORMANCE]
    for sentence in [*ELSEWHERE, *(text for page, text in claims(report) if page == PERFORMANCE)]:
        rest = rest.replace(sentence, "")
    figure = r"\d[\d.,]*(?:th power| ?(?:%|×(?! \d)|times|ms\b|[kKM]i?B|GFLOP)| of the time)"
    return lacking + [f"{PERFORMANCE}: {found}" for found in re.findall(figure, rest)]


if __name__ == "__main__":
    results = ROOT / "benchmarks" / "results.json"
    sys.exit("\n".join(missing(json.loads(results.read_text(encoding="utf-8")))) or None)
