# SPDX-License-Identifier: Apache-2.0
"""Files of results can be read by others, and are whole or not there."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mmeformer.detection.writers import run_length_code
from mmeformer.errors import UserError
from mmeformer.inference.outputs import (
    VideoWriter,
    json_results,
    mark,
    prepare_folder,
    write_mask,
)
from mmeformer.results import Mask


def test_json_is_a_coco_data_set(tmp_path):
    pixels = np.zeros((20, 30), bool)
    pixels[3:9, 4:14] = True
    path = tmp_path / "predictions.json"
    with json_results(path, {2: "cat", 17: "dog"}) as results:
        code = run_length_code(Mask.from_array(pixels), (20, 30))
        entry = dict(category_id=2, bbox=[4, 3, 10, 6], area=60, iscrowd=0, score=0.5)
        results.add("a/b.png", (20, 30), [dict(entry, segmentation=code), entry], None)
        results.add("clip.mp4", (20, 30), [], 0)
        results.add("clip.mp4", (20, 30), [entry], 1)
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.json"]
    coco = COCO(str(path))
    assert coco.loadCats(coco.getCatIds()) == [dict(id=2, name="cat"), dict(id=17, name="dog")]
    assert coco.loadImgs([1, 3]) == [
        dict(id=1, file_name="a/b.png", height=20, width=30),
        dict(id=3, file_name="clip.mp4", height=20, width=30, frame=1),
    ]
    assert [len(coco.getAnnIds(image)) for image in (1, 2, 3)] == [2, 0, 1]
    first = coco.loadAnns([1])[0]
    assert (first["image_id"], first["score"]) == (1, 0.5)
    np.testing.assert_array_equal(coco.annToMask(first), pixels)


def test_without_images_the_json_is_whole_too(tmp_path):
    with json_results(tmp_path / "p.json", {1: "cat"}):
        pass
    assert json.loads((tmp_path / "p.json").read_text())["images"] == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "predictions.json"
    path.write_text("old")
    with pytest.raises(error), json_results(path, {1: "cat"}) as results:
        results.add("a.png", (2, 2), [dict(score=1)], None)
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.json"]
    assert path.read_text() == "old"


def test_masks_are_labels_with_colors_or_without(tmp_path):
    labels = np.array([[0, 1], [2, 0]], np.uint8)
    palette = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    write_mask(tmp_path / "deep" / "er" / "a.png", labels, palette)
    image = Image.open(tmp_path / "deep" / "er" / "a.png")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.array(image), labels)
    np.testing.assert_array_equal(np.array(image.convert("RGB")), np.array(palette)[labels])
    write_mask(tmp_path / "b.png", labels, None)
    grey = cv2.imread(str(tmp_path / "b.png"), cv2.IMREAD_UNCHANGED)
    assert grey.dtype == np.uint8
    np.testing.assert_array_equal(grey, labels)
    many = labels.astype(np.uint16) + 300
    write_mask(tmp_path / "b.png", many, None)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "b.png"), -1), many)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_video(tmp_path, size):
    path = tmp_path / "videos" / "a.mp4"
    with VideoWriter(path, 7.5) as writer:
        for index in range(6):
            writer.add(np.full((*size, 3), 40 * index, np.uint8))
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]
    video = cv2.VideoCapture(str(path))
    assert video.get(cv2.CAP_PROP_FPS) == 7.5
    frames = []
    while (step := video.read())[0]:
        frames.append(step[1])
    np.testing.assert_allclose([frame.mean() for frame in frames], np.arange(6) * 40, atol=4)
    # mp4v has sides of even length.
    assert abs(frames[0].shape[0] - size[0]) <= 1 and abs(frames[0].shape[1] - size[1]) <= 1


def test_aborted_and_empty_videos_leave_nothing(tmp_path):
    for pictures in (1, 0):
        with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 10) as writer:
            for _ in range(pictures):
                writer.add(np.zeros((32, 32, 3), np.uint8))
            raise KeyboardInterrupt
    with VideoWriter(tmp_path / "b.mp4", 10):
        pass
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_to(tmp_path):
    assert prepare_folder(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"output folder .*file.* cannot be written .*--out"):
            prepare_folder(path)


@pytest.mark.parametrize("name", ["pictures/a.jpg", "cat/a.jpg", "predictions.json", "a.png"])
def test_a_folder_of_others_is_refused_and_an_own_one_is_not(tmp_path, name):
    """Also a data set with one folder per class, in which pictures/ would be another class."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    first = name.partition("/")[0]
    for use in (prepare_folder, mark):
        with pytest.raises(UserError, match=f"{first} was not written by predict .*--out"):
            use(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [first]


def test_an_empty_folder_and_one_of_an_earlier_run_are_taken(tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    assert prepare_folder(tmp_path) == tmp_path
    mark(tmp_path)
    (tmp_path / "pictures").mkdir()
    mark(tmp_path)
    assert prepare_folder(tmp_path) == tmp_path
