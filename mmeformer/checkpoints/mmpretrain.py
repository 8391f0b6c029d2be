# SPDX-License-Identifier: Apache-2.0
"""Tensor names of mmpretrain (V1 only; ``mmpretrain/models/backbones/efficientformer.py``).

A stage is ``network.{i}``; its downsample counts as its first block. As in the reference, the layer
that flattens the map to tokens counts as a block too.
"""

from __future__ import annotations

import re

from mmeformer.variants import Architecture

_TABLE = ".attention_bias.table"
_CONV_MLP = {"fc1.conv": "fc1", "fc1.bn": "norm1", "fc2.conv": "fc2", "fc2.bn": "norm2"}


def mmpretrain_name(name: str, family: str, architecture: Architecture) -> str:
    """Return mmpretrain's name of our tensor ``name`` (as in ``backbone.state_dict()``).

    Raises:
        KeyError: mmpretrain's model has no such tensor (it has no V2 and no attention before the
            last stage).
    """
    if family != "v1" or any(architecture.attention_blocks[:3]):
        raise KeyError(name)
    if match := re.fullmatch(r"stem\.conv([12])\.(conv|bn)\.(\w+)", name):
        return f"patch_embed.{int(match[1]) - 1}.{match[2]}.{match[3]}"
    if match := re.fullmatch(r"norms\.(\d)\.(\w+)", name):
        return f"norm{match[1]}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.downsample\.((?:conv|bn)\.\w+)", name):
        return f"network.{match[1]}.0.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name):
        stage, position = int(match[1]), int(match[2])
        on_tokens = position >= architecture.depths[stage] - architecture.attention_blocks[stage]
        return f"network.{stage}.{position + (stage > 0) + on_tokens}.{_block_name(match[3])}"
    raise KeyError(name)


def _block_name(rest: str) -> str:
    if match := re.fullmatch(r"ls([12])\.gamma", rest):
        return f"ls{match[1]}.weight"
    if match := re.fullmatch(r"mlp\.(\w+\.(?:conv|bn))\.(\w+)", rest):
        return f"mlp.{_CONV_MLP[match[1]]}.{match[2]}"
    return rest.replace(_TABLE, ".attention_biases")
