"""MAML against closed forms, finite differences of the outer loss, and a loop over single tasks."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from etude.core.randomness import generator
from etude.meta.maml import (
    Convolutional,
    Regressor,
    Task,
    adapt,
    answer,
    batched,
    episodes,
    meta_loss,
    plain,
    sinusoids,
    task_losses,
)
from etude.meta.maml.pictures import curves


class Point(nn.Module):
    """A network that is nothing but θ: its output is θ whatever it is asked."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x):
        return self.theta + 0 * x.sum()


def quadratic(dimensions=4, tasks=3):
    dice = torch.Generator().manual_seed(0)
    a = torch.randn(dimensions, dimensions, generator=dice, dtype=torch.float64)
    hessian = a @ a.T + torch.eye(dimensions, dtype=torch.float64)
    centres = torch.randn(2, tasks, dimensions, generator=dice, dtype=torch.float64)
    theta = torch.randn(dimensions, generator=dice, dtype=torch.float64)

    def loss(out, centre):
        return 0.5 * (out - centre) @ hessian @ (out - centre)

    x = torch.zeros(tasks, 1, dtype=torch.float64)
    return Point(theta), loss, Task(x, centres[0], x, centres[1]), hessian


@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradient_of_quadratics_is_the_closed_form(steps):
    model, loss, task, hessian = quadratic()
    rate = 0.05
    meta_loss(model, loss, task, rate, steps).backward()
    shrink = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - rate * hessian, steps)
    adapted = task.support_y + (model.theta.detach() - task.support_y) @ shrink.T
    expected = ((adapted - task.query_y) @ hessian @ shrink).mean(0)
    torch.testing.assert_close(model.theta.grad, expected, rtol=1e-12, atol=1e-12)


def test_first_order_gradient_of_quadratics():
    model, loss, task, hessian = quadratic()
    meta_loss(model, loss, task, 0.05, 1, "first").backward()
    adapted = model.theta.detach() - 0.05 * (model.theta.detach() - task.support_y) @ hessian
    torch.testing.assert_close(model.theta.grad, ((adapted - task.query_y) @ hessian).mean(0), rtol=1e-12, atol=1e-12)


def _finite_difference(model, loss, task, rate, steps, predict=None, count=6, h=1e-6):
    """Central differences of the outer loss along a few parameter entries."""
    found = []
    parameters = dict(model.named_parameters())
    for index, (name, p) in enumerate(parameters.items()):
        if index >= count:
            break
        place = (0,) * p.ndim
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                dict(moved.named_parameters())[name][place] += sign * h
            again = predict(moved) if predict else None
            values.append(float(meta_loss(moved, loss, task, rate, steps, "second", again).detach()))
        found.append((name, place, (values[0] - values[1]) / (2 * h)))
    return found


@pytest.mark.parametrize("kind", ["regressor", "convolutional"])
def test_second_order_passes_finite_differences_and_first_order_fails(kind):  # E131
    torch.manual_seed(0)
    dice = torch.Generator().manual_seed(1)
    if kind == "regressor":
        model, loss, rate, predict = (
            nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double(),
            F.mse_loss,
            0.05,
            None,
        )
        task = Task(*(part.double() for part in sinusoids(3, 5, 5, dice)[0]))
    else:
        model, loss, rate = Convolutional(3, 4).double(), F.cross_entropy, 0.3
        drawings = torch.randint(0, 256, (6, 20, 28, 28), generator=dice, dtype=torch.uint8)
        task = episodes(drawings, 2, 3, 1, 2, dice, turn=True)
        task = Task(task.support_x.double(), task.support_y, task.query_x.double(), task.query_y)
        predict = lambda module: answer(module, "support")  # noqa: E731
    close = {}
    for order in ("second", "first"):
        model.zero_grad()
        meta_loss(model, loss, task, rate, 2, order, predict(model) if predict else None).backward()
        gaps = [
            abs(float(dict(model.named_parameters())[name].grad[place]) - numeric) / (abs(numeric) + 1e-4)
            for name, place, numeric in _finite_difference(model, loss, task, rate, 2, predict)
        ]
        close[order] = max(gaps)
    assert close["second"] < 1e-5
    assert close["first"] > 1e-3  # FOMAML must fail this, or the second order is not there


