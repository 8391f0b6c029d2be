# SPDX-License-Identifier: Apache-2.0
"""Which parts of an image the network sees: the whole image, a padded one, or windows."""

from __future__ import annotations

from dataclasses import replace

from mmeformer.runtime.images import input_size
from mmeformer.runtime.metadata import Metadata
from mmeformer.tasks import BACKBONE

Size = tuple[int, int]
"""Height and width in pixels."""


def patch_side(metadata: Metadata) -> int:
    """Side of the windows that images are cut into or padded to by a model of patches; 0: neither.

    That of the training, or less if the file's own size has no room for it at the same scale.
    """
    size, scale = metadata.size, metadata.scale
    if size is None or scale is None:
        return metadata.patch_size
    return int(min(1.0, min(size) / min(scale)) * metadata.patch_size)


def window_side(image: Size, metadata: Metadata) -> int | None:
    """Side of the windows that an image is cut into; None: it is not cut."""
    longer, side = max(image), patch_side(metadata)
    if not side:
        limit = metadata.cut_above
        return None if limit is None or longer <= limit else metadata.window
    if longer <= side or (longer == metadata.patch_size and _has_room(image, metadata)):
        return None
    return side


def _has_room(image: Size, metadata: Metadata) -> bool:
    """Whether the file's own size has room for an image as long as a patch."""
    if metadata.size is None or metadata.scale is None:
        return True
    factor = min(metadata.scale) / metadata.patch_size
    return all(
        round(side * factor) <= room for side, room in zip(image, metadata.size, strict=True)
    )


def size_warning(image: Size, metadata: Metadata) -> str | None:
    """A sentence if a file of one size shows the network something else than the checkpoint does.

    Args:
        image: height and width.
        metadata: of the file.
    """
    if metadata.size is None or metadata.task == BACKBONE:
        return None
    of_checkpoint = replace(metadata, size=None)
    ours, theirs = _seen(image, metadata), _seen(image, of_checkpoint)
    if ours == theirs:
        return None
    _, (height, width) = theirs
    return (
        f"image of {image[1]} x {image[0]} px: this file sees {metadata.size[1]} x "
        f"{metadata.size[0]} px, prediction with the checkpoint {width} x {height} px, so results "
        f"differ; export with --dynamic, or with --size {height} {width}"
    )


def _seen(image: Size, metadata: Metadata) -> tuple[Size, Size]:
    """Sizes of the part of an image that the network sees at once, and of the network's input."""
    part, side = image, patch_side(metadata)
    window = window_side(image, metadata)
    if window:
        part = (window, window) if side else (min(window, image[0]), min(window, image[1]))
    elif max(image) < side:
        part = (side, side)
    return part, input_size(part, metadata)
