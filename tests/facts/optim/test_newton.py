"""Newton's method: quadratics in one step, quadratic convergence, saddles, damping (E08)."""

import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from torch import nn

from etude.optim.newton import Newton, derivatives, newton_step, solve


def spd(n=6, seed=0):
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + torch.eye(n, dtype=torch.float64)


def test_one_step_solves_a_quadratic():
    h, c = spd(), torch.arange(6.0, dtype=torch.float64)
    theta = newton_step(lambda t: t @ h @ t / 2 - c @ t, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(theta, torch.linalg.solve(h, c), rtol=1e-11, atol=1e-12)
    half = newton_step(lambda t: t @ h @ t / 2 - c @ t, torch.ones(6, dtype=torch.float64), lr=0.5)
    torch.testing.assert_close(half, (1 + torch.linalg.solve(h, c)) / 2, rtol=1e-11, atol=1e-12)


@pytest.fixture(scope="module")
def cancer():
    """Breast cancer, standardised, labels ±1: Σ log(1 + exp(−y wᵀx)) + ½‖w‖² (C = 1, no intercept)."""
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.from_numpy((x - x.mean(0)) / x.std(0))
    return x, torch.from_numpy(2.0 * y - 1)


def objective(x, y):
    return lambda w: nn.functional.softplus(-y * (x @ w)).sum() + w @ w / 2


def test_logistic_regression_converges_quadratically(cancer):
    """The recorded trace; ‖g‖ squares each time near the end, and is below 1e-10 within 10 steps."""
    loss = objective(*cancer)
    w, trace, slopes = torch.zeros(30, dtype=torch.float64), [], []
    for _ in range(10):
        w = newton_step(loss, w)
        trace.append(loss(w).item())
        slopes.append(torch.func.grad(loss)(w).norm().item())
    golden = [156.4, 90.9, 57.0, 43.3, 38.72, 37.911, 37.8778, 37.877766]
    for value, expected in zip(trace, golden, strict=False):
        digits = len(str(expected).split(".")[1])
        assert abs(value - expected) <= 0.51 * 10**-digits
    assert slopes[6] == pytest.approx(4.0e-2, rel=0.02)
    assert slopes[7] < 0.1 * slopes[6] ** 2  # quadratic: 4e-2, 1e-4, 5e-10, then rounding
    assert slopes[8] < 0.1 * slopes[7] ** 2
    assert slopes[9] < 1e-10

    x, y = cancer
    reference = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=10000).fit(x.numpy(), y.numpy())
    assert (w - torch.from_numpy(reference.coef_[0])).abs().max() < 1e-5
    scipys = minimize(
        lambda v: loss(torch.from_numpy(v)).item(),
        torch.zeros(30).double().numpy(),
        jac=lambda v: torch.func.grad(loss)(torch.from_numpy(v)).numpy(),
        hess=lambda v: torch.autograd.functional.hessian(loss, torch.from_numpy(v)).numpy(),
        method="trust-ncg",
        options={"gtol": 1e-9},
    )
    assert (w - torch.from_numpy(scipys.x)).abs().max() < 1e-7  # as far as trust-ncg gets


def test_the_optimizer_takes_the_same_steps_on_a_module(cancer):
    x, y = cancer
    model = nn.Linear(30, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = Newton(model.parameters())
    w = torch.zeros(30, dtype=torch.float64)
    for _ in range(6):
        before = optimizer.step(lambda: objective(x, y)(model.weight[0]))
        assert before.item() == pytest.approx(objective(x, y)(w).item(), rel=1e-12)
        w = newton_step(objective(x, y), w)
        torch.testing.assert_close(model.weight[0].detach(), w, rtol=1e-10, atol=1e-12)


def test_derivatives_couple_several_tensors():
    """The joint Hessian of a two-layer network against the Hessian in its flat parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    x = torch.randn(7, 3, dtype=torch.float64)
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]

    def loss(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        values = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return torch.func.functional_call(net, values, (x,)).square().mean()

    gradient, hessian = derivatives(net(x).square().mean(), [*net.parameters(), unused])
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(gradient[:-2], torch.func.grad(loss)(theta), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        hessian[:-2, :-2], torch.autograd.functional.hessian(loss, theta), rtol=1e-11, atol=1e-13
    )
    assert (hessian[-2:] == 0).all()
    assert (hessian[:, -2:] == 0).all()


def saddle(t):
    """x² − y² + y⁴/4: a saddle at 0, minima at (0, ±√2)."""
    return t[0] ** 2 - t[1] ** 2 + t[1] ** 4 / 4


@pytest.mark.parametrize(
    ("settings", "end"),
    [({}, 0.0), ({"damping": 3.0}, 2**0.5), ({"absolute": True}, 2**0.5), ({"absolute": True, "damping": 0.1}, 2**0.5)],
    ids=["plain", "levenberg", "absolute", "absolute-damped"],
)
def test_plain_newton_converges_to_the_saddle_and_damping_escapes(settings, end):
    """E08: from (1, 0.3), where H is indefinite."""
    theta = torch.tensor([1.0, 0.3], dtype=torch.float64)
    parameter = nn.Parameter(theta.clone())
    optimizer = Newton([parameter], **settings)
    for _ in range(60):
        theta = newton_step(saddle, theta, **settings)
        optimizer.step(lambda: saddle(parameter))
    assert theta.tolist() == pytest.approx([0.0, end], abs=1e-8)
    torch.testing.assert_close(parameter.detach(), theta, rtol=1e-9, atol=1e-12)


def test_the_two_forms_agree_where_the_hessian_is_positive():
    h, g = spd(), torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(solve(h, g, 0.3), solve(h, g, 0.3, absolute=True), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(solve(h, g, 1e9) * 1e9, g, rtol=1e-6, atol=0)  # λ → ∞ is gradient descent
    q, _ = torch.linalg.qr(h)
    indefinite = q @ torch.diag(torch.tensor([3.0, 2, 1, -1, -2, -3]).double()) @ q.T
    torch.testing.assert_close(
        solve(indefinite, g, absolute=True),
        q @ torch.diag(1 / torch.tensor([3.0, 2, 1, 1, 2, 3]).double()) @ q.T @ g,
        rtol=1e-10,
        atol=1e-12,
    )
    assert solve(indefinite, g, absolute=True) @ g > 0  # a descent direction


@pytest.mark.parametrize("absolute", [False, True])
def test_a_singular_hessian_is_named(absolute):
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="damping > 0"):
        Newton([parameter], absolute=absolute).step(lambda: parameter.sum())
    Newton([parameter], damping=1.0, absolute=absolute).step(lambda: parameter.sum())
    assert parameter.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_a_dtype_without_a_solver_is_named(dtype):
    parameter = nn.Parameter(torch.ones(2, dtype=dtype))
    with pytest.raises(RuntimeError, match=f"solves in float32 or float64, not in {dtype}"):
        Newton([parameter]).step(lambda: parameter.abs().square().sum())


def test_settings_are_checked_and_saved():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
        Newton([a], damping=-1)
    with pytest.raises(ValueError, match="one parameter group"):
        Newton([{"params": [a]}, {"params": [b]}])
    saved = Newton([a], lr=0.5, damping=0.25, absolute=True).state_dict()
    other = Newton([b])
    other.load_state_dict(saved)
    assert {key: other.param_groups[0][key] for key in ("lr", "damping", "absolute")} == {
        "lr": 0.5,
        "damping": 0.25,
        "absolute": True,
    }
