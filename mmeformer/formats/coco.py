# SPDX-License-Identifier: Apache-2.0
"""COCO JSON under any file names, one file or several, as COCO, Roboflow, CVAT, Label Studio write.

Format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmeformer.bars import counted, read_json
from mmeformer.checks.findings import ERROR, Finding, first_of
from mmeformer.formats.lists import split_by_lists
from mmeformer.formats.tree import Options, Tree, read_sizes
from mmeformer.labeled import BOXES, POLYGONS, LabeledData, LabeledImage, LabeledObject

NAME = "COCO"
_OTHER_TASKS = "COCO of other tasks"
"""Key of ``Tree.found`` for files such as COCO's captions."""
_TRIED = 50
"""JSON files that are opened to find COCO: a set has few, LabelMe has one for each image."""


def find(tree: Tree) -> list[Path]:
    """The annotation files of objects."""
    if NAME in tree.found:
        return tree.found[NAME]
    found, others = [], []
    for path in sorted(tree.with_suffix(".json"), key=lambda path: -path.stat().st_size)[:_TRIED]:
        try:
            content = read_json(path)
        except (ValueError, RecursionError):
            # A damaged file with a name of COCO's is an error of `read`.
            if "instances" in path.name or "coco" in path.name.lower():
                found.append(path)
            continue
        if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
            if _is_of_other_task(content["annotations"]):
                others.append(path)
            else:
                found.append(path)
                tree.contents[path] = content
    tree.found[NAME], tree.found[_OTHER_TASKS] = sorted(found), sorted(others)
    return tree.found[NAME]


def _is_of_other_task(annotations: Any) -> bool:
    """Whether no annotation has a class or a box, as in COCO's captions."""
    return (
        isinstance(annotations, list)
        and bool(annotations)
        and all(isinstance(e, dict) and not {"category_id", "bbox"} & e.keys() for e in annotations)
    )


