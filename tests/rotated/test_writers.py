# SPDX-License-Identifier: Apache-2.0
"""What is written can be read back, and says what was found."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes
from rotated_boxes import outline, random_detections

from mmeformer.registry import VISUALIZERS
from mmeformer.results import RotatedDetections
from mmeformer.rotated import to_json, write_json, write_picture, write_task1
from mmeformer.rotated.dota import read_labels
from mmeformer.rotated.writers import write_dota_text

CLASSES = ("plane", "ship", "harbor")


@pytest.fixture
def detections():
    return random_detections(np.random.default_rng(0), 20, 10_000)


def test_corners_are_those_of_the_boxes(detections):
    for box, polygon in zip(detections.boxes, detections.corners(), strict=True):
        expected = np.array(outline(box).exterior.coords)[:4]
        nearest = np.abs(polygon[:, None] - expected[None]).sum(-1).min(1)
        assert nearest.max() < 0.01


def test_label_files_are_read_back(tmp_path, detections):
    write_dota_text(tmp_path / "a.txt", detections, CLASSES)
    found = read_labels(tmp_path / "a.txt")
    assert [item.name for item in found] == [CLASSES[label] for label in detections.labels]
    assert {item.difficult for item in found} == {0}
    np.testing.assert_allclose([item.polygon for item in found], detections.corners(), atol=0.006)
    write_dota_text(tmp_path / "a.txt", RotatedDetections.concatenate([]), CLASSES)
    assert read_labels(tmp_path / "a.txt") == []


def test_submission_has_every_class_and_every_digit(tmp_path, detections):
    detections = replace(detections, labels=np.ones(20, int))
    images = {"P1": detections, "P2": detections.take([3])}
    archive = write_task1(tmp_path / "task1", images, CLASSES)
    assert archive == tmp_path / "task1" / "Task1.zip"
    assert (tmp_path / "task1" / "Task1_plane.txt").read_text() == ""
    rows = [
        line.split() for line in (tmp_path / "task1" / "Task1_ship.txt").read_text().splitlines()
    ]
    assert [row[0] for row in rows] == ["P1"] * 20 + ["P2"]
    numbers = np.array([row[1:] for row in rows[:20]], float)
    np.testing.assert_allclose(numbers[:, 0], detections.scores, atol=1e-6)
    np.testing.assert_allclose(numbers[:, 1:], detections.corners().reshape(-1, 8), atol=0.006)
    with pytest.raises(ValueError, match="image name 'a b' has white space"):
        write_task1(tmp_path / "other", {"a b": detections}, CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["task1"]


def test_json_says_boxes_in_three_ways(tmp_path, detections):
    write_json(tmp_path / "a.json", to_json("P1", detections, CLASSES))
    entries = json.loads((tmp_path / "a.json").read_text())
    assert len(entries) == 20
    for row, entry in enumerate(entries):
        assert entry["image_id"] == "P1"
        assert entry["category"] == CLASSES[entry["category_id"] - 1]
        assert entry["category_id"] == detections.labels[row] + 1
        assert entry["score"] == pytest.approx(detections.scores[row], abs=1e-6)
        np.testing.assert_allclose(entry["rbox"], detections.boxes[row], atol=0.006)
        shape = outline(detections.boxes[row])
        x, y, width, height = entry["bbox"]
        np.testing.assert_allclose([x, y, x + width, y + height], shape.bounds, atol=0.03)
        (polygon,) = entry["segmentation"]
        assert len(polygon) == 8
        assert cv2.contourArea(np.float32(polygon).reshape(4, 2)) == pytest.approx(
            shape.area, abs=1
        )


def test_picture_shows_boxes_where_they_are(tmp_path):
    image = np.zeros((200, 300, 3), np.uint8)
    boxes = np.array([[200, 100, 120, 60, 0.4], [60, 60, 40, 40, 0]], np.float32)
    found = RotatedDetections(boxes, np.array([0.9, 0.1], np.float32), np.array([1, 0]))
    meta = dict(classes=CLASSES, palette=[(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    write_picture(tmp_path / "a.png", image, found, meta, score_thr=0.5)
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture.shape == image.shape
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    for x, y in found.corners()[0]:
        corner = picture[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4]
        assert corner[..., 1].max() > 100
    assert picture[:, :100].max() == 0, "the second box scores too low to be drawn"
    write_picture(tmp_path / "b.png", image, found, meta, score_thr=0.5, max_side=150)
    small = cv2.imread(str(tmp_path / "b.png"))
    assert small.shape == (100, 150, 3)
    x, y = (found.corners()[0][0] / 2).astype(int)
    assert small[y - 3 : y + 4, x - 3 : x + 4, 1].max() > 100
    write_picture(tmp_path / "c.jpg", image, RotatedDetections.concatenate([]), meta)
    assert cv2.imread(str(tmp_path / "c.jpg")).max() < 10


def test_boxes_beyond_the_border_do_not_shrink_the_picture(tmp_path):
    image = np.random.default_rng(0).integers(0, 100, (120, 160, 3), np.uint8)
    boxes = np.array([[155, 5, 80, 40, 0.4], [0, 119, 10, 300, 0]], np.float32)
    found = RotatedDetections(boxes, np.ones(2, np.float32), np.array([1, 0]))
    write_picture(
        tmp_path / "a.png", image, found, dict(classes=CLASSES, palette=[(255, 0, 0)] * 3)
    )
    picture = cv2.imread(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(picture[50:, 20:140], image[50:, 20:140])
    assert (picture != image).any()


def test_texts_are_left_out_where_they_would_cover_the_picture():
    grid = np.stack(np.meshgrid(np.arange(10, 200, 20), np.arange(10, 200, 20)), -1).reshape(-1, 2)
    boxes = np.concatenate([grid, np.full((100, 2), 16), np.zeros((100, 1))], 1).astype(np.float32)
    sample = DetDataSample(
        pred_instances=InstanceData(
            bboxes=RotatedBoxes(boxes), scores=torch.ones(100), labels=torch.zeros(100, dtype=int)
        )
    )
    pictures = {}
    for max_texts in (100, 99):
        visualizer = VISUALIZERS.build(
            dict(type="mmeformer.RotatedVisualizer", name=f"{max_texts}", max_texts=max_texts)
        )
        visualizer.dataset_meta = dict(classes=CLASSES, palette=[(0, 255, 0)] * 3)
        image = np.full((200, 200, 3), 255, np.uint8)
        visualizer.add_datasample("a", image, sample, draw_gt=False)
        pictures[max_texts] = visualizer.get_image()
    # Texts stand on black.
    assert (pictures[100].max(-1) < 60).any() and not (pictures[99].max(-1) < 60).any()
