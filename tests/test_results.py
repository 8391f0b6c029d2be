# SPDX-License-Identifier: Apache-2.0
"""Results: masks as crops against dense arrays, and objects that are chosen, moved and joined."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmeformer.results import (
    Classification,
    Detections,
    Mask,
    RotatedDetections,
    Segmentation,
    category_id,
)

side = st.integers(1, 12)
pixel_maps = st.tuples(side, side).flatmap(lambda shape: arrays(bool, shape))
place = st.integers(-8, 8)


def shifted(pixels, x, y, height=10, width=11):
    """``pixels`` with their first one at (x, y) of an image, by a loop."""
    image = np.zeros((height, width), bool)
    for row, column in np.argwhere(pixels):
        if 0 <= row + y < height and 0 <= column + x < width:
            image[row + y, column + x] = True
    return image


@settings(max_examples=100)
@given(pixel_maps, place, place)
def test_masks_keep_their_pixels_in_the_smallest_rectangle(pixels, x, y):
    mask = Mask.from_array(pixels, x, y)
    assert mask.area == pixels.sum()
    if pixels.any():
        rows, columns = np.nonzero(pixels)
        assert (mask.height, mask.width) == (np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert len(mask.bits) == -(-mask.height * mask.width // 8)
    image = np.zeros((10, 11), bool)
    mask.paste(image)
    np.testing.assert_array_equal(image, shifted(pixels, x, y))
    image[:] = False
    mask.moved(2, -3).paste(image)
    np.testing.assert_array_equal(image, shifted(pixels, x + 2, y - 3))
    assert pickle.loads(pickle.dumps(mask)) == mask


def detections(generator, count, size=(20, 30), masks=True):
    boxes = generator.uniform(0, 15, (count, 4)).astype(np.float32)
    pixels = generator.random((count, *size)) < 0.1
    return (
        Detections(
            boxes,
            generator.random(count).astype(np.float32),
            generator.integers(0, 3, count),
            size,
            tuple(map(Mask.from_array, pixels)) if masks else None,
        ),
        pixels,
    )


@pytest.mark.parametrize(
    "which", [[2, 0], slice(3), np.array([True, False, False, True, True]), [], np.array([4])]
)
def test_objects_are_chosen_with_all_that_is_theirs(which):
    found, pixels = detections(np.random.default_rng(0), 5)
    rows = np.arange(5)[which]
    chosen = found.take(which)
    assert len(chosen) == len(rows) and chosen.image_size == (20, 30)
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(found, name)[rows])
    np.testing.assert_array_equal(chosen.masks(), pixels[rows])
    rotated = RotatedDetections(np.zeros((5, 5), np.float32), found.scores, found.labels)
    np.testing.assert_array_equal(rotated.take(which).scores, found.scores[rows])


def test_objects_of_crops_lie_in_their_image():
    generator = np.random.default_rng(1)
    (first, pixels1), (second, pixels2) = (detections(generator, count) for count in (2, 3))
    parts = [first.moved(5, 7, (40, 50)), second.moved(-3, 0, (40, 50))]
    whole = Detections.concatenate(parts, (40, 50))
    assert len(whole) == 5 and whole.masks().shape == (5, 40, 50)
    np.testing.assert_array_equal(whole.boxes[:2], first.boxes + np.float32([5, 7, 5, 7]))
    np.testing.assert_array_equal(whole.masks()[:2, 7:27, 5:35], pixels1)
    np.testing.assert_array_equal(whole.masks()[2:, :20, :27], pixels2[:, :, 3:])
    assert whole.masks()[:2].sum() == pixels1.sum()


def test_without_masks_and_without_objects():
    plain, _ = detections(np.random.default_rng(2), 2, masks=False)
    assert plain.take([0]).moved(1, 1, (9, 9)).instance_masks is None
    assert Detections.concatenate([plain, plain], (20, 30)).instance_masks is None
    with pytest.raises(ValueError, match="boxes without masks"):
        plain.masks()
    for empty, numbers in (
        (Detections.concatenate([], (5, 6)), 4),
        (RotatedDetections.concatenate([]), 5),
    ):
        assert len(empty) == 0 and empty.boxes.shape == (0, numbers)
        kinds = (empty.boxes.dtype, empty.scores.dtype, empty.labels.dtype)
        assert kinds == (np.float32, np.float32, np.int64)


def test_rotated_boxes_are_scaled_and_moved_and_have_corners():
    boxes = np.array([[10, 20, 8, 2, 0], [10, 20, 8, 2, np.pi / 2]], np.float32)
    found = RotatedDetections(boxes, np.ones(2, np.float32), np.zeros(2, np.int64))
    # From the corner ahead of both axes, against the direction of positive angles.
    expected = [[[14, 21], [14, 19], [6, 19], [6, 21]], [[9, 24], [11, 24], [11, 16], [9, 16]]]
    np.testing.assert_allclose(found.corners(), expected, atol=1e-5)
    np.testing.assert_allclose(found.moved(3, -1).corners(), np.add(expected, [3, -1]), atol=1e-5)
    np.testing.assert_allclose(found.scaled(2.5).corners(), np.array(expected) * 2.5, atol=1e-5)
    # Metrics send results from process to process.
    copy = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(copy.boxes, found.boxes)


def test_labels_have_colors_and_category_ids():
    palette = [(1, 2, 3), (40, 50, 60)]
    found = Segmentation(np.array([[0, 1]], np.uint8))
    assert found.colors(palette).tolist() == [[[1, 2, 3], [40, 50, 60]]]
    assert category_id(np.int64(0)) == 1 and type(category_id(np.int64(0))) is int


def test_pictures_name_likely_classes_only():
    scores = np.array([0.009, 0.03, 0.95, 0.01, 0.001], np.float32)
    assert Classification(scores).best(5) == [2, 1, 3, 0, 4]
    assert Classification(scores).shown(5) == [2, 1, 3]
    assert Classification(scores).shown(2) == [2, 1]
    # The label of an image has score 1, all others 0; a lost model has no likely class at all.
    assert Classification(np.eye(5, dtype=np.float32)[3]).shown(5) == [3]
    assert Classification(np.full(200, 0.005, np.float32)).shown(5) == [0]
