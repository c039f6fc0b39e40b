"""The strongest patches by brute force, ties, batches; the whole run and every number again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import etude
from etude.core.errors import UserError
from etude.insight.max_patches import alikeness, purity, strongest
from etude.insight.parts import grids

SMALL = {"images": 14, "batch": 5, "network": "lenet", "train_steps": 3, "train_batch": 16, "quiet": True, "seed": 3}


def brute(a: np.ndarray, count: int, once: bool) -> list[list[tuple[float, int, int]]]:
    """All answers of (N, M, P) of a map in a list, sorted: strongest first, then by image and place."""
    rows = []
    for m in range(a.shape[1]):
        found = []
        for n in range(len(a)):
            places = [(-float(a[n, m, p]), n, p) for p in range(a.shape[2])]
            found += [min(places)] if once else places
        rows.append([(-v, n, p) for v, n, p in sorted(found)[:count]])
    return rows


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 11])
def test_strongest_by_brute_force(once: bool, batch: int) -> None:
    """Over images and places, in any batches, in train mode too, ties included (answers are rounded)."""
    model = nn.Sequential(nn.Conv2d(1, 5, 3, 2), nn.BatchNorm2d(5), nn.Hardtanh(-0.3, 0.3)).train()
    x = torch.rand(11, 1, 9, 12)
    found, shape = strongest(model, x.split(batch), "2", 6, 4, once)
    with torch.no_grad():
        a = model.eval()(x)[:, :4].flatten(2).numpy()
    assert shape == (4, 5)
    rows = brute(a, 6, once)
    assert len({v for row in rows for v, _, _ in row}) < 24  # there are ties
    assert found.image.tolist() == [[n for _, n, _ in row] for row in rows]
    assert found.place.tolist() == [[p for _, _, p in row] for row in rows]
    assert found.value.numpy() == pytest.approx(np.array([[v for v, _, _ in row] for row in rows]), rel=1e-6)


def test_alikeness_and_purity_by_hand() -> None:
    crops = torch.rand(3, 4, 2, 5, 5)
    pairs = [
        np.corrcoef(row[i].flatten(), row[j].flatten())[0, 1]
        for row in crops.numpy() for i in range(4) for j in range(4) if i != j
    ]  # fmt: skip
    assert alikeness(crops) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert purity(torch.tensor([[1, 1, 2, 1], [0, 1, 2, 2]]), 4) == pytest.approx((0.75 + 0.5) / 2)


def check(plain: Any, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
    """The picture and the numbers, by loops over a padded image."""
    drawn: list[Any] = []
    real = grids.grid
    monkeypatch.setattr(
        "etude.insight.max_patches.grid", lambda rows, said: drawn.append((rows, said)) or real(rows, said)
    )
    done = etude.run("insight/max_patches", **SMALL, strongest=4, pictures=5, **flags)
    model = plain(3).saved("lenet", done.folder)
    logits = flags.get("layer") == "logits"
    mean = etude.load(done.folder).spec.mean[0]
    parts = plain(3).rounds(28, 14, 5)
    x, y = torch.cat([image for _, image, _ in parts]), torch.cat([label for _, _, label in parts])
    body = nn.Sequential(model.standardise, *model.features[:4])
    with torch.no_grad():
        a = (model(x)[:, :, None] if logits else body(x).flatten(2))[:, :5]
    rows = brute(a.numpy(), 4, flags.get("once", True))
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2), value=mean)

    def crop(n: int, p: int) -> torch.Tensor:
        top, left = 2 * (p // 10), 2 * (p % 10)
        return x[n] if logits else wide[n, :, top : top + 14, left : left + 14]

    crops = torch.stack([torch.stack([crop(n, p) for _, n, p in row]) for row in rows])
    torch.testing.assert_close(drawn[0][0], crops)
    draw = plain(3).draw("random patches")
    images = torch.stack([torch.randperm(14, generator=draw)[:4] for _ in range(5)])
    places = torch.randint(1 if logits else 100, (5, 4), generator=draw)
    chance = torch.stack([torch.stack([crop(int(n), int(p)) for n, p in zip(*pair)]) for pair in zip(images, places)])
    labels = torch.tensor([[int(y[n]) for _, n, _ in row] for row in rows])

    def alike(crops: torch.Tensor) -> float:
        return float(np.mean([
            np.corrcoef(row[i].flatten(), row[j].flatten())[0, 1]
            for row in crops.numpy() for i in range(4) for j in range(4) if i != j
        ]))  # fmt: skip

    def pure(labels: torch.Tensor) -> float:
        return float(np.mean([np.bincount(row).max() / 4 for row in labels.numpy()]))

    expected = {
        "score": np.mean([v for row in rows for v, _, _ in row]),
        "purity": pure(labels),
        "random_purity": pure(y[images]),
        "own_class": float((labels == torch.arange(5)[:, None]).double().mean()) if logits else 0.0,
        "alikeness": alike(crops),
        "random_alikeness": alike(chance),
    }
    assert done.metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("double")
def test_loop_is_the_one_written_out(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check(plain, monkeypatch)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("flags", [{"layer": "logits"}, {"once": False}])
def test_reported_numbers_are_those_of_the_patches(plain: Any, monkeypatch: pytest.MonkeyPatch, flags: Any) -> None:
    check(plain, monkeypatch, **flags)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="--layer nowhere is no layer"):
        etude.run("insight/max_patches", **SMALL, layer="nowhere")
    with pytest.raises(UserError, match="--strongest 20 needs as many images, and there are 14"):
        etude.run("insight/max_patches", **SMALL, strongest=20)


def test_the_fresh_network_learns_as_written_out(plain: Any, tmp_path: Path) -> None:
    done = etude.run("insight/max_patches", **SMALL, strongest=4, pictures=2, out=tmp_path / "run")
    model, _ = plain(3).learn("lenet", 3, 16)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(etude.load(done.folder).state["model"][name], value)
