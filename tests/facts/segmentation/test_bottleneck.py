"""Bottleneck: un-pooling with indices and transposed convolutions, the mirror of the way down, and tiles as one pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.blocks.nn.windows import convolve, convolve_transposed, max_pool, max_unpool
from etude.core.errors import UserError
from etude.segmentation.bottleneck import Bottleneck, median_frequency, unpool
from etude.segmentation.parts.tiles import logits


def test_values_go_back_to_their_places_and_zeros_stand_elsewhere():
    """E42: of each window all positions but the maximum's are zero; pooled again, maxima that are not negative come back."""
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    y, places = F.max_pool2d(x, 2, return_indices=True)
    back = unpool(y, places)
    torch.testing.assert_close(back, max_unpool(y, places, 6, 8))
    for n in range(2):
        for c in range(3):
            for i in range(6):
                for j in range(8):
                    largest = x[n, c, i // 2 * 2 : i // 2 * 2 + 2, j // 2 * 2 : j // 2 * 2 + 2].max()
                    assert back[n, c, i, j] == (x[n, c, i, j] if x[n, c, i, j] == largest else 0)
    torch.testing.assert_close(max_pool(unpool(y.relu(), places), 2)[0], y.relu())
    assert float(max_pool(unpool(-y.abs(), places), 2)[0].max()) == 0  # a negative one loses to the zeros beside it


def test_unpooling_without_indices():
    y = torch.arange(1.0, 7).view(1, 1, 2, 3)
    places = torch.tensor([[[[1, 8, 5], [12, 14, 23]]]])
    corner = torch.zeros(1, 1, 4, 6)
    corner[..., ::2, ::2] = y
    assert torch.equal(unpool(y, places, "corner"), corner)
    assert torch.equal(unpool(y, places, "repeat"), F.interpolate(y, scale_factor=2, mode="nearest"))
    assert unpool(y, places)[0, 0].nonzero().tolist() == [[0, 1], [0, 5], [1, 2], [2, 0], [2, 2], [3, 5]]


def written_out(net, x, decoder, rule):
    """Two levels by the windows of blocks/nn/windows: pooling, un-pooling, convolution and its adjoint."""
    state = net.state_dict()

    def convs(x, name, up=False):
        for layer in (0, 2):
            weight, bias = state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"]
            x = (convolve_transposed if up else convolve)(x, weight, bias, padding=1).relu()
        return x

    x, kept = (x - 0.5) / 0.25, []
    for level in range(2):
        x = convs(x, f"down.{level}")
        kept.append((*max_pool(x, 2)[1:], *x.shape[-2:]))
        x = max_pool(x, 2)[0]
    if decoder == "transposed":
        pad = net.bottom[0].kernel_size[0] // 2
        x = convolve(x, state["bottom.0.weight"], state["bottom.0.bias"], padding=pad).relu()
        x = convolve(x, state["bottom.2.weight"], state["bottom.2.bias"]).relu()
        x = convolve_transposed(x, state["bottom.4.weight"], state["bottom.4.bias"], padding=pad).relu()
    for level in range(2):
        places, height, width = kept.pop()
        if rule == "indices":
            x = max_unpool(x, places, height, width)
        elif rule == "repeat":
            x = F.interpolate(x, scale_factor=2)
        else:
            wide = x.new_zeros(*x.shape[:2], height, width)
            wide[..., ::2, ::2] = x
            x = wide
        x = convs(x, f"up.{level}", decoder == "transposed")
    return convolve(x, state["last.weight"], state["last.bias"])


@pytest.mark.parametrize("decoder", ["convolution", "transposed"])
@pytest.mark.parametrize("rule", ["indices", "corner", "repeat"])
def test_network_is_the_one_written_out(decoder, rule):
    """E41 too: the windows' transposed convolutions add overlaps up."""
    net = Bottleneck(3, (0.5,), (0.25,), 2, 2, decoder, rule, bottom=3, normalizer="none").double()
    x = torch.rand(2, 1, 16, 20, dtype=torch.float64)
    torch.testing.assert_close(net(x), written_out(net, x, decoder, rule))


@pytest.mark.parametrize("decoder", ["convolution", "transposed"])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_way_up_mirrors_the_way_down(decoder, levels):
    """As many weights up as down, but for the picture's own channels; sides that are multiples of 2^levels stay."""
    net = Bottleneck(2, (0.5,), (0.5,), 4, levels, decoder, normalizer="none", bottom=3)
    down, up = ([tuple(sorted(p.shape[:2])) for p in part.parameters() if p.ndim == 4] for part in (net.down, net.up))
    assert up[:-1] == down[:0:-1]
    assert (down[0], up[-1]) == ((1, 4), (4, 4))
    x = torch.rand(1, 1, 2**levels, 3 * 2**levels)
    assert net(x).shape == (1, 2, 2**levels, 3 * 2**levels)


def test_sizes_of_deconvnet(monkeypatch):
    """Its bottom has VGG's: a 7×7 convolution to 4096 maps, 1×1 on them, and a 7×7 transposed convolution back."""
    monkeypatch.setattr("etude.segmentation.bottleneck.Standardise", lambda *_: nn.Identity())
    with torch.device("meta"):
        net = Bottleneck(21, (0.5,) * 3, (0.5,) * 3, 128, 5, "transposed", bottom=7, normalizer="none")
    first, second, third = (m for m in net.bottom if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))
    assert first.weight.shape == (4096, 2048, 7, 7)
    assert second.weight.shape == (4096, 4096, 1, 1)
    assert third.weight.shape == (4096, 2048, 7, 7)


