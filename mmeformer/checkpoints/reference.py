# SPDX-License-Identifier: Apache-2.0
"""Tensor names of the reference implementation (snap-research/EfficientFormer).

The reference numbers its stages and the downsamples between them together: stage ``i`` is
``network.{2 i}``, the downsample before it ``network.{2 i - 1}``. In V1, a layer without parameters
that flattens the map to tokens counts as one of the blocks of the last stage.
"""

from __future__ import annotations

import re

from torch import Tensor

from mmeformer.variants import Architecture

_STEM = {
    "conv1.conv": "patch_embed.0",
    "conv1.bn": "patch_embed.1",
    "conv2.conv": "patch_embed.3",
    "conv2.bn": "patch_embed.4",
}
_CONV_MLP = {
    "fc1.conv": "fc1",
    "fc1.bn": "norm1",
    "mid.conv": "mid",
    "mid.bn": "mid_norm",
    "fc2.conv": "fc2",
    "fc2.bn": "norm2",
}


def reference_name(name: str, family: str, architecture: Architecture, downstream: bool) -> str:
    """Return the reference's name of our tensor ``name`` (as in ``backbone.state_dict()``).

    Args:
        name: such as ``stages.2.blocks.4.token_mixer.q.conv.weight``.
        family: ``"v1"`` or ``"v2"``.
        architecture: of the backbone.
        downstream: names of the reference's detection and segmentation backbones, which store their
            trained tables as ``attention_biases_seg``; the classifier's are ``attention_biases``.

    Raises:
        KeyError: our backbones have no such tensor.
    """
    if match := re.fullmatch(r"stem\.(\w+\.\w+)\.(\w+)", name):
        return f"{_STEM[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"norms\.(\d)\.(\w+)", name):
        return f"norm{2 * int(match[1])}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.downsample\.(.+)", name):
        attentive = family == "v2" and match[1] == "3"
        rest = _downsample_name(match[2], attentive, downstream)
        return f"network.{2 * int(match[1]) - 1}.{rest}"
    if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name):
        stage, position = int(match[1]), int(match[2])
        on_tokens = position >= architecture.depths[stage] - architecture.attention_blocks[stage]
        if family == "v1" and on_tokens:
            position += 1
        rest = _block_name(match[3], downstream)
        return f"network.{2 * stage}.{position}.{rest}"
    raise KeyError(name)


def reference_layout(name: str, tensor: Tensor, family: str) -> Tensor:
    """Reshape our tensor as in the reference.

    Bias tables are flat there, (heads, rows * columns), and V2's layer scales are (C, 1, 1).
    """
    if name.endswith(".attention_bias.table"):
        return tensor.flatten(1)
    if family == "v2" and name.endswith(".gamma"):
        return tensor[:, None, None]
    return tensor


def _downsample_name(rest: str, attentive: bool, downstream: bool) -> str:
    if rest.startswith("attn."):
        return "attn." + _attention_name(rest.removeprefix("attn."), downstream)
    match = re.fullmatch(r"(?:conv\.)?(conv|bn)\.(\w+)", rest)
    if match is None:
        raise KeyError(rest)
    names = {"conv": "conv", "bn": "bn"} if attentive else {"conv": "proj", "bn": "norm"}
    return f"{names[match[1]]}.{match[2]}"


def _block_name(rest: str, downstream: bool) -> str:
    if match := re.fullmatch(r"ls([12])\.gamma", rest):
        return f"layer_scale_{match[1]}"
    if match := re.fullmatch(r"mlp\.(\w+\.(?:conv|bn))\.(\w+)", rest):
        return f"mlp.{_CONV_MLP[match[1]]}.{match[2]}"
    if rest.startswith("token_mixer."):
        return "token_mixer." + _attention_name(rest.removeprefix("token_mixer."), downstream)
    return rest


def _attention_name(rest: str, downstream: bool) -> str:
    if rest == "attention_bias.table":
        return "attention_biases_seg" if downstream else "attention_biases"
    # A convolution and its norm are entries 0 and 1 of a sequence; the output projection has the
    # activation before them.
    rest = re.sub(r"^proj\.conv\.", "proj.1.", rest)
    rest = re.sub(r"^proj\.bn\.", "proj.2.", rest)
    rest = re.sub(r"^q\.local\.", "q.local.0.", rest)
    return re.sub(r"\.(conv|bn)\.", lambda m: {"conv": ".0.", "bn": ".1."}[m[1]], rest)
