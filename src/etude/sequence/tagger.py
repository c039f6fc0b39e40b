"""Tagger: recurrent layers that read a sentence in both directions tag its words

Paper: Schuster, Paliwal, "Bidirectional Recurrent Neural Networks", 1997; Graves, 2013, arXiv:1308.0850 (layers); Ling et al.,
"Finding Function in Form", 2015, arXiv:1508.02096 (letters); Plank, Søgaard, Goldberg, 2016, arXiv:1604.05529 (parts of speech).

Equation: x_t the vector of word t and, beside it, what an LSTM over its letters says in each direction
    →h_t = cell(x_t, →h_{t−1}),   ←h_t = cell'(x_t, ←h_{t+1})           independent of each other, on the same input
    h_t = [→h_t ; ←h_t],  x_t of the next layer is h_t of this one
    p(tag of t) = softmax(V h_t + d),   loss = −mean log p over all words

Algorithm:
    1. sentences whose words carry tags; words and letters are numbered by the training part, 0 stands for any other
    2. each step: a batch of sentences, packed: the backward direction begins at each one's own last word
    3. a word seen once becomes the unknown one with probability `unknown`; dropout of vectors, between layers, before the readout
    4. cross-entropy; clip the gradient's norm; Adam with a rate that falls on a line
    5. while it learns, look at the validation part; at the end score the test part, once

Differences:
    - E51 of the notes: two directions are two independent passes over the same input, side by side, in every layer. A reversed
      layer on top of a forward one (what the notes describe) is another network.
    - The paper's bidirectional network is Elman's; here any cell (`--cell`).
    - Tags are chosen one by one: no tag sees another one (no CRF).
    - Numbers that need no network, returned beside ours: each word's commonest tag (of its ending, where it is new), and logistic
      regression on the word and its endings.
    - `--data people` is generated: names, some new, decide the tags of words before and behind them.

Expect: one thread of a CPU, seed 0: people 1.00 of the words in 12 s (forwards only 0.93, the word alone 0.88). English EWT
    (12,556 sentences) in 125 s: 0.932, of new words 0.735 (logistic regression on the word: 0.897).
Command: `etude run sequence/tagger --preset ewt`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.metrics import confusion_matrix
from etude.blocks.pictures.plots import confusion
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data import tagged, texts
from etude.data.batches import Stream
from etude.data.tagged import UNKNOWN, Column, Sentence
from etude.sequence.parts.baselines import commonest_tags, linear_tags
from etude.sequence.parts.people import people
from etude.sequence.parts.tagging import Lexicon, Tagger, answers, collate, moved, score, share, words_of
from etude.sequence.parts.text import falling


@dataclass(frozen=True)
class Config:
    data: str = "people"
    """Tagged sentences: the generated people, a treebank's folder (ud_english_ewt), a CoNLL-U file, or lines of word and tag."""
    column: Column = "upos"
    """What of a treebank is the tag."""
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """The recurrent cell."""
    layers: Few = 1
    """Recurrent layers; each reads both directions of the one below it."""
    width: Count = 64
    """Units of a layer in each direction, D."""
    bidirectional: bool = True
    """Read in both directions; without it forwards only."""
    embedding: Count = 64
    """Length of the vector that stands for a word."""
    spelling: Whole = 16
    """Length of a letter's vector, and units of the LSTM that reads letters in each direction; 0: words only."""
    unknown: Probability = 0.5
    """Probability that a word seen once in training is read as an unknown one."""
    dropout: Probability = 0.2
    """Dropout of word vectors, between layers, and before the readout."""
    training_examples: Whole = 0
    """Training sentences that are used, the first ones; 0: all."""
    batch: Count = 16
    """Sentences in a step."""
    steps: Count = 400
    """Number of parameter updates."""
    learning_rate: Positive = 5e-3
    """Adam's learning rate in the first step."""
    final_learning_rate: Probability = 0.05
    """Learning rate at the end, as a part of the first; a line leads there."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Whole = 200
    """Steps between validations (0: only at the end)."""


PRESETS = {
    "tiny": Config(width=8, embedding=8, spelling=4, batch=8, steps=20, training_examples=60),  # 1 s
    "default": Config(),  # 12 s → 1.00
    "ewt": Config(
        data="ud_english_ewt", width=96, embedding=96, spelling=32, dropout=0.4, batch=32, steps=1500, evaluate_every=500
    ),
}  # fmt: skip

SETTINGS = {
    "data": "ud_english_ewt",
    "column": {"column": "xpos", "data": "ud_english_ewt"},
    "clip_norm": 0.01,
    "evaluate_every": 5,
    "training_examples": 30,
}

METRICS = {
    "test_new_word_accuracy": "share of the words, not among those of the training part, whose tag is right",
    "test_commonest_accuracy": "of each word's commonest tag, of a new word's that of its longest known ending",
    "test_linear_accuracy": "of logistic regression on the word, its endings and its capitals",
    "test_span_f1": "F1 of spans, where the tags mark spans",
}

EXPERIMENTS = (
    Experiment(
        "people",
        preset="default",
        metric="test_accuracy",
        bar=0.99,
        controls=(
            Control("forwards only: what comes is not known", flags={"bidirectional": False}),
            Control("words without letters", flags={"spelling": 0}),
            Control("logistic regression on the word", metric="test_linear_accuracy"),
        ),
    ),
    Experiment(
        "ewt",
        preset="ewt",
        metric="test_accuracy",
        bar=0.925,
        controls=(
            Control("logistic regression on the word", metric="test_linear_accuracy"),
            Control("each word's commonest tag", metric="test_commonest_accuracy"),
        ),
    ),
)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network, for the words, letters and tags of the spec."""
    known = spec.extra["lexicon"]
    model = Tagger(
        len(known["words"]), len(known["letters"]), len(spec.classes), config.cell, config.embedding, config.spelling,
        config.width, config.layers, bidirectional=config.bidirectional, dropout=config.dropout,
    )  # fmt: skip
    return {"model": model}


