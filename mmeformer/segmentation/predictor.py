# SPDX-License-Identifier: Apache-2.0
"""Prediction of the class of every pixel, by mmseg's inferencer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmengine.visualization import Visualizer
from mmseg.apis import MMSegInferencer
from mmseg.structures import SegDataSample
from torch import Tensor
from torch.nn import functional

from mmeformer.inference.outputs import write_mask
from mmeformer.inference.predictor import (
    Predictor,
    Progress,
    TrustedWeights,
    at_picture_size,
    native_size,
)
from mmeformer.windows import Window, predict_windows, windows

LOGITS_AT_ONCE = 2**26
"""Numbers (256 MiB of them) that are made at once when logits are brought to the image's size."""

NAMED_SHARE = 0.002
"""Part of a picture that a class must cover for its name to be written there."""


class _Inferencer(TrustedWeights, MMSegInferencer):
    pass


class SegmentationPredictor(Predictor):
    """Results are label maps: (H, W) of uint8, or of uint16 with more than 256 classes.

    Args:
        inferencer, native_size: see the base class.
        mask_format: ``palette`` or ``ids``.
    """

    LARGE = 8.0  # as for detection
    json = False

    def __init__(self, inferencer, native_size: int | None, mask_format: str) -> None:
        super().__init__(inferencer, native_size)
        count = len(self.classes)
        if mask_format == "palette" and count > 256:
            raise ValueError(f"a palette has 256 colours, not {count}: use the mask format ids")
        self.mask_format = mask_format
        self.dtype = np.uint8 if count <= 256 else np.uint16
        palette = self.model.dataset_meta.get("palette")
        if palette is None or len(palette) != count:
            palette = np.random.default_rng(0).integers(0, 256, (count, 3)).tolist()
        self.palette = [tuple(int(value) for value in colour) for colour in palette]
        self.legend = [
            dict(id=index, name=name, color=list(colour))
            for index, (name, colour) in enumerate(zip(self.classes, self.palette, strict=True))
        ]
        inferencer.visualizer.set_dataset_meta(classes=self.classes, palette=self.palette)

    @classmethod
    def from_config(
        cls,
        config: Config,
        checkpoint: str,
        *,
        device: str,
        score_thr: float | None,
        mask_format: str | None,
    ) -> SegmentationPredictor:
        """See :func:`mmeformer.inference.predictor.load_predictor`, which calls this."""
        if score_thr is not None:
            raise ValueError("a score threshold is for detection; every pixel has a class")
        if mask_format not in (None, "palette", "ids"):
            raise ValueError(f"mask format {mask_format!r} must be palette or ids")
        # mmseg's own default hides most of the image.
        config.visualizer.setdefault("alpha", 0.5)
        inferencer = _Inferencer(config, checkpoint, device=device, show_progress=False)
        return cls(inferencer, native_size(config), mask_format or "palette")

    def _forward_batch(self, batch: dict) -> list[np.ndarray]:
        # mmseg's own `predict` would bring the logits of all classes to the size of the image:
        # 7 GB for a photograph of 12 megapixels and 150 classes.
        data = self.model.data_preprocessor(batch, False)
        metas = [sample.metainfo for sample in data["data_samples"]]
        logits = self.model.inference(data["inputs"], metas)
        head = self.model.decode_head
        return [
            label_map(
                _without_padding(item, meta),
                meta["ori_shape"],
                align_corners=head.align_corners,
                threshold=head.threshold,
            )
            .cpu()
            .numpy()
            .astype(self.dtype)
            for item, meta in zip(logits, metas, strict=True)
        ]

    def predict_windows(
        self, image: np.ndarray, size: int, overlap: int, batch_size: int, progress: Progress
    ) -> np.ndarray:
        """See the base class and :func:`segment_windows`."""
        return segment_windows(
            image, self.predict_images, size, overlap, batch_size, progress, self.dtype
        )

    def draw(self, image: np.ndarray, result: np.ndarray) -> np.ndarray:
        """See the base class; drawn by the visualizer of the config, with names of the classes."""
        picture, _ = at_picture_size(image)
        height, width = picture.shape[:2]
        labels = cv2.resize(result, (width, height), interpolation=cv2.INTER_NEAREST)
        return draw_labels(self.inferencer.visualizer, picture, labels, self.classes)

    def write_files(self, out: Path, name: str, result: np.ndarray) -> None:
        """Write ``masks/NAME.png``."""
        palette = self.palette if self.mask_format == "palette" else None
        write_mask(out / "masks" / f"{name}.png", result, palette)


def _without_padding(logits: Tensor, meta: dict) -> Tensor:
    """Logits (C, H, W) of the part of the model's input that the data preprocessor did not add."""
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", (0, 0, 0, 0)))
    height, width = logits.shape[1:]
    return logits[:, top : height - bottom, left : width - right]