@dataclass
class _Merged:
    """What several annotation files say together.

    Args:
        root: folder of the data set.
        classes: label of each class.
        images: labeled images, by path.
        files: annotation files that list each image, in the order in which they are read.
        sizes: width and height of each image file in pixels; None if it cannot be read.
        repeated: number of objects that were there already, from another file.
        repeated_in: the files of these objects.
        findings, notes: see :class:`LabeledData`.
    """

    root: Path
    classes: dict[str, int] = field(default_factory=dict)
    images: dict[Path, LabeledImage] = field(default_factory=dict)
    files: dict[Path, list[Path]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[Path, tuple[int, int] | None] = field(default_factory=dict)
    repeated: int = 0
    repeated_in: set[Path] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def short(self, path: Path) -> str:
        """A path for people: relative to the root."""
        return str(path.relative_to(self.root))


def read(tree: Tree, options: Options) -> LabeledData:
    """Read all annotation files; their names and folders tell the splits.

    Files that name a split come first: their images keep it, whatever other files list them.
    """
    splits = {path: tree.split_of_labels(path) for path in find(tree)}
    merged = _Merged(tree.root)
    for path in sorted(splits, key=lambda path: splits[path] is None):
        _read_file(path, splits[path], tree, merged)
    _drop_images_of_two_splits(splits, merged)
    images = list(merged.images.values())
    data = LabeledData(
        NAME, tree.root, BOXES, tuple(merged.classes), images, merged.findings, merged.notes
    )
    split_by_lists(tree, images, data.notes)
    masks = [bool(item.polygons or item.rle) for image in images for item in image.objects]
    if masks and all(masks):
        data.kind = POLYGONS
    elif any(masks):
        data.notes.append(
            f"{masks.count(False)} of {len(masks)} objects have a box but no mask: masks are not "
            "learned"
        )
    if others := tree.found[_OTHER_TASKS]:
        listed = ", ".join(map(merged.short, others))
        data.notes.append(f"no classes and boxes (captions, for example), so not read: {listed}")
    if merged.repeated:
        listed = ", ".join(map(merged.short, sorted(merged.repeated_in)))
        data.notes.append(f"{merged.repeated} objects are repeated, and count once: {listed}")
    if len(splits) > 1 and not all(splits.values()):
        listed = ", ".join(map(merged.short, splits))
        data.notes.append(f"annotation files read as one: {listed}")
    return data


def _read_file(path: Path, split: str | None, tree: Tree, merged: _Merged) -> None:
    """Add what one file says."""
    # Needs mmdet, which finding does not.
    from mmeformer.detection import annotations
    from mmeformer.detection.checks import check_coco

    if path in tree.contents:
        content = annotations.clean(tree.contents.pop(path))
    else:
        content = annotations.read(path)
    if not annotations.is_coco(content):
        text = "is not COCO: images, annotations and categories must be lists"
        merged.findings.append(Finding(ERROR, "not COCO", str(path), text))
        return
    unclear = _repeated_ids(content.get("images", []), "file_name")
    _locate(content, path, split, tree, merged)
    entries = content.get("annotations", [])
    masks = bool(entries) and all(isinstance(e, dict) and e.get("segmentation") for e in entries)
    names = _categories(content)
    merged.findings += [
        finding
        for finding in check_coco(
            content,
            str(path),
            str(tree.root),
            list(names.values()),
            training=False,
            masks=masks,
            limit=0,
        )
        # The file's order of images tells which one is meant; classes are reported below.
        if finding.kind not in ("missing image", "unused category")
    ]
    for name in names.values():
        merged.classes.setdefault(name, len(merged.classes))
    _add(content, path, split, names, unclear, masks, merged)
    for kind, ids in (
        ("images", unclear),
        ("classes", _repeated_ids(content.get("categories", []), "name")),
    ):
        if ids:
            merged.notes.append(
                f"{merged.short(path)}: several {kind} have the same id, so they and their "
                f"annotations are left out: {first_of(sorted(ids))}"
            )


def _repeated_ids(entries: list, key: str) -> set[str]:
    """Ids that several images or categories have, so that nobody knows which one is meant.

    Args:
        entries: of the file.
        key: of what tells them apart.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if isinstance(entry, dict) and "id" in entry:
            values[str(entry["id"])].add(str(entry.get(key)))
    return {number for number, found in values.items() if len(found) > 1}


def _locate(content: dict, path: Path, split: str | None, tree: Tree, merged: _Merged) -> None:
    """Replace file names by paths of images, in place, and add sizes that are left out.

    Entries without an image of their own, and of their size, are left out.
    """
    located: list[tuple[Any, Path | None]] = []
    names: dict[Path, set[str]] = defaultdict(set)
    for entry in counted(content.get("images", []), f"{path.name}: images found"):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            located.append((entry, None))
            continue
        image = tree.find_image(name, path, split)
        if image is None:
            text = f"image {name} is not below {tree.root}; add it or remove its entry"
            merged.findings.append(Finding(ERROR, "missing image", str(path), text))
            continue
        names[image].add(os.path.normpath(name))
        located.append((entry, image))
    for image, several in names.items():
        if len(several) > 1:
            text = (
                f"{first_of(sorted(several))} would all be {merged.short(image)}; add the images "
                "that are missing, or remove their entries"
            )
            merged.findings.append(Finding(ERROR, "several images", str(path), text))
    new = {image for _, image in located if image is not None} - merged.sizes.keys()
    merged.sizes.update(dict.fromkeys(new))
    merged.sizes.update(read_sizes(sorted(new), merged.findings))
    kept = [
        entry
        for entry, image in located
        if image is None or (len(names[image]) == 1 and _fits(entry, image, path, merged))
    ]
    gone = {str(e.get("id")) for e in content.get("images", []) if isinstance(e, dict)} - {
        str(e.get("id")) for e in kept if isinstance(e, dict)
    }
    content["images"] = kept
    content["annotations"] = [
        entry
        for entry in content.get("annotations", [])
        if not (isinstance(entry, dict) and str(entry.get("image_id")) in gone)
    ]


def _fits(entry: dict, image: Path, path: Path, merged: _Merged) -> bool:
    """Complete an entry by its image, in place; False if that is unreadable or of another size."""
    if (size := merged.sizes[image]) is None:
        return False
    entry["file_name"] = image.relative_to(merged.root).as_posix()
    for side, pixels in zip(("width", "height"), size, strict=True):
        # Label Studio can leave them out.
        if entry.get(side) is None:
            entry[side] = pixels
    labeled = entry["width"], entry["height"]
    if labeled == size or not all(type(side) is int and side > 0 for side in labeled):
        return True
    text = (
        f"is {size[0]} x {size[1]} px, but its labels are for {labeled[0]} x {labeled[1]} px "
        f"({merged.short(path)}); use the image that was labeled"
    )
    merged.findings.append(Finding(ERROR, "wrong size", str(image), text))
    return False


def _categories(content: dict) -> dict[str, str]:
    """Name by id; of two names, Roboflow's root category is the one without objects."""
    used = {
        str(entry.get("category_id"))
        for entry in content.get("annotations", [])
        if isinstance(entry, dict)
    }
    unclear = _repeated_ids(content.get("categories", []), "name")
    entries = [
        entry
        for entry in content.get("categories", [])
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and "id" in entry
    ]
    parents = {entry.get("supercategory") for entry in entries}
    return {
        str(entry["id"]): entry["name"]
        for entry in entries
        if str(entry["id"]) not in unclear
        and (str(entry["id"]) in used or entry["name"] not in parents or len(entries) == 1)
    }


def _add(
    content: dict,
    path: Path,
    split: str | None,
    names: Mapping[str, str],
    unclear: set[str],
    masks: bool,
    merged: _Merged,
) -> None:
    """Add the images and objects of one file that are valid.

    Args:
        content: of the file, with located images.
        path, split: of the file.
        names: of the categories, by id.
        unclear: ids of several images.
        masks: whether every object must have a valid mask.
        merged: gets them.
    """
    from mmeformer.detection.checks import is_image, is_usable

    entries = {
        str(entry["id"]): entry
        for entry in content["images"]
        if is_image(entry) and str(entry["id"]) not in unclear
    }
    objects: dict[str, list[LabeledObject]] = {number: [] for number in entries}
    for annotation in counted(content.get("annotations", []), f"{path.name}: objects read"):
        if not isinstance(annotation, dict):
            continue
        number = str(annotation.get("image_id"))
        name = names.get(str(annotation.get("category_id")))
        if number not in entries or name is None:
            continue
        masked = bool(annotation.get("segmentation")) and is_usable(
            annotation, entries[number], masks=True
        )
        if masked or (not masks and is_usable(annotation, entries[number], masks=False)):
            objects[number].append(_object(annotation, merged.classes[name], masked))
    for number, found in objects.items():
        place = merged.root / entries[number]["file_name"]
        width, height = entries[number]["width"], entries[number]["height"]
        image = merged.images.setdefault(place, LabeledImage(place, width, height, split=split))
        # As in `Annotations`: two equal objects of one entry are two, of two entries are one.
        new = [item for item in found if item not in image.objects]
        if len(new) < len(found):
            merged.repeated += len(found) - len(new)
            merged.repeated_in |= {path, *merged.files[place]}
        image.objects += new
        if path not in merged.files[place]:
            merged.files[place].append(path)


def _object(annotation: dict, label: int, masked: bool) -> LabeledObject:
    """The object of a usable annotation, with its mask if that is usable too."""
    x, y, width, height = annotation["bbox"]
    item = LabeledObject(label, (x, y, width, height), crowd=bool(annotation["iscrowd"]))
    if masked:
        mask = annotation["segmentation"]
        if isinstance(mask, dict):
            item.rle = dict(size=mask["size"], counts=mask["counts"])
        else:
            item.polygons = mask
    return item


def _drop_images_of_two_splits(splits: Mapping[Path, str | None], merged: _Merged) -> None:
    """Leave out images that files of different splits list, with an error for each two files."""
    both: dict[tuple[Path, Path], list[Path]] = defaultdict(list)
    for image, files in merged.files.items():
        first = files[0]
        for other in files[1:]:
            if splits[other] not in (None, splits[first]):
                both[first, other].append(image)
    for (first, other), images in both.items():
        text = (
            f"{len(images)} images are for {splits[other]} here and for {splits[first]} in "
            f"{merged.short(first)}, such as {merged.short(images[0])}; remove them from one of "
            "the two files"
        )
        merged.findings.append(Finding(ERROR, "two splits", str(other), text))
    for image in {image for images in both.values() for image in images}:
        del merged.images[image]
