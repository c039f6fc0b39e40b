"""Features of regions, all of one size: RoI max pooling (Fast R-CNN) and RoIAlign (Mask R-CNN)

Paper: Girshick, Fast R-CNN, 2015, arXiv:1504.08083, §2.1; He, Gkioxari, Dollár, Girshick, Mask R-CNN, 2017, arXiv:1703.06870, §3.

Equation: a region is cut into P × P bins.
    pooling: its edges are rounded to whole cells, those of bin p to ⌊p·h/P⌋ and ⌈(p + 1)·h/P⌉ with h its height in cells, both
        edges inside; a bin is the maximum over its cells, 0 where it has none.
    aligning: nothing is rounded; a bin is the mean of `samples`² points evenly spread over it, each interpolated between its
        four nearest cells, whose values are those of their centres: cell i is at i + ½ of the map.

Both are linear in the features once the places are known, and their backward is the adjoint: the gradient of a bin goes to the
cell that was its maximum, or to the cells of its points by their weights. On the CPU machine code runs along the channels, so
that one cell is one contiguous read, and points of a bin that fall on the same cells are read once; elsewhere RoIAlign is two
products with matrices of interpolation weights, and pooling a maximum over masked rows and columns.

Differences:
- E39: Fast R-CNN pools regions that were proposed on the *picture*, projected on the map.
- Edges of bins are computed in whole numbers; torchvision's float32 now and then takes in one more row (7 · (3/7) > 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# N pictures, R regions of each, C channels, H × W cells, P bins a side


def roi_align(features: Tensor, boxes: Tensor, size: int, scale: float, samples: int = 2) -> Tensor:
    """RoIAlign: features (N, C, H, W), boxes (N, R, 4) in pixels → (N, R, C, P, P), P = `size`.

    `scale` is cells a pixel (1 / stride). torchvision's `roi_align(…, sampling_ratio=samples, aligned=True)`: points further than
    a cell outside the map count as 0, those nearer as the edge. Features in half precision are widened.
    """
    features = widened(features)
    height, width = features.shape[2:]
    rows = interpolation(boxes[..., 1] * scale, boxes[..., 3] * scale, size, samples, height)
    columns = interpolation(boxes[..., 0] * scale, boxes[..., 2] * scale, size, samples, width)
    if features.is_cpu:
        return _Align.apply(features, *rows, *columns)  # type: ignore[return-value]
    return aligned_by_products(features, dense(*rows, height), dense(*columns, width))


def interpolation(low: Tensor, high: Tensor, size: int, samples: int, cells: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the cells that each bin reads and their weights.

    Edges of the regions (N, R) in cells → cell numbers int64 (N, R, P, 2·samples) and weights (N, R, P, 2·samples), which sum to
    1 (less where points lie outside). A cell that several points share has all its weight in the first place, 0 in the others.
    """
    step = (high - low) / (size * samples)
    point = torch.arange(size * samples, device=low.device, dtype=low.dtype) + 0.5
    place = (
        low[..., None] - 0.5 + point * step[..., None]
    )  # (N, R, P·samples), in units of cells from the first one's centre
    inside = (place >= -1) & (place <= cells)
    place = place.clamp(0, cells - 1)
    below = place.floor().clamp(max=max(0, cells - 2))
    share = place - below
    cell = torch.stack([below, (below + 1).clamp(max=cells - 1)], -1).long().unflatten(-2, (size, samples)).flatten(-2)
    weight = (
        (torch.stack([1 - share, share], -1) * inside[..., None] / samples).unflatten(-2, (size, samples)).flatten(-2)
    )
    same = cell[..., :, None] == cell[..., None, :]  # of equal cells the first takes all
    first = ~same.tril(-1).any(-1)
    return cell, torch.where(first, (weight[..., None, :] * same).sum(-1), 0.0)


def dense(cell: Tensor, weight: Tensor, cells: int) -> Tensor:
    """Weights at their cells: (N, R, P, taps), (N, R, P, taps) → (N, R, P, cells)."""
    return weight.new_zeros(*cell.shape[:-1], cells).scatter_add_(-1, cell, weight)


