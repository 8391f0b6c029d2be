# SPDX-License-Identifier: Apache-2.0
"""Settings of the light detector for own data with boxes only."""

from __future__ import annotations

from mmeformer.labeled import LabeledData
from mmeformer.starter import (
    Plan,
    Rates,
    Setting,
    backbone,
    enlarged,
    epochs_setting,
    round_up,
    sides_of,
    smallest,
)

TEMPLATE = "detection/gfl-lite_efficientformerv2-s0_pafpn_custom.py"
SIDE = 640
"""Longer side of images in the recipe, in pixels."""
LONG, SHORT = 1333, 800
"""Largest size of images, in pixels, where small objects need it."""
SMALL = 16
"""Side in pixels of objects that the levels from stride 8 on still find well: two cells."""
WIDE = 256
"""Channels of the last stage from which neck and head are wider too, as in the COCO configs."""
BATCH = 8
"""Images per step without a GPU: neck and head have batch norms, also in fine-tuning."""
RATES = Rates(1e-4, 2.5e-3, largest=5e-3)
"""For two images. From scratch the light head needs a higher rate than others: 5e-3 for eight."""


def settings(data: LabeledData, plan: Plan) -> list[Setting]:
    """The settings of the light detector alone."""
    images = data.of_split("train")
    long, short = sides_of(images)
    small = smallest(data)
    # Enlarged, or reduced less, if small objects need it.
    factor = min(max(SMALL / small, min(1.0, SIDE / long)), 2.0)
    factor = min(factor, LONG / long, SHORT / short)
    scale = (min(round_up(long * factor), LONG), min(round_up(short * factor), SHORT))
    size = small * factor
    stride = 4 if round(size) < SMALL else 8
    wide = plan.variant.architecture.widths[-1] > WIDE
    return [
        Setting(
            "scale",
            str(scale),
            f"images are {long} x {short} px, a tenth of the objects below {small:.0f} px: "
            f"{enlarged(factor)}",
        ),
        Setting("stride", str(stride), f"of the finest level; small objects have {size:.0f} px"),
        Setting("width", "128" if wide else "96", "channels of neck and head, for this backbone"),
        epochs_setting(len(images)),
    ]


def model(plan: Plan) -> str:
    """The model of the config, which follows from the settings."""
    network = backbone(
        plan,
        "(scale[0] // 32) * (scale[1] // 32)",
        out_indices="tuple(range(first, 4))",
        bias_grid="[max(1, side // 32) for side in scale[::-1]]",
    )
    return MODEL.format(backbone=network, widths=list(plan.variant.architecture.widths))


MODEL = """\
first = {{4: 0, 8: 1}}[stride]
model = dict(
    backbone=dict({backbone}),
    neck=dict(in_channels={widths}[first:], out_channels=width),
    bbox_head=dict(
        num_classes=len(classes), in_channels=width, feat_channels=width,
        anchor_generator=dict(strides=[4, 8, 16, 32][first:]),
    ),
)
"""
