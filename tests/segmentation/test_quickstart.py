# SPDX-License-Identifier: Apache-2.0
"""The quickstart's machinery; that it reaches its goal takes minutes (`make quickstart-seg`)."""

from dataclasses import replace
from functools import partial

import cv2
import pytest

from mmeformer import quickstart
from mmeformer.segmentation import quickstart as segmentation
from mmeformer.synthetic.masks import write_mask_dataset

TWO_STEPS = {
    "train_cfg.max_iters": 2,
    "train_cfg.val_interval": 2,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.logger.interval": 1,
    "train_dataloader.batch_size": 2,
}


def test_a_missed_goal_is_an_error_after_curve_and_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = replace(segmentation.QUICKSTART, generate=partial(write_mask_dataset, train=6, val=4))
    monkeypatch.setattr(segmentation, "QUICKSTART", few)
    with pytest.raises(RuntimeError, match="missed its goal for mIoU"):
        quickstart.run("segmentation", options=TWO_STEPS)
    work = tmp_path / "work_dirs/quickstart-segmentation"
    assert cv2.imread(str(work / "loss_curve.png")) is not None
    pictures = sorted((work / "pictures").glob("*.png"))
    assert len(pictures) == 4
    # Ground truth left, prediction right.
    assert cv2.imread(str(pictures[0])).shape == (128, 256, 3)
    images = sorted((tmp_path / "data/quickstart-masks/images/training").iterdir())
    assert len(images) == 6


@pytest.mark.slow
def test_reaches_its_goal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quickstart.run("segmentation")["mIoU"] >= 60
