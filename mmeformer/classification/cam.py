# SPDX-License-Identifier: Apache-2.0
"""Class activation maps: which places of an image speak for a class."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from mmeformer.classification.predictor import ClassificationPredictor


@torch.no_grad()
def activation_map(
    predictor: ClassificationPredictor, image: np.ndarray, label: int | None = None
) -> tuple[np.ndarray, int]:
    """Logits of a class at every place that the model sees.

    Args:
        predictor: of a classifier with :class:`~mmeformer.classification.head.EfficientFormerHead`.
        image: (H, W, 3) uint8, blue, green, red.
        label: index of the class; None takes the most likely one.

    Returns:
        The map (h, w), whose mean is the class's logit, of the crop that the test pipeline cuts
        (:func:`seen`); and the label.
    """
    model = predictor.model
    batch = predictor.inferencer.collate_fn([predictor.prepare(image)])
    feats = model.extract_feat(model.data_preprocessor(batch, False)["inputs"])
    if label is None:
        label = int(model.head(feats)[0].argmax())
    return model.head.activation_map(feats)[0, label].cpu().numpy(), label


def seen(predictor: ClassificationPredictor, image: np.ndarray) -> np.ndarray:
    """The crop that the model sees of an image, (H, W, 3) uint8, blue, green, red."""
    inputs = predictor.prepare(image)["inputs"]
    return np.ascontiguousarray(inputs.permute(1, 2, 0).numpy())


def draw(image: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """Lay an activation map over the crop it belongs to.

    Args:
        image: from :func:`seen`.
        activation: from :func:`activation_map`; red speaks for the class, blue against it.
    """
    height, width = image.shape[:2]
    low, high = activation.min(), activation.max()
    scaled = ((activation - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    large = cv2.resize(scaled, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.addWeighted(image, 0.5, cv2.applyColorMap(large, cv2.COLORMAP_JET), 0.5, 0)
