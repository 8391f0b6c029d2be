# SPDX-License-Identifier: Apache-2.0
"""Every format: known labels are read back exactly, and bad files are named with their place."""

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path

import cv2
import labeled_sets as sets
import numpy as np
import pytest
import yaml
from PIL import Image

from mmeformer.errors import UserError
from mmeformer.formats import folders, masks
from mmeformer.formats.find import read_folder, recognize
from mmeformer.formats.tree import Options, Tree, split_word
from mmeformer.labeled import BOXES, CORNERS, FOLDERS, MASKS, POLYGONS, decode_rle

SPLIT = dict.fromkeys(sets.NAMES[:4], "train") | dict.fromkeys(sets.NAMES[4:], "val")


def read(root, **options):
    return read_folder(root, Options(**options))


def by_name(data):
    return {image.path.stem: image for image in data.images}


def assert_as_written(data, kind, *, tolerance=1e-4, splits=None):
    """All images, classes and boxes are those of :mod:`labeled_sets`."""
    assert data.kind == kind and not data.findings
    found = by_name(data)
    assert sorted(found) == list(sets.NAMES)
    for name, image in found.items():
        assert (image.width, image.height) == (sets.WIDTH, sets.HEIGHT)
        assert [data.classes[item.label] for item in image.objects] == [
            sets.CLASSES[label] for label in sets.labels(name)
        ]
        boxes = [item.box for item in image.objects]
        np.testing.assert_allclose(boxes, sets.upright(name), atol=tolerance)
        if splits is not None:
            assert image.split == splits[name]


def list_images(root):
    """Name the images of each split of a YOLO folder in a file, one path per line."""
    content = yaml.safe_load((root / "data.yaml").read_text())
    for split in ("train", "val"):
        paths = sorted((root / "images" / split).iterdir())
        (root / f"{split}.txt").write_text("".join(f"./images/{split}/{p.name}\n" for p in paths))
        content[split] = f"{split}.txt"
    (root / "data.yaml").write_text(yaml.safe_dump(content))


class TestCoco:
    def test_polygons(self, tmp_path):
        sets.write_coco(tmp_path)
        data = read(tmp_path)
        assert_as_written(data, POLYGONS)
        for name, image in by_name(data).items():
            for index, item in enumerate(image.objects):
                np.testing.assert_allclose(
                    item.polygons, [sets.outline(name, index).ravel()], atol=1e-9
                )

    def test_run_lengths(self, tmp_path):
        sets.write_coco(tmp_path, masks="rle")
        data = read(tmp_path)
        assert_as_written(data, POLYGONS)
        for name, image in by_name(data).items():
            for index, item in enumerate(image.objects):
                np.testing.assert_array_equal(decode_rle(item.rle), sets.filled(name, index))

    def test_boxes_only(self, tmp_path):
        sets.write_coco(tmp_path, masks="none")
        assert_as_written(read(tmp_path), BOXES)

    def test_an_only_image_with_an_unused_class(self, tmp_path):
        """It is there twice, and its labels follow the classes that are left once."""
        Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
        content = dict(
            images=[dict(id=1, file_name="a.png", width=40, height=30)],
            categories=[dict(id=number, name=name) for number, name in enumerate("abcd")],
            annotations=[
                dict(id=n, image_id=1, category_id=n, bbox=[n, 2, 9, 9], area=81, iscrowd=0)
                for n in (1, 3)
            ],
        )
        (tmp_path / "labels.json").write_text(json.dumps(content))
        data = read(tmp_path)
        assert data.classes == ("b", "d") and [i.split for i in data.images] == ["train", "val"]
        assert [[item.label for item in image.objects] for image in data.images] == [[0, 1]] * 2

    def test_roboflow(self, tmp_path):
        """Images beside the JSON of each split, and a root category without objects."""
        root = dict(id=0, name="things", supercategory="none")
        for split, names in (("train", sets.NAMES[:4]), ("valid", sets.NAMES[4:])):
            file = sets.write_coco(
                tmp_path / split,
                names=names,
                images=".",
                file="_annotations.coco.json",
                more_categories=[root],
            )
            content = json.loads(file.read_text())
            for category in content["categories"][1:]:
                category["supercategory"] = "things"
            file.write_text(json.dumps(content))
        data = read(tmp_path)
        assert data.classes == sets.CLASSES
        assert_as_written(data, POLYGONS, splits=SPLIT)

    def test_cvat(self, tmp_path):
        sets.write_coco(tmp_path, file="annotations/instances_default.json")
        assert_as_written(read(tmp_path), POLYGONS)

    def test_label_studio(self, tmp_path):
        """Ids from 0, paths of another machine, sizes left out, boxes without masks."""
        file = sets.write_coco(
            tmp_path, file="result.json", prefix="..\\..\\upload\\1\\", masks="", first_category=0
        )
        content = json.loads(file.read_text())
        for image in content["images"]:
            del image["width"], image["height"]
        file.write_text(json.dumps(content))
        assert_as_written(read(tmp_path), BOXES)

    def test_images_outside_of_the_folder_are_not_read(self, tmp_path):
        """A file from elsewhere names what it likes."""
        sets.write_coco(tmp_path / "data", names=sets.NAMES[:2])
        sets.write_images(tmp_path, ["egg"])
        file = tmp_path / "data" / "labels.json"
        file.write_text(file.read_text().replace("apple.png", "../egg.png"))
        with pytest.raises(UserError, match=r"image \.\./egg.png is not below"):
            read(tmp_path / "data")

    def test_equal_names_in_two_splits(self, tmp_path):
        """COCO's own layout: the file of each split means the image of that split."""
        for split in ("train2017", "val2017"):
            sets.write_coco(
                tmp_path,
                names=sets.NAMES[:2],
                images=split,
                file=f"annotations/instances_{split}.json",
            )
        data = read(tmp_path)
        assert [image.path.parent.name for image in data.of_split("train")] == ["train2017"] * 2
        assert [image.path.parent.name for image in data.of_split("val")] == ["val2017"] * 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c["annotations"][3].update(bbox=[1, 2, "x", 4]), r"annotations\[3\].*bbox"),
            (lambda c: c["annotations"][2].update(category_id=9), "category_id 9"),
            (lambda c: c["annotations"][2].update(bbox=[900, 9, 5, 5]), "lies outside its image"),
            (lambda c: c["images"][1].update(file_name="gone.png"), "gone.png is not below"),
            (lambda c: c["images"][0].update(width=50), "is 64 x 48 px, but its labels are for 50"),
        ],
    )
    def test_bad_entries(self, tmp_path, change, message):
        file = sets.write_coco(tmp_path)
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path)
        assert str(file) in str(error.value) or "apple.png" in str(error.value)
        left = read_folder(tmp_path, Options(), skip_bad=True)
        assert 0 < sum(len(image.objects) for image in left.images) < 12
        assert left.findings

    def test_captions_and_keypoints_beside_instances(self, tmp_path):
        """COCO's own folder: captions are no objects, and people with keypoints are there once."""
        for split, names in (("train2017", sets.NAMES[:4]), ("val2017", sets.NAMES[4:])):
            folder = tmp_path / "annotations"
            file = sets.write_coco(
                tmp_path, names=names, images=split, file=f"annotations/instances_{split}.json"
            )
            content = json.loads(file.read_text())
            boats = [
                dict(entry, keypoints=[9, 9, 2], num_keypoints=1)
                for entry in content["annotations"]
                if entry["category_id"] == 1
            ]
            keypoints = dict(content, annotations=boats, categories=content["categories"][:1])
            (folder / f"person_keypoints_{split}.json").write_text(json.dumps(keypoints))
            captions = dict(content, annotations=[dict(id=1, image_id=0, caption="a boat")])
            del captions["categories"]
            (folder / f"captions_{split}.json").write_text(json.dumps(captions))
        data = read(tmp_path)
        assert_as_written(data, POLYGONS, splits=SPLIT)
        assert data.notes == [
            "no classes and boxes (captions, for example), so not read: "
            "annotations/captions_train2017.json, annotations/captions_val2017.json",
            "6 objects are repeated, and count once: annotations/instances_train2017.json, "
            "annotations/instances_val2017.json, annotations/person_keypoints_train2017.json, "
            "annotations/person_keypoints_val2017.json",
        ]

    def test_captions_alone_are_no_labels(self, tmp_path):
        file = sets.write_coco(tmp_path)
        content = json.loads(file.read_text())
        content["annotations"] = [dict(id=1, image_id=0, caption="a boat")]
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match="no labels that are known"):
            read(tmp_path)

    def test_equal_objects_of_one_image_are_two_but_count_once_in_two_entries(self, tmp_path):
        file = sets.write_coco(tmp_path, names=sets.NAMES[:2])
        content = json.loads(file.read_text())
        first, bread = content["annotations"][0], content["annotations"][2]
        content["images"].append(dict(content["images"][1], id=7))
        content["annotations"] += [dict(first, id=8), dict(bread, id=9, image_id=7)]
        file.write_text(json.dumps(content))
        data = read(tmp_path)
        counts = {name: len(image.objects) for name, image in by_name(data).items()}
        assert counts == {"apple": 3, "bread": 2}
        assert "1 objects are repeated, and count once: labels.json" in data.notes

    def test_file_of_all_beside_files_of_splits(self, tmp_path):
        for file, names in (
            ("all.json", sets.NAMES),
            ("train.json", sets.NAMES[:4]),
            ("val.json", sets.NAMES[4:]),
        ):
            sets.write_coco(tmp_path, names=names, file=file)
        data = read(tmp_path)
        assert_as_written(data, POLYGONS, splits=SPLIT)
        assert "12 objects are repeated, and count once: all.json, train.json, val.json" in (
            data.notes
        )

    def test_images_of_two_splits(self, tmp_path):
        sets.write_coco(tmp_path, names=sets.NAMES[:5], file="train.json")
        file = sets.write_coco(tmp_path, names=sets.NAMES[3:], file="val.json")
        message = (
            f"{file}: 2 images are for val here and for train in train.json, such as "
            "images/date.png; remove them from one of the two files"
        )
        with pytest.raises(UserError, match=message):
            read(tmp_path)
        left = read_folder(tmp_path, Options(), skip_bad=True)
        assert {name: image.split for name, image in by_name(left).items()} == {
            "apple": "train",
            "bread": "train",
            "cheese": "train",
            "fig": "val",
        }

    def test_repeated_ids(self, tmp_path):
        """Nobody knows which image, or which class, their annotations are of."""
        file = sets.write_coco(tmp_path)
        content = json.loads(file.read_text())
        content["images"][3]["id"] = 2
        for entry in content["annotations"]:
            entry["image_id"] = {3: 2}.get(entry["image_id"], entry["image_id"])
        content["categories"] += [dict(id=5, name="cat"), dict(id=5, name="dog")]
        content["annotations"][0]["category_id"] = 5
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"two entries \(image\) have the id 2"):
            read(tmp_path)
        left = read_folder(tmp_path, Options(), skip_bad=True)
        counts = {name: len(image.objects) for name, image in by_name(left).items()}
        assert counts == {"apple": 1, "bread": 2, "egg": 2, "fig": 2}
        assert left.classes == sets.CLASSES
        assert left.notes[:2] == [
            "labels.json: several images have the same id, so they and their annotations are left "
            "out: ['2']",
            "labels.json: several classes have the same id, so they and their annotations are left "
            "out: ['5']",
        ]
        # The same, if one of the two images is missing.
        (tmp_path / "images" / "date.png").unlink()
        left = read_folder(tmp_path, Options(), skip_bad=True)
        assert sorted(by_name(left)) == ["apple", "bread", "egg", "fig"]

    def test_names_of_one_image_in_two_folders_of_which_one_is_missing(self, tmp_path):
        """The objects of the missing image are not those of the other."""
        file = sets.write_coco(tmp_path, images="images/north")
        content = json.loads(file.read_text())
        for image in content["images"]:
            image["file_name"] = "north/" + image["file_name"]
        content["images"][0]["file_name"] = "south/bread.png"
        file.write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert (
            f"{file}: ['north/bread.png', 'south/bread.png'] would all be images/north/bread.png; "
            "add the images that are missing" in str(error.value)
        )
        left = read_folder(tmp_path, Options(), skip_bad=True)
        assert sorted(by_name(left)) == list(sets.NAMES[2:])

    def test_sizes_that_are_left_out_are_those_of_the_images(self, tmp_path):
        """So boxes outside are found, and run lengths fit."""
        file = sets.write_coco(tmp_path, masks="rle")
        content = json.loads(file.read_text())
        for image in content["images"]:
            del image["width"], image["height"]
        file.write_text(json.dumps(content))
        assert_as_written(read(tmp_path), POLYGONS)
        content["annotations"][2]["bbox"] = [64, 9, 5, 5]
        content["annotations"][4]["bbox"] = [9, 9, 0, 5]
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match="2 errors in the labels") as error:
            read(tmp_path)
        assert f"{file}: annotation 2 (images/bread.png)" in str(error.value)
        assert f"{file}: annotation 4 (images/cheese.png)" in str(error.value)
        left = read_folder(tmp_path, Options(), skip_bad=True)
        assert sum(len(image.objects) for image in left.images) == 10

    def test_second_file_for_images_of_another_size(self, tmp_path):
        sets.write_coco(tmp_path, names=sets.NAMES[:1], file="a.json")
        file = sets.write_coco(tmp_path, file="b.json")
        content = json.loads(file.read_text())
        content["images"][0].update(width=128, height=96)
        content["annotations"][0]["bbox"] = [70, 50, 20, 20]
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"are for 128 x 96 px \(b.json\)"):
            read(tmp_path)
        left = read_folder(tmp_path, Options(), skip_bad=True)
        assert_as_written(dataclasses.replace(left, findings=[]), POLYGONS)

    def test_masks_of_bad_objects(self, tmp_path):
        """With masks they are errors; where masks are not learned, the boxes stay."""
        file = sets.write_coco(tmp_path, masks="rle")
        content = json.loads(file.read_text())
        content["annotations"][0]["segmentation"]["size"] = [sets.WIDTH, sets.HEIGHT]
        content["annotations"][2]["segmentation"] = [[-500, 0, 9, 0, 9, 9]]
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match="2 errors in the labels"):
            read(tmp_path)
        left = read_folder(tmp_path, Options(), skip_bad=True)
        assert left.kind == POLYGONS and sum(len(image.objects) for image in left.images) == 10
        content["annotations"][4]["segmentation"] = []
        file.write_text(json.dumps(content))
        data = read(tmp_path)
        assert_as_written(data, BOXES)
        assert "3 of 12 objects have a box but no mask" in data.notes[0]

    def test_damaged_file(self, tmp_path):
        file = sets.write_coco(tmp_path, file="instances_train.json")
        file.write_text(file.read_text()[:-30])
        with pytest.raises(UserError, match="instances_train.json is not COCO JSON"):
            read(tmp_path)


