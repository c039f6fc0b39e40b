"""ELMo written out word by word: letters, windows, gates and sums in loops, from a dictionary of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def spelled(word, lexicon):
    """The numbers of a word's letters, or of a mark's sign (None, "<" or ">"), as the network counts them."""
    signs = {"<": [2, 4, 3], ">": [2, 5, 3]}
    if word in signs:
        return signs[word]
    return [2, *(6 + lexicon.letters.index(a) if a in lexicon.letters else 1 for a in word[1:][-48:]), 3]


def vector(weights, ids):
    """x of one word."""
    table = weights["spelled.letters.weight"]
    rows, found = [table[i] for i in ids], []
    for k in range(20):
        if f"spelled.convolutions.{k}.weight" not in weights:
            break
        kernel, bias = weights[f"spelled.convolutions.{k}.weight"], weights[f"spelled.convolutions.{k}.bias"]
        size = kernel.shape[2]
        padded = rows + [torch.zeros_like(table[0])] * (size - len(rows))
        windows = [
            sum(kernel[:, :, j] @ padded[i + j] for j in range(size)) + bias
            for i in range(max(1, len(rows) - size + 1))
        ]
        found.append(torch.stack(windows).max(0).values)
    x = torch.cat(found).clamp(min=0)
    for k in range(20):
        name = f"spelled.highways.{k}."
        if f"{name}gate.bias" not in weights:
            break
        t = torch.sigmoid(weights[f"{name}gate.weight"] @ x + weights[f"{name}gate.bias"])
        new = (weights[f"{name}transform.weight"] @ x + weights[f"{name}transform.bias"]).clamp(min=0)
        x = t * new + (1 - t) * x
    return weights["spelled.projection.weight"] @ x + weights["spelled.projection.bias"]


def lstm(weights, name, xs):
    """What one LSTM says at each of the vectors, one after the other."""
    inward, across = weights[f"{name}weight_ih_l0"], weights[f"{name}weight_hh_l0"]
    bias = weights[f"{name}bias_ih_l0"] + weights[f"{name}bias_hh_l0"]
    down = weights.get(f"{name}weight_hr_l0")
    h, c, said = torch.zeros_like(across[0]), torch.zeros_like(bias[: len(bias) // 4]), []
    for x in xs:
        i, f, g, o = (inward @ x + across @ h + bias).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        h = h if down is None else down @ h
        said.append(h)
    return said


def states(weights, words, lexicon, read="letters"):
    """(→h, ←h) of each layer, lists of vectors over mark, words, mark; words begin with a sign of their own ("=word")."""
    marked = ["<", *words, ">"]
    if read == "letters":
        x = [vector(weights, spelled(word, lexicon)) for word in marked]
    else:
        x = [weights["embedding.weight"][n] for n in numbers(words, lexicon)]
    found, layer = [(x, x)], 0
    while f"forwards.{layer}.weight_ih_l0" in weights:
        ahead, back = found[-1]
        new = (
            lstm(weights, f"forwards.{layer}.", ahead),
            lstm(weights, f"backwards.{layer}.", back[::-1])[::-1],
        )
        if layer:
            new = tuple([a + b for a, b in zip(one, old)] for one, old in zip(new, (ahead, back)))
        found.append(new)
        layer += 1
    return found


def numbers(words, lexicon):
    """1, the words' numbers, 2."""
    return [1, *(3 + lexicon.words.index(w[1:]) if w[1:] in lexicon.words else 0 for w in words), 2]


def nats(weights, words, lexicon, read="letters"):
    """−log p of each word and the closing mark forwards, and of the opening mark and each word backwards."""
    ahead, back = states(weights, words, lexicon, read)[-1]
    ids = numbers(words, lexicon)
    logits = [F.linear(h, weights["readout.weight"], weights["readout.bias"]).log_softmax(0) for h in (*ahead, *back)]
    n = len(ids)
    return (
        [-logits[t][ids[t + 1]] for t in range(n - 1)],
        [-logits[n + t][ids[t - 1]] for t in range(1, n)],
    )


def features(weights, words, lexicon, read="letters"):
    """[→h; ←h] of each layer at each word: (words, L + 1, 2P)."""
    layers = states(weights, words, lexicon, read)
    return torch.stack(
        [torch.stack([torch.cat([ahead[t], back[t]]) for ahead, back in layers]) for t in range(1, len(words) + 1)]
    )


def mixed(weights, layers, norm=True):
    """Logits of the tags from features (words, L + 1, 2P)."""
    share = torch.exp(weights["mixture.s"])
    share = share / share.sum()
    if norm:
        mean = layers.mean(-1, keepdim=True)
        layers = (layers - mean) / ((layers - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    elmo = weights["mixture.gamma"] * sum(share[j] * layers[:, j] for j in range(layers.shape[1]))
    return elmo @ weights["readout.weight"].t() + weights["readout.bias"]
