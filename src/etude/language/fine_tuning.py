"""Fine-tuning BERT: one encoder, a head for sentences, pairs, words or answers

Paper: Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
arXiv:1810.04805, sections 4 and 5.3; Rajpurkar et al., "SQuAD", 2016, arXiv:1606.05250 (exact match and F1).

Equation: T_i the last hidden state of token i, C the pooled first one
    sentence, pair    p(class) = softmax(W·C + b)
    tags              p(tag of a word) = softmax(W·T_i + b),      i the FIRST piece of the word
    span              p(start = i) = softmax_i(S·T_i), p(end = j) = softmax_j(E·T_j); answer argmax_{i ≤ j} S·T_i + E·T_j
    features          a frozen encoder, and T_i from its layers h⁰ … hᴺ: the last, the one before, the sum or the
                      concatenation of the last four, or a learned mixture γ·Σ_l softmax(s)_l·hˡ

Algorithm:
    1. the encoder: fresh, of a run of language/bert, or published weights; a fresh head on it
    2. each step: a batch of examples, [CLS] first [SEP] (second [SEP]), padded to the longest
    3. cross-entropy of the classes, of the first pieces' tags, or the mean of start and end; AdamW, warm-up, linear decay
    4. while it learns, look at the validation part; the test part is scored once, at the end

Differences:
    - E74 (notes 6.9.2.2): answers are not found by "losses on the paragraph output" but by two pointers, softmaxes over the
      positions for start and end; a tag is read from the first piece of its word, the other pieces are not asked.
    - Answers are whole words of the passage as it stands between spaces (the official rules then drop punctuation); an answer
      has at most 30 words. Longer passages are read in windows that overlap by half; a window without the answer points at [CLS].
    - Of SQuAD only the development file is read: 7 of 10 articles train, 1 validates, 2 are the test. SST-2 and tags have their
      official test here (GLUE's dev file, as its test labels are not public).
    - The paper's feature experiment puts a two-layer BiLSTM on the features; here it is the same linear head.
    - Any text sets tasks by itself (`--data`): which mark ends a line, which mark follows each word, whether a line is
      the next one, how a line goes on.

Expect: SST-2, from scratch, one thread of a busy 2-core CPU, seed 0: 0.805 of the development file after 400 steps in 30 s (the
    commonest class: 0.51).
Command: `etude run language/fine_tuning --preset sst2`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import etude
from etude.blocks.metrics import confusion_matrix
from etude.blocks.pictures.plots import confusion
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Few, NonNegative, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.batches import Stream
from etude.language.parts.bert import Architecture, load_pretrained, read_published
from etude.language.parts.heads import (
    Features,
    Kind,
    Model,
    answers,
    collate,
    label_of,
    loss_of,
    majority,
    score,
    shown,
)
from etude.language.parts.tasks import Item, encode, read_task
from etude.language.parts.wordpiece import WordPiece


@dataclass(frozen=True)
class Config:
    task: Kind = "sentence"
    """What is asked: the class of a sentence, of a pair, a tag for each word, or a span of the second text."""
    data: str = "house_text"
    """A folder of official files (sst2, ud_english_ewt, squad), or any text, which sets the task by itself."""
    init: str = ""
    """The encoder: empty for a fresh one, a run of language/bert, or published weights (folder, file, hub id)."""
    features: Features = "fine_tune"
    """Train the whole, or freeze the encoder and read these of its layers."""
    vocabulary: Count = 500
    """Number of WordPiece tokens to learn, for a fresh encoder."""
    layers: Few = 2
    """Transformer layers of a fresh encoder."""
    heads: Count = 2
    """Attention heads of a layer; divides the width."""
    width: Count = 48
    """Width of a fresh encoder's states."""
    context: Count = 48
    """Positions of an example at most, special tokens included."""
    dropout: Probability = 0.1
    """Dropout before the head, and in a fresh encoder."""
    training_examples: Whole = 0
    """Training examples that are used; 0: all."""
    batch: Count = 32
    """Examples in one step."""
    steps: Count = 300
    """Number of parameter updates."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of AdamW; published weights want 2e-5 to 5e-5."""
    warmup_steps: Whole = 30
    """Steps over which the learning rate rises from 0; from there it falls to 0."""
    weight_decay: NonNegative = 0.01
    """Decoupled decay of matrices and embeddings; biases and layer norms are left alone."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Whole = 100
    """Steps between validations (0: only at the end)."""


PRESETS = {
    "tiny": Config(vocabulary=200, width=16, context=24, batch=8, steps=12, warmup_steps=3),
    "default": Config(),
    "sst2": Config(
        data="sst2", vocabulary=8000, width=64, batch=64, steps=400, learning_rate=2e-3, warmup_steps=40, dropout=0.2,
        evaluate_every=200,
    ),
    "tags": Config(
        task="tags", data="ud_english_ewt", vocabulary=6000, width=64, context=96, batch=32, steps=800,
        warmup_steps=80, evaluate_every=200,
    ),
    "squad": Config(
        task="span", data="squad", vocabulary=6000, width=64, context=192, batch=16, steps=300, evaluate_every=150
    ),
    "published": Config(
        data="sst2", init="bert-base-uncased", context=64, batch=32, steps=6000, learning_rate=2e-5, warmup_steps=600,
        evaluate_every=1000,
    ),
}  # fmt: skip

SETTINGS = {
    "data": "sst2",
    "init": Idle("needs another run or published weights; tests start from both"),
    "vocabulary": 250,
    "heads": 4,
    "width": 32,
    "context": 12,
    "training_examples": 20,
    "evaluate_every": 5,
}

METRICS = {
    "test_accuracy": "share of sentences, pairs or words whose class is right; of answers that match exactly",
    "test_f1": "macro F1 over the classes; for answers the mean F1 of their words by SQuAD's rules",
    "test_majority_accuracy": "of the commonest training class; of each word's commonest tag; of answering with the first word",
}

EXPERIMENTS = (
    Experiment(
        "sst2", preset="sst2", metric="test_accuracy", bar=0.78, within_seconds=300,
        published="0.935 (Devlin et al., BERT-base with its pre-training; this encoder has none)",
        controls=(
            Control("the most frequent class", metric="test_majority_accuracy"),
            Control("the encoder stays as it was drawn", flags={"features": "last"}),
        ),
    ),
)  # fmt: skip


def rate(step: int, config: Config) -> float:
    """The learning rate of a step (from 0): linear up to the peak, then linear down to 0 behind the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * (config.steps - step) / max(1, config.steps - config.warmup_steps)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network that the spec's `architecture` and `classes` describe."""
    of = Architecture(**spec.extra["architecture"])
    return {"model": Model(of, config.task, len(spec.classes), config.features, config.dropout)}


