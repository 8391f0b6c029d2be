# SPDX-License-Identifier: Apache-2.0
"""Split a data set into training and validation, so that near copies stay together."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from mmeformer.labeled import LabeledData, LabeledImage

SHARE = 0.2
"""Share of the images that validate, in a data set without a split."""
_LARGEST_GROUP = 0.5
"""A prefix that more images share is a name of the whole set, not of one scene."""

# Roboflow writes several changed copies of an image: NAME_jpg.rf.HASH.jpg.
_ROBOFLOW = re.compile(r"\.rf\.[0-9a-f]{16,}$")
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
        data.notes.append(f"{len(loose)} images belong to no split and are left out")
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
        data.images.append(LabeledImage(**{**vars(image), "split": "val"}))
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
    names = names_of_classes(images)
    if len({image.label for image in images}) > 1:
        rule = "from every class alike"
    else:
        rule = "one by one (their names tell no scenes; if they are frames of one video, make "
        rule += "folders train and val)"
    for strip, kind in ((tile_of, "tiles of one image"), (scene_of, "one scene or video")):
        groups: dict[tuple, list[LabeledImage]] = defaultdict(list)
        for image in images:
            prefix = strip(image.path.stem)
            alone = prefix == image.path.stem or (image.label, scene_of(prefix)) in names
            groups[(image.path,) if alone else (prefix,)].append(image)
        largest = max(map(len, groups.values()))
        if 3 < len(groups) < len(images) and largest <= _LARGEST_GROUP * len(images):
            count = sum(len(group) > 1 for group in groups.values())
            return list(groups.values()), f"by file-name prefix, as {kind}: {count} prefixes"
    # Changed copies of one image stay together in any case.
    copies: dict[tuple, list[LabeledImage]] = defaultdict(list)
    for image in images:
        copies[image.label, _ROBOFLOW.sub("", image.path.stem)].append(image)
    if len(copies) < len(images):
        rule = f"with the copies of each of the {len(copies)} original images together"
    return list(copies.values()), rule


def names_of_classes(images: Sequence[LabeledImage]) -> set[tuple[int, str]]:
    """Prefixes by which most images of a class are named (``tabby_1``), with the label.

    They are no scenes: a whole class would train or validate.
    """
    by_label: dict[int, list[str]] = defaultdict(list)
    for image in images:
        if image.label is not None:
            by_label[image.label].append(scene_of(image.path.stem))
    found = set()
    for label, prefixes in by_label.items():
        prefix, count = Counter(prefixes).most_common(1)[0]
        if count > _LARGEST_GROUP * len(prefixes):
            found.add((label, prefix))
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
