"""word2vec: word vectors learned by predicting the words nearby (skip-gram)

Paper: Mikolov, Chen, Corrado, Dean, "Efficient Estimation of Word Representations in Vector Space", 2013, arXiv:1301.3781;
Mikolov, Sutskever, Chen, Corrado, Dean, "Distributed Representations of Words and Phrases and their Compositionality", 2013,
arXiv:1310.4546 (negative sampling, subsampling); Levy, Goldberg, "Neural Word Embedding as Implicit Matrix Factorization",
2014 (the optimum); Ji, Satish, Li, Dubey, 2016, arXiv:1604.04661 (shared noise words).

Equation: v_w a word's vector as a centre c, u_w as a context o; the pairs (c, o) lie within a window of the text
    softmax     max Σ_(c,o) log [exp(u_o·v_c) / Σ_{w∈V} exp(u_w·v_c)]
    negatives   max Σ_(c,o) [log σ(u_o·v_c) + Σ_{k=1}^K log σ(−u_{w_k}·v_c)],   w_k ~ P_n(w) ∝ count(w)^0.75
At full rank their optima are p(o|c) = #(c,o)/#(c), and u_o·v_c = log p(o|c) − log P_n(o) − log K, which is PMI − log K where
P_n is the words' own frequency.

Algorithm:
    1. the first 90 % of the text are learned, the next 5 % validate, the last 5 % are the test; the words are those that the
       first part has at least `least_count` times
    2. each pass over the text keeps an occurrence of w with probability min(1, √(t/f_w) + t/f_w)
    3. each step takes the next `batch` words of the text; a kept one is a centre, its contexts are the kept words at most r
       places away, r uniform in 1 … window
    4. a gradient step on the sum over these pairs; the learning rate falls linearly to a floor
    5. at the end p(o|c) of the test part, once; the vectors v are what is used

Differences:
    - E68 (notes 6.8.1): the notes take argmax p(o|c), and their denominator sums "over the entire dataset". It is Σ log p(o|c)
      over the corpus that is maximised, and the denominator sums over the vocabulary.
    - E69: σ(u·v) is the probability that a pair is no noise, p(D=1|o,c), no distribution over o. Noise words are drawn from
      unigram^0.75 without rejecting true contexts; subsampling and the dynamic window, which the notes leave out, are here.
    - The released program (and gensim) updates after every pair; here the gradients of a batch of text are summed first, so
      `batch` is a setting that matters, and the numbers do not depend on the number of threads.
    - `--shared-negatives M` lets a batch share M noise words, each with weight K/M: the same gradient on average, by two
      matrix products. 0 draws K of their own for each pair, as in the paper.
    - The text is one row of words: no sentence ends, as in the paper's files with one long line.
    - Where a batch has many terms of one word, its rows take the shorter step α/(1 + α·n/4) (n: the terms to
      be expected).
    - With the softmax all rows change in every step: Adam, from the words' frequencies (`begin_at`).
    - Held-out text is scored as p(o|c) = softmax(u·v), with negatives softmax(u·v + log P_n), which their optimum says.

Expect: tiny Shakespeare, one thread of a busy 2-core CPU, seed 0: 20 passes with negatives in 4 s, after which the similarities
    of the 500 most frequent words correlate 0.48 (ranks) with those of PPMI and SVD; the softmax 6.57 nats a context in 5 s
    (frequencies alone: 6.58).
Command: `etude run language/word2vec --preset shakespeare`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import data
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, NonNegative, Positive, Probability, Range, Whole
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.texts import split
from etude.language.word2vec import objective
from etude.language.word2vec.files import write_vectors
from etude.language.word2vec.kernels import Kernels
from etude.language.word2vec.pairs import (
    Noise,
    Vocabulary,
    keep_probability,
    neighbours,
    noise_probability,
    split_words,
)
from etude.language.word2vec.scores import (
    agreement,
    analogy_scores,
    nearest,
    pair_counts,
    ppmi_vectors,
    similarity_score,
)
from etude.language.word2vec.showing import map_figure, neighbour_table, parse

COMPARED = 500
"""The most frequent words, whose similarities are held against those of PPMI and SVD."""


@dataclass(frozen=True)
class Config:
    data: str = "house_text"
    """Text to learn: a dataset name (tiny_shakespeare, or the bundled house_text) or a text file."""
    objective: Literal["negatives", "softmax"] = "negatives"
    """Negative sampling, or the full softmax over the vocabulary."""
    negatives: Annotated[int, Range(1, 100_000)] = 5
    """Noise words of a pair, K."""
    shared_negatives: Annotated[int, Range(0, 100_000)] = 16
    """Each M centres in a row share M noise words; 0: every pair draws K of its own."""
    noise_power: NonNegative = 0.75
    """Power of the counts in the noise distribution; 1: the words' frequency, 0: uniform."""
    subsample: NonNegative = 1e-3
    """Threshold t of the subsampling of frequent words; 0: keep all."""
    window: Annotated[int, Range(1, 1000)] = 5
    """Words on each side of a centre, at most."""
    dynamic_window: bool = True
    """Draw the reach of each centre from 1 … window; else it is the window."""
    least_count: Count = 2
    """Least occurrences of a word of the vocabulary."""
    width: Count = 50
    """Length of a vector, D."""
    batch: Count = 200
    """Words of the text in one step."""
    steps: Count = 400
    """Number of parameter updates."""
    learning_rate: Positive = 0.05
    """Learning rate at the start."""
    final_learning_rate: Probability = 1e-3
    """Learning rate at the end, as a fraction of that at the start."""
    evaluate_every: Whole = 100
    """Steps between validations (0: only at the end)."""


