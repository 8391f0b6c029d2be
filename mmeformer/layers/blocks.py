# SPDX-License-Identifier: Apache-2.0
"""Layers that both versions share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmeformer.layers.graphs import eager_on_gpu, in_graph


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of maps that does not count its batches.

    Only a cumulative average (``momentum=None``) reads the counter, and counting takes a launch per
    norm: an eighth of all operators of a training step's forward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.momentum is None:
            return super().forward(x)
        use_batch = self.training or self.running_mean is None
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_batch,
            self.momentum,
            self.eps,
        )


class ConvNorm(nn.Module):
    """Convolution (with bias, as published), batch norm and, if given, an activation.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)); the padding is
    half the kernel.
    """

    folds = {"bn": "conv"}
    """For `mmeformer.deploy.fold`, as in all blocks: module -> the layer that it is merged into."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups
        )
        self.bn = BatchNorm(out_channels)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._norm_removes_bias():
            return self.act(self._norm_of_unbiased(x))
        return self.act(self.bn(self.conv(x)))

    def _norm_removes_bias(self) -> bool:
        """Whether the bias shifts the mean that the norm subtracts again, and nothing else."""
        bn = self.bn
        return (
            type(bn) is BatchNorm
            and bn.training
            and type(self.conv) is nn.Conv2d
            and self.conv.bias is not None
            and not in_graph()
        )

    def _norm_of_unbiased(self, x: Tensor) -> Tensor:
        """``bn(conv(x))`` by statistics of the batch, without a pass over the map for the bias.

        On a GPU, adding the bias and summing its gradient would each read the whole map, and AMP
        would cast both.
        """
        conv, bn = self.conv, self.bn
        bias = cast(Tensor, conv.bias)
        x = bn(_ZeroGradient.apply(conv._conv_forward(x, conv.weight, None), bias))  # type: ignore[no-untyped-call]
        if bn.running_mean is not None:
            # Not a change that autograd has to know of: gradients need the batch's mean alone.
            mean, shift = bn.running_mean.data, bias.data
            if bn.momentum is None:
                mean.add_(shift / cast(Tensor, bn.num_batches_tracked))
            else:
                mean.add_(shift, alpha=bn.momentum)
        return x


class _ZeroGradient(torch.autograd.Function):
    """The first input; the second gets a gradient of zeros, as DDP waits for one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (bias,) = ctx.saved_tensors
        return gradients[0], torch.zeros_like(bias) if ctx.needs_input_grad[1] else None


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: (B, 3, H, W) -> (B, width, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, width // 2, 3, stride=2, act=act)
        self.conv2 = ConvNorm(width // 2, width, 3, stride=2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class MapNorm(nn.GroupNorm):
    """Group norm of one group: by mean and variance of a whole map, (B, C, H, W) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, x: Tensor) -> Tensor:
        if eager_on_gpu(x):
            return normalize_map(x, self.weight, self.bias, self.eps)
        # PyTorch's group norm of channels last crashes on a CPU if only its parameters need
        # gradients (2.12).
        return super().forward(x.contiguous())


def normalize_map(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """:class:`MapNorm` for a GPU, in the memory format of ``x``.

    PyTorch's kernel takes the mean of each map with one of the 132 processors of an H100: a fifth
    of the time of V1-L1. As in that kernel, sums are float32, and under autocast the result is too.
    """
    kept = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype is not torch.float64:
            x = x.float()
        variance, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = weight[:, None, None] * (variance + eps).rsqrt()
        shift = bias[:, None, None] - mean * scale
        return torch.addcmul(shift, x, scale).to(kept)


def average_neighbors(x: Tensor) -> Tensor:
    """Average pooling by 3 x 3 of stride 1, without padding: (B, C, H, W) -> the same shape."""
    if eager_on_gpu(x):
        return average_by_convolution(x)
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def average_by_convolution(x: Tensor) -> Tensor:
    """:func:`average_neighbors` for a GPU: a depthwise convolution takes a tenth of the time."""
    # A CUDA graph uses tensors by their address; the cache would forget them.
    recorded = x.is_cuda and torch.cuda.is_current_stream_capturing()
    window = _window.__wrapped__ if recorded else _window
    weights, shares = window(x.shape[1], x.shape[2], x.shape[3], x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weights, padding=1, groups=x.shape[1]) * shares


@lru_cache(maxsize=256)
@torch.inference_mode(False)
@torch.no_grad()
def _window(
    channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weights 1/16 (C, 1, 3, 3), and 16 / number of neighbors inside the map (H, W).

    With ones, sums of large values would overflow in float16; 1/16 is exact.
    """
    weights = torch.full((channels, 1, 3, 3), 1 / 16, dtype=dtype, device=device)
    inside = torch.ones(1, 1, height, width, device=device)
    neighbors = F.avg_pool2d(inside, 3, stride=1, padding=1, divisor_override=1)
    return weights, 16 / neighbors.to(dtype)


class LayerScale(nn.Module):
    """One learned factor per channel; ``channel_dim`` is 1 for maps and -1 for tokens."""

    def __init__(self, width: int, init_value: float, channel_dim: int = 1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init_value)))
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        # As float32, it would make the map and all that follow float32 under autocast.
        gamma = self.gamma.to(x.dtype)
        return x * (gamma[:, None, None] if self.channel_dim == 1 else gamma)


class ConvMlp(nn.Module):
    """MLP of 1x1 convolutions with batch norm: (B, C, H, W) -> (B, C, H, W).

    V2 has a depthwise 3x3 convolution in the middle (``depthwise=True``), V1 has not.
    """

    def __init__(self, width: int, ratio: float, depthwise: bool) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.fc1 = ConvNorm(width, hidden, act=nn.GELU)
        self.mid = (
            ConvNorm(hidden, hidden, 3, groups=hidden, act=nn.GELU) if depthwise else nn.Identity()
        )
        self.fc2 = ConvNorm(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mid(self.fc1(x)))


def run_checkpointed(block: nn.Module, *args: object) -> Tensor:
    """Call a block and keep only its arguments for the backward pass.

    The backward pass runs the block again; batch norms update their statistics in the first run
    only.
    """
    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), keep_statistics(block)),
    )


@contextmanager
def keep_statistics(block: nn.Module) -> Iterator[None]:
    """Context in which the batch norms of ``block`` do not change their running statistics."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
