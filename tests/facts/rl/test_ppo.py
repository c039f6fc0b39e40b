"""The clipped objective by cases and by its gradient, standardised advantages, explained variance, refusals."""

import math

import numpy as np
import pytest
import torch

import etude
from etude.core.errors import UserError
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.policies import categorical_gradient
from etude.rl.ppo import clipped_objective, clipped_slope, explained_variance, minibatches, standardised


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_objective_is_the_papers_figure_1():
    ratio, eps = torch.linspace(0, 2, 201, dtype=torch.float64), 0.2
    good, bad = (clipped_objective(ratio, tensor(a).expand_as(ratio), eps) for a in (1.0, -1.0))
    torch.testing.assert_close(good, ratio.clamp(max=1.2))
    torch.testing.assert_close(bad, -ratio.clamp(min=0.8))


def test_no_gradient_flows_where_the_ratio_is_beyond_the_clip_to_the_better_side():
    ratio = tensor(0.5, 1.0, 1.5, 0.5, 1.0, 1.5).requires_grad_()
    clipped_objective(ratio, tensor(2, 2, 2, -3, -3, -3), 0.2).sum().backward()
    assert ratio.grad.tolist() == [2.0, 2.0, 0.0, 0.0, -3.0, -3.0]


def test_where_nobody_has_moved_it_is_the_policy_gradient():
    torch.manual_seed(0)
    model = ActorCritic(3, 4, (5,)).double()
    state, action, advantage = torch.randn(20, 3).double(), torch.randint(4, (20,)), torch.randn(20).double()
    log_prob, _, _ = model.judge(state, action)
    plain = torch.autograd.grad((log_prob * advantage).mean(), model.policy.parameters(), retain_graph=True)
    ratio = (log_prob - log_prob.detach()).exp()
    ours = torch.autograd.grad(clipped_objective(ratio, advantage, 0.2).mean(), model.policy.parameters())
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-12)


def test_without_advantage_an_entropy_bonus_raises_the_entropy():
    torch.manual_seed(0)
    model = ActorCritic(3, 4, (5,))
    torch.nn.init.normal_(model.policy[-1].weight, std=2.0)
    state, action = torch.randn(50, 3), torch.randint(4, (50,))
    _, before, _ = model.judge(state, action)
    (-before.mean()).backward()
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter -= 0.01 * parameter.grad
    assert model.judge(state, action)[1].mean() > before.mean()


def test_standardised_advantages():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 7 + 3
    got = standardised(x)
    assert abs(float(got.mean())) < 1e-12
    assert float(got.std()) == pytest.approx(1.0, rel=1e-6)
    assert standardised(tensor(5.0)).tolist() == [5.0]  # one alone is no NaN
    assert standardised(tensor(2.0, 2.0)).tolist() == [0.0, 0.0]


def test_explained_variance():
    returns = tensor(1, 2, 3, 4)
    assert float(explained_variance(returns, returns)) == 1.0
    assert float(explained_variance(tensor(7, 7, 7, 7), returns)) == 0.0
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3.0)
    assert float(explained_variance(returns, tensor(2, 2, 2, 2))) == 0.0


def test_a_minibatch_of_one_learns_finite_numbers(tmp_path):
    settings = {
        "steps": 51,
        "worlds": 3,
        "segment": 17,
        "passes": 1,
        "batch": 50,
        "final_episodes": 2,
        "evaluate_every": 0,
    }
    done = etude.run("rl/ppo", preset="tiny", out=tmp_path / "run", quiet=True, **settings)
    assert all(np.isfinite(value) for value in done.metrics.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"env": "CartPole-v9"}, "CartPole"),
        ({"worlds": 1, "segment": 1}, "two steps"),
    ],
)
def test_refusals(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        etude.run("rl/ppo", out=tmp_path / "run", quiet=True, **settings)


@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_written_out_is_that_of_the_graph(shared):
    """`follow`, `clipped_slope`, `categorical_gradient` and `backward` against autograd of the loss, float64."""
    torch.manual_seed(1)
    model = ActorCritic(3, 4, (5, 6), shared).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
        parameter.grad = torch.full_like(parameter, 7.0)  # what stood there is written over
    state, action = torch.randn(32, 3).double(), torch.randint(4, (32,))
    old, advantage, returns = (torch.randn(32).double() for _ in range(3))
    old -= 1.4
    log_prob, entropy, value = model.judge(state, action)
    ratio = (log_prob - old).exp()
    loss = 0.7 * 0.5 * (value - returns).square().mean() - clipped_objective(ratio, advantage, 0.2).mean()
    want = torch.autograd.grad(loss - 0.3 * entropy.mean(), list(model.parameters()))
    logits, found, kept = model.follow(state)
    torch.testing.assert_close(found, value.detach())
    slope = clipped_slope(ratio.detach(), advantage, 0.2)
    assert 0 < (slope == 0).sum() < 32
    model.backward(kept, categorical_gradient(logits, action, slope, 0.3) / -32, 0.7 / 32 * (found - returns))
    for parameter, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_an_action_that_cannot_be_taken_has_a_finite_gradient():
    logits = torch.tensor([[0.3, -math.inf, 1.0]])
    found = categorical_gradient(logits, torch.tensor([2]), torch.ones(1), 0.5)
    assert found.isfinite().all()
    assert found[0, 1] == 0
    assert found.sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("rows", "batch", "count"), [(12, 5, 0), (12, 5, 3), (9, 5, 3), (2, 5, 3), (1, 1, 4)])
def test_ranks_with_fewer_rows_take_as_many_minibatches(rows, batch, count):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    parts = minibatches(order, batch, count)
    assert len(parts) == (count or -(-rows // batch))
    assert all(0 < len(part) <= batch for part in parts)
    assert torch.cat(parts)[:rows].equal(order)
    if rows >= len(parts):
        assert len(torch.cat(parts)) == rows
