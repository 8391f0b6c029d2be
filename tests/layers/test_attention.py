# SPDX-License-Identifier: Apache-2.0
"""Attention in pieces of queries is the attention of all queries at once."""

import pytest
import torch
from torch import nn

from mmeformer.layers import attention
from mmeformer.layers.attention_bias import AttentionBias

SIZE = (5, 7)


def parts(stride, resize="displacement", grid=(3, 4)):
    torch.manual_seed(0)
    bias = AttentionBias(2, grid, stride, resize).double()
    nn.init.normal_(bias.table)
    rows, columns = (-(-side // stride) for side in SIZE)
    query = torch.randn(2, 2, rows * columns, 4, dtype=torch.double)
    key = torch.randn(2, 2, SIZE[0] * SIZE[1], 4, dtype=torch.double)
    value = torch.randn(2, 2, SIZE[0] * SIZE[1], 6, dtype=torch.double)
    mixes = [nn.Conv2d(2, 2, 1).double() for _ in range(2)]
    return query, key, value, bias, mixes


def plain(query, key, value, bias, mixes):
    """The definition, at once."""
    logits = mixes[0](query @ key.transpose(2, 3) / 2 + bias.compute(SIZE))
    return mixes[1](logits.softmax(-1)) @ value


def attend(query, key, value, bias, stride, mixes):
    return attention.attend(
        query,
        key,
        value,
        bias,
        SIZE,
        stride,
        mix_logits=mixes[0],
        mix_attention=mixes[1],
        mix_bias=mixes[1].bias,
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("resize", ["displacement", "matrix"])
@pytest.mark.parametrize("limit", [1, 300, 1000, 10**9])
@pytest.mark.parametrize("cached", [0, 10**9])
def test_pieces_equal_the_whole(monkeypatch, stride, resize, limit, cached):
    monkeypatch.setitem(attention.PIECE, "cpu", limit)
    monkeypatch.setattr(AttentionBias, "MAX_CACHED_NUMBERS", cached)
    query, key, value, bias, mixes = parts(stride, resize)
    leaves = [query, key, value]
    results = []
    for function in ("plain", "attend", "attend in eval mode"):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        bias.zero_grad()
        if function == "plain":
            out = plain(query, key, value, bias, mixes)
        else:
            bias.train("eval" not in function)
            out = attend(query, key, value, bias, stride, mixes)
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), bias.table.grad.clone(), *(leaf.grad for leaf in leaves)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    with torch.no_grad():
        out = attend(query, key, value, bias.eval(), stride, mixes)
    torch.testing.assert_close(out, results[0][0])


def test_only_the_talking_heads_learn(monkeypatch):
    """With everything else frozen their gradient must still arrive."""
    monkeypatch.setitem(attention.PIECE, "cpu", 1)
    query, key, value, bias, mixes = parts(1)
    bias.requires_grad_(False)
    attend(query, key, value, bias, 1, mixes).sum().backward()
    pieces = [mix.weight.grad.clone() for mix in mixes]
    for mix in mixes:
        mix.zero_grad()
    plain(query, key, value, bias, mixes).sum().backward()
    torch.testing.assert_close(pieces, [mix.weight.grad for mix in mixes])


def test_the_whole_matrix_is_never_held():
    """Memory of 64 x 64 queries: one matrix of them all would take 537 MB."""
    tracked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                tracked.append(out.numel())
            return out

    bias = AttentionBias(8, (64, 64)).eval()
    query, key = torch.randn(2, 1, 8, 64 * 64, 4)
    with torch.no_grad(), Watch():
        attention.attend(query, key, key, bias, (64, 64))
    assert max(tracked) <= 2 * attention.PIECE["cpu"] < 8 * 4096**2 / 32
