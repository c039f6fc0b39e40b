"""U-Net: the paper's sizes and parameters, its skips, and the same answers from tiles as from one pass."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import etude
from etude.cli import main
from etude.core.errors import UserError
from etude.segmentation.parts.tiles import logits
from etude.segmentation.unet import UNet


def test_sizes_and_parameters_are_the_papers(monkeypatch):
    """E43: unpadded, 572 → 388; 31,030,658 parameters for one channel and two classes."""
    monkeypatch.setattr("etude.segmentation.unet.Standardise", lambda *_: nn.Identity())
    with torch.device("meta"):  # sizes without arithmetic
        net, same = (UNet(2, width=64, levels=4, padding=padding) for padding in ("valid", "same"))
        assert net(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
        assert same(torch.zeros(1, 1, 512, 512)).shape == (1, 2, 512, 512)
    assert sum(p.numel() for p in net.parameters()) == 31_030_658
    assert (net.margin, net.fitting(388), net.fitting(389)) == (92, 388, 404)


def plain(net, x, padding):
    """The two-level network by torch's functions, its maps cut by hand."""
    pad = 1 if padding == "same" else 0
    state = net.state_dict()

    def twice(x, name):
        for layer in (0, 2):
            x = F.conv2d(x, state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"], padding=pad).relu()
        return x

    a = twice((x - 0.5) / 0.5, "down.0")
    b = twice(nn.MaxPool2d(2)(a), "down.1")
    c = twice(nn.MaxPool2d(2)(b), "down.2")
    for k, skip in ((0, b), (1, a)):
        c = F.conv_transpose2d(c, state[f"up.{k}.weight"], state[f"up.{k}.bias"], stride=2)
        rim = (skip.shape[-1] - c.shape[-1]) // 2
        skip = skip[:, :, rim : skip.shape[2] - rim, rim : skip.shape[3] - rim]
        c = twice(torch.cat([skip, c], 1), f"join.{k}")
    return F.conv2d(c, state["last.weight"], state["last.bias"])


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_network_is_the_one_written_out(padding):
    net = UNet(3, (0.5,), (0.5,), width=3, levels=2, padding=padding).double()
    x = torch.rand(2, 1, 52, 52, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain(net, x, padding))
    assert net(x).shape[-1] == (52 if padding == "same" else 12)


def test_every_skip_matters():
    net = UNet(2, (0.5,), (0.5,), width=8, levels=2, padding="same").double()
    x = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    whole = net(x)
    for level in range(2):
        weight = net.join[1 - level][0].weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[:, : weight.shape[1] // 2] = 0  # of the skip's maps
        assert not torch.allclose(net(x), whole)
        with torch.no_grad():
            weight.copy_(kept)
    torch.testing.assert_close(net(x), whole)
    net.skips = "cut"
    assert not torch.allclose(net(x), whole)
    with torch.no_grad():
        for join in net.join:
            join[0].weight[:, : join[0].weight.shape[1] // 2] = 9.0
    cut = net(x)
    net.skips = "concat"
    assert not torch.allclose(net(x), cut)


def test_reach_is_how_far_a_block_sees():
    """The gradients of the answers of one aligned block of 4 × 4 pixels end `reach` pixels beyond it, no sooner."""
    net = UNet(2, (0.5,), (0.5,), width=2, levels=2, padding="same").double()
    for p in net.parameters():
        nn.init.uniform_(p, 0.01, 1)
    x = (1 + torch.rand(1, 1, 52, 52, dtype=torch.float64)).requires_grad_()
    net(x)[0, 0, 24:28, 24:28].sum().backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero()[:, 0]
    assert (int(rows.min()), int(rows.max())) == (24 - net.reach, 27 + net.reach)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("levels", "size", "tile"), [(1, (21, 33), 8), (2, (50, 61), 16), (2, (9, 5), 16)])
def test_tiles_are_one_pass(padding, levels, size, tile):
    net = UNet(2, (0.0,), (1.0,), width=2, levels=levels, padding=padding).double()
    for p in net.parameters():
        nn.init.uniform_(p, 0.01, 0.2)  # no ReLU is dead, so that everything within reach is seen
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    whole = logits(net, x)
    assert whole.shape == (1, 2, *size)
    torch.testing.assert_close(logits(net, x, tile), whole, rtol=1e-10, atol=0)


def test_crop_that_fits_no_output_is_refused():
    net = UNet(2, width=2, levels=2, padding="same")
    net.check(64)
    with pytest.raises(UserError, match="take 60 or 64"):
        net.check(62)
    with pytest.raises(UserError, match=r"--crop 30 is no side .* take 28 or 32"):
        etude.run("segmentation/unet", preset="tiny", crop=30, quiet=True, out="nowhere")


def test_predict_writes_masks_that_can_be_read_again(tmp_path, monkeypatch, capsys):
    """On pictures of any size; the command names the classes, and pixels give the same mask as their file."""
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)
    done = etude.run("segmentation/unet", preset="tiny", steps=2, quiet=True, seed=0, out=tmp_path / "run")
    x = np.random.default_rng(0).integers(0, 256, (37, 51), dtype=np.uint8)
    Image.fromarray(x).save(tmp_path / "p.png")
    Image.fromarray(x[:20]).convert("RGB").save(tmp_path / "q.png")
    loaded = etude.load(done.folder)
    assert main(["predict", str(done.folder), str(tmp_path / "p.png"), str(tmp_path / "q.png")]) == 0
    assert "p-overlay.png" in capsys.readouterr().out.replace("\n", "")
    (mask,) = loaded.predict(x[None])
    with Image.open(done.folder / "predictions/p-mask.png") as image:
        assert np.array_equal(np.asarray(image), mask["mask"])
    expected = logits(loaded.model, torch.tensor(x)[None, None])[0].argmax(0)
    assert np.array_equal(mask["mask"], expected.numpy())
    assert sum(mask["shares"].values()) == pytest.approx(1)
    with Image.open(done.folder / "predictions/q-overlay.png") as image:
        assert image.size == (51, 20)
    with pytest.raises(UserError, match="does not exist"):
        loaded.predict(tmp_path / "none.png")
    with pytest.raises(UserError, match="takes uint8 pixels"):
        loaded.predict(x[None] / 255)
