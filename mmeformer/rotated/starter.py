# SPDX-License-Identifier: Apache-2.0
"""Starter of rotated detection: DOTA's label files, lists of images, settings of rotated GFL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmeformer.bars import counted
from mmeformer.checks.findings import WARNING, Finding
from mmeformer.errors import UserError
from mmeformer.files import write_text
from mmeformer.labeled import BOXES, CORNERS, POLYGONS, SPLITS, LabeledData, LabeledImage
from mmeformer.rotated.dota import format_label
from mmeformer.rotated.patches import CutSettings, Split
from mmeformer.starter import (
    Plan,
    Setting,
    Starter,
    backbone,
    enlarged,
    epochs_setting,
    file_names,
    flips,
    neck,
    round_up,
    sides_of,
    smallest,
    varied,
)
from mmeformer.windows import windows

PATCH = 1024
"""Side of the patches of the published recipe, in pixels."""
HUGE = 1536
"""Longer images are cut into patches."""
SMALL = 16
"""Images are cut if their objects would be below this side in pixels: two cells at stride 8."""
TINY = 12
"""Objects are enlarged to this side in pixels, up to twice."""


class RotatedStarter(Starter):
    """See the base class."""

    kinds = (POLYGONS, BOXES)

    def template(self, data: LabeledData) -> str:
        """See the base class."""
        return "rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_custom.py"

    def prepare(self, data: LabeledData, folder: Path) -> LabeledData:
        """Write a list of images and label files per split; huge images are cut into patches."""
        names = ["-".join(name.split()) for name in data.classes]
        if changed := [name for name in data.classes if len(name.split()) > 1]:
            text = f"{', '.join(changed)}: spaces become -, as label files separate by spaces"
            data.findings.append(Finding(WARNING, "class name", str(data.root), text))
        data = replace(data, kind=CORNERS, classes=tuple(names))
        files = file_names(data.images, data.root)
        for split in SPLITS:
            if images := data.of_split(split):
                _write(images, files, names, folder / split)
        return self._patched(data, folder) if is_cut(data) else data

    def samples(self, data: LabeledData) -> int:
        """See the base class; patches, if images are cut."""
        images = data.of_split("train")
        if not is_cut(data):
            return len(images)
        cut = CutSettings(size=PATCH)
        return sum(len(windows(im.width, im.height, cut.size, cut.overlap)) for im in images)

    def _patched(self, data: LabeledData, folder: Path) -> LabeledData:
        total = 0
        for split in SPLITS:
            if not data.of_split(split):
                continue
            source = (folder / split / "images.txt", folder / split / "labels")
            cut = Split([source], folder / split / "patches", CutSettings(size=PATCH))
            outcomes = cut.run(min(8, os.cpu_count() or 1))
            steps = counted(cut.pending, "images cut")
            for outcome, _ in zip(outcomes, steps, strict=False):
                if outcome.error is not None:
                    raise UserError(f"{outcome.job.image} cannot be cut: {outcome.error}")
                total += len(outcome.patches)
        note = (
            f"images are too large for their objects: cut into {total} patches of {PATCH} px "
            f"(copies, in {folder}); prediction cuts images by itself"
        )
        return replace(data, notes=[*data.notes, note])

    def _enlargement(self, data: LabeledData) -> float:
        """How much images are enlarged, for objects below ``TINY`` pixels."""
        if is_cut(data):
            return 1.0
        long, _ = sides_of(data.of_split("train"))
        return min(max(1.0, min(2.0, TINY / smallest(data))), PATCH / long)

    def sample_size(self, data: LabeledData) -> tuple[int, int]:
        """See the base class."""
        long, _ = sides_of(data.of_split("train"))
        side = PATCH if is_cut(data) else min(round_up(long * self._enlargement(data)), PATCH)
        return side, side

    def settings(self, data: LabeledData, plan: Plan) -> list[Setting]:
        """See the base class.

        Anchors stay as published (4 strides): by ATSS, smaller ones move objects to coarser
        levels.
        """
        images = data.of_split("train")
        long, short = sides_of(images)
        patched = is_cut(data)
        side, _ = self.sample_size(data)
        kind = f"patches of {PATCH} px of images of" if patched else "images are"
        samples = self.samples(data)
        return [
            Setting(
                "size",
                str((side, side)),
                f"{kind} {long} x {short} px, a tenth of the objects below "
                f"{smallest(data):.0f} px: {enlarged(self._enlargement(data))}",
            ),
            varied("rotate", 0.5, 0.0, "share of training images turned by any angle", samples),
            flips(data, upright=False),
            epochs_setting(samples, "patches" if patched else "images"),
        ]

    def body(self, data: LabeledData, plan: Plan) -> str:
        """See the base class."""
        more = dict(bias_grid="[max(1, side // 32) for side in size]")
        if plan.variant.family == "v1":
            more["out_indices"] = "(1, 2, 3)"
        network = backbone(plan, "max(1, size[0] * size[1] // 1024)", **more)
        patched = is_cut(data)
        return BODY.format(
            backbone=network,
            neck=neck(plan, first=1),
            images="/patches/images/" if patched else "/images.txt",
            labels="/patches/annfiles/" if patched else "/labels/",
            test="test" if data.of_split("test") else "val",
            hooks=self.hooks(data, plan),
        )


# The lists of images have whole paths, so that data_root is that of the labels.
BODY = """\
model = dict(
    backbone=dict({backbone}),
    neck=dict({neck}),
    bbox_head=dict(num_classes=len(classes)),
)
train_pipeline = _base_.train_pipeline
train_pipeline[3].scale = size
train_pipeline[4].prob = flips
train_pipeline.insert(5, dict(type="RandomRotate", prob=rotate, angle_range=180))
val_pipeline = _base_.val_pipeline
val_pipeline[1].scale = size


