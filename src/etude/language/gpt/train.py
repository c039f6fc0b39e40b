"""GPT: a causal Transformer learns text by predicting the next token, and writes

Paper: Radford, Narasimhan, Salimans, Sutskever, "Improving Language Understanding by Generative Pre-Training", 2018
(GPT-1); Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2); Brown et al., 2020,
arXiv:2005.14165 (GPT-3). Parameter names and shapes are Hugging Face's, so published GPT-2 and GPT-1 weights load.

Equation:
    h⁰ = W_e[token] + W_p[position]                                  B batch, T time, D width, N layers
    a  = h + Attention(LN₁(h)),  h' = a + W₂·gelu(W₁·LN₂(a))         (norm placement "pre": GPT-2; a last LN after layer N)
    a  = LN₁(h + Attention(h)),  h' = LN₂(a + W₂·gelu(W₁·a))         (norm placement "post": GPT-1)
    p(token t+1 | tokens ≤ t) = softmax(W_e·hᴺ_t),  loss = −mean log p     (the head is the embedding table)

Algorithm:
    1. the first 90 % of the text are learned, the next 5 % validate, the last 5 % are the test; the tokens are those of
       the first part
    2. each step: `batch` windows of `context` tokens at offsets drawn from (seed, step)
    3. loss as above; clip the gradient's norm; AdamW with warm-up and cosine decay
    4. while it learns, look at the validation part; at the end score the test part, once
    5. write: feed the prompt once, keep keys and values, then one token at a time

Differences:
    - E75: GPT is the decoder WITHOUT cross-attention; GPT-1 puts layer norms after the residual sums, GPT-2 and GPT-3
      before. GPT-3 is not only deeper: it is also 8 times wider, trained on far more data, and alternates dense with
      sparse attention. Those sparse layers are not here.
    - E57, E61, E62, E64 of the notes (scale 1/√d, the output projection, Linear–activation–Linear, where the norms
      stand): the standard forms.
    - GPT-2, section 2.3: the residual projections start 1/√(2N) smaller, N counting blocks (two residual branches in
      each; the paper says "N is the number of residual layers").
    - From scratch the activation is the exact gelu, three to four times faster (forward and backward, one CPU
      thread) than the tanh form GPT-2 was published with; published weights keep the one their config.json names.
    - A character that the first 90 % never show is written as U+FFFD, a token of its own, in the other parts.
    - The number that needs no network, returned beside ours: p(b | a) = (c(ab) + p(b)) / (c(a) + 1) from the counts c of the
      training tokens, p(b) = (c(b) + 1) / (N + V). It is what can be known from the last token alone.
    - Past the context the last half of the window is read again from position 0, because learned absolute positions
      cannot slide (`etude.blocks.tokens.decoding.stream`).

Expect: tiny Shakespeare, one thread of a busy 2-core CPU, seed 0: 1.78 nats a character of the test part in 300 s (pairs of
characters: 2.51).
Command: `etude run language/gpt --preset shakespeare`
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from etude import data
from etude.blocks.tokens import decoding, writing
from etude.blocks.tokens.text import UNKNOWN, BytePairs, Characters, Tokenizer, starts, windows
from etude.blocks.tokens.writing import Sample
from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import state_of
from etude.core.config import Count, Few, NonNegative, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.texts import split
from etude.language.gpt.network import GPT, Architecture, next_token_loss, total_nats
from etude.language.gpt.nulls import bigram_nats
from etude.language.gpt.published import load_pretrained


@dataclass(frozen=True)
class Config:
    data: str = "house_text"
    """Text to learn: a dataset name (tiny_shakespeare, or the bundled house_text) or a text file."""
    tokens: Literal["characters", "bpe"] = "characters"
    """One token a character, or byte-pair tokens learned from the text (needs the extra `text`)."""
    vocabulary: Count = 1024
    """Number of byte-pair tokens to learn; at least 256, the bytes."""
    init: str = ""
    """Fine-tune published GPT-2 weights: a folder in Hugging Face's format or a hub id such as gpt2. The tokenizer and
    everything about the network then come from there."""
    layers: Few = 4
    """Number of blocks, N."""
    heads: Count = 4
    """Attention heads a block; divides the width."""
    width: Count = 128
    """Width of the residual stream, D."""
    context: Count = 64
    """Number of positions: the most tokens the model sees at once."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Layer norms before the branches (GPT-2, GPT-3) or after the sums (GPT-1)."""
    dropout: Probability = 0.0
    """Dropout on embeddings, attention weights and branches; 0.1-0.2 when the text is passed over many times."""
    batch: Count = 12
    """Windows in one step."""
    steps: Count = 600
    """Number of parameter updates."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of AdamW."""
    warmup_steps: Whole = 100
    """Steps over which the learning rate rises from 0."""
    final_learning_rate: Probability = 0.1
    """Learning rate at the end, as a fraction of the peak; a cosine leads there."""
    beta2: Probability = 0.99
    """AdamW's decay of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices and embeddings; biases and layer norms are left alone."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Whole = 500
    """Steps between validations (0: only at the end)."""
    sample_every: Whole = 500
    """Steps between samples written to the run folder (0: only at the end)."""


PRESETS = {
    "tiny": Config(layers=2, heads=2, width=32, context=32, batch=4, steps=20, warmup_steps=5),  # 1 s
    "default": Config(),  # 42 s → 2.03 nats a character
    "shakespeare": Config(
        data="tiny_shakespeare", batch=32, steps=1000, learning_rate=5e-3, evaluate_every=250
    ),  # 200 to 300 s → 1.78
}

SETTINGS = {
    "data": "tiny_shakespeare",
    "vocabulary": {"tokens": "bpe", "vocabulary": 300},
    "init": Idle("needs files of published weights, which a tiny run has not; the learning tests start from such"),
    "heads": 4,
    "width": 48,
    "evaluate_every": 10,
    "sample_every": 10,
}

METRICS = {
    "test_nats_per_character": "negative log-likelihood of the test text over its characters (nats)",
    "test_bigram_nats_per_character": "the same of pairs of tokens counted in the training text, the model to beat",
}

EXPERIMENTS = (
    Experiment(
        "shakespeare",
        preset="shakespeare",
        metric="test_nats_per_character",
        bar=1.85,
        better="lower",
        published="1.88 (nanoGPT's README: this network, after 2,000 steps of 12 windows; validation, last 10 %)",
        within_seconds=300,
        controls=(
            Control(
                "the last character alone (counted pairs of the training text)", metric="test_bigram_nats_per_character"
            ),
            Control("an untrained network", flags={"steps": 1}),
        ),
    ),
)


def rate(step: int, config: Config) -> float:
    """The learning rate of a step (from 0): linear up to the peak, then a cosine down to its `final_learning_rate` part."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    low = config.final_learning_rate
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network that the spec's `architecture` describes."""
    return {"model": GPT(Architecture(**spec.extra["architecture"]))}


