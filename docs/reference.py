"""Write the reference: a table of the names that users import, a page for each of them, and pages
of the modules.
"""

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

FEDERATION = (
    "server client node discovery peer_table trust manifest credentials keys cache catalog follow"
)
MODELS = (
    "twins layers rows folding adapt checkpoint manager registry encoder encoder_folder any_encoder"
)
TRAINING = "data retrieval synthetic losses schedules ewc train online_adapter"
EVOLUTION = (
    "probe documents novelty acceptance exam distill teacher queue database nights worker factory"
)
TESTING = "bench binding domains remote serve reference plugin tolerance strategies report"
FILTER = '<input class="filter" type="search" hidden placeholder="{}" aria-label="Filter the rows">'
"""A box that filter.js shows, and that hides the rows of a page's tables."""

REFERENCE = {
    "Cards": ["card", "arrow_format", "files", "ipc_check", "checks", "errors"],
    "Algebra and targets": [
        *("factors", "blas"),
        "targets",
        "experts",
        "merging",
        "extract",
        "presets",
        "drawing",
    ],
    "Interop": [
        *("interop.peft", "interop.safetensors", "interop.foreign_names", "interop.hub"),
        *("interop.factor_files", "interop.weights"),
    ],
    "Models": [f"models.{name}" for name in MODELS.split()],
    "Routing": ["routing", "router"],
    "Engine": ["engine", "state", "batches", "metrics"],
    "Federation": [f"federation.{name}" for name in f"{FEDERATION} stream_limits fork".split()],
    "Training": [*(f"training.{name}" for name in TRAINING.split()), "progress"],
    "Evolution": [*(f"evolution.{name}" for name in EVOLUTION.split()), "learning"],
    "Testing": [f"testing.{name}" for name in f"{TESTING} requirements".split()],
}

PACKAGES = ("lora", "lora.training", "lora.federation", "lora.evolution")
ALSO = {
    "engine": "default_model",
    "factors": "delta spectrum",
    "merging": "Average Weighted Slerp TaskArithmetic Cat Ties Dare",
    "interop.peft": "import_peft export_peft",
    "interop.safetensors": "save_safetensors load_safetensors",
    "models.adapt": "init_card injections linears",
    "models.any_encoder": "PooledEncoder",
    "federation.keys": "generate_key sign_file",
    "training.train": "Settings",
    "training.data": "docstring_pairs",
    "training.synthetic": "synthetic_pairs",
    "testing.binding": "Binding PlainCard PlainPair",
}
"""Whose names have pages: all of these packages', and those of these modules that guides use."""


