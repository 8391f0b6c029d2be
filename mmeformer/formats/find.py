# SPDX-License-Identifier: Apache-2.0
"""Recognize the format of a folder of labeled images, and read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from mmeformer.bars import counted
from mmeformer.checks.findings import (
    ERROR,
    WARNING,
    Finding,
    errors_first,
    first_of,
    format_findings,
)
from mmeformer.errors import UserError
from mmeformer.formats import coco, dota, folders, labelme, masks, splits, voc, yolo
from mmeformer.formats.tree import Options, Tree
from mmeformer.garbage import without_collection
from mmeformer.labeled import LabeledData, LabeledImage, LabeledObject, bounding_box

FORMATS = dict(
    coco=coco, yolo=yolo, voc=voc, labelme=labelme, dota=dota, masks=masks, folders=folders
)
"""Readers by the name that ``--format`` takes. Label files of others count more than ``masks``, and
``folders`` count only if there is nothing else."""
_LABEL_FILES = tuple(name for name in FORMATS if name not in ("masks", "folders"))
_SMALLEST = 1
"""Width and height in pixels of the smallest box that mmdet trains on; it skips others silently."""
_THIN = 0.01
"""Width in pixels below which a rotated box has none: label files of DOTA have hundredths."""


@without_collection()
def read_folder(
    folder: Path, options: Options, *, skip_bad: bool = False, seed: int = 0
) -> LabeledData:
    """Read a folder of labeled images in any of :data:`FORMATS`, with a split.

    Args:
        folder: is only read.
        options: what the user says about it.
        skip_bad: leave out files and objects with errors, which are in the findings.
        seed: of the split, if the data set has none.

    Raises:
        UserError: no or several formats fit, there are errors, or nothing is labeled. The message
            names the files and the option that answers.
    """
    tree = Tree.of(Path(folder))
    name = options.format or recognize(tree)
    for option, given, formats in (
        ("--classes", options.classes, ("yolo", "masks")),
        ("--legend", options.legend, ("masks",)),
    ):
        if given is not None and name not in formats:
            raise UserError(
                f"{option} is for {' and '.join(formats)}; leave it out: {name} has names itself"
            )
    try:
        data = FORMATS[name].read(tree, options)
    except ValueError as error:
        raise UserError(str(error)) from error
    if others := tree.other_images():
        data.notes.append(others)
    _drop_bad(data)
    data.findings = errors_first(data.findings)
    errors = [finding for finding in data.findings if finding.severity == ERROR]
    if errors and not skip_bad:
        raise UserError(
            f"{len(errors)} errors in the labels of {tree.root} (read as {data.format}); correct "
            f"them, or leave these files and objects out with --skip-bad:\n"
            f"{format_findings(errors)}"
        )
    if errors:
        data.notes.append(f"{len(errors)} errors: these files and objects are left out")
    if not any(data.counts().values()):
        raise UserError(
            f"{tree.root} was read as {data.format}, but no image there is labeled; choose another "
            f"--format ({', '.join(FORMATS)}), or give the folder that has images and labels"
        )
    splits.complete(data, seed)
    _drop_unused(data)
    return data


def recognize(tree: Tree) -> str:
    """Name of the one format of a folder.

    Raises:
        UserError: no format fits, or several do.
    """
    found: dict[str, Sequence[Path]] = {}
    for name in _LABEL_FILES:
        if evidence := FORMATS[name].find(tree):
            found[name] = evidence
    if len(found) > 1:
        listed = " and ".join(
            f"{name} ({files[0].relative_to(tree.root)})" for name, files in found.items()
        )
        choices = " or ".join(f"--format {name}" for name in found)
        raise UserError(f"{tree.root} has labels in several formats: {listed}; choose {choices}")
    for name in (*found, "masks", "folders"):
        if name in found or FORMATS[name].find(tree):
            return name
    # A guess of what was meant: JPEG files are never read as masks.
    jpegs = tree.with_suffix(".jpg", ".jpeg")
    lossy = [path for path in jpegs if masks.in_mask_folder(path, tree)]
    hint = f"; {others}" if (others := tree.other_images()) else ""
    if lossy:
        shown = lossy[0].relative_to(tree.root)
        hint = f"; if {shown} is a mask: JPEG changes its values, so export masks as PNG"
    if doubt := folders.doubtful_classes(tree):
        hint += f"; {doubt}"
    raise UserError(
        f"{tree.root} has {len(tree.images)} images, but no labels that are known: "
        "COCO JSON, YOLO, Pascal VOC XML, LabelMe, DOTA text, masks, or a folder for each class"
        f"{hint}"
    )


def _drop_bad(data: LabeledData) -> None:
    """Leave out objects that cannot be learned, with an error that names their label."""
    for image in counted(data.images, "images with checked labels"):
        kept = []
        for number, item in enumerate(image.objects, start=1):
            fault = _fault(item, image)
            if fault is None:
                kept.append(item)
                continue
            place = item.place or f"object {number} ({data.classes[item.label]})"
            path = str(image.source or image.path)
            data.findings.append(Finding(ERROR, "bad object", path, f"{place}: {fault}"))
        image.objects = kept


def _fault(item: LabeledObject, image: LabeledImage) -> str | None:
    """What is wrong with an object: it has no area, or lies outside its image."""
    x, y, width, height = item.box
    size = f"{image.width} x {image.height} px"
    if item.corners is not None:
        if min(cv2.minAreaRect(item.quadrilateral().astype(np.float32))[1]) < _THIN:
            return "the corners enclose no area; remove it"
    # Rounded to thousandths, as labels are written: YOLO's own rounding makes 0.9998 px of 1 px.
    elif round(width, 3) < _SMALLEST or round(height, 3) < _SMALLEST:
        text = f"the box of {width:.3g} x {height:.3g} px"
        return f"{text} is less than a pixel wide or high; remove it"
    elif item.polygons and not round(item.polygon_area(), 3):  # as labels are written
        return "the outline encloses no area; remove it"
    if x + width <= 0 or y + height <= 0 or x >= image.width or y >= image.height:
        return (
            f"lies outside its image of {size}: x from {x:.0f} to {x + width:.0f}, y from {y:.0f} "
            f"to {y + height:.0f}; remove it, or use the image that was labeled"
        )
    if item.polygons:
        # Of COCO, the box can be another.
        x, y, width, height = bounding_box(item.polygons)
        right, bottom = 2 * image.width, 2 * image.height
        if x < -image.width or y < -image.height or x + width > right or y + height > bottom:
            # pycocotools can crash on it.
            return f"the outline reaches far beyond its image of {size}; correct it"
    return None


def _drop_unused(data: LabeledData) -> None:
    """Leave out classes of objects that occur nowhere, with a finding."""
    if not any(image.objects for image in data.images):
        return
    counts = data.counts()
    kept = [label for label in range(len(data.classes)) if counts[label]]
    unused = [name for label, name in enumerate(data.classes) if not counts[label]]
    if unused:
        text = f"{first_of(unused, 20)}: no object, so left out of the classes"
        data.findings.append(Finding(WARNING, "unused class", str(data.root), text))
    new = {label: place for place, label in enumerate(kept)}
    data.classes = tuple(data.classes[label] for label in kept)
    for image in data.images:
        # New objects: an only image is there twice, for training and validation, and shares them.
        image.objects = [replace(item, label=new[item.label]) for item in image.objects]