def encoder(config: Config, words: Callable[[], str]) -> tuple[Architecture, WordPiece, dict[str, Tensor]]:
    """Line 1: (architecture, tokenizer, weights by Hugging Face's names, none for a fresh encoder)."""
    if not config.init:
        tokens = WordPiece.learn(words(), config.vocabulary)
        of = Architecture(
            tokens.size, config.context, config.layers, config.heads, config.width, 4 * config.width,
            dropout=config.dropout, attention_dropout=config.dropout,
        )  # fmt: skip
        return of, tokens, {}
    if (Path(config.init) / "spec.json").is_file() or config.init in ("latest", "language/bert"):
        run = etude.load(config.init)
        if run.name != "language/bert":
            raise UserError(f"{config.init} is a run of {run.name}; the encoder comes from one of language/bert")
        state = run.spec.extra["tokenizer"]
        of = Architecture(**run.spec.extra["architecture"])
        return of, WordPiece(state["tokens"], state["lower"]), run.model.state_dict()
    of, weights, tokens = read_published(config.init)
    if tokens is None:
        raise UserError(f"{config.init} has no vocab.txt, and its weights mean nothing without it")
    return of, tokens, weights


@method("language/fine_tuning", paper="arXiv:1810.04805", section="6.9.2.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    task, kind = read_task(config.data, config.task, config.training_examples), config.task
    if not (task.train and task.validation and task.test):
        raise UserError(f"{task.name} sets too few examples of the task {kind!r}; give a longer text")
    of, tokens, weights = encoder(config, lambda: "\n".join(" ".join(i.first + i.second) for i in task.train))
    context = min(of.context, config.context)
    if context < 8:
        raise UserError(f"a context of {context} positions holds no example; give at least 8 (--context)")
    known = {"architecture": asdict(of), "tokenizer": tokens.state()}
    spec = Spec(shape=(context,), classes=task.classes, extra=known)
    run.describe(spec, task)
    model = build(config, spec)["model"]
    if weights:
        load_pretrained(model, weights, config.init)
    run.suit_threads(model)
    model = run.place(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in learned if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        eps=1e-6,
        fused=True,
    )
    run.track(model=model, optimizer=optimizer)

    stride = context // 4 if kind == "span" else 0
    windows = [(item, window) for item in task.train for window in encode(item, tokens, context, kind, stride)]
    labels = [label_of(item, window, kind) for item, window in windows]
    order = Stream(len(windows), config.batch, run.seed, run.rank, run.world)
    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config)
        chosen = order.indices(step).tolist()
        batch = collate([windows[i][1] for i in chosen], [labels[i] for i in chosen], kind, tokens.pad)  # line 2
        ids, types, mask, targets = (part.to(run.device) for part in batch)
        with run.autocast():
            logits = model(ids, types, mask)
        loss = loss_of(logits, targets, mask, kind)  # line 3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(learned, config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(validation_accuracy=score(model, task.validation, tokens, context)[0])  # line 4
    accuracy, f1, told = score(model, task.test, tokens, context)
    if kind != "span":
        truth, said = (torch.tensor(part) for part in told)
        names = [name or "none" for name in task.classes]
        run.artifact("confusion", confusion(confusion_matrix(truth, said, len(names)), names), "Test part.")
    run.artifact("examples", shown(model, task.test[:12], tokens, context, task.classes), "The first of the test part.")
    return {
        "test_accuracy": accuracy,
        "test_f1": f1,
        "test_majority_accuracy": majority(task.train, task.test, kind),
    }


