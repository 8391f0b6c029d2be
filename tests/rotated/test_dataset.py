# SPDX-License-Identifier: Apache-2.0
"""The DOTA data set reads valid data, and errors in it never end in a silent score of zero."""

import time

import cv2
import numpy as np
import pytest
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from mmeformer.registry import DATASETS
from mmeformer.rotated import DOTADataset

SHIP = "10 10 30 10 30 20 10 20 ship 0\n"
HARD = "12.5 12 32 12 32 22 12 22 ship 1\n"
PLANE = "40 40 60 50 55 60 35 50 plane 0\n"


@pytest.fixture
def root(tmp_path):
    """Six images of mixed kinds; two without objects, one of these without a label file."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labelTxt").mkdir()
    labels = {
        "a.png": "imagesource:GoogleEarth\ngsd:0.1\n" + SHIP + HARD,
        "b.jpg": PLANE + SHIP,
        "c.v1.tif": SHIP,
        "d.bmp": "imagesource:GoogleEarth\ngsd:null\n",
        "e.PNG": None,
        "f.jpeg": HARD,
    }
    for name, text in labels.items():
        ending = name[name.rindex(".") :].lower()
        data = cv2.imencode(ending, np.full((64, 80, 3), 90, np.uint8))[1]
        (tmp_path / "images" / name).write_bytes(data.tobytes())
        if text is not None:
            stem = name[: name.rindex(".")]
            (tmp_path / "labelTxt" / f"{stem}.txt").write_text(text)
    return tmp_path


def build(root, classes=("ship", "plane"), metainfo=None, **kwargs):
    arguments = dict(
        data_root=str(root),
        ann_file="labelTxt/",
        data_prefix=dict(img_path="images/"),
        metainfo=dict(classes=classes) if metainfo is None else metainfo,
    )
    return DATASETS.build({"type": "mmeformer.DOTADataset"} | arguments | kwargs)


def test_objects_outside_their_images_are_named(root):
    outside = "110 10 130 10 130 20 110 20 ship 0\n"
    (root / "labelTxt" / "f.txt").write_text(HARD + outside)
    with pytest.raises(ValueError, match=r"f.txt: line 2: x from 110 to 130 .* of 80 x 64 px"):
        build(root)
    # One of many is only logged.
    (root / "labelTxt" / "f.txt").write_text(HARD * 200 + outside)
    assert len(build(root)) == 6


def test_original_labels_and_mixed_images(root):
    dataset = build(root)
    assert isinstance(dataset, DOTADataset)
    items = [dataset.get_data_info(index) for index in range(len(dataset))]
    assert [item["img_id"] for item in items] == ["a", "b", "c.v1", "d", "e", "f"]
    assert [len(item["instances"]) for item in items] == [2, 2, 1, 0, 0, 1]
    assert items[0]["instances"][1] == dict(
        bbox=[12.5, 12, 32, 12, 32, 22, 12, 22], bbox_label=0, ignore_flag=0
    )
    assert [found["bbox_label"] for found in items[1]["instances"]] == [1, 0]
    assert items[4]["img_path"] == str(root / "images" / "e.PNG")
    assert dataset.get_cat_ids(1) == [1, 0]


def test_difficult_objects_are_ignored_above_the_threshold(root):
    flags = [
        [found["ignore_flag"] for found in build(root, diff_thr=threshold)[0]["instances"]]
        for threshold in (0, 1)
    ]
    assert flags == [[0, 1], [0, 0]]


def test_empty_images_are_negatives_or_filtered(root):
    assert len(build(root, filter_cfg=dict(filter_empty_gt=True))) == 4
    assert len(build(root, filter_cfg=dict(filter_empty_gt=False))) == 6
    assert len(build(root, filter_cfg=dict(filter_empty_gt=True), test_mode=True)) == 6


def test_suffix_and_unlabeled_images(root):
    assert [item["img_id"] for item in build(root, img_suffix="png")] == ["a", "e"]
    unlabeled = build(root, ann_file="")
    assert [item["instances"] for item in unlabeled] == [[]] * 6


def test_pipeline_makes_rotated_boxes(root):
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="mmdet.LoadAnnotations", with_bbox=True, box_type="qbox"),
        dict(type="mmrotate.ConvertBoxType", box_type_mapping=dict(gt_bboxes="rbox")),
        dict(type="mmdet.PackDetInputs"),
    ]
    with DefaultScope.overwrite_default_scope("mmrotate"):
        dataset = build(root, diff_thr=0, pipeline=pipeline)
    sample = dataset[0]["data_samples"]
    assert dataset[0]["inputs"].shape == (3, 64, 80)
    np.testing.assert_allclose(sample.gt_instances.bboxes.tensor[0, :2], [20, 15])
    assert sample.gt_instances.bboxes.areas.item() == pytest.approx(200)
    assert len(sample.ignored_instances) == 1
    assert len(dataset[3]["data_samples"].gt_instances) == 0


def test_unknown_classes_are_an_error_with_place_and_mend(root):
    with pytest.raises(ValueError, match=r"(?s)'plane': 1 objects.*b\.txt line 1.*dropped_classes"):
        build(root, ("ship",))
    chosen = build(root, metainfo=dict(classes=("ship",), dropped_classes=("plane",)))
    assert [found["bbox_label"] for found in chosen[1]["instances"]] == [0]
    with pytest.raises(ValueError, match="are in metainfo classes and in dropped_classes"):
        build(root, metainfo=dict(classes=("ship", "plane"), dropped_classes=("plane",)))


def test_default_classes_are_those_of_dota(root):
    dataset = build(root, metainfo={})
    assert len(dataset.metainfo["classes"]) == len(dataset.metainfo["palette"]) == 15
    assert dataset[2]["instances"][0]["bbox_label"] == dataset.metainfo["classes"].index("ship")


def test_palette_fits_the_classes(root):
    own = build(root, ("plane", "ship", "barge"), lazy_init=True).metainfo["palette"]
    assert own[:2] == [(165, 42, 42), (255, 0, 255)] and len(own) == 3
    given = dict(classes=("ship",), palette=((1, 2, 3),))
    # A tuple of colors is one color to mmrotate's visualizer.
    assert build(root, metainfo=given, lazy_init=True).metainfo["palette"] == [(1, 2, 3)]
    with pytest.raises(ValueError, match="1 colors for 2 classes"):
        build(root, metainfo=dict(classes=("ship", "plane"), palette=[(1, 2, 3)]))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("ship", r"a single class needs a comma: classes = \('ship',\)"),
        ((), "has no class names"),
        (("ship", "ship"), r"\['ship'\] twice"),
    ],
)
def test_malformed_classes(root, classes, message):
    with pytest.raises(ValueError, match=message):
        build(root, classes)


def test_missing_folders_and_mixed_up_ones(root):
    with pytest.raises(FileNotFoundError, match="label folder .*annfiles"):
        build(root, ann_file="annfiles/")
    with pytest.raises(FileNotFoundError, match="image folder .*pictures"):
        build(root, data_prefix=dict(img_path="pictures/"))
    (root / "other").mkdir()
    (root / "other" / "z.txt").write_text(SHIP)
    with pytest.raises(ValueError, match="no label file in .*other.* belongs to an image"):
        build(root, ann_file="other/")


def test_labels_without_objects_are_no_data_set(root):
    for path in (root / "labelTxt").iterdir():
        path.write_text("gsd:1\n")
    with pytest.raises(ValueError, match="have no object of"):
        build(root)


def test_bad_lines_stop_the_start(root):
    (root / "labelTxt" / "b.txt").write_text(SHIP + "1 2 3\n")
    with pytest.raises(ValueError, match=r"(?s)b\.txt has invalid lines.*line 2: 3 fields"):
        build(root)


def test_flaws_are_logged_and_objects_without_area_ignored(root, caplog):
    (root / "labelTxt" / "z.txt").write_text(SHIP)
    (root / "labelTxt" / "c.v1.txt").write_text("5 5 9 9 7 7 6 6 ship 0\n" + SHIP)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        dataset = build(root, ("ship", "plane", "barge"))
    finally:
        logger.removeHandler(caplog.handler)
    assert [found["ignore_flag"] for found in dataset[2]["instances"]] == [1, 0]
    for text in (
        "1 images have no label file and count as without objects, such as e",
        "1 label files have no image, such as z",
        "1 classes have no object, such as barge",
        "1 objects have no area and are ignored, such as",
    ):
        assert text in caplog.text


def test_100_000_objects_take_seconds(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labelTxt").mkdir()
    for number in range(100):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), np.zeros((32, 32, 3), np.uint8))
        (tmp_path / "labelTxt" / f"{number}.txt").write_text(SHIP * 1000)
    start = time.process_time()
    assert len(build(tmp_path)) == 100
    assert time.process_time() - start < 15
