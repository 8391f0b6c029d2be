# SPDX-License-Identifier: Apache-2.0
"""Load an exported file and predict."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mmeformer import tasks
from mmeformer.files import refuse_url
from mmeformer.images import Image, as_image
from mmeformer.runtime import executorch, litert
from mmeformer.runtime.decoders import Result
from mmeformer.runtime.images import Prepared, prepare
from mmeformer.runtime.metadata import KEY, Metadata
from mmeformer.runtime.parts import patch_side, size_warning, window_side
from mmeformer.training_images import TrainingImages
from mmeformer.windows import as_patch, crop, predict_windows, windows


class Session(Protocol):
    """What predictors need of an onnxruntime session; other runtimes have it too."""

    def get_inputs(self) -> Sequence[Any]:
        """The inputs, which have a ``name``, in order."""

    def get_outputs(self) -> Sequence[Any]:
        """The outputs, which have a ``name``, in order."""

    def run(self, names: None, inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """All outputs in order, given the inputs by name."""


RUNTIMES: dict[str, tuple[str, Callable[[Path, int], Session]]] = {
    litert.SUFFIX: ("LiteRT", litert.LiteRtSession),
    executorch.SUFFIX: ("ExecuTorch", executorch.ExecuTorchSession),
}
"""Runtimes other than onnxruntime: suffix of their files -> name, session of path and threads."""

WINDOWS_AT_ONCE = 4
"""Windows of a large image per run, if the batch is free."""

MAX_LOGITS = 2**28
"""Largest number of logits (1 GiB) that a segmentation graph resizes at once."""


def load(
    path: str | Path,
    threads: int = 0,
    providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
    options: onnxruntime.SessionOptions | None = None,
) -> Predictor:
    """Load a file that ``mmeformer export`` wrote.

    Args:
        path: an ``.onnx`` file, whose metadata is inside; a ``.tflite`` file, which LiteRT runs and
            whose metadata is in the JSON file beside it; or a ``.pte`` file, which ExecuTorch runs.
        threads: per operator; 0 lets the runtime choose, or takes the number of ``options``. In
            ExecuTorch, the number of all loaded files.
        providers: of onnxruntime, each a name or a pair of name and settings; None takes the CPU.
        options: of onnxruntime's session.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file that mmeformer exported, or this onnxruntime does not have, or cannot
            start, one of the providers; or another runtime is not installed, or was given
            providers.
    """
    refuse_url(path, "model")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model {path} does not exist")
    if path.suffix.lower() in RUNTIMES and (providers or options):
        name, _ = RUNTIMES[path.suffix.lower()]
        raise ValueError(f"{path} runs in {name}: providers and options are of onnxruntime")
    wanted = list(providers or ["CPUExecutionProvider"])
    session = _start(path, threads, wanted, options)
    loaded = Predictor(session, Metadata.from_json(_metadata_text(path, session), path))
    # A session and its options cannot be pickled; what they were made of can.
    loaded._source = None if options is not None else (path.resolve(), threads, wanted)
    return loaded


def _metadata_text(path: Path, session: Any) -> str:
    if path.suffix.lower() == litert.SUFFIX:
        sidecar = path.with_suffix(".json")
        if not sidecar.is_file():
            raise ValueError(f"{path} needs {sidecar.name} beside it, which the export wrote")
        return sidecar.read_text(encoding="utf-8")
    properties = session.get_modelmeta().custom_metadata_map
    if KEY not in properties:
        raise ValueError(f"{path} has no metadata of mmeformer; export it with mmeformer export")
    text: str = properties[KEY]
    return text


def _start(
    path: Path,
    threads: int,
    providers: Sequence[str | tuple[str, dict[str, Any]]],
    options: onnxruntime.SessionOptions | None,
) -> Any:
    if path.suffix.lower() in RUNTIMES:
        _, session_of = RUNTIMES[path.suffix.lower()]
        return session_of(path, threads)
    names = [item if isinstance(item, str) else item[0] for item in providers]
    known = onnxruntime.get_available_providers()
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"this onnxruntime has no {', '.join(missing)}, only {', '.join(known)}; install the "
            "package of onnxruntime that has it (such as onnxruntime-gpu), or name another provider"
        )
    if options is None:
        options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's errors have no common base but this one
        raise ValueError(f"{path}: onnxruntime cannot load it ({error})") from error
    # If a provider does not start, onnxruntime goes on with the others after a line in its log.
    if idle := [name for name in names if name not in session.get_providers()]:
        raise ValueError(
            f"onnxruntime could not start {', '.join(idle)}; its log says why (often a missing "
            "library of the driver or of CUDA), or name another provider"
        )
    return session


class Predictor:
    """Predicts with one exported model; made by :func:`load`.

    Args:
        session: of the exported file, in onnxruntime or another runtime.
        metadata: of the file.
    """

    def __init__(self, session: Session, metadata: Metadata) -> None:
        self.session: Any = session
        self.metadata = metadata
        self.input_names = [item.name for item in session.get_inputs()]
        self.output_names = [item.name for item in session.get_outputs()]
        self._decode = tasks.load(metadata.export.decoder)
        self._source: tuple[Path, int, list[Any]] | None = None
        self._warned_of_size = False

    def __getstate__(self) -> dict[str, Any]:
        """Arguments of :func:`load`; other processes read the same file again.

        Raises:
            TypeError: there are options of the session, which cannot be pickled.
        """
        if self._source is None:
            raise TypeError(
                "this predictor cannot be pickled, as it was made with options of a session; load "
                "the file in the other process"
            )
        return dict(source=self._source, metadata=self.metadata)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the file again."""
        path, threads, providers = state["source"]
        self.__init__(_start(path, threads, providers, None), state["metadata"])  # type: ignore
        self._source = state["source"]

    def predict(self, image: Image) -> Result:
        """Predict on one image.

        Args:
            image: a path, the content of a file (``bytes``), a binary file object, a Pillow image,
                or an array of ``uint8``: (H, W) gray, (H, W, 3) BGR or (H, W, 4) BGRA.

        Returns:
            The result of the model's task (of a backbone its :class:`Pyramid`), in pixels of the
            image.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an image.
            TypeError: of another type.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Image]) -> list[Result]:
        """Predict on several images; see :meth:`predict`.

        Images of one size go through the network together, as many as the model's batch allows.
        No image is padded to the size of another. Images that prediction with the checkpoint cuts
        into overlapping windows are cut here too; those that are smaller than the patches that a
        model was trained on are padded.
        """
        arrays = [as_image(image, self.metadata.reading) for image in images]
        self._warn_of_scale(arrays)
        self._warn_of_size(arrays)
        sides = [window_side(image.shape[:2], self.metadata) for image in arrays]
        whole = [
            as_patch(image, self.patch_size)
            for image, side in zip(arrays, sides, strict=True)
            if not side
        ]
        results = iter(self._predict_whole(whole))
        return [
            self._predict_windows(image, side) if side else next(results)
            for image, side in zip(arrays, sides, strict=True)
        ]

    def predict_whole(self, image: Image) -> Result:
        """Predict on one image without cutting it, as OpenMMLab's test loop does; see
        :meth:`predict`.

        A file without room for a patch of the training cuts all the same: shrunk patches would
        show their objects at another scale.
        """
        if self.patch_size < self.metadata.patch_size:
            return self.predict(image)
        array = as_image(image, self.metadata.reading)
        self._warn_of_size([array])
        result: Result = self._predict_whole([as_patch(array, self.patch_size)])[0]
        return result

    @property
    def patch_size(self) -> int:
        """See :func:`mmeformer.runtime.parts.patch_side`."""
        return patch_side(self.metadata)

    def _warn_of_size(self, images: Sequence[NDArray[Any]]) -> None:
        """Warn of the first image that this file, which has one size, shows otherwise."""
        for image in images:
            if self._warned_of_size:
                return
            if text := size_warning(image.shape[:2], self.metadata):
                self._warned_of_size = True
                warnings.warn(text, stacklevel=3)

    def _warn_of_scale(self, images: Sequence[NDArray[Any]]) -> None:
        record = TrainingImages(self.metadata.training_sides, self.metadata.patch_size)
        if self.metadata.patch_size:
            return  # their scale is kept
        for height, width in {image.shape[:2] for image in images}:
            if text := record.scale_warning(max(height, width)):
                warnings.warn(f"image of {width} x {height} px: {text}", stacklevel=3)

    def _predict_windows(self, image: NDArray[Any], side: int) -> Result:
        """Predict on a large image, window by window."""
        height, width = image.shape[:2]
        places = windows(width, height, side, side // 4)
        step = self.metadata.batch or WINDOWS_AT_ONCE
        pad_to = side if self.patch_size else None
        found = predict_windows(image, places, self._predict_whole, step, pad_to)
        merger = self.metadata.export.merger
        assert merger is not None, "tasks without a merger cut no image"
        result: Result = tasks.load(merger)(places, found, (height, width), self.metadata)
        return result

    def _predict_whole(self, images: Sequence[NDArray[Any]]) -> list[Any]:
        """Predict on images as they are."""
        prepared = [prepare(image, self.metadata) for image in images]
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
        outputs = self.session.run(None, self._inputs(batch))
        return dict(zip(self.output_names, outputs, strict=True))

    def inputs(self, image: Image) -> Iterator[dict[str, NDArray[Any]]]:
        """Inputs of the graph by name, of every run for one image: one, or one per window."""
        array = as_image(image, self.metadata.reading)
        height, width = array.shape[:2]
        if side := window_side((height, width), self.metadata):
            places = windows(width, height, side, side // 4)
            parts = [crop(array, place, side if self.patch_size else None) for place in places]
        else:
            parts = [as_patch(array, self.patch_size)]
        for part in parts:
            yield self._inputs([prepare(part, self.metadata)])

    def _inputs(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        items = list(batch)
        items += [items[-1]] * ((self.metadata.batch or len(items)) - len(items))
        inputs = {"image": np.stack([item.data for item in items])}
        if "image_size" in self.input_names:
            inputs["image_size"] = np.array([item.size for item in items], np.float32)
        if "output_size" in self.input_names:
            inputs["output_size"] = np.array(self._output_size(items[0].original), np.int64)
        return inputs

    def _output_size(self, original: tuple[int, int]) -> tuple[int, int]:
        """``original`` (H, W), or a smaller size of the same shape if memory requires it."""
        height, width = original
        logits = height * width * max(len(self.metadata.classes), 1)
        shrink = min((MAX_LOGITS / logits) ** 0.5, 1.0)
        return max(int(height * shrink), 1), max(int(width * shrink), 1)
