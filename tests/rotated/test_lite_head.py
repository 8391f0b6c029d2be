# SPDX-License-Identifier: Apache-2.0
"""The light neck and head of rotated detection: losses of the plain head, exports."""

import copy

import pytest
import tiny
import torch
from mmengine.registry import init_default_scope

from mmeformer import runtime
from mmeformer.deploy import models
from mmeformer.deploy.check import random_image
from mmeformer.registry import MODELS
from mmeformer.rotated import RotatedGFLHead, RotatedLiteGFLHead


def light_config():
    """The tiny rotated detector with the light neck and head."""
    config = tiny.small_config("rotated")
    model = config.model
    widths = [tiny.ARCH["widths"][index] for index in model.backbone.out_indices]
    model.neck = dict(type="mmeformer.LitePAFPN", in_channels=widths, out_channels=tiny.WIDTH)
    model.bbox_head.type = "mmeformer.RotatedLiteGFLHead"
    model.bbox_head.norm_cfg = dict(type="BN")
    model.bbox_head.anchor_generator.strides = [8, 16, 32]
    return config


def test_layers_alone_differ_from_the_plain_head():
    config = light_config()
    init_default_scope("mmrotate")
    settings = config.model.bbox_head.to_dict() | dict(train_cfg=config.model.train_cfg)
    light = MODELS.build(settings | dict(test_cfg=config.model.test_cfg))
    assert type(light) is RotatedLiteGFLHead
    assert RotatedLiteGFLHead.loss_by_feat is RotatedGFLHead.loss_by_feat
    assert RotatedLiteGFLHead.predict_by_feat is RotatedGFLHead.predict_by_feat
    torch.manual_seed(0)
    levels = [torch.randn(2, tiny.WIDTH, side, side) for side in (8, 4, 2)]
    scores, logits = light(levels)
    bins = 5 * (light.reg_max + 1)
    assert [level.shape for level in scores] == [(2, light.num_classes, s, s) for s in (8, 4, 2)]
    assert [level.shape for level in logits] == [(2, bins, s, s) for s in (8, 4, 2)]
    sum(level.mean() for level in (*scores, *logits)).backward()
    assert [name for name, p in light.named_parameters() if p.grad is None] == []


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    import cv2

    path = tmp_path_factory.mktemp("picture") / "picture.png"
    cv2.imwrite(str(path), random_image(64, 64, 0))
    return path


def test_exports_predict_as_pytorch(picture, tmp_path):
    config = light_config()
    small = tiny.Trained(copy.deepcopy(config), tiny.save_trained(config, tmp_path), tmp_path)
    lines: list[str] = []
    path = tiny.exported(small, picture, lines=lines, preprocessing=True)
    assert any("detections match" in line for line in lines), lines
    assert len(runtime.load(path).predict(picture).boxes) >= 5
    model = models.build_model(config, small.checkpoint)
    assert [stride[0] for stride in model.bbox_head.prior_generator.strides] == [8, 16, 32]
