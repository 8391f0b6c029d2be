# SPDX-License-Identifier: Apache-2.0
import copy
from dataclasses import replace

import cv2
import numpy as np
import pytest
from mmengine.structures import BaseDataElement

from mmeformer.commands import test as command
from mmeformer.deploy.evaluate import ExportedModel, use_exported
from mmeformer.synthetic.aerial import write_dota_dataset
from mmeformer.synthetic.masks import write_mask_dataset
from mmeformer.synthetic.shapes import write_coco_dataset
from mmeformer.training import engine

WRITERS = {
    "segmentation": write_mask_dataset,
    "detection": write_coco_dataset,
    "rotated": write_dota_dataset,
}


def evaluate(config, checkpoint, folder) -> dict:
    config = copy.deepcopy(config)
    config.work_dir = str(folder)
    config.test_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    if str(checkpoint).endswith(".onnx"):
        use_exported(config, str(checkpoint))
        checkpoint = None
    return engine.build_test_runner(config, checkpoint).test()


@pytest.mark.parametrize("task", ["segmentation", "detection", "rotated"])
def test_the_metric_is_that_of_the_checkpoint(trained, onnx_file, tmp_path, task):
    small = trained(task)
    # Pictures larger than the network's input: resizing and bringing back count too.
    root = WRITERS[task](tmp_path / "data", train=1, val=6, size=96)
    small.config.test_dataloader.dataset.data_root = str(root) + "/"
    if task == "detection":
        small.config.test_evaluator.ann_file = str(root / "annotations/instances_val2017.json")
    path = onnx_file(task, size=None, preprocessing=task == "detection")
    theirs = evaluate(small.config, small.checkpoint, tmp_path)
    ours = evaluate(small.config, path, tmp_path)
    assert set(ours) == set(theirs) and ours
    for name, value in theirs.items():
        points = 1 if "coco" in name or "dota" in name else 100
        assert ours[name] == pytest.approx(value, abs=1e-3 * points), name
    if task == "segmentation":
        assert theirs["mIoU"] > 1


@pytest.mark.parametrize("task", ["segmentation", "detection", "rotated"])
def test_no_image_is_cut(onnx_file, tmp_path, monkeypatch, task):
    """The metric of the checkpoint is that of whole images; small patches are padded in both."""
    model = ExportedModel(str(onnx_file(task, size=None, preprocessing=task == "detection")))
    predictor, runs = model.predictor, []
    limits = dict(patch_size=64) if task == "rotated" else dict(cut_above=100, window=64)
    predictor.metadata = replace(predictor.metadata, **limits)
    run = predictor.run
    monkeypatch.setattr(predictor, "run", lambda batch: runs.extend(batch) or run(batch))
    sizes = [(80, 150), (30, 40)]
    for size in sizes:
        path = tmp_path / f"{size[0]}.png"
        cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
        model.test_step(dict(data_samples=[BaseDataElement(metainfo=dict(img_path=str(path)))]))
    assert [item.original for item in runs] == [
        (80, 150),
        (64, 64) if limits.get("patch_size") else (30, 40),
    ]


def test_files_that_do_not_fit(trained, onnx_file, tmp_path, capsys, quiet_logging):
    small = trained("segmentation")
    path = onnx_file("segmentation", size=None, preprocessing=False)
    with pytest.raises(ValueError, match="model for segmentation, but the config is for detection"):
        evaluate(trained("detection").config, path, tmp_path)
    small.config.test_dataloader.dataset.metainfo.classes = ("background", "other")
    with pytest.raises(ValueError, match=r"the config has \['background', 'other'\]"):
        evaluate(small.config, path, tmp_path)
    config = tmp_path / "config.py"
    small.config.dump(config)
    assert command.main([str(config), str(path), "--tta", "--work-dir", str(tmp_path)]) == 1
    assert "test-time augmentation needs a checkpoint" in capsys.readouterr().err
