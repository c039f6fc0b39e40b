"""The temperature and the soft value by hand; the optimal soft policy of a bandit in closed form. The squashed density's own
tests lie with `rl/off_policy_actor_critic`."""

import math

import pytest
import torch

import etude
from etude.core.errors import RunError, UserError
from etude.rl import sac
from etude.rl.parts.continuous import SquashedGaussian
from etude.rl.sac import Temperature, soft_value

SMALL = {"steps": 96, "worlds": 2, "collect": 16, "updates": 3, "batch": 8, "learning_starts": 20, "widths": (6, 5)}
SMALL |= {"evaluation_episodes": 1, "final_episodes": 1, "evaluate_every": 0, "quiet": True}


def test_soft_value_is_the_smaller_one_and_the_entropy():
    values, log_prob = torch.tensor([[1.0, 5.0], [2.0, 4.0]]), torch.tensor([-0.5, 2.0])
    torch.testing.assert_close(soft_value(values, log_prob, 0.5), torch.tensor([1.25, 3.0]))


@pytest.mark.parametrize(("entropy", "rises"), [(-3.0, True), (1.0, False), (-1.0, None)])
def test_temperature_rises_where_the_entropy_is_too_low(entropy, rises):
    temperature = Temperature(0.2)
    assert float(temperature()) == pytest.approx(0.2)
    temperature.learn(torch.full((4,), -entropy), -1.0)
    slope = float(temperature.log_alpha.grad)
    assert slope == pytest.approx(entropy + 1.0)  # H − H̄: log α goes against it
    assert rises is None or (slope < 0) == rises


def test_climbing_the_soft_value_finds_the_boltzmann_density():
    # one state, Q(u) = −c (u − 0.2)²: the best density is ∝ exp(Q/α); its mean and deviation by quadrature
    alpha, c = 0.1, 2.0
    torch.manual_seed(0)
    policy = SquashedGaussian(1, 1, ()).double()
    with torch.no_grad():
        policy.pairs[0][0].zero_()
    adam, noise = torch.optim.Adam(policy.parameters(), lr=0.02), torch.randn(4000, 1).double()
    state = torch.zeros(4000, 1).double()
    for _ in range(250):
        u, log_prob = policy.draw(state, noise)
        q = -c * (u[:, 0] - 0.2) ** 2
        adam.zero_grad()
        (-soft_value(torch.stack([q, q + 1]), log_prob, alpha).mean()).backward()
        adam.step()
    grid = torch.linspace(-1, 1, 100_001).double()
    weight = (-c * (grid - 0.2) ** 2 / alpha).exp()
    mean = float((weight * grid).sum() / weight.sum())
    deviation = math.sqrt(float((weight * (grid - mean) ** 2).sum() / weight.sum()))
    with torch.no_grad():
        u, _ = policy.draw(state, noise)
    assert float(u.mean()) == pytest.approx(mean, abs=0.01)
    assert float(u.std()) == pytest.approx(deviation, rel=0.05)


def test_nan_stops_the_run_before_the_update(tmp_path, monkeypatch):
    real = sac.td_target
    monkeypatch.setattr(sac, "td_target", lambda *given: real(*given) * float("nan"))
    with pytest.raises(RunError, match="loss is nan at step"):
        etude.run("rl/sac", out=tmp_path / "run", **SMALL)


def test_unusable_settings_are_answered(tmp_path):
    for settings, sentence in (({"env": "CartPole-v1"}, "needs continuous actions"), ({"worlds": 60}, "must not fall")):
        with pytest.raises(UserError, match=sentence):
            etude.run("rl/sac", out=tmp_path / "run", **SMALL | settings)
