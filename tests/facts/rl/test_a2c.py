"""The loss of A2C against torch's, n-step returns against a double loop, one world and one step as online actor-critic."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import etude
from etude.blocks.acting.returns import lambda_advantages
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold, generator
from etude.optim.flat import flatten
from etude.rl.a2c import Config, loss_of, slopes_of
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.policies import categorical_draw
from etude.rl.parts.remembered import Collector, advantages
from etude.rl.parts.remembered import drawn as draw


def drawn(seed=0, count=12):
    torch.manual_seed(seed)
    model = ActorCritic(3, 4, (5,)).double()
    torch.nn.init.normal_(model.policy[-1].weight)
    weight = torch.full((count,), 1 / max(count, 1)).double()
    return model, torch.randn(count, 3).double(), torch.randint(4, (count,)), torch.randn(2, count).double(), weight


def test_the_loss_is_torchs():
    model, state, action, (advantage, returns), weight = drawn()
    config = Config(value_coefficient=0.7, entropy_bonus=0.3)
    loss, error, entropy = loss_of(*told(model, state, action), advantage, returns, weight, config)
    policy, value = Categorical(logits=model.logits(state)), model.value(state)
    want = torch.nn.functional.mse_loss(value, returns)
    torch.testing.assert_close(error, want)
    torch.testing.assert_close(entropy, policy.entropy().mean())
    want = 0.7 * want - (advantage * policy.log_prob(action)).mean() - 0.3 * policy.entropy().mean()
    torch.testing.assert_close(loss, want)


def told(model, state, action):
    logits, value = model(state)
    return logits, action, value


def test_the_slopes_are_those_of_autograd_and_a_reset_has_none():
    model, state, action, (advantage, returns), _ = drawn()
    config = Config(value_coefficient=0.7, entropy_bonus=0.3)
    weight = torch.tensor([0, 1, 1, 0] * 3).double() / 6
    logits, _, value = (part.detach().requires_grad_(part.is_floating_point()) for part in told(model, state, action))
    loss, error, entropy = loss_of(logits, action, value, advantage, returns, weight, config)
    want = torch.autograd.grad(loss, (logits, value))
    found = slopes_of(logits.detach(), action, value.detach(), advantage, returns, weight, config)
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert (ours[weight == 0] == 0).all()
    real = weight > 0  # means over the transitions alone
    assert error.item() == pytest.approx((value - returns)[real].square().mean().item())
    assert entropy.item() == pytest.approx(Categorical(logits=logits).entropy()[real].mean().item())


def test_without_advantage_an_entropy_bonus_raises_the_entropy():
    model, state, action, (_, returns), weight = drawn()
    before = model.judge(state, action)[1].mean().item()
    config = Config(entropy_bonus=1.0)
    logits, value = model(state)
    slopes = slopes_of(logits.detach(), action, value.detach(), 0 * returns, returns, weight, config)
    torch.autograd.backward((logits, value), slopes)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter -= 0.01 * parameter.grad
    assert model.judge(state, action)[1].mean().item() > before


def test_nothing_real_is_no_gradient():
    model, state, action, (advantage, returns), weight = drawn()
    parts = *(part.detach() for part in told(model, state, action)), advantage, returns, 0 * weight, Config()
    assert all(number == 0 for number in loss_of(*parts))
    assert all((slope == 0).all() for slope in slopes_of(*parts))


def collected(env="CartPole-v1", count=4, steps=60, shared=False, engine="gymnasium"):
    torch.manual_seed(1)
    worlds = Worlds.make(env, count, 0, engine=engine)
    model = ActorCritic(worlds.size, worlds.actions, (6, 5), shared)
    torch.nn.init.normal_(model.policy[-1].weight)
    flatten(model)
    return model, Collector(model, worlds, steps)


def test_n_step_returns_by_a_double_loop():
    """λ = 1: Σ γ^k r to the end of the segment or of the episode, with V behind unless the task is over."""
    _, collector = collected()
    rows = collector.play(generator(0))
    rows = rows._replace(reward=(np.random.default_rng(0).normal(size=(60, 4)) * rows.real).astype(np.float32))
    found, returns = advantages(rows, 0.9, 1.0)
    for i in range(4):
        for t in range(60):
            if not rows.real[t, i]:
                continue
            total, k = 0.0, t
            while True:
                total += 0.9 ** (k - t) * float(rows.reward[k, i])
                if rows.terminated[k, i]:
                    break
                if k == 59 or rows.truncated[k, i]:
                    total += 0.9 ** (k + 1 - t) * float(rows.behind[k, i])
                    break
                k += 1
            assert float(returns[t, i]) == pytest.approx(total, abs=1e-5)
            assert float(found[t, i]) == pytest.approx(total - float(rows.value[t, i]), abs=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_advantages_are_those_of_any_segment(lam):
    _, collector = collected(engine="compiled")
    collector.worlds.env.elapsed[:] = (480, 490, 470, 490)
    rows = collector.play(generator(0))
    assert rows.truncated.any()
    assert rows.terminated.any()
    parts = [torch.from_numpy(part) for part in (rows.reward, rows.terminated, rows.truncated, rows.value, rows.behind)]
    want = lambda_advantages(*parts, 0.9, lam)
    found, returns = advantages(rows, 0.9, lam)
    np.testing.assert_allclose(found, want, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(returns, want.numpy() + rows.value, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("over", ["terminated", "truncated"])
def test_a_reward_of_one_that_is_cut_or_ends(over):
    """bugs-to-catch: behind a truncation the value counts, behind a termination nothing does; the last row of a segment too."""
    _, collector = collected(count=1, steps=2)
    rows = collector.play(generator(0))
    none, last = np.zeros((2, 1), bool), np.array([[False], [True]])
    rows = rows._replace(reward=np.ones((2, 1), np.float32), value=np.zeros((2, 1), np.float32))
    rows = rows._replace(behind=np.array([[0], [10]], np.float32), terminated=none, truncated=none)
    _, returns = advantages(rows._replace(**{over: last}), 0.5, 1.0)
    assert returns[:, 0].tolist() == ([1.5, 1.0] if over == "terminated" else [4.0, 6.0])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("engine", ["gymnasium", "compiled"])
def test_what_is_remembered_is_what_the_networks_say(shared, engine):
    """Rows, values and the gradient of three segments in a row, against the worlds stepped by hand and autograd."""
    model, collector = collected(shared=shared, engine=engine, steps=9)
    twin = Worlds.make("CartPole-v1", 4, 0, engine=engine)
    twin.step(np.zeros(4, int))  # elapsed 1 in both
    collector.worlds.step(np.zeros(4, int))
    for segment in range(3):
        rows = collector.play(generator(segment))
        dice = generator(segment)
        for t in range(9):
            state = torch.from_numpy(twin.observation)
            np.testing.assert_array_equal(rows.state[t], state)
            action = model.act(state, model.noise(dice, 4)).numpy()
            np.testing.assert_array_equal(rows.action[t], action)
            row, here = twin.step(action), torch.arange(4)
            there = here[torch.from_numpy(rows.real[t])]
            np.testing.assert_array_equal(row.world, there)
            for name in ("reward", "terminated", "truncated"):
                np.testing.assert_array_equal(getattr(rows, name)[t, row.world], getattr(row, name))
                assert not getattr(rows, name)[t, ~rows.real[t]].any()
            with torch.no_grad():
                np.testing.assert_allclose(rows.value[t], model.value(state), atol=1e-6)
                behind = model.value(torch.from_numpy(row.next_state)).numpy()
            on = rows.real[t] & ~rows.terminated[t]
            np.testing.assert_allclose(rows.behind[t][on], behind[~row.terminated], atol=1e-6)
        np.testing.assert_array_equal(rows.state[9], twin.observation)
    seen = torch.from_numpy(rows.state[:-1]).flatten(0, 1)
    logits, value = model(seen)
    torch.testing.assert_close(rows.logits, logits.detach())
    by_logits, by_value = torch.randn(logits.shape), torch.randn(value.shape)
    want = torch.autograd.grad((logits, value), list(model.parameters()), (by_logits, by_value))
    collector.backward(by_logits, by_value)
    for parameter, slope in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, slope, atol=1e-5, rtol=1e-4)


def test_a_time_limit_is_asked_for_the_value_of_the_last_state():
    """Compiled worlds begin anew in the same step: V is that of the state reached, not of the next episode's first."""
    model, collector = collected(steps=4, engine="compiled")
    collector.worlds.env.elapsed[:] = (0, 497, 0, 498)
    rows = collector.play(generator(0))
    assert rows.truncated[2, 1]
    assert rows.truncated[1, 3]
    twin = Worlds.make("CartPole-v1", 4, 0, engine="compiled")
    twin.env.elapsed[:] = (0, 497, 0, 498)
    for t in range(4):
        row = twin.step(rows.action[t])
        with torch.no_grad():
            np.testing.assert_allclose(rows.behind[t], model.value(torch.from_numpy(row.next_state)), atol=1e-6)


