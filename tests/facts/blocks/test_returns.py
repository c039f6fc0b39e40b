"""Targets and returns against brute force over every mix of terminated and truncated, and against closed forms."""

import itertools

import pytest
import torch

from etude.blocks.acting.returns import discounted_returns, lambda_advantages, td_target

F64 = torch.float64


def brute_advantage(reward, terminated, truncated, value, next_value, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k}, the sum written out and stopped at the first end of an episode."""
    length = len(reward)
    out = []
    for t in range(length):
        total, weight = 0.0, 1.0
        for u in range(t, length):
            behind = 0.0 if terminated[u] else gamma * next_value[u]
            total += weight * (reward[u] + behind - value[u])
            if terminated[u] or truncated[u]:
                break
            weight *= gamma * lam
        out.append(total)
    return torch.tensor(out, dtype=F64)


def brute_return(reward, terminated, truncated, next_value, gamma):
    length = len(reward)
    out = []
    for t in range(length):
        total, weight = 0.0, 1.0
        for u in range(t, length):
            total += weight * reward[u]
            weight *= gamma
            if terminated[u]:
                break
            if truncated[u] or u == length - 1:
                total += weight * next_value[u]
                break
        out.append(total)
    return torch.tensor(out, dtype=F64)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_every_mix_of_ends(lam):  # E93
    torch.manual_seed(0)
    length = 4
    for flags in itertools.product([(False, False), (True, False), (False, True), (True, True)], repeat=length):
        terminated, truncated = (torch.tensor(column) for column in zip(*flags))
        reward, value, following = torch.randn(3, length, dtype=F64)
        got = lambda_advantages(reward, terminated, truncated, value, following, 0.9, lam)
        want = brute_advantage(*(x.tolist() for x in (reward, terminated, truncated, value, following)), 0.9, lam)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        got = discounted_returns(reward, terminated, truncated, following, 0.9)
        want = brute_return(*(x.tolist() for x in (reward, terminated, truncated, following)), 0.9)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_columns_do_not_mix():
    torch.manual_seed(1)
    reward, value, following = torch.randn(3, 6, 5, dtype=F64)
    terminated, truncated = torch.rand(2, 6, 5) < 0.3
    together = lambda_advantages(reward, terminated, truncated, value, following, 0.95, 0.9)
    for n in range(5):
        columns = (x[:, n] for x in (reward, terminated, truncated, value, following))
        torch.testing.assert_close(together[:, n], lambda_advantages(*columns, 0.95, 0.9), atol=0, rtol=0)


def test_true_values_have_no_advantage_on_a_chain_cut_by_a_time_limit():
    # s0 → s1 → … for ever with reward 1: V = 1/(1 − γ) everywhere. Cut every 3 steps, never terminated.
    gamma, length = 0.9, 9
    value = torch.full((length,), 1 / (1 - gamma), dtype=F64)
    reward, terminated = torch.ones(length, dtype=F64), torch.zeros(length, dtype=torch.bool)
    truncated = torch.arange(length) % 3 == 2
    advantage = lambda_advantages(reward, terminated, truncated, value, value, gamma, 0.95)
    assert advantage.abs().max() < 1e-12
    # the same ends called terminations are a different task: the value is too high at once
    assert lambda_advantages(reward, truncated, terminated, value, value, gamma, 0.95)[2] == pytest.approx(-9.0)


def test_fixed_point_on_a_one_state_loop():
    # SB3 284: a task that never ends, treated as episodic, has the wrong fixed point
    reward, going = torch.tensor([2.0], dtype=F64), torch.tensor([False])
    q = torch.zeros(1, dtype=F64)
    for _ in range(600):
        q = td_target(reward, going, q, 0.95)
    assert q.item() == pytest.approx(2.0 / (1 - 0.95), abs=1e-9)
    assert td_target(reward, ~going, q, 0.95).item() == 2.0


def test_target_is_a_constant_and_ignores_what_lies_behind_the_end():  # E93
    value = torch.tensor([1.0, float("nan")], requires_grad=True)
    y = td_target(torch.tensor([0.5, 0.25]), torch.tensor([False, True]), value, 0.5)
    assert not y.requires_grad
    assert y.tolist() == [1.0, 0.25]
