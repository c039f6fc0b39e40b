"""RNN: one layer, at every time on its own output and the next input, writes text

Paper: Elman, "Finding Structure in Time", Cognitive Science 14, 1990; Werbos, "Backpropagation Through Time", 1990; Williams,
Peng, 1990 (truncated).

Equation:
    h_t = tanh(W x_t + b + U h_{t−1} + c)                                 (one W, U, b, c for all t)
    p(x_{t+1} | x_{≤t}) = softmax(V h_t + d),   loss = −mean log p
    δ_t = (1 − h_t²)⊙(Vᵀ ∂loss/∂logits_t + Uᵀ δ_{t+1}),   ∂loss/∂U = Σ_t δ_t h_{t−1}ᵀ        (back-propagation through time)

Algorithm:
    1. the first 90 % of the text are learned, the next 5 % validate, the last 5 % are the test; `batch` equal rows of the
       first part are read side by side, from their beginnings to their ends, over and over
    2. each step: the next `context` characters of each row, from the state in which the step before ended; no gradient
       goes back into that step (truncated back-propagation through time)
    3. loss as above; clip the gradient's norm; Adam with a rate that falls on a line
    4. while it learns, look at the validation part; at the end score the test part, once
    5. write: feed the prompt, then one character at a time, from the state alone

Differences:
    - E49 of the notes: W and b carry no index of time; the same ones act at every t, and the readout is the same too.
    - E50 of the notes: automatic differentiation does nothing particular here, it adds up the gradients of the steps. `--engine
      loop` leaves it to autograd, `--engine written` (the default on a CPU) is the equation above, written out.
    - Elman copied the state without a gradient (`--context 1` is that); here it goes back over `context` steps.
    - Each pass over the text begins at another offset, drawn from (seed, pass), so that the cuts lie elsewhere.
    - A character that the first 90 % never show is written as U+FFFD, a token of its own, in the other parts.
    - The number that needs no network, returned beside ours: the last two characters, counted
      (`etude.sequence.parts.nulls.counted_nats`).

Expect: tiny Shakespeare, one CPU thread, 21 s, seed 0: 1.81 nats a character of the test part (the last two characters, counted:
2.14).
Command: `etude run sequence/rnn --preset shakespeare`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from etude.blocks.nn.recurrent import Recurrent
from etude.blocks.pictures.plots import curves
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, Fraction, Positive, Probability, Whole
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.sequence.parts import writing
from etude.sequence.parts.nulls import counted_nats
from etude.sequence.parts.text import CharacterModel, Tracks, corpus, falling, surprise, total_nats
from etude.sequence.parts.writing import Sample


@dataclass(frozen=True)
class Config:
    data: str = "house_text"
    """Text to learn: a dataset name (tiny_shakespeare, or the bundled house_text) or a text file."""
    activation: Literal["tanh", "relu"] = "tanh"
    """What squashes the state."""
    engine: Literal["auto", "loop", "written", "torch"] = "auto"
    """Autograd over a plain loop, the gradient written out, torch's kernels, or the fastest of them."""
    layers: Few = 1
    """Recurrent layers; each reads the outputs of the one below it."""
    width: Count = 128
    """Units of a layer, D."""
    embedding: Count = 64
    """Length of the vector that stands for a character."""
    dropout: Probability = 0.0
    """Dropout of the character vectors, between layers, and before the readout; never from one time to the next."""
    batch: Count = 32
    """Rows of the text that are read side by side."""
    context: Count = 64
    """Characters of each row in a step: how far a gradient goes back."""
    carry: bool = True
    """Begin a step with the state in which the one before ended; without it every chunk begins with nothing."""
    steps: Count = 300
    """Number of parameter updates."""
    learning_rate: Positive = 4e-3
    """Adam's learning rate in the first step."""
    final_learning_rate: Probability = 0.05
    """Learning rate at the end, as a part of the first; a line leads there."""
    beta2: Fraction = 0.99
    """Adam's decay of the second moment."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Whole = 250
    """Steps between validations (0: only at the end)."""


PRESETS = {
    "tiny": Config(width=16, embedding=8, batch=8, context=16, steps=20),  # 1 s
    "default": Config(),  # 9 s → 1.85
    "shakespeare": Config(data="tiny_shakespeare", batch=32, steps=1200),  # 21 s → 1.81
    "large": Config(
        data="tiny_shakespeare", layers=1, width=512, embedding=128, dropout=0.5, batch=128, context=128, steps=4000,
        learning_rate=2e-3, evaluate_every=500,
    ),  # for a GPU
}  # fmt: skip

SETTINGS = {"data": "tiny_shakespeare", "evaluate_every": 10, "engine": "loop"}

METRICS = {
    "test_nats_per_character": "negative log-likelihood of the test text over its characters (nats)",
    "test_counted_nats_per_character": "the same of the last two characters, counted in the training text: what to beat",
}

EXPERIMENTS = (
    Experiment(
        "shakespeare",
        preset="shakespeare",
        metric="test_nats_per_character",
        bar=2.05,
        better="lower",
        flags={"steps": 500},
        controls=(
            Control(
                "the last two characters alone (counted in the training text)", metric="test_counted_nats_per_character"
            ),
            Control("an untrained network", flags={"steps": 1}),
        ),
    ),
)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network, for as many characters as the spec says."""
    cell = "rnn" if config.activation == "tanh" else "rnn_relu"
    recurrent = Recurrent(
        cell, config.embedding, config.width, config.layers, dropout=config.dropout, engine=config.engine
    )
    return {"model": CharacterModel(spec.extra["vocabulary"], config.embedding, recurrent, config.dropout)}


