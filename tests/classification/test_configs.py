# SPDX-License-Identifier: Apache-2.0
"""Every config builds its model, optimizer and data, and says what the published recipe says."""

import re

import numpy as np
import pytest
import tiny
import torch
from helpers import larger_are_slow
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from timm.utils.agc import adaptive_clip_grad

from mmeformer import configs
from mmeformer.paths import config_dir
from mmeformer.synthetic import photographs
from mmeformer.variants import VARIANTS, find_variant

FOLDER = config_dir() / "classification"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.py"))
PUBLISHED = [name for name in CONFIGS if "in1k" in name]
FAMILIES = {"mmeformer.EfficientFormer": "v1", "mmeformer.EfficientFormerV2": "v2"}
OTHER_SCHEDULES = [name for name in PUBLISHED if "_300e_" not in name]
CUSTOM = "efficientformerv2-s0_custom.py"
QUICKSTART = "efficientformerv2-s0_quickstart.py"


def load(name: str) -> Config:
    """A config without pretrained weights, which tests do not download."""
    config = configs.load_config(FOLDER / name)
    configs.drop_pretrained(config.model)
    init_default_scope(config.default_scope)
    return config


def test_every_variant_has_its_published_schedules():
    schedules = {name: ["300e", "450e"] for name in VARIANTS if "v2" in name}
    schedules |= {name: ["300e"] for name in VARIANTS if "v2" not in name}
    schedules["efficientformer_l1"].append("1000e")
    expected = {f"{n.replace('_', '-', 1)}_{s}_in1k.py" for n in schedules for s in schedules[n]}
    assert set(PUBLISHED) == expected
    assert set(CONFIGS) - expected == {CUSTOM, QUICKSTART}


@pytest.mark.parametrize("name", CONFIGS)
def test_model(name):
    config = load(name)
    variant = find_variant(FAMILIES[config.model.backbone.type], config.model.backbone.arch)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    assert name.split("_")[0] == variant.name.replace("_", "-", 1)
    assert model.head.family == variant.family
    assert model.head.norm.weight.shape == (variant.architecture.widths[-1],)
    assert not model.backbone.norms and model.backbone.out_indices == (3,)


@pytest.mark.parametrize("name", larger_are_slow([n for n in CONFIGS if n not in OTHER_SCHEDULES]))
def test_optimizer(name):
    config = load(name)
    with torch.device("meta"):
        model = MODELS.build(config.model)
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
    clips_adaptively = name != QUICKSTART
    assert (wrapper.clip_func is adaptive_clip_grad) == clips_adaptively
    settings = {id(p): group for group in wrapper.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        # Kernels have 4 dimensions and matrices 2; a table of attention biases has 3.
        decayed = settings[id(parameter)]["weight_decay"] > 0
        assert decayed == (parameter.dim() in (2, 4)), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe(name):
    config = load(name)
    epochs = int(re.search(r"_(\d+)e_", name)[1])
    assert config.train_cfg.max_epochs == epochs
    warm_up, cosine = config.param_scheduler
    assert (warm_up.type, warm_up.begin, warm_up.end, warm_up.by_epoch) == ("LinearLR", 0, 5, True)
    assert warm_up.start_factor * config.optim_wrapper.optimizer.lr == pytest.approx(1e-5)
    assert (cosine.type, cosine.eta_min) == ("CosineAnnealingLR", 1e-5)
    assert (cosine.begin, cosine.end, cosine.by_epoch) == (5, epochs, True)

    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.eps) == ("AdamW", 1e-3, 1e-8)
    assert optimizer.weight_decay == 0.025
    assert config.optim_wrapper.clip_grad == dict(type="agc", clip_factor=0.01)
    assert config.auto_scale_lr.base_batch_size == 1024 == 8 * config.train_dataloader.batch_size
    if name in OTHER_SCHEDULES:
        other = load(re.sub(r"_\d+e_", "_300e_", name))
        assert (config.model, config.optim_wrapper) == (other.model, other.optim_wrapper)
    sampler = config.train_dataloader.sampler
    assert (sampler.type, sampler.num_repeats, sampler.shuffle) == ("RepeatAugSampler", 3, True)
    crop, augment, erase = (config.train_pipeline[place] for place in (1, 3, 4))
    assert (crop.scale, crop.interpolation) == (224, "bicubic")
    assert (augment.magnitude_level, augment.magnitude_std) == (9, 0.5)
    assert (augment.policies, augment.num_policies) == ("timm_increasing", 2)
    assert erase.erase_prob == 0.25
    mixup, cutmix = config.model.train_cfg.augments
    assert (mixup.type, mixup.alpha, cutmix.type, cutmix.alpha) == ("Mixup", 0.8, "CutMix", 1.0)
    # One of both for every batch, either with a probability of 0.5.
    assert config.model.train_cfg.get("probs") is None
    assert config.model.head.loss.label_smooth_val == 0.1
    rate = {"efficientformerv2-s2": 0.02, "efficientformerv2-l": 0.1}.get(name.split("_")[0], 0)
    backbone = config.model.backbone
    assert "drop_path_rate" not in backbone, "the rate is that of the variant"
    architecture = find_variant(FAMILIES[backbone.type], backbone.arch).architecture
    assert architecture.drop_path_rate == rate
    assert (config.model.head.kind, config.model.head.alpha) == ("hard", 0.5)
    assert config.model.teacher == dict(timm="regnety_160.deit_in1k")
    assert config.model.backbone.get("head_bias_keys") == (49 if "v2" in name else None)
    assert "EMAHook" not in str(config.custom_hooks)

    resize, crop = config.test_pipeline[1:3]
    assert (resize.type, resize.scale, resize.edge) == ("ResizeEdge", 256, "short")
    assert (resize.interpolation, resize.backend) == ("bicubic", "pillow")
    assert (crop.type, crop.crop_size) == ("CenterCrop", 224)
    for loader in (config.val_dataloader, config.test_dataloader):
        assert loader.dataset.test_mode and loader.dataset.pipeline == config.test_pipeline
    assert config.val_evaluator == dict(type="Accuracy", topk=(1, 5))