def label_map(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool, threshold: float | None
) -> Tensor:
    """The most likely class of every pixel, without logits of all classes at the image's size.

    Args:
        logits: (C, h, w); with one channel, of the second of two classes.
        size: height and width of the image.
        align_corners: of the bilinear interpolation.
        threshold: probability of the second class from which a pixel is of it; for one channel.

    Returns:
        (H, W) int64, equal to the ``argmax`` of the logits interpolated to ``size``.
    """
    step = max(1, LOGITS_AT_ONCE // (size[0] * size[1]))
    best = labels = None
    for start in range(0, len(logits), step):
        part = functional.interpolate(
            logits[None, start : start + step],
            size=tuple(size),
            mode="bilinear",
            align_corners=align_corners,
        )[0]
        if len(logits) == 1:
            return (part[0].sigmoid() > threshold).long()
        value, index = part.max(0)
        if best is None:
            best, labels = value, index
        else:
            better = value > best
            best = torch.where(better, value, best)
            labels = torch.where(better, index + start, labels)
    return labels


def segment_windows(
    image: np.ndarray,
    predict: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]],
    size: int,
    overlap: int,
    batch_size: int,
    progress: Progress,
    dtype: type = np.uint8,
) -> np.ndarray:
    """Label map of an image of any size.

    Each pixel gets its class from the window in which it lies farthest from the border, where the
    model sees most of what is around it. Beside the map no more than one batch is held.

    Args:
        image: ``(H, W, 3)``.
        predict: label maps of the images of one batch.
        size, overlap, batch_size, progress: see :meth:`Predictor.predict_windows`.
        dtype: of the map.

    Returns:
        (H, W).
    """
    height, width = image.shape[:2]
    places = windows(width, height, size, overlap)
    owned = cores(places)
    labels = np.empty((height, width), dtype)
    for done, (window, found) in enumerate(predict_windows(image, places, predict, batch_size)):
        x0, y0, x1, y1 = owned[done]
        left, top = window[:2]
        labels[y0:y1, x0:x1] = found[y0 - top : y1 - top, x0 - left : x1 - left]
        progress(done + 1, len(places))
    return labels


def cores(places: Sequence[Window]) -> list[Window]:
    """The part of each window that is its own: neighbours share their overlap half and half.

    Args:
        places: as :func:`mmeformer.windows.windows` gives them.

    Returns:
        Rectangles that cover the image without overlap, in the same order.
    """
    columns = _shares({(x0, x1) for x0, _, x1, _ in places})
    rows = _shares({(y0, y1) for _, y0, _, y1 in places})
    owned = []
    for x0, y0, _, _ in places:
        (left, right), (top, bottom) = columns[x0], rows[y0]
        owned.append((left, top, right, bottom))
    return owned


def _shares(spans: set[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    spans = sorted(spans)
    edges = [(end + start) // 2 for (_, end), (start, _) in zip(spans, spans[1:], strict=False)]
    edges = [spans[0][0], *edges, spans[-1][1]]
    return {
        start: (low, high)
        for (start, _), low, high in zip(spans, edges[:-1], edges[1:], strict=True)
    }


def draw_labels(
    visualizer: Visualizer, image: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> np.ndarray:
    """An image with its classes laid over it in their colours, and named.

    Args:
        visualizer: mmseg's ``SegLocalVisualizer`` with classes and palette.
        image: (H, W, 3) uint8, blue, green, red.
        labels: (H, W).
        classes: names.

    Returns:
        (H, W, 3) uint8, blue, green, red.
    """
    sample = SegDataSample(
        pred_sem_seg=PixelData(data=torch.from_numpy(labels[None].astype(np.int64)))
    )
    # mmseg's own names are placed by sorting the pixels of every class, which takes minutes.
    visualizer.add_datasample(
        "labels",
        np.ascontiguousarray(image[..., ::-1]),
        sample,
        draw_gt=False,
        with_labels=False,
    )
    for label in np.unique(labels):
        region = (labels == label).astype(np.uint8)
        if region.mean() < NAMED_SHARE:
            continue
        # Padded, so that the border of the image counts as one of the region.
        depth = cv2.distanceTransform(np.pad(region, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        place = np.unravel_index(depth.argmax(), depth.shape)[::-1]
        visualizer.draw_texts(
            classes[label],
            np.array(place),
            colors="w",
            horizontal_alignments="center",
            vertical_alignments="center",
            bboxes=dict(facecolor="black", alpha=0.6, pad=0.7, edgecolor="none"),
        )
    return visualizer.get_image()[..., ::-1]
