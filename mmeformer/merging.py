# SPDX-License-Identifier: Apache-2.0
"""Merge the results of overlapping windows into that of the whole image; only numpy is needed.

Rotated boxes have :meth:`mmeformer.results.RotatedDetections.merged`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmeformer.results import Detections, Segmentation
from mmeformer.windows import Window, cores

Array = NDArray[Any]

SAME = 0.5
"""Two boxes are one object above this IoU, computed in the pixels that both windows see."""

NEAR_BORDER = 0.02
"""A box ends at its window's border if it is this close: share of the side, at least 2 pixels."""

Pairs = list[tuple[int, int]]


def merge_segmentations(
    places: Sequence[Window],
    results: Iterable[Segmentation],
    size: tuple[int, int],
    dtype: DTypeLike = np.uint8,
) -> Segmentation:
    """Merge the label maps of windows into that of the whole image.

    Each pixel gets its class from the window in which it is farthest from the border, where the
    model sees most of its surroundings. Results are read one by one.

    Args:
        places: the windows.
        results: of each window.
        size: height and width of the image.
        dtype: of the labels.
    """
    labels: Array = np.empty(size, dtype)
    for window, core, found in zip(places, cores(places), results, strict=True):
        x0, y0, x1, y1 = core
        left, top = window[:2]
        labels[y0:y1, x0:x1] = found.labels[y0 - top : y1 - top, x0 - left : x1 - left]
    return Segmentation(labels)


def merge_detections(
    places: Sequence[Window],
    results: Iterable[Detections],
    size: tuple[int, int],
    iou_thr: float = 0.5,
) -> Detections:
    """Merge the objects of overlapping windows into those of the whole image.

    Boxes of one class from two windows are compared:

    - Of two objects that lie completely inside their windows and overlap by more than ``iou_thr``,
      the one with the lower score is removed (non-maximum suppression).
    - An object that is cut by the border of its window is removed if another window shows it
      completely.
    - An object that no window shows completely is joined from its fragments: box and mask become
      their union.

    Args:
        places: the windows.
        results: the objects of each window, in its own pixels.
        size: height and width of the image.
        iou_thr: for complete objects.

    Returns:
        In pixels of the image, the best first.
    """
    found = [
        detections.moved(*window[:2], size)
        for window, detections in zip(places, results, strict=True)
    ]
    window_of = np.repeat(np.arange(len(found)), [len(detections) for detections in found])
    windows = np.array(places, np.float32).reshape(-1, 4)
    objects = Detections.concatenate(found, size)
    cut = _is_cut(objects.boxes, windows[window_of], size)
    duplicates, same = _related(objects, window_of, windows, cut, iou_thr)

    kept = np.flatnonzero(_suppress(objects.scores, ~cut, duplicates))
    fragment = cut.copy()
    for first, second in same:
        if cut[first] != cut[second]:
            # Another window shows the object completely.
            fragment[first] = fragment[second] = False
    links = [pair for pair in same if fragment[pair[0]] and fragment[pair[1]]]
    joined = _joined(objects, np.flatnonzero(fragment), links)
    merged = Detections.concatenate([objects.take(kept), *joined], size)
    return merged.take(np.argsort(-merged.scores, kind="stable"))


def _is_cut(boxes: Array, windows: Array, size: tuple[int, int]) -> Array:
    """(N,) bool: whether a box ends at a border of its window that is no border of the image."""
    height, width = size
    sides = windows[:, 2:] - windows[:, :2]
    reach = np.maximum(2, NEAR_BORDER * sides)
    before = (boxes[:, :2] - windows[:, :2] < reach) & (windows[:, :2] > 0)
    after = (windows[:, 2:] - boxes[:, 2:] < reach) & (windows[:, 2:] < [width, height])
    reached: Array = np.asarray((before | after).any(1))
    return reached


def _related(
    objects: Detections,
    window_of: Array,
    windows: Array,
    cut: Array,
    iou_thr: float,
) -> tuple[Pairs, Pairs]:
    """Pairs of complete objects that overlap, and pairs that show one object, at least once cut."""
    duplicates: Pairs = []
    same: Pairs = []
    for first, second, shared in _neighbors(window_of, windows):
        same_class = objects.labels[first][:, None] == objects.labels[second]
        both_whole = ~cut[first][:, None] & ~cut[second]
        boxes, others = objects.boxes[first], objects.boxes[second]
        low, high = np.tile(shared[:2], 2), np.tile(shared[2:], 2)
        visible = _iou(np.clip(boxes, low, high), np.clip(others, low, high))
        for pairs, overlap, threshold, wanted in (
            (duplicates, _iou(boxes, others), iou_thr, both_whole),
            (same, visible, SAME, ~both_whole),
        ):
            rows, columns = np.nonzero((overlap > threshold) & same_class & wanted)
            pairs += zip(first[rows].tolist(), second[columns].tolist(), strict=True)
    return duplicates, same


def _neighbors(window_of: Array, windows: Array) -> Iterator[tuple[Array, Array, Array]]:
    """For every two windows that overlap: the objects of each, and the rectangle that both see."""
    ends = np.searchsorted(window_of, np.arange(len(windows) + 1))
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


def _iou(boxes: Array, others: Array) -> Array:
    """Overlap (N, M) of upright boxes (N, 4) and (M, 4); 0 if both are empty."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (high - low).clip(0).prod(-1)
    areas, more = ((item[:, 2:] - item[:, :2]).prod(-1) for item in (boxes, others))
    overlap: Array = shared / np.maximum(areas[:, None] + more - shared, 1e-9)
    return overlap


def _suppress(scores: Array, whole: Array, duplicates: Pairs) -> Array:
    """(N,) bool: which ``whole`` objects stay; of a pair, the lower score is removed."""
    others: dict[int, list[int]] = {}
    for first, second in duplicates:
        others.setdefault(first, []).append(second)
        others.setdefault(second, []).append(first)
    stays = whole.copy()
    order = np.argsort(-scores, kind="stable")
    for index in order[whole[order]]:
        if stays[index]:
            # Better objects that overlap this one would have removed it.
            stays[others.get(index, [])] = False
    return stays


def _joined(objects: Detections, fragments: Array, links: Pairs) -> list[Detections]:
    """Objects joined from fragments, one for each group of fragments that links connect.

    Args:
        objects: all objects.
        fragments: indices of the fragments, in increasing order.
        links: pairs of fragments of one object.
    """
    if not len(fragments):
        return []
    edges = np.searchsorted(fragments, np.array(links, np.int64).reshape(-1, 2))
    group_of = _groups(len(fragments), edges)
    return [_union(objects.take(fragments[group_of == group])) for group in np.unique(group_of)]


def _groups(count: int, edges: Array) -> Array:
    """The group (count,) of each of ``count`` items, which is its first item.

    Args:
        count: of the items.
        edges: (E, 2), pairs of items of one group.
    """
    group_of = np.arange(count)
    for first, second in edges:
        one, other = group_of[first], group_of[second]
        group_of[group_of == max(one, other)] = min(one, other)
    return group_of


def _union(fragments: Detections) -> Detections:
    """One object with the score and label of the best fragment, and box and mask of all of them."""
    best = fragments.take([np.argmax(fragments.scores)])
    boxes, masks = fragments.boxes, fragments.instance_masks
    box = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])[None]
    mask = None if masks is None else (masks[0].union(masks[1:]),)
    return Detections(box, best.scores, best.labels, best.image_size, mask)
