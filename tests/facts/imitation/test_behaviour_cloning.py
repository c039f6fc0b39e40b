"""Five policies against closed forms, sums over all bins and numerical integrals; the experts; the obstacle; refusals."""

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import etude
from etude.blocks.acting import recording as files
from etude.blocks.acting.environments import environment
from etude.blocks.acting.recording import Recording
from etude.core.errors import RunError, UserError
from etude.core.randomness import generator
from etude.imitation import behaviour_cloning as cloning
from etude.imitation.parts import experts, obstacle
from etude.imitation.parts import policies as p

TINY = {"preset": "tiny", "quiet": True, "steps": 6, "evaluate_every": 0, "final_episodes": 4}


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=dice(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- mixture


@pytest.mark.parametrize(("k", "a"), [(1, 1), (3, 1), (4, 3)])
def test_mixture_is_that_of_torch(k, a):  # E77: weights are a softmax
    logits, mean, log_std, action = (
        normals(7, k),
        normals(7, k, a, seed=1),
        0.5 * normals(7, k, a, seed=2),
        normals(7, a, seed=3),
    )
    theirs = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, log_std.exp()), 1)).log_prob(action)
    torch.testing.assert_close(p.mixture_log_prob(logits, mean, log_std, action), theirs, atol=1e-12, rtol=1e-12)
    if k == 1:
        alone = Normal(mean[:, 0], log_std[:, 0].exp()).log_prob(action).sum(-1)
        torch.testing.assert_close(p.mixture_log_prob(logits, mean, log_std, action), alone)


def test_mixture_density_integrates_to_one():
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
    one = p.mixture_log_prob(normals(3), normals(3, 1, seed=1), 0.3 * normals(3, 1, seed=2), grid).exp()
    assert float(torch.trapezoid(one, grid[:, 0])) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1e6])
def test_mixture_stays_finite_at_any_width(sigma):
    # an action far from every mean: each density is 0 in single precision, its logarithm is not
    head = p.Mixture(1, 2, (4,), 3, 1e-6)
    with torch.no_grad():
        head.net[-1].bias[9:] = math.log(sigma)
    loss = head.losses(torch.ones(5, 1, 1), torch.full((5, 1, 2), 40.0), dice()).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in head.parameters())
    assert head.act(torch.ones(5, 1), None, dice())[0].isfinite().all()


def test_sigma_never_falls_below_its_bound_and_still_learns_there():
    log_std = torch.tensor([-80.0, math.log(1e-3), 2.0], dtype=torch.float64, requires_grad=True)
    got = p.above(log_std, 1e-3)
    torch.testing.assert_close(got.exp(), log_std.exp() + 1e-3)
    got[1:].sum().backward()
    assert log_std.grad[1] == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------------------------- latent


def test_kl_is_that_of_torch():
    mean, log_std = normals(6, 4), normals(6, 4, seed=1)
    theirs = kl_divergence(Normal(mean, log_std.exp()), Normal(torch.zeros(()).double(), torch.ones(()).double())).sum(
        -1
    )
    torch.testing.assert_close(p.kl_to_standard(mean, log_std), theirs)


def test_latent_loss_bounds_the_integral_over_z():
    torch.manual_seed(2)
    head = p.Latent(1, 1, (5,), 1, 1e-3).double()
    seen, action = torch.full((20_000, 1, 1), 0.3).double(), torch.full((20_000, 1, 1), -0.4).double()
    with torch.no_grad():
        bound = head.losses(seen, action, dice()).mean()
        z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
        mean = head.decoder(torch.cat([torch.full_like(z, 0.3), z], -1))
        log_std = p.above(head.log_std, head.least)
        density = (p.gaussian_log_prob(mean, log_std, action[:1, 0]) + p.gaussian_log_prob(z * 0, z[0] * 0, z)).exp()
        exact = -torch.trapezoid(density, z[:, 0]).log()
        # the gap is KL(q(z | o, a) ‖ p(z | o, a)), here by quadrature too
        m, s = head.encoder(torch.tensor([[0.3, -0.4]]).double()).chunk(2, -1)
        log_q = p.gaussian_log_prob(m, s, z)
        gap = torch.trapezoid(log_q.exp() * (log_q - density.log() - exact), z[:, 0])
    assert gap > 0.01
    assert float(bound) == pytest.approx(float(exact + gap), abs=0.02)


