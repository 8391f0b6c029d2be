# SPDX-License-Identifier: Apache-2.0
"""Every rotated config builds, fits its backbone, trains a step and predicts."""

import pytest
import torch
from helpers import larger_are_slow
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from mmrotate.structures.bbox import RotatedBoxes

from mmeformer import configs
from mmeformer.paths import config_dir
from mmeformer.training import device
from mmeformer.variants import VARIANTS, find_variant

CONFIGS = sorted(path.name for path in (config_dir() / "rotated").glob("*.py"))
DOTA = [name for name in CONFIGS if "_dota" in name]
FAMILIES = {"mmeformer.EfficientFormer": "v1", "mmeformer.EfficientFormerV2": "v2"}


def load(name):
    """A config without its pretrained weights, which tests do not download."""
    config = configs.load_config(f"rotated/{name}")
    configs.drop_pretrained(config.model)
    device.prepare_device(config, "none")
    init_default_scope(config.default_scope)
    return config


def batch(num_classes, empty=False):
    """Two images of different sizes with three and two boxes, or none."""
    torch.manual_seed(0)
    inputs, samples = [], []
    for size, count in (((64, 96), 3), ((75, 64), 2)):
        count = 0 if empty else count
        boxes = torch.stack(
            [
                torch.rand(count) * size[1],
                torch.rand(count) * size[0],
                20 + 20 * torch.rand(count),
                8 + 8 * torch.rand(count),
                torch.rand(count) * 3 - 0.7,
            ],
            1,
        )
        sample = DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0)
        )
        sample.gt_instances = InstanceData(
            bboxes=RotatedBoxes(boxes), labels=torch.randint(0, num_classes, (count,))
        )
        sample.ignored_instances = InstanceData(
            bboxes=RotatedBoxes(torch.zeros(0, 5)), labels=torch.zeros(0, dtype=torch.long)
        )
        inputs.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def test_every_variant_has_its_configs():
    for variant in VARIANTS.values():
        stem = f"rotated-gfl-le135_{variant.name.replace('_', '-')}_fpn"
        assert {f"{stem}_1x_dota.py", f"{stem}_1x_dota-trainval.py"} <= set(CONFIGS)
        if variant.arch in ("l1", "s2"):
            assert f"{stem}_qfl-dfl-1x_dota.py" in CONFIGS


@pytest.mark.parametrize("name", DOTA)
def test_children_state_only_what_differs(name):
    assert len((config_dir() / "rotated" / name).read_text().splitlines()) <= 10


@pytest.mark.parametrize("name", CONFIGS)
def test_config_agrees_with_the_table(name):
    config = configs.load_config(f"rotated/{name}")
    backbone = config.model.backbone
    variant = find_variant(FAMILIES[backbone.type], backbone.arch)
    assert variant.name.replace("_", "-") in name
    assert tuple(config.model.neck.in_channels) == variant.architecture.widths[1:]
    if "_dota" in name:
        assert backbone.init_cfg.checkpoint == f"timm://{variant.name}.snap_dist_in1k"
        assert config.optim_wrapper.optimizer.lr == 1e-4
        assert config.auto_scale_lr.base_batch_size == config.train_dataloader.batch_size == 2
        assert config.model.bbox_head.num_classes == 15
        assert ("loss_dfl" in config.model.bbox_head) == ("dfl" in name or "lite" in name)
        parts = config.train_dataloader.dataset.get("datasets", [config.train_dataloader.dataset])
        folders = [part.ann_file for part in parts]
        assert folders == ["train/annfiles/"] + ["val/annfiles/"] * ("trainval" in name)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "trainval" in name])
def test_trainval_is_the_same_model_on_other_data(name):
    other = configs.load_config(f"rotated/{name.replace('-trainval', '')}")
    assert configs.load_config(f"rotated/{name}").model == other.model


@pytest.mark.parametrize(
    "name", larger_are_slow([name for name in CONFIGS if "trainval" not in name])
)
def test_trains_a_step_and_predicts(name):
    config = load(name)
    model = MODELS.build(config.model)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    num_classes = config.model.bbox_head.num_classes
    model.train()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    logs = model.train_step(batch(num_classes), wrapper)
    assert logs["loss"].isfinite() and logs["loss_bbox"] > 0
    for key, parameter in model.named_parameters():
        # Outputs of a level without a positive place have no gradient, only the extra levels'.
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    moved = [k for k, v in model.named_parameters() if not torch.equal(v, before[k])]
    assert any(k.startswith("backbone.stem") for k in moved)
    assert any(k.startswith("bbox_head.gfl_reg") for k in moved)

    logs = model.train_step(batch(num_classes, empty=True), wrapper)
    assert logs["loss"].isfinite() and logs["loss_bbox"] == 0

    model.eval()
    with torch.no_grad():
        results = model.test_step(batch(num_classes))
    assert len(results) == 2
    for result in results:
        instances = result.pred_instances
        count = len(instances.bboxes)
        assert instances.bboxes.shape == (count, 5)
        assert len(instances.labels) == len(instances.scores) == count
        assert instances.bboxes.isfinite().all()
