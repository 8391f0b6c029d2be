# SPDX-License-Identifier: Apache-2.0
"""Layers that both versions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmeformer.layers.norm_gelu import can_fuse, conv_for_norm, norm_gelu, norm_gelu_conv


class PointConv2d(nn.Conv2d):
    """1x1 convolution of stride 1; of small maps on a CPU a product of matrices.

    oneDNN's convolution brings its weights into a format of its own at every call. A large map pays
    for that, a small one does not: 7 x 7 places take a quarter less time this way.
    """

    SMALL = 2**20
    """Numbers in a map up to which the product was found faster (two cores of a Xeon)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        widest = max(self.in_channels, self.out_channels)
        if (
            x.device.type == "cpu"
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.numel() // self.in_channels * widest <= self.SMALL
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        ):
            x = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
            return x.permute(0, 3, 1, 2)
        return super().forward(x)


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
        self.conv = (
            PointConv2d(in_channels, out_channels)
            if kernel_size == stride == groups == 1
            else nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups
            )
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        """``scale``: a :class:`LayerScale` of the result, for layers without an activation."""
        x = scaled_norm(self.bn, scale, self.conv(x))
        if (
            isinstance(self.act, nn.GELU)
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        ):
            # In place: nothing else reads it, and the largest maps are then not written twice.
            return torch.ops.aten.gelu_(x)
        return self.act(x)


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


def run_chain(layers: Sequence[ConvNorm], x: Tensor, scale: nn.Module | None = None) -> Tensor:
    """One :class:`ConvNorm` after the other, then the scale, keeping less for the backward pass.

    Autograd keeps the inputs of a batch norm, of its activation and of the next convolution: the
    largest maps of the network three times. Here the last one, and on a CPU the last two, are
    computed again when they are needed.
    """
    *inner, last = layers
    if not torch.is_grad_enabled():
        for layer in inner:
            x = layer(x)
        return last(x, scale)
    again = None
    for layer in inner:
        fused = _can_fuse(layer, x)
        with forget(x, again):
            x = conv_for_norm(layer.conv, x) if fused else layer.conv(x)
        if not fused:
            x, again = _norm_act(layer, x)
        elif layer is inner[-1] and isinstance(last.conv, PointConv2d):
            x = norm_gelu_conv(layer.bn, x, layer.conv.bias, last.conv)
            break
        else:
            x, again = norm_gelu(layer.bn, x, layer.conv.bias)
    else:
        with forget(x, again):
            x = last.conv(x)
    return last.act(scaled_norm(last.bn, scale, x))


def scaled_norm(norm: nn.Module, scale: nn.Module | None, x: Tensor) -> Tensor:
    """``scale(norm(x))``; in training the factors of both are multiplied first.

    That spares a pass over the map forwards, two backwards, and a map kept in between.
    """
    if (
        isinstance(norm, _BatchNorm)
        and isinstance(scale, LayerScale)
        and torch.is_grad_enabled()
        # Half precision would lose a small scale.
        and x.dtype == scale.gamma.dtype
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    ):
        factors = {"weight": norm.weight * scale.gamma, "bias": norm.bias * scale.gamma}
        return torch.func.functional_call(norm, factors, (x,))
    x = norm(x)
    return x if scale is None else scale(x)


def _norm_act(layer: ConvNorm, x: Tensor) -> tuple[Tensor, Callable[[], Tensor] | None]:
    """The norm and activation of a layer, and a function that computes the result again."""
    norm, act = layer.bn, layer.act
    if _keeps_all() or not isinstance(act, nn.GELU):
        # A rectifier's gradient needs the result itself.
        return act(norm(x)), None
    before = norm(x)
    return act(before), (lambda: act(before.detach())) if before.requires_grad else None


def _can_fuse(layer: ConvNorm, x: Tensor) -> bool:
    """Whether norm and activation of a layer can be had in one; ``x`` is the layer's input."""
    return (
        isinstance(layer.act, nn.GELU)
        and not _keeps_all()
        and can_fuse(layer.bn, x)
        and (x.requires_grad or layer.conv.weight.requires_grad)
    )


def _keeps_all() -> bool:
    return (
        # A compiler decides by itself what to keep.
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        # A checkpointed block keeps nothing as it is.
        or _in_checkpoint.get()
    )


def forget(after: Tensor, again: Callable[[], Tensor] | None) -> AbstractContextManager:
    """Within it autograd keeps the function ``again`` in place of its result ``after``."""
    if (
        again is None
        or not torch.is_grad_enabled()
        # A compiler decides by itself what to keep.
        or torch.compiler.is_compiling()
        # A checkpointed block keeps nothing as it is.
        or _in_checkpoint.get()
    ):
        return nullcontext()
    # Autograd keeps the function below as well, so it must not hold the tensor.
    address, numbers = after.data_ptr(), after.numel()

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        if kept.data_ptr() != address or kept.numel() != numbers:
            return kept
        # A product of matrices keeps the map in another shape.
        shape, strides = kept.shape, kept.stride()
        return lambda: again().as_strided(shape, strides)

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

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        """``scale``: a :class:`LayerScale` of the result."""
        layers = [layer for layer in self.children() if isinstance(layer, ConvNorm)]
        return run_chain(layers, x, scale)
