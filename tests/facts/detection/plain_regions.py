"""What the written-out runs of the region detectors share. Read it with ``runpy``, as `plain.py`."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from etude.core.checkpoint import list_checkpoints, read
from etude.core.randomness import fold
from etude.detection import fast_rcnn, faster_rcnn, rcnn
from etude.detection.parts.scenes import Scene, scenes

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain.py"))))
ROOMS = {"fast_rcnn": fast_rcnn, "faster_rcnn": faster_rcnn, "rcnn": rcnn}
ASIDE = {"quiet": True, "seed": 0, "threads": 1}
SMALL = {"size": 32, "examples": 16, "width": 4, "steps": 3, "batch": 4, "head_width": 8, "regions": 6, "proposals": 9}
SMALL |= ASIDE


def begun(name, flags):
    """Config, data and the network that a run with seed 0 begins with."""
    room = ROOMS[name]
    config = room.Config(**{k: v for k, v in flags.items() if k not in ASIDE})
    data = scenes("digits", 32, config.examples, config.objects)
    torch.manual_seed(fold(0, 0, 0, "init"))
    return config, data, room.build(config, data.spec)["model"]


def dice(step):
    return torch.Generator().manual_seed(fold(0, step, 0, "regions"))


def turned(regions, step, batch):
    """The mirrored regions of the pictures that the mini-batch mirrors."""
    turn = torch.rand(batch, generator=torch.Generator().manual_seed(fold(0, step, 0, "mirror"))) < 0.5
    out = regions.clone()
    out[turn, :, 0], out[turn, :, 2] = 32 - regions[turn, :, 2], 32 - regions[turn, :, 0]
    return out


def whole(net, trunk):
    """The network with torch's own trunk in place of its trunk."""
    return nn.ModuleList([trunk, *(part for name, part in net.named_children() if name != "trunk")])


def trained(config, net, data, loss_of):
    """The loop: losses of every step."""
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1.0, weight_decay=config.weight_decay)
    rates = plain.one_cycle(config.learning_rate, config.steps)
    batch = plain.batches(data.train, config.batch, 0, config.flip)
    losses, clipped = [], 0
    net.train()
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        loss = loss_of(step, *batch(step))
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            clipped += bool(nn.utils.clip_grad_norm_(learning, config.clip_norm) > config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    assert clipped or config.clip_norm is None or config.clip_norm > 1
    return losses


def pictures(boxes, labels):
    return Scene(torch.zeros(len(boxes)), boxes, labels, torch.zeros_like(labels, dtype=torch.bool))


def agree(done, losses, net):
    rows = plain.log(done.folder)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    saved = read(list_checkpoints(done.folder / "checkpoints")[-1])["model"]
    mine = torch.cat([v.double().flatten() for k, v in saved.items() if k.endswith(("weight", "bias"))])
    theirs = torch.cat([p.detach().flatten().double() for p in net.parameters()])
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def worth(done, rows, data, **more):
    expected = plain.worth(rows, data.test, "test") | more
    assert done.metrics == pytest.approx(expected, abs=2e-3)
