# SPDX-License-Identifier: Apache-2.0
"""Every segmentation config builds, fits its backbone, trains a step and predicts."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import larger_are_slow
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from tiny import ARCH
from torch.nn.modules.batchnorm import _BatchNorm

from mmeformer import configs
from mmeformer.paths import config_dir
from mmeformer.training import device
from mmeformer.variants import VARIANTS, find_variant

FOLDER = config_dir() / "segmentation"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.py"))
ADE20K = [name for name in CONFIGS if "ade20k" in name]
# Other schedules of the same models.
SAME_MODEL = {
    name: re.sub("(amp-40k|80k)", "40k", name)
    for name in CONFIGS
    if "_amp-" in name or "_80k" in name
}
FAMILIES = {"mmeformer.EfficientFormer": "v1", "mmeformer.EfficientFormerV2": "v2"}


def load(name: str) -> Config:
    """A config without its pretrained weights, which tests do not download."""
    config = Config.fromfile(FOLDER / name)
    configs.drop_pretrained(config.model)
    init_default_scope(config.default_scope)
    return config


def build(config: Config, size=(64, 64)):
    """A config's model for training crops of ``size``, as one process on a CPU runs it."""
    config.model.data_preprocessor.size = size
    config.model.test_cfg.crop_size = size
    config.model.test_cfg.stride = tuple(side * 2 // 3 for side in size)
    return revert_sync_batchnorm(MODELS.build(config.model))


def sample(size, classes: int, pad: bool = False) -> dict:
    """An image of random pixels and labels, as a data set returns it."""
    data = SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(0, classes, (1, *size))),
        metainfo=dict(ori_shape=size, img_shape=size),
    )
    return dict(inputs=torch.randint(0, 256, (3, *size), dtype=torch.uint8), data_samples=data)


def collate(samples: list[dict]) -> dict:
    """Samples as mmengine's ``pseudo_collate`` joins them."""
    return {key: [item[key] for item in samples] for key in ("inputs", "data_samples")}


def test_every_variant_has_a_config():
    expected = {name.replace("_", "-", 1) for name in VARIANTS}
    found = {name.split("_")[1] for name in ADE20K if "_40k_" in name}
    assert found == expected


@pytest.mark.parametrize("name", ADE20K)
def test_children_stay_short(name):
    assert len((FOLDER / name).read_text().splitlines()) <= 10


@pytest.mark.parametrize("name", CONFIGS)
def test_neck_fits_backbone(name):
    config = load(name)
    backbone = config.model.backbone
    variant = find_variant(FAMILIES[backbone.type], backbone.arch)
    assert name.split("_")[1] == variant.name.replace("_", "-", 1)
    assert list(config.model.neck.in_channels) == list(variant.architecture.widths)


@pytest.mark.parametrize("name", ADE20K)
def test_pretrained_weights_are_those_of_the_variant(name):
    config = Config.fromfile(FOLDER / name)
    variant = name.split("_")[1].replace("-", "_", 1)
    checkpoint = config.model.backbone.init_cfg.checkpoint
    assert checkpoint == f"timm://{variant}.snap_dist_in1k"


@pytest.mark.parametrize("name", ADE20K)
def test_published_recipe(name):
    config = load(name)
    v2 = "efficientformerv2" in name
    iterations = 80000 if "80k" in name else 40000
    assert config.train_cfg.max_iters == iterations
    (schedule,) = config.param_scheduler
    assert (schedule.type, schedule.power, schedule.end) == ("PolyLR", 0.9, iterations)
    assert schedule.by_epoch is False
    assert schedule.eta_min == (1e-6 if v2 else 0)
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 2e-4, 1e-4)
    amp = config.optim_wrapper.type == "AmpOptimWrapper"
    assert amp == ("amp" in name)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 32
    assert config.model.data_preprocessor.size == (512, 512)
    assert config.model.backbone.bias_grid == 16
    assert config.model.backbone.get("norm_eval", False) == v2
    assert config.model.decode_head.num_classes == 150
    resize, multiple = config.test_pipeline[1:3]
    assert (resize.type, resize.scale, resize.keep_ratio) == ("Resize", (2048, 512), True)
    assert (multiple.type, multiple.size_divisor) == ("ResizeToMultiple", 32)


