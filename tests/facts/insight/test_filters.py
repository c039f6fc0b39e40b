"""Filters: the grid gives the weights back, smoothness by hand, and the layer that reads the pixels in any module."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import etude
from etude.core.errors import UserError
from etude.insight.filters import drawn, first_layer, grid, shuffled, smoothness, tiles, weights
from etude.vision.lenet import LeNet

SMALL = {"train_steps": 6, "train_batch": 16, "quiet": True, "seed": 3}


@pytest.mark.parametrize("scale", ["each", "all"])
def test_the_grid_gives_the_weights_back(scale: Any) -> None:
    weight = torch.randn(7, 3, 4, 5, dtype=torch.float64)
    whole = grid(tiles(weight, scale), 3)
    assert whole.shape == (3, 1 + 3 * 5, 1 + 3 * 6)
    used = torch.zeros(whole.shape[1:], dtype=torch.bool)
    for o in range(7):
        top, left = 1 + o // 3 * 5, 1 + o % 3 * 6
        tile = whole[:, top : top + 4, left : left + 5]
        used[top : top + 4, left : left + 5] = True
        largest = weight[o].abs().max() if scale == "each" else weight.abs().max()
        torch.testing.assert_close((2 * tile - 1) * largest, weight[o])
    assert float(whole[:, ~used].min()) == 1  # white between
    assert torch.equal(tiles(torch.zeros(2, 1, 3, 3)), torch.full((2, 1, 3, 3), 0.5))


def test_smoothness_by_hand_and_by_chance() -> None:
    w = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert float(smoothness(w)) == pytest.approx((2 + 12 + 3 + 8) / 4 / (30 / 4))
    board = torch.tensor([[1.0, -1.0] * 3, [-1.0, 1.0] * 3] * 3)
    assert smoothness(torch.stack([board[None], torch.full((1, 6, 6), -0.7)])).tolist() == pytest.approx([-1, 1])
    assert smoothness(torch.zeros(1, 1, 3, 3)).item() == 0
    assert smoothness(torch.rand(2, 3, 1, 1)).tolist() == [0, 0]
    noise = smoothness(torch.randn(2000, 3, 5, 5, dtype=torch.float64))
    assert abs(float(noise.mean())) < 4 * float(noise.std()) / 2000**0.5
    colours = torch.randn(4, 3, 5, 6, dtype=torch.float64)  # neighbours of one channel only
    for w, found in zip(colours.numpy(), smoothness(colours)):
        pairs = [c[i, j] * c[i + 1, j] for c in w for i in range(4) for j in range(6)]
        pairs += [c[i, j] * c[i, j + 1] for c in w for i in range(5) for j in range(5)]
        assert float(found) == pytest.approx(np.mean(pairs) / np.mean(w**2))


def test_other_places_hold_the_same_weights() -> None:
    w = torch.randn(5, 2, 4, 4)
    other = shuffled(w, torch.Generator().manual_seed(0))
    assert torch.equal(other.flatten(2).sort(-1).values, w.flatten(2).sort(-1).values)
    alike = shuffled(w[:1].expand(5, -1, -1, -1), torch.Generator().manual_seed(0))
    assert not torch.equal(alike[0], alike[1])  # each filter in an order of its own
    assert not torch.equal(other, w)


def test_layer_that_reads_the_pixels() -> None:
    class Backwards(nn.Module):
        """Whose first layer is not the first that it names, and does not read the pixels bare."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(8, 3), nn.Conv2d(2, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(F.avg_pool2d(x, 2)).mean((2, 3)))

    model = Backwards().train()
    assert first_layer(model, torch.rand(1, 2, 12, 12)) == "first"
    assert model.training
    assert not model.first._forward_pre_hooks
    assert weights(model, "first", (2, 12, 12)).shape == (8, 2, 3, 3)
    with pytest.raises(UserError, match="--layer last has no weights that are pictures"):
        weights(model, "last", (2, 12, 12))
    with pytest.raises(UserError, match="Flatten has no convolution or linear layer"):
        first_layer(nn.Flatten(), torch.rand(1, 1, 2, 2))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4, 5))
    name = first_layer(flat, torch.rand(1, 2, 3, 4))
    x = torch.rand(1, 2, 3, 4)
    torch.testing.assert_close((weights(flat, name, (2, 3, 4)) * x).sum((1, 2, 3)) + flat[1].bias, flat(x)[0])


