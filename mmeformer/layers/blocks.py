# SPDX-License-Identifier: Apache-2.0
"""Layers that both versions share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class ConvNorm(nn.Module):
    """Convolution (with bias, as published), batch norm and, if given, an activation.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)); the padding is
    half the kernel.
    """

    folds = {"bn": "conv"}
    """What `mmeformer.deploy.fold` merges: part -> the layer before it. The same in all blocks."""

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
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


_in_checkpoint = ContextVar("_in_checkpoint", default=False)


def run_checkpointed(block: nn.Module, *args) -> Tensor:
    """Call a block so that only its arguments are kept for the backward pass.

    Batch norms take in the statistics of the first run alone.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    runs = 0

    def run(*args) -> Tensor:
        nonlocal runs
        runs += 1
        token = _in_checkpoint.set(True)
        try:
            if runs > 1:
                for norm in norms:
                    norm.momentum = 0.0
            return block(*args)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            _in_checkpoint.reset(token)

    return checkpoint(run, *args, use_reentrant=False)


def run_chain(layers: Iterable[ConvNorm], x: Tensor) -> Tensor:
    """One :class:`ConvNorm` after the other, keeping less for the backward pass.

    Autograd keeps the input of an activation for its gradient and its output for the next
    convolution's: the largest maps of the network twice. Here the output is computed again from
    the input when it is needed.
    """
    before, act = None, nn.Identity()
    for layer in layers:
        with _forget(x, before, act):
            x = layer.conv(x)
        before, act = layer.bn(x), layer.act
        x = act(before)
    return x


def _forget(after: Tensor, before: Tensor | None, act: nn.Module) -> AbstractContextManager:
    """Within it autograd keeps ``before`` in place of its activation ``after``."""
    if (
        # A compiler decides by itself what to keep.
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or before is None
        or not (torch.is_grad_enabled() and before.requires_grad)
        # A checkpointed block keeps nothing as it is.
        or _in_checkpoint.get()
    ):
        return nullcontext()

    # Autograd keeps the function below as well, so it must not hold the tensor.
    address, shape = after.data_ptr(), after.shape

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        if kept.data_ptr() != address or kept.shape != shape:
            return kept
        return lambda: act(before.detach())

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: (B, 3, H, W) -> (B, width, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, width // 2, 3, stride=2, act=act)
        self.conv2 = ConvNorm(width // 2, width, 3, stride=2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return run_chain((self.conv1, self.conv2), x)


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
        return run_chain([layer for layer in self.children() if isinstance(layer, ConvNorm)], x)