@pytest.mark.parametrize("name", SAME_MODEL)
def test_schedules_change_nothing_of_a_step(name):
    """So that a step of the first schedule, below, is one of them all."""
    config, other = load(name), load(SAME_MODEL[name])
    for item in (config, other):
        device.prepare_device(item, "none")
    assert config.model == other.model and config.optim_wrapper == other.optim_wrapper


@pytest.mark.parametrize(
    "name", larger_are_slow([name for name in CONFIGS if name not in SAME_MODEL])
)
def test_trains_a_step_and_predicts(name):
    config = load(name)
    device.prepare_device(config, "none")
    model = build(config)
    classes = config.model.decode_head.num_classes
    optimizer = build_optim_wrapper(model, config.optim_wrapper)

    model.train()
    weight = model.backbone.stem.conv1.conv.weight
    before = weight.detach().clone()
    data = collate([sample((64, 64), classes) for _ in range(2)])
    losses = model(**model.data_preprocessor(data, training=True), mode="loss")
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    optimizer.backward(loss)
    # A parameter without a part in the loss would stop training on several GPUs.
    assert not [key for key, value in model.named_parameters() if value.grad is None]
    optimizer.step()
    assert not torch.equal(weight, before)

    model.eval()
    size = (61, 47)
    with torch.no_grad():
        (result,) = model.test_step(collate([sample(size, classes)]))
    assert result.pred_sem_seg.data.shape == (1, *size)
    assert result.seg_logits.data.shape == (classes, *size)
    assert torch.isfinite(result.seg_logits.data).all()


@pytest.mark.parametrize("arch", ["efficientformer-l1", "efficientformerv2-s0"])
def test_decay_is_for_weights_only(arch):
    config = load(f"semantic-fpn_{arch}_40k_ade20k-512x512.py")
    model = build(config)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    decay = {id(value): group["weight_decay"] for group in groups for value in group["params"]}
    for name, value in model.named_parameters():
        # Kernels have 4 dimensions and matrices 2; a table of attention biases has 3.
        assert decay[id(value)] == (1e-4 if value.dim() in (2, 4) else 0), name


