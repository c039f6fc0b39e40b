"""Pictures: exact pixels where pixels are promised, and figures that leave nothing behind."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from etude.blocks.pictures import plots


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_grid_puts_every_pixel_where_it_belongs(channels: int, padding: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, channels, 4, 5), dtype=np.uint8)
    drawn = pixels(plots.grid(images, columns=3, padding=padding, background=0.0)).reshape(
        3 * (4 + padding) + padding, 3 * (5 + padding) + padding, -1
    )
    expected = np.zeros_like(drawn)
    for i in range(7):
        top, left = padding + (i // 3) * (4 + padding), padding + (i % 3) * (5 + padding)
        expected[top : top + 4, left : left + 5] = images[i].transpose(1, 2, 0)
    np.testing.assert_array_equal(drawn, expected)


def test_grid_rounds_and_clips_floats() -> None:
    values = torch.tensor([-1.0, 0.0, 0.5 / 255 + 1e-6, 0.4999 / 255, 1.0, 7.0, float("nan")], requires_grad=True)
    drawn = pixels(plots.grid(values.reshape(1, 1, 1, 7), padding=0))
    assert drawn[0].tolist() == [0, 0, 1, 0, 255, 255, 0]
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(pixels(plots.grid(levels, padding=0)), pixels(plots.grid(levels / 255, padding=0)))


def test_grid_refuses_what_is_no_picture() -> None:
    for shape in ((2, 2, 4, 4), (4, 4), (0, 1, 4, 4)):
        with pytest.raises(ValueError):
            plots.grid(np.zeros(shape))


def test_filters_are_scaled_one_by_one_with_grey_zero() -> None:
    weight = torch.zeros(3, 1, 1, 3)
    weight[0, 0, 0] = torch.tensor([-2.0, 0.0, 1.0])
    weight[1, 0, 0] = torch.tensor([0.0, 0.0, 1e-6])
    drawn = pixels(plots.filters(weight, columns=1))
    assert drawn[1, 1:4].tolist() == [0, 128, 191]
    assert drawn[3, 1:4].tolist() == [128, 128, 255]
    assert drawn[5, 1:4].tolist() == [128, 128, 128]  # a dead filter is grey, not a division by zero
    assert plots.filters(torch.randn(16, 3, 5, 5)).mode == "RGB"
    assert plots.filters(torch.randn(4, 6, 5, 5)).size == (6 * 6 + 1, 4 * 6 + 1)


def test_mistakes_are_the_surest_wrong_ones_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, predicted = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 2, 1, 1, 1])
    confidence = torch.tensor([0.99, 0.6, 0.998, 0.7, 1.0])
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 4, 4)
    figure = plots.mistakes(images, truth, predicted, confidence, ["cat", "$dog$", "eel"], count=2)
    shown = [int(axes.images[0].get_array()[0, 0]) for axes in figure.axes]  # type: ignore[index]
    assert shown == [2, 3]
    assert [text.get_text() for text in figure.texts] == ["$dog$ >99%", "is eel", "$dog$ 70%", "is cat"]
    plots.picture(figure)
    none = plots.mistakes(images, truth, truth, confidence, ["cat", "dog", "eel"])
    assert none.axes[0].texts[0].get_text() == "No mistake among 5."


def test_confusion_shows_each_count_and_shades_by_row() -> None:
    figure = plots.confusion(torch.tensor([[8, 2], [0, 1000]]), ["a_$x$", "b"])
    axes = figure.axes[0]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "8"),
        ((1, 0), "2"),
        ((1, 1), "1000"),
    }
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), [[0.8, 0.2], [0, 1]])
    plots.picture(figure)
    with pytest.raises(ValueError, match="names"):
        plots.confusion(np.eye(3, dtype=int), ["a"])


@pytest.mark.parametrize("classes", [2, 30, 120])
def test_confusion_of_any_size_draws(classes: int) -> None:
    figure = plots.confusion(np.eye(classes, dtype=int), [f"class number {i}" for i in range(classes)])
    assert plots.picture(figure).width == round(plots.WIDTH * 160)


def test_other_figures_draw_what_they_are_given() -> None:
    x = np.arange(5.0)
    figure = plots.curves({"a_$": (x, x**2), "b": (x, torch.arange(5.0))}, y="loss", log=False)
    np.testing.assert_array_equal(np.asarray(figure.axes[0].lines[0].get_ydata()), x**2)
    figures = [figure, plots.bars(["sgd", "adam"], [0.5, 0.25], spread=[0.1, 0.05], bar=0.4, x="loss")]
    assert [bar.get_width() for bar in figures[1].axes[0].patches] == [0.5, 0.25]  # type: ignore[attr-defined]
    hills = np.outer(np.arange(8), np.arange(8))
    figures.append(plots.paths({"p": np.eye(2)}, background=hills, extent=(-1, 1, -1, 1)))
    for one in figures:
        assert isinstance(one, Figure)
        assert len(np.unique(pixels(plots.picture(one)))) > 10


def test_animation_and_gif() -> None:
    frames = plots.animation([np.full((1, 8, 8), k / 4) for k in range(5)], least=30)
    assert {frame.size for frame in frames} == {(32, 32)}
    file = io.BytesIO()
    plots.write_gif(frames, file, 50)
    with Image.open(file) as read:
        assert read.n_frames == 5  # type: ignore[attr-defined]
        assert read.info["loop"] == 0
        read.seek(3)
        assert abs(int(pixels(read.convert("L"))[5, 5]) - 191) <= 1
    with pytest.raises(ValueError, match="one size"):
        plots.animation([np.zeros((8, 8)), np.zeros((9, 8))])


class _Run:
    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.kept: dict[str, object] = {}

    def artifact(self, name: str, value: object, /, *, caption: str = "") -> None:
        assert caption
        self.kept[name] = value


def test_classifier_pictures_are_batch_independent_and_leave_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    x, y = torch.rand(25, 1, 4, 4), torch.randint(3, (25,))
    drawn = []
    for batch in (25, 4):
        run = _Run()
        plots.classifier_pictures(run, model, x, y, ["a", "b", "c"], torch.randn(2, 1, 3, 3), batch=batch)
        assert list(run.kept) == ["confusion", "mistakes", "filters"]
        figure = run.kept["confusion"]
        assert isinstance(figure, Figure)
        drawn.append(sorted((text.get_position(), text.get_text()) for text in figure.axes[0].texts))
    assert drawn[0] == drawn[1]
    assert sum(int(text) for _, text in drawn[0]) == 25
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_pyplot_knows_none_of_the_figures() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plots.picture(plots.confusion(np.eye(2, dtype=int), ["a", "b"]))
    plots.mistakes(np.zeros((2, 1, 4, 4)), [0, 1], [1, 0], [0.5, 0.5], ["a", "b"])
    plots.curves({"a": ([1, 2], [3, 4])})
    assert pyplot.get_fignums() == before
