"""Every weight's expectation by exact enumeration, under another policy than the one that acted; importance sampling itself."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import etude
from etude.core.errors import UserError
from etude.rl.off_policy_gradient import effective_sample_size, importance_mean, log_multiplier, step_weights

exact = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("enumeration.py"))))
CORRECTIONS = ("first_order", "per_decision", "trajectory", "future_dropped", "notes", "none")


def policies(apart=1.0):
    """θ, which acted, and θ', whose gradient is wanted."""
    old = exact.small_policy(0)
    return old, (old + apart * (exact.small_policy(1) - old)).detach().requires_grad_()


def expectation(correction, count=1, apart=1.0, ended=None, world=None, **settings):
    """E[ĝ] (S, A) over all batches of `count` episodes of the old policy, the weights as the method has them."""
    world = world or exact.small_world()
    old, new = policies(apart)
    every = exact.trajectories(world)
    index, chance = exact.batches(every, exact.probability(old, every).detach(), count)
    state, action = every.state[index], every.action[index]
    alive = torch.ones_like(state, dtype=torch.bool) if ended is None else state != ended
    ratio = (exact.log_probs(new, every) - exact.log_probs(old, every)).detach()[index] * alive
    weight = step_weights(ratio, every.reward[index] * alive, alive, correction, **settings)
    terms = (weight[..., None, None] * exact.score(new, state, action)).sum(2)  # (M, N, S, A)
    return torch.einsum("m,mnsa->sa", chance, terms) / count, world, old, new


def off(got, want):
    return (got - want).abs().max().item()


@pytest.mark.parametrize("correction", ["per_decision", "trajectory"])
@pytest.mark.parametrize("gamma", [1.0])
def test_products_of_all_ratios_are_unbiased(correction, gamma):
    got, world, _, new = expectation(correction, baseline=False, gamma=gamma)
    want = exact.gradient(world, new, gamma)
    assert want.norm() > 0.2
    assert off(got, want) < 1e-12


def test_what_is_left_out_is_what_the_errata_say():
    """E82: ρ_t counted twice. E83, E84: other gradients, written out. All are ∇J where nobody has moved."""
    world = exact.small_world()
    old, new = policies()
    pi = new.detach().softmax(-1)
    slope = torch.stack(
        [
            torch.stack([pi[s, a] * exact.score(new, torch.tensor(s), torch.tensor(a)) for a in range(2)])
            for s in range(2)
        ]
    )
    _, q = exact.values(world, old)
    of_old, of_new = (torch.einsum("ts,sapq,tsa->pq", exact.occupancy(world, who), slope, q) for who in (old, new))
    want = exact.gradient(world, new)
    assert off(expectation("first_order", baseline=False)[0], of_old) < 1e-12
    assert off(expectation("future_dropped", baseline=False)[0], of_new) < 1e-12
    for correction in ("notes", "first_order", "future_dropped", "none"):
        assert off(expectation(correction, baseline=False)[0], want) > 0.02, correction
    for correction in CORRECTIONS:
        assert off(expectation(correction, apart=0.0, baseline=False)[0], exact.gradient(world, old)) < 1e-12


def test_the_first_order_error_grows_with_the_distance():
    errors = []
    for apart in (0.01, 0.02):
        got, world, _, new = expectation("first_order", apart=apart, baseline=False)
        errors.append(off(got, exact.gradient(world, new)))
    assert errors[1] / errors[0] == pytest.approx(2.0, rel=0.1)  # O(‖θ' − θ‖)


@pytest.mark.parametrize("correction", ["first_order", "per_decision", "trajectory", "future_dropped"])
def test_the_baseline_changes_no_expectation(correction):
    """b comes from the other episodes; its weighted mean is not independent of them, but of this one."""
    world = exact.small_world(horizon=2)
    with_it = expectation(correction, 2, world=world)[0]
    without = expectation(correction, 2, world=world, baseline=False)[0]
    assert off(with_it, without) < 1e-12


def test_episodes_of_unequal_length():
    world = exact.small_world()
    move, reward = world.move.clone(), world.reward.clone()
    move[1], reward[1] = torch.tensor([0.0, 1.0]).double(), 0.0  # state 1 is the end
    ending = exact.World(torch.tensor([1.0, 0.0]).double(), move, reward, 3)
    for correction in ("per_decision", "trajectory"):
        for baseline in (False, True):
            got, _, _, new = expectation(correction, 2, ended=1, world=ending, baseline=baseline)
            assert off(got[0], exact.gradient(ending, new)[0]) < 1e-12