@pytest.mark.parametrize("name", CONFIGS)
def test_only_v2_keeps_the_pretrained_statistics(name):
    config = load(name)
    # The statistics are as easily frozen in a small backbone.
    config.model.backbone.arch = ARCH
    config.model.neck.in_channels = list(ARCH["widths"])
    model = build(config)
    model.train()
    norms = [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
    assert norms
    frozen = config.model.backbone.get("norm_eval", False)
    assert {norm.training for norm in norms} == {not frozen}
    assert any(
        norm.training for norm in model.decode_head.modules() if isinstance(norm, _BatchNorm)
    )


def edited_template(folder: Path, **lines: str) -> Config:
    """The custom template with some of its settings changed, as a user changes them."""
    text = (FOLDER / "semantic-fpn_efficientformerv2-s0_custom.py").read_text()
    for key, value in lines.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert count == 1, key
    path = folder / "mine.py"
    path.write_text(text.replace('_base_ = "', f'_base_ = "{FOLDER}/'))
    return Config.fromfile(path)


def test_custom_template_from_scratch(tmp_path):
    """With ``checkpoint = None`` norms learn, and blocks count from the start."""
    model = edited_template(tmp_path, checkpoint="None").model
    assert model.backbone.init_cfg is None and model.backbone.norm_eval is False
    assert model.backbone.layer_scale_init_value == 0.5
    assert model.neck.norm_cfg.type == "SyncBN"
    model = edited_template(tmp_path).model
    assert model.backbone.init_cfg.checkpoint.startswith("timm://")
    assert model.backbone.norm_eval is True
    assert model.backbone.layer_scale_init_value is None and model.neck.norm_cfg is None


def test_custom_template_of_a_training_shorter_than_its_warm_up(tmp_path):
    """mmengine refuses a schedule that ends before it begins, without naming the setting."""
    for iterations in (1, 40):
        config = edited_template(tmp_path, max_iters=str(iterations))
        schedule = config.param_scheduler[1]
        assert schedule.begin < schedule.end == iterations
    assert edited_template(tmp_path).param_scheduler[1].begin == 5600


def test_custom_template_carries_its_settings_everywhere(tmp_path):
    config = edited_template(
        tmp_path,
        data_root='"data/streets/"',
        metainfo='dict(classes=("sky", "road", "car"), palette=[])',
        reduce_zero_label="True",
        crop_size="(96, 160)",
        class_weight="[1.0, 2.0, 3.0]",
    )
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert loader.dataset.type == "mmeformer.SegmentationDataset"
        assert loader.dataset.data_root == "data/streets/"
        assert loader.dataset.metainfo.classes == ("sky", "road", "car")
        assert loader.dataset.reduce_zero_label is True
    assert config.model.decode_head.num_classes == 3
    assert config.model.data_preprocessor.size == (96, 160)
    assert config.model.backbone.bias_grid == (3, 5)
    assert config.val_dataloader.dataset.test_mode and not config.train_dataloader.dataset.get(
        "test_mode", False
    )


def test_class_weights_count_labeled_pixels_only(tmp_path):
    """Against the sum over labeled pixels of weight times cross entropy, over that of weights."""
    config = edited_template(tmp_path, checkpoint="None", class_weight="[1.0, 3.0]")
    configs.drop_pretrained(config.model)
    init_default_scope(config.default_scope)
    model = build(config).eval()
    data = collate([sample((64, 64), 2) for _ in range(2)])
    for item in data["data_samples"]:
        item.gt_sem_seg.data[:, :20] = 255
    batch = model.data_preprocessor(data, training=True)
    with torch.no_grad():
        loss = model(**batch, mode="loss")["decode.loss_ce"]
        logits = torch.nn.functional.interpolate(
            model(batch["inputs"], mode="tensor"), (64, 64), mode="bilinear"
        )
    labels = torch.cat([item.gt_sem_seg.data for item in batch["data_samples"]])
    expected = torch.nn.functional.cross_entropy(
        logits, labels, weight=torch.tensor([1.0, 3.0]), ignore_index=255
    )
    torch.testing.assert_close(loss, expected)


@pytest.fixture(scope="module", params=["efficientformer-l1", "efficientformerv2-s0"])
def published(request):
    """The published model with the smallest backbone of each family."""
    return build(load(f"semantic-fpn_{request.param}_40k_ade20k-512x512.py")).eval()


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("size", [(33, 95), (129, 70), (20, 20)])
def test_prediction_has_the_size_of_the_image(published, monkeypatch, size, mode):
    model = published
    monkeypatch.setitem(model.test_cfg, "mode", mode)
    picture = sample(size, 150)
    # The image was resized to `size`.
    original = (size[0] * 2 - 1, size[1] * 2 + 3)
    picture["data_samples"].set_metainfo(dict(ori_shape=original))
    with torch.no_grad():
        (result,) = model.test_step(collate([picture]))
    assert result.pred_sem_seg.data.shape == (1, *original)


def test_sliding_window_averages_its_windows():
    """Against a plain loop over the windows."""
    config = load("semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py")
    config.model.test_cfg.mode = "slide"
    model = build(config).eval()
    size = (64, 95)
    picture = sample(size, 150)
    with torch.no_grad():
        (result,) = model.test_step(collate([copy.deepcopy(picture)]))
        inputs = model.data_preprocessor(collate([picture]))["inputs"]
        total, count = torch.zeros(1, 150, *size), torch.zeros(size)
        # Crop 64, stride 42: windows begin at 0 and, moved back to the border, at 95 - 64.
        for left in (0, 31):
            logits = model.decode_head(model.extract_feat(inputs[..., left : left + 64]))
            total[..., left : left + 64] += torch.nn.functional.interpolate(
                logits, (64, 64), mode="bilinear"
            )
            count[:, left : left + 64] += 1
    torch.testing.assert_close(result.seg_logits.data, (total / count)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_do_not_name_files_of_one_machine(name):
    config = load(name)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert not Path(loader.dataset.data_root).is_absolute()