class TestYolo:
    @pytest.mark.parametrize("kind", ["detect", "segment", "obb"])
    def test_read_back(self, tmp_path, kind):
        data = read(sets.write_yolo(tmp_path, kind))
        expected = dict(detect=BOXES, segment=POLYGONS, obb=CORNERS)[kind]
        assert_as_written(data, expected, splits=SPLIT)
        for name, image in by_name(data).items():
            if kind == "obb":
                found = [item.quadrilateral() for item in image.objects]
                np.testing.assert_allclose(found, sets.quadrilaterals(name), atol=1e-4)

    def test_without_settings(self, tmp_path):
        sets.write_yolo(tmp_path, yaml_file=False)
        assert read(tmp_path).classes == ("class_0", "class_1")
        assert read(tmp_path, classes=sets.CLASSES).classes == sets.CLASSES
        (tmp_path / "classes.txt").write_text("boat\ncar\n")
        assert_as_written(read(tmp_path), BOXES, splits=SPLIT)

    def test_lists_of_images(self, tmp_path):
        """``train: train.txt`` with one path per line, as Darknet and Ultralytics write."""
        sets.write_yolo(tmp_path)
        list_images(tmp_path)
        assert_as_written(read(tmp_path), BOXES, splits=SPLIT)

    def test_keypoints_are_no_outlines(self, tmp_path):
        sets.write_yolo(tmp_path)
        settings = tmp_path / "data.yaml"
        settings.write_text(settings.read_text() + "kpt_shape: [2, 2]\n")
        for path in (tmp_path / "labels").rglob("*.txt"):
            lines = path.read_text().splitlines()
            path.write_text("".join(f"{line} 0.5 0.5 0.6 0.6\n" for line in lines))
        data = read(tmp_path)
        assert_as_written(data, BOXES, splits=SPLIT)
        assert "keypoints are left out" in data.notes[0]

    def test_images_without_labels_have_no_objects(self, tmp_path):
        sets.write_yolo(tmp_path)
        for name in ("train/apple", "train/date", "val/egg"):
            (tmp_path / "labels" / f"{name}.txt").unlink()
        data = read(tmp_path)
        assert by_name(data)["apple"].objects == []
        assert data.notes == [
            "2 of 4 train and 1 of 2 val images have no label file (background), such as "
            f"{tmp_path}/images/train/apple.jpg"
        ]

    def test_labels_of_other_names(self, tmp_path):
        """Both sides are named; other text files and labels of images left out do not count."""
        sets.write_yolo(tmp_path)
        (tmp_path / "labels/train/apple.txt").rename(tmp_path / "labels/train/ap_ple.txt")
        (tmp_path / "README.txt").write_text("0 objects\n")
        (tmp_path / "images/other").mkdir()
        (tmp_path / "images/val/fig.jpg").rename(tmp_path / "images/other/fig.jpg")
        (tmp_path / "labels/other").mkdir()
        (tmp_path / "labels/val/fig.txt").rename(tmp_path / "labels/other/fig.txt")
        lost = f"1 label files have no image, such as {tmp_path}/labels/train/ap_ple.txt"
        assert read(tmp_path).notes == [
            "1 of 4 train images have no label file (background), such as "
            f"{tmp_path}/images/train/apple.jpg",
            f"1 images are not in data.yaml and left out, such as {tmp_path}/images/other/fig.jpg",
            lost,
        ]
        (tmp_path / "data.yaml").unlink()
        (tmp_path / "classes.txt").write_text("boat\ncar\n")
        bare = f"left out, such as {tmp_path}/images/train/apple.jpg"
        assert read(tmp_path).notes[:2] == [f"1 images have no label file and are {bare}", lost]

    @pytest.mark.parametrize("kind", ["segment", "obb"])
    def test_one_box_among_outlines(self, tmp_path, kind):
        sets.write_yolo(tmp_path, kind)
        assert not read(tmp_path).notes
        path = tmp_path / "labels/train/cheese.txt"
        path.write_text(path.read_text() + "0 0.5 0.5 0.2 0.2\n")
        data = read(tmp_path)
        assert data.kind == BOXES and data.notes == [
            f"1 of 13 objects have a box but no outline, the first in {path} line 3: outlines are "
            "not learned; to keep them, remove these boxes or draw their outlines"
        ]

    @pytest.mark.parametrize("test", ["../test/images", "test.txt"])
    def test_exports_without_their_test_images(self, tmp_path, test):
        """As of Roboflow, and of COCO in Ultralytics' layout."""
        sets.write_yolo(tmp_path)
        settings = tmp_path / "data.yaml"
        text = settings.read_text()
        settings.write_text(f"{text}test: {test}\n")
        missing = f"{test} does not exist below {tmp_path}"
        if test == "test.txt":
            (tmp_path / test).write_text("./images/test2017/1.jpg\n./images/test2017/2.jpg\n")
            missing = f"{test} lists 2 images that do not exist, such as ./images/test2017/1.jpg"
        data = read(tmp_path)
        assert_as_written(data, BOXES, splits=SPLIT)
        assert data.notes == [f"{settings}: test: {missing}: no test images from there"]
        settings.write_text(text.replace("images/val", test))
        with pytest.raises(UserError, match=re.escape(f"val: {missing}; correct it")):
            read(tmp_path)

    def test_four_points(self, tmp_path):
        """Corners without right angles: outlines or rotated boxes? The task answers."""
        sets.write_yolo(tmp_path, "obb")
        for path in (tmp_path / "labels" / "train").iterdir():
            path.write_text("0 0.1 0.1 0.9 0.2 0.8 0.9 0.1 0.7\n")
        assert read(tmp_path).kind == CORNERS  # a half of them
        for path in (tmp_path / "labels" / "val").iterdir():
            path.write_text("0 0.1 0.1 0.9 0.2 0.8 0.9 0.1 0.7\n")
        with pytest.raises(UserError, match="four points, but only 0 of 6.*--task"):
            read(tmp_path)
        assert read(tmp_path, corners=True).kind == CORNERS
        assert read(tmp_path, corners=False).kind == POLYGONS

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("2 0.5 0.5 0.1 0.1", "line 1: the class is 2, but the names go from 0 to 1"),
            ("0 0.5 0.5 0.1", "line 1: has 3 numbers"),
            ("0 32 24 10 10", "line 1: numbers must be shares"),
            ("0 0.5 0.5 0 0.1", "line 1: the box of 0 x 4.8 px is less than a pixel"),
            ("boat 0.5 0.5 0.1 0.1", "line 1: must be numbers"),
        ],
    )
    def test_bad_lines(self, tmp_path, line, message):
        sets.write_yolo(tmp_path)
        path = tmp_path / "labels" / "train" / "apple.txt"
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=f"{path}: {message}"):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("train: images/train\nnames: [boat\n", r"data.yaml line \d+ is not YAML"),
            ("train: gone\nnames: [boat, car]\n", "data.yaml: train: gone does not exist"),
            ("train: images/train\nnames: {1: boat, 2: car}\n", "data.yaml: names must be a list"),
        ],
    )
    def test_bad_settings(self, tmp_path, text, message):
        sets.write_yolo(tmp_path)
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read(tmp_path)

    def test_images_of_two_splits_train(self, tmp_path):
        sets.write_yolo(tmp_path)
        settings = tmp_path / "data.yaml"
        settings.write_text(settings.read_text().replace("images/val", "val.txt"))
        (tmp_path / "val.txt").write_text("".join(f"{name}.jpg\n" for name in sets.NAMES[2:]))
        data = read(tmp_path)
        assert_as_written(data, BOXES, splits=SPLIT)
        assert data.notes == [
            f"{settings}: val: 2 of its images are for train too, and count there, such as "
            f"{tmp_path}/images/train/cheese.jpg"
        ]


