# SPDX-License-Identifier: Apache-2.0
"""Masks against dense ones, and objects of windows against those of the whole image."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from mmeformer.detection.predictor import DetectionPredictor, from_sample
from mmeformer.detection.visualizer import paste_scaled
from mmeformer.detection.writers import run_length_code
from mmeformer.merging import merge_detections
from mmeformer.results import Detections, Mask

small = st.integers(1, 9)
pixel_maps = st.tuples(small, small).flatmap(lambda shape: arrays(bool, shape))


def dense(mask, height, width):
    image = np.zeros((height, width), bool)
    image[mask.y : mask.y + mask.height, mask.x : mask.x + mask.width] = mask.array()
    return image


@settings(max_examples=200)
@given(pixel_maps, st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3))
def test_code_of_the_whole_image_is_that_of_pycocotools(pixels, left, top, right, bottom):
    image = np.pad(pixels, ((top, bottom), (left, right)))
    mask = Mask.from_array(pixels, left, top)
    height, width = image.shape
    if pixels.any():
        shape = tuple(np.ptp(index) + 1 for index in np.nonzero(pixels))
        assert mask.array().shape == (mask.height, mask.width) == shape
        np.testing.assert_array_equal(dense(mask, height, width), image)
    assert mask.area == image.sum()
    expected = coco_mask.encode(np.asfortranarray(image, np.uint8))
    code = run_length_code(mask, (height, width))
    assert code == dict(size=[height, width], counts=expected["counts"].decode())


@settings(max_examples=100)
@given(st.lists(st.tuples(pixel_maps, st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_union_of_masks(items):
    masks = [Mask.from_array(pixels, x, y) for pixels, x, y in items]
    expected = np.zeros((20, 20), bool)
    for pixels, x, y in items:
        expected[y : y + pixels.shape[0], x : x + pixels.shape[1]] |= pixels
    union = masks[0].union(masks[1:])
    np.testing.assert_array_equal(dense(union, 20, 20), expected)
    np.testing.assert_array_equal(dense(union.moved(2, 3), 30, 30)[3:23, 2:22], expected)


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_paste_at_the_scale_of_a_picture(scale):
    pixels = np.zeros((40, 60), bool)
    pixels[10:30, 20:50] = True
    target = np.zeros((int(40 * scale), int(60 * scale)), bool)
    paste_scaled(target, Mask.from_array(pixels), scale)
    expected = np.zeros_like(target)
    expected[int(10 * scale) : int(30 * scale), int(20 * scale) : int(50 * scale)] = True
    np.testing.assert_array_equal(target, expected)
    paste_scaled(target, Mask.from_array(np.zeros((40, 60), bool)), scale)
    np.testing.assert_array_equal(target, expected)


def detections(boxes, scores=None, labels=None, size=(100, 100)):
    """Objects that fill their boxes of whole pixels."""
    masks = []
    for x0, y0, x1, y1 in boxes:
        masks.append(Mask.from_array(np.ones((int(y1 - y0), int(x1 - x0)), bool), int(x0), int(y0)))
    count = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.full(count, 0.9, np.float32) if scores is None else np.array(scores, np.float32),
        np.zeros(count, np.int64) if labels is None else np.array(labels, np.int64),
        size,
        tuple(masks),
    )


class Camera:
    """Sees of a scene of rectangles what lies in the crop it gets.

    An image's first two channels hold the place of each pixel. The score is the share of the object
    that can be seen, and less than ``least`` pixels are nothing.
    """

    def __init__(self, boxes, labels, least=3):
        self.boxes, self.labels, self.least = boxes, labels, least
        self.batches = []

    @staticmethod
    def image(width, height):
        image = np.zeros((height, width, 3), np.uint16)
        image[..., 0], image[..., 1] = np.meshgrid(np.arange(width), np.arange(height))
        return image

    def __call__(self, crops):
        self.batches.append(len(crops))
        return [self._see(crop) for crop in crops]

    def _see(self, crop):
        height, width = crop.shape[:2]
        x, y = (int(value) for value in crop[0, 0, :2])
        boxes, scores, labels = [], [], []
        for box, label in zip(self.boxes, self.labels, strict=True):
            seen = np.array(box) - [x, y, x, y]
            seen = np.clip(seen, 0, [width, height, width, height])
            sides = seen[2:] - seen[:2]
            if (sides >= self.least).all():
                boxes.append(seen)
                whole = (box[2] - box[0]) * (box[3] - box[1])
                scores.append(sides.prod() / whole)
                labels.append(label)
        return detections(boxes, scores, labels, (height, width))


class Detector(DetectionPredictor):
    """Detects with a camera in place of a model."""

    def __init__(self, camera):
        self.camera = camera

    def prepare(self, image):
        return image

    def predict(self, prepared):
        return self.camera(prepared)


def found_in_windows(boxes, labels, width, height, size, overlap, batch_size=3, least=3):
    camera = Camera(boxes, labels, least)
    steps = []
    found = Detector(camera).predict_windows(
        Camera.image(width, height),
        size,
        overlap,
        batch_size,
        lambda done, total: steps.append((done, total)),
    )
    assert max(camera.batches) <= batch_size
    assert [done for done, _ in steps] == list(range(1, sum(camera.batches) + 1))
    assert {total for _, total in steps} == {sum(camera.batches)}
    assert found.image_size == (height, width)
    return found


def by_place(found):
    return sorted(
        (tuple(box.tolist()), int(label))
        for box, label in zip(found.boxes, found.labels, strict=True)
    )


def expected_of(boxes, labels):
    return sorted(
        (tuple(float(edge) for edge in box), label)
        for box, label in zip(boxes, labels, strict=True)
    )


@st.composite
def scenes(draw):
    """Rectangles in the cells of a grid, apart by at least 8 pixels, of any size up to a cell's."""
    boxes, labels = [], []
    cell = draw(st.integers(40, 140))
    for row in range(300 // cell):
        for column in range(400 // cell):
            if draw(st.booleans()):
                width, height = (draw(st.integers(12, cell - 8)) for _ in range(2))
                x = column * cell + draw(st.integers(0, cell - 8 - width))
                y = row * cell + draw(st.integers(0, cell - 8 - height))
                boxes.append((x, y, x + width, y + height))
                labels.append(draw(st.integers(0, 1)))
    return boxes, labels


@settings(max_examples=60)
@given(scenes(), st.integers(90, 160), st.integers(30, 45))
def test_windows_give_the_objects_of_the_whole_image(scene, size, overlap):
    # Also objects larger than the overlap and than a window, which no window shows whole.
    boxes, labels = scene
    found = found_in_windows(boxes, labels, 400, 300, size, overlap)
    assert by_place(found) == expected_of(boxes, labels)
    assert (np.diff(found.scores) <= 0).all()
    for box, mask in zip(found.boxes, found.instance_masks, strict=True):
        x0, y0, x1, y1 = box.astype(int)
        assert (mask.x, mask.y, mask.width, mask.height) == (x0, y0, x1 - x0, y1 - y0)
        assert mask.area == (x1 - x0) * (y1 - y0)


def test_touching_objects_stay_apart_and_classes_too():
    # Two of one class side by side on the line where windows meet, and one of another class there.
    boxes = [(60, 10, 100, 40), (100, 10, 140, 40), (62, 11, 101, 41)]
    labels = [0, 0, 1]
    found = found_in_windows(boxes, labels, 200, 60, 100, 50, least=10)
    assert by_place(found) == expected_of(boxes, labels)


def test_objects_larger_than_a_window_are_put_together():
    boxes = [(10, 20, 390, 60), (20, 100, 60, 390), (5, 70, 395, 95)]
    labels = [0, 0, 1]
    found = found_in_windows(boxes, labels, 400, 400, 100, 25)
    assert by_place(found) == expected_of(boxes, labels)
    assert [mask.area for mask in found.instance_masks] == [
        int((box[2] - box[0]) * (box[3] - box[1])) for box in found.boxes
    ]


def test_a_whole_view_beats_a_part_with_a_higher_score():
    left, right = (0, 0, 100, 100), (60, 0, 160, 100)
    whole = detections([(10, 30, 40, 50)], scores=[0.4])  # 70 to 100 of the image, in the right
    part = detections([(70, 30, 99, 50)], scores=[0.95])  # cut at 99, in the left
    found = merge_detections([left, right], [part, whole], (100, 160))
    assert by_place(found) == [((70, 30, 100, 50), 0)] and found.scores[0] == np.float32(0.4)


def test_suppression_is_greedy_and_between_windows_only():
    left, right = (0, 0, 100, 100), (0, 0, 100, 100)
    # Each next box overlaps the one before by 0.6, the one after next by 0.33.
    boxes = [(10, 10, 50, 50), (20, 10, 60, 50), (30, 10, 70, 50)]
    first = detections([boxes[0], boxes[2]], scores=[0.9, 0.7])
    second = detections([boxes[1]], scores=[0.8])
    found = merge_detections([left, right], [first, second], (100, 100))
    assert by_place(found) == expected_of([boxes[0], boxes[2]], [0, 0])
    # A model that left both in one window has its reasons.
    crowd = detections([boxes[0], boxes[1]], scores=[0.9, 0.8])
    found = merge_detections([left, right], [crowd, detections([])], (100, 100))
    assert by_place(found) == expected_of(boxes[:2], [0, 0])
    found = merge_detections([left, right], [first, second], (100, 100), iou_thr=0.7)
    assert len(found) == 3


def test_without_masks_and_without_objects():
    plain = Detections(
        np.array([[10, 10, 30, 30]], np.float32),
        np.ones(1, np.float32),
        np.zeros(1, int),
        (100, 100),
    )
    window = (0, 0, 100, 100)
    found = merge_detections([window] * 2, [plain] * 2, (100, 100))
    assert len(found) == 1 and found.instance_masks is None
    assert len(merge_detections([window], [detections([])], (100, 100))) == 0
    assert len(merge_detections([], [], (100, 100))) == 0


def test_detections_of_a_sample():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 4:9, 5:15] = True
    instances = InstanceData(
        bboxes=torch.tensor([[5.0, 4.0, 15.0, 9.0], [0.0, 0.0, 1.0, 1.0]]),
        scores=torch.tensor([0.9, 0.5]),
        labels=torch.tensor([3, 1]),
        masks=masks,
    )
    sample = DetDataSample(metainfo=dict(ori_shape=(20, 30)), pred_instances=instances)
    found = from_sample(sample)
    assert found.labels.tolist() == [3, 1] and found.image_size == (20, 30)
    assert [mask.area for mask in found.instance_masks] == [50, 0]
    assert (found.instance_masks[0].x, found.instance_masks[0].y) == (5, 4)
    np.testing.assert_array_equal(found.masks(), masks.numpy())


def test_memory_does_not_grow_with_the_image():
    peaks = []
    for side in (500, 500, 2000):  # the first imports what it needs
        boxes = [(x, x, x + 20, x + 20) for x in range(10, side - 30, 40)]
        labels = [0] * len(boxes)
        image, camera = Camera.image(side, side), Camera(boxes, labels)
        tracemalloc.start()
        found = Detector(camera).predict_windows(image, 250, 60, 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert by_place(found) == expected_of(boxes, labels)
    # One dense mask of the larger image alone has four million pixels.
    assert peaks[2] < 2_000_000 and peaks[2] < peaks[1] + 500_000
