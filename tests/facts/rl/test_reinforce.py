"""Every estimator's expectation by exact enumeration, its variance, the gradient of each episode, whole episodes."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import etude
from etude.blocks.acting.environments import environment
from etude.core.errors import RunError, UserError
from etude.core.randomness import generator
from etude.rl import reinforce
from etude.rl.parts.policies import CategoricalPolicy, GaussianPolicy
from etude.rl.parts.whole_episodes import Episodes, collect, episode_gradients, put_gradient, returns
from etude.rl.reinforce import Config, estimate, noise, optimal_baseline, step_weights, variances

exact = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("enumeration.py"))))
SMALL = {"episodes": 16, "batch": 4, "widths": (6,), "evaluate_every": 8, "evaluation_episodes": 2, "final_episodes": 2}
SMALL |= {"probe_episodes": 8, "quiet": True}


def table(theta):
    """The policy network whose logits are θ_s, for one-hot states; its gradients are (A, S) and, of the bias, (A,)."""
    policy = CategoricalPolicy(len(theta), theta.shape[1], ()).double()
    policy.net[0].weight.data.copy_(theta.T)
    policy.net[0].bias.data.zero_()
    return policy


def wanted(gradient):
    """∇J (S, A) in the order of that network's parameters."""
    return torch.cat([gradient.T.flatten(), gradient.sum(0)])


def enumerated(world, count, ended=None):
    """All batches of `count` episodes (M^N, N, T, …), and their probabilities; `ended`: the state that is the end."""
    theta = exact.small_policy()
    every = exact.trajectories(world)
    index, weight = exact.batches(every, exact.probability(theta, every).detach(), count)
    state = torch.eye(2, dtype=torch.float64)[every.state[index]]
    alive = torch.ones(state.shape[:-1], dtype=torch.bool) if ended is None else every.state[index] != ended
    return theta, Episodes(state, every.action[index], every.reward[index], alive), weight


def expectation(world, count, ended=None, **settings):
    """(E[ĝ], ∇J) of the configured estimator from batches of `count` episodes."""
    theta, episodes, weight = enumerated(world, count, ended)
    got = estimate(table(theta), episodes, Config(**settings)).mean(-2)
    return weight @ got, wanted(exact.gradient(world, theta, settings.get("gamma", 1.0)))


def error(*arguments, **settings):
    got, want = expectation(*arguments, **settings)
    assert want.norm() > 0.2
    return (got - want).abs().max().item()


@pytest.mark.parametrize("credit", ["full", "to_go"])
def test_one_episode_is_unbiased(credit):  # 7.3, 7.3.4.1, E79: E[ĝ] = ∇J, exactly
    world = exact.small_world()
    assert error(world, 1, credit=credit, baseline="none") < 1e-12
    assert error(world, 1, credit=credit, baseline="leave_one_out") < 1e-12  # nobody is left: b = 0


@pytest.mark.parametrize("credit", ["full", "to_go"])
@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "optimal"])
def test_baselines_from_other_episodes_are_unbiased(credit, baseline):
    assert error(exact.small_world(), 2, credit=credit, baseline=baseline) < 1e-12
    assert error(exact.small_world(1, horizon=2), 3, credit=credit, baseline=baseline) < 1e-12