def brute(rho, reward, alive, correction, gamma):
    """w (T,) of one episode by the definitions, products and sums written out."""
    steps = [t for t in range(len(rho)) if alive[t]]
    found = [0.0] * len(rho)
    for t in steps:
        before = math.prod(rho[u] for u in steps if u <= t)
        whole = math.prod(rho[u] for u in steps)
        for later in (u for u in steps if u >= t):
            between = math.prod(rho[u] for u in steps if t < u <= later)
            factor = {
                "first_order": rho[t], "per_decision": before * between, "trajectory": whole, "future_dropped": before,
                "notes": before * rho[t] * between, "none": 1.0,
            }[correction]  # fmt: skip
            found[t] += factor * gamma ** (later - t) * reward[later]
    return found


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_weights_by_their_definitions(correction, gamma):
    dice = torch.Generator().manual_seed(0)
    alive = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    ratio = torch.randn(3, 5, generator=dice, dtype=torch.float64) * alive
    reward = torch.randn(3, 5, generator=dice, dtype=torch.float64) * alive
    got = step_weights(ratio, reward, alive, correction, baseline=False, gamma=gamma)
    if gamma == 1 or correction != "none":
        want = [brute(*map(torch.Tensor.tolist, row), correction, gamma) for row in zip(ratio.exp(), reward, alive)]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=1e-12)


def test_the_baseline_is_the_weighted_mean_of_the_others():
    dice = torch.Generator().manual_seed(1)
    alive = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    ratio, reward = (torch.randn(3, 4, generator=dice, dtype=torch.float64) * alive for _ in range(2))
    plain = step_weights(ratio, reward, alive, "first_order", baseline=False)
    m, got = ratio.exp() * alive, step_weights(ratio, reward, alive, "first_order")
    for t in range(4):
        for i in range(3):
            others = [j for j in range(3) if j != i and alive[j, t]]
            b = sum(plain[j, t] for j in others) / sum(m[j, t] for j in others) if others else 0.0
            assert got[i, t] == pytest.approx(float(plain[i, t] - m[i, t] * b), abs=1e-12)


def test_self_normalised_ratios_have_mean_one_at_every_step():
    alive = torch.arange(6) < torch.tensor([6, 3, 5, 6])[:, None]
    ratio = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 * alive
    m = log_multiplier(ratio, alive, "per_decision", self_normalised=True).exp()
    torch.testing.assert_close(m.sum(0) / alive.sum(0), torch.ones(6, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (m[~alive] == 0).all()


def test_long_products_neither_underflow_nor_overflow():
    """Products of 5,000 ratios of e^±1 are beyond float64; their shares are not."""
    ratio = torch.full((3, 5000), -1.0, dtype=torch.float64)
    ratio[1] = 1.0
    alive = torch.ones(3, 5000, dtype=torch.bool)
    m = log_multiplier(ratio, alive, "trajectory", self_normalised=True).exp()
    torch.testing.assert_close(m[:, -1], torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64))
    assert float(effective_sample_size(ratio.sum(1))) == pytest.approx(1.0)
    assert float(effective_sample_size(torch.full((7,), -4000.0, dtype=torch.float64))) == pytest.approx(7.0)


def test_importance_sampling_of_gaussians():
    """p = N(μ, 1), q = N(0, 1), f = x: E = μ; the weights' second moment is e^{μ²}, so the share kept is e^{−μ²}."""
    mu, x = 0.7, torch.randn(400_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_weight = mu * x - mu**2 / 2
    for normalised in (False, True):
        assert float(importance_mean(x, log_weight, normalised)) == pytest.approx(mu, abs=0.01)
    share = float(effective_sample_size(log_weight)) / len(x)
    assert share == pytest.approx(math.exp(-(mu**2)), rel=0.02)
    # p/q known up to a factor: only the self-normalised mean does not need it
    assert float(importance_mean(x, log_weight + 5, True)) == pytest.approx(mu, abs=0.01)
    assert float(importance_mean(x, log_weight + 5)) > 50


def test_a_bandit_by_hand():
    """Two arms, old 0.8/0.2, new 0.5/0.5, reward 1 for the second: E = ½ score(1), by the probability of what was done."""
    reward = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    ratio = torch.tensor([[0.5 / 0.8], [0.5 / 0.2]], dtype=torch.float64).log()
    weight = step_weights(ratio, reward, torch.ones(2, 1, dtype=torch.bool), "per_decision", baseline=False)
    assert 0.8 * weight[0, 0] == 0
    assert float(0.2 * weight[1, 0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "said"), [({"env": "Pendulum-v1"}, "Pendulum"), ({"env": "CartPole-v9"}, "CartPole")]
)
def test_refusals(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("rl/off_policy_gradient", out=tmp_path / "run", quiet=True, **settings)
