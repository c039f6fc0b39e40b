"""Transformer: attention alone, without recurrence, reads, writes and translates

Paper: Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, "Attention Is All You Need", 2017, arXiv:1706.03762;
pre-norm: Xiong et al., 2020, arXiv:2002.04745; learned positions: Gehring et al., 2017, arXiv:1705.03122.

Equation:
    Attention(Q, K, V) = softmax(QKᵀ/√d)V,   MultiHead(Q, K, V) = concat_h(Attention(QW_q, KW_k, VW_v))W_O
    FFN(x) = max(0, xW_1 + b_1)W_2 + b_2
    x ← LN(x + Sub(x))  (post, the paper)     x ← x + Sub(LN(x))  (pre, and one more LN behind the last layer)
    encoder layer: Sub = self-attention, FFN;   decoder layer: Sub = causal self-attention, attention to the encoder's end, FFN
    x⁰_t = √D E[token_t] + PE_t,   p(y_l | y_<l, source) = softmax(E h_l),   PE(t, 2i), PE(t, 2i+1) = sin, cos(t/10000^{2i/D})
    loss = −(1−ε) log p(y) − ε mean_v log p(v),   rate(k) = D^{−½}·min(k^{−½}, k·w^{−3/2})

Algorithm:
1. pairs of sentences: random strings and these backwards, or parallel text as byte pairs of both languages
2. each step: `batch` pairs of like lengths, drawn from (seed, step); the decoder reads BOS and the target shifted right by one
3. loss as above over all tokens and the end of each target; Adam (β = 0.9, 0.98, ε = 1e-9) at rate(k)
4. while it learns, look at the validation pairs; at the end translate the test, once, with `beams` hypotheses
5. translate: read the source once; then one token at a time, from the keys and values of those before it

Differences:
- E57: the scores are q·k/√d, not q·k.
- E58: self-attention asks with its own layer's states, q_t = q(h_t), and e_{l,t} is query l against key t throughout.
- E59: the notes announce four changes to recurrent attention and list six.
- E60: the first frequency of PE is 1, its period 2π; it tells no even from odd.
- E61: the heads side by side are multiplied by W_O, and each has its own W_q, W_k, W_v.
- E62: a_l = Σ_t α_{l,t} v_t, and the network between is Linear–ReLU–Linear, D → 4D → D.
- E63: layer norm divides by √(σ² + ε); γ and β are vectors.
- E64: LN(x + Sub(x)), or x + Sub(LN(x)); not x + LN(Sub(x)).
- E65: every decoder layer looks at the LAST encoder layer, not at the one of its own number.
- E66: the decoder reads the target shifted right by one. Missing there, too: √D on the vectors, one table E for both languages
  and the softmax, dropout, label smoothing, warm-up, the width 4D.
- Dropout also on attention weights and inside the network, as in `torch.nn.Transformer`; the paper has it on branches and inputs.
- All but the attention itself is computed for the text alone, not for the padding between (`blocks.nn.attention.Text`).
- `--positions` concatenated and appended: [x; P_t] and [x; t/context], mapped back to D features, as the notes have them.
- The last weights translate; the paper averages the last five checkpoints.
- BLEU is on the text as written, equal to sacrebleu's (`etude.sequence.parts.bleu`).

Expect: strings of up to 6 letters, one CPU thread, 30 s, three seeds: 0.98 to 0.99 of the test strings written backwards without
an error (without positions at most strings of one letter). Multi30k en-de, `--preset en_de --steps 1000`, 7 minutes, three seeds:
test BLEU 29.2 to 30.4 with 5 beams (the same translations against other sentences' targets: 0.5).
`--preset en_fr --steps 1000`, seed 0: 43.6 (0.7).
Command: `etude run sequence/transformer`, or `etude run sequence/transformer --preset en_de`
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.pictures.plots import picture
from etude.blocks.tokens.text import tokenizer
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, NonNegative, Positive, Probability, Whole
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim.schedules import inverse_root, set_lr
from etude.sequence.parts import translating
from etude.sequence.parts.translating import PAD, Beams, Sample, Special, read_task, scores
from etude.sequence.transformer.network import Architecture, Transformer
from etude.sequence.transformer.pictures import attention_figures


@dataclass(frozen=True)
class Config:
    data: str = "reversal"
    """Pairs to learn: reversal (random strings, to be written backwards), multi30k, or a folder of parallel text."""
    languages: str = "en-de"
    """Source and target of parallel text; a folder's files end in these names."""
    vocabulary: Count = 4000
    """Number of byte-pair tokens to learn from both languages together; at least 256, the bytes."""
    longest: Count = 6
    """Most letters of a random string; of parallel text, most tokens of a sentence in training and of a translation."""
    layers: Few = 2
    """Layers of the encoder, and of the decoder, N."""
    heads: Count = 2
    """Attention heads of a layer; divides the width."""
    width: Count = 32
    """Width of the states, D; the position-wise networks are 4·D wide."""
    positions: Literal["sinusoidal", "learned", "concatenated", "appended", "none"] = "sinusoidal"
    """How a token knows its place: sinusoids or a learned table are added, a learned table or t/context stands beside."""
    context: Count = 256
    """Positions there are, where they are learned or appended; sinusoids have no end."""
    norm_placement: Literal["post", "pre"] = "post"
    """Layer norms behind the sums (the paper) or before the branches."""
    dropout: Probability = 0.0
    """Dropout on the inputs, attention weights, inside the networks and on branches."""
    smoothing: Probability = 0.1
    """Label smoothing ε: this much of each target is spread over all tokens."""
    batch: Count = 64
    """Pairs in one step."""
    steps: Count = 1000
    """Number of parameter updates."""
    learning_rate: Positive = 1.0
    """Factor on the paper's rate D^(−½)·min(k^(−½), k·w^(−3/2))."""
    warmup_steps: Count = 400
    """Steps over which the rate rises, w."""
    beams: Beams = 4
    """Hypotheses kept at a time in the test; 1 is greedy."""
    length_penalty: NonNegative = 1.0
    """A hypothesis is judged by Σ log p / length to this power: 1 is the mean, 0 the sum."""
    evaluate_every: Whole = 500
    """Steps between validations, which are greedy (0: only at the end)."""


