# SPDX-License-Identifier: Apache-2.0
"""Write files of results, completely or not at all; see :mod:`mmeformer.files`."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from PIL import Image

from mmeformer.errors import UserError
from mmeformer.files import refuse_url, replacing, write_text

FOLDERS = ("pictures", "videos", "masks", "labels")
"""Folders of outputs, below the output folder."""

RESULTS, TABLE, LEGEND = "predictions.json", "predictions.csv", "classes.json"

MARKER = ".mmeformer-predictions"
"""A file that says that an output folder is one: what has our names there may be replaced."""


def prepare_folder(out: str | Path) -> Path:
    """Create a folder for outputs and check that it is writable.

    Raises:
        ValueError: it is not.
        UserError: it has files of others.
    """
    refuse_url(out, "output folder")
    out = Path(out)
    try:
        refuse_files_of_others(out)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(
            f"output folder {out} cannot be written to ({error.strerror or error}): choose another "
            "with --out"
        ) from error
    return out


def is_marked(out: str | Path) -> bool:
    """Whether a folder has outputs of an earlier run."""
    return Path(out, MARKER).is_file()


def refuse_files_of_others(out: Path) -> None:
    """Raise if a folder has files or folders in it but those of an earlier run, or hidden ones.

    Whatever is there may be a data set, and pictures of results in it would become part of it.

    Raises:
        UserError: it has.
    """
    if is_marked(out) or not out.exists():
        return
    if found := sorted(path.name for path in out.iterdir() if not path.name.startswith(".")):
        raise UserError(
            f"{out / found[0]} was not written by predict (there is no {MARKER} beside it); choose "
            "a new or empty folder with --out"
        )


def mark(out: Path) -> None:
    """Say that a folder is one of outputs; comes before the first of them.

    Raises:
        UserError: the folder has files of others.
    """
    refuse_files_of_others(out)
    write_text(out / MARKER, "mmeformer predict wrote this folder, and may write it again.\n")


def write_mask(
    path: Path, labels: np.ndarray, palette: Sequence[tuple[int, int, int]] | None
) -> None:
    """Write a label map as a PNG file.

    Args:
        path: ends in ``.png``; missing folders are created.
        labels: (H, W) uint8 or uint16.
        palette: (red, green, blue) per label, for an indexed file whose pixels are labels and are
            shown in these colors. None writes gray values.
    """
    image = Image.fromarray(labels)
    if palette is not None:
        image.putpalette([value for color in palette for value in color])
    with replacing(path) as draft:
        image.save(draft, format="PNG")


class JsonResults:
    """A COCO data set of predictions that grows image by image; made by :func:`json_results`.

    Only the entries of the images are in memory, not their annotations.

    Args:
        file: to write to.

    Attributes:
        images: entries of the images so far.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.images: list[dict] = []
        self._annotations = 0
        file.write('{"annotations": [')

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
        image = dict(id=len(self.images) + 1, file_name=file_name, height=size[0], width=size[1])
        if frame is not None:
            image["frame"] = frame
        self.images.append(image)
        for entry in entries:
            self._file.write(",\n" if self._annotations else "\n")
            self._annotations += 1
            json.dump(dict(id=self._annotations, image_id=image["id"], **entry), self._file)


@contextmanager
def json_results(path: Path, categories: Mapping[int, str]) -> Iterator[JsonResults]:
    """Write a COCO data set of predictions; the file appears if the block succeeds.

    The file has ``images`` (``id``, ``file_name``, ``height``, ``width`` and, for videos,
    ``frame``), ``categories``, and ``annotations`` with ``score``. pycocotools, FiftyOne and label
    tools read it.

    Args:
        path: of the file.
        categories: names of the classes, by category id.
    """
    with replacing(path) as draft, draft.open("w", encoding="utf-8") as file:
        results = JsonResults(file)
        yield results
        listed = [dict(id=number, name=name) for number, name in categories.items()]
        # The annotations end here.
        file.write(
            f'\n],\n"categories": {json.dumps(listed)},\n"images": {json.dumps(results.images)}}}\n'
        )


@contextmanager
def table_results(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Write a CSV table of predictions; the file appears if the block succeeds.

    Args:
        path: of the file.
        columns: beside the name of the file and the number of the frame.

    Yields:
        Writer of the module ``csv``, to which the first row was given.
    """
    with replacing(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "frame", *columns])
        yield writer


class VideoWriter:
    """Context manager that writes an MP4 video of pictures.

    The file is started at the first picture, and appears if the block succeeds.

    Args:
        path: ends in ``.mp4``; missing folders are created.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self._files = ExitStack()
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, picture: np.ndarray) -> None:
        """Add a picture, (H, W, 3) uint8, blue, green, red; all have the size of the first.

        Raises:
            OSError: this OpenCV cannot write the video.
        """
        if self._writer is None:
            draft = self._files.enter_context(replacing(self.path))
            size = picture.shape[1], picture.shape[0]
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(draft), code, self.fps, size)
            self._files.callback(self._writer.release)
            if not self._writer.isOpened():
                raise OSError(f"{self.path}: OpenCV cannot write an MP4 video here")
        self._writer.write(np.ascontiguousarray(picture))

    def __exit__(self, *error) -> None:
        self._files.__exit__(*error)