def test_data_of_the_published_configs(imagenet):
    """Two batches after all augmentation, mixing included, and the validation images."""
    config = load("efficientformerv2-s0_300e_in1k.py")
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = str(imagenet)
    train, val = (
        DATASETS.build(loader.dataset)
        for loader in (config.train_dataloader, config.val_dataloader)
    )
    assert len(train.metainfo["classes"]) == 1000 and len(train) == len(val) == 4
    assert val[3]["data_samples"].gt_label.item() == 3
    assert {tuple(val[index]["inputs"].shape) for index in range(4)} == {(3, 224, 224)}
    samples = [train[index] for index in range(4)]
    with torch.device("cpu"):
        preprocessor = MODELS.build(
            {**config.model.data_preprocessor, "batch_augments": config.model.train_cfg}
        )
    images = torch.stack([sample["inputs"] for sample in samples])
    labels = [sample["data_samples"] for sample in samples]
    batch = preprocessor(dict(inputs=images, data_samples=labels), training=True)
    scores = torch.stack([sample.gt_score for sample in batch["data_samples"]])
    assert batch["inputs"].shape == (4, 3, 224, 224) and batch["inputs"].isfinite().all()
    assert scores.shape == (4, 1000) and torch.allclose(scores.sum(1), torch.ones(4))


def edited_template(folder, **lines):
    """The custom template with some of its settings changed, as a user changes them."""
    text = (FOLDER / CUSTOM).read_text()
    for key, value in lines.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert count == 1, key
    path = folder / "mine.py"
    path.write_text(text.replace('_base_ = "', f'_base_ = "{FOLDER}/'))
    return Config.fromfile(path)


def test_custom_template_carries_its_settings_everywhere(tmp_path, root):
    config = edited_template(
        tmp_path, data_root=f'"{root}/"', metainfo=f"dict(classes={tuple(tiny.ANIMALS)})", crop=96
    )
    assert config.model.head.num_classes == config.model.head.loss.num_classes == 4
    assert config.model.data_preprocessor.num_classes == 4 and config.val_evaluator.topk == (1, 4)
    assert config.model.backbone.init_cfg.checkpoint.startswith("timm://")
    init_default_scope(config.default_scope)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        dataset = DATASETS.build(loader.dataset)
        assert dataset.metainfo["classes"] == tuple(tiny.ANIMALS)
        assert dataset[0]["inputs"].shape == (3, 96, 96)
    scratch = edited_template(tmp_path, checkpoint="None", crop=96).model
    assert scratch.backbone.init_cfg is None and scratch.backbone.layer_scale_init_value == 0.5
    assert scratch.backbone.bias_grid == 3 and not scratch.teacher
    taught = edited_template(tmp_path, teacher='dict(config="a.py", checkpoint="a.pth")').model
    assert taught.teacher == dict(config="a.py", checkpoint="a.pth") and taught.head.distillation


@pytest.mark.parametrize("name", [CUSTOM, QUICKSTART])
def test_children_can_add_a_teacher(name, tmp_path):
    """mmengine refuses a dict in place of None."""
    teacher = dict(config="a.py", checkpoint="a.pth")
    (tmp_path / "child.py").write_text(
        f"_base_ = {str(FOLDER / name)!r}\nmodel = dict(teacher={teacher})\n"
    )
    assert Config.fromfile(FOLDER / name).model.teacher == {}
    assert Config.fromfile(tmp_path / "child.py").model.teacher == teacher


def test_quickstart_is_about_its_photographs():
    config = load(QUICKSTART)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert tuple(loader.dataset.metainfo["classes"]) == photographs.CLASSES
    assert config.model.head.num_classes == len(photographs.CLASSES) == 10


def test_crops_are_of_the_photographs_and_apart(tmp_path):
    pytest.importorskip("skimage", reason="the photographs are those of scikit-image")
    root = photographs.write_photograph_dataset(tmp_path / "data", train=20, val=10, size=32)
    assert (
        len(list(root.rglob("train/*/*.png"))) == 20 and len(list(root.rglob("val/*/*.png"))) == 10
    )
    assert {path.name for path in (root / "val").iterdir()} == set(photographs.CLASSES)
    for name in photographs.CLASSES:
        image = photographs.read_photograph(name)
        assert min(image.shape[:2]) >= 128 and image.shape[1] >= 256, name
    # A crop that is not shrunk is in the half it is said to be from.
    image = photographs.read_photograph("cat")
    crop = photographs.draw_crop(np.random.default_rng(0), image[:64, :64], 64)
    assert np.array_equal(crop, image[:64, :64])


def test_missing_photographs_say_what_to_install(monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(photographs.UserError, match=r'pip install "mmeformer\[classification\]"'):
        photographs.read_photograph("cat")
