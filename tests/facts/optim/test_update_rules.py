"""SGD, momentum, RMSProp, AdaGrad, Adam, AdamW: parity with torch.optim, golden values, state dicts, errors."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from etude.core.errors import UserError
from etude.optim import SGD, AdaGrad, Adam, AdamW, Momentum, RMSProp, adagrad, adam, make, momentum, rmsprop, sgd
from etude.optim import chain as chain_module
from etude.optim.chain import (
    Chain,
    accumulate,
    average,
    chain,
    clip_norm,
    clip_value,
    decay,
    l2,
    over_root,
    update,
)
from etude.optim.newton import newton_step

# name, ours, torch's, settings of both, settings of torch's only
PAIRS = [
    ("sgd", SGD, torch.optim.SGD, {}, {}),
    ("sgd-l2", SGD, torch.optim.SGD, {"weight_decay": 0.1}, {}),
    ("momentum", Momentum, torch.optim.SGD, {"momentum": 0.9}, {}),
    ("momentum-l2", Momentum, torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.1}, {}),
    ("nesterov", Momentum, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {}),
    ("rmsprop", RMSProp, torch.optim.RMSprop, {}, {}),
    ("rmsprop-l2", RMSProp, torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}, {}),
    ("adagrad", AdaGrad, torch.optim.Adagrad, {"weight_decay": 0.1}, {}),
    ("adam", Adam, torch.optim.Adam, {}, {}),
    ("adam-l2", Adam, torch.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1}, {}),
    ("adam-decoupled", Adam, torch.optim.AdamW, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
    ("adamw", AdamW, torch.optim.AdamW, {"weight_decay": 0.1}, {}),
    ("adamw-default", AdamW, torch.optim.AdamW, {}, {}),
]
IDS = [pair[0] for pair in PAIRS]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a small tensor: what 2¹⁵ does for a large one."""
    monkeypatch.setattr(chain_module, "BLOCK", 64)


