"""ELMo: language models in both directions give words features of their sentence

Paper: Peters, Neumann, Iyyer, Gardner, Clark, Lee, Zettlemoyer, "Deep contextualized word representations", 2018,
arXiv:1802.05365. The network is in `etude.language.parts.elmo`.

Equation: x_t the vector of word t, made of its letters: convolutions, their maxima, highway layers, a projection
    →h_{t,j} = LSTM_j(→h_{t,j−1}, →h_{t−1,j}) [+ →h_{t,j−1} for j > 1],   ←h_{t,j} the same from the other end;   h_{t,0} = x_t
    p(w_{t+1} | w_{≤t}) = softmax(V →h_{t,L} + d),   p(w_{t−1} | w_{≥t}) = softmax(V ←h_{t,L} + d)
    loss = −½ (mean log →p + mean log ←p)
    ELMo_t = γ Σ_{j=0}^{L} softmax(s)_j [→h_{t,j} ; ←h_{t,j}],   p(tag of t) = softmax(U ELMo_t + e)

Algorithm:
    1. sentences whose words carry tags; the language models read all of the training part, without its tags
    2. each step: a batch of sentences of like length between marks; Adam on the loss, its rate rising, then falling on a line
    3. the language models stand still from here on
    4. each tagging step: features of a batch of the labelled sentences; Adam on s, γ and the softmax of the tags
    5. while it learns, look at the validation part; at the end score the test part, once

Differences:
    - E70 (notes 6.9.1): the sum begins at the token layer, j = 0; the backward state of layer j stands beside the forward one
      of the same layer (printed is layer 1); the weights are a softmax.
    - d begins at the words' log-frequencies. Begun at 0 the frequencies are learned through x, which grows until every LSTM is
      saturated: tagging by such features is worse than by those of a random network.
    - The softmax is over the `vocabulary` commonest words and an unknown one, whole; the paper samples among 800,000.
    - Windows of the convolutions lie inside a word; published networks pad each word to 50 letters and look at these too. No
      clipping of cells and projections. Letters are those of the training part, not bytes.
    - The features go into a softmax; in the paper into the recurrent network of a task. `--normalizer layer` is the paper's
      option to norm each layer first; here it has no weights. No l2 on s.
    - `--data company` is generated: words of random letters, which no label shows, and which their neighbours tell apart. Any
      text sets tags by itself: which mark follows each word.
    - Numbers that need no network, returned beside ours: logistic regression on the word and its endings, each word's commonest
      tag.

Expect: company, one thread of a busy CPU, 15 s, seeds 0 and 1: all test words right with 12 labelled sentences (random features
    0.52 of them, logistic regression on the word 0.73), a word 1.24 nats likelier than by its frequency. EWT
    in 110 s, seed 0: 0.800 with 1,000 labelled sentences (random features 0.667, logistic regression 0.865).
Command: `etude run language/elmo --preset ewt`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.metrics import confusion_matrix
from etude.blocks.pictures.plots import bars, confusion
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.batches import Grouped
from etude.language.parts.company import company
from etude.language.parts.elmo import Architecture, BiLM, Lexicon, Mixture, collate
from etude.language.parts.tasks import Item, read_task
from etude.language.parts.words import commonest_tags, linear_tags, share, words_of

IGNORED = -100


@dataclass(frozen=True)
class Config:
    data: str = "company"
    """Tagged sentences: company, which is generated; a treebank's folder (ud_english_ewt); any text sets tags by itself."""
    read: Literal["letters", "words"] = "letters"
    """What a word's vector is made of: its letters, or a table of the words that are predicted."""
    vocabulary: Count = 200
    """Words that are predicted, the commonest; any other is the unknown one."""
    spelling: Count = 16
    """Length of a letter's vector."""
    filters: tuple[int, ...] = (8, 16, 32)
    """Filters that look at one letter, at two, at three and so on."""
    highways: Whole = 1
    """Highway layers behind the filters."""
    layers: Few = 2
    """LSTM layers of each direction, L."""
    width: Count = 32
    """Cells of an LSTM."""
    projection: Count = 32
    """Length of a word's vector and of what an LSTM says; at most the width."""
    dropout: Probability = 0.1
    """Dropout of word vectors and of each layer's output; of the features before the softmax of the tags."""
    batch: Count = 16
    """Sentences in a step."""
    steps: Count = 250
    """Updates of the language models."""
    learning_rate: Positive = 5e-3
    """Peak learning rate of the language models."""
    warmup_steps: Whole = 50
    """Steps over which that rate rises; from there it falls on a line to a twentieth."""
    clip_norm: Positive = 1.0
    """Largest norm of the language models' whole gradient."""
    training_examples: Whole = 12
    """Sentences whose tags are used, drawn from the training part; 0: all."""
    features: Literal["mixture", "last", "token"] = "mixture"
    """What of the layers is read: all, weighted; the last alone; the word's vector alone, which knows no context."""
    normalizer: Literal["none", "layer"] = "layer"
    """Set each layer's features of a word to mean 0 and variance 1 before they are weighted."""
    tagging_steps: Count = 60
    """Updates of the mixture and of the softmax of the tags, behind the others."""
    tagging_learning_rate: Positive = 0.01
    """Their learning rate; it falls on a line to a twentieth."""
    evaluate_every: Whole = 100
    """Steps between validations (0: only at the end of either part)."""


