"""A whole run of FGSM against plain code: the fresh network's training, and every number that is returned."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import etude
from etude import data as room
from etude.core.randomness import fold, generator
from etude.data.batches import permutation
from etude.robustness import fgsm

SMALL = {"images": 53, "batch": 20, "shown": 1, "quiet": True, "seed": 3}
RADII = {"linf": (0.3, 0.05), "l2": (1.5, 0.4)}  # not in order: the run sorts them
MODULES = {"lenet": "etude.vision.lenet", "mlp": "etude.basics.mlp", "softmax": "etude.basics.mlp"}


@pytest.fixture
def _double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ETUDE_RUNS", str(tmp_path / "runs"))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(kind: str) -> tuple[nn.Module, room.Images]:
    """A fresh network as the run begins with it, and its data."""
    data = room.images("digits", 28) if kind == "lenet" else room.images("digits")
    module = importlib.import_module(MODULES[kind])
    torch.manual_seed(fold(3, 0, 0, "init"))
    return module.build(module.Config(**({"widths": ()} if kind == "softmax" else {})), data.spec)["model"], data


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(
    ("kind", "steps", "batch"), [("lenet", 5, 16), ("mlp", 5, 16), ("softmax", 5, 16), ("mlp", 4, 700)]
)  # of 1,293 training images: the second batch of 700 begins a new epoch
def test_loop_trains_a_fresh_network_as_torch_does(kind: str, steps: int, batch: int) -> None:
    done = etude.run("robustness/fgsm", **SMALL, network=kind, epsilon=(0.1,), train_steps=steps, train_batch=batch)
    model, data = network(kind)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, cycle_momentum=False)
    order = np.concatenate([permutation(len(data.train), 3, epoch) for epoch in range(3)])
    losses = []
    for step in range(steps):
        index = torch.from_numpy(order[step * batch : (step + 1) * batch])
        loss = F.cross_entropy(model(data.train.x[index] / 255), data.train.y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    saved = etude.load(done.folder).state["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-7, atol=1e-9)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))  # the examination adds none
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)


def reference(
    model: nn.Module, test: room.Split, norm: str, target: int | None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The numbers and the table, image by image: cross-entropy by autograd, the ball and the box by hand."""
    order = torch.randperm(len(test), generator=generator(3, -1, 0, "examined images"))[: SMALL["images"]]
    x, y = test.x[order] / 255, test.y[order]
    if target is not None:
        x, y = x[y != target], y[y != target]
    noise = torch.randn(x.shape, generator=generator(3, -1, 0, "noise"))
    step, chance = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(len(x)):
        leaf = x[i : i + 1].clone().requires_grad_()
        loss = F.cross_entropy(model(leaf), y[i : i + 1] if target is None else torch.tensor([target]))
        slope = torch.autograd.grad(loss, leaf)[0][0] * (1 if target is None else -1)
        step[i], chance[i] = (v.sign() if norm == "linf" else v / v.square().sum().sqrt() for v in (slope, noise[i]))

    def answers(change: Tensor) -> Tensor:
        with torch.no_grad():
            return model((x + change).clip(0, 1)).softmax(1)

    def error(change: Tensor) -> float:
        return (answers(change).argmax(1) != y).double().mean().item()

    found, table = {}, []
    for radius in sorted(RADII[norm]):
        sure, taken = answers(radius * step).max(1)
        wrong = taken != y
        found[f"accuracy_at_{radius}"] = 1 - error(radius * step)
        found["attacked_confidence"] = sure[wrong].mean().item()
        row = {
            "epsilon": radius,
            "accuracy": 1 - error(radius * step),
            "accuracy_under_noise": 1 - error(radius * chance),
        }
        table.append({**row, "mean_confidence_when_wrong": sure[wrong].mean().item()})
    if target is not None:
        found["target_reached"] = (taken == target).double().mean().item()
    found["clean_accuracy"] = 1 - error(0 * step)
    found["attacked_error"], found["noise_error"] = error(radius * step), error(radius * chance)
    found["reversed_error"] = error(-radius * step)
    return found, table


def check(done: etude.core.launch.Finished, model: nn.Module, test: room.Split, norm: str, target: int | None) -> None:
    expected, table = reference(model, test, norm, target)
    assert done.metrics == pytest.approx(expected, rel=1e-9)
    rows = json.loads((done.folder / "artifacts" / "table.json").read_text())["rows"]
    for row, wanted in zip(rows, table, strict=True):
        assert row == pytest.approx(wanted, rel=1e-9)
    assert 0.5 < done.metrics["clean_accuracy"] < 1
    errors = [done.metrics[f"{name}_error"] for name in ("attacked", "noise", "reversed")]
    assert target is not None or len({*errors, 1 - done.metrics["clean_accuracy"]}) == 4  # none would pass for another


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("target", [None, 4])
def test_reported_numbers_of_a_fresh_network(norm: str, target: int | None) -> None:
    settings = {**SMALL, "network": "mlp", "train_steps": 40, "train_batch": 64, "norm": norm, "target": target}
    done = etude.run("robustness/fgsm", **settings, epsilon=RADII[norm])
    model, data = network("mlp")
    model.load_state_dict(etude.load(done.folder).state["model"])
    check(done, model.eval(), data.test, norm, target)


@pytest.mark.usefixtures("_double")
def test_reported_numbers_are_those_of_eval_mode() -> None:
    """A network with dropout and batch norm that the caller has left in train mode."""
    data = room.images("digits")
    torch.manual_seed(11)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for k in range(20):
        rows = slice(60 * k, 60 * k + 60)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.x[rows] / 255), data.train.y[rows]).backward()
        optimizer.step()
    done = etude.run("robustness/fgsm", **SMALL, epsilon=RADII["linf"], source=model.train(), data="digits")
    assert model.training
    check(done, model.eval(), data.test, "linf", None)


def test_loop_draws_what_it_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The curves begin at the clean accuracy and show the table; the picture is the attack at the largest radius."""
    monkeypatch.setenv("ETUDE_RUNS", str(tmp_path / "runs"))
    seen: dict[str, Any] = {}

    def curves(series: dict[str, Any], **axes: Any) -> Any:
        seen.update(series)
        return real_curves(series, **axes)

    def panel(columns: dict[str, Tensor], said: Any) -> Any:
        seen["image"], seen["change"], seen["sum"] = columns.values()
        return real_panel(columns, said)

    real_curves, real_panel = fgsm.curves, fgsm.panel
    monkeypatch.setattr(fgsm, "curves", curves)
    monkeypatch.setattr(fgsm, "panel", panel)
    settings = {**SMALL, "network": "mlp", "train_steps": 30, "shown": 6, "epsilon": (0.2, 0.1)}
    done = etude.run("robustness/fgsm", **settings)
    rows = json.loads((done.folder / "artifacts" / "table.json").read_text())["rows"]
    clean = done.metrics["clean_accuracy"]
    assert seen["attacked"] == ([0.0, 0.1, 0.2], [clean, *(row["accuracy"] for row in rows)])
    noise = seen["random noise of the same size"]
    assert noise == ([0.0, 0.1, 0.2], [clean, *(row["accuracy_under_noise"] for row in rows)])
    assert len(seen["image"]) == 6
    assert float(seen["change"].abs().max()) == pytest.approx(0.2, abs=1e-6)
    assert torch.equal(seen["sum"][:, 0], seen["image"][:, 0] + seen["change"])