def parameters(dtype=torch.float64, seed=0):
    """Three tensors; the largest runs in several blocks, one is a channels_last convolution weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2 * 64 + 37,), (3, 4), (8, 3, 3, 3)]
    values = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    values[2] = values[2].to(memory_format=torch.channels_last)
    return [nn.Parameter(value) for value in values]


def gradients(step, like):
    """Gradients over nine orders of magnitude, the same for both sides; every seventh step one of them is None."""
    generator = torch.Generator().manual_seed(1000 + step)
    result = []
    for i, parameter in enumerate(like):
        g = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        g = g * 10.0 ** torch.empty_like(g).uniform_(-6, 3, generator=generator)
        if parameter.is_contiguous(memory_format=torch.channels_last) and parameter.ndim == 4:
            g = g.to(memory_format=torch.channels_last)
        result.append(None if i == 1 and step % 7 == 3 else g.to(parameter.dtype))
    return result


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        for parameter, gradient in zip(params, gradients(step, params), strict=True):
            parameter.grad = gradient
        optimizer.step()


def gap(one, other):
    """Largest difference relative to the size of the parameters, which grow with the steps."""
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("fused", [False, None], ids=["rule", "kernel"])
@pytest.mark.parametrize(("name", "ours", "theirs", "settings", "only"), PAIRS, ids=IDS)
def test_a_hundred_steps_equal_torch(name, ours, theirs, settings, only, fused):
    a, b = parameters(), parameters()
    torchs = {key: value for key, value in settings.items() if key != "decoupled_weight_decay"} | only
    train(ours(a, lr=0.01, fused=fused, **settings), a, 100)
    train(theirs(b, lr=0.01, foreach=False, **torchs), b, 100)
    assert gap(a, b) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fused", [False, None], ids=["rule", "kernel"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_is_bit_equal_to_torch(dtype, fused, weight_decay):
    a, b = parameters(dtype), parameters(dtype)
    train(SGD(a, lr=0.01, weight_decay=weight_decay, fused=fused), a, 100)
    train(torch.optim.SGD(b, lr=0.01, weight_decay=weight_decay, foreach=False), b, 100)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_rmsprop_kernel_with_decay_is_bit_equal_to_torchs_loop():
    a, b = parameters(torch.float32), parameters(torch.float32)
    train(RMSProp(a, lr=0.01, weight_decay=0.1), a, 100)
    train(torch.optim.RMSprop(b, lr=0.01, weight_decay=0.1, foreach=False), b, 100)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("alpha", [0.0, 0.99, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rmsprop_borrows_adams_kernel_and_leaves_the_gradient_as_it_was(dtype, alpha):
    """β₁ = 0 with the gradient in the place of its own mean, and no correction even for the slowest decay."""
    generator = torch.Generator().manual_seed(1)
    start, slopes = (torch.randn(2, 1000, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    slopes[0, 0] = 0.0
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = RMSProp([ours], lr=0.01, alpha=alpha), torch.optim.RMSprop([theirs], lr=0.01, alpha=alpha)
    for k in range(1, 6):
        ours.grad, theirs.grad = slopes / k, slopes / k
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(ours.grad, slopes / k)
    loose = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=loose, atol=loose)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_bit_equal_to_torch_rule_for_loop_and_kernel_for_kernel(nesterov):
    for fused, torchs in ((False, {"foreach": False}), (None, {"fused": True})):
        a, b = parameters(), parameters()
        train(Momentum(a, lr=0.01, momentum=0.9, nesterov=nesterov, fused=fused), a, 100)
        train(torch.optim.SGD(b, lr=0.01, momentum=0.9, nesterov=nesterov, **torchs), b, 100)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), fused


# ------------------------------------------------------------------------------------------------ golden values


def first_step(rule, g, lr=1.0):
    one = torch.tensor([g], dtype=torch.float64)
    return update(rule, torch.zeros(1, dtype=torch.float64), one, {}, 1, lr)[0].item()


def test_epsilon_is_outside_the_root():
    """E09, E10: at g = 1e-8 the three denominators differ by where ε stands."""
    assert first_step(rmsprop.rule(), 1e-8) == pytest.approx(-0.909091, abs=1e-6)
    assert first_step(adagrad.rule(eps=1e-10), 1e-8) == pytest.approx(-0.990099, abs=1e-6)
    assert first_step(adam.rule(), 1e-8) == pytest.approx(-0.5, abs=1e-12)


@pytest.mark.parametrize("rule", [rmsprop.rule(), adagrad.rule(), adam.rule()])
def test_a_coordinate_without_gradient_does_not_move(rule):
    """E09: the notes' ÷√s would be 0/0 here."""
    assert first_step(rule, 0.0) == 0.0


@pytest.mark.parametrize("g", [1e-9, -3e-8, 0.7, -1e6])
def test_adams_first_step(g):
    assert first_step(adam.rule(), g, lr=0.1) == pytest.approx(-0.1 * g / (abs(g) + 1e-8), rel=1e-12)


def constant_gradient_steps(rule, count):
    theta, state, sizes = torch.zeros(1, dtype=torch.float64), {}, []
    for k in range(1, count + 1):
        after, state = update(rule, theta, torch.ones(1, dtype=torch.float64), state, k, 1.0)
        sizes.append((theta - after).item())
        theta = after
    return sizes


def test_bias_correction_shrinks_early_steps():
    """E11: uncorrected, a constant gradient gives 3.162 α at k = 1 and at most 6.569 α, at k = 12; corrected α."""
    sizes = constant_gradient_steps(adam.rule(eps=0.0, corrected=False), 2000)
    closed = [(1 - 0.9**k) / math.sqrt(1 - 0.999**k) for k in range(1, 2001)]
    assert sizes == pytest.approx(closed, rel=1e-9)
    for k, golden in ((1, 3.162), (10, 6.528), (12, 6.569), (100, 3.241), (1000, 1.258), (2000, 1.075)):
        assert sizes[k - 1] == pytest.approx(golden, abs=6e-4)
    assert max(range(2000), key=sizes.__getitem__) == 11
    assert constant_gradient_steps(adam.rule(eps=0.0), 100) == pytest.approx([1.0] * 100, abs=1e-12)


