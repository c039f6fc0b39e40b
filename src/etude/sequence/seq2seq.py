"""Seq2seq: a recurrent encoder and decoder with attention between them, translates

Paper: Sutskever, Vinyals, Le, "Sequence to Sequence Learning with Neural Networks", 2014, arXiv:1409.3215; Bahdanau, Cho, Bengio,
2014, arXiv:1409.0473 (attention); Luong, Pham, Manning, 2015, arXiv:1508.04025 (its scores); Wu et al., 2016, arXiv:1609.08144
(beam search by the mean of log p).

Equation:
    h_1 … h_S = encoder(x_1 … x_S),   s_0 = its last state,   s_l = cell(y_{l−1}, s_{l−1})
    e_{t,l} = score(h_t, s_l),   α_{·,l} = softmax over t of e_{·,l},   a_l = Σ_t α_{t,l} v(h_t)
    p(y | x) = Π_l p(y_l | y_{<l}, x),   p(y_l | …) = softmax(V tanh(W [s_l; a_l])),   loss = −mean log p

    score:  identity  h·s      general  hᵀW_e s (W_e = W_kᵀW_q)      additive  wᵀtanh(W_k h + W_q s)
            values    as general, with v(h) = W_v h; else v(h) = h      none  no a_l: all that is known of x is s_0

Algorithm:
    1. pairs of sentences: random strings and these backwards, or parallel text as byte pairs of both languages
    2. each step: `batch` pairs of like lengths, drawn from (seed, step); the decoder reads BOS and the target (teacher forcing)
    3. loss as above over all tokens and the end of each target; clip the gradient's norm; Adam with a rate that falls on a line
    4. while it learns, look at the validation pairs; at the end translate the test, once
    5. translate: keep the `beams` best beginnings, score those that have ended by (Σ log p) / length

Differences:
    - E55 of the notes: a hypothesis is divided by its OWN length (not the input's, not the cut-off), leaves the beam when it has
      ended, and the first step expands one hypothesis (`etude.blocks.tokens.decoding.beam_search`).
    - E56: t = 0 is the first ENCODING time, and ŷ_l = f(s_l, a_l), not f(s_t, a_l).
    - `--read-in` says where a_l goes, one of the notes' three places: `readout` (as above), `state` (the cell reads a_{l−1},
      which s_{l−1} asked for, beside y_{l−1}: Bahdanau's, one step after another also in training) or `layer` (another recurrent
      layer reads [s_l; a_l], and the readout its state alone).
    - Each direction of the encoder has half the width, so that h, s and s_0 are equally long and `identity` is the plain dot.
    - Sutskever turns the source round; two directions and attention make that needless, and it is not done here.
    - The tokens are byte pairs of both languages together (Sennrich, 2016), not 160,000 words.
    - BLEU is on the text as written, equal to sacrebleu's (`etude.sequence.parts.bleu`); numbers published for Multi30k are often
      on lower-cased words.

Expect: reversal, one CPU thread, 10 s, three seeds: 0.994 to 1 of the strings exactly (without attention 0.62 to 0.63).
Multi30k en-de, two passes (900 steps, 2 to 4 minutes of one core), three seeds: test BLEU 15.9 to 17.4 with 5 beams (the same
translations against other sentences' targets: 0.7); published networks reach 30 and more (from memory).
en-fr, seed 0: 13.2 with 5 beams.
Command: `etude run sequence/seq2seq`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from etude.blocks.nn.recurrent import Recurrent, State
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, Fraction, NonNegative, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.sequence.parts import translating
from etude.sequence.parts.looks import as_batch, attention_maps, names_of, shown_pairs, table
from etude.sequence.parts.text import falling
from etude.sequence.parts.translating import PAD, Beams, Sample, Task, read_task, scores, token_nats


@dataclass(frozen=True)
class Config:
    data: str = "reversal"
    """Pairs to learn: reversal (random strings, to be written backwards), multi30k, or a folder of parallel text."""
    languages: str = "en-de"
    """Source and target of parallel text; a folder's files end in these names."""
    vocabulary: Count = 4000
    """Number of byte-pair tokens to learn from both languages together; at least 256, the bytes."""
    longest: Count = 10
    """Most letters of a random string; of parallel text, most tokens of a sentence in training and of a translation."""
    cell: Literal["gru", "lstm"] = "gru"
    """Of the encoder and the decoder."""
    bidirectional: bool = True
    """The encoder reads forwards and backwards, half of the width each."""
    layers: Few = 1
    """Recurrent layers of the encoder, and of the decoder."""
    width: Count = 64
    """Units of a layer, D."""
    embedding: Count = 32
    """Length of the vector that stands for a token."""
    attention: Literal["none", "identity", "general", "additive", "values"] = "general"
    """How a state of the decoder and one of the encoder are compared; none: only the encoder's last state is known."""
    read_in: Literal["readout", "state", "layer"] = "readout"
    """Where what was attended to goes: into the readout, the next step of the cell, or another recurrent layer."""
    dropout: Probability = 0.0
    """Dropout of the token vectors, between layers, and before the last matrix."""
    batch: Count = 64
    """Pairs in one step."""
    steps: Count = 600
    """Number of parameter updates."""
    learning_rate: Positive = 5e-3
    """Adam's learning rate in the first step."""
    final_learning_rate: Probability = 0.05
    """Learning rate at the end, as a part of the first; a line leads there."""
    beta2: Fraction = 0.99
    """Adam's decay of the second moment."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    label_smoothing: Probability = 0.0
    """This much of each target's probability is spread over all tokens."""
    beams: Beams = 5
    """Hypotheses kept at a time in the test; 1 is greedy."""
    length_penalty: NonNegative = 1.0
    """A hypothesis is judged by Σ log p / length to this power: 1 is the mean, 0 the sum."""
    evaluate_every: Whole = 200
    """Steps between validations, which are greedy (0: only at the end)."""