PRESETS = {
    "tiny": Config(steps=20, width=16),  # 0.2 s
    "default": Config(),  # 1 s
    "shakespeare": Config(
        data="tiny_shakespeare", least_count=5, width=100, batch=4000, steps=900, evaluate_every=225
    ),  # 4 s → rank correlation 0.48 with PPMI and SVD
    "softmax": Config(
        data="tiny_shakespeare",
        objective="softmax",
        least_count=10,
        width=30,
        batch=1000,
        steps=600,
        learning_rate=5e-3,
        evaluate_every=150,
    ),  # 5 s → 6.57 nats (the words' frequencies: 6.58)
}

SETTINGS = {
    "data": "tiny_shakespeare",
    "final_learning_rate": 0.5,
    "evaluate_every": 10,
}

METRICS = {
    "test_nats_per_context": "negative log-likelihood of a context given its centre, in the test text (nats)",
    "test_unigram_nats_per_context": "the same of the words' frequencies alone, which know no centre",
    "test_gain_nats": "by how much the first is below the second",
    "ppmi_spearman": "rank correlation of the words' similarities with those of the PPMI matrix's SVD, most frequent words",
}

EXPERIMENTS = (
    Experiment(
        "negatives", preset="shakespeare", metric="ppmi_spearman", bar=0.46, within_seconds=300,
        notes="No parity: the SVD of the PPMI matrix is another way to the same optimum, of words that are frequent enough.",
        controls=(
            Control("untrained vectors", flags={"steps": 1}),
            Control("contexts go to other centres", swap={"neighbours": "etude.language.word2vec.nulls.strangers"}),
        ),
    ),
    Experiment(
        "softmax", preset="softmax", metric="test_gain_nats", bar=0.016, within_seconds=300,
        controls=(
            Control("untrained: the words' frequencies, whatever the centre", flags={"steps": 1}),
            Control("contexts go to other centres", swap={"neighbours": "etude.language.word2vec.nulls.strangers"}),
        ),
    ),
)  # fmt: skip


class WordVectors(nn.Module):
    """`vectors` v (V, D) of words as centres, `contexts` u (V, D); they start uniform in ±1/(2D), and at zero."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(words, width).uniform_(-0.5 / width, 0.5 / width))
        self.contexts = nn.Parameter(torch.zeros(words, width))

    @torch.no_grad()
    def begin_at(self, share: Tensor) -> None:
        """Let softmax(u·v) of every word be `share` (V,): a column of ones in v and of centred logarithms in u."""
        self.vectors[:, 0], log = 1.0, share.log()
        self.contexts[:, 0] = (log - log.mean()).float()


class Passes:
    """Passes over a text: which words of it a step takes, and which occurrences a pass keeps. A function of the step."""

    def __init__(self, text: Tensor, keep: Tensor, batch: int, seed: int) -> None:
        self.text, self.keep, self.batch, self.seed = text, keep[text.long()], batch, seed
        self.parts = -(-len(text) // batch)
        self._kept: tuple[int, Tensor, Tensor] = (-1, text, text)

    def part(self, number: int) -> tuple[Tensor, int, int]:
        """(kept text of this pass, first, last): part `number`'s centres are first ≤ i < last."""
        turn, part = divmod(number, self.parts)
        if self._kept[0] != turn:
            dice = torch.rand(
                len(self.text), generator=generator(self.seed, turn, 0, "subsampling"), dtype=torch.float64
            )
            stays = dice < self.keep  # line 2
            self._kept = turn, self.text[stays], F.pad(stays.cumsum(0), (1, 0))
        _, kept, before = self._kept
        begin = part * self.batch
        return kept, int(before[begin]), int(before[min(begin + self.batch, len(self.text))])