def aligned_by_products(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, C, H, W), rows (N, R, P, H), columns (N, R, P, W) → (N, R, C, P, P): two products, for every device."""
    rows, columns = rows.to(features.dtype), columns.to(features.dtype)
    across = torch.einsum("nrph,nchw->nrcpw", rows, features)
    return torch.einsum("nrcpw,nrqw->nrcpq", across, columns)


def roi_pool(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """RoI max pooling: features (N, C, H, W), boxes (N, R, 4) in pixels → (N, R, C, P, P), P = `size`.

    Both rounded edges are inside, so a region has one cell at least. Of equal values the first in reading order is the maximum.
    """
    features = widened(features)
    if features.is_cpu:
        return _Pool.apply(features, whole(boxes * scale), size)  # type: ignore[return-value]
    height, width = features.shape[2:]
    rows = bins(boxes[..., 1] * scale, boxes[..., 3] * scale, size, height)
    columns = bins(boxes[..., 0] * scale, boxes[..., 2] * scale, size, width)
    return pooled_by_masks(features, rows, columns)


def whole(edges: Tensor) -> Tensor:
    """Edges in cells to the nearest cell, int64; a half goes up."""
    return (edges + 0.5).floor().long()


def bins(low: Tensor, high: Tensor, size: int, cells: int) -> Tensor:
    """Edges of the regions (N, R) in cells → first cell and the one after the last of each bin, int64 (N, R, P, 2)."""
    first, last = whole(low), whole(high)
    length = (last - first + 1).clamp(min=1)[..., None]
    bin_ = torch.arange(size, device=low.device)
    start, end = bin_ * length // size, -(-(bin_ + 1) * length // size)
    return (torch.stack([start, end], -1) + first[..., None, None]).clamp(0, cells)


def pooled_by_masks(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Maximum over masked rows, then over masked columns, for every device; arguments as `bins` gives them."""

    def inside(edges: Tensor, cells: int) -> Tensor:
        at = torch.arange(cells, device=edges.device)
        return (at >= edges[..., :1]) & (at < edges[..., 1:])  # (N, R, P, cells)

    vertical, horizontal = inside(rows, features.shape[2]), inside(columns, features.shape[3])
    least = torch.finfo(features.dtype).min
    out = []
    for p in range(rows.shape[2]):
        tall = features[:, None].masked_fill(~vertical[:, :, p, None, :, None], least).amax(3)  # (N, R, C, W)
        out.append(
            torch.stack([tall.masked_fill(~wide[:, :, None], least).amax(3) for wide in horizontal.unbind(2)], -1)
        )
    full = (vertical.any(-1)[..., None] & horizontal.any(-1)[:, :, None])[:, :, None]
    return torch.where(full, torch.stack(out, -2), 0.0)


def widened(features: Tensor) -> Tensor:
    """float32 in place of half precision."""
    return features if features.dtype == torch.float64 else features.float()


def _last(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).contiguous()  # no copy of what is channels_last already


