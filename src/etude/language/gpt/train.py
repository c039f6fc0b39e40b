"""GPT: a causal Transformer learns text by predicting the next token, and writes

Paper: Radford, Narasimhan, Salimans, Sutskever, "Improving Language Understanding by Generative Pre-Training", 2018
(GPT-1); Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2); Brown et al., 2020,
arXiv:2005.14165 (GPT-3). Parameter names and shapes are Hugging Face's, so published GPT-2 and GPT-1 weights load.

Equation:
    h⁰ = W_e[token] + W_p[position]                                  B batch, T time, D width, N layers
    a  = h + Attention(LN₁(h)),  h' = a + W₂·gelu(W₁·LN₂(a))         (norm "pre": GPT-2, and a last LN after layer N)
    a  = LN₁(h + Attention(h)),  h' = LN₂(a + W₂·gelu(W₁·a))         (norm "post": GPT-1)
    p(token t+1 | tokens ≤ t) = softmax(W_e·hᴺ_t),  loss = −mean log p     (the head is the embedding table)

Algorithm:
    1. cut the text into tokens; keep the last tenth for validation
    2. each step: `batch` windows of `context` tokens at offsets drawn from (seed, step)
    3. loss as above; clip the gradient's norm; AdamW with warm-up and cosine decay
    4. write: feed the prompt once, keep keys and values, then one token at a time

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
    - Past the context the last half of the window is read again from position 0, because learned absolute positions
      cannot slide (`etude.blocks.decoding.stream`).

Expect: tiny Shakespeare, one thread of a busy 2-core CPU, seed 0: 1.73 nats a character in 202 s; bundled text: 2.03 in
42 s.
Command: `etude run language/gpt --preset shakespeare`
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from etude.blocks.decoding import generate, stream
from etude.blocks.text import BytePairs, Characters, Tokenizer, pieces, split, starts, tokenizer, windows
from etude.catalog import Experiment, method
from etude.core.checkpoint import state_of
from etude.core.config import Count, NonNegative, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data import text
from etude.language.gpt.network import GPT, Architecture, next_token_loss, total_nats
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
    layers: Count = 4
    """Number of blocks, N."""
    heads: Count = 4
    """Attention heads a block; divides the width."""
    width: Count = 128
    """Width of the residual stream, D."""
    context: Count = 64
    """Number of positions: the most tokens the model sees at once."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norms before the branches (GPT-2, GPT-3) or after the sums (GPT-1)."""
    dropout: Probability = 0.0
    """Dropout on embeddings, attention weights and branches; 0.1-0.2 when the text is passed over many times."""
    batch: Count = 12
    """Windows in one step."""
    steps: Count = 600
    """Number of parameter updates."""
    lr: Positive = 2e-3
    """Peak learning rate of AdamW."""
    warmup: Whole = 100
    """Steps over which the learning rate rises from 0."""
    final_lr: Probability = 0.1
    """Learning rate at the end, as a fraction of the peak; a cosine leads there."""
    beta2: Probability = 0.99
    """AdamW's decay of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices and embeddings; biases and layer norms are left alone."""
    clip: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Count = 500
    """Steps between validations."""
    sample_every: Count = 500
    """Steps between samples written to the run folder."""


PRESETS = {
    "tiny": Config(layers=2, heads=2, width=32, context=32, batch=4, steps=20, warmup=5),  # 1 s
    "default": Config(),  # 42 s → 2.03 nats a character
    "shakespeare": Config(data="tiny_shakespeare", batch=32, steps=1000, lr=5e-3, evaluate_every=250),  # 202 s → 1.73
}

EXPERIMENTS = (
    Experiment(
        "shakespeare",
        preset="shakespeare",
        metric="validation_nats_per_character",
        bar=1.90,
        better="lower",
        seeds=(0, 1, 2),
        published="1.88 (nanoGPT's README, a network of this size on a CPU)",
        within_seconds=300,
    ),
)


def rate(step: int, config: Config) -> float:
    """The learning rate of a step (from 0): linear up to `lr`, then a cosine down to `final_lr · lr`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network that the spec's `architecture` describes."""
    return {"model": GPT(Architecture(**spec.extra["architecture"]))}


