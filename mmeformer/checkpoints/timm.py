# SPDX-License-Identifier: Apache-2.0
"""Tensor names of timm (``timm/models/efficientformer.py`` and ``efficientformer_v2.py``)."""

from __future__ import annotations

import re

from mmeformer.variants import Architecture

_TABLE = ".attention_bias.table"


def timm_name(name: str, family: str, architecture: Architecture) -> str:
    """Return timm's name of our tensor ``name`` (as in ``backbone.state_dict()``).

    Our names follow timm's V2. In its V1, which is older, convolutions and norms are siblings, and
    the layer that flattens the map to tokens is counted among the blocks.

    Raises:
        KeyError: timm's model has no such tensor (it has no pyramid norms).
    """
    if not name.startswith(("stem.", "stages.")):
        raise KeyError(name)
    name = name.replace(_TABLE, ".attention_biases")
    if family == "v2":
        return name
    name = re.sub(r"^stem\.conv(\d)\.conv\.", r"stem.conv\1.", name)
    name = re.sub(r"^stem\.conv(\d)\.bn\.", r"stem.norm\1.", name)
    name = re.sub(r"\.downsample\.bn\.", ".downsample.norm.", name)
    name = re.sub(r"\.mlp\.fc(\d)\.conv\.", r".mlp.fc\1.", name)
    name = re.sub(r"\.mlp\.fc(\d)\.bn\.", r".mlp.norm\1.", name)
    if match := re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name):
        stage, position = int(match[1]), int(match[2])
        if position >= architecture.depths[stage] - architecture.attention_blocks[stage]:
            name = f"stages.{stage}.blocks.{position + 1}.{name[match.end() :]}"
    return name
