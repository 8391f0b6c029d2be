# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest
import torch
from helpers import larger_are_slow
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from mmeformer import configs
from mmeformer.layers.attention_bias import AttentionBias
from mmeformer.layers.blocks import LayerScale
from mmeformer.paths import config_dir
from mmeformer.training import device
from mmeformer.variants import VARIANTS

CONFIGS = sorted(path.name for path in (config_dir() / "detection").glob("*.py"))
FULL = {
    "mask-rcnn_efficientformerv2-s0_fpn_quickstart.py",
    "mask-rcnn_efficientformerv2-s0_fpn_custom.py",
    "faster-rcnn_efficientformerv2-s0_fpn_custom.py",
    "gfl-lite_efficientformerv2-s0_pafpn_custom.py",
    "gfl-lite_efficientformerv2-s0_pafpn_quickstart.py",
    "rtmdet-ins-lite_efficientformerv2-s0_pafpn_custom.py",
}


# Other schedules of the same models.
SAME_MODEL = {
    name: re.sub("(amp-1x|ms-3x)", "1x", name)
    for name in CONFIGS
    if "_amp-" in name or "_ms-" in name
}


def load(name):
    config = configs.load_config(f"detection/{name}")
    configs.drop_pretrained(config.model)
    device.prepare_device(config, "none")
    init_default_scope(config.default_scope)
    return config


def variant_of(config):
    family = "efficientformerv2" if config.model.backbone.type.endswith("V2") else "efficientformer"
    return VARIANTS[f"{family}_{config.model.backbone.arch}"]


def test_every_variant_has_its_configs():
    for variant in VARIANTS.values():
        stem = f"mask-rcnn_{variant.name.replace('_', '-')}_fpn"
        assert f"{stem}_1x_coco.py" in CONFIGS
        if variant.arch in ("l1", "s2"):
            assert {f"{stem}_amp-1x_coco.py", f"{stem}_ms-3x_coco.py"} <= set(CONFIGS)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - FULL))
def test_children_state_only_what_differs(name):
    text = (config_dir() / "detection" / name).read_text()
    assert len(text.splitlines()) <= 10


@pytest.mark.parametrize("name", CONFIGS)
def test_config_agrees_with_the_table(name):
    config = configs.load_config(f"detection/{name}")
    variant = variant_of(config)
    assert variant.name.replace("_", "-") in name
    levels = config.model.backbone.get("out_indices", range(4))
    widths = tuple(variant.architecture.widths[index] for index in levels)
    assert tuple(config.model.neck.in_channels) == widths
    published = f"timm://{variant.name}.snap_dist_in1k"
    init_cfg = config.model.backbone.get("init_cfg")
    assert init_cfg is None or init_cfg.checkpoint == published
    if "_1x_coco" in name or "3x_coco" in name:
        assert config.auto_scale_lr.base_batch_size == 16
        assert init_cfg is not None
        assert config.optim_wrapper.optimizer.lr == 2e-4
        decay = 1e-4 if variant.family == "v1" else 0.05
        assert config.optim_wrapper.optimizer.weight_decay == decay
        assert config.model.backbone.get("norm_eval", False) == (variant.family == "v2")
        assert config.train_cfg.max_epochs == (36 if "3x" in name else 12)
        assert ("AmpOptimWrapper" == config.optim_wrapper.type) == ("amp" in name)
        resize = config.train_dataloader.dataset.pipeline[2].type
        assert resize == ("RandomResize" if "ms-" in name else "Resize")


LITE = [name for name in CONFIGS if "-lite_" in name and "_coco" in name]
# Other sizes of images.
SAME_MODEL |= {name: name.replace("416x416", "640x640") for name in LITE if "416" in name}


@pytest.mark.parametrize("name", LITE)
def test_light_config_agrees_with_its_name(name):
    config = configs.load_config(f"detection/{name}")
    size = tuple(map(int, re.search(r"coco-(\d+)x(\d+)", name).groups()))
    pipelines = (config.train_pipeline, config.last_pipeline)
    assert all(step.size == size for steps in pipelines for step in steps if step.type == "Pad")
    assert config.test_dataloader.dataset.pipeline[1].scale == size
    assert config.model.backbone.bias_grid == size[0] // 32
    assert config.train_dataloader.dataset.pipeline == config.train_pipeline
    assert config.custom_hooks[-1].switch_pipeline == config.last_pipeline
    model = config.model
    assert model.neck.out_channels == model.bbox_head.in_channels == model.bbox_head.feat_channels
    masks = name.startswith("rtmdet-ins")
    pipelines += (config.test_pipeline, *config.tta_pipeline[1].transforms)
    loads = [s for steps in pipelines for s in steps if s.type == "LoadAnnotations"]
    assert [step.get("with_mask", False) for step in loads] == [masks] * 4


