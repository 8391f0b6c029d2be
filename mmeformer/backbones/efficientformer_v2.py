# SPDX-License-Identifier: Apache-2.0
"""EfficientFormer V2 (arXiv 2212.08059; reference: snap-research/EfficientFormer, ``models/``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from mmeformer.backbones.base import PyramidBackbone, Stage
from mmeformer.layers.attention import TalkingHead, attend
from mmeformer.layers.attention_bias import AttentionBias
from mmeformer.layers.blocks import ConvMlp, ConvNorm, LayerScale
from mmeformer.layers.graphs import in_export
from mmeformer.registry import MODELS

NUM_HEADS = 8
VALUE_RATIO = 4
KEY_WIDTH = 32
DOWNSAMPLE_KEY_WIDTH = 16


def to_heads(x: Tensor) -> Tensor:
    """(B, heads * D, H, W) -> (B, heads, H * W, D)."""
    return x.flatten(2).unflatten(1, (NUM_HEADS, -1)).transpose(2, 3)


def from_heads(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, heads, H * W, D) -> (B, heads * D, H, W), in channels last."""
    if in_export():
        return x.transpose(2, 3).flatten(1, 2).unflatten(2, size)  # one reordering, not two
    return x.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, size)


class MapAttention(nn.Module):
    """Attention with talking heads on a map: (B, C, H, W) -> (B, C, H, W).

    With ``halve``, attention works on a map of half the size, whose result is upsampled by two
    (bilinear). Half of an odd side is rounded up and the result cropped; even sides are as in the
    reference.

    ``head_bias_keys``: see :class:`EfficientFormerV2`.
    """

    head_bias_keys: int | None = None
    scale = KEY_WIDTH**-0.5

    def __init__(
        self,
        width: int,
        halve: bool,
        bias_grid: tuple[int, int],
        bias_resize: str,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        keys, values = NUM_HEADS * KEY_WIDTH, NUM_HEADS * KEY_WIDTH * VALUE_RATIO
        self.halve = halve
        self.stride_conv = (
            ConvNorm(width, width, 3, stride=2, groups=width) if halve else nn.Identity()
        )
        self.q = ConvNorm(width, keys)
        self.k = ConvNorm(width, keys)
        self.v = ConvNorm(width, values)
        self.v_local = ConvNorm(values, values, 3, groups=values)
        self.talking_head1 = TalkingHead(NUM_HEADS)
        self.talking_head2 = TalkingHead(NUM_HEADS)
        self.proj = ConvNorm(values, width)
        self.attention_bias = AttentionBias(NUM_HEADS, bias_grid, resize=bias_resize)

    def forward(self, x: Tensor) -> Tensor:
        full_size = x.shape[-2:]
        x = self.stride_conv(x)
        size = x.shape[-2:]
        value_map = self.v(x)
        query, key, value = to_heads(self.q(x)), to_heads(self.k(x)), to_heads(value_map)
        # In exported graphs a constant bias is part of the convolution, at no cost.
        with_bias = in_export() and self.head_bias_keys is None
        out = attend(
            query,
            key,
            value,
            self.attention_bias,
            size,
            self.scale,
            mix_logits=self.talking_head1,
            mix_attention=self.talking_head2 if with_bias else self.talking_head2.mix,
            with_cp=self.with_cp,
        )
        if not with_bias:
            # The second head's bias is the same for all queries and keys, so it multiplies the sum
            # of the values.
            out = out + self._head_bias(size) * value.sum(dim=2, keepdim=True)
        out = from_heads(out, size) + self.v_local(value_map)
        if self.halve:
            out = F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=False)
            out = crop_to(out, full_size)
        return self.proj(F.gelu(out))

    def _head_bias(self, size: tuple[int, ...]) -> Tensor:
        """The bias that the second talking head adds for each key: (heads, 1, 1)."""
        bias = self.talking_head2.bias
        assert bias is not None  # folding takes that of the first head alone
        if self.head_bias_keys is not None:
            # Bias first: CoreML cannot divide two integers.
            bias = bias * self.head_bias_keys / (size[0] * size[1])
        return bias[:, None, None]