@pytest.mark.parametrize(("count", "horizon"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("credit", ["full", "to_go"])
def test_mean_of_the_batch_shrinks_the_gradient(count, horizon, credit):  # E81: (1 − 1/N) ∇J
    got, want = expectation(exact.small_world(horizon=horizon), count, credit=credit, baseline="mean")
    torch.testing.assert_close(got, (1 - 1 / count) * want, atol=1e-12, rtol=0)
    assert (got - want).abs().max() > 0.1


def test_baselines_are_unbiased_with_episodes_of_unequal_length():
    world = exact.small_world()
    move, reward = world.move.clone(), world.reward.clone()
    move[1], reward[1] = torch.tensor([0.0, 1.0]).double(), 0.0  # state 1 is the end
    ending = exact.World(torch.tensor([1.0, 0.0]).double(), move, reward, 3)
    for credit in ("full", "to_go"):
        for kind in ("none", "leave_one_out", "optimal"):
            assert error(ending, 2, 1, credit=credit, baseline=kind) < 1e-12
        assert error(ending, 2, 1, credit=credit, baseline="mean") > 0.02


def test_discounted_gradient_needs_the_factor_that_everybody_drops():  # E89
    world = exact.small_world()
    for credit in ("full", "to_go"):
        assert error(world, 2, credit=credit, gamma=0.6, exact_discount=True) < 1e-12
    assert error(world, 2, credit="full", gamma=0.6) < 1e-12
    assert error(world, 2, credit="to_go", gamma=0.6) > 0.05


def spread(world, **settings):
    """Exact variance of one episode's ĝ, summed over the parameters."""
    theta, episodes, weight = enumerated(world, 1)
    got = estimate(table(theta), episodes, Config(baseline="none", **settings)).mean(-2)
    return (weight @ (got - weight @ got) ** 2).sum().item()


def test_reward_to_go_is_not_always_better():  # E80
    world = exact.small_world(horizon=2)
    assert spread(world, credit="to_go") < spread(world, credit="full")
    theta, episodes, weight = enumerated(world, 1)
    steady = episodes._replace(reward=torch.tensor([-1.0, 1.0]).double().expand_as(episodes.reward))
    for credit, lowest, highest in (("full", 0, 1e-30), ("to_go", 0.1, 10)):
        got = estimate(table(theta), steady, Config(credit=credit, baseline="none")).mean(-2)
        assert (weight @ got).abs().max() < 1e-12  # ∇J = 0, for nothing depends on the actions
        assert lowest <= (weight @ got**2).sum() <= highest


def test_optimal_baseline_has_the_least_variance():
    theta, episodes, weight = enumerated(exact.small_world(), 1)
    policy, one = table(theta), torch.ones_like(episodes.reward)
    score = episode_gradients(policy, episodes.state, episodes.action, one)[:, 0]
    gain = episodes.reward.sum((1, 2))[:, None]
    best = (weight @ (score**2 * gain)) / (weight @ score**2)  # E[S² r]/E[S²]

    def variance(b):
        terms = score * (gain - b)
        return weight @ (terms - weight @ terms) ** 2

    for change in (-0.1, 0.1, 1.0):
        assert (variance(best) < variance(best + change)).all()
    assert (variance(best) < variance(weight @ gain)).all()  # the mean return is not the best
    # drawn in their true shares, the other episodes give that very number
    shares = (weight * 2e4).round().long()
    index = torch.arange(len(weight)).repeat_interleave(shares)
    found = optimal_baseline((score * gain)[index], score[index])
    torch.testing.assert_close(found, best.expand_as(found), atol=0.02, rtol=0)
    small = torch.tensor([[2.0], [4.0], [-3.0]]), torch.tensor([[1.0], [2.0], [0.0]])
    assert optimal_baseline(*small).flatten().tolist() == [2.0, 2.0, 2.0]
    assert optimal_baseline(torch.ones(2, 1), torch.zeros(2, 1)).tolist() == [[0.0], [0.0]]


def test_weights_by_brute_force():
    dice = np.random.default_rng(0)
    length = [5, 2, 4]
    alive = np.arange(5) < np.array(length)[:, None]
    reward = dice.normal(size=(3, 5)) * alive
    for gamma in (1.0, 0.7):
        go = [[sum(gamma ** (u - t) * reward[i, u] for u in range(t, 5)) for t in range(5)] for i in range(3)]
        full = [[sum(gamma**u * reward[i, u] for u in range(5))] * 5 for i in range(3)]
        for to_go, want in ((True, go), (False, full)):
            torch.testing.assert_close(returns(torch.from_numpy(reward), gamma, to_go), torch.tensor(want).double())
        for kind in ("none", "mean", "leave_one_out"):
            want = np.zeros((3, 5))
            for i in range(3):
                for t in range(length[i]):
                    others = [go[j][t] for j in range(3) if length[j] > t and (j != i or kind == "mean")]
                    want[i, t] = go[i][t] - (np.mean(others) if others and kind != "none" else 0.0)
            got = step_weights(torch.from_numpy(reward), torch.from_numpy(alive), "to_go", kind, gamma)
            np.testing.assert_allclose(got, want, atol=1e-12)
            # of the full return, episodes that have ended count too
            total = np.array(full)[:, 0]
            b = {"none": 0 * total, "mean": total.mean() + 0 * total, "leave_one_out": (total.sum() - total) / 2}[kind]
            got = step_weights(torch.from_numpy(reward), torch.from_numpy(alive), "full", kind, gamma)
            np.testing.assert_allclose(got, (total - b)[:, None] * alive, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: CategoricalPolicy(4, 3, (6, 5)), lambda: GaussianPolicy(4, 2, (6,))])
def test_gradient_of_each_episode_is_that_of_autograd(make):
    torch.manual_seed(0)
    policy, state = make().double(), torch.randn(2, 3, 5, 4).double()
    action = policy.act(state.flatten(0, 2), policy.noise(torch.Generator().manual_seed(0), 30)).unflatten(0, (2, 3, 5))
    weight, bonus = torch.randn(2, 3, 5).double(), torch.rand(2, 3, 5).double()
    got = episode_gradients(policy, state, action, weight, bonus)
    for b in range(2):
        for i in range(3):
            log_prob, entropy = policy.judge(state[b, i], action[b, i])
            value = (weight[b, i] * log_prob + bonus[b, i] * entropy).sum()
            want = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()))])
            torch.testing.assert_close(got[b, i], want, atol=1e-12, rtol=1e-10)
    put_gradient(policy, got[0, 0])
    assert torch.equal(torch.cat([p.grad.flatten() for p in policy.parameters()]), got[0, 0])


