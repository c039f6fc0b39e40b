"""The ascent on pictures: closed forms, monotone for small steps, the adjoint of its transform, fgsm's ball, layers of any module."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

import etude
from etude.core.errors import UserError
from etude.insight.activation_max import Config
from etude.insight.parts import ascent
from etude.vision.lenet import LeNet

SMALL = {"images": 12, "batch": 5, "network": "mlp", "train_steps": 5, "train_batch": 16, "quiet": True, "seed": 3}


def climb(steps: int, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    heights = []
    for _ in range(steps):
        x, height = ascent.ascend(x, *args, **kwargs)
        heights.append(height)
    return x, heights


def test_linear_unit_has_its_optimum_in_closed_form() -> None:
    """E45: R = −λ‖x − μ‖², so x* = μ + w/(2λ); with the sign of the notes x would run away from it."""
    model = nn.Linear(6, 3).double()
    mean = torch.rand(1, 6, dtype=torch.float64)
    units = torch.tensor([2, 0])
    score = ascent.unit_score(model, "", units)
    x, _ = climb(200, mean.repeat(2, 1), score, ascent.steepest(0.3), ascent.squared(mean, 0.7))
    torch.testing.assert_close(x, mean + model.weight[units] / 1.4)
    away, _ = climb(200, mean.repeat(2, 1), score, ascent.steepest(0.3), ascent.squared(mean, -0.7))
    assert float((away - mean).norm()) > 1e3 * float((x - mean).norm())


def test_small_steps_climb_and_each_picture_by_itself() -> None:
    model = LeNet(10).double().train()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    units = torch.tensor([4, 7, 4])
    kept = [p.clone() for p in model.parameters()]
    both, heights = climb(8, x, ascent.unit_score(model, "", units), ascent.steepest(1e-3))
    values = torch.stack(heights)
    assert bool((values[1:] > values[:-1]).all())
    for i in range(3):
        alone, _ = climb(8, x[i : i + 1], ascent.unit_score(model, "", units[i : i + 1]), ascent.steepest(1e-3))
        torch.testing.assert_close(alone[0], both[i])
    assert model.training
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), kept))


def test_gradient_comes_back_through_the_transform() -> None:
    """A shift there and back changes nothing, and the gradient of what was shifted lies where it belongs."""
    x, w = torch.rand(2, 1, 5, 6, dtype=torch.float64), torch.randn(1, 1, 5, 6, dtype=torch.float64)
    assert torch.equal(ascent.shifted(ascent.shifted(x, 2, -3), -2, 3), x)
    y, height = ascent.ascend(
        x, lambda z: (w * z).sum((1, 2, 3)), ascent.steepest(1.0), transform=lambda z: ascent.shifted(z, 2, -1)
    )
    torch.testing.assert_close(y - x, ascent.shifted(w, -2, 1).expand_as(x))
    torch.testing.assert_close(height, (w * ascent.shifted(x, 2, -1)).sum((1, 2, 3)))


def test_steps_and_the_ball() -> None:
    g = torch.randn(3, 2, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 1e-6, 0.0])[:, None, None, None]
    step = ascent.even(0.3)(g)
    assert step.abs().flatten(1).mean(1).tolist() == pytest.approx([0.3, 0.3, 0.0])
    start = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    far = start + torch.randn_like(start)
    near = ascent.within(start, 0.1)(far)
    assert torch.equal(near, (start + (far - start).clamp(-0.1, 0.1)).clamp(0, 1))
    short = ascent.within(start, 0.5, "l2", -9, 9)(far) - start
    assert float(short.flatten(1).norm(dim=1).max()) == pytest.approx(0.5)
    assert torch.equal(ascent.within(start)(far), far.clamp(0, 1))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.5])
def test_blur_is_scipys(sigma: float) -> None:
    x = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    expected = ndimage.gaussian_filter(x.numpy(), sigma, axes=(2, 3))
    torch.testing.assert_close(ascent.blurred(x, sigma), torch.from_numpy(expected))


def test_layers_of_any_module() -> None:
    """Layers answer as by hand, before what works in place; the pass ends with the last, so any size of picture will do."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    assert ascent.layers(model) == ["0", "1", "2", "3", "4"]
    x = torch.rand(2, 1, 6, 6)
    first, relu, last = ascent.seen(model, x, ["0", "1", ""])
    torch.testing.assert_close(first, model[0](x))
    torch.testing.assert_close(relu, model[0](x).relu())
    torch.testing.assert_close(last, model(x))
    (wide,) = ascent.seen(model, torch.rand(1, 1, 20, 30), ["2"])
    assert wide.shape == (1, 2, 16, 26)
    assert not model[2]._forward_hooks
    score = ascent.unit_score(model, "2", torch.tensor([1, 0]))
    torch.testing.assert_close(score(x), model[:3](x).mean((2, 3))[torch.arange(2), torch.tensor([1, 0])])
    moody = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9)).train()
    (made,) = ascent.seen(moody, x, ["2"])
    torch.testing.assert_close(
        made, moody[0](x) / (1 + moody[1].eps) ** 0.5
    )  # as if it were in eval mode, which it is not
    assert moody[2].training
    with pytest.raises(UserError, match=r"--layer conv is no layer.* Known: 0, 1, 2"):
        ascent.layer(model, "conv")


