# SPDX-License-Identifier: Apache-2.0
"""Whole models predict the same with our operators and with mmcv's compiled ones."""

import importlib

import numpy as np
import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmrotate")

from ops.model_cases import TEST_CFG, predict  # noqa: E402

from mmeformer.ops import status, substitute  # noqa: E402


@pytest.mark.skipif(status().operators != "compiled", reason="mmcv has no compiled operators here")
@pytest.mark.parametrize("task", list(TEST_CFG))
def test_predictions_equal_those_with_compiled_operators(task, monkeypatch):
    theirs = predict(task)
    for name in ("nms", "box_iou_rotated", "roi_align"):
        module = importlib.import_module(f"mmcv.ops.{name}")
        monkeypatch.setattr(module, "ext_module", substitute)
    ours = predict(task)
    assert len(theirs["boxes"]) >= 30 and len(np.unique(theirs["scores"])) >= 30, "says nothing"
    for key, value in theirs.items():
        if key in ("labels", "masks"):
            np.testing.assert_array_equal(ours[key], value)
        else:
            np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-5)
