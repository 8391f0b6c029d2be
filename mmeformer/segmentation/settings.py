# SPDX-License-Identifier: Apache-2.0
"""Checks of settings of model, data set and metric that must fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmeformer.training.data import leaves

UNLABELED = 255
"""Value of pixels that mmseg leaves out for ``reduce_zero_label`` and for classes not chosen."""


def plain_model(model: Any) -> Any:
    """The segmentor inside wrappers for several processes or test-time augmentation."""
    while hasattr(model, "module"):
        model = model.module
    return model


def require_windows(model: Any) -> None:
    """Raise ValueError if testing in windows would leave gaps between them.

    mmseg fails in an assertion, in training after the first epoch.
    """
    settings = getattr(plain_model(model), "test_cfg", None) or {}
    if settings.get("mode") != "slide":
        return
    crop, stride = settings.get("crop_size"), settings.get("stride")
    if crop is None or stride is None:
        raise ValueError(
            "model.test_cfg.mode=slide needs model.test_cfg.crop_size and stride, each (height, "
            "width) in pixels"
        )
    if any(not 0 < step <= side for step, side in zip(stride, crop, strict=True)):
        raise ValueError(
            f"model.test_cfg.stride {tuple(stride)} must be at least 1 and at most crop_size "
            f"{tuple(crop)}, or pixels between the windows have no class; set it to about two "
            "thirds of crop_size"
        )


def require_ignore_index_of_model(dataset: Any, model: Any) -> None:
    """Raise ValueError if data set and model mark unlabeled pixels by different values.

    Args:
        dataset: of the training data loader; may be a wrapper.
        model: the segmentor.
    """
    model = plain_model(model)
    found = {
        f"model.{name}.ignore_index": module.ignore_index
        for name, module in model.named_modules()
        if hasattr(module, "ignore_index") and hasattr(module, "num_classes")
    }
    preprocessor: Any = getattr(model, "data_preprocessor", None)
    if hasattr(preprocessor, "seg_pad_val"):
        found["model.data_preprocessor.seg_pad_val"] = preprocessor.seg_pad_val
    _require_equal(dataset, found)


def require_ignore_index_of_metrics(dataset: Any, metrics: Sequence, evaluator: str) -> None:
    """Raise ValueError if data set and metric mark unlabeled pixels by different values.

    Args:
        dataset: of a data loader; may be a wrapper.
        metrics: of an evaluator.
        evaluator: its name in the config.
    """
    values = [metric.ignore_index for metric in metrics if hasattr(metric, "ignore_index")]
    _require_equal(dataset, {f"{evaluator}.ignore_index": value for value in values})


def _require_equal(dataset: Any, found: dict[str, int]) -> None:
    for leaf in leaves(dataset):
        value = getattr(leaf, "ignore_index", None)
        if value is None:
            continue
        if wrong := {name: other for name, other in found.items() if other != value}:
            listed = ", ".join(f"{name} is {other}" for name, other in wrong.items())
            raise ValueError(
                f"the data set has ignore_index={value}, but {listed}: unlabeled pixels would "
                f"count as a class. Set {' and '.join(wrong)} to {value} too"
            )
        label_map = getattr(leaf, "label_map", None) or {}
        if value != UNLABELED and (
            getattr(leaf, "reduce_zero_label", False) or UNLABELED in label_map.values()
        ):
            raise ValueError(
                f"the data set has ignore_index={value}, but mmseg marks the pixels that it leaves "
                f"out for reduce_zero_label or unused classes by {UNLABELED}. Save {value} in the "
                f"masks as {UNLABELED}, and remove ignore_index"
            )