FAMILIES: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "Ways to run a model with cards",
        {
            "lora.adapt": "One set of cards for all inputs, side by side with the base weights.",
            "lora.adapt_rows": "Each row of a batch has its own set of cards.",
            "lora.rows": "Names the set of each row while a model of `adapt_rows` runs.",
            "lora.fold": "A plain model of `W + ΔW` in memory: no overhead, to save or compile.",
            "lora.fold_checkpoint": "The same on disk: a model's folder for vLLM and others.",
            "lora.LoRAManager": "Cards come and go while the model serves.",
            "lora.ArrowEngine": "An encoder with loading, routing, peers and learning beside it.",
            "lora.LoRALinear": "The adapted layer itself, for one Linear of your own.",
        },
    ),
    (
        "Ask what a card would do to a model",
        {
            "lora.models.adapt.injections": "Which modules each card finds, before you adapt.",
            "lora.Injection": "The answer: the modules that are bound, and what found no place.",
            "lora.uncalled": "Which adapted layers a forward never reaches.",
            "lora.fingerprint": "Identifies the base weights that a card is made for.",
            "lora.models.adapt.linears": "Every module that a card could adapt, with its shape.",
            "lora.UnboundWarning": "Warns that a card takes effect only in part.",
        },
    ),
    (
        "Make a card",
        {
            "lora.LoRACard": "From factors that you have in memory.",
            "lora.LowRank": "The factors of one module in such a card.",
            "lora.models.adapt.init_card": "Untrained, for a training loop of your own.",
            "lora.training.LoRATrainer": "By training on pairs of texts.",
            "lora.extract_delta": "From a model that was fine-tuned, and its base.",
            "lora.extract_direct": "From one model's weights, to compress them.",
            "lora.merge": "From other cards.",
            "lora.interop.peft.import_peft": "From a PEFT folder.",
            "lora.interop.safetensors.load_safetensors": "From a safetensors file.",
        },
    ),
    (
        "Combine cards",
        {
            "lora.merge": "One new card, whose rank may be cut; the cards are no longer separate.",
            "lora.AdapterSet": "Keeps the cards apart, each with a weight that you can change.",
            "lora.interpolate": "Moves from one such set to another.",
            "lora.fold": "Adds the cards to the weights of a model.",
        },
    ),
    (
        "Strategies of a merge",
        {
            "lora.merging.Average": "The mean, and the default.",
            "lora.merging.Weighted": "A weighted sum; with `normalize`, a weighted mean.",
            "lora.merging.TaskArithmetic": "A weighted sum whose negative weights remove a skill.",
            "lora.merging.Cat": "The same sum, kept exact: factors side by side, ranks add up.",
            "lora.merging.Slerp": "Exactly two cards: turns from one to the other along an arc.",
            "lora.merging.Ties": "Cards that disagree: small entries and outvoted signs go.",
            "lora.merging.Dare": "Drops entries at random and scales up the rest.",
        },
    ),
    (
        "Read and write a card",
        {
            "lora.load": "Maps a card file; the factors are not copied.",
            "lora.save": "Writes a card file and returns its digest.",
            "lora.inspect": "Reads all but the factors: name, shapes, metadata.",
            "lora.Header": "What `inspect` returns.",
            "lora.digest": "The SHA-256 that names a file's content.",
            "lora.card_to_table": "An Arrow table in memory, to send or to store elsewhere.",
            "lora.table_to_card": "The card in such a table.",
            "lora.interop.peft.export_peft": "A folder that PEFT loads.",
            "lora.interop.peft.import_peft": "A card from such a folder.",
            "lora.interop.safetensors.save_safetensors": "One safetensors file.",
            "lora.interop.safetensors.load_safetensors": "A card from such a file.",
        },
    ),
    (
        "Rank rules of an extraction",
        {
            "lora.MaxError": "The smallest rank whose relative error is at most this.",
            "lora.MinEnergy": "The smallest rank that holds this share of the squared norm.",
            "lora.factors.spectrum": "The singular values, to choose a rank by eye.",
            "lora.factors.delta": "ΔW itself, to compare with the change that you want.",
        },
    ),
    (
        "Settings of an adapter and of its training",
        {
            "lora.LoRAConfig": "The adapter: rank, alpha, targets, dropout.",
            "lora.training.train.Settings": "The training: loss, schedule, batch, epochs.",
        },
    ),
    (
        "Choose a card by a text",
        {
            "lora.LoRARouter": "Ranks cards by meaning and picks those that fit.",
            "lora.Route": "One card with its score.",
            "lora.calibrate": "Finds a threshold from queries that you know.",
            "lora.Calibration": "That threshold, and what it costs.",
            "lora.ArrowEngine": "Routes a query and encodes with the card that was picked.",
        },
    ),
    (
        "Encode texts",
        {
            "lora.ArrowEngine": "A list of texts, with the active cards or a request's own.",
            "lora.Encoding": "What it returns: an array that knows which cards made it.",
            "lora.encode_batches": "Millions of rows of Arrow or Parquet, in bounded memory.",
            "lora.InferenceCore": "A BERT encoder alone, without cards and routing.",
            "lora.models.any_encoder.PooledEncoder": "An encoder of transformers other than BERT.",
            "lora.engine.default_model": "The folder of the encoder that comes with the library.",
        },
    ),
    (
        "Keep many cards",
        {
            "lora.AdapterRegistry": "By name and version, with a bound on what is mapped.",
            "lora.federation.CardCache": "By digest, as they come from peers.",
            "lora.LoRAManager": "Those that are active on a model.",
        },
    ),
    (
        "Share cards",
        {
            "lora.federation.Node": "All in one: serves, finds peers and fetches.",
            "lora.federation.LoRAFlightServer": "Serves a folder, nothing more.",
            "lora.federation.LoRAFlightClient": "Asks one peer whose address you know.",
            "lora.federation.Discovery": "Finds the addresses of peers.",
            "lora.federation.Policy": "Decides which cards are accepted.",
            "lora.federation.CardCache": "Keeps what was fetched.",
            "lora.federation.keys.generate_key": "Makes a key to sign with.",
            "lora.federation.keys.sign_file": "Signs a card file.",
        },
    ),
    (
        "Learn",
        {
            "lora.training.LoRATrainer": "A card from pairs, once.",
            "lora.training.OnlineAdapter": "A small card that goes on learning from feedback.",
            "lora.training.LearningEvent": "One piece of that feedback.",
            "lora.evolution.SkillDistiller": "Skills from what an engine does not know yet.",
            "lora.evolution.SkillFactory": "Long work as jobs that survive a restart.",
            "lora.evolution.WeightMapProbe": "Which layers matter, before you choose targets.",
        },
    ),
    (
        "Pairs to learn from",
        {
            "lora.training.Pairs": "Your own, from a file or from lists.",
            "lora.training.data.docstring_pairs": "Real ones from Python's own docstrings.",
            "lora.training.synthetic.synthetic_pairs": "Made-up ones, for a test.",
            "lora.evolution.CloudDistiller": "Asked from a teacher, about your documents.",
        },
    ),
    (
        "Teachers",
        {
            "lora.evolution.CloudDistiller": "Asks a teacher and checks what it answers.",
            "lora.evolution.OpenAITeacher": "A server that speaks OpenAI's protocol.",
            "lora.evolution.MockTeacher": "Within this process: for tests and dry runs.",
            "lora.evolution.Consent": "What may be sent, and to which host.",
            "lora.evolution.Ledger": "What was sent and what it cost.",
        },
    ),
    (
        "Test an implementation",
        {
            "lora.testing.binding.Binding": "What your implementation offers to the tests.",
            "lora.testing.binding.PlainCard": "A card, as the tests hand it over.",
            "lora.testing.binding.PlainPair": "The factors of one module in it.",
        },
    ),
)
"""Names that a reader chooses between: a heading, and when to use each. Their pages show them."""

