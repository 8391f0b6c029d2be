# SPDX-License-Identifier: Apache-2.0
"""Layers that both versions share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


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
        return self.act(self.bn(self.conv(x)))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: (B, 3, H, W) -> (B, width, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, width // 2, 3, stride=2, act=act)
        self.conv2 = ConvNorm(width // 2, width, 3, stride=2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class LayerScale(nn.Module):
    """One learned factor per channel; ``channel_dim`` is 1 for maps and -1 for tokens."""

    def __init__(self, width: int, init_value: float, channel_dim: int = 1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init_value)))
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma[:, None, None] if self.channel_dim == 1 else self.gamma)


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
