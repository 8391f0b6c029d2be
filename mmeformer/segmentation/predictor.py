# SPDX-License-Identifier: Apache-2.0
"""Predict the class of every pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.infer import BaseInferencer
from mmseg.apis import MMSegInferencer
from torch import Tensor
from torch.nn import functional

from mmeformer.inference.outputs import write_mask
from mmeformer.inference.pictures import at_picture_size
from mmeformer.inference.predictor import Predictor
from mmeformer.merging import merge_segmentations
from mmeformer.results import Segmentation
from mmeformer.segmentation.settings import require_windows
from mmeformer.segmentation.visualizer import draw_labels
from mmeformer.windows import LARGE, Window

LOGITS_AT_ONCE = 2**26
"""Numbers (256 MiB) that are computed at once when logits are resized to the image."""


class SegmentationPredictor(Predictor[Segmentation]):
    """Predicts :class:`mmeformer.results.Segmentation`.

    Labels are of uint8, or of uint16 with more than 256 classes.

    Args:
        inferencer, native_size, score_thr: see the base class.
        mask_format: ``palette`` (default) or ``ids``, see :meth:`write_files`.
    """

    inferencer_class = MMSegInferencer
    large = LARGE
    has_scores = False
    mask_formats = ("palette", "ids")
    writes_json = False

    def __init__(
        self,
        inferencer: BaseInferencer,
        native_size: int | None = None,
        mask_format: str | None = None,
        score_thr: None = None,
    ) -> None:
        super().__init__(inferencer, native_size, mask_format, score_thr)
        require_windows(self.model)
        count = len(self.classes)
        if self.mask_format == "palette" and count > 256:
            raise ValueError(f"a palette has 256 colors, not {count}: use the mask format ids")
        self.dtype = np.uint8 if count <= 256 else np.uint16
        palette = self.model.dataset_meta.get("palette")
        if palette is None or len(palette) != count:
            palette = np.random.default_rng(0).integers(0, 256, (count, 3)).tolist()
        self.palette = [(int(r), int(g), int(b)) for r, g, b in palette]
        self.legend = [
            dict(id=index, name=name, color=list(color))
            for index, (name, color) in enumerate(zip(self.classes, self.palette, strict=True))
        ]
        inferencer.visualizer.set_dataset_meta(classes=self.classes, palette=self.palette)

    @classmethod
    def set_visualizer(cls, settings: ConfigDict) -> None:
        """See the base class."""
        # mmseg's own default hides most of the image.
        settings.setdefault("alpha", 0.5)

    def results_of_batch(self, batch: dict) -> list[Segmentation]:
        """See the base class."""
        # mmseg's own `predict` resizes the logits of all classes to the image: 7 GB for a
        # photograph of 12 megapixels and 150 classes.
        data = self.model.data_preprocessor(batch, False)
        metas = [sample.metainfo for sample in data["data_samples"]]
        logits = self.model.inference(data["inputs"], metas)
        found = []
        for item, meta in zip(logits, metas, strict=True):
            labels = label_map(
                _without_padding(item, meta),
                meta["ori_shape"],
                align_corners=self.model.align_corners,
                # Heads that classify masks, such as Mask2Former's, have none.
                threshold=getattr(self.model.decode_head, "threshold", None),
            )
            found.append(Segmentation(labels.cpu().numpy().astype(self.dtype)))
        return found

    def merge(
        self, places: Sequence[Window], results: Iterable[Segmentation], size: tuple[int, int]
    ) -> Segmentation:
        """See the base class and :func:`mmeformer.merging.merge_segmentations`."""
        return merge_segmentations(places, results, size, self.dtype)

    def draw(self, image: np.ndarray, result: Segmentation) -> np.ndarray:
        """See the base class; drawn by the visualizer of the config, with names of the classes."""
        picture, _ = at_picture_size(image)
        height, width = picture.shape[:2]
        labels = cv2.resize(result.labels, (width, height), interpolation=cv2.INTER_NEAREST)
        return draw_labels(self.inferencer.visualizer, picture, labels, self.classes)

    def write_files(self, out: Path, name: str, result: Segmentation) -> None:
        """Write ``masks/NAME.png``, indexed with the palette or as gray values (``ids``)."""
        palette = self.palette if self.mask_format == "palette" else None
        write_mask(out / "masks" / f"{name}.png", result.labels, palette)


def _without_padding(logits: Tensor, meta: dict) -> Tensor:
    """Logits (C, H, W) without the padding that the data preprocessor added to the input."""
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", (0, 0, 0, 0)))
    height, width = logits.shape[1:]
    return logits[:, top : height - bottom, left : width - right]


def label_map(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool, threshold: float | None
) -> Tensor:
    """Find the most likely class of every pixel, without resizing all logits at once.

    Args:
        logits: (C, h, w); a single channel is the logit of the second of two classes.
        size: height and width of the image.
        align_corners: of the bilinear interpolation.
        threshold: for a single channel, the probability from which a pixel is of the second class.

    Returns:
        (H, W) int64, equal to the ``argmax`` of the logits interpolated to ``size``.
    """

    def enlarge(logits: Tensor) -> Tensor:
        return functional.interpolate(
            logits[None], size=tuple(size), mode="bilinear", align_corners=align_corners
        )[0]

    if len(logits) == 1:
        assert threshold is not None, "a single channel needs a threshold"
        return (enlarge(logits)[0].sigmoid() > threshold).long()
    step = max(1, LOGITS_AT_ONCE // (size[0] * size[1]))
    best, labels = enlarge(logits[:step]).max(0)
    for start in range(step, len(logits), step):
        value, index = enlarge(logits[start : start + step]).max(0)
        better = value > best
        best = torch.where(better, value, best)
        labels = torch.where(better, index + start, labels)
    return labels
