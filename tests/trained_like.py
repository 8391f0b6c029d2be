# SPDX-License-Identifier: Apache-2.0
"""Random weights with the statistics of trained ones, so that a forgotten part shows."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmeformer.layers.attention_bias import AttentionBias
from mmeformer.layers.blocks import LayerScale


@torch.no_grad()
def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise norms, layer scales and attention biases in place; eval mode."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            module.weight.uniform_(0.5, 1.5, generator=random)
            module.bias.normal_(0, 0.2, generator=random)
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=random)
            module.running_var.uniform_(0.5, 2.0, generator=random)
        elif isinstance(module, LayerScale):
            module.gamma.uniform_(0.2, 0.8, generator=random)
        elif isinstance(module, AttentionBias):
            module.table.normal_(0, 1.0, generator=random)
    return model.eval()