def crop_to(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The upper left part of a map, of ``size`` (H, W)."""
    if isinstance(size[0], torch.SymInt) or isinstance(size[1], torch.SymInt):
        # `torch.export` asks whether a slice is contiguous, and makes the answer a condition.
        return F.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))
    return x[..., : size[0], : size[1]]


class LocalGlobalQuery(nn.Module):
    """Queries at half the grid: a depthwise convolution plus the map subsampled by two.

    (B, C, H, W) -> (B, out_width, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
        self.proj = ConvNorm(width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.local(x) + x[..., ::2, ::2])


class AttentionDownsample(nn.Module):
    """Attention with queries at every second position.

    (B, C, H, W) -> (B, out_width, ceil(H / 2), ceil(W / 2)).
    """

    scale = DOWNSAMPLE_KEY_WIDTH**-0.5

    def __init__(
        self,
        width: int,
        out_width: int,
        bias_grid: tuple[int, int],
        bias_resize: str,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        keys = NUM_HEADS * DOWNSAMPLE_KEY_WIDTH
        values = keys * VALUE_RATIO
        self.q = LocalGlobalQuery(width, keys)
        self.k = ConvNorm(width, keys)
        self.v = ConvNorm(width, values)
        self.v_local = ConvNorm(values, values, 3, stride=2, groups=values)
        self.proj = ConvNorm(values, out_width)
        self.attention_bias = AttentionBias(NUM_HEADS, bias_grid, 2, bias_resize)

    def forward(self, x: Tensor) -> Tensor:
        value = self.v(x)
        local = self.v_local(value)
        out = attend(
            to_heads(self.q(x)),
            to_heads(self.k(x)),
            to_heads(value),
            self.attention_bias,
            x.shape[-2:],
            self.scale,
            query_stride=2,
            with_cp=self.with_cp,
        )
        return self.proj(F.gelu(from_heads(out, local.shape[-2:]) + local))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, summed with an :class:`AttentionDownsample` if given."""

    def __init__(self, width: int, out_width: int, attn: AttentionDownsample | None) -> None:
        super().__init__()
        self.conv = ConvNorm(width, out_width, 3, stride=2)
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return out if self.attn is None else self.attn(x) + out


class Block(nn.Module):
    """Attention, if given, then an MLP with a depthwise convolution: (B, C, H, W) -> the same."""

    folds = {"ls1": "token_mixer.proj.conv", "ls2": "mlp.fc2.conv"}

    def __init__(
        self,
        width: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float,
        token_mixer: MapAttention | None,
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        self.ls1 = None if token_mixer is None else LayerScale(width, layer_scale)
        self.mlp = ConvMlp(width, mlp_ratio, depthwise=True)
        self.ls2 = LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.token_mixer is not None and self.ls1 is not None:
            x = x + self.drop_path(self.ls1(self.token_mixer(x)))
        return x + self.drop_path(self.ls2(self.mlp(x)))


@MODELS.register_module()
class EfficientFormerV2(PyramidBackbone):
    """EfficientFormer V2 with pyramid outputs: the raw outputs of the stages.

    Source: arXiv 2212.08059; repository snap-research/EfficientFormer,
    ``models/efficientformer_v2.py``.

    Args:
        arch: ``"s0"``, ``"s1"``, ``"s2"`` or ``"l"``, or a dict with the fields of
            :class:`mmeformer.variants.Architecture`.
        out_indices: the pyramid levels to return, of 0 to 3 (strides 4, 8, 16, 32). Stages beyond
            the last one are not built.
        drop_path_rate: stochastic depth rate of the last block; None takes the published one.
        layer_scale_init_value: None takes the published one (1e-5).
        frozen_stages: -1 trains all; 0 freezes the stem; n freezes the stem and n stages, which
            then also stay in eval mode.
        norm_eval: keep the batch norms' running statistics as they are while training, as the
            published recipes do from ImageNet weights.
        with_cp: recompute blocks in the backward pass to save memory.
        bias_grid: grid (rows, columns), or one number for both, of the trained attention bias
            tables at stride 32; 7 as pretrained at 224 px. The downsample's table has twice as
            many rows and columns. 25 suits 800 px inputs.
        bias_resize: ``"displacement"``, or ``"matrix"`` for checkpoints trained downstream by the
            reference; see :class:`mmeformer.layers.attention_bias.AttentionBias`.
        head_bias_keys: the number of keys for which the bias of the second talking head was
            trained; 49 for ImageNet weights (224 px). That bias comes after the softmax and is
            added once per key, so its share of the output grows with the area of the map: 21-fold
            from 224 px to 1024 px. If ``head_bias_keys`` is set, the bias is scaled by
            ``head_bias_keys / keys`` and keeps its trained share at any size. None (default) is the
            reference's way, which its downstream checkpoints need.
        init_cfg: mmengine's initialization config.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    family = "v2"
    stem_act = nn.GELU

    def __init__(
        self, arch: str | Mapping[str, Any] = "s0", head_bias_keys: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(arch, **kwargs)
        if head_bias_keys is not None and head_bias_keys < 1:
            raise ValueError(f"head_bias_keys must be None or positive, but is {head_bias_keys}")
        for module in self.modules():
            if isinstance(module, MapAttention):
                module.head_bias_keys = head_bias_keys

    def build_stage(
        self, index: int, in_width: int | None, drop_path: list[float], layer_scale: float
    ) -> Stage:
        """See :meth:`PyramidBackbone.build_stage`."""
        architecture = self.architecture
        width, depth = architecture.widths[index], architecture.depths[index]
        first_attention = depth - architecture.attention_blocks[index]
        # Attention works at stride 32, in the last but one stage on the halved map: the same grid.
        halve = index == 2
        rows, columns = self.bias_grid
        finer = 1 if index >= 2 else 2 ** (3 - index)
        grid = (rows * finer, columns * finer)
        blocks = []
        for position, (ratio, rate) in enumerate(
            zip(architecture.mlp_ratios[index], drop_path, strict=True)
        ):
            mixer = (
                MapAttention(width, halve, grid, self.bias_resize, self.with_cp)
                if position >= first_attention
                else None
            )
            blocks.append(Block(width, ratio, rate, layer_scale, mixer))
        downsample = None
        if in_width is not None:
            attn = None
            if index == 3:
                grid = (2 * rows, 2 * columns)
                attn = AttentionDownsample(in_width, width, grid, self.bias_resize, self.with_cp)
            downsample = Downsample(in_width, width, attn)
        return Stage(downsample, blocks)
