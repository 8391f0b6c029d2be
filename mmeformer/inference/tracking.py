# SPDX-License-Identifier: Apache-2.0
"""Track ids: tell which objects in the frames of a video are the same one.

The tracker is ByteTrack (Zhang et al., ECCV 2022, arXiv:2110.06864) from the package ``trackers``:
it matches boxes by their overlap with the predicted motion of every track, of any class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, TypeVar

import cv2
import numpy as np

from mmeformer.errors import UserError
from mmeformer.inference.inputs import Source
from mmeformer.results import Detections, RotatedDetections

BEGIN_SCORE = 0.3
"""Objects below this score continue a track but begin none."""
LOST = 30
"""Frames, at 30 per second, after which a track that finds no object ends."""
SAME = 0.8
"""Overlap (IoU) from which two boxes of a frame, of different classes, are one object."""

Objects = TypeVar("Objects", Detections, RotatedDetections)


def require_library() -> None:
    """Check that the tracker's library is there, without importing it.

    Raises:
        UserError: it is not.
    """
    if find_spec("trackers") is None:
        raise UserError(
            "track ids need the package trackers, which is not installed: "
            "pip install 'trackers>=2.6,<3'"
        )


def require_video(sources: Iterable[Source]) -> None:
    """Check that there is a video among the inputs.

    Raises:
        UserError: there is none.
    """
    if not any(source.is_video for source in sources):
        raise UserError("track ids are for videos, and there is none among the inputs")


class Tracker:
    """Follows the objects of one video.

    Args:
        fps: frames per second.
    """

    def __init__(self, fps: float) -> None:
        from trackers import ByteTrackTracker

        self._tracker = ByteTrackTracker(
            lost_track_buffer=LOST,
            frame_rate=fps,
            track_activation_threshold=BEGIN_SCORE,
            high_conf_det_threshold=BEGIN_SCORE,
        )

    def update(self, found: Objects) -> Objects:
        """The objects of the next frame with their ``track_ids``.

        Of boxes at one place, which detectors give if they are not sure of the class, only the
        surest has an id; else the boxes of an object would take turns.
        """
        import supervision

        boxes = supervision.Detections(
            xyxy=found.upright_boxes(),
            confidence=found.scores,
            class_id=found.labels.astype(int),
            # The tracker returns the objects in an order of its own.
            data={"index": np.arange(len(found))},
        )
        boxes = boxes.with_nms(SAME, class_agnostic=True)
        tracked = self._tracker.update(boxes)
        # The library counts from 0, and -1 is no track.
        ids = np.zeros(len(found), np.int64)
        if len(tracked) and tracked.tracker_id is not None:
            ids[tracked.data["index"]] = tracked.tracker_id + 1
        return replace(found, track_ids=ids)


def draw_ids(picture: np.ndarray, found: Any, scale: float) -> np.ndarray:
    """Write track ids at the centers of their objects.

    Args:
        picture: (H, W, 3) uint8, which is ``scale`` times the image's size.
        found: with ``track_ids``, in pixels of the image.
        scale: see above.

    Returns:
        (H, W, 3) uint8.
    """
    picture = np.ascontiguousarray(picture)
    boxes = found.upright_boxes() * scale
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.6
    for box, number in zip(boxes, found.track_ids, strict=True):
        if number:
            text = f"#{number}"
            (width, height), _ = cv2.getTextSize(text, font, size, 2)
            place = (
                int((box[0] + box[2] - width) / 2),
                int((box[1] + box[3] + height) / 2),
            )
            # A dark rim makes white letters readable on any picture.
            for color, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
                cv2.putText(picture, text, place, font, size, color, thickness, cv2.LINE_AA)
    return picture
