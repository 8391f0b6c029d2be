# SPDX-License-Identifier: Apache-2.0
"""Split a data set into training and validation, so that near copies stay together."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mmeformer.labeled import LabeledData, LabeledImage

SHARE = 0.2
"""Share of the images that validate, in a data set without a split."""
_LARGEST_GROUP = 0.5
"""A prefix that more images share is a name of the whole set, not of one scene."""

# Roboflow writes several changed copies of an image: NAME_jpg.rf.HASH.jpg.
_ROBOFLOW = re.compile(r"(?:_(?:jpe?g|png|bmp|webp|tiff?))?\.rf\.[0-9a-f]{16,}$", re.IGNORECASE)
# NAME__SIZE__X___Y (mmrotate), NAME_X_Y, NAME-ROW-COLUMN: tiles of one image.
_TILE = re.compile(r"(?:__\d+__\d+___\d+|[_-][xr]?\d+[_-][yc]?\d+)$", re.IGNORECASE)
# NAME_0012, NAME-frame12, NAME.12: frames of one video.
_FRAME = re.compile(r"(?:[_.-]?(?:frame|f|t)?[_.-]?\d+)$", re.IGNORECASE)


def complete(data: LabeledData, seed: int) -> None:
    """Give every image a split, in place, and note how.

    A data set with training and validation images stays as it is. Images of no split are left out
    if others have one, and so are validation or test images of which none is labeled. Without
    validation images, a share of the training images becomes them; of a data set with validation or
    test images only, those are split.
    """
    for split in ("val", "test"):
        images = data.of_split(split)
        if images and any(data.counts().values()) and not any(data.counts(split).values()):
            data.images = [image for image in data.images if image.split != split]
            data.notes.append(f"the {len(images)} {split} images have no labels and are left out")
    known = {image.split for image in data.images}
    loose = [image for image in data.images if image.split is None]
    if "train" in known and loose:
        data.images = [image for image in data.images if image.split is not None]
        text = f"{len(loose)} images belong to no split and are left out, such as {loose[0].path}"
        data.notes.append(text)
    if {"train", "val"} <= known:
        return
    if "train" not in known:
        for image in loose or data.images:
            image.split = "train"
        if data.of_split("val"):
            return
    images = data.of_split("train")
    if len(images) == 1:
        image = images[0]
        data.images.append(replace(image, split="val"))
        data.notes.append("there is one image, which trains and validates; scores mean little")
        return
    groups, rule = grouped(images)
    for image in choose(groups, seed):
        image.split = "val"
    counts = {split: len(data.of_split(split)) for split in ("train", "val")}
    data.notes.append(
        f"no validation images: {counts['val']} of {len(images)} chosen with seed {seed}, {rule}"
    )


def grouped(images: Sequence[LabeledImage]) -> tuple[list[list[LabeledImage]], str]:
    """Images that must stay together, and the rule by which they do, for people."""
    prefixes = [
        (_by_prefix(images, tile_of), "by file-name prefix, as tiles of one image", "prefixes"),
        (_by_prefix(images, scene_of), "by file-name prefix, as one scene or video", "prefixes"),
    ]
    folders = [(_by_folder(images), "by folder, as one scene or video", "folders")]
    # Where the numbers begin again in other folders, a prefix is that of all scenes: a/frame_1.
    again = len({image.path.stem for image in images}) < len(images)
    for groups, rule, kind in folders + prefixes if again else prefixes + folders:
        if 3 < len(groups) < len(images) and max(map(len, groups)) <= _LARGEST_GROUP * len(images):
            return groups, f"{rule}: {sum(len(group) > 1 for group in groups)} {kind}"
    if len({image.label for image in images}) > 1:
        rule = "from every class alike"
    else:
        rule = "one by one (their names tell no scenes; if they are frames of one video, make "
        rule += "folders train and val)"
    # Changed copies of one image, and those of several cameras, stay together in any case.
    copies: dict[tuple, list[LabeledImage]] = defaultdict(list)
    for image in images:
        copies[image.label, _ROBOFLOW.sub("", image.path.stem)].append(image)
    if len(copies) < len(images):
        rule += "; copies and images of one name stay together"
    return list(copies.values()), rule


def _by_prefix(
    images: Sequence[LabeledImage], strip: Callable[[str], str]
) -> list[list[LabeledImage]]:
    """Images whose names are one after ``strip``; images whose names tell nothing are alone."""
    of_classes = _names_of_classes(images, lambda image: scene_of(image.path.stem))
    groups: dict[object, list[LabeledImage]] = defaultdict(list)
    for image in images:
        prefix = strip(image.path.stem)
        alone = prefix == image.path.stem or (image.label, scene_of(prefix)) in of_classes
        groups[image.path if alone else prefix].append(image)
    return list(groups.values())


def _by_folder(images: Sequence[LabeledImage]) -> list[list[LabeledImage]]:
    """The numbered images of each folder; others, and those in the folder of a class, are alone."""
    of_classes = _names_of_classes(images, lambda image: str(image.path.parent))
    groups: dict[Path, list[LabeledImage]] = defaultdict(list)
    for image in images:
        folder = image.path.parent
        numbered = _FRAME.search(_ROBOFLOW.sub("", image.path.stem)) is not None
        alone = not numbered or (image.label, str(folder)) in of_classes
        groups[image.path if alone else folder].append(image)
    return list(groups.values())


def _names_of_classes(
    images: Sequence[LabeledImage], name: Callable[[LabeledImage], str]
) -> set[tuple[int | None, str]]:
    """Names that most images of a class have, with the label: a prefix (``tabby_1``) or a folder.

    They are no scenes: a whole class would train or validate.
    """
    by_label: dict[int, list[str]] = defaultdict(list)
    for image in images:
        if image.label is not None:
            by_label[image.label].append(name(image))
    found: set[tuple[int | None, str]] = set()
    for label, names in by_label.items():
        most, count = Counter(names).most_common(1)[0]
        if count > _LARGEST_GROUP * len(names):
            found.add((label, most))
    return found


def tile_of(stem: str) -> str:
    """Name of the image that a tile was cut from; the name itself if it is no tile."""
    stem = _ROBOFLOW.sub("", stem)
    return _TILE.sub("", stem) or stem


def scene_of(stem: str) -> str:
    """Name of the scene or video that an image belongs to; the name itself if it tells none."""
    stem = tile_of(stem)
    return _FRAME.sub("", stem) or stem


def choose(groups: Sequence[list[LabeledImage]], seed: int) -> list[LabeledImage]:
    """Images of about :data:`SHARE` of the total, in whole groups; from every class alike."""
    order = sorted(groups, key=lambda group: str(group[0].path))
    random.Random(seed).shuffle(order)
    by_label: dict[int | None, list[list[LabeledImage]]] = defaultdict(list)
    for group in order:
        by_label[group[0].label].append(group)
    chosen: list[LabeledImage] = []
    for same in by_label.values():
        wanted = max(1, round(SHARE * sum(map(len, same)))) if len(same) > 1 else 0
        found: list[LabeledImage] = []
        for group in same:
            if len(found) + len(group) <= wanted * 1.25:
                found += group
            if len(found) >= wanted:
                break
        if not found and wanted:
            found += sorted(same, key=len)[0]
        chosen += found
    return chosen
