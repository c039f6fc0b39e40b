"""Vanishing gradients: closed forms for linear networks, torch's Jacobians, truncation as a sum over steps, the loop written out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import etude
from etude.core import checkpoint
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.sequence.vanishing import Adder, Config, adding, build, measured, reaches

KINDS = {"rnn": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
SMALL = {"length": 7, "width": 5, "batch": 4, "steps": 6, "clip_norm": 0.1, "learning_rate": 0.03, "evaluate_every": 4}


def torchs(cell, ours):
    """torch's own module with the same weights."""
    extra = {"nonlinearity": "relu" if cell == "rnn_relu" else "tanh"} if cell.startswith("rnn") else {}
    module = KINDS[cell](2, ours.width, batch_first=True, **extra).to(ours.weight_hh_l0.dtype)
    module.load_state_dict(ours.state_dict())
    return module


@pytest.mark.parametrize("length", [2, 3, 50])
def test_the_answer_is_the_sum_of_the_two_marked_values(length):
    x, y = adding(3000, length, torch.Generator().manual_seed(0))
    assert x.shape == (3000, length, 2)
    assert set(x[..., 1].unique().tolist()) <= {0.0, 1.0}
    half = max(1, length // 2)
    assert (x[:, :half, 1].sum(1) == 1).all()
    assert (x[:, half:, 1].sum(1) == 1).all()
    torch.testing.assert_close((x[..., 0] * x[..., 1]).sum(1), y)
    assert (x[..., 1].sum(0) > 0).all()
    assert abs(float(y.mean()) - 1) < 0.03
    assert abs(float((y - 1).square().mean()) - 1 / 6) < 0.02


@pytest.mark.parametrize("kind", ["any", "orthogonal", "exploding"])
def test_a_linear_network_has_the_powers_of_its_matrix(kind):
    """‖∂a_T/∂a_t‖ = σ_max(U^{T−t}) exactly: 1 at every depth for an orthogonal U, 1.1^{T−t} for 1.1 times one."""
    torch.manual_seed(0)
    u = torch.randn(6, 6, dtype=torch.float64) / 6
    if kind != "any":
        u = torch.linalg.qr(u)[0] * (1.1 if kind == "exploding" else 1.0)

    def linear(given, state, by):
        return (given + state[0] @ by.matrix.T,)

    given = torch.randn(9, 3, 6, dtype=torch.float64)
    weights = type("W", (), {"matrix": u})
    norms, bounds = reaches(linear, given, (torch.randn(3, 6, dtype=torch.float64),), weights)
    powers = torch.stack([torch.linalg.svdvals(torch.linalg.matrix_power(u, k))[0] for k in range(10)])
    torch.testing.assert_close(norms, powers, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(bounds, torch.linalg.svdvals(u)[0] ** torch.arange(10), rtol=1e-12, atol=1e-14)
    if kind != "any":
        factor = 1.1 if kind == "exploding" else 1.0
        torch.testing.assert_close(
            norms, torch.tensor([factor**k for k in range(10)], dtype=torch.float64), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("cell", list(KINDS))
def test_the_jacobians_are_those_of_torchs_module(cell):
    """From the state at t, torch's module is run to T and differentiated: the LSTM's state is (h, c)."""
    torch.manual_seed(0)
    net = Adder(cell, 5).double().recurrent
    for p in net.parameters():
        nn.init.normal_(p, std=0.7)
    theirs = torchs(cell, net)
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    norms, bounds = measured(net, x)
    expected = []
    for row in x:
        told = []
        for t in range(6, -1, -1):
            parts = 2 if cell == "lstm" else 1
            begun = torch.zeros(parts, 1, 1, 5, dtype=torch.float64)

            def to_state(flat, t0, t1, row=row, parts=parts):
                if t0 == t1:
                    return flat
                at = flat.view(parts, 1, 1, 5)
                _, last = theirs(row[None, t0:t1], tuple(at) if parts == 2 else at[0])
                return torch.cat([part.flatten() for part in (last if parts == 2 else (last,))])

            at_t = to_state(begun.flatten(), 0, t).detach()
            jacobian = torch.autograd.functional.jacobian(lambda flat, t=t: to_state(flat, t, 6), at_t)
            told.append(torch.linalg.svdvals(jacobian)[0])
        expected.append(torch.stack(told))
    torch.testing.assert_close(norms, torch.stack(expected).mean(0), rtol=1e-10, atol=1e-14)
    assert (bounds >= norms - 1e-12).all()
    if cell.startswith("rnn"):  # the notes' bound: the slope of tanh and relu is at most 1
        assert (bounds <= torch.linalg.svdvals(net.weight_hh_l0)[0] ** torch.arange(7) + 1e-12).all()


@pytest.mark.parametrize("engine", ["loop", "written", "torch"])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_truncation_is_the_sum_over_the_last_steps(cell, engine):
    """Every step has its own copy of the weights: the gradients of the last k copies add up to the truncated one, for T ≤ k to
    the whole; what is computed forwards is the same."""
    torch.manual_seed(0)
    model = Adder(cell, 4, engine).double()
    x, y = torch.randn(3, 6, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    copies = [torchs(cell, model.recurrent) for _ in range(6)]
    state, outputs = None, None
    for t, step in enumerate(copies):
        outputs, state = step(x[:, t : t + 1], state)
    plain = (outputs[:, 0] @ model.readout.weight[0] + model.readout.bias - y).square().mean()
    names = [name for name, _ in copies[0].named_parameters()]
    grads = torch.autograd.grad(plain, [p for step in copies for p in step.parameters()])
    by_step = [grads[i * len(names) : (i + 1) * len(names)] for i in range(6)]
    for k in (1, 2, 5, 6, 9, 0):
        loss = (model(x, k) - y).square().mean()
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(loss, [model.recurrent.get_parameter(name) for name in names])
        kept = by_step[-k:] if k else by_step
        for name, one, many in zip(names, found, zip(*kept)):
            torch.testing.assert_close(one, sum(many), rtol=1e-9, atol=1e-12, msg=f"{name}, {k}")


def test_the_recurrent_matrix_begins_as_asked():
    made = {}
    for name in ("torch", "orthogonal", "identity"):
        torch.manual_seed(0)
        config = Config(cell="gru", width=4, initializer=name, gain=1.5)
        made[name] = build(config, Spec())["model"].recurrent.weight_hh_l0.detach().view(3, 4, 4)
    eye = torch.eye(4)
    torch.testing.assert_close(made["orthogonal"] @ made["orthogonal"].mT, (2.25 * eye).expand(3, 4, 4))
    torch.testing.assert_close(made["identity"], (1.5 * eye).expand(3, 4, 4))
    torch.manual_seed(0)
    plain = nn.GRU(2, 4).weight_hh_l0.detach().view(3, 4, 4)
    torch.testing.assert_close(made["torch"], 1.5 * plain)
    biases = [build(Config(width=4, forget_bias=b), Spec())["model"].recurrent for b in (0.0, 2.0)]
    assert float(biases[1].bias_hh_l0[4:8].detach().mean()) > 1 > float(biases[0].bias_hh_l0[4:8].detach().mean())


def test_two_marks_need_two_steps(tmp_path):
    with pytest.raises(UserError, match="--length 2"):
        etude.run("sequence/vanishing", preset="tiny", length=1, out=tmp_path / "run", quiet=True)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "settings",
    [{}, {"cell": "rnn", "truncation": 3}, {"cell": "gru", "clip_norm": 9.0, "initializer": "orthogonal", "gain": 1.2}],
)
def test_loop_equals_a_plain_one(settings, tmp_path):
    """Six updates with torch's module, Adam written out; the truncated gradient by a state that is cut off."""
    result = etude.run(
        "sequence/vanishing", out=tmp_path / "run", seed=3, quiet=True, threads=1, **{**SMALL, **settings}
    )
    config = Config(**{**SMALL, **settings})
    torch.manual_seed(fold(3, 0, 0, "init"))
    ours = build(config, Spec())["model"].double()
    net, readout = torchs(config.cell, ours.recurrent), nn.Linear(5, 1).double()
    readout.load_state_dict(ours.readout.state_dict())
    parameters = {f"recurrent.{k}": p for k, p in net.named_parameters()}
    parameters |= {f"readout.{k}": p for k, p in readout.named_parameters()}
    moments = {k: (torch.zeros_like(p), torch.zeros_like(p)) for k, p in parameters.items()}

    def answer(x, cut):
        state = None
        for t in range(7):
            if t == cut and t:
                state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            h, state = net(x[:, t : t + 1].double(), state)
        return readout(h[:, 0])[:, 0]

    losses, norms, validations = [], [], {}
    for step in range(6):
        x, y = adding(4, 7, generator(3, step, 0, "batch"))
        loss = (answer(x, 7 - config.truncation if config.truncation else 0) - y).square().mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        shrink, k = min(1.0, config.clip_norm / (norm + 1e-6)), step + 1
        rate = 0.03 * (1 - (1 - config.final_learning_rate) * step / 6)
        with torch.no_grad():
            for key, p in parameters.items():
                g, (m, v) = gradients[key] * shrink, moments[key]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.sub_(rate * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8))
        losses.append(float(loss.detach()))
        norms.append(norm)
        if k in (4, 6):
            x, y = adding(1000, 7, generator(3, -1, 0, "validation"))
            validations[k] = float((answer(x, 0).detach() - y).square().mean())
    trained = checkpoint.load(result.folder / "checkpoints")[1]["model"]
    for key, p in parameters.items():
        torch.testing.assert_close(trained[key], p.detach(), rtol=1e-8, atol=1e-9, msg=key)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-8)
    assert [row["gradient_norm"] for row in rows] == pytest.approx(norms, rel=1e-7)
    assert {row["step"]: row["validation_error"] for row in rows if "validation_error" in row} == pytest.approx(
        validations, rel=1e-8
    )


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_reported_numbers_are_those_of_the_saved_network(cell, tmp_path):
    """The error on 2,000 sequences, that of answering 1, and torch's Jacobian from 0 to T before and after training."""
    settings = {**SMALL, "cell": cell}
    result = etude.run("sequence/vanishing", out=tmp_path / "run", seed=2, quiet=True, threads=1, **settings)
    model = etude.load(result.folder).model
    x, y = adding(2000, 7, generator(2, -1, 0, "test"))
    net = torchs(cell, model.recurrent)
    with torch.no_grad():
        error = float((model.readout(net(x)[0][:, -1])[:, 0].double() - y).square().mean())
    assert result.metrics["test_error"] == pytest.approx(error, rel=1e-5)
    assert result.metrics["test_mean_error"] == pytest.approx(float((y.double() - 1).square().mean()), rel=1e-6)
    looked_at, _ = adding(4, 7, generator(2, -1, 0, "examined"))
    torch.manual_seed(fold(2, 0, 0, "init"))
    fresh = build(Config(**settings), Spec())["model"]
    for name, which in (("reach", model), ("untrained_reach", fresh)):
        net, parts = torchs(cell, which.recurrent).double(), 2 if cell == "lstm" else 1

        def last(flat, row, net=net, parts=parts):
            at = flat.view(parts, 1, 1, 5)
            _, end = net(row[None], tuple(at) if parts == 2 else at[0])
            return torch.cat([part.flatten() for part in (end if parts == 2 else (end,))])

        nothing = torch.zeros(parts * 5, dtype=torch.float64)
        found = [
            torch.linalg.svdvals(torch.autograd.functional.jacobian(lambda flat, row=row: last(flat, row), nothing))[0]
            for row in looked_at.double()
        ]
        assert result.metrics[name] == pytest.approx(float(torch.stack(found).mean()), rel=1e-6)
    assert set(result.metrics) == {"test_error", "test_mean_error", "reach", "untrained_reach"}
