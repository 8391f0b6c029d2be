# SPDX-License-Identifier: Apache-2.0
"""Masks: one file for each image, whose pixels are numbers, palette entries or colors of classes.

Recognized names are those of ADE20K (``annotations``), Cityscapes (``_gtFine_labelIds``), Pascal
VOC (``SegmentationClass``), CamVid (``_L``), and folders or endings such as ``masks`` and
``_mask``. A legend names the colors or numbers: see :mod:`mmeformer.formats.legends`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmeformer.checks.findings import ERROR, Finding, first_of
from mmeformer.checks.images import UNREADABLE, in_threads
from mmeformer.errors import UserError
from mmeformer.formats.legends import Color, Legend, find_legend, learned
from mmeformer.formats.lists import split_by_lists
from mmeformer.formats.tree import (
    IMAGE_FOLDERS,
    Options,
    Tree,
    class_names,
    is_drawn,
    read_sizes,
    split_word,
)
from mmeformer.labeled import MASKS, UNLABELED, LabeledData, LabeledImage

NAME = "masks"
_MASK_FOLDER = re.compile(
    r"^(masks?|labels?|annotations?|annots?|gt|ground_?truth|segmentationclass(aug)?|gtfine|"
    r"label_?ids?|seg(mentation)?s?|(train|val|valid|test)_?(masks?|labels?|annot))$"
)
_MASK_ENDING = re.compile(
    r"(_gt(Fine|Coarse)_label(Train)?Ids|[_-]((?i:masks?|labels?|seg|segmentation|gt)|L|labelIds))$"
)
_NO_MASK = re.compile(r"_(gt(Fine|Coarse)_)?(color|instanceIds)$")
_IMAGE_ENDING = re.compile(r"(_leftImg8bit|(?i:_image|_img|[_-]sat))$")
_MANY = 64
"""A mask of more colors than these is a photo, or was saved as JPEG."""
_STEPS = 3
"""Edges are soft from this many values between two on; one is the border class of trimaps."""
_ENDS = 0.6
"""Share of the pixels that have the two values between which edges are soft, at least."""
_RISING = 0.6
"""Share of the pixels between them that lie between their neighbors, at least: of blurred,
resized and JPEG masks 64 to 100%, of labels with thin and tiny objects below 50%."""
_TRIED = 20
_LOOKED_AT = 5
"""Images of a folder that tell whether they are photographs."""
_PIXELS = 2**20
"""About this many pixels of each are enough."""
_BULK = 0.9
"""Share of the pixels of a photograph that has more than :data:`_MANY` values."""
_FLAT = 0.5
"""Share of the pixels of a photograph that equal their neighbor, at most; of masks, nearly all."""
_PHOTOS = "photographs"
"""Key of ``Tree.found`` for folders with names of masks, but of photographs."""

# The 19 classes that count, of cityscapesScripts' helpers/labels.py, by their numbers in labelIds.
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
# http://host.robots.ox.ac.uk/pascal/VOC/voc2012, in the order of the numbers.
VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip


def find(tree: Tree) -> list[Path]:
    """Masks that belong to an image."""
    return [mask for _, mask in _pairs(tree)[0]]


def _is_mask(path: Path, tree: Tree) -> bool:
    if path.suffix.lower() not in (".png", ".bmp", ".tif", ".tiff") or _NO_MASK.search(path.stem):
        return False
    return in_mask_folder(path, tree) or _MASK_ENDING.search(path.stem) is not None


def in_mask_folder(path: Path, tree: Tree) -> bool:
    """Whether an image lies below a folder such as ``masks``, which is no class."""
    return any(
        _MASK_FOLDER.match(name.lower()) and Path(*path.parts[:end]) not in _photo_folders(tree)
        for end, name in enumerate(path.parts[:-1], start=1)
        if end > len(tree.root.parts)
    )


def _photo_folders(tree: Tree) -> list[Path]:
    """Folders called ``mask`` or the like that are classes: photographs, beside other classes."""
    if _PHOTOS not in tree.found:
        holders = {path.parent for path in tree.images}
        folders = {
            folder
            for holder in holders
            for folder in (holder, *holder.parents)
            if folder != tree.root and folder.is_relative_to(tree.root)
        }
        classes = {
            folder
            for folder in folders
            if folder.name.lower() not in IMAGE_FOLDERS and not split_word(folder.name)
        }
        tree.found[_PHOTOS] = [
            folder
            for folder in classes
            if _MASK_FOLDER.match(folder.name.lower())
            and any(other.parent == folder.parent for other in classes - {folder})
            and _are_photos([path for path in tree.images if folder in path.parents])
        ]
    return tree.found[_PHOTOS]


def _are_photos(paths: Sequence[Path]) -> bool:
    """Whether most of some images are plainly photographs, and no masks."""
    some = paths[:: max(1, len(paths) // _LOOKED_AT)][:_LOOKED_AT]
    return sum(map(_is_photo, some)) > len(some) / 2


def _is_photo(path: Path) -> bool:
    try:
        array, kind, _ = _open(path)
    except UNREADABLE:
        return False
    array = array[:: max(1, array.size // _PIXELS)]
    flat = np.mean(array[:, 1:] == array[:, :-1]) if array.shape[1] > 1 else 1.0
    # Of masks saved with loss, only the last bits of colors vary.
    values = array >> 3 & 0x1F1F1F if kind == "colors" else array
    largest = np.sort(np.unique(values, return_counts=True)[1])[: -_MANY - 1 : -1]
    return bool(flat < _FLAT and largest.sum() < _BULK * array.size)


def _pairs(tree: Tree) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    """Images with their masks: those of one stem, in the folders that are most alike.

    Second are further masks, each with the one that was there first.
    """
    images: dict[str, list[Path]] = defaultdict(list)
    masks = []
    for path in tree.images:
        if _is_mask(path, tree):
            masks.append(path)
        elif not _NO_MASK.search(path.stem) and not is_drawn(path):
            images[_IMAGE_ENDING.sub("", path.stem)].append(path)
    if any(mask.stem.endswith("labelTrainIds") for mask in masks):
        masks = [mask for mask in masks if not mask.stem.endswith("labelIds")]
    found: dict[Path, Path] = {}
    others = []
    for mask in masks:
        same = images.get(mask.stem) or images.get(_MASK_ENDING.sub("", mask.stem)) or []
        if same:
            split = tree.split_of(mask)

            def likeness(image: Path, mask: Path = mask, split: str | None = split):
                shared = set(image.parts) & set(mask.parts)
                return tree.split_of(image) == split, len(shared), -len(image.parts)

            if (first := found.setdefault(max(same, key=likeness), mask)) != mask:
                others.append((mask, first))
    return sorted(found.items()), others


def read(tree: Tree, options: Options) -> LabeledData:
    """Read all masks once, for their values; folders or lists tell the splits."""
    pairs, further = _pairs(tree)
    if not pairs:
        raise UserError(
            f"{tree.root} has no mask with the name of an image; put them into folders such as "
            "images/ and masks/"
        )
    findings: list[Finding] = []
    sizes = read_sizes([image for image, _ in pairs], findings)
    read = in_threads(_values, [mask for _, mask in pairs], "masks read")
    good: list[tuple[LabeledImage, _Values]] = []
    for (image, mask), values in zip(pairs, read, strict=True):
        if isinstance(values, Finding):
            findings.append(values)
        elif image in sizes and values.size != sizes[image]:
            text = (
                f"is {values.size[0]} x {values.size[1]} px, but its image {image} is "
                f"{sizes[image][0]} x {sizes[image][1]} px; make them the same size"
            )
            findings.append(Finding(ERROR, "size mismatch", str(mask), text))
        elif image in sizes:
            labeled = LabeledImage(image, *sizes[image], mask=mask, split=tree.split_of(mask))
            good.append((labeled, values))
    if not good:
        return LabeledData(NAME, tree.root, MASKS, (), [], findings)
    notes: list[str] = []
    split_by_lists(tree, [labeled for labeled, _ in good], notes, "Segmentation")
    labels = _labels(tree, options, good, findings)
    for labeled, values in good:
        for value, count in values.counts.items():
            label = labels.table.get(value, UNLABELED)
            if label != UNLABELED:
                labeled.pixels[label] = labeled.pixels.get(label, 0) + count
    notes += labels.notes
    if further:
        mask, first = further[0]
        notes.append(
            f"{len(further)} masks are second ones of an image and not read, such as {mask} beside "
            f"{first}; remove those that are wrong"
        )
    paths = {path for pair in [*pairs, *further] for path in pair}
    if others := [path for path in tree.images if path not in paths and not _known(path)]:
        notes.append(f"{len(others)} images have no mask and are left out, such as {others[0]}")
    return LabeledData(
        NAME,
        tree.root,
        MASKS,
        labels.names,
        [image for image, _ in good],
        findings,
        notes,
        palette=None if labels.colors is None else list(labels.colors),
        read_mask=functools.partial(_read_mask, table=labels.table),
        plain_masks=all(values.kind == "ids" for _, values in good)
        and all(key == value for key, value in labels.table.items()),
    )


def _known(path: Path) -> bool:
    """Whether an image without a pair is one of Cityscapes' or Pascal VOC's other files."""
    others = _NO_MASK.search(path.stem) is not None or _MASK_ENDING.search(path.stem) is not None
    return others or path.parent.name.lower().startswith("segmentationobject")


# --- values of mask files -------------------------------------------------------------------------


def _packed(red: Any, green: Any, blue: Any) -> Any:
    """One number for a color, or an array of them."""
    return red << 16 | green << 8 | blue


def _unpacked(value: int) -> Color:
    return value >> 16, value >> 8 & 255, value & 255


class _Values(NamedTuple):
    """Values of one mask: numbers, or colors as :func:`_packed` makes them.

    The palette has the colors of these numbers.
    """

    path: Path
    size: tuple[int, int]
    kind: str
    counts: dict[int, int]
    palette: dict[int, Color]


def _open(path: Path) -> tuple[NDArray, str, dict[int, Color]]:
    """Values (H, W), their kind (``ids`` or ``colors``), and the palette by number."""
    with Image.open(path) as opened:
        raw = opened.getpalette("RGB") if opened.mode == "P" else None
        palette = {}
        if raw is not None:
            palette = {i: tuple(color) for i, color in enumerate(np.reshape(raw, (-1, 3)).tolist())}
        array = np.asarray(opened)
    if array.ndim == 3:
        array = array[..., :3].astype(np.int64) if array.shape[2] > 2 else array[..., :1]
        if array.shape[2] == 3 and (array == array[..., :1]).all():
            array = array[..., :1]
        if array.shape[2] == 3:
            return _packed(*np.moveaxis(array, -1, 0)), "colors", palette
        array = array[..., 0]
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ValueError(f"has {array.dtype} numbers of shape {array.shape}, which are no labels")
    return array, "ids", palette


def _values(path: Path) -> _Values | Finding:
    try:
        array, kind, palette = _open(path)
    except UNREADABLE as error:
        return Finding(ERROR, "unreadable mask", str(path), f"cannot be read: {error}")
    values, counts = np.unique(array, return_counts=True)
    if len(values) > (256 if kind == "ids" else _MANY):
        text = (
            f"has {len(values)} {'numbers' if kind == 'ids' else 'colors'}: it is no mask, or was "
            "saved with loss; export it again as PNG"
        )
        return Finding(ERROR, "no mask", str(path), text)
    size = (array.shape[1], array.shape[0])
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    # Of thousands of masks, whole palettes of 256 colors would take most of the memory.
    used = {value: palette[value] for value in found if value in palette}
    return _Values(path, size, kind, found, used)


def _read_mask(path: Path, table: dict[int, int]) -> NDArray[np.uint8]:
    """Labels (H, W) of a mask; values that the table lacks become :data:`UNLABELED`."""
    array, _, _ = _open(path)
    values, places = np.unique(array, return_inverse=True)
    labels = np.array([table.get(value, UNLABELED) for value in values.tolist()], np.uint8)
    return labels[places.reshape(array.shape)]


# --- names of values ------------------------------------------------------------------------------


class _Labels(NamedTuple):
    """Names and colors of the classes, and the label of each value of the masks."""

    names: tuple[str, ...]
    colors: tuple[Color, ...] | None
    table: dict[int, int]
    notes: tuple[str, ...] = ()


def _labels(tree: Tree, options: Options, read, findings: list[Finding]) -> _Labels:
    legend = find_legend(tree, options)
    gray = [index for index, (_, values) in enumerate(read) if values.kind == "ids"]
    colored = len(gray) < len(read)
    if colored and gray and legend is None:
        raise UserError(
            f"{tree.root}: some masks are colors and some are numbers ({read[gray[0]][1].path}); "
            "name the colors in a file of lines name,red,green,blue and give it with --legend"
        )
    for index in gray if colored else ():
        # A mask of one gray color among colored ones.
        image, values = read[index]
        counts = {_packed(value, value, value): count for value, count in values.counts.items()}
        read[index] = image, values._replace(kind="colors", counts=counts)
    total: Counter[int] = Counter()
    for _, values in read:
        total.update(values.counts)
    if colored:
        return _of_colors(tree, legend, total, read, findings)
    palette = {number: color for _, values in read for number, color in values.palette.items()}
    if legend is not None and legend.colors is not None and palette:
        return _of_palette(legend, palette, total)
    if read[0][1].path.stem.endswith("labelIds"):
        table = {number: label for label, number in enumerate(CITYSCAPES)}
        return _Labels(tuple(CITYSCAPES.values()), None, table, ("Cityscapes' 19 classes",))
    names: tuple[str, ...] | None = None if legend is None else legend.names
    notes: tuple[str, ...] = ()
    if names is None and "labelTrainIds" in read[0][1].path.stem:
        names, notes = tuple(CITYSCAPES.values()), ("Cityscapes' 19 classes",)
    elif names is None and read[0][1].path.parent.name.startswith("SegmentationClass"):
        if max(set(total) - {UNLABELED}, default=0) < len(VOC):
            names, notes = VOC, ("Pascal VOC's 21 classes",)
    known = options.classes or names
    if known is None or len(known) <= 2:
        _refuse_soft_edges(total, [values for _, values in read])
    return _of_numbers(options, names, total, notes)


def _refuse_soft_edges(total: Counter, read: Sequence[_Values]) -> None:
    """Raise if the masks have two values, and others only on the way from one to the other.

    Masks of 0 and 255 that were drawn with antialiasing, resized or saved as JPEG are such. Their
    steps would become classes, and 255 would be unlabeled.

    Args:
        total: number of pixels of each value.
        read: the masks.
    """
    low, high = min(total), max(total)
    steps = len(total) - 2
    soft = [values.path for values in read if values.counts.keys() - {low, high}]
    if steps < _STEPS or total[low] + total[high] < _ENDS * sum(total.values()):
        return
    # Labels have their own value around them, or the background on both sides.
    between = rising = 0
    for path in soft[:_TRIED]:
        array = _open(path)[0].astype(np.float32)
        inside = (low < array) & (array < high)
        square = np.ones((3, 3), np.uint8)
        lower, higher = cv2.erode(array, square), cv2.dilate(array, square)
        between += np.count_nonzero(inside)
        rising += np.count_nonzero(inside & (lower < array) & (array < higher))
    if rising < _RISING * between:
        return
    raise UserError(
        f"the masks have the values {low} and {high}, and {steps} between them at soft edges (in "
        f"{len(soft)} masks, such as {soft[0]}); threshold them at {(low + high + 1) // 2}, or, if "
        "all values are classes, name them with --classes"
    )


def _of_numbers(options: Options, names, total: Counter, notes: tuple[str, ...]) -> _Labels:
    """Numbers 0, 1, ... with 255 for unlabeled; two values that are no labels become 0 and 1."""
    values = sorted(set(total) - {UNLABELED})
    known = options.classes or names
    if known is not None and len(known) == 1 and 0 in total:
        # One class alone has nothing to compete with.
        known = ("background", *known)
        options = replace(options, classes=known)
    few = known is None or len(known) <= 2
    if len(total) == 2 and min(total) == 0 and max(total) > 1 and few:
        # 0 and 255 of binary masks, or 0 and any other number.
        named = class_names(2, options, known or ("background", "object"))
        note = f"masks have 0 and {max(total)}, taken as {named[0]} and {named[1]}"
        return _Labels(tuple(named[:2]), None, {0: 0, max(total): 1}, (*notes, note))
    highest = max(values, default=0)
    if known is not None and len(known) == highest:
        # One name less than numbers: 0 is what has no name.
        note = f"{len(known)} names for the numbers 0 to {highest}: 0 is not learned"
        return _Labels(
            tuple(known), None, {value: value - 1 for value in values if value}, (*notes, note)
        )
    if highest > 254 or (known is None and len(values) <= highest):
        # Numbers with gaps, such as 50, 100, 150: no class for what does not occur.
        named = class_names(len(values), options, [f"value_{value}" for value in values])
        note = f"masks have the values {first_of(values, 12)}, which become 0, 1, ..."
        return _Labels(tuple(named), None, {v: i for i, v in enumerate(values)}, (*notes, note))
    default = ["background"] if known is None else known
    named = class_names(highest + 1, options, default)
    if known is None:
        note = f"masks have the numbers 0 to {highest} without names; name them with --classes"
        notes = (*notes, note)
    return _Labels(tuple(named), None, {value: value for value in range(len(named))}, notes)


def _of_palette(legend: Legend, palette: dict[int, Color], total: Counter) -> _Labels:
    """Numbers whose colors in the palette the legend names."""
    names, colors, _ = learned(legend)
    label = {color: index for index, color in enumerate(colors)}
    table = {number: label[palette[number]] for number in total if palette.get(number) in label}
    return _Labels(names, colors, table)


def _of_colors(tree: Tree, legend: Legend | None, total, read, findings) -> _Labels:
    if legend is None or legend.colors is None:
        shown = [_unpacked(value) for value, _ in total.most_common(6)]
        raise UserError(
            f"the masks of {tree.root} are {len(total)} colors without names, most of all "
            f"{', '.join(map(str, shown))} (red, green, blue); write a file with a line "
            "name,red,green,blue for each class and give it with --legend"
        )
    names, colors, ignored = learned(legend)
    table = {_packed(*color): index for index, color in enumerate(colors)}
    known = {*table, *(_packed(*color) for color in ignored)}
    for _, values in read:
        if strange := sorted(set(values.counts) - known):
            shown = [_unpacked(value) for value in strange]
            text = f"has colors that the legend lacks: {first_of(shown, 4)}"
            findings.append(Finding(ERROR, "unknown color", str(values.path), text))
    return _Labels(names, colors, table)