def test_batched_tasks_equal_a_loop_over_tasks():
    torch.manual_seed(0)
    model = Regressor(10).double()
    task = Task(*(part.double() for part in sinusoids(4, 5, 6, torch.Generator().manual_seed(0))[0]))
    meta_loss(model, F.mse_loss, task, 0.01, 2).backward()
    batched_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0
    for sx, sy, qx, qy in zip(*task):  # the textbook loop, one task at a time
        weights = dict(model.named_parameters())
        for _ in range(2):
            inner = F.mse_loss(functional_call(model, weights, (sx,)), sy)
            grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            weights = {name: w - 0.01 * g for (name, w), g in zip(weights.items(), grads)}
        total = total + F.mse_loss(functional_call(model, weights, (qx,)), qy)
    (total / 4).backward()
    for mine, p in zip(batched_grads, model.parameters()):
        torch.testing.assert_close(mine, p.grad, rtol=1e-10, atol=1e-12)


def test_no_inner_rate_is_joint_training():
    torch.manual_seed(0)
    model = Regressor(8)
    task, *_ = sinusoids(3, 5, 5, torch.Generator().manual_seed(0))
    grads = []
    for rate, steps in ((0.0, 1), (0.3, 0)):
        model.zero_grad()
        meta_loss(model, F.mse_loss, task, rate, steps).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    F.mse_loss(model(task.query_x.flatten(0, 1)), task.query_y.flatten(0, 1)).backward()
    for a, b, p in zip(*grads, model.parameters()):
        torch.testing.assert_close(a, p.grad)
        torch.testing.assert_close(b, p.grad)


