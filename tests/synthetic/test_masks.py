# SPDX-License-Identifier: Apache-2.0

import cv2
import numpy as np
from helpers import digest

from mmeformer.segmentation.checks import check_pairs
from mmeformer.synthetic.masks import (
    CLASSES,
    UNLABELED,
    draw_masked_scene,
    write_mask_dataset,
)
from mmeformer.synthetic.shapes import MIN_VISIBLE_SHARE, draw_scene


def test_same_seed_same_data(tmp_path):
    a = write_mask_dataset(tmp_path / "a", 3, 2, 64, seed=1)
    b = write_mask_dataset(tmp_path / "b", 3, 2, 64, seed=1)
    c = write_mask_dataset(tmp_path / "c", 3, 2, 64, seed=2)
    assert digest(a) == digest(b) != digest(c)
    names = [path.name for path in sorted((a / "images/training").iterdir())]
    assert names == ["000000.png", "000001.png", "000002.png"]


def test_masks_pass_the_checks(tmp_path):
    root = write_mask_dataset(tmp_path / "data", 12, 1, 96)
    images = sorted((root / "images/training").iterdir())
    pairs = [(str(path), str(root / "annotations/training" / path.name)) for path in images]
    assert check_pairs(pairs, CLASSES, reduce_zero_label=False) == []


def test_labels_cover_the_shapes():
    hidden = 0
    for seed in range(60):
        image, mask = draw_masked_scene(np.random.default_rng(seed), 96)
        assert image.shape == (96, 96, 3) and mask.shape == (96, 96)
        same, instances = draw_scene(np.random.default_rng(seed), 96)
        assert np.array_equal(image, same)
        covered = np.zeros((96, 96), dtype=bool)
        for instance in instances:
            covered |= instance.mask
            if instance.visible_share >= MIN_VISIBLE_SHARE:
                assert (mask[instance.mask] == 1 + instance.label).all()
            else:
                hidden += int(instance.mask.any())
                assert (mask[instance.mask] == UNLABELED).all()
        assert (mask[~covered] == 0).all()
    assert hidden, "the rule for hidden shapes was never put to the test"


def test_pictures_are_what_the_masks_say(tmp_path):
    """A shape has one flat color plus noise, so a label map off by a pixel would show."""
    root = write_mask_dataset(tmp_path / "data", 4, 1, 96)
    spread = []
    for path in sorted((root / "images/training").iterdir()):
        image = cv2.imread(str(path)).astype(float)
        mask = cv2.imread(str(root / "annotations/training" / path.name), cv2.IMREAD_UNCHANGED)
        for label in range(1, len(CLASSES)):
            count, parts = cv2.connectedComponents((mask == label).astype(np.uint8))
            for part in range(1, count):
                colors = image[parts == part]
                spread.append(np.abs(colors - np.median(colors, axis=0)).mean())
    # Two touching shapes of one kind are one part of two colors, so not every part is flat.
    assert np.median(spread) < 10
