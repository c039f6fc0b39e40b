"""R-CNN's classifiers and regressions are scikit-learn's."""

import numpy as np
import pytest
import torch

from etude.detection.parts.linear import ridge, support_vectors


@pytest.mark.parametrize("slack", [1e-3, 1.0])
def test_support_vector_machines_are_scikit_learns(slack):
    """E39: the notes say "classification"; the paper's classifiers are linear machines on frozen features."""
    from sklearn.svm import LinearSVC

    g = np.random.default_rng(0)
    x = g.normal(size=(200, 6))
    sign = np.where(x @ g.normal(size=6) + 0.8 * g.normal(size=200) > 0.4, 1.0, -1.0)
    peer = LinearSVC(C=slack, tol=1e-12, max_iter=1_000_000, dual=False).fit(x, sign)
    weight, bias = support_vectors(torch.from_numpy(x), torch.from_numpy(sign), slack)
    np.testing.assert_allclose(weight.numpy(), peer.coef_[0], atol=1e-7, rtol=1e-5)
    np.testing.assert_allclose(float(bias), peer.intercept_[0], atol=1e-7, rtol=1e-5)


def test_regression_is_scikit_learns():
    from sklearn.linear_model import Ridge

    g = np.random.default_rng(1)
    x, t = g.normal(size=(50, 5)), g.normal(size=(50, 4))
    weight, bias = ridge(torch.from_numpy(x), torch.from_numpy(t), 3.0)
    peer = Ridge(alpha=3.0).fit(x, t)
    np.testing.assert_allclose(weight.numpy(), peer.coef_, atol=1e-10)
    np.testing.assert_allclose(bias.numpy(), peer.intercept_, atol=1e-10)
    weight, bias = ridge(torch.zeros(0, 5), torch.zeros(0, 4), 1.0)
    assert weight.shape == (4, 5)
    assert bias.abs().max() == weight.abs().max() == 0
