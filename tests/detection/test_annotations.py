# SPDX-License-Identifier: Apache-2.0
"""Data set and metric read one file the same way, however its exporter wrote it."""

import copy
import json

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import METRICS

from mmeformer import configs
from mmeformer.detection.coco import CocoDataset
from mmeformer.training import engine

CLASSES = ("cat", "dog")
IMAGES = 4


@pytest.fixture
def content(tmp_path):
    """Four images of 96 x 64 px with a cat and a dog each."""
    for index in range(IMAGES):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((64, 96, 3), 90, np.uint8))
    boxes = [[5, 5, 20, 18], [40, 30, 30, 22]]
    return dict(
        images=[dict(id=i, file_name=f"{i}.png", width=96, height=64) for i in range(IMAGES)],
        categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
        annotations=[
            dict(
                id=1 + 2 * image + kind,
                image_id=image,
                category_id=kind + 1,
                bbox=box,
                area=box[2] * box[3],
                iscrowd=0,
            )
            for image in range(IMAGES)
            for kind, box in enumerate(boxes)
        ],
    )


def write(content, folder, name="labels.json", encoding="utf-8"):
    path = folder / name
    path.write_text(json.dumps(content), encoding=encoding)
    return path


def load(path, classes=CLASSES, **kwargs):
    return CocoDataset(
        data_root=str(path.parent),
        ann_file=path.name,
        data_prefix=dict(img=""),
        metainfo=dict(classes=classes),
        pipeline=[],
        serialize_data=False,
        **kwargs,
    )


def evaluate(path, dataset, **kwargs):
    """Scores of predictions that equal the objects of the data set."""
    evaluator = configs.load_config(tiny.QUICKSTARTS["detection"]).val_evaluator
    metric = METRICS.build(
        {**evaluator, "ann_file": str(path), "metric": "bbox", "collect_device": "cpu", **kwargs}
    )
    metric.dataset_meta = dataset.metainfo
    dataset.check_metrics([metric])
    for item in dataset:
        objects = [instance for instance in item["instances"] if not instance["ignore_flag"]]
        boxes = torch.tensor([instance["bbox"] for instance in objects]).reshape(-1, 4).float()
        labels = torch.tensor([instance["bbox_label"] for instance in objects], dtype=torch.long)
        predicted = dict(bboxes=boxes, labels=labels, scores=torch.full((len(objects),), 0.9))
        sample = dict(
            img_id=item["img_id"],
            ori_shape=(item["height"], item["width"]),
            pred_instances=predicted,
        )
        metric.process({}, [sample])
    return metric.evaluate(len(dataset))


def score(content, folder, classes=CLASSES, **kwargs):
    path = write(content, folder)
    dataset = load(path, classes, test_mode=True, **kwargs)
    return evaluate(path, dataset)["coco/bbox_mAP"]


def test_plain_file(content, tmp_path):
    assert score(content, tmp_path) == 1


@pytest.mark.parametrize("kept", [1, 8])
def test_the_object_with_id_0_counts(content, tmp_path, kept):
    content["annotations"] = content["annotations"][:kept]
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number
    assert score(content, tmp_path) == 1


def without(annotation):
    del annotation["iscrowd"]


@pytest.mark.parametrize(
    "change",
    [
        without,
        lambda annotation: annotation.update(iscrowd=None),
        lambda annotation: annotation.update(iscrowd=False),
        lambda annotation: annotation.update(area=0),
        lambda annotation: annotation.update(area=None),
        lambda annotation: annotation.pop("area"),
        lambda annotation: annotation.update(id=f"object {annotation['id']}"),
        lambda annotation: annotation.update(image_id=str(annotation["image_id"])),
        lambda annotation: annotation.update(category_id=float(annotation["category_id"])),
    ],
)
def test_spellings_of_annotations(content, tmp_path, change):
    for annotation in content["annotations"]:
        change(annotation)
    assert score(content, tmp_path) == 1
    dataset = load(tmp_path / "labels.json")
    assert [len(item["instances"]) for item in dataset] == [2] * IMAGES


@pytest.mark.parametrize("convert", [float, str, lambda side: f"{side}.0"])
def test_sizes_as_text_or_with_a_fraction(content, tmp_path, convert):
    for image in content["images"]:
        image.update(width=convert(image["width"]), height=convert(image["height"]))
    assert score(content, tmp_path) == 1
    item = load(tmp_path / "labels.json").get_data_info(0)
    assert (item["width"], item["height"]) == (96, 64) and type(item["width"]) is int


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(content, tmp_path, encoding):
    path = write(content, tmp_path, encoding=encoding)
    assert load(path).findings() == []
    assert evaluate(path, load(path, test_mode=True))["coco/bbox_mAP"] == 1


def test_text_ids(content, tmp_path):
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    for category in content["categories"]:
        category["id"] = category["name"]
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
        annotation["category_id"] = CLASSES[annotation["category_id"] - 1]
    path = write(content, tmp_path)
    dataset = load(path, test_mode=True)
    scores = evaluate(path, dataset, outfile_prefix=str(tmp_path / "found"))
    assert scores["coco/bbox_mAP"] == 1
    found = json.loads((tmp_path / "found.bbox.json").read_text())
    assert {(entry["image_id"], entry["category_id"]) for entry in found} == {
        (f"image {index}", name) for index in range(IMAGES) for name in CLASSES
    }


