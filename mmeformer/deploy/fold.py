# SPDX-License-Identifier: Apache-2.0
"""Copies of models for inference, with norms and layer scales merged into other layers."""

from __future__ import annotations

import copy
from typing import cast

import torch
from mmcv.cnn import ConvModule
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmeformer.backbones.efficientformer import KEY_WIDTH, NUM_HEADS, TokenAttention
from mmeformer.backbones.efficientformer_v2 import AttentionDownsample, MapAttention
from mmeformer.deploy.biases import fix_biases
from mmeformer.deploy.substitutes import substitute
from mmeformer.layers.blocks import ConvNorm, LayerScale


def fold(model: nn.Module, image_size: tuple[int, int] | None = None) -> nn.Module:
    """Make an inference copy of a backbone or of a whole detector or segmentor.

    Batch norms are merged into the convolutions before them (our own blocks, mmcv's ``ConvModule``
    of necks and heads, neighbors in ``nn.Sequential``), layer scales into the convolution or linear
    layer before them, the scale of attention products into the layer of the queries; drop path is
    removed. Layer norms and group norms remain, because their statistics depend on the input, and
    so does the layer scale of V1's pooling mixer, which is a difference of two maps. Outputs agree
    with the model's in eval mode to 1e-5 of their largest value.

    Args:
        model: is not changed.
        image_size: (H, W) in pixels of all inputs, if they have one size: the attention biases then
            become constants. None keeps them: they are cached per size in eager mode.

    Returns:
        A copy in eval mode without gradients, on the same device. It cannot be trained, and the
        names in its state dict differ from the model's.

    Raises:
        ValueError: ``image_size`` is given, but the model has none of our backbones.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    substitute(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if (unshared := getattr(child, "unshared", None)) is not None:
                # Convolutions that levels share, each with norms of its own.
                setattr(module, name, unshared().eval().requires_grad_(False))
    # Parents come before their children: in reverse, a child is folded before its parent uses it.
    for module in reversed(list(model.modules())):
        for absorbed, layer in _foldable_pairs(module):
            part = getattr(module, absorbed)
            parent, _, attribute = layer.rpartition(".")
            owner = module.get_submodule(parent)
            setattr(owner, attribute, _merge(getattr(owner, attribute), part))
            setattr(module, absorbed, nn.Identity())
        if isinstance(module, MapAttention):
            # The same for all keys of a query: the softmax cancels it.
            module.talking_head1.bias = None
        if isinstance(module, (MapAttention, AttentionDownsample, TokenAttention)):
            _scale_queries(module)
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath):
                setattr(module, name, nn.Identity())
    if image_size is not None:
        fix_biases(model, image_size)
    return model


def _foldable_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """(name of a part, path of the layer before it that it is merged into) of one module."""
    if isinstance(module, ConvModule):
        order = [step for step in module.order if step != "act" or module.with_activation]
        follows = "norm" in order and order.index("norm") == order.index("conv") + 1
        pairs = [(module.norm_name, "conv")] if module.with_norm and follows else []
    elif isinstance(module, nn.Sequential):
        names = list(module._modules)
        pairs = list(zip(names[1:], names[:-1], strict=True))
    else:
        pairs = list(getattr(module, "folds", {}).items())
    return [
        (part, layer)
        for part, layer in pairs
        if getattr(module, part) is not None  # a block without attention
        and _can_merge(module.get_submodule(layer), getattr(module, part))
    ]


def _can_merge(layer: nn.Module, part: nn.Module) -> bool:
    if isinstance(part, _BatchNorm):
        # Without running statistics, a norm uses those of the input.
        return isinstance(layer, nn.Conv2d) and part.running_mean is not None
    return isinstance(part, LayerScale) and isinstance(layer, (nn.Conv2d, nn.Linear))


def _merge(layer: nn.Conv2d | nn.Linear, part: _BatchNorm | LayerScale) -> nn.Module:
    """A new layer that computes ``part(layer(x))``; other modules may share the old layer."""
    if isinstance(part, _BatchNorm):
        assert isinstance(layer, nn.Conv2d)  # see `_can_merge`
        return fuse_conv_bn_eval(layer, part)
    scaled = copy.deepcopy(layer)
    with torch.no_grad():
        scaled.weight.mul_(part.gamma.view(-1, *[1] * (layer.weight.dim() - 1)))
        if scaled.bias is not None:
            scaled.bias.mul_(part.gamma)
    return scaled


@torch.no_grad()
def _scale_queries(attention: MapAttention | AttentionDownsample | TokenAttention) -> None:
    """Make the scale of the products part of the layer that gives the queries, in place."""
    if isinstance(attention, TokenAttention):
        for values in (attention.qkv.weight, attention.qkv.bias):
            values.unflatten(0, (NUM_HEADS, -1))[:, :KEY_WIDTH].mul_(attention.scale)
    else:
        # A downsample's queries are two layers; see `query_in_one_convolution`.
        query: nn.Module = attention.q
        last = cast(ConvNorm, query[-1] if isinstance(query, nn.Sequential) else query)
        if not isinstance(last.bn, nn.Identity):
            return  # a norm by the input's statistics would undo it
        last.conv.weight.mul_(attention.scale)
        cast(Tensor, last.conv.bias).mul_(attention.scale)
    attention.scale = 1.0
