# SPDX-License-Identifier: Apache-2.0
"""Checks of images and label masks for errors that cause crashes or silently lower scores."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from mmeformer.checks.findings import ERROR, WARNING, Finding, errors_first, first_of
from mmeformer.checks.images import (
    UNREADABLE,
    check_depth,
    decode_fault,
    in_threads,
    layout_fault,
    quick_fault,
    read_header,
)
from mmeformer.images import PLAIN, Reading


@dataclass(frozen=True)
class _Labels:
    """Content of one mask: label value -> number of pixels, or why it could not be read.

    ``colors`` are those of its palette, label value -> (red, green, blue); empty without palette.
    """

    image: str
    mask: str
    counts: dict[int, int]
    finding: Finding | None = None
    colors: dict[int, tuple[int, ...]] = field(default_factory=dict)


def check_pairs(
    pairs: Sequence[tuple[str, str]],
    classes: Sequence[str],
    *,
    reduce_zero_label: bool,
    ignore_index: int = 255,
    training: bool = True,
    limit: int | None = None,
    decode: bool = False,
    reading: Reading | None = PLAIN,
) -> list[Finding]:
    """Check images and their label masks.

    Checks that all masks exist. For the first ``limit`` pairs, reads the whole mask, as mmseg does,
    and the header and the end of the image.

    Args:
        pairs: paths of images and masks.
        classes: names of the classes, in the order of their labels.
        reduce_zero_label: value 0 means "other" and the classes have the values 1, 2, ...; if False
            they have 0, 1, ...
        ignore_index: value of unlabeled pixels.
        training: warn about classes that do not occur.
        limit: number of pairs to read; None reads all.
        decode: decode the images in full too.
        reading: see :func:`mmeformer.checks.images.check_images`.

    Returns:
        The problems, errors first; kinds: ``missing mask``, ``unreadable image``, ``unreadable
        mask``, ``color mask``, ``size mismatch``, ``label out of range``, ``one class``,
        ``0/255 masks``, ``nothing to tell apart``, ``reduce_zero_label``, ``nothing labeled``,
        ``unused class``, ``different palettes``, ``bands or depth``, ``deep image``.
    """
    exists = in_threads(os.path.isfile, [mask for _, mask in pairs])
    readable = [pair for pair, found in zip(pairs, exists, strict=True) if found][:limit]
    read = in_threads(partial(_read_pair, decode=decode, reading=reading), readable, "masks read")
    findings = [
        Finding(
            ERROR,
            "missing mask",
            image,
            f"has no mask: {mask} does not exist; add it, remove the image, or correct "
            "seg_map_suffix",
        )
        for (image, mask), found in zip(pairs, exists, strict=True)
        if not found
    ]
    findings += [labels.finding for labels in read if labels.finding is not None]
    findings += _check_palettes(read)
    if reading is None or reading.stretch is None:
        findings += check_depth([labels.image for labels in read if labels.finding is None])
    if masks := [labels for labels in read if labels.counts]:
        complete = training and len(read) == len(pairs)
        findings += _check_labels(
            _MaskSet(masks, classes, reduce_zero_label, ignore_index, complete)
        )
    return errors_first(findings)


def find_masks_without_image(
    pairs: Iterable[tuple[str, str]], mask_dir: str, suffix: str
) -> list[Finding]:
    """Findings about masks below ``mask_dir`` (files ending in ``suffix``) that are in no pair."""
    known = {os.path.normpath(mask) for _, mask in pairs}
    return [
        Finding(
            WARNING,
            "mask without image",
            str(mask),
            "belongs to no image and is not used; add the image, or correct img_suffix",
        )
        for mask in sorted(Path(mask_dir).rglob(f"*{suffix}"))
        if os.path.normpath(mask) not in known
    ]


def _read_pair(pair: tuple[str, str], decode: bool, reading: Reading | None) -> _Labels:
    """Read the label values of a mask, and check the pair of files."""
    image, mask = pair

    def wrong(kind: str, path: str, message: str) -> _Labels:
        return _Labels(image, mask, {}, Finding(ERROR, kind, path, message))

    if fault := decode_fault(image) if decode else quick_fault(image):
        return wrong("unreadable image", image, f"cannot be read: it {fault}")
    try:
        header = read_header(image)
        image_size = header.height, header.width
    except UNREADABLE as error:
        return wrong("unreadable image", image, f"cannot be read ({error}); copy it again")
    if (fault := layout_fault(header.layout, reading)) is not None:
        return wrong("bands or depth", image, fault)
    try:
        with Image.open(mask) as opened:
            labels = np.asarray(opened).squeeze()
            palette = np.reshape(opened.getpalette("RGB") or (), (-1, 3)).tolist()
    except UNREADABLE as error:
        return wrong("unreadable mask", mask, f"cannot be read ({error}); export it again")
    if labels.ndim < 2:
        return wrong(
            "thin mask",
            mask,
            "is 1 px high or wide, which mmseg cannot read; leave it out",
        )
    if labels.ndim != 2:
        return wrong(
            "color mask",
            mask,
            f"has shape {labels.shape}, so its pixels are colors; save one channel with the label "
            "of each pixel",
        )
    if not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        return wrong(
            "unreadable mask", mask, f"has {labels.dtype} numbers; save labels as 8-bit integers"
        )
    if labels.shape != image_size:
        return wrong(
            "size mismatch",
            mask,
            f"is {labels.shape[1]} x {labels.shape[0]} px, but its image {image} is "
            f"{image_size[1]} x {image_size[0]} px; make them the same size",
        )
    if labels.dtype in (np.uint8, bool):
        counts = np.bincount(labels.astype(np.uint8).reshape(-1), minlength=256)
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(labels, return_counts=True)
    colors = {value: tuple(palette[value]) for value in values.tolist() if value < len(palette)}
    return _Labels(
        image, mask, dict(zip(values.tolist(), counts.tolist(), strict=True)), colors=colors
    )


def _check_palettes(read: Sequence[_Labels]) -> list[Finding]:
    """An error if one color has different values in two masks, as in colors quantized by file."""
    first: dict[tuple[int, ...], tuple[int, str]] = {}
    for item in read:
        # A color that a palette has twice tells nothing.
        repeated = Counter(item.colors.values())
        for value, color in item.colors.items():
            if repeated[color] > 1:
                continue
            other, mask = first.setdefault(color, (value, item.mask))
            if other != value:
                return [
                    Finding(
                        ERROR,
                        "different palettes",
                        item.mask,
                        f"has the value {value} for the color {color} (red, green, blue), but in "
                        f"{mask} this color has {other}: the values are numbers of colors, chosen "
                        "file by file, and no labels. Save every color as the label of its class",
                    )
                ]
    return []


@dataclass(frozen=True)
class _MaskSet:
    """Masks that were read, at least one, and what their values may mean.

    Args:
        masks: with label values.
        classes, reduce_zero_label, ignore_index: as in :func:`check_pairs`.
        complete: these are all masks of a training set, so that a class they lack is missing.
    """

    masks: Sequence[_Labels]
    classes: Sequence[str]
    reduce_zero_label: bool
    ignore_index: int
    complete: bool

    @cached_property
    def labels(self) -> range:
        """Values of the classes."""
        first = 1 if self.reduce_zero_label else 0
        return range(first, first + len(self.classes))

    @cached_property
    def seen(self) -> set[int]:
        """Values in any mask."""
        return {value for item in self.masks for value in item.counts}

    @cached_property
    def beyond(self) -> set[int]:
        """Those that mean nothing."""
        return self.seen - {*self.labels, self.ignore_index, *range(self.labels.start)}

    @property
    def folder(self) -> str:
        return str(Path(self.masks[0].mask).parent)

    def first_with(self, value: int) -> str:
        """Path of the first mask that has a value."""
        return next(item.mask for item in self.masks if value in item.counts)


def _check_labels(found: _MaskSet) -> list[Finding]:
    """Findings about the values in masks."""
    if (finding := _nothing_to_learn(found)) is not None:
        return [finding]
    return [*_check_range(found), *_check_unlabeled(found), *_check_unused(found)]


def _nothing_to_learn(found: _MaskSet) -> Finding | None:
    """An error if a model would learn nothing from all masks together, whatever else is wrong."""
    classes, ignore_index, seen = found.classes, found.ignore_index, found.seen
    if len(classes) == 1:
        text = _one_class(classes[0], ignore_index if ignore_index in seen else None)
        return Finding(ERROR, "one class", found.folder, text)
    if seen == {0, ignore_index}:
        learned = "nothing" if found.reduce_zero_label else "only value 0"
        fix = f"Save {ignore_index} as 1 (or as the label of {classes[-1]!r})"
        if found.reduce_zero_label:
            fix += ", and set reduce_zero_label=False if 0 is a class too"
        return Finding(
            ERROR,
            "0/255 masks",
            found.first_with(ignore_index),
            f"has, like all {len(found.masks)} masks read, only 0 and {ignore_index}, and "
            f"{ignore_index} means 'unlabeled': {learned} would be learned. {fix}",
        )
    used = [name for value, name in zip(found.labels, classes, strict=True) if value in seen]
    if found.complete and not found.beyond and len(used) < 2:
        what = f"the one class {used[0]!r}" if used else "no class"
        return Finding(
            ERROR,
            "nothing to tell apart",
            found.folder,
            f"all {len(found.masks)} masks together have {what} of {len(classes)} (values "
            f"{sorted(seen)}): nothing would be learned; correct the masks, or `classes` and "
            "reduce_zero_label in the config",
        )
    return None


def _check_range(found: _MaskSet) -> list[Finding]:
    """Errors about values that are no label."""
    count = len(found.classes)
    if not found.reduce_zero_label and found.beyond == {count}:
        return [
            Finding(
                ERROR,
                "reduce_zero_label",
                found.first_with(count),
                f"has the value {count}, but {count} classes have the values 0 to {count - 1}. If "
                f"value 0 means 'other' and {count} is {found.classes[-1]!r}, set "
                "reduce_zero_label=True; otherwise a class is missing in `classes`",
            )
        ]
    return [_out_of_range(item, found) for item in found.masks if found.beyond & item.counts.keys()]


def _check_unlabeled(found: _MaskSet) -> list[Finding]:
    """Warnings about masks without a class."""
    known = {*found.labels, *found.beyond}
    return [
        Finding(
            WARNING,
            "nothing labeled",
            item.mask,
            f"has only {' and '.join(map(str, sorted(item.counts)))}: no pixel of any class; "
            "correct the mask or remove it",
        )
        for item in found.masks
        if not item.counts.keys() & known
    ]


def _check_unused(found: _MaskSet) -> list[Finding]:
    """Findings about classes that no mask has."""
    labels, classes = found.labels, found.classes
    unused = [name for value, name in zip(labels, classes, strict=True) if value not in found.seen]
    # Value 0 and all classes but the last one occur: this is typical of masks that count from 0.
    if found.reduce_zero_label and 0 in found.seen and unused == [classes[-1]]:
        return [
            Finding(
                ERROR if found.complete else WARNING,
                "reduce_zero_label",
                found.folder,
                f"none of the {len(found.masks)} masks read has {labels[-1]} ({classes[-1]!r} with "
                "reduce_zero_label=True), but 0, which would be ignored, occurs. If 0 is "
                f"{classes[0]!r}, set reduce_zero_label=False; if 0 means 'other', "
                f"{classes[-1]!r} has no pixels here",
            )
        ]
    if found.complete and unused:
        return [
            Finding(
                WARNING,
                "unused class",
                found.folder,
                f"{first_of(unused, 20)} have no pixel in any mask and cannot be learned; correct "
                "`classes`, their order or the masks",
            )
        ]
    return []


def _one_class(name: str, unlabeled: int | None) -> str:
    background = "other" if name == "background" else "background"
    masks = "" if unlabeled is None else f". If {unlabeled} is {name!r}, save it as 1"
    return (
        f"belongs to a config with the one class {name!r}: it competes with nothing, so the loss "
        f"is always 0. Name what is not {name!r} as well: classes=({background!r}, {name!r}) with "
        f"reduce_zero_label=False (masks: 0 and 1){masks}"
    )


def _out_of_range(item: _Labels, found: _MaskSet) -> Finding:
    wrong = sorted(found.beyond & item.counts.keys())
    values = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
    pixels = sum(item.counts[value] for value in wrong)
    hint = "correct the mask, or `classes` in the config"
    if item.mask.lower().endswith((".jpg", ".jpeg")):
        hint = "JPEG compression changes values; save masks as PNG"
    return Finding(
        ERROR,
        "label out of range",
        item.mask,
        f"has {values} ({pixels} pixels), but labels go from {found.labels[0]} to "
        f"{found.labels[-1]}, and {found.ignore_index} means 'unlabeled'; {hint}",
    )
