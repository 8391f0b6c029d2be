# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from mmeformer.detection.coco import CocoDataset
from mmeformer.synthetic.shapes import CLASSES, write_coco_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_coco_dataset(tmp_path_factory.mktemp("coco") / "shapes", train=4, val=2, size=64)


def build(root, ann_file="annotations/instances_train2017.json", classes=CLASSES, **kwargs):
    return CocoDataset(
        data_root=str(root),
        ann_file=str(ann_file),
        data_prefix=dict(img="train2017/"),
        metainfo=dict(classes=classes),
        pipeline=[],
        serialize_data=False,
        **kwargs,
    )


def edited(root, tmp_path, **changes):
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    content.update(changes)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def test_reads_what_was_written(root):
    dataset = build(root)
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    assert len(dataset) == 4
    instances = [item for info in dataset.data_list for item in info["instances"]]
    assert len(instances) == len(content["annotations"])
    labels = sorted(item["bbox_label"] for item in instances)
    assert labels == sorted(item["category_id"] - 1 for item in content["annotations"])


def test_subset_of_the_classes(root):
    for classes in (("circle", "star"), ("star", "circle")):
        dataset = build(root, classes=classes)
        assert dataset.metainfo["classes"] == classes
        names = {CLASSES.index(name) + 1: name for name in classes}
        content = json.loads((root / "annotations/instances_train2017.json").read_text())
        expected = sorted(
            (names[item["category_id"]], item["bbox"][0])
            for item in content["annotations"]
            if item["category_id"] in names
        )
        found = [item for info in dataset.data_list for item in info["instances"]]
        assert sorted((classes[i["bbox_label"]], i["bbox"][0]) for i in found) == expected


@pytest.mark.parametrize(
    "classes, message",
    [
        (("circle", "rectangel"), r"classes \['rectangel'\].*not among the 4 categories of .*star"),
        (("circle", "star", "circle"), r"\['circle'\] twice"),
        ("circle", r"classes = \('circle',\)"),
    ],
)
def test_wrong_class_lists_are_errors(root, classes, message):
    with pytest.raises(ValueError, match=message):
        build(root, classes=classes)


def test_thousands_of_categories_make_a_short_message(root, tmp_path):
    categories = [dict(id=i, name=f"category {i}") for i in range(5000)]
    path = edited(root, tmp_path, categories=categories)
    with pytest.raises(ValueError, match="'category 1', .* and 4950 more") as raised:
        build(root, path, classes=tuple(f"class {i}" for i in range(5000)))
    assert len(str(raised.value)) < 2000


def test_missing_file(root):
    with pytest.raises(FileNotFoundError, match="instances_trian2017.json does not exist"):
        build(root, "annotations/instances_trian2017.json")


@pytest.mark.parametrize("content", ["", "<html>", "[]", "{}"])
def test_not_coco(root, tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="broken.json"):
        build(root, path)


def test_no_annotations(root, tmp_path):
    path = edited(root, tmp_path, annotations=[])
    for test_mode in (False, True):
        with pytest.raises(ValueError, match="no annotations"):
            build(root, path, test_mode=test_mode)


def test_no_images(root, tmp_path):
    with pytest.raises(ValueError, match="lists no images"):
        build(root, edited(root, tmp_path, images=[], annotations=[]))


def test_unlabeled_test_set_is_accepted(root, tmp_path):
    path = edited(root, tmp_path, annotations=None)
    assert len(build(root, path, test_mode=True)) == 4
    with pytest.raises(ValueError, match="no annotations"):
        build(root, path)
