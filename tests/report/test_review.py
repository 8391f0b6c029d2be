# SPDX-License-Identifier: Apache-2.0
"""Confusion matrices and precision-recall of predictions that were made by hand."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData

from mmeformer.report.review import RECALLS, pair_up
from mmeformer.results import Classification, Detections, Mask, RotatedDetections, Segmentation

CLASSES = ("cat", "dog")
SIZE = (100, 100)


def test_pairs_take_the_largest_overlap_once():
    iou = np.array([[0.9, 0.8, 0.0], [0.95, 0.0, 0.0], [0.0, 0.6, 0.49]])
    same = np.ones_like(iou, bool)
    # The second detection takes the first object, the first one the second; 0.49 is too little.
    assert pair_up(iou, same) == [(1, 0), (0, 1)]
    # Between equal overlaps the class decides.
    assert pair_up(np.array([[0.7], [0.7]]), np.array([[False], [True]])) == [(1, 0)]
    assert pair_up(np.zeros((0, 3)), np.zeros((0, 3), bool)) == []


# --- objects: the same scene as upright and as rotated boxes -------------------------------------

OBJECTS = [(10, 10, 30, 30, 0), (50, 10, 70, 30, 0), (10, 50, 30, 70, 1), (60, 60, 80, 90, 1)]
"""Left, top, right, bottom and label."""
IGNORED = [(0, 80, 20, 100, 1)]
FOUND = [
    (10, 10, 30, 30, 0.9, 0),  # right
    (80, 80, 99, 99, 0.8, 0),  # nothing there
    (50, 10, 70, 32, 0.7, 0),  # right, IoU 0.91
    (10, 51, 30, 71, 0.6, 0),  # there is a dog
    (60, 60, 80, 74, 0.5, 1),  # IoU 0.47
    (0, 80, 20, 100, 0.95, 1),  # to ignore
    (50, 10, 70, 30, 0.2, 1),  # score too low for the matrix
]
MATRIX = [
    # cat, dog, missed
    [2, 0, 0],  # cat
    [1, 0, 1],  # dog
    [1, 1, 0],  # nothing
]


def upright(rows, masks=False):
    boxes = np.array([row[:4] for row in rows], np.float32).reshape(-1, 4)
    shapes = None
    if masks:
        shapes = []
        for x0, y0, x1, y1 in boxes.astype(int):
            shapes.append(Mask.from_array(np.ones((y1 - y0, x1 - x0), bool), int(x0), int(y0)))
        shapes = tuple(shapes)
    scores = np.array([row[4] for row in rows], np.float32)
    labels = np.array([row[5] for row in rows], np.int64)
    return Detections(boxes, scores, labels, SIZE, shapes)


def rotated(rows):
    corners = np.array([row[:4] for row in rows], np.float32).reshape(-1, 4)
    centers, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    boxes = np.concatenate([centers, sides, np.zeros((len(rows), 1), np.float32)], axis=1)
    return boxes.astype(np.float32)


def detection_sample(objects, ignored=(), masks=False):
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    sample = DetDataSample(metainfo=dict(ori_shape=SIZE))
    for key, rows in (("gt_instances", objects), ("ignored_instances", ignored)):
        boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4)
        instances = InstanceData(
            bboxes=HorizontalBoxes(boxes), labels=torch.tensor([row[4] for row in rows]).long()
        )
        if masks:
            pixels = np.zeros((len(rows), *SIZE), np.uint8)
            for mask, (x0, y0, x1, y1) in zip(pixels, boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = 1
            instances.masks = BitmapMasks(pixels, *SIZE)
        setattr(sample, key, instances)
    return sample


def rotated_sample(objects, ignored=()):
    pytest.importorskip("mmrotate")
    from mmdet.structures import DetDataSample
    from mmrotate.structures.bbox import RotatedBoxes

    sample = DetDataSample(metainfo=dict(ori_shape=SIZE))
    for key, rows in (("gt_instances", objects), ("ignored_instances", ignored)):
        labels = torch.tensor([row[4] for row in rows]).long()
        boxes = RotatedBoxes(torch.from_numpy(rotated(rows)))
        setattr(sample, key, InstanceData(bboxes=boxes, labels=labels))
    return sample


def detection_review():
    pytest.importorskip("mmdet")
    from mmeformer.detection.review import DetectionReview

    return DetectionReview(CLASSES)


def rotated_review():
    pytest.importorskip("mmrotate")
    from mmeformer.rotated.review import RotatedReview

    return RotatedReview(CLASSES)


def rotated_result(rows):
    found = upright(rows)
    return RotatedDetections(rotated(rows), found.scores, found.labels)


SCENES = {
    "upright": (detection_review, upright, detection_sample),
    "rotated": (rotated_review, rotated_result, rotated_sample),
}


@pytest.fixture(params=SCENES)
def scene(request):
    """A review, and functions that make its results and samples."""
    review, result, sample = SCENES[request.param]
    return review(), result, sample


def test_confusion_of_objects(scene):
    review, result, sample = scene
    score = review.add(result(FOUND), sample(OBJECTS, IGNORED))
    assert review.confusion().counts.tolist() == MATRIX
    assert review.confusion().has_background
    # 2 of 5 detections and of 4 objects are right; the ignored one does not count.
    assert score == pytest.approx(2 * 2 / (5 + 4))
    review.add(result(FOUND), sample(OBJECTS, IGNORED))
    assert review.summary().confusion.counts.tolist() == (2 * np.array(MATRIX)).tolist()


def test_scores_of_images(scene):
    review, result, sample = scene
    assert review.add(result([]), sample([])) is None
    assert review.add(result([]), sample(OBJECTS)) == 0
    assert review.add(result(FOUND[:1]), sample([])) == 0
    perfect = [(*row[:4], 0.9, row[4]) for row in OBJECTS]
    assert review.add(result(perfect), sample(OBJECTS)) == 1
    shown = review.shown(result(FOUND))
    assert len(shown) == 6 and shown.scores.min() > 0.3


def test_precision_of_objects(scene):
    """Cats: right, wrong, right, wrong, of two. Dogs: one ignored, one wrong, one wrong class."""
    review, result, sample = scene
    review.add(result(FOUND), sample(OBJECTS, IGNORED))
    curves = {curve.name: curve for curve in review.summary().curves}
    # The best precision from each recall on: 1 of 1 up to a half, then 2 of 3.
    cat = np.where(RECALLS <= 0.5, 1.0, 2 / 3)
    assert curves["cat"].precision == pytest.approx(cat)
    assert curves["cat"].ap == pytest.approx(5 / 6, abs=0.002)
    assert curves["dog"].precision == pytest.approx(np.zeros(101)) and curves["dog"].ap == 0
    table = review.summary().table
    assert table.header[:2] == ("class", "objects")
    assert [row[:2] for row in table.rows] == [("cat", 2), ("dog", 2)]


def test_classes_without_objects_or_detections(scene):
    review, result, sample = scene
    review.add(result([]), sample(OBJECTS[:2]))
    summary = review.summary()
    assert [(curve.name, curve.ap) for curve in summary.curves] == [("cat", 0)]
    cat, dog = summary.table.rows
    assert cat[:3] == ("cat", 2, 0) and dog[:3] == ("dog", 0, None)


def test_masks_have_columns_of_their_own():
    review = detection_review()
    found = [(*row[:4], 0.9, row[4]) for row in OBJECTS]
    sample = detection_sample(OBJECTS, masks=True)
    # The boxes are right, but the masks of dogs are half of them.
    result = upright(found, masks=True)
    halves = [
        Mask.from_array(np.ones((mask.height // 2 - 1, mask.width), bool), mask.x, mask.y)
        if label
        else mask
        for mask, label in zip(result.instance_masks, result.labels, strict=True)
    ]
    result = Detections(result.boxes, result.scores, result.labels, SIZE, tuple(halves))
    review.add(result, sample)
    table = review.summary().table
    assert table.header == ("class", "objects", "box AP", "box AP50", "mask AP", "mask AP50")
    cat, dog = table.rows
    assert cat[2:] == pytest.approx((1, 1, 1, 1)) and dog[2:] == pytest.approx((1, 1, 0, 0))
    assert review.truth(sample).masks().sum() == 3 * 400 + 600


# --- pixels --------------------------------------------------------------------------------------


def segmentation_sample(labels):
    from mmseg.structures import SegDataSample

    data = PixelData(data=torch.tensor(labels)[None])
    return SegDataSample(gt_sem_seg=data, metainfo=dict(ori_shape=np.shape(labels)))


@pytest.fixture
def segmentation_review():
    pytest.importorskip("mmseg")
    from mmeformer.segmentation.review import SegmentationReview

    return SegmentationReview(("sky", "road", "tree"))


def test_confusion_of_pixels(segmentation_review):
    review = segmentation_review
    labels = [[0, 0, 0, 1], [0, 0, 255, 1]]
    found = [[0, 0, 1, 1], [0, 2, 2, 1]]
    score = review.add(Segmentation(np.array(found, np.uint8)), segmentation_sample(labels))
    summary = review.summary()
    # The ignored pixel is in no row.
    assert summary.confusion.counts.tolist() == [[3, 1, 1], [0, 2, 0], [0, 0, 0]]
    assert not summary.confusion.has_background and summary.curves == ()
    sky, road, tree = summary.table.rows
    assert sky == ("sky", pytest.approx(5 / 7), pytest.approx(3 / 5), 1, pytest.approx(3 / 5))
    assert road == ("road", pytest.approx(2 / 7), pytest.approx(2 / 3), pytest.approx(2 / 3), 1)
    assert tree == ("tree", 0, 0, 0, None)
    # Sky and road are in the image.
    assert score == pytest.approx((3 / 5 + 2 / 3) / 2)
    assert (
        review.add(Segmentation(np.zeros((1, 2), np.uint8)), segmentation_sample([[255] * 2]))
        is None
    )


def test_ious_are_those_of_the_metric(segmentation_review):
    from mmseg.evaluation import IoUMetric

    random = np.random.default_rng(0)
    metric = IoUMetric()
    metric.dataset_meta = dict(classes=segmentation_review.classes)
    for _ in range(3):
        labels = random.choice([0, 1, 2, 255], (20, 30))
        found = random.integers(0, 3, (20, 30))
        segmentation_review.add(Segmentation(found.astype(np.uint8)), segmentation_sample(labels))
        parts = metric.intersect_and_union(
            torch.from_numpy(found), torch.from_numpy(labels), 3, 255
        )
        metric.results.append(parts)
    expected = metric.compute_metrics(metric.results)
    iou, recall = np.array([(row[2], row[4]) for row in segmentation_review.summary().table.rows]).T
    assert 100 * iou.mean() == pytest.approx(expected["mIoU"], abs=0.01)
    assert 100 * recall.mean() == pytest.approx(expected["mAcc"], abs=0.01)


def test_truth_that_is_drawn_has_a_class_everywhere(segmentation_review):
    labels = [[0, 255, 255, 2, 2]]
    assert segmentation_review.truth(segmentation_sample(labels)).labels.tolist() == [
        [0, 0, 2, 2, 2]
    ]
    labels = [[255, 255]]
    assert segmentation_review.truth(segmentation_sample(labels)).labels.tolist() == [[0, 0]]


# --- classes of images ---------------------------------------------------------------------------

ANIMALS = ("cat", "dog", "fox", "owl")
SCORES = [
    # The label, and the probabilities of the four classes.
    (0, (0.7, 0.2, 0.1, 0.0)),
    (0, (0.4, 0.6, 0.0, 0.0)),
    (1, (0.1, 0.8, 0.1, 0.0)),
    (1, (0.5, 0.3, 0.2, 0.0)),
    (2, (0.0, 0.1, 0.3, 0.6)),
]


def classification_sample(label):
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(label)


@pytest.fixture
def classification_review():
    pytest.importorskip("mmpretrain")
    from mmeformer.classification.review import ClassificationReview

    return ClassificationReview(ANIMALS)


def test_confusion_of_images(classification_review):
    review = classification_review
    for label, scores in SCORES:
        found = Classification(np.array(scores, np.float32))
        sample = classification_sample(label)
        assert review.add(found, sample) == pytest.approx(scores[label])
        assert review.truth(sample).scores.tolist() == [float(i == label) for i in range(4)]
    summary = review.summary()
    assert summary.confusion.counts.tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]
    assert not summary.confusion.has_background and summary.confusion.unit == "images"
    assert summary.table.header == ("class", "images", "precision", "recall", "AP")
    cat, dog, fox, owl = summary.table.rows
    # By the probability of cat: cat, dog, cat, dog, fox. By that of dog: dog, cat, dog, cat, fox.
    assert cat == ("cat", 2, 0.5, 0.5, pytest.approx(5 / 6, abs=0.002))
    assert dog == ("dog", 2, 0.5, 0.5, pytest.approx(5 / 6, abs=0.002))
    assert fox == ("fox", 1, None, 0, 1) and owl == ("owl", 0, 0, None, None)
    curves = {curve.name: curve for curve in summary.curves}
    assert list(curves) == ["cat", "dog", "fox"]
    assert curves["cat"].precision == pytest.approx(np.where(RECALLS <= 0.5, 1.0, 2 / 3))
    assert curves["fox"].precision == pytest.approx(np.ones(101))
    from mmpretrain.structures import DataSample

    assert review.truth(DataSample()) is None


def test_numbers_of_classes_are_those_of_the_metric(classification_review):
    from mmpretrain.evaluation import SingleLabelMetric

    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 60)
    scores = random.random((60, 4), np.float32) + np.eye(4, dtype=np.float32)[labels] / 2
    scores /= scores.sum(1, keepdims=True)
    for label, row in zip(labels.tolist(), scores, strict=True):
        classification_review.add(Classification(row), classification_sample(label))
    rows = [row[2:4] for row in classification_review.summary().table.rows]
    found, target = torch.from_numpy(scores), torch.from_numpy(labels)
    (numbers,) = SingleLabelMetric.calculate(found, target, thrs=(0.0,), average=None)
    np.testing.assert_allclose(rows, torch.stack(numbers[:2], 1) / 100, atol=1e-6)


def test_statistics_of_class_folders(classification_review, tmp_path):
    import tiny

    from mmeformer.checks.dataset import datasets_of

    (dataset,) = datasets_of(tiny.classification(tmp_path), "val")
    found = classification_review.statistics([dataset, dataset])
    assert (found.images, found.names) == (4, tuple(tiny.ANIMALS))
    assert found.amounts.tolist() == found.in_images.tolist() == [2, 2, 0, 0]
