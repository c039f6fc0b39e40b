"""The policy's gradient against enumeration, V against linear equations, the death state against an augmented world."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import etude
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.rl import actor_critic
from etude.rl.actor_critic import Config, ages, mean, standardised, with_deaths
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.rollouts import Segment, advantages, collect

exact = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("enumeration.py"))))
CPU = torch.device("cpu")


def enumerated(gamma, weights):
    """(E[Σ_t w_t ∇log π Â_t], ∇J_γ) where V is exact: every trajectory is a world of its own, weighted by its probability."""
    world, theta = exact.small_world(), exact.small_policy()
    every = exact.trajectories(world)
    steps, count = world.horizon, len(every.chance)
    value, _ = exact.values(world, theta, gamma)
    clock = torch.arange(steps + 1)[:, None].expand(-1, count)
    last = torch.zeros(count, dtype=torch.int64)  # where a trajectory ends nobody looks
    place = torch.cat([every.state.T, last[None]])
    no = torch.zeros(steps, count, dtype=torch.bool)
    over = no.clone()
    over[-1] = True
    rows = Segment(
        torch.stack([clock, place], -1).double(), every.action.T, every.reward.T, over, no, ~no, torch.empty(0, 2)
    )
    advantage, _ = advantages(rows, lambda s: value[s[:, 0].long(), s[:, 1].long()], gamma, 0.0)
    chance = exact.probability(theta, every).detach()
    weight = gamma ** ages(rows, last)[:-1].double() if weights else torch.ones_like(advantage)
    gain = (chance * weight * advantage * exact.log_probs(theta, every).T).sum()
    return torch.autograd.grad(gain, theta)[0], exact.gradient(world, theta, gamma), advantage, chance, every


def test_with_the_true_v_its_expectation_is_the_gradient():
    """7.4.4.1: unbiased at γ = 1; E89: at γ < 1 only with γ^t at the policy's terms."""
    found, want, *_ = enumerated(1.0, weights=False)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)
    found, want, *_ = enumerated(0.7, weights=True)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)
    found, want, *_ = enumerated(0.7, weights=False)
    assert (found - want).abs().max() > 0.01


def test_advantages_of_the_true_v_have_mean_zero():
    """7.4.2: E_π[A(s, ·)] = 0 in every state and at every time."""
    _, _, advantage, chance, every = enumerated(0.9, weights=False)
    for t in range(len(advantage)):
        for s in range(2):
            here = every.state[:, t] == s
            assert abs(float((chance * advantage[t])[here].sum())) < 1e-12


class Chain:
    """A world of 4 states that never ends: p(s' | s) and r(s) under some policy, all known."""

    def __init__(self):
        dice = np.random.default_rng(0)
        self.move, self.reward = dice.dirichlet(np.ones(4), 4), dice.normal(size=4)

    def value(self, gamma):
        return np.linalg.solve(np.eye(4) - gamma * self.move, self.reward)


