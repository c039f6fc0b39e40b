"""Panels and films: axes with names, frames of one size and palette that differ only where something moved."""

import numpy as np
import pytest

from etude.blocks.pictures.panels import film, label, legend, panels


def test_panels_are_styled_axes_row_by_row():
    figure, axes = panels(3, rows=2, width=6.0, height=4.0)
    assert len(axes) == 6
    assert figure.get_size_inches().tolist() == [6.0, 4.0]
    label(axes[4], "a title", "step", "loss (nats)")
    axes[4].plot([0, 1], [0, 1], label="line")
    legend(axes[4], loc="lower right")
    assert axes[4].get_title(loc="left") == "a title"
    assert (axes[4].get_xlabel(), axes[4].get_ylabel()) == ("step", "loss (nats)")
    assert [text.get_text() for text in axes[4].get_legend().get_texts()] == ["line"]


def test_a_film_redraws_what_moves_on_what_stands_still():
    figure, (axes,) = panels(1, width=2.0, height=2.0)
    axes.plot([0, 1], [0, 0], color="black")
    axes.set(xlim=(0, 1), ylim=(-1, 1))
    (dot,) = axes.plot([], [], "o", color="red")
    frames = film(figure, [dot], [0.2, 0.8, 0.2], lambda time: dot.set_data([time], [0.5]))
    pixels = [np.asarray(frame.convert("RGB")).astype(int) for frame in frames]
    assert {frame.size for frame in frames} == {(288, 288)}
    assert np.array_equal(pixels[0], pixels[2])
    moved = np.abs(pixels[0] - pixels[1]).sum(-1) > 0
    assert 0 < moved.mean() < 0.05
    columns = np.flatnonzero((pixels[0][..., 0] - pixels[0][..., 1] > 100).any(0))  # the red ones
    assert np.ptp(columns) < 20


def test_a_film_without_frames_is_refused():
    figure, _ = panels(1)
    with pytest.raises(ValueError, match="at least one frame"):
        film(figure, [], [], lambda time: None)
