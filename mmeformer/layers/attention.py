# SPDX-License-Identifier: Apache-2.0
"""Attention with a bias by displacement, of all queries at once or in chunks of queries.

The matrix of logits of all queries and keys grows with the square of the area: 35 MB per block at
800 x 1344 px, 537 MB at 2048 px. If none of it is kept for a backward pass, it is computed in
chunks of queries and never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmeformer.layers.graphs import in_export, in_graph

CPU_CHUNK = 2**20
"""Logits per chunk on a CPU: 4 MiB stay in its cache through bias, softmax and talking heads."""

LARGEST_MATRIX = 2**28
"""Logits that are computed at once on a GPU, and in training: 1 GiB in float32.

On a GPU, chunks gain no cache hits, and each chunk launches every kernel again. In training, chunks
are recomputed in the backward pass, which costs time.
"""


class TalkingHead(nn.Conv2d):
    """1x1 convolution over attention heads (arXiv 2003.02436): (heads, B, n, m) -> the same.

    With the heads first it is one matrix product, which does not reorder the large matrix (n, m).
    As a product per image, the gradient of its weight took half of a training step on a GPU.

    In exported graphs the matrices are (B, heads, n, m): a convolution, as every runtime has it.
    """

    def __init__(self, heads: int) -> None:
        super().__init__(heads, heads, 1)

    def mix(self, x: Tensor) -> Tensor:
        """The convolution without its bias."""
        if in_export():
            return F.conv2d(x, self.weight)
        return (self.weight.flatten(1) @ x.flatten(1)).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        if in_export():
            return super().forward(x)
        x = self.mix(x)
        if self.bias is None:
            return x
        return x + self.bias[:, None, None, None].to(x.dtype)  # under autocast the bias is float32


class Bias(Protocol):
    """A bias of logits, such as :class:`mmeformer.layers.attention_bias.AttentionBias`.

    Sizes are (H, W) of the key map.
    """

    def __call__(self, size: tuple[int, ...]) -> Tensor:
        """The bias of all queries: (heads, Nq, H * W)."""

    def chunks(self, size: tuple[int, ...]) -> Callable[[int, int], Tensor]:
        """A function of ``first`` and ``last`` (exclusive) that gives the bias of these queries."""


def unchanged(x: Tensor) -> Tensor:
    """No talking head."""
    return x


def softmax(logits: Tensor) -> Tensor:
    """Softmax of the last dimension, in the type of the logits.

    Autocast would write the large matrix in float32, only to cast it for the next product. The
    kernels compute in float32 in either case.
    """
    if logits.dtype in (torch.float32, torch.float64):
        return logits.softmax(dim=-1)
    with torch.autocast(logits.device.type, enabled=False):
        return logits.softmax(dim=-1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias,
    size: tuple[int, ...],
    scale: float,
    query_stride: int = 1,
    mix_logits: Callable[[Tensor], Tensor] = unchanged,
    mix_attention: Callable[[Tensor], Tensor] = unchanged,
    with_cp: bool = False,
) -> Tensor:
    """``softmax(scale * query @ key^T + bias) @ value``, with talking heads around the softmax.

    Args:
        query: (B, heads, Nq, D), row by row, at every ``query_stride``-th position.
        key: (B, heads, H * W, D).
        value: (B, heads, H * W, V).
        bias: of the logits.
        size: (H, W) of the key map.
        scale: of the products.
        query_stride: that of the bias.
        mix_logits, mix_attention: talking heads before and after the softmax, of matrices
            (heads, B, Nq, H * W); see :class:`TalkingHead`.
        with_cp: use chunks of queries in training too, recomputed in the backward pass.

    Returns:
        (B, heads, Nq, V).
    """
    key = key.transpose(2, 3)
    if scale != 1:  # else it is part of the layer before
        query = query * scale  # not the products, which are far more numbers
    if in_export():
        return mix_attention(mix_logits(query @ key + bias(size)).softmax(dim=-1)) @ value
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # see TalkingHead

    def attend_to_all_keys(query: Tensor, bias: Tensor) -> Tensor:
        logits = query @ key
        # Under autocast the bias is float32, and would make the large matrix float32 as well.
        logits = mix_logits(logits + bias[:, None].to(logits.dtype))
        return mix_attention(softmax(logits)) @ value

    step = _queries_per_chunk(query, key, -(-size[1] // query_stride), with_cp)
    if step is None:
        return attend_to_all_keys(query, bias(size)).transpose(0, 1)
    bias_of = bias.chunks(size)

    def attend_chunk(query: Tensor, first: int) -> Tensor:
        return attend_to_all_keys(query, bias_of(first, first + query.shape[2]))

    run: Callable[..., Any] = attend_chunk
    if torch.is_grad_enabled():
        run = partial(checkpoint, attend_chunk, use_reentrant=False, preserve_rng_state=False)
    # `split` puts the gradient together once; each slice would have a gradient of full size.
    chunks = enumerate(query.split(step, dim=2))
    out = torch.cat([run(chunk, index * step) for index, chunk in chunks], dim=2)
    return out.transpose(0, 1)


def _queries_per_chunk(query: Tensor, key: Tensor, row: int, with_cp: bool) -> int | None:
    """Queries per chunk, in whole rows of ``row`` queries, or None if one chunk holds all."""
    if in_graph():
        # A graph made for one size serves others, so it must not contain a number of chunks.
        return None
    cheap = with_cp or not torch.is_grad_enabled()
    limit = CPU_CHUNK if cheap and query.device.type == "cpu" else LARGEST_MATRIX
    logits_per_query = query.shape[0] * query.shape[1] * key.shape[-1]
    if query.shape[2] * logits_per_query <= limit:
        return None
    return max(1, limit // (row * logits_per_query)) * row