def split(name, pipeline):
    return dict(
        data_root=labels,
        ann_file=name + "{labels}",
        data_prefix=dict(img_path=name + "{images}"),
        metainfo=dict(classes=classes),
        pipeline=pipeline,
    )


loader = dict(num_workers=num_workers, persistent_workers=num_workers > 0)
train_dataloader = dict(batch_size=batch_size, dataset=split("train", train_pipeline), **loader)
val_dataloader = dict(dataset=split("val", val_pipeline), **loader)
test_dataloader = dict(dataset=split("{test}", val_pipeline), **loader)
train_cfg = dict(max_epochs=epochs, val_interval=max(1, epochs // 12))
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = warmup_iters
param_scheduler[1].update(begin=min(int(full_rate * epochs), epochs - 1), end=epochs)
optim_wrapper = dict(type=optimizer_type, optimizer=dict(lr=learning_rate))
auto_scale_lr = dict(base_batch_size=batch_size)
{hooks}
"""


def is_cut(data: LabeledData) -> bool:
    """Whether images are cut: they are huge, or resized to a patch their objects are too small."""
    long, _ = sides_of(data.of_split("train"))
    small = smallest(data)
    return long > HUGE or (long > PATCH and small * PATCH / long < SMALL)


def _write(
    images: Sequence[LabeledImage], files: Mapping[Path, str], names: Sequence[str], folder: Path
) -> None:
    """Write ``images.txt`` and ``labels/NAME.txt`` for the images of one split.

    Args:
        images: of the split.
        files: NAME by the path of the image.
        names: of the classes.
        folder: of the split.
    """
    listed = []
    for image in counted(images, "label files written"):
        name = files[image.path]
        row = image.path.as_posix()
        listed.append(f"{row}\n" if name == image.path.stem else f"{row}\t{name}\n")
        lines = [
            format_label(item.quadrilateral(), names[item.label], item.difficult) + "\n"
            for item in image.objects
            if not item.crowd
        ]
        write_text(folder / "labels" / f"{name}.txt", "".join(lines))
    write_text(folder / "images.txt", "".join(listed))


STARTER = RotatedStarter()