def test_entropy_bonus_raises_the_entropy():
    torch.manual_seed(0)
    policy, state = CategoricalPolicy(4, 3, (8,)), torch.randn(2, 6, 4)
    nothing = Episodes(
        state, torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6), torch.ones(2, 6, dtype=torch.bool)
    )
    before = policy.judge(state.flatten(0, 1), nothing.action.flatten())[1].mean()
    step = estimate(policy, nothing, Config(entropy_bonus=0.1)).mean(0)
    with torch.no_grad():
        for p, piece in zip(policy.parameters(), step.split([p.numel() for p in policy.parameters()])):
            p += 0.1 * piece.view_as(p)
    assert policy.judge(state.flatten(0, 1), nothing.action.flatten())[1].mean() > before + 1e-4
    assert not estimate(policy, nothing, Config()).any()


def test_normalised_weights_have_unit_spread(monkeypatch):
    torch.manual_seed(0)
    policy, alive = CategoricalPolicy(4, 3, (8,)), torch.arange(6) < torch.tensor([[6], [3], [5]])
    episodes = Episodes(torch.randn(3, 6, 4), torch.randint(3, (3, 6)), torch.randn(3, 6) * alive, alive)
    plain, ours = (estimate(policy, episodes, Config(normalise=n)) for n in (False, True))
    kept = step_weights(episodes.reward, alive)[alive].numpy()
    torch.testing.assert_close(ours, plain / kept.std(), atol=1e-5, rtol=1e-5)


def test_noise_and_variances_by_hand():
    terms = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double()
    standard_error = np.sqrt(np.var(terms.numpy(), axis=0, ddof=1).sum() / 7)
    assert noise(terms).item() == pytest.approx(standard_error / terms.mean(0).norm().item())
    assert noise(terms[:1]) == 0
    torch.manual_seed(0)
    policy, config = CategoricalPolicy(4, 2, (5,)), Config(batch=3)
    some = collect(environment("CartPole-v1"), policy, 13, 0, torch.Generator().manual_seed(0))
    got = variances(policy, some, config)
    assert len(got) == 8
    for name, value in got.items():
        credit, kind = name.split(", ")
        each = Config(credit=credit, baseline=kind)
        means = [estimate(policy, Episodes(*(x[3 * k : 3 * k + 3] for x in some)), each).mean(0) for k in range(4)]
        assert value == pytest.approx(torch.stack(means).double().var(0).sum().item(), rel=1e-4)
    # E81 again: over the very same batches the mean's gradient is (1 − 1/N) of the unbiased one
    assert got["full, mean"] / got["full, leave_one_out"] == pytest.approx((1 - 1 / 3) ** 2, rel=1e-4)


# --------------------------------------------------------------------------------------------------- episodes


class Timer(gymnasium.Env):
    """An episode lasts as long as its first observation says; the reward counts the steps. Nobody can read its state."""

    observation_space = spaces.Box(0, 100, (2,), np.float32)
    action_space = spaces.Discrete(3)
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = np.array([self.np_random.integers(1, 9), 0], np.float32)
        return self.seen, {}

    def step(self, action):
        self.seen[1] += 1  # one array for ever, the trap of aliased observations
        over, odd = bool(self.seen[1] >= self.seen[0]), bool(self.seen[0] % 2)
        return self.seen, float(self.seen[1]), over and odd, over and not odd, {}  # it cuts some of them itself


for _limit in (5, None):
    if f"etude-test/Timer{_limit}-v0" not in gymnasium.registry:
        gymnasium.register(f"etude-test/Timer{_limit}-v0", entry_point=Timer, max_episode_steps=_limit)


