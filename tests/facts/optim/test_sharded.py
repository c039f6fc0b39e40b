"""Optimizers and clipping on sharded parameters (FSDP2) equal the whole ones, and keep their state sharded."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from etude.optim import SGD, AdaGrad, Adam, AdamW, Momentum, RMSProp
from etude.optim.clipping import clip_norm_, clip_value_


@pytest.fixture(scope="module")
def mesh():
    """A group of this one process: the same tensors and dispatch as with many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "rule"])
@pytest.mark.parametrize("maker", [SGD, Momentum, RMSProp, AdaGrad, Adam, AdamW])
@pytest.mark.filterwarnings("default")  # torch's own, about meshes and first uses
def test_sharded_training_is_the_same(mesh, maker, fused):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    sharded = copy.deepcopy(whole)
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = [maker(model.parameters(), lr=0.01, fused=fused) for model in (whole, sharded)]
    for step in range(5):
        x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        norms = []
        for model, optimizer in zip((whole, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            norms.append(clip_norm_(model.parameters(), 0.05).item())
            clip_value_(model.parameters(), 0.02)
            optimizer.step()
        assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    for mine, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(mine, DTensor)
        torch.testing.assert_close(mine.full_tensor().detach(), other.detach(), rtol=1e-11, atol=1e-13)
        state = optimizers[1].state[mine]
        assert all(isinstance(value, DTensor) for name, value in state.items() if name != "step")