def in_capitals(root, *suffixes):
    """Rename files, such as ``1.txt`` to ``1.TXT``."""
    for suffix in suffixes:
        for path in sorted(root.rglob(f"*{suffix}")):
            path.rename(path.with_suffix(suffix.upper()))
    return root


class TestCapitalSuffixes:
    """As of cameras, and of tools for Windows."""

    @pytest.mark.parametrize(
        "suffixes", [(".txt",), (".jpg",), (".txt", ".jpg"), (".txt", ".jpg", ".yaml")]
    )
    def test_yolo(self, tmp_path, suffixes):
        data = read(in_capitals(sets.write_yolo(tmp_path), *suffixes))
        assert_as_written(data, BOXES, splits=SPLIT)
        assert not data.notes

    def test_yolo_without_settings(self, tmp_path):
        sets.write_yolo(tmp_path, yaml_file=False)
        for name in ("images", "labels"):
            (tmp_path / name).rename(tmp_path / name.capitalize())
        (tmp_path / "Classes.txt").write_text("boat\ncar\n")
        data = read(in_capitals(tmp_path, ".txt"))
        assert_as_written(data, BOXES, splits=SPLIT)
        assert not data.notes

    def test_lists_of_yolo(self, tmp_path):
        """The names in the lists have the suffix before."""
        sets.write_yolo(tmp_path)
        list_images(tmp_path)
        assert_as_written(read(in_capitals(tmp_path, ".jpg")), BOXES, splits=SPLIT)

    @pytest.mark.parametrize(
        ("write", "suffixes", "kind", "splits"),
        [
            (sets.write_voc, (".xml", ".jpg", ".txt"), BOXES, SPLIT),
            (sets.write_labelme, (".json", ".jpg"), POLYGONS, None),
            (sets.write_dota, (".txt", ".png"), CORNERS, SPLIT),
            (sets.write_coco, (".json", ".png"), POLYGONS, None),
        ],
    )
    def test_others(self, tmp_path, write, suffixes, kind, splits):
        write(tmp_path)
        for one in [*suffixes, ""]:
            data = read(in_capitals(tmp_path, one) if one else tmp_path)
            assert_as_written(data, kind, tolerance=0.011, splits=splits)

    def test_masks(self, tmp_path):
        sets.write_masks(tmp_path)
        (tmp_path / "Labels.TXT").write_text("sea\nboat\ncar\n")
        data = read(in_capitals(tmp_path, ".png", ".jpg"))
        assert data.classes == ("sea", *sets.CLASSES) and len(data.images) == 6
        assert all(image.mask.suffix == ".PNG" for image in data.images)

    @pytest.mark.parametrize("ending", ["_MASK", "-Label", "_GT"])
    def test_endings_of_masks(self, tmp_path, ending):
        sets.write_masks(tmp_path)
        for path in sorted((tmp_path / "masks").rglob("*.png")):
            path.rename(tmp_path / "images" / path.parent.name / f"{path.stem}{ending}.PNG")
        found = {name: image.mask.name for name, image in by_name(read(tmp_path)).items()}
        assert found == {name: f"{name}{ending}.PNG" for name in sets.NAMES}

    def test_class_folders(self, tmp_path):
        data = read(in_capitals(sets.write_folders(tmp_path), ".jpg"))
        assert [by_name(data)[name].label for name in sets.NAMES] == [0, 1, 0, 1, 0, 1]

    def test_images_that_differ_in_their_suffix_alone(self, tmp_path):
        """Labels name the one that is written alike."""
        sets.write_coco(tmp_path, names=sets.NAMES[:2])
        for name in sets.NAMES[:2]:
            path = tmp_path / "images" / f"{name}.png"
            path.with_name(f"{name}.PNG").write_bytes(path.read_bytes())
        if len(list((tmp_path / "images").iterdir())) < 4:
            pytest.skip("this file system does not tell capital letters")
        assert {image.path.suffix for image in read(tmp_path).images} == {".png"}


