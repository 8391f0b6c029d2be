# SPDX-License-Identifier: Apache-2.0
"""The way of images to files: batches, windows, faults; with a stand-in for the predictor."""

import json

import cv2
import numpy as np
import pytest
import torch

from mmeformer.errors import UserError
from mmeformer.inference import Settings, run
from mmeformer.inference.inputs import find_sources
from mmeformer.inference.loop import Status
from mmeformer.inference.predictor import Predictor


class Means(Predictor):
    """The result of an image is its mean; it remembers how it was asked."""

    large = 2.0

    def __init__(self, native_size=50):
        self.native_size = native_size
        self.classes, self.category_ids = ("thing",), (1,)
        self.batches, self.windows, self.drawn = [], [], 0

    def prepare(self, image):
        if image.shape[0] == 1:
            raise cv2.error("resize failed: (-215) dsize.area() > 0")
        return dict(inputs=torch.from_numpy(image))

    def predict(self, prepared):
        self.batches.append(len(prepared))
        return [float(item["inputs"].float().mean()) for item in prepared]

    def results_of_batch(self, batch):
        raise NotImplementedError

    def merge(self, places, results, size):
        raise NotImplementedError

    def predict_windows(self, image, size, overlap, batch_size, progress):
        self.windows.append((image.shape[:2], size, overlap, batch_size))
        for done in (1, 2):
            progress(done, 2)
        return float(image.mean())

    def draw(self, image, result):
        self.drawn += 1
        return image

    def entries(self, result):
        return [dict(category_id=1, score=result)]

    def write_files(self, out, name, result):
        path = out / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(result))


def save(path, width, height, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), value, np.uint8))


def clip(path, frames, size=(32, 32)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, size)
    for index in range(frames):
        writer.write(np.full((*size[::-1], 3), index * 10, np.uint8))
    writer.release()


def predict(folder, out, predictor=None, **settings):
    out.mkdir(exist_ok=True)
    predictor = predictor or Means()
    steps = []
    statuses = list(
        run(
            predictor, find_sources([folder]), out, Settings(**settings), lambda *s: steps.append(s)
        )
    )
    return predictor, statuses, steps


def annotations(out):
    content = json.loads((out / "predictions.json").read_text())
    images = {image["id"]: (image["file_name"], image.get("frame")) for image in content["images"]}
    return {images[entry["image_id"]]: entry["score"] for entry in content["annotations"]}


def test_batches_results_and_files(tmp_path):
    for index in range(5):
        save(tmp_path / "in" / "deep" / f"{index}.png", 30, 20, index)
    out = tmp_path / "out"
    predictor, statuses, _ = predict(tmp_path / "in", out, batch_size=2)
    assert predictor.batches == [2, 2, 1] and not predictor.windows
    paths = [str(tmp_path / "in" / "deep" / f"{index}.png") for index in range(5)]
    assert statuses == [Status(path, index + 1, 5) for index, path in enumerate(paths)]
    expected = {(f"deep/{index}.png", None): index for index in range(5)}
    assert annotations(out) == expected
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == sorted(
        [".mmeformer-predictions", "predictions.json"]
        + [f"labels/deep/{index}.txt" for index in range(5)]
        + [f"pictures/deep/{index}.jpg" for index in range(5)]
    )


def test_without_pictures(tmp_path):
    save(tmp_path / "in" / "a.png", 30, 20)
    clip(tmp_path / "in" / "b.mkv", 3)
    predictor, statuses, _ = predict(tmp_path / "in", tmp_path / "out", pictures=False)
    assert predictor.drawn == 0 and len(statuses) == 4
    assert not (tmp_path / "out" / "pictures").exists()
    assert not (tmp_path / "out" / "videos").exists()