@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
def test_nothing_but_crowds_is_an_error(content, tmp_path, flag):
    for annotation in content["annotations"]:
        annotation[flag] = 1
    path = write(content, tmp_path)
    for test_mode in (False, True):
        with pytest.raises(ValueError, match="8 of 8 annotations have iscrowd"):
            load(path, test_mode=test_mode)
    content["annotations"][0][flag] = 0
    findings = load(write(content, tmp_path), lazy_init=True).findings()
    assert [finding.kind for finding in findings] == ["many crowds", "unused class"]


def test_ignored_objects_are_no_background(content, tmp_path):
    content["annotations"][0]["ignore"] = 1
    assert score(content, tmp_path) == 1
    flags = [item["ignore_flag"] for item in load(tmp_path / "labels.json")[0]["instances"]]
    assert flags == [1, 0]


def test_one_file_under_two_ids_is_one_image(content, tmp_path, caplog):
    again = [{**image, "id": image["id"] + 100} for image in content["images"]]
    again[0]["file_name"] = "./" + again[0]["file_name"]
    content["images"] += again
    for annotation in content["annotations"][1::2]:
        annotation["image_id"] += 100
    # An object that both entries have.
    twice = {**content["annotations"][0], "id": 99, "image_id": 100}
    content["annotations"].append(twice)
    assert score(content, tmp_path) == 1
    dataset = load(tmp_path / "labels.json")
    assert [len(item["instances"]) for item in dataset] == [2] * IMAGES
    kinds = {finding.kind for finding in dataset.findings()}
    assert kinds == {"repeated image"}
    again[0]["width"] = 50
    with pytest.raises(ValueError, match="images 0 and 100 are the same file .* 50 x 64 px"):
        load(write(content, tmp_path))


def test_only_predicted_images_are_evaluated(content, tmp_path):
    assert score(content, tmp_path, indices=3) == 1


def test_the_root_category_of_roboflow_is_no_class(content, tmp_path):
    root = dict(id=0, name="cat", supercategory="none")
    content["categories"].insert(0, root)
    assert score(content, tmp_path) == 1
    labels = [item["bbox_label"] for item in load(tmp_path / "labels.json")[0]["instances"]]
    assert labels == [0, 1]
    content["annotations"][0]["category_id"] = 0
    with pytest.raises(ValueError, match=r"categories \[0, 1\] are all named 'cat'"):
        load(write(content, tmp_path))


def test_files_may_order_their_categories_differently(content, tmp_path):
    """The order of the config counts, for labels, scores and scores per class."""
    other = copy.deepcopy(content)
    other["categories"].reverse()
    for annotation in other["annotations"]:
        if annotation["category_id"] == 1 and annotation["image_id"]:
            annotation["iscrowd"] = 1
    paths = [write(content, tmp_path, "train.json"), write(other, tmp_path, "val.json")]
    for classes in (CLASSES, CLASSES[::-1]):
        for path in paths:
            dataset = load(path, classes, test_mode=True)
            for instance in dataset.get_data_info(0)["instances"]:
                is_cat = instance["bbox"][0] == 5
                assert classes[instance["bbox_label"]] == ("cat" if is_cat else "dog")
            # Without the dogs, so that the classes differ.
            for item in dataset.data_list:
                item["instances"] = [
                    instance
                    for instance in item["instances"]
                    if classes[instance["bbox_label"]] == "cat"
                ]
            scores = evaluate(path, dataset, classwise=True)
            assert scores["coco/cat_precision"] == 1 and scores["coco/dog_precision"] == 0


def test_mmdets_own_metric_is_refused_where_it_misreads(content, tmp_path):
    path = write(content, tmp_path)
    dataset = load(path, test_mode=True)
    assert evaluate(path, dataset, type="mmdet.CocoMetric")["coco/bbox_mAP"] == 1
    content["annotations"][0]["id"] = 0
    path = write(content, tmp_path)
    with pytest.raises(ValueError, match="type='mmeformer.CocoMetric'"):
        evaluate(path, load(path, test_mode=True), type="mmdet.CocoMetric")


def test_metric_and_data_set_must_read_the_same_file(tmp_path):
    config = tiny.detection(tmp_path)
    labels = tmp_path / "coco/annotations"
    config.work_dir = str(tmp_path / "work")
    config.val_evaluator.ann_file = str(labels / "instances_train2017.json")
    runner = engine.build_train_runner(Config(config.copy().to_dict()))
    with pytest.raises(ValueError, match="instances_train2017.json, but its data set .*val2017"):
        runner.train()
    # Copies are the same.
    copied = tmp_path / "copy.json"
    copied.write_bytes((labels / "instances_val2017.json").read_bytes())
    config.val_evaluator.ann_file = str(copied)
    runner = engine.build_train_runner(Config(config.copy().to_dict()))
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.call_hook("before_train")
