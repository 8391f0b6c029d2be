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
    ("size", "weights", "crop"),
    [(40, None, "64"), (100, None, "128"), (900, None, "224"), (40, "timm://x", "224")],
)
def test_size(size, weights, crop):
    images = [LabeledImage(Path(f"{i}.png"), size, size, label=0, split="train") for i in range(9)]
    data = LabeledData("folders", Path("/data"), FOLDERS, ("a", "b"), images)
    plan = starter.Plan(own_data.find_arch("s0"), weights, Path("/labels"), None, 2)
    found = {item.name: item.value for item in STARTER.settings(data, plan)}
    assert found["crop"] == crop and found["epochs"] == "200"


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