WORDS = {
    "lora.ArrowEngine": "multi adapter, multi-adapter, multi-LoRA, set_adapter, hotswap, hot swap",
    "lora.LoRAManager": "set_adapter, add_adapter, delete_adapter, hotswap, hot swap",
    "lora.adapt": "get_peft_model, PeftModel, multi adapter",
    "lora.adapt_rows": "multi adapter, multi-LoRA, S-LoRA, Punica, mixed batch, adapter_names",
    "lora.fold": "merge_and_unload, merge_adapter, fuse_lora",
    "lora.fold_checkpoint": "merge_and_unload, save_pretrained, fuse_lora",
    "lora.merge": "add_weighted_adapter, model merging, mergekit",
    "lora.interop.peft.import_peft": "PeftModel.from_pretrained, adapter_model.safetensors",
    "lora.interop.peft.export_peft": "save_pretrained, adapter_config.json",
}
"""Words of other libraries by which the search of the site finds a page."""


@dataclass(frozen=True)
class Name:
    """A name that users import.

    Args:
        path: As users write it, such as `lora.adapt`.
        home: Where it is defined, such as `lora.models.adapt`.
        chapter: The title of the page of its module.
        sentence: The first of its docstring.
    """

    path: str
    home: str
    chapter: str
    sentence: str

    @property
    def defined(self) -> str:
        """Its path in the module that defines it."""
        return f"{self.home}.{self.path.rpartition('.')[2]}"


def names() -> list[Name]:
    """Return every name that has a page, by chapter; of several paths the first one."""
    chapters = {f"lora.{module}": title for title, part in REFERENCE.items() for module in part}
    offered = [f"{p}.{name}" for p in PACKAGES for name in importlib.import_module(p).__all__]
    also = [f"lora.{module}.{name}" for module, part in ALSO.items() for name in part.split()]
    by_definition: dict[str, Name] = {}
    for path in [*offered, *also]:
        package, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(package), name)
        if not inspect.ismodule(value):
            entry = Name(path, value.__module__, chapters[value.__module__], sentence_of(value))
            by_definition.setdefault(entry.defined, entry)
    return sorted(by_definition.values(), key=lambda entry: list(REFERENCE).index(entry.chapter))


