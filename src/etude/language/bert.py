"""BERT: an encoder learns text by filling in hidden words, looking both ways

Paper: Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
arXiv:1810.04805. Parameter names are Hugging Face's, so published BERT and MiniLM weights load.

Equation: input [CLS] A [SEP] B [SEP]; embeddings of token, position and sentence added, normed; N layers, norms behind the sums;
    p(token i | the rest) = softmax(E·LN(gelu(W·h_i)) + b), E the embedding table,   for i in the chosen 15 % alone
    p(B follows A) = softmax(W'·tanh(W''·h_[CLS]))
    loss = −mean_chosen log p(token) − mean log p(follows)

Algorithm:
    1. the first 90 % of the text are learned, the next 5 % validate, the last 5 % are the test; WordPiece tokens and their
       vocabulary are those of the first part
    2. each example: sentences A from a random place; B is what follows them (half of the time) or sentences from another place
    3. 15 % of the tokens of A and B are chosen; of these 80 % become [MASK], 10 % a random token, 10 % stay
    4. the loss above; clip the gradient's norm; AdamW with warm-up and linear decay
    5. at the end examples of the test part, once

Differences:
    - E71 (notes 6.9.2.1): not all of the 15 % become [MASK]: 80 % do, 10 % become a random token and 10 % stay as they are.
    - E72: "next sentence prediction" does not swap A and B. B is the true continuation or a RANDOM other sentence; the
      swap is ALBERT's sentence order prediction.
    - E73: no reconstruction at every position: the loss is on the chosen tokens alone.
    - A sentence is a line of the text, and all lines are one document (the paper's second half comes from another document); the
      true next line is never drawn as the random one.
    - Random tokens are drawn from all but the special ones, and special tokens and padding are never chosen.
    - The number chosen is round(0.15·n), at least 1, of each example's n tokens.
    - Padding is not computed: linear layers and norms see the tokens of the text alone (`parts.bert.Bert.states`).

Expect: tiny Shakespeare, one thread of a busy 2-core CPU, seed 0: after 500 steps in 25 s a hidden token of the test part costs
    5.69 nats (its frequency alone 5.96); which sentence follows is not learned in this time.
Command: `etude run language/bert --preset shakespeare`
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import data
from etude.blocks.pictures.panels import label, panels
from etude.blocks.pictures.plots import PALETTE
from etude.catalog import Control, Experiment, Idle, method
from etude.core.config import Count, Few, NonNegative, Positive, Probability, Range, Whole
from etude.core.errors import UserError
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.texts import split
from etude.language.parts.bert import Architecture, PreTraining, load_pretrained, read_published
from etude.language.parts.wordpiece import WordPiece


@dataclass(frozen=True)
class Config:
    data: str = "house_text"
    """Text to learn: a dataset name (tiny_shakespeare, or the bundled house_text) or a text file."""
    init: str = ""
    """Go on from published weights: a folder in Hugging Face's format, a .safetensors file or a hub id. Tokenizer and network
    then come from there."""
    vocabulary: Count = 500
    """Number of WordPiece tokens to learn."""
    layers: Few = 2
    """Transformer layers, N."""
    heads: Count = 4
    """Attention heads of a layer; divides the width."""
    width: Count = 64
    """Width of the hidden states, D; the position-wise networks are 4·D wide."""
    context: Annotated[int, Range(8, 100_000)] = 64
    """Positions of an example, special tokens included."""
    masked: Annotated[float, Range(0, 1, open_low=True)] = 0.15
    """Share of the tokens that are chosen."""
    dropout: Probability = 0.0
    """Dropout on embeddings, attention weights and branches; the paper has 0.1, for far more text."""
    batch: Count = 32
    """Examples in one step."""
    steps: Count = 300
    """Number of parameter updates."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of AdamW."""
    warmup_steps: Whole = 50
    """Steps over which the learning rate rises from 0; from there it falls to 0."""
    weight_decay: NonNegative = 0.01
    """Decoupled decay of matrices and embeddings; biases and layer norms are left alone."""
    clip_norm: Positive = 1.0
    """Largest norm of the whole gradient."""
    evaluate_every: Whole = 100
    """Steps between validations (0: only at the end)."""
    examples: Count = 256
    """Examples of the validation part, and of the test part, that are scored."""