def reaches(count: int, config: Config, stream: torch.Generator) -> Tensor:
    """(count,) int64: how far the contexts of each centre go."""
    if config.dynamic_window:
        return torch.randint(1, config.window + 1, (count,), generator=stream)
    return torch.full((count,), config.window)


def rates(counts: Tensor, shares: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """The learning rates of the rows of v and of u at the start, (V,) each: α / (1 + α·n/4).

    n is the number of terms that a batch has of a word on average, and ¼ the largest curvature of log σ. A rare word gets the sum
    of its gradients, as the paper's single updates would give it; of a word with many, the sum would overshoot.

    Args:
        counts: (V,) float64, how often each word is kept in a pass; shares: (V,) P_n; the batch is a share of the text.
    """
    kept = counts / counts.sum()
    reach = (1 + config.window) / 2 if config.dynamic_window else config.window
    pairs = config.batch * 2 * reach
    terms = pairs * (1 + config.negatives) * kept, pairs * (kept + config.negatives * shares)
    alpha = config.learning_rate
    return tuple(alpha / (1 + alpha * n / 4) for n in terms)  # type: ignore[return-value]


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The two tables for the words of the spec."""
    return {"model": WordVectors(len(spec.extra["words"]), config.width)}


@method("language/word2vec", paper="arXiv:1310.4546", section="6.8.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    content = data.text(config.data)
    parts = [split_words(part) for part in split(content.text)]  # line 1
    vocabulary = Vocabulary(parts[0], config.least_count)
    if len(vocabulary) < 2:
        raise UserError(f"{content.name} has fewer than two words that come {config.least_count} times (--least-count)")
    learned, validation, test = (vocabulary.encode(part) for part in parts)
    keep = keep_probability(vocabulary.counts, config.subsample)
    shares = noise_probability(vocabulary.counts, config.noise_power)
    known = {"words": vocabulary.words, "counts": vocabulary.counts.tolist()}
    run.describe(Spec(extra=known), content)

    logistic = config.objective == "negatives"
    model = run.place(WordVectors(len(vocabulary), config.width))
    kept = vocabulary.counts * keep
    by_frequency = kept / kept.sum()
    if not logistic:
        model.begin_at(by_frequency)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)  # of the softmax, whose gradients are dense
    run.track(model=model, **({} if logistic else {"optimizer": optimizer}))
    noise, passes = Noise(shares, torch.get_num_threads()), Passes(learned, keep, config.batch, run.seed)
    own = config.negatives if logistic and not config.shared_negatives else 0
    block = (config.shared_negatives or 16) if logistic else 1  # centres that are computed together

    held_out = {
        name: held_out_pairs(text, keep, config, generator(run.seed, 0, 0, name + " pairs"))
        for name, text in (("validation", validation), ("test", test))
    }
    if not all(len(centre) for centre, _ in held_out.values()):
        raise UserError(f"{content.name} is too short: its last twentieths need two known words side by side each")
    offset = shares.log().float().to(run.device) if logistic else None
    v, u = model.vectors.detach(), model.contexts.detach()
    slow = [rate.float().to(run.device) for rate in rates(kept, shares, config)]
    by = objective
    if run.device.type == "cpu" and v.dtype == torch.float32:
        by = Kernels(torch.get_num_threads())  # the same functions
        if logistic:
            torch.set_num_threads(1)  # the kernels take the threads

    for step in run.steps(config.steps):
        fall = max(1 - step / config.steps, config.final_learning_rate)
        rate_v, rate_u = fall * slow[0], fall * slow[1]
        text, first, last = passes.part(step * run.world + run.rank)
        reach = reaches(last - first, config, run.generator("reach", step))
        key = fold(run.seed, step, run.rank, "noise")
        pairs = neighbours(text, first, last, reach, noise, own, key)  # line 3
        fill = (first - last) % block if first < last else block  # whole blocks; the last rows have no pairs
        rows = F.pad(text[first:last], (0, fill))
        centre, targets, rows = (part.to(run.device) for part in (*pairs, rows))
        count = torch.bincount(centre, minlength=len(rows))
        words, more_u = rows[:0], None  # noise words that a block shares, or ∂/∂u of the softmax's denominators
        if logistic:
            if not own:
                words = noise.draw(len(rows), key).to(run.device)
            weight = (count * (config.negatives / block)).view(-1, block)
            value, slope, by_v, by_noise = by.negatives(v, u, rows, centre, targets, words, weight)
        else:
            mine, by_noise = v.index_select(0, rows), v[:0]
            value, slope, by_v = objective.terms(mine, u, centre, targets, False)
            more, more_v, more_u = objective.softmax_terms(mine, u, count)
            value, by_v = value + more, by_v.add_(more_v)
        loss = -value / max(1, len(centre))
        into, direct = (v, u), logistic and run.world == 1
        if direct:
            run.average(loss=loss)
        else:
            into = torch.zeros_like(v), torch.zeros_like(u)
            if not logistic:
                rate_v = rate_u = torch.full_like(slow[0], -1 / max(1, len(centre)))
        by.spread(into[1], v, rows, centre, targets, slope, words, by_noise, rate_u)  # line 4
        by.add(into[0], rows, by_v, rate_v)
        if more_u is not None:
            into[1].add_(more_u * rate_u.unsqueeze(1))
        if not direct:
            model.vectors.grad, model.contexts.grad = into
            run.average(model, loss=loss)
            if logistic:  # the sum of the changes on all ranks, as of one batch
                v.add_(into[0], alpha=run.world)
                u.add_(into[1], alpha=run.world)
            else:
                optimizer.param_groups[0]["lr"] = config.learning_rate * fall
                optimizer.step()
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            run.log(validation_nats_per_context=nats(v, u, offset, *held_out["validation"]))
    table = v.cpu()
    compared = min(COMPARED, len(vocabulary))
    counts = pair_counts(learned, compared, config.window, config.dynamic_window)
    run.artifact(
        "map",
        map_figure(vocabulary.words, table),
        "Frequent words, the very commonest left out: their unit vectors along the two directions in which they differ most.",
    )
    run.artifact("neighbours", neighbour_table(vocabulary.words, table), "Words with their nearest by cosine.")
    tested = nats(v, u, offset, *held_out["test"])  # line 5
    alone = -float(by_frequency.log()[held_out["test"][1]].mean())
    return {
        "test_nats_per_context": tested,
        "test_unigram_nats_per_context": alone,
        "test_gain_nats": alone - tested,
        "ppmi_spearman": agreement(table[:compared], ppmi_vectors(counts, config.width)),
    }


def held_out_pairs(text: Tensor, keep: Tensor, config: Config, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """(centres, contexts), word numbers (P,) int64 each, of a text subsampled and read as the training text is."""
    kept = text[torch.rand(len(text), generator=stream, dtype=torch.float64) < keep[text.long()]]
    centre, targets = neighbours(kept, 0, len(kept), reaches(len(kept), config, stream))
    return kept[centre.long()].long(), targets[:, 0].long()


@torch.no_grad()
def nats(v: Tensor, u: Tensor, offset: Tensor | None, centre: Tensor, context: Tensor) -> float:
    """−mean log p(context | centre) over pairs (P,), p = softmax(u·v + offset) over the vocabulary."""
    total = 0.0
    once, place = centre.unique(return_inverse=True)
    for begin in range(0, len(once), 512):  # each centre's distribution is computed once
        score = v[once[begin : begin + 512].to(v.device)] @ u.t()
        log_p = (score if offset is None else score + offset).log_softmax(1).cpu()
        inside = (place >= begin) & (place < begin + 512)
        total -= float(log_p[place[inside] - begin, context[inside]].double().sum())
    return total / len(centre)


@dataclass(frozen=True)
class Sample:
    text: str = ""
    """A word, or a sum such as "king - man + woman"; empty: the most frequent word of four letters or more."""
    count: Count = 10
    """Neighbours to name."""
    similarity: str = ""
    """File of human similarity scores, such as wordsim353/combined.csv: print Spearman's ρ."""
    analogies: str = ""
    """File of analogy questions, such as questions-words.txt: print how many are answered."""
    save: Literal["no", "text", "binary"] = "no"
    """Write the vectors in word2vec's text or binary format, which gensim reads."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Neighbours of a word or of a sum of words, scores on official files, and files of vectors."""
    words, vectors = loaded.spec.extra["words"], loaded.model.vectors.detach().cpu()
    lines = []
    if options.text or not (options.similarity or options.analogies or options.save != "no"):
        query = options.text or next((word for word in words if len(word) > 3), words[0])
        terms = parse(query, words)
        unit = F.normalize(vectors, dim=1)
        total = torch.stack([sign * unit[place] for sign, place in terms]).sum(0)
        row, cosine = nearest(vectors, total, options.count, [place for _, place in terms])
        lines += [query, *(f"  {words[i]:<16} {c:.3f}" for i, c in zip(row.tolist(), cosine.tolist()))]
    if options.similarity:
        rho, count = similarity_score(options.similarity, words, vectors)
        lines.append(f"word similarity: Spearman {rho:.3f} on {count} pairs")
    if options.analogies:
        for name, (right, asked) in analogy_scores(options.analogies, words, vectors).items():
            if asked:
                lines.append(f"analogies {name}: {right} of {asked}")
    if options.save != "no":
        path = folder / ("vectors.txt" if options.save == "text" else "vectors.bin")
        write_vectors(path, words, vectors, options.save == "binary")
    return "\n".join(lines)
