# SPDX-License-Identifier: Apache-2.0
"""Average precision, against plain loops over shapely polygons and against mmrotate."""

from dataclasses import replace

import numpy as np
import pytest
from mmrotate.evaluation.functional import mean_ap as mmrotate_mean_ap
from rotated_boxes import polygon_iou, random_boxes

from mmeformer.results import RotatedDetections
from mmeformer.rotated.evaluation import (
    IOU_THRS,
    GroundTruth,
    average_precision,
    evaluate,
    match,
)

CLASSES = 4


def random_image(generator, objects):
    """Objects, some ignored, and predictions: shifted, repeated, of wrong class, on nothing."""
    boxes = random_boxes(generator, objects, side=150)
    truth = GroundTruth(
        boxes, generator.integers(0, CLASSES - 1, objects), generator.random(objects) < 0.3
    )
    found, labels = [], []
    for box, label in zip(truth.boxes, truth.labels, strict=True):
        for _ in range(generator.integers(0, 4)):
            found.append(box + generator.normal(0, 1.5, 5) * [1, 1, 1, 1, 0.05])
            labels.append(label if generator.random() < 0.8 else generator.integers(CLASSES))
    false = random_boxes(generator, generator.integers(0, 6), side=150)
    found = np.concatenate([np.array(found).reshape(-1, 5), false]).astype(np.float32)
    found[:, 2:4] = found[:, 2:4].clip(1)
    labels = np.array([*labels, *generator.integers(0, CLASSES, len(false))], int)
    scores = generator.random(len(found)).astype(np.float32)
    return RotatedDetections(found, scores, labels), truth


def random_images(seed):
    generator = np.random.default_rng(seed)
    images = [random_image(generator, objects) for objects in (15, 0, 25, 8)]
    nothing_found = RotatedDetections.concatenate([])
    return [*images, (nothing_found, images[0][1])]


def brute_force(images, label, iou_thr, mode):
    """AP and number of objects of one class, by loops."""
    total = sum(int((~t.ignored & (t.labels == label)).sum()) for _, t in images)
    ranked = sorted(
        (
            (-float(score), number, box)
            for number, (detections, _) in enumerate(images)
            for box, score, found in zip(
                detections.boxes, detections.scores, detections.labels, strict=True
            )
            if found == label
        ),
        key=lambda item: item[0],
    )
    taken, curve, right, wrong = set(), [], 0, 0
    for _, number, box in ranked:
        truth = images[number][1]
        best, best_iou = None, 0.0
        for index in range(len(truth.labels)):
            if truth.labels[index] == label:
                iou = polygon_iou(box[None], truth.boxes[index][None])[0, 0]
                if iou > best_iou:
                    best, best_iou = index, iou
        if best is not None and best_iou >= iou_thr:
            if truth.ignored[best]:
                continue
            if (number, best) in taken:
                wrong += 1
            else:
                taken.add((number, best))
                right += 1
        else:
            wrong += 1
        curve.append((right / total if total else 0, right / (right + wrong)))
    if mode == "11points":
        points = [
            max((precision for recall, precision in curve if recall >= step * 0.1), default=0)
            for step in range(11)
        ]
        return sum(points) / 11, total
    area, last = 0.0, 0.0
    for place, (recall, _) in enumerate(curve):
        area += (recall - last) * max(precision for _, precision in curve[place:])
        last = recall
    return area, total


@pytest.mark.parametrize("mode", ["11points", "area"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_plain_loops(seed, mode):
    images = random_images(seed)
    found = evaluate(images, CLASSES, mode)
    for label in range(CLASSES):
        for row in (0, 5, 8):
            expected, total = brute_force(images, label, IOU_THRS[row], mode)
            assert found.objects[label] == total
            if total:
                assert found.ap[row, label] == pytest.approx(expected, abs=1e-9)
    # A class without objects has no score; the others have real ones.
    assert np.isnan(found.ap[:, CLASSES - 1]).all() and found.detections[CLASSES - 1] > 0
    assert ((found.ap[0, :-1] > 0.1) & (found.ap[0, :-1] < 0.9)).all()
    assert (found.ap[0, :-1] >= found.ap[9, :-1]).all()


class SerialPool:
    """mmrotate's pool without its processes."""

    def starmap(self, function, arguments):
        return [function(*each) for each in arguments]

    def close(self):
        """Nothing to close."""


@pytest.mark.parametrize("mode", ["11points", "area"])
def test_scores_are_those_of_mmrotate(monkeypatch, mode):
    context = type("Context", (), {"Pool": staticmethod(lambda processes: SerialPool())})
    monkeypatch.setattr(mmrotate_mean_ap, "get_context", lambda method: context)
    images = random_images(7)
    detections = [
        [
            np.column_stack([found.boxes, found.scores])[found.labels == label]
            for label in range(CLASSES)
        ]
        for found, _ in images
    ]
    annotations = [
        dict(
            bboxes=truth.boxes[~truth.ignored],
            labels=truth.labels[~truth.ignored],
            bboxes_ignore=truth.boxes[truth.ignored],
            labels_ignore=truth.labels[truth.ignored],
        )
        for _, truth in images
    ]
    ours = evaluate(images, CLASSES, mode)
    for row in (0, 5, 9):
        mean, _ = mmrotate_mean_ap.eval_rbbox_map(
            detections,
            annotations,
            iou_thr=IOU_THRS[row],
            use_07_metric=mode == "11points",
            logger="silent",
        )
        assert np.nanmean(ours.ap[row]) == pytest.approx(mean, abs=1e-6)


def test_of_equal_objects_the_one_that_counts_is_found():
    box = np.array([[50, 50, 20, 10, 0.5]], np.float32)
    detections = RotatedDetections(box, np.ones(1, np.float32), np.zeros(1, int))
    truth = GroundTruth(box.repeat(3, 0), np.array([0, 0, 1]), np.array([True, False, False]))
    iou, index = match(detections, truth)
    assert iou[0] == pytest.approx(1) and index.tolist() == [1]
    nowhere = detections.moved(500, 0)
    assert [array.tolist() for array in match(nowhere, truth)] == [[0], [-1]]


def test_predictions_on_ignored_objects_count_nothing():
    box = np.array([[50, 50, 20, 10, 0.5]], np.float32)
    hit = RotatedDetections(box.repeat(2, 0), np.array([0.9, 0.8], np.float32), np.zeros(2, int))
    ignored = GroundTruth(box, np.zeros(1, int), np.ones(1, bool))
    counted = GroundTruth(box, np.zeros(1, int), np.zeros(1, bool))
    once = replace(hit.take([0]), scores=np.array([0.1], np.float32))
    # All boxes of the first image are ignored: mmrotate would count its predictions as errors.
    found = evaluate([(hit, ignored), (once, counted)], 1, "area")
    assert found.ap[0, 0] == 1 and found.recall[0, 0] == 1
    assert evaluate([(hit, counted)], 1, "area").ap[0, 0] == 1


def test_curves_by_hand():
    recall, precision = np.array([0.25, 0.25, 0.5]), np.array([1.0, 0.5, 2 / 3])
    assert average_precision(recall, precision, "area") == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert average_precision(recall, precision, "11points") == pytest.approx((3 + 3 * 2 / 3) / 11)
    for mode in ("area", "11points"):
        assert average_precision(np.zeros(0), np.zeros(0), mode) == 0
        assert average_precision(np.ones(1), np.ones(1), mode) == 1
