# SPDX-License-Identifier: Apache-2.0
"""Predict on any number of images and frames in batches, and write the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmeformer.errors import UserError
from mmeformer.files import write_text
from mmeformer.images import write_image
from mmeformer.inference.inputs import Source, read
from mmeformer.inference.outputs import (
    LEGEND,
    RESULTS,
    TABLE,
    JsonResults,
    VideoWriter,
    json_results,
    mark,
    table_results,
)
from mmeformer.inference.predictor import Predictor
from mmeformer.inference.tracking import Tracker, draw_ids, require_library, require_video
from mmeformer.inference.videos import Video

PIXELS_AT_ONCE = 2**25
"""Largest number of pixels in a batch of several images; the memory for masks grows with it."""


@dataclass(frozen=True)
class Settings:
    """How to predict.

    Args:
        batch_size: images, frames or windows per call of the model.
        window: side of the windows that every image is cut into, pixels; 0 never cuts; None cuts
            only those that are large for the model, see :meth:`Predictor.window_of`.
        overlap: of the windows, pixels; None is a quarter of their side.
        pictures: whether to draw pictures and videos.
        track: whether objects in videos get track ids.

    Raises:
        ValueError: a number is out of range.
        UserError: tracking needs a library that is not installed.
    """

    batch_size: int = 1
    window: int | None = None
    overlap: int | None = None
    pictures: bool = True
    track: bool = False

    def __post_init__(self) -> None:
        if self.track:
            require_library()
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size} must be at least 1")
        if self.window is not None and self.window != 0 and self.window < 32:
            raise ValueError(
                f"window {self.window} must be at least 32 pixels, or 0 for whole images"
            )
        if self.overlap is not None and self.overlap < 0:
            raise ValueError(f"overlap {self.overlap} must not be negative")
        if self.window and self.overlap is not None and self.overlap >= self.window:
            raise ValueError(
                f"overlap {self.overlap} must be less than the window, {self.window} pixels"
            )


@dataclass(frozen=True)
class Status:
    """Progress of a run after an image, a frame, or a video that cannot be read to its end.

    Args:
        name: path of the file, with the frame's number.
        done: images and frames that are finished or skipped so far.
        total: all images and frames, as far as known.
        error: why it was skipped, or None.
        warning: what may be wrong with its result, or None.
    """

    name: str
    done: int
    total: int
    error: str | None = None
    warning: str | None = None


@dataclass
class _Item:
    """An entry in the sequence of images, frames, failures and ends of videos."""

    source: Source
    frame: int | None = None

    @property
    def title(self) -> str:
        """Name for people."""
        frame = "" if self.frame is None else f", frame {self.frame}"
        return f"{self.source.path}{frame}"

    @property
    def name(self) -> str:
        """Name of its files, without suffix."""
        return self.source.name if self.frame is None else f"{self.source.name}/{self.frame:06d}"


@dataclass
class _Image(_Item):
    """An image or a frame to predict on.

    Args:
        image: (H, W, 3) uint8.
        window: side of the windows to cut it into, or None to predict on the whole image.
        prepared: output of the test pipeline; empty if the image is cut into windows.
    """

    image: np.ndarray = field(kw_only=True)
    window: int | None = field(kw_only=True)
    prepared: dict = field(default_factory=dict)


@dataclass
class _Failure(_Item):
    """An image, a frame or the rest of a video that cannot be used, and why."""

    error: str = field(kw_only=True)


class _EndOfVideo(_Item):
    """Follows the last frame of a video."""


def run(
    predictor: Predictor,
    sources: Sequence[Source],
    out: Path,
    settings: Settings,
    on_window: Callable[[str, int, int], None] | None = None,
) -> Iterator[Status]:
    """Predict on all sources and write results and pictures below ``out``.

    An image that cannot be read is skipped, and its status says why. Errors in the model or the
    output folder end the run.

    Args:
        predictor: see :func:`mmeformer.inference.predictor.load_predictor`.
        sources: see :func:`mmeformer.inference.inputs.find_sources`.
        out: a folder that exists.
        settings: see there.
        on_window: called with the image's name and the numbers of finished and of all windows.

    Yields:
        The status after every image and frame, when its files are written, and after every video
        that cannot be read to its end.

    Raises:
        ValueError: the overlap is not less than the window.
        UserError: there is nothing to track: no video, or results without boxes; or ``out`` has
            files of others.
        OSError: an output cannot be written.
    """
    if settings.track:
        require_video(sources)
        if not predictor.has_scores:
            raise UserError("track ids are for detection; these results have no boxes")
    state = _Run(predictor, out, settings, on_window)
    mark(out)
    if predictor.legend is not None:
        write_text(out / LEGEND, json.dumps(predictor.legend, indent=1) + "\n")
    results = json_results(out / RESULTS, predictor.categories) if predictor.writes_json else None
    table = table_results(out / TABLE, predictor.columns) if predictor.columns else None
    with (
        results or nullcontext() as state.results,
        table or nullcontext() as state.table,
        state.video_files,
    ):
        yield from state.all(sources)


class _Run:
    """State of one run.

    Args:
        predictor, out, settings, on_window: see :func:`run`.

    Attributes:
        results: JSON file, or None for tasks without one.
        table: writer of the CSV file, or None for tasks without one.
        video_files: holds the video that is being written.
    """

    def __init__(
        self,
        predictor: Predictor,
        out: Path,
        settings: Settings,
        on_window: Callable[[str, int, int], None] | None,
    ) -> None:
        self.predictor = predictor
        self.out = out
        self.settings = settings
        self.on_window = on_window
        self.results: JsonResults | None = None
        self.table: Any = None
        self.video_files = ExitStack()
        self.video: VideoWriter | None = None
        self.tracker: Tracker | None = None
        self.done = 0
        self.total = 0
        side, overlap = predictor.window_size, settings.overlap
        if settings.window is None and side is not None and (overlap or 0) >= side:
            raise ValueError(
                f"overlap {overlap} must be less than the window, {side} pixels (--window)"
            )

    def all(self, sources: Sequence[Source]) -> Iterator[Status]:
        """Predict on all sources in their order."""
        self.total = len(sources)
        waiting: list[_Image] = []
        for item in self._items(sources):
            if isinstance(item, _Image) and item.window is None:
                pixels = sum(other.image[..., 0].size for other in [*waiting, item])
                if len(waiting) == self.settings.batch_size or pixels > PIXELS_AT_ONCE:
                    yield from self._predict(waiting)
                    waiting = []
                waiting.append(item)
                continue
            # Finish the waiting images first, to keep the order.
            yield from self._predict(waiting)
            waiting = []
            if isinstance(item, _Failure):
                self.done += item.frame is None and not item.source.is_video
                yield Status(item.title, self.done, self.total, item.error)
            elif isinstance(item, _Image) and item.window is not None:
                yield self._finish(item, self._predict_windows(item, item.window))
            else:
                # The end of a video: its file is complete.
                self.video_files.close()
        yield from self._predict(waiting)

    def _items(self, sources: Sequence[Source]) -> Iterator[_Item]:
        for source in sources:
            if source.is_video:
                yield from self._frames(source)
                continue
            try:
                image = read(source, self.predictor.reading)
            except (OSError, ValueError) as error:
                yield _Failure(source, error=str(error))
            else:
                yield self._prepared(source, None, image)

    def _frames(self, source: Source) -> Iterator[_Item]:
        self.total -= 1
        promised = 0
        index = 0
        try:
            video = Video(source.path)
            promised = video.expected
            self.total += promised
            self.tracker = Tracker(video.fps) if self.settings.track else None
            if self.settings.pictures:
                path = self.out / "videos" / f"{source.name}.mp4"
                self.video = self.video_files.enter_context(VideoWriter(path, video.fps))
            for index, frame in enumerate(video, start=1):
                yield self._prepared(source, index - 1, frame)
        except (OSError, ValueError) as error:
            yield _Failure(source, error=str(error))
        yield _EndOfVideo(source)
        self.total += index - promised

    def _prepared(self, source: Source, frame: int | None, image: np.ndarray) -> _Item:
        item = _Image(source, frame, image=image, window=self._window(image))
        if item.window is not None:
            return item
        try:
            item.prepared = self.predictor.prepare(image)
        except (ValueError, cv2.error) as error:
            height, width = image.shape[:2]
            reason = str(error).strip().splitlines()[-1]
            message = (
                f"{item.title} ({width} x {height} pixels) cannot be resized to the model's "
                f"input: {reason}"
            )
            return _Failure(source, frame, error=message)
        return item

    def _window(self, image: np.ndarray) -> int | None:
        """Side of the windows to cut an image into, or None to predict on the whole image."""
        if self.settings.window is not None:
            return self.settings.window or None
        return self.predictor.window_of(image.shape[:2])

    def _predict(self, items: Sequence[_Image]) -> Iterator[Status]:
        if not items:
            return
        found = self.predictor.predict([item.prepared for item in items])
        for item, result in zip(items, found, strict=True):
            yield self._finish(item, result)

    def _predict_windows(self, item: _Image, size: int) -> Any:
        progress = None if self.on_window is None else partial(self.on_window, item.title)
        overlap = size // 4 if self.settings.overlap is None else self.settings.overlap
        return self.predictor.predict_windows(
            item.image, size, overlap, self.settings.batch_size, progress
        )

    def _finish(self, item: _Image, result: Any) -> Status:
        tracker = self.tracker if item.source.is_video else None
        if tracker is not None:
            result = tracker.update(result)
        if self.results is not None:
            entries = self.predictor.entries(result)
            self.results.add(item.source.file_name, item.image.shape[:2], entries, item.frame)
        if self.table is not None:
            frame = "" if item.frame is None else item.frame
            self.table.writerow([item.source.file_name, frame, *self.predictor.cells(result)])
        self.predictor.write_files(self.out, item.name, result)
        if self.settings.pictures:
            picture = self.predictor.draw(item.image, result)
            if tracker is not None:
                picture = draw_ids(picture, result, picture.shape[0] / item.image.shape[0])
            if item.source.is_video and self.video is not None:
                self.video.add(picture)
            else:
                write_image(self.out / "pictures" / f"{item.name}.jpg", picture)
        self.done += 1
        warning = self.predictor.scale_warning(item.image.shape[:2], item.window)
        return Status(item.title, self.done, self.total, warning=warning)
