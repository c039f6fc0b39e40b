"""A3C's parts: the shared RMSProp by the paper's formula, a gradient of weights that others have moved meanwhile, its sentences."""

import numpy as np
import pytest
import torch

import etude
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import RunError, UserError
from etude.core.randomness import generator
from etude.core.spec import Spec
from etude.optim.flat import flatten
from etude.rl import a3c
from etude.rl.a3c import Config, build, gradient_of, shared_rmsprop_
from etude.rl.parts.remembered import Collector

SMALL = {"steps": 200, "workers": 2, "worlds": 2, "segment": 5, "widths": (6,), "collect": 50, "quiet": True}
SMALL |= {"evaluate_every": 0, "evaluation_episodes": 1, "final_episodes": 2}


@pytest.mark.parametrize("seed", range(2))
def test_shared_rmsprop_is_the_papers(seed):
    dice = np.random.default_rng(seed)
    theta, square = dice.normal(size=7), np.zeros(7)
    ours = torch.from_numpy(theta.copy()), torch.zeros(7).double()
    for _ in range(5):
        slope, rate = dice.normal(size=7), float(dice.random())
        square = 0.9 * square + 0.1 * slope**2
        theta = theta - rate * slope / np.sqrt(square + 1e-3)  # ε inside the root
        shared_rmsprop_(*ours, torch.from_numpy(slope), rate, 0.9, 1e-3)
    np.testing.assert_allclose(ours[0].numpy(), theta, rtol=1e-12)
    np.testing.assert_allclose(ours[1].numpy(), square, rtol=1e-12)


def test_a_gradient_is_that_of_the_weights_that_were_copied():
    """E90: what another worker does to θ between the copy and the update changes neither d nor what the other did."""
    config, spec = Config(workers=2, worlds=3, segment=5, widths=(6,)), Spec(extra={"size": 4, "actions": 2})
    torch.manual_seed(0)
    theta = flatten(build(config, spec)["model"]).data.clone()
    square = torch.zeros_like(theta)
    slopes = {}
    for order in ("01", "10"):
        shared, g, nets = theta.clone(), square.clone(), []
        for worker in range(2):  # both copy before anyone writes
            local = build(config, spec)["model"]
            weights = flatten(local)
            weights.data.copy_(shared)
            mine = Worlds.make("CartPole-v1", 3, 0, f"worker {worker}")
            gradient_of(Collector(local, mine, 5), weights, generator(0, worker, 0, "act"), config, False)
            nets.append(weights)
        for worker in map(int, order):
            shared_rmsprop_(shared, g, nets[worker].grad, 1e-3)
            assert slopes.setdefault(worker, nets[worker].grad.clone()).equal(nets[worker].grad)
        assert not shared.equal(theta)
        torch.testing.assert_close(g, 0.01 * (slopes[int(order[1])] ** 2) + 0.0099 * slopes[int(order[0])] ** 2)
    assert not slopes[0].equal(slopes[1])


def test_unusable_settings_and_failures_are_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(a3c, "show", lambda *given: None)
    with pytest.raises(UserError, match="discrete actions"):
        etude.run("rl/a3c", out=tmp_path / "a", **SMALL | {"env": "Pendulum-v1"})
    monkeypatch.setattr(a3c, "advantages", lambda rows, *given: (rows.value * np.nan, rows.value))
    with pytest.raises(RunError, match=r"the gradient is not finite after \d+ environment steps of a worker; lower"):
        etude.run("rl/a3c", out=tmp_path / "b", **SMALL)
