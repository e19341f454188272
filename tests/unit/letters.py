"""A tiny encoder and a language for it, in which a card is trained and examined within a second.

``ea gc`` asks for ``fa hc``: what some combinations teach holds for the others.
"""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from lora.engine import ArrowEngine
from lora.evolution.documents import Source
from lora.models.encoder import EncoderConfig, InferenceCore
from lora.training.data import Pairs
from lora.training.train import Settings

LETTERS = "abcdefghijklmnopqrst"
SETTINGS = Settings(lr=1e-2, batch_size=32, share=0.9, validation_size=64)


def core():
    """A tiny random encoder over a vocabulary of ``aa … lt``."""
    names = [first + second for first in "abcdefghijkl" for second in LETTERS]
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = InferenceCore(EncoderConfig(len(vocabulary), 32, 2, 2, 64, 16), tokenizer)
    return encoder.requires_grad_(requires_grad=False).eval()


def engine():
    return ArrowEngine(core())


def combined(letters, shuffled=None, size=20):
    """Pairs of a subject of four letters, in as many files as there are second letters."""
    places = [(i, j) for i in range(size) for j in range(size)]
    queries, answers = (
        [f"{letters[k]}{LETTERS[i]} {letters[k + 2]}{LETTERS[j]}" for i, j in places]
        for k in (0, 1)
    )
    if shuffled is not None:
        order = np.random.default_rng(shuffled).permutation(len(answers))
        answers = [answers[row] for row in order]
    return Pairs.of(
        {"query": query, "positive": answer, "group": f"{letters} {(i + j) % size}"}
        for (i, j), query, answer in zip(places, queries, answers, strict=True)
    )


def subject(letters, **options):
    return Source(combined(letters, **options))


def write_documents(folder, letters, **options):
    """Write the pairs of a subject as paragraphs, a file for each group."""
    folder.mkdir()
    for row in combined(letters, **options).table.to_pylist():
        with (folder / f"{row['group'].split()[1]}.md").open("a") as file:
            file.write(f"{row['query']} then . {row['positive']} then now\n\n")
    return folder
