# SPDX-License-Identifier: Apache-2.0
"""Two processes train one classifier, each with a teacher of its own."""

import json

import pytest
import tiny
import torch

pytestmark = pytest.mark.forks


def test_two_processes_distil(root, config_file, trained, tmp_path):
    config = tiny.classifier(root)
    config.model.head.distillation = True
    config.model.teacher = dict(config=str(config_file), checkpoint=trained)
    # As published.
    config.train_dataloader.sampler = dict(type="RepeatAugSampler", shuffle=True, num_repeats=3)

    def one(rank):
        losses = tiny.train(config, tmp_path / "work", launcher="pytorch")
        (tmp_path / f"{rank}.json").write_text(json.dumps(list(losses.values())))

    assert tiny.fork(one, world_size=2, timeout=120) == [0, 0]
    losses = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    # 16 images in batches of 4 for each of two processes, twice.
    assert [len(found) for found in losses] == [4, 4] and losses[0] != losses[1]
    saved = torch.load(tmp_path / "work/epoch_2.pth", weights_only=False)["state_dict"]
    assert not [name for name in saved if "teacher" in name]
    assert "head.fc_dist.weight" in saved
    first = torch.load(trained, weights_only=False)["state_dict"]
    assert not torch.equal(saved["head.fc.weight"], first["head.fc.weight"])