PRESETS = {
    "tiny": Config(width=16, embedding=8, batch=8, steps=20, longest=4, beams=2),  # 1 s
    "default": Config(),  # 11 s → 0.998
    "en_de": Config(
        data="multi30k", vocabulary=3000, longest=40, width=256, embedding=128, dropout=0.1, label_smoothing=0.1, steps=900,
        learning_rate=3e-3, evaluate_every=225,
    ),  # 4 minutes of one core → BLEU 16.7
    "en_fr": Config(
        data="multi30k", languages="en-fr", vocabulary=3000, longest=40, width=256, embedding=128, dropout=0.1,
        label_smoothing=0.1, steps=900, learning_rate=3e-3, evaluate_every=225,
    ),
}  # fmt: skip

SETTINGS = {
    "data": {"data": "multi30k", "vocabulary": 300, "longest": 30, "steps": 3},
    "languages": {"data": "multi30k", "vocabulary": 300, "longest": 30, "steps": 3, "languages": "en-fr"},
    "vocabulary": {"data": "multi30k", "longest": 30, "steps": 3, "vocabulary": 320},
    "width": 20,
    "beams": {"steps": 100, "beams": 5},
    "length_penalty": {"steps": 100, "length_penalty": 0.0},
    "evaluate_every": 10,
}

EXPERIMENTS = (
    Experiment(
        "reversal",
        preset="default",
        metric="test_exact_match",
        bar=0.993,
        controls=(
            Control(
                "no attention: all that is known of the string is the encoder's last state", flags={"attention": "none"}
            ),
            Control("an untrained network", flags={"steps": 1}),
        ),
    ),
    Experiment(
        "Multi30k, English to German",
        preset="en_de",
        metric="test_bleu",
        bar=15,
        notes="two passes over 29,000 captions, BLEU on the text as written",
        published="30 and more (recurrent networks trained for long on a GPU; from memory)",
        controls=(
            Control("the same translations, each held against another sentence's target", metric="test_unrelated_bleu"),
            Control("an untrained network", flags={"steps": 1, "evaluate_every": 0}),
        ),
    ),
)