PRESETS = {
    "tiny": Config(layers=1, width=16, batch=8, steps=20, warmup_steps=10, longest=4, beams=2),
    "default": Config(),  # 30 s → 0.98
    "long": Config(longest=10, heads=4, width=64, steps=2000),
    "en_de": Config(
        data="multi30k", longest=40, layers=3, heads=4, width=128, dropout=0.1, batch=128, steps=2000, warmup_steps=500, beams=5
    ),
    "en_fr": Config(
        data="multi30k", languages="en-fr", longest=40, layers=3, heads=4, width=128, dropout=0.1, batch=128, steps=2000,
        warmup_steps=500, beams=5,
    ),
    "paper": Config(
        data="multi30k", vocabulary=37_000, longest=100, layers=6, heads=8, width=512, dropout=0.1, batch=512,
        steps=100_000, warmup_steps=4000, length_penalty=0.6, evaluate_every=5000,
    ),  # the base model's settings, which want millions of pairs and a GPU
}  # fmt: skip

SETTINGS = {
    "data": "multi30k",
    "languages": {"languages": "de-en", "data": "multi30k"},
    "vocabulary": {"vocabulary": 300, "data": "multi30k", "longest": 60},
    "context": {"context": 100, "positions": "appended"},
    "heads": 4,
    "width": 32,
    "beams": {"beams": 1, "steps": 200},
    "length_penalty": {"length_penalty": 3.0, "steps": 200},
    "evaluate_every": 10,
}

EXPERIMENTS = (
    Experiment(
        "reversal", preset="default", metric="test_exact_match", bar=0.979, within_seconds=300,
        controls=(
            Control("no positions", flags={"positions": "none"}),
            Control("an untrained network", flags={"steps": 1}),
        ),
    ),
    Experiment(
        "Multi30k, English to German", preset="en_de", flags={"steps": 1000}, metric="test_bleu", bar=24,
        notes="four and a half passes over 29,000 captions, BLEU on the text as written",
        published="38 to 40 (large networks; from memory)",
        controls=(
            Control("the same translations, each held against another sentence's target", metric="test_unrelated_bleu"),
            Control("an untrained network", flags={"steps": 1}),
        ),
    ),
)  # fmt: skip


