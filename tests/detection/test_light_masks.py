# SPDX-License-Identifier: Apache-2.0
"""The light detector with masks: its head, and its template from the checker to the runtime."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from pycocotools import mask as coco_masks

from mmeformer import configs, runtime
from mmeformer.commands import check_dataset, export, predict, test, train
from mmeformer.registry import DATASETS


def test_head_gives_maps_of_every_level():
    config = tiny.network("detection", tiny.LIGHT_MASKS).model.bbox_head
    init_default_scope("mmdet")
    head = MODELS.build(config)
    head.init_weights()
    levels = tuple(torch.randn(2, tiny.WIDTH, 16 // 2**i, 8 // 2**i) for i in range(3))
    scores, distances, kernels, features = head(levels)
    for level, maps in enumerate(zip(scores, distances, kernels, strict=True)):
        size = levels[level].shape[2:]
        assert [m.shape for m in maps] == [(2, c, *size) for c in (2, 4, 169)]
        # Before training every box is about two strides large.
        assert 0.5 < float(maps[1].detach().mean()) / 8 / 2**level < 1.5 and (maps[1] >= 0).all()
    assert features.shape == (2, 8, 16, 8)
    sum(x.square().sum() for x in (*scores, *distances, *kernels, features)).backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None]
    # The shared features are made by depthwise convolutions.
    layers = [m for m in head.mask_head.modules() if isinstance(m, torch.nn.Conv2d)]
    spatial = [conv for conv in layers if conv.kernel_size[0] > 1]
    assert spatial and all(conv.groups == conv.in_channels for conv in spatial)


def as_outlines(path):
    """Replace run lengths by the outlines of the boxes."""
    content = json.loads(path.read_text())
    for item in content["annotations"]:
        left, top, width, height = item["bbox"]
        right, bottom = left + width, top + height
        item["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("stage", ["train_pipeline", "last_pipeline"])
def test_mosaics_keep_the_masks_of_their_boxes(tmp_path, stage):
    root = tiny.write_coco_dataset(tmp_path / "coco", train=8, val=2, size=64)
    as_outlines(root / "annotations/instances_train2017.json")
    config = configs.load_config(
        "detection/rtmdet-ins-lite_efficientformerv2-s0_pafpn_300e_coco-640x640.py"
    )
    settings = config.train_dataloader.dataset
    names = configs.load_config(tiny.LIGHT).metainfo
    settings.update(data_root=str(root), pipeline=config[stage], metainfo=names)
    init_default_scope("mmdet")
    np.random.seed(0)
    dataset = DATASETS.build(settings)
    seen = 0
    for index in range(4):
        sample = dataset[index]["data_samples"]
        found = sample.gt_instances
        assert len(found.masks) == len(found.bboxes) == len(found.labels)
        # Crops cut polygons and boxes at the same edge.
        masks = found.masks.to_tensor(torch.bool, "cpu")
        for mask, box in zip(masks, found.bboxes.tensor, strict=True):
            left, top, right, bottom = (int(value) for value in box.round())
            inside = mask[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2]
            assert inside.sum() == mask.sum()
            seen += int(mask.any())
    assert seen >= 4


def test_run_lengths_are_not_ignored_silently(tmp_path):
    root = tiny.write_coco_dataset(tmp_path / "coco", train=8, val=2, size=64)
    config = configs.load_config(
        "detection/rtmdet-ins-lite_efficientformerv2-s0_pafpn_300e_coco-640x640.py"
    )
    settings = config.train_dataloader.dataset
    settings.update(data_root=str(root), metainfo=configs.load_config(tiny.LIGHT).metainfo)
    init_default_scope("mmdet")
    with pytest.raises(ValueError, match="masks as run lengths.*poly2mask=True"):
        DATASETS.build(settings)


# --- own data ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, its file, checkpoint) after a few iterations of the template."""
    folder = tmp_path_factory.mktemp("masks")
    config = tiny.with_masks(folder, iterations=24)
    config.work_dir = str(folder / "work")
    config.model.test_cfg.update(score_thr=0.001, max_per_img=5)
    config.default_hooks.checkpoint.interval = 24
    config.optim_wrapper.optimizer.lr = 5e-3
    config.train_dataloader.batch_size = 8
    config.model.backbone.drop_path_rate = 0.0
    path = folder / "masks.py"
    config.dump(str(path))
    with tiny.one_thread():
        assert train.main([str(path)]) == 0
    checkpoint = Path(config.work_dir, "last_checkpoint").read_text().strip()
    return config, path, checkpoint


@pytest.fixture(autouse=True)
def quiet(quiet_logging):
    """Commands in one process."""


@pytest.mark.slow
def test_masks_are_learned(trained):
    (log,) = Path(trained[0].work_dir).glob("*/vis_data/scalars.json")
    rows = map(json.loads, log.read_text().splitlines())
    losses = [row["loss_mask"] for row in rows if "loss_mask" in row]
    assert len(losses) == 24 and all(map(math.isfinite, losses))
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


@pytest.mark.slow
def test_masks_are_checked_and_evaluated(trained, capsys):
    _, path, checkpoint = trained
    assert check_dataset.main([str(path)]) == 0, capsys.readouterr()
    assert test.main([str(path), checkpoint, "--tta"]) == 0
    shown = capsys.readouterr()
    assert "bbox_mAP_50" in shown.out + shown.err and "segm_mAP_50" in shown.out + shown.err


@pytest.mark.slow
def test_masks_are_predicted_and_exported(trained, tmp_path, capsys):
    config, path, checkpoint = trained
    folder = Path(config.test_dataloader.dataset.data_root, "val2017")
    arguments = [str(path), checkpoint, str(folder), "--score-thr", "0.001"]
    assert predict.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    assert written["annotations"]

    file = tmp_path / "masks.onnx"
    arguments = [str(path), checkpoint, "--to", "onnx", "--dynamic", "--out", str(file)]
    assert export.main(arguments) == 0
    model = runtime.load(file)
    for image in written["images"]:
        own = [item for item in written["annotations"] if item["image_id"] == image["id"]]
        found = model.predict(folder / Path(image["file_name"]).name)
        expected = np.stack([coco_masks.decode(item["segmentation"]) for item in own]).astype(bool)
        assert len(found.boxes) == len(own) == 5
        assert (found.masks() != expected).mean((1, 2)).max() <= 1e-3
    assert test.main([str(path), str(file)]) == 0
    shown = capsys.readouterr()
    assert "segm_mAP_50" in shown.out + shown.err
