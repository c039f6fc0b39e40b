"""TD3's three changes one by one: the smaller target, the clipped noise a row, the actor that waits; networks' own tests lie
with `rl/off_policy_actor_critic`."""

import numpy as np
import pytest
import torch

import etude
from etude.core.errors import RunError, UserError
from etude.rl import td3
from etude.rl.parts import continuous
from etude.rl.td3 import least, smeared

SMALL = {"steps": 96, "worlds": 2, "collect": 16, "updates": 3, "batch": 8, "learning_starts": 20, "widths": (6, 5)}
SMALL |= {"evaluation_episodes": 1, "final_episodes": 1, "evaluate_every": 0, "quiet": True}


@pytest.fixture(autouse=True)
def _no_film(monkeypatch):
    monkeypatch.setattr(td3, "show", lambda *given: None)


def test_both_critics_learn_the_smaller_target():
    values = torch.tensor([[1.0, 5.0, -3.0], [2.0, 4.0, -3.5]])
    assert torch.equal(least(values), torch.tensor([[1.0, 4.0, -3.5], [1.0, 4.0, -3.5]]))


def test_target_noise_is_clipped_and_of_each_row_its_own():
    torch.manual_seed(0)
    best, noise = torch.rand(5000, 2).double() * 2 - 1, torch.randn(5000, 2).double()
    got = smeared(best, noise, 0.2, 0.5)
    by_hand = [
        [min(1.0, max(-1.0, b + min(0.5, max(-0.5, 0.2 * e)))) for b, e in zip(*rows)]
        for rows in zip(best.tolist(), noise.tolist())
    ]
    np.testing.assert_allclose(got.numpy(), by_hand, atol=1e-15)
    assert got.abs().max() == 1
    moved = smeared(torch.zeros(5000, 2).double(), noise, 0.2, 0.5)
    assert moved.abs().max() == 0.5
    assert len(moved[:, 0].unique()) > 4900
    assert float(moved.std()) == pytest.approx(0.2, rel=0.03)
    assert torch.equal(smeared(best, noise, 0.0, 0.5), best)


@pytest.mark.parametrize("worlds", [1, 8])
@pytest.mark.parametrize("delay", [1, 3])
def test_actor_and_targets_move_every_d_updates_whatever_the_worlds(worlds, delay, tmp_path, monkeypatch):
    moves, real = [], continuous.follow_

    def spy(target, source, tau):
        moves.append(type(target).__name__)
        real(target, source, tau)

    monkeypatch.setattr(td3, "follow_", spy)
    settings = SMALL | {"worlds": worlds, "delay": delay, "updates": 4}
    result = etude.run("rl/td3", out=tmp_path / "run", **settings)
    updates = int(result.metrics["updates"])
    assert updates == 5 * 4  # rounds 2 to 6
    assert moves == ["Critics", "DeterministicActor"] * (updates // delay)
    state = etude.load(result.folder).state
    assert [float(s["step"]) for s in state["actor_optimizer"]["state"].values()] == [updates // delay]
    assert [float(s["step"]) for s in state["optimizer"]["state"].values()] == [updates]


def test_nan_stops_the_run_before_the_update(tmp_path, monkeypatch):
    monkeypatch.setattr(td3, "least", lambda values: values * float("nan"))
    with pytest.raises(RunError, match="loss is nan at step"):
        etude.run("rl/td3", out=tmp_path / "run", **SMALL)


def test_unusable_settings_are_answered(tmp_path):
    for settings, sentence in (({"env": "CartPole-v1"}, "needs continuous actions"), ({"worlds": 60}, "must not fall")):
        with pytest.raises(UserError, match=sentence):
            etude.run("rl/td3", out=tmp_path / "run", **SMALL | settings)
