# SPDX-License-Identifier: Apache-2.0
"""COCO annotation files, read in one way for the data set, its checks and the metric.

Exporters write the same thing in many ways. pycocotools and mmdet accept some of them, crash on
others, and silently misread a few: an annotation with the id 0 counts as "no match" in
``COCOeval`` (``evaluateImg`` in cocodataset/cocoapi, ``PythonAPI/pycocotools/cocoeval.py``).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets.api_wrappers import COCO

from mmeformer.bars import read_json

LISTS = ("images", "annotations", "categories")


def read(path: str | Path) -> Any:
    """Read an annotation file as JSON (UTF-8 with or without byte order mark, UTF-16, UTF-32).

    Returns:
        The content after :func:`clean`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not JSON.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"annotation file {path} does not exist; set data_root and ann_file to where it is"
        )
    try:
        return clean(read_json(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"annotation file {path} is not COCO JSON ({error}); export it again"
        ) from error


def is_coco(content: Any) -> bool:
    """Whether this is a mapping whose :data:`LISTS` are lists (or missing)."""
    return isinstance(content, Mapping) and all(
        isinstance(content.get(key, []), list) for key in LISTS
    )


def clean(content: Any) -> Any:
    """Give unambiguous values their usual form, in place; everything else stays as it is.

    - Ids and sizes as ``96.0`` (sizes also as text) become integers.
    - ``iscrowd`` that is missing, null or a boolean becomes 0 or 1. ``ignore: 1`` becomes
      ``iscrowd: 1``: mmdet would take such an object for background in training, and count it in
      evaluation.
    - An ``area`` that is missing or not positive becomes that of the box, as in mmdet's
      ``CocoMetric.gt_to_coco_json``.

    Returns:
        ``content``.
    """
    if not is_coco(content):
        return content
    for image in _entries(content, "images"):
        _make_whole(image, "id")
        for side in ("height", "width"):
            with contextlib.suppress(ValueError):
                if isinstance(image.get(side), str):
                    image[side] = float(image[side])
            _make_whole(image, side)
    for category in _entries(content, "categories"):
        _make_whole(category, "id")
    for annotation in _entries(content, "annotations"):
        for key in ("id", "image_id", "category_id"):
            _make_whole(annotation, key)
        flags = [annotation.get(key) for key in ("iscrowd", "ignore")]
        if all(is_flag(flag) for flag in flags):
            annotation["iscrowd"] = int(any(flags))
            annotation.pop("ignore", None)
        area: Any = annotation.get("area")
        box: Any = annotation.get("bbox")
        if is_box(box) and not (is_number(area) and area > 0):
            annotation["area"] = max(box[2], 0) * max(box[3], 0)
    return content


def _entries(content: Mapping, key: str) -> Iterator[dict]:
    return (entry for entry in content.get(key, []) if isinstance(entry, dict))


def _make_whole(entry: dict, key: str) -> None:
    value = entry.get(key)
    if isinstance(value, float) and value.is_integer():
        entry[key] = int(value)


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def are_numbers(values: list) -> bool:
    """:func:`is_number` of all values; a data set has millions, so without a call for each."""
    return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))