def test_photos_that_are_shown_turned(tmp_path):
    """EXIF 6: stored lying, shown upright. Shares are of the image as it is shown."""
    (tmp_path / "labels").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "images").mkdir()
    for name in ("one", "two"):
        photo = Image.new("RGB", (80, 40))
        photo.save(tmp_path / "images" / f"{name}.jpg", exif=exif)
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.25 0.5 0.25\n")
    for image in read(tmp_path).images:
        assert (image.width, image.height) == (40, 80)
        assert image.objects[0].box == (10, 10, 20, 20)


class TestVoc:
    def test_boxes(self, tmp_path):
        assert_as_written(read(sets.write_voc(tmp_path)), BOXES, splits=SPLIT)

    def test_pixels_of_voc_itself_count_from_1(self, tmp_path):
        data = read(sets.write_voc(tmp_path, database="The VOC2007 Database"))
        assert_as_written(data, BOXES, splits=SPLIT)

    def test_rotated(self, tmp_path):
        data = read(sets.write_voc(tmp_path, "rotated"))
        assert_as_written(data, CORNERS, splits=SPLIT)
        for name, image in by_name(data).items():
            found = [item.quadrilateral() for item in image.objects]
            np.testing.assert_allclose(found, sets.quadrilaterals(name), atol=1e-6)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("<bndbox>", "<box>", "cannot be used: mismatched tag: line 1"),
            ("<name>boat</name>", "<name />", "object 1 has no name"),
            ("<ymax>", "<ymax>x", r"object 1 \(boat\): bndbox has ymax 'x"),
            ("<width>64</width>", "<width>99</width>", "is 64 x 48 px, but its labels are for 99"),
            ("apple.jpg", "gone.jpg", "image gone.jpg is not below"),
        ],
    )
    def test_bad_files(self, tmp_path, old, new, message):
        sets.write_voc(tmp_path)
        path = tmp_path / "Annotations" / "apple.xml"
        if "gone" in new:
            (tmp_path / "JPEGImages" / "apple.jpg").unlink()
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path)
        assert "apple.xml" in str(error.value) or "apple.jpg" in str(error.value)


class TestLabelMe:
    @pytest.mark.parametrize(
        ("shape", "kind"), [("polygon", POLYGONS), ("rectangle", BOXES), ("rotation", CORNERS)]
    )
    def test_read_back(self, tmp_path, shape, kind):
        data = read(sets.write_labelme(tmp_path, shape))
        assert_as_written(data, kind)

    def test_circles_groups_and_lines(self, tmp_path):
        sets.write_labelme(tmp_path)
        path = tmp_path / "apple.json"
        content = json.loads(path.read_text())
        square = [[2, 2], [6, 2], [6, 6], [2, 6]]
        content["shapes"] = [
            dict(label="car", points=[[30, 20], [33, 24]], shape_type="circle"),
            dict(label="boat", points=square, shape_type="polygon", group_id=7),
            dict(label="boat", points=[[9, 9], [12, 9], [12, 14]], shape_type=None, group_id=7),
            dict(label="car", points=[[1, 1], [5, 5]], shape_type="line"),
        ]
        path.write_text(json.dumps(content))
        data = read(tmp_path)
        circle, group = by_name(data)["apple"].objects
        np.testing.assert_allclose(circle.box, (25, 15, 10, 10), atol=0.05)
        assert group.box == (2, 2, 10, 12) and len(group.polygons) == 2
        (finding,) = data.findings
        assert finding.path == str(path) and "shape 4 (car) is a line" in finding.message

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            (dict(label="", points=[[1, 1]] * 3), "shape 1 has no label"),
            (dict(label="car", points=[[1, 1], [2, 2]]), r"shape 1 \(car\): a polygon with 2"),
            (dict(label="car", points=[[1, None]] * 3), r"shape 1 \(car\): points must be pairs"),
        ],
    )
    def test_bad_shapes(self, tmp_path, shape, message):
        sets.write_labelme(tmp_path)
        path = tmp_path / "apple.json"
        path.write_text(json.dumps(dict(imagePath="apple.jpg", shapes=[shape])))
        with pytest.raises(UserError, match=f"{path}: cannot be used: {message}"):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("corner", "size", "message"),
        [
            ((70, 9), (64, 48), "the mask lies outside its image of 64 x 48 px"),
            ((5, 5), (0, 0), "the mask lies outside its image of 0 x 0 px"),
            ((63, 9), (64, 48), "the part of the mask in its image is empty"),
            ((60, 9), (64, 48), None),
        ],
    )
    def test_masks_beyond_the_image(self, tmp_path, corner, size, message):
        sets.write_labelme(tmp_path)
        path = tmp_path / "apple.json"
        mask = np.zeros((4, 4), np.uint8)
        mask[1:3, 2] = 1
        text = base64.b64encode(cv2.imencode(".png", mask)[1].tobytes()).decode()
        points = [list(corner), [corner[0] + 3, corner[1] + 3]]
        shape = dict(label="car", points=points, shape_type="mask", mask=text)
        content = dict(imagePath="apple.jpg", shapes=[shape])
        content.update(imageWidth=size[0], imageHeight=size[1])
        path.write_text(json.dumps(content))
        if message is None:
            (item,) = by_name(read(tmp_path))["apple"].objects
            assert item.box == (62, 10, 1, 2)
            return
        with pytest.raises(UserError, match=rf"{path}: cannot be used: shape 1 \(car\): {message}"):
            read(tmp_path)

    def test_renamed_files_with_old_paths(self, tmp_path):
        """Their labels would be those of the next image, but for the last one."""
        sets.write_labelme(tmp_path)
        for path in (tmp_path / "apple.json", tmp_path / "apple.jpg"):
            path.unlink()
        for old, new in zip(sets.NAMES[1:], sets.NAMES, strict=False):
            for suffix in ("json", "jpg"):
                (tmp_path / f"{old}.{suffix}").rename(tmp_path / f"{new}.{suffix}")
        path, image = tmp_path / "apple.json", tmp_path / "apple.jpg"
        with pytest.raises(UserError, match="4 errors in the labels") as error:
            read(tmp_path)
        assert (
            f"{path}: cannot be used: it is named like {image}, but imagePath is "
            "..\\photos\\bread.jpg; rename it, or correct imagePath"
        ) in str(error.value)

    def test_other_names_than_those_of_images(self, tmp_path):
        sets.write_labelme(tmp_path)
        for name in sets.NAMES:
            (tmp_path / f"{name}.json").rename(tmp_path / f"labels of {name}.json")
        assert_as_written(read(tmp_path, format="labelme"), POLYGONS)


class TestDota:
    @pytest.mark.parametrize("splits", [True, False])
    def test_read_back(self, tmp_path, splits):
        data = read(sets.write_dota(tmp_path, splits=splits))
        # Label files have hundredths.
        assert_as_written(data, CORNERS, tolerance=0.011, splits=SPLIT if splits else None)
        assert [item.difficult for item in by_name(data)["fig"].objects] == [0, 1]

    def test_bad_line(self, tmp_path):
        sets.write_dota(tmp_path)
        path = tmp_path / "train" / "labelTxt" / "apple.txt"
        path.write_text(path.read_text() + "1 2 3 4 5 6 7 x boat 0\n")
        with pytest.raises(UserError, match=f"{path}: .*line 5: .*must be numbers"):
            read(tmp_path)

    def test_what_has_no_partner_is_named(self, tmp_path):
        sets.write_dota(tmp_path)
        (tmp_path / "train/images/apple.png").unlink()
        (tmp_path / "train/labelTxt/bread.txt").unlink()
        data = read(tmp_path)
        assert sorted(by_name(data)) == list(sets.NAMES[2:])
        assert data.notes == [
            "1 images have no label file and are left out, such as train/images/bread.png",
            f"1 label files have no image, such as {tmp_path}/train/labelTxt/apple.txt",
        ]


def write_photos(folder, stems):
    folder.mkdir(parents=True, exist_ok=True)
    for stem in stems:
        Image.new("RGB", (16, 12)).save(folder / f"{stem}.jpg")


