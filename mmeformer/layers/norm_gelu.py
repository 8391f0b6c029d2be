# SPDX-License-Identifier: Apache-2.0
"""Batch norm and GELU in one, for training on a CPU: of both only the norm's input is kept.

Autograd would keep the result of the norm as well and, for the next layer, that of the GELU: the
hidden maps of the MLPs, the largest of the network, three times. Here results are computed again
from the norm's input when the backward pass needs them, piece after piece in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIECE = 2**17
"""Numbers of a map taken at a time: 512 KiB, of which a core's cache holds several."""


def can_fuse(norm: nn.Module, x: Tensor) -> bool:
    """Whether :func:`norm_gelu` can do the work of this norm on this map."""
    return (
        # A synchronised norm has ways of its own.
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.momentum is not None
        and x.device.type == "cpu"
        # Mixed precision rounds in other places.
        and x.dtype == norm.weight.dtype
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def norm_gelu(norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """GELU of the batch norm of ``x`` (B, C, H, W), and a function that computes it again.

    The norm counts the batch and takes in its statistics as in its own forward pass.
    """
    if norm.training and norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
    out, factor, offset = _NormGelu.apply(x, norm.weight, norm.bias, norm)
    # What the function holds must not hold the graph.
    kept = x.detach()

    def again() -> Tensor:
        result = torch.empty_like(kept)
        for part, place in _pieces(kept, result):
            torch.ops.aten.gelu_(torch.addcmul(offset, part, factor, out=place))
        return result

    return out, again


class _NormGelu(torch.autograd.Function):
    """x, weight, bias, norm -> the result, and the norm as a factor and an offset per channel."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d):
        ctx.norm, ctx.by_batch = norm, norm.training or norm.running_mean is None
        running = norm.running_mean, norm.running_var
        out, mean, inverse = torch.native_batch_norm(
            x, weight, bias, *running, ctx.by_batch, norm.momentum, norm.eps
        )
        if not ctx.by_batch:
            mean, inverse = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
        factor = weight * inverse
        offset = bias - mean * factor
        ctx.save_for_backward(x, weight, mean, inverse, factor, offset)
        ctx.mark_non_differentiable(factor, offset)
        return torch.ops.aten.gelu_(out), factor, offset

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        x, weight, mean, inverse, factor, offset = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        inner = torch.empty_like(x)
        for part, outer, place in _pieces(x, gradient, inner):
            normalised = torch.addcmul(offset, part, factor)
            torch.ops.aten.gelu_backward.grad_input(outer, normalised, grad_input=place)
        norm = ctx.norm
        running = norm.running_mean, norm.running_var
        wanted = ctx.needs_input_grad[:3]
        return *torch.ops.aten.native_batch_norm_backward(
            inner, x, weight, *running, mean, inverse, ctx.by_batch, norm.eps, wanted
        ), None


def _pieces(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Part after part of maps (B, C, H, W) with channels last, as views (places, C)."""
    places = [part.permute(0, 2, 3, 1).flatten(0, 2) for part in maps]
    yield from zip(*(part.split(max(1, PIECE // part.shape[1])) for part in places), strict=True)
