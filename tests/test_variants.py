# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from helpers import build_backbone
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmeformer.layers.blocks import LayerScale
from mmeformer.variants import VARIANTS, Architecture, find_variant

NUM_CLASSES = 1000


def classifier_counts(variant):
    """Parameters and multiply-adds at 224 px, counted as the published tables count.

    The tables do not say how they count; these rules give every one of the 14 published figures.
    V1 is counted as trained: a batch norm costs 2 operations per element, a layer norm 5. V2 is
    counted as deployed: batch norms and layer scales folded into the convolutions (one norm before
    the heads included), a bilinear resize costs 4 per element. These are the costs in fvcore.
    """
    backbone = build_backbone(variant).eval()
    backbone.norms.clear()
    width = variant.architecture.widths[-1]
    params = sum(p.numel() for p in backbone.parameters())
    params += 2 * (width * NUM_CLASSES + NUM_CLASSES)
    elementwise = 0

    def count(module, _, output):
        nonlocal elementwise
        if isinstance(module, nn.BatchNorm2d) and variant.family == "v1":
            elementwise += 2 * output.numel()
        elif isinstance(module, nn.LayerNorm):
            elementwise += 5 * output.numel()
        elif getattr(module, "halve", False):
            full, half = output.shape[-2:], module.v.conv.out_channels
            elementwise += 4 * half * math.prod(full)

    for module in backbone.modules():
        module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, 224, 224))
    macs = counter.get_total_flops() / 2 + 2 * width * NUM_CLASSES + elementwise
    if variant.family == "v1":
        params += 2 * width  # the norm before the heads
    else:
        folded = (nn.BatchNorm2d, LayerScale)
        params -= sum(
            p.numel() for m in backbone.modules() if isinstance(m, folded) for p in m.parameters()
        )
    return params, macs


def test_published_totals(variant):
    params, macs = classifier_counts(variant)
    digits = 2 if variant.family == "v1" else 1
    assert round(params / 1e6, digits) == variant.params
    assert round(macs / 1e9, 2) == variant.macs


def test_finding():
    assert find_variant("v2", "S0") is VARIANTS["efficientformerv2_s0"]
    with pytest.raises(ValueError, match=r"V1 has no arch 's0'.*\['l1', 'l3', 'l7'\]"):
        find_variant("v1", "s0")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(width=3), r"arch: unknown keys \['width'\]"),
        (dict(depths=None), "missing keys"),
        (dict(widths=(8, 8, 8)), "widths must have 4 entries"),
        (dict(widths=(8, 8, 8, 7)), "positive and even"),
        (dict(attention_blocks=(0, 0, 0, 2)), "stage 3: 1 blocks of which 2"),
        (dict(mlp_ratios=((4,), (4,), (4, 4), (4,))), "mlp_ratios gives 2"),
    ],
)
def test_bad_architectures_are_named(change, message):
    arch = dict(widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 1))
    arch.update(change)
    arch = {key: value for key, value in arch.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        Architecture.from_mapping(arch)
