# SPDX-License-Identifier: Apache-2.0
"""Upright boxes with masks of one image, and how those of overlapping windows become one set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torchvision.ops import box_iou

from mmeformer.windows import Window

SAME = 0.5
"""IoU of two boxes within the pixels that both windows see, from which they are one object."""

NEAR_BORDER = 0.02
"""Share of a window's side (and at least 2 pixels) within which a box ends at its border."""


@dataclass(frozen=True)
class Mask:
    """The pixels of one object, held for the rectangle around them only.

    Args:
        x, y: left and upper edge of the rectangle in pixels of the image.
        rle: its pixels in COCO's compressed run-length code.
    """

    x: int
    y: int
    rle: Mapping

    @classmethod
    def from_array(cls, pixels: np.ndarray, x: int = 0, y: int = 0) -> Mask:
        """From ``pixels`` (H, W) bool, whose first pixel lies at (x, y) of the image."""
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        if not len(rows):
            rows = columns = np.zeros(1, int)
        crop = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        rle = coco_mask.encode(np.asfortranarray(crop, np.uint8))
        return cls(x + int(columns[0]), y + int(rows[0]), rle)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the rectangle."""
        return tuple(self.rle["size"])

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(coco_mask.area(self.rle))

    def array(self) -> np.ndarray:
        """Pixels of the rectangle, (h, w) bool."""
        return coco_mask.decode(self.rle).astype(bool)

    def moved(self, x: int, y: int) -> Mask:
        """The same pixels elsewhere."""
        return Mask(self.x + x, self.y + y, self.rle)

    def union(self, others: Sequence[Mask]) -> Mask:
        """The pixels of this mask and of others."""
        masks = [self, *others]
        x, y = min(mask.x for mask in masks), min(mask.y for mask in masks)
        width = max(mask.x + mask.shape[1] for mask in masks) - x
        height = max(mask.y + mask.shape[0] for mask in masks) - y
        pixels = np.zeros((height, width), bool)
        for mask in masks:
            rows, columns = mask.shape
            top, left = mask.y - y, mask.x - x
            pixels[top : top + rows, left : left + columns] |= mask.array()
        return Mask.from_array(pixels, x, y)

    def coco(self, height: int, width: int) -> dict:
        """COCO's compressed code of the whole image, made without a picture of that size.

        Args:
            height, width: of the image, pixels.

        Returns:
            ``size`` and ``counts`` (text), as in COCO's result files.
        """
        # COCO runs down the columns: where a column's runs begin and end, one after the other.
        columns = np.pad(self.array().T.astype(np.int8), ((0, 0), (1, 1)))
        steps = np.diff(columns, axis=1)
        begins, ends = (
            (self.x + column) * height + self.y + row
            for column, row in (np.nonzero(steps == 1), np.nonzero(steps == -1))
        )
        # A column full to the bottom goes on at the top of the next one.
        apart = begins[1:] != ends[:-1]
        edges = np.empty(2 * (np.count_nonzero(apart) + (len(begins) > 0)), np.int64)
        if len(begins):
            edges[0::2] = begins[np.r_[True, apart]]
            edges[1::2] = ends[np.r_[apart, True]]
        counts = np.diff(np.r_[0, edges, height * width])
        if len(counts) > 1 and counts[-1] == 0:
            counts = counts[:-1]
        code = coco_mask.frPyObjects(
            {"size": [height, width], "counts": counts.tolist()}, height, width
        )
        return {"size": [height, width], "counts": code["counts"].decode("ascii")}


@dataclass(frozen=True)
class Instances:
    """Objects of one image, the best first.

    Args:
        boxes: (N, 4) float32: left, top, right and lower edge in pixels.
        scores: (N,) float32.
        labels: (N,) int64, index of the class.
        masks: N masks, or None from a detector without them.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[Mask, ...] | None

    @classmethod
    def from_prediction(cls, found: Mapping) -> Instances:
        """From ``pred_instances`` of an mmdet data sample."""
        masks = None
        if "masks" in found:
            masks = tuple(Mask.from_array(pixels.cpu().numpy()) for pixels in found["masks"])
        return cls(
            found["bboxes"].cpu().float().numpy(),
            found["scores"].cpu().float().numpy(),
            found["labels"].cpu().long().numpy(),
            masks,
        )

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.scores)

    def take(self, which: Sequence[int]) -> Instances:
        """The objects of an index array."""
        which = np.asarray(which, np.int64)
        masks = None if self.masks is None else tuple(self.masks[index] for index in which)
        return Instances(self.boxes[which], self.scores[which], self.labels[which], masks)

    def moved(self, x: int, y: int) -> Instances:
        """The same objects elsewhere."""
        masks = None if self.masks is None else tuple(mask.moved(x, y) for mask in self.masks)
        boxes = self.boxes + np.array([x, y, x, y], np.float32)
        return Instances(boxes, self.scores, self.labels, masks)