def write_named_alike(root, pattern, folders, labels):
    """Images 0 and 1 in each folder, each with one object of a class of its own.

    Args:
        pattern: path of an image's label file, with the class as ``{folder}`` and ``{stem}``.
        folders: of the images, by class.
        labels: text of the label file of a class and the name of its image.
    """
    for name, folder in folders.items():
        write_photos(root / folder, "01")
        for stem in "01":
            path = root / pattern.format(folder=name, stem=stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(labels(name, f"{stem}.jpg"))


def voc_text(name, file, more=""):
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    entry = f"<object><name>{name}</name>{box}</object>"
    return f"<annotation>{more}<filename>{file}</filename>{entry}</annotation>"


def labelme_text(name, file):
    shape = dict(label=name, points=[[1, 2], [9, 8]], shape_type="rectangle")
    return json.dumps(dict(imagePath=file, shapes=[shape]))


def dota_text(name, file):
    return f"1 2 9 2 9 8 1 8 {name} 0\n"


def class_by_image(data):
    """Name of the class of each image's only object, by the image's path below the root."""
    return {
        image.path.relative_to(data.root).as_posix(): data.classes[item.label]
        for image in data.images
        for item in image.objects
    }


LABEL_TEXTS = {"xml": voc_text, "json": labelme_text, "txt": dota_text}


@pytest.mark.parametrize("suffix", LABEL_TEXTS)
class TestImagesOfOneName:
    """Folders tell which of several images of one name is meant."""

    @pytest.mark.parametrize(
        ("images", "labels"),
        [
            ("JPEGImages/{}", "Annotations/{folder}"),
            ("{}/images", "{folder}/labels"),
            ("images/{}", "labels/{folder}/first"),
            ("{}", "{folder}"),
            ("pictures/{}/2024/raw", "notes/{folder}/2024"),
        ],
    )
    @pytest.mark.parametrize("names", [("train", "val"), ("camA", "camB"), ("a/b", "b/a", "b")])
    def test_folders(self, tmp_path, suffix, images, labels, names):
        places = {name: images.format(name) for name in names}
        pattern = f"{labels}/{{stem}}.{suffix}"
        write_named_alike(tmp_path, pattern, places, LABEL_TEXTS[suffix])
        data = read(tmp_path)
        assert class_by_image(data) == {
            f"{folder}/{stem}.jpg": name for name, folder in places.items() for stem in "01"
        }
        if names == ("train", "val"):
            assert all(data.classes[i.objects[0].label] == i.split for i in data.images)

    def test_splits_of_other_words(self, tmp_path, suffix):
        places = {"training": "photos_train", "valid": "photos_val"}
        pattern = f"labels_{{folder}}/{{stem}}.{suffix}"
        write_named_alike(tmp_path, pattern, places, LABEL_TEXTS[suffix])
        found = class_by_image(read(tmp_path))
        assert found["photos_train/0.jpg"] == "training" and found["photos_val/1.jpg"] == "valid"

    @pytest.mark.parametrize("side", ["images", "labels"])
    def test_splits_of_one_side(self, tmp_path, suffix, side):
        """Only the images, or only the label files, are in folders of splits."""
        for split, names in (("train", "abc"), ("val", "de")):
            folders = {
                part: f"{part}/{split}" if part == side else part for part in ("images", "labels")
            }
            write_photos(tmp_path / folders["images"], names)
            (tmp_path / folders["labels"]).mkdir(parents=True, exist_ok=True)
            for name in names:
                path = tmp_path / folders["labels"] / f"{name}.{suffix}"
                path.write_text(LABEL_TEXTS[suffix]("boat", f"{name}.jpg"))
        found = {name: image.split for name, image in by_name(read(tmp_path)).items()}
        assert found == dict(a="train", b="train", c="train", d="val", e="val")

    def test_two_label_files_of_one_image(self, tmp_path, suffix):
        write_named_alike(
            tmp_path, f"{{folder}}/{{stem}}.{suffix}", {"boat": "photos"}, LABEL_TEXTS[suffix]
        )
        path = tmp_path / "boat" / f"1.{suffix}"
        copy = tmp_path / "copy" / f"1.{suffix}"
        copy.parent.mkdir()
        copy.write_text(path.read_text())
        with pytest.raises(UserError, match="; remove one of them, or name the folders") as error:
            read(tmp_path)
        for each in (path, copy, tmp_path / "photos" / "1.jpg"):
            assert str(each) in str(error.value)
        (left,) = {image.path for image in read_folder(tmp_path, Options(), skip_bad=True).images}
        assert left == tmp_path / "photos" / "0.jpg"


@pytest.mark.parametrize(
    "more",
    [
        "<folder>{}</folder>",
        "<folder>images</folder><path>C:\\data\\{}\\0.jpg</path>",
        "<path>/photos/{}/new/0.jpg</path>",
    ],
)
def test_voc_tells_the_folder_of_its_image(tmp_path, more):
    """Of label files in one folder; the label file's own folders count more, if it has any."""
    for name in ("camA", "camB"):
        write_photos(tmp_path / "images" / name, "0")
        (tmp_path / f"{name}.xml").write_text(voc_text(name, "0.jpg", more.format(name)))
    expected = {f"images/{name}/0.jpg": name for name in ("camA", "camB")}
    assert class_by_image(read(tmp_path)) == expected
    for name in ("camA", "camB"):
        (tmp_path / "xml" / name).mkdir(parents=True)
        text = voc_text(name, "0.jpg", more.format("camA"))
        (tmp_path / "xml" / name / "0.xml").write_text(text)
        (tmp_path / f"{name}.xml").unlink()
    assert class_by_image(read(tmp_path)) == expected


def test_voc_boxes_are_not_those_of_masks(tmp_path):
    """Of one name in folders of which that of the masks comes first; no file name is given."""
    write_photos(tmp_path / "images", "01")
    for stem in "01":
        for folder, text in (("SegmentationClass", None), ("Annotations", voc_text("boat", ""))):
            (tmp_path / folder).mkdir(exist_ok=True)
            if text is None:
                Image.new("L", (16, 12)).save(tmp_path / folder / f"{stem}.png")
            else:
                (tmp_path / folder / f"{stem}.xml").write_text(text)
    data = read(tmp_path)
    assert class_by_image(data) == {"images/0.jpg": "boat", "images/1.jpg": "boat"}
    assert "left out" not in str(data.notes)


class TestMasks:
    def test_only_the_used_colors_of_a_palette_are_kept(self, tmp_path):
        image = Image.fromarray(np.array([[3, 3, 7]], np.uint8))
        image.putpalette([value for number in range(256) for value in (number, 0, 0)])
        image.save(tmp_path / "mask.png")
        assert masks._values(tmp_path / "mask.png").palette == {3: (3, 0, 0), 7: (7, 0, 0)}

    def assert_masks(self, data, classes, shift=0):
        assert data.kind == MASKS and data.classes == classes and not data.findings
        for name, image in by_name(data).items():
            expected = sets.mask_of(name).astype(int) - shift
            expected[(expected < 0) | (expected > 200)] = 255
            np.testing.assert_array_equal(data.read_mask(image.mask), expected)
            values, counts = np.unique(expected, return_counts=True)
            pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
            pixels.pop(255, None)
            assert image.pixels == pixels
            assert image.split == SPLIT[name]

    def test_numbers(self, tmp_path):
        data = read(sets.write_masks(tmp_path))
        self.assert_masks(data, ("background", "class_1", "class_2"))
        assert data.plain_masks and "--classes" in data.notes[0]
        data = read(tmp_path, classes=("sea", *sets.CLASSES))
        self.assert_masks(data, ("sea", *sets.CLASSES))

    def test_zero_has_no_name(self, tmp_path):
        """As in ADE20K: names for 1 and 2 only."""
        data = read(sets.write_masks(tmp_path), classes=sets.CLASSES)
        self.assert_masks(data, sets.CLASSES, shift=1)
        assert not data.plain_masks and "0 is not learned" in data.notes[0]

    @pytest.mark.parametrize("kind", ["palette", "colors"])
    def test_colors_with_a_legend(self, tmp_path, kind):
        sets.write_masks(tmp_path, kind)
        names = dict(zip(("sea", *sets.CLASSES, "void"), sets.COLORS.values(), strict=True))
        lines = [f"{name}:{','.join(map(str, color))}::" for name, color in names.items()]
        (tmp_path / "labelmap.txt").write_text("# label:color_rgb\n" + "\n".join(lines) + "\n")
        data = read(tmp_path)
        self.assert_masks(data, ("sea", *sets.CLASSES))
        assert data.palette == [sets.COLORS[label] for label in range(3)]

    @pytest.mark.parametrize(
        ("name", "form"),
        [
            ("class_dict.csv", "name,r,g,b\n{rows}"),
            ("colors.csv", "{rows}"),
            ("legend.json", "{json}"),
            ("label_colors.txt", "{camvid}"),
        ],
    )
    def test_legends(self, tmp_path, name, form):
        sets.write_masks(tmp_path / "data", "colors")
        named = dict(zip(("sea", *sets.CLASSES, "void"), sets.COLORS.values(), strict=True))
        rows = "".join(f"{key},{','.join(map(str, color))}\n" for key, color in named.items())
        camvid = "".join(f"{' '.join(map(str, color))}\t{key}\n" for key, color in named.items())
        text = form.format(rows=rows, camvid=camvid, json=json.dumps(named))
        (tmp_path / name).write_text(text)
        data = read(tmp_path / "data", legend=tmp_path / name)
        self.assert_masks(data, ("sea", *sets.CLASSES))

    def test_colors_without_a_legend(self, tmp_path):
        sets.write_masks(tmp_path, "colors")
        with pytest.raises(UserError, match=r"4 colors without names.*\(0, 0, 0\).*--legend"):
            read(tmp_path)
        legend = tmp_path / "legend.csv"
        legend.write_text("sea,0,0,0\nboat,200,30,40\n")
        with pytest.raises(UserError, match=r"apple.png: has colors that the legend lacks: \[\(20"):
            read(tmp_path, legend=legend)
        legend.write_text("sea,0,0,0\nboat,200,300,40\n")
        with pytest.raises(UserError, match=r"legend.csv line 2: .*from 0 to 255"):
            read(tmp_path, legend=legend)

    def test_black_and_white(self, tmp_path):
        sets.write_masks(tmp_path, values={1: 255, 2: 255})
        data = read(tmp_path)
        assert data.classes == ("background", "object") and not data.plain_masks
        mask = data.read_mask(by_name(data)["apple"].mask)
        expected = sets.mask_of("apple")
        np.testing.assert_array_equal(mask, expected > 0)

    @pytest.mark.parametrize(
        ("values", "middle"), [((0, 255), 128), ((255, 0), 128), ((1, 7), 4), ((0, 40), 20)]
    )
    @pytest.mark.parametrize("way", ["blurred", "resized", "antialiased"])
    def test_soft_edges(self, tmp_path, values, middle, way):
        """Their steps would be classes, and 255 unlabeled."""
        sets.write_masks(tmp_path)
        for path in sorted((tmp_path / "masks").rglob("*.png")):
            mask = np.full((48, 64), values[0], np.uint8)
            line = cv2.LINE_AA if way == "antialiased" else cv2.LINE_8
            cv2.circle(mask, (30, 25), 15, values[1], -1, line)
            if way == "blurred":
                mask = cv2.GaussianBlur(mask, (0, 0), 1.5)
            elif way == "resized":
                mask = cv2.resize(cv2.resize(mask, (43, 32)), (64, 48))
            Image.fromarray(mask).save(path)
        steps = rf"the masks have the values {min(values)} and {max(values)}, and \d+ between them"
        message = rf"{steps} at soft edges .in 6 masks, .*\.png.; threshold them at {middle}, "
        with pytest.raises(UserError, match=message):
            read(tmp_path)
        with pytest.raises(UserError, match=message):
            read(tmp_path, classes=("background", "object"))

    def test_one_soft_mask_among_others(self, tmp_path):
        sets.write_masks(tmp_path, values={1: 255, 2: 255})
        path = tmp_path / "masks" / "val" / "fig.png"
        Image.fromarray(cv2.GaussianBlur(np.array(Image.open(path)), (0, 0), 1)).save(path)
        with pytest.raises(UserError, match=f"soft edges .in 1 masks, such as {path}"):
            read(tmp_path)

    @pytest.mark.parametrize("ring", [1, 3])
    def test_small_objects_between_two_values_are_no_soft_edges(self, tmp_path, ring):
        """Most pixels are 0 or 255, others few: numbers with gaps, rings of 255 as in VOC."""
        sets.write_masks(tmp_path)
        for path in sorted((tmp_path / "masks").rglob("*.png")):
            mask = np.zeros((48, 64), np.uint8)
            for index, label in enumerate((3, 30, 90, 120, 200)):
                center = (6 + 12 * index, 24)
                cv2.circle(mask, center, 3 + ring, 255, -1)
                cv2.circle(mask, center, 3, label, -1)
            cv2.line(mask, (0, 5), (63, 5), 60, 1)
            Image.fromarray(mask).save(path)
        data = read(tmp_path)
        assert data.classes == tuple(f"value_{value}" for value in (0, 3, 30, 60, 90, 120, 200))
        assert sum(data.counts().values()) == sum(
            np.count_nonzero(np.array(Image.open(path)) != 255)
            for path in (tmp_path / "masks").rglob("*.png")
        )

    def test_border_class_of_a_trimap(self, tmp_path):
        """A line of 128 between 0 and 254 is a class."""
        sets.write_masks(tmp_path)
        for path in sorted((tmp_path / "masks").rglob("*.png")):
            mask = np.zeros((48, 64), np.uint8)
            cv2.circle(mask, (30, 25), 15, 254, -1)
            cv2.circle(mask, (30, 25), 15, 128, 1)
            Image.fromarray(mask).save(path)
        assert read(tmp_path).classes == ("value_0", "value_128", "value_254")

    def test_one_name(self, tmp_path):
        """What is not the class is the background."""
        for values in ({1: 255, 2: 255}, {1: 1, 2: 1}):
            root = tmp_path / str(values[1])
            data = read(sets.write_masks(root, values=values), classes=("boat",))
            assert data.classes == ("background", "boat")
            mask = data.read_mask(by_name(data)["apple"].mask)
            np.testing.assert_array_equal(mask[2:], sets.mask_of("apple")[2:] > 0)

    def test_cityscapes(self, tmp_path):
        """26 is car and 23 sky; what does not count becomes unlabeled."""
        sets.write_masks(tmp_path / "old", values={0: 23, 1: 26, 2: 9})
        for split, names in (("train", sets.NAMES[:4]), ("val", sets.NAMES[4:])):
            for name in names:
                for kind, folder, ending in (
                    ("images", "leftImg8bit", "_leftImg8bit.jpg"),
                    ("masks", "gtFine", "_gtFine_labelIds.png"),
                ):
                    suffix = Path(ending).suffix
                    target = tmp_path / "new" / folder / split / "city" / f"{name}{ending}"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / "old" / kind / split / f"{name}{suffix}").rename(target)
                color = target.with_name(f"{name}_gtFine_color.png")
                Image.new("RGB", (sets.WIDTH, sets.HEIGHT)).save(color)
        data = read(tmp_path / "new")
        assert data.classes[10] == "sky" and data.classes[13] == "car" and len(data.classes) == 19
        labels = {label for image in data.images for label in image.pixels}
        assert labels == {10, 13} and len(data.images) == 6

    def test_pascal_voc(self, tmp_path):
        """Names by the folder SegmentationClass, splits by ImageSets."""
        sets.write_masks(tmp_path / "old", "palette")
        for kind, folder in (("images", "JPEGImages"), ("masks", "SegmentationClass")):
            (tmp_path / "new" / folder).mkdir(parents=True)
            for path in sorted((tmp_path / "old" / kind).rglob("*.*")):
                path.rename(tmp_path / "new" / folder / path.name)
        lists = tmp_path / "new" / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("\n".join(sets.NAMES[:4]))
        (lists / "val.txt").write_text("\n".join(sets.NAMES[4:]))
        data = read(tmp_path / "new")
        assert data.classes[:3] == ("background", "aeroplane", "bicycle")
        assert {image.path.stem: image.split for image in data.images} == SPLIT

    @pytest.mark.parametrize("images", ["JPEGImages", "images"])
    def test_masks_of_objects_are_no_images(self, tmp_path, images):
        """Pascal VOC has masks of one name in two folders."""
        sets.write_masks(tmp_path / "old", "palette")
        for path in sorted((tmp_path / "old").rglob("*.*")):
            folders = [images] if path.suffix == ".jpg" else ["SegmentationClass"]
            for folder in folders if path.suffix == ".jpg" else [*folders, "SegmentationObject"]:
                (tmp_path / "new" / folder).mkdir(parents=True, exist_ok=True)
                (tmp_path / "new" / folder / path.name).write_bytes(path.read_bytes())
        data = read(tmp_path / "new")
        assert {image.path.parent.name for image in data.images} == {images}
        assert {image.mask.parent.name for image in data.images} == {"SegmentationClass"}
        assert data.notes[0] == "Pascal VOC's 21 classes" and "left out" not in str(data.notes)

    def test_two_masks_of_one_image(self, tmp_path):
        sets.write_masks(tmp_path)
        other = tmp_path / "labels" / "train" / "apple.png"
        other.parent.mkdir(parents=True)
        Image.new("L", (sets.WIDTH, sets.HEIGHT), 1).save(other)
        data = read(tmp_path, classes=("sea", *sets.CLASSES))
        assert data.notes == [
            f"1 masks are second ones of an image and not read, such as "
            f"{tmp_path}/masks/train/apple.png beside {other}; remove those that are wrong"
        ]

    def test_bad_masks(self, tmp_path):
        sets.write_masks(tmp_path)
        Image.new("L", (30, 48)).save(tmp_path / "masks" / "train" / "apple.png")
        (tmp_path / "masks" / "val" / "fig.png").write_bytes(b"nonsense")
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "masks" / "train" / "date.png")
        with pytest.raises(UserError) as error:
            read(tmp_path)
        text = str(error.value)
        assert "train/apple.png: is 30 x 48 px, but its image" in text
        assert "val/fig.png: cannot be read" in text
        assert "train/date.png: has 30" in text and "it is no mask" in text
        left = read_folder(tmp_path, Options(), skip_bad=True)
        assert sorted(by_name(left)) == ["bread", "cheese", "egg"]