class _Align(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, features: Tensor, rows: Tensor, by_row: Tensor, columns: Tensor, by_column: Tensor
    ) -> Tensor:
        places = [part.contiguous().numpy() for part in (rows, by_row.to(features), columns, by_column.to(features))]
        ctx.places, ctx.shape = places, features.shape
        out = features.new_empty(*rows.shape[:3], rows.shape[2], features.shape[1])
        _kernels()["align"](_last(features).numpy(), *places, out.numpy())
        return out.permute(0, 1, 4, 2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        n, c, h, w = ctx.shape
        found = grad.new_zeros(n, h, w, c)
        _kernels()["align_back"](grad.permute(0, 1, 3, 4, 2).contiguous().numpy(), *ctx.places, found.numpy())
        return found.permute(0, 3, 1, 2), None, None, None, None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, edges: Tensor, size: int) -> Tensor:  # type: ignore[override]
        cells = _last(features)
        out = features.new_empty(*edges.shape[:2], size, size, features.shape[1])
        _kernels()["pool"](cells.detach().numpy(), edges.numpy(), out.numpy())
        ctx.save_for_backward(cells, edges, out)
        return out.permute(0, 1, 4, 2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        cells, edges, out = ctx.saved_tensors
        found = torch.zeros_like(cells)
        slope = grad.permute(0, 1, 3, 4, 2).contiguous()
        _kernels()["pool_back"](slope.numpy(), cells.numpy(), edges.numpy(), out.numpy(), found.numpy())
        return found.permute(0, 3, 1, 2), None, None


@functools.cache
def _kernels() -> dict[str, Callable[..., None]]:
    """The four loops in machine code (compiled once, then cached); features (N, H, W, C), bins (N, R, P, P, C)."""
    from numba import njit

    @njit(cache=True, nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")
    def align(features, rows, by_row, columns, by_column, out):  # type: ignore[no-untyped-def]
        count, regions, size, taps = rows.shape
        channels = features.shape[3]
        for n in range(count):
            for r in range(regions):
                for p in range(size):
                    for q in range(size):
                        place = out[n, r, p, q]
                        place[:] = 0
                        for i in range(taps):
                            if by_row[n, r, p, i] == 0:
                                continue
                            line = features[n, rows[n, r, p, i]]
                            for j in range(taps):
                                weight = by_row[n, r, p, i] * by_column[n, r, q, j]
                                if weight == 0:
                                    continue
                                cell = line[columns[n, r, q, j]]
                                for k in range(channels):
                                    place[k] += weight * cell[k]

    @njit(cache=True, nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")
    def align_back(grad, rows, by_row, columns, by_column, found):  # type: ignore[no-untyped-def]
        count, regions, size, taps = rows.shape
        channels = found.shape[3]
        for n in range(count):
            for r in range(regions):
                for p in range(size):
                    for q in range(size):
                        place = grad[n, r, p, q]
                        for i in range(taps):
                            if by_row[n, r, p, i] == 0:
                                continue
                            line = found[n, rows[n, r, p, i]]
                            for j in range(taps):
                                weight = by_row[n, r, p, i] * by_column[n, r, q, j]
                                if weight == 0:
                                    continue
                                cell = line[columns[n, r, q, j]]
                                for k in range(channels):
                                    cell[k] += weight * place[k]

    @njit(cache=True, nogil=True, error_model="numpy")
    def cut(low, high, cells, found):  # type: ignore[no-untyped-def]
        """As `bins`, of one region along one axis: `found` (P, 2), with one division a region in place of two a bin."""
        size, length = len(found), max(high - low + 1, 1)
        step, more = length // size, length % size
        at, over = low, 0  # the edge is at + over / size
        for p in range(size):
            found[p, 0] = min(max(at, 0), cells)
            at, over = at + step, over + more
            if over >= size:
                at, over = at + 1, over - size
            found[p, 1] = min(max(at + (over > 0), 0), cells)

    # first the maximum over the rows of a bin, for all its columns at once (one long read), then over the columns
    @njit(cache=True, nogil=True, error_model="numpy")
    def pool(features, edges, out):  # type: ignore[no-untyped-def]
        count, regions, size = out.shape[:3]
        rows, columns = np.empty((size, 2), np.int64), np.empty((size, 2), np.int64)
        height, width, channels = features.shape[1:]
        cells, places = features.reshape(-1), out.reshape(-1, channels)
        tall = np.empty(width * channels, features.dtype)
        number = 0
        for n in range(count):
            for r in range(regions):
                cut(edges[n, r, 1], edges[n, r, 3], height, rows)
                cut(edges[n, r, 0], edges[n, r, 2], width, columns)
                west, east = columns[0, 0], columns[-1, 1]
                for p in range(size):
                    top, bottom = rows[p, 0], rows[p, 1]
                    full = top < bottom and west < east
                    if full:
                        length, at = (east - west) * channels, ((n * height + top) * width + west) * channels
                        line = cells[at : at + length]
                        for k in range(length):
                            tall[k] = line[k]
                        for _ in range(top + 1, bottom):
                            at += width * channels
                            line = cells[at : at + length]
                            for k in range(length):
                                tall[k] = line[k] if line[k] > tall[k] else tall[k]
                    for q in range(size):
                        left, right = columns[q, 0], columns[q, 1]
                        place = places[number]
                        number += 1
                        if not full or left >= right:
                            place[:] = 0
                            continue
                        at = (left - west) * channels
                        cell = tall[at : at + channels]
                        for k in range(channels):
                            place[k] = cell[k]
                        for _ in range(left + 1, right):
                            at += channels
                            cell = tall[at : at + channels]
                            for k in range(channels):
                                place[k] = cell[k] if cell[k] > place[k] else place[k]

    # the maximum is found again by its value: the first cell that equals it takes what there is to give, the last cell what no
    # other took; cells are read by their numbers, since a view of each would cost more than its arithmetic
    @njit(cache=True, nogil=True, error_model="numpy")
    def pool_back(grad, features, edges, out, found):  # type: ignore[no-untyped-def]
        count, regions, size = out.shape[:3]
        rows, columns = np.empty((size, 2), np.int64), np.empty((size, 2), np.int64)
        height, width, channels = features.shape[1:]
        cells, given = features.reshape(-1, channels), found.reshape(-1, channels)
        slopes, places = grad.reshape(-1, channels), out.reshape(-1, channels)
        rest = np.empty(channels, features.dtype)
        zero = rest.dtype.type(0)
        number = -1
        for n in range(count):
            for r in range(regions):
                cut(edges[n, r, 1], edges[n, r, 3], height, rows)
                cut(edges[n, r, 0], edges[n, r, 2], width, columns)
                for p in range(size):
                    top, bottom = rows[p, 0], rows[p, 1]
                    for q in range(size):
                        left, right = columns[q, 0], columns[q, 1]
                        number += 1
                        if top >= bottom or left >= right:
                            continue
                        last = (n * height + bottom - 1) * width + right - 1
                        if bottom - top == 1 and right - left == 1:
                            for k in range(channels):
                                given[last, k] += slopes[number, k]
                            continue
                        if (bottom - top) * (right - left) == 2:  # the maximum need not be read
                            at = (n * height + top) * width + left
                            for k in range(channels):
                                hit, more = cells[last, k] > cells[at, k], slopes[number, k]
                                given[at, k] += zero if hit else more
                                given[last, k] += more if hit else zero
                            continue
                        for k in range(channels):
                            rest[k] = slopes[number, k]
                        for y in range(top, bottom):
                            for x in range(left, right - (y == bottom - 1)):
                                at = (n * height + y) * width + x
                                for k in range(channels):
                                    hit, more = cells[at, k] == places[number, k], rest[k]
                                    given[at, k] += more if hit else zero
                                    rest[k] = zero if hit else more
                        for k in range(channels):
                            given[last, k] += rest[k]

    return {"align": align, "align_back": align_back, "pool": pool, "pool_back": pool_back}