@method("language/gpt", paper="arXiv:2005.14165", section="6.9.3", threads=1, shards=True)
def train(config: Config, run: Run) -> dict[str, float]:
    content = data.text(config.data)
    parts = split(content.text)  # line 1
    published = None
    if config.init:
        published, tokens = load_pretrained(config.init)
        if tokens is None:
            raise UserError(f"{config.init} has no tokenizer files, and its weights mean nothing without them")
        of = published.of
    else:
        learn = config.tokens == "bpe"
        tokens = BytePairs.learn(parts[0], config.vocabulary) if learn else Characters.of(parts[0] + UNKNOWN)
        of = Architecture(
            tokens.size, config.context, config.layers, config.heads, config.width,
            norm_placement=config.norm_placement, dropout=config.dropout,
        )  # fmt: skip
    context = min(of.context, config.context)
    learned, validation, test = (_encode(tokens, part) for part in parts)
    if len(learned) <= context or not all(parts):
        raise UserError(
            f"{content.name} is too short: its first 90 % are {len(learned)} tokens, and a context of {context} takes "
            f"{context + 1} at least (and a text 11 characters)"
        )
    run.describe(Spec(shape=(context,), extra={"architecture": asdict(of), "tokenizer": tokens.state()}), content)

    model = build(config, Spec(extra={"architecture": asdict(of)}))["model"]
    if published is not None:
        model.load_state_dict(published.state_dict())
    run.suit_threads(model)
    model = run.place(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        fused=True,
    )
    run.track(model=model, optimizer=optimizer)
    prompt = learned[: min(8, context)]
    loss_of = run.compile(lambda x, y: next_token_loss(model(x), y))

    def nats(before: Tensor, ids: Tensor) -> float:
        """−Σ log p of a part of the text; its first token follows the last one before it."""
        return total_nats(model, torch.cat([before[-1:], ids]).to(run.device))

    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config)
        offsets = starts(len(learned), context, config.batch, run.generator("batch", step))  # line 2
        x, y = (part.to(run.device) for part in windows(learned, offsets, context))
        with run.autocast():
            loss = loss_of(x, y)  # line 3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):  # line 4
            run.log(validation_nats_per_character=nats(learned, validation) / len(parts[1]))
        if run.every(config.sample_every):
            run.artifact("writing", _write(run, model, tokens, prompt, run.generator("writing", step)), step=step + 1)
    paragraph = _write(run, model, tokens, prompt, run.generator("paragraph"), count=500)  # line 5
    run.artifact("paragraph", paragraph, caption="500 tokens drawn from the trained model at temperature 0.8")
    pairs = bigram_nats(learned, torch.cat([validation[-1:], test]), of.vocabulary)
    return {
        "test_nats_per_character": nats(validation, test) / len(parts[2]),
        "test_bigram_nats_per_character": pairs / len(parts[2]),
    }


def _encode(tokens: Tokenizer, part: str) -> Tensor:
    return tokens.encode(part, UNKNOWN) if isinstance(tokens, Characters) else tokens.encode(part)


def _write(
    run: Run, model: GPT, tokens: Tokenizer, prompt: Tensor, generator: torch.Generator, count: int = 200
) -> str:
    writer = model
    if run.common.shard:  # every rank holds a part of the weights, and only forward passes bring them together
        writer = GPT(model.of).to(run.device)
        writer.load_state_dict(state_of(model))
    writer.eval()
    ids = decoding.generate(writer, prompt[None].to(run.device), count, temperature=0.8, generator=generator)
    writer.train()
    return tokens.decode(ids[0])


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Write texts to the terminal token by token, and all of them to sample.txt."""
    return writing.sample(loaded, options, folder)


def generate(loaded: Loaded, prompts: list[str], options: Sample) -> list[str]:
    """Each prompt and what the model writes after it, `options.samples` texts a prompt, in order."""
    return writing.generate(loaded, prompts, options)
