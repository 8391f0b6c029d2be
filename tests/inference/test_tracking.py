# SPDX-License-Identifier: Apache-2.0
"""Track ids of objects in videos, with a predictor that finds bright squares."""

import importlib.util
import json

import cv2
import numpy as np
import pytest
import torch

from mmeformer.commands.predict import main
from mmeformer.detection.predictor import DetectionPredictor
from mmeformer.detection.writers import to_json
from mmeformer.errors import UserError
from mmeformer.inference import Settings, run
from mmeformer.inference.inputs import find_sources
from mmeformer.inference.predictor import Predictor
from mmeformer.inference.tracking import Tracker
from mmeformer.results import Detections, RotatedDetections

HAS_TRACKERS = importlib.util.find_spec("trackers") is not None
needs_trackers = pytest.mark.skipif(not HAS_TRACKERS, reason="trackers is not installed")
WIDTH, HEIGHT, SIDE, FRAMES = 200, 80, 24, 40
BLANK = 20
"""A frame in which nothing is found."""


def place(square, frame):
    """Left and top edge: one goes right, one goes left and in part over it."""
    return (10 + 4 * frame, 15) if square == 0 else (166 - 4 * frame, 27)


class Squares(Predictor):
    """Finds gray squares; their label is that of their gray, their order changes by frame."""

    large = 8.0

    def __init__(self, rotated=False):
        self.native_size = None
        self.classes, self.category_ids = ("dark", "light"), (1, 2)
        self.rotated, self.calls = rotated, 0

    def prepare(self, image):
        return dict(inputs=torch.from_numpy(image))

    def predict(self, prepared):
        return [self.find(item["inputs"].numpy()[..., 0]) for item in prepared]

    def find(self, gray):
        boxes, labels = [], []
        self.calls += 1
        for label, (low, high) in enumerate([(70, 150), (180, 255)]):
            rows, columns = np.nonzero((gray > low) & (gray < high))
            if len(rows) > 50:
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                labels.append(label)
        order = slice(None, None, -1 if self.calls % 2 else 1)
        boxes = np.array(boxes, np.float32).reshape(-1, 4)[order]
        labels = np.array(labels, np.int64)[order]
        scores = np.full(len(labels), 0.9, np.float32)
        if self.rotated:
            size = boxes[:, 2:] - boxes[:, :2]
            center = boxes[:, :2] + size / 2
            boxes = np.concatenate([center, size, np.zeros((len(labels), 1), np.float32)], 1)
            return RotatedDetections(boxes, scores, labels)
        return Detections(boxes, scores, labels, gray.shape)

    def results_of_batch(self, batch):
        raise NotImplementedError

    def merge(self, places, results, size):
        raise NotImplementedError

    def draw(self, image, result):
        return cv2.resize(image, None, fx=3, fy=3)

    def entries(self, result):
        kind = DetectionPredictor
        if self.rotated:
            from mmeformer.rotated.predictor import RotatedPredictor as kind
        return kind.annotations(result, self.classes, self.category_ids)


def clip(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30, (WIDTH, HEIGHT))
    for frame in range(FRAMES):
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        for square, gray in enumerate((110, 220)):
            x, y = place(square, frame)
            if frame != BLANK:
                image[y : y + SIDE, x : x + SIDE] = gray
        writer.write(image)
    writer.release()


def track(folder, out, predictor, **settings):
    """Ids by video and class: a list of the ids of the frames in which it was found."""
    out.mkdir()
    statuses = list(run(predictor, find_sources([folder]), out, Settings(track=True, **settings)))
    assert not [status.error for status in statuses if status.error]
    content = json.loads((out / "predictions.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    ids = {}
    for entry in content["annotations"]:
        key = names[entry["image_id"]], entry["category_id"]
        ids.setdefault(key, []).append(entry.get("track_id"))
    return ids


@needs_trackers
@pytest.mark.parametrize("rotated", [False, True])
def test_ids_stay_while_objects_pass_each_other(tmp_path, rotated):
    clip(tmp_path / "in" / "a.avi")
    clip(tmp_path / "in" / "b.avi")
    cv2.imwrite(str(tmp_path / "in" / "c.png"), np.full((HEIGHT, WIDTH, 3), 110, np.uint8))
    ids = track(tmp_path / "in", tmp_path / "out", Squares(rotated), batch_size=3)
    for video in ("a.avi", "b.avi"):
        dark, light = ids[video, 1], ids[video, 2]
        # A track begins with the second frame in which an object is found, and outlives a frame in
        # which it is not. Every video counts from 1.
        assert len(dark) == len(light) == FRAMES - 1
        assert dark[0] is None and light[0] is None
        assert len(set(dark[1:])) == len(set(light[1:])) == 1
        assert {dark[1], light[1]} == {1, 2}
    assert ids["c.png", 1] == [None]


@needs_trackers
def test_a_second_guess_at_the_class_has_no_id():
    tracker = Tracker(fps=30)
    for frame in range(6):
        left = 10 + 4 * frame
        boxes = np.array([[left, 10, left + 30, 40], [left + 1, 10, left + 31, 40]], np.float32)
        order = [0, 1] if frame % 2 else [1, 0]
        scores = np.array([0.7, 0.6], np.float32)
        found = Detections(boxes[order], scores[order], np.array([0, 1])[order], (64, 64))
        ids = tracker.update(found).track_ids[order]
        # A track begins with the second frame.
        assert ids.tolist() == [1 if frame else 0, 0]


@needs_trackers
def test_ids_are_drawn_into_the_video(tmp_path):
    clip(tmp_path / "in" / "a.avi")
    track(tmp_path / "in", tmp_path / "out", Squares())
    video = cv2.VideoCapture(str(tmp_path / "out" / "videos" / "a.mp4"))
    white = []
    for _ in range(3):
        _, picture = video.read()
        # The dark square, in a picture of three times the size.
        x, y = (3 * edge for edge in place(0, len(white)))
        white.append(int((picture[y : y + 3 * SIDE, x : x + 3 * SIDE] > 190).sum()))
    assert white[0] == 0 and min(white[1:]) > 30


def test_ids_follow_a_choice_of_objects():
    found = Detections(
        np.zeros((3, 4), np.float32),
        np.zeros(3, np.float32),
        np.zeros(3, np.int64),
        (10, 10),
        track_ids=np.array([4, 0, 6]),
    )
    assert found.take([2, 0]).track_ids.tolist() == [6, 4]
    assert [entry.get("track_id") for entry in to_json(found)] == [4, None, 6]


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "mmeformer.inference.tracking.find_spec",
        lambda name: None if name == "trackers" else find(name),
    )
    with pytest.raises(UserError, match="pip install 'trackers"):
        Settings(track=True)
    assert Settings().track is False


def test_without_videos_or_boxes_there_is_nothing_to_track(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmeformer.inference.tracking.find_spec", lambda name: True)
    image, checkpoint = tmp_path / "a.png", tmp_path / "model.pth"
    cv2.imwrite(str(image), np.zeros((20, 20, 3), np.uint8))
    checkpoint.touch()
    config = "classification/efficientformerv2-s0_custom.py"
    arguments = [config, str(checkpoint), str(image), "--out", str(tmp_path / "out"), "--track"]
    assert main(arguments) == 1
    assert "none among the inputs" in capsys.readouterr().err
    clip(tmp_path / "b.avi")
    predictor = Squares()
    predictor.has_scores = False
    with pytest.raises(UserError, match="no boxes"):
        next(run(predictor, find_sources([tmp_path / "b.avi"]), tmp_path, Settings(track=True)))
