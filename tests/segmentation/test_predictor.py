# SPDX-License-Identifier: Apache-2.0
"""Label maps: of windows, in bounded memory, and as pictures."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from torch.nn import functional

from mmeformer.results import Segmentation
from mmeformer.segmentation import predictor as segmentation
from mmeformer.segmentation.graph import _AnyPool
from mmeformer.segmentation.predictor import SegmentationPredictor, label_map
from mmeformer.segmentation.visualizer import draw_labels
from mmeformer.windows import cores, windows


class Segmentor(SegmentationPredictor):
    """Labels crops with a function in place of a model."""

    def __init__(self, label, dtype=np.uint8):
        self.label, self.dtype = label, dtype

    def prepare(self, image):
        return image

    def predict(self, prepared):
        return [Segmentation(labels) for labels in self.label(prepared)]


@settings(max_examples=100)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 39))
def test_cores_cover_every_pixel_once(width, height, size, overlap):
    places = windows(width, height, size, overlap % size)
    count = np.zeros((height, width), int)
    for (x0, y0, x1, y1), core in zip(places, cores(places), strict=True):
        left, top, right, bottom = core
        assert x0 <= left < right <= x1 and y0 <= top < bottom <= y1
        count[top:bottom, left:right] += 1
    assert (count == 1).all()


def test_a_pixel_gets_its_class_where_it_is_farthest_from_the_border():
    class Counter:
        """Labels a window with its number; keeps the sizes of the batches."""

        number, batches = 0, []

        def __call__(self, crops):
            self.batches.append(len(crops))
            found = []
            for crop in crops:
                found.append(np.full(crop.shape[:2], self.number, np.uint8))
                self.number += 1
            return found

    width, height = 230, 150
    counter, steps = Counter(), []
    labels = (
        Segmentor(counter)
        .predict_windows(
            np.zeros((height, width, 3), np.uint8),
            100,
            40,
            4,
            lambda done, total: steps.append((done, total)),
        )
        .labels
    )
    places = windows(width, height, 100, 40)
    assert counter.batches == [4, 4] and len(places) == 8
    assert steps == [(index, 8) for index in range(1, 9)]
    y, x = np.mgrid[:height, :width]
    depth = []
    for x0, y0, x1, y1 in places:
        # The border of the image is none: there is nothing more to see.
        left = np.where(x0 > 0, x - x0 + 1, 10**6)
        right = np.where(x1 < width, x1 - x, 10**6)
        top = np.where(y0 > 0, y - y0 + 1, 10**6)
        bottom = np.where(y1 < height, y1 - y, 10**6)
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        depth.append(np.where(inside, np.minimum.reduce([left, right, top, bottom]), -1))
    depth = np.stack(depth)
    chosen = np.take_along_axis(depth, labels[None].astype(int), 0)[0]
    assert (chosen >= 1).all()
    # Along the diagonals of crossings the nearer border decides, here each direction by itself.
    assert (chosen >= np.minimum(depth.max(0), 20)).all()


def test_windows_of_a_pixelwise_model_give_the_whole_map():
    image = np.random.default_rng(0).integers(0, 200, (97, 301, 3), np.uint8)
    green = Segmentor(lambda crops: [crop[..., 1] for crop in crops])
    found = green.predict_windows(image, 64, 16, 3)
    np.testing.assert_array_equal(found.labels, image[..., 1])
    many = Segmentor(
        lambda crops: [crop[..., 1].astype(np.uint16) + 300 for crop in crops], np.uint16
    )
    found = many.predict_windows(image, 64, 16, 3)
    np.testing.assert_array_equal(found.labels, image[..., 1].astype(int) + 300)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("at_once", [1, 3000, 2**26])
def test_label_map_is_the_argmax_of_interpolated_logits(align_corners, at_once, monkeypatch):
    monkeypatch.setattr(segmentation, "LOGITS_AT_ONCE", at_once)
    logits = torch.randn(7, 12, 9)
    expected = functional.interpolate(
        logits[None], size=(31, 45), mode="bilinear", align_corners=align_corners
    )[0].argmax(0)
    found = label_map(logits, (31, 45), align_corners=align_corners, threshold=None)
    assert torch.equal(found, expected)


def test_label_map_of_one_channel():
    logits = torch.randn(1, 8, 8)
    found = label_map(logits, (8, 8), align_corners=False, threshold=0.3)
    assert torch.equal(found, (logits[0].sigmoid() > 0.3).long())


def test_memory_is_the_map_and_one_batch():
    image = np.zeros((1000, 1500, 3), np.uint8)

    def predict(crops):
        # As a model would: logits of 20 classes of each crop.
        return [np.zeros((20, *crop.shape[:2]), np.float32).argmax(0) for crop in crops]

    Segmentor(predict).predict_windows(image[:300], 200, 50, 2)  # imports what it needs
    tracemalloc.start()
    Segmentor(predict).predict_windows(image, 200, 50, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    window = 200 * 200 * (20 * 4 + 8)
    assert peak < 1000 * 1500 + 3 * window


def test_picture_names_large_regions_only():
    visualizer = SegLocalVisualizer(alpha=0.5)
    classes, palette = ("sky", "tree", "speck"), [[0, 0, 255], [0, 255, 0], [255, 0, 0]]
    visualizer.set_dataset_meta(classes=classes, palette=palette)
    texts = []
    draw_texts = visualizer.draw_texts
    visualizer.draw_texts = lambda text, place, **kwargs: (
        texts.append((text, place.tolist())),
        draw_texts(text, place, **kwargs),
    )
    labels = np.zeros((200, 300), np.uint8)
    labels[:, 200:] = 1
    labels[:4, :4] = 2
    picture = draw_labels(visualizer, np.full((200, 300, 3), 100, np.uint8), labels, classes)
    assert picture.shape == (200, 300, 3)
    # Half of grey 100 and half of the color; blue, green, red.
    np.testing.assert_allclose(picture[190, 10], [177, 50, 50], atol=1)
    np.testing.assert_allclose(picture[190, 290], [50, 177, 50], atol=1)
    np.testing.assert_allclose(picture[1, 1], [50, 50, 177], atol=1)
    assert [text for text, _ in texts] == ["sky", "tree"]
    for text, (x, y) in texts:
        assert classes[labels[y, x]] == text
        assert 49 <= y <= 150


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 12), (7, 16)])
def test_pooling_for_any_size_is_that_of_pytorch(count, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    pool = torch.nn.AdaptiveAvgPool2d((count, 2))
    torch.testing.assert_close(_AnyPool(pool)(x), pool(x))


def test_heads_that_classify_masks_have_no_threshold():
    """Such as mmseg's ``Mask2FormerHead``."""
    predictor = SegmentationPredictor.__new__(SegmentationPredictor)
    predictor.dtype = np.uint8
    logits = torch.randn(1, 3, 8, 8)
    sample = SegDataSample(metainfo=dict(ori_shape=(8, 8), img_shape=(8, 8)))
    model = SimpleNamespace(
        data_preprocessor=lambda batch, training: dict(inputs=None, data_samples=[sample]),
        inference=lambda inputs, metas: logits,
        decode_head=object(),
        align_corners=False,
    )
    predictor.inferencer = SimpleNamespace(model=model)
    (found,) = predictor.results_of_batch({})
    np.testing.assert_array_equal(found.labels, logits[0].argmax(0))
