"""Scores against scikit-learn, against their definitions, and the same however the data are cut into batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics as reference
import torch

from etude.blocks import metrics

CLASSES = 5


@pytest.fixture(scope="module")
def scores() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (203, 5) and targets that agree with them about half the time; class 4 is never the truth."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(203, CLASSES, generator=generator)
    random = torch.randint(CLASSES - 1, (203,), generator=generator)
    right = (torch.rand(203, generator=generator) < 0.4) & (logits.argmax(-1) < CLASSES - 1)
    return logits, torch.where(right, logits.argmax(-1), random)


def test_against_scikit_learn(scores: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = scores
    truth, predicted = targets.numpy(), logits.argmax(-1).numpy()
    matrix = metrics.confusion_matrix(targets, logits.argmax(-1), CLASSES)
    probabilities = logits.double().softmax(-1).numpy()
    labels = list(range(CLASSES))
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(truth, predicted, labels=labels))
    pairs = [
        (metrics.accuracy(logits, targets), reference.accuracy_score(truth, predicted)),
        (metrics.nll(logits, targets), reference.log_loss(truth, probabilities, labels=labels)),
        (metrics.macro_f1(matrix), reference.f1_score(truth, predicted, average="macro")),
        (metrics.mean_iou(matrix), reference.jaccard_score(truth, predicted, average="macro")),
    ]
    for k in (1, 2, 4):
        expected = reference.top_k_accuracy_score(truth, probabilities, k=k, labels=labels)
        pairs.append((metrics.top_k_accuracy(logits, targets, k), expected))
    for ours, theirs in pairs:
        assert float(ours) == pytest.approx(float(theirs), abs=1e-12)


def test_classes_that_never_occur_are_left_out() -> None:
    truth, predicted = torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2])
    matrix = metrics.confusion_matrix(truth, predicted, 9)
    assert metrics.macro_f1(matrix) == pytest.approx(reference.f1_score(truth, predicted, average="macro"))
    assert metrics.mean_iou(matrix) == pytest.approx(reference.jaccard_score(truth, predicted, average="macro"))
    assert metrics.mean_iou(torch.zeros(3, 3)).isnan()


@pytest.mark.parametrize("sizes", [[203], [1] * 203, [100, 103], [200, 3]])
def test_batches_do_not_matter(scores: tuple[torch.Tensor, torch.Tensor], sizes: list[int]) -> None:
    logits, targets = scores
    targets = targets.where(torch.arange(203) % 7 != 0, torch.tensor(-100))
    parts = list(zip(logits.split(sizes), targets.split(sizes)))
    total = sum((metrics.nll(x, y, "sum") for x, y in parts), torch.tensor(0.0).double())
    kept = int((targets != -100).sum())
    assert float(total) / kept == pytest.approx(float(metrics.nll(logits, targets)), rel=1e-12)
    assert float((total / kept).exp()) == pytest.approx(float(metrics.perplexity(logits, targets)), rel=1e-12)
    each = torch.cat([metrics.nll(x, y, "none") for x, y in parts])
    torch.testing.assert_close(each, metrics.nll(logits, targets, "none"))
    predicted = logits.argmax(-1)
    whole = metrics.confusion_matrix(targets, predicted, CLASSES, ignore_index=-100)
    summed = sum(metrics.confusion_matrix(y, x.argmax(-1), CLASSES, ignore_index=-100) for x, y in parts)
    assert torch.equal(torch.as_tensor(summed), whole)
    assert int(whole.sum()) == kept


def test_uniform_prediction_has_perplexity_v_and_log2_v_bits() -> None:
    logits, targets = torch.zeros(4, 6, 11), torch.randint(11, (4, 6))
    assert float(metrics.perplexity(logits, targets)) == pytest.approx(11)
    # four items of 3 × 8 × 8 numbers, each number uniform over 256 levels: 8 bits
    assert metrics.bits_per_dim(3 * 64 * math.log(256), 3 * 64) == pytest.approx(8)


def test_constant_scores_earn_no_free_places() -> None:
    targets = torch.arange(10)
    assert float(metrics.top_k_accuracy(torch.zeros(10, 10), targets, 3)) == pytest.approx(0.3)
    assert float(metrics.accuracy(torch.zeros(10, 10), targets)) == pytest.approx(0.1)
    for k in (0, 11):
        with pytest.raises(ValueError, match="between 1 and"):
            metrics.top_k_accuracy(torch.zeros(2, 10), targets[:2], k)


def test_labels_outside_the_matrix_are_refused() -> None:
    with pytest.raises(IndexError, match="predicted"):
        metrics.confusion_matrix(torch.tensor([0]), torch.tensor([3]), 3)
    with pytest.raises(IndexError, match="truth"):
        metrics.confusion_matrix(torch.tensor([-1]), torch.tensor([0]), 3)
    with pytest.raises(ValueError, match="shape"):
        metrics.confusion_matrix(torch.tensor([0]), torch.tensor([0, 1]), 3)


def _brute_force_ece(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    total, seen = 0.0, 0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins or (m == 1 and c == 0)]
        seen += len(inside)
        if inside:
            total += len(inside) / len(confidence) * abs(correct[inside].mean() - confidence[inside].mean())
    assert seen == len(confidence)
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_calibration_error_by_brute_force_with_every_edge(bins: int) -> None:
    generator = np.random.default_rng(bins)
    confidence = np.concatenate([generator.random(400), np.arange(bins + 1) / bins, [0.0, 1.0, 1.0]])
    correct = generator.random(len(confidence)) < confidence
    ours = metrics.expected_calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct), bins)
    assert float(ours) == pytest.approx(_brute_force_ece(confidence, correct, bins), abs=1e-12)


def test_reliability_against_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(1000)
    correct = generator.random(1000) < confidence
    hits, means = sklearn.calibration.calibration_curve(correct, confidence, n_bins=10)
    counts, confidences, accuracies = metrics.reliability(torch.from_numpy(confidence), torch.from_numpy(correct), 10)
    np.testing.assert_allclose(accuracies, hits, atol=1e-12)
    np.testing.assert_allclose(confidences, means, atol=1e-12)
    assert int(counts.sum()) == 1000


def test_certainty_counts() -> None:
    sure = torch.ones(4)
    assert float(metrics.expected_calibration_error(sure, torch.tensor([True, True, False, False]))) == pytest.approx(
        0.5
    )
    assert float(metrics.expected_calibration_error(0 * sure, torch.zeros(4))) == 0
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            metrics.expected_calibration_error(torch.tensor([wrong]), torch.tensor([True]))


def test_shapes_that_would_be_broadcast_are_refused():
    scores, targets = torch.eye(4), torch.arange(4)
    assert float(metrics.accuracy(scores, targets)) == float(metrics.top_k_accuracy(scores, targets, 1)) == 1
    for wrong in (targets[:, None], targets[:1]):
        with pytest.raises(ValueError, match=r"scores of shape \(4, 4\) need targets of shape \(4,\), got \("):
            metrics.accuracy(scores, wrong)
        with pytest.raises(ValueError, match="need targets of shape"):
            metrics.top_k_accuracy(scores, wrong, 2)
