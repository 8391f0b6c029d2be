# SPDX-License-Identifier: Apache-2.0
"""The light detector: layers against their equations, losses against mmdet's, own data."""

import math

import labeled_sets as sets
import pytest
import tiny
import torch
from mmdet.models.dense_heads import GFLHead
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch.nn import functional as F

from mmeformer import configs, own_data, quickstart
from mmeformer.deploy.fold import fold
from mmeformer.detection import LiteGFLHead
from mmeformer.lite import ACTIVATION, NORM, LitePAFPN, LiteTower

CHANNELS = (8, 12, 16)


def pyramid(channels, size=64):
    torch.manual_seed(0)
    return [torch.randn(2, c, size // 2**i, size // 2**i) for i, c in enumerate(channels)]


@pytest.mark.parametrize("channels", [CHANNELS, (4, *CHANNELS)])
def test_neck_has_one_width_at_the_size_of_every_level(channels):
    levels = pyramid(channels)
    neck = LitePAFPN(channels, 20)
    outputs = neck(levels)
    assert [level.shape for level in outputs] == [(2, 20, *x.shape[2:]) for x in levels]
    # Information flows from the coarsest to the finest level, and back.
    for source, target in ((-1, 0), (0, -1)):
        given = [level.clone().requires_grad_() for level in levels]
        neck(given)[target].square().mean().backward()
        assert given[source].grad.abs().sum() > 0
    # All convolutions over several pixels are depthwise.
    spatial = [m for m in neck.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] > 1]
    assert spatial and all(conv.groups == conv.in_channels for conv in spatial)


def test_tower_is_its_equation():
    torch.manual_seed(0)
    tower = LiteTower(8, 12, 2, 3, norm_cfg=NORM, act_cfg=ACTIVATION)
    for x in pyramid((8, 8, 8)):
        for level in range(3):
            tower(x, level)  # running statistics of its own
    tower.eval()
    x = torch.randn(2, 8, 9, 7)
    for level in range(3):
        expected = x
        for conv, norm in zip(tower.convs, tower.norms[level], strict=True):
            expected = F.conv2d(expected, conv.weight, padding=1)
            mean, std = norm.running_mean, (norm.running_var + norm.eps).sqrt()
            expected = (expected - mean[:, None, None]) / std[:, None, None]
            expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
            expected = expected.clamp(min=0)
        torch.testing.assert_close(tower(x, level), expected, atol=1e-5, rtol=1e-5)


def test_settings_of_convolutions_are_not_ignored():
    light = tiny.network("detection", tiny.LIGHT).model.bbox_head
    init_default_scope("mmdet")
    with pytest.raises(KeyError, match="Cannot find"):
        MODELS.build({**light, "conv_cfg": dict(type="NoSuchConv")})


def test_levels_share_convolutions_and_have_statistics_of_their_own():
    tower = LiteTower(8, 8, 2, 2, norm_cfg=NORM, act_cfg=ACTIVATION)
    before = [norm.running_mean.clone() for level in tower.norms for norm in level]
    tower(torch.randn(2, 8, 8, 8) + 3, 1)
    after = [norm.running_mean for level in tower.norms for norm in level]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
        *[True] * 2,
        *[False] * 2,
    ]
    assert sum(p.numel() for p in tower.convs.parameters()) == 2 * 9 * 8 * 8


def heads():
    """The light head and mmdet's, with the same settings."""
    init_default_scope("mmdet")
    config = configs.load_config(
        "detection/gfl-lite_efficientformerv2-s0_pafpn_300e_coco-640x640.py"
    )
    settings = config.model.bbox_head.to_dict()
    shared = dict(
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        train_cfg=ConfigDict(config.model.train_cfg.to_dict()),
        test_cfg=ConfigDict(config.model.test_cfg.to_dict()),
    )
    settings.update(shared, stacked_convs=1)
    light = MODELS.build(settings)
    plain = {k: v for k, v in settings.items() if k not in ("type", "act_cfg")}
    plain["norm_cfg"] = dict(type="BN")
    return light, GFLHead(**plain)


