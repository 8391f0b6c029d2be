# SPDX-License-Identifier: Apache-2.0
"""mmrotate's own detectors on our backbones train and predict, without a compiler."""

import pytest
import tiny
import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.registry import init_default_scope
from mmrotate.registry import MODELS
from samples import random_sample

from mmeformer import configs
from mmeformer.ops import status
from mmeformer.training import device

SIDE = 64
DETECTORS = {
    "oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py": 4,
    "roi_trans/roi-trans-le90_r50_fpn_1x_dota.py": 4,
    "rotated_rtmdet/rotated_rtmdet_tiny-3x-dota.py": 3,
    "rotated_fcos/rotated-fcos-le90_r50_fpn_1x_dota.py": 3,
}
"""Configs of mmrotate, and how many maps of the backbone they use."""
OUR_LOSS = """
custom_imports = dict(imports=["mmeformer.rotated"], allow_failed_imports=False)
model = dict(bbox_head=dict(loss_bbox=dict(type="mmeformer.RotatedIoULoss")))
"""
SMALL = dict.fromkeys(("in_channels", "out_channels", "feat_channels"), tiny.WIDTH) | dict(
    fc_out_channels=32, stacked_convs=1, nms_pre=60, max_per_img=20, num=32, score_thr=0.0
)


def shrink(node) -> None:
    """Narrow heads and few candidates, in place; no score is too low."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key in SMALL and not isinstance(value, list):
            node[key] = SMALL[key]
        elif isinstance(value, dict | list):
            shrink(value)


@pytest.mark.skipif(status().operators != "torch", reason="mmcv has compiled operators here")
@pytest.mark.parametrize(
    "name, lines",
    [(name, "") for name in DETECTORS] + [(name, OUR_LOSS) for name in list(DETECTORS)[2:]],
)
def test_computes_gradients_and_predicts(name, lines, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(f'_base_ = "mmrotate::{name}"\n{lines}')
    config = configs.load_config(path)
    shrink(config.model)
    used = (0, 1, 2, 3)[-DETECTORS[name] :]
    config.model.backbone = dict(
        type="mmeformer.EfficientFormerV2", arch=tiny.ARCH, out_indices=used
    )
    config.model.neck.in_channels = [tiny.ARCH["widths"][index] for index in used]
    device.prepare_device(config, "none")
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(config.model)

    data = dict(
        inputs=list(torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)),
        data_samples=[random_sample("rotated", count, SIDE, seed=count) for count in (3, 2)],
    )
    losses = model.train()(**model.data_preprocessor(data, training=True), mode="loss")
    loss, logs = model.parse_losses(losses)
    assert all(value.isfinite() for value in logs.values()), logs
    assert all(value > 0 for key, value in logs.items() if "loss_bbox" in key), logs
    loss.backward()
    head = "roi_head" if "roi_head" in config.model else "bbox_head"
    moved = set()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key
            moved |= {key.partition(".")[0]} if parameter.grad.any() else set()
    assert {"backbone", "neck", head} <= moved

    with torch.no_grad():
        found = model.eval().test_step(data)
    for sample in found:
        boxes = get_box_tensor(sample.pred_instances.bboxes)
        assert len(boxes) and boxes.shape[1] == 5 and boxes.isfinite().all()
