# SPDX-License-Identifier: Apache-2.0
"""Load a trained model or an exported file in one line, and predict.

.. code-block:: python

    from mmeformer import load

    model = load("runs/nuclei")  # a work directory, a checkpoint or an exported file
    found = model("image.jpg")
    print(found.boxes, [model.classes[label] for label in found.labels])
    found.save("out.png")

An exported ``.onnx`` file needs only numpy, OpenCV and onnxruntime.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Iterator, Sequence
from functools import singledispatch
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmeformer.backends import Backend, Exported, Trained
from mmeformer.errors import UserError
from mmeformer.files import refuse_url
from mmeformer.images import VIDEO_SUFFIXES, Reading, as_image, write_image
from mmeformer.results import (
    Classification,
    Detections,
    Pyramid,
    RotatedDetections,
    Segmentation,
    mask_extent,
)
from mmeformer.without_onedl import drop_note
from mmeformer.work_dirs import (
    best_checkpoint,
    choose_checkpoint,
    find_config,
    last_checkpoint,
)

_Named = tuple[np.ndarray, Path | None, int | None]
"""An image (H, W, 3) in BGR, its file and the number of its frame."""

_TAKES = (
    "load takes the work directory of a training, a checkpoint (.pth) with its config, or an "
    "exported .onnx, .tflite or .pte file"
)
EXPORTED = (".onnx", ".tflite", ".pte")
"""Files that :mod:`mmeformer.runtime` runs."""
CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
"""Suffixes of checkpoints."""
_CHECKPOINT_STARTS = (b"PK\x03\x04", b"\x80")
"""First bytes of PyTorch's files, new and old."""
_EXPORT = "export the model with `mmeformer export --to onnx`, and load that file"
_OTHER_FILES = {
    ".mlpackage": f"is a Core ML package, which runs in apps of Apple's devices; {_EXPORT}",
    ".mlmodel": f"is a Core ML model, which runs in apps of Apple's devices; {_EXPORT}",
    ".xml": f"is of OpenVINO, which runs the .onnx file itself (mmeformer.runtime.openvino); "
    f"{_EXPORT}",
    ".engine": f"is of TensorRT, which runs outside of mmeformer; {_EXPORT}",
    ".py": "is a config without weights; give the checkpoint that was trained with it: "
    'load("epoch_12.pth", config="config.py")',
}
"""What files that may be taken for models are, by suffix, and the next step."""


def load(
    path: str | Path,
    *,
    config: str | Path | None = None,
    device: str | None = None,
    score_thr: float | None = None,
    classes: Sequence[str] | None = None,
) -> Model:
    """Load a model of any task.

    Args:
        path: the work directory of a training, of which the best checkpoint is taken, else the last
            (``Model.path`` says which); a checkpoint; or an exported ``.onnx``, ``.tflite`` (with
            its JSON beside it) or ``.pte`` file.
        config: of a checkpoint; None takes the one beside it.
        device: such as ``cpu`` or ``cuda:1``; None takes the first GPU, if there is one. An
            exported file runs on the CPU; for other providers see :func:`mmeformer.runtime.load`.
        score_thr: detections with this score or a lower one are left out (default 0.3).
        classes: names of the classes to report; None reports all.

    Raises:
        FileNotFoundError: there is no such file or folder.
        UserError: it is none of these; or there is no config or no checkpoint.
        CheckpointError: the checkpoint is damaged, refused, or not of this config's model.
        ValueError: an argument does not fit the model.
    """
    drop_note()
    refuse_url(path, "model")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {_TAKES}")
    if path.is_file() and path.suffix.lower() in EXPORTED:
        if config is not None or device not in (None, "cpu"):
            raise ValueError(
                f"{path} is an exported file, which needs no config and runs on the CPU here; for "
                "other devices use mmeformer.runtime.load"
            )
        return Model(path, Exported(path, score_thr, classes))
    _refuse_others(path)
    checkpoint = choose_checkpoint(path) if path.is_dir() else path
    if config is None:
        config = find_config(path) if path.is_dir() else _config_beside(path)
    return Model(checkpoint, Trained(checkpoint, config, device, score_thr, classes))


