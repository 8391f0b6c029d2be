# SPDX-License-Identifier: Apache-2.0
"""Starter of segmentation: masks of labels, lists of files, and settings of Semantic FPN."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mmeformer.checks.images import in_threads
from mmeformer.files import write_bytes, write_text
from mmeformer.labeled import (
    BOXES,
    CORNERS,
    MASKS,
    POLYGONS,
    SPLITS,
    LabeledData,
    LabeledImage,
    decode_rle,
    fill_polygons,
)
from mmeformer.starter import (
    Plan,
    Rates,
    Setting,
    Starter,
    backbone,
    epochs_for,
    file_names,
    flips,
    neck,
    relative_to,
    sides_of,
    varied,
)

BACKGROUND = "background"
CROP = 512
"""Side of the crops of the published recipe, in pixels."""
LARGEST = 4096
"""Longer images are resized to this many pixels."""
SCALES = (0.75, 1.25)
"""Training images are resized by factors between these, but not to less than a crop."""
RARE = 0.02
"""Class weights are set if a class has less than this share of the labeled pixels."""
WEIGHTS = (0.5, 5.0)
"""Limits of the class weights."""
FEWEST = 1000
"""Iterations at least."""


class SegmentationStarter(Starter):
    """See the base class."""

    kinds = (POLYGONS, BOXES, CORNERS)
    base_batch = 4
    rates = Rates(2e-4, 1e-3)

    def template(self, data: LabeledData) -> str:
        """See the base class."""
        return "segmentation/semantic-fpn_efficientformerv2-s0_custom.py"

    def prepare(self, data: LabeledData, folder: Path) -> LabeledData:
        """Write a list of images and masks per split, and the masks if theirs are no labels."""
        if data.kind != MASKS:
            data = replace(
                data,
                kind=MASKS,
                classes=(BACKGROUND, *data.classes),
                notes=[*data.notes, f"masks are drawn from the objects; the rest is {BACKGROUND}"],
                palette=None,
            )
            names = file_names(data.images, data.root)
            data.images = [
                self._written(image, names[image.path], folder, drawn(image))
                for image in data.images
            ]
        elif not data.plain_masks:
            assert data.read_mask is not None
            read = data.read_mask
            names = file_names(data.images, data.root)

            def convert(image: LabeledImage) -> LabeledImage:
                assert image.mask is not None
                return self._written(
                    image, names[image.path], folder, read(image.mask), image.pixels
                )

            data = replace(data, images=in_threads(convert, data.images, "masks written"))
        for split in SPLITS:
            if images := data.of_split(split):
                rows = [
                    f"{relative_to(image.path, data.root)}\t"
                    f"{relative_to(image.mask or image.path, data.root)}\n"
                    for image in images
                ]
                write_text(folder / f"{split}.txt", "".join(rows))
        return data

    def _written(
        self,
        image: LabeledImage,
        name: str,
        folder: Path,
        labels: NDArray[np.uint8],
        pixels: dict[int, int] | None = None,
    ) -> LabeledImage:
        """The image with its labels as a new mask file NAME."""
        path = folder / "masks" / str(image.split) / f"{name}.png"
        write_bytes(path, cv2.imencode(".png", labels)[1].tobytes())
        if pixels is None:
            values, counts = np.unique(labels, return_counts=True)
            pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        return replace(image, mask=path, pixels=pixels, objects=[])

    def steps(self, data: LabeledData, plan: Plan) -> int:
        """See the base class."""
        return max(FEWEST, super().steps(data, plan))

    def _scale(self, data: LabeledData) -> tuple[int, int]:
        """Longer and shorter side that images are resized to, in pixels."""
        long, short = sides_of(data.of_split("train"))
        factor = min(1.0, LARGEST / long)
        return int(long * factor), int(short * factor)

    def sample_size(self, data: LabeledData) -> tuple[int, int]:
        """See the base class."""
        side = min(CROP, max(32, self._scale(data)[1] // 32 * 32))
        return side, side

    def settings(self, data: LabeledData, plan: Plan) -> list[Setting]:
        """See the base class."""
        images = data.of_split("train")
        long, short = sides_of(images)
        scale = self._scale(data)
        side, _ = self.sample_size(data)
        # Less would be padded.
        scales = (round(min(1.0, max(SCALES[0], side / scale[1])), 2), SCALES[1])
        steps = self.steps(data, plan)
        epochs = epochs_for(len(images))
        shown = "as they are" if scale[0] == long else f"resized to {scale[0]} px"
        return [
            Setting("scale", str(scale), f"images are {long} x {short} px: {shown}"),
            Setting(
                "crop_size",
                str((side, side)),
                "height, width; " + ("as published" if side == CROP else "fits into most images"),
            ),
            varied(
                "scales", scales, (1.0, 1.0), "training images are resized by these", len(images)
            ),
            flips(data),
            self._class_weight(data),
            Setting(
                "max_iters",
                str(steps),
                f"{epochs} epochs for {len(images)} images, at least {FEWEST} iterations",
            ),
        ]

    def _class_weight(self, data: LabeledData) -> Setting:
        """Weights of rare classes: the root of median frequency balancing.

        Weights of median / frequency are from Eigen and Fergus (arXiv 1411.4734, section 6.3.2);
        their root, within limits, leaves frequent classes in their place.
        """
        counts = data.counts("train")
        total = max(sum(counts.values()), 1)
        shares = np.array([counts[label] / total for label in range(len(data.classes))])
        present = shares[shares > 0]
        rarest = present.min() if len(present) else 1.0
        if rarest >= RARE:
            return Setting("class_weight", "None", f"every class has {rarest:.0%} of the pixels")
        ratio = np.median(present) / np.where(shares > 0, shares, np.median(present))
        weights = np.clip(np.sqrt(ratio), *WEIGHTS)
        name = data.classes[int(np.argmin(np.where(shares > 0, shares, 2)))]
        return Setting(
            "class_weight",
            str([round(float(weight), 2) for weight in weights]),
            f"{name} has {rarest:.2%} of the pixels; root of median / share (arXiv 1411.4734)",
        )

    def body(self, data: LabeledData, plan: Plan) -> str:
        """See the base class."""
        grid = "[max(1, -(-side // 32)) for side in crop_size]"
        network = backbone(plan, "(crop_size[0] // 32) * (crop_size[1] // 32)", bias_grid=grid)
        palette = data.palette or distinct_colors(len(data.classes))
        return BODY.format(
            backbone=network,
            neck=neck(plan),
            palette=json.dumps(palette),
            test="test" if data.of_split("test") else "val",
            hooks=self.hooks(data, plan),
        )


BODY = """\
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict({backbone}),
    neck=dict({neck}),
    decode_head=dict(
        num_classes=len(classes),
        loss_decode=dict(avg_non_ignore=class_weight is None, class_weight=class_weight),
    ),
    test_cfg=dict(crop_size=crop_size, stride=tuple(side * 2 // 3 for side in crop_size)),
)
train_pipeline = [t for t in _base_.train_pipeline if t["type"] != "PhotoMetricDistortion"]
train_pipeline[2].update(scale=scale, ratio_range=scales)
train_pipeline[3].crop_size = crop_size
train_pipeline[4].update(prob=flips, direction=["horizontal", "vertical", "diagonal"])
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [dict(type="Resize", scale=scale, keep_ratio=True)]
data = dict(
    data_root=data_root, data_prefix=dict(img_path="", seg_map_path=""), reduce_zero_label=False,
    metainfo=dict(classes=classes, palette={palette}),
)
loader = dict(num_workers=num_workers, persistent_workers=num_workers > 0)
train_data = dict(ann_file=labels + "train.txt", pipeline=train_pipeline, **data)
val_data = dict(ann_file=labels + "val.txt", pipeline=test_pipeline, **data)
test_data = dict(ann_file=labels + "{test}.txt", pipeline=test_pipeline, **data)
train_dataloader = dict(batch_size=batch_size, dataset=train_data, **loader)
val_dataloader = dict(dataset=val_data, **loader)
test_dataloader = dict(dataset=test_data, **loader)
train_cfg = dict(max_iters=max_iters, val_interval=max(1, max_iters // 10))
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = warmup_iters
param_scheduler[1].update(begin=min(int(full_rate * max_iters), max_iters - 1), end=max_iters)
optim_wrapper = dict(type=optimizer_type, optimizer=dict(lr=learning_rate))
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(checkpoint=dict(interval=max(1, max_iters // 10)))
{hooks}
"""


def drawn(image: LabeledImage) -> NDArray[np.uint8]:
    """Labels (H, W) of an image's objects, 0 where there is none; small ones over large ones."""
    labels = np.zeros((image.height, image.width), np.uint8)
    order: Sequence = sorted(image.objects, key=lambda item: -item.box[2] * item.box[3])
    for item in order:
        if item.rle is not None:
            labels[decode_rle(item.rle) > 0] = item.label + 1
        else:
            inside = fill_polygons(item.outlines(), image.height, image.width)
            labels[inside > 0] = item.label + 1
    return labels


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Colors (red, green, blue) of different hues."""
    hues = [(index * 180 // max(count, 1), 200 - 60 * (index % 2), 230) for index in range(count)]
    colors = cv2.cvtColor(np.array([hues], np.uint8), cv2.COLOR_HSV2RGB)[0]
    return [(int(red), int(green), int(blue)) for red, green, blue in colors]


STARTER = SegmentationStarter()
