"""DeepDream: the error at the layer, the shift, the octaves; photographs; the whole run and every number again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import etude
from etude.core.errors import UserError
from etude.insight.deep_dream import carried, dream, half_square, offsets, sizes, step_up
from etude.insight.parts import ascent
from etude.insight.parts.photos import entering, leaving, photograph, resized
from etude.vision.lenet import LeNet

SMALL = {
    "size": 48, "octaves": 2, "steps": 3, "jitter": 4, "octave_scale": 1.5, "network": "lenet", "train_steps": 3,
    "train_batch": 16, "quiet": True, "seed": 3,
}  # fmt: skip


def test_error_at_the_layer_is_the_activation() -> None:
    """δ = a^l: entering the activations themselves gives the gradient of ½‖a‖²; finite differences agree."""
    model, x = LeNet(10).double().train(), torch.rand(2, 1, 30, 26, dtype=torch.float64)
    score = half_square(model, "features.3")
    y, heights = ascent.ascend(x, score, ascent.steepest(1.0))
    leaf = x.clone().requires_grad_()
    a = model.features[:4](model.standardise(leaf))
    (gradient,) = torch.autograd.grad(a, leaf, grad_outputs=a.detach())
    torch.testing.assert_close(y - x, gradient)
    torch.testing.assert_close(heights, 0.5 * (a.detach() ** 2).sum((1, 2, 3)))
    v, h = torch.randn_like(x), 1e-6
    slope = (score(x + h * v) - score(x - h * v)) / (2 * h)
    torch.testing.assert_close(slope, (gradient * v).sum((1, 2, 3)), rtol=1e-5, atol=1e-6)
    assert model.training


def test_shift_and_back_is_the_identity_and_step_the_notes_one() -> None:
    """E46: shifted, moved by α g / mean |g|, shifted back; the picture of the notes' order, and inside [0, 1]."""
    model, x = LeNet(10).double().requires_grad_(False), torch.rand(1, 1, 30, 26, dtype=torch.float64)
    for down, across in ((0, 0), (7, -3), (-31, 40)):
        assert torch.equal(x.roll((down, across), (2, 3)).roll((-down, -across), (2, 3)), x)
        leaf = x.roll((down, across), (2, 3)).requires_grad_()
        (0.5 * model.features[:4](model.standardise(leaf)).pow(2).sum()).backward()
        g = leaf.grad
        assert g is not None
        moved = leaf.detach() + 0.02 * g / g.abs().mean()
        y, _ = step_up(x, half_square(model, "features.3"), 0.02, (down, across))
        torch.testing.assert_close(y, moved.roll((-down, -across), (2, 3)).clamp(0, 1))


def test_octaves_grow_to_the_photograph_and_carry_what_was_added() -> None:
    assert sizes((100, 70), 3, 2.0) == [(25, 18), (50, 35), (100, 70)]
    assert sizes((5, 1), 2, 4.0)[0] == (1, 1)
    base, larger = torch.rand(1, 3, 10, 8), torch.rand(1, 3, 20, 16)
    torch.testing.assert_close(carried(base, base, larger), larger)
    torch.testing.assert_close(carried(base + 0.25, base, larger), larger + 0.25)
    draws = {offsets(2, torch.Generator().manual_seed(k)) for k in range(200)}
    assert len(draws) == 25
    assert offsets(0, None) == (0, 0)


def test_objective_rises_in_every_octave() -> None:
    model, x = LeNet(10).double().requires_grad_(False), torch.rand(1, 1, 60, 50, dtype=torch.float64)
    score, y = half_square(model, "features.0"), x
    for _ in range(10):
        z, before = step_up(y, score, 0.004, (1, 2))
        assert float(score(z)) > float(before)
        y = z
    whole = dream(model, x, "features.0", 3, 1.4, 5, 0.01, 4, torch.Generator().manual_seed(0))
    assert float(score(whole)) > 1.2 * float(score(x))
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1


