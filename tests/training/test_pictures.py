# SPDX-License-Identifier: Apache-2.0
"""Pictures of a test: one for every image."""

import cv2
import pytest
import tiny

from mmeformer.training import engine


@pytest.mark.parametrize("task", ["segmentation", "rotated"])
def test_every_image_has_a_picture_of_its_own(task, tmp_path):
    places = ("north", "south") if task == "segmentation" else ("north",)
    configs = [tiny.TASKS[task](tmp_path / place) for place in places]
    config = configs[0]
    checkpoint = tiny.save_trained(config, tmp_path)
    if len(places) > 1:
        # Both have images of the same names.
        parts = [other.test_dataloader.dataset for other in configs]
        config.test_dataloader.dataset = dict(type="ConcatDataset", datasets=parts)
    config.work_dir = str(tmp_path / "work")
    out = tmp_path / "pictures"
    engine.build_test_runner(config, checkpoint, show_dir=str(out)).test()
    found = sorted(path for path in out.rglob("*") if path.is_file())
    assert len(found) == 2 * len(places) and len({path.name for path in found}) == 2
    if len(places) > 1:
        assert {path.relative_to(out).parts[0] for path in found} == set(places)
    for path in found:
        assert cv2.imread(str(path)).shape == (64, 128, 3), "ground truth on the left"
