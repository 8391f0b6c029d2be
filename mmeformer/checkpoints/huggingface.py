# SPDX-License-Identifier: Apache-2.0
"""Tensor names of Hugging Face transformers (V1 only; ``models/efficientformer``, up to 4.x).

Stages and the downsamples between them share one numbering, as in the reference. The last stage is
separate, with one list of the blocks on maps and another of the blocks on tokens.
"""

from __future__ import annotations

import re

from mmeformer.variants import Architecture

_STEM = {
    "conv1.conv": "convolution1",
    "conv1.bn": "batchnorm_before",
    "conv2.conv": "convolution2",
    "conv2.bn": "batchnorm_after",
}
_DOWNSAMPLE = {"conv": "projection", "bn": "norm"}
_BLOCK = {
    "mlp.fc1.conv": "mlp.convolution1",
    "mlp.fc1.bn": "mlp.batchnorm_before",
    "mlp.fc2.conv": "mlp.convolution2",
    "mlp.fc2.bn": "mlp.batchnorm_after",
    "ls1.gamma": "layer_scale_1",
    "ls2.gamma": "layer_scale_2",
    "norm1": "layernorm1",
    "norm2": "layernorm2",
    "token_mixer.qkv": "token_mixer.qkv",
    "token_mixer.proj": "token_mixer.projection",
    "token_mixer.attention_bias.table": "token_mixer.attention_biases",
    "mlp.fc1": "mlp.linear_in",
    "mlp.fc2": "mlp.linear_out",
}
_LAST_STAGE = 3


def huggingface_name(name: str, family: str, architecture: Architecture) -> str:
    """Return the name in transformers of our tensor ``name`` (as in ``backbone.state_dict()``).

    Raises:
        KeyError: transformers' model has no such tensor (it has no pyramid norms, no V2 and no
            attention before the last stage).
    """
    if family != "v1" or any(architecture.attention_blocks[:_LAST_STAGE]):
        raise KeyError(name)
    if match := re.fullmatch(r"stem\.(\w+\.\w+)\.(\w+)", name):
        return f"efficientformer.patch_embed.{_STEM[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.downsample\.(\w+)\.(\w+)", name):
        number = 2 * int(match[1]) - 1
        rest = f"{_DOWNSAMPLE[match[2]]}.{match[3]}"
        return f"efficientformer.encoder.intermediate_stages.{number}.{rest}"
    if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name):
        stage, position = int(match[1]), int(match[2])
        first_on_tokens = architecture.depths[stage] - architecture.attention_blocks[stage]
        kind = "meta4D_layers"
        if position >= first_on_tokens:
            kind, position = "meta3D_layers", position - first_on_tokens
        parent = "last_stage" if stage == _LAST_STAGE else f"intermediate_stages.{2 * stage}"
        return f"efficientformer.encoder.{parent}.{kind}.blocks.{position}.{_block_name(match[3])}"
    raise KeyError(name)


def _block_name(rest: str) -> str:
    if rest in _BLOCK:
        return _BLOCK[rest]
    module, leaf = rest.rsplit(".", 1)
    return f"{_BLOCK[module]}.{leaf}"