PRESETS = {
    "tiny": Config(
        data="house_text", vocabulary=60, spelling=4, filters=(4, 8), width=12, projection=8, batch=8, steps=12, warmup_steps=3,
        tagging_steps=8, evaluate_every=6, training_examples=60,
    ),
    "default": Config(),  # 12 s → 1.00
    "ewt": Config(
        data="ud_english_ewt", vocabulary=2500, filters=(16, 32, 64, 64), width=96, projection=96, batch=32, steps=800,
        learning_rate=3e-3, warmup_steps=100, training_examples=1000, tagging_steps=300, evaluate_every=200,
    ),
    "paper": Config(
        data="ud_english_ewt", vocabulary=800_000, filters=(32, 32, 64, 128, 256, 512, 1024), highways=2, width=4096,
        projection=512, batch=128, steps=100_000, learning_rate=1e-3, warmup_steps=1000, training_examples=0,
        tagging_steps=2000, evaluate_every=1000,
    ),  # the paper's sizes; give it a text of its size, and a GPU
}  # fmt: skip

SETTINGS = {
    "data": "company",
    "filters": (4, 4, 4),
    "evaluate_every": 5,
    "training_examples": 30,
    "vocabulary": 40,
    "clip_norm": 0.01,
}

METRICS = {
    "test_forward_nats": "negative log-likelihood of a word given those before it (nats)",
    "test_backward_nats": "negative log-likelihood of a word given those behind it (nats)",
    "test_unigram_nats": "the same of the words' frequencies, which read nothing",
    "test_gain_nats": "by how much the mean of both directions is below the frequencies",
    "test_accuracy": "share of the words whose tag is right",
    "test_new_word_accuracy": "share of the words, not among the labelled ones, whose tag is right",
    "test_linear_accuracy": "of logistic regression on the word, its endings and its capitals, from the same labels",
    "test_commonest_accuracy": "of each word's commonest tag, of a new word's the commonest of all",
}

EXPERIMENTS = (
    Experiment(
        "company", preset="default", metric="test_accuracy", bar=0.95,
        controls=(
            Control("language models that learn nothing: random features", flags={"learning_rate": 1e-12}),
            Control("logistic regression on the word", metric="test_linear_accuracy"),
            Control("each word's commonest tag", metric="test_commonest_accuracy"),
        ),
    ),
    Experiment(
        "ewt", preset="ewt", metric="test_accuracy", bar=0.77, within_seconds=400,
        notes="Logistic regression on the word and its endings is better here (0.86): the paper's text has a billion words.",
        controls=(
            Control("language models that learn nothing: random features", flags={"learning_rate": 1e-12}),
        ),
    ),
    Experiment(
        "language_model", preset="default", metric="test_gain_nats", bar=1.05,
        controls=(
            Control("language models that learn nothing", flags={"learning_rate": 1e-12}),
            Control("sentences without their order", swap={"collate": "etude.language.parts.words.shuffled"}),
        ),
    ),
)  # fmt: skip


