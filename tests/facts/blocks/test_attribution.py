"""Facts about input gradients: exact, per image, and the model is left as it was, whatever it does inside."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.blocks.looking import attribution
from etude.blocks.looking.attribution import (
    chosen,
    erase,
    heat,
    input_gradient,
    panel,
    probabilities,
    rank_correlation,
    shuffled,
    unit,
    verdicts,
)
from etude.vision.lenet import LeNet


def first(logits: Tensor) -> Tensor:
    return unit(logits, 0)


def total(logits: Tensor) -> Tensor:
    return logits[:, 0].sum()


def convolutions() -> nn.Sequential:
    """Batch norm, dropout and a reused ReLU in place: what goes wrong when a model is not in eval mode, or hooked."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4), relu, nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), relu,
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(6 * 4 * 4, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("model", [convolutions(), LeNet(3).double(), LeNet(3, style="1998").double()])
def test_equals_autograd_in_eval_mode(model: nn.Module) -> None:
    side = 28 if isinstance(model, LeNet) else 12
    x = torch.rand(5, 1, side, side, dtype=torch.float64)
    gradient, logits = input_gradient(model, x, first)
    model.eval()
    leaf = x.clone().requires_grad_()
    expected = model(leaf)
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(total(expected), leaf)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (5, {"padding": 2}),
        (3, {}),
        ((3, 5), {"padding": (0, 4)}),
        (4, {"padding": 3}),
        (3, {"padding": 5}),
        (3, {"stride": 2}),
        (3, {"dilation": 2}),
        (3, {"padding": "same"}),
    ],
)
def test_convolutions_of_few_channels(kernel: int | tuple[int, int], options: dict, bias: bool, channels: int) -> None:
    """The shortcut for few input channels, and everything it must leave to the library."""
    model = nn.Sequential(
        nn.Conv2d(channels, 3, kernel, bias=bias, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)
    ).double()
    x = torch.rand(2, channels, 9, 11, dtype=torch.float64)
    model(x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(total(model(leaf)), leaf)[0]
    torch.testing.assert_close(input_gradient(model, x, first)[0], expected, rtol=1e-10, atol=1e-12)


def test_images_are_not_coupled() -> None:
    """The gradient of an image is the same alone and in any company, also for a model in training mode."""
    model, x = convolutions().train(), torch.rand(6, 1, 12, 12, dtype=torch.float64)
    together = input_gradient(model, x, first)[0]
    alone = torch.cat([input_gradient(model, one[None], first)[0] for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-13)
    coupled = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(144, 2)).double()
    with pytest.raises(ValueError, match="couples its images"):
        input_gradient(coupled, x, first)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(guided: bool, fails: bool) -> None:
    model = convolutions().train()
    model[1].eval()  # mixed flags must come back too
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    flags = [part.training for part in model.modules()]
    wanted = [(id(p), p.requires_grad, p.grad is None, p.is_contiguous()) for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    kept, random = x.clone(), torch.get_rng_state()

    def score(logits: Tensor) -> Tensor:
        if fails:
            raise KeyboardInterrupt
        return first(logits)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            input_gradient(model, x, score, guided)
    else:
        input_gradient(model, x, score, guided)
    assert [part.training for part in model.modules()] == flags
    assert [(id(p), p.requires_grad, p.grad is None, p.is_contiguous()) for p in model.parameters()] == wanted
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(
        not part._forward_hooks and not part._backward_hooks and not part._forward_pre_hooks for part in model.modules()
    )
    assert all(not p._backward_hooks for p in model.parameters())
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    # and the next plain backward pass is plain: no rule is left behind
    model.eval()
    leaf = x.clone().requires_grad_()
    before = torch.autograd.grad(total(model(leaf)), leaf)[0]
    if not fails:
        input_gradient(model, x, first, guided=True)
    assert torch.equal(torch.autograd.grad(total(model(leaf)), leaf)[0], before)


class Counts(nn.Module):
    """A model that changes its input, and a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x.sub_(0.5))


def test_in_place_models_and_callers_without_gradients() -> None:
    model, x = Counts(), torch.rand(3, 4)
    kept = x.clone()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            gradient, _ = input_gradient(model, x, first)
        assert torch.equal(gradient, model.linear.weight[0].detach().expand(3, 4))
    assert torch.equal(x, kept)
    assert float(model.calls) == 0


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"uint8.*floating"):
        input_gradient(model, torch.zeros(1, 4, dtype=torch.uint8), first)
    with pytest.raises(ValueError, match=r"must return logits \(N, classes\)"):
        input_gradient(nn.Sequential(nn.Linear(4, 1)), torch.zeros(2, 4), first)
    with pytest.raises(ValueError, match="has no gradient at x"):
        input_gradient(_Rounds(), torch.rand(2, 4), first)
    with pytest.raises(ValueError, match="no ReLU is seen"):
        input_gradient(model, torch.rand(2, 4), first, guided=True)
    logits = torch.zeros(3, 4)
    for bad in (4, -1, torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(ValueError, match="target"):
            chosen(logits, bad)


class _Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.detach())


def test_chosen() -> None:
    logits = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    assert chosen(logits, None).tolist() == [1, 0]
    assert chosen(logits, 1).tolist() == [1, 1]
    assert chosen(logits, torch.tensor([0, 1], dtype=torch.int32)).tolist() == [0, 1]


def test_rank_correlation_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(6, 7, 7), torch.randn(6, 7, 7)
    a[:, :3], b[:, 2:4] = 0, 1  # ties
    expected = [stats.spearmanr(one.flatten(), two.flatten()).statistic for one, two in zip(a.numpy(), b.numpy())]
    torch.testing.assert_close(
        rank_correlation(a, b), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    assert rank_correlation(a, torch.zeros_like(a)).tolist() == [0] * 6
    torch.testing.assert_close(rank_correlation(a, a.exp()), torch.ones(6, dtype=torch.float64))


def test_erase_takes_the_highest_pixels() -> None:
    x, rank = torch.rand(2, 3, 4, 4) + 1, torch.arange(32.0).view(2, 4, 4)
    rank[1] = -rank[1]
    gone = erase(x, rank, 0.25, torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
    assert torch.equal(gone[0, :, :3], x[0, :, :3])
    assert torch.equal(gone[1, :, 1:], x[1, :, 1:])
    torch.testing.assert_close(gone[0, :, 3], torch.tensor([0.1, 0.2, 0.3])[:, None].expand(3, 4))
    assert torch.equal(erase(x, rank, 0.0), x)
    assert heat(torch.tensor([[[[1.0]], [[-3.0]]]])).item() == 3


def test_shuffled_keeps_the_entries_and_the_original() -> None:
    model = convolutions()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    every = shuffled(model, torch.Generator().manual_seed(1))
    last = shuffled(model, torch.Generator().manual_seed(1), last_only=True)
    for (name, a), b, c in zip(model.named_parameters(), every.parameters(), last.parameters()):
        assert torch.equal(a, state[name])
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        assert torch.equal(a, c) == (not name.startswith("8."))
    assert not torch.equal(model[0].weight, every[0].weight)


def test_panel_and_words() -> None:
    x, maps = torch.rand(2, 3, 8, 8), torch.randn(2, 8, 8)
    before = torch.tensor([[0.997, 0.003], [0.4, 0.6]])
    said = verdicts(before, before.flip(1), ("cat", "a very long name"), torch.tensor([0, 1]))
    assert said[0] == ["is cat", "before: cat >99%", "after: a very … >99%"]
    assert said[1][1:] == ["before: a very … 60%", "after: cat 60%"]
    figure = panel({"image": x, "map": maps, "grey": x[:, :1]}, said)
    assert len(figure.axes) == 6
    assert "before: cat >99%" in [text.get_text() for text in figure.texts]
    # the sign is kept: the colour scale is symmetric about 0
    assert figure.axes[2].images[0].norm.vmin == -figure.axes[2].images[0].norm.vmax


def test_probabilities_restore_the_flags() -> None:
    model = convolutions().train()
    found = probabilities(model, torch.rand(2, 1, 12, 12, dtype=torch.float64))
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    assert all(part.training for part in model.modules())
    assert not found.requires_grad
    assert F.relu(found).grad_fn is None


class Viewing(nn.Module):
    """Colour convolutions, batch norm with and without weights, `view` of a tensor that may be channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 6, 3, stride=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(6, affine=False)])
        self.out = nn.Linear(6 * 3 * 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[1](self.two(self.norms[0](self.one(x)).relu())).relu()
        return self.out(y.view(size=(len(y), 2, -1)).view(len(y), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_equals_of_batch_norm_and_view_change_nothing(dtype) -> None:
    torch.manual_seed(0)
    model = Viewing().to(dtype)
    model(torch.randn(16, 3, 9, 9, dtype=dtype))  # running estimates that are not 0 and 1
    model.eval()
    x = torch.rand(4, 3, 9, 9, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, logits = input_gradient(model, x, lambda z: unit(z, torch.arange(4)))
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(model(leaf).diagonal().sum(), leaf)
    close = 1e-12 if dtype == torch.float64 else 1e-6
    assert torch.allclose(found, plain, rtol=0, atol=close)
    assert torch.allclose(logits, model(x), rtol=0, atol=close)
    assert found.is_contiguous()
    assert plain.abs().max() > 1e-3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.one.weight.is_contiguous()
    assert x.is_contiguous()


class Branching(nn.Module):
    """Two convolutions with batch norm; `way` says who else uses the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm, self.other = nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        self.out, self.way = nn.Linear(6, 4), "plain"

    def forward(self, x: Tensor) -> Tensor:
        made = self.one(x)
        if self.way == "swapped":
            made = self.other(made)
        elif self.way == "skipped":
            made = made.tanh()
        else:
            y = self.norm(made)
            made = F.relu(y, inplace=True) if self.way == "plain" else y + made
        made = self.norm(self.two(made)) if self.way == "shared" else self.other(self.two(made))
        return self.out(made.relu().mean((2, 3)))


def _by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(total(model(leaf)), leaf)[0]


def test_batch_norm_is_folded_only_where_that_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Branching().double()
    model(torch.randn(8, 2, 6, 6, dtype=torch.float64))
    model.eval()
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    for way in ("plain", "plain", "swapped", "plain", "kept", "skipped", "shared", "plain", "swapped"):
        model.way = way
        for _ in range(3):  # seen, held against the plain result, folded
            found = input_gradient(model, x, first)[0]
            torch.testing.assert_close(found, _by_autograd(model, x), rtol=1e-11, atol=1e-13)
        known, sure = attribution._FOLDS[model]
        assert sure
        assert way not in ("kept", "skipped") or "one.weight" not in known
        assert known["two.weight"].mean == ("norm" if way == "shared" else "other") + ".running_mean"
        with torch.no_grad():  # what is folded are the weights of now
            model.one.weight.mul_(1.1)
            model.norm.running_var.mul_(1.2)
            model.norm.bias.add_(0.1)


def test_a_hook_sees_what_the_convolution_made() -> None:
    torch.manual_seed(0)
    model, x = Branching().double().eval(), torch.rand(3, 2, 6, 6, dtype=torch.float64)
    for _ in range(3):
        input_gradient(model, x, first)
    assert "one.weight" in attribution._FOLDS[model].norms
    kept: list[Tensor] = []
    hook = model.one.register_forward_hook(lambda module, inputs, out: kept.append(out))
    found = input_gradient(model, x, first)[0]
    hook.remove()
    torch.testing.assert_close(kept[-1].detach(), F.conv2d(x, model.one.weight, padding=1).detach())
    torch.testing.assert_close(found, _by_autograd(model, x), rtol=1e-11, atol=1e-13)


def test_the_memory_of_folding_goes_with_the_model() -> None:
    model, x = Branching().eval(), torch.rand(3, 2, 6, 6)
    input_gradient(model, x, first)
    assert attribution._FOLDS[model].norms["one.weight"].mean == "norm.running_mean"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_the_lens_cannot_see_is_found_by_comparing() -> None:
    """A scripted function uses the convolution's output as well; it is no torch function that a mode would meet."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its retirement
        scripted = torch.jit.script(_squared)
    model = Branching().double()
    model(torch.randn(8, 2, 6, 6, dtype=torch.float64))
    model.eval()
    model.forward = lambda x: model.out((model.norm(y := model.one(x)) + scripted(y)).relu().mean((2, 3)))  # type: ignore
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    for _ in range(4):
        torch.testing.assert_close(input_gradient(model, x, first)[0], _by_autograd(model, x), rtol=1e-11, atol=1e-13)
    assert attribution._FOLDS[model] == ({}, True)  # never folded


def _squared(y: Tensor) -> Tensor:
    return y * y
