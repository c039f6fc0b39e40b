"""The loss of A2C against torch's, n-step returns against a double loop, one world and one step as online actor-critic."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import etude
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import UserError
from etude.rl.a2c import Config, loss_of
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.rollouts import Segment, advantages, collect


def drawn(seed=0, count=12):
    torch.manual_seed(seed)
    model = ActorCritic(3, 4, (5,)).double()
    torch.nn.init.normal_(model.policy[-1].weight)
    return model, torch.randn(count, 3).double(), torch.randint(4, (count,)), torch.randn(2, count).double()


def test_the_loss_is_torchs():
    model, state, action, (advantage, returns) = drawn()
    config = Config(value_coefficient=0.7, entropy_bonus=0.3)
    loss, error = loss_of(*model.judge(state, action), advantage, returns, config)
    policy, value = Categorical(logits=model.logits(state)), model.value(state)
    want = torch.nn.functional.mse_loss(value, returns)
    torch.testing.assert_close(error, want)
    want = 0.7 * want - (advantage * policy.log_prob(action)).mean() - 0.3 * policy.entropy().mean()
    torch.testing.assert_close(loss, want)


def test_without_advantage_an_entropy_bonus_raises_the_entropy():
    model, state, action, (_, returns) = drawn()
    before = model.judge(state, action)[1].mean().item()
    loss, _ = loss_of(*model.judge(state, action), torch.zeros_like(returns), returns, Config(entropy_bonus=1.0))
    loss.backward()
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter -= 0.01 * parameter.grad
    assert model.judge(state, action)[1].mean().item() > before


def test_nothing_real_is_no_gradient():
    model, state, action, (advantage, returns) = drawn(count=0)
    loss, error = loss_of(*model.judge(state, action), advantage, returns, Config())
    loss.backward()
    assert loss == error == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_n_step_returns_by_a_double_loop():
    """λ = 1: Σ γ^k r to the end of the segment or of the episode, with V behind unless the task is over."""
    worlds = Worlds.make("CartPole-v1", 4, 0)
    rows = collect(worlds, lambda s: (s[:, 2] > 0).long(), 60, torch.device("cpu"))
    rows = rows._replace(
        reward=torch.randn(rows.reward.shape, generator=torch.Generator().manual_seed(0)).double() * rows.real
    )

    def value(state):
        return state.double().sum(1).sin()

    _, returns = advantages(rows, value, 0.9, 1.0)
    for i in range(4):
        for t in range(60):
            if not rows.real[t, i]:
                continue
            total, k = 0.0, t
            while True:
                total += 0.9 ** (k - t) * rows.reward[k, i]
                if rows.terminated[k, i]:
                    break
                if k == 59 or rows.truncated[k, i]:
                    total += 0.9 ** (k + 1 - t) * value(rows.state[k + 1, i][None])[0]
                    break
                k += 1
            assert float(returns[t, i]) == pytest.approx(float(total), abs=1e-10)


@pytest.mark.parametrize("over", ["terminated", "truncated"])
def test_a_reward_of_one_that_is_cut_or_ends(over):
    """bugs-to-catch: behind a truncation the value counts, behind a termination nothing does; the last row of a segment too."""
    flags = {name: torch.zeros(2, 1, dtype=torch.bool) for name in ("terminated", "truncated")}
    flags[over][1] = True
    state = torch.zeros(3, 1, 1)
    reached = torch.ones(1, 1) if over == "truncated" else torch.empty(0, 1)
    rows = Segment(
        state, torch.zeros(2, 1).long(), torch.ones(2, 1), **flags, real=torch.ones(2, 1).bool(), reached=reached
    )
    _, returns = advantages(rows, lambda s: 10 * s[:, 0], 0.5, 1.0)
    assert returns[:, 0].tolist() == ([1.5, 1.0] if over == "terminated" else [4.0, 6.0])


def test_an_online_actor_critic_is_one_world_and_one_step(tmp_path):
    """E88: δ = r + γ V(s') − V(s) of one transition; the first update by hand, with torch's RMSprop."""
    settings = {"preset": "online", "steps": 1, "widths": (6,), "final_episodes": 1, "evaluate_every": 0, "seed": 2}
    done = etude.run("rl/a2c", out=tmp_path / "run", quiet=True, **settings)
    from etude.core.randomness import fold, generator

    torch.manual_seed(fold(2, 0, 0, "init"))
    model = ActorCritic(4, 2, (6,))
    worlds = Worlds.make("CartPole-v1", 1, 2)
    state = torch.from_numpy(worlds.observation)
    action = model.act(state, model.noise(generator(2, 0, 0, "act"), 1))
    row = worlds.step(action.numpy())
    log_prob = Categorical(logits=model.logits(state)).log_prob(action)
    with torch.no_grad():
        target = float(row.reward[0]) + 0.99 * model.value(torch.from_numpy(row.next_state))
        delta = target - model.value(state)
    loss = 0.5 * (model.value(state) - target).square().mean() - (delta * log_prob).mean()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-4, alpha=0.99, eps=1e-5)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    for ours, theirs in zip(etude.load(done.folder).model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_an_online_run_goes_through_resets(tmp_path):
    settings = {"preset": "online", "steps": 200, "widths": (6,), "final_episodes": 1, "evaluate_every": 0}
    done = etude.run("rl/a2c", out=tmp_path / "run", quiet=True, **settings)
    assert all(math.isfinite(value) for value in done.metrics.values())
    assert done.metrics["env_steps"] < 200  # some of the steps were resets
    assert np.isfinite([p.detach().numpy().sum() for p in etude.load(done.folder).model.parameters()]).all()


@pytest.mark.parametrize(
    ("settings", "said"), [({"env": "Pendulum-v1"}, "Pendulum"), ({"env": "CartPole-v9"}, "CartPole")]
)
def test_refusals(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("rl/a2c", out=tmp_path / "run", quiet=True, **settings)
