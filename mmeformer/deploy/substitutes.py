# SPDX-License-Identifier: Apache-2.0
"""Faster equivalents of our backbones' modules, for inference copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmeformer.backbones.efficientformer import PoolBlock
from mmeformer.backbones.efficientformer_v2 import LocalGlobalQuery
from mmeformer.layers.blocks import ConvMlp, ConvNorm, LayerScale

Kind = TypeVar("Kind", bound=nn.Module)


def replace_modules(
    model: nn.Module, kind: type[Kind], make: Callable[[str, Kind], nn.Module]
) -> None:
    """Replace every module of a kind below ``model`` by ``make(name, module)``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, make(name, module))


class InplaceGelu(nn.Module):
    """GELU in place: the largest maps of the network do not exist twice."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


class FoldedPoolBlock(nn.Module):
    """A :class:`PoolBlock` without drop path, whose mixer is one pass over the map and its means.

    Args:
        block: the block; its layers are used, not copied.
    """

    folds = PoolBlock.folds

    ls1: LayerScale
    mlp: ConvMlp
    ls2: LayerScale

    def __init__(self, block: PoolBlock | FoldedPoolBlock) -> None:
        super().__init__()
        self.ls1, self.mlp, self.ls2 = block.ls1, block.mlp, block.ls2

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return x + self.ls2(self.mlp(x))

    def mix(self, x: Tensor, means: Tensor) -> Tensor:
        """``x + scale * (means - x)``, all of them (B, C, H, W)."""
        # Autocast leaves lerp alone, which takes numbers of one type.
        return torch.lerp(x, means, self.ls1.gamma[:, None, None].to(x.dtype))


class GraphPoolBlock(FoldedPoolBlock):
    """A :class:`FoldedPoolBlock` for exported graphs.

    Between convolutions, onnxruntime stores maps in blocks of channels. For sums and products it
    would reorder all three maps, and the result again, so here the mixer consists of depthwise
    convolutions. In PyTorch these take several times longer.
    """

    share: Tensor
    rest: Tensor

    def __init__(self, block: PoolBlock | FoldedPoolBlock) -> None:
        super().__init__(block)
        # Constants: some converters take no weights that are computed in the graph.
        self.register_buffer("share", self.ls1.gamma.detach()[:, None, None, None].clone())
        self.register_buffer("rest", 1 - self.share)

    def mix(self, x: Tensor, means: Tensor) -> Tensor:
        """See :meth:`FoldedPoolBlock.mix`."""
        groups = x.shape[1]
        return F.conv2d(means, self.share, groups=groups) + F.conv2d(x, self.rest, groups=groups)


def query_in_one_convolution(query: LocalGlobalQuery) -> nn.Sequential:
    """A query whose map subsampled by two is part of its convolution: the center of the kernel."""
    local = copy.deepcopy(query.local)
    with torch.no_grad():
        local.weight[:, :, 1, 1] += 1
    return nn.Sequential(local, query.proj)


def substitute(model: nn.Module) -> None:
    """Put faster modules into an inference copy, before or after its norms are merged."""
    replace_modules(model, PoolBlock, lambda _, block: FoldedPoolBlock(block))
    replace_modules(model, LocalGlobalQuery, lambda _, query: query_in_one_convolution(query))
    for module in model.modules():
        if isinstance(module, ConvNorm) and isinstance(module.act, nn.GELU):
            module.act = InplaceGelu()


def substitute_for_graph(model: nn.Module) -> None:
    """Put modules that are faster in exported graphs into a folded copy."""
    replace_modules(model, FoldedPoolBlock, lambda _, block: GraphPoolBlock(block))
