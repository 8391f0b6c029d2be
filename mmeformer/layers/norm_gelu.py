# SPDX-License-Identifier: Apache-2.0
"""Batch norm and GELU in one, for training on a CPU: of both only the norm's input is kept.

Autograd would keep the result of the norm as well and, for the next layer, that of the GELU: the
hidden maps of the MLPs, the largest of the network, three times. Here results are computed again
from the norm's input when the backward pass needs them, piece after piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIECE = 2**20
"""Numbers of a map taken at a time, 4 MiB: what is computed again never exists as a whole."""


def can_fuse(norm: nn.Module, x: Tensor) -> bool:
    """Whether the functions below can do the work of this norm on maps like ``x`` (B, C, H, W)."""
    return (
        # A synchronised norm has ways of its own.
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.momentum is not None
        and x.device.type == "cpu"
        # Mixed precision rounds in other places.
        and x.dtype == norm.weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def conv_for_norm(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, leaving the gradient of its bias to :func:`norm_gelu` or what else follows."""
    return torch.func.functional_call(conv, {"bias": conv.bias.detach()}, (x,))


def norm_gelu(
    norm: nn.BatchNorm2d, x: Tensor, shift: Tensor
) -> tuple[Tensor, Callable[[], Tensor]]:
    """GELU of the batch norm of ``x`` (B, C, H, W), and a function that computes it again.

    The norm counts the batch and takes in its statistics as in its own forward pass. ``shift`` (C,)
    is the bias that :func:`conv_for_norm` added: the norm subtracts it again with the mean of the
    batch, so its gradient is zero, where autograd would add up the rounding errors of a whole map.
    """
    _count_batch(norm)
    x = x.contiguous(memory_format=torch.channels_last)
    out, factor, offset = _NormGelu.apply(x, norm.weight, norm.bias, shift, norm)
    # What the function holds must not hold the graph.
    kept = x.detach()

    def again() -> Tensor:
        result = torch.empty_like(kept)
        for part, place in _pieces(kept, result):
            torch.ops.aten.gelu_(torch.addcmul(offset, part, factor, out=place))
        return result

    return out, again


def norm_gelu_conv(norm: nn.BatchNorm2d, x: Tensor, shift: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution (with bias, stride 1) of what :func:`norm_gelu` gives.

    (B, C, H, W) -> (B, conv.out_channels, H, W). The backward pass computes the GELU once for both
    the gradient of the weight and that of ``x``.
    """
    _count_batch(norm)
    x = x.contiguous(memory_format=torch.channels_last)
    return _NormGeluConv.apply(x, norm.weight, norm.bias, shift, conv.weight, conv.bias, norm, conv)


def _count_batch(norm: nn.BatchNorm2d) -> None:
    if norm.training and norm.track_running_stats:
        norm.num_batches_tracked.add_(1)


def _forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d):
    """GELU of the norm, and the norm as a factor and an offset per channel."""
    ctx.norm, ctx.by_batch = norm, norm.training or norm.running_mean is None
    if ctx.by_batch and x.numel() == x.shape[1]:
        # PyTorch's own norm says as much; from here it would put NaN into the running statistics.
        raise ValueError(
            f"a batch norm in training got a single value per channel, {tuple(x.shape)}: take "
            "larger images, more of them per batch, or norm_eval=True"
        )
    running = norm.running_mean, norm.running_var
    out, mean, inverse = torch.native_batch_norm(
        x, weight, bias, *running, ctx.by_batch, norm.momentum, norm.eps
    )
    if not ctx.by_batch:
        mean, inverse = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    factor = weight * inverse
    offset = bias - mean * factor
    ctx.save_for_backward(x, weight, mean, inverse, factor, offset)
    return torch.ops.aten.gelu_(out), factor, offset


def _norm_backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and shift from that of the norm's result."""
    x, weight, mean, inverse, factor, _ = ctx.saved_tensors
    norm = ctx.norm
    running = norm.running_mean, norm.running_var
    of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, *running, mean, inverse, ctx.by_batch, norm.eps, [True] * 3
    )
    of_shift = torch.zeros_like(of_bias) if ctx.by_batch else factor * of_bias
    return of_x, of_weight, of_bias, of_shift


class _NormGelu(torch.autograd.Function):
    """x, weight, bias, shift, norm -> the result, and the norm as a factor and an offset."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, norm: nn.BatchNorm2d):
        out, factor, offset = _forward(ctx, x, weight, bias, norm)
        ctx.mark_non_differentiable(factor, offset)
        return out, factor, offset

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        x, *_, factor, offset = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        inner = torch.empty_like(x)
        for part, outer, place in _pieces(x, gradient, inner):
            normalised = torch.addcmul(offset, part, factor)
            torch.ops.aten.gelu_backward.grad_input(outer, normalised, grad_input=place)
        return *_norm_backward(ctx, inner), None


class _NormGeluConv(torch.autograd.Function):
    """x, the norm's weight, bias and shift, the convolution's weight and bias, both modules."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        norm: nn.BatchNorm2d,
        conv: nn.Conv2d,
    ):
        ctx.conv = conv
        return conv(_forward(ctx, x, weight, bias, norm)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, *_, factor, offset = ctx.saved_tensors
        matrix = ctx.conv.weight.flatten(1)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        inner = torch.empty_like(x)
        of_matrix, of_bias = torch.zeros_like(matrix), matrix.new_zeros(len(matrix))
        for part, outer, place in _pieces(x, gradient, inner):
            normalised = torch.addcmul(offset, part, factor)
            active = torch.ops.aten.gelu(normalised)
            of_matrix.addmm_(outer.t(), active)
            of_bias += outer.sum(0)
            torch.mm(outer, matrix, out=active)
            torch.ops.aten.gelu_backward.grad_input(active, normalised, grad_input=place)
        of_weight = of_matrix.view_as(ctx.conv.weight)
        return *_norm_backward(ctx, inner), of_weight, of_bias, None, None


def _pieces(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Part after part of maps (B, C, H, W) with channels last, as views (places, C).

    All have as many places; the first one's channels count.
    """
    places = [part.permute(0, 2, 3, 1).flatten(0, 2) for part in maps]
    size = max(1, PIECE // maps[0].shape[1])
    yield from zip(*(part.split(size) for part in places), strict=True)