def test_pictures_are_coloured_or_every_channel_its_own() -> None:
    """The same weights always give the same bytes."""
    colour = drawn(torch.randn(10, 3, 5, 5), "each", 6)
    assert colour.mode == "RGB"
    grey = drawn(torch.randn(10, 1, 5, 5), "each", 96)
    assert (grey.mode, drawn(torch.randn(4, 2, 3, 3), "all", 8).mode) == ("L", "L")
    w = LeNet(10).features[0].weight.detach()
    assert drawn(w, "each", 6).tobytes() == drawn(w.clone(), "each", 6).tobytes()
    assert 350 <= grey.width <= 700


def plainly_smooth(w: np.ndarray) -> float:
    """Of (units, …, h, w)."""
    rows = []
    for f in w:
        pairs = [(f[..., 1:] * f[..., :-1]).ravel(), (f[..., 1:, :] * f[..., :-1, :]).ravel()]
        rows.append(np.concatenate(pairs).mean() / (f**2).mean())
    return float(np.mean(rows))


@pytest.mark.usefixtures("double")
def test_loop_is_the_one_written_out(plain: Any) -> None:
    """Losses, smoothness after each step, and the pictures that are drawn on the way."""
    done = etude.run("insight/filters", **SMALL, draw_every=4)
    model, losses = plain(3).learn("softmax", 6, 16)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses)
    name = next(name for name, p in model.named_parameters() if p.shape == (10, 64))
    for steps, row in enumerate(rows):
        then = part(plain, steps + 1).get_parameter(name).detach()
        assert row["smoothness"] == pytest.approx(plainly_smooth(then.view(10, 8, 8).numpy()))
    weight = etude.load(done.folder).state["model"][name]
    torch.testing.assert_close(weight, model.get_parameter(name).detach())
    assert sorted(p.name for p in (done.folder / "artifacts").glob("*.png")) == [
        f"filters-{step:07d}.png" for step in (0, 4, 6)
    ]
    last = np.asarray(Image.open(done.folder / "artifacts" / "filters-0000006.png").convert("L"))
    assert np.array_equal(last, np.asarray(drawn(weight.view(10, 1, 8, 8), "each", 96)))
    first = np.asarray(Image.open(done.folder / "artifacts" / "filters-0000000.png").convert("L"))
    begun = plain(3).network("softmax")[0].get_parameter(name).detach().view(10, 1, 8, 8)
    assert np.array_equal(first, np.asarray(drawn(begun, "each", 96)))


def part(plain: Any, steps: int) -> nn.Module:
    """The network after these steps of six: the rate's schedule is that of six."""
    model, data = plain(3).network("softmax")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=6, cycle_momentum=False)
    order = torch.from_numpy(np.asarray(etude.data.batches.permutation(len(data.train.y), 3, 0)))
    for step in range(steps):
        index = order[step * 16 : step * 16 + 16]
        loss = F.cross_entropy(model(data.train.x[index] / 255), data.train.y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("flags", [{}, {"network": "lenet", "layer": "features.3", "scale": "all"}], ids=str)
def test_reported_numbers_are_those_of_the_saved_weights(flags: dict[str, Any]) -> None:
    done = etude.run("insight/filters", **SMALL, **flags)
    state = etude.load(done.folder).state["model"]
    held, shape = ((16, 6, 5, 5), (16, 6, 5, 5)) if flags else ((10, 64), (10, 1, 8, 8))
    w = next(value for value in state.values() if value.shape == held).view(shape)
    assert done.metrics["smoothness"] == pytest.approx(plainly_smooth(w.numpy()))
    top = w.abs().flatten(1).max(1).values
    assert done.metrics["filters"] == shape[0]
    assert done.metrics["dead"] == pytest.approx(float((top < 0.01 * top.max()).double().mean()))
    moved = shuffled(w, etude.core.randomness.generator(3, -1, 0, "other places"))
    assert done.metrics["shuffled_smoothness"] == pytest.approx(float(smoothness(moved).mean()))


def test_unknown_layer_is_one_sentence() -> None:
    with pytest.raises(UserError, match="--layer nowhere is no layer"):
        etude.run("insight/filters", **SMALL, layer="nowhere")
    with pytest.raises(UserError, match="has no weights that are pictures"):
        etude.run("insight/filters", **SMALL, network="mlp", layer="layers.3")
