"""LSTM: a recurrent network whose cell keeps what its gates let in, writes text

Paper: Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997; Gers, Schmidhuber, Cummins, "Learning to
Forget", 2000; peepholes as in Graves, 2013, arXiv:1308.0850, equations 7 to 11.

Equation:
    i, f, o = σ(W x_t + U h_{t−1} + b),  g = tanh(W x_t + U h_{t−1} + b)      (each with its own W, U, b, the same at every t)
    c_t = f⊙c_{t−1} + i⊙g,   h_t = o⊙tanh(c_t)                               (∂c_T/∂c_t along the cell: a product of f)
    p(x_{t+1} | x_{≤t}) = softmax(V h_t + d),   loss = −mean log p

Algorithm:
    1. the first 90 % of the text are learned, the next 5 % validate, the last 5 % are the test; `batch` equal rows of the
       first part are read side by side, from their beginnings to their ends, over and over
    2. each step: the next `context` characters of each row, from the state in which the step before ended; no gradient
       goes back into that step (truncated back-propagation through time)
    3. loss as above; clip the gradient's norm; Adam with a rate that falls on a line
    4. while it learns, look at the validation part; at the end score the test part, once
    5. write: feed the prompt, then one character at a time, from the state alone

Differences:
    - E52 of the notes: h_t = o_t⊙tanh(c_t), not c_t·o_t, and no further factor 1; the gates stand in torch's order i, f, g, o
      with two biases, so that weights of `torch.nn.LSTM` load.
    - `--forget-bias`: b of the forget gate begins there (Gers 2000; 0 is torch's start), so that cells keep at first.
    - `--peephole`: i and f also see c_{t−1}, o sees c_t, each through a vector; Hochreiter's cell had neither these nor f.
    - The whole gradient within a chunk; Hochreiter cut it at the gates.
    - Each pass over the text begins at another offset, drawn from (seed, pass), so that the cuts lie elsewhere.
    - A character that the first 90 % never show is written as U+FFFD, a token of its own, in the other parts.
    - The number that needs no network, returned beside ours: the last two characters, counted
      (`etude.sequence.parts.nulls.counted_nats`).

Expect: tiny Shakespeare, one CPU thread, 27 s, seed 0: 1.78 nats a character of the test part (the last two characters, counted:
2.14).
Command: `etude run sequence/lstm --preset shakespeare`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    peephole: bool = False
    """Let the gates see the cell (a plain loop over time: slower)."""
    forget_bias: float = 1.0
    """Added to the forget gate's bias at the start."""
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
    learning_rate: Positive = 8e-3
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
    "default": Config(),  # 11 s → 1.78
    "shakespeare": Config(data="tiny_shakespeare", batch=32, steps=800),  # 27 s → 1.78
    "large": Config(
        data="tiny_shakespeare", layers=2, width=512, embedding=128, dropout=0.5, batch=128, context=128, steps=4000,
        learning_rate=2e-3, evaluate_every=500,
    ),  # for a GPU
}  # fmt: skip

SETTINGS = {"data": "tiny_shakespeare", "evaluate_every": 10}

METRICS = {
    "test_nats_per_character": "negative log-likelihood of the test text over its characters (nats)",
    "test_counted_nats_per_character": "the same of the last two characters, counted in the training text: what to beat",
}

EXPERIMENTS = (
    Experiment(
        "shakespeare",
        preset="shakespeare",
        metric="test_nats_per_character",
        bar=2.0,
        better="lower",
        flags={"steps": 400},
        controls=(
            Control(
                "the last two characters alone (counted in the training text)", metric="test_counted_nats_per_character"
            ),
            Control("an untrained network", flags={"steps": 1}),
        ),
    ),
)


def favour_memory(recurrent: Recurrent, forget_bias: float) -> None:
    """Add `forget_bias` to the forget gates' bias (rows D … 2D of each layer's), so that f begins near σ(forget_bias)."""
    for name, parameter in recurrent.named_parameters():
        if name.startswith("bias_hh"):
            parameter.data[recurrent.width : 2 * recurrent.width] += forget_bias


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network, for as many characters as the spec says."""
    cell = "lstm_peephole" if config.peephole else "lstm"
    recurrent = Recurrent(cell, config.embedding, config.width, config.layers, dropout=config.dropout)
    favour_memory(recurrent, config.forget_bias)
    return {"model": CharacterModel(spec.extra["vocabulary"], config.embedding, recurrent, config.dropout)}


@method("sequence/lstm", paper="doi:10.1162/neco.1997.9.8.1735", section="6.2", threads=1)
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
        "memory", curves({"LSTM": (places, nats)}, x="characters read since nothing was known", y="nats a character"),
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
