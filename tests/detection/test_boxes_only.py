# SPDX-License-Identifier: Apache-2.0
"""Data with boxes but no masks, with the templates for it: from the checker to the runtime."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from mmeformer import runtime
from mmeformer.commands import check_dataset, export, predict, test, train
from mmeformer.training import engine

TEMPLATES = [
    pytest.param(tiny.LIGHT_CUSTOM, id="light"),
    pytest.param(tiny.FASTER_RCNN_CUSTOM, id="faster-rcnn", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=TEMPLATES)
def trained(tmp_path_factory, request):
    """(config, its file, checkpoint) after a few iterations of a template."""
    folder = tmp_path_factory.mktemp("boxes")
    config = tiny.boxes_only(folder, path=request.param)
    config.work_dir = str(folder / "work")
    test_cfg = config.model.test_cfg
    test_cfg.get("rcnn", test_cfg).update(score_thr=0.001, max_per_img=5)
    path = folder / "boxes.py"
    config.dump(str(path))
    with tiny.one_thread():
        assert train.main([str(path)]) == 0
    checkpoint = Path(config.work_dir, "last_checkpoint").read_text().strip()
    return config, path, checkpoint


@pytest.fixture(autouse=True)
def quiet(quiet_logging):
    """Commands in one process."""


def test_the_checker_wants_no_masks(trained, capsys):
    _, path, _ = trained
    assert check_dataset.main([str(path)]) == 0, capsys.readouterr()


def test_boxes_are_learned_evaluated_exported_and_predicted(trained, tmp_path, capsys):
    config, path, checkpoint = trained
    assert test.main([str(path), checkpoint]) == 0
    shown = capsys.readouterr()
    assert "bbox_mAP_50" in shown.out + shown.err and "segm" not in shown.out

    folder = Path(config.test_dataloader.dataset.data_root, "val2017")
    arguments = [str(path), checkpoint, str(folder), "--score-thr", "0.001"]
    assert predict.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    assert written["annotations"]
    assert all("segmentation" not in entry for entry in written["annotations"])

    file = tmp_path / "boxes.onnx"
    arguments = [str(path), checkpoint, "--to", "onnx", "--dynamic", "--out", str(file)]
    assert export.main(arguments) == 0
    model = runtime.load(file)
    entries = {image["file_name"]: [] for image in written["images"]}
    names = {image["id"]: image["file_name"] for image in written["images"]}
    for entry in written["annotations"]:
        entries[names[entry["image_id"]]].append(entry)
    for name, expected in entries.items():
        found = model.predict(folder / Path(name).name)
        assert found.instance_masks is None
        assert len(found.boxes) == len(expected) == 5
        scores = sorted(entry["score"] for entry in expected)
        np.testing.assert_allclose(sorted(found.scores.tolist()), scores, atol=1e-3)
    assert test.main([str(path), str(file)]) == 0


def test_augmentation_and_tiles(trained, tmp_path, capsys):
    config, path, checkpoint = trained
    assert test.main([str(path), checkpoint, "--tta"]) == 0
    shown = capsys.readouterr()
    assert "bbox_mAP_50" in shown.out + shown.err
    folder = Path(config.test_dataloader.dataset.data_root, "val2017")
    arguments = [str(path), checkpoint, str(folder), "--score-thr", "0.001", "--window", "48"]
    assert predict.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    assert written["annotations"]


@pytest.mark.slow
@pytest.mark.parametrize("template", [tiny.LIGHT_CUSTOM, tiny.FASTER_RCNN_CUSTOM])
def test_a_tiny_detector_learns_its_images(tmp_path, template):
    config = tiny.boxes_only(tmp_path, iterations=200, path=template)
    config.work_dir = str(tmp_path / "work")
    config.train_dataloader.batch_size = 8
    config.model.backbone.drop_path_rate = 0.0
    if "rcnn" in config.model.train_cfg:
        config.model.train_cfg.rcnn.sampler.num = 64
    config.optim_wrapper.optimizer.lr = 2e-3
    config.default_hooks.checkpoint.interval = 200
    config.test_dataloader.dataset.update(
        ann_file="annotations/instances_train2017.json", data_prefix=dict(img="train2017/")
    )
    root = Path(config.train_dataloader.dataset.data_root)
    config.test_evaluator.ann_file = str(root / "annotations/instances_train2017.json")
    engine.build_train_runner(config.copy()).train()
    checkpoint = Path(config.work_dir, "last_checkpoint").read_text().strip()
    metrics = engine.build_test_runner(config, checkpoint).test()
    assert metrics["coco/bbox_mAP_50"] > 0.6
