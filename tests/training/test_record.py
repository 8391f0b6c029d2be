# SPDX-License-Identifier: Apache-2.0
"""What checkpoints record of the training data."""

import json

import pytest
import tiny
import torch

from mmeformer.results import category_ids
from mmeformer.training_images import KEY


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_checkpoints_record_sizes_and_category_ids(task, tmp_path):
    config = tiny.TASKS[task](tmp_path, iterations=2)
    expected = None
    if task == "detection":
        path = tmp_path / "coco" / "annotations" / "instances_train2017.json"
        content = json.loads(path.read_text())
        for item in content["categories"]:
            item["id"] = 100 - item["id"]
        for item in content["annotations"]:
            item["category_id"] = 100 - item["category_id"]
        path.write_text(json.dumps(content))
        expected = [item["id"] for item in content["categories"]]
    tiny.train(config, tmp_path / "work")
    meta = torch.load(tmp_path / "work" / "iter_2.pth", weights_only=False)["meta"]["dataset_meta"]
    assert meta[KEY] == dict(sides=(64, 64), patch_size=0)
    assert meta.get("category_ids") == expected
    if expected:
        assert category_ids(meta) == tuple(expected)
        del meta["category_ids"]
        assert category_ids(meta) == tuple(range(1, len(expected) + 1))


def test_resuming_does_not_complain_of_the_record(tmp_path, capfd):
    config = tiny.segmentation(tmp_path, iterations=2)
    tiny.train(config, tmp_path / "work")
    config.train_cfg.max_iters = 4
    tiny.train(config, tmp_path / "work", resume="auto")
    assert "dataset metainfo from the resumed checkpoint" not in "".join(capfd.readouterr())
    assert (
        KEY
        in torch.load(tmp_path / "work" / "iter_4.pth", weights_only=False)["meta"]["dataset_meta"]
    )