def test_bad_images_are_named_and_the_others_kept(tmp_path):
    save(tmp_path / "in" / "a.png", 30, 20, 1)
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    save(tmp_path / "in" / "c.png", 40, 1, 3)
    (tmp_path / "in" / "d.mp4").write_bytes(b"no video")
    save(tmp_path / "in" / "e.png", 30, 20, 5)
    predictor, statuses, _ = predict(tmp_path / "in", tmp_path / "out", batch_size=4)
    assert [(status.done, status.error is None) for status in statuses] == [
        (1, True),
        (2, False),
        (3, False),
        (3, False),
        (4, True),
    ]
    errors = [status.error for status in statuses if status.error]
    assert "b.png" in errors[0]
    assert "c.png (40 x 1 pixels) cannot be resized to the model's input" in errors[1]
    assert "d.mp4" in errors[2]
    assert statuses[-1].total == 4
    assert annotations(tmp_path / "out") == {("a.png", None): 1, ("e.png", None): 5}


def test_videos_become_videos(tmp_path):
    (tmp_path / "in").mkdir()
    clip(tmp_path / "in" / "a.mkv", 5)
    save(tmp_path / "in" / "b.png", 30, 20, 7)
    predictor, statuses, _ = predict(tmp_path / "in", tmp_path / "out", batch_size=3)
    # The end of a video is not held up by a batch that is not full.
    assert predictor.batches == [3, 2, 1]
    assert statuses[0].name.endswith("a.mkv, frame 0")
    assert [(status.done, status.total) for status in statuses] == [
        (done, 6) for done in range(1, 7)
    ]
    found = annotations(tmp_path / "out")
    assert set(found) == {("a.mkv", frame) for frame in range(5)} | {("b.png", None)}
    np.testing.assert_allclose(
        [found["a.mkv", frame] for frame in range(5)], np.arange(5) * 10, atol=3
    )
    video = cv2.VideoCapture(str(tmp_path / "out" / "videos" / "a.mp4"))
    assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)) == (5, 10)
    assert (tmp_path / "out" / "labels" / "a" / "000004.txt").is_file()
    assert (tmp_path / "out" / "pictures" / "b.jpg").is_file()


