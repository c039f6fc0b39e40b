"""Facts about FGSM: exact on linear models, inside the ball and the box, signs right, and pixel units kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import etude
from etude.blocks.nn.norm import Standardise
from etude.core.errors import UserError
from etude.robustness.fgsm import direction, explain, fgsm, project
from etude.vision.lenet import LeNet


def logistic(w: Tensor, b: float = 0.3) -> nn.Linear:
    """Two logits (0, w·x + b): the cross-entropy of class 1 is softplus(−(w·x + b)), of class 0 softplus(w·x + b)."""
    linear = nn.Linear(len(w), 2, dtype=w.dtype)
    linear.weight.data = torch.stack([torch.zeros_like(w), w])
    linear.bias.data = torch.tensor([0.0, b], dtype=w.dtype)
    return linear


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_logistic_model_meets_its_worst_case_exactly(norm: str, dual: int) -> None:
    """Loss = softplus(−y(w·x + b) + ε‖w‖_dual), and no other point of the ball has a larger one."""
    w, eps = torch.randn(12, dtype=torch.float64), 0.07
    model, x, y = logistic(w), torch.rand(30, 12, dtype=torch.float64), torch.arange(30) % 2
    attacked = fgsm(model, x, y, eps, low=-10, high=10, norm=norm)  # type: ignore[arg-type]
    margin = (2 * y - 1) * (x @ w + 0.3)
    expected = F.softplus(-margin + eps * w.norm(p=dual))
    loss = F.cross_entropy(model(attacked), y, reduction="none").detach()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for _ in range(50):
        other = x + project(torch.randn_like(x), eps, norm)  # type: ignore[arg-type]
        assert bool((F.cross_entropy(model(other), y, reduction="none") <= loss + 1e-12).all())


def test_the_clip_keeps_the_worst_case_of_ball_and_box() -> None:  # E124
    """On a linear model the best point of ball ∩ box is found corner by corner: the clipped step is that corner."""
    w, eps = torch.randn(3, dtype=torch.float64), 0.4
    model, x = logistic(w), torch.rand(9, 3, dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([-eps, eps], dtype=torch.float64)] * 3)
    for y in (0, 1):
        truth = torch.full((9,), y)
        losses = torch.stack([F.cross_entropy(model((x + c).clamp(0, 1)), truth, reduction="none") for c in corners])
        found = F.cross_entropy(model(fgsm(model, x, y, eps)), truth, reduction="none")
        torch.testing.assert_close(found, losses.max(0).values)


def test_the_paper_s_formula() -> None:
    """clip(x + ε sign ∇ cross-entropy) with plain autograd, pixel for pixel."""
    model, y = LeNet(5).double().eval(), torch.arange(6) % 5
    x = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]
    assert torch.equal(fgsm(model, x, y, 0.1), (x + 0.1 * gradient.sign()).clamp(0, 1))
    targeted = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]
    assert torch.equal(fgsm(model, x, y, 0.1, targeted=True), (x - 0.1 * targeted.sign()).clamp(0, 1))
    slope = gradient.flatten(1) / gradient.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(direction(model, x, y, norm="l2").flatten(1), slope)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1 / 255, 0.3, 2.0])
def test_inside_ball_and_box(norm: str, dtype: torch.dtype, eps: float) -> None:
    model, x = LeNet(4).to(dtype), torch.rand(8, 1, 28, 28, dtype=dtype)
    x[0], x[1] = 0, 1  # already on the border of the box
    attacked = fgsm(model, x, torch.arange(8) % 4, eps, norm=norm)  # type: ignore[arg-type]
    assert attacked.dtype == dtype
    assert attacked.shape == x.shape
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    size = (attacked - x).flatten(1).norm(p=float("inf") if norm == "linf" else 2, dim=1)
    assert float(size.max()) <= eps + 4 * torch.finfo(dtype).eps
    if eps == 0:
        assert torch.equal(attacked, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_exact_and_idempotent(norm: str) -> None:
    """What is inside stays as it is; what is outside goes to the nearest point of the ball."""
    delta, eps = torch.randn(40, 3, 2, dtype=torch.float64) * 2, 1.5
    delta[0], delta[1] = 0, delta[1] * 1e-9
    p = float("inf") if norm == "linf" else 2
    onto = project(delta, eps, norm)  # type: ignore[arg-type]
    torch.testing.assert_close(project(onto, eps, norm), onto, rtol=1e-15, atol=0)  # type: ignore[arg-type]
    size, before = onto.flatten(1).norm(p=p, dim=1), delta.flatten(1).norm(p=p, dim=1)
    inside = before <= eps
    assert torch.equal(onto[inside], delta[inside])
    assert inside.any()
    torch.testing.assert_close(size[~inside], torch.full_like(size[~inside], eps))
    for _ in range(200):  # no other point of the ball is nearer
        other = project(torch.randn_like(delta) * 2, eps, norm)  # type: ignore[arg-type]
        assert bool(((other - delta).flatten(1).norm(dim=1) >= (onto - delta).flatten(1).norm(dim=1) - 1e-12).all())


def test_pixel_units_whatever_the_network_standardises() -> None:
    """ε is in units of the pixels: dividing by a deviation inside changes neither the size nor the sign of the step."""
    w, x, y = torch.randn(1, 2, 9), torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 1, 0])
    inner = nn.Linear(9, 2)
    inner.weight.data = w[0]
    plain = nn.Sequential(nn.Flatten(), inner)
    scaled = nn.Sequential(Standardise((0.1,), (0.02,)), nn.Flatten(), inner)
    assert torch.equal(fgsm(plain, x, y, 0.1), fgsm(scaled, x, y, 0.1))


def test_sign_of_zero_is_zero() -> None:  # E124
    """A pixel without influence is left alone, and so is an image without gradient (ℓ2 divides by no zero)."""
    w = torch.tensor([1.0, 0.0, -2.0])
    x = torch.full((2, 3), 0.5)
    assert fgsm(logistic(w), x, 1, 0.1)[0].tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert torch.equal(direction(logistic(w * 0), x, 1, norm="l2"), torch.zeros(2, 3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("gain", [1.0, 1e3, 1e6])
def test_a_saturated_softmax_hides_nothing(norm: str, gain: float) -> None:
    """With logits a thousand apart p_y is 1 in floating point and the cross-entropy flat; the attack still sees."""
    w, x = torch.tensor([1.0, -2.0, 0.5]), torch.full((1, 3), 0.5)
    steps = direction(logistic(gain * w, b=5 * gain), x, 1, norm=norm)  # type: ignore[arg-type]
    torch.testing.assert_close(steps, direction(logistic(w, b=5.0), x, 1, norm=norm))  # type: ignore[arg-type]
    assert bool((steps != 0).all())


def test_a_target_gains_probability_and_the_robust_loss_is_not_below_the_clean_one() -> None:
    """On convex losses (softmax regression) one step against the truth never lowers its loss, nor with the clip."""
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), torch.rand(64, 1, 4, 4), torch.arange(64) % 5
    for eps in (0.01, 0.1, 0.5):
        attacked = fgsm(model, x, y, eps)
        with torch.no_grad():
            worse = F.cross_entropy(model(attacked), y, reduction="none") - F.cross_entropy(
                model(x), y, reduction="none"
            )
        assert float(worse.min()) >= -1e-6
        assert float(worse.max()) > 0
    wanted = (y + 2) % 5
    toward = fgsm(model, x, wanted, 0.01, targeted=True)
    gain = (model(toward).softmax(1) - model(x).softmax(1)).detach()
    assert float(gain.gather(1, wanted[:, None]).min()) > 0


def test_what_is_refused() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"x lies in \[-1, 1\].*standardise inside"):
        fgsm(model, torch.tensor([[-1.0, 1.0, 0.0, 0.0]]), 0, 0.1)
    with pytest.raises(ValueError, match=r"x lies in \[nan"):
        fgsm(model, torch.full((1, 4), float("nan")), 0, 0.1)
    for eps in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="epsilon is"):
            fgsm(model, torch.zeros(1, 4), 0, eps)
    with pytest.raises(ValueError, match="target holds classes 2"):
        fgsm(model, torch.zeros(1, 4), 2, 0.1)


def test_explain_takes_any_module() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    figure = explain(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 4]), 0.1)
    assert len(figure.axes) == 6


def test_a_run_counts_what_it_says(tmp_path: Path) -> None:
    """Accuracy falls with ε on a linear network, the curve starts at the clean accuracy, the target is counted."""
    options = {"preset": "tiny", "quiet": True, "network": "softmax", "train_steps": 400, "epsilon": (0.02, 0.1, 0.3)}
    done = etude.run("robustness/fgsm", out=tmp_path / "run", **options)
    found = done.metrics
    falling = [found["clean_accuracy"], found["accuracy_at_0.02"], found["accuracy_at_0.1"], found["accuracy_at_0.3"]]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > 0.8
    assert falling[-1] < 0.1
    assert found["attacked_error"] == pytest.approx(1 - falling[-1])
    rows = json.loads((done.folder / "artifacts" / "table.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows] == falling[1:]
    aimed = etude.run("robustness/fgsm", out=tmp_path / "aimed", target=3, **options)
    assert aimed.metrics["target_reached"] > 0.8
    with pytest.raises(UserError, match="--target 10 is no class"):
        etude.run("robustness/fgsm", out=tmp_path / "no", target=10, **options)
    with pytest.raises(UserError, match="--epsilon is empty"):
        etude.run("robustness/fgsm", out=tmp_path / "no", **{**options, "epsilon": ()})
    with pytest.raises(UserError, match="--epsilon 8 is more than a pixel's whole range"):
        etude.run("robustness/fgsm", out=tmp_path / "no", **{**options, "epsilon": (0.1, 8.0)})
    wide = etude.run(
        "robustness/fgsm", out=tmp_path / "wide", **{**options, "epsilon": (0.5, 3.0), "norm": "l2"}
    ).metrics
    assert wide["accuracy_at_3"] < wide["accuracy_at_0.5"]  # a Euclidean length may exceed 1
