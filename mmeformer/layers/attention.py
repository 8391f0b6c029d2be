# SPDX-License-Identifier: Apache-2.0
"""Attention with a bias by displacement, computed in pieces of queries.

The matrix of logits of all queries and keys grows with the square of the area: 35 MB per block at
800 x 1344 px, 537 MB at 2048 px. Taken in pieces of queries it never exists as a whole, and each
piece stays in the processor's cache while it passes through bias, softmax and talking heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PIECE = {"cpu": 2**20, "cuda": 2**25}
"""Logits held at a time: 4 MiB on a CPU, for its cache; 128 MiB on a GPU, to fill it."""


def mix_heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution over heads: (B, heads, n, m) -> (B, out heads, n, m).

    As a product of matrices, which keeps heads apart in memory where a convolution in channels-last
    format would interleave them.

    Args:
        x: (B, heads, n, m).
        weight: (out heads, heads, 1, 1).
        bias: (out heads,) or None.
    """
    mixed = weight.flatten(1) @ x.flatten(2)
    if bias is not None:
        mixed = mixed.add_(bias[:, None])
    # Not by `unflatten`: PyTorch's ONNX exporter then takes the sizes for constants.
    return mixed.view(x.shape[0], -1, *x.shape[2:])


@torch.no_grad()
def fold_scale(layer: nn.Conv2d, scale: float) -> None:
    """Make a layer give ``scale`` times its output."""
    layer.weight.mul_(scale)
    if layer.bias is not None:
        layer.bias.mul_(scale)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: nn.Module,
    size: tuple[int, int],
    query_stride: int = 1,
    scale: float | None = None,
    mix_logits: nn.Conv2d | None = None,
    mix_attention: nn.Conv2d | None = None,
    mix_bias: Tensor | None = None,
) -> Tensor:
    """Softmax of scaled products and a bias, times the values.

    In training the pieces' matrices are not kept for the backward pass but computed again, unless
    one piece holds all.

    Args:
        query: (B, heads, Nq, D), row after row of every ``query_stride``-th place.
        key: (B, heads, H * W, D).
        value: (B, heads, H * W, V).
        bias: an :class:`mmeformer.layers.attention_bias.AttentionBias` or what stands for it.
        size: (H, W) of the key map.
        query_stride: as the bias has it.
        scale: of the products; None takes ``D ** -0.5``.
        mix_logits, mix_attention: talking heads before and after the softmax: 1x1 convolutions over
            heads, of which the weight counts and, of the first, the bias.
        mix_bias: (heads,), added to the mixed attention of every query and key.

    Returns:
        (B, heads, Nq, V).
    """
    # Each product is scaled through its query, which has far fewer numbers.
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query * scale if scale != 1 else query
    key = key.transpose(2, 3)

    def piece(query: Tensor, bias: Tensor) -> Tensor:
        logits = query @ key
        # In place where that does not round the bias (autocast has half-precision logits).
        logits = logits.add_(bias) if logits.dtype == bias.dtype else logits + bias
        if mix_logits is not None:
            logits = mix_heads(logits, mix_logits.weight, mix_logits.bias)
        attention = logits.softmax(dim=-1).to(value.dtype)
        if mix_attention is not None:
            attention = mix_heads(attention, mix_attention.weight, None)
        return attention @ value

    out = _in_pieces(piece, query, key, value, bias, size, query_stride)
    if mix_bias is not None:
        # The same for all queries, so it meets the sum of the values rather than every key.
        out = out + mix_bias[:, None, None] * value.sum(dim=2, keepdim=True)
    return out


def _in_pieces(
    piece: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: nn.Module,
    size: tuple[int, int],
    query_stride: int,
) -> Tensor:
    """``piece`` of all queries and their bias, or of as many queries at a time as fit."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # A compiler fuses the passes by itself, and a graph should not hold a number of pieces.
        return piece(query, bias(size))
    rows, width = (-(-side // query_stride) for side in size)
    sizes = _piece_sizes(query, key, rows, width)
    if len(sizes) == 1:
        return piece(query, bias(size))
    recompute = torch.is_grad_enabled() and any(
        part.requires_grad for part in (query, key, value, *bias.parameters())
    )
    bias_part = bias.parts(size)
    out, first = [], 0
    # A split, whose gradient is put together once; each slice would have one of full size.
    for part in query.split(sizes, dim=2):
        last = first + part.shape[2]
        if recompute:

            def run(part: Tensor, first: int, last: int) -> Tensor:
                return piece(part, bias_part(first, last))

            out.append(
                checkpoint(run, part, first, last, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            out.append(piece(part, bias_part(first, last)))
        first = last
    return torch.cat(out, dim=2)


def _piece_sizes(query: Tensor, key: Tensor, rows: int, width: int) -> list[int]:
    """Numbers of queries: of one or more whole rows each, or of parts of a row."""
    logits_per_query = query.shape[0] * query.shape[1] * key.shape[-1]
    most = max(1, PIECE.get(query.device.type, PIECE["cuda"]) // logits_per_query)
    if most >= width:
        step = most // width * width
        return [min(step, rows * width - first) for first in range(0, rows * width, step)]
    return [min(most, width - first) for first in range(0, width, most)] * rows