def test_draws_are_the_policys():
    logits, uniform = torch.randn(500, 4), torch.rand(500, dtype=torch.float64)
    np.testing.assert_array_equal(draw(logits.numpy(), uniform.numpy()), categorical_draw(logits, uniform))
    sure = np.array([[0.0, -np.inf, 0.0]], np.float32)
    assert {int(draw(sure, np.array([u]))[0]) for u in (0.0, 0.49, 0.51, 1 - 2**-53)} == {0, 2}
    assert draw(np.array([[np.inf, 0.0]], np.float32), np.array([0.5])).shape == (1,)  # no warning; the update refuses


def test_an_online_actor_critic_is_one_world_and_one_step(tmp_path):
    """E88: δ = r + γ V(s') − V(s) of one transition; the first update by hand, with torch's RMSprop."""
    settings = {"preset": "online", "steps": 1, "widths": (6,), "final_episodes": 1, "evaluate_every": 0, "seed": 2}
    done = etude.run("rl/a2c", out=tmp_path / "run", quiet=True, **settings)
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


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    """Before the update: what is kept can be gone on from."""
    with pytest.raises(RunError, match="the update was not made"):
        etude.run("rl/a2c", preset="tiny", out=tmp_path / "run", quiet=True, learning_rate=1e30, clip_norm=1e30)
