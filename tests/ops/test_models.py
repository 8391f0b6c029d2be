# SPDX-License-Identifier: Apache-2.0
"""Predictions of whole models with our operators equal those with mmcv's compiled ones."""

import importlib

import numpy as np
import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmrotate")

from ops.model_cases import GOLDEN, TEST_CFG, predict  # noqa: E402

from mmeformer.ops import status, substitute  # noqa: E402


@pytest.fixture
def ours(monkeypatch):
    for name in ("nms", "box_iou_rotated", "roi_align"):
        module = importlib.import_module(f"mmcv.ops.{name}")
        monkeypatch.setattr(module, "ext_module", substitute)


def check(task):
    found = predict(task)
    with np.load(GOLDEN) as stored:
        expected = {key: stored[f"{task}/{key}"] for key in found}
    assert len(expected["boxes"]) >= 30
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-2)
    if task == "detection":
        bits, theirs = np.unpackbits(found["masks"]), np.unpackbits(expected["masks"])
        assert theirs.sum() > 300, "masks say nothing"
        assert (bits != theirs).sum() <= 0.01 * theirs.sum()


@pytest.mark.parametrize("task", list(TEST_CFG))
def test_predictions_equal_those_with_compiled_operators(task, ours):
    check(task)


@pytest.mark.skipif(status().operators != "compiled", reason="mmcv has no compiled operators here")
@pytest.mark.parametrize("task", list(TEST_CFG))
def test_what_is_stored_was_predicted_with_compiled_operators(task):
    check(task)
