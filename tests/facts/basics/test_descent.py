"""Descent paths against closed forms and torch's optimizers: rates, the saddle, the ridge, rotation (E08, E09, E11)."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch

import etude
from etude.basics import descent
from etude.basics.descent import NAMES, Config, curvatures, losses, movie, saddle, settings, starts, turn, valley
from etude.core.errors import RunError
from etude.core.randomness import generator

I = {name: i for i, name in enumerate(NAMES)}  # noqa: E741


@contextlib.contextmanager
def without_pictures():
    """They cost more than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("paths_figure", "losses_figure"):
            patch.setattr(descent, name, lambda *_: "")
        yield


@pytest.fixture
def undrawn():
    with without_pictures():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Metrics and path (steps + 1, 9, 3, 2) of the default run and of one in an upright valley."""

    def go(name, **flags):
        with without_pictures():
            done = etude.run(
                "basics/descent", out=tmp_path_factory.mktemp(name) / "run", quiet=True, seed=0, frames=0, **flags
            )
        return done.metrics, etude.load(done.folder).state["held"]["path"]

    return {"turned": go("turned"), "upright": go("upright", angle=0.0, steps=400)}


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


@pytest.mark.parametrize("count", [1, 12, 25])
def test_the_movie_moves(count):
    path = np.cumsum(np.random.default_rng(0).normal(size=(11, 9, 3, 2)) / 10, axis=0)
    frames = movie(path, Config(frames=count))
    assert len(frames) == count
    if count == 1:
        return
    assert frames[0].size == frames[-1].size
    assert frames[0].tobytes() != frames[8].tobytes()


def value(theta, problem, config):
    """The loss of one point, written once more: the valley by its eigenvectors, the saddle by its polynomial."""
    if problem:
        return theta[0] ** 2 - theta[1] ** 2 + theta[1] ** 4 / 4
    c, s = math.cos(math.radians(config.angle)), math.sin(math.radians(config.angle))
    return ((c * theta[0] + s * theta[1]) ** 2 + config.kappa * (c * theta[1] - s * theta[0]) ** 2) / 2


def torchs(name, point, problem, config):
    """torch's optimizer of that name, with the best settings for the valley (Lessard et al., table 1)."""
    k, at = config.kappa, config.saddle_learning_rate
    root, long = math.sqrt(k), math.sqrt(3 * k + 1)
    if name in ("sgd", "noisy"):
        return torch.optim.SGD([point], lr=at if problem else 2 / (1 + k))
    if name == "momentum":
        lr = at if problem else 4 / (1 + root) ** 2
        return torch.optim.SGD([point], lr=lr, momentum=((root - 1) / (root + 1)) ** 2)
    if name == "nesterov":
        lr = at if problem else 4 / (3 * k + 1)
        return torch.optim.SGD([point], lr=lr, momentum=(long - 2) / (long + 2), nesterov=True)
    if name == "rmsprop":
        return torch.optim.RMSprop([point], lr=config.rmsprop_learning_rate, alpha=0.9, eps=1e-8)
    if name == "adagrad":
        return torch.optim.Adagrad([point], lr=config.adagrad_learning_rate, eps=1e-10)
    return torch.optim.Adam([point], lr=config.adam_learning_rate)


CHANGES = [
    {},
    {"kappa": 9.0, "angle": 75.0},
    {"noise": 0.0, "damping": 7.0},
    {
        "rmsprop_learning_rate": 0.2,
        "adagrad_learning_rate": 0.1,
        "adam_learning_rate": 0.03,
        "saddle_learning_rate": 0.2,
    },
]


