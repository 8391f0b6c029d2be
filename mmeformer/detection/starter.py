# SPDX-License-Identifier: Apache-2.0
"""Starter of detection: COCO JSON, and settings of Mask R-CNN or of the light detector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmeformer.bars import counted
from mmeformer.detection import light_starter
from mmeformer.files import replacing
from mmeformer.images import read_image, write_image
from mmeformer.labeled import (
    CORNERS,
    POLYGONS,
    SPLITS,
    LabeledData,
    LabeledImage,
    LabeledObject,
    decode_rle,
    encode_rle,
    fill_polygons,
    mask_box,
)
from mmeformer.starter import (
    Plan,
    Rates,
    Setting,
    Starter,
    backbone,
    enlarged,
    epochs_setting,
    file_names,
    flips,
    nearest,
    neck,
    relative_to,
    round_up,
    sides_of,
    smallest,
    varied,
)
from mmeformer.windows import Window, crop, windows

LONG, SHORT = 1333, 800
"""Largest size of images in the published recipe, in pixels."""
SMALL = 16
"""Side in pixels of objects that are still found well: four cells at stride 4."""
TINY = 8
"""Images are cut into tiles if small objects would be smaller than this."""
TILE, OVERLAP = 800, 200
SCALES = (0.75, 1.0)
"""Larger images would fill a batch, which is padded to its largest one."""
ROIS = (32, 64, 128)
"""Boxes of an image that its heads are trained on without a GPU; the published recipe has 512."""
ROIS_PER_OBJECT = 8
"""A fourth of the boxes may be on objects, so two on each."""
INSIDE = 0.4
"""An object belongs to a tile if at least this share of its box is inside."""


class DetectionStarter(Starter):
    """See the base class."""

    kinds = (CORNERS,)

    def template(self, data: LabeledData) -> str:
        """See the base class."""
        if data.kind != POLYGONS:
            return light_starter.TEMPLATE
        return "detection/mask-rcnn_efficientformerv2-s0_fpn_custom.py"

    def default_batch(self, data: LabeledData) -> int:
        """See the base class."""
        return super().default_batch(data) if data.kind == POLYGONS else light_starter.BATCH

    def rates_for(self, data: LabeledData) -> Rates:
        """See the base class."""
        return self.rates if data.kind == POLYGONS else light_starter.RATES

    def _enlargement(self, data: LabeledData) -> float:
        """How much images are enlarged (for objects below ``SMALL`` pixels) or reduced."""
        long, short = sides_of(data.of_split("train"))
        return min(max(1.0, min(2.0, SMALL / smallest(data))), LONG / long, SHORT / short)

    def sample_size(self, data: LabeledData) -> tuple[int, int]:
        """See the base class; of images with outlines."""
        long, short = sides_of(data.of_split("train"))
        factor = self._enlargement(data)
        return min(round_up(long * factor), LONG), min(round_up(short * factor), SHORT)

    def prepare(self, data: LabeledData, folder: Path) -> LabeledData:
        """Write one COCO file per split; huge images with small objects are cut into tiles."""
        data = self._tiled(data, folder)
        for split in SPLITS:
            if images := data.of_split(split):
                root = data.tiles or data.root
                path = folder / f"{split}.json"
                write_coco(path, images, data.classes, root, data.kind == POLYGONS)
        return data

    def _tiled(self, data: LabeledData, folder: Path) -> LabeledData:
        long, short = sides_of(data.of_split("train"))
        small = smallest(data)
        fit = min(LONG / long, SHORT / short)
        if fit >= 1 or fit * small >= TINY:
            return data
        names = file_names(data.images, data.root)
        images = [
            tile
            for image in counted(data.images, "images cut into tiles")
            for tile in cut(image, names[image.path], folder / "tiles")
        ]
        note = (
            f"images of {long} x {short} px with objects of {small:.0f} px: cut into "
            f"{len(images)} tiles of {TILE} px (copies, in {folder / 'tiles'}); predict with "
            f"--window {TILE}"
        )
        return replace(data, images=images, notes=[*data.notes, note], tiles=folder / "tiles")

    def settings(self, data: LabeledData, plan: Plan) -> list[Setting]:
        """See the base class."""
        images = data.of_split("train")
        scales = varied(
            "scales", SCALES, (1.0, 1.0), "training images are resized by these", len(images)
        )
        if data.kind != POLYGONS:
            return [*light_starter.settings(data, plan), scales, flips(data)]
        long, short = sides_of(images)
        small = smallest(data)
        factor = self._enlargement(data)
        scale = self.sample_size(data)
        anchor = nearest(small * factor / 4, (2, 4, 8))
        ratios = self._ratios(images)
        wide = "also long" if len(ratios) > 3 else "usual"
        return [
            Setting(
                "scale",
                str(scale),
                f"images are {long} x {short} px, a tenth of the objects below {small:.0f} px: "
                f"{enlarged(factor)}",
            ),
            Setting(
                "anchor_scale",
                str(anchor),
                f"smallest anchors {4 * anchor} px, small objects {small * factor:.0f} px",
            ),
            Setting("anchor_ratios", str(ratios), f"height by width; boxes have {wide} shapes"),
            self._rois(images, plan),
            scales,
            flips(data),
            epochs_setting(len(images)),
        ]

    def _rois(self, images: Sequence[LabeledImage], plan: Plan) -> Setting:
        """Boxes that the heads are trained on: as published, or by the number of objects."""
        if plan.gpu:
            value, why = 512, "as published"
        else:
            count = sum(len(image.objects) for image in images) / max(len(images), 1)
            value = min(ROIS, key=lambda rois: abs(rois - ROIS_PER_OBJECT * count))
            why = f"few, for a CPU and {count:.2g} objects per image"
        return Setting("rois_per_image", str(value), f"boxes to train the heads on; {why}")

    def _ratios(self, images: Sequence[LabeledImage]) -> list[float]:
        """Height by width of the anchors: more if a tenth of the boxes is longer than 3 to 1."""
        ratios = [
            max(item.box[2:]) / max(min(item.box[2:]), 1e-6)
            for image in images
            for item in image.objects
        ]
        if np.mean(np.array(ratios or [1.0]) > 3) > 0.1:
            return [0.25, 0.5, 1.0, 2.0, 4.0]
        return [0.5, 1.0, 2.0]

    def body(self, data: LabeledData, plan: Plan) -> str:
        """See the base class."""
        masks = data.kind == POLYGONS
        return BODY.format(
            model=_with_masks(plan) if masks else light_starter.model(plan),
            load="with_bbox=True, with_mask=True" if masks else "with_bbox=True",
            test="test" if data.of_split("test") else "val",
            hooks=self.hooks(data, plan),
        )


def _with_masks(plan: Plan) -> str:
    """The model of the config: Mask R-CNN."""
    network = backbone(
        plan,
        "(scale[0] // 32) * (scale[1] // 32)",
        bias_grid="[max(1, side // 32) for side in scale[::-1]]",
    )
    return MODEL.format(backbone=network, neck=neck(plan))


MODEL = """\
model = dict(
    backbone=dict({backbone}),
    neck=dict({neck}),
    rpn_head=dict(anchor_generator=dict(scales=[anchor_scale], ratios=anchor_ratios)),
    roi_head=dict(
        bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=rois_per_image))),
)
"""

BODY = """\
{model}\
train_pipeline = [
    _base_.load_image,
    dict(type="LoadAnnotations", {load}),
    dict(type="RandomResize", scale=scale, ratio_range=scales, keep_ratio=True),
    dict(type="RandomFlip", prob=flips, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [dict(type="Resize", scale=scale, keep_ratio=True)]
data = dict(data_root=data_root, data_prefix=dict(img=""), metainfo=dict(classes=classes))
loader = dict(num_workers=num_workers, persistent_workers=num_workers > 0)
train_data = dict(ann_file=labels + "train.json", pipeline=train_pipeline, **data)
val_data = dict(ann_file=labels + "val.json", pipeline=test_pipeline, **data)
test_data = dict(ann_file=labels + "{test}.json", pipeline=test_pipeline, **data)
train_dataloader = dict(batch_size=batch_size, dataset=train_data, **loader)
val_dataloader = dict(dataset=val_data, **loader)
test_dataloader = dict(dataset=test_data, **loader)
val_evaluator = dict(ann_file=labels + "val.json")
test_evaluator = dict(ann_file=labels + "{test}.json")
train_cfg = dict(max_epochs=epochs, val_interval=max(1, epochs // 12))
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = warmup_iters
param_scheduler[1].update(begin=min(int(full_rate * epochs), epochs - 1), end=epochs)
optim_wrapper = dict(type=optimizer_type, optimizer=dict(lr=learning_rate))
auto_scale_lr = dict(base_batch_size=batch_size)
{hooks}
"""


def write_coco(
    path: Path, images: Sequence[LabeledImage], classes: Sequence[str], root: Path, masks: bool
) -> None:
    """Write labeled images as a COCO file.

    Args:
        path: of the file.
        images: of one split.
        classes: names; category ids are 1, 2, ...
        root: file names are relative to it.
        masks: write polygons and run lengths too.
    """
    entries = (
        dict(
            id=number,
            file_name=relative_to(image.path, root),
            width=image.width,
            height=image.height,
        )
        for number, image in enumerate(images, start=1)
    )
    objects = (
        (number, item)
        for number, image in enumerate(counted(images, f"{path.name}: images written"), start=1)
        for item in image.objects
    )
    annotations = (
        _annotation(item, number, image, masks)
        for number, (image, item) in enumerate(objects, start=1)
    )
    categories = (dict(id=index + 1, name=name) for index, name in enumerate(classes))
    # One entry at a time: as one object, the annotations of COCO take gigabytes.
    with replacing(path) as draft, draft.open("w", encoding="utf-8") as file:
        for start, parts in (
            ('{"images": [', entries),
            ('], "annotations": [', annotations),
            ('], "categories": [', categories),
        ):
            file.write(start)
            for number, part in enumerate(parts):
                file.write(f"{', ' if number else ''}{json.dumps(part)}")
        file.write("]}")


def _annotation(item: LabeledObject, number: int, image: int, masks: bool) -> dict[str, Any]:
    """Entry of an object in a COCO file, with its number and that of its image."""
    entry: dict[str, Any] = dict(
        id=number,
        image_id=image,
        category_id=item.label + 1,
        bbox=[round(value, 3) for value in item.box],
        area=round(_area(item), 3),
        iscrowd=int(item.crowd or item.difficult > 0),
    )
    if masks:
        entry["segmentation"] = item.rle or [
            [round(value, 3) for value in polygon] for polygon in item.outlines()
        ]
    return entry


def _area(item: LabeledObject) -> float:
    """Area of an object in pixels: of its polygons, its mask, or its box."""
    if item.rle is not None:
        return float(decode_rle(item.rle).sum())
    if item.polygons:
        return item.polygon_area()
    return item.box[2] * item.box[3]


def cut(image: LabeledImage, name: str, folder: Path) -> list[LabeledImage]:
    """Write the tiles of an image; their labels are those whose box is enough inside.

    Args:
        image: to cut.
        name: the tiles are ``folder/SPLIT/NAME__SIZE__X___Y``.
        folder: of all tiles.
    """
    pixels = read_image(image.path)
    suffix = ".jpg" if image.path.suffix.lower() in (".jpg", ".jpeg") else ".png"
    tiles = []
    for window in windows(image.width, image.height, TILE, OVERLAP):
        tile = f"{name}__{TILE}__{window[0]}___{window[1]}{suffix}"
        path = folder / str(image.split) / tile
        write_image(path, crop(pixels, window))
        objects = [part for item in image.objects if (part := inside(item, window)) is not None]
        width, height = window[2] - window[0], window[3] - window[1]
        tiles.append(LabeledImage(path, width, height, objects, split=image.split))
    return tiles


def inside(item: LabeledObject, window: Window) -> LabeledObject | None:
    """The part of an object in a window, with its pixels; None if that is too little of it."""
    x, y, width, height = item.box
    left, top = max(x, window[0]), max(y, window[1])
    right, bottom = min(x + width, window[2]), min(y + height, window[3])
    if right - left < 1 or bottom - top < 1:
        return None
    if (right - left) * (bottom - top) < INSIDE * width * height:
        return None
    box = (left - window[0], top - window[1], right - left, bottom - top)
    part = replace(item, box=box, polygons=[], rle=None, corners=None)
    whole = (left, top, right, bottom) == (x, y, x + width, y + height)
    if item.polygons and whole:
        part.polygons = [
            (np.reshape(polygon, (-1, 2)) - window[:2]).ravel().tolist()
            for polygon in item.polygons
        ]
    elif item.polygons or item.rle is not None:
        return _cut_mask(item, part, window)
    return part


def _cut_mask(item: LabeledObject, part: LabeledObject, window: Window) -> LabeledObject | None:
    """The object's mask in the window, as run lengths."""
    shape = (window[3] - window[1], window[2] - window[0])
    if item.rle is not None:
        mask = decode_rle(item.rle)[window[1] : window[3], window[0] : window[2]]
    else:
        shifted = [(np.reshape(polygon, (-1, 2)) - window[:2]).ravel() for polygon in item.polygons]
        mask = fill_polygons(shifted, *shape)
    if not mask.any():
        return None
    return replace(part, rle=encode_rle(mask), box=mask_box(mask))


STARTER = DetectionStarter()