class Tags(nn.Module):
    """Features of all layers (…, L + 1, 2P) → logits of the tags (…, K)."""

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        self.which = {"mixture": slice(None), "last": slice(-1, None), "token": slice(1)}[config.features]
        self.mixture = Mixture(config.layers + 1 if config.features == "mixture" else 1, config.normalizer)
        self.dropout, self.readout = nn.Dropout(config.dropout), nn.Linear(2 * config.projection, classes)

    def forward(self, layers: Tensor) -> Tensor:
        return self.readout(self.dropout(self.mixture(layers[..., self.which, :])))


def rate(step: int, steps: int, warmup: int = 0) -> float:
    """The factor of a learning rate in a step (from 0): up to 1 on a line, then down to 1/20 behind the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.95 * (step - warmup) / max(1, steps - warmup)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The language models, and what reads tags from them."""
    of = Architecture(**spec.extra["architecture"])
    return {"model": BiLM(of), "tags": Tags(config, len(spec.classes))}


@method("language/elmo", paper="arXiv:1802.05365", section="6.9.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if config.projection > config.width:
        raise UserError(f"a projection makes shorter: {config.projection} is more than the width, {config.width}")
    if config.read == "letters" and (min(config.filters, default=0) < 0 or not sum(config.filters)):
        raise UserError(
            f"no filter reads the letters: --filters is {config.filters}; give one number from 0 on for each size"
        )
    task = company() if config.data == "company" else read_task(config.data, "tags")  # line 1
    if not (task.train and task.validation and task.test):
        raise UserError(f"{task.name} has too few sentences for three parts; give a longer text")
    drawn = torch.randperm(len(task.train), generator=run.generator("labelled"))[: config.training_examples or None]
    labelled = [task.train[i] for i in drawn.tolist()]
    lexicon = Lexicon.of((item.first for item in task.train), config.vocabulary)
    of = Architecture(
        lexicon.size, len(lexicon.letters), config.read, config.spelling, config.filters, config.highways, config.width,
        config.projection, config.layers, config.dropout,
    )  # fmt: skip
    spec = Spec(classes=task.classes, extra={"architecture": asdict(of), "lexicon": lexicon.state()})
    run.describe(spec, task)
    model, tags = build(config, spec).values()
    assert isinstance(model, BiLM)
    frequencies = unigram(task.train, lexicon)
    with torch.no_grad():
        model.readout.bias.copy_(frequencies)
    run.suit_threads(model)
    model, tags = run.place(model), run.place(tags)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    tagging = torch.optim.Adam(tags.parameters(), lr=config.tagging_learning_rate, fused=True)
    run.track(model=model, tags=tags, optimizer=optimizer, tagging=tagging)
    text, some = (
        Grouped(np.array([len(item.first) for item in part]), config.batch, run.seed, run.rank, run.world)
        for part in (task.train, labelled)
    )

    for step in run.steps(config.steps + config.tagging_steps):
        if step < config.steps:  # line 2
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate(step, config.steps, config.warmup_steps)
            batch = collate([task.train[i].first for i in text.indices(step)], lexicon).to(run.device)
            with run.autocast():
                ahead, back = model.nats(batch)
            loss = (ahead.mean() + back.mean()) / 2
            optimizer.zero_grad()
            loss.backward()
            run.average(model, loss=loss)
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            run.log(loss=loss)
            if run.every(config.evaluate_every) or step + 1 == config.steps:
                forward, backward = surprise(model, task.validation, lexicon)
                run.log(validation_forward_nats=forward, validation_backward_nats=backward)
            continue
        place = step - config.steps  # lines 3 and 4
        for group in tagging.param_groups:
            group["lr"] = config.tagging_learning_rate * rate(place, config.tagging_steps)
        items = [labelled[i] for i in some.indices(place)]
        with run.autocast():
            logits = tags(model.features(collate([item.first for item in items], lexicon).to(run.device)))
        asked = torch.tensor([tag for item in items for tag in item.tags], device=run.device)
        tagging_loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), asked)
        tagging.zero_grad()
        tagging_loss.backward()
        run.average(tags, tagging_loss=tagging_loss)
        tagging.step()
        run.log(tagging_loss=tagging_loss)
        if run.every(config.evaluate_every):  # line 5
            told = answers(model, tags, task.validation, lexicon)
            run.log(validation_accuracy=share(task.validation, told))

    told = answers(model, tags, task.test, lexicon)
    true, said = (torch.tensor([tag for row in rows for tag in row]) for rows in ([i.tags for i in task.test], told))
    names = [name or "none" for name in task.classes]
    run.artifact(
        "confusion", confusion(confusion_matrix(true, said, len(names), ignore_index=IGNORED), names), "Test words."
    )
    if config.features == "mixture":
        weights = tags.mixture.s.softmax(0).tolist()  # type: ignore[union-attr]
        layers = ["token", *(f"LSTM {j}" for j in range(1, len(weights)))]
        run.artifact("layers", bars(layers, weights, x="weight"), "Which layers the tags are read from.")
    forward, backward = surprise(model, task.test, lexicon)
    alone = -float(
        torch.cat([frequencies[collate([i.first], lexicon).words[0, 1:-1]].double() for i in task.test]).mean()
    )
    known = {word for item in labelled for word in item.first}
    new = any(t != IGNORED and w not in known for item in task.test for w, t in zip(item.first, item.tags))
    return {
        "test_forward_nats": forward,
        "test_backward_nats": backward,
        "test_unigram_nats": alone,
        "test_gain_nats": alone - (forward + backward) / 2,
        "test_accuracy": share(task.test, told),
        **({"test_new_word_accuracy": share(task.test, told, known)} if new else {}),
        "test_linear_accuracy": share(task.test, linear_tags(labelled, task.test)),
        "test_commonest_accuracy": share(task.test, commonest_tags(labelled, task.test)),
    }


