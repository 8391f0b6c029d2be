# SPDX-License-Identifier: Apache-2.0
"""Small models of the three tasks, as if they had been trained, and their exports."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn
from trained_like import trained_like

from mmeformer import configs
from mmeformer.deploy import export, models
from mmeformer.deploy.export import Request

ARCH = dict(widths=(8, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 1, 1))
WIDTH = 32
"""Channels of necks and heads."""

QUICKSTARTS = {
    "segmentation": "segmentation/semantic-fpn_efficientformerv2-s0_quickstart.py",
    "detection": "detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py",
    "rotated": "rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_quickstart.py",
}


@dataclass(frozen=True)
class Trained:
    """A config with a checkpoint of its model."""

    config: Config
    checkpoint: str
    folder: Path
    """Empty."""


def small_config(task: str) -> Config:
    """The task's quickstart with a tiny network, for pictures of 64 px."""
    config = configs.load_config(QUICKSTARTS[task])
    model = config.model
    model.backbone.update(arch=ARCH)
    model.neck.update(
        in_channels=[ARCH["widths"][i] for i in model.backbone.get("out_indices", range(4))],
        out_channels=WIDTH,
    )
    if task == "segmentation":
        model.decode_head.update(in_channels=[WIDTH] * 4, channels=16)
    elif task == "detection":
        model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
        heads = model.roi_head
        heads.bbox_roi_extractor.out_channels = heads.mask_roi_extractor.out_channels = WIDTH
        heads.bbox_head.update(in_channels=WIDTH, fc_out_channels=32)
        heads.mask_head.update(in_channels=WIDTH, conv_out_channels=16)
        model.test_cfg.rpn.update(nms_pre=40, max_per_img=30)
    else:
        model.bbox_head.update(in_channels=WIDTH, feat_channels=WIDTH, stacked_convs=1)
        # A group of one channel has no variance on the coarsest map, which is one place large.
        model.bbox_head.norm_cfg = dict(type="GN", num_groups=4)
        model.test_cfg.update(nms_pre=50, score_thr=0.2)
    if task != "segmentation":
        for step in config.test_dataloader.dataset.pipeline:
            if step.type.endswith("Resize"):
                step.scale = (64, 64)
    return config


def save_trained(config: Config, folder: Path, seed: int = 0) -> str:
    """A checkpoint with spread weights, so that scores and boxes tell objects apart."""
    torch.manual_seed(seed)
    model = trained_like(models.build_model(copy.deepcopy(config)), seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            outputs = ("rpn_cls", "rpn_reg", "fc_cls", "fc_reg", "gfl_cls", "gfl_reg")
            if name.rpartition(".")[2] in (*outputs, "conv_logits", "conv_seg"):
                nn.init.normal_(module.weight, std=1.5 * module.weight[0].numel() ** -0.5)
    path = folder / "trained.pth"
    meta = dict(dataset_meta=dict(config.test_dataloader.dataset.metainfo))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


def exported(trained, picture, name="model.onnx", lines=None, folder=None, **request):
    """Export a small model, checked on a real picture too; returns the file."""
    out = (folder or trained.folder) / name
    lines = [] if lines is None else lines
    return export.export(
        trained.config,
        trained.checkpoint,
        out,
        Request(**{"target": "onnx", **request}),
        images=[picture],
        force=True,
        report=lines.append,
    )
