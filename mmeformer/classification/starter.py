# SPDX-License-Identifier: Apache-2.0
"""Starter of classification: lists of images with labels, and settings of a classifier."""

from __future__ import annotations

from pathlib import Path

from mmeformer.files import write_text
from mmeformer.labeled import SPLITS, LabeledData
from mmeformer.starter import (
    Plan,
    Setting,
    Starter,
    backbone,
    enlarged,
    epochs_for,
    relative_to,
    round_up,
    sides_of,
)
from mmeformer.variants import find_variant

CROP = 224
"""Side of the network's input in the published recipe, in pixels."""
SMALLEST = 64
"""Side of the input for the smallest images: four cells at stride 32."""
BORDER = 8 / 7
"""The shorter side of test images, as a multiple of the crop, in the published recipe."""
UNEVEN = 3
"""If the largest class has this many times the images of the smallest, accuracy says little."""


class ClassificationStarter(Starter):
    """See the base class."""

    base_batch = 32
    rates = (2e-4, 1e-3)

    def template(self, data: LabeledData) -> str:
        """See the base class."""
        return "classification/efficientformerv2-s0_custom.py"

    def prepare(self, data: LabeledData, folder: Path) -> LabeledData:
        """Write a list of images and labels per split."""
        for split in SPLITS:
            if images := data.of_split(split):
                rows = [f"{relative_to(im.path, data.root)} {im.label}\n" for im in images]
                write_text(folder / f"{split}.txt", "".join(rows))
        return data

    def settings(self, data: LabeledData, plan: Plan) -> list[Setting]:
        """See the base class."""
        images = data.of_split("train")
        long, short = sides_of(images)
        if plan.checkpoint is None:
            crop = min(CROP, max(SMALLEST, round_up(short)))
            why = "published" if crop == CROP else "about that of the images"
        else:
            crop, why = CROP, "that of the pretrained weights"
        resize = crop if short <= crop else round(crop * BORDER)
        cut = "no border is cut" if resize == crop else "as published"
        return [
            Setting("crop", str(crop), f"side of the network's input in pixels: {why}"),
            Setting(
                "resize",
                str(resize),
                f"shorter side of test images before the crop, {cut}; images are {long} x {short} "
                f"px: {enlarged(resize / short)}",
            ),
            self._best_metric(data),
            Setting(
                "epochs",
                str(epochs_for(len(images))),
                f"for {len(images)} images; see docs/own_data.md",
            ),
        ]

    def _best_metric(self, data: LabeledData) -> Setting:
        """The metric by which the best weights are kept."""
        counts = data.counts("train")
        numbers = [counts[label] for label in range(len(data.classes))]
        fewest, most = min(numbers), max(numbers)
        span = str(most) if fewest == most else f"{fewest} to {most}"
        shown = f"classes have {span} training images"
        if most >= UNEVEN * fewest:
            return Setting(
                "best_metric",
                '"single-label/f1-score"',
                f"keeps weights; {shown}: mean of the classes",
            )
        return Setting("best_metric", '"accuracy/top1"', f"keeps the best weights; {shown}")

    def body(self, data: LabeledData, plan: Plan) -> str:
        """See the base class."""
        variant = plan.variant
        more = {}
        if plan.checkpoint is None:
            more["bias_grid"] = "-(-crop // 32)"
        if variant.family == "v1":
            more.update(out_indices="(3,)", pyramid_norms="False")
        # Nothing follows the backbone that could take other norms.
        network, _ = backbone(plan, "(-(-crop // 32)) ** 2", **more)
        head = ""
        if variant.name != "efficientformerv2_s0":
            width = find_variant(variant.family, variant.arch).architecture.widths[-1]
            head = f'family="{variant.family}", in_channels={width}, '
        return BODY.format(
            backbone=network,
            head=head,
            test="test" if data.of_split("test") else "val",
            hooks=self.hooks(data, plan),
        )


BODY = """\
model = dict(
    data_preprocessor=dict(num_classes=len(classes)),
    backbone=dict({backbone}),
    head=dict({head}num_classes=len(classes), loss=dict(num_classes=len(classes))),
)
train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = crop
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = resize
test_pipeline[2].crop_size = crop
data = dict(data_root=data_root, data_prefix=dict(img_path=""), metainfo=dict(classes=classes))
loader = dict(
    batch_size=batch_size, num_workers=num_workers, persistent_workers=num_workers > 0
)
train_data = dict(ann_file=labels + "train.txt", pipeline=train_pipeline, **data)
val_data = dict(ann_file=labels + "val.txt", pipeline=test_pipeline, **data)
test_data = dict(ann_file=labels + "{test}.txt", pipeline=test_pipeline, **data)
train_dataloader = dict(drop_last=False, dataset=train_data, **loader)
val_dataloader = dict(dataset=val_data, **loader)
test_dataloader = dict(dataset=test_data, **loader)
val_evaluator = [
    dict(type="Accuracy", topk=(1, 5) if len(classes) > 5 else (1,)),
    dict(type="SingleLabelMetric"),  # precision, recall, F1: means of the classes
]
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=epochs, val_interval=max(1, epochs // 12))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(by_epoch=False, end=warmup_iters, convert_to_iter_based=False)
param_scheduler[1].update(begin=0, end=epochs)
optim_wrapper = dict(type=optimizer_type, optimizer=dict(lr=learning_rate))
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(checkpoint=dict(save_best=best_metric))
{hooks}
"""


STARTER = ClassificationStarter()
