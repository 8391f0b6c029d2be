# SPDX-License-Identifier: Apache-2.0
"""Load an exported ONNX file and predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mmeformer import tasks
from mmeformer.files import refuse_url
from mmeformer.runtime.decoders import Result
from mmeformer.runtime.images import Prepared, as_image, prepare
from mmeformer.runtime.metadata import KEY, Metadata

MAX_LOGITS = 2**28
"""Largest number of logits (1 GiB) that a segmentation graph resizes at once."""


def load(path: str | Path, threads: int = 0, providers: Sequence[str] | None = None) -> Predictor:
    """Load a file that ``tools/export.py`` wrote.

    Args:
        path: the ``.onnx`` file. Its metadata is inside; the JSON file beside it is for people.
        threads: per operator; 0 lets onnxruntime choose.
        providers: of onnxruntime; None takes the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ONNX file that mmeformer exported.
    """
    refuse_url(path, "model")
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
        metadata: of the file.
    """

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata) -> None:
        self.session = session
        self.metadata = metadata
        self.input_names = [item.name for item in session.get_inputs()]
        self.output_names = [item.name for item in session.get_outputs()]
        self._decode = tasks.load(metadata.export.decoder)

    def predict(self, image: NDArray[Any] | str | Path) -> Result:
        """Predict on one image.

        Args:
            image: a file, or an array (H, W, 3) of ``uint8`` in BGR.

        Returns:
            The result of the model's task (of a backbone its :class:`Pyramid`), in pixels of the
            image.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an image.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[NDArray[Any] | str | Path]) -> list[Result]:
        """Predict on several images; see :meth:`predict`.

        Images of one size go through the network together, as many as the model's batch allows.
        No image is padded to the size of another.
        """
        prepared = [
            prepare(as_image(image, self.metadata.reading), self.metadata) for image in images
        ]
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for index, item in enumerate(prepared):
            groups.setdefault((item.data.shape, item.original), []).append(index)
        results: dict[int, Result] = {}
        for members in groups.values():
            step = self.metadata.batch or len(members)
            for start in range(0, len(members), step):
                chunk = members[start : start + step]
                batch = [prepared[index] for index in chunk]
                found = self._decode(batch, self.run(batch), self.metadata)
                results.update(zip(chunk, found, strict=True))
        return [results[index] for index in range(len(prepared))]

    def run(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        """Run the graph on prepared images of one size; returns its outputs by name.

        If the graph has a fixed batch size, the batch is filled up with the last image.
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
        """``original`` (H, W), or a smaller size of the same shape if memory requires it."""
        height, width = original
        logits = height * width * max(len(self.metadata.classes), 1)
        shrink = min((MAX_LOGITS / logits) ** 0.5, 1.0)
        return max(int(height * shrink), 1), max(int(width * shrink), 1)