@method("language/gpt", paper="arXiv:2005.14165", section="6.9.3", threads=1, shards=True)
def train(config: Config, run: Run) -> dict[str, float]:
    content = text(config.data)
    published = None
    if config.init:
        published, tokens = load_pretrained(config.init)
        if tokens is None:
            raise UserError(f"{config.init} has no tokenizer files, and its weights mean nothing without them")
        of = published.of
    else:
        learn = config.tokens == "bpe"
        tokens = BytePairs.learn(content.text, config.vocabulary) if learn else Characters.of(content.text)
        of = Architecture(
            tokens.size, config.context, config.layers, config.heads, config.width, norm=config.norm,
            dropout=config.dropout,
        )  # fmt: skip
    context = min(of.context, config.context)
    ids = tokens.encode(content.text)
    learned, held_out = split(ids)
    if len(learned) <= context:
        raise UserError(f"{content.name} has only {len(ids)} tokens: too few for a context of {context}")
    validation = torch.cat([learned[-1:], held_out]).to(run.device)  # so that each held-out token is a target once
    characters = len(tokens.decode(held_out))
    spec = Spec(shape=(context,), extra={"architecture": asdict(of), "tokenizer": tokens.state()})
    run.describe(spec)

    model = build(config, spec)["model"]
    if published is not None:
        model.load_state_dict(published.state_dict())
    run.suit_threads(model)
    model = run.place(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, config.beta2),
        fused=True,
    )
    run.track(model=model, optimizer=optimizer)
    prompt = ids[: min(8, context)]
    loss_of = run.compile(lambda x, y: next_token_loss(model(x), y))
    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config)
        offsets = starts(len(learned), context, config.batch, run.generator("batch", step))
        x, y = (part.to(run.device) for part in windows(learned, offsets, context))
        with run.autocast():
            loss = loss_of(x, y)
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            nats = total_nats(model, validation) / characters
            run.log(validation_nats_per_character=nats)
        if run.every(config.sample_every):
            run.artifact("writing", _write(run, model, tokens, prompt, run.generator("writing", step)), step=step + 1)
    nats = total_nats(model, validation) / characters
    paragraph = _write(run, model, tokens, prompt, run.generator("paragraph"), count=500)
    run.artifact("paragraph", paragraph, caption="500 tokens drawn from the trained model at temperature 0.8")
    return {"validation_nats_per_character": nats}


def _write(
    run: Run, model: GPT, tokens: Tokenizer, prompt: Tensor, generator: torch.Generator, count: int = 200
) -> str:
    writer = model
    if run.common.shard:  # every rank holds a part of the weights, and only forward passes bring them together
        writer = GPT(model.of).to(run.device)
        writer.load_state_dict(state_of(model))
    writer.eval()
    ids = generate(writer, prompt[None].to(run.device), count, temperature=0.8, generator=generator)
    writer.train()
    return tokens.decode(ids[0])


@dataclass(frozen=True)
class Sample:
    prompt: str = ""
    """What the text begins with; empty: a new line, or the first of the known characters where there is none."""
    count: Count = 500
    """Number of tokens to write."""
    temperature: Positive = 0.8
    """Below 1: more cautious; above 1: wilder."""
    top_k: Count | None = None
    """Draw among the k most probable tokens only."""
    top_p: Probability | None = None
    """Draw among the fewest tokens that hold this much probability."""
    greedy: bool = False
    """Always take the most probable token."""
    samples: Count = 1
    """Texts to write."""
    seed: int = 0
    """Same seed, same texts."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Write texts to the terminal token by token, and all of them to sample.txt."""
    if options.top_p == 0:
        raise UserError("--top-p is 0, which leaves no token; give a share above 0, or --greedy")
    model, tokens = loaded.model.eval(), tokenizer(loaded.spec.extra["tokenizer"])
    known = getattr(tokens, "alphabet", "\n")
    prompt = options.prompt or ("\n" if "\n" in known else known[0])
    written = []
    for index in range(options.samples):
        ids = tokens.encode(prompt)[None].to(next(model.parameters()).device)
        drawn = stream(
            model, ids, options.count, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
            greedy=options.greedy, generator=torch.Generator().manual_seed(options.seed + index),
        )  # fmt: skip
        written.append(prompt)
        sys.stdout.write(prompt)
        for piece in pieces(tokens, (int(token) for token in drawn)):
            written[-1] += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    (folder / "sample.txt").write_text("\n\n".join(written) + "\n", encoding="utf-8")
    return ""
