# SPDX-License-Identifier: Apache-2.0
"""Files of results. Each is written under another name and renamed when it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

FOLDERS = ("pictures", "videos", "masks", "labels")
"""Folders of outputs, below the one that is asked for."""

RESULTS, LEGEND = "predictions.json", "classes.json"


def prepare_folder(out: str | Path) -> Path:
    """Make a folder for outputs and make sure that it can be written to.

    Raises:
        ValueError: it cannot.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = _unfinished(out / "probe")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output folder {out} cannot be written to ({error.strerror or error}): choose another "
            "with --out"
        ) from error
    return out


def _unfinished(path: Path) -> Path:
    # The suffix stays, as writers of pictures and videos choose the format by it.
    return path.with_name(f".unfinished-{path.name}")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _unfinished(path).write_text(text, encoding="utf-8")
    _unfinished(path).replace(path)


def write_mask(
    path: Path, labels: np.ndarray, palette: Sequence[tuple[int, int, int]] | None
) -> None:
    """Write a label map as a PNG file.

    Args:
        path: ends in ``.png``; folders are made.
        labels: (H, W) uint8 or uint16.
        palette: (red, green, blue) per label: the file is then an indexed one, whose pixels are
            labels and shown in these colours. None writes grey values.
    """
    image = Image.fromarray(labels)
    if palette is not None:
        image.putpalette([value for colour in palette for value in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(_unfinished(path), format="PNG")
    _unfinished(path).replace(path)


class JsonResults:
    """A COCO data set of predictions, written as they come.

    ``images`` (``id``, ``file_name``, ``height``, ``width`` and, of videos, ``frame``),
    ``categories`` and ``annotations`` with ``score``: pycocotools, FiftyOne and label tools read
    it. A context manager; only the images are held in memory, and the file appears at its end,
    unless an exception ends it.

    Args:
        path: of the file.
        classes: names, by label; their category ids begin at 1.
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self.path = path
        self._categories = [
            dict(id=index, name=name) for index, name in enumerate(classes, start=1)
        ]
        self._images: list[dict] = []
        self._annotations = 0
        self._file = None

    def __enter__(self) -> JsonResults:
        self._file = _unfinished(self.path).open("w", encoding="utf-8")
        self._file.write('{"annotations": [')
        return self

    def add(
        self, file_name: str, size: tuple[int, int], entries: Iterable[dict], frame: int | None
    ) -> None:
        """Add an image.

        Args:
            file_name: of the image or video.
            size: height and width, pixels.
            entries: annotations without ``id`` and ``image_id``.
            frame: of a video, from 0.
        """
        image = dict(id=len(self._images) + 1, file_name=file_name, height=size[0], width=size[1])
        if frame is not None:
            image["frame"] = frame
        self._images.append(image)
        for entry in entries:
            self._file.write(",\n" if self._annotations else "\n")
            self._annotations += 1
            json.dump(dict(id=self._annotations, image_id=image["id"], **entry), self._file)

    def __exit__(self, kind, error, trace) -> None:
        unfinished = _unfinished(self.path)
        try:
            if kind is None:
                self._file.write('\n],\n"categories": ')
                json.dump(self._categories, self._file)
                self._file.write(',\n"images": ')
                json.dump(self._images, self._file)
                self._file.write("}\n")
        finally:
            self._file.close()
        if kind is None:
            unfinished.replace(self.path)
        else:
            unfinished.unlink()


class VideoWriter:
    """Pictures as an MP4 video; made at the first picture, renamed by :meth:`close`.

    Args:
        path: ends in ``.mp4``; folders are made.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self._writer = None
        self._size = None

    def add(self, picture: np.ndarray) -> None:
        """Add a picture, (H, W, 3) uint8, blue, green, red; all are as large as the first.

        Raises:
            OSError: this OpenCV cannot write the video.
        """
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._size = picture.shape[1], picture.shape[0]
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(_unfinished(self.path)), code, self.fps, self._size)
            if not self._writer.isOpened():
                raise OSError(f"{self.path}: OpenCV cannot write an MP4 video here")
        self._writer.write(np.ascontiguousarray(picture))

    def close(self) -> None:
        """Finish the file, if there was a picture."""
        if self._writer is not None:
            self._writer.release()
            _unfinished(self.path).replace(self.path)

    def abort(self) -> None:
        """Leave no file."""
        if self._writer is not None:
            self._writer.release()
            _unfinished(self.path).unlink(missing_ok=True)
