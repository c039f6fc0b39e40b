"""The training of a translator written out in plain arithmetic, against which the loops of the room are held.

Not a test itself: `runpy.run_path` brings it into the tests of the methods. Only the documented random streams are etude's: the
seeds of the start, of a step and of a batch of strings.
"""

import json
import math

import pytest
import sacrebleu
import torch

from etude.core.randomness import fold, generator
from etude.sequence.parts.translating import reversals

EOS, BOS = 2, 1


def rows(result):
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def numbers(text):
    return [ord(letter) - 97 + 3 for letter in text]


def strings(seed, step, batch, longest):
    """The pairs of a step as rows of numbers: sources with EOS, targets without."""
    return [(numbers(a) + [EOS], numbers(b)) for a, b in reversals(batch, longest, generator(seed, step, 0, "strings"))]


def held(part, longest):
    return reversals(500, longest, generator(0, 0, 0, part))


def tensors(pairs):
    """source, lengths, before and after, filled with zeros."""
    wide, tall = max(len(a) for a, _ in pairs), max(len(b) for _, b in pairs) + 1
    source = torch.tensor([a + [0] * (wide - len(a)) for a, _ in pairs])
    before = torch.tensor([[BOS, *b] + [0] * (tall - 1 - len(b)) for _, b in pairs])
    after = torch.tensor([[*b, EOS] + [0] * (tall - 1 - len(b)) for _, b in pairs])
    return source, torch.tensor([len(a) for a, _ in pairs]), before, after


def loss_of(logits, after, smoothing):
    """−log p of the tokens asked for, with `smoothing` of each target spread over all tokens, over what is no padding."""
    log_p, total, count = logits.log_softmax(-1), 0.0, 0
    for b in range(len(after)):
        for t in range(after.shape[1]):
            if after[b, t]:
                total = total - (1 - smoothing) * log_p[b, t, after[b, t]] - smoothing * log_p[b, t].mean()
                count += 1
    return total / count


def mean_nats(model, pairs):
    total, count = 0.0, 0
    for a, b in pairs:
        source, lengths, before, after = tensors([(numbers(a) + [EOS], numbers(b))])
        total += float(loss_of(model(source, lengths, before), after, 0.0)) * (len(b) + 1)
        count += len(b) + 1
    return total / count


def greedy(model, text, longest):
    """The whole prefix read anew for each token."""
    source, written = torch.tensor([numbers(text) + [EOS]]), [BOS]
    while len(written) < longest + 2 and (len(written) == 1 or written[-1] != EOS):
        logits = model(source, torch.tensor([source.shape[1]]), torch.tensor([written]))
        written.append(int(logits[0, -1].argmax()))
    return "".join(chr(token - 3 + 97) for token in written if token > EOS)


class Updates:
    """Clipping and Adam in plain arithmetic."""

    def __init__(self, model, config, steps):
        self.model, self.config, self.steps = model, config, steps
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
        self.norms = []

    def __call__(self, loss, step):
        parameters, config, k = dict(self.model.named_parameters()), self.config, step + 1
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found)}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        self.norms.append(norm)
        shrink = min(1.0, config["clip_norm"] / (norm + 1e-6))
        rate = config["learning_rate"] * (1 - (1 - config["final_learning_rate"]) * step / self.steps)
        with torch.no_grad():
            for name, p in parameters.items():
                g, (m, v) = gradients[name] * shrink, self.moments[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(config["beta2"]).add_((1 - config["beta2"]) * g * g)
                p.sub_(rate * (m / (1 - 0.9**k)) / ((v / (1 - config["beta2"] ** k)).sqrt() + 1e-8))


def seed_of_step(seed, step):
    return fold(seed, step, 0, "step")


def scores_of(model, pairs, longest):
    told = [greedy(model, a, longest) for a, _ in pairs]
    return sum(said == b for said, (_, b) in zip(told, pairs)) / len(pairs), mean_nats(model, pairs)


def bleu_of(told, pairs):
    return pytest.approx(sacrebleu.corpus_bleu(told, [[b for _, b in pairs]]).score)
