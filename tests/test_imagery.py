# SPDX-License-Identifier: Apache-2.0
"""Raw imagery looks the same to checks, training, splitting, prediction and runtime."""

import copy
import json

import cv2
import numpy as np
import pytest
import tiny
from mmengine.registry import DATASETS, init_default_scope
from tiffs import write_tiff

from mmeformer import runtime
from mmeformer.checks.dataset import checked_datasets_of as datasets_of
from mmeformer.commands import split_dota
from mmeformer.images import LOADER, Reading
from mmeformer.inference import loop
from mmeformer.inference.inputs import find_sources
from mmeformer.inference.predictor import load_predictor

SETTINGS = dict(bands=(4, 3, 2), stretch=(0, 4080))
IMAGES = {
    "detection": ("coco/train2017", "coco/val2017"),
    "segmentation": ("masks/images/training", "masks/images/validation"),
    "rotated": ("aerial/train/images", "aerial/val/images"),
    "classification": tuple(f"folders/train/{name}" for name in tiny.ANIMALS),
}


def as_imagery(path, target=None, bands=5):
    """Write a picture as 12 bits of infrared, blue, green, red and infrared, or of the colors."""
    deep = cv2.imread(str(path)).astype(np.uint16) << 4
    infrared = deep[..., :1] // 3
    if bands == 5:
        write_tiff(target or path, np.concatenate([infrared, deep, infrared], 2))
    else:
        (target or path).write_bytes(cv2.imencode(".png", deep)[1].tobytes())


def steps(config):
    for split in ("train", "val", "test"):
        for step in config[f"{split}_dataloader"].dataset.pipeline:
            if step.type.endswith("LoadImageFromFile"):
                yield step


@pytest.fixture
def folder(tiny_copy):
    return tiny_copy


def first_image(config):
    """The first training image as the pipeline loads it, (H, W, 3) in BGR."""
    settings = copy.deepcopy(config.train_dataloader.dataset)
    settings.pipeline = settings.pipeline[:1]
    init_default_scope(config.default_scope)
    return DATASETS.build(settings)[0]["img"]


@pytest.mark.parametrize("bands", [3, 5])
@pytest.mark.parametrize("task", tiny.all_tasks())
def test_checks_and_training(folder, task, bands):
    config = tiny.ALL_TASKS[task](folder)
    picture = first_image(config)
    for place in IMAGES[task]:
        for path in (folder / place).iterdir():
            as_imagery(path, bands=bands)
    (dataset,) = datasets_of(config, "train")
    findings = dataset.findings()
    assert {finding.severity for finding in findings} == {"error"}
    if bands == 5:
        assert {finding.kind for finding in findings} == {"bands or depth"}
        assert len(findings) == 8 and "bands=(3, 2, 1)" in findings[0].message
    else:
        assert [finding.kind for finding in findings] == ["deep image"]
        assert "stretch=(0, 4095)" in findings[0].message
    with pytest.raises(ValueError, match="bands=" if bands == 5 else "stretch="):
        first_image(config)
    settings = SETTINGS if bands == 5 else dict(stretch=SETTINGS["stretch"])
    for step in steps(config):
        step.update(settings, type=LOADER)
    (dataset,) = datasets_of(config, "train")
    assert dataset.findings(decode=True) == []
    assert np.array_equal(first_image(config), picture)


def test_other_loaders_are_refused_where_they_misread(folder):
    config = tiny.detection(folder)
    for step in steps(config):
        step.type = "LoadImageFromFile"
    assert datasets_of(config, "train")[0].findings() == []
    for path in (folder / "coco/train2017").iterdir():
        write_tiff(path, cv2.imread(str(path)))
    findings = datasets_of(config, "train")[0].findings()
    assert {finding.kind for finding in findings} == {"bands or depth"} and len(findings) == 8
    assert "mmeformer.LoadImageFromFile" in findings[0].message


def test_split(folder, capsys):
    def split(name, *more):
        arguments = [str(folder / "aerial/train"), str(folder / name), "--labels", "annfiles"]
        arguments += ["--size", "64", "--overlap", "16", "--workers", "1"]
        status = split_dota.main([*arguments, *more])
        captured = capsys.readouterr()
        return status, (captured.out + captured.err).replace("\n", " ")

    assert split("plain")[0] == 0
    for path in (folder / "aerial/train/images").iterdir():
        as_imagery(path)
    status, text = split("a")
    assert status == 1 and "bands=(3, 2, 1)" in text
    bands = ("--bands", "4", "3", "2")
    status, text = split("b", *bands)
    assert status == 1 and "--stretch 0 4095" in text
    assert not list((folder / "b/images").iterdir())
    assert split("cut", *bands, "--stretch", "0", "4080")[0] == 0
    ours, theirs = (sorted((folder / name / "images").iterdir()) for name in ("cut", "plain"))
    assert len(ours) == 8
    for left, right in zip(ours, theirs, strict=True):
        assert np.array_equal(cv2.imread(str(left)), cv2.imread(str(right)))
    status, text = split("c", *bands, "--stretch", "much")
    assert status == 1 and "stretch must be (low, high)" in text


def test_prediction_and_runtime(tmp_path):
    """A model whose pipeline stretches predicts on imagery as on the picture it shows."""
    picture = tmp_path / "picture.png"
    image = np.full((64, 64, 3), 90, np.uint8)
    cv2.circle(image, (25, 25), 15, (200, 60, 20), -1)
    cv2.rectangle(image, (35, 30), (60, 55), (20, 180, 240), -1)
    cv2.imwrite(str(picture), image)
    as_imagery(picture, tmp_path / "raw.tif")
    config = tiny.small_config("segmentation")
    for step in steps(config):
        step.update(SETTINGS, type=LOADER)
    checkpoint = tiny.save_trained(config, tmp_path)
    predictor = load_predictor(config, checkpoint, device="cpu")
    assert predictor.reading == Reading(**SETTINGS)
    found = []
    for path in (picture, tmp_path / "raw.tif"):
        out = tmp_path / path.stem / "out"
        status = list(loop.run(predictor, find_sources([path]), out, loop.Settings()))
        assert [item.error for item in status] == [None]
        found.append(cv2.imread(str(out / "masks" / f"{path.stem}.png")))
        found.append(cv2.imread(str(out / "pictures" / f"{path.stem}.jpg")))
    assert len(np.unique(found[0])) > 1
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])

    trained = tiny.Trained(copy.deepcopy(config), checkpoint, tmp_path)
    model = runtime.load(tiny.exported(trained, picture, part="backbone"))
    left, right = (model.predict(path).levels[0] for path in (picture, tmp_path / "raw.tif"))
    assert np.array_equal(left, right) and left.std() > 0


def test_metadata_of_earlier_versions():
    from mmeformer.runtime.metadata import Metadata

    zeros = (0.0, 0.0, 0.0)
    metadata = Metadata("backbone", "0.2", "c", zeros, zeros, True, **SETTINGS)
    values = json.loads(metadata.to_json())
    assert Metadata.from_json(json.dumps(values), "a.onnx").reading == Reading(**SETTINGS)
    del values["bands"], values["stretch"]
    assert Metadata.from_json(json.dumps(values), "a.onnx").reading == Reading()
