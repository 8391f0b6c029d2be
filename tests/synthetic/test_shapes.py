# SPDX-License-Identifier: Apache-2.0
import json

import cv2
import numpy as np
import pytest
from helpers import digest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mmeformer.synthetic.shapes import CLASSES, draw_scene, outline, write_coco_dataset


def test_same_seed_same_data(tmp_path):
    a = write_coco_dataset(tmp_path / "a", 3, 2, 64, seed=1)
    b = write_coco_dataset(tmp_path / "b", 3, 2, 64, seed=1)
    c = write_coco_dataset(tmp_path / "c", 3, 2, 64, seed=2)
    assert digest(a) == digest(b) != digest(c)


def test_annotations_describe_the_pictures(tmp_path):
    root = write_coco_dataset(tmp_path / "d", 6, 2, 96)
    coco = COCO(str(root / "annotations/instances_train2017.json"))
    assert [cat["name"] for cat in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.imgs) == 6 and len(coco.anns) >= 6
    for image in coco.imgs.values():
        pixels = cv2.imread(str(root / "train2017" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        masks = [coco.annToMask(a) for a in coco.imgToAnns[image["id"]]]
        assert np.sum(masks, axis=0).max() == 1, "visible masks never overlap"
    for ann in coco.anns.values():
        mask = coco.annToMask(ann)
        ys, xs = np.nonzero(mask)
        x, y, w, h = ann["bbox"]
        assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert ann["area"] == mask.sum() == coco_mask.area(coco.annToRLE(ann))
        # One flat color plus noise: the mask is the shape that was painted.
        name = coco.imgs[ann["image_id"]]["file_name"]
        color = cv2.imread(str(root / "train2017" / name))[mask.astype(bool)].astype(float)
        assert np.abs(color - np.median(color, axis=0)).mean() < 10


def test_shapes_occlude():
    counts = []
    for index in range(40):
        _, instances = draw_scene(np.random.default_rng(index), 128)
        counts.append(len(instances))
        assert instances
    assert min(counts) < max(counts)


def test_outlines_fit_their_circle():
    for label in range(len(CLASSES)):
        points = outline(label, (10.0, 20.0), 5.0, 0.7)
        assert np.linalg.norm(points - [10, 20], axis=1).max() == pytest.approx(5.0)


def test_foreign_folder_is_left_alone(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    (root / "photo.png").write_text("precious")
    with pytest.raises(FileExistsError, match="mine exists and is not the requested data set"):
        write_coco_dataset(root, 1, 1, 64)
    assert (root / "photo.png").read_text() == "precious"


def test_second_call_writes_nothing(tmp_path):
    root = write_coco_dataset(tmp_path / "e", 1, 1, 64)
    marker = root / "recipe.json"
    assert json.loads(marker.read_text())["size"] == 64
    before = marker.stat().st_mtime_ns
    assert write_coco_dataset(tmp_path / "e", 1, 1, 64) == root
    assert marker.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [root]
