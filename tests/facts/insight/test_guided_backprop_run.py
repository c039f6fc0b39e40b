"""A whole run of guided backpropagation against plain code: the fresh network's training, and every returned number."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etude
from etude import data as room
from etude.insight import guided_backprop

SMALL = {"images": 12, "batch": 5, "subsets": 4, "shown": 1, "quiet": True, "seed": 3}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("network", ["lenet", "mlp"])
def test_loop_trains_a_fresh_network_as_torch_does(network: str, plain: Any) -> None:
    done = etude.run("insight/guided_backprop", **SMALL, network=network, train_steps=5, train_batch=20)
    model, losses = plain(3).learn(network, 5, 20)
    saved = etude.load(done.folder).state["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-7, atol=1e-9)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]  # the examination adds none
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)


def by_hooks(autograd: Any, model: nn.Module, x: Tensor, target: Any) -> Tensor:
    """Guided maps as they are often made: a hook on every ReLU module clips what goes down."""
    hooked = copy.deepcopy(model)
    for part in hooked.modules():
        if isinstance(part, nn.ReLU):
            part.register_full_backward_hook(lambda _part, down, _up: (down[0].clamp(min=0),))
    return autograd(hooked, x, target)


def reference(
    plain: Any, autograd: Any, model: nn.Module, size: int, mean: float, target: int | None
) -> dict[str, float]:
    """Lines 1 to 4 of the algorithm, the maps by hooks and by autograd."""
    total: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        total[name] = total.get(name, 0.0) + value / SMALL["images"]

    for number, x, y in plain.rounds(size, SMALL["images"], SMALL["batch"]):
        with torch.no_grad():
            said = model(x).argmax(1)
        add("test_accuracy", float((said == y).sum()))
        c = said if target is None else torch.full_like(y, target)
        for rule in ("", "plain_"):

            def made(network: nn.Module, rule: str = rule, x: Tensor = x, c: Tensor = c) -> Tensor:
                return autograd(network, x, c) if rule else by_hooks(autograd, network, x, c)

            maps = made(model)
            for kind in ("last", "all"):
                theirs = made(plain.shuffled(model, kind, number))
                add(f"{rule}sanity_{kind}", plain.spearman(maps.abs(), theirs.abs()))
            add(f"{rule}faithfulness", plain.worth(model, x, c, maps, number, SMALL["subsets"], mean))
    total["sanity_gap"] = total["sanity_last"] - total["plain_sanity_last"]
    total["sanity_all_gap"] = total["sanity_all"] - total["plain_sanity_all"]
    return total


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("target", [None, 4])
def test_reported_numbers_of_a_fresh_network(target: int | None, plain: Any, autograd: Any) -> None:
    settings = {**SMALL, "network": "mlp", "train_steps": 20, "train_batch": 64, "target": target}
    done = etude.run("insight/guided_backprop", **settings)
    mean = room.images("digits").spec.mean[0]
    expected = reference(plain(3), autograd, plain(3).saved("mlp", done.folder), 8, mean, target)
    assert done.metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert len(set(expected.values())) == len(expected)  # none would pass for another


@pytest.mark.usefixtures("double")
def test_reported_numbers_are_those_of_eval_mode(moody: nn.Module, plain: Any, autograd: Any) -> None:
    """A network with dropout and batch norm that the caller has left in train mode."""
    done = etude.run("insight/guided_backprop", **SMALL, source=moody, data="digits")
    assert moody.training
    expected = reference(plain(3), autograd, moody.eval(), 8, room.images("digits").spec.mean[0], None)
    assert done.metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert 0 < done.metrics["test_accuracy"] < 1


def test_reported_numbers_are_means_over_the_images_there_are(moody: nn.Module) -> None:
    test = room.images("digits").test
    done = etude.run("insight/guided_backprop", **{**SMALL, "images": 50}, source=moody, data=(test.x[:7], test.y[:7]))
    right = (moody.eval()(test.x[:7] / 255).argmax(1) == test.y[:7]).float().mean()
    assert done.metrics["test_accuracy"] == pytest.approx(float(right))
    assert float(right) > 0


def test_loop_shows_the_maps_it_names(moody: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures of the same images: guided and plain maps, and guided maps of shuffled networks."""
    seen: list[tuple[dict[str, Tensor], list[list[str]]]] = []

    def panel(columns: dict[str, Tensor], said: Any) -> Any:
        seen.append((columns, said))
        return real(columns, said)

    real = guided_backprop.panel
    monkeypatch.setattr(guided_backprop, "panel", panel)
    etude.run("insight/guided_backprop", **{**SMALL, "shown": 7}, source=moody, data="digits", erased=0.25)
    (maps, _), (sanity, said) = seen
    image = maps["image"]
    assert image.shape == (7, 1, 8, 8)
    assert torch.equal(sanity["image"], image)
    assert torch.equal(maps["guided"], guided_backprop.guided_backprop(moody, image)[:, 0])
    assert torch.equal(maps["plain"], guided_backprop.saliency(moody, image)[:, 0])
    assert torch.equal(sanity["trained"], maps["guided"])
    gone = (image != maps["erased"])[:, 0]
    assert int(gone.flatten(1).sum(1).max()) == 16
    for one, erased in zip(maps["guided"].abs(), gone):
        assert float(one[erased].min()) >= float(one[~erased].max())
    assert not torch.equal(sanity["last shuffled"], sanity["trained"])
    assert not torch.equal(sanity["last shuffled"], sanity["all shuffled"])
    alike = [
        guided_backprop.rank_correlation(sanity["trained"].abs(), sanity[f"{k} shuffled"].abs())
        for k in ("last", "all")
    ]
    assert said == [[f"last: ρ = {a:.2f}", f"all: ρ = {b:.2f}"] for a, b in zip(*(values.tolist() for values in alike))]
