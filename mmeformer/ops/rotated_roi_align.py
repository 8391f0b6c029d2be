# SPDX-License-Identifier: Apache-2.0
"""RoIAlign of rotated regions in plain PyTorch, on any device.

A region is cut into bins, and the value of a bin is the mean of samples on a regular grid in it.
Each sample is the bilinear value of the map at its point: a weighted sum of four places. So a bin
is a weighted sum of rows of a table with one row per place of the maps, which is what
``embedding_bag`` computes. The gradient of a place is the same weighted sum, over the bins that
read it.

Source: He et al., "Mask R-CNN", ICCV 2017 (RoIAlign); Ding et al., "Learning RoI Transformer for
Oriented Object Detection in Aerial Images", CVPR 2019 (rotated regions).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = ["Grid", "roi_align", "roi_align_gradient"]

# Samples whose places are computed at once; bounds memory.
_SAMPLES = 1 << 18


class Grid(NamedTuple):
    """How regions are sampled.

    Attributes:
        size: bins of a region, along its height and its width.
        scale: places of the map per pixel of the image.
        samples: per bin along each side; 0 for one per place, rounded up.
        aligned: the first place of the map is the center of a pixel, at 0.5; else at 0, and
            regions are at least one place wide and high.
        clockwise: in the image, y downwards, positive angles turn from the x axis to the y axis;
            else the other way.
    """

    size: tuple[int, int]
    scale: float
    samples: int
    aligned: bool
    clockwise: bool


# The number of samples depends on the data, which would break a graph of torch.compile.
@torch.compiler.disable
def roi_align(maps: Tensor, rois: Tensor, grid: Grid) -> Tensor:
    """Means over the bins of every region, without a gradient.

    Args:
        maps: ``(B, C, H, W)``.
        rois: ``(K, 6)``: index of the map, center x, center y, width, height in pixels, and angle
            in radians. Samples more than one place outside of the map count as 0, as do those of
            regions that are not finite.
        grid: see :class:`Grid`.

    Returns:
        ``(K, C, *grid.size)``.
    """
    table = maps.detach().permute(0, 2, 3, 1).flatten(0, 2)
    bins = [
        embedding_bag(terms.place, table, terms.start, mode="sum", per_sample_weights=terms.weight)
        for terms in _terms(rois.to(table.dtype), maps.shape, grid)
    ]
    output = torch.cat(bins) if bins else table[:0]
    return output.view(len(rois), *grid.size, maps.shape[1]).permute(0, 3, 1, 2)


@torch.compiler.disable
def roi_align_gradient(gradient: Tensor, rois: Tensor, shape: torch.Size, grid: Grid) -> Tensor:
    """Gradient of the maps.

    Args:
        gradient: ``(K, C, *grid.size)``, that of the result.
        rois: ``(K, 6)``, as in :func:`roi_align`.
        shape: ``(B, C, H, W)`` of the maps.
        grid: see :class:`Grid`.

    Returns:
        ``(B, C, H, W)``.
    """
    batch, channels, height, width = shape
    bins = gradient.detach().permute(0, 2, 3, 1).flatten(0, 2)
    table = bins.new_zeros(batch * height * width, channels)
    for terms in _terms(rois.to(table.dtype), shape, grid):
        place, order = terms.place.sort(stable=True)
        place, count = place.unique_consecutive(return_counts=True)
        start = count.cumsum(0) - count
        bin, weight = terms.bin[order], terms.weight[order]
        table[place] += embedding_bag(bin, bins, start, mode="sum", per_sample_weights=weight)
    return table.view(batch, height, width, channels).permute(0, 3, 1, 2)


class _Regions(NamedTuple):
    """Regions in places of the map; x before y, width before height."""

    image: Tensor
    """``(K,)``."""
    center: Tensor
    """``(K, 2)``."""
    size: Tensor
    """``(K, 2)``."""
    axes: Tensor
    """``(K, 2, 2)``, columns: unit vectors along the width and the height."""
    samples: Tensor
    """``(K, 2)``, of every bin."""


def _regions(rois: Tensor, grid: Grid) -> _Regions:
    image, center, size, angle = rois.split([1, 2, 2, 1], 1)
    center = center * grid.scale - (0.5 if grid.aligned else 0)
    size = size * grid.scale
    if not grid.aligned:
        size = size.clamp(min=1)
    angle = angle if grid.clockwise else -angle
    cos, sin = angle.cos(), angle.sin()
    axes = torch.cat([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    if grid.samples > 0:
        samples = torch.full_like(size, grid.samples)
    else:
        # Rounded up in float32, as in mmcv's kernels: there, 3 and a rounding error are 3.
        samples = (size / size.new_tensor(grid.size[::-1])).float().ceil()
        samples = samples.nan_to_num(0, 0, 0).clamp(min=0)
    return _Regions(image[:, 0].long(), center, size, axes, samples.long())


class _Terms(NamedTuple):
    """The weighted sums of some bins, term by term."""

    place: Tensor
    """``(T,)``, index into the places of all maps."""
    weight: Tensor
    """``(T,)``."""
    bin: Tensor
    """``(T,)``, index into the bins of all regions; ascending."""
    start: Tensor
    """First term of every bin."""


def _terms(rois: Tensor, shape: torch.Size, grid: Grid) -> Iterator[_Terms]:
    """All terms, of as many bins at a time as have about :data:`_SAMPLES` samples together."""
    if not len(rois):
        return
    regions = _regions(rois, grid)
    rows, columns = grid.size
    samples = regions.samples.prod(1).repeat_interleave(rows * columns)  # of every bin
    bins = torch.arange(len(samples), device=rois.device)
    part = samples.cumsum(0) // _SAMPLES
    lengths = part.unique_consecutive(return_counts=True)[1].tolist()
    for some, count in zip(bins.split(lengths), samples.split(lengths), strict=True):
        # From here on: one row per sample.
        start = count.cumsum(0) - count
        bin = some.repeat_interleave(count)
        number = torch.arange(len(bin), device=rois.device) - start.repeat_interleave(count)
        region = bin // (rows * columns)
        image, center, size, axes, across = (values[region] for values in regions)
        # Bins and samples of a region are numbered row by row.
        bin_at = torch.stack([bin % columns, bin // columns % rows], 1)
        sample_at = torch.stack([number % across[:, 0], number // across[:, 0]], 1)
        share = (bin_at + (sample_at.to(size) + 0.5) / across) / size.new_tensor([columns, rows])
        point = center + (axes * ((share - 0.5) * size)[:, None]).sum(2)

        place, weight = _bilinear(point, shape[2:])
        place = place + (image * shape[2] * shape[3])[:, None]
        weight = weight / across.prod(1, keepdim=True)
        yield _Terms(place.flatten(), weight.flatten(), bin.repeat_interleave(4), 4 * start)


def _bilinear(point: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The four places around every point, and their weights.

    Args:
        point: ``(S, 2)``, x and y. Points up to one place outside are moved to the border; the
            weights of those further out are 0.
        shape: height and width of the map.

    Returns:
        ``(S, 4)`` index into the places of one map, and ``(S, 4)``.
    """
    height, width = shape
    last = torch.tensor([width - 1, height - 1], device=point.device)
    # False for points that are not numbers.
    inside = ((point >= -1) & (point <= last + 1)).all(1, keepdim=True)
    point = torch.minimum(point.masked_fill(~inside, 0).clamp(min=0), last.to(point))
    low = point.long()
    high = torch.minimum(low + 1, last)
    upper = point - low
    (left, top), (right, bottom) = low.T, high.T
    place = torch.stack([top, top, bottom, bottom], 1) * width
    place = place + torch.stack([left, right, left, right], 1)
    to_right, to_bottom = upper.T
    to_left, to_top = (1 - upper).T
    weight = torch.stack(
        [to_top * to_left, to_top * to_right, to_bottom * to_left, to_bottom * to_right], 1
    )
    return place, weight * inside