def test_adapting_leaves_theta_untouched():
    torch.manual_seed(0)
    model = Regressor(8)
    before = copy.deepcopy(model.state_dict())
    task, *_ = sinusoids(3, 5, 5, torch.Generator().manual_seed(0))
    adapted = adapt(plain(model), F.mse_loss, batched(model, 3), task, 0.1, 5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all((adapted[name] != p).any() for name, p in model.named_parameters())


def _convolutional_episode():
    torch.manual_seed(0)
    model = Convolutional(5, 8)
    drawings = torch.randint(0, 256, (9, 20, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return model, episodes(drawings, 1, 5, 1, 6, torch.Generator().manual_seed(1), turn=False)


def _answers(model, task, normalizer, queries):
    predict = answer(model, normalizer)
    weights = adapt(predict, F.cross_entropy, batched(model, 1), task, 0.4, 2, "first")
    return torch.vmap(predict)(weights, queries, task.support_x)[0].detach()


def test_answers_do_not_depend_on_the_other_queries():
    """learn2learn 207, higher 55: with transductive batch norm an answer changes with the company it is asked in."""
    model, task = _convolutional_episode()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    for normalizer, invariant in (("support", True), ("transductive", False)):
        whole = _answers(model, task, normalizer, task.query_x)
        shuffled = _answers(model, task, normalizer, task.query_x[:, order])
        few = _answers(model, task, normalizer, task.query_x[:, :7])
        torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=1e-5)  # order never matters …
        assert torch.allclose(few, whole[:7], rtol=1e-4, atol=1e-5) == invariant  # … number does, when transductive


def test_statistics_are_the_supports():
    model, task = _convolutional_episode()
    x = torch.cat([task.support_x[0], task.query_x[0]])
    first = model.norms[0](model.convs[0](x), 5)
    part = first[:5]
    torch.testing.assert_close(part.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(part.var((0, 2, 3), correction=0), torch.ones(8), rtol=1e-3, atol=1e-3)
    assert not list(model.buffers())  # nothing is carried from task to task


def test_episodes_are_well_formed():
    drawings = torch.arange(8 * 20, dtype=torch.uint8).view(8, 20, 1, 1).expand(8, 20, 28, 28)
    task = episodes(drawings, 6, 5, 2, 3, torch.Generator().manual_seed(0), turn=True)
    assert task.support_x.shape == (6, 10, 1, 28, 28)
    assert task.query_x.shape == (6, 15, 1, 28, 28)
    pixel = lambda x: (x[:, :, 0, 0, 0] * 255).round().long()  # noqa: E731
    seen = []
    for support, support_y, query, query_y in zip(
        pixel(task.support_x), task.support_y, pixel(task.query_x), task.query_y
    ):
        assert not set(support.tolist()) & set(query.tolist())  # no drawing on both sides
        for label in range(5):
            classes = {*(support[support_y == label] // 20).tolist(), *(query[query_y == label] // 20).tolist()}
            assert len(classes) == 1
            seen.append((label, classes.pop()))
    assert len({c for label, c in seen if label == 0}) > 1  # labels are dealt anew in every task


def test_sinusoids_are_the_papers():
    task, amplitude, phase = sinusoids(2000, 5, 5, torch.Generator().manual_seed(0))
    assert amplitude.min() >= 0.1
    assert amplitude.max() <= 5
    assert phase.min() >= 0
    assert phase.max() <= torch.pi
    assert task.support_x.abs().max() <= 5
    torch.testing.assert_close(task.query_y, amplitude * torch.sin(task.query_x - phase))


def test_test_tasks_are_a_function_of_the_seed():
    first = sinusoids(3, 2, 2, generator(0, 0, 0, "test tasks"))[0]
    again = sinusoids(3, 2, 2, generator(0, 0, 0, "test tasks"))[0]
    other = sinusoids(3, 2, 2, generator(1, 0, 0, "test tasks"))[0]
    assert torch.equal(first.support_x, again.support_x)
    assert not torch.equal(first.support_x, other.support_x)


class Crowded(nn.Module):
    """A network with a part that is never asked, and dropout."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.drop = nn.Linear(1, 4), nn.Linear(3, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.used(x)).sum(-1, keepdim=True)


@pytest.mark.parametrize("order", ["second", "first"])
def test_modules_with_unused_parameters_and_dropout(order):
    torch.manual_seed(0)
    model = Crowded()
    x = torch.ones(3, 6, 1)
    meta_loss(model, F.mse_loss, Task(x, x, x, x), 0.1, 2, order).backward()
    assert model.used.weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in model.idle.parameters())
    weights = batched(model, 3)
    alone = task_losses(plain(model), F.mse_loss, weights, x, x, x)
    assert len(set(alone.tolist())) > 1  # equal tasks, yet each draws its own mask
    model.eval()
    assert len(set(task_losses(plain(model), F.mse_loss, weights, x, x, x).tolist())) == 1


def test_pictures_are_drawn_from_where_the_model_lives(monkeypatch):
    """Tasks are drawn on the CPU: whatever meets the weights must have been moved to their device."""
    moved = []
    monkeypatch.setattr(Task, "to", lambda task, device: moved.append(device) or task)
    nets = {"one": (Regressor(4), 0.01), "other": (Regressor(5), 0.02)}
    figure = curves(nets, 2, 3, torch.Generator().manual_seed(0))
    assert moved == [torch.device("cpu")] * 2
    assert len(figure.axes) == 6
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["before", "1 step", "2 steps", "the task", "support"]


def test_the_curves_are_those_of_each_network_at_its_rate():
    """The drawn values: θ's own answers, then those after steps taken here by hand."""
    nets = {"one": (Regressor(4), 0.01), "other": (Regressor(5), 0.3)}
    figure = curves(nets, 2, 3, torch.Generator().manual_seed(0))
    task = sinusoids(3, 3, 1, torch.Generator().manual_seed(0))[0]
    x = torch.linspace(-5, 5, 200)[:, None]
    for place, axes in enumerate(figure.axes):
        net, rate = list(nets.values())[place // 3]
        tuned, (sx, sy) = copy.deepcopy(net), (task.support_x[place % 3], task.support_y[place % 3])
        optimizer = torch.optim.SGD(tuned.parameters(), lr=rate)
        for step in range(3):
            drawn = torch.as_tensor(axes.lines[step].get_ydata())
            torch.testing.assert_close(drawn, tuned(x).detach()[:, 0], rtol=1e-4, atol=1e-5)
            optimizer.zero_grad()
            F.mse_loss(tuned(sx), sy).backward()
            optimizer.step()
