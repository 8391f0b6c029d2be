# SPDX-License-Identifier: Apache-2.0
"""Other detectors on our backbones: the backbone is exported and profiled, the rest is refused."""

import json
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from tiny import ARCH

from mmeformer import runtime
from mmeformer.commands import export, profile
from mmeformer.deploy import models

CONFIGS = {
    "RetinaNet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "RTMDet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "DINO": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}


@pytest.fixture(params=CONFIGS)
def detector(request, tmp_path):
    """(type, config file, checkpoint) of a config of mmdet with a tiny backbone of ours."""
    folder = Path(mmdet.__file__).parent / ".mim/configs"
    if not folder.is_dir():
        pytest.skip("mmdet was installed without its configs")
    config = Config.fromfile(folder / CONFIGS[request.param])
    indices = (0, 1, 2, 3) if request.param == "RetinaNet" else (1, 2, 3)
    config.model.backbone = dict(
        type="mmeformer.EfficientFormerV2", arch=dict(ARCH), out_indices=indices
    )
    config.model.neck.in_channels = [ARCH["widths"][index] for index in indices]
    config.custom_imports = dict(imports=["mmeformer.backbones"])
    path = tmp_path / "detector.py"
    config.dump(str(path))
    model = models.build_model(Config.fromfile(path))
    assert type(model).__name__ == request.param
    # DINO has parameters that are uninitialized memory until then.
    model.init_weights()
    checkpoint = tmp_path / "detector.pth"
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    return request.param, str(path), str(checkpoint)


def test_the_backbone_is_exported_and_profiled_and_the_rest_refused(
    detector, picture, tmp_path, capsys, quiet_logging
):
    kind, path, checkpoint = detector
    out = tmp_path / "model.onnx"
    arguments = [path, checkpoint, "--to", "onnx", "--dynamic", "--out", str(out)]
    figures = tmp_path / "profile.json"
    measuring = [path, "--size", "64", "64", "--modes", "eager", "--rounds", "2"]
    for command, given in ((export, arguments), (profile, measuring)):
        assert command.main(given) == 1
        error = capsys.readouterr().err
        assert (
            f"{kind} is neither a two-stage detector of mmdet nor GFL" in error
            and "--part backbone" in error
        )
        assert "rcnn" not in error.lower().replace("r-cnn", "")
    assert not out.exists()

    assert export.main([*arguments, "--part", "backbone", "--images", str(picture)]) == 0
    levels = runtime.load(out).predict(picture).levels
    widths = ARCH["widths"] if kind == "RetinaNet" else ARCH["widths"][1:]
    assert [level.shape[0] for level in levels] == list(widths)
    assert profile.main([*measuring, "--part", "backbone", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["total"]["params"] > 0


def test_other_rotated_detectors(trained, tmp_path, capsys, quiet_logging):
    small = trained("rotated")
    small.config.model.bbox_head.type = "mmrotate.RotatedRetinaHead"
    for key in ("reg_max", "delta_range", "angle_range", "loss_dfl"):
        small.config.model.bbox_head.pop(key, None)
    small.config.model.bbox_head.loss_bbox = dict(type="mmdet.L1Loss")
    path = tmp_path / "other.py"
    small.config.dump(str(path))
    arguments = [str(path), "--size", "64", "64", "--modes", "eager", "--rounds", "2"]
    assert profile.main(arguments) == 1
    error = capsys.readouterr().err
    assert "no RotatedGFLHead" in error, error
    assert "--part backbone" in error
    assert profile.main([*arguments, "--part", "backbone"]) == 0


def test_profiles_do_not_depend_on_how_images_are_prepared(trained, tmp_path, capsys):
    small = trained("detection")
    small.config.model.data_preprocessor.pad_value = 114
    small.config.test_dataloader.dataset.pipeline[0].color_type = "grayscale"
    path = tmp_path / "other.py"
    small.config.dump(str(path))
    arguments = [str(path), "--size", "64", "64", "--modes", "folded", "--rounds", "2"]
    assert profile.main(arguments) == 0, capsys.readouterr().err
