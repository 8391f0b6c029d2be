# SPDX-License-Identifier: Apache-2.0
"""Metadata of an exported model: how to prepare inputs, and what its outputs mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mmeformer import tasks
from mmeformer.images import Reading

FORMAT = 1
"""Version of the format; increased when a reader of the old format would misread the new one."""

KEY = "mmeformer"
"""The entry of an ONNX file's ``metadata_props``, and of a CoreML model's user metadata."""


_ADDED_LATER = {
    "patch_size",
    "training_sides",
    "bands",
    "stretch",
    "shorter_side",
    "crop",
    "candidates",
    "category_ids",
    "cut_above",
    "window",
}
"""Entries that files of earlier versions do not have; their defaults hold."""


@dataclass(frozen=True)
class Metadata:
    """How to prepare inputs of an exported model, and what its outputs mean.

    Args:
        task: a key of :func:`mmeformer.tasks.exports`.
        version: version of mmeformer that wrote the file.
        config: name of the config it was exported from.
        mean, std: of the channels, in the order the network sees them, on a scale of 0 to 255.
        bgr_to_rgb: whether the network sees RGB; images come in as BGR, as OpenCV reads them.
        preprocessing_in_graph: the graph takes ``uint8`` images (B, H, W, 3) in BGR and normalizes
            them itself; else it takes normalized ``float32`` images (B, 3, H, W).
        batch: images per run; None for any number.
        size: (H, W) of the graph's image input in pixels; None for any size.
        scale: two numbers from the test pipeline, in pixels: images are resized so that the long
            side is at most the larger and the short side at most the smaller, or, without
            ``keep_ratio``, to exactly (width, height). None leaves images at their size.
        keep_ratio: see ``scale``.
        multiple: after that, images are stretched until their sides are multiples of this.
        shorter_side, crop: of classifiers, from the test pipeline, in pixels: images are resized,
            with Pillow's bicubic filter, so that their shorter side is ``shorter_side``, then the
            center (height, width) is cut out. None for other models.
        pad_divisor: after normalizing, images are padded with zeros at the right and at the bottom
            until their sides are multiples of this.
        classes: names, in the order of the labels.
        palette: a color (R, G, B) for each class, or empty.
        strides: of a backbone's outputs, in pixels.
        score_threshold: detections with this score or a lower one are not reported.
        iou_threshold: of the last non-maximum suppression, in the graph or in
            :mod:`mmeformer.runtime.decoders`.
        max_per_image: largest number of detections of an image.
        mask_threshold: smallest probability of a mask's pixel.
        patch_size: side in pixels of the patches that the model was trained on: larger images are
            cut into windows of this side, whose rotated boxes are merged, and smaller ones are
            padded to it. 0 for a model of whole images.
        training_sides: the smallest and the largest longer side of a training image in pixels; None
            if unknown, or if objects have any size in pixels.
        candidates: largest number of boxes of a level that go into non-maximum suppression in
            :mod:`mmeformer.runtime.decoders`; None for all.
        cut_above, window: of models of photographs: images whose longer side exceeds ``cut_above``
            pixels are cut into windows of this side, as in prediction with the checkpoint. None if
            none is cut, or if they are cut by ``patch_size``.
        category_ids: of COCO, by label; empty if they count from 1.
        bands, stretch: how imagery in files is read; see :class:`mmeformer.images.Reading`.
    """

    task: str
    version: str
    config: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr_to_rgb: bool
    preprocessing_in_graph: bool = False
    batch: int | None = None
    size: tuple[int, int] | None = None
    scale: tuple[int, int] | None = None
    keep_ratio: bool = True
    multiple: int = 1
    pad_divisor: int = 1
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    strides: tuple[int, ...] = ()
    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_per_image: int | None = None
    mask_threshold: float | None = None
    patch_size: int = 0
    training_sides: tuple[int, int] | None = None
    bands: Sequence[int] | None = None
    stretch: Sequence[float] | str | None = None
    shorter_side: int | None = None
    crop: tuple[int, int] | None = None
    candidates: int | None = None
    category_ids: tuple[int, ...] = ()
    cut_above: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.task not in tasks.exports():
            raise ValueError(
                f"task must be one of {', '.join(tasks.exports())}, but is {self.task!r}"
            )
        if self.crop and self.size and tuple(self.size) != tuple(self.crop):
            raise ValueError(
                f"the size {tuple(self.size)} must be that of the test pipeline's CenterCrop, "
                f"{tuple(self.crop)}: change one of them"
            )
        if self.category_ids and len(self.category_ids) != len(self.classes):
            raise ValueError(
                f"category_ids has {len(self.category_ids)} numbers for {len(self.classes)} classes"
            )

    @property
    def export(self) -> tasks.Export:
        """How files of this task are run."""
        return tasks.exports()[self.task]

    @property
    def reading(self) -> Reading:
        """How imagery in files is read."""
        return Reading(self.bands, self.stretch)

    def to_json(self) -> str:
        """Text for :meth:`from_json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str | Path) -> Metadata:
        """Read the text of :meth:`to_json`; messages name the file ``source``.

        Raises:
            ValueError: the text is of another format, or damaged.
        """
        try:
            values = json.loads(text)
            version = values.pop("format")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{source}: its metadata is damaged; export the model again") from None
        if version != FORMAT:
            raise ValueError(
                f"{source}: its metadata has format {version}, but this version of mmeformer reads "
                f"format {FORMAT}; export the model again, or install the version that wrote it"
            )
        known = {field.name for field in fields(cls)}
        required = known - _ADDED_LATER
        if not required <= set(values) <= known:
            raise ValueError(
                f"{source}: its metadata has missing entries {sorted(required - set(values))} and "
                f"unknown entries {sorted(set(values) - known)}; export the model again"
            )
        try:
            return cls(**{name: _as_tuple(value) for name, value in values.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{source}: its metadata is damaged ({error}); export the model again"
            ) from None


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