def test_momentum_is_the_sum_form():
    """θ moves by α(1 − μᵏ)/(1 − μ) at step k, not by α(1 − μᵏ)."""
    sizes = constant_gradient_steps(momentum.rule(0.9), 50)
    assert sizes == pytest.approx([(1 - 0.9**k) / 0.1 for k in range(1, 51)], rel=1e-12)
    averaged = constant_gradient_steps(chain(average(0.9, corrected=False)), 50)
    assert sizes == pytest.approx([10 * size for size in averaged], rel=1e-12)


def test_weight_decay_is_twice_the_notes_lambda():
    """E05: a penalty λ‖θ‖² on the loss is weight_decay = 2λ for SGD; inside Adam it is not decoupled decay."""
    generator, lam = torch.Generator().manual_seed(0), 0.3
    theta, g = (torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = theta - 0.1 * (g + 2 * lam * theta)
    torch.testing.assert_close(update(sgd.rule(2 * lam), theta, g, {}, 1, 0.1)[0], expected, rtol=1e-14, atol=0)
    coupled, _ = update(adam.rule(weight_decay=lam), theta, g, {}, 1, 0.1)
    decoupled, _ = update(adam.rule(weight_decay=lam, decoupled=True), theta, g, {}, 1, 0.1)
    plain, _ = update(adam.rule(), theta, g, {}, 1, 0.1)
    torch.testing.assert_close(decoupled, plain - 0.1 * lam * theta, rtol=1e-13, atol=0)
    assert (coupled - decoupled).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------- what the theory says


def quadratic(kappa=100.0):
    return torch.tensor([1.0, kappa], dtype=torch.float64)


def test_gradient_descent_on_a_quadratic_is_a_matrix_power():
    """θ_k = (I − αH)ᵏ θ_0; it diverges exactly above α = 2/λ_max."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    h = root @ root.T
    top = torch.linalg.eigvalsh(h)[-1].item()
    start = torch.randn(4, dtype=torch.float64, generator=generator)
    for factor, shrinks in ((0.9, True), (1.1, False)):
        lr = factor * 2 / top
        theta = nn.Parameter(start.clone())
        optimizer = SGD([theta], lr=lr)
        for _ in range(50):
            optimizer.zero_grad()
            (theta @ h @ theta / 2).backward()
            optimizer.step()
        power = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - lr * h, 50)
        torch.testing.assert_close(theta.detach(), power @ start, rtol=1e-9, atol=1e-12)
        along_top = torch.linalg.eigh(h)[1][:, -1]
        assert (abs(theta.detach() @ along_top) < abs(start @ along_top)) == shrinks


def steps_to(rule, lr, kappa, tolerance=1e-6):
    theta, state, h = torch.ones(2, dtype=torch.float64), {}, quadratic(kappa)
    k = 0
    while theta.norm() >= tolerance:
        k += 1
        theta, state = update(rule, theta, h * theta, state, k, lr)
    return k


def test_momentum_takes_the_square_root_of_the_condition_number():
    """κ = 100 with the best settings: rates 99/101 and 9/11 a step, so at least five times fewer steps."""
    kappa = 100.0
    root = math.sqrt(kappa)
    plain = steps_to(sgd.rule(), 2 / (1 + kappa), kappa)
    heavy = steps_to(momentum.rule(((root - 1) / (root + 1)) ** 2), (2 / (1 + root)) ** 2, kappa)
    assert plain == pytest.approx(math.log(1e-6 / math.sqrt(2)) / math.log((kappa - 1) / (kappa + 1)), abs=2)
    assert plain >= 5 * heavy


def test_adagrads_regret_bound():
    """Theorem 5 of the paper on online |θ − z_k| in 3 dimensions: regret ≤ √2 D Σ_i √(Σ_k g²), α = D/√2."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.rand(400, 3, dtype=torch.float64, generator=generator)
    theta, state, paid, squares = torch.zeros(3, dtype=torch.float64), {}, 0.0, torch.zeros(3, dtype=torch.float64)
    for k, target in enumerate(targets, start=1):
        paid += (theta - target).abs().sum().item()
        g = torch.sign(theta - target)
        squares += g**2
        theta, state = update(adagrad.rule(), theta, g, state, k, 1 / math.sqrt(2))
        theta = theta.clamp(0, 1)
    best = (targets.median(dim=0).values - targets).abs().sum().item()
    assert 0 < paid - best <= math.sqrt(2) * squares.sqrt().sum().item()


def test_adagrad_beats_sgd_on_sparse_features():
    """Logistic regression, 5 % of labels flipped, feature j present with probability 2^-j: distance of the loss to its
    minimum after 200 steps, each at its best rate of a grid (measured 0.0014 against 0.0048)."""
    generator = torch.Generator().manual_seed(0)
    rates = 2.0 ** -torch.arange(10, dtype=torch.float64)
    x = (torch.rand(2000, 10, dtype=torch.float64, generator=generator) < rates).double()
    y = (x @ torch.randn(10, dtype=torch.float64, generator=generator) > 0).double()
    y = torch.where(torch.rand(2000, dtype=torch.float64, generator=generator) < 0.05, 1 - y, y)

    def full(theta):
        return nn.functional.binary_cross_entropy_with_logits(x @ theta, y)

    best = torch.zeros(10, dtype=torch.float64)
    for _ in range(20):
        best = newton_step(full, best)

    def excess(maker):
        losses = []
        for lr in (0.1, 0.3, 1.0, 3.0, 10.0):
            theta = nn.Parameter(torch.zeros(10, dtype=torch.float64))
            optimizer = maker([theta], lr=lr)
            for step in range(200):
                rows = sgd.minibatch(2000, 32, step, seed=0)
                optimizer.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(x[rows] @ theta, y[rows]).backward()
                optimizer.step()
            losses.append((full(theta) - full(best)).item())
        assert min(losses) not in (losses[0], losses[-1])
        return min(losses)

    ours, plain = excess(AdaGrad), excess(SGD)
    assert 0 < ours < 0.5 * plain


def test_logistic_regression_on_separable_data_has_no_minimiser():
    """E07: the loss falls towards 0 and ‖θ‖ grows for ever; an L2 term gives a finite minimiser."""
    x = torch.tensor([[1.0], [2.0], [-1.0], [-3.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)

    def norms(weight_decay):
        theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer, seen = SGD([theta], lr=1.0, weight_decay=weight_decay), []
        for step in range(1600):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(x @ theta, y).backward()
            optimizer.step()
            if step + 1 in (400, 800, 1600):
                seen.append(theta.abs().item())
        return seen

    free, held = norms(0.0), norms(0.1)
    assert free[1] - free[0] > 0.5  # ‖θ‖ ~ log k: every doubling adds about log 2
    assert free[2] - free[1] > 0.5
    assert max(held) - min(held) < 1e-9


# ------------------------------------------------------------------------------------------------- the optimizer


def test_rules_are_pure():
    generator = torch.Generator().manual_seed(0)
    theta, g = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(2))
    kept = theta.clone(), g.clone()
    for rule in (sgd.rule(0.1), momentum.rule(0.9, True, 0.1), rmsprop.rule(), adagrad.rule(), adam.rule()):
        _, state = update(rule, theta, g, {}, 1, 0.1)
        frozen = {name: value.clone() for name, value in state.items()}
        assert not any(value.data_ptr() in (theta.data_ptr(), g.data_ptr()) for value in state.values())
        update(rule, theta, g, state, 2, 0.1)
        assert torch.equal(theta, kept[0])
        assert torch.equal(g, kept[1])
        assert all(torch.equal(state[name], frozen[name]) for name in state)


@pytest.mark.parametrize("fused", [False, None], ids=["rule", "kernel"])
@pytest.mark.parametrize(("name", "ours", "theirs", "settings", "only"), PAIRS, ids=IDS)
def test_resume_is_exact_and_torch_state_moves_both_ways(name, ours, theirs, settings, only, fused):
    torchs = {key: value for key, value in settings.items() if key != "decoupled_weight_decay"} | only
    whole = parameters()
    train(ours(whole, lr=0.01, fused=fused, **settings), whole, 10)

    half = parameters()
    optimizer = ours(half, lr=0.01, fused=fused, **settings)
    train(optimizer, half, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    for maker, kwargs, exact in (
        (ours, {"fused": fused, **settings}, True),
        (theirs, {"foreach": False, **torchs}, False),
    ):
        rest = [nn.Parameter(p.detach().clone()) for p in half]
        resumed = maker(rest, lr=0.5, **kwargs)  # the rate comes from the state dict
        resumed.load_state_dict(copy.deepcopy(saved))  # load_state_dict keeps the tensors it is given
        train(resumed, rest, 5, start=5)
        if exact:
            assert all(torch.equal(x, y) for x, y in zip(rest, whole, strict=True))
        assert gap(rest, whole) < 1e-12

    start = parameters()
    first = theirs(start, lr=0.01, foreach=False, **torchs)
    train(first, start, 5)
    second = ours(start, lr=0.5, fused=fused, **settings)
    second.load_state_dict(first.state_dict())
    train(second, start, 5, start=5)
    assert gap(start, whole) < 1e-12


@pytest.mark.parametrize("maker", [SGD, Momentum, RMSProp, AdaGrad, Adam, AdamW])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_gradients_and_states_in_another_order_of_memory(maker, format):
    """The fused kernels read memory in order; torch's own take a wrong step here without a word."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, 2, 2)
    value = torch.randn(shape, dtype=torch.float64, generator=generator)
    slopes = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(4)]
    other = torch.channels_last if format == torch.contiguous_format else torch.contiguous_format
    ends = []
    for odd in (False, True):
        parameter = nn.Parameter(value.clone(memory_format=format))
        optimizer = maker([parameter], lr=0.1)
        for step, slope in enumerate(slopes):
            parameter.grad = slope.clone(memory_format=other if odd else format)
            optimizer.step()
            if odd and step == 1:  # a state that was saved in the other order
                saved = copy.deepcopy(optimizer.state_dict())
                for entry in saved["state"].values():
                    for name, part in entry.items():
                        if part is not None and part.shape == shape:
                            entry[name] = part.clone(memory_format=other)
                optimizer = maker([parameter], lr=0.1)
                optimizer.load_state_dict(saved)
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("maker", [SGD, Momentum, RMSProp, AdaGrad, Adam, AdamW])
@pytest.mark.parametrize("odd", [False, True], ids=["gradient-row-major", "gradient-with-gaps"])
def test_a_parameter_with_gaps_in_its_memory(maker, odd):
    """A slice of a larger tensor: a fused kernel would take the wrong elements and write between them."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    around = wide[:, 1::2].clone()
    gapped, dense = nn.Parameter(wide[:, ::2]), nn.Parameter(wide[:, ::2].clone())
    assert not gapped.is_contiguous()
    optimizers = maker([gapped], lr=0.1), maker([dense], lr=0.1)
    for _ in range(4):
        slope = torch.randn(4, 6, dtype=torch.float64, generator=generator)[:, ::2]
        gapped.grad, dense.grad = slope if odd else slope.contiguous(), slope.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(gapped, dense, rtol=1e-12, atol=1e-13)
    assert torch.equal(wide[:, 1::2], around)


def test_a_saved_switch_that_we_lack_is_refused():
    theirs = torch.optim.Adam([nn.Parameter(torch.zeros(1))], amsgrad=True)
    with pytest.raises(ValueError, match="Adam has no amsgrad, but a parameter group has amsgrad=True"):
        Adam([nn.Parameter(torch.zeros(1))]).load_state_dict(theirs.state_dict())
    heavy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], momentum=0.9)
    with pytest.raises(ValueError, match=r"SGD has no momentum, but a parameter group has momentum=0\.9"):
        SGD([nn.Parameter(torch.zeros(1))]).load_state_dict(heavy.state_dict())


def test_groups_have_their_own_settings_and_schedulers_work():
    a, b = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamW([{"params": [a]}, {"params": [b], "weight_decay": 0.0, "lr": 0.5}], lr=0.1, weight_decay=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    a.grad, b.grad = torch.zeros_like(a), torch.ones_like(b)
    optimizer.step()
    scheduler.step()
    assert a.tolist() == pytest.approx([0.9] * 3)  # decay only
    assert b.tolist() == pytest.approx([0.5] * 3)  # Adam's first step only
    optimizer.step()
    assert a.tolist() == pytest.approx([0.9 * 0.99] * 3)
    assert b.tolist() == pytest.approx([0.45] * 3)


@pytest.mark.parametrize(
    ("maker", "own", "message"),
    [
        (Adam, {"maximize": True}, "Adam has no maximize, but a parameter group has maximize=True"),
        (SGD, {"momentum": 0.9}, r"SGD has no momentum, but a parameter group has momentum=0\.9"),
        (RMSProp, {"centered": True}, "RMSProp has no centered"),
        (Momentum, {"lr": -1.0}, r"lr must be a finite number >= 0, got -1\.0"),
        (AdaGrad, {"eps": -1.0}, "eps must be a finite number >= 0"),
        (AdamW, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1\.0"),
        (Adam, {"betas": (0.9,)}, r"betas must be two numbers, got \(0\.9,\)"),
    ],
)
def test_a_groups_own_settings_are_checked_too(maker, own, message):
    first, second = (nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        maker([{"params": [first], **own}])
    optimizer = maker([first])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [second], **own})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("maker", [SGD, Momentum, RMSProp, AdaGrad, Adam, AdamW])
def test_closure_none_gradients_and_zero_grad(maker):
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = maker([used, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert (used < 1).all()
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state
    optimizer.zero_grad()
    assert used.grad is None
    before = used.detach().clone()
    assert optimizer.step() is None
    assert torch.equal(used, before)


def test_mixed_dtypes_hooks_and_deepcopy():
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = Adam(params, lr=0.25)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global")),
    ]
    for p in params:
        p.grad = torch.ones_like(p)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        optimizer.step()
    assert calls == ["before", "after", "global"]
    assert "Optimizer.step#Adam.step" in {event.key for event in profile.key_averages()}
    for handle in handles:
        handle.remove()
    assert [p[0].item() for p in params] == pytest.approx([0.75] * 3, abs=1e-7)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [p.dtype for p in params]
    assert copy.deepcopy(optimizer).state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("maker", [SGD, Momentum, RMSProp, AdaGrad, Adam, AdamW])
def test_sparse_and_complex_gradients_are_refused(maker):
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = maker(table.parameters())
    for _ in range(2):  # as the first gradient, and behind a dense one
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match=r"dense real gradients, got torch\.float32 in torch\.sparse_coo"):
            optimizer.step()
        table.weight.grad = torch.ones(4, 2)
        optimizer.step()
        optimizer.zero_grad()
    turning = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    turning.grad = torch.ones_like(turning)
    with pytest.raises(RuntimeError, match=r"dense real gradients, got torch\.complex64"):
        maker([turning]).step()


# ------------------------------------------------------------------------------------------ custom chains, clipping


def test_a_chain_of_ones_own():
    """Clip by the joint norm, then momentum, then decoupled decay, as two visible lines, against doing it by hand."""
    a, b = (
        nn.Parameter(torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))) for i in (1, 2)
    )
    theta = [a.detach().clone(), b.detach().clone()]
    optimizer = Chain(
        [{"params": [a]}, {"params": [b]}], chain(clip_norm(1.0), accumulate(0.5), decay(0.1)), lr=0.1, fused=None
    )
    buffers = [torch.zeros_like(t) for t in theta]
    for step in range(4):
        g = [torch.full_like(t, 3.0 + step) for t in theta]
        a.grad, b.grad = (x.clone() for x in g)
        optimizer.step()
        norm = torch.cat(g).norm()
        buffers = [0.5 * m + x / norm for m, x in zip(buffers, g, strict=True)]
        theta = [t - 0.1 * (m + 0.1 * t) for t, m in zip(theta, buffers, strict=True)]
    for mine, expected in zip((a, b), theta, strict=True):
        torch.testing.assert_close(mine.detach(), expected, rtol=1e-13, atol=1e-15)