def forgotten(words: Tensor, rare: Tensor, probability: float, dice: torch.Generator) -> Tensor:
    """Line 3: `words` (B, T) with each of the `rare` ones made 0, the unknown one, with that probability."""
    chosen = torch.rand(words.shape, generator=dice) < probability
    return words.masked_fill(chosen & torch.isin(words, rare), 0)


@method("sequence/tagger", paper="doi:10.1109/78.650093", section="6.1.4.2, 6.1.4.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = people() if config.data == "people" else tagged.read(config.data, config.column)  # line 1
    learned = data.train[: config.training_examples or None]
    lexicon = Lexicon.of(learned)
    spec = Spec(classes=data.classes, extra={"lexicon": lexicon.state()})
    run.describe(spec, data)
    model = build(config, spec)["model"]
    run.suit_threads(model.recurrent)
    model = run.place(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    run.track(model=model, optimizer=optimizer)
    rare = torch.tensor(sorted(lexicon.rare))
    order = Stream(len(learned), config.batch, run.seed, run.rank, run.world)

    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * falling(step, config.steps, config.final_learning_rate)
        batch = collate([learned[i] for i in order.indices(step).tolist()], lexicon)  # line 2
        words = forgotten(batch.words, rare, config.unknown, run.generator("unknown", step))  # line 3
        batch = moved(batch._replace(words=words), run.device)
        with run.autocast():
            logits = model(batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        loss = F.cross_entropy(logits, batch.tags.flatten(), ignore_index=UNKNOWN)  # line 4
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):  # line 5
            run.log(validation_accuracy=share(data.validation, answers(model, data.validation, lexicon)))

    said = answers(model, data.test, lexicon)
    true, told = ([tag for row in rows for tag in row] for rows in ([s.tags for s in data.test], said))
    table = confusion_matrix(torch.tensor(true), torch.tensor(told), len(data.classes), ignore_index=UNKNOWN)
    run.artifact("confusion", confusion(table, data.classes), "Words of the test part.")
    lines = [" ".join(shown(s, t, data.classes)) for s, t in zip(data.test[:12], said)]
    run.artifact(
        "examples", "\n".join(lines), "The first of the test part: word/tag, and what it is where that is wrong."
    )
    return {
        **{f"test_{name}": value for name, value in score(data.test, said, data.classes, lexicon).items()},
        "test_commonest_accuracy": share(data.test, commonest_tags(learned, data.test)),
        "test_linear_accuracy": share(data.test, linear_tags(learned, data.test)),
    }


def shown(sentence: Sentence, said: Sequence[int], classes: Sequence[str]) -> list[str]:
    """word/tag, and the true tag behind it where it is another one."""
    return [
        f"{word}/{classes[tag]}" + (f"[{classes[true]}]" if true not in (tag, UNKNOWN) else "")
        for word, true, tag in zip(sentence.words, sentence.tags, said)
    ]


@dataclass(frozen=True)
class Sample:
    text: str = "Mira they meet the dear Tomo"
    """A sentence to tag; a mark that stands at a word is cut off."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Each word of a sentence and its tag, a line a word."""
    sentences = [Sentence(words, (UNKNOWN,) * len(words)) for words in words_of(options.text)]
    if not sentences:
        raise UserError("--text is empty; give some words")
    return "\n\n".join("\n".join(f"{w:<16} {tag}" for w, tag in rows) for rows in named(loaded, sentences))


def predict(loaded: Loaded, files: Any) -> list[dict[str, Any]]:
    """Tag text files, line by line, and CoNLL-U files: `predicted/NAME.txt` of the run has a word and its tag on each line.

    Returns a row a file: what it holds, the share of each tag, for a CoNLL-U file the share of the words tagged rightly.
    """
    found = []
    for number, path in enumerate(map(Path, [files] if isinstance(files, (str, Path)) else files)):
        row: dict[str, Any] = {"file": str(path)}
        if ".conllu" in path.name:
            given = tagged.sentences(path, loaded.config.column)
            place = {name: i for i, name in enumerate(loaded.spec.classes)}
            sentences = [Sentence(tuple(w for w, _ in s), tuple(place.get(t, UNKNOWN) for _, t in s)) for s in given]
        else:
            text = texts.read(path, "name a text file, a sentence on each line, or a CoNLL-U file")
            sentences = [Sentence(words, (UNKNOWN,) * len(words)) for words in words_of(text)]
        if not sentences:
            raise UserError(f"{path} has no words to tag")
        rows = named(loaded, sentences)
        every = [tag for tags in rows for _, tag in tags]
        row |= {"sentences": len(rows), "words": len(every)}
        row["tags"] = {name: every.count(name) / len(every) for name in loaded.spec.classes if name in every}
        if ".conllu" in path.name:
            said = [[loaded.spec.classes.index(tag) for _, tag in tags] for tags in rows]
            if any(tag != UNKNOWN for s in sentences for tag in s.tags):
                row["accuracy"] = share(sentences, said)
        out = loaded.folder / "predicted" / f"{number:03d}-{path.name.split('.')[0]}.txt"
        out.parent.mkdir(exist_ok=True)
        out.write_text(
            "\n\n".join("\n".join(f"{w}\t{tag}" for w, tag in tags) for tags in rows) + "\n", encoding="utf-8"
        )
        found.append({**row, "tagged": str(out)})
    return found


def named(loaded: Loaded, sentences: Sequence[Sentence]) -> list[list[tuple[str, str]]]:
    """(word, name of its tag) of each sentence."""
    model: Any = loaded.model
    said = answers(model, sentences, Lexicon(**loaded.spec.extra["lexicon"]))
    return [[(w, loaded.spec.classes[t]) for w, t in zip(s.words, tags)] for s, tags in zip(sentences, said)]
