"""Scheduled sampling: a decoder that learns from what it wrote itself, ever more

Paper: Bengio, Vinyals, Jaitly, Shazeer, "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks", 2015,
arXiv:1506.03099; Huszár, "How (not) to Train your Generative Model", 2015, arXiv:1511.05101 (what it optimises).

Equation:
    loss = −mean log p(y_l | ŷ_1 … ŷ_{l−1}, x),   ŷ_j = y_j with probability ε_i, else ŷ_j ~ p(· | ŷ_1 … ŷ_{j−1}, x)

    linear   ε_i = max(least, 1 − c i)       exponential   ε_i = kⁱ       inverse_sigmoid   ε_i = k / (k + e^{i/k})
    with c, or k, such that ε = 1/2 at step `half`: c = 1/(2 half), k = 2^{−1/half}, and k ln k = half

Algorithm:
    1. pairs: strings through a noisy channel, or any task of `sequence/seq2seq`
    2. each step: `batch` pairs drawn from (seed, step); write the targets with the present network, and toss a coin for EACH
       token: heads (ε_i), the decoder will read the given one; tails, the one that was written
    3. loss of the GIVEN tokens behind what was read; clip the gradient's norm; Adam with a rate that falls on a line
    4. while it learns, look at the validation pairs; at the end score the test, once

Differences:
    - E54 of the notes: the coin is tossed for each token, not for each sequence; no gradient goes through what was drawn. So it
      is drawn first, without gradients, and the loss is the ordinary one on the mixed row: ε = 1 is teacher forcing, bit for bit.
    - E54: the objective is not consistent (Huszár): with ε → 0 the optimum is the product of p(y_l | x), which knows nothing of
      what was written. That is wrong for sentences and for likelihood, and right where single tokens count. The default task is
      of the second kind: teacher forcing learns to trust the letter before, and its own letters do not deserve it.
    - The first token that is read is always BOS; what is drawn comes from the network without dropout.
    - The paper's k and c are set by the step at which ε is 1/2.

Expect: noisy strings, one CPU thread, 6 s, three seeds: 0.232 to 0.239 of the tokens wrong when it writes by itself; with teacher
forcing 0.264 to 0.279 (the source as it is: 0.289), but 0.53 to 0.55 nats a token against 0.64 to 0.67.
Command: `etude run sequence/scheduled_sampling`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from etude.blocks.pictures.plots import curves
from etude.blocks.tokens.decoding import pick
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Fraction, Positive, Probability, Whole
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.sequence.parts import translating
from etude.sequence.parts.text import falling
from etude.sequence.parts.translating import PAD, Batch, Pairs, Sample, Task, padded, read_task, scores, token_nats
from etude.sequence.seq2seq import Seq2Seq


@dataclass(frozen=True)
class Config:
    data: str = "noisy_copy"
    """Pairs to learn: noisy_copy or reversal (random strings), multi30k, or a folder of parallel text."""
    languages: str = "en-de"
    """Source and target of parallel text; a folder's files end in these names."""
    vocabulary: Count = 3000
    """Number of byte-pair tokens to learn from both languages together; at least 256, the bytes."""
    longest: Count = 12
    """Most letters of a random string; of parallel text, most tokens of a sentence in training and of a translation."""
    forcing: Literal["linear", "exponential", "inverse_sigmoid", "always", "never"] = "inverse_sigmoid"
    """How ε, the probability of reading the given token, falls; always: teacher forcing; never: free running."""
    half: Count = 150
    """The step at which ε is 1/2."""
    least: Probability = 0.0
    """The linear schedule stops here."""
    guess: Literal["draw", "argmax"] = "draw"
    """What is written in place of a given token: one drawn from the network's probabilities, or the most probable."""
    attention: Literal["none", "identity", "general", "additive", "values"] = "general"
    """How a state of the decoder and one of the encoder are compared; see sequence/seq2seq."""
    width: Count = 32
    """Units of the encoder's layer (half in each direction) and of the decoder's."""
    embedding: Count = 32
    """Length of the vector that stands for a token."""
    dropout: Probability = 0.0
    """Dropout of the token vectors and before the last matrix."""
    batch: Count = 32
    """Pairs in one step."""
    steps: Count = 300
    """Number of parameter updates."""
    learning_rate: Positive = 1e-2
    """Adam's learning rate in the first step."""
    final_learning_rate: Probability = 0.05
    """Learning rate at the end, as a part of the first; a line leads there."""
    beta2: Fraction = 0.99
    """Adam's decay of the second moment."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Whole = 100
    """Steps between validations (0: only at the end)."""


PRESETS = {
    "tiny": Config(width=16, embedding=8, batch=8, steps=20, longest=4, half=6),  # 1 s
    "default": Config(),  # 6 s → 0.235 of the tokens wrong
    "en_de": Config(
        data="multi30k", longest=40, width=256, embedding=128, dropout=0.1, batch=64, steps=900, half=900, learning_rate=3e-3,
        evaluate_every=225,
    ),
}  # fmt: skip

SETTINGS = {
    "data": "reversal",
    "languages": {"data": "multi30k", "vocabulary": 300, "longest": 30, "steps": 3, "languages": "en-fr"},
    "vocabulary": {"data": "multi30k", "longest": 30, "steps": 3, "vocabulary": 320},
    "least": {"forcing": "linear", "least": 0.6},
    "width": 20,
    "evaluate_every": 10,
}

METRICS = {
    "free_error": "share of the tokens that are wrong, place by place, when the decoder reads what it wrote itself",
    "forced_error": "the same when it reads the given tokens",
    "copy_error": "the same of the source taken for the target",
}

EXPERIMENTS = (
    Experiment(
        "noisy strings",
        preset="default",
        metric="test_free_error",
        bar=0.25,
        better="lower",
        controls=(
            Control("teacher forcing", flags={"forcing": "always"}),
            Control("the source as it is", metric="test_copy_error"),
            Control("an untrained network", flags={"steps": 1}),
        ),
    ),
)


def given_share(forcing: str, step: int, half: int, least: float = 0.0) -> float:
    """ε of a step (from 0): the probability with which a given token is read."""
    if forcing in ("always", "never"):
        return float(forcing == "always")
    if forcing == "linear":
        return max(least, 1 - step / (2 * half))
    if forcing == "exponential":
        return 2 ** (-step / half)
    k = sigmoid_pace(half)
    return 1 / (1 + math.exp(min(step / k, 700.0)) / k)


def sigmoid_pace(half: float) -> float:
    """k of the inverse sigmoid, with k ln k = half: there k / (k + e^{half/k}) is 1/2."""
    k = half + 1.0
    for _ in range(60):  # Newton's method on the convex function k ln k − half, from the right
        k -= (k * math.log(k) - half) / (math.log(k) + 1)
    return k


@torch.no_grad()
def mixed(
    model: Seq2Seq, batch: Batch, epsilon: float, dice: torch.Generator | None = None, argmax: bool = False
) -> Tensor:
    """What the decoder is to read, (B, T): BOS, then each given token with probability ε, else what the network writes there."""
    coins = torch.rand(batch.before.shape, generator=dice).to(batch.before.device) < epsilon
    coins[:, 0] = True
    read = batch.before.clone()
    if bool(coins.all()):
        return read
    training = model.training
    model.eval()
    state = model.begin(batch.source, batch.lengths)
    for t in range(1, read.shape[1]):
        logits, state = model.step(read[:, t - 1], state)
        written = pick(logits, greedy=argmax, generator=dice)
        read[:, t] = torch.where(coins[:, t], read[:, t], written)
    model.train(training)
    return read


@torch.no_grad()
def token_errors(model: Seq2Seq, task: Task, pairs: Pairs, size: int = 64) -> dict[str, float]:
    """Shares of the tokens (ends included) that are not the most probable one: free running, forced, and copied."""
    training, found, count = model.training, torch.zeros(3, dtype=torch.int64), 0
    model.eval()
    for first in range(0, len(pairs), size):
        rows = [tuple(task.tokens.encode_all(pair)) for pair in pairs[first : first + size]]
        batch = padded(rows).to(model.readout.weight.device)
        real, wide = batch.after != PAD, batch.after.shape[1]
        copied = nn.functional.pad(batch.source, (0, max(0, wide - batch.source.shape[1])))[:, :wide]
        answers = [
            model(batch.source, batch.lengths, read).argmax(-1)
            for read in (mixed(model, batch, 0.0, argmax=True), batch.before)
        ]
        found += torch.stack([((said != batch.after) & real).sum() for said in (*answers, copied)]).cpu()
        count += int(real.sum())
    model.train(training)
    return dict(zip(("free_error", "forced_error", "copy_error"), (found / count).tolist()))


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network of sequence/seq2seq: GRUs, an encoder of two directions, what is attended to in the readout."""
    network = Seq2Seq(
        spec.extra["vocabulary"],
        config.embedding,
        config.width,
        1,
        "gru",
        True,
        config.attention,
        "readout",
        config.dropout,
    )
    return {"model": network}