def test_second_moments_see_the_clipped_and_decayed_gradient():
    theta, g = torch.full((2,), 2.0, dtype=torch.float64), torch.tensor([0.5, 30.0], dtype=torch.float64)
    _, state = update(chain(clip_value(1.0), l2(0.5), over_root(0.0, 1e-8)), theta, g, {}, 1, 1.0)
    assert state["exp_avg_sq"].tolist() == [1.5**2, 2.0**2]


def test_asking_for_a_kernel_that_does_not_exist():
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="Chain has no fused kernel"):
        Chain([p], adam.rule(), lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="no fused kernel"):
        Adam([p], corrected=False, fused=True).step()
    Adam([p], fused=True).step()


# -------------------------------------------------------------------------------------------------- make, errors


def test_make_knows_every_name():
    p = nn.Parameter(torch.zeros(2))
    kinds = {"sgd": SGD, "momentum": Momentum, "nesterov": Momentum, "rmsprop": RMSProp, "adagrad": AdaGrad}
    for name, kind in {**kinds, "adam": Adam, "adamw": AdamW}.items():
        optimizer = make(name, [p], lr=0.3)
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["lr"] == 0.3
    assert make("nesterov", [p], 0.1, momentum=0.5).param_groups[0]["nesterov"] is True
    assert make("momentum", [p], 0.1).param_groups[0]["nesterov"] is False
    assert make("adam", [p], 0.1, betas=(0.5, 0.9)).param_groups[0]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adm", {}, "did you mean 'adam'"),
        ("adam", {"momentum": 0.9}, "'adam' has no setting 'momentum', only betas, eps, weight_decay"),
        ("sgd", {"momentum": 0.9}, "'sgd' has no setting 'momentum'"),
        ("momentum", {"nesterov": True}, "'momentum' has no setting 'nesterov'"),
        ("rmsprop", {"alhpa": 0.9}, "did you mean 'alpha'"),
        ("adam", {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1\.0"),
        ("sgd", {"weight_decay": -1}, "weight_decay must be a finite number >= 0, got -1"),
        ("rmsprop", {"eps": float("nan")}, "eps must be a finite number >= 0"),
    ],
)
def test_make_refuses_in_one_sentence(name, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        make(name, [nn.Parameter(torch.zeros(1))], lr=0.1, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("maker", [SGD, Momentum, RMSProp, AdaGrad, Adam, AdamW])
@pytest.mark.parametrize("lr", [-1.0, float("inf"), float("nan")])
def test_a_bad_rate_is_a_value_error(maker, lr):
    with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
        maker([nn.Parameter(torch.zeros(1))], lr=lr)