@method("sequence/rnn", paper="doi:10.1207/s15516709cog1402_1", section="6.1.1, 6.1.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    text = corpus(config.data)  # line 1
    spec = Spec(extra={"vocabulary": text.tokens.size, "tokenizer": text.tokens.state()})
    run.describe(spec, text.content)
    rows = slice(run.rank * config.batch, (run.rank + 1) * config.batch)
    tracks = Tracks(
        text.learned, rows, config.batch * run.world, config.context,
        lambda turn: int(torch.randint(config.context, (), generator=run.generator("offset", turn))),
    )  # fmt: skip

    model = build(config, spec)["model"]
    run.suit_threads(model)
    model = run.place(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    nothing = model.recurrent.zeros(config.batch)
    memory = Box(state=nothing)
    run.track(model=model, optimizer=optimizer, memory=memory)

    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * falling(step, config.steps, config.final_learning_rate)
        x, y, fresh = tracks(step)  # line 2
        begun = nothing if fresh or not config.carry else tuple(part.to(run.device) for part in memory.state)
        logits, state = model(x.to(run.device), begun)
        loss = F.cross_entropy(logits.flatten(0, 1), y.to(run.device).flatten())  # line 3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        memory.state = tuple(part.detach() for part in state)
        run.log(loss=loss)
        if run.every(config.evaluate_every):  # line 4
            nats = total_nats(model, text.learned, text.validation)
            run.log(validation_nats_per_character=nats / len(text.validation))

    places, nats = surprise(model, text.validation)
    run.artifact(
        "memory", curves({"RNN": (places, nats)}, x="characters read since nothing was known", y="nats a character"),
        caption="How much what was read before helps, on the validation part",
    )  # fmt: skip
    dice = run.generator("paragraph")
    loaded = writing.write(model, text.tokens, text.learned[:8].to(run.device), 500, dice)  # line 5
    run.artifact("paragraph", loaded, caption="500 characters drawn from the trained model at temperature 0.8")
    before, count = torch.cat([text.learned, text.validation]), len(text.test)
    counted = counted_nats(text.learned, torch.cat([before[-2:], text.test]), text.tokens.size)
    return {
        "test_nats_per_character": total_nats(model, before, text.test) / count,
        "test_counted_nats_per_character": counted / count,
    }


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Write texts to the terminal character by character, and all of them to sample.txt."""
    return writing.sample(loaded, options, folder)


def generate(loaded: Loaded, prompts: list[str], options: Sample) -> list[str]:
    """Each prompt and what the model writes after it; see `etude.sequence.parts.writing.generate`."""
    return writing.generate(loaded, prompts, options)
