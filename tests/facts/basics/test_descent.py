"""Descent paths against closed forms: contraction rates, the saddle, the ridge, rotation (E08, E09, E11)."""

import math

import numpy as np
import pytest
import torch

import etude
from etude.basics.descent import NAMES, Config, curvatures, losses, movie, saddle, settings, starts, turn, valley

I = {name: i for i, name in enumerate(NAMES)}  # noqa: E741


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Metrics and path (steps + 1, 9, 3, 2) of the default run and of one in an upright valley."""

    def go(name, **flags):
        done = etude.run(
            "basics/descent", out=tmp_path_factory.mktemp(name) / "run", quiet=True, seed=0, frames=0, **flags
        )
        return done.metrics, etude.load(done.folder).state["held"]["path"]

    return {"turned": go("turned"), "upright": go("upright", angle=0.0)}


def test_curvatures_are_the_hessians():
    theta = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shapes = (lambda t: valley(t, 50.0, 20.0), saddle, saddle)
    automatic = [torch.autograd.functional.hessian(shape, point) for shape, point in zip(shapes, theta)]
    torch.testing.assert_close(curvatures(theta, 50.0, 20.0), torch.stack(automatic), rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(curvatures(theta, 50.0, 20.0)[0]).tolist() == pytest.approx([1.0, 50.0])
    parts = [shape(point).item() for shape, point in zip(shapes, theta)]
    assert losses(theta, 50.0, 20.0).tolist() == pytest.approx(parts)
    assert saddle(torch.tensor([0.0, math.sqrt(2)])).item() == pytest.approx(-1.0)


def test_paths_in_the_valley_contract_at_the_closed_form_rates(runs):
    """Gradient descent is (I − αH)ᵏ exactly; heavy ball and Nesterov have the rates of Lessard et al., table 1."""
    metrics, path = runs["turned"]
    h = curvatures(starts(30.0), 100.0, 30.0)[0]
    power = torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) - 2 / 101 * h, 300)
    torch.testing.assert_close(torch.from_numpy(path[300, 0, 0]), power @ starts(30.0)[0], rtol=1e-9, atol=0)
    distance = np.linalg.norm(path[:, :, 0], axis=-1)
    # the best (α, μ) make the slowest eigenvalue ρ a double one: the distance falls like k ρᵏ
    for name, rate, power in (("sgd", 99 / 101, 0), ("momentum", 9 / 11, 1), ("nesterov", 1 - 2 / 301**0.5, 1)):
        measured = math.log(distance[400, I[name]] / distance[100, I[name]] / 4**power) / 300
        assert measured == pytest.approx(math.log(rate), rel=2e-3), name
    assert metrics["steps_sgd"] == pytest.approx(math.log(1e-6 / math.hypot(2, 0.2)) / math.log(99 / 101), abs=1)
    assert metrics["momentum_speedup"] >= 5
    assert metrics["steps_newton"] == 1
    assert distance[1, I["newton"]] < 1e-14
    # damped Newton contracts by λ/(λ + 1) along the valley
    assert distance[20, I["damped"]] / distance[19, I["damped"]] == pytest.approx(3 / 4, rel=1e-6)


def test_rmsprop_ends_in_a_cycle_as_wide_as_its_rate(runs):
    """At a constant rate: ±α/2 in each coordinate, so it never has a `steps_rmsprop`."""
    metrics, path = runs["turned"]
    assert np.abs(path[-2:, I["rmsprop"], 0]) == pytest.approx(np.full((2, 2), 0.015), rel=1e-3)
    assert np.sign(path[-1, I["rmsprop"], 0]).tolist() == (-np.sign(path[-2, I["rmsprop"], 0])).tolist()
    assert "steps_rmsprop" not in metrics
    assert "steps_noisy" not in metrics


def test_turning_the_valley_matters_to_diagonal_scalings_only(runs):
    """Paths of the scale-free and of the whole-matrix rules turn with the valley; AdaGrad's advantage is gone."""
    (_, turned), (upright_metrics, upright) = runs["turned"], runs["upright"]
    r = turn(30.0).numpy()
    for name in ("sgd", "momentum", "nesterov", "newton", "damped"):
        np.testing.assert_allclose(turned[:60, I[name], 0], upright[:60, I[name], 0] @ r.T, rtol=1e-7, atol=1e-10)
    for name in ("rmsprop", "adagrad", "adam"):
        assert np.abs(turned[5, I[name], 0] - r @ upright[5, I[name], 0]).max() > 1e-2
    assert upright_metrics["steps_adagrad"] * 5 < runs["turned"][0]["steps_adagrad"]


def test_first_steps_are_the_rates(runs):
    """E11: bias-corrected Adam moves α in each coordinate with a gradient; RMSProp, uncorrected, α/√(1 − β)."""
    _, path = runs["turned"]
    first = np.abs(path[1] - path[0])
    assert first[I["adam"], 0] == pytest.approx([0.1, 0.1], rel=1e-6)
    assert first[I["adam"], 1] == pytest.approx([0.1, 0.1], rel=1e-6)  # though ∂L/∂y is 0.02 there
    assert first[I["adagrad"], 1] == pytest.approx([0.5, 0.5], rel=1e-6)
    assert first[I["rmsprop"], 1] == pytest.approx([0.03 / 0.1**0.5] * 2, rel=1e-4)


def test_plain_newton_goes_to_the_saddle(runs):
    """E08: and the eight others, damped Newton among them, to a minimum."""
    metrics, path = runs["turned"]
    assert metrics["saddle_distance_newton"] < 1e-8
    assert metrics["escaped"] == 8
    ends = path[-1, :, 1]
    exact = [I[name] for name in ("sgd", "momentum", "nesterov", "adagrad", "adam", "damped")]
    assert np.abs(ends[exact]) == pytest.approx(np.tile([0, math.sqrt(2)], (len(exact), 1)), abs=1e-6)


def test_only_noise_leaves_the_ridge(runs):
    """E09: without noise ∂L/∂y stays 0, which ÷√s alone would turn into NaN; with noise the ridge is left."""
    metrics, path = runs["turned"]
    quiet = [i for i, name in enumerate(NAMES) if name != "noisy"]
    assert np.isfinite(path).all()
    assert (path[:, quiet, 2, 1] == 0).all()
    assert (metrics["ridge_escaped_noisy"], metrics["ridge_escaped_others"]) == (1, 0)
    assert abs(abs(path[-1, I["noisy"], 2, 1]) - math.sqrt(2)) < 0.3


def test_rates_follow_from_kappa():
    rules, rates = settings(Config(kappa=25.0))
    assert rates[:4, 0].tolist() == pytest.approx([2 / 26, 2 / 26, 4 / 36, 4 / 76])
    assert [rule is None for rule in rules] == [False] * 7 + [True] * 2
    assert torch.equal(rates[7:], torch.ones(2, 3, dtype=torch.float64))


def test_the_movie_moves():
    path = np.cumsum(np.random.default_rng(0).normal(size=(11, 9, 3, 2)) / 10, axis=0)
    frames = movie(path, Config(frames=25))
    assert len(frames) == 25
    assert frames[0].size == frames[-1].size
    assert frames[0].tobytes() != frames[4].tobytes()
