# SPDX-License-Identifier: Apache-2.0
"""Each error in a COCO file and its images is found and named; correct data passes."""

import copy
import json
import re
import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as mask_api

from mmeformer.checks.findings import ERROR, WARNING
from mmeformer.detection.annotations import clean
from mmeformer.detection.checks import check_coco, run_lengths
from mmeformer.detection.coco import CocoDataset

CLASSES = ("cat", "dog")


@pytest.fixture
def content(tmp_path):
    """Two images of 40 x 30 px with an object of each class."""
    for index in range(2):
        cv2.imwrite(str(tmp_path / f"{index}.jpg"), np.full((30, 40, 3), 90, np.uint8))
    return dict(
        images=[dict(id=i, file_name=f"{i}.jpg", width=40, height=30) for i in range(2)],
        categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
        annotations=[
            dict(
                id=i,
                image_id=i,
                category_id=i + 1,
                bbox=[5, 5, 10, 8],
                area=80,
                segmentation=[[5, 5, 15, 5, 15, 13]],
                iscrowd=0,
            )
            for i in range(2)
        ],
    )


def compressed(mask):
    """A mask (H, W) as text, as pycocotools writes it."""
    rle = mask_api.encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(mask.shape), counts=rle["counts"].decode())


def check(content, folder, **kwargs):
    return check_coco(clean(copy.deepcopy(content)), "labels.json", str(folder), CLASSES, **kwargs)


def only(findings):
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


def test_sound_data(content, tmp_path):
    assert check(content, tmp_path, decode=True) == []
    content["annotations"][0]["segmentation"] = compressed(np.eye(30, 40))
    content["annotations"][1]["bbox"] = [-0.5, 0, 40.9, 30]
    del content["annotations"][1]["segmentation"]
    assert check(content, tmp_path) == []


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(bbox=[5, 5, -2, 8]), "inverted box", r"annotation 0 \(0.jpg\): bbox \[5, 5, -2, 8\]"),
        (dict(bbox=[5, 5, 0, 8]), "empty box", "less than a pixel"),
        (dict(bbox=[50, 5, 9, 8]), "box outside image", "outside its image of 40 x 30 px"),
        (dict(segmentation=[[1, 1, 2, 2]]), "short polygon", "4 numbers"),
        (dict(segmentation=[[1, 1, 2, 2, 3, 3, 4]]), "short polygon", "7 numbers"),
        (
            dict(segmentation=dict(size=[40, 30], counts="x")),
            "mask size",
            r"its image \[30, 40\] px",
        ),
        (dict(segmentation="polygon"), "bad entry", "segmentation is 'polygon'"),
        (dict(segmentation={}), "mask size", "has size None"),
        (dict(segmentation=dict(size=[30, 40], counts="rubbish!!")), "damaged mask", "run lengths"),
        (dict(segmentation=dict(size=[30, 40], counts="")), "damaged mask", "run lengths"),
        (dict(segmentation=dict(size=[30, 40], counts=[600, 599])), "damaged mask", "add up"),
        (dict(segmentation=dict(size=[30, 40], counts=[-1, 1201])), "damaged mask", "add up"),
        (dict(segmentation=dict(size=[30, 40], counts=["1200"])), "damaged mask", "add up"),
        (dict(segmentation=[[0, 0, 1e9, 0, 5, 9]]), "mask outside image", "from 0 to 1e\\+09 px"),
        (dict(segmentation=[[0, -50, 1, 0, 5, 9]]), "mask outside image", "from -50 to 9 px"),
        (dict(iscrowd="0"), "bad entry", "iscrowd '0' instead of 0 or 1"),
        (dict(category_id=7), "unknown category", "category_id 7"),
        (dict(image_id=7), "unknown image", "image 7, which is not in `images`"),
        (dict(bbox=[5, 5, 10]), "bad entry", r"bbox \[5, 5, 10\]"),
        (dict(bbox=[5, 5, 10, float("nan")]), "bad entry", "finite"),
        (dict(ignore="0"), "bad entry", "ignore '0' instead of 0 or 1"),
        (dict(id=None), "bad entry", "id None"),
        (dict(id=1), "repeated id", "two annotations have the id 1"),
    ],
)
def test_annotations(content, tmp_path, change, kind, message):
    content["annotations"][0].update(change)
    masks = "segmentation" in change
    first = check(content, tmp_path, training=False, masks=masks)[0]
    assert (first.severity, first.kind, first.path) == (ERROR, kind, "labels.json")
    assert re.search(message, first.message), first.message
    if masks:
        assert check(content, tmp_path, training=False) == [], "not read, so not judged"


def test_objects_need_masks_where_masks_are_learned(content, tmp_path):
    del content["annotations"][0]["segmentation"]
    content["annotations"][1]["segmentation"] = []
    assert check(content, tmp_path) == []
    kinds = [(item.severity, item.kind) for item in check(content, tmp_path, masks=True)]
    assert kinds == [(ERROR, "missing mask")] * 2 + [(WARNING, "unused class")]


def test_a_box_and_a_mask_can_both_be_wrong(content, tmp_path):
    content["annotations"][0].update(bbox=[5, 5, 38, 8], segmentation=[[1, 1]])
    kinds = [item.kind for item in check(content, tmp_path, training=False, masks=True)]
    assert kinds == ["short polygon", "box beyond image"]


@settings(max_examples=100)
@given(
    mask=arrays(
        np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 60)), elements=st.integers(0, 1)
    )
)
def test_run_lengths_are_those_of_pycocotools(mask):
    lengths = run_lengths(compressed(mask)["counts"])
    assert lengths.min() >= 0
    colors = np.arange(len(lengths)) % 2
    assert np.array_equal(np.repeat(colors, lengths), mask.flatten(order="F"))
    assert np.array_equal(run_lengths(lengths.tolist()), lengths)


