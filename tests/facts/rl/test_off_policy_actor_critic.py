"""E97: the three gradients of E_{a~π} Q against quadrature and closed forms; targets, bounds and squashed densities."""

import math
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, TanhTransform

import etude
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import RunError, UserError
from etude.rl import off_policy_actor_critic as opac
from etude.rl.off_policy_actor_critic import climb, expected_value
from etude.rl.parts import continuous
from etude.rl.parts.continuous import (
    Bounds,
    Critics,
    DeterministicActor,
    SquashedGaussian,
    follow_,
    frozen,
    gather,
    replay_of,
    squashed_log_prob,
)

SMALL = {"steps": 96, "worlds": 2, "collect": 16, "updates": 3, "batch": 8, "learning_starts": 20, "widths": (6, 5)}
SMALL |= {"evaluation_episodes": 1, "final_episodes": 2, "evaluate_every": 0, "quiet": True}


class Recorder(gymnasium.Env):
    """A box of [−2, 6] × [0, 1]; it remembers what was done to it, and its time limit cuts at 5."""

    observation_space = spaces.Box(-9, 9, (2,), np.float32)
    action_space = spaces.Box(np.float32([-2, 0]), np.float32([6, 1]))
    metadata: ClassVar = {"render_modes": []}
    done: ClassVar[list] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2).astype(np.float32)
        return self.x, {}

    def step(self, action):
        Recorder.done.append(np.array(action))
        self.x = (0.9 * self.x).astype(np.float32)
        return self.x, 1.0, bool(self.x[0] > 1), False, {}


if "etude-test/Recorder-v0" not in gymnasium.registry:
    gymnasium.register("etude-test/Recorder-v0", entry_point=Recorder, max_episode_steps=5)


# ------------------------------------------------------------------------------------------------- the gradients of E97


def smooth(state, action):
    """A Q that is no polynomial, (1, N)."""
    return (torch.sin(2 * action[:, 0] + state[:, 0]) - 0.3 * (action**2).sum(-1) * state[:, 1])[None]


def smooth_slope(state, action):
    """∂/∂a of it, (N, A)."""
    action = action.detach().requires_grad_()
    return torch.autograd.grad(smooth(state, action).sum(), action)[0]


@pytest.mark.parametrize("where", [0.2, 0.95])
def test_score_and_reparameterised_gradients_agree_in_mean_by_quadrature(where):
    """E97: the gradient of an expectation over actions wants one of the two, and both are the same in mean."""
    state, sigma, grid = torch.tensor([[0.4, -0.7]], dtype=torch.float64), 0.3, torch.linspace(-7, 7, 70_001).double()
    weight = (-0.5 * grid**2).exp() / (-0.5 * grid**2).exp().sum()

    def gradient(kind):
        """Σ_k w_k of the gradient by draw k alone: a row of `mean` each."""
        mean = torch.full((len(grid), 1), where, dtype=torch.float64)
        each = climb(smooth, smooth_slope, state.expand(len(grid), -1), mean, grid.view(1, -1, 1), sigma, kind)
        return float(weight @ each[:, 0])

    def integral(mean):
        action = (mean + sigma * grid[:, None]).clamp(-1, 1)
        return float(weight @ smooth(state.expand(len(grid), -1), action)[0])

    want = (integral(where + 1e-4) - integral(where - 1e-4)) / 2e-4  # the clip at 1 belongs to the world
    assert abs(want) > 0.02
    assert gradient("score") == pytest.approx(want, abs=1e-5)  # measured 1e-7 and 3e-6
    assert gradient("reparameterised") == pytest.approx(want, abs=1e-3 if where > 0.5 else 1e-5)
    mean = torch.tensor([[where]], dtype=torch.float64)
    still = climb(smooth, smooth_slope, state, mean, grid[:1].view(1, 1, 1), sigma, "mean")
    by_hand = 2 * math.cos(2 * where + 0.4) - 0.6 * where * -0.7
    assert float(still) == pytest.approx(by_hand, rel=1e-12)


def test_gradients_are_unbiased_through_the_networks():
    # the same for θ itself: every draw's gradient flows through μ_θ alone
    torch.manual_seed(0)
    actor, critic = DeterministicActor(2, 2, (5,)).double(), Critics(1, 2, 2, (7,)).double()
    state, noise = torch.randn(3, 2).double(), torch.randn(4000, 3, 2).double()
    grads = {}
    for kind in ("reparameterised", "score"):
        mean = actor(state)
        with torch.no_grad():
            up = climb(critic, critic.slope, state, mean, noise, 0.2, kind)
        slopes = torch.autograd.grad(mean, list(actor.parameters()), up / len(state))
        grads[kind] = torch.cat([g.flatten() for g in slopes])
    # measured 0.0013 of a gradient of norm 0.089
    assert (grads["score"] - grads["reparameterised"]).norm() < 0.03 * grads["reparameterised"].norm()


