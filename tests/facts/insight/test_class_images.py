"""Class images: each of the four priors by hand, the logit and not the probability, and what the pictures are held against."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

import etude
from etude.core.errors import UserError
from etude.insight.class_images import Config, alike, kept, regularised, roughness
from etude.insight.parts.ascent import ascend, unit_score

SMALL = {"images": 40, "network": "mlp", "train_steps": 5, "train_batch": 16, "quiet": True, "seed": 3}


def test_small_pixels_return_to_the_mean() -> None:
    x = torch.tensor([[[[1.0, -4.0], [2.0, -3.0]], [[0.5, 0.0], [0.1, 0.0]]]])
    assert kept(x, x.norm(dim=1), 0.5).tolist() == [[[[0, -4], [0, -3]], [[0, 0], [0, 0]]]]
    assert torch.equal(kept(x, x.norm(dim=1), 0.0), x)
    assert torch.equal(kept(x, x.norm(dim=1), 0.24), x)  # a share of less than a pixel


def reference(x: np.ndarray, gradient: np.ndarray, config: Config, step: int) -> np.ndarray:
    """r of the equation by numpy and scipy, one picture."""
    x = x * (1 - config.shrink)
    if config.blur and step % config.blur_every == config.blur_every - 1:
        x = ndimage.gaussian_filter(x, config.blur, axes=(1, 2))
    for share, weight in (
        (config.small_pixels, lambda x: np.sqrt((x**2).sum(0))),
        (config.small_contributions, lambda x: np.abs((x * gradient).sum(0))),
    ):
        if share:
            gone = np.argsort(weight(x), axis=None, kind="stable")[: int(share * x[0].size)]
            x = x.copy()
            x.reshape(len(x), -1)[:, gone] = 0
    return x


@pytest.mark.parametrize(
    "flags", [{}, {"small_contributions": 0.4, "blur": 0.0}, {"shrink": 0.0, "blur_every": 1}], ids=str
)
def test_priors_are_those_written_out(flags: dict[str, Any]) -> None:
    x, gradient = torch.randn(2, 3, 7, 8, dtype=torch.float64), torch.randn(2, 3, 7, 8, dtype=torch.float64)
    for step in range(4):
        found = regularised(x, gradient, Config(**flags), step)
        for one, two, slope in zip(found, x, gradient):
            expected = reference(two.numpy(), slope.numpy(), Config(**flags), step)
            torch.testing.assert_close(one, torch.from_numpy(expected))


def test_logit_and_not_probability() -> None:
    """The gradient of a logit is its row of weights however sure the network is; that of the probability has faded."""
    model = nn.Linear(5, 3).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        x += 400 * (model.weight[1] - model.weight.mean(0)) / model.weight.norm()
    y, _ = ascend(x, unit_score(model, "", torch.tensor([1])), lambda g: g)
    torch.testing.assert_close(y - x, model.weight[1:2])
    faded, _ = ascend(x, lambda z: model(z).softmax(1)[:, 1], lambda g: g)
    assert float((faded - x).abs().max()) < 1e-9


def test_likeness_is_numpys_correlation() -> None:
    x, images = torch.rand(3, 1, 4, 5, dtype=torch.float64), torch.rand(9, 1, 4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 3, 1, 0, 3, 3])
    found = alike(x, images, labels, 4)
    for i in range(3):
        for k in (0, 1, 3):
            mean = images[labels == k].mean(0).flatten()
            assert float(found[i, k]) == pytest.approx(np.corrcoef(x[i].flatten(), mean)[0, 1])
        assert float(found[i, 2]) == 0
    with pytest.raises(UserError, match="no labelled image"):
        alike(x, images[:0], labels[:0], 4)


def test_roughness_by_hand() -> None:
    x = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert roughness(x, torch.tensor(0.0)) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4 / 0.5)


def check(plain: Any, **flags: Any) -> None:
    done = etude.run("insight/class_images", **SMALL, steps=4, **flags)
    config = Config(steps=4, **flags)
    model = plain(3).saved("mlp", done.folder)
    mean, rows, heights = etude.load(done.folder).spec.mean[0], torch.arange(config.classes), []
    x = mean + 0.1 * torch.randn((config.classes, 1, 8, 8), generator=plain(3).draw("start"))
    for step in range(4):
        leaf = x.clone().requires_grad_()
        value = model(leaf)[rows, rows]
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        heights.append(float(value.detach().mean()))
        x = x + config.learning_rate * slope / slope.abs().mean((1, 2, 3), keepdim=True)
        x = torch.stack([
            torch.from_numpy(mean + reference((one - mean).numpy(), g.numpy(), config, step)) for one, g in zip(x, slope)
        ]).clamp(0, 1)  # fmt: skip
    torch.testing.assert_close(etude.load(done.folder).state["pictures"]["x"], x)
    logged = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["score"] for row in logged[5:]] == pytest.approx(heights)
    images = [(image, label) for _, image, label in plain(3).rounds(8, 40, 40)]
    with torch.no_grad():
        logits = model(x)
    likeness = alike(x, *images[0], 10)
    assert done.metrics == pytest.approx({
        "score": float(logits.diagonal().mean()),
        "confidence": float(logits.softmax(1).diagonal().mean()),
        "likeness": float((likeness.argmax(1) == rows).double().mean()),
        "correlation": float(likeness.diagonal().mean()),
        "roughness": roughness(x, torch.tensor(mean)),
    }, rel=1e-6)  # fmt: skip


@pytest.mark.usefixtures("double")
def test_loop_is_the_one_written_out(plain: Any) -> None:
    check(plain, blur_every=2)


@pytest.mark.usefixtures("double")
def test_reported_numbers_are_those_of_the_pictures(plain: Any) -> None:
    check(plain, classes=4, small_contributions=0.2, shrink=0.1)
