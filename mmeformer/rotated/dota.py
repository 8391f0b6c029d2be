# SPDX-License-Identifier: Apache-2.0
"""Read and write DOTA label files, and list image folders; does not need mmrotate.

A label file has one line per object, ``x1 y1 x2 y2 x3 y3 x4 y4 class difficult``, in pixels, and
may begin with the lines ``imagesource:...`` and ``gsd:...`` (Xia et al., DOTA, arXiv 1711.10398;
format: captain-whu.github.io/DOTA).
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmeformer.checks.findings import first_of
from mmeformer.files import refuse_url

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_HEADERS = ("imagesource:", "gsd:")
_SHOWN = 5
_LINE = "\n  "


class DotaObject(NamedTuple):
    """One line of a label file.

    Args:
        polygon: (4, 2) float64, corners in pixels.
        name: class name.
        difficult: 0 means not difficult.
        line: line number in the file, from 1.
    """

    polygon: np.ndarray
    name: str
    difficult: int
    line: int


def read_labels(path: str | Path) -> list[DotaObject]:
    """Read one label file; skips header lines and empty lines.

    If the flag ``difficult`` is missing, as in exports of some tools, it is 0.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8 text, has invalid lines or numbers that are not pixels;
            the message names the file, the lines and what is wrong with them.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from error
    objects, bad = [], []
    for number, text in enumerate(lines, start=1):
        fields = text.split()
        if not fields or fields[0].lower().startswith(_HEADERS):
            continue
        try:
            objects.append(_parse(fields, number))
        except ValueError as error:
            bad.append(f"line {number}: {error}: {text.strip()[:100]!r}")
    if bad:
        raise ValueError(
            f"label file {path} has invalid lines; correct them:\n  " + _some(bad, _LINE)
        )
    if _are_normalized(objects):
        raise ValueError(
            f"label file {path} has only numbers between 0 and 1: these are shares of the image's "
            "width and height, as YOLO writes them; multiply x by the width and y by the height"
        )
    return objects


def _are_normalized(objects: list[DotaObject]) -> bool:
    """Whether corners are shares of the image: all in its first pixel, not all on its corners."""
    if not objects:
        return False
    corners = np.stack([item.polygon for item in objects])
    return bool((np.abs(corners) <= 1).all() and (corners % 1 != 0).any())


def _parse(fields: list[str], line: int) -> DotaObject:
    if len(fields) not in (9, 10):
        raise ValueError(
            f"{len(fields)} fields instead of 'x1 y1 x2 y2 x3 y3 x4 y4 class difficult' (separated "
            "by spaces; class names cannot contain spaces)"
        )
    try:
        corners = [float(field) for field in fields[:8]]
    except ValueError:
        raise ValueError("the first 8 fields must be numbers") from None
    if not all(map(math.isfinite, corners)):
        raise ValueError("the first 8 fields must be finite")
    if _is_fraction(fields[8]) and fields[0].isdigit():
        raise ValueError(
            "the class comes first, as in YOLO's format; write 'x1 y1 x2 y2 x3 y3 x4 y4 class "
            "difficult' in pixels, with the name of the class"
        )
    difficult = fields[9] if len(fields) == 10 else "0"
    if not (difficult.isascii() and difficult.isdigit()):
        raise ValueError(f"difficult must be an integer of at least 0, but is {difficult!r}")
    return DotaObject(np.array(corners).reshape(4, 2), fields[8], int(difficult), line)


def _is_fraction(text: str) -> bool:
    """Whether a text is a number with a decimal point."""
    try:
        return "." in text and math.isfinite(float(text))
    except ValueError:
        return False


