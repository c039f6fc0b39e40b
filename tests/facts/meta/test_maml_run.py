"""A whole run of MAML against a loop over single tasks, its numbers counted again, its parts apart."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

import etude
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.meta.maml import Convolutional, Regressor, episodes, sinusoids, train

ALPHABETS = ("Angelic", "Braille", "Cree", "Futurama", "Greek", "Hebrew", "Korean")
SINES = {"shots": 4, "queries": 5, "tasks": 3, "steps": 4, "width": 6, "validation_tasks": 7, "test_tasks": 60}
SINES |= {"test_steps": 4, "evaluate_every": 2, "inner_learning_rate": 0.05, "learning_rate": 0.02}
FEW = {"shots": 2, "queries": 3, "ways": 3, "tasks": 2, "steps": 3, "width": 4, "validation_tasks": 2, "test_tasks": 3}
FEW |= {"test_steps": 2, "evaluate_every": 2, "preset": "omniglot"}


def run(folder, seed: int = 5, **settings):
    return etude.run("meta/maml", out=folder / "run", seed=seed, quiet=True, threads=1, **settings)


def rows(result):
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def noise(count: int, seed: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 20, 28, 28), generator=dice, dtype=torch.uint8)


@pytest.fixture
def drawings(monkeypatch):
    """Omniglot as noise: 7 alphabets of 4 characters, of which the sixth validates, and 5 characters to be tested on."""
    of = tuple(name for name in ALPHABETS for _ in range(4))
    sets = SimpleNamespace(
        background=SimpleNamespace(x=noise(28, 0), alphabets=of), evaluation=SimpleNamespace(x=noise(5, 1))
    )
    monkeypatch.setattr("etude.data.characters", lambda name, size: sets)
    return sets


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def forward(weights, x, reference, normalizer):
    """The convolutional network written out; `reference`: images whose statistics normalise (None: those of x)."""
    split = 0 if reference is None or normalizer == "transductive" else len(reference)
    x = x if split == 0 else torch.cat([reference, x])
    for k in range(4):
        x = F.conv2d(x, weights[f"convs.{k}.weight"], weights[f"convs.{k}.bias"], stride=2, padding=1)
        asked = x[:split] if split else x
        mean = asked.mean((0, 2, 3), keepdim=True)
        variance = ((asked - mean) ** 2).mean((0, 2, 3), keepdim=True)
        scale, shift = (weights[f"norms.{k}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        x = torch.clamp((x - mean) / torch.sqrt(variance + 1e-5) * scale + shift, min=0)
    return (x.mean((2, 3)) @ weights["out.weight"].T + weights["out.bias"])[split:]


def adapted(weights, respond, loss, task, rate, steps, second):
    """One task, step by step with autograd; without `second` the gradients are constants."""
    for _ in range(steps):
        value = loss(respond(weights, task[0], None), task[1])
        gradients = torch.autograd.grad(value, list(weights.values()), create_graph=second)
        gradients = [g if second else g.detach() for g in gradients]
        weights = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients)}
    return weights


def plain_run(net, draw, respond, loss, steps, settings, seed=5):
    """Meta-train `net`: a plain loop over updates, tasks and inner steps; the losses."""
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=settings["learning_rate"]), []
    for step in range(steps):
        many = draw(generator(seed, step, 0, "tasks"))
        total = 0.0
        for task in zip(*many):
            theta, second = dict(net.named_parameters()), settings.get("order", "second") == "second"
            rate, inner = settings["inner_learning_rate"], settings.get("inner_steps", 1)
            weights = adapted(theta, respond, loss, task, rate, inner, second)
            total = total + loss(respond(weights, task[2], task[0]), task[3]) / len(many[0])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    return losses


def counted(net, many, respond, loss, wrong, rate, most):
    """The error after 0, 1, … `most` steps, mean over tasks, each adapted alone."""
    sums = [0.0] * (most + 1)
    for task in zip(*many):
        for k in range(most + 1):
            theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
            weights = adapted(theta, respond, loss, task, rate, k, True)
            sums[k] += float(wrong(respond(weights, task[2], task[0]), task[3]).double().mean()) / len(many[0])
    return sums


def sine(net):
    return lambda weights, x, reference: functional_call(net, weights, (x,))


def squared(out, y):
    return (out - y).detach() ** 2


def differs(out, y):
    return out.argmax(-1) != y


def equal_weights(loaded, net):
    for name, p in net.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], p, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("order", ["second", "first"])
def test_loop_on_sinusoids_equals_a_loop_over_tasks(order, inner, tmp_path, double):
    settings = {**SINES, "order": order, "inner_steps": inner}
    result = run(tmp_path, joint=True, **settings)
    torch.manual_seed(fold(5, 0, 0, "init"))
    net = Regressor(6)
    joint = copy.deepcopy(net)

    def draw(dice):
        return sinusoids(3, 4, 5, dice)[0]

    losses = plain_run(net, draw, sine(net), F.mse_loss, 4, settings)
    others = plain_run(joint, draw, sine(joint), F.mse_loss, 4, settings | {"inner_steps": 0})
    loaded = etude.load(result.folder)
    equal_weights(loaded.model, net)
    equal_weights(loaded.modules["joint"], joint)
    assert [row["loss"] for row in rows(result)] == pytest.approx(losses, rel=1e-10)
    assert [row["joint_loss"] for row in rows(result)] == pytest.approx(others, rel=1e-10)
    tasks = sinusoids(7, 4, 100, generator(5, 0, 0, "validation tasks"))[0]
    expected = counted(net, tasks, sine(net), F.mse_loss, squared, 0.05, 4)
    assert [row["step"] for row in rows(result) if "validation_error_1" in row] == [2, 4]
    for k in (1, 4):
        assert rows(result)[-1][f"validation_error_{k}"] == pytest.approx(expected[k], rel=1e-9)


@pytest.mark.parametrize(
    ("normalizer", "order", "inner"),
    [("support", "second", 2), ("support", "first", 1), ("transductive", "second", 1), ("transductive", "first", 2)],
)
def test_loop_on_characters_equals_a_loop_over_tasks(normalizer, order, inner, tmp_path, double, drawings):
    settings = {"order": order, "inner_steps": inner, "normalizer": normalizer}
    settings |= {"inner_learning_rate": 0.3, "learning_rate": 2e-3}
    result = run(tmp_path, **FEW, **settings)
    torch.manual_seed(fold(5, 0, 0, "init"))
    net = Convolutional(3, 4)
    apart = torch.tensor([alphabet == "Hebrew" for alphabet in drawings.background.alphabets])
    learned, held = drawings.background.x[~apart], drawings.background.x[apart]

    def draw(dice):
        return episodes(learned, 2, 3, 2, 3, dice, turn=True)

    def respond(weights, x, reference):
        return forward(weights, x, reference, normalizer)

    losses = plain_run(net, draw, respond, F.cross_entropy, 3, settings)
    equal_weights(etude.load(result.folder).model, net)
    assert [row["loss"] for row in rows(result)] == pytest.approx(losses, rel=1e-9)
    kind = "transductive_error" if normalizer == "transductive" else "error"
    for part, characters, count in (("validation", held, 2), ("test", drawings.evaluation.x, 3)):
        tasks = episodes(characters, count, 3, 2, 15, generator(5, 0, 0, f"{part} tasks"), turn=False)
        expected = counted(net, tasks, respond, F.cross_entropy, differs, 0.3, 2)
        told = result.metrics if part == "test" else rows(result)[-1]
        found = {name: value for name, value in told.items() if name.startswith(part)}
        steps = (0, 1, 2) if part == "test" else (1, 2)
        assert found == pytest.approx({f"{part}_{kind}_{k}": expected[k] for k in steps}, abs=1e-12)


def test_reported_numbers_are_those_of_the_saved_networks(tmp_path):
    result = run(tmp_path, joint=True, **SINES)
    loaded = etude.load(result.folder)
    net, joint = loaded.model, loaded.modules["joint"]
    first, rest = (sinusoids(n, 4, 100, dice)[0] for dice in [generator(5, 0, 0, "test tasks")] for n in (50, 10))
    tasks = [torch.cat(parts) for parts in zip(first, rest)]  # drawn fifty at a time
    held = sinusoids(7, 4, 100, generator(5, 0, 0, "validation tasks"))[0]
    after = {
        factor: counted(joint, held, sine(joint), F.mse_loss, squared, 0.05 * factor, 4)[4]
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0)
    }
    tuned = 0.05 * min(after, key=after.__getitem__)
    ours = counted(net, tasks, sine(net), F.mse_loss, squared, 0.05, 4)
    theirs = counted(joint, tasks, sine(joint), F.mse_loss, squared, tuned, 4)
    expected = {"joint_inner_learning_rate": tuned}
    for k in (0, 1, 3, 4):
        expected |= {f"test_error_{k}": ours[k], f"test_joint_error_{k}": theirs[k]}
        expected[f"test_times_better_{k}"] = theirs[k] / ours[k]
    assert result.metrics == pytest.approx(expected, rel=1e-4)


def test_without_inner_steps_it_is_the_joint_network(tmp_path):
    result = run(tmp_path, joint=True, **SINES, inner_steps=0)
    loaded = etude.load(result.folder)
    weights = [loaded.modules[name].state_dict() for name in ("model", "joint")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_rate_at_which_nothing_is_left_is_not_chosen(tmp_path, monkeypatch):
    def errors(config, run, model, drawings, part, rate):
        return {1: 1.0, 4: float("nan") if part == "validation" and rate < 0.02 else rate}

    monkeypatch.setattr(train, "errors", errors)
    settings = SINES | {"evaluate_every": 0, "steps": 1}
    monkeypatch.setattr(
        train, "_named", lambda config, part, found: {} if part == "validation" else {f"{part}_4": found[4]}
    )
    assert run(tmp_path, joint=True, **settings).metrics["joint_inner_learning_rate"] == 0.025


def test_the_test_characters_are_seen_by_the_test_only(tmp_path, drawings):
    """Other evaluation characters change no row of the log and no weight."""
    one = run(tmp_path / "one", **FEW)
    drawings.evaluation.x = noise(5, 9)
    two = run(tmp_path / "two", **FEW)
    assert rows(one) == rows(two)
    ours, theirs = (etude.load(result.folder).model.state_dict() for result in (one, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.metrics != two.metrics


def test_a_task_may_use_every_drawing(tmp_path, drawings):
    result = run(tmp_path, **FEW | {"shots": 18, "queries": 2})  # the picture has two queries left, too
    assert (result.folder / "artifacts" / "episode.png").is_file()


def test_tasks_that_cannot_be_drawn_are_refused(tmp_path, drawings):
    with pytest.raises(UserError, match="more than the 20 drawings"):
        run(tmp_path, **FEW | {"shots": 18, "queries": 3})
    with pytest.raises(UserError, match="--ways 5 is more than the 4 characters"):
        run(tmp_path / "more", **FEW | {"ways": 5})
