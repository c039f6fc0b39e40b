"""The three networks: parity with nn.RNN, whole runs, isolation of the one that ends, what clipping bounds."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import etude
from etude.basics.clipping import NAMES, Cells, Config, adding, build, clipped
from etude.core import checkpoint
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.optim.clipping import global_norm


def test_a_cell_is_torchs_rnn():
    torch.manual_seed(0)
    cells = Cells(2, 7, 1.1).double()
    with torch.no_grad():
        cells.recurrent[1] *= 0.5
        cells.bias[1] += 0.3
    x, _ = adding(4, 9, torch.Generator().manual_seed(0))
    for i in range(2):
        theirs = nn.RNN(2, 7, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            theirs.weight_hh_l0.copy_(cells.recurrent[i].T)
            theirs.weight_ih_l0.copy_(cells.input[i].T)
            theirs.bias_hh_l0.zero_()
            theirs.bias_ih_l0.copy_(cells.bias[i, 0])
        expected = theirs(x.double())[0][:, -1] @ cells.output[i] + cells.shift[i]
        torch.testing.assert_close(cells(x.double())[i], expected, rtol=1e-12, atol=1e-12)
    assert torch.linalg.svdvals(cells.recurrent[0]).tolist() == pytest.approx([1.1] * 7)


def test_a_network_that_is_not_finite_leaves_the_others_alone():
    torch.manual_seed(0)
    cells = Cells(3, 5, 1.0)
    x, y = adding(4, 6, torch.Generator().manual_seed(0))
    whole = torch.autograd.grad((cells(x) - y).square().mean((1, 2)).sum(), list(cells.parameters()))
    with torch.no_grad():
        cells.output[0] = math.inf
    broken = torch.autograd.grad((cells(x) - y).square().mean((1, 2)).sum(), list(cells.parameters()))
    assert not all(g[0].isfinite().all() for g in broken)
    for before, after in zip(whole, broken):
        torch.testing.assert_close(before[1:], after[1:])


@pytest.mark.parametrize("length", [2, 3, 50])
def test_the_adding_problem(length):
    x, y = adding(500, length, torch.Generator().manual_seed(0))
    numbers, marks = x.unbind(-1)
    assert (marks.sum(1) == 2).all()
    assert (marks[:, : length // 2].sum(1) == 1).all()
    assert torch.equal((numbers * marks).sum(1, keepdim=True), y)
    assert (y - 1).square().mean().item() == pytest.approx(1 / 6, abs=0.03)  # what always answering 1 costs


def test_what_clipping_keeps():
    """E21: by norm the direction, with one norm over all parameters; by value each element's bound and sign."""
    gradients = [torch.tensor([30.0, -0.001]), torch.tensor([[40.0]])]
    config = Config(clip_norm=1.0, clip_value=0.05)
    by_norm, by_value = clipped(gradients, "norm", config), clipped(gradients, "value", config)
    assert global_norm(by_norm).item() == pytest.approx(1.0)
    assert (by_norm[0][0] / by_norm[1][0, 0]).item() == pytest.approx(0.75)
    assert [t.flatten().tolist() for t in by_value] == [pytest.approx([0.05, -0.001]), pytest.approx([0.05])]
    assert clipped(gradients, "unclipped", config) is gradients
    assert global_norm(clipped([torch.zeros(3)], "norm", config)).item() == 0
    beyond = Config(clip_norm=1e300, clip_value=1e300)  # no float32 is that large: nothing is clipped
    for name in ("norm", "value"):
        assert all(map(torch.equal, clipped(gradients, name, beyond), gradients))


def test_the_end_is_noted_where_it_happens_and_the_network_left_there(tmp_path):
    """The unclipped network's last weights are finite; it moves no more, while the clipped ones go on.

    Where it ends is chaotic, but with a rate of 1 every one of eight seeds ends after 14 to 18 steps.
    """
    flags = {"width": 16, "length": 30, "gain": 1.5, "learning_rate": 1.0, "test_examples": 50}
    flags |= {"steps": 80, "save_every": 40}
    done = etude.run("basics/clipping", out=tmp_path / "run", quiet=True, seed=0, **flags)
    assert done.metrics["diverged"] == 1
    assert 1 <= done.metrics["unclipped_steps"] < 40
    half, whole = (checkpoint.read(path) for path in checkpoint.list_checkpoints(done.folder / "checkpoints"))
    for name, one in half["cells"].items():
        two = whole["cells"][name]
        assert one.isfinite().all()
        assert torch.equal(one[0], two[0])
        assert not torch.equal(one[1], two[1])
        assert not torch.equal(one[2], two[2])
    end = int(done.metrics["unclipped_steps"])
    assert np.isfinite(whole["seen"]["loss"][0, :end]).all()
    assert np.isnan(whole["seen"]["loss"][0, end:]).all()
    assert np.isfinite(whole["seen"]["loss"][1:]).all()


def test_a_calm_network_does_not_diverge(tmp_path):
    flags = {"gain": 0.9, "learning_rate": 0.01, "width": 8, "length": 10, "steps": 20}
    done = etude.run("basics/clipping", out=tmp_path / "run", quiet=True, seed=0, **flags)
    assert done.metrics["diverged"] == 0
    assert done.metrics["unclipped_steps"] == 20
    assert "test_loss_unclipped" in done.metrics