def test_losses_and_predictions_are_those_of_mmdet():
    light, plain = heads()
    assert isinstance(light, LiteGFLHead)
    torch.manual_seed(0)
    boxes = torch.tensor([[4.0, 6, 30, 40], [20, 20, 60, 50], [40, 8, 52, 20]])
    objects = [
        InstanceData(bboxes=boxes, labels=torch.tensor([0, 1, 2])),
        InstanceData(bboxes=boxes[:0], labels=torch.zeros(0, dtype=torch.long)),
    ]
    metas = [
        dict(img_shape=(64, 64), pad_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0))
    ] * 2
    maps = light(
        [level[:, :, :8, :8] for level in pyramid((8, 8, 8))][:1]
        + [torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2)]
    )
    for ours, theirs in zip(
        *(h.loss_by_feat(*maps, objects, metas).values() for h in (light, plain)), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    losses = light.loss_by_feat(*maps, objects, metas)
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_dfl"}
    sum(sum(values) for values in losses.values()).backward()
    missing = [name for name, p in light.named_parameters() if p.grad is None]
    assert not missing
    with torch.no_grad():
        found = [h.predict_by_feat(*maps, batch_img_metas=metas)[0] for h in (light, plain)]
    assert torch.equal(found[0].bboxes, found[1].bboxes)


def test_a_location_has_one_anchor():
    config = tiny.network("detection", tiny.LIGHT).model.bbox_head
    config.anchor_generator.ratios = [0.5, 1.0]
    init_default_scope("mmdet")
    with pytest.raises(ValueError, match="one anchor per location"):
        MODELS.build(config)


# --- own data ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The config that is made from a folder with boxes only."""
    folder = tmp_path_factory.mktemp("own")
    root = sets.write_voc(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_data, "_seconds", lambda config: 0.5)
        request = own_data.Request(root, folder / "boxes.py", weights=own_data.SCRATCH)
        made = own_data.make(request, report=lambda line: None)
    assert made.errors == 0
    return made.config


def test_boxes_get_the_light_detector(made):
    text = made.read_text()
    assert tiny.LIGHT_CUSTOM.removeprefix("detection/") in text and len(text.splitlines()) <= 60
    config = configs.load_config(made)
    assert config.model.bbox_head.type == "mmeformer.LiteGFLHead"
    assert [hook.type for hook in config.custom_hooks] == ["NumClassCheckHook", "EMAHook"]


def test_settings_are_alive(made, tmp_path):
    text = made.read_text()
    for line in text.splitlines():
        for name, value in (("stride", "4"), ("width", "144"), ("scale", "(320, 192)")):
            if line.startswith(f"{name} = "):
                text = text.replace(line, f"{name} = {value}")
    path = tmp_path / "changed.py"
    path.write_text(text)
    model = configs.load_config(path).model
    assert model.bbox_head.anchor_generator.strides == [4, 8, 16, 32]
    assert list(model.neck.in_channels) == [32, 48, 96, 176]
    assert model.backbone.out_indices == (0, 1, 2, 3) and model.backbone.bias_grid == [6, 10]
    assert model.neck.out_channels == model.bbox_head.in_channels == 144


def test_config_trains(made, tmp_path):
    """Two iterations of a tiny network on the data of the config, and its validation."""
    config = tiny.network("detection", str(made))
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2)
    config.param_scheduler = []
    config.log_processor.by_epoch = False
    config.default_hooks.checkpoint.update(by_epoch=False, interval=2)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    losses = tiny.train(config, tmp_path)
    assert len(losses) == 2 and all(map(math.isfinite, losses.values()))


@pytest.mark.parametrize("arch", ["s1", "l1", "l7"])
def test_other_backbones(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "_seconds", lambda config: 0.5)
    root = sets.write_voc(tmp_path / "data")
    request = own_data.Request(root, tmp_path / "a.py", arch=arch, weights=own_data.SCRATCH)
    config = configs.load_config(own_data.make(request, report=lambda line: None).config)
    init_default_scope("mmdet")
    configs.drop_pretrained(config.model)
    model = MODELS.build(config.model).eval()
    assert config.model.neck.out_channels == (96 if arch == "s1" else 128)
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 64), mode="tensor")
    assert [level.shape[-1] for level in maps[0]] == [
        64 // s for s in config.model.bbox_head.anchor_generator.strides
    ]


@pytest.mark.parametrize("path", [tiny.LIGHT, tiny.LIGHT_MASKS])
def test_every_norm_is_merged_into_a_convolution(path):
    config = tiny.network("detection", path)
    configs.drop_pretrained(config.model)
    init_default_scope("mmdet")
    model = MODELS.build(config.model)
    x = torch.randn(2, 3, 64, 64)
    model.train()
    model(x, mode="tensor")
    model.eval()
    folded = fold(model)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        expected, found = (m(x, mode="tensor") for m in (model, folded))
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(list(ours), list(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_quickstart_reaches_its_goal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quickstart.run("detection", light=True)["coco/bbox_mAP_50"] >= 0.8


def test_quickstart_of_a_task_without_a_light_model():
    with pytest.raises(ValueError, match="segmentation has no light model; .*detection"):
        quickstart.run("segmentation", light=True)
