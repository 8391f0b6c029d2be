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
from mmeformer.layers.blocks import ConvMlp, ConvNorm, LayerScale, average_neighbors
from mmeformer.layers.graphs import eager_on_gpu, in_graph

Kind = TypeVar("Kind", bound=nn.Module)


def replace_modules(model: nn.Module, kind: type[Kind], make: Callable[[Kind], nn.Module]) -> None:
    """Replace every module of a kind below ``model`` by ``make(module)``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, make(module))


class InplaceGelu(nn.Module):
    """GELU in place: the largest maps of the network do not exist twice."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


class OneDnnConv(ConvNorm):
    """A folded :class:`ConvNorm`, with its activation, as one operator of oneDNN on a CPU.

    The activation is computed while a result is in the processor's cache. PyTorch itself takes a
    slower convolution than oneDNN's for small maps. It is the operator that ``torch.compile`` puts
    there (torch/_inductor/fx_passes/mkldnn_fusion.py).
    """

    @classmethod
    def of(cls, block: ConvNorm) -> OneDnnConv:
        """The same layers; they are used, not copied."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.conv, made.bn, made.act = block.conv, block.bn, block.act
        return made.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        activation = _ACTIVATIONS.get(type(self.act))
        if activation is None or type(self.bn) is not nn.Identity or not _onednn_computes(x):
            return super().forward(x)
        conv = self.conv
        return torch.ops.mkldnn._convolution_pointwise(
            x,
            conv.weight,
            conv.bias,
            conv.padding,
            conv.stride,
            conv.dilation,
            conv.groups,
            activation,
            [],
            "none",  # of GELU: by the error function, as in nn.GELU
        )


_ACTIVATIONS = {nn.Identity: "none", InplaceGelu: "gelu", nn.ReLU: "relu"}


def _onednn_computes(x: Tensor) -> bool:
    """Whether convolutions of a map are oneDNN's, launched one by one, without gradients."""
    return bool(
        not in_graph()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that adds its bias in the same kernel on a GPU: a product of matrices.

    Behind a convolution of cuDNN, PyTorch adds the bias in a pass of its own, which takes up to
    three times as long as the convolution.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> PointwiseConv:
        """The same convolution, with the same weights."""
        bias = conv.bias is not None
        made = cls(conv.in_channels, conv.out_channels, 1, bias=bias, device="meta")
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.as_product(x) if eager_on_gpu(x) else super().forward(x)

    def as_product(self, x: Tensor) -> Tensor:
        """The convolution as a product of matrices, in channels last."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(
            0, 3, 1, 2
        )


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution computes each position by itself, from all channels."""
    return (conv.kernel_size, conv.stride, conv.groups) == ((1, 1), (1, 1), 1)


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
        x = self.mix(x, average_neighbors(x))
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
    replace_modules(model, PoolBlock, FoldedPoolBlock)
    replace_modules(model, LocalGlobalQuery, query_in_one_convolution)
    for module in model.modules():
        if isinstance(module, ConvNorm):
            if isinstance(module.act, nn.GELU):
                module.act = InplaceGelu()
            if is_pointwise(module.conv):
                module.conv = PointwiseConv.of(module.conv)
    replace_modules(model, ConvNorm, OneDnnConv.of)


def substitute_for_graph(model: nn.Module) -> None:
    """Put modules that are faster in exported graphs into a folded copy."""
    replace_modules(model, FoldedPoolBlock, GraphPoolBlock)