SMALL = {"length": 9, "width": 6, "gain": 1.3, "steps": 7, "batch": 5, "learning_rate": 0.2, "test_examples": 11}


def plain(cells, i):
    """Network `i` in torch's own parts: nn.RNN and nn.Linear."""
    rnn, head = nn.RNN(2, cells.bias.shape[-1], batch_first=True), nn.Linear(cells.bias.shape[-1], 1)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(cells.recurrent[i].T)
        rnn.weight_ih_l0.copy_(cells.input[i].T)
        rnn.bias_ih_l0.copy_(cells.bias[i, 0])
        rnn.bias_hh_l0.zero_()
        rnn.bias_hh_l0.requires_grad_(False)
        head.weight.copy_(cells.output[i].T)
        head.bias.copy_(cells.shift[i, 0])
    return rnn, head


def answers(network, x):
    return network[1](network[0](x)[0][:, -1])


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "extra", [{}, {"clip_norm": 0.3, "clip_value": 0.02}, {"batch": 1}, {"gain": 0.8, "length": 2}]
)
def test_loop_equals_a_plain_one(extra, tmp_path, double):
    """Each network alone, in torch's parts: the same sequences, its own clipping, a rate that falls to 0."""
    flags = SMALL | extra
    done = etude.run("basics/clipping", out=tmp_path / "run", quiet=True, seed=4, **flags)
    config = Config(**flags)
    torch.manual_seed(fold(4, 0, 0, "init"))
    start = build(config, Spec())["cells"]
    networks = [plain(start, i) for i in range(3)]
    optimizers = [
        torch.optim.SGD([p for part in network for p in part.parameters() if p.requires_grad]) for network in networks
    ]
    losses, norms, shortened = np.zeros((3, 7)), np.zeros((3, 7)), [0, 0]
    for step in range(7):
        x, y = adding(config.batch, config.length, generator(4, step, 0, "batch"))
        for i, (network, optimizer) in enumerate(zip(networks, optimizers)):
            optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / 7)
            optimizer.zero_grad()
            loss = ((answers(network, x) - y) ** 2).mean()
            loss.backward()
            grads = [p.grad for p in optimizer.param_groups[0]["params"]]
            losses[i, step], norms[i, step] = loss.item(), math.sqrt(sum(float((g**2).sum()) for g in grads))
            for g in grads:
                if NAMES[i] == "norm":
                    g *= min(1.0, config.clip_norm / norms[i, step])
                    shortened[0] += norms[i, step] > config.clip_norm
                elif NAMES[i] == "value":
                    shortened[1] += bool((g.abs() > config.clip_value).any())
                    g.clamp_(-config.clip_value, config.clip_value)
            optimizer.step()
    assert min(shortened) > 0, "both limits were met"
    got = etude.load(done.folder)
    cells = got.modules["cells"]
    for i, (rnn, head) in enumerate(networks):
        for ours, theirs in (
            (cells.recurrent[i].T, rnn.weight_hh_l0),
            (cells.input[i].T, rnn.weight_ih_l0),
            (cells.bias[i, 0], rnn.bias_ih_l0),
            (cells.output[i].T, head.weight),
            (cells.shift[i, 0], head.bias),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got.state["seen"]["loss"], losses, rtol=1e-9)
    np.testing.assert_allclose(got.state["seen"]["norm"], norms, rtol=1e-9)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    for i, name in enumerate(NAMES):
        assert [row[f"loss_{name}"] for row in rows] == pytest.approx(losses[i])
        assert [row[f"gradient_{name}"] for row in rows] == pytest.approx(norms[i])


@pytest.mark.parametrize(
    "extra", [{"gain": 0.9, "learning_rate": 0.02}, {"width": 32, "learning_rate": 3.0, "steps": 40}]
)
def test_reported_numbers_are_those_of_the_last_networks_on_fresh_sequences(extra, tmp_path):
    flags = SMALL | extra
    done = etude.run("basics/clipping", out=tmp_path / "run", quiet=True, seed=4, **flags)
    got = etude.load(done.folder)
    cells, seen = got.modules["cells"], got.state["seen"]
    x, y = adding(flags["test_examples"], flags["length"], generator(4, -1, 0, "test"))
    over = [i for i, loss in enumerate(seen["loss"][0]) if not math.isfinite(loss)]
    expected = {"diverged": float(bool(over)), "unclipped_steps": float(over[0] if over else flags["steps"])}
    for i, name in enumerate(NAMES):
        if i or not over:
            with torch.no_grad():
                expected[f"test_loss_{name}"] = ((answers(plain(cells, i), x) - y) ** 2).mean().item()
        if i:
            expected[f"largest_gradient_{name}"] = max(seen["norm"][i])
    assert bool(over) == (flags["steps"] == 40)
    assert done.metrics == pytest.approx(expected, rel=1e-4)


def test_a_last_update_that_is_one_too_many_counts_as_the_end(tmp_path):
    """The loss of the one step was finite; the network it left is not."""
    flags = SMALL | {"steps": 1, "learning_rate": 1e30}
    done = etude.run(
        "basics/clipping", out=tmp_path / "run", quiet=True, seed=4, **flags, clip_norm=1e-30, clip_value=1e-30
    )
    assert (done.metrics["diverged"], done.metrics["unclipped_steps"]) == (1, 1)
    assert "test_loss_unclipped" not in done.metrics
