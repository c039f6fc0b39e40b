"""word2vec: pairs by brute force, gradients by autograd, both optima on toy counts, gensim's files, scores by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from etude.core.errors import UserError
from etude.language.word2vec import (
    Vocabulary,
    analogy_scores,
    machine,
    nearest,
    objective,
    read_vectors,
    similarity_score,
    split_words,
    write_vectors,
)
from etude.language.word2vec.kernels import Kernels
from etude.language.word2vec.nulls import strangers
from etude.language.word2vec.pairs import Noise, keep_probability, neighbours, noise_probability
from etude.language.word2vec.scores import agreement, pair_counts, ppmi_vectors, spearman
from etude.language.word2vec.showing import neighbour_table, parse


def draws(key: int, numbers: int, probability: list[float]) -> list[int]:
    """The stream of a key in Python's integers: splitmix64, then the alias table."""
    noise, found = Noise(torch.tensor(probability)), []
    for number in range(1, numbers + 1):
        z = (key + number * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        z ^= z >> 31
        word = ((z >> 32) * len(probability)) >> 32
        found.append(word if z % 2**32 < int(noise.share[word]) else int(noise.alias[word]))
    return found


# ------------------------------------------------------------------------------------------------------ words and pairs


def test_words_and_their_counts():
    assert split_words("The king's men, the KING 3 times:\nÉtude—l’été x_y") == [
        "the", "king's", "men", "the", "king", "times", "étude", "l’été", "x", "y",
    ]  # fmt: skip
    known = Vocabulary(["b", "a", "c", "a", "b", "d", "a"], 2)
    assert known.words == ["a", "b"]
    assert known.counts.tolist() == [3, 2]
    assert known.encode(["a", "z", "b", "c", "a"]).tolist() == [0, 1, 0]


def test_keep_probability_by_hand():
    """f = 0.9 and 0.1, t = 0.01: √(t/f) + t/f; word2vec.c's ran = (√(f/t) + 1)·t/f is the same."""
    found = keep_probability(torch.tensor([90, 10]), 0.01).tolist()
    assert found == pytest.approx([(math.sqrt(f / 0.01) + 1) * 0.01 / f for f in (0.9, 0.1)])
    assert keep_probability(torch.tensor([999, 1]), 0.01).tolist()[1] == 1
    assert keep_probability(torch.tensor([90, 10]), 0).tolist() == [1, 1]


def test_noise_is_drawn_from_its_distribution():
    """The alias table holds P_n to 2⁻³²; its draws pass a χ² test, and are those of the stream in plain integers (E69)."""
    counts = torch.tensor([500, 100, 40, 7, 1])
    p = noise_probability(counts, 0.75)
    expected = torch.tensor([c**0.75 for c in counts.tolist()], dtype=torch.float64)
    torch.testing.assert_close(p, expected / expected.sum())
    noise = Noise(p)
    held = [
        sum(
            (int(noise.share[w]) if w == word else 0) + ((2**32 - int(noise.share[w])) if noise.alias[w] == word else 0)
            for w in range(5)
        )
        for word in range(5)
    ]
    assert [share / 5 / 2**32 for share in held] == pytest.approx(p.tolist(), abs=1e-9)
    found = np.bincount(noise.draw(40_000, 7).numpy(), minlength=5)
    assert stats.chisquare(found, 40_000 * p.numpy()).pvalue > 0.001
    assert noise.draw(50, 2**63 - 5).tolist() == draws(2**63 - 5, 50, p.tolist())
    assert noise.draw(50, 8).tolist() != noise.draw(50, 7).tolist()


@pytest.mark.parametrize(("first", "last"), [(0, 9), (2, 5), (7, 9), (3, 3)])
def test_pairs_equal_brute_force(first, last):
    text = torch.tensor([4, 2, 2, 0, 1, 3, 4, 0, 1], dtype=torch.int32)
    reach = torch.randint(1, 5, (last - first,))
    p = [0.5, 0.1, 0.1, 0.2, 0.1]
    centre, targets = neighbours(text, first, last, reach, Noise(torch.tensor(p)), 3, 11)
    expected = [
        (i - first, int(text[j]))
        for i in range(first, last)
        for j in range(9)
        if 0 < abs(i - j) <= int(reach[i - first])
    ]
    assert list(zip(centre.tolist(), targets[:, 0].tolist())) == expected
    assert targets[:, 1:].flatten().tolist() == draws(11, 3 * len(expected), p)
    assert neighbours(text, first, last, reach)[1].shape == (len(expected), 1)
    for threads in (2, 3):  # some with a rest
        again = neighbours(text, first, last, reach, Noise(torch.tensor(p), threads), 3, 11)
        assert torch.equal(again[0], centre)
        assert torch.equal(again[1], targets)


def test_the_null_keeps_the_words_and_loses_the_pairs():
    text = torch.arange(40, dtype=torch.int32)
    reach = torch.full((40,), 2)
    centre, targets = strangers(text, 0, 40, reach)
    true_centre, true_targets = neighbours(text, 0, 40, reach)
    assert torch.equal(centre, true_centre)
    assert sorted(targets[:, 0].tolist()) == sorted(true_targets[:, 0].tolist())
    assert (targets == true_targets).float().mean() < 0.2


# ------------------------------------------------------------------------------------------------------------ gradients


def case(dtype=torch.float64, negatives=3):
    v, u = torch.randn(6, 5, dtype=dtype), torch.randn(9, 5, dtype=dtype)
    centre = torch.tensor([0, 0, 0, 1, 3, 3, 5], dtype=torch.int32)
    return v, u, centre, torch.randint(9, (7, 1 + negatives)).int()


NONE = torch.empty(0, dtype=torch.int32)


def spread(made, into, v, centre, targets, slope, rate):
    """The step of `into` by pairs alone, each row of v the vector of its own word."""
    made.spread(into, v, torch.arange(len(v)).int(), centre, targets, slope, NONE, v[:0], rate)


@pytest.mark.parametrize("logistic", [True, False])
def test_gradients_of_pairs_equal_autograd(logistic):
    v, u, centre, targets = case(negatives=3 if logistic else 0)
    v0, u0 = v.clone().requires_grad_(), u.clone().requires_grad_()
    total = 0
    for i, row in zip(centre.tolist(), targets.tolist()):
        positive = u0[row[0]] @ v0[i]
        total = total + (positive.sigmoid().log() if logistic else positive)
        for noise in row[1:]:
            total = total + (-(u0[noise] @ v0[i])).sigmoid().log()
    by_v, by_u = torch.autograd.grad(total, [v0, u0])
    value, slope, uphill = objective.terms(v, u, centre, targets, logistic)
    into, rate = torch.zeros_like(u), torch.rand(9, dtype=u.dtype)
    spread(objective, into, v, centre, targets, slope, rate)
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-12)
    torch.testing.assert_close(uphill, by_v)
    torch.testing.assert_close(into, by_u * rate[:, None])
    into = torch.zeros_like(u)
    objective.add(into, torch.tensor([1, 2, 1, 0, 0, 0]), v, rate)
    torch.testing.assert_close(into[1], rate[1] * (v[0] + v[2]))