@pytest.mark.parametrize("extra", CHANGES)
def test_loop_equals_a_plain_one(extra, tmp_path, undrawn):
    """Every optimizer alone on every problem, by torch.optim and torch.linalg.solve, with the same noise."""
    flags = {"steps": 12, "frames": 0} | extra
    done = etude.run("basics/descent", out=tmp_path / "run", quiet=True, seed=6, **flags)
    path, config = etude.load(done.folder).state["held"]["path"], Config(**flags)
    expected = np.zeros((13, 9, 3, 2))
    for i, name in enumerate(NAMES):
        for problem in range(3):
            point = starts(config.angle)[problem].clone().requires_grad_()
            optimizer = None if i > 6 else torchs(name, point, problem, config)
            expected[0, i, problem] = point.detach()
            for step in range(12):
                (g,) = torch.autograd.grad(value(point, problem, config), point)
                if name == "noisy":
                    noise = torch.randn(3, 2, dtype=torch.float64, generator=generator(6, step, 0, "noise"))
                    g = g + config.noise * noise[problem]
                if optimizer is None:
                    h = torch.autograd.functional.hessian(lambda p, k=problem: value(p, k, config), point.detach())
                    h += (config.damping if name == "damped" else 0.0) * torch.eye(2, dtype=h.dtype)
                    point.data -= torch.linalg.solve(h, g)
                else:
                    point.grad = g
                    optimizer.step()
                expected[step + 1, i, problem] = point.detach()
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-12)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    away = np.sqrt((expected[1:, :, 0] ** 2).sum(-1))
    assert [row["arrived"] for row in rows] == (away <= 1e-6).sum(1).tolist()
    assert [row["distance_noisy"] for row in rows] == pytest.approx(away[:, 1])


@pytest.mark.parametrize("extra", [{"steps": 60, "kappa": 4.0}, {"steps": 200, "tolerance": 0.05, "noise": 0.1}])
def test_reported_numbers_are_read_off_the_path(extra, tmp_path, undrawn):
    done = etude.run("basics/descent", out=tmp_path / "run", quiet=True, seed=6, frames=0, **extra)
    path, limit = etude.load(done.folder).state["held"]["path"], extra.get("tolerance", 1e-6)
    expected = {}
    for i, name in enumerate(NAMES):
        away = [math.hypot(*point) for point in path[:, i, 0]]
        stays = [all(d <= limit for d in away[step:]) for step in range(len(away))]
        if any(stays):
            expected[f"steps_{name}"] = stays.index(True)
    assert {"steps_sgd", "steps_momentum", "steps_newton"} <= set(expected)
    expected["momentum_speedup"] = expected["steps_sgd"] / expected["steps_momentum"]

    def left(points):
        return [min(math.hypot(x, y - 2**0.5), math.hypot(x, y + 2**0.5)) < math.hypot(x, y) for x, y in points]

    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    others = [i for i, name in enumerate(NAMES) if name != "newton"]
    assert [row["escaped"] for row in rows] == [sum(left(now[others, 1])) for now in path[1:]]
    expected["escaped"] = rows[-1]["escaped"]
    expected["saddle_distance_newton"] = math.hypot(*path[-1, I["newton"], 1])
    expected["ridge_escaped_noisy"] = float(left(path[-1, :, 2])[I["noisy"]])
    expected["ridge_escaped_others"] = sum(left(path[-1, :, 2])) - expected["ridge_escaped_noisy"]
    assert done.metrics == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_damping_that_cancels_the_curvature_is_named(tmp_path):
    """At the ridge the curvature along y is −2: with λ = 2 there is no step."""
    with pytest.raises(RunError, match="step 0 of damped Newton was not made: the Hessian is singular"):
        etude.run("basics/descent", preset="tiny", out=tmp_path / "run", quiet=True, damping=2.0)


def test_what_flies_off_is_drawn_without_a_warning(tmp_path):
    far = {"saddle_learning_rate": 5.0, "adagrad_learning_rate": 1e37}
    path = etude.run("basics/descent", preset="tiny", out=tmp_path / "run", quiet=True, steps=20, frames=0, **far)
    assert (path.folder / "artifacts" / "losses.png").is_file()
