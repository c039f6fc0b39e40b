"""Selective search equals its definition, segment by segment and merge by merge, on small pictures."""

import colorsys

import numpy as np
import pytest
import torch

from etude.detection.parts import selective_search as ss
from etude.detection.parts.average_precision import recall_of
from etude.detection.parts.scenes import scenes


def picture(seed=0, side=14, channels=3):
    """A few flat rectangles under noise."""
    g = np.random.default_rng(seed)
    x = np.full((channels, side, side), 40.0)
    for _ in range(4):
        top, left = g.integers(0, side - 4, 2)
        x[:, top : top + g.integers(3, 7), left : left + g.integers(3, 7)] = g.integers(60, 250, (channels, 1, 1))
    return torch.from_numpy((x + g.normal(0, 4, x.shape)).clip(0, 255).astype(np.uint8))


def segments(image, k, least):
    """Sets of pixels, joined edge by edge."""
    h, w = image.shape[:2]
    home = {(y, x): {(y, x)} for y in range(h) for x in range(w)}
    inner = {(y, x): 0.0 for y in range(h) for x in range(w)}  # by a set's first pixel
    lines = []
    for dy, dx, back in ((0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
        for y in range(h - dy):
            for x in range(w - dx):
                a, b = ((y, x + 1), (y + 1, x)) if back else ((y, x), (y + dy, x + dx))
                apart = np.float32(np.sqrt(((image[a] - image[b]) ** 2).sum(dtype=np.float32)))
                lines.append((apart, a, b))
    lines.sort(key=lambda line: line[0])

    def join(a, b, weight):
        one, two = home[a], home[b]
        both = one | two
        for p in both:
            home[p] = both
        inner[min(both)] = weight

    for weight, a, b in lines:
        one, two = home[a], home[b]
        if one is not two:
            bounds = [inner[min(s)] + np.float32(k) / len(s) for s in (one, two)]
            if weight <= min(bounds):
                join(a, b, weight)
    for _, a, b in lines:
        if home[a] is not home[b] and min(len(home[a]), len(home[b])) < least:
            join(a, b, 0.0)
    return {frozenset(s) for s in home.values()}


@pytest.mark.parametrize(("k", "least"), [(30.0, 1), (120.0, 4)])
def test_segments_are_joined_edge_by_edge(k, least):
    image = np.ascontiguousarray(ss._smoothed(picture()[None].float(), 0.8)[0].numpy().transpose(1, 2, 0))
    labels, count = ss._compiled()["segments"](image, *ss.edges(image), np.float32(k), least)
    found = {frozenset(map(tuple, np.argwhere(labels == n).tolist())) for n in range(count)}
    assert found == segments(image, k, least)
    assert 2 < count < 150


def test_regions_merge_in_the_order_of_their_similarity():
    """One region fewer at each merge, always the most similar pair of neighbours; similarities from histograms, by hand."""
    x = picture(1)[None]
    image = np.ascontiguousarray(ss._smoothed(x.float(), 0.8)[0].numpy().transpose(1, 2, 0))
    labels, count = ss._compiled()["segments"](image, *ss.edges(image), np.float32(20.0), 3)
    colour = (x.permute(0, 2, 3, 1).int() * 25 // 256).numpy()[0]
    texture = ss._texture(x.float())[0]
    boxes = ss._compiled()["merged"](labels, count, colour, texture, 25, 80)
    assert len(boxes) == 2 * count - 1
    assert boxes[-1].tolist() == [0, 0, 14, 14]
    regions = {n: set(map(tuple, np.argwhere(labels == n).tolist())) for n in range(count)}

    def histogram(pixels):
        shades = np.zeros((3, 25))
        strokes = np.zeros((3, 8, 10))
        for y, x in pixels:
            for c in range(3):
                shades[c, colour[y, x, c]] += 1
                for d in range(8):
                    strokes[c, d, texture[y, x, c, d]] += 1
        return shades / shades.sum(), strokes / strokes.sum()

    def box(pixels):
        ys, xs = zip(*pixels)
        return min(xs), min(ys), max(xs) + 1, max(ys) + 1

    def near(a, b):
        return any((y + dy, x + dx) in b for y, x in a for dy in (-1, 0, 1) for dx in (-1, 0, 1))

    told = {n: histogram(p) for n, p in regions.items()}
    for new in range(count, 2 * count - 1):
        best = None
        for a in regions:
            for b in regions:
                if b < a and near(regions[a], regions[b]):
                    x1, y1, x2, y2 = box(regions[a] | regions[b])
                    both = len(regions[a]) + len(regions[b])
                    s = sum(np.minimum(p, q).sum() for p, q in zip(told[a], told[b]))
                    s += 1 - both / 196 + 1 - ((x2 - x1) * (y2 - y1) - both) / 196
                    if best is None or s > best[0] + 1e-12:
                        best = (s, a, b)
        _, a, b = best
        regions[new] = regions.pop(a) | regions.pop(b)
        told[new] = histogram(regions[new])
        assert tuple(boxes[new]) == box(regions[new])


def test_colour_spaces_are_those_of_the_standards():
    x = torch.randint(0, 256, (1, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[0, :, 0] = torch.tensor(
        [[0, 255, 120, 255, 0], [0, 255, 120, 0, 0], [0, 255, 120, 0, 255]]
    )  # black, white, grey, red, blue
    hsv = ss.in_space(x, "hsv").int()
    for row in range(6):
        for column in range(5):
            wanted = colorsys.rgb_to_hsv(*(x[0, :, row, column].double() / 255).tolist())
            assert hsv[0, :, row, column].tolist() == pytest.approx([255 * v for v in wanted], abs=0.51)
    lab = ss.in_space(x, "lab")[0, :, 0].T.tolist()
    known = ((0, 0, 0), (100, 0, 0), (50.43, 0, 0), (53.24, 80.09, 67.20), (32.30, 79.19, -107.86))
    for mine, (light, a, b) in zip(lab, known):
        assert mine == pytest.approx([2.55 * light, a + 128, max(0, b + 128)], abs=1)
    assert ss.in_space(x, "rgb") is x
    grey = x[:, :1]
    assert torch.equal(ss.in_space(grey, "lab"), ss.in_space(grey.expand(-1, 3, -1, -1), "lab"))


def test_fast_takes_the_hierarchies_of_two_spaces_in_turn(monkeypatch):
    x = torch.stack([picture(n, 24) for n in range(2)])
    lists = []
    for space in ("hsv", "lab"):
        for k in (50.0, 150.0, 400.0):
            monkeypatch.setitem(ss.MODES, "single", ((space,), (k,)))
            boxes, count = ss.selective_search(x, 500)
            lists.append([boxes[n, : count[n]].tolist() for n in range(2)])
    found, count = ss.selective_search(x, 500, "fast")
    for n in range(2):
        own = found[n, : count[n]].tolist()
        assert {tuple(box) for box in own} == {tuple(box) for rows in lists for box in rows[n]}
        assert own[0] == [0, 0, 24, 24]


def test_proposals_of_digits_find_nearly_all():
    """More proposals, more recall; each once; a picture's do not depend on the others'."""
    part = scenes("digits", 48, 24).train
    boxes, count = ss.selective_search(part.x, 60)
    recalls = [recall_of(boxes[:, :most], part.boxes, part.labels) for most in (5, 20, 60)]
    assert recalls == sorted(recalls)
    assert recalls[-1] >= 0.95  # measured 1.0
    for n in range(24):
        rows = boxes[n, : count[n]]
        assert len({tuple(row) for row in rows.tolist()}) == count[n]
        assert ((rows[:, 2:] - rows[:, :2]) >= 3).all()
        assert boxes[n, count[n] :].abs().sum() == 0
    assert torch.equal(ss.selective_search(part.x[3:4], 60)[0][0], boxes[3])
