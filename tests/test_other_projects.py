# SPDX-License-Identifier: Apache-2.0
"""Configs of other projects: bases of the libraries, pure Python, settings beside the model."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from mmdet.models.necks import FPN
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop

from mmeformer import configs, settings, tasks
from mmeformer.checks import channels
from mmeformer.checks.channels import require_channels
from mmeformer.checks.dataset import check_model
from mmeformer.commands import test as command_test
from mmeformer.configs import load_config
from mmeformer.deploy import models
from mmeformer.paths import config_dir
from mmeformer.settings import SettingError
from mmeformer.training import device, engine
from mmeformer.training.averaging import EMAHook
from mmeformer.training.loops import IterBasedTrainLoop
from mmeformer.training.saving import CheckpointHook

PURE_PYTHON = """
from mmengine.config import read_base
from mmengine.hooks import CheckpointHook
from mmeformer import EfficientFormerV2
from {library} import {dataset}
from {models} import {model}
with read_base():
    from .base import *
model = dict(type={model}, backbone=dict(type=EfficientFormerV2, arch="s0"))
default_hooks = dict(checkpoint=dict(type=CheckpointHook))
test_dataloader = dict(dataset=dict(type={dataset}, pipeline=[]))
"""


@pytest.fixture
def write(tmp_path):
    """A function that writes config files and reads the last one."""

    def write_files(options=None, **files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        return load_config(tmp_path / f"{name}.py", options)

    return write_files


@pytest.fixture
def warnings_of(monkeypatch):
    """Warnings that are logged."""
    found = []

    def print_log(message, logger=None, level=logging.INFO):
        if level == logging.WARNING:
            found.append(message)

    monkeypatch.setattr("mmeformer.configs.print_log", print_log)
    return found


# --- files ---------------------------------------------------------------------------------------


def test_bases_of_mmseg_are_found_by_whatever_name_it_was_installed(write):
    pytest.importorskip("mmseg")
    config = write(own='_base_ = "mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py"\n')
    assert config.model.decode_head.type == "UPerHead"


def test_bases_of_this_project_have_another_name(write):
    with pytest.raises(ValueError, match=r'write _base_ = __import__\("mmeformer"\)'):
        write(own='_base_ = "mmeformer::detection/any.py"\n')


@pytest.mark.parametrize(
    "task, library, dataset, source, model",
    [
        ("detection", "mmdet.datasets", "CocoDataset", "mmdet.models", "GFL"),
        ("segmentation", "mmseg.datasets", "BaseSegDataset", "mmseg.models", "EncoderDecoder"),
        # The detector is mmdet's, the data are not.
        ("rotated", "mmrotate.datasets", "DOTADataset", "mmdet.models", "FasterRCNN"),
        ("rotated", "mmeformer.rotated", "DOTADataset", "mmdet.models", "FasterRCNN"),
    ],
)
def test_pure_python_configs(write, task, library, dataset, source, model):
    for package in tasks.TASKS[task].libraries:
        pytest.importorskip(package)
    text = PURE_PYTHON.format(library=library, dataset=dataset, models=source, model=model)
    config = write(base="load_from = None\n", own=text)
    assert tasks.of_config(config).name == task
    assert config.model.backbone.type == "mmeformer.EfficientFormerV2"
    assert config.test_dataloader.dataset.type == f"{library}.{dataset}"
    assert settings.is_of_mmengine(config.default_hooks.checkpoint.type, MMEngineCheckpointHook)
    assert "EfficientFormerV2" not in config and config.load_from is None


# --- settings ------------------------------------------------------------------------------------

BESIDE = 'model = dict(type="ImageClassifier")\ndata_preprocessor = dict(mean=[1.0], to_rgb=True)\n'
INSIDE = (
    'model = dict(type="A", data_preprocessor=dict(size=8))\ndata_preprocessor = dict(size=8)\n'
)


def test_a_data_preprocessor_beside_the_model_is_that_of_the_model(write):
    config = write({"data_preprocessor.mean": [2.0]}, own=BESIDE)
    assert config.model.data_preprocessor == dict(mean=[2.0], to_rgb=True)


def test_a_data_preprocessor_that_changes_nothing(write, warnings_of):
    with pytest.raises(ValueError, match=r"did you mean model\.data_preprocessor\.size"):
        write({"data_preprocessor.size": 4}, own=INSIDE)
    child = '_base_ = "own.py"\n'
    write(own=INSIDE, child=child + "model = dict(data_preprocessor=dict(size=4))\n")
    assert not warnings_of
    write(own=INSIDE, child=child + "data_preprocessor = dict(size=4)\n")
    assert len(warnings_of) == 1 and "set model.data_preprocessor" in warnings_of[0]


@pytest.mark.parametrize("prefix", ["pictures", dict(img_path="pictures"), dict(img="pictures")])
def test_images_of_any_data_prefix(tmp_path, prefix):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/1.png").touch()
    dataset = dict(data_root=str(tmp_path), data_prefix=prefix)
    found = models.sample_images(Config(dict(test_dataloader=dict(dataset=dataset))), 2)
    assert [path.name for path in found] == ["1.png"]


@pytest.mark.parametrize("prefix", ["", "mmengine.", "mmengine.some.place."])
def test_classes_of_mmengine_by_any_name(tmp_path, prefix):
    config = tiny.detection(tmp_path)
    config.default_hooks.checkpoint.type = f"{prefix}CheckpointHook".replace("some.place", "hooks")
    config.custom_hooks = [dict(type=f"{prefix}EMAHook".replace("some.place", "hooks"))]
    config.train_cfg = dict(
        type=f"{prefix}IterBasedTrainLoop".replace("some.place", "runner"), max_iters=2
    )
    config.work_dir = str(tmp_path / "run")
    runner = engine.build_train_runner(config)
    assert isinstance(runner.train_loop, IterBasedTrainLoop)
    for ours, theirs in ((CheckpointHook, MMEngineCheckpointHook), (EMAHook, MMEngineEMAHook)):
        (hook,) = [hook for hook in runner.hooks if isinstance(hook, theirs)]
        assert type(hook) is ours


def test_loops_given_as_classes():
    loops = [MMEngineIterBasedTrainLoop, "mmdet.IterBasedTrainLoop", IterBasedTrainLoop]
    found = [settings.is_of_mmengine(loop, MMEngineIterBasedTrainLoop) for loop in loops]
    assert found == [True, False, False]


def test_the_device_knows_types_by_any_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Config(
        dict(
            model=dict(backbone=dict()),
            optim_wrapper=dict(
                type="mmengine.optim.AmpOptimWrapper", optimizer=dict(type="torch.optim.AdamW")
            ),
        )
    )
    device.prepare_device(config, "none")
    assert config.optim_wrapper.type == "OptimWrapper" and config.optim_wrapper.optimizer.fused
    model = ConfigDict(norm_cfg=dict(type="torch.nn.SyncBatchNorm"))
    device._unsynchronize_norms(model)
    assert model.norm_cfg.type == "BN"


def test_the_scope_tells_classes_of_one_name(write):
    pytest.importorskip("mmpretrain.models")
    config = dict(backbone=dict(type="mmeformer.EfficientFormer", depth=50))
    error = TypeError("EfficientFormer.__init__() got an unexpected keyword argument 'depth'")
    settings.import_classes(("mmeformer", "mmpretrain"))
    text = settings.explain(error, config)
    assert text and "bias_grid" in text and "mlp_ratios" not in text


def test_layer_decay_of_a_library(tmp_path):
    config = tiny.detection(tmp_path)
    config.work_dir = str(tmp_path / "run")
    config.optim_wrapper.update(
        constructor="LearningRateDecayOptimizerConstructor",
        paramwise_cfg=ConfigDict(decay_rate=0.8, decay_type="layer_wise", num_layers=6),
    )
    runner = engine.build_train_runner(config)
    with pytest.raises(SettingError, match=r"use mmeformer\.LayerDecayConstructor"):
        runner.build_optim_wrapper(runner.optim_wrapper)


# --- model, data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, part, value, right",
    [
        ("detection", "neck", [256, 512, 1024, 2048], "[8, 16, 24, 32]"),
        ("rotated", "neck", [8, 16, 24, 32], "[16, 24, 32]"),
        ("classification", "head", 2048, "32"),
    ],
)
def test_channels_of_another_backbone(task, part, value, right):
    for library in tasks.TASKS[task].libraries:
        pytest.importorskip(library)
    config = tiny.network(task)
    require_channels(config, models.build_model(tiny.network(task)))
    config.model[part].in_channels = value
    if task == "rotated":
        config.model.backbone.out_indices = (1, 2, 3)
        config.model.neck.start_level = 0
    with pytest.raises(channels.ChannelsError) as error:
        require_channels(config, models.build_model(config))
    assert f"model.{part}.in_channels={value}, but" in str(error.value)
    assert str(error.value).endswith(f"set model.{part}.in_channels={right}")


def test_channels_of_a_segmentation_head():
    pytest.importorskip("mmseg")
    config = tiny.network("segmentation")
    config.model.pop("neck")
    config.model.decode_head.in_channels = [256, 512, 1024, 2048]
    with pytest.raises(channels.ChannelsError, match=r"set .*in_channels=\[8, 16, 24, 32\]"):
        require_channels(config, models.build_model(config))


@pytest.mark.parametrize(
    "neck, wrong",
    [
        (dict(type="FPN", in_channels=[8, 16, 24, 32]), None),
        ([dict(type="FPN", in_channels=[8, 16, 24]), dict(type="BFP")], "model.neck.0.in_channels"),
        # Makes its own channels, of which the head knows.
        (dict(type="Feature2Pyramid", embed_dim=768), None),
        (dict(type="GlobalAveragePooling"), "model.decode_head.in_channels"),
    ],
)
def test_which_channels_are_compared(neck, wrong):
    backbone = models.build_model(tiny.network("detection")).backbone
    layer = FPN([8, 16, 24, 32], 8, 5)
    model = SimpleNamespace(backbone=backbone, neck=[layer] if isinstance(neck, list) else layer)
    config = dict(model=dict(neck=neck, decode_head=dict(in_channels=[768] * 4)))
    if wrong is None:
        require_channels(config, model)
        return
    with pytest.raises(channels.ChannelsError, match=f"^{wrong}=.* 32]$"):
        require_channels(config, model)


def test_training_compares_channels_before_it_begins(tmp_path):
    config = tiny.detection(tmp_path)
    config.work_dir = str(tmp_path / "run")
    config.model.neck.in_channels = [256, 512, 1024, 2048]
    with pytest.raises(channels.ChannelsError):
        engine.build_train_runner(config)


def test_other_number_of_classes_without_a_hook_that_compares(tmp_path):
    config = tiny.detection(tmp_path)
    config.work_dir = str(tmp_path / "run")
    config.custom_hooks = []
    config.model.roi_head.bbox_head.num_classes = 80
    runner = engine.build_train_runner(config)
    wrong = "model.roi_head.bbox_head.num_classes=80, but train_dataloader.dataset has 4 classes"
    assert wrong in Path(runner.log_dir, f"{runner.timestamp}.log").read_text()
    assert (check_model(config, ["train"]) or "").startswith(wrong)


def test_a_work_directory_that_does_not_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_test.main(["work_dirs/nuclei"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: there is no work directory work_dirs/nuclei\n"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_own_imports_keep_those_of_the_task(write, task, tmp_path, monkeypatch):
    (tmp_path / "own_layers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    imported = []
    monkeypatch.setattr(configs, "import_module", imported.append)
    base = next((config_dir() / task).glob("*_custom.py"))
    config = write(own=f'_base_ = "{base}"\ncustom_imports = dict(imports=["own_layers"])')
    assert imported == [f"mmeformer.{task}"] and config.custom_imports.imports == ["own_layers"]


def test_own_imports_that_fail_say_why(write, tmp_path, monkeypatch):
    """And not ``sys.path``, nor that the module itself is missing if it misses another one."""
    text = 'custom_imports = dict(imports=["own_broken"])'
    with pytest.raises(ValueError, match="No module named 'own_broken'; .* PYTHONPATH=FOLDER"):
        write(own=text)
    (tmp_path / "own_broken.py").write_text("import not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="No module named 'not_installed'; "):
        write(own=text)
