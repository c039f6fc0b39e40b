"""A whole run of saliency against plain code: the fresh network's training, and every number that is returned."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import etude
from etude import data as room

SMALL = {"images": 12, "batch": 5, "subsets": 4, "shown": 1, "quiet": True, "seed": 3}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("network", "steps", "batch"), [("lenet", 5, 16), ("mlp", 5, 16), ("softmax", 5, 16), ("mlp", 4, 700)]
)  # of 1,293 training images: the second batch of 700 begins a new epoch
def test_loop_trains_a_fresh_network_as_torch_does(network: str, steps: int, batch: int, plain: Any) -> None:
    done = etude.run("insight/saliency", **SMALL, network=network, train_steps=steps, train_batch=batch)
    model, losses = plain(3).learn(network, steps, batch)
    saved = etude.load(done.folder).state["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-7, atol=1e-9)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))  # the examination adds none
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)
    assert all(set(row) <= {"step", "loss", "time", "seconds"} for row in rows)


def reference(
    plain: Any, autograd: Any, model: nn.Module, size: int, mean: float, target: int | None
) -> dict[str, float]:
    """Lines 1 to 5 of the algorithm by autograd, argsort and scipy, one image at a time where it matters."""
    total: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        total[name] = total.get(name, 0.0) + value / SMALL["images"]

    for number, x, y in plain.rounds(size, SMALL["images"], SMALL["batch"]):
        with torch.no_grad():
            before = model(x).softmax(1)
        add("test_accuracy", float((before.argmax(1) == y).sum()))
        c = before.argmax(1) if target is None else torch.full_like(y, target)
        maps = autograd(model, x, c)
        other = {kind: autograd(plain.shuffled(model, kind, number), x, c) for kind in ("last", "all")}
        for kind, theirs in other.items():
            add(f"sanity_{kind}", plain.spearman(maps.abs(), theirs.abs()))
        side = torch.linspace(-1, 1, size)
        blob = (-2 * (side[:, None] ** 2 + side**2)).exp().expand(x.shape)
        noise = torch.randn(x.shape, generator=plain.draw("random map", number))
        nulls = {"_centre": blob, "_image": x, "_random": noise, "_shuffled": other["all"]}
        for name, values in {"": maps, **nulls}.items():
            add(f"faithfulness{name}", plain.worth(model, x, c, values, number, SMALL["subsets"], mean))
        ranks = {
            "salient": maps * (x - mean), "absolute": maps.abs(), "centre": blob, "image": x, "random": noise,
            "inked_centre": blob * (x - mean),
        }  # fmt: skip
        for name, rank in ranks.items():
            without = x.clone()
            for i in range(len(x)):
                gone = torch.topk(rank[i].flatten(), int(np.ceil(0.1 * size * size))).indices
                without[i].view(-1)[gone] = mean
            with torch.no_grad():
                add(f"drop_{name}", float((before - model(without).softmax(1))[torch.arange(len(x)), c].sum()))
    return total


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("target", [None, 4])
def test_reported_numbers_of_a_fresh_network(target: int | None, plain: Any, autograd: Any) -> None:
    # not LeNet: where its pooling sees equal values (an even background), which of them gets the gradient is rounding
    done = etude.run("insight/saliency", **SMALL, network="mlp", train_steps=20, train_batch=64, target=target)
    mean = room.images("digits").spec.mean[0]
    expected = reference(plain(3), autograd, plain(3).saved("mlp", done.folder), 8, mean, target)
    assert done.metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert len(set(expected.values())) == len(expected)  # none would pass for another


@pytest.mark.usefixtures("double")
def test_reported_numbers_are_those_of_eval_mode(moody: nn.Module, plain: Any, autograd: Any) -> None:
    """A network with dropout and batch norm that the caller has left in train mode."""
    done = etude.run("insight/saliency", **SMALL, source=moody, data="digits")
    assert moody.training
    mean = room.images("digits").spec.mean[0]
    expected = reference(plain(3), autograd, moody.eval(), 8, mean, None)
    assert done.metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert 0 < done.metrics["test_accuracy"] < 1


def test_reported_numbers_are_means_over_the_images_there_are(moody: nn.Module) -> None:
    test = room.images("digits").test
    done = etude.run("insight/saliency", **{**SMALL, "images": 50}, source=moody, data=(test.x[:7], test.y[:7]))
    right = (moody.eval()(test.x[:7] / 255).argmax(1) == test.y[:7]).float().mean()
    assert done.metrics["test_accuracy"] == pytest.approx(float(right))
    assert float(right) > 0


def test_loop_gives_the_network_and_the_images_it_names(moody: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture: the first images, their map, and the same images without what the map points at."""
    seen: dict[str, Tensor] = {}

    def panel(columns: dict[str, Tensor], said: Any, least: float = 0.0) -> Any:
        seen.update(columns, said=said)
        return real(columns, said, least)

    real = etude.insight.saliency.panel
    monkeypatch.setattr(etude.insight.saliency, "panel", panel)
    etude.run("insight/saliency", **{**SMALL, "shown": 7}, source=moody, data="digits", erased=0.25)
    assert seen["image"].shape == (7, 1, 8, 8)
    changed = (seen["image"] != seen["erased"]).flatten(1).sum(1)
    assert int(changed.max()) == 16
    assert seen["saliency"].shape == (7, 8, 8)
    mean = room.images("digits").spec.mean[0]
    expected = seen["saliency"] * (seen["image"][:, 0] - mean)
    gone = (seen["image"] != seen["erased"])[:, 0]
    for fall, erased in zip(expected, gone):
        assert float(fall[erased].min()) >= float(fall[~erased].max()) - 1e-6
