# SPDX-License-Identifier: Apache-2.0
"""Checks of COCO annotation files and their images."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmeformer.bars import counted
from mmeformer.checks.findings import ERROR, WARNING, Finding, errors_first, first_of
from mmeformer.checks.images import check_images, find_missing
from mmeformer.detection.annotations import (
    LISTS,
    are_numbers,
    file_key,
    is_box,
    is_coco,
    is_flag,
)
from mmeformer.images import PLAIN, Reading

LEFT_OUT = ("empty box", "inverted box", "box outside image", "short polygon")
"""Kinds of annotations that mmdet silently leaves out of training."""
# A box may reach this many pixels beyond its image, by rounding.
TOLERANCE = 1.0
# More than this share of crowds is no data set but a mistake of the exporter.
MANY_CROWDS = 0.5


def check_coco(
    content: Any,
    path: str,
    image_dir: str,
    classes: Sequence[str],
    *,
    training: bool = True,
    masks: bool = False,
    limit: int | None = None,
    decode: bool = False,
    reading: Reading | None = PLAIN,
) -> list[Finding]:
    """Check an annotation file and its images.

    Checks all annotations and that every image exists, and reads the header and both ends of the
    first ``limit`` images.

    Args:
        content: of :func:`mmeformer.detection.annotations.read`.
        path: the file, for messages.
        image_dir: folder to which ``file_name`` is relative.
        classes: names of the classes to train.
        training: warn about classes that do not occur.
        masks: masks are read: every object needs one. Else masks are not checked.
        limit: number of images to read; None reads all.
        decode: decode these images in full.
        reading: see :func:`mmeformer.checks.images.check_images`.

    Returns:
        The problems, errors first; kinds: ``not COCO``, ``bad entry``, ``repeated id``, ``repeated
        image``, ``repeated name``, ``only crowds``, ``many crowds``, ``unknown image``, ``unknown
        category``, ``unused category``, ``inverted box``, ``empty box``, ``box
        outside image``, ``box beyond image``, ``short polygon``, ``mask outside image``, ``mask
        size``, ``damaged mask``, ``missing mask``, ``unused class``, ``missing image``,
        ``unreadable image``, ``wrong size``, ``bands or depth``, ``deep image``.
    """
    if not is_coco(content):
        message = f"is not COCO: it must have the lists {', '.join(LISTS)}; export it again"
        return [Finding(ERROR, "not COCO", path, message)]
    findings: list[Finding] = []

    def wrong(kind: str, message: str, severity: str = ERROR) -> None:
        findings.append(Finding(severity, kind, path, message))

    images = _by_id(content.get("images", []), "image", _image_fault, wrong)
    categories = _by_id(content.get("categories", []), "category", _category_fault, wrong)
    annotations = content.get("annotations", [])
    counts = _check_annotations(annotations, images, categories, classes, masks, wrong)
    findings += _repeated_names(categories.values(), counts.used, path)
    findings += _crowds(sum(counts.crowds.values()), sum(counts.instances.values()), path)
    for name, count in counts.others.items():
        wrong(
            "unused category",
            f"{count} annotations are of {name!r}, which is not a class of the config",
            WARNING,
        )
    if training and (unused := [name for name in classes if not counts.instances[name]]):
        message = f"{first_of(unused, 20)} have no usable annotation and cannot be learned"
        wrong("unused class", message, WARNING)
    findings += _repeated_images(images.values(), path)
    findings += _check_images(images.values(), image_dir, limit, decode, reading)
    return errors_first(findings)


@dataclass
class _Counts:
    """Sums of the annotations of a file.

    Args:
        used: ids of the categories that occur.
        instances, crowds: class -> number of usable objects.
        others: category that is no class -> number of objects.
    """

    used: set[str] = field(default_factory=set)
    instances: Counter[str] = field(default_factory=Counter)
    crowds: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


def _check_annotations(
    annotations: Sequence[Any],
    images: Mapping[str, dict],
    categories: Mapping[str, dict],
    classes: Sequence[str],
    masks: bool,
    wrong: Callable[..., None],
) -> _Counts:
    """Check the entries of ``annotations`` one by one; ``wrong`` gets what is found."""
    counts = _Counts()
    seen: set[str] = set()
    for index, annotation in enumerate(counted(annotations, "objects checked")):
        if fault := _annotation_fault(annotation):
            wrong("bad entry", f"annotations[{index}] {fault}; export the file again")
            continue
        number, image_id = annotation["id"], annotation["image_id"]
        if str(number) in seen:
            wrong("repeated id", f"two annotations have the id {number}; renumber them")
        seen.add(str(number))
        image = images.get(str(image_id))
        if image is None:
            message = f"annotation {number} belongs to image {image_id}, which is not in `images`"
            wrong("unknown image", message)
            continue
        where = f"annotation {number} ({image['file_name']})"
        category = categories.get(str(annotation["category_id"]))
        if category is None:
            wrong(
                "unknown category",
                f"{where} has category_id {annotation['category_id']}, which is not in "
                "`categories`",
            )
            continue
        counts.used.add(str(category["id"]))
        if category["name"] not in classes:
            counts.others[category["name"]] += 1
            continue
        found = _object_findings(annotation, image, masks)
        for kind, message, severity in found:
            wrong(kind, f"{where}: {message}", severity)
        if all(severity == WARNING for _, _, severity in found):
            kept = counts.crowds if annotation["iscrowd"] else counts.instances
            kept[category["name"]] += 1
    return counts


def is_image(entry: Any) -> bool:
    """Whether :func:`check_coco` finds no error in an entry of ``images`` itself."""
    return _image_fault(entry) is None


def is_usable(annotation: Any, image: Mapping, masks: bool) -> bool:
    """Whether :func:`check_coco` finds no error in an annotation itself.

    Args:
        annotation: of a known class.
        image: its entry in ``images``, which is valid.
        masks: see :func:`check_coco`.
    """
    return _annotation_fault(annotation) is None and all(
        severity == WARNING for _, _, severity in _object_findings(annotation, image, masks)
    )


def _object_findings(
    annotation: Mapping, image: Mapping, masks: bool
) -> list[tuple[str, str, str]]:
    """Kind, text and severity of what is wrong with a box and a mask."""
    # What is not read cannot harm.
    mask = _mask_finding(annotation, image) if masks else None
    return [finding for finding in (_box_finding(annotation, image), mask) if finding]


def _repeated_names(categories: Iterable[Mapping], used: set[str], path: str) -> list[Finding]:
    """Categories of one name that several annotations use; unused ones do no harm."""
    ids: dict[str, list] = defaultdict(list)
    for category in categories:
        if str(category["id"]) in used:
            ids[category["name"]].append(category["id"])
    return [
        Finding(
            ERROR,
            "repeated name",
            path,
            f"the categories {first_of(numbers)} are all named {name!r}; give their annotations "
            "one category_id, or rename them",
        )
        for name, numbers in ids.items()
        if len(numbers) > 1
    ]


def _crowds(crowds: int, others: int, path: str) -> list[Finding]:
    """A finding if most objects are crowds, which are neither learned nor evaluated."""
    if crowds <= MANY_CROWDS * (crowds + others):
        return []
    severity, kind = (WARNING, "many crowds") if others else (ERROR, "only crowds")
    text = (
        f"{crowds} of {crowds + others} annotations have iscrowd (or ignore) 1, so that they are "
        "neither learned nor evaluated; set iscrowd to 0 for single objects"
    )
    return [Finding(severity, kind, path, text)]


def _repeated_images(images: Iterable[Mapping], path: str) -> list[Finding]:
    """Image files with several entries; mmdet would take the objects of one for the background of
    the other."""
    first: dict[str, Mapping] = {}
    findings = []
    for image in images:
        other = first.setdefault(file_key(image["file_name"]), image)
        if other is image:
            continue
        name = f"images {other['id']} and {image['id']} are the same file {image['file_name']}"
        sizes = [f"{item['width']} x {item['height']} px" for item in (other, image)]
        if sizes[0] == sizes[1]:
            text = f"{name}; it counts as one image with the annotations of both"
            findings.append(Finding(WARNING, "repeated image", path, text))
        else:
            text = f"{name}, but of {sizes[0]} and {sizes[1]}; remove one"
            findings.append(Finding(ERROR, "repeated image", path, text))
    return findings


def _check_images(
    images: Iterable[Mapping],
    image_dir: str,
    limit: int | None,
    decode: bool,
    reading: Reading | None,
) -> list[Finding]:
    images = list(images)
    sizes = {
        os.path.join(image_dir, image["file_name"]): (image["height"], image["width"])
        for image in images
    }
    outside = [
        Finding(
            WARNING,
            "outside folder",
            os.path.join(image_dir, image["file_name"]),
            f"file_name {image['file_name']} leads out of the folder of the images; do not trust "
            "a file from elsewhere that names such files",
        )
        for image in images
        if os.path.isabs(image["file_name"]) or file_key(image["file_name"]).startswith("..")
    ]
    missing = find_missing(list(sizes))
    absent = {finding.path for finding in missing}
    existing = [path for path in sizes if path not in absent][:limit]
    return outside + missing + check_images(existing, sizes, decode, reading)


def _by_id(entries: list, name: str, fault_of, wrong) -> dict:
    """Valid entries by the text of their id: ``7`` and ``"7"`` are the same."""
    known: dict = {}
    for index, entry in enumerate(entries):
        if fault := fault_of(entry):
            wrong("bad entry", f"{name} {index} of the file {fault}; export it again")
        elif str(entry["id"]) in known:
            wrong("repeated id", f"two entries ({name}) have the id {entry['id']}; renumber them")
        else:
            known[str(entry["id"])] = entry
    return known


def _is_id(value) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _image_fault(entry) -> str | None:
    if not isinstance(entry, Mapping) or not _is_id(entry.get("id")):
        return "has no id"
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        return f"(id {entry['id']}) has no file_name"
    for key in ("height", "width"):
        if type(entry.get(key)) is not int or entry[key] <= 0:
            return f"({entry['file_name']}) has {key} {entry.get(key)!r} instead of pixels"
    return None


def _category_fault(entry) -> str | None:
    if not isinstance(entry, Mapping) or not _is_id(entry.get("id")):
        return "has no id"
    return None if isinstance(entry.get("name"), str) else f"(id {entry['id']}) has no name"


def _annotation_fault(entry) -> str | None:
    if not isinstance(entry, Mapping):
        return f"is {str(entry)[:50]!r} instead of an annotation"
    for key in ("id", "image_id", "category_id"):
        if not _is_id(entry.get(key)):
            return f"has {key} {entry.get(key)!r}"
    where = f"(id {entry['id']})"
    box = entry.get("bbox")
    if not is_box(box):
        return (
            f"{where} has bbox {str(box)[:80]} instead of four finite numbers x, y, width, height"
        )
    for key in ("iscrowd", "ignore"):
        if not is_flag(entry.get(key)):
            return f"{where} has {key} {entry[key]!r} instead of 0 or 1"
    return None


def _box_finding(annotation: Mapping, image: Mapping) -> tuple[str, str, str] | None:
    x, y, width, height = annotation["bbox"]
    if width < 0 or height < 0:
        text = f"bbox {annotation['bbox']} has a negative side; COCO wants x, y, width, height"
        return "inverted box", text, ERROR
    if width < 1 or height < 1:
        text = f"bbox {annotation['bbox']} is less than a pixel wide or high; remove it"
        return "empty box", text, ERROR
    right, bottom = image["width"], image["height"]
    if min(x + width, right) <= max(x, 0) or min(y + height, bottom) <= max(y, 0):
        text = f"bbox {annotation['bbox']} lies outside its image of {right} x {bottom} px"
        return "box outside image", text, ERROR
    beyond = max(-x, -y, x + width - right, y + height - bottom)
    if beyond > TOLERANCE:
        text = f"bbox {annotation['bbox']} reaches {beyond:g} px beyond its {right} x {bottom} px"
        if width > x and height > y and width <= right + TOLERANCE and height <= bottom + TOLERANCE:
            text += "; if these are two corners: COCO wants x, y, width, height"
        return "box beyond image", text, WARNING
    return None


def _mask_finding(annotation: Mapping, image: Mapping) -> tuple[str, str, str] | None:
    mask = annotation.get("segmentation")
    if mask is None or mask == []:
        return "missing mask", "has no segmentation, but the model learns masks", ERROR
    if isinstance(mask, list):
        return _polygon_finding(mask, image)
    elif isinstance(mask, Mapping):
        size = [image["height"], image["width"]]
        if mask.get("size") != size or not isinstance(mask.get("counts"), (str, list)):
            text = f"the mask has size {mask.get('size')} (height, width), its image {size} px"
            return "mask size", text, ERROR
        lengths = run_lengths(mask["counts"])
        if lengths is None or lengths.min() < 0 or lengths.sum() != size[0] * size[1]:
            text = "the run lengths of the mask do not add up to its size; export it again"
            return "damaged mask", text, ERROR
    else:
        return "bad entry", f"segmentation is {str(mask)[:50]!r}", ERROR
    return None


def _polygon_finding(polygons: list, image: Mapping) -> tuple[str, str, str] | None:
    for polygon in polygons:
        if not isinstance(polygon, list) or not are_numbers(polygon):
            text = "segmentation is not a list of polygons of finite numbers"
            return "bad entry", text, ERROR
        if len(polygon) % 2 or len(polygon) < 6:
            text = f"a polygon has {len(polygon)} numbers; it needs an even number, at least 6"
            return "short polygon", text, ERROR
        for start, side in enumerate((image["width"], image["height"])):
            low, high = min(polygon[start::2]), max(polygon[start::2])
            if low < -side or high > 2 * side:
                text = (
                    f"a polygon reaches from {low:g} to {high:g} px, but the image has {side} px; "
                    "pycocotools can crash on it"
                )
                return "mask outside image", text, ERROR
    return None


def run_lengths(counts: str | list) -> np.ndarray | None:
    """Run lengths of a COCO mask: background, object, background, ... in pixels.

    Args:
        counts: a list, or text with six bits per character. The text has each number five bits at a
            time, lowest first; from the fourth number on, it has the difference to the number two
            places before (``rleFrString`` in cocodataset/cocoapi, ``common/maskApi.c``).

    Returns:
        (runs,) int64, or None if ``counts`` is invalid.
    """
    if isinstance(counts, list):
        if not counts or not all(type(number) is int and number < 2**32 for number in counts):
            return None
        return np.array(counts, np.int64)
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = codes & 32 == 0
    first = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    digits = np.diff(first, append=codes.size)
    if digits.max() > 7:  # more than 32 bits
        return None
    place = np.arange(codes.size) - np.repeat(first, digits)
    numbers = np.add.reduceat((codes & 31) << (5 * place), first)
    numbers -= (codes[last] >> 4 & 1) << (5 * digits)
    for start in (1, 2):
        numbers[start::2] = np.cumsum(numbers[start::2])
    return numbers
