# SPDX-License-Identifier: Apache-2.0
"""YOLO text labels: boxes, outlines and rotated boxes, with or without ``data.yaml``.

A line is ``class x y width height`` (center and size), ``class x1 y1 x2 y2 ...`` (an outline) or
``class x1 y1 ... x4 y4`` (corners of a rotated box), all as shares of the image's width and height.
Format: https://docs.ultralytics.com/datasets/detect, ``/segment`` and ``/obb``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from mmeformer.bars import counted
from mmeformer.checks.findings import ERROR, WARNING, Finding
from mmeformer.errors import UserError
from mmeformer.formats.lists import split_by_lists
from mmeformer.formats.tree import (
    SPLIT_KEYS,
    Options,
    Tree,
    class_names,
    read_names,
    read_sizes,
    read_text,
    sample,
)
from mmeformer.labeled import (
    BOXES,
    CORNERS,
    POLYGONS,
    LabeledData,
    LabeledImage,
    LabeledObject,
    note_of_boxes,
)

NAME = "YOLO"
_NAME_FILES = ("classes.txt", "obj.names", "labels.txt")
_SETTINGS = (".yaml", ".yml")
_BEYOND = 1e-3
"""Share of the image by which a point may lie outside it, by rounding."""
_MOST = 0.25
_RIGHT = 0.03
"""Corners of a rotated box may miss the right angle by this (its cosine)."""


class _Line(NamedTuple):
    """A valid line of a label file.

    Args:
        number: from 1.
        label: class.
        values: the numbers behind it, shares of width and height in turn.
    """

    number: int
    label: int
    values: NDArray[np.float64]


def find(tree: Tree) -> list[Path]:
    """``data.yaml``, or label files."""
    return _settings_files(tree) or [
        path for path in sample(tree.named_like_images(".txt")) if _looks_like_labels(path)
    ]


def _settings_files(tree: Tree) -> list[Path]:
    found = []
    for path in tree.with_suffix(*_SETTINGS):
        try:
            content = yaml.safe_load(read_text(path))
        except (yaml.YAMLError, ValueError):
            if path.stem in ("data", "dataset"):
                found.append(path)
            continue
        if isinstance(content, dict) and "names" in content and {"train", "val"} & content.keys():
            found.append(path)
    return found


def is_settings(path: Path) -> bool:
    """Whether a path is a file like ``data.yaml``, by its suffix."""
    return path.suffix.lower() in _SETTINGS and path.is_file()


def folder_of(settings: Path) -> Path:
    """The folder of images and labels that a ``data.yaml`` is for: its ``path``, else its own.

    Raises:
        UserError: the file is none of YOLO, or there is no such folder.
    """
    base = Path(str(_read_settings(settings).get("path") or "."))
    for folder in (settings.parent / base, base):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{settings}: path: {base} is no folder; correct it, or give the folder of the data instead"
    )


def _looks_like_labels(path: Path) -> bool:
    try:
        lines = read_names(path)
        fields = lines[0].split() if lines else []
        numbers = [float(field) for field in fields[1:]]
    except ValueError:
        return False
    return len(numbers) >= 4 and fields[0].isdigit() and all(0 <= x <= 1 for x in numbers)


def read(tree: Tree, options: Options) -> LabeledData:
    """Read the images that ``data.yaml`` names, else all, with their labels."""
    settings = [options.settings] if options.settings else _settings_files(tree)
    if len(settings) > 1:
        listed = ", ".join(str(path.relative_to(tree.root)) for path in settings)
        raise UserError(f"{tree.root} has several sets: {listed}; give one of these files instead")
    notes: list[str] = []
    has_points = False
    if settings:
        content = _read_settings(settings[0])
        if has_points := "kpt_shape" in content:
            notes.append("keypoints are left out; the boxes are read")
        names = _names(content["names"], settings[0])
        images = _images_of(content, settings[0], tree, notes)
    else:
        named = [path for path in tree.files if path.name.lower() in _NAME_FILES]
        names = read_names(named[0]) if named else []
        images = {path: tree.split_of(path) for path in tree.images}
        if not named and not options.classes:
            notes.append("no data.yaml or classes.txt names the classes; name them with --classes")
    labels = {path: _label_of(path, tree) for path in (*tree.images, *images)}
    if settings:
        notes += _without_labels(images, labels)
        if others := [path for path in tree.images if path not in images]:
            where = f"are not in {settings[0].name} and left out"
            notes.append(f"{len(others)} images {where}, such as {others[0]}")
    else:
        # Without a list of images, one without a label file was rather not labeled.
        if bare := [path for path in images if labels[path] is None]:
            notes.append(
                f"{len(bare)} images have no label file and are left out, such as {bare[0]}"
            )
        images = {path: split for path, split in images.items() if labels[path] is not None}
    notes += _without_images(tree, labels)
    findings: list[Finding] = []
    sizes = read_sizes(images, findings)
    found = [
        LabeledImage(path, *sizes[path], split=split, source=labels[path])
        for path, split in images.items()
        if path in sizes
    ]
    if not settings:
        split_by_lists(tree, found, notes)
    lines = [
        (image, line)
        for image in counted(found, "label files read")
        if image.source is not None
        for line in _read_labels(image.source, len(names), findings, has_points)
    ]
    kind = _kind(lines, options)
    for image, line in lines:
        image.objects.append(_object(line, image, kind))
    notes += note_of_boxes(found)
    count = max([len(names), *(line.label + 1 for _, line in lines)])
    classes = class_names(count, options, names)
    return LabeledData(NAME, tree.root, kind, tuple(classes), found, findings, notes)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" line {mark.line + 1}"
        raise UserError(
            f"{path}{place} is not YAML ({getattr(error, 'problem', error)})"
        ) from error
    if not isinstance(content, dict) or "names" not in content:
        raise UserError(f"{path} has no entry names; add the names of the classes")
    return content


def _names(value: Any, path: Path) -> list[str]:
    """Names by number, from a list or a mapping."""
    if isinstance(value, dict):
        try:
            numbered = {int(number): str(name) for number, name in value.items()}
        except (TypeError, ValueError):
            numbered = {}
        if sorted(numbered) == [*range(len(numbered))] and numbered:
            return [numbered[number] for number in range(len(numbered))]
    elif isinstance(value, list) and value:
        return [str(name) for name in value]
    raise UserError(f"{path}: names must be a list, or a mapping from 0, 1, ... to names")


def _images_of(content: dict, path: Path, tree: Tree, notes: list[str]) -> dict[Path, str | None]:
    """The images of each split: of folders, of text files with a path a line, or of lists.

    Adds a note for test images that do not exist: exports name them, and training needs none. Adds
    one for images of two splits, which count for the first.
    """
    base = Path(str(content.get("path") or "."))
    bases = [base, path.parent / base, path.parent, tree.root]
    images: dict[Path, str | None] = {}
    for key, split in SPLIT_KEYS.items():
        places = content.get(key)
        for place in [places] if isinstance(places, str) else places or []:
            found, missing = _listed(str(place), bases, tree)
            both = [image for image in found if images.setdefault(image, split) != split]
            if both:
                first = images[both[0]]
                notes.append(
                    f"{path}: {key}: {len(both)} of its images are for {first} too, and count "
                    f"there, such as {both[0]}"
                )
            if missing and split != "test":
                raise UserError(f"{path}: {key}: {missing}; correct it")
            if missing:
                notes.append(f"{path}: {key}: {missing}: no test images from there")
    return images


def _listed(place: str, bases: Sequence[Path], tree: Tree) -> tuple[list[Path], str]:
    """Images below a folder, or those that a text file lists, and in words what does not exist.

    Args:
        place: folder or file, relative to one of ``bases``.
    """
    # Roboflow writes ../train/images for what lies beside data.yaml.
    plain = place.replace("\\", "/")
    tries = [Path(b, p) for p in (plain, plain.removeprefix("../")) for b in bases]
    root = tree.root.resolve()
    existing = (path.resolve() for path in tries if path.exists())
    found = next((path for path in existing if path.is_relative_to(root)), None)
    if found is None:
        return [], f"{place} does not exist below {tree.root}"
    if found.is_dir():
        return [path for path in tree.images if path.resolve().is_relative_to(found)], ""
    images = {name: tree.find_image(name, found) for name in read_names(found)}
    gone = [name for name, image in images.items() if image is None]
    kept = [image for image in images.values() if image is not None]
    if gone:
        return kept, f"{place} lists {len(gone)} images that do not exist, such as {gone[0]}"
    return kept, ""


def _label_of(image: Path, tree: Tree) -> Path | None:
    """The label file: in the folder ``labels`` instead of ``images``, or beside the image."""
    name = f"{image.stem}.txt"
    parts = list(image.parent.relative_to(tree.root).parts)
    places = [image.parent]
    for index in reversed(range(len(parts))):
        if parts[index].lower() in ("images", "jpegimages"):
            places.insert(0, tree.root.joinpath(*parts[:index], "labels", *parts[index + 1 :]))
            break
    places.append(image.parent.parent / "labels")
    return next(filter(None, (tree.find_label(place / name) for place in places)), None)


def _without_labels(
    images: Mapping[Path, str | None], labels: Mapping[Path, Path | None]
) -> list[str]:
    """A note on the images without a label file, if there are any.

    Args:
        images: split of each.
        labels: label file of each.
    """
    bare = [path for path in images if labels[path] is None]
    if not bare:
        return []
    total, counts = Counter(images.values()), Counter(images[path] for path in bare)
    listed = " and ".join(f"{count} of {total[split]} {split}" for split, count in counts.items())
    return [f"{listed} images have no label file (background), such as {bare[0]}"]


def _without_images(tree: Tree, labels: Mapping[Path, Path | None]) -> list[str]:
    """A note on the label files of no image, if there are any: their names may differ."""
    used = set(labels.values())
    others = [path for path in tree.with_suffix(".txt") if path not in used]
    lost = [path for path in others if _looks_like_labels(path)]
    return [f"{len(lost)} label files have no image, such as {lost[0]}"] if lost else []


def _read_labels(
    path: Path, classes: int, findings: list[Finding], has_points: bool
) -> list[_Line]:
    """The valid lines, without the keypoints behind a box."""
    found: list[_Line] = []
    seen: set[str] = set()
    try:
        lines = read_text(path).splitlines()
    except ValueError as error:
        findings.append(Finding(ERROR, "bad label file", str(path), str(error)))
        return []
    for number, line in enumerate(lines, start=1):
        fields = line.split()[: 5 if has_points else None]
        if not fields:
            continue
        if fault := _fault(fields, classes):
            text = f"line {number}: {fault}: {line.strip()[:80]!r}"
            findings.append(Finding(ERROR, "bad label line", str(path), text))
        elif line in seen:
            text = f"line {number} repeats an earlier one, which counts once"
            findings.append(Finding(WARNING, "repeated line", str(path), text))
        else:
            found.append(_Line(number, int(float(fields[0])), np.array(fields[1:], np.float64)))
        seen.add(line)
    return found


def _fault(fields: list[str], classes: int) -> str | None:
    try:
        number, *values = map(float, fields)
    except ValueError:
        return "must be numbers only"
    if not all(map(math.isfinite, [number, *values])):
        return "must be finite numbers"
    if number < 0 or number % 1 or (classes and number >= classes):
        known = f", but the names go from 0 to {classes - 1}" if classes else ""
        return f"the class is {fields[0]}{known}"
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        return f"has {len(values)} numbers after the class; 4 make a box, 6, 8, ... an outline"
    if max(values) > 1 + _BEYOND or min(values) < -_BEYOND:
        return "numbers must be shares of the image's width and height, from 0 to 1"
    return None


def _kind(lines: Sequence[tuple[LabeledImage, _Line]], options: Options) -> str:
    """Kind of the labels. Four points in every line are corners if most make right angles."""
    shapes = {len(line.values) for _, line in lines}
    if not shapes or 4 in shapes:
        return BOXES
    if shapes != {8} or options.corners is False:
        return POLYGONS
    right = [
        _is_rectangle(np.reshape(line.values, (4, 2)) * (image.width, image.height))
        for image, line in lines
    ]
    # Of DOTA's own boxes, many are not quite rectangles.
    if options.corners or np.mean(right) >= _MOST:
        return CORNERS
    raise UserError(
        f"every label has four points, but only {sum(right)} of {len(right)} make rectangles: are "
        f"they corners of rotated boxes or outlines? Answer with {options.answer}"
    )


def _is_rectangle(corners: np.ndarray) -> bool:
    """Whether four points (4, 2) make right angles, up to a pixel of rounding."""
    sides = np.roll(corners, -1, 0) - corners
    lengths = np.maximum(np.hypot(*sides.T), 1e-9)
    cosines = np.abs((sides * np.roll(sides, -1, 0)).sum(1)) / (lengths * np.roll(lengths, -1))
    return bool((cosines <= _RIGHT + 1 / np.minimum(lengths, np.roll(lengths, -1))).all())


def _object(line: _Line, image: LabeledImage, kind: str) -> LabeledObject:
    place = f"line {line.number}"
    points = (line.values.reshape(-1, 2) * (image.width, image.height)).ravel().tolist()
    if len(points) == 4:
        x, y, width, height = points
        box = (x - width / 2, y - height / 2, width, height)
        return LabeledObject(line.label, box, place=place)
    if kind == CORNERS:
        return LabeledObject.cornered(line.label, points, place=place)
    return LabeledObject.outlined(line.label, [points], place=place)