def without_masks(value):
    """A config without its masks, as plain containers."""
    if isinstance(value, dict):
        mask_settings = ("mask_head", "mask_roi_extractor", "with_mask", "pad_mask")
        return {k: without_masks(v) for k, v in value.items() if k not in mask_settings}
    if isinstance(value, (list, tuple)):
        return [without_masks(item) for item in value]
    return value


@pytest.mark.parametrize("kind", ["1x_coco", "custom"])
def test_faster_rcnn_is_mask_rcnn_without_masks(kind):
    with_masks, boxes = (
        without_masks(configs.load_config(path).to_dict())
        for path in (
            f"detection/mask-rcnn_efficientformerv2-s0_fpn_{kind}.py",
            f"detection/faster-rcnn_efficientformerv2-s0_fpn_{kind}.py",
        )
    )
    assert with_masks["model"].pop("type") == "MaskRCNN"
    assert boxes["model"].pop("type") == "FasterRCNN"
    for evaluator in ("val_evaluator", "test_evaluator"):
        assert with_masks[evaluator].pop("metric") == ["bbox", "segm"]
        assert boxes[evaluator].pop("metric") == "bbox"
    assert with_masks == boxes


def small_batch(num_classes, masks):
    torch.manual_seed(0)
    return demo_mm_inputs(
        2, [[3, 64, 96], [3, 75, 64]], num_items=[3, 2], num_classes=num_classes, with_mask=masks
    )


@pytest.mark.parametrize("name", SAME_MODEL)
def test_schedules_change_nothing_of_a_step(name):
    """So that a step of the first schedule, below, is one of them all."""
    config, other = load(name), load(SAME_MODEL[name])
    if "416x416" in name:
        config.model.backbone.bias_grid = other.model.backbone.bias_grid
    assert config.model == other.model and config.optim_wrapper == other.optim_wrapper


@pytest.mark.parametrize(
    "name", larger_are_slow([name for name in CONFIGS if name not in SAME_MODEL])
)
def test_trains_a_step_and_predicts(name):
    config = load(name)
    train, test = config.model.train_cfg, config.model.test_cfg
    one_stage = "rpn_head" not in config.model
    if one_stage:
        test.max_per_img = 10
        head, num_classes = "bbox_head", config.model.bbox_head.num_classes
    else:
        # Images of 64 px do not need hundreds of proposals.
        for proposals in (train.rpn_proposal, test.rpn):
            proposals.update(nms_pre=100, max_per_img=50)
        train.rcnn.sampler.num = 32
        test.rcnn.max_per_img = 10
        head, num_classes = "roi_head.bbox_head", config.model.roi_head.bbox_head.num_classes
    model = MODELS.build(config.model)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    masks = name.startswith(("mask-rcnn", "rtmdet-ins"))
    assert one_stage or masks == model.roi_head.with_mask
    model.train()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    logs = model.train_step(small_batch(num_classes, masks), wrapper)
    assert torch.isfinite(logs["loss"])
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    moved = [k for k, v in model.named_parameters() if not torch.equal(v, before[k])]
    assert any(k.startswith("backbone.stem") for k in moved)
    assert any(k.startswith(head) for k in moved)
    assert any("_head.mask_head" in k for k in moved) == masks

    model.eval()
    with torch.no_grad():
        results = model.test_step(small_batch(num_classes, masks))
    assert len(results) == 2
    for result in results:
        instances = result.pred_instances
        assert len(instances.bboxes) == len(instances.labels)
        assert not masks or len(instances.masks) == len(instances.bboxes)
        assert instances.bboxes.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        "mask-rcnn_efficientformer-l1_fpn_1x_coco.py",
        "mask-rcnn_efficientformerv2-s0_fpn_1x_coco.py",
    ],
)
def test_weight_decay_is_for_weights_only(name):
    config = load(name)
    model = MODELS.build(config.model)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    undecayed = {
        id(p)
        for group in wrapper.param_groups
        if group["weight_decay"] == 0
        for p in group["params"]
    }
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            free = leaf == "bias" or isinstance(module, (*norms, LayerScale, AttentionBias))
            assert (id(parameter) in undecayed) == free, f"{module_name}.{leaf}"


def test_bases_need_nothing_from_other_packages():
    for path in Path(config_dir()).rglob("*.py"):
        assert not re.search(r"\w::\w", path.read_text()), path
