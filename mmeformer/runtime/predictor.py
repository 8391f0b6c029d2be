# SPDX-License-Identifier: Apache-2.0
"""Load an exported ONNX file and predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

from mmeformer.runtime.images import Prepared, as_image, prepare
from mmeformer.runtime.metadata import KEY, Metadata
from mmeformer.runtime.results import Detections, Pyramid, RotatedDetections, Segmentation
from mmeformer.runtime.rotated_nms import rotated_nms

Result = Detections | Pyramid | RotatedDetections | Segmentation

MAX_LOGITS = 2**28
"""Most logits (1 GiB of them) that a segmentation graph is asked to enlarge at once."""


def load(path: str | Path, threads: int = 0, providers: Sequence[str] | None = None) -> Predictor:
    """A predictor for a file that ``tools/export.py`` wrote.

    Args:
        path: the ``.onnx`` file. Its metadata is inside; the JSON file beside it is for readers.
        threads: for one operator; 0 lets onnxruntime choose.
        providers: of onnxruntime; None takes the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ONNX file of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model {path} does not exist")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers or ["CPUExecutionProvider"])
        )
    except Exception as error:  # onnxruntime's errors have no common base but this one
        raise ValueError(f"{path}: onnxruntime cannot load it ({error})") from error
    properties = session.get_modelmeta().custom_metadata_map
    if KEY not in properties:
        raise ValueError(f"{path} has no metadata of mmeformer; export it with tools/export.py")
    return Predictor(session, Metadata.from_json(properties[KEY], path))


class Predictor:
    """Predicts with one exported model; made by :func:`load`.

    Args:
        session: of the exported file.
        metadata: what the file says of itself.
    """

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata) -> None:
        self.session = session
        self.metadata = metadata
        self.input_names = [item.name for item in session.get_inputs()]
        self.output_names = [item.name for item in session.get_outputs()]

    def predict(self, image: np.ndarray | str | Path) -> Result:
        """What the model finds in an image: a file, or an array (H, W, 3) of ``uint8`` in BGR.

        Returns:
            :class:`Detections`, :class:`Segmentation`, :class:`RotatedDetections` or
            :class:`Pyramid`, in pixels of the image.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an image.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[np.ndarray | str | Path]) -> list[Result]:
        """As :meth:`predict`, for several images at once.

        Images go through the network together where their sizes agree and the model's batch lets
        them, so that nothing is padded for the sake of another image.
        """
        prepared = [prepare(as_image(image), self.metadata) for image in images]
        groups: dict[tuple, list[int]] = {}
        for index, item in enumerate(prepared):
            key = (item.data.shape, item.original)
            groups.setdefault(key, []).append(index)
        results: list[Result | None] = [None] * len(prepared)
        for members in groups.values():
            step = self.metadata.batch or len(members)
            for start in range(0, len(members), step):
                chunk = members[start : start + step]
                found = self._run([prepared[index] for index in chunk])
                for index, result in zip(chunk, found, strict=True):
                    results[index] = result
        return results

    def run(self, batch: Sequence[Prepared]) -> dict[str, np.ndarray]:
        """The graph's outputs for prepared images of one size, by name.

        A graph of a fixed batch is filled up with the last image.
        """
        items = list(batch)
        items += [items[-1]] * ((self.metadata.batch or len(items)) - len(items))
        inputs = {"image": np.stack([item.data for item in items])}
        if "image_size" in self.input_names:
            inputs["image_size"] = np.array([item.size for item in items], np.float32)
        if "output_size" in self.input_names:
            inputs["output_size"] = np.array(self._output_size(items[0].original), np.int64)
        return dict(zip(self.output_names, self.session.run(None, inputs), strict=True))

    def _output_size(self, original: tuple[int, int]) -> tuple[int, int]:
        """``original``, or of that shape and as large as memory allows."""
        height, width = original
        logits = height * width * max(len(self.metadata.classes), 1)
        shrink = min((MAX_LOGITS / logits) ** 0.5, 1.0)
        return max(int(height * shrink), 1), max(int(width * shrink), 1)

    def _run(self, batch: list[Prepared]) -> list[Result]:
        outputs = self.run(batch)
        if self.metadata.task == "backbone":
            return [
                Pyramid(tuple(outputs[name][index] for name in self.output_names))
                for index in range(len(batch))
            ]
        if self.metadata.task == "segmentation":
            labels = outputs["labels"][: len(batch)]
            return [_segmentation(item, image) for item, image in zip(batch, labels, strict=True)]
        single = self._rotated if self.metadata.task == "rotated" else self._detections
        results = []
        for index, item in enumerate(batch):
            own = outputs["image_index"] == index
            results.append(single(item, {name: value[own] for name, value in outputs.items()}))
        return results

    def _detections(self, item: Prepared, outputs: dict[str, np.ndarray]) -> Detections:
        height, width = _scale_factors(item)
        boxes = outputs["boxes"] / np.array([width, height, width, height], np.float32)
        return Detections(
            boxes,
            outputs["scores"],
            outputs["labels"],
            outputs.get("masks"),
            item.original,
            self.metadata.mask_threshold,
        )

    def _rotated(self, item: Prepared, outputs: dict[str, np.ndarray]) -> RotatedDetections:
        boxes, scores, labels = outputs["boxes"], outputs["scores"], outputs["labels"]
        boxes = _rescale_rotated(boxes, *_scale_factors(item))
        kept = rotated_nms(boxes, scores, labels, self.metadata.iou_threshold)
        kept = kept[: self.metadata.max_per_image]
        return RotatedDetections(boxes[kept], scores[kept], labels[kept])


def _scale_factors(item: Prepared) -> tuple[float, float]:
    """Pixels of the network's input for a pixel of the image, vertically and horizontally."""
    return tuple(new / old for new, old in zip(item.size, item.original, strict=True))


def _rescale_rotated(boxes: np.ndarray, height: float, width: float) -> np.ndarray:
    """Rotated boxes of the network's input in pixels of the image.

    Both factors are the same but for rounding, and so the boxes stay rectangles. Source: mmrotate's
    ``RotatedBoxes.rescale_``.
    """
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    return np.stack(
        [
            boxes[:, 0] / width,
            boxes[:, 1] / height,
            boxes[:, 2] * np.hypot(cos / width, sin / height),
            boxes[:, 3] * np.hypot(sin / width, cos / height),
            np.arctan2(sin / width, cos / height),
        ],
        1,
    ).astype(np.float32)


def _segmentation(item: Prepared, labels: np.ndarray) -> Segmentation:
    if labels.shape != item.original:
        height, width = item.original
        labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    return Segmentation(labels)
