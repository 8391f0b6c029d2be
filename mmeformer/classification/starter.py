# SPDX-License-Identifier: Apache-2.0
"""Starter of classification: lists of images with their classes, and settings of a classifier."""

from __future__ import annotations

from pathlib import Path

from mmeformer.files import write_text
from mmeformer.labeled import SPLITS, LabeledData
from mmeformer.starter import (
    Plan,
    Rates,
    Setting,
    Starter,
    backbone,
    epochs_setting,
    flips,
    relative_to,
    round_up,
    sides_of,
)

SIDE = 224
"""Side of the images of the published recipe, in pixels."""
SMALLEST = 64
"""Smaller inputs leave no map at stride 32."""
LARGEST_ZOOM = 1.3
"""Random crops are enlarged at most this much beyond the whole image: more only blurs them."""
SMALLEST_CROP = 0.3
"""Of an image's area, where images are large enough for it."""


class ClassificationStarter(Starter):
    """See the base class."""

    base_batch = 32
    rates = Rates(2e-4, 2e-3)
    # As published; half gains nothing (docs/recipes.md).
    full_rate = 0.0

    def template(self, data: LabeledData) -> str:
        """See the base class."""
        return "classification/efficientformerv2-s0_custom.py"

    def prepare(self, data: LabeledData, folder: Path) -> LabeledData:
        """Write a list of images and labels per split."""
        for split in SPLITS:
            if images := data.of_split(split):
                rows = [f"{relative_to(image.path, data.root)} {image.label}\n" for image in images]
                write_text(folder / f"{split}.txt", "".join(rows))
        return data

    def default_batch(self, data: LabeledData) -> int:
        """See the base class; the same for all sizes."""
        return self.base_batch

    def settings(self, data: LabeledData, plan: Plan) -> list[Setting]:
        """See the base class."""
        images = data.of_split("train")
        long, short = sides_of(images)
        if plan.checkpoint is None:
            side = min(SIDE, max(SMALLEST, round_up(short)))
            why = "about their size, at most as published"
        else:
            side, why = SIDE, "as the weights were trained"
        published = side * 8 // 7
        resize = published if short >= published else max(side, short)
        least = max(SMALLEST_CROP, (min(side, short) / (LARGEST_ZOOM * short)) ** 2)
        zoom = f"enlarged at most {max(1.0, side / (least**0.5 * short)):.2g} times"
        return [
            Setting("crop", str(side), f"images are {long} x {short} px; {why}"),
            Setting("resize", str(resize), "shorter side of test images before the crop"),
            Setting("smallest_crop", f"{least:.2g}", f"of the area of a training image; {zoom}"),
            flips(data),
            epochs_setting(len(images)),
        ]

    def body(self, data: LabeledData, plan: Plan) -> str:
        """See the base class."""
        family = plan.variant.family
        more = dict(bias_grid="-(-crop // 32)") if plan.checkpoint is None else {}
        if family == "v1":
            more |= dict(out_indices="(3,)", pyramid_norms="False")
        network = backbone(plan, "(-(-crop // 32)) ** 2", **more)
        return BODY.format(
            backbone=network,
            family=family,
            width=plan.variant.architecture.widths[-1],
            test="test" if data.of_split("test") else "val",
            hooks=self.hooks(data, plan),
        )


BODY = """\
model = dict(
    data_preprocessor=dict(num_classes=len(classes)),
    backbone=dict({backbone}),
    head=dict(
        family="{family}",
        in_channels={width},
        num_classes=len(classes),
        loss=dict(num_classes=len(classes)),
    ),
)
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(scale=crop, crop_ratio_range=(smallest_crop, 1.0))
train_pipeline[2].update(prob=flips, direction=["horizontal", "vertical", "diagonal"])
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = resize
test_pipeline[2].crop_size = crop
data = dict(data_root=data_root, data_prefix=dict(img_path=""), metainfo=dict(classes=classes))
loader = dict(num_workers=num_workers, persistent_workers=num_workers > 0)
train_data = dict(ann_file=labels + "train.txt", pipeline=train_pipeline, **data)
val_data = dict(ann_file=labels + "val.txt", pipeline=test_pipeline, **data)
test_data = dict(ann_file=labels + "{test}.txt", pipeline=test_pipeline, **data)
train_dataloader = dict(batch_size=batch_size, drop_last=False, dataset=train_data, **loader)
val_dataloader = dict(batch_size=batch_size, dataset=val_data, **loader)
test_dataloader = dict(batch_size=batch_size, dataset=test_data, **loader)
val_evaluator = dict(topk=(1, min(5, len(classes))))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=epochs, val_interval=max(1, epochs // 12))
param_scheduler = _base_.param_scheduler
param_scheduler[0] = dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=warmup_iters)
param_scheduler[1].update(begin=min(int(full_rate * epochs), epochs - 1), end=epochs)
optim_wrapper = dict(type=optimizer_type, optimizer=dict(lr=learning_rate))
auto_scale_lr = dict(base_batch_size=batch_size)
{hooks}
"""

STARTER = ClassificationStarter()
