"""Learning-rate schedules: closed forms, parity with torch's schedulers, resume."""

import math

import pytest
import torch

from etude.core.errors import UserError
from etude.optim import SGD
from etude.optim.schedules import (
    constant,
    cosine,
    inverse_root,
    linear,
    one_cycle,
    schedule,
    set_lr,
    snapshot_steps,
    snapshots,
    step_decay,
)


def torchs(make, steps, lr=0.3):
    """The rates that a torch scheduler uses for updates 0 … steps − 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_constant_and_warm_up():
    assert [constant(k, 0.4) for k in range(3)] == [0.4] * 3
    assert [constant(k, 0.4, warm=4) for k in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    expected = torchs(lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=9), 20)
    assert [constant(k, 0.3, warm=10) for k in range(20)] == pytest.approx(expected, rel=1e-12)


def test_cosine_equals_torch():
    expected = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.01), 51)
    assert [cosine(k, 0.3, total=50, floor=0.01) for k in range(51)] == pytest.approx(expected, rel=1e-12)


def test_cosine_closed_form_with_warm_up():
    rate = [cosine(k, 1.0, total=110, warm=10, floor=0.2) for k in range(200)]
    assert rate[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rate[10] == 1.0
    assert rate[60] == pytest.approx(0.6)  # half-way
    assert rate[35] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert rate[110:] == pytest.approx([0.2] * 90)


def test_linear_equals_torch_and_meets_its_ends():
    expected = torchs(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=40), 60)
    assert [linear(k, 0.3, total=40) for k in range(60)] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    rate = [linear(k, 1.0, total=30, warm=10, floor=0.5) for k in range(40)]
    assert (rate[9], rate[10], rate[20], rate[30], rate[39]) == pytest.approx((1.0, 1.0, 0.75, 0.5, 0.5))


@pytest.mark.parametrize(("total", "rise"), [(100, 0.3), (57, 0.45), (10, 0.25)])
def test_one_cycle_equals_torch(total, rise):
    expected = torchs(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total, pct_start=rise, cycle_momentum=False), total
    )
    assert [one_cycle(k, 0.3, total, rise) for k in range(total)] == pytest.approx(expected, rel=1e-10)
    assert one_cycle(total - 1, 0.3, total, rise) == pytest.approx(0.3 / 25e4)
    assert one_cycle(10 * total, 0.3, total, rise) == pytest.approx(0.3 / 25e4)


def test_step_decay_equals_torch():
    expected = torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 15, 15], gamma=0.1), 20)
    assert [step_decay(k, 0.3, (10, 15, 15)) for k in range(20)] == pytest.approx(expected, rel=1e-12)


def test_inverse_root_is_the_transformers():
    """Vaswani equation 3: d^−½ min(s^−½, s · warm^−3/2), s counted from 1."""
    d, warm = 512, 40
    expected = [d**-0.5 * min(s**-0.5, s * warm**-1.5) for s in range(1, 200)]
    assert [inverse_root(k, (d * warm) ** -0.5, warm) for k in range(199)] == pytest.approx(expected, rel=1e-12)
    assert max(range(199), key=lambda k: expected[k]) == warm - 1


def test_snapshots_are_the_papers_cycles():
    """Huang equation 2, t counted from 1: ½ α₀ (cos(π mod(t − 1, ⌈T/M⌉) / ⌈T/M⌉) + 1)."""
    total, cycles = 103, 5
    length = math.ceil(total / cycles)
    expected = [0.1 / 2 * (math.cos(math.pi * ((t - 1) % length) / length) + 1) for t in range(1, total + 1)]
    rates = [snapshots(k, 0.1, total, cycles) for k in range(total)]
    assert rates == pytest.approx(expected, rel=1e-12)
    taken = snapshot_steps(total, cycles)
    assert len(taken) == cycles
    assert taken[-1] == total - 1
    for k in taken[:-1]:
        assert rates[k] == min(rates)
        assert rates[k + 1] == 0.1


def test_the_rate_is_a_function_of_the_step_so_resume_is_exact():
    def run(optimizer, parameter, steps):
        for step in steps:
            set_lr(optimizer, cosine(step, 0.1, total=20, warm=3))
            optimizer.zero_grad()
            (parameter**4).sum().backward()
            optimizer.step()

    whole, half = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    run(SGD([whole], lr=9.0), whole, range(20))
    run(SGD([half], lr=9.0), half, range(8))
    run(SGD([half], lr=5.0), half, range(8, 20))  # a new optimizer, nothing loaded
    assert torch.equal(whole, half)


def test_set_lr_reaches_every_group():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [a], "lr": 1.0}, {"params": [b]}], lr=2.0)
    assert set_lr(optimizer, 0.25) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="total must be greater than warm"):
        cosine(5, 0.1, total=5, warm=5)
    with pytest.raises(ValueError, match="warm must be at least 1"):
        inverse_root(0, 0.1, warm=0)
    with pytest.raises(ValueError, match="rise must be between 0 and 1"):
        one_cycle(0, 0.1, 10, rise=1.0)
    with pytest.raises(ValueError, match="cycles must be at least 1"):
        snapshots(0, 0.1, 10, 0)


def test_schedules_by_name():
    expected = {
        "constant": lambda k: constant(k, 0.3, 2),
        "linear": lambda k: linear(k, 0.3, 20, 2),
        "cosine": lambda k: cosine(k, 0.3, 20, 2),
        "one_cycle": lambda k: one_cycle(k, 0.3, 20),
        "cyclic": lambda k: snapshots(k, 0.3, 20, 5),
    }
    for name, function in expected.items():
        rate = schedule(name, 0.3, 20, warm=2)
        assert [rate(k) for k in range(25)] == [function(k) for k in range(25)]
    assert [schedule("cyclic", 0.3, 20, cycles=2)(k) for k in range(20)] == [
        snapshots(k, 0.3, 20, 2) for k in range(20)
    ]
    with pytest.raises(
        UserError, match=r"unknown schedule 'cosin', choose from constant, linear, .* did you mean 'cosine'"
    ):
        schedule("cosin", 0.3, 20)
