# SPDX-License-Identifier: Apache-2.0
"""COCO JSON under any file names, one file or several, as COCO, Roboflow, CVAT, Label Studio write.

Format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmeformer.checks.findings import ERROR, Finding
from mmeformer.formats.tree import Options, Tree, read_sizes
from mmeformer.labeled import BOXES, POLYGONS, LabeledData, LabeledImage, LabeledObject

NAME = "COCO"
_TRIED = 50
"""JSON files that are opened to find COCO: a set has few, LabelMe has one for each image."""


def find(tree: Tree) -> list[Path]:
    """The annotation files."""
    if NAME in tree.found:
        return tree.found[NAME]
    found = []
    for path in sorted(tree.with_suffix(".json"), key=lambda path: -path.stat().st_size)[:_TRIED]:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            # A damaged file with a name of COCO's is an error of `read`.
            if "instances" in path.name or "coco" in path.name.lower():
                found.append(path)
            continue
        if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
            found.append(path)
    tree.found[NAME] = sorted(found)
    return tree.found[NAME]


def read(tree: Tree, options: Options) -> LabeledData:
    """Read all annotation files; their names and folders tell the splits."""
    # Needs mmdet, which finding does not.
    from mmeformer.detection import annotations
    from mmeformer.detection.checks import check_coco

    classes: dict[str, int] = {}
    images: dict[Path, LabeledImage] = {}
    findings: list[Finding] = []
    unmasked = masked = 0
    paths = find(tree)
    splits = [tree.split_of_labels(path) for path in paths]
    for path, split in zip(paths, splits, strict=True):
        content = annotations.read(path)
        if not annotations.is_coco(content):
            text = "is not COCO: images, annotations and categories must be lists"
            findings.append(Finding(ERROR, "not COCO", str(path), text))
            continue
        _locate(content, path, split, tree, findings)
        entries = content.get("annotations", [])
        has_masks = [bool(isinstance(e, Mapping) and e.get("segmentation")) for e in entries]
        masked, unmasked = masked + sum(has_masks), unmasked + len(entries) - sum(has_masks)
        names = _categories(content)
        findings += [
            finding
            for finding in check_coco(
                content,
                str(path),
                str(tree.root),
                list(names.values()),
                training=False,
                masks=bool(entries) and all(has_masks),
                limit=0,
            )
            # The file's order of images tells which one is meant; classes are reported below.
            if finding.kind not in ("missing image", "unused category")
        ]
        for name in names.values():
            classes.setdefault(name, len(classes))
        _add(content, names, classes, split, tree.root, images)
    sizes = read_sizes(images, findings)
    data = LabeledData(NAME, tree.root, BOXES, tuple(classes), [], findings)
    for path, image in images.items():
        if path not in sizes:
            continue
        width, height = sizes[path]
        if (image.width, image.height) not in ((0, 0), (width, height)):
            text = (
                f"is {width} x {height} px, but its labels are for {image.width} x {image.height} "
                "px; use the image that was labeled"
            )
            findings.append(Finding(ERROR, "wrong size", str(path), text))
            continue
        image.width, image.height = width, height
        data.images.append(image)
    if masked and not unmasked:
        data.kind = POLYGONS
    elif masked:
        data.notes.append(
            f"{unmasked} of {masked + unmasked} objects have a box but no mask: masks are not "
            "learned"
        )
    if len(paths) > 1 and not all(splits):
        listed = ", ".join(str(path.relative_to(tree.root)) for path in paths)
        data.notes.append(f"annotation files read as one: {listed}")
    return data


def _locate(
    content: dict, path: Path, split: str | None, tree: Tree, findings: list[Finding]
) -> None:
    """Replace file names by paths of images, in place; entries without a file are left out."""
    kept = []
    for entry in content.get("images", []):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            kept.append(entry)
            continue
        found = tree.find_image(name, path, split)
        if found is None:
            text = f"image {name} is not below {tree.root}; add it or remove its entry"
            findings.append(Finding(ERROR, "missing image", str(path), text))
            continue
        entry["file_name"] = found.relative_to(tree.root).as_posix()
        for side in ("width", "height"):
            # Label Studio can leave them out.
            if entry.get(side) is None:
                entry[side] = 2**20
                entry["unknown_size"] = True
        kept.append(entry)
    gone = {str(e.get("id")) for e in content.get("images", []) if isinstance(e, dict)} - {
        str(e.get("id")) for e in kept if isinstance(e, dict)
    }
    content["images"] = kept
    content["annotations"] = [
        entry
        for entry in content.get("annotations", [])
        if not (isinstance(entry, dict) and str(entry.get("image_id")) in gone)
    ]


def _categories(content: dict) -> dict[str, str]:
    """Name by id; of two names, Roboflow's root category is the one without objects."""
    used = {
        str(entry.get("category_id"))
        for entry in content.get("annotations", [])
        if isinstance(entry, dict)
    }
    entries = [
        entry
        for entry in content.get("categories", [])
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and "id" in entry
    ]
    parents = {entry.get("supercategory") for entry in entries}
    return {
        str(entry["id"]): entry["name"]
        for entry in entries
        if str(entry["id"]) in used or entry["name"] not in parents or len(entries) == 1
    }


def _add(content, names, classes, split, root: Path, images: dict[Path, LabeledImage]) -> None:
    """Add the images and objects of one file that are valid."""
    from mmeformer.detection.annotations import is_box

    by_id: dict[str, LabeledImage] = {}
    for entry in content["images"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            continue
        path = root / entry["file_name"]
        width, height = entry.get("width"), entry.get("height")
        if entry.get("unknown_size") or type(width) is not int or type(height) is not int:
            width = height = 0
        image = images.setdefault(path, LabeledImage(path, width, height, split=split))
        by_id[str(entry.get("id"))] = image
    for entry in content.get("annotations", []):
        if not isinstance(entry, dict) or not is_box(entry.get("bbox")):
            continue
        owner = by_id.get(str(entry.get("image_id")))
        name = names.get(str(entry.get("category_id")))
        if owner is None or name is None or not _is_usable(entry, owner):
            continue
        x, y, width, height = entry["bbox"]
        item = LabeledObject(classes[name], (x, y, width, height), crowd=bool(entry.get("iscrowd")))
        mask: Any = entry.get("segmentation")
        if isinstance(mask, dict):
            item.rle = dict(size=mask.get("size"), counts=mask.get("counts"))
        elif mask:
            item.polygons = [list(polygon) for polygon in mask]
        owner.objects.append(item)


def _is_usable(entry: Mapping[str, Any], image: LabeledImage) -> bool:
    """Whether box and mask of an annotation are valid; of others, ``check_coco`` says why not."""
    from mmeformer.detection.annotations import is_number
    from mmeformer.detection.checks import run_lengths

    x, y, width, height = entry["bbox"]
    inside = not image.width or (
        min(x + width, image.width) > max(x, 0) and min(y + height, image.height) > max(y, 0)
    )
    if width < 1 or height < 1 or not inside:
        return False
    mask: Any = entry.get("segmentation")
    if isinstance(mask, Mapping):
        counts, size = mask.get("counts"), mask.get("size")
        runs = run_lengths(counts) if isinstance(counts, (str, list)) else None
        if runs is None or not isinstance(size, list) or not all(map(is_number, size)):
            return False
        return bool(runs.min() >= 0 and runs.sum() == math.prod(size))
    return not mask or (
        isinstance(mask, list)
        and all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(map(is_number, polygon))
            for polygon in mask
        )
    )