def test_expected_value_is_that_of_the_clipped_actions():
    def critic(s, u):
        return (u.sum(-1) + 10 * s[:, 0])[None]

    state, mean = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [-0.9]])
    noise = torch.tensor([[[1.0], [1.0]], [[2.0], [-3.0]]])
    got = expected_value(critic, state, mean, noise, 0.4, "reparameterised")
    torch.testing.assert_close(got, torch.tensor([10 + (0.9 + 1.0) / 2, 20 + (-0.5 - 1.0) / 2]))
    got = expected_value(critic, state, mean, noise, 0.4, "mean")
    torch.testing.assert_close(got, torch.tensor([10.5, 19.1]))


# --------------------------------------------------------------------------------------------------- networks and targets


@pytest.mark.parametrize("half", [1.0, 2.0, 0.25])
def test_squashed_density_is_that_of_torch_distributions(half):
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(40, 3).double(), torch.randn(40, 3).double() * 0.5, torch.randn(40, 3).double()
    x = mean + log_std.exp() * noise
    base = Independent(Normal(mean, log_std.exp()), 1)
    law = TransformedDistribution(base, [TanhTransform(cache_size=1), AffineTransform(0.0, half, event_dim=1)])
    action = law.transforms[1](law.transforms[0](x))  # cached: the inverse is not computed from saturated values
    torch.testing.assert_close(squashed_log_prob(x, mean, log_std, half), law.log_prob(action), atol=1e-9, rtol=1e-9)


def test_squashed_density_integrates_to_one_and_is_finite_where_tanh_is_one():
    a = torch.linspace(-2 + 1e-7, 2 - 1e-7, 400_001).double()[:, None]
    x = torch.atanh(a / 2)
    mean, log_std = torch.full_like(x, 0.3), torch.full_like(x, -0.2)
    area = torch.trapezoid(squashed_log_prob(x, mean, log_std, 2.0).exp(), a[:, 0])
    assert float(area) == pytest.approx(1.0, abs=1e-6)
    single, double = (
        squashed_log_prob(*(torch.tensor([[v]], dtype=kind) for v in (12.5, 12.0, -1.0)))
        for kind in (torch.float32, torch.float64)
    )
    assert float(single) == pytest.approx(float(double), rel=1e-5)
    far = squashed_log_prob(*(torch.tensor([[v]]) for v in (60.0, 60.0, 0.0)))
    assert torch.isfinite(far).all()


def test_squashed_policy_draws_what_it_says():
    torch.manual_seed(0)
    policy = SquashedGaussian(3, 2, (8,)).double()
    state, noise = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    u, log_prob = policy.draw(state, noise)
    mean, log_std = policy(state)
    torch.testing.assert_close(u, torch.tanh(mean + log_std.exp() * noise))
    law = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()])
    torch.testing.assert_close(log_prob, law.log_prob(u), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(policy.best(state), mean.tanh())


def test_critics_are_separate_mlps_that_start_like_torch():
    torch.manual_seed(3)
    critics = Critics(2, 3, 1, (8, 5))
    torch.manual_seed(3)
    layers = list(zip(*([nn.Linear(a, b) for a, b in ((4, 8), (8, 5), (5, 1))] for _ in range(2))))
    state, action = torch.randn(6, 3), torch.randn(6, 1)
    got = critics(state, action)
    for i in range(2):
        a, b, c = (pair[i] for pair in layers)
        want = nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)(torch.cat([state, action], 1))[:, 0]
        torch.testing.assert_close(got[i], want)
    assert not torch.allclose(got[0], got[1])


def gradients(module, value):
    """By the graph, one tensor a parameter; `.grad` is made ready for what is written out."""
    found = torch.autograd.grad(value, list(module.parameters()))
    for p in module.parameters():
        p.grad = torch.full_like(p, 9.0)
    return found