def sentence_of(value: Any) -> str:
    """Return the first sentence of a docstring, on one line."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\w\.|[)`]\.) (?=[A-Z])", text)[0].replace("``", "`")


def documented(module: str) -> list[str]:
    """Return the public names that a module defines and documents, in its own order."""
    source = inspect.getsource(importlib.import_module(module))
    body, listed = ast.parse(source).body, list[str]()
    for node, after in pairwise([*body, ast.Pass()]):
        match node, after:
            case (ast.ClassDef(name=name) | ast.FunctionDef(name=name), _):
                docstring = ast.get_docstring(node)
            case (
                ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str())),
            ):
                docstring = "a string below it"
            case _:
                continue
        if docstring and not name.startswith("_"):
            listed.append(name)
    return listed


def escaped(text: str) -> str:
    """Text for a cell of a table: no mark of a table, a link or HTML but in code."""
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(
        part if code else re.sub(r"[|\[\]<]", lambda mark: f"&#{ord(mark[0])};", part)
        for code, part in zip(itertools.cycle([False, True]), parts, strict=False)
    )


def page_of(title: str) -> str:
    """The file of the page of a chapter's modules."""
    return f"reference-{title.lower().replace(' ', '-')}.md"


def page_of_module(module: str) -> str:
    """The place of a module, such as `models.adapt`; empty where the reference has none."""
    titles = [title for title, part in REFERENCE.items() if module in part]
    return f"{page_of(titles[0])}#lora{module.replace('.', '')}" if titles else ""


def modules(title: str, own: Sequence[Name]) -> str:
    """A page that mkdocstrings fills: a chapter's modules, without the names that have pages."""
    lines = [f"# {title}: modules", "", "For those who read or extend the library itself.", ""]
    for module in REFERENCE[title]:
        path = f"lora.{module}"
        apart = [entry for entry in own if entry.home == path]
        lines += [f"## {path}", ""]
        if apart:
            links = [f'<span id="{e.defined}">[{e.path}]({e.path}.md)</span>' for e in apart]
            lines += [f"On pages of their own: {', '.join(links)}.", ""]
        elsewhere = {entry.defined for entry in apart}
        left = [name for name in documented(path) if f"{path}.{name}" not in elsewhere]
        lines += [f"::: {path}", "    options:", f"      members: {left}", ""]
    return "\n".join(lines)


def page(entry: Name, chapters: Sequence[str]) -> str:
    """The page of one name, which mkdocstrings fills; below it, where it is from and held to."""
    package, _, name = entry.path.rpartition(".")
    module = page_of_module(entry.home.removeprefix("lora."))
    lines = ["---", "search:", "  boost: 4", "---", "", f"::: {entry.path}", "    options:"]
    lines += ["      heading_level: 1", "      show_root_heading: true", "      show_bases: false"]
    lines += ["      show_root_full_path: true", "", *beside(entry), "---", ""]
    lines += [f"`from {package} import {name}`, defined in [{entry.home}]({module})."]
    value = getattr(importlib.import_module(package), name)
    others = [p for p in PACKAGES if getattr(importlib.import_module(p), name, ...) is value]
    if also := [f"`{other}`" for other in others if other != package]:
        lines += [f"The same as in {', '.join(also)}."]
    if entry.path in WORDS:
        lines += ["", f"In other libraries: {WORDS[entry.path]}."]
    if chapters:
        lines += ["", f"Requirements that hold for it: {', '.join(chapters)}."]
    return "\n".join([*lines, ""])


def beside(entry: Name) -> list[str]:
    """Tables of the names that a reader may choose instead, or needs next.

    Raises:
        ValueError: The name is in no table.
    """
    lines = []
    for heading, uses in FAMILIES:
        if entry.path in uses:
            lines += [f"## {heading}", "", "| name | use it for |", "|---|---|"]
            for path, use in uses.items():
                name = f"**`{path}`**" if path == entry.path else f"[`{path}`]({path}.md)"
                lines += [f"| {name} | {escaped(use)} |"]
            lines += [""]
    if not lines and entry.path not in ALONE:
        raise ValueError(f"{entry.path} is in no table of FAMILIES in docs/reference.py")
    return lines


ALONE = {"lora.FrozenJSON", "lora.LoRAError"}
"""Names beside which there is no other one to choose."""


def overview(entries: Sequence[Name]) -> str:
    """The table of all names, by chapter, and the way to the modules."""
    lines = ["# Names", "", "Every name that you import, with what it is.", ""]
    lines += [FILTER.format("Filter: merge, rank, PEFT …"), ""]
    for title in REFERENCE:
        own = [entry for entry in entries if entry.chapter == title]
        lines += [f"## {title}", ""]
        if own:
            lines += ["| name | what it is |", "|---|---|"]
            lines += [f"| [`{e.path}`]({e.path}.md) | {escaped(e.sentence)} |" for e in own]
        lines += ["", f"[The modules of this chapter]({page_of(title)})", ""]
    return "\n".join(lines)