def unigram(items: Sequence[Item], lexicon: Lexicon) -> Tensor:
    """log of the share of each of the V words in the text, the marks once a sentence, each counted once more than it occurs."""
    count = Counter(lexicon.numbers.get(word, 0) for item in items for word in item.first)
    often = torch.tensor([count[0], *[len(items)] * 2, *(count[i] for i in range(3, lexicon.size))]) + 1.0
    return (often / often.sum()).log()


def batches(items: Sequence[Item], lexicon: Lexicon, device: torch.device, size: int = 64) -> Any:
    """(places, batch) of all items, those of like length side by side."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].first))
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        yield places, collate([items[i].first for i in places], lexicon).to(device)


@torch.no_grad()
def surprise(model: BiLM, items: Sequence[Item], lexicon: Lexicon) -> tuple[float, float]:
    """Mean −log p of the words, the closing mark left out forwards and the opening one backwards: (forwards, backwards)."""
    training, total = model.training, torch.zeros(2, dtype=torch.float64)
    model.eval()
    for _, batch in batches(items, lexicon, model.readout.weight.device):
        known = batch.mask[:, 1:]
        words = (batch.words[:, 1:][known] != 2, batch.words[:, :-1][known] != 1)
        total += torch.stack([n[w].double().sum().cpu() for n, w in zip(model.nats(batch), words)])
    model.train(training)
    forward, backward = (total / sum(len(item.first) for item in items)).tolist()
    return forward, backward


@torch.no_grad()
def answers(model: BiLM, tags: nn.Module, items: Sequence[Item], lexicon: Lexicon) -> list[list[int]]:
    """The most probable tag of each word."""
    training, said = tags.training, [[0]] * len(items)
    tags.eval()
    for places, batch in batches(items, lexicon, model.readout.weight.device):
        best = tags(model.features(batch)).argmax(-1).split([len(items[i].first) for i in places])
        for i, row in zip(places, best):
            said[i] = row.tolist()
    tags.train(training)
    return said


@dataclass(frozen=True)
class Sample:
    text: str = "they read the old letter"
    """A sentence; each of its words is tagged, and what each direction thought of it is said."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """A line a word: the word, its tag, −log p of it given the words before it and given those behind it, in nats."""
    words = words_of(options.text)
    if not words:
        raise UserError("--text is empty; give some words")
    model: Any = loaded.modules["model"]
    lexicon = Lexicon(**loaded.spec.extra["lexicon"])
    item = Item(words)
    (said,) = answers(model, loaded.modules["tags"], [item], lexicon)
    with torch.no_grad():
        batch = collate([words], lexicon).to(model.readout.weight.device)
        ahead, back = (nats.tolist() for nats in model.nats(batch))
    rows = zip(words, said, ahead[:-1], back[1:])
    lines = [f"{word:<16} {loaded.spec.classes[tag] or '-':<6} {a:5.2f} {b:5.2f}" for word, tag, a, b in rows]
    return "\n".join([f"{'word':<16} {'tag':<6} after before", *lines])
