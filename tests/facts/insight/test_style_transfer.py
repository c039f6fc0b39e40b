"""Style transfer: Gram matrices, the loss and its gradient, L-BFGS; the cut network; the whole run and every number again."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import etude
from etude.core.errors import UserError
from etude.insight.parts import lbfgs
from etude.insight.parts.cut import Cut
from etude.insight.style_transfer import Config, Targets, aims, content_loss, gram, loss, objective, style_loss, terms
from etude.vision.lenet import LeNet

SMALL = {
    "size": 40, "steps": 4, "network": "lenet", "train_steps": 3, "train_batch": 16, "quiet": True, "seed": 3, "history": 2
}  # fmt: skip


def test_gram_does_not_see_where_things_are() -> None:
    """E47: F Fᵀ / M, an uncentred second moment: any permutation of the places leaves it, a centred one is another."""
    maps = torch.rand(1, 4, 5, 6, dtype=torch.float64)
    rows = maps[0].flatten(1)
    torch.testing.assert_close(gram(maps), rows @ rows.T / 30)
    moved = rows[:, torch.randperm(30)].view(1, 4, 5, 6)
    torch.testing.assert_close(gram(moved), gram(maps))
    torch.testing.assert_close(gram(maps.contiguous(memory_format=torch.channels_last)), gram(maps))
    assert not torch.allclose(gram(maps), torch.cov(rows, correction=0))
    other = torch.rand(1, 4, 5, 6, dtype=torch.float64)
    by_gatys = ((rows @ rows.T - other[0].flatten(1) @ other[0].flatten(1).T) ** 2).sum() / (4 * 4**2 * 30**2)
    torch.testing.assert_close(style_loss(gram(maps), gram(other)), by_gatys)
    torch.testing.assert_close(content_loss(maps, other), 0.5 * ((maps - other) ** 2).sum())


def problem(**settings: Any) -> tuple[Cut, Targets, Tensor]:
    model = LeNet(10).double()
    photo, style = (torch.rand(1, 1, *shape, dtype=torch.float64) for shape in ((24, 22), (30, 20)))
    network = Cut(model, ["features.0", "features.3", "features.3"], photo)
    return network, aims(network, photo, style, Config(**settings))[0], photo


def test_loss_is_nothing_where_content_style_and_picture_are_one() -> None:
    model, x = LeNet(10).double(), torch.rand(1, 1, 24, 22, dtype=torch.float64)
    network = Cut(model, ["features.0", "features.3", "features.3"], x)
    targets, far = aims(network, x, x, Config())
    assert far == 0
    value, gradient = objective(network, targets)(x)
    assert float(value) == 0
    assert float(gradient.abs().max()) == 0
    assert terms(network, x, targets.content, targets.grams) == (0, 0)


def test_gradient_by_finite_differences_and_the_weights() -> None:
    """E48: α, β and γ weigh the three terms, each divided by a size of its own."""
    network, targets, photo = problem(content_weight=2.0, style_weight=3.0, smoothness=0.5, inside=7.0)
    x, v = 2 * torch.rand_like(photo) - 0.5, torch.randn_like(photo)
    evaluate, h = objective(network, targets), 1e-6
    slope = (evaluate(x + h * v)[0] - evaluate(x - h * v)[0]) / (2 * h)
    assert float(slope) == pytest.approx(float((evaluate(x)[1] * v).sum()), rel=1e-6)
    content, style = terms(network, x, targets.content, targets.grams)
    far = terms(network, photo, targets.content, targets.grams)[1]
    rough = ((x[..., 1:] - x[..., :-1]) ** 2).sum() + ((x[..., 1:, :] - x[..., :-1, :]) ** 2).sum()
    expected = 2 * content / (0.5 * targets.content.pow(2).sum()) + 3 * style / far + 0.5 * rough / (24 * 22)
    expected += 7 * ((x - 1).clamp(min=0) ** 2 + x.clamp(max=0) ** 2).sum() / (24 * 22)
    torch.testing.assert_close(evaluate(x)[0], expected)
    torch.testing.assert_close(loss(x, network(x), targets), expected)


def test_cut_network_answers_as_the_whole() -> None:
    """Before what works in place, without what comes behind; the model itself stays as it is, hooks and all."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    x = torch.rand(1, 1, 12, 9)
    cut = Cut(model, ["2", "0", "2"], x)
    y = torch.rand(1, 1, 12, 9)
    made = cut(y)
    torch.testing.assert_close(made[0], model[:3](y))
    torch.testing.assert_close(made[1], model[0](y))
    assert made[2] is made[0]
    assert not model[0]._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_lbfgs_takes_the_direction_of_the_matrix_and_solves_a_quadratic() -> None:
    """The two loops against BFGS's inverse Hessian written out; a quadratic of 12 numbers is solved; values never rise."""
    s, y = torch.randn(2, 3, 6, dtype=torch.float64)
    y = y + 3 * s
    g, h = torch.randn(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for count in range(6):
        order = [n % 3 for n in range(max(0, count - 3), count)]
        if order:
            h = torch.eye(6, dtype=torch.float64) * (s[order[-1]] @ y[order[-1]]) / (y[order[-1]] @ y[order[-1]])
        for k in order:
            rho = 1 / (s[k] @ y[k])
            v = torch.eye(6, dtype=torch.float64) - rho * torch.outer(s[k], y[k])
            h = v @ h @ v.T + rho * torch.outer(s[k], s[k])
        torch.testing.assert_close(lbfgs.direction(g, torch.stack([s, y]), count), -h @ g)
    a = torch.randn(12, 12, dtype=torch.float64)
    a, b = a @ a.T + torch.eye(12), torch.randn(12, dtype=torch.float64)
    state = lbfgs.begin(torch.zeros(12, dtype=torch.float64), lambda x: (0.5 * x @ a @ x - b @ x, a @ x - b), 10)
    values = [float(state.value)]
    for _ in range(60):
        lbfgs.step(state, lambda x: (0.5 * x @ a @ x - b @ x, a @ x - b), 0.01)
        values.append(float(state.value))
    assert all(one >= two - 1e-12 for one, two in itertools.pairwise(values))
    torch.testing.assert_close(state.x, torch.linalg.solve(a, b), rtol=1e-5, atol=1e-5)


def plain_loss(
    body: Any, x: Tensor, photo: Tensor, style: Tensor, flags: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """L, C and S from the definition, with matrices of sums over places."""
    one, two = body(x)
    p, a = body(photo), body(style)
    kept = p[0] if flags.get("content_layer") == "features.0" else p[1]
    mine = one if flags.get("content_layer") == "features.0" else two

    def moment(maps: Tensor) -> Tensor:
        return torch.einsum("nchw,ndhw->cd", maps, maps) / (maps.shape[2] * maps.shape[3])

    def far(maps: Any) -> Tensor:
        return sum(((moment(m) - moment(t)) ** 2).sum() / (4 * m.shape[1] ** 2) for m, t in zip(maps, a)) / 2  # type: ignore[return-value]

    content, texture = 0.5 * ((mine - kept) ** 2).sum(), far((one, two))
    rough = ((x[..., 1:] - x[..., :-1]) ** 2).sum() + ((x[..., 1:, :] - x[..., :-1, :]) ** 2).sum()
    config = Config(**flags)
    far_out = ((x - 1).clamp(min=0) ** 2 + (-x).clamp(min=0) ** 2).sum() * config.inside / x[0, 0].numel()
    total = far_out + config.content_weight * content / (0.5 * (kept**2).sum()) + config.style_weight * texture / far(p)
    return total + config.smoothness * rough / x[0, 0].numel(), content, texture


def begun(shape: tuple[int, int], power: float) -> Tensor:
    """The preconditioner as a matrix: columns are pictures of one pixel, whose waves are weighed one by one."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in shape)
    total = torch.zeros(shape[0] * shape[1], shape[0] * shape[1], dtype=torch.float64)
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    for i in range(shape[0]):
        for j in range(shape[1]):
            cycles = torch.tensor(
                [min(i, shape[0] - i) / shape[0], min(j, shape[1] - j) / shape[1]], dtype=torch.float64
            )
            weight = float(cycles.norm().clamp(min=1 / max(shape))) ** -power
            phase = 2 * torch.pi * (place * torch.tensor([i / shape[0], j / shape[1]], dtype=torch.float64)).sum(1)
            total += weight * (torch.outer(phase.cos(), phase.cos()) + torch.outer(phase.sin(), phase.sin()))
    return total / len(total)


def test_the_preconditioner_weighs_waves() -> None:
    """Against sums of cosines; a symmetric positive map; none at all for power 0."""
    q = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    made = lbfgs.spectral(q, 1.5)(q)
    matrix = begun((6, 5), 1.5)
    torch.testing.assert_close(made[0].flatten(1), q[0].flatten(1) @ matrix)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    assert lbfgs.spectral(q, 0.0)(q) is q
    half = lbfgs.spectral(q.float(), 1.5)(q.float())
    torch.testing.assert_close(half, made.float(), rtol=1e-5, atol=1e-5)


def test_a_network_in_half_precision_points_the_same_way() -> None:
    """bfloat16: loss and gradient stay single precision, and are near what single precision has."""
    network, targets, photo = problem()
    network.model.float()
    x = photo.float() + 0.1
    targets = targets._replace(content=targets.content.float(), grams=[target.float() for target in targets.grams])
    value, gradient = objective(network, targets)(x)
    low, slope = objective(network, targets, lambda: torch.autocast("cpu", torch.bfloat16))(x)
    assert low.dtype == slope.dtype == x.dtype
    assert not torch.equal(slope, gradient)
    assert float(low) == pytest.approx(float(value), rel=0.03)
    assert F.cosine_similarity(slope.flatten(), gradient.flatten(), dim=0) > 0.99


def test_a_run_in_half_precision_goes_nearly_the_same_way() -> None:
    """`--precision bf16` reaches the network that is looked at; what the result says of the picture is single precision's."""
    learned, heights = etude.run("vision/lenet", preset="tiny", quiet=True), []
    for precision in ("fp32", "bf16"):
        done = etude.run("insight/style_transfer", **SMALL, source=str(learned.folder), precision=precision)
        rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
        heights.append([row["objective"] for row in rows if "objective" in row])
    assert heights[0] != heights[1]
    assert heights[1][0] == pytest.approx(heights[0][0], rel=0.1)


def check(plain: Any, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
    """The run's x lowers the loss of the definition along its own steps; every number is computed again."""
    drawn: list[Tensor] = []
    monkeypatch.setattr("etude.insight.style_transfer.picture", lambda x: drawn.append(x) or Image.new("RGB", (4, 4)))
    done = etude.run("insight/style_transfer", **SMALL, **flags)
    model = plain(3).saved("lenet", done.folder).requires_grad_(False)

    def body(x: Tensor) -> tuple[Tensor, Tensor]:
        first = model.features[0](model.standardise(x))
        return first, model.features[3](model.features[2](model.features[1](first)))

    from etude.insight.parts.photos import photograph

    photo, style = photograph("china", 40), photograph(flags.get("style", "flower"), 40)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    whole, texture = ((x * luma).sum(1, keepdim=True) for x in (photo, style))
    x = whole.clone()
    if flags.get("start") == "noise":
        x = torch.rand(whole.shape, generator=plain(3).draw("start"))

    def value(x: Tensor) -> tuple[float, Tensor]:
        leaf = x.clone().requires_grad_()
        total, _, _ = plain_loss(body, leaf, whole, texture, flags)
        total.backward()
        assert leaf.grad is not None
        return float(total.detach()), leaf.grad

    f, g = value(x)  # L-BFGS with an explicit matrix H over the last two pairs
    h0 = begun(tuple(x.shape[2:]), flags.get("preconditioner", 0.0))
    pairs: list[tuple[Tensor, Tensor]] = []
    heights, passes = [], 1
    for _ in range(4):
        h = h0
        if pairs:
            s, y = pairs[-1]
            h = h * (s @ y) / (y @ h @ y)
        for s, y in pairs[-2:]:
            v = torch.eye(x.numel()) - torch.outer(s, y) / (s @ y)
            h = v @ h @ v.T + torch.outer(s, s) / (s @ y)
        d = -(h @ g.flatten()).view_as(x)
        t = 1.0 if pairs else 0.01 / float(d.abs().mean())
        while True:
            new, slope = value(x + t * d)
            passes += 1
            if new <= f + 1e-4 * t * float((d * g).sum()):
                break
            t *= 0.3
        pairs.append(((t * d).flatten(), (slope - g).flatten()))
        x, f, g = x + t * d, new, slope
        heights.append(f)
    torch.testing.assert_close(etude.load(done.folder).state["picture"]["x"], x, rtol=1e-6, atol=1e-8)
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["objective"] for row in rows[3:]] == pytest.approx(heights, rel=1e-6)
    x = x.clamp(0, 1)
    torch.testing.assert_close(drawn[0], (photo + x - whole).clamp(0, 1), rtol=1e-6, atol=1e-7)
    resized = F.interpolate(texture, size=tuple(whole.shape[2:]), mode="bilinear", antialias=True)
    _, content, drop = plain_loss(body, x, whole, texture, flags)
    expected = {
        "style_drop": plain_loss(body, whole, whole, texture, flags)[2] / drop,
        "content_ratio": content / plain_loss(body, resized, whole, texture, flags)[1],
        "evaluations": passes / 4,
    }
    assert done.metrics == pytest.approx({name: float(v) for name, v in expected.items()}, rel=1e-5)
    assert np.isfinite(list(done.metrics.values())).all()


@pytest.mark.usefixtures("double")
def test_loop_is_the_one_written_out(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check(plain, monkeypatch)


@pytest.mark.usefixtures("double")
def test_reported_numbers_are_those_of_the_picture(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {
        "start": "noise",
        "content_layer": "features.0",
        "content_weight": 0.7,
        "style_weight": 9.0,
        "smoothness": 0.3,
        "preconditioner": 1.5,
    }
    check(plain, monkeypatch, **flags)


def test_the_fresh_network_learns_as_written_out(plain: Any) -> None:
    done = etude.run("insight/style_transfer", **SMALL)
    model, _ = plain(3).learn("lenet", 3, 16)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(etude.load(done.folder).state["model"][name], value)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="has no convolution"):
        etude.run("insight/style_transfer", **{**SMALL, "network": "mlp"})
    with pytest.raises(UserError, match="--style-layers nowhere is no layer"):
        etude.run("insight/style_transfer", **SMALL, style_layers=("nowhere",))
    with pytest.raises(UserError, match="--style nothing.jpg does not exist"):
        etude.run("insight/style_transfer", **SMALL, style="nothing.jpg")
