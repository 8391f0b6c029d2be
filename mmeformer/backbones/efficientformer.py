# SPDX-License-Identifier: Apache-2.0
"""EfficientFormer V1 (arXiv 2206.01191; reference: snap-research/EfficientFormer, ``models/``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from mmeformer.backbones.base import PyramidBackbone, Stage, run_block
from mmeformer.layers.attention import attend
from mmeformer.layers.attention_bias import AttentionBias
from mmeformer.layers.blocks import ConvMlp, ConvNorm, LayerScale, MapNorm, average_neighbors
from mmeformer.registry import MODELS

NUM_HEADS = 8
KEY_WIDTH = 32
VALUE_WIDTH = 128


class Pooling(nn.Module):
    """3 x 3 average pooling (without padding) minus the input: (B, C, H, W) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return average_neighbors(x) - x


class PoolBlock(nn.Module):
    """4D block: average pooling as token mixer, then an MLP: (B, C, H, W) -> (B, C, H, W)."""

    folds = {"ls2": "mlp.fc2.conv"}

    def __init__(self, width: int, mlp_ratio: float, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.token_mixer = Pooling()
        self.ls1 = LayerScale(width, layer_scale)
        self.mlp = ConvMlp(width, mlp_ratio, depthwise=False)
        self.ls2 = LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.token_mixer(x)))
        return x + self.drop_path(self.ls2(self.mlp(x)))


class TokenAttention(nn.Module):
    """Multi-head attention over tokens with a bias by displacement: (B, N, C) -> (B, N, C)."""

    scale = KEY_WIDTH**-0.5

    def __init__(
        self, width: int, bias_grid: tuple[int, int], bias_resize: str, with_cp: bool
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.qkv = nn.Linear(width, NUM_HEADS * (2 * KEY_WIDTH + VALUE_WIDTH))
        self.proj = nn.Linear(NUM_HEADS * VALUE_WIDTH, width)
        self.attention_bias = AttentionBias(NUM_HEADS, bias_grid, resize=bias_resize)

    def forward(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, NUM_HEADS, -1).transpose(1, 2)
        query, key, value = qkv.split([KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH], dim=-1)
        out = attend(query, key, value, self.attention_bias, size, self.scale, with_cp=self.with_cp)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class TokenMlp(nn.Module):
    """MLP of two linear layers with GELU: (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TokenBlock(nn.Module):
    """3D block: pre-norm attention, then an MLP, over the tokens of a map of ``size`` (H, W).

    (B, H * W, C) -> (B, H * W, C).
    """

    folds = {"ls1": "token_mixer.proj", "ls2": "mlp.fc2"}

    def __init__(
        self,
        width: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float,
        bias_grid: tuple[int, int],
        bias_resize: str,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.token_mixer = TokenAttention(width, bias_grid, bias_resize, with_cp)
        self.ls1 = LayerScale(width, layer_scale, channel_dim=-1)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TokenMlp(width, mlp_ratio)
        self.ls2 = LayerScale(width, layer_scale, channel_dim=-1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        x = x + self.drop_path(self.ls1(self.token_mixer(self.norm1(x), size)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class TokenStage(Stage):
    """A stage whose last blocks work on tokens; it converts the map to tokens and back once."""

    def run_blocks(self, x: Tensor, with_cp: bool) -> Tensor:
        size = x.shape[-2:]
        on_tokens = False
        for block in self.blocks:
            if isinstance(block, TokenBlock):
                if not on_tokens:
                    x = x.flatten(2).transpose(1, 2)
                    on_tokens = True
                x = run_block(block, with_cp, x, size)
            else:
                x = run_block(block, with_cp, x)
        return x.transpose(1, 2).unflatten(2, size) if on_tokens else x


@MODELS.register_module()
class EfficientFormer(PyramidBackbone):
    """EfficientFormer V1 with pyramid outputs.

    Source: arXiv 2206.01191; repository snap-research/EfficientFormer, ``detection/backbone.py``.
    Every output level has a GroupNorm of one group, as in the reference downstream (not with
    ``pyramid_norms=False``); ImageNet checkpoints do not have these norms.

    Args:
        arch: ``"l1"``, ``"l3"`` or ``"l7"``, or a dict with the fields of
            :class:`mmeformer.variants.Architecture`.
        out_indices: the pyramid levels to return, of 0 to 3 (strides 4, 8, 16, 32). Stages beyond
            the last one are not built.
        drop_path_rate: stochastic depth rate of the last block; None takes the published one.
        layer_scale_init_value: None takes the published one (1e-5; l7: 1e-6).
        frozen_stages: -1 trains all; 0 freezes the stem; n freezes the stem and n stages, which
            then also stay in eval mode. The pyramid norms are never frozen.
        norm_eval: keep the batch norms' running statistics as they are while training.
        with_cp: recompute blocks in the backward pass to save memory.
        bias_grid: grid (rows, columns), or one number for both, of the trained attention bias
            tables at stride 32; 7 as pretrained at 224 px. 25 suits 800 px inputs.
        bias_resize: ``"displacement"``, or ``"matrix"`` for checkpoints trained downstream by the
            reference; see :class:`mmeformer.layers.attention_bias.AttentionBias`.
        pyramid_norms: whether the outputs are normalized. Classifiers have no such norms.
        init_cfg: mmengine's initialization config.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    family = "v1"
    stem_act = nn.ReLU

    def __init__(
        self, arch: str | Mapping[str, Any] = "l1", pyramid_norms: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(arch, **kwargs)
        for index in self.out_indices if pyramid_norms else ():
            self.norms[str(index)] = MapNorm(self.architecture.widths[index])

    def build_stage(
        self, index: int, in_width: int | None, drop_path: list[float], layer_scale: float
    ) -> Stage:
        """See :meth:`PyramidBackbone.build_stage`."""
        architecture = self.architecture
        width, depth = architecture.widths[index], architecture.depths[index]
        first_attention = depth - architecture.attention_blocks[index]
        rows, columns = self.bias_grid
        blocks: list[nn.Module] = []
        for position, (ratio, rate) in enumerate(
            zip(architecture.mlp_ratios[index], drop_path, strict=True)
        ):
            if position < first_attention:
                blocks.append(PoolBlock(width, ratio, rate, layer_scale))
            else:
                # The grid is given at stride 32: an earlier stage sees a finer map.
                finer = 2 ** (3 - index)
                grid = (rows * finer, columns * finer)
                attention = grid, self.bias_resize, self.with_cp
                blocks.append(TokenBlock(width, ratio, rate, layer_scale, *attention))
        downsample = None if in_width is None else ConvNorm(in_width, width, 3, stride=2)
        return TokenStage(downsample, blocks)