def merge_windows(
    parts: Sequence[tuple[Window, Instances]], size: tuple[int, int], iou_thr: float = 0.5
) -> Instances:
    """Objects of a whole image from those of its overlapping windows.

    Boxes of one class from two windows are compared by what both windows see:

    - of two objects that lie whole in their windows and overlap by more than ``iou_thr`` the one
      with the lower score goes (non-maximum suppression);
    - an object that is cut by the border of its window goes, if another window shows it whole;
    - what no window shows whole is put together from its parts: box and mask become their union.

    Args:
        parts: windows with the objects found in them, in pixels of the window.
        size: height and width of the image.
        iou_thr: for whole objects.

    Returns:
        In pixels of the image, the best first.
    """
    windows = np.array([window for window, _ in parts], np.float32).reshape(-1, 4)
    pieces = [found.moved(*window[:2]) for window, found in parts]
    owner = np.repeat(np.arange(len(parts)), [len(found) for found in pieces])
    everything = _concatenate(pieces)
    cut = _is_cut(everything.boxes, windows[owner], size)
    rivals, seen = _related(everything, owner, windows, cut, iou_thr)

    whole = ~cut
    alive = whole.copy()
    neighbours: dict[int, list[int]] = {}
    for first, second in rivals:
        neighbours.setdefault(first, []).append(second)
        neighbours.setdefault(second, []).append(first)
    order = np.argsort(-everything.scores, kind="stable")
    for index in order[whole[order]]:
        if alive[index]:
            # Whatever is better than this one and near it is already gone.
            alive[neighbours.get(index, [])] = False

    orphan = cut.copy()
    for first, second in seen:
        if whole[first] != whole[second]:
            orphan[first] = orphan[second] = False
    joined = [pair for pair in seen if orphan[pair[0]] and orphan[pair[1]]]
    result = _concatenate(
        [everything.take(np.flatnonzero(alive)), _joined(everything, orphan, joined)]
    )
    return result.take(np.argsort(-result.scores, kind="stable"))


def _concatenate(pieces: Sequence[Instances]) -> Instances:
    if not pieces:
        return Instances(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), None
        )
    masks = None
    if all(piece.masks is not None for piece in pieces):
        masks = tuple(mask for piece in pieces for mask in piece.masks)
    return Instances(
        np.concatenate([piece.boxes for piece in pieces]),
        np.concatenate([piece.scores for piece in pieces]),
        np.concatenate([piece.labels for piece in pieces]),
        masks,
    )


def _is_cut(boxes: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: whether a box ends at a border of its window that is none of the image's."""
    height, width = size
    sides = windows[:, 2:] - windows[:, :2]
    reach = np.maximum(2, NEAR_BORDER * sides)
    before = (boxes[:, :2] - windows[:, :2] < reach) & (windows[:, :2] > 0)
    after = (windows[:, 2:] - boxes[:, 2:] < reach) & (windows[:, 2:] < [width, height])
    return (before | after).any(1)


def _related(
    found: Instances, owner: np.ndarray, windows: np.ndarray, cut: np.ndarray, iou_thr: float
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of whole objects that are rivals, and pairs with a cut one that are one object."""
    rivals, seen = [], []
    for first, second, shared in _neighbours(owner, windows):
        same_class = found.labels[first][:, None] == found.labels[second]
        whole = ~cut[first][:, None] & ~cut[second]
        boxes = [torch.from_numpy(found.boxes[which]) for which in (first, second)]
        low, high = torch.from_numpy(shared[:2]).repeat(2), torch.from_numpy(shared[2:]).repeat(2)
        visible = [torch.minimum(torch.maximum(part, low), high) for part in boxes]
        # Boxes without a pixel in common are 0 / 0 there, which exceeds nothing.
        for pairs, overlap, threshold, wanted in (
            (rivals, box_iou(*boxes), iou_thr, whole),
            (seen, box_iou(*visible), SAME, ~whole),
        ):
            rows, columns = np.nonzero((overlap.numpy() > threshold) & same_class & wanted)
            pairs += zip(first[rows].tolist(), second[columns].tolist(), strict=True)
    return rivals, seen


def _neighbours(
    owner: np.ndarray, windows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For two windows that overlap: the objects of each, and the rectangle that both see."""
    ends = np.searchsorted(owner, np.arange(len(windows) + 1))
    members = [np.arange(ends[index], ends[index + 1]) for index in range(len(windows))]
    for index, window in enumerate(windows):
        later = windows[index + 1 :]
        shared = np.concatenate(
            [np.maximum(window[:2], later[:, :2]), np.minimum(window[2:], later[:, 2:])], 1
        )
        overlaps = (shared[:, 2:] > shared[:, :2]).all(1)
        for other in np.flatnonzero(overlaps):
            if len(members[index]) and len(members[index + 1 + other]):
                yield members[index], members[index + 1 + other], shared[other]


def _joined(found: Instances, orphan: np.ndarray, pairs: list[tuple[int, int]]) -> Instances:
    """Objects put together from parts, one for each connected group of ``orphan`` ones."""
    parts = np.flatnonzero(orphan)
    place = np.full(len(orphan), -1)
    place[parts] = np.arange(len(parts))
    links = place[np.array(pairs, np.int64).reshape(-1, 2)]
    graph = coo_array((np.ones(len(links)), tuple(links.T)), shape=(len(parts), len(parts)))
    count, group = connected_components(graph, directed=False) if len(parts) else (0, parts)
    objects = []
    for index in range(count):
        members = parts[group == index]
        best = found.take(members[np.argmax(found.scores[members])][None])
        boxes = found.boxes[members]
        box = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])[None]
        masks = best.masks
        if masks is not None and len(members) > 1:
            masks = (masks[0].union([found.masks[member] for member in members]),)
        objects.append(Instances(box, best.scores, best.labels, masks))
    return _concatenate(objects) if objects else found.take([])