def test_class_folders(tmp_path):
    data = read(sets.write_folders(tmp_path))
    assert data.kind == FOLDERS and data.classes == sets.CLASSES
    assert [by_name(data)[name].label for name in sets.NAMES] == [0, 1, 0, 1, 0, 1]
    assert {name: image.split for name, image in by_name(data).items()} == SPLIT and not data.notes
    (tmp_path / "val" / "loose.jpg").write_bytes(
        (tmp_path / "val" / "boat" / "egg.jpg").read_bytes()
    )
    (note,) = read(tmp_path).notes
    assert "1 images are in no class folder and left out, such as val/loose.jpg" in note


class TestBadObjects:
    """What training would skip, or stop at after everything is written, is named by its label."""

    def write_yolo(self, root, line):
        sets.write_yolo(root)
        path = root / "labels" / "train" / "apple.txt"
        path.write_text(f"{line}\n{path.read_text()}")
        return path

    def write_voc(self, root, old, new):
        """Replace a text of the second object of an image."""
        sets.write_voc(root)
        path = root / "Annotations" / "apple.xml"
        first, second = path.read_text().rsplit("<object>", 1)
        assert old in second
        path.write_text(f"{first}<object>{second.replace(old, new)}")
        return path

    def assert_left_out(self, root, path, message, left):
        """An error with the place, and the other objects of the image with ``skip_bad``."""
        with pytest.raises(UserError, match=message) as error:
            read(root)
        assert f"error: {path}: " in str(error.value) and "1 errors" in str(error.value)
        data = read_folder(root, Options(), skip_bad=True)
        assert len(by_name(data)["apple"].objects) == left
        assert "1 errors: these files and objects are left out" in data.notes
        assert data.findings[0].path == str(path)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("0 0.5 0.5 0.01 0.01", "line 1: the box of 0.64 x 0.48 px is less than a pixel"),
            ("0 0.5 0.5 0 0.1", "line 1: the box of 0 x 4.8 px is less than a pixel"),
            ("0 0.2 0.2 0.4 0.4 0.6 0.6", "line 1: the outline encloses no area"),
        ],
    )
    def test_yolo(self, tmp_path, line, message):
        path = self.write_yolo(tmp_path, line)
        self.assert_left_out(tmp_path, path, message, left=2)

    def test_a_pixel_that_yolo_rounds(self, tmp_path):
        """1 px of 48 is 0.020833 in six digits: 0.99998 px."""
        self.write_yolo(tmp_path, "0 0.5 0.5 0.020833 0.020833")
        assert len(by_name(read(tmp_path))["apple"].objects) == 3

    def test_corners_without_area(self, tmp_path):
        sets.write_yolo(tmp_path, "obb")
        path = tmp_path / "labels" / "val" / "fig.txt"
        path.write_text("0 0.1 0.1 0.9 0.9 0.9 0.9 0.1 0.1\n" + path.read_text())
        with pytest.raises(UserError, match="fig.txt: line 1: the corners enclose no area"):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("xmin", "xmax", "message"),
        [
            (70, 90, r"object 2 \(car\): lies outside its image of 64 x 48 px: x from 70 to 90"),
            (30, 10, r"object 2 \(car\): the box of -20 x .* px is less than a pixel"),
            (30, 30.5, r"object 2 \(car\): the box of 0.5 x .* px is less than a pixel"),
        ],
    )
    def test_voc(self, tmp_path, xmin, xmax, message):
        box = sets.upright("apple")[1]
        old = f"<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[0] + box[2]}</xmax>"
        new = f"<xmin>{xmin}</xmin><ymin>{box[1]}</ymin><xmax>{xmax}</xmax>"
        path = self.write_voc(tmp_path, old, new)
        self.assert_left_out(tmp_path, path, message, left=1)

    def test_labelme(self, tmp_path):
        sets.write_labelme(tmp_path, "rectangle")
        path = tmp_path / "apple.json"
        content = json.loads(path.read_text())
        content["shapes"][1]["points"] = [[5, 5], [5, 20]]
        path.write_text(json.dumps(content))
        name = content["shapes"][1]["label"]
        message = rf"shape 2 \({name}\): the box of 0 x 15 px is less than a pixel"
        self.assert_left_out(tmp_path, path, message, left=1)

    def test_dota(self, tmp_path):
        sets.write_dota(tmp_path)
        path = tmp_path / "train" / "labelTxt" / "apple.txt"
        path.write_text(path.read_text() + "500 500 520 500 520 510 500 510 car 0\n")
        message = r"object 3 \(car\): lies outside its image of 64 x 48 px: x from 500 to 520"
        self.assert_left_out(tmp_path, path, message, left=2)

    def test_outlines_far_away(self, tmp_path):
        """pycocotools can crash on them."""
        old = "<bndbox>"
        new = "<polygon><x1>9</x1><y1>9</y1><x2>200</x2><y2>9</y2><x3>9</x3><y3>30</y3></polygon>"
        path = self.write_voc(tmp_path, old, new + old)
        message = r"object 2 \(car\): the outline reaches far beyond its image of 64 x 48 px"
        self.assert_left_out(tmp_path, path, message, left=1)

    def test_labels_without_places(self, tmp_path):
        """Readers that do not say where a label is: the image and the number of the object."""
        sets.write_dota(tmp_path)
        path = tmp_path / "train" / "labelTxt" / "apple.txt"
        path.write_text("900 5 950 5 950 9 900 9 car 0\n")
        with pytest.raises(UserError, match=r"object 1 \(car\): lies outside its image"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected", "left_out"),
    [
        pytest.param(
            ["bus/1", "car/1", "train/1", "Boat/1"],
            {"Boat/1": None, "bus/1": None, "car/1": None, "train/1": None},
            0,
            id="train is a vehicle",
        ),
        pytest.param(
            ["train/bus/1", "train/train/2", "val/bus/3", "val/train/4"],
            {"bus/1": "train", "train/2": "train", "bus/3": "val", "train/4": "val"},
            0,
            id="a vehicle in a split",
        ),
        pytest.param(
            ["train/bullet_train/1", "train/test tube/2", "test/bus/3"],
            {"bullet_train/1": "train", "test tube/2": "train", "bus/3": "test"},
            0,
            id="words of splits in names",
        ),
        pytest.param(
            ["train/bus/a/1", "train/train/b/2", "val/bus/a/3"],
            {"bus/1": "train", "train/2": "train", "bus/3": "val"},
            0,
            id="folders below classes",
        ),
        pytest.param(
            ["train/bus/1", "train/train/2", "val/train/3"],
            {"bus/1": "train", "train/2": "train", "train/3": "val"},
            0,
            id="a split of vehicles alone",
        ),
        pytest.param(
            ["dev/1", "dev/2", "ops/3"],
            {"dev/1": None, "dev/2": None, "ops/3": None},
            0,
            id="dev is a class",
        ),
        pytest.param(
            ["bus/train/1", "bus/val/2", "train/train/3", "train/val/4"],
            {"bus/1": "train", "bus/2": "val", "train/3": "train", "train/4": "val"},
            0,
            id="splits below classes",
        ),
        pytest.param(
            ["set/bus/Train/1", "set/bus/valid/2", "set/bus/test/a/3", "set/car/images/train/4"],
            {"bus/1": "train", "bus/2": "val", "bus/3": "test", "car/4": "train"},
            0,
            id="three splits below classes",
        ),
        pytest.param(
            ["bus/a/1", "bus/b/2", "car/a/3", "car/b/4"],
            {"bus/1": None, "bus/2": None, "car/3": None, "car/4": None},
            0,
            id="other folders below classes",
        ),
        pytest.param(
            ["x-ray/set/train/sick/1", "x-ray/set/train/well/2", "x-ray/set/test/well/3"],
            {"sick/1": "train", "well/2": "train", "well/3": "test"},
            0,
            id="an unpacked archive",
        ),
        pytest.param(
            ["pets/1", "pets/cat/2", "pets/dog/3", "4"],
            {"cat/2": None, "dog/3": None},
            2,
            id="loose images around classes",
        ),
        pytest.param(
            ["train/train/cat/1", "train/train/dog/2", "test/test/cat/3"],
            {"cat/1": "train", "dog/2": "train", "cat/3": "test"},
            0,
            id="an archive of each split",
        ),
        pytest.param(
            ["train/cat/1", "train/dog/2", "val/dog/3", "test/4", "unknown/5"],
            {"cat/1": "train", "dog/2": "train", "dog/3": "val"},
            2,
            id="images beside splits",
        ),
        pytest.param(
            ["cat/1", "dog/2", "masks/3", "dog/labels/4"],
            {"cat/1": None, "dog/2": None},
            2,
            id="masks are no class",
        ),
        pytest.param(["train/1", "test/2"], {}, 2, id="splits alone"),
    ],
)
def test_which_folders_are_classes(tmp_path, files, expected, left_out):
    """Expected are class and stem of each image, with its split."""
    for file in files:
        path = tmp_path / file
        write_photos(path.parent, [path.name])
    tree = Tree.of(tmp_path)
    data = folders.read(tree, Options())
    found = {f"{data.classes[i.label]}/{i.path.stem}": i.split for i in data.images}
    assert found == expected
    assert bool(folders.find(tree)) == (len(data.classes) > 1)
    assert [note.split()[0] for note in data.notes] == ([str(left_out)] if left_out else [])


