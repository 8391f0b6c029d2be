# SPDX-License-Identifier: Apache-2.0
"""Settings of model, data set and metric that do not fit are errors before training."""

import copy

import cv2
import numpy as np
import pytest
import tiny
from mmengine.config import Config

from mmeformer.training import engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


def start(config, work_dir, command="train"):
    """Begin a training or a test of random weights; the model's first step is not reached."""
    config = Config(copy.deepcopy(config.to_dict()))
    config.work_dir = str(work_dir)
    runner = engine.build_train_runner(config)
    runner.call_hook("before_run")
    if command == "train":
        runner.train_loop  # noqa: B018
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.call_hook("before_train")
    else:
        runner.test_loop  # noqa: B018
        runner.call_hook("before_test")


@pytest.mark.parametrize("command", ["train", pytest.param("test", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(crop_size=(64, 64), stride=(64, 65)), r"stride \(64, 65\) must be .* \(64, 64\)"),
        *(
            pytest.param(settings, message, marks=pytest.mark.slow)
            for settings, message in (
                (dict(crop_size=(64, 64), stride=(0, 32)), r"stride \(0, 32\) must be at least 1"),
                (dict(crop_size=(64, 64)), "needs model.test_cfg.crop_size and stride"),
            )
        ),
    ],
)
def test_windows_with_gaps(folder, tmp_path, command, settings, message):
    config = tiny.segmentation(folder)
    config.model.test_cfg = dict(mode="slide", crop_size=(64, 64), stride=(64, 64))
    start(config, tmp_path / "good", command)
    config.model.test_cfg = dict(mode="slide", **settings)
    with pytest.raises(ValueError, match=message):
        start(config, tmp_path, command)


def with_ignore_index(folder, value):
    config = tiny.segmentation(folder)
    for path in (folder / "masks/annotations").rglob("*.png"):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(labels == 255, value, labels).astype(np.uint8))
    for name in ("train", "val", "test"):
        config[f"{name}_dataloader"].dataset.ignore_index = value
    return config


@pytest.mark.slow
def test_value_of_unlabeled_pixels_in_the_data_set_only(tmp_path):
    config = with_ignore_index(tmp_path, 200)
    with pytest.raises(
        ValueError, match=r"data set has ignore_index=200, but model.decode_head.ig"
    ):
        start(config, tmp_path)
    config.model.decode_head.ignore_index = 200
    with pytest.raises(ValueError, match=r"Set model.data_preprocessor.seg_pad_val to 200 too"):
        start(config, tmp_path)
    config.model.data_preprocessor.seg_pad_val = 200
    with pytest.raises(ValueError, match=r"val_evaluator.ignore_index is 255"):
        start(config, tmp_path)
    with pytest.raises(ValueError, match=r"test_evaluator.ignore_index is 255"):
        start(config, tmp_path, "test")
    config.val_evaluator.ignore_index = config.test_evaluator.ignore_index = 200
    start(config, tmp_path)
    start(config, tmp_path, "test")


def test_value_of_unlabeled_pixels_in_the_model_only(folder, tmp_path):
    config = tiny.segmentation(folder)
    config.model.decode_head.ignore_index = 200
    with pytest.raises(ValueError, match=r"Set model.decode_head.ignore_index to 255 too"):
        start(config, tmp_path)


@pytest.mark.slow
def test_value_of_unlabeled_pixels_inside_a_wrapper(tmp_path):
    config = with_ignore_index(tmp_path, 200)
    dataset = config.train_dataloader.dataset
    config.train_dataloader.dataset = dict(type="RepeatDataset", dataset=dataset, times=2)
    with pytest.raises(ValueError, match="ignore_index=200"):
        start(config, tmp_path)


@pytest.mark.slow
def test_reduced_labels_leave_out_255_only(tmp_path):
    config = with_ignore_index(tmp_path, 200)
    config.model.decode_head.ignore_index = 200
    config.model.data_preprocessor.seg_pad_val = 200
    config.train_dataloader.dataset.type = "BaseSegDataset"
    config.train_dataloader.dataset.update(
        reduce_zero_label=True,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    )
    with pytest.raises(ValueError, match=r"Save 200 in the masks as 255"):
        start(config, tmp_path)
