"""The flat parameter vector: same training as separate parameters, names and state kept, nothing lost silently."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from etude.optim import SGD, AdaGrad, Adam, AdamW, Momentum, RMSProp, flatten
from etude.optim.clipping import clip_norm_


class Net(nn.Module):
    """A convolution, batch norm with buffers, a tied layer and a frozen one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x):
        return self.frozen(torch.tanh(self.tied(torch.tanh(self.first(self.norm(self.conv(x)).mean((2, 3)))))))


def net(channels_last=False):
    torch.manual_seed(0)
    model = Net().double()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def batch(step, model):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64, generator=generator)
    if not model.conv.weight.is_contiguous():
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randn(8, 3, dtype=torch.float64, generator=generator)


def train(model, optimizer, steps, clip=None, zero=None):
    for step in steps:
        x, y = batch(step, model)
        (zero or optimizer.zero_grad)()
        nn.functional.mse_loss(model(x), y).backward()
        if clip:
            clip_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()


def same(one, other, **tolerance):
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance or {"rtol": 1e-11, "atol": 1e-13})


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("maker", [SGD, Momentum, RMSProp, AdaGrad, Adam, AdamW, torch.optim.Adam, torch.optim.SGD])
def test_training_is_the_same_as_with_separate_parameters(maker, channels_last):
    plain, flat = net(channels_last), net(channels_last)
    vector = flatten(flat)
    assert flat.conv.weight.stride() == plain.conv.weight.stride()
    train(plain, maker([p for p in plain.parameters() if p.requires_grad], lr=0.01), range(20), clip=0.5)
    train(flat, maker([vector], lr=0.01), range(20), clip=0.5)
    same(flat.state_dict(), plain.state_dict())
    assert not torch.equal(plain.conv.weight, net().conv.weight)


def test_the_vector_is_the_parameters_in_order():
    model = net()
    expected = nn.utils.parameters_to_vector(p for p in model.parameters() if p.requires_grad)
    names, vector = list(model.state_dict()), flatten(model)
    assert torch.equal(vector.detach(), expected.detach())
    assert list(model.state_dict()) == names
    assert model.tied.weight is model.first.weight
    model.first.bias.data.fill_(7.0)
    assert (vector == 7.0).sum() == 4
    assert sum(p.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr() for p in model.parameters()) == 7


@pytest.mark.parametrize("how", ["module", "to none", "assigned"])
def test_gradients_that_were_replaced_still_count(how):
    """`module.zero_grad()` sets every .grad to None, so backward makes new ones: the update must see them."""
    plain, flat = net(), net()
    optimizer = Adam([flatten(flat)], lr=0.01)

    def drop():
        if how == "module":
            flat.zero_grad()
        elif how == "to none":
            optimizer.zero_grad(set_to_none=True)
        else:
            for p in flat.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None

    train(flat, optimizer, range(5), zero=drop)
    train(plain, Adam([p for p in plain.parameters() if p.requires_grad], lr=0.01), range(5))
    same(flat.state_dict(), plain.state_dict())


def test_zero_grad_is_a_fill_and_unused_parameters_get_zero():
    model = net()
    vector = flatten(model)
    optimizer = Adam([vector], lr=0.1)
    for set_to_none in (True, False):
        train(model, optimizer, range(1))
        assert vector.grad.abs().sum() > 0
        slopes = model.conv.weight.grad
        optimizer.zero_grad(set_to_none=set_to_none)
        assert model.conv.weight.grad is slopes
        assert (vector.grad == 0).all()
    model.first.bias.sum().backward()
    assert (model.conv.weight.grad == 0).all()
    assert (vector.grad != 0).sum() == 4
    vector.grad = torch.ones_like(vector)
    assert (model.conv.weight.grad == 1).all()


def test_a_loss_of_the_vector_itself_counts():
    """A penalty λ‖θ‖² written on the vector adds 2λθ to what the parameters' own losses give; twice, it adds twice."""
    model = net()
    vector = flatten(model)
    x, y = batch(0, model)
    nn.functional.mse_loss(model(x), y).backward()
    own, view = vector.grad.clone(), model.conv.weight.grad
    (nn.functional.mse_loss(model(x), y) + 0.5 * vector.square().sum()).backward()
    vector.sum().backward()
    torch.testing.assert_close(vector.grad, 2 * own + vector.detach() + 1, rtol=1e-12, atol=1e-14)
    assert model.conv.weight.grad is view
    assert torch.equal(view, vector.grad[: view.numel()].view(view.shape))
    Adam([vector]).zero_grad()
    assert (vector.grad == 0).all()


def test_existing_gradients_are_kept():
    model = net()
    x, y = batch(0, model)
    nn.functional.mse_loss(model(x), y).backward()
    kept = model.conv.weight.grad.clone()
    vector = flatten(model)
    assert torch.equal(model.conv.weight.grad, kept)
    assert vector.grad.abs().sum() > 0


def test_saving_and_loading_keep_names_and_reach_the_vector(tmp_path):
    whole = net()
    train(whole, Adam([flatten(whole)], lr=0.01), range(10))

    half = net()
    optimizer = Adam([flatten(half)], lr=0.01)
    train(half, optimizer, range(5))
    save_file(half.state_dict() | {"tied.weight": half.tied.weight.clone()}, tmp_path / "half.safetensors")
    moments = copy.deepcopy(optimizer.state_dict())

    rest = Net().double()
    vector = flatten(rest)
    resumed = Adam([vector], lr=0.01)
    rest.load_state_dict(load_file(tmp_path / "half.safetensors"))
    resumed.load_state_dict(moments)
    train(rest, resumed, range(5, 10))
    same(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)

    ordinary = Net().double()
    ordinary.load_state_dict(rest.state_dict())
    same(ordinary.state_dict(), rest.state_dict(), rtol=0, atol=0)


def test_a_deepcopy_is_an_ordinary_module():
    model = net()
    vector = flatten(model)
    train(model, Adam([vector], lr=0.01), range(2))
    twin, frozen = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    train(model, Adam([vector], lr=0.01), range(2, 4))
    same(twin.state_dict(), frozen, rtol=0, atol=0)
    twin_vector = flatten(twin)
    train(twin, Adam([twin_vector], lr=0.01), range(2, 4))
    same(twin.state_dict(), model.state_dict())
    for refused in (lambda: copy.deepcopy(vector), lambda: pickle.dumps(vector)):
        with pytest.raises(TypeError, match="belongs to its module"):
            refused()


@pytest.mark.parametrize("how", ["float", "flatten again"])
def test_a_parameter_that_left_the_vector_is_named(how):
    model = net()
    optimizer = Adam([flatten(model)], lr=0.01)
    if how == "float":
        model.float()
    else:
        flatten(model)
    with pytest.raises(RuntimeError, match=r"conv\.weight no longer lives in the flat vector"):
        optimizer.step()


def test_two_vectors_with_settings_of_their_own():
    model = nn.Linear(3, 2).double()
    weights, biases = flatten([model.weight]), flatten([model.bias])
    optimizer = AdamW([{"params": [weights], "weight_decay": 1.0}, {"params": [biases], "weight_decay": 0.0}], lr=0.1)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()  # all gradients are zero
    torch.testing.assert_close(model.weight.detach(), 0.9 * before["weight"])
    assert torch.equal(model.bias.detach(), before["bias"])


def test_what_cannot_be_flat():
    with pytest.raises(ValueError, match="no trainable parameter"):
        flatten(nn.ReLU())
    with pytest.raises(ValueError, match=r"one dtype and one device, got torch\.float32 on cpu, torch\.float64 on cpu"):
        flatten([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))])