def test_photographs(tmp_path: Path) -> None:
    """A file of any shape, turned as the camera noted; a grey network sees the lightness and gives the colours back."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    file = tmp_path / "mine.png"
    image.save(file)
    x = photograph(str(file), 60)
    torch.testing.assert_close(x[0], torch.tensor(np.array(image)).permute(2, 0, 1) / 255)
    assert photograph(str(file), 20).shape == (1, 3, 10, 20)
    assert photograph("flower", 512).shape == (1, 3, 342, 512)
    grey = entering(x, 1)
    assert grey[0, 0, 3, 4] == pytest.approx(
        float(0.299 * x[0, 0, 3, 4] + 0.587 * x[0, 1, 3, 4] + 0.114 * x[0, 2, 3, 4])
    )
    torch.testing.assert_close(leaving(grey, x), x)
    assert leaving(x, x) is x
    assert entering(x, 3) is x
    assert resized(x, (30, 60)) is x
    with pytest.raises(UserError, match=r"--image nowhere.png does not exist\. Name a picture.*china, flower"):
        photograph("nowhere.png", 20)
    with pytest.raises(UserError, match="--style .* is a folder"):
        photograph(str(tmp_path), 20, "--style")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="text.png cannot be read"):
        photograph(str(tmp_path / "text.png"), 20)


def write_out(
    plain: Any, model: nn.Module, whole: Tensor, flags: dict[str, Any]
) -> tuple[Tensor, list[float], list[float]]:
    """Lines 1 to 7 with torch.roll and autograd; also the scores before each step and the rise of each octave."""
    body = nn.Sequential(model.standardise, *model.features[: 4 if flags["layer"] == "middle" else 1])
    h, w = whole.shape[2:]
    bases = [whole if k == 1 else F.interpolate(whole, size=(round(h / 1.5), round(w / 1.5)), mode="bilinear", antialias=True)
             for k in range(2)]  # fmt: skip
    x, scores, rises = bases[0], [], []

    def half(x: Tensor) -> Tensor:
        return 0.5 * (body(x) ** 2).sum()

    for octave in range(2):
        if octave:
            x = bases[1] + F.interpolate(x - bases[0], size=(h, w), mode="bilinear", antialias=True)
        with torch.no_grad():
            first = float(half(x))
        for number in range(3):
            draw = plain.draw("jitter", 3 * octave + number)
            down, across = torch.randint(-4, 5, (2,), generator=draw).tolist()
            leaf = x.roll((down, across), (2, 3)).requires_grad_()
            value = half(leaf)
            value.backward()
            scores.append(float(value.detach()))
            assert leaf.grad is not None
            x = leaf.detach() + 0.008 * leaf.grad / leaf.grad.abs().mean()
            x = x.roll((-down, -across), (2, 3)).clamp(0, 1)
        with torch.no_grad():
            rises.append(float(half(x)))
            rises[-1] /= first
    return x, scores, [*rises, float(half(x).detach()), float(half(whole).detach())]


def check(plain: Any, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr("etude.insight.deep_dream.picture", lambda x: drawn.append(x) or Image.new("RGB", (4, 4)))
    done = etude.run("insight/deep_dream", **SMALL, **flags)
    model = plain(3).saved("lenet", done.folder).requires_grad_(False)
    photo = photograph(flags.get("image", "china"), 48)
    whole = (photo * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    x, scores, rest = write_out(plain(3), model, whole, {"layer": "middle", **flags})
    torch.testing.assert_close(etude.load(done.folder).state["dream"]["x"], x)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows[3:]] == pytest.approx(scores)
    torch.testing.assert_close(drawn[0], (photo + x - whole).clamp(0, 1))
    torch.testing.assert_close(drawn[1], photo)
    body = nn.Sequential(model.standardise, *model.features[: 4 if "layer" not in flags else 1])
    draw, far = plain(3).draw("random direction"), []
    for _ in range(2):
        chance = torch.randn(x.shape, generator=draw)
        noisy = (whole + chance * (x - whole).norm() / chance.norm()).clamp(0, 1)
        far.append(float(0.5 * (body(noisy) ** 2).sum()) / rest[3])
    expected = {
        "rise": rest[2] / rest[3],
        "random_rise": far[0],
        "gain": (rest[2] / rest[3] - 1) / (far[0] - 1),
        "random_gain": (far[1] - 1) / (far[0] - 1),
        "least_rise": min(rest[:2]),
        "change": float((x - whole).abs().mean()),
    }
    assert done.metrics == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("double")
def test_loop_is_the_one_written_out(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check(plain, monkeypatch)


@pytest.mark.usefixtures("double")
def test_reported_numbers_are_those_of_the_dream(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check(plain, monkeypatch, image="flower", layer="features.0")


def test_the_fresh_network_learns_as_written_out(plain: Any) -> None:
    done = etude.run("insight/deep_dream", **SMALL)
    model, _ = plain(3).learn("lenet", 3, 16)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(etude.load(done.folder).state["model"][name], value)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="has no convolution"):
        etude.run("insight/deep_dream", **(SMALL | {"network": "mlp"}))
    with pytest.raises(UserError, match="--layer nowhere is no layer"):
        etude.run("insight/deep_dream", **SMALL, layer="nowhere")
    with pytest.raises(UserError, match="--layer features.3 takes no picture of"):
        etude.run("insight/deep_dream", **{**SMALL, "size": 6}, layer="features.3")