def _refuse_others(path: Path) -> None:
    """Raise if a file or folder is no checkpoint and no work directory; say what it is.

    Raises:
        UserError: the message has the next step.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        if suffix == ".mlpackage":
            raise UserError(f"{path} {_OTHER_FILES[suffix]}")
        if best_checkpoint(path) is None and last_checkpoint(path) is None:
            try:
                find_config(path)
            except UserError:
                raise UserError(
                    f"{path} has no config (*.py) and no checkpoint (*.pth), so it is not the work "
                    f"directory of a training; {_TAKES}"
                ) from None
        return
    if suffix == ".bin" and path.with_suffix(".xml").exists():
        suffix = ".xml"
    if suffix in _OTHER_FILES:
        raise UserError(f"{path} {_OTHER_FILES[suffix]}")
    if suffix == ".json" and (model := path.with_suffix(".tflite")).exists():
        raise UserError(f"{path} describes {model.name}; load that file")
    if suffix in CHECKPOINTS:
        return
    with path.open("rb") as file:
        head = file.read(9)
    # Checkpoints may have any name.
    if not head.startswith(_CHECKPOINT_STARTS) and head[8:] != b"{":
        raise UserError(f"{path} is no model; {_TAKES}")


def _config_beside(checkpoint: Path) -> Path:
    """The config in the folder of a checkpoint.

    Raises:
        UserError: there is none.
    """
    try:
        return find_config(checkpoint.parent)
    except UserError:
        raise UserError(
            f"{checkpoint} has no config (*.py) beside it; give the one that it was trained with: "
            f'load("{checkpoint.name}", config="config.py")'
        ) from None


class Model:
    """A loaded model; call it with images. Made by :func:`load`.

    Attributes:
        path: the checkpoint or exported file.
        classes: names, by label.
    """

    def __init__(self, path: Path, backend: Backend) -> None:
        self.path = path
        self.backend = backend
        self.classes = backend.classes

    def __repr__(self) -> str:
        return f"<Model of {self.path}: {', '.join(self.classes[:10])}>"

    def __call__(self, images: Any, batch_size: int = 1) -> Any:
        """Predict.

        Args:
            images: one image (a path, the content of a file, a file object, a Pillow image, or an
                array of ``uint8`` in BGR); a list or an iterator of them; or the path of a video,
                of a folder or a pattern such as ``images/*.jpg``.
            batch_size: images, frames or windows of a large image per call of the model. Exported
                files decide themselves how many windows they take at once.

        Returns:
            A :class:`Prediction` for one image, a list of them for a list; else an iterator, which
            predicts as it is read. Items of a video, a folder or a pattern know their ``path`` and
            ``frame``. Files of a folder or a pattern that cannot be read are left out, with a
            warning for each.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not an image or a video, or a URL; or nothing of a folder or a pattern can
                be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if isinstance(images, (list, tuple)):
            return list(self._predict(map(self._read, images), batch_size))
        # Files are iterators too, of lines.
        if isinstance(images, Iterator) and not hasattr(images, "read"):
            return self._predict(map(self._read, images), batch_size)
        if isinstance(images, (str, Path)):
            refuse_url(images, "image")
            if (many := _many(images, self.backend.reading)) is not None:
                return self._predict(many, batch_size)
        return next(self._predict(map(self._read, [images]), batch_size))

    predict = __call__
    """The same as calling the model."""

    def _read(self, image: Any) -> _Named:
        return as_image(image, self.backend.reading), _path_of(image), None

    def _predict(self, images: Iterator[_Named], batch_size: int) -> Iterator[Prediction]:
        while chunk := list(islice(images, batch_size)):
            arrays = [image for image, _, _ in chunk]
            results = self.backend.predict(arrays, batch_size)
            for (array, path, frame), result in zip(chunk, results, strict=True):
                yield Prediction(result, array, self.classes, self.backend, path, frame)


def _path_of(image: Any) -> Path | None:
    return Path(image) if isinstance(image, (str, Path)) else None


def _many(path: str | Path, reading: Reading) -> Iterator[_Named] | None:
    """Images of a video, folder or pattern, each with its path and frame; None for one image."""
    one = Path(path)
    if not one.is_dir() and one.suffix.lower() not in VIDEO_SUFFIXES:
        if one.exists() or not glob.has_magic(str(path)):
            return None
    # Needs PyTorch, which single images do not.
    from mmeformer.inference.inputs import find_sources

    # Raises before the first image is asked for.
    sources = find_sources([path])
    if one.is_file():
        return _frames(one)
    return _each(path, sources, reading)


def _frames(video: Path) -> Iterator[_Named]:
    from mmeformer.inference.videos import Video

    for index, frame in enumerate(Video(video)):
        yield frame, video, index


def _each(given: str | Path, sources: Sequence[Any], reading: Reading) -> Iterator[_Named]:
    """Images and frames; a warning for each file that cannot be read, as `mmeformer predict` has.

    Raises:
        ValueError: none can be read.
    """
    from mmeformer.inference.inputs import read

    count, fault = 0, ""
    for source in sources:
        try:
            if source.is_video:
                for item in _frames(source.path):
                    count += 1
                    yield item
            else:
                image = read(source, reading)
                count += 1
                yield image, source.path, None
        except (OSError, ValueError) as error:
            fault = " ".join(str(error).split())
            # Reading and predicting are generators, so the caller is three frames above.
            warnings.warn(f"skipped: {fault}", stacklevel=3)
    if not count:
        raise ValueError(f"{given} has {len(sources)} files, and none can be read: {fault}")


class Prediction:
    """The result of one image. Its numbers, such as ``boxes`` and ``labels``, are attributes.

    Attributes:
        result: one of :mod:`mmeformer.results`; all its attributes are attributes of this too.
        image: (H, W, 3) uint8, blue, green, red.
        classes: names, by label.
        path: of the image or video; None if it was given as an array.
        frame: number of a video's frame, from 0; else None.
    """

    def __init__(
        self,
        result: Any,
        image: np.ndarray,
        classes: Sequence[str],
        backend: Backend,
        path: Path | None = None,
        frame: int | None = None,
    ) -> None:
        self.result = result
        self.image = image
        self.classes = tuple(classes)
        self.path = path
        self.frame = frame
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "result":
            raise AttributeError(name)
        return getattr(self.result, name)

    def __len__(self) -> int:
        """Number of objects, which is that of :attr:`names`: 1 of a classified image."""
        return len(self._labels())

    def __repr__(self) -> str:
        where = "" if self.path is None else f" of {self.path}"
        return f"<Prediction{where}: {type(self.result).__name__}>"

    @property
    def names(self) -> list[str]:
        """Name of every object's class.

        Of a classified image that of its most likely class, of a label map those that occur.
        """
        return [self.classes[label] for label in self._labels()]

    def _labels(self) -> Sequence[int]:
        """Label of every object."""
        if isinstance(self.result, Classification):
            return [self.result.label]
        if isinstance(self.result, Segmentation):
            return np.unique(self.result.labels).tolist()
        if isinstance(self.result, Pyramid):
            raise TypeError("the result of a backbone has no objects, only levels")
        return self.result.labels.tolist()

    def plot(self) -> np.ndarray:
        """The image with the result drawn in: (H', W', 3) uint8, blue, green, red.

        Its size may differ: small images are enlarged, so that names fit, very large ones shrunk.
        """
        return self._backend.draw(self.image, self.result)

    def _repr_jpeg_(self) -> bytes | None:
        """:meth:`plot`, as a notebook shows it; None of a backbone."""
        if isinstance(self.result, Pyramid):
            return None
        return cv2.imencode(".jpg", self.plot())[1].tobytes()

    def save(self, path: str | Path) -> Path:
        """Write :meth:`plot` to a file (``.png``, ``.jpg``, ...); returns its path.

        Raises:
            ValueError: OpenCV does not write files of this kind.
            OSError: it cannot be written.
        """
        write_image(path, self.plot())
        return Path(path)

    def to_coco(self) -> dict:
        """A COCO data set of this image: ``images``, ``annotations`` with scores, ``categories``.

        Raises:
            ValueError: the result has no objects, as a label map.
            UserError: the library that the task needs for it is not installed.
        """
        height, width = self.image.shape[:2]
        name = "" if self.path is None else self.path.name
        image = dict(id=1, file_name=name, height=height, width=width)
        if self.frame is not None:
            image["frame"] = self.frame
        entries = self._backend.entries(self.result)
        return dict(
            images=[image],
            annotations=[dict(id=n, image_id=1, **entry) for n, entry in enumerate(entries, 1)],
            categories=[
                dict(id=number, name=name)
                for number, name in zip(self._backend.category_ids, self.classes, strict=True)
            ],
        )

    def to_supervision(self) -> Any:
        """A ``supervision.Detections`` with the same objects, or ``supervision.Classifications``.

        Rotated boxes have their corners in ``data["xyxyxyxy"]``; of a label map every class is one
        object with a mask.

        Raises:
            UserError: supervision is not installed.
            TypeError: supervision has nothing like this result.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError("supervision is not installed: pip install supervision") from error
        if isinstance(self.result, Classification):
            scores = self.result.scores
            return supervision.Classifications(np.arange(len(scores)), confidence=scores)
        fields = supervision_fields(self.result)
        names = np.array([self.classes[label] for label in fields["class_id"]], dtype=str)
        fields["data"] = {**fields.get("data", {}), "class_name": names}
        return supervision.Detections(**fields)


@singledispatch
def supervision_fields(result: Any) -> dict[str, Any]:
    """Arguments of ``supervision.Detections`` for a result; without names of classes.

    Raises:
        TypeError: there are none for this kind.
    """
    raise TypeError(f"supervision has no objects for {type(result).__name__}")


@supervision_fields.register
def _(result: Detections) -> dict[str, Any]:
    masks = None if result.instance_masks is None else result.masks()
    return dict(
        xyxy=result.boxes, mask=masks, confidence=result.scores, class_id=result.labels.astype(int)
    )


@supervision_fields.register
def _(result: RotatedDetections) -> dict[str, Any]:
    corners = result.corners().astype(np.float32)
    return dict(
        xyxy=result.upright_boxes(),
        confidence=result.scores,
        class_id=result.labels.astype(int),
        data={"xyxyxyxy": corners},
    )


@supervision_fields.register
def _(result: Segmentation) -> dict[str, Any]:
    labels = np.unique(result.labels)
    masks = result.labels[None] == labels[:, None, None]
    boxes = [mask_extent(mask) for mask in masks]
    return dict(xyxy=np.array(boxes, np.float32), mask=masks, class_id=labels.astype(int))
