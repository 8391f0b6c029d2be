# SPDX-License-Identifier: Apache-2.0
"""What a program must know about an exported model, carried inside the file and beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FORMAT = 1
"""Raised when a reader of the old format would misread the new one."""

KEY = "mmeformer"
"""The entry of an ONNX file's ``metadata_props``, and of a CoreML model's user metadata."""

TASKS = ("backbone", "segmentation", "detection", "rotated")


@dataclass(frozen=True)
class Metadata:
    """How to feed an exported model, and what its outputs mean.

    Args:
        task: one of :data:`TASKS`.
        version: version of mmeformer that wrote the file.
        config: name of the config it was exported from.
        mean, std: of the channels, in the order the network sees them, on a scale of 0 to 255.
        bgr_to_rgb: whether the network sees RGB; images come in as BGR, as OpenCV reads them.
        preprocessing_in_graph: the graph takes ``uint8`` images (B, H, W, 3) in BGR and normalises
            them itself; else it takes normalised ``float32`` images (B, 3, H, W).
        batch: images per run; None for any number.
        size: (H, W) of the graph's image input in pixels; None for any size.
        scale: two numbers from the test pipeline, in pixels: images are resized so that the long
            side is at most the larger and the short side at most the smaller, or, without
            ``keep_ratio``, to exactly (width, height). None leaves images at their size.
        keep_ratio: see ``scale``.
        multiple: after that, sides are stretched up to multiples of this.
        pad_divisor: after normalising, the right and the lower side are padded with zeros up to
            multiples of this.
        classes: names, in the order of the labels.
        palette: a colour (R, G, B) for each class, or empty.
        strides: of a backbone's outputs, in pixels.
        score_threshold: detections scored lower are not reported.
        iou_threshold: of the non-maximum suppression that ended a detection (``detection``: inside
            the graph; ``rotated``: in :mod:`mmeformer.runtime`).
        max_per_image: most detections of an image.
        mask_threshold: least probability of a mask's pixel.
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

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, but is {self.task!r}")

    def to_json(self) -> str:
        """The text that :meth:`from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str | Path) -> Metadata:
        """Read what :meth:`to_json` wrote; ``source`` is the file that messages name.

        Raises:
            ValueError: the text is of another format, or damaged.
        """
        try:
            values = json.loads(text)
            version = values.pop("format")
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{source}: its metadata is damaged; export the model again") from None
        if version != FORMAT:
            raise ValueError(
                f"{source}: its metadata has format {version}, but this version of mmeformer reads "
                f"format {FORMAT}; export the model again, or install the version that wrote it"
            )
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(
                f"{source}: its metadata lacks {sorted(known - set(values))} and has unknown "
                f"{sorted(set(values) - known)}; export the model again"
            )
        return cls(**{name: _as_tuple(value) for name, value in values.items()})


def _as_tuple(value):
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