@pytest.mark.parametrize(("threads", "many", "shared"), [(1, 16, False), (2, 2, True), (3, 3, True)])
def test_machine_code_equals_the_definition(threads, many, shared):
    """Large scores, too; on any number of threads, in blocks of any length, the same bits."""
    v, u, centre, targets = case(torch.float32)
    v, rate = v * 4, torch.rand(9)
    rows = F.pad(torch.tensor([4, 1, 1, 0, 5, 2], dtype=torch.int32), (0, -6 % many))
    noise, weight = torch.randint(9, (len(rows),)).int() if shared else NONE, torch.rand(len(rows) // many, many)
    expected = objective.negatives(v, u, rows, centre, targets, noise, weight)
    results = []
    for made in (objective, Kernels(1), Kernels(threads)):
        found = made.negatives(v, u, rows, centre, targets, noise, weight)
        into = u.clone()
        made.spread(into, v, rows, centre, targets, expected[1], noise, expected[3], rate)
        results.append((*found, into))
    assert all(torch.equal(a, b) for a, b in zip(*results[1:]))
    for theirs, ours in zip(*results[:2]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, check_dtype=False)
    places, change, ours = torch.tensor([1, 2, 1, 0, 0, 0], dtype=torch.int32), torch.randn(6, 5), u.clone()
    Kernels(1).add(ours, places, change, rate)
    theirs = u.clone()
    objective.add(theirs, places, change, rate)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_many_terms_do_not_overflow():
    """Far scores in hundreds of columns: the product of odds is taken apart in time, each exponential held at 80."""
    v, u = torch.full((1, 2), 30.0), torch.full((1, 2), 1.0)
    row, both, all_of_it = torch.zeros(1).int(), torch.zeros(2).int(), torch.zeros(2, 300, dtype=torch.int32)
    value, slope, *_ = Kernels(1).negatives(v, u, row, both, all_of_it, NONE, torch.ones(1, 1))
    assert float(value) == pytest.approx(-2 * 299 * 60, rel=1e-4)
    assert slope[0, 1:].tolist() == pytest.approx([-1] * 299)


def test_many_shared_noise_words_do_not_overflow():
    """The odds of 40 noise words, e^60 each, have no product in double precision."""
    v, u = torch.full((40, 2), 30.0), torch.full((1, 2), 1.0)
    value, by_v, _ = shared(Kernels(1), v, u, torch.zeros(40).int(), torch.ones(1, 40))
    assert float(value) == pytest.approx(-40 * 40 * 60, rel=1e-4)
    assert by_v.flatten().tolist() == pytest.approx([-40.0] * 80)


def shared(made, v, u, noise, weight):
    """(value, by v, by noise) of the shared noise words alone: no pairs."""
    rows = torch.arange(len(v)).int()
    value, _, by_v, by_noise = made.negatives(v, u, rows, NONE, NONE.view(0, 1), noise, weight)
    return value, by_v, by_noise


def test_shared_noise_equals_autograd_and_own_noise_on_average():
    """The mean over all words that could be drawn, P_n-weighted, is K·Σ P_n log σ(−u·v) of each pair."""
    v, u = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    weight = torch.tensor([[2.0, 0, 1], [3, 1, 4]], dtype=torch.float64)
    rows = torch.tensor([[1, 1, 2], [0, 5, 8]])
    v0, n0 = v.clone().requires_grad_(), u[rows].clone().requires_grad_()
    total = (F.logsigmoid(-torch.einsum("bid,bmd->bim", v0, n0)) * weight[..., None]).sum()
    expected = torch.autograd.grad(total, [v0, n0])
    value, by_v, by_noise = shared(objective, v.flatten(0, 1), u, rows.flatten().int(), weight)
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-12)
    torch.testing.assert_close(by_v, expected[0].flatten(0, 1))
    torch.testing.assert_close(by_noise, expected[1].flatten(0, 1))
    p, negatives = noise_probability(torch.arange(1, 10), 0.75), 4

    def of_word(w):
        return shared(objective, v.flatten(0, 1), u, torch.full((6,), w), weight * negatives / 3)[0]

    own = negatives * (weight[..., None] * p * F.logsigmoid(-v @ u.t())).sum()
    assert float(sum(p[w] * of_word(w) for w in range(9))) == pytest.approx(float(own), rel=1e-12)