PRESETS = {
    "tiny": Config(vocabulary=200, heads=2, width=32, context=32, batch=8, steps=20, warmup_steps=5, examples=32),
    "default": Config(),
    "shakespeare": Config(
        data="tiny_shakespeare", vocabulary=1000, width=96, context=32, steps=500, learning_rate=3e-3, evaluate_every=250
    ),  # 25 s → 0.28 nats below the tokens' frequencies
    "large": Config(
        data="tiny_shakespeare", vocabulary=3000, layers=6, heads=6, width=384, dropout=0.1, batch=256, steps=4000,
        learning_rate=5e-4, warmup_steps=400, evaluate_every=500,
    ),  # for a GPU
    "paper": Config(
        data="tiny_shakespeare", vocabulary=30_000, layers=12, heads=12, width=768, context=512, dropout=0.1, batch=256,
        steps=1_000_000, learning_rate=1e-4, warmup_steps=10_000, evaluate_every=10_000,
    ),  # BERT-base's settings; give it a text of its size
}  # fmt: skip

SETTINGS = {
    "data": "tiny_shakespeare",
    "init": Idle("needs files of published weights, which a tiny run has not; the learning tests start from such"),
    "vocabulary": 250,
    "heads": 4,
    "width": 48,
    "evaluate_every": 10,
}

METRICS = {
    "test_masked_nats": "negative log-likelihood of a chosen token of the test text (nats)",
    "test_unigram_nats": "the same of the tokens' frequencies in the training text, which read nothing",
    "test_gain_nats": "by how much the first is below the second",
    "test_next_accuracy": "share of test pairs of which it is said rightly whether B follows A",
}

EXPERIMENTS = (
    Experiment(
        "masked", preset="shakespeare", metric="test_gain_nats", bar=0.24, within_seconds=300,
        notes="A small network and half a minute: published BERTs are trained for days.",
        controls=(
            Control("an untrained network", flags={"steps": 1}),
            Control("the tokens are not hidden", swap={"hide": "etude.language.parts.nulls.nothing_hidden"}),
        ),
    ),
)  # fmt: skip


class Sentences(NamedTuple):
    """A text as tokens, and where its sentences begin: ids (N,) int64, starts (S + 1,) int64 with N at its end."""

    ids: Tensor
    starts: Tensor

    @classmethod
    def of(cls, text: str, tokens: WordPiece) -> Sentences:
        """Every line that has a word is a sentence."""
        lines = [ids for line in text.split("\n") if len(ids := tokens.encode(line))]
        lengths = torch.tensor([0, *(len(line) for line in lines)])
        return cls(torch.cat(lines) if lines else torch.zeros(0, dtype=torch.int64), lengths.cumsum(0))


class Examples(NamedTuple):
    """ids, types (B, T) int64; mask (B, T) bool, True where there is text; follows (B,) int64: 0 where B follows A, else 1."""

    ids: Tensor
    types: Tensor
    mask: Tensor
    follows: Tensor