def test_latent_acts_by_the_prior_and_its_noise():
    torch.manual_seed(0)
    head = p.Latent(1, 1, (), 1, 1e-3)
    with torch.no_grad():
        head.decoder[0].weight[:] = torch.tensor([[2.0, 3.0]])
        head.decoder[0].bias[:] = 1.0
        head.log_std[:] = math.log(0.5 - 1e-3)
        made = head.act(torch.full((40_000, 1), 0.5), None, dice())[0]
    assert made.mean() == pytest.approx(2.0, abs=0.05)
    assert made.std() == pytest.approx(math.sqrt(9 + 0.25), abs=0.05)


# --------------------------------------------------------------------------------------------------- autoregressive


def test_probabilities_over_all_bins_sum_to_one():
    torch.manual_seed(0)
    head = p.Autoregressive(2, 3, (4,), 5).double()
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    action = p.centres(every, head.low, head.high, 5)
    with torch.no_grad():
        loss = head.losses(torch.tensor([0.3, -1.0]).double().expand(1, 125, 2), action[None], dice())[0]
        assert (-loss).exp().sum() == pytest.approx(1, abs=1e-12)
        # and what it draws follows them
        made = head.act(torch.tensor([[0.3, -1.0]]).double().repeat(40_000, 1), None, dice())[0]
    index = p.to_bins(made, head.low, head.high, 5) @ torch.tensor([25, 5, 1])
    share = torch.bincount(index, minlength=125) / len(made)
    assert (share - (-loss).exp()).abs().max() < 0.004
    torch.testing.assert_close(p.centres(p.to_bins(made, head.low, head.high, 5), head.low, head.high, 5), made)


def test_a_bin_is_at_most_half_a_bin_away():
    low, high = torch.tensor([-1.0, 2.0]).double(), torch.tensor([1.0, 2.5]).double()
    action = low + (high - low) * torch.rand(1000, 2, generator=dice()).double()
    back = p.centres(p.to_bins(action, low, high, 7), low, high, 7)
    assert ((back - action).abs() <= (high - low) / 14 + 1e-12).all()
    assert p.to_bins(torch.stack([low, high, low - 9, high + 9]), low, high, 7).tolist() == [
        [0, 0],
        [6, 6],
        [0, 0],
        [6, 6],
    ]