@method("sequence/scheduled_sampling", paper="arXiv:1506.03099", section="6.3.2", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    task = read_task(  # line 1
        config.data, config.languages, config.vocabulary, config.longest, config.batch, run.seed, run.rank, run.world
    )
    spec = task.spec()
    run.describe(spec, task.content)

    model = build(config, spec)["model"]
    run.suit_threads(model)
    model = run.place(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    run.track(model=model, optimizer=optimizer)

    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * falling(step, config.steps, config.final_learning_rate)
        batch = task(step).to(run.device)
        epsilon = given_share(config.forcing, step, config.half, config.least)  # line 2
        read = mixed(model, batch, epsilon, run.generator("coins", step), config.guess == "argmax")
        loss = token_nats(model(batch.source, batch.lengths, read), batch.after)  # line 3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss, epsilon=epsilon)
        if run.every(config.evaluate_every):  # line 4
            found = token_errors(model, task, task.validation)
            run.log(**{f"validation_{name}": value for name, value in found.items() if name != "copy_error"})

    fall = [given_share(config.forcing, step, config.half, config.least) for step in range(config.steps)]
    run.artifact("epsilon", curves({config.forcing: (range(config.steps), fall)}, y="share of given tokens"))
    found = {**scores(model, task, task.test), **token_errors(model, task, task.test)}
    return {f"test_{name}": value for name, value in found.items()}


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """The translation of `--text`, also written to sample.txt."""
    return translating.sample(loaded, options, folder)


def generate(loaded: Loaded, prompts: list[str], options: Sample) -> list[str]:
    """The translation of each sentence."""
    return translating.generate(loaded, prompts, options)