def smoothed_nats(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean over R of −(1−ε) log p(y) − ε mean_v log p(v), from logits (R, V) and targets (R,)."""
    precise = torch.promote_types(logits.dtype, torch.float32)  # a sum over V in bfloat16 would lose digits
    return F.cross_entropy(logits.to(precise), targets, label_smoothing=smoothing)


def rate(step: int, config: Config) -> float:
    """The learning rate of a step (from 0): factor·D^(−½)·min(k^(−½), k·w^(−3/2)), k = step + 1."""
    peak = config.learning_rate * (config.width * config.warmup_steps) ** -0.5
    return inverse_root(step, peak, config.warmup_steps)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network that the spec's `architecture` describes."""
    return {"model": Transformer(Architecture(**spec.extra["architecture"]))}


@method(
    "sequence/transformer", paper="arXiv:1706.03762",
    section="6.6.1, 6.6.2, 6.7.2.1a, 6.7.2.1b, 6.7.2.2, 6.7.2.3, 6.7.2.4, 6.7.2.5, 6.7.2.6, 6.7.3", threads=1,
)  # fmt: skip
def train(config: Config, run: Run) -> dict[str, float]:
    task = read_task(  # line 1
        config.data, config.languages, config.vocabulary, config.longest, config.batch, run.seed, run.rank, run.world
    )
    of = Architecture(
        task.tokens.size, config.context, config.layers, config.heads, config.width, config.positions,
        config.norm_placement, config.dropout,
    )  # fmt: skip
    spec = Spec(extra={"architecture": asdict(of), "tokenizer": task.tokens.inner.state(), "longest": task.longest})
    run.describe(spec, task.content)

    model = build(config, spec)["model"]
    held = task.tokens.encode_all([side for pair in task.validation + task.test for side in pair])
    model.require(max(task.longest + 1, *map(len, held)))
    run.suit_threads(model)
    model = run.place(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate(0, config), betas=(0.9, 0.98), eps=1e-9, fused=True)
    run.track(model=model, optimizer=optimizer)
    loss_of = run.compile(
        lambda batch: smoothed_nats(
            model(batch.source, batch.lengths, batch.before, flat=True),
            batch.after[batch.after != PAD],
            config.smoothing,
        )
    )

    for step in run.steps(config.steps):
        set_lr(optimizer, rate(step, config))
        batch = task(step).to(run.device)  # line 2
        with run.autocast():
            loss = loss_of(batch)  # line 3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):  # line 4
            found = scores(model, task, task.validation)
            run.log(**{f"validation_{name}": value for name, value in found.items()})

    shown = max(task.validation[:100], key=lambda pair: min(len(pair[0]), 60))
    for name, figure in attention_figures(model, task.tokens, *shown).items():
        run.artifact(f"attention_{name}", figure, f"Who looks where in a validation pair: {WHERE[name]}.")
    rules = {"beams": config.beams, "length_penalty": config.length_penalty}
    return {f"test_{name}": value for name, value in scores(model, task, task.test, **rules).items()}


WHERE = {
    "encoder": "the encoder's tokens among themselves",
    "decoder": "the decoder's, which see none behind them",
    "cross": "from the token that was read last (rows) to the source (columns)",
}


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """The translation, also written to sample.txt, and who looked where to attention_*.png."""
    said = translating.sample(loaded, options, folder)
    if options.text != "-":
        tokens = Special(tokenizer(loaded.spec.extra["tokenizer"]))
        for name, figure in attention_figures(loaded.model, tokens, options.text, said).items():
            picture(figure).save(folder / f"attention_{name}.png")
    return said


def generate(loaded: Loaded, prompts: list[str], options: Sample) -> list[str]:
    """The translation of each sentence."""
    return translating.generate(loaded, prompts, options)