@pytest.mark.parametrize("decoder", ["convolution", "transposed"])
@pytest.mark.parametrize("levels", [1, 2])
def test_reach_is_how_far_a_block_sees(decoder, levels, monkeypatch):
    """Values are repeated, so that every place's gradient arrives; places themselves have none."""
    net = Bottleneck(2, (0.5,), (0.5,), 2, levels, decoder, "repeat", 3, "none").double()
    for p in net.parameters():
        nn.init.uniform_(p, 0.01, 1)
    x = (1 + torch.rand(1, 1, 64, 64, dtype=torch.float64)).requires_grad_()
    pooled = F.max_pool2d  # in its place means, which are seen from all pixels of a window
    monkeypatch.setattr(F, "max_pool2d", lambda y, k, **_: (F.avg_pool2d(y, k), pooled(y, k, return_indices=True)[1]))
    block = 2**levels
    net(x)[0, 0, 32 : 32 + block, 32 : 32 + block].sum().backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero()[:, 0]
    assert (int(rows.min()), int(rows.max())) == (32 - net.reach, 31 + 2**levels + net.reach)


@pytest.mark.parametrize("decoder", ["convolution", "transposed"])
@pytest.mark.parametrize(("levels", "size", "tile"), [(1, (21, 33), 8), (2, (50, 61), 16), (2, (9, 5), 16)])
def test_tiles_are_one_pass(decoder, levels, size, tile):
    net = Bottleneck(2, (0.0,), (1.0,), 2, levels, decoder, bottom=5, normalizer="none").double()
    for p in net.parameters():
        nn.init.uniform_(p, -0.1, 0.3)
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    whole = logits(net, x)
    assert whole.shape == (1, 2, *size)
    torch.testing.assert_close(logits(net, x, tile), whole, rtol=1e-10, atol=1e-12)


def test_weights_of_classes_are_medians_over_shares():
    """Three classes of shares 3/4, 1/4 and (in the one picture that has it) 1/2; a fourth is nowhere; void does not count."""
    masks = [torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 0], [0, 1]]), torch.tensor([[2, 2], [1, 0]])]
    masks = [torch.cat([mask, torch.full((1, 2), 255)]).to(torch.uint8) for mask in masks]
    shares = torch.tensor([7 / 12, 3 / 12, 2 / 4])
    expected = torch.cat([0.5 / shares, torch.zeros(1)])
    torch.testing.assert_close(median_frequency(masks, 4), expected)


@pytest.mark.parametrize(("flags", "said"), [
    ({"bottom": 4}, "--bottom is 4; it must be odd"), ({"crop": 30}, r"--crop 30 is no side .* take 28 or 32"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_go_together(flags, said):
    with pytest.raises(UserError, match=said):
        etude.run("segmentation/bottleneck", preset="tiny", quiet=True, out="nowhere", **flags)