@pytest.mark.parametrize("limit", [5, None])
def test_episodes_are_whole_and_one_a_world(limit):
    policy = CategoricalPolicy(2, 3, ())
    got = collect(environment(f"etude-test/Timer{limit}-v0"), policy, 40, 3, torch.Generator().manual_seed(0))
    length = got.state[:, 0, 0].numpy().astype(int)
    assert set(length) == set(range(1, 9))  # a world an episode: every length has its share
    if limit:
        length = np.minimum(length, limit)
    assert got.alive.shape == (40, length.max())
    assert (got.alive.numpy() == (np.arange(length.max()) < length[:, None])).all()
    time = np.arange(length.max())
    assert (got.state[..., 1].numpy() == time)[got.alive.numpy()].all()  # every state is the one acted in
    np.testing.assert_array_equal(got.reward, (time + 1) * got.alive.numpy())
    np.testing.assert_array_equal(got.returns, length * (length + 1) / 2)
    assert got.steps == length.sum()


def test_episodes_are_gymnasiums_under_the_policys_own_draws():
    torch.manual_seed(0)
    policy = CategoricalPolicy(4, 2, (5,))
    got = collect(environment("CartPole-v1"), policy, 6, 9, generator(9, 2, 0, "act"), rank=1)
    dice = generator(9, 2, 0, "act")
    env = gymnasium.make_vec("CartPole-v1", num_envs=6, vectorization_mode="vector_entry_point")
    from etude.core.randomness import fold

    state, _ = env.reset(seed=fold(9, 0, 1, "training"))
    going = np.ones(6, bool)
    for t in range(got.reward.shape[1]):
        assert (got.alive[:, t].numpy() == going).all()
        np.testing.assert_array_equal(got.state[going, t], state[going])
        pi = policy(torch.from_numpy(state)).softmax(-1).detach().double().numpy()
        action = (torch.rand(6, generator=dice, dtype=torch.float64).numpy() >= pi[:, 0]).astype(int)
        np.testing.assert_array_equal(got.action[going, t], action[going])
        state, reward, terminated, truncated, _ = env.step(action)
        np.testing.assert_array_equal(got.reward[:, t], reward * going)
        going = going & ~(terminated | truncated)
    assert not going.any()


def test_resume_is_exact_even_where_the_world_cannot_be_restored(tmp_path, monkeypatch):
    settings = SMALL | {"env": "etude-test/Timer5-v0", "seed": 4}
    whole = etude.run("rl/reinforce", out=tmp_path / "whole", **settings)
    calls, real = [], reinforce.estimate

    def fail(policy, episodes, config):
        calls.append(episodes.reward.ndim)
        if calls.count(2) == 3:
            raise RunError("power cut")
        return real(policy, episodes, config)

    monkeypatch.setattr(reinforce, "estimate", fail)
    with pytest.raises(RunError, match="power cut"):
        etude.run("rl/reinforce", out=tmp_path / "parts", save_every=1, **settings)
    monkeypatch.setattr(reinforce, "estimate", real)
    parts = etude.resume(tmp_path / "parts")
    assert parts.metrics == whole.metrics
    assert (parts.folder / "metrics.jsonl").read_text() == (whole.folder / "metrics.jsonl").read_text()


def test_nan_stops_the_run_before_the_update(tmp_path, monkeypatch):
    monkeypatch.setattr(reinforce, "returns", lambda reward, *_: reward * float("nan"))
    with pytest.raises(RunError, match="not finite at step 0; the update was not made"):
        etude.run("rl/reinforce", out=tmp_path / "run", **SMALL | {"probe_episodes": 0})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"env": "CartPole-v2"}, "did you mean 'CartPole"),
        ({"batch": 0}, "--batch"),
        ({"baseline": "median"}, "baseline"),
        ({"batch": 9000, "widths": (100_000,)}, "--batch.*of memory"),
    ],
)
def test_unusable_settings_are_answered(settings, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        etude.run("rl/reinforce", out=tmp_path / "run", **{**SMALL, **settings})
    assert not (tmp_path / "run").exists()


def test_sample_plays_and_writes_films(tmp_path):
    pytest.importorskip("pygame")
    result = etude.run("rl/reinforce", out=tmp_path / "run", **SMALL)
    assert (result.folder / "artifacts" / "episode.gif").stat().st_size > 1000
    loaded = etude.load(result.folder)
    said = [reinforce.sample(loaded, reinforce.Sample(count=1, greedy=greedy), tmp_path) for greedy in (True, False)]
    assert (tmp_path / "episode-0.gif").is_file()
    assert said[0] != said[1]
    loaded.config = Config(env="etude-test/Timer5-v0")
    loaded.modules["model"] = CategoricalPolicy(2, 3, ())
    assert "cannot be drawn" in reinforce.sample(loaded, reinforce.Sample(count=2), tmp_path)
