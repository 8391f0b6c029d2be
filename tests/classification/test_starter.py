# SPDX-License-Identifier: Apache-2.0
"""``init`` of class folders: a short config that trains, with the classes of the folders."""

import math
from pathlib import Path

import labeled_sets as sets
import pytest
import tiny
import torch

from mmeformer import configs, own_data, starter
from mmeformer.classification.starter import STARTER
from mmeformer.labeled import FOLDERS, LabeledData, LabeledImage


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Path of the config of a set of class folders."""
    folder = tmp_path_factory.mktemp("own")
    root = sets.write_folders(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_data, "_seconds", lambda config: 0.5)
        request = own_data.Request(root, folder / "my.py", weights=own_data.SCRATCH)
        made = own_data.make(request, lambda line: None)
    assert made.errors == 0
    return made.config


def test_lists_and_classes(config):
    text = config.read_text()
    assert len(text.splitlines()) <= 60
    assert configs.load_config(config).classes == sets.CLASSES
    rows = (config.with_name("my_data") / "train.txt").read_text().split("\n")[:-1]
    assert rows == [
        f"train/{sets.CLASSES[index % 2]}/{name}.jpg {index % 2}"
        for index, name in sorted(
            enumerate(sets.NAMES[:4]), key=lambda item: (item[0] % 2, item[1])
        )
    ]


def test_it_trains(config, tmp_path):
    loaded = configs.load_config(config)
    loaded.model.backbone.update(arch=tiny.ARCH)
    loaded.model.head.in_channels = tiny.ARCH["widths"][3]
    loaded.train_cfg.update(max_epochs=2, val_interval=2)
    loaded.param_scheduler = []
    for loader in (loaded.train_dataloader, loaded.val_dataloader, loaded.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    losses = tiny.train(loaded, tmp_path)
    assert len(losses) == 4 and all(map(math.isfinite, losses.values()))
    assert (tmp_path / "epoch_2.pth").is_file()


@pytest.mark.parametrize(
    ("size", "weights", "crop", "resize", "least", "zoom"),
    [
        (40, None, "64", "64", "0.59", "2.1"),
        (64, None, "64", "64", "0.59", "1.3"),
        (100, None, "128", "128", "0.59", "1.7"),
        (240, None, "224", "240", "0.52", "1.3"),
        (900, None, "224", "256", "0.3", "1"),
        (40, "timm://x", "224", "224", "0.59", "7.3"),
    ],
)
def test_size(size, weights, crop, resize, least, zoom):
    images = [LabeledImage(Path(f"{i}.png"), size, size, label=0, split="train") for i in range(9)]
    data = LabeledData("folders", Path("/data"), FOLDERS, ("a", "b"), images)
    plan = starter.Plan(own_data.find_arch("s0"), weights, Path("/labels"), None, 2)
    settings = {item.name: item for item in STARTER.settings(data, plan)}
    found = {name: item.value for name, item in settings.items()}
    assert found["crop"] == crop and found["epochs"] == "200"
    assert (found["resize"], found["smallest_crop"]) == (resize, least)
    assert settings["smallest_crop"].reason.endswith(f"; enlarged at most {zoom} times")


def test_crops_reach_the_training(config):
    loaded = configs.load_config(config)
    training, testing = (
        loader.dataset.pipeline for loader in (loaded.train_dataloader, loaded.val_dataloader)
    )
    assert training[1].crop_ratio_range == (loaded.smallest_crop, 1.0)
    assert (training[1].scale, testing[1].scale, testing[2].crop_size) == (
        loaded.crop,
        loaded.resize,
        loaded.crop,
    )


@pytest.mark.parametrize(
    ("arch", "weights"), [("l1", None), pytest.param("s2", "none", marks=pytest.mark.slow)]
)
def test_other_variants(config, arch, weights, tmp_path, monkeypatch):
    """The head fits the backbone."""
    from mmengine.registry import MODELS, init_default_scope

    monkeypatch.setattr(own_data, "_seconds", lambda config: 0.5)
    root = config.parent / "data"
    own_data.make(own_data.Request(root, tmp_path / "a.py", arch=arch, weights=weights), print)
    loaded = configs.load_config(tmp_path / "a.py")
    configs.drop_pretrained(loaded.model)
    init_default_scope("mmpretrain")
    model = MODELS.build(loaded.model).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64), mode="tensor").shape == (1, 2)