@pytest.mark.parametrize("widths", [(), (7,), (6, 5)])
def test_gradients_written_out_are_those_of_the_graph(widths):
    torch.manual_seed(5)
    state, noise, pull = torch.randn(9, 3).double(), torch.randn(9, 2).double(), torch.randn(9, 2).double()
    critics, actor = Critics(2, 3, 2, widths).double(), DeterministicActor(3, 2, widths).double()
    policy = SquashedGaussian(3, 2, widths).double()
    with torch.no_grad():
        policy.pairs[-1][1][2:] = torch.tensor([2.1, -1.0])  # one log σ in most rows beyond what is allowed
    action, weight = (torch.rand(9, 2).double() * 2 - 1).requires_grad_(), torch.randn(2, 9).double()
    smaller = critics(state, action).amin(0)
    towards, towards_least = (
        torch.autograd.grad(value.sum(), action)[0] for value in (critics(state, action)[0], smaller)
    )
    want = gradients(critics, (weight * critics(state, action)).sum())
    with torch.no_grad():
        torch.testing.assert_close(critics.slope(state, action), towards)
        torch.testing.assert_close(critics.least_slope(state, action), towards_least)
        q, kept = critics.follow(state, action)
        torch.testing.assert_close(q, critics(state, action))
        critics.learn(kept, weight)
    torch.testing.assert_close([p.grad for p in critics.parameters()], list(want))

    want = gradients(actor, (pull * actor(state)).sum())
    with torch.no_grad():
        u, kept = actor.act(state)
        torch.testing.assert_close(u, actor(state))
        actor.learn(kept, pull)
    torch.testing.assert_close([p.grad for p in actor.parameters()], list(want))

    u, log_prob = policy.draw(state, noise)
    want = gradients(policy, (pull * u).sum() + 0.7 * log_prob.sum())
    with torch.no_grad():
        again, density, kept = policy.act(state, noise)
        torch.testing.assert_close((again, density), (u.detach(), log_prob.detach()))
        policy.learn(kept, pull, 0.7)
    torch.testing.assert_close([p.grad for p in policy.parameters()], list(want))


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.7, 1.0])
def test_targets_move_exactly_and_get_no_gradient(tau):
    torch.manual_seed(0)
    source = DeterministicActor(3, 1, (4,)).double()
    target = frozen(source)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    before, now = ([p.detach().clone() for p in net.parameters()] for net in (target, source))
    follow_(target, source, tau)
    for old, new, goal in zip(before, target.parameters(), now):
        torch.testing.assert_close(new, old + tau * (goal - old), atol=1e-15, rtol=1e-15)
        assert not new.requires_grad
    for p, old in zip(source.parameters(), now):
        assert torch.equal(p, old)
    assert tau != 1 or all(torch.equal(p, q) for p, q in zip(target.parameters(), now))


def test_actions_round_trip_between_the_box_and_the_buffer():
    worlds = Worlds.make("etude-test/Recorder-v0", 2, 0, box=True)
    Recorder.done.clear()  # its first step is tried when it is made
    replay = replay_of(worlds, 50)
    told, dice = [], np.random.default_rng(0)

    def act(state):
        told.append(dice.uniform(-1.5, 1.5, (len(state), 2)).astype(np.float32))
        return told[-1]

    gather(worlds, replay, 24, act)
    rows = replay.gather(np.arange(24))
    want = np.clip(np.concatenate(told), -1, 1)
    np.testing.assert_array_equal(rows["action"].numpy(), want)
    np.testing.assert_allclose(np.stack(Recorder.done), [2, 0.5] + want * [4, 0.5], atol=1e-6)
    assert {field: rows[field].dtype for field in rows} == {
        "state": torch.float32, "action": torch.float32, "reward": torch.float32, "next_state": torch.float32,
        "terminated": torch.bool,
    }  # fmt: skip
    # what follows is what was reached: the time limit is no termination, and no pair crosses a reset
    torch.testing.assert_close(rows["next_state"], 0.9 * rows["state"])
    assert torch.equal(rows["terminated"], rows["next_state"][:, 0] > 1)
    assert worlds.episodes >= 4


def test_bounds_reach_both_ends():
    bounds = Bounds([-2, 0], [6, 1])
    np.testing.assert_array_equal(bounds.world(np.array([[-1, -1], [1, 1], [0, 0.0]])), [[-2, 0], [6, 1], [2, 0.5]])


# ------------------------------------------------------------------------------------------------------- refusals, resume


def test_nan_stops_the_run_before_the_update(tmp_path, monkeypatch):
    real = opac.td_target
    monkeypatch.setattr(opac, "td_target", lambda *given: real(*given) * float("nan"))
    with pytest.raises(RunError, match="loss is nan at step"):
        etude.run("rl/off_policy_actor_critic", out=tmp_path / "run", **SMALL)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"env": "CartPole-v1"}, "needs continuous actions between bounds"),
        ({"worlds": 60}, "must not fall: worlds <= collect <= buffer"),
        ({"buffer": 10}, "must not fall: worlds <= collect <= buffer"),
        ({"updates": 10**9, "batch": 10**9}, "of memory"),
    ],
)
def test_unusable_settings_are_answered(settings, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        etude.run("rl/off_policy_actor_critic", out=tmp_path / "run", **{**SMALL, **settings})
    assert not (tmp_path / "run").exists()


def test_sample_plays_by_the_means_in_the_box(tmp_path, monkeypatch):
    monkeypatch.setattr(opac, "show", lambda *given: None)
    result = etude.run("rl/off_policy_actor_critic", out=tmp_path / "run", **SMALL)
    loaded, told = etude.load(result.folder), {}
    monkeypatch.setattr(continuous, "films", lambda *given: told.update(zip("epcsf", given)) or "played")
    assert opac.sample(loaded, opac.Sample(count=2, seed=5), tmp_path) == "played"
    state = np.float32([[1, 0, 0.5], [0, 1, -3]])
    with torch.no_grad():
        want = 2 * loaded.model(torch.from_numpy(state)).numpy()
    np.testing.assert_allclose(told["p"](state), want, rtol=1e-6)
    assert (told["e"].name, told["c"], told["s"]) == ("Pendulum-v1", 2, 5)