@pytest.mark.parametrize("images", ["photos", "images", "set/images"])
def test_masks_as_jpeg_are_no_class(tmp_path, images):
    masks = Path(images).parent / "masks"
    for folder in (Path(images), masks):
        write_photos(tmp_path / folder, "01")
    with pytest.raises(UserError, match=f"4 images, .* if {masks}/0.jpg is a mask: .* as PNG"):
        read(tmp_path)


def write_noise(folder, stems, gray=False, flat=False, suffix=".png"):
    """Photographs as far as their pixels tell, or drawings."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for stem in stems:
        shape = (48, 64) if gray else (48, 64, 3)
        image = np.zeros(shape, np.uint8) if flat else rng.normal(120, 40, shape).clip(0, 255)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{stem}{suffix}")


class TestClassesCalledLikeFoldersOfLabels:
    @pytest.mark.parametrize("suffix", [".png", ".jpg"])
    @pytest.mark.parametrize("gray", [False, True])
    @pytest.mark.parametrize("name", ["mask", "Masks", "labels", "seg"])
    def test_photographs(self, tmp_path, name, gray, suffix):
        """Also if images of two classes have one name, as masks have."""
        for split in ("train", "val"):
            for label in (name, "none"):
                write_noise(tmp_path / split / label, "abc", gray, suffix=suffix)
        data = read(tmp_path)
        assert data.kind == FOLDERS and set(data.classes) == {name, "none"} and not data.notes
        assert len(data.images) == 12

    @pytest.mark.parametrize(("folder", "other"), [("mask", "none"), ("images", "drawings")])
    def test_others_are_a_question(self, tmp_path, folder, other):
        write_noise(tmp_path / folder, "abc", flat=True)
        write_noise(tmp_path / other, "def", flat=True)
        question = f"no labels that are known.*; to take {folder} for classes too, add --format f"
        with pytest.raises(UserError, match=question) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)
        data = read(tmp_path, format="folders")
        assert set(data.classes) == {folder, other} and len(data.images) == 6

    def test_one_of_several_is_named(self, tmp_path):
        for name in ("cat", "dog", "images"):
            write_noise(tmp_path / name, "abc")
        data = read(tmp_path)
        assert data.classes == ("cat", "dog")
        assert data.notes[0].endswith(
            "images/a.png; to take images for classes too, add --format folders"
        )
        assert read(tmp_path, format="folders").classes == ("cat", "dog", "images")

    @pytest.mark.parametrize("images", ["images", "photos"])
    def test_masks_stay_masks(self, tmp_path, images):
        """Also those with a value for each of many objects."""
        write_noise(tmp_path / images, "abc", suffix=".jpg")
        (tmp_path / "masks").mkdir()
        objects = np.arange(192, dtype=np.uint8).reshape(12, 16).repeat(4, 0).repeat(4, 1)
        for stem in "abc":
            Image.fromarray(objects).save(tmp_path / "masks" / f"{stem}.png")
        assert read(tmp_path).kind == MASKS

    def test_photographs_that_were_taken_for_masks(self, tmp_path):
        """Beside a folder of images there are no classes."""
        for name in ("images", "masks"):
            write_noise(tmp_path / name, "abc")
        with pytest.raises(UserError, match="it is no mask, or was saved with loss"):
            read(tmp_path)


class TestRecognition:
    def test_two_formats_are_a_question(self, tmp_path):
        sets.write_coco(tmp_path / "a")
        sets.write_labelme(tmp_path / "b")
        message = r"coco \(a/labels.json\) and labelme \(b/apple.json\); choose --format coco or"
        with pytest.raises(UserError, match=message):
            recognize(Tree.of(tmp_path))
        assert read(tmp_path, format="coco").format == "COCO"

    def test_options_of_other_formats(self, tmp_path):
        sets.write_coco(tmp_path)
        with pytest.raises(UserError, match="--classes is for yolo and masks; .*: coco has names"):
            read(tmp_path, classes=("a",))
        with pytest.raises(UserError, match="--legend is for masks"):
            read(tmp_path, legend=Path("a.csv"))

    def test_nothing_known(self, tmp_path):
        sets.write_images(tmp_path)
        with pytest.raises(UserError, match="6 images, but no labels that are known"):
            read(tmp_path)

    @pytest.mark.parametrize("suffix", [".heic", ".GIF", ".jfif"])
    def test_images_of_other_kinds(self, tmp_path, suffix):
        """A class, or all masks, would vanish without a word."""
        sets.write_folders(tmp_path)
        for name in ("one", "two"):
            (tmp_path / "train" / "ship").mkdir(exist_ok=True)
            (tmp_path / "train" / "ship" / f"{name}{suffix}").write_bytes(b"some image")
        data = read(tmp_path)
        others = (
            f"2 images are of kinds that are not read ({suffix.lower()}), such as "
            f"train/ship/one{suffix}; convert them to PNG or JPEG"
        )
        assert data.classes == sets.CLASSES and data.notes == [others]
        for name in sets.CLASSES:
            shutil.rmtree(tmp_path / "val" / name)
            shutil.rmtree(tmp_path / "train" / name)
        with pytest.raises(UserError, match=rf"has no image .*; {re.escape(others)}"):
            read(tmp_path)
        write_photos(tmp_path / "images", "01")
        with pytest.raises(UserError, match=rf"no labels that are known.*; {re.escape(others)}"):
            read(tmp_path)

    def test_no_images_and_no_folder(self, tmp_path):
        with pytest.raises(UserError, match="has no image"):
            read(tmp_path)
        with pytest.raises(UserError, match="is not a folder"):
            read(tmp_path / "gone")

    def test_hidden_files_do_not_count(self, tmp_path):
        sets.write_coco(tmp_path)
        sets.write_labelme(tmp_path / ".cache")
        (tmp_path / "images" / "._apple.png").write_bytes(b"x")
        assert_as_written(read(tmp_path), POLYGONS)

    def test_reading_changes_nothing(self, tmp_path):
        sets.write_yolo(tmp_path)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        read(tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_unused_classes_are_left_out(self, tmp_path):
        sets.write_yolo(tmp_path)
        content = yaml.safe_load((tmp_path / "data.yaml").read_text())
        content["names"] = ["boat", "car", "plane"]
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
        data = read(tmp_path)
        assert data.classes == sets.CLASSES and "['plane']: no object" in data.findings[0].message


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train2017", "train"),
        ("instances_val2017", "val"),
        ("validation", "val"),
        ("my-test", "test"),
        ("strain", None),
        ("value", None),
        ("trainval", None),
        ("train_val", None),
    ],
)
def test_words_of_splits(name, split):
    assert split_word(name) == split