@pytest.mark.parametrize("name", ["../../etc/passwd.jpg", "a/../../x.jpg", "/etc/x.jpg"])
def test_file_names_that_lead_out_of_the_folder(content, tmp_path, name):
    content["images"][0]["file_name"] = name
    found = [item for item in check(content, tmp_path) if item.kind == "outside folder"]
    assert only(found).severity == WARNING and name in found[0].message
    content["images"][0]["file_name"] = "a/../0.jpg"
    assert "outside folder" not in {item.kind for item in check(content, tmp_path)}


def test_corners_instead_of_sizes(content, tmp_path):
    for annotation in content["annotations"]:
        annotation["bbox"] = [20, 10, 38, 28]
    found = check(content, tmp_path)
    assert {item.kind for item in found} == {"box beyond image"} and len(found) == 2
    assert found[0].severity == WARNING and "if these are two corners" in found[0].message


def test_classes(content, tmp_path):
    content["annotations"][1]["category_id"] = 1
    finding = only(check(content, tmp_path))
    assert (finding.severity, finding.kind) == (WARNING, "unused class")
    assert "['dog']" in finding.message
    assert check(content, tmp_path, training=False) == []
    content["categories"][0]["name"] = "cow"
    kinds = [item.kind for item in check(content, tmp_path, training=False)]
    assert kinds == ["unused category"]


def test_images(content, tmp_path):
    (tmp_path / "0.jpg").unlink()
    cv2.imwrite(str(tmp_path / "1.jpg"), np.zeros((40, 30, 3), np.uint8))
    missing, turned = check(content, tmp_path)
    assert (missing.kind, missing.path) == ("missing image", str(tmp_path / "0.jpg"))
    assert turned.kind == "wrong size" and "is 30 x 40 px" in turned.message
    assert only(check(content, tmp_path, limit=0)).kind == "missing image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(width=0), "width 0"),
        (dict(height="30 px"), "height '30 px'"),
        (dict(height=30.5), "height 30.5"),
        (dict(height=True), "height True"),
        (dict(file_name=None), "no file_name"),
        (dict(id=[]), "no id"),
        (dict(id=1), "two entries (image) have the id 1"),
    ],
)
def test_image_entries(content, tmp_path, change, message):
    content["images"][0].update(change)
    assert any(message in str(finding) for finding in check(content, tmp_path))


@pytest.mark.parametrize("content", [[], None, 5, dict(images=5), dict(annotations={})])
def test_not_coco(content, tmp_path):
    assert only(check(content, tmp_path)).kind == "not COCO"


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 50) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(content):
    """Every (container, key) of nested lists and dicts."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def damaged_text(text):
    """``text`` with something else in one place."""
    return st.builds(
        lambda place, new: text[:place] + new + text[place + 1 :],
        st.integers(0, len(text) - 1),
        st.text(st.characters(codec="ascii"), max_size=2),
    )


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_annotations_never_pass_silently(tmp_path_factory, data):
    """With any value in one place, the checks finish and mmdet reads what they accept."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "0.jpg"), np.full((30, 40, 3), 90, np.uint8))
    content = dict(
        images=[dict(id=0, file_name="0.jpg", width=40, height=30)],
        categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
        annotations=[
            dict(id=i, image_id=0, category_id=i, bbox=[5, 5, 9, 8], area=72, segmentation=mask)
            for i, mask in ((1, [[5] * 6]), (2, compressed(np.eye(30, 40))))
        ],
    )
    container, key = data.draw(st.sampled_from(list(places(content))))
    before = json.dumps(container[key])
    text = isinstance(container[key], str) and key == "counts"
    container[key] = data.draw(damaged_text(container[key]) if text else anything)
    findings = check(content, folder, masks=True)
    path = folder / "labels.json"
    path.write_text(json.dumps(content))
    if json.dumps(container[key]) == before or findings:
        return
    dataset = CocoDataset(
        data_root=str(folder),
        ann_file=str(path),
        data_prefix=dict(img=""),
        metainfo=dict(classes=CLASSES),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="mmdet.LoadAnnotations", with_bbox=True, with_mask=True),
        ],
    )
    boxes = [item["bbox"] for item in dataset.get_data_info(0)["instances"]]
    assert len(boxes) == 2 and np.isfinite(boxes).all()
    masks = dataset.prepare_data(0)["gt_masks"]
    assert len(masks) == 2 and (masks.height, masks.width) == (30, 40)


def test_training_stops_or_names(content, tmp_path, caplog):
    def build(**kwargs):
        path = tmp_path / "labels.json"
        path.write_text(json.dumps(content))
        return CocoDataset(
            data_root=str(tmp_path),
            ann_file=str(path),
            data_prefix=dict(img=""),
            metainfo=dict(classes=CLASSES),
            pipeline=[],
            **kwargs,
        )

    assert len(build()) == 2
    content["annotations"][0]["bbox"] = [5, 5, -2, 8]
    # Half of the annotations: more than training may leave out without a word.
    with pytest.raises(ValueError, match="errors:\nerror: .*labels.json: annotation 0"):
        build()
    content["annotations"] += [
        {**content["annotations"][1], "id": number} for number in range(2, 102)
    ]
    assert len(build()) == 2
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(ValueError, match="0.jpg: does not exist"):
        build()


def test_100_000_annotations_take_seconds(content, tmp_path):
    content["annotations"] = [
        {**content["annotations"][number % 2], "id": number} for number in range(100_000)
    ]
    start = time.process_time()
    assert check(content, tmp_path) == []
    assert time.process_time() - start < 15
