"""FCN: a classifier slid over the picture, bilinear steps up, and scores of finer levels added where they belong."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.blocks.nn.windows import convolve_transposed
from etude.core.errors import UserError
from etude.core.spec import Spec
from etude.segmentation.fcn import FCN, Config, bilinear, build
from etude.segmentation.parts.tiles import logits

SPEC = Spec((1,), ("a", "b", "c"), (0.5,), (0.25,), {"segments": False})


def loud(net):
    """Weights by which no ReLU is dead, so that everything within reach is seen."""
    for p in net.parameters():
        nn.init.uniform_(p, 0.01, 0.2)
    return net.double()


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bilinear_kernel_interpolates(factor):
    """E41: overlaps are summed; under a bilinear kernel the sum is an average, and equals interpolation away from the rim."""
    x = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    kernel = bilinear(factor)[None, None].double()
    y = F.conv_transpose2d(x, kernel, stride=factor, padding=factor // 2)
    torch.testing.assert_close(y, convolve_transposed(x, kernel, stride=factor, padding=factor // 2))
    smooth = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    inner = (..., slice(factor // 2, -(factor // 2)), slice(factor // 2, -(factor // 2)))
    torch.testing.assert_close(y[inner], smooth[inner])
    flat = F.conv_transpose2d(torch.ones_like(x), kernel, stride=factor, padding=factor // 2)
    torch.testing.assert_close(flat[inner], torch.ones_like(flat[inner]))


@pytest.mark.parametrize(("levels", "head"), [(1, 3), (2, 1), (2, 5), (3, 3)])
def test_coarse_scores_are_a_classifier_slid_over_the_picture(levels, head):
    """One score for every 2^levels pixels: that of a classifier, ending in fully connected layers, on its patch alone."""
    torch.manual_seed(1)
    net = FCN(3, (0.5,), (0.25,), width=3, levels=levels, fused=0, head=head, head_width=6, padding="valid").double()
    first, second, last = net.head[0], net.head[3], net.scores[0]
    full = [nn.Linear(m.weight[0].numel(), m.out_channels).double() for m in (first, second, last)]
    for linear, convolution in zip(full, (first, second, last)):
        linear.weight.data, linear.bias.data = convolution.weight.data.flatten(1), convolution.bias.data
    trunk = [m for level in net.down for m in (*level, nn.MaxPool2d(2))]
    classifier = nn.Sequential(*trunk, nn.Flatten(), full[0], nn.ReLU(), full[1], nn.ReLU(), full[2])
    stride = 2**levels
    patch = stride * head + 4 * (stride - 1)
    x = torch.rand(2, 1, patch + 2 * stride, patch + 3 * stride, dtype=torch.float64)
    coarse, _ = net.coarse(x)
    assert coarse.shape == (2, 3, 3, 4)
    for i in range(3):
        for j in range(4):
            seen = x[..., stride * i : stride * i + patch, stride * j : stride * j + patch]
            torch.testing.assert_close(classifier((seen - 0.5) / 0.25), coarse[..., i, j])


def written_out(net, x, fused, padding):
    """Three levels by torch's functions; where nothing is padded, interpolations keep what all their cells cover."""
    state = net.state_dict()
    pad = 1 if padding == "same" else 0
    h, pools = (x - 0.5) / 0.25, []
    for level in range(3):
        for layer in (0, 2):
            name = f"down.{level}.{layer}"
            h = F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], padding=pad).relu()
        h = F.max_pool2d(h, 2)
        pools.append(h)
    h = F.conv2d(h, state["head.0.weight"], state["head.0.bias"], padding=pad).relu()
    h = F.conv2d(h, state["head.3.weight"], state["head.3.bias"]).relu()
    z = F.conv2d(h, state["scores.0.weight"], state["scores.0.bias"])

    def rimless(y, factor):
        cut = factor // 2 if padding == "same" else factor
        return y[..., cut:-cut, cut:-cut]

    for k in range(fused):
        z = rimless(F.conv_transpose2d(z, state[f"up.{k}.weight"], stride=2), 2)
        score = F.conv2d(pools[1 - k], state[f"scores.{k + 1}.weight"], state[f"scores.{k + 1}.bias"])
        rim = (score.shape[-1] - z.shape[-1]) // 2
        z = z + score[..., rim : rim + z.shape[-2], rim : rim + z.shape[-1]]
    factor = 2 ** (3 - fused)
    kernel = torch.block_diag(*[bilinear(factor)] * 3).double()
    kernel = torch.stack([torch.stack(row.split(2 * factor, 1)) for row in kernel.split(2 * factor, 0)])
    return rimless(F.conv_transpose2d(z, kernel, stride=factor), factor)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("fused", [0, 1, 2])