def write_out(plain: Any, model: nn.Module, config: Config, mean: float) -> tuple[Tensor, list[float]]:
    """Lines 1 to 3 by autograd."""
    x = torch.full((config.pictures, 1, 8, 8), mean)
    if config.start == "noise":
        x = x + 0.1 * torch.randn(x.shape, generator=plain.draw("start"))
    rows, heights = torch.arange(config.pictures), []
    for _ in range(config.steps):
        leaf = x.clone().requires_grad_()
        value = model(leaf)[rows, rows]
        (value.sum() - config.l2 * ((leaf - mean) ** 2).sum()).backward()
        x = x + config.learning_rate * leaf.grad
        x = x.clamp(0, 1) if config.clipped else x
        heights.append(float(value.detach().mean()))
    return x, heights


def check(plain: Any, **flags: Any) -> None:
    done = etude.run("insight/activation_max", **SMALL, steps=4, **flags)
    model = plain(3).saved("mlp", done.folder)
    mean = etude.load(done.folder).spec.mean[0]
    x, heights = write_out(plain(3), model, Config(steps=4, **flags), mean)
    torch.testing.assert_close(etude.load(done.folder).state["pictures"]["x"], x)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    _, losses = plain(3).learn("mlp", SMALL["train_steps"], SMALL["train_batch"])
    assert [row["loss"] for row in rows[:5]] == pytest.approx(losses, rel=1e-9)
    assert [row["score"] for row in rows[5:]] == pytest.approx(heights)
    count = len(x)
    with torch.no_grad():
        images = torch.cat([image for _, image, _ in plain(3).rounds(8, 12, 5)])
        best, low = model(images)[:, :count].amax(0), model(torch.full((1, 1, 8, 8), mean))[0, :count]
        reached = model(x).diagonal()
        length = (x - mean).flatten(1).norm(dim=1)
        chance = torch.randn(x.shape, generator=plain(3).draw("random direction"))
        chance = chance * (length / chance.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        random = model(mean + chance).diagonal()
    expected = {
        "score": reached.mean(),
        "image_score": best.mean(),
        "score_ratio": ((reached - low) / (best - low)).mean(),
        "random_ratio": ((random - low) / (best - low)).mean(),
        "length_ratio": length.mean() / (images - mean).flatten(1).norm(dim=1).mean(),
    }
    assert done.metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)


def test_unknown_layer_is_one_sentence() -> None:
    with pytest.raises(UserError, match="--layer nowhere is no layer"):
        etude.run("insight/activation_max", **SMALL, layer="nowhere")


@pytest.mark.usefixtures("double")
def test_loop_is_the_one_written_out(plain: Any) -> None:
    check(plain, l2=0.2)


@pytest.mark.usefixtures("double")
def test_reported_numbers_are_those_of_the_pictures(plain: Any) -> None:
    check(plain, start="mean", clipped=True, pictures=4)
