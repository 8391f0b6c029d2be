# SPDX-License-Identifier: Apache-2.0
"""Attention biases of inference copies: constants for one size, or a graph for every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from mmeformer.backbones.base import PyramidBackbone
from mmeformer.backbones.efficientformer_v2 import MapAttention
from mmeformer.deploy.substitutes import replace_modules
from mmeformer.layers.attention_bias import (
    AttentionBias,
    distances,
    resample_in_graph,
    resize_offset_table,
)


class _WholeBias(nn.Module):
    """A bias that is always computed as a whole."""

    def chunks(self, size: tuple[int, ...]) -> Callable[[int, int], Tensor]:
        """See :meth:`AttentionBias.chunks`."""
        bias = self(size)
        return lambda first, last: bias[:, first:last]


class FixedBias(_WholeBias):
    """The bias for one size, as a constant.

    An ONNX file gets the table of offsets, a few kB, where the bias takes megabytes (at 512 px more
    than all weights of V2-S0): runtimes expand it once, when they load the file.

    Args:
        source: the bias to fix.
        size: (H, W) of the key map.
    """

    bias: Tensor
    table: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, source: AttentionBias, size: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("bias", source.compute(size).detach().clone())
        self.size = size
        self.has_table = source.resize == "displacement"
        if self.has_table:
            table = resize_offset_table(source.table, size).detach().clone()
            self.register_buffer("table", table)
            for name, side in zip(("rows", "columns"), size, strict=True):
                places = distances(side, source.query_stride, table.device).clone()
                self.register_buffer(name, places)

    def forward(self, size: tuple[int, ...]) -> Tensor:
        """``size`` (H, W) of the key map -> bias (heads, Nq, H * W).

        Raises:
            ValueError: ``size`` is not the size it was made for.
        """
        # In a trace, sizes are not plain numbers.
        if not torch.jit.is_tracing() and tuple(size) != self.size:
            raise ValueError(
                f"this copy was folded for an attention map of {self.size}, but got {tuple(size)}; "
                "fold without image_size for inputs of any size"
            )
        if self.has_table and torch.onnx.is_in_onnx_export():
            return _expand(self.table, self.rows, self.columns)
        return self.bias


class GraphBias(_WholeBias):
    """The bias for any size, computed by tensor operations only, so that a graph can contain it.

    Gives the same numbers as :class:`AttentionBias`, whose Python arithmetic on sizes would become
    constants in a trace.

    Args:
        source: the bias to replace; ``"displacement"`` only.

    Raises:
        ValueError: the bias is resized as a matrix, which has no exact standard operator.
    """

    table: Tensor

    def __init__(self, source: AttentionBias) -> None:
        super().__init__()
        if source.resize != "displacement":
            raise ValueError(
                f"bias_resize={source.resize!r} cannot be exported for any size; "
                "give a fixed --size instead"
            )
        self.query_stride = source.query_stride
        self.register_buffer("table", source.table.detach().clone())

    def forward(self, size: tuple[int, ...]) -> Tensor:
        """``size`` (H, W) of the key map -> bias (heads, Nq, H * W)."""
        rows = distances(size[0], self.query_stride, self.table.device)
        columns = distances(size[1], self.query_stride, self.table.device)
        table = resample_in_graph(self.table, -2, size[0])
        table = resample_in_graph(table, -1, size[1])
        return _expand(table, rows, columns)


def _expand(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Table (heads, H, W), distances (Hq, H) and (Wq, W) -> bias (heads, Hq * Wq, H * W)."""
    # (heads, Hq, H, Wq, W) by two gathers, as in `expand_offset_table`.
    bias = table[:, :, columns][:, rows].permute(0, 1, 3, 2, 4)
    return bias.flatten(3, 4).flatten(1, 2)


class _SizeProbe(nn.Module):
    """Stands in for a bias and records the size that it is called with."""

    def __init__(self, source: AttentionBias) -> None:
        super().__init__()
        self.source = source
        self.size: tuple[int, ...] = ()

    def forward(self, size: tuple[int, ...]) -> Tensor:
        self.size = tuple(size)
        return self.source(size)

    def chunks(self, size: tuple[int, ...]) -> Callable[[int, int], Tensor]:
        self.size = tuple(size)
        return self.source.chunks(size)


def fix_biases(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Make the attention biases of a folded copy constants for images of ``image_size`` (H, W).

    Raises:
        ValueError: the model has none of our backbones.
    """
    backbones = [module for module in model.modules() if isinstance(module, PyramidBackbone)]
    if not backbones:
        raise ValueError(
            f"{type(model).__name__} has no EfficientFormer backbone, so image_size has no use"
        )
    replace_modules(model, AttentionBias, _SizeProbe)
    for backbone in backbones:
        weight = backbone.stem.conv1.conv.weight
        with torch.no_grad():
            backbone(weight.new_zeros(1, weight.shape[1], *image_size))
    replace_modules(model, _SizeProbe, lambda probe: FixedBias(probe.source, probe.size))
    for module in model.modules():
        if isinstance(module, MapAttention) and module.head_bias_keys is not None:
            fixed = cast(FixedBias, module.attention_bias)
            rows, columns = fixed.size
            with torch.no_grad():
                cast(Tensor, module.talking_head2.bias).mul_(
                    module.head_bias_keys / (rows * columns)
                )
            module.head_bias_keys = None