def test_network_is_the_one_written_out(fused, padding):
    net = loud(FCN(3, (0.5,), (0.25,), width=2, levels=3, fused=fused, head=3, head_width=4, padding=padding))
    side = net.fitting(20) + 2 * net.margin
    x = torch.rand(2, 1, side, side, dtype=torch.float64)
    assert net(x).shape == (2, 3, net.fitting(20), net.fitting(20))
    torch.testing.assert_close(net(x), written_out(net, x, fused, padding))


@pytest.mark.parametrize("fused", [0, 1, 2])
def test_reach_is_how_far_a_block_sees(fused):
    """The gradients of the answers of one aligned block of 8 × 8 pixels end `reach` pixels beyond it, no sooner."""
    net = loud(FCN(2, (0.5,), (0.5,), width=2, levels=3, fused=fused, head=3, head_width=2))
    x = (1 + torch.rand(1, 1, 96, 96, dtype=torch.float64)).requires_grad_()
    net(x)[0, 0, 40:48, 40:48].sum().backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero()[:, 0]
    low, high = 40 - int(rows.min()), int(rows.max()) - 47
    assert max(low, high) == net.reach


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    ("levels", "fused", "size", "tile"), [(1, 0, (21, 33), 8), (2, 1, (50, 61), 16), (3, 2, (45, 70), 16)]
)
def test_tiles_are_one_pass(padding, levels, fused, size, tile):
    net = loud(FCN(2, (0.0,), (1.0,), width=2, levels=levels, fused=fused, head=3, head_width=3, padding=padding))
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    whole = logits(net, x)
    assert whole.shape == (1, 2, *size)
    torch.testing.assert_close(logits(net, x, tile), whole, rtol=1e-10, atol=0)


def test_begins_at_zero_and_bilinear():
    net = build(Config(levels=3, fused=2, width=2, head_width=4), SPEC)["model"]
    assert not any(score.weight.any() or score.bias.any() for score in net.scores)
    for up in net.up:
        z = torch.randn(1, 3, 4, 4)
        smooth = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(up(z)[..., 1:-1, 1:-1], smooth[..., 1:-1, 1:-1])
        assert up.weight.requires_grad
    fixed = build(Config(levels=3, fused=2, width=2, head_width=4, upsampling="fixed"), SPEC)["model"]
    assert not any(p.requires_grad for p in fixed.up.parameters())
    assert all(p.requires_grad for name, p in fixed.named_parameters() if not name.startswith("up."))


def test_sizes_of_the_paper(monkeypatch):
    """VGG's 7×7 head of 4096 units: 32, 16 and 8 pixels between scores that are interpolated; the head's parameters are VGG's."""
    monkeypatch.setattr("etude.segmentation.fcn.Standardise", lambda *_: nn.Identity())
    for fused, factor in ((0, 32), (1, 16), (2, 8)):
        with torch.device("meta"):
            net = FCN(21, (0.5,) * 3, (0.5,) * 3, width=32, levels=5, fused=fused, head=7)
        assert (net.last, net.stride, len(net.up)) == (factor, 32, fused)
        assert sum(p.numel() for p in net.head.parameters()) == 7 * 7 * 512 * 4096 + 4096 + 4096 * 4096 + 4096


@pytest.mark.parametrize(("flags", "said"), [
    ({"fused": 3}, "--fused 3 of --levels 3: at most 2"),
    ({"head": 4}, "--head is 4; it must be odd"),
    ({"crop": 30}, r"--crop 30 is no side .* take 24 or 32"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_go_together(flags, said):
    with pytest.raises(UserError, match=said):
        etude.run("segmentation/fcn", preset="tiny", quiet=True, out="nowhere", **flags)


def test_masks_of_pictures_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("etude.core.launch._report", lambda *_: None)
    monkeypatch.setattr("etude.segmentation.fcn.pictures", lambda *_: None)
    done = etude.run("segmentation/fcn", preset="tiny", steps=1, quiet=True, seed=0, out=tmp_path / "run")
    x = np.random.default_rng(0).integers(0, 256, (1, 37, 51), dtype=np.uint8)
    loaded = etude.load(done.folder)
    (found,) = loaded.predict(x)
    assert np.array_equal(found["mask"], logits(loaded.model, torch.tensor(x)[None])[0].argmax(0).numpy())