def _some(items: Collection[str], separator: str = ", ") -> str:
    """Join the first items, and add the number of the others."""
    shown = separator.join(list(items)[:_SHOWN])
    return shown + (f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def format_label(polygon: np.ndarray, name: str, difficult: int) -> str:
    """Format one line of a label file, without line end, as :func:`read_labels` reads it.

    Args:
        polygon: (4, 2) in pixels; rounded to 0.01 px.
        name: class name without spaces.
        difficult: at least 0.
    """
    corners = " ".join(f"{round(float(value), 2):.10g}" for value in np.reshape(polygon, 8))
    return f"{corners} {name} {difficult}"


def read_label_files(
    paths: Iterable[Path], classes: Collection[str], dropped_classes: Collection[str] = ()
) -> list[list[DotaObject]]:
    """Read label files and check their class names.

    Args:
        paths: label files.
        classes: names of the classes to keep.
        dropped_classes: names whose objects are left out on purpose.

    Returns:
        The objects of each file, without those of ``dropped_classes``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has invalid lines (see :func:`read_labels`), or class names that are in
            neither list; the message names the first place of each.
    """
    known, dropped = set(classes), set(dropped_classes)
    files, bad = [], []
    unknown: dict[str, list[str]] = {}
    for path in paths:
        try:
            objects = read_labels(path)
        except ValueError as error:
            bad.append(str(error))
            continue
        files.append([item for item in objects if item.name not in dropped])
        for item in objects:
            if item.name not in known and item.name not in dropped:
                unknown.setdefault(item.name, []).append(f"{path} line {item.line}")
    if bad:
        raise ValueError(_some(bad, "\n"))
    if unknown:
        found = [
            f"{name!r}: {len(places)} objects, the first in {places[0]}"
            for name, places in sorted(unknown.items())
        ]
        raise ValueError(
            f"the label files have {len(unknown)} classes that are not in the config:\n  "
            f"{_some(found, _LINE)}\nThe config has {first_of(list(classes), 20)}. Correct the "
            "labels or metainfo.classes; to leave these objects out on purpose, set "
            f"metainfo.dropped_classes={first_of(sorted(unknown), 20)}"
        )
    return files


def list_images(folder: str | Path, suffix: str | None = None) -> dict[str, Path]:
    """List the images of a folder by name without suffix, in alphabetical order.

    Args:
        folder: folder; subfolders and hidden files are skipped. Or a text file that lists images,
            one path per line, relative to the file or absolute; after a tab, the name of its label
            file may follow (without suffix), if that is not the image's.
        suffix: suffix with or without dot, in any case; None means all of :data:`IMAGE_SUFFIXES`.

    Raises:
        FileNotFoundError: the folder is missing, or has no such file.
        ValueError: two files differ only in their suffix, so that a label file would fit both.
    """
    refuse_url(folder, "image folder")
    folder = Path(folder)
    if folder.is_file():
        return _listed_images(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder} does not exist")
    wanted = IMAGE_SUFFIXES if suffix is None else ("." + suffix.lower().removeprefix("."),)
    images: dict[str, Path] = {}
    others = set()
    for name in sorted(os.listdir(folder)):
        stem, ending = os.path.splitext(name)
        if name.startswith("."):
            continue
        if ending.lower() not in wanted:
            others.add(ending)
        elif stem in images:
            raise ValueError(
                f"{images[stem]} and {folder / name} differ only in their suffix; rename one"
            )
        else:
            images[stem] = folder / name
    if not images:
        found = f"; the files there end in {sorted(others)}" if others else ", which is empty"
        raise FileNotFoundError(f"no image ({', '.join(wanted)}) in folder {folder}{found}")
    return images


def _listed_images(file: Path) -> dict[str, Path]:
    """The images that a text file lists, by name; see :func:`list_images`."""
    images: dict[str, Path] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        place, _, name = line.strip().partition("\t")
        path = file.parent / place
        name = name or path.stem
        if not path.is_file():
            raise FileNotFoundError(f"{file} line {number}: image {path} does not exist")
        if name in images:
            raise ValueError(
                f"{file} line {number}: {path} has the same name as {images[name]}; give it one of "
                "its own after a tab"
            )
        images[name] = path
    if not images:
        raise FileNotFoundError(f"{file} lists no image")
    return dict(sorted(images.items()))


def list_labels(folder: str | Path) -> dict[str, Path]:
    """List the label files (``.txt``) of a folder by name without suffix, in alphabetical order.

    Raises:
        FileNotFoundError: the folder is missing, or has no such file.
    """
    refuse_url(folder, "label folder")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"label folder {folder} does not exist")
    labels = {
        name[: -len(".txt")]: folder / name
        for name in sorted(os.listdir(folder))
        if name.endswith(".txt") and not name.startswith(".")
    }
    if not labels:
        raise FileNotFoundError(f"no label file (.txt) in folder {folder}")
    return labels
