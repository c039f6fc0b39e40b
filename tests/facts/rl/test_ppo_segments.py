"""Segments against worlds that are counted by hand, advantages by their definition, a policy and a value as one or two networks."""

from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from etude.blocks.acting.environments import Environment
from etude.blocks.acting.worlds import Worlds
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.policies import CategoricalPolicy
from etude.rl.parts.rollouts import advantages, collect


class Counter(gymnasium.Env):
    """Observes how many steps the episode has had, and its number; ends after 3 steps (by `over`) and pays the count."""

    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(2)
    metadata: ClassVar = {"render_modes": []}
    over, number = "terminated", 0

    def _seen(self):
        return np.array([self.t, self.number], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.number = 0, self.number + 1
        return self._seen(), {}

    def step(self, action):
        self.t += 1
        ended = self.t == 3
        return self._seen(), float(self.t), ended and self.over == "terminated", ended and self.over == "truncated", {}


def segment_of(over, steps=8, count=2):
    kind = Environment("counter", type("C", (Counter,), {"over": over}), own=True)
    worlds = Worlds.make(kind, count)
    return collect(worlds, lambda s: torch.zeros(len(s), dtype=torch.int64), steps, torch.device("cpu")), worlds


@pytest.mark.parametrize("over", ["terminated", "truncated"])
def test_no_pair_crosses_a_reset(over):
    rows, worlds = segment_of(over)
    assert rows.real.all()  # these worlds are reset in the same step
    for t in range(8):
        for i in range(2):
            count = rows.state[t, i, 0]
            assert rows.reward[t, i] == count + 1
            ended = count == 2
            assert rows.terminated[t, i] == (ended and over == "terminated")
            assert rows.truncated[t, i] == (ended and over == "truncated")
            assert rows.state[t + 1, i, 0] == (0 if ended else count + 1)
    assert len(rows.reached) == (4 if over == "truncated" else 0)
    assert (rows.reached[:, :1] == 3).all()  # the state that was reached, not the next episode's first
    again = collect(worlds, lambda s: torch.zeros(len(s), dtype=torch.int64), 2, torch.device("cpu"))
    torch.testing.assert_close(again.state[0], rows.state[-1])  # the worlds go on


def test_rows_of_a_reset_are_not_real():
    """Gymnasium's own vector CartPole spends a step on the reset."""
    worlds = Worlds.make("CartPole-v1", 3, 0)
    rows = collect(worlds, lambda s: torch.ones(len(s), dtype=torch.int64), 40, torch.device("cpu"))
    ended = rows.terminated | rows.truncated
    assert ended.any()
    np.testing.assert_array_equal(~rows.real[1:].numpy(), ended[:-1].numpy())
    assert int(rows.real.sum()) == worlds.steps


def brute(rows, value, gamma, lam):
    """Σ_k (γλ)^k δ_(t+k) within the episode, every δ by the state truly reached."""
    steps, count = rows.reward.shape
    found = torch.zeros(steps, count, dtype=torch.float64)
    places = rows.truncated.nonzero().tolist()
    for i in range(count):
        for t in range(steps):
            weight = 1.0
            for u in range(t, steps):
                behind = value(rows.state[u + 1, i][None])[0]
                if [u, i] in places:
                    behind = value(rows.reached[places.index([u, i])][None])[0]
                if rows.terminated[u, i]:
                    behind = 0.0
                delta = rows.reward[u, i] + gamma * behind - value(rows.state[u, i][None])[0]
                found[t, i] += weight * delta
                weight *= gamma * lam
                if rows.terminated[u, i] or rows.truncated[u, i]:
                    break
    return found


def value(state):
    return (state.double() @ torch.tensor([1.5, -0.7], dtype=torch.float64)).sin() * 2


@pytest.mark.parametrize("over", ["terminated", "truncated"])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_advantages_by_their_definition(over, lam):
    rows, _ = segment_of(over)
    rows = rows._replace(reward=rows.reward.double())
    got, returns = advantages(rows, value, 0.9, lam)
    torch.testing.assert_close(got, brute(rows, value, 0.9, lam), atol=1e-10, rtol=0)
    torch.testing.assert_close(returns, got + value(rows.state[:-1]), atol=1e-12, rtol=0)


def test_resets_in_between_change_nothing():
    worlds = Worlds.make("CartPole-v1", 3, 0)
    rows = collect(worlds, lambda s: torch.ones(len(s), dtype=torch.int64), 40, torch.device("cpu"))

    def of(state):
        return state.double().sum(-1).cos()

    got, _ = advantages(rows._replace(reward=rows.reward.double()), of, 0.95, 0.9)
    want = brute(rows._replace(reward=rows.reward.double()), of, 0.95, 0.9)
    torch.testing.assert_close(got[rows.real], want[rows.real], atol=1e-9, rtol=0)


def test_two_networks_share_nothing_and_one_trunk_adds_its_gradients():
    """7.4.4.4: one head's loss alone leaves the other's network as it is; in a trunk the two gradients add."""
    torch.manual_seed(0)
    state, action = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])

    def gradients(model, policy, critic):
        model.zero_grad()
        log_prob, _, v = model.judge(state, action)
        (policy * log_prob.mean() + critic * v.square().mean()).backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    two = ActorCritic(4, 2, (6, 5))
    assert all((g == 0).all() for name, g in gradients(two, 1, 0).items() if name.startswith("critic"))
    assert all((g == 0).all() for name, g in gradients(two, 0, 1).items() if name.startswith("policy"))
    one = ActorCritic(4, 2, (6, 5), shared=True)
    both, first, second = (gradients(one, *weights) for weights in ((1, 1), (1, 0), (0, 1)))
    for name in both:
        torch.testing.assert_close(both[name], first[name] + second[name], atol=1e-6, rtol=1e-4)
    assert (first["trunk.0.0.weight"] != 0).any()
    assert (second["trunk.0.0.weight"] != 0).any()
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in two.parameters())


def test_it_acts_as_the_policy_with_its_logits():
    torch.manual_seed(1)
    for shared in (False, True):
        model, policy = ActorCritic(4, 3, (6,), shared), CategoricalPolicy(4, 3, ())
        policy.forward = model.logits
        state = torch.randn(50, 4)
        noise = model.noise(torch.Generator().manual_seed(0), 50)
        assert (model.act(state, noise) == policy.act(state, noise)).all()
        assert (model.best(state) == policy.best(state)).all()
        action = model.act(state, noise)
        log_prob, entropy, v = model.judge(state, action)
        torch.testing.assert_close(log_prob, policy.judge(state, action)[0])
        torch.testing.assert_close(entropy, policy.judge(state, action)[1])
        torch.testing.assert_close(v, model.value(state))
        assert (entropy - np.log(3)).abs().max() < 0.01  # it begins near the uniform policy