@pytest.mark.parametrize("many", [1, 5, 8, 19])
def test_shared_noise_in_machine_code_equals_the_definition(many):
    """Blocks of any length, large scores, float32; on any number of threads the same bits."""
    v, u = 3 * torch.randn(4 * many, 12), torch.randn(30, 12)
    noise, weight = torch.randint(30, (4 * many,)).int(), torch.rand(4, many)
    weight[1] = 0
    results = [shared(Kernels(count), v, u, noise, weight) for count in (1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    for ours, theirs in zip(results[0], shared(objective, v, u, noise, weight)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_exponentials_by_arithmetic():
    """Single precision within three units in the last place, cut at ±80; a NaN is not lost, in pairs and in shared noise."""
    exact = np.linspace(-80, 80, 20001)
    found = exact.astype(np.float32)
    exact = np.exp(found.astype(np.float64))
    machine.exponentials(found)
    assert np.abs(found / exact - 1).max() < 3 * 2.0**-23
    far = np.array([-1e30, 1e30, -np.inf, np.inf, np.nan], np.float32)
    machine.exponentials(far)
    assert far[:4].tolist() == pytest.approx([np.exp(-80), np.exp(80)] * 2)
    assert np.isnan(far[4])
    v, u, centre, targets = case(torch.float32)
    v[3, 0] = torch.nan
    value, slope, by_v, _ = Kernels(1).negatives(v, u, torch.arange(6).int(), centre, targets, NONE, torch.ones(6, 1))
    assert value.isnan()
    assert torch.equal(slope.isnan().all(1), centre == 3)
    assert torch.equal(by_v.isnan().any(1), torch.arange(6) == 3)
    value, by_v, _ = shared(Kernels(1), v, u, torch.arange(6).int(), torch.ones(3, 2))
    assert value.isnan()
    assert by_v.isnan().any(1).tolist() == [False, False, False, True, False, False]


def test_softmax_gradient_is_that_of_the_vocabulary():
    """E68: the denominator sums over the vocabulary. With `terms`: ∂/∂u_w = Σ_(c,o) (1[o = w] − p(w|c)) v_c."""
    v, u, centre, targets = case(negatives=0)
    count = torch.bincount(centre, minlength=6)
    v0, u0 = v.clone().requires_grad_(), u.clone().requires_grad_()
    total = sum((v0[i] @ u0.t()).log_softmax(0)[o] for i, (o,) in zip(centre.tolist(), targets.tolist()))
    expected = torch.autograd.grad(total, [v0, u0])
    value, slope, by_v = objective.terms(v, u, centre, targets, False)
    more, more_v, by_u = objective.softmax_terms(v, u, count)
    by_u = by_u.clone()
    spread(objective, by_u, v, centre, targets, slope, torch.ones(9, dtype=u.dtype))
    assert float(value + more) == pytest.approx(float(total.detach()), rel=1e-12)
    torch.testing.assert_close(by_v + more_v, expected[0])
    torch.testing.assert_close(by_u, expected[1])


# --------------------------------------------------------------------------------------------------------------- optima

COUNTS = torch.tensor([[8, 2, 3, 1], [2, 2, 5, 2], [3, 5, 2, 4], [1, 2, 4, 6]])


def listed() -> list[tuple[int, int]]:
    return [(c, o) for c in range(4) for o in range(4) for _ in range(int(COUNTS[c, o]))]


@pytest.mark.parametrize("negatives", [1, 3])
def test_optimum_of_negative_sampling_is_pmi_less_log_k(negatives):
    """Levy and Goldberg's theorem at full rank, with the words' own frequency as noise (E69): |u·v − (PMI − log k)| < 0.05.

    Every pair meets every token of the text as its noise, so the objective is the expected one; measured below 0.001.
    """
    pairs = listed()
    tokens = [o for _, o in pairs]
    centre, targets = [], []
    for c, o in pairs:
        for shift in range(len(tokens)):
            centre.append(c)
            targets.append([o, *(tokens[(shift + 7 * k) % len(tokens)] for k in range(negatives))])
    order = sorted(range(len(centre)), key=centre.__getitem__)
    centre_, targets_ = torch.tensor(centre)[order].int(), torch.tensor(targets)[order].int()
    v, u = torch.eye(4), torch.zeros(4, 4)  # v = 1 leaves u free to be any matrix: full rank
    rate = torch.full((4,), 2 / len(centre))
    for _ in range(400):
        _, slope, *_ = Kernels(1).negatives(v, u, torch.arange(4).int(), centre_, targets_, NONE, torch.ones(1, 4))
        spread(Kernels(1), u, v, centre_, targets_, slope, rate * 4)
    total = COUNTS.sum()
    pmi = (COUNTS * total / (COUNTS.sum(1, keepdim=True) * COUNTS.sum(0))).log()
    assert (v @ u.t() - (pmi - math.log(negatives))).abs().max() < 0.05


def test_optimum_of_the_softmax_is_the_conditional():
    """At full rank p(o|c) is what was counted; both tables learn."""
    pairs = torch.tensor(listed())
    centre, targets, count = pairs[:, 0].int(), pairs[:, 1:].int(), COUNTS.sum(1)
    v, u = torch.randn(4, 4), torch.zeros(4, 4)
    rate = torch.full((4,), 0.02)
    for _ in range(3000):
        _, slope, by_v = objective.terms(v, u, centre, targets, False)
        _, more_v, more_u = objective.softmax_terms(v, u, count)
        spread(objective, u, v.clone(), centre, targets, slope, rate)
        u += 0.02 * more_u
        v += 0.02 * (by_v + more_v)
    assert ((v @ u.t()).softmax(1) - COUNTS / COUNTS.sum(1, keepdim=True)).abs().max() < 0.005


# ---------------------------------------------------------------------------------------------------- files and scores

WORDS = ["the", "king", "l’été", "x"]


@pytest.mark.parametrize("binary", [False, True])
def test_files_keep_every_bit_and_gensim_reads_them(binary, tmp_path):
    vectors = torch.randn(4, 7) * torch.tensor([[1e-6], [1.0], [1e6], [0.0]])
    write_vectors(tmp_path / "ours", WORDS, vectors, binary)
    words, found = read_vectors(tmp_path / "ours", binary)
    assert words == WORDS
    assert torch.equal(found, vectors)
    with pytest.raises(UserError, match="no whole file of word vectors"):
        read_vectors(tmp_path / "ours", not binary)
    (tmp_path / "cut").write_bytes((tmp_path / "ours").read_bytes()[:-9])
    with pytest.raises(UserError, match="no whole file of word vectors"):
        read_vectors(tmp_path / "cut", binary)
    with pytest.raises(UserError, match="cannot be read"):
        read_vectors(tmp_path / "none", binary)
    models = pytest.importorskip("gensim.models", reason="gensim is not installed")
    theirs = models.KeyedVectors.load_word2vec_format(str(tmp_path / "ours"), binary=binary)
    assert theirs.index_to_key == WORDS
    assert np.array_equal(theirs.vectors, vectors.numpy())
    theirs.save_word2vec_format(str(tmp_path / "theirs"), binary=binary)
    words, found = read_vectors(tmp_path / "theirs", binary)
    assert words == WORDS
    torch.testing.assert_close(found, vectors, rtol=1e-6, atol=0)


def test_spearman_equals_scipy():
    a, b = torch.tensor([1.0, 1, 2, 5, 3, 3]), torch.tensor([2.0, 0, 0, 9, 4, 1])
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(a, torch.ones(6)) == 0
    ours, theirs = torch.randn(5, 3), torch.randn(5, 2)
    pairs = list(itertools.combinations(range(5), 2))
    sides = [[float(F.cosine_similarity(t[i], t[j], dim=0)) for i, j in pairs] for t in (ours, theirs)]
    assert agreement(ours, theirs) == pytest.approx(stats.spearmanr(*sides).statistic)


def test_similarity_of_a_file(tmp_path):
    vectors = torch.tensor([[1.0, 0], [1, 1], [0, 1]])
    for name, sign in (("combined.csv", ","), ("combined.tab", "\t")):
        rows = [
            ("Word 1", "Word 2", "Human (mean)"),
            ("a", "B", "7"),
            ("a", "c", "1"),
            ("c", "c", "10"),
            ("a", "z", "3"),
        ]
        (tmp_path / name).write_text("\n".join(sign.join(row) for row in rows))
        assert similarity_score(tmp_path / name, ["a", "b", "c"], vectors) == (pytest.approx(1.0), 3)
    (tmp_path / "bad").write_text("x\na,b,c\n")
    with pytest.raises(UserError, match="not two words and a number"):
        similarity_score(tmp_path / "bad", ["a", "b"], vectors)
    with pytest.raises(UserError, match=r"of the 4 pairs of .* 0 are known"):
        similarity_score(tmp_path / "combined.csv", ["q"], vectors)
    with pytest.raises(UserError, match="cannot be read as text"):
        similarity_score(tmp_path / "none", ["q"], vectors)


def test_analogies_of_a_file(tmp_path):
    """man : king = woman : queen; the three given words are no answers; unknown words are not asked."""
    words = ["king", "man", "woman", "queen", "other", "up", "upper"]
    vectors = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1], [1.0, 0, 1], [-1, 0, 0.2], [1, 0, 0], [1, 0.05, 0]])
    (tmp_path / "q").write_text(
        ": family\nMan King Woman Queen\nwoman queen man king\nman king woman zebra\n: wrong\nman king woman other\n: c is nearest\nup upper woman queen\n"
    )
    assert analogy_scores(tmp_path / "q", words, vectors) == {
        "family": (2, 2),
        "wrong": (0, 1),
        "c is nearest": (1, 1),
        "all": (3, 4),
    }
    (tmp_path / "bad").write_text(": a\nb c d\n")
    with pytest.raises(UserError, match="no analogy question"):
        analogy_scores(tmp_path / "bad", words, vectors)
    row, cosine = nearest(vectors, vectors[0] - vectors[1] + vectors[2], 2, [0, 1, 2])
    assert row.tolist() == [3, 5]
    assert float(cosine[0]) == pytest.approx(1)
    assert parse("king - man+woman", words) == [(1.0, 0), (-1.0, 1), (1.0, 2)]
    with pytest.raises(UserError, match="'zebra' is not among the 7"):
        parse("king zebra", words)
    with pytest.raises(UserError, match="names no word"):
        parse("+", words)
    assert neighbour_table(words, vectors).split()[:2] == ["man", "king"]


def test_counted_pairs_and_their_pmi():
    text = [0, 1, 2, 0, 3, 1, 0]
    found = pair_counts(torch.tensor(text).int(), 3, 2, True)
    expected = Counter()
    for i, j in itertools.permutations(range(7), 2):
        if abs(i - j) <= 2 and text[i] < 3 and text[j] < 3:
            expected[text[i], text[j]] += 1.0 if abs(i - j) == 1 else 0.5
    assert {(a, b): float(found[a, b]) for a in range(3) for b in range(3) if found[a, b]} == dict(expected)
    counts = COUNTS.double() + COUNTS.t()
    pmi = (counts * counts.sum() / (counts.sum(1, keepdim=True) * counts.sum(0))).log().clamp(min=0)
    whole = ppmi_vectors(counts, 4)
    eigen = torch.linalg.eigh(pmi)
    expected = eigen.eigenvectors * eigen.eigenvalues.abs().sqrt()
    torch.testing.assert_close(whole @ whole.t(), expected @ expected.t())
