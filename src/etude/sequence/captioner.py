"""Captioner: a convolutional network looks, a recurrent one says what it sees

Paper: Vinyals, Toshev, Bengio, Erhan, "Show and Tell: A Neural Image Caption Generator", 2014, arXiv:1411.4555; Donahue et al.,
2014, arXiv:1411.4389 (LRCN).

Equation: S_0 = START, S_1 … S_N the caption, S_{N+1} = END
    x_{−1} = CNN(image),   x_t = E S_t for t ≥ 0                     (the image is read once, before the first word)
    h_t = LSTM(x_t, h_{t−1}),   p(S_{t+1} | image, S_{≤t}) = softmax(V h_t + d) for t ≥ 0
    loss = −mean log p(S_{t+1} | …) over all t from 0 to N

Algorithm:
    1. images with captions; the tokens (characters or words) are those of the training captions
    2. each step: a batch of images, each with one of its captions; features = CNN(image)
    3. the recurrent network reads the features, then START and the caption, and at each token names the next one
    4. loss as above; clip the gradient's norm; Adam with a rate that falls on a line; CNN and decoder learn together
    5. while it learns, look at the validation part; at the end describe the test images, once: the most probable token at
       each time, until END

Differences:
    - The paper's CNN was trained on ImageNet; here LeNet's layers, from scratch, with the caption's loss alone.
    - The paper looks for captions with a beam of 20; here greedily.
    - `--inject state`: the features are the first state h (a_0 = CNN(image) of the notes) instead of the first input.
    - The captions of a labelled dataset are the names of its classes, digits in letters: "three". A caption is right where all of
      it is right.
    - The number that needs no network, returned beside ours: always the commonest training caption.

Expect: one thread of a CPU, seed 0: 0.986 of the bundled digits in 6 s; MNIST 0.977 after 600 steps in 12 s.
Command: `etude run sequence/captioner --preset mnist`
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.nn.init import initialise
from etude.blocks.nn.recurrent import Recurrent, State
from etude.blocks.pictures.plots import mistakes
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Positive, Probability, Whole
from etude.core.predict import Pictures, decoded, listed, pixels
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.batches import Stream
from etude.sequence.parts.captions import IGNORED, Part, Units, Vocabulary, read
from etude.sequence.parts.text import falling
from etude.vision.lenet import LeNet


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Labelled images (digits, mnist, cifar10, class folders), or a folder of images with captions.tsv, .txt or .csv."""
    level: Units = "characters"
    """What is said at a time."""
    size: Literal[28, 32] = 28
    """Side of the images in pixels; others are resized."""
    inject: Literal["input", "state"] = "input"
    """Where the image enters, once: as the first input, or as the first state."""
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """The recurrent cell."""
    width: Count = 64
    """Units of the recurrent layer, D."""
    embedding: Count = 64
    """Length of a token's vector."""
    dropout: Probability = 0.0
    """Dropout of the recurrent network's inputs and outputs."""
    examples: Whole = 0
    """Training images that are used, the first ones; 0: all."""
    batch: Count = 64
    """Images in a step."""
    steps: Count = 300
    """Number of parameter updates."""
    learning_rate: Positive = 3e-3
    """Adam's learning rate in the first step."""
    final_learning_rate: Probability = 0.05
    """Learning rate at the end, as a part of the first; a line leads there."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Whole = 100
    """Steps between validations (0: only at the end)."""


PRESETS = {
    "tiny": Config(width=8, embedding=8, batch=8, steps=20, examples=200),  # 1 s
    "default": Config(),  # 6 s → 0.986
    "mnist": Config(data="mnist", steps=1000, evaluate_every=500),  # 25 s → 0.98
}

SETTINGS = {"data": "mnist", "examples": 100, "clip_norm": 0.01, "evaluate_every": 5}

METRICS = {
    "test_accuracy": "share of the test images whose whole caption is one of theirs",
    "test_nats_per_token": "negative log-likelihood of the first caption of each test image over its tokens and END (nats)",
    "test_commonest_accuracy": "of always giving the commonest training caption",
}

EXPERIMENTS = (
    Experiment(
        "mnist",
        preset="mnist",
        metric="test_accuracy",
        bar=0.979,
        within_seconds=120,
        controls=(
            Control("the features of other images", swap={"look": "etude.sequence.parts.baselines.of_other_images"}),
            Control("the commonest caption", metric="test_commonest_accuracy"),
        ),
    ),
)


class Captioner(nn.Module):
    """LeNet's layers up to a vector, and a recurrent network that reads it once, before the tokens."""

    def __init__(self, config: Config, spec: Spec, tokens: int) -> None:
        super().__init__()
        self.inject = config.inject
        inputs = config.embedding if config.inject == "input" else config.width
        self.cnn = initialise(LeNet(inputs, spec.mean, spec.std, config.size), "he")
        self.embedding = nn.Embedding(tokens, config.embedding)
        self.recurrent = Recurrent(config.cell, config.embedding, config.width)
        self.readout, self.dropout = nn.Linear(config.width, tokens), nn.Dropout(config.dropout)

    def begin(self, features: Tensor) -> State:
        """The state behind the image, of features (B, F)."""
        nothing = self.recurrent.zeros(len(features))
        if self.inject == "state":
            return (features[None], *nothing[1:])
        return self.recurrent(self.dropout(features)[:, None], nothing)[1]

    def speak(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """tokens (B, T) → logits (B, T, V) of the token behind each, and the state behind the last."""
        h, state = self.recurrent(self.dropout(self.embedding(tokens)), state)
        return self.readout(self.dropout(h)), state

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Line 3: features (B, F) and tokens (B, T) → logits (B, T, V)."""
        return self.speak(tokens, self.begin(features))[0]


def look(model: Captioner, images: Tensor) -> Tensor:
    """Line 2: features (B, F) of images (B, C, H, W), uint8 or in [0, 1]."""
    return model.cnn(images)


def likelihood(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Line 4: −log p of the targets (B, T), IGNORED left out."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


@torch.no_grad()
def describe(model: Captioner, images: Tensor, words: Vocabulary) -> list[tuple[str, float]]:
    """Line 5: the greedy caption of each image (N, C, H, W), and the probability of all of its tokens and END.

    A caption that has not ended one token behind the longest of the training part is cut.
    """
    training, device = model.training, model.readout.weight.device
    model.eval()
    found = []
    for part in images.split(500):
        state = model.begin(look(model, part.to(device)))
        last = torch.full((len(part), 1), words.START, device=device)
        nats, ended, said = (
            torch.zeros(len(part), device=device),
            torch.zeros(len(part), dtype=torch.bool, device=device),
            [],
        )
        for _ in range(words.longest + 1):
            logits, state = model.speak(last, state)
            best, last = logits[:, 0].log_softmax(-1).max(-1)
            nats = torch.where(ended, nats, nats - best)
            said.append(torch.where(ended, words.END, last))
            ended, last = ended | (last == words.END), last[:, None]
        rows = torch.stack(said, 1).tolist()
        found += [(words.decode(row), p) for row, p in zip(rows, nats.neg().exp().tolist())]
    model.train(training)
    return found


@torch.no_grad()
def total_nats(model: Captioner, part: Part, words: Vocabulary) -> tuple[float, int]:
    """−Σ log p of the first caption of each image, with END, and how many tokens these are."""
    training, device = model.training, model.readout.weight.device
    model.eval()
    nats, count = 0.0, 0
    for begin in range(0, len(part.x), 500):
        x, y = words.encode([captions[0] for captions in part.captions[begin : begin + 500]])
        logits = model(look(model, part.x[begin : begin + 500].to(device)), x.to(device))
        nats += float(likelihood(logits, y.to(device), "sum"))
        count += int((y != IGNORED).sum())
    model.train(training)
    return nats, count


def exact(said: list[tuple[str, float]], captions: list[tuple[str, ...]]) -> float:
    """Share of the images whose caption is one of theirs."""
    return sum(caption in theirs for (caption, _), theirs in zip(said, captions)) / len(captions)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """CNN and decoder, for the images and tokens of the spec."""
    return {"model": Captioner(config, spec, Vocabulary(**spec.extra["vocabulary"]).size)}


@method("sequence/captioner", paper="arXiv:1411.4555", section="6.1.4.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    data = read(config.data, config.size)  # line 1
    learned = Part(*(part[: config.examples or None] for part in data.train))
    pairs = [(image, caption) for image, captions in enumerate(learned.captions) for caption in captions]
    words = Vocabulary.of((caption for _, caption in pairs), config.level)
    spec = Spec(data.spec.shape, (), data.spec.mean, data.spec.std, {"vocabulary": words.state()})
    run.describe(spec, data)
    model = build(config, spec)["model"]
    run.suit_threads(model)
    model = run.place(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    run.track(model=model, optimizer=optimizer)
    order = Stream(len(pairs), config.batch, run.seed, run.rank, run.world)

    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * falling(step, config.steps, config.final_learning_rate)
        images, captions = zip(*(pairs[i] for i in order.indices(step).tolist()))  # line 2
        tokens, targets = (part.to(run.device) for part in words.encode(captions))
        with run.autocast():
            features = look(model, learned.x[list(images)].to(run.device))
            loss = likelihood(model(features, tokens), targets)  # lines 3, 4
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):  # line 5
            said = describe(model, data.validation.x, words)
            run.log(validation_accuracy=exact(said, data.validation.captions))

    said = describe(model, data.test.x, words)
    nats, count = total_nats(model, data.test, words)
    (commonest, _), *_ = Counter(caption for _, caption in pairs).most_common(1)
    run.artifact(
        "mistakes", shown(data.test, said), "The surest wrong captions: what was said, how surely, and what it is."
    )
    lines = [
        f"{caption}   (probability {p:.3f}; people: {theirs[0]})"
        for (caption, p), theirs in zip(said, data.test.captions)
    ]
    run.artifact("captions", "\n".join(lines[:40]), "The first of the test part.")
    return {
        "test_accuracy": exact(said, data.test.captions),
        "test_nats_per_token": nats / count,
        "test_commonest_accuracy": exact([(commonest, 1.0)] * len(said), data.test.captions),
    }


def shown(part: Part, said: list[tuple[str, float]]) -> Any:
    """The wrong captions as a picture."""
    true = [caption if caption in theirs else theirs[0] for (caption, _), theirs in zip(said, part.captions)]
    names = sorted({*true, *(caption for caption, _ in said)})
    numbers = ([names.index(caption) for caption in captions] for captions in (true, [caption for caption, _ in said]))
    truth, told = (torch.tensor(row) for row in numbers)
    return mistakes(part.x, truth, told, torch.tensor([p for _, p in said]), names)


def predict(loaded: Loaded, pictures: Pictures) -> list[dict[str, Any]]:
    """The caption of each picture (files, folders, or pixels as `loaded.predict` takes them), and its probability."""
    if isinstance(pictures, (str, bytes)) or hasattr(pictures, "__fspath__"):
        pictures = [cast(Any, pictures)]
    if hasattr(pictures, "shape"):
        x = pixels(cast(Any, pictures), loaded.spec)
        files: list[str | None] = [None] * len(x)
    else:
        paths = listed(cast(Any, pictures))
        x, files = torch.from_numpy(decoded(paths, loaded.spec)), [*map(str, paths)]
    said = describe(cast(Captioner, loaded.model), x, Vocabulary(**loaded.spec.extra["vocabulary"]))
    return [{"file": file, "caption": caption, "probability": p} for file, (caption, p) in zip(files, said)]
