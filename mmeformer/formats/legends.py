# SPDX-License-Identifier: Apache-2.0
"""Legends: files that name the classes and colors of masks.

``class_dict.csv``, CVAT's ``labelmap.txt``, ``label_colors.txt``, or JSON.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

from mmeformer.errors import UserError
from mmeformer.formats.tree import Options, Tree, read_names

_LEGENDS = ("labelmap.txt", "label_colors.txt", "label_colours.txt", "class_dict.csv")
_IGNORED_NAMES = ("void", "ignore", "unlabeled", "unlabelled", "unknown")

Color = tuple[int, int, int]


class Legend(NamedTuple):
    """Names of classes, with the color of each.

    Args:
        names: of the classes.
        colors: one for each, or None if the file has only names.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...] | None


def find_legend(tree: Tree, options: Options) -> Legend | None:
    """The legend that the user gives, else that of the folder."""
    if options.legend is not None:
        if not options.legend.is_file():
            raise UserError(f"--legend {options.legend} does not exist")
        return read_legend(options.legend)
    found = [path for path in tree.files if path.name.lower() in _LEGENDS]
    if found:
        return read_legend(found[0])
    named = [path for path in tree.files if path.name.lower() in ("classes.txt", "labels.txt")]
    return Legend(tuple(read_names(named[0])), None) if named else None


def read_legend(path: Path) -> Legend:
    """Read names and colors of classes.

    Understands ``name,red,green,blue`` (also with a header line), CVAT's
    ``name:red,green,blue::``, CamVid's ``red green blue name``, and JSON: a mapping from name to
    color, or a list of mappings with ``name`` and ``color``.

    Raises:
        UserError: a line is none of these; the message names it.
    """
    rows = _rows_of_json(path) if path.suffix.lower() == ".json" else _rows_of_text(path)
    return Legend(tuple(name for name, _ in rows), tuple(color for _, color in rows))


def _rows_of_json(path: Path) -> list[tuple[str, Color]]:
    try:
        content = json.loads(path.read_bytes())
        items = (
            content.items()
            if isinstance(content, dict)
            else [(entry["name"], entry["color"]) for entry in content]
        )
        return [(str(name), _color(color)) for name, color in items]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"legend {path} is not JSON of names and colors ({error})") from error


def _rows_of_text(path: Path) -> list[tuple[str, Color]]:
    rows = []
    for number, line in enumerate(read_names(path), start=1):
        if line.startswith("#"):
            continue
        try:
            rows.append(_row(line))
        except ValueError as error:
            if number == 1 and "," in line:
                continue  # a header
            raise UserError(
                f"legend {path} line {number}: {line!r} is not name,red,green,blue ({error})"
            ) from error
    return rows


def _row(line: str) -> tuple[str, Color]:
    if ":" in line:
        name, color = line.split(":")[:2]
        return name.strip(), _color(color.split(","))
    if "," in line:
        fields = next(csv.reader([line]))
        return fields[0].strip(), _color(fields[1:4])
    fields = line.split(maxsplit=3)
    return fields[3].strip() if len(fields) == 4 else "", _color(fields[:3])


def _color(values) -> Color:
    red, green, blue = (int(value) for value in values)
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise ValueError("colors go from 0 to 255")
    return red, green, blue


def learned(legend: Legend) -> tuple[tuple[str, ...], tuple[Color, ...], list[Color]]:
    """Names and colors of a legend without those that mean "no label", and the colors of these."""
    rows = list(zip(legend.names, legend.colors or (), strict=True))
    kept = [row for row in rows if row[0].lower() not in _IGNORED_NAMES]
    ignored = [color for name, color in rows if name.lower() in _IGNORED_NAMES]
    return tuple(name for name, _ in kept), tuple(color for _, color in kept), ignored