def test_a_cut_off_video_keeps_its_frames_and_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.mkv"
    clip(path, 20)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    save(tmp_path / "in" / "b.png", 30, 20, 7)
    _, statuses, _ = predict(tmp_path / "in", tmp_path / "out")
    errors = [status.error for status in statuses if status.error]
    assert len(errors) == 1 and "of 20 frames" in errors[0]
    frames = len(statuses) - 2
    assert 0 < frames < 18 and statuses[-1].done == statuses[-1].total == frames + 1
    video = cv2.VideoCapture(str(tmp_path / "out" / "videos" / "a.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == frames


@pytest.mark.parametrize(
    ("settings", "native", "expected"),
    [
        # (size, overlap) for 101 x 40 pixels; 100 x 40 pixels is twice the native size.
        (dict(), 50, [(50, 12)]),
        (dict(overlap=20), 50, [(50, 20)]),
        (dict(), 200, []),
        (dict(), None, []),
        (dict(window=0), 50, []),
        (dict(window=40), 50, [(40, 10), (40, 10)]),
        (dict(window=40, overlap=5), None, [(40, 5), (40, 5)]),
    ],
)
def test_which_images_are_cut(tmp_path, settings, native, expected):
    save(tmp_path / "in" / "a.png", 100, 40)
    save(tmp_path / "in" / "b.png", 101, 40)
    predictor, statuses, steps = predict(
        tmp_path / "in", tmp_path / "out", Means(native), batch_size=3, **settings
    )
    assert [call[1:3] for call in predictor.windows] == expected
    assert all(call[3] == 3 for call in predictor.windows)
    assert sum(predictor.batches) == 2 - len(expected)
    name = str(tmp_path / "in" / "b.png")
    assert steps[-2:] == ([(name, 1, 2), (name, 2, 2)] if expected else [])
    assert [status.done for status in statuses] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=0), "batch size 0 must be at least 1"),
        (dict(window=-1), "window -1 must be at least 32"),
        (dict(window=8), "window 8 must be at least 32"),
        (dict(overlap=-1), "overlap -1 must not be negative"),
        (dict(window=64, overlap=64), "overlap 64 must be less than the window, 64"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_overlap_that_does_not_fit_the_native_size(tmp_path):
    save(tmp_path / "in" / "a.png", 30, 20)
    with pytest.raises(ValueError, match="overlap 50 must be less than the window, 50"):
        predict(tmp_path / "in", tmp_path / "out", overlap=50)


def test_batches_of_large_images_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr("mmeformer.inference.loop.PIXELS_AT_ONCE", 1300)
    for index in range(4):
        save(tmp_path / "in" / f"{index}.png", 30, 20)
    save(tmp_path / "in" / "larger.png", 50, 40)
    predictor, *_ = predict(tmp_path / "in", tmp_path / "out", Means(200), batch_size=4)
    assert predictor.batches == [2, 2, 1]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_fault_that_is_not_the_image_s_ends_the_run(tmp_path, error):
    class Faulty(Means):
        def draw(self, image, result):
            if self.drawn == 3:
                raise error("no space left")
            return super().draw(image, result)

    (tmp_path / "in").mkdir()
    clip(tmp_path / "in" / "a.mkv", 5)
    with pytest.raises(error):
        predict(tmp_path / "in", tmp_path / "out", Faulty())
    # Neither half a video nor half a JSON file.
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(left) == [
        ".mmeformer-predictions",
        *(f"{frame:06d}.txt" for frame in range(4)),
    ]


def test_outputs_of_an_earlier_run_are_replaced(tmp_path):
    save(tmp_path / "in" / "a.png", 30, 20, 1)
    predict(tmp_path / "in", tmp_path / "out")
    save(tmp_path / "in" / "a.png", 30, 20, 2)
    predict(tmp_path / "in", tmp_path / "out")
    assert annotations(tmp_path / "out") == {("a.png", None): 2}


def test_files_of_others_are_left_alone(tmp_path):
    save(tmp_path / "in" / "a.png", 30, 20, 1)
    own = tmp_path / "in" / "labels" / "a.txt"
    own.parent.mkdir()
    own.write_text("my label")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"in/a.png was not written by predict"):
        predict(tmp_path / "in", tmp_path / "in")
    assert own.read_text() == "my label" and sorted(tmp_path.rglob("*")) == before


def test_nothing_is_written_outside_the_output_folder(tmp_path, monkeypatch):
    """Whatever inputs are named, and wherever links lead to."""
    image = np.full((20, 20, 3), 90, np.uint8)
    secret = tmp_path / "secret"
    work = tmp_path / "work"
    for folder in (secret, work / "in/deep", work / "in/.. odd"):
        folder.mkdir(parents=True)
    for path in (
        secret / "s.png",
        work / "in/..png",
        work / "in/.. odd/..a.png",
        work / "in/deep/d.png",
    ):
        cv2.imwrite(str(path), image)
        path.touch()
    (work / "in/link.png").symlink_to(secret / "s.png")
    (work / "in/folder").symlink_to(secret, target_is_directory=True)
    monkeypatch.chdir(work)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    inputs = [
        "in",
        "in/../../secret",
        "*/../../secret/*.png",
        str(secret / "s.png"),
        "in/../in/deep",
    ]
    for number, text in enumerate(inputs):
        out = work / "out" / str(number)
        out.mkdir(parents=True)
        statuses = list(run(Means(), find_sources([text]), out, Settings()))
        assert statuses and all(status.error is None for status in statuses)
        assert len(list((out / "labels").rglob("*.txt"))) == len(statuses)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    new = [path for path in after if after[path] != before.get(path)]
    assert new and all(path.is_relative_to(work / "out") for path in new)