def test_a_death_state_is_a_discount():
    """7.4.4.2: V_γ is the undiscounted V of the world in which a step is the last with probability 1 − γ."""
    chain, gamma = Chain(), 0.8
    dead = np.zeros((5, 5))
    dead[:4, :4], dead[:4, 4], dead[4, 4] = gamma * chain.move, 1 - gamma, 1
    undiscounted = np.linalg.solve(np.eye(4) - dead[:4, :4], chain.reward)  # nothing follows the fifth state
    np.testing.assert_allclose(undiscounted, chain.value(gamma), atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_targets_with_deaths_mean_those_with_gamma(lam):
    """Every pattern of coins, each with its probability: the mean of the targets without γ is the target with γ."""
    gamma, steps = 0.7, 4
    dice = torch.Generator().manual_seed(0)
    reward, value = torch.randn(steps, 1, generator=dice).double(), torch.randn(steps + 1, generator=dice).double()
    no = torch.zeros(steps, 1, dtype=torch.bool)
    state = torch.arange(steps + 1.0)[:, None, None]
    rows = Segment(state, no.long(), reward, no, no, ~no, torch.empty(0, 1))
    _, want = advantages(rows, lambda s: value[s[:, 0].long()], gamma, lam)
    total = torch.zeros_like(want)
    for pattern in torch.cartesian_prod(*[torch.tensor([0, 1])] * steps):
        dead = pattern[:, None].bool()
        coin = torch.where(dead, gamma, torch.zeros(1).double())  # at γ itself it is over
        chance = ((1 - gamma) ** dead.sum()) * gamma ** (~dead).sum()
        there = with_deaths(rows, gamma, coin)
        assert (there.terminated == dead).all()
        total += chance * advantages(there, lambda s: value[s[:, 0].long()], 1.0, lam)[1]
    torch.testing.assert_close(total, want, atol=1e-6, rtol=0)


def test_deaths_come_at_their_rate_and_truly_over_stays_over():
    no = torch.zeros(400, 50, dtype=torch.bool)
    ended = no.clone()
    ended[::7] = True
    rows = Segment(torch.zeros(401, 50, 1), no.long(), no.float(), ended, no, ~no, torch.empty(0, 1))
    there = with_deaths(rows, 0.9, torch.rand(400, 50, generator=torch.Generator().manual_seed(0)))
    assert there.terminated[::7].all()
    assert float(there.terminated[~ended].float().mean()) == pytest.approx(0.1, abs=0.01)


def test_ages_are_those_of_the_environment():
    """Counted beside the worlds, over resets that take a row and over the edge of a segment."""
    worlds, start = Worlds.make("CartPole-v1", 3, 0), torch.zeros(3, dtype=torch.int64)
    known, seen = np.zeros(3, int), 0
    for _ in range(5):
        rows = collect(worlds, lambda s: (s[:, 2] > 0).long(), 20, CPU)
        found = ages(rows, start)
        for t in range(20):
            for i in range(3):
                if rows.real[t, i]:
                    assert found[t, i] == known[i]
                    known[i] += 1
                if rows.terminated[t, i] or rows.truncated[t, i]:
                    known[i], seen = 0, seen + 1
        start = found[-1]
    assert seen >= 3


def test_an_age_ends_with_a_time_limit_too():
    flags = torch.zeros(3, 3, 1, dtype=torch.bool)  # terminated, truncated, not real
    flags[1, 1] = True
    rows = Segment(
        torch.zeros(4, 1, 1), flags[0].long(), flags[0].float(), flags[0], flags[1], ~flags[2], torch.ones(1, 1)
    )
    assert ages(rows, torch.tensor([5]))[:, 0].tolist() == [5, 6, 0, 1]


def test_a_fit_to_bootstrapped_targets_ends_at_the_solution_of_the_linear_equations():
    """Line 3 with a table: V → (I − γP)⁻¹r where every transition is seen as often as it is probable (E87: y is constant)."""
    chain, gamma = Chain(), 0.6
    s, s2 = np.divmod(np.arange(16), 4)
    chance = torch.from_numpy(chain.move[s, s2] / 4)
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    no = torch.zeros(1, 16, dtype=torch.bool)
    state = torch.from_numpy(np.stack([s, s2])[..., None]).double()
    rows = Segment(state, no.long(), torch.from_numpy(chain.reward[s])[None], no, no, ~no, torch.empty(0, 1))
    for _ in range(60):
        wanted = advantages(rows, lambda x, v=table: v[x[:, 0].long()], gamma, 0.0)[1][0]
        assert not wanted.requires_grad
        for _ in range(40):
            error = (chance * (table[s] - wanted).square()).sum()
            (slope,) = torch.autograd.grad(error, table)
            with torch.no_grad():
                table -= slope
    np.testing.assert_allclose(table.detach().numpy(), chain.value(gamma), atol=1e-9)


def test_the_smallest_batches():
    assert mean(torch.empty(0)) == 0
    assert mean(torch.tensor([1.0, 3.0])) == 2
    assert standardised(torch.tensor([5.0])) == 5
    drawn = torch.randn(50).double() * 3 + 7
    want = (drawn.numpy() - drawn.numpy().mean()) / drawn.numpy().std(ddof=1)
    np.testing.assert_allclose(standardised(drawn).numpy(), want, atol=1e-7)


def test_one_step_of_one_world_is_the_online_form(tmp_path, monkeypatch):
    """Notes, Algorithm 12: first V, towards r + γ V(s'), then the policy by the new V; the first update by hand."""
    settings = {"preset": "online", "steps": 1, "widths": (6,), "final_episodes": 1, "evaluate_every": 0, "seed": 2}
    monkeypatch.setattr(actor_critic, "show", lambda *arguments: None)
    done = etude.run("rl/actor_critic", out=tmp_path / "run", quiet=True, **settings)
    config = actor_critic.PRESETS["online"]
    torch.manual_seed(fold(2, 0, 0, "init"))
    model = actor_critic.build(Config(widths=(6,)), Spec(extra={"size": 4, "actions": 2}))["model"]
    v = torch.optim.Adam(model.critic.parameters(), lr=config.critic_learning_rate)
    pi = torch.optim.Adam(model.policy.parameters(), lr=config.learning_rate)
    env = gymnasium.make_vec("CartPole-v1", num_envs=1, vectorization_mode="vector_entry_point")
    s = torch.from_numpy(env.reset(seed=fold(2, 0, 0, "training"))[0])
    a = model.act(s, model.noise(generator(2, 0, 0, "act"), 1))
    s2, reward, *_ = env.step(a.numpy())
    s2, r = torch.from_numpy(s2), float(reward[0])
    target = r + 0.99 * model.value(s2).detach()
    nn.functional.mse_loss(model.value(s), target).backward()
    v.step()
    with torch.no_grad():
        delta = r + 0.99 * model.value(s2) - model.value(s)
    (-delta * Categorical(logits=model.logits(s)).log_prob(a)).sum().backward()
    pi.step()
    for ours, theirs in zip(etude.load(done.folder).model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_each_loss_moves_its_own_network_and_both_move_a_trunk(shared, tmp_path, monkeypatch):
    """7.4.4.4: with one of the two rates as good as 0, one head stays; two networks share nothing."""
    settings = {"preset": "tiny", "steps": 128, "evaluate_every": 0, "final_episodes": 1, "shared": shared, "seed": 1}
    torch.manual_seed(fold(1, 0, 0, "init"))
    before = ActorCritic(4, 2, (16,), shared)
    monkeypatch.setattr(actor_critic, "show", lambda *arguments: None)
    rates = ("learning_rate", "critic_learning_rate")
    for rate, still, moves in ((rates[0], "policy", "critic"), (rates[1], "critic", "policy")):
        done = etude.run("rl/actor_critic", out=tmp_path / rate, quiet=True, **settings, **{rate: 1e-30})
        after = etude.load(done.folder).model
        change = {
            part: max(
                (float((one - other).detach().abs().max()) for one, other in zip(*(
                    getattr(model, part).parameters() for model in (before, after)
                ))),
                default=0.0,
            )
            for part in ("trunk", "policy", "critic")
        }  # fmt: skip
        assert change[still] < 1e-12 < 1e-4 < change[moves]
        assert (change["trunk"] > 1e-4) == shared


@pytest.mark.parametrize(
    ("settings", "said"), [({"env": "Pendulum-v1"}, "Pendulum"), ({"env": "CartPole-v9"}, "CartPole")]
)
def test_refusals(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("rl/actor_critic", out=tmp_path / "run", quiet=True, **settings)
