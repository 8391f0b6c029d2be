# SPDX-License-Identifier: Apache-2.0
"""Random changes of colors behind a flip give the same colors as before it."""

from importlib import import_module

import numpy as np
import pytest
from mmengine.registry import TRANSFORMS, DefaultScope


@pytest.mark.parametrize(("scope", "room"), [("mmdet", "detection"), ("mmrotate", "rotated")])
@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_flipped_images(scope, room, direction):
    """OpenCV cannot write into a flipped image, which mmdet's own lets it do."""
    pytest.importorskip(scope)
    import_module(f"mmeformer.{room}")
    image = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    with DefaultScope.overwrite_default_scope(scope):
        flip = TRANSFORMS.build(dict(type="mmdet.RandomFlip", prob=1.0, direction=direction))
        colors = TRANSFORMS.build(dict(type="mmdet.YOLOXHSVRandomAug"))
    results = []
    for steps in ((flip, colors), (colors, flip)):
        sample = dict(img=image.copy(), img_shape=image.shape[:2])
        for step in steps:
            if step is colors:
                np.random.seed(1)
            sample = step(sample)
        results.append(sample["img"])
    np.testing.assert_array_equal(*results)
    assert not np.array_equal(results[0], flip(dict(img=image, img_shape=(12, 17)))["img"])