class Memory(NamedTuple):
    """The source as the decoder may look at it."""

    keys: Tensor
    """(B, S, D)."""
    values: Tensor
    """(B, S, D)."""
    blank: Tensor
    """(B, S) bool: padding, which is not looked at."""


def attend(scores: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """From scores (B, L, S): what is attended to, a (B, L, D), and the weights α (B, L, S), 0 on padding and 1 in sum."""
    weights = scores.masked_fill(memory.blank[:, None], -torch.inf).softmax(-1)
    return weights @ memory.values, weights


class Attention(nn.Module):
    """The scores of §6.5: what stands on the encoder's side is computed once a sentence (`remember`)."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind != "identity":
            self.key = nn.Linear(width, width, bias=kind == "additive")
        if kind == "additive":
            self.query, self.weigh = nn.Linear(width, width, bias=False), nn.Linear(width, 1, bias=False)
        if kind == "values":
            self.value = nn.Linear(width, width)

    def remember(self, h: Tensor, blank: Tensor) -> Memory:
        """Keys and values of the encoder's states h (B, S, D)."""
        keys = h if self.kind == "identity" else self.key(h)
        return Memory(keys, self.value(h) if self.kind == "values" else h, blank)

    def forward(self, s: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """States s (B, L, D) of the decoder → a (B, L, D) and α (B, L, S)."""
        if self.kind == "additive":
            pairs = torch.tanh(memory.keys[:, None] + self.query(s)[:, :, None])
            return attend(self.weigh(pairs)[..., 0], memory)
        return attend(s @ memory.keys.transpose(1, 2), memory)


class Written:
    """What is known while R hypotheses are written: the memory of B sentences, and the states (L, R, D) of each hypothesis."""

    def __init__(self, memory: Memory | None, states: State, upper: State) -> None:
        self.memory, self.states, self.upper = memory, states, upper

    def select(self, rows: Tensor, sentences: Tensor | None) -> Written:
        """The given hypotheses; the memory is held once a sentence, however many there are."""
        memory = self.memory
        if memory is not None and sentences is not None:
            memory = Memory(*(part.index_select(0, sentences) for part in memory))
        states, upper = (tuple(part.index_select(1, rows) for part in of) for of in (self.states, self.upper))
        return Written(memory, states, upper)


class Seq2Seq(nn.Module):
    """Token vectors → encoder; token vectors of the target → decoder, which looks at the encoder's states."""

    def __init__(
        self, vocabulary: int, embedding: int, width: int, layers: int, cell: Any, bidirectional: bool, attention: str,
        read_in: str, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        looks, directions = attention != "none", 2 if bidirectional else 1
        if width % directions:
            raise UserError(f"a width of {width} cannot be halved between the two directions; give an even one")
        self.read_in = read_in if looks else "nowhere"
        self.source, self.target = (nn.Embedding(vocabulary, embedding, padding_idx=PAD) for _ in range(2))
        self.encoder = Recurrent(
            cell, embedding, width // directions, layers, bidirectional=bidirectional, dropout=dropout
        )
        self.attention = Attention(attention, width) if looks else None
        self.decoder = Recurrent(cell, embedding + width * (self.read_in == "state"), width, layers, dropout=dropout)
        self.upper = Recurrent(cell, 2 * width, width) if self.read_in == "layer" else None
        self.join = nn.Linear(width + width * (self.read_in == "readout"), embedding)
        self.readout, self.dropout = nn.Linear(embedding, vocabulary), nn.Dropout(dropout)

    def begin(self, source: Tensor, lengths: Tensor) -> Written:
        """The source (B, S) read: its memory, and the state s_0 that the decoder begins with."""
        h, last = self.encoder(self.dropout(self.source(source)), None, lengths)
        layers, width = self.encoder.num_layers, self.decoder.width
        states = tuple(part.unflatten(0, (layers, -1)).transpose(1, 2).reshape(layers, -1, width) for part in last)
        memory = None if self.attention is None else self.attention.remember(h, source == PAD)
        upper = () if self.upper is None else self.upper.zeros(len(source))
        return Written(memory, states, upper)

    def write(self, before: Tensor, state: Written) -> tuple[Tensor, Tensor | None, Written]:
        """Read `before` (R, T) after what the state holds: logits (R, T, V), α (R, T, S), and the state behind the last."""
        x, memory, states, upper = self.dropout(self.target(before)), state.memory, state.states, state.upper
        weights = None
        if memory is None or self.attention is None:
            s, states = self.decoder(x, states)
        elif self.read_in == "state":
            steps = []
            for t in range(before.shape[1]):
                a, seen = self.look(states[0][-1][:, None], memory)
                one, states = self.decoder(torch.cat([x[:, t : t + 1], a], -1), states)
                steps.append((one, seen))
            s, weights = (torch.cat(parts, 1) for parts in zip(*steps))
        else:
            s, states = self.decoder(x, states)
            a, weights = self.look(s, memory)
            s = torch.cat([s, a], -1)
            if self.upper is not None:
                s, upper = self.upper(self.dropout(s), upper)
        logits = self.readout(self.dropout(torch.tanh(self.join(s))))
        return logits, weights, Written(memory, states, upper)

    def look(self, s: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Attention of R = B·K hypotheses, K of each sentence side by side: s (R, T, D) → a (R, T, D) and α (R, T, S)."""
        assert self.attention is not None
        a, weights = self.attention(s.reshape(len(memory.keys), -1, s.shape[-1]), memory)
        return a.reshape(s.shape), weights.reshape(*s.shape[:2], -1)

    def forward(self, source: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each one of `before`."""
        return self.write(before, self.begin(source, lengths))[0]

    @torch.no_grad()
    def step(self, tokens: Tensor, state: Written) -> tuple[Tensor, Written]:
        """Read one token of each hypothesis, (R,): logits (R, V) of the next."""
        logits, _, state = self.write(tokens[:, None], state)
        return logits[:, 0], state

    @torch.no_grad()
    def looked(self, task: Task, source: str, target: str) -> tuple[Tensor, list[str], list[str]]:
        """The weights α (T, S) with which a given target is written, and the names of its tokens and of the source's."""
        training = self.training
        self.eval()
        given, lengths, before, after = (part.to(self.readout.weight.device) for part in as_batch(task, source, target))
        weights = self.write(before, self.begin(given, lengths.cpu()))[1]
        self.train(training)
        assert weights is not None
        return weights[0], names_of(task.tokens, after[0]), names_of(task.tokens, given[0])


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network, for as many tokens as the spec says."""
    network = Seq2Seq(
        spec.extra["vocabulary"], config.embedding, config.width, config.layers, config.cell, config.bidirectional,
        config.attention, config.read_in, config.dropout,
    )  # fmt: skip
    return {"model": network}


@method("sequence/seq2seq", paper="arXiv:1409.3215", section="6.4.1, 6.4.2, 6.5.2, 6.5.3", threads=1)
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
        batch = task(step).to(run.device)  # line 2
        loss = token_nats(
            model(batch.source, batch.lengths, batch.before), batch.after, config.label_smoothing
        )  # line 3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):  # line 4
            found = scores(model, task, task.validation)
            run.log(**{f"validation_{name}": value for name, value in found.items()})

    pairs = shown_pairs(task)
    if config.attention != "none":
        run.artifact(
            "attention", attention_maps([model.looked(task, *pair) for pair in pairs]),
            caption="Where each token that is written looks: validation pairs, the given translation forced",
        )  # fmt: skip
    rules = {"beams": config.beams, "length_penalty": config.length_penalty}
    run.artifact("translations", table(model, task, pairs, **rules), caption="Validation pairs, and what is written")
    return {f"test_{name}": value for name, value in scores(model, task, task.test, **rules).items()}  # line 5


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """The translation of `--text`, also written to sample.txt."""
    return translating.sample(loaded, options, folder)


def generate(loaded: Loaded, prompts: list[str], options: Sample) -> list[str]:
    """The translation of each sentence."""
    return translating.generate(loaded, prompts, options)