@dataclass(frozen=True)
class Sample:
    text: str = "a fine and moving story"
    """A sentence; of a pair the first one; the words to tag; the question."""
    second: str = ""
    """The second sentence of a pair; the passage in which the answer is looked for."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """What the trained model says of one text."""
    state = loaded.spec.extra["tokenizer"]
    tokens, model = WordPiece(state["tokens"], state["lower"]), loaded.model
    item = Item(tuple(options.text.split()), tuple(options.second.split()))
    if not item.first:
        raise UserError("--text is empty; give some words")
    if model.task in ("pair", "span") and not item.second:
        raise UserError(f"this model reads two texts (its task is {model.task!r}): give the other one with --second")
    (context,), (said,) = loaded.spec.shape, answers(model, [item], tokens, loaded.spec.shape[0])
    if model.task == "span":
        return " ".join(item.second[said[0] : said[1] + 1])
    if model.task == "tags":
        return "\n".join(f"{word:<16} {loaded.spec.classes[tag] or '-'}" for word, tag in zip(item.first, said))
    (window,) = encode(item, tokens, context, model.task)
    with torch.no_grad():
        shares = model(window.ids[None], window.types[None])[0].softmax(0)
    order = shares.argsort(descending=True, stable=True).tolist()
    return "\n".join(f"{loaded.spec.classes[i]:<12} {float(shares[i]):.3f}" for i in order)
