"""Fitted iteration: targets by loops, transitions that respect ends, least squares and trees against scikit-learn, E92 and E93."""

from fractions import Fraction
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import Ridge
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import etude
from etude.blocks.acting.environments import environment
from etude.blocks.acting.tables import Tables, optimal_q, tables
from etude.core.errors import RunError, UserError
from etude.rl import fitted
from etude.rl.dynamic_programming import action_values
from etude.rl.fitted import expected, targets
from etude.rl.parts.inputs import places, standardised
from etude.rl.parts.linear import Linear, solvers
from etude.rl.parts.nulls import best_of_all, unmasked_expected
from etude.rl.parts.transitions import collect, known, observed
from etude.rl.parts.trees import LEAF, Trees, grow, most_nodes

LAKE = tables("FrozenLake-v1")


def random_world(seed, states=6, actions=3, outcomes=2):
    """Terminations lead to states that are worth something, so that a missing mask is seen."""
    dice = np.random.default_rng(seed)
    shape = (states, actions, outcomes)
    return Tables(
        dice.integers(states, size=shape),
        dice.normal(size=shape),
        dice.random(shape) < 0.2,
        dice.dirichlet(np.ones(outcomes), (states, actions)),
        dice.dirichlet(np.ones(states)),
    )


class Count(gymnasium.Env):
    """Observes (episode, time): a pair across a reset or a wrong next state cannot be missed. Over at time 5 after action 1."""

    observation_space = spaces.Box(-1, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(2)
    metadata: ClassVar = {"render_modes": []}
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        return np.array([self.episode, self.time], np.float32), 1.0, bool(self.time >= 5 and action == 1), False, {}


if "etude-test/Count-v0" not in gymnasium.registry:
    gymnasium.register("etude-test/Count-v0", entry_point=Count, max_episode_steps=7)


# ---------------------------------------------------------------------------------------------------- targets and data


@pytest.mark.parametrize("seed", range(3))
def test_targets_are_those_of_loops(seed):
    world, value = random_world(seed), np.random.default_rng(seed).normal(size=6)
    q = np.zeros((6, 3))
    for s in range(6):
        for a in range(3):
            for o in range(2):
                behind = 0.0 if world.terminated[s, a, o] else value[world.next_state[s, a, o]]
                q[s, a] += world.probability[s, a, o] * (world.reward[s, a, o] + 0.9 * behind)
    data = known(world, values=False)
    np.testing.assert_allclose(targets(data, value, 0.9), q[data.here, data.action], rtol=0, atol=1e-12)
    assert sorted(zip(data.here, data.action)) == [(s, a) for s in range(6) for a in range(3)]
    visited = np.array([3, 3, 0, 5])
    for data in (known(world, values=True), known(world, values=True, visited=visited)):
        np.testing.assert_allclose(targets(data, value, 0.9), q.max(1)[data.here], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(data.here, visited)


def test_behind_a_termination_nothing_is_worth_anything_and_a_cut_is_none():  # E93
    reward, terminated = np.ones((3, 1)), np.array([[True], [False], [False]])
    behind = np.array([[1e9], [2.0], [4.0]])
    one = np.ones((3, 1))
    assert expected(reward, terminated, one, behind, 0.5).tolist() == [1.0, 2.0, 3.0]
    assert unmasked_expected(reward, terminated, one, behind, 0.5).tolist() == [1 + 5e8, 2.0, 3.0]
    # an infinite or undefined value behind the end does no harm either
    assert expected(reward, terminated, one, np.array([[np.nan], [2.0], [4.0]]), 0.5).tolist() == [1.0, 2.0, 3.0]


def test_the_notes_maximum_makes_all_actions_equal():  # E92
    value = np.random.default_rng(0).normal(size=6)
    world = random_world(0)
    data = known(world, values=False)
    exact = action_values(world, value, 0.9)
    assert np.ptp(targets(data, value, 0.9).reshape(6, 3), axis=1).min() > 1e-3
    np.testing.assert_allclose(best_of_all(data, value, 0.9).reshape(6, 3), exact.max(1, keepdims=True).repeat(3, 1))


def test_collected_rows_pair_nothing_across_an_end_and_cuts_are_no_terminations():
    state, action, reward, after, over = collect(environment("etude-test/Count-v0"), 500, 3)
    assert len(state) == len(action) == len(reward) == len(after) == len(over) == 500
    np.testing.assert_array_equal(after - state, np.tile([0, 1], (500, 1)))
    np.testing.assert_array_equal(over, (after[:, 1] >= 5) & (action == 1))
    assert (~over & (after[:, 1] == 7)).any()  # cut by the time limit
    assert over.any()
    assert abs(action.mean() - 0.5) < 0.1
    again = collect(environment("etude-test/Count-v0"), 500, 3)
    assert all(np.array_equal(one, two) for one, two in zip((state, action, reward, after, over), again))
    assert not np.array_equal(collect(environment("etude-test/Count-v0"), 500, 4)[1], action)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_collected_actions_are_greedy_but_for_the_share(share):
    kind = environment("etude-test/Count-v0")
    action = collect(kind, 4000, 0, share, lambda state: np.ones(len(state), np.int64))[1]
    assert action.mean() == pytest.approx(1 - share / 2, abs=0.03 if share else 0)


def test_observed_rows_point_at_their_states():
    rows = collect(environment("etude-test/Count-v0"), 40, 0)
    data = observed(rows, discrete=False)
    np.testing.assert_array_equal(data.points[data.here], rows[0])
    np.testing.assert_array_equal(data.points[data.there[:, 0]], rows[3])
    rows = collect(environment("FrozenLake-v1"), 300, 0)
    data = observed(rows, discrete=True)
    np.testing.assert_array_equal(data.points[data.here], rows[0])
    np.testing.assert_array_equal(data.points[data.there[:, 0]], rows[3])
    value = np.arange(16.0)
    want = [r + 0.9 * (0 if over else value[n]) for r, n, over in zip(rows[2], rows[3].argmax(1), rows[4])]
    np.testing.assert_allclose(targets(data, value, 0.9), want)


# ---------------------------------------------------------------------------------------------------- least squares


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_features_are_those_of_scikit_learn(degree, constant):
    z = torch.randn(9, 3, dtype=torch.float64)
    ours = Linear(3, 2, degree, constant, 0.5)
    want = PolynomialFeatures(degree, include_bias=constant).fit_transform(z.numpy())
    np.testing.assert_allclose(ours.features(z).numpy(), want, rtol=1e-12)
    np.testing.assert_allclose(ours(z).numpy(), want @ np.full((want.shape[1], 2), 0.5), rtol=1e-12)


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_solutions_are_those_of_least_squares(l2):
    dice = np.random.default_rng(0)
    x, y, action = dice.normal(size=(40, 5)), dice.normal(size=40), dice.integers(2, size=40)
    x[:, 4] = x[:, 3]  # several solutions: the shortest is meant
    for output, (rows, matrix) in enumerate(solvers(x, action, 2, l2)):
        np.testing.assert_array_equal(rows, np.flatnonzero(action == output))
        if l2:
            want = Ridge(alpha=l2, fit_intercept=False).fit(x[rows], y[rows]).coef_
        else:
            want = np.linalg.lstsq(x[rows], y[rows], rcond=None)[0]
        np.testing.assert_allclose(matrix @ y[rows], want, atol=1e-10)
    empty = solvers(x, np.zeros(40, np.int64), 2, l2)[1]
    assert (empty[1] @ y[empty[0]]).tolist() == [0.0] * 5  # an action that was never taken


def test_a_table_holds_the_means_of_its_targets():
    dice = np.random.default_rng(1)
    state, y = dice.integers(4, size=30), dice.normal(size=30)
    ((rows, matrix),) = solvers(np.eye(5)[state], np.zeros(30, np.int64), 1, 0.0)
    want = [y[state == s].mean() for s in range(4)] + [0.0]
    np.testing.assert_allclose(matrix @ y[rows], want, atol=1e-12)


def test_inputs_are_standardised_and_places_are_those_of_the_grid():
    x = np.random.default_rng(0).normal(3, 2, (50, 3)).astype(np.float32)
    x[:, 1] = 7
    scale, shift = standardised(x)
    np.testing.assert_allclose(x @ scale + shift, StandardScaler().fit_transform(x.astype(float)), atol=1e-6)
    kind = environment("CliffWalking-v1")
    found = places("CliffWalking-v1", kind, 48, one_hot=False)
    assert found[[0, 11, 36, 47]].tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert found[13] == pytest.approx([-1 / 3, -9 / 11])
    np.testing.assert_array_equal(places("CliffWalking-v1", kind, 48, one_hot=True), np.eye(48))


# ---------------------------------------------------------------------------------------------------- trees


def plain_tree(x, y, action, actions, leaf, dice):
    """The tree with lists and exact fractions: nodes [input, cut, left, value, rows] in breadth-first order; y of whole numbers."""
    nodes = [[LEAF, 0.0, 0, 0.0, np.flatnonzero(action == a)] for a in range(actions)]
    for node in nodes:  # grows while it is walked
        rows = node[4]
        if not len(rows):
            continue
        node[3] = y[rows].mean()
        if len(rows) < 2 * leaf or np.ptp(y[rows]) == 0:
            continue
        best = None
        for d in range(x.shape[1]):
            low, high = x[rows, d].min(), x[rows, d].max()
            if low == high:
                continue
            cut = low + dice.random() * (high - low)
            one, two = rows[x[rows, d] <= cut], rows[x[rows, d] > cut]
            if min(len(one), len(two)) >= leaf:
                left_over = sum(sum(y[side] ** 2) - Fraction(sum(y[side])) ** 2 / len(side) for side in (one, two))
                if best is None or left_over < best[0]:
                    best = (left_over, d, cut, one, two)
        if best is not None:
            node[:3] = best[1], best[2], len(nodes)
            nodes.extend([LEAF, 0.0, 0, 0.0, side] for side in best[3:])
    return nodes


@pytest.mark.parametrize("leaf", [1, 4])
def test_trees_are_those_of_a_plain_builder(leaf):
    dice = np.random.default_rng(leaf)
    x, action = dice.normal(size=(70, 3)), dice.integers(2, size=70)
    x[:, 1] = np.round(x[:, 1])  # ties
    y = np.round(50 * (np.sin(3 * x[:, 0]) + x[:, 1] * action))
    forest = Trees(3, most_nodes(70, 3, leaf), 3, start=-2.0)
    forest.fit(x, action, y, leaf, seed=5)
    feature, cut, left, value = forest.arrays()
    chance = np.random.default_rng(5)
    for t in range(3):
        nodes = plain_tree(x, y, action, 3, leaf, chance)
        assert len(nodes) <= feature.shape[1]
        assert feature[t, : len(nodes)].tolist() == [node[0] for node in nodes]
        inner = [i for i, node in enumerate(nodes) if node[0] != LEAF]
        assert left[t, inner].tolist() == [nodes[i][2] for i in inner]
        np.testing.assert_array_equal(cut[t, inner], [nodes[i][1] for i in inner])
        full = [i for i, node in enumerate(nodes) if len(node[4])]
        np.testing.assert_allclose(value[t, full], [nodes[i][3] for i in full], atol=1e-12)
        assert value[t, 2] == -2.0  # the root of an action without rows keeps what it had
        assert min(len(nodes[i][4]) for i in full) >= leaf
    if leaf == 1:  # every row has a leaf of its own
        got = forest(torch.from_numpy(x)).numpy()[np.arange(70), action]
        np.testing.assert_allclose(got, y, atol=1e-12)


def test_trees_predict_as_well_as_those_of_scikit_learn():
    dice = np.random.default_rng(0)
    x = dice.random((800, 5))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + dice.normal(size=800)
    theirs = ExtraTreesRegressor(60, min_samples_leaf=3, random_state=0).fit(x[:500], y[:500]).predict(x[500:])
    ours = Trees(60, most_nodes(500, 1, 3), 1)
    ours.fit(x[:500], np.zeros(500, np.int64), y[:500], 3, 0)
    got = ours(torch.from_numpy(x[500:])).numpy()[:, 0]
    errors = [np.mean((p - y[500:]) ** 2) for p in (got, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.08)  # measured 2.1 %; the variance of y is 24
    assert np.corrcoef(got, theirs)[0, 1] > 0.99


def test_kept_cuts_take_new_means():
    dice = np.random.default_rng(0)
    x, action, y = dice.normal(size=(200, 2)), dice.integers(2, size=200), dice.normal(size=200)
    forest = Trees(4, most_nodes(200, 2, 5), 2)
    forest.fit(x, action, y, 5, 0)
    leaves, before = forest.leaves(x), [part.copy() for part in forest.arrays()]
    mine = leaves[:, np.arange(200), action]
    np.testing.assert_array_equal(forest.at(leaves), forest(torch.from_numpy(x)).numpy())
    forest.refresh(mine, y)
    np.testing.assert_allclose(forest.arrays()[3][:, :2], before[3][:, :2])  # roots are no leaves: untouched
    np.testing.assert_allclose(forest.at(leaves), forest(torch.from_numpy(x)).numpy(), rtol=0, atol=0)
    forest.refresh(mine, 2 * y + 1)
    got = forest(torch.from_numpy(x)).numpy()
    for i in range(0, 200, 20):
        want = [(2 * y + 1)[mine[t] == mine[t, i]].mean() for t in range(4)]
        assert got[i, action[i]] == pytest.approx(np.mean(want), abs=1e-12)
    assert all(np.array_equal(one, two) for one, two in zip(forest.arrays()[:3], before[:3]))


def test_no_tree_needs_more_nodes_than_there_is_room_for():
    dice = np.random.default_rng(0)
    for rows, leaf in ((1, 1), (7, 3), (50, 1), (64, 4), (3, 9)):
        x, action = dice.normal(size=(rows, 2)), dice.integers(2, size=rows)
        most = most_nodes(rows, 2, leaf)
        arrays = [np.zeros(most, kind) for kind in (np.int32, float, np.int32, float)]
        order = np.argsort(action, kind="stable")
        bounds = np.searchsorted(action[order], [0, 1, 2])
        assert grow(x, dice.normal(size=rows), order, bounds, leaf, dice, *arrays) <= most


# ---------------------------------------------------------------------------------------------------- fixed points


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They have a test of their own."""
    monkeypatch.setattr(fitted, "pictures", lambda *arguments: None)


def fit(tmp_path, **settings):
    return etude.run("rl/fitted", out=tmp_path / "run", quiet=True, evaluate_every=0, **settings)


@pytest.mark.parametrize("form", ["fitted_value", "fitted_q", "fully_fitted_q"])
def test_a_table_over_everything_is_value_iteration(form, tmp_path):
    """After any number of iterations, and at the end: catalogue, at most 1e-6."""
    value = np.zeros(16)
    settings = {"env": "FrozenLake-v1", "form": form, "features": "tabular", "transitions": 0, "gamma": 0.99}
    for k in (1, 2):
        q = action_values(LAKE, value, 0.99)
        value = q.max(1)
        done = fit(tmp_path / str(k), iterations=k, **settings)
        found = etude.load(done.folder).model.of(np.eye(16, dtype=np.float32))
        np.testing.assert_allclose(found, value[:, None] if form == "fitted_value" else q, rtol=0, atol=1e-12)
    done = fit(tmp_path / "end", iterations=5000, tolerance=1e-12, **settings)
    assert done.metrics["value_error"] < 1e-9
    assert done.metrics["start_value"] == pytest.approx(0.5420259, abs=6e-8)
    assert done.metrics["greedy_return"] == pytest.approx(0.740165, abs=1e-6)
    assert done.metrics["iterations"] == 704  # as rl/dynamic_programming counts


def test_a_table_on_data_is_value_iteration_in_the_world_of_frequencies(tmp_path):
    """Off-policy rows of the uniform policy; the world whose chances are their relative frequencies is solved exactly."""
    done = fit(tmp_path, env="FrozenLake-v1", features="tabular", transitions=3000, iterations=400, gamma=0.9, seed=2)
    from etude.core.randomness import fold

    state, action, reward, after, over = collect(environment("FrozenLake-v1"), 3000, fold(2, 0, 0, "data"))
    s, n = state.argmax(1), after.argmax(1)
    count = np.zeros((16, 4, 16))
    np.add.at(count, (s, action, n), 1)
    pay, end = np.zeros((16, 4, 16)), np.ones((16, 4, 16), bool)
    pay[s, action, n], end[s, action, n] = reward, over
    seen = count.sum(2, keepdims=True)
    chance = np.where(seen > 0, count / np.maximum(seen, 1), 1 / 16)
    world = Tables(np.broadcast_to(np.arange(16), (16, 4, 16)), pay, end, chance, np.eye(16)[0])
    want = optimal_q(world, 0.9)
    got = etude.load(done.folder).model.of(np.eye(16, dtype=np.float32))
    visited = seen[..., 0] > 0
    np.testing.assert_allclose(got[visited], want[visited], rtol=0, atol=1e-10)
    assert (got[~visited] == 0).all()
    assert visited.sum() == 44  # 11 places that are neither ice holes nor the goal
    exact = optimal_q(LAKE, 0.9)
    assert done.metrics["value_error"] == pytest.approx(np.abs(got - exact)[visited].max())


@pytest.mark.parametrize("gamma", [0.99, 0.8])
@pytest.mark.parametrize("features", ["linear", "tabular"])
def test_two_states_diverge_by_the_known_factor(features, gamma, tmp_path):
    done = fit(
        tmp_path, env="two_states", form="fitted_value", features=features, transitions=0, iterations=40, degree=1,
        constant=False, initial_weight=1.0, gamma=gamma,
    )  # fmt: skip
    linear = features == "linear"
    factor, first = (1.2 * gamma, 2.0) if linear else (gamma, 1.0)  # argmin (w − 2γw)² + (2w − 2γw)²
    assert done.metrics["contraction"] == pytest.approx(factor, rel=1e-9)
    assert done.metrics["largest_value"] == pytest.approx(first * factor**40, rel=1e-9)
    assert done.metrics["largest_value"] == done.metrics["value_error"]  # V* is 0
    value = etude.load(done.folder).model.of(np.eye(2, dtype=np.float32))[:, 0]
    np.testing.assert_allclose(value, np.array([0.5, 1.0] if linear else [1.0, 1.0]) * first * factor**40, rtol=1e-9)
    assert etude.sample(done.folder).text.startswith("values of the two states: ")


@pytest.mark.parametrize("features", ["tabular", "linear", "trees"])
def test_one_iteration_is_regression_on_the_reward(features, tmp_path):
    """K = 1: Q_0 is 0, so whatever γ is, y is r. γ = 0 and K = 2: the same again for what is solved exactly."""
    from etude.core.randomness import fold

    for k, gamma in ((1, 0.9), (2, 0.0)):
        done = fit(
            tmp_path / f"{k}{gamma}", env="FrozenLake-v1", features=features, transitions=500, iterations=k,
            gamma=gamma, trees=3, leaf=2, seed=1,
        )  # fmt: skip
        state, action, reward, _, _ = collect(environment("FrozenLake-v1"), 500, fold(1, 0, 0, "data"))
        model = etude.load(done.folder).model
        q = model.of(np.eye(16, dtype=np.float32))
        s = state.argmax(1)
        if features == "linear":
            place = np.stack(np.divmod(s, 4), 1) / 1.5 - 1
            psi = PolynomialFeatures(2).fit_transform(place)
            for a in range(4):
                w = np.linalg.lstsq(psi[action == a], reward[action == a].astype(float), rcond=None)[0]
                np.testing.assert_allclose(model.body.weight[:, a].numpy(), w, atol=1e-10)
        elif features == "tabular":
            for a in range(4):
                for place in np.unique(s[action == a]):
                    rows = (s == place) & (action == a)
                    assert q[place, a] == pytest.approx(reward[rows].mean(), abs=1e-12)
        else:
            assert q.max() <= reward.max()
            assert done.metrics["fit_error"] <= reward.std() + 1e-9


class Line(gymnasium.Env):
    """Two places and one action: 1 is paid for ever, and it never ends."""

    observation_space, action_space = spaces.Discrete(2), spaces.Discrete(1)
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = 0
        return 0, {}

    def step(self, action):
        self.s = 1 - self.s
        return self.s, 1.0, False, False, {}


if "etude-test/Line-v0" not in gymnasium.registry:
    gymnasium.register("etude-test/Line-v0", entry_point=Line, max_episode_steps=3)


def test_a_time_limit_takes_no_value_away(tmp_path):
    done = fit(tmp_path, env="etude-test/Line-v0", features="tabular", transitions=60, iterations=200, gamma=0.8)
    assert done.metrics["start_value"] == pytest.approx(5.0, abs=1e-9)  # 1 / (1 − γ); 2.44 were a cut an end


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"form": "fitted_value"}, "--form fitted_value takes expectations, and --env CartPole-v1 has no table"),
        ({"transitions": 0}, "--transitions 0 takes expectations"),
        ({"features": "tabular"}, "no discrete states for a table; take --features linear"),
        ({"env": "two_states"}, "wants --transitions 0"),
        ({"uniform_share": 0.5}, "belongs to the fresh data of --form fitted_q"),
        ({"env": "Taxi-v4", "features": "linear"}, "no numbers to fit polynomials to"),
        ({"env": "Pendulum-v1"}, "needs discrete actions"),
        ({"features": "linear", "degree": 10, "env": "CartPole-v1", "transitions": 10_000_000}, "of memory"),
    ],
)
def test_refusals(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("rl/fitted", out=tmp_path / "run", quiet=True, **settings)
    assert not (tmp_path / "run").exists()


def test_divergence_ends_in_a_sentence(tmp_path):
    with pytest.raises(RunError, match=r"have grown beyond 1e\+30 after 397 iterations: it diverges"):
        fit(
            tmp_path, env="two_states", form="fitted_value", features="linear", transitions=0, iterations=10_000,
            degree=1, constant=False, initial_weight=1.0, gamma=0.99,
        )  # fmt: skip