def is_box(value: object) -> bool:
    """Whether a value of a JSON file is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and are_numbers(value)


def is_flag(value: object) -> bool:
    """Whether a value of a JSON file is 0, 1, false, true or null."""
    # Any text, even "0", would count as true.
    return value is None or (isinstance(value, (int, float)) and value in (0, 1))


def file_key(name: str) -> str:
    """``file_name`` of an image, the same for all spellings of one path."""
    return os.path.normpath(name)


class Annotations(COCO):
    """An index of a COCO file, numbered such that pycocotools and mmdet read it correctly.

    - Ids of different types match (``7`` and ``"7"``); annotations have ids from 1, images and
      categories have integers. Integer ids stay as they are where possible.
    - Several entries of one image file are one image with the annotations of all; annotations that
      occur in several of them count once.
    - Of several categories with the same name only those in use stay, or the last one. (Roboflow
      adds a root category, which can be named like a class.)
    - The ids of the classes increase in the order of the config: mmdet numbers classes in the order
      of the file, ``COCOeval`` in that of the ids.

    Args:
        content: of :func:`read`; belongs to this object afterwards. It has to be free of the errors
            that :func:`mmeformer.detection.checks.check_coco` finds.
        classes: of the config.

    Attributes:
        image_ids, category_ids: the ids of the file by those of this index.
        renumbered: whether anything differs from what pycocotools itself would read.
    """

    def __init__(self, content: dict, classes: Sequence[str]) -> None:
        super().__init__()
        content = dict(content)
        before = _names(content)
        images, image_numbers, self.image_ids = _number_images(content.get("images", []))
        categories, category_numbers, self.category_ids = _number_categories(content, classes)
        content.update(images=images, categories=categories)
        if "annotations" in content:
            content["annotations"] = _number_annotations(
                content["annotations"], image_numbers, category_numbers
            )
        self.renumbered = before != _names(content)
        self.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()
        # As in mmdet's constructor.
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


def _names(content: Mapping) -> list:
    """All ids of a file, and the names of its categories, in their order."""
    names = [category["name"] for category in content.get("categories", [])]
    return [names, *([entry["id"] for entry in content.get(key, [])] for key in LISTS)]


def _integers(entries: Sequence[dict]) -> list[int]:
    """The ids of entries if all are integers, else 1, 2, ..."""
    ids = [entry["id"] for entry in entries]
    return ids if all(type(number) is int for number in ids) else [*range(1, len(ids) + 1)]


def _number_images(entries: Sequence[dict]) -> tuple[list[dict], dict[str, int], dict]:
    """Entries with unique files, the number of each id of the file, and the id of each number."""
    numbers: dict[str, int] = {}
    originals: dict[int, int | str] = {}
    first: dict[str, dict] = {}
    for entry, number in zip(entries, _integers(entries), strict=True):
        image = first.setdefault(file_key(entry["file_name"]), {**entry, "id": number})
        numbers[str(entry["id"])] = image["id"]
        originals.setdefault(image["id"], entry["id"])
    return list(first.values()), numbers, originals


def _number_categories(
    content: Mapping, classes: Sequence[str]
) -> tuple[list[dict], dict[str, int], dict]:
    """As :func:`_number_images`, in the order of the classes; others follow."""
    used = {str(annotation["category_id"]) for annotation in content.get("annotations", [])}
    by_name = defaultdict(list)
    for category in content.get("categories", []):
        by_name[category["name"]].append(category)
    rank = {name: place for place, name in enumerate(classes)}
    entries = [
        category
        for name in sorted(by_name, key=lambda name: rank.get(name, len(rank)))
        for category in (
            [category for category in by_name[name] if str(category["id"]) in used]
            or by_name[name][-1:]
        )
    ]
    numbers = _integers(entries)
    wanted = numbers[: sum(entry["name"] in rank for entry in entries)]
    if wanted != sorted(wanted):
        numbers = [*range(1, len(entries) + 1)]
    originals = {number: entry["id"] for number, entry in zip(numbers, entries, strict=True)}
    entries = [{**entry, "id": number} for number, entry in zip(numbers, entries, strict=True)]
    return entries, {str(old): new for new, old in originals.items()}, originals


def _number_annotations(
    entries: Sequence[dict], images: Mapping[str, int], categories: Mapping[str, int]
) -> list[dict]:
    several = {number for number, count in Counter(images.values()).items() if count > 1}
    keep_ids = all(type(entry["id"]) is int and entry["id"] > 0 for entry in entries)
    numbers: dict[str, int] = {}
    seen: set[str] = set()
    found = []
    for entry in entries:
        number = numbers.setdefault(str(entry["id"]), len(numbers) + 1)
        image = images.get(str(entry["image_id"]), entry["image_id"])
        category = categories.get(str(entry["category_id"]), entry["category_id"])
        if image in several:
            content = json.dumps([image, category, entry["bbox"], entry.get("segmentation")])
            if content in seen:
                continue
            seen.add(content)
        entry.update(id=entry["id"] if keep_ids else number, image_id=image, category_id=category)
        found.append(entry)
    return found