def examples(text: Sentences, tokens: WordPiece, count: int, context: int, stream: torch.Generator) -> Examples:
    """`count` examples [CLS] A [SEP] B [SEP] of at most `context` tokens (line 2); the text has three sentences at least.

    A is as many whole sentences from a random one on as fit into half of the room (cut where one alone is too long), B as many as
    fit into the rest: those that follow A, or those from a random sentence on that is not the next.
    """
    starts, last = text.starts, len(text.starts) - 1
    room = context - 3
    first = torch.randint(last - 1, (count,), generator=stream)
    end_a, next_a = _whole(starts, first, torch.full((count,), max(1, room // 2)), last - 1)  # one is left for B
    other = torch.randint(last - 1, (count,), generator=stream)
    other += other >= next_a  # any sentence but the true one
    follows = (torch.rand(count, generator=stream) < 0.5).long()
    begin_b = torch.where(follows == 0, next_a, other)
    begin_a, length_a = starts[first], end_a - starts[first]
    end_b, _ = _whole(starts, begin_b, room - length_a, last)
    length_b = end_b - starts[begin_b]
    place = torch.arange(context)
    a, b = length_a[:, None], length_b[:, None]
    in_a, in_b = (place >= 1) & (place <= a), (place >= a + 2) & (place < a + 2 + b)
    source = torch.where(in_a, begin_a[:, None] + place - 1, starts[begin_b][:, None] + place - a - 2)
    ids = text.ids[source.clamp(0, len(text.ids) - 1)]
    ids = torch.where(in_a | in_b, ids, tokens.sep)
    ids[:, 0] = tokens.cls
    mask = place <= a + b + 2
    return Examples(ids.where(mask, tokens.pad), ((place >= a + 2) & mask).long(), mask, follows)


def _whole(starts: Tensor, first: Tensor, room: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Where the sentences from `first` to before `most` end that fit into `room` tokens, and the sentence behind, both (B,)."""
    begin = starts[first]
    behind = (torch.searchsorted(starts, begin + room, right=True) - 1).clamp(max=most).maximum(first + 1)
    return torch.minimum(starts[behind], begin + room), behind


def hide(ids: Tensor, tokens: WordPiece, share: float, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Line 3: (ids with chosen tokens hidden (B, T), places (P,) of the chosen in the flat (B·T), ascending).

    Of each row's n tokens that are not special round(share·n) are chosen, at least one where there is one: 80 % of them become
    [MASK], 10 % a random token that is not special, 10 % stay.
    """
    special = torch.isin(ids, tokens.specials)
    count = (~special).sum(1)
    wanted = torch.minimum((share * count).round().clamp(min=1), count)
    rank = torch.rand(ids.shape, generator=stream).masked_fill(special, 2.0).argsort(1).argsort(1)
    chosen = rank < wanted[:, None]
    every = torch.arange(tokens.size)
    ordinary = every[~torch.isin(every, tokens.specials)]
    random = ordinary[torch.randint(len(ordinary), ids.shape, generator=stream)]
    dice = torch.rand(ids.shape, generator=stream)
    hidden = torch.where(dice < 0.8, torch.full_like(ids, tokens.mask), random)
    hidden = torch.where(chosen & (dice < 0.9), hidden, ids)
    return hidden, chosen.flatten().nonzero()[:, 0]


def rate(step: int, config: Config) -> float:
    """The learning rate of a step (from 0): linear up to the peak, then linear down to 0 behind the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * (config.steps - step) / max(1, config.steps - config.warmup_steps)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The network that the spec's `architecture` describes."""
    return {"model": PreTraining(Architecture(**spec.extra["architecture"]))}


@method("language/bert", paper="arXiv:1810.04805", section="6.9.2.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    content = data.text(config.data)
    parts = split(content.text)  # line 1
    weights = None
    if config.init:
        of, weights, tokens = read_published(config.init)
        if tokens is None:
            raise UserError(f"{config.init} has no vocab.txt, and its weights mean nothing without it")
    else:
        tokens = WordPiece.learn(parts[0], config.vocabulary)
        of = Architecture(
            tokens.size, config.context, config.layers, config.heads, config.width, 4 * config.width,
            dropout=config.dropout, attention_dropout=config.dropout,
        )  # fmt: skip
    context = min(of.context, config.context)
    learned, validation, test = (Sentences.of(part, tokens) for part in parts)
    if min(len(part.starts) for part in (learned, validation, test)) < 4:
        raise UserError(f"{content.name} is too short: each of its parts (90 %, 5 %, 5 %) needs three lines with words")
    run.describe(Spec(shape=(context,), extra={"architecture": asdict(of), "tokenizer": tokens.state()}), content)

    model = build(config, Spec(extra={"architecture": asdict(of)}))["model"]
    if weights is not None:
        load_pretrained(model, weights, config.init)
    run.suit_threads(model)
    model = run.place(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-6,
        fused=True,
    )
    run.track(model=model, optimizer=optimizer)

    def losses(text: Sentences, count: int, stream: torch.Generator) -> tuple[Tensor, ...]:
        """(token loss, sentence loss, tokens chosen, share of pairs said rightly) of fresh examples."""
        batch = examples(text, tokens, count, context, stream)
        hidden, places = hide(batch.ids, tokens, config.masked, stream)
        targets = batch.ids.flatten()[places].to(run.device)
        hidden, types, mask, places, follows = (
            part.to(run.device) for part in (hidden, batch.types, batch.mask, places, batch.follows)
        )
        with run.autocast():
            words, next_one = model(hidden, types, mask, places)
        right = (next_one.argmax(1) == follows).float().mean()
        precise = torch.promote_types(words.dtype, torch.float32)  # a sum over V in bfloat16 would lose digits
        word_loss = F.cross_entropy(words.to(precise), targets)
        return word_loss, F.cross_entropy(next_one.to(precise), follows), targets, right

    @torch.no_grad()
    def score(text: Sentences, name: str) -> tuple[float, float, Tensor]:
        """(nats a chosen token, share of pairs, chosen tokens) of the same examples every time."""
        model.eval()
        nats, right, chosen = 0.0, 0.0, []
        stream = run.generator(name)
        for begin in range(0, config.examples, 64):
            count = min(64, config.examples - begin)
            word_loss, _, targets, share = losses(text, count, stream)
            nats += float(word_loss) * len(targets)
            right += float(share) * count
            chosen.append(targets.cpu())
        model.train()
        every = torch.cat(chosen)
        return nats / len(every), right / config.examples, every

    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config)
        word_loss, next_loss, _, _ = losses(learned, config.batch, run.generator("batch", step))
        loss = word_loss + next_loss  # line 4
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        run.log(loss=loss, masked_nats=word_loss, next_nats=next_loss)
        if run.every(config.evaluate_every):
            nats, right, _ = score(validation, "validation")
            run.log(validation_masked_nats=nats, validation_next_accuracy=right)
    nats, right, chosen = score(test, "test")  # line 5
    often = torch.bincount(learned.ids, minlength=tokens.size).double() + 1
    run.artifact(
        "filled",
        filled_figure(model, tokens, test.ids[: min(14, context - 2)]),
        "The beginning of the test text, each token hidden in turn: the three likeliest fillings; the true one is coloured.",
    )
    alone = -float((often / often.sum()).log()[chosen].mean())
    return {
        "test_masked_nats": nats,
        "test_unigram_nats": alone,
        "test_gain_nats": alone - nats,
        "test_next_accuracy": right,
    }


@torch.no_grad()
def fill(model: PreTraining, tokens: WordPiece, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each [MASK] among the tokens (T,): (log-probabilities of all tokens, sorted, and the tokens), each (V,).

    Raises UserError where there is no [MASK], or more text than the network has positions.
    """
    ids = torch.cat([torch.tensor([tokens.cls]), ids, torch.tensor([tokens.sep])])
    places = (ids == tokens.mask).nonzero()[:, 0]
    if not len(places):
        raise UserError("there is nothing to fill in; write [MASK] for a word, as in: the [MASK] is dead")
    if len(ids) > model.bert.of.context:
        raise UserError(f"this text is {len(ids)} tokens long, and the network has {model.bert.of.context} positions")
    model.eval()
    device = next(model.parameters()).device
    logits, _ = model(ids[None].to(device), places=places.to(device))
    logits = logits.float().cpu()
    logits[:, tokens.specials] = -torch.inf
    return [tuple(row.sort(descending=True, stable=True)) for row in logits.log_softmax(1)]


def filled_figure(model: PreTraining, tokens: WordPiece, ids: Tensor) -> Any:
    """The tokens of a text (T,), each hidden in turn, with the three likeliest fillings and their probabilities."""
    figure, (axes,) = panels(width=6.4, height=0.3 * len(ids) + 0.7)
    for row, true in enumerate(ids.tolist()):
        (value, order), *_ = fill(model, tokens, torch.cat([ids[:row], torch.tensor([tokens.mask]), ids[row + 1 :]]))
        left = 0.0
        for share, token in zip(value[:3].exp().tolist(), order[:3].tolist()):
            colour = PALETTE[1 if token == true else 0]
            axes.barh(row, share, left=left, color=colour, alpha=0.85, height=0.7, edgecolor="white")
            if share > 0.06:
                middle = {"ha": "center", "va": "center", "fontsize": 7, "color": "white"}
                axes.text(left + share / 2, row, tokens.tokens[token].replace("$", r"\$"), **middle)
            left += share
    axes.set_yticks(range(len(ids)), [tokens.tokens[i].replace("$", r"\$") for i in ids.tolist()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(visible=False)
    label(axes, "Each token hidden in turn", "probability of the three likeliest tokens")
    return figure


@dataclass(frozen=True)
class Sample:
    text: str = "the [MASK] is dead ."
    """A text with [MASK] for each word to fill in."""
    count: Count = 5
    """Fillings to name for each [MASK]."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """The likeliest fillings of a text's blanks, each with its probability."""
    state = loaded.spec.extra["tokenizer"]
    tokens = WordPiece(state["tokens"], state["lower"])
    lines = []
    for number, (value, order) in enumerate(fill(loaded.model, tokens, tokens.encode(options.text)), 1):
        lines.append(f"[MASK] {number}")
        best = zip(order[: options.count].tolist(), value[: options.count].exp().tolist())
        lines += [f"  {tokens.tokens[token]:<16} {share:.3f}" for token, share in best]
    return "\n".join(lines)