def test_correlated_numbers_cost_log_two_not_twice_that(tmp_path):
    # a = (s, −s) with s = ±1 at random: the second number follows from the first
    head = p.Autoregressive(1, 2, (16,), 4)
    side = torch.randint(0, 2, (256, 1), generator=dice()) * 2.0 - 1
    action, seen = torch.cat([side, -side], 1)[None], torch.zeros(1, 256, 1)
    optimizer = torch.optim.Adam(head.parameters(), 0.03)
    for _ in range(60):
        loss = head.losses(seen, action, dice()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(math.log(2), abs=0.02)
    with torch.no_grad():
        made = head.act(torch.zeros(500, 1), None, dice())[0]
    assert (made[:, 0] * made[:, 1] < 0).float().mean() > 0.98


# ---------------------------------------------------------------------------------------------------------- history


def test_history_is_markov_where_its_memory_has_no_weight_and_resets_with_an_episode():
    torch.manual_seed(0)
    head = p.History(3, 2, False, 4).double()
    x = normals(2, 6, 3)
    with torch.no_grad():
        whole = head.head(head.lstm(x)[0])
        memory = None
        for t in range(6):  # step by step is the same as at once
            one, memory = head.act(x[:, t], memory, dice())
            torch.testing.assert_close(one, whole[:, t])
        fresh, _ = head.act(x[:, 3], None, dice())
        assert (fresh - whole[:, 3]).abs().max() > 1e-3  # what went before matters
        head.lstm.weight_hh_l0.zero_()
        head.lstm.bias_ih_l0[4:8] = -1e9  # the forget gate shuts
        memory = None
        for t in range(6):
            one, memory = head.act(x[:, t], memory, dice())
            torch.testing.assert_close(one, head.act(x[:, t], None, dice())[0])


def test_what_is_behind_the_end_of_an_episode_changes_nothing():
    ends = torch.tensor([3, 3, 3, 7, 7, 7, 7])
    rows, mask = p.windows(torch.tensor([0, 3, 5]), ends, 4)
    assert rows.tolist() == [[0, 1, 2, 2], [3, 4, 5, 6], [5, 6, 6, 6]]
    assert mask.tolist() == [[True] * 3 + [False], [True] * 4, [True] * 2 + [False] * 2]
    values = torch.arange(12.0).view(3, 4)
    want = (0 + 1 + 2 + 4 + 5 + 6 + 7 + 8 + 9) / 9
    assert p.masked_mean(values, mask) == pytest.approx(want)
    assert p.masked_mean(torch.where(mask, values, torch.tensor(float("inf"))), mask) == pytest.approx(want)
    longer = p.windows(torch.tensor([0, 3, 5]), ends, 9)
    assert longer[1].sum() == mask.sum()
    torch.manual_seed(0)
    head = p.History(1, 1, False, 3)
    x, y = normals(7, 1).float(), normals(7, 1, seed=1).float()
    short, long = (
        p.masked_mean(head.losses(x[r], y[r], dice()), m)
        for r, m in ((rows[:1, :3], mask[:1, :3]), (longer[0][:1], longer[1][:1]))
    )
    torch.testing.assert_close(short, long)


# ------------------------------------------------------------------------------------------------------------ units


def taken(count=40, masked=(1,), head=None):
    observations = np.random.default_rng(0).normal([3, 50, -2], [0.1, 9, 4], (count, 3)).astype(np.float32)
    observations[:, 2] = 7  # constant
    actions = np.random.default_rng(1).normal([5, -1], [2, 0.01], (count, 2)).astype(np.float32)
    model = p.Cloned(head or p.Mixture(2, 2, (4,), 2, 1e-3), 3, 2, False, masked)
    data = Recording(observations, actions, np.ones(count, bool), np.zeros(count, np.float32))
    model.measure(data)
    return model, data


def test_units_are_those_of_the_training_episodes_and_a_hidden_column_is_not_seen():
    model, data = taken()
    seen = model.see(torch.from_numpy(data.observations))
    assert seen.shape == (40, 2)
    assert seen[:, 0].mean().abs() < 1e-4
    assert seen[:, 0].std(correction=0) == pytest.approx(1, abs=1e-4)
    assert (seen[:, 1] == 0).all()
    changed = torch.from_numpy(data.observations).clone()
    changed[:, 1] = 1e6
    assert torch.equal(model.see(changed), seen)


def test_a_density_is_that_of_the_worlds_units():
    model, data = taken()
    x, a = torch.from_numpy(data.observations)[:, None], torch.from_numpy(data.actions)[:, None]
    logits, mean, log_std = model.head.parts(model.see(x))
    theirs = MixtureSameFamily(
        Categorical(logits=logits),
        Independent(Normal(mean * model.scale + model.shift, log_std.exp() * model.scale), 1),
    ).log_prob(a)
    torch.testing.assert_close(model.losses(x, a, dice()), -theirs, rtol=1e-3, atol=1e-3)
    made = torch.cat([model.act(x[:, 0], None, dice(s))[0] for s in range(50)])
    assert made.mean(0).tolist() == pytest.approx([5, -1], abs=3)
    assert made[:, 1].std() < 0.1


def test_bins_span_the_recorded_actions():
    model, data = taken(head=p.Autoregressive(2, 2, (4,), 5))
    made = torch.cat([model.act(torch.from_numpy(data.observations), None, dice(s))[0] for s in range(10)]).numpy()
    low, high = data.actions.min(0), data.actions.max(0)
    assert (made > low).all()
    assert (made < high).all()
    assert (np.abs(made.min(0) - (low + (high - low) / 10)) < 1e-3 * (high - low)).all()


# ---------------------------------------------------------------------------------------------------------- experts


def test_the_rule_balances_the_pole():
    expert = experts._in_world(experts.Expert("rule", 4, 2, True), environment("CartPole-v1"), "rule")
    assert (expert.play(experts.balance, 200, 9, "test").returns == 500).all()
    state = np.array([[0, 0, 0.1, 0], [0, 0, -0.1, 0.1], [0, 0.5, -0.1, 0]], np.float32)
    assert experts.balance(state).tolist() == [1, 0, 1]


def test_the_experts_word_is_recorded_not_what_was_carried_out():
    expert = experts._in_world(experts.Expert("rule", 4, 2, True), environment("CartPole-v1"), "rule")
    expert.policy = lambda seed, purpose: experts.balance
    calm, rough = (expert.shows(6, 3, noise)["training"] for noise in (0.0, 0.5))
    assert (calm.actions == experts.balance(calm.observations)).all()
    assert (rough.actions == experts.balance(rough.observations)).all()
    pushed = np.sign(np.diff(rough.observations[:, 1]))[~rough.starts[1:]]  # what was carried out moved the cart
    share = ((pushed > 0) != (rough.actions[:-1][~rough.starts[1:]] == 1)).mean()
    assert share == pytest.approx(0.25, abs=0.06)  # half of the random ones agree by chance


def test_splits_share_no_step_and_every_split_has_some():
    seen = np.arange(60, dtype=np.float32)[:, None]
    for starts in (np.arange(60) % 3 == 0, np.arange(60) == 0):
        parts = experts.split(Recording(seen, seen, starts, seen[:, 0]), 4)
        numbers = [set(part.observations[:, 0]) for part in parts.values()]
        assert len(set.union(*numbers)) == sum(map(len, numbers)) == 60
        assert [len(part) for part in parts.values()] == [48, 6, 6]
        assert all(part.starts[0] for part in parts.values())
        other = experts.split(Recording(seen, seen, starts, seen[:, 0]), 5)["test"]
        assert set(other.observations[:, 0]) != numbers[2]


def test_the_sinusoid_is_bishops():
    data = experts.sinusoid(0, 5000)
    x, t = data.observations[:, 0], data.actions[:, 0]
    rest = x - t - 0.3 * np.sin(2 * np.pi * t)
    assert rest.min() > -0.1001
    assert rest.max() < 0.1001
    assert (t.min() < 0.01, t.max() > 0.99) == (True, True)
    assert np.histogram(rest, 4)[0] == pytest.approx(np.full(4, 1250), abs=120)


# --------------------------------------------------------------------------------------------------------- obstacle


def test_touching_is_that_of_a_fine_walk_along_the_way():
    rng = np.random.default_rng(0)
    start, end = rng.uniform(-0.4, 0.4, (500, 2)) + [0, 0.3], rng.uniform(-0.4, 0.4, (500, 2)) + [0, 0.3]
    way = start + np.linspace(0, 1, 2001)[:, None, None] * (end - start)
    nearest = np.linalg.norm(way - obstacle.CENTRE, axis=2).min(0)
    clear = np.abs(nearest - obstacle.RADIUS) > 1e-4
    assert (obstacle.touches(start, end) == (nearest < obstacle.RADIUS))[clear].all()
    assert obstacle.touches(start[:1] * 0, start[:1] * 0).tolist() == [False]


def test_the_obstacle_ends_an_episode_in_one_of_three_ways():
    world = obstacle.Obstacle(3, 0)
    moves = np.array([[0.0, 0.1], [0.2, 0.0], [-0.14, 0.14]], np.float32)
    seen = [world.step(moves) for _ in range(20)]
    rewards = np.array([row.reward for row in seen])
    assert (rewards[0].tolist(), rewards[1, 0], rewards[:, 1].any()) == ([0, 0, 0], -1, False)
    assert np.allclose(np.linalg.norm(seen[0].next_state - seen[0].state, axis=1), [0.1, 0.2, 0.198], atol=1e-3)
    far = obstacle.Obstacle(1, 0).step(np.array([[3.0, 4.0]]))
    assert np.allclose(far.next_state - far.state, [[0.12, 0.16]])
    first = [next(t for t, row in enumerate(seen) if row.terminated[w] or row.truncated[w]) for w in range(3)]
    assert [bool(seen[t].terminated[w]) for w, t in enumerate(first)] == [True, False, True]
    assert first[1] == 19  # the time limit
    assert rewards[first[2], 2] == 1
    assert np.array_equal(seen[first[2]].next_state[2], seen[-1].state[2])  # it stays where it is


def test_the_two_way_expert_passes_on_both_sides():
    expert = experts.Expert("two", 2, 2, False, obstacle.LIMIT, obstacle.Obstacle, obstacle.two_ways)
    data = expert.shows(100, 0)["training"]
    told = obstacle.outcome(data)
    assert told == {"crash_share": 0.0, "rarer_side_share": 0.5}
    first = data.actions[data.first]
    assert np.abs(first.mean(0)[0]) < 0.01  # the average goes straight on
    assert first.mean(0)[1] > 0.1
    straight = expert.play(lambda state: np.tile(np.float32([0, 0.2]), (len(state), 1)), 50, 0, "test")
    assert obstacle.outcome(straight)["crash_share"] == 1
    way = obstacle.ways(data)[0]
    assert np.allclose(way[1:-1] - way[:-2], obstacle.shortened(data.actions[: len(way) - 2]), atol=1e-6)
    assert way[-1, 1] > obstacle.FINISH
    assert len(obstacle.picture([("a", data), ("b", straight)]).axes) == 2


# ------------------------------------------------------------------------------------------------------------- runs


def test_a_run_that_acts_in_a_box_is_an_expert(tmp_path):
    """Its actor says shares of the box; the expert does what they mean in the world, and the learner's episodes are recorded."""
    small = {
        "widths": (4,),
        "updates": 2,
        "evaluation_episodes": 1,
        "final_episodes": 1,
        "evaluate_every": 0,
        "quiet": True,
    }
    taught = etude.run("rl/td3", steps=128, learning_starts=64, out=tmp_path / "td3", **small)
    loaded, seen = etude.load(taught.folder), np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    with torch.no_grad():
        share = loaded.model(torch.from_numpy(seen)).numpy()
    np.testing.assert_allclose(files.policy_of(loaded)(seen), 2 * share, rtol=1e-6)
    clone = {"policy": "markov", "expert_episodes": 2, **TINY, "final_episodes": 2}
    first = etude.run("imitation/behaviour_cloning", expert=str(taught.folder), out=tmp_path / "a", **clone)
    assert -2000 < first.metrics["learner_return"] < 0
    assert not etude.load(first.folder).spec.extra["discrete"]
    episodes = files.load(etude.load(first.folder).sample(count=2).folder / "episodes.npz")
    assert episodes.actions.shape == (400, 1)


def test_a_run_is_an_expert_and_its_recorded_episodes_too(tmp_path):
    pole = {"policy": "markov", "expert_episodes": 3, **TINY}
    taught = etude.run("rl/dqn", preset="tiny", steps=600, final_episodes=2, quiet=True, out=tmp_path / "dqn")
    act = files.policy_of(etude.load(taught.folder))
    seen = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    assert (act(seen) == etude.load(taught.folder).model(torch.from_numpy(seen)).argmax(1).numpy()).all()
    first = etude.run("imitation/behaviour_cloning", expert=str(taught.folder), out=tmp_path / "a", **pole)
    assert {"learner_return", "expert_return", "test_loss"} <= first.metrics.keys()
    assert etude.load(first.folder).spec.extra["env"] == "CartPole-v1"
    drawn = etude.load(first.folder).sample(count=12)
    recorded = str(drawn.folder / "episodes.npz")
    assert len(files.load(drawn.folder / "episodes.npz").first) == 12
    second = etude.run("imitation/behaviour_cloning", expert=recorded, out=tmp_path / "b", **pole)
    assert second.metrics.keys() == {"test_loss", "training_steps"}
    third = etude.run("imitation/behaviour_cloning", expert=recorded, env="CartPole-v1", out=tmp_path / "c", **pole)
    assert third.metrics["test_loss"] == second.metrics["test_loss"]
    assert "expert_return" not in third.metrics
    with pytest.raises(UserError, match=r"observes 4 numbers and has 2 actions; Acrobot-v1 has 6 and 3"):
        etude.run("imitation/behaviour_cloning", expert=recorded, env="Acrobot-v1", out=tmp_path / "d", **pole)
    with pytest.raises(UserError, match="no world to act in"):
        etude.load(second.folder).sample()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"expert": "nobody"}, "--expert nobody: .*balance, obstacle, sinusoid"),
        ({"expert": "none.npz"}, "none.npz cannot be read"),
        ({"expert": "balance"}, "--policy mixture needs continuous actions.*2 discrete ones"),
        ({"expert": "balance", "policy": "latent"}, "--policy latent needs continuous actions"),
        ({"expert": "balance", "policy": "autoregressive"}, "--policy autoregressive needs continuous actions"),
        (
            {"expert": "balance", "policy": "markov", "env": "Acrobot-v1"},
            "observes 4 numbers and has 2 actions; Acrobot-v1",
        ),
        ({"env": "CartPole-v1"}, "--expert obstacle has a world of its own"),
        ({"masked": (2,)}, "--masked 2: an observation has the columns 0 to 1"),
        ({"masked": (0, 1)}, "leaves nothing to see of 2 columns"),
        ({"policy": "mean"}, "--policy"),
    ],
)
def test_unusable_settings_are_answered(settings, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("ETUDE_RUNS", str(tmp_path / "runs"))
    with pytest.raises(UserError, match=sentence):
        etude.run("imitation/behaviour_cloning", out=tmp_path / "run", **TINY | settings)
    assert not (tmp_path / "run").exists()


def test_divergence_is_said_in_a_sentence(tmp_path):
    with pytest.raises(RunError, match="not finite|is nan|is inf"):
        etude.run(
            "imitation/behaviour_cloning", out=tmp_path / "run", **TINY | {"learning_rate": 1e30, "policy": "latent"}
        )


def test_another_file_in_place_of_the_expert_is_noticed(tmp_path, monkeypatch):
    files.Recording(*(getattr(experts.sinusoid(0, 60), n) for n in files.NAMES)).save(tmp_path / "a.npz")
    settings = TINY | {"expert": str(tmp_path / "a.npz"), "out": tmp_path / "run", "save_every": 2}
    calls, real = [], p.Mixture.losses

    def fail(self, *given):
        calls.append(1)
        if len(calls) == 4:
            raise RunError("power cut")
        return real(self, *given)

    monkeypatch.setattr(p.Mixture, "losses", fail)
    with pytest.raises(RunError, match="power cut"):
        etude.run("imitation/behaviour_cloning", **settings)
    monkeypatch.setattr(p.Mixture, "losses", real)
    files.Recording(*(getattr(experts.sinusoid(1, 60), n) for n in files.NAMES)).save(tmp_path / "a.npz")
    with pytest.raises(UserError, match="is not the file that this run began with"):
        etude.resume(tmp_path / "run")


def test_an_environment_object_is_acted_in(tmp_path):
    class Short(gymnasium.wrappers.TimeLimit):
        def __init__(self, render_mode=None):
            super().__init__(gymnasium.make("CartPole-v1", render_mode=render_mode).unwrapped, 3)

    settings = TINY | {"expert": "balance", "policy": "markov", "expert_episodes": 4, "env": Short}
    result = etude.run("imitation/behaviour_cloning", out=tmp_path / "run", **settings)
    assert result.metrics["expert_return"] == 3
    assert isinstance(etude.load(result.folder).model, nn.Module)
    assert cloning.build(cloning.Config(), etude.load(result.folder).spec)
    assert generator(0).initial_seed() != generator(1).initial_seed()
