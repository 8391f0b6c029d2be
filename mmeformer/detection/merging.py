# SPDX-License-Identifier: Apache-2.0
"""Merge the objects of overlapping windows into those of the whole image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torchvision.ops import box_iou

from mmeformer.results import Detections
from mmeformer.windows import Window

SAME = 0.5
"""Two boxes are one object above this IoU, computed in the pixels that both windows see."""

NEAR_BORDER = 0.02
"""A box ends at its window's border if it is this close: share of the side, at least 2 pixels."""

Pairs = list[tuple[int, int]]


def merge_windows(
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


def _is_cut(boxes: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: whether a box ends at a border of its window that is not a border of the image."""
    height, width = size
    sides = windows[:, 2:] - windows[:, :2]
    reach = np.maximum(2, NEAR_BORDER * sides)
    before = (boxes[:, :2] - windows[:, :2] < reach) & (windows[:, :2] > 0)
    after = (windows[:, 2:] - boxes[:, 2:] < reach) & (windows[:, 2:] < [width, height])
    return (before | after).any(1)


def _related(
    objects: Detections,
    window_of: np.ndarray,
    windows: np.ndarray,
    cut: np.ndarray,
    iou_thr: float,
) -> tuple[Pairs, Pairs]:
    """Pairs of complete objects that overlap, and pairs that show one object, at least once cut."""
    duplicates: Pairs = []
    same: Pairs = []
    for first, second, shared in _neighbors(window_of, windows):
        same_class = objects.labels[first][:, None] == objects.labels[second]
        both_whole = ~cut[first][:, None] & ~cut[second]
        boxes = [torch.from_numpy(objects.boxes[which]) for which in (first, second)]
        low, high = torch.from_numpy(shared[:2]).repeat(2), torch.from_numpy(shared[2:]).repeat(2)
        visible = [torch.minimum(torch.maximum(box, low), high) for box in boxes]
        # Boxes outside the shared pixels give 0 / 0 = NaN there, which exceeds no threshold.
        for pairs, overlap, threshold, wanted in (
            (duplicates, box_iou(*boxes), iou_thr, both_whole),
            (same, box_iou(*visible), SAME, ~both_whole),
        ):
            rows, columns = np.nonzero((overlap.numpy() > threshold) & same_class & wanted)
            pairs += zip(first[rows].tolist(), second[columns].tolist(), strict=True)
    return duplicates, same


def _neighbors(
    window_of: np.ndarray, windows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
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


def _suppress(scores: np.ndarray, whole: np.ndarray, duplicates: Pairs) -> np.ndarray:
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


def _joined(objects: Detections, fragments: np.ndarray, links: Pairs) -> list[Detections]:
    """Objects joined from fragments, one for each group of fragments that links connect.

    Args:
        objects: all objects.
        fragments: indices of the fragments, in increasing order.
        links: pairs of fragments of one object.
    """
    if not len(fragments):
        return []
    edges = np.searchsorted(fragments, np.array(links, np.int64).reshape(-1, 2))
    count = len(fragments)
    graph = coo_array((np.ones(len(edges)), tuple(edges.T)), shape=(count, count))
    groups, group_of = connected_components(graph, directed=False)
    return [_union(objects.take(fragments[group_of == group])) for group in range(groups)]


def _union(fragments: Detections) -> Detections:
    """One object with the score and label of the best fragment, and box and mask of all of them."""
    best = fragments.take([np.argmax(fragments.scores)])
    boxes, masks = fragments.boxes, fragments.instance_masks
    box = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])[None]
    mask = None if masks is None else (masks[0].union(masks[1:]),)
    return Detections(box, best.scores, best.labels, best.image_size, mask)
