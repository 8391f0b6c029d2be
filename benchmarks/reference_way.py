# SPDX-License-Identifier: Apache-2.0
"""Our backbones set to the reference's way of working, as the baseline of the measurements.

Same weights, same numbers (up to rounding), but as snap-research/EfficientFormer works downstream
(``detection/`` and ``segmentation/``): the bias matrix is expanded and resized by bicubic
interpolation at every forward pass, the logits of all queries are one tensor that is scaled, biased
and mixed by convolutions in passes of their own, layer scales take a pass of theirs, 1x1
convolutions are convolutions, maps are NCHW, and nothing is folded or computed again.
"""

from __future__ import annotations

from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor, nn

from mmeformer.backbones import base, efficientformer, efficientformer_v2
from mmeformer.layers import blocks
from mmeformer.layers.attention_bias import AttentionBias


def attend(
    query,
    key,
    value,
    bias,
    size,
    query_stride=1,
    scale=None,
    mix_logits=None,
    mix_attention=None,
    mix_bias=None,
):
    """What :func:`mmeformer.layers.attention.attend` computes, all at once."""
    scale = query.shape[-1] ** -0.5
    logits = (query @ key.transpose(2, 3)) * scale + bias.compute(tuple(size))
    if mix_logits is not None:
        logits = mix_logits(logits)
    attention = logits.softmax(dim=-1)
    if mix_attention is not None:
        attention = F.conv2d(attention, mix_attention.weight, mix_bias)
    return attention @ value


def run_chain(layers, x, scale=None):
    """What :func:`mmeformer.layers.blocks.run_chain` computes, with all that autograd keeps."""
    for layer in layers:
        x = layer(x)
    return x if scale is None else scale(x)


def scaled_norm(norm, scale, x):
    """What :func:`mmeformer.layers.blocks.scaled_norm` computes, in two passes."""
    x = norm(x)
    return x if scale is None else scale(x)


class ReferenceWay(nn.Module):
    """Runs a backbone built with ``bias_resize="matrix"`` in the reference's way."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        biases = [module for module in backbone.modules() if isinstance(module, AttentionBias)]
        if any(bias.resize != "matrix" for bias in biases):
            raise ValueError("the reference resizes matrices: build with bias_resize='matrix'")
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with (
            patch.object(efficientformer, "attend", attend),
            patch.object(efficientformer_v2, "attend", attend),
            patch.object(base, "prefers_channels_last", lambda x: False),
            patch.object(blocks, "run_chain", run_chain),
            patch.object(blocks, "scaled_norm", scaled_norm),
            patch.object(blocks.PointConv2d, "forward", nn.Conv2d.forward),
        ):
            return self.backbone(x)
