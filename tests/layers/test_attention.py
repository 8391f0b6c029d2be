# SPDX-License-Identifier: Apache-2.0
"""Attention in chunks of queries is the attention of all queries at once."""

import pytest
import torch
from torch import nn

from mmeformer.layers import attention
from mmeformer.layers.attention_bias import AttentionBias

SIZE = (5, 7)


def operands(stride, resize="displacement", grid=(3, 4)):
    torch.manual_seed(0)
    bias = AttentionBias(2, grid, stride, resize).double()
    nn.init.normal_(bias.table)
    rows, columns = (-(-side // stride) for side in SIZE)
    query = torch.randn(2, 2, rows * columns, 4, dtype=torch.double)
    key = torch.randn(2, 2, SIZE[0] * SIZE[1], 4, dtype=torch.double)
    value = torch.randn(2, 2, SIZE[0] * SIZE[1], 6, dtype=torch.double)
    mixes = [attention.TalkingHead(2).double() for _ in range(2)]
    return query, key, value, bias, mixes


def plain(query, key, value, bias, mixes):
    """The definition, at once."""
    heads = [nn.Conv2d(2, 2, 1).double() for _ in mixes]
    for head, mix in zip(heads, mixes, strict=True):
        head.weight, head.bias = mix.weight, mix.bias
    logits = heads[0](query @ key.transpose(2, 3) / 2 + bias.compute(SIZE))
    return heads[1](logits.softmax(-1)) @ value


def attend(query, key, value, bias, stride, mixes, with_cp=True):
    return attention.attend(
        query,
        key,
        value,
        bias,
        SIZE,
        scale=0.5,
        query_stride=stride,
        mix_logits=mixes[0],
        mix_attention=mixes[1],
        with_cp=with_cp,
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("resize", ["displacement", "matrix"])
@pytest.mark.parametrize("limit", [1, 300, 1000, 10**9])
@pytest.mark.parametrize("cached", [0, 10**9])
def test_chunks_equal_the_whole(monkeypatch, stride, resize, limit, cached):
    monkeypatch.setattr(attention, "CPU_CHUNK", limit)
    monkeypatch.setattr(AttentionBias, "MAX_CACHED_NUMBERS", cached)
    query, key, value, bias, mixes = operands(stride, resize)
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
    monkeypatch.setattr(attention, "CPU_CHUNK", 1)
    query, key, value, bias, mixes = operands(1)
    bias.requires_grad_(False)
    attend(query, key, value, bias, 1, mixes).sum().backward()
    chunks = [mix.weight.grad.clone() for mix in mixes]
    for mix in mixes:
        mix.zero_grad()
    plain(query, key, value, bias, mixes).sum().backward()
    torch.testing.assert_close(chunks, [mix.weight.grad for mix in mixes])


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Sizes of all tensors that come into being."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.sizes.append(out.numel())
        return out


def test_the_whole_matrix_is_never_held():
    """Memory of 64 x 64 queries: one matrix of them all would take 537 MB."""
    bias = AttentionBias(8, (64, 64)).eval()
    query, key = torch.randn(2, 1, 8, 64 * 64, 4)
    with torch.no_grad(), Watch() as watch:
        attention.attend(query, key, key, bias, (64, 64), scale=0.5)
    assert max(watch.sizes) <= 2 * attention.CPU_CHUNK < 8 * 4096**2 / 32


@pytest.mark.parametrize("with_cp", [False, True])
def test_training_uses_chunks_where_asked_or_where_the_matrix_is_too_large(monkeypatch, with_cp):
    monkeypatch.setattr(attention, "CPU_CHUNK", 100)
    query, key, value, bias, mixes = operands(1)
    query.requires_grad_()
    whole = 2 * 2 * (SIZE[0] * SIZE[1]) ** 2

    def largest():
        with Watch() as watch:
            attend(query, key, value, bias, 1, mixes, with_cp).sum().backward()
        return max(watch.sizes)

    assert (largest() < whole) == with_cp
    monkeypatch.setattr(attention, "LARGEST_MATRIX", whole - 1)
    assert largest() < whole


def test_a_graph_has_no_chunks(monkeypatch):
    """Traced for one size it would hold their number."""
    monkeypatch.setattr(attention, "CPU_CHUNK", 1)
    query, key, value, bias, _ = operands(1)
    bias.requires_grad_(False)

    class Attention(nn.Module):
        def forward(self, query, key, value):
            return attention.attend(query, key, value, bias, SIZE, scale=0.5)

    with torch.no_grad():
        graph = torch.jit.trace(Attention(), (query, key, value))
    assert str(graph.graph).count("aten::softmax") == 1


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_attention_in_exported_graphs_is_the_same(stride):
    """There, talking heads are convolutions of (B, heads, n, m)."""
    query, key, value, bias, mixes = operands(stride)
    for module in (bias, *mixes):
        module.requires_grad_(False)  # as in models that are exported: they become constants
    expected = plain(query, key, value, bias, mixes)

    def run(query, key, value):
        return attend(query, key, value, bias, stride, mixes)

    traced = torch.jit.trace(run, (query, key, value), check_trace=False)
    torch.testing.assert_close(traced(query, key, value), expected)
    assert "_convolution" in str(traced.graph)


@pytest.mark.parametrize("heads", [True, False])
def test_the_matrix_is_never_float32_under_autocast(heads):
    query, key, value, bias, mixes = operands(1)
    expected = plain(query, key, value, bias, mixes) if heads else None
    query, key, value = (x.float() for x in (query, key, value))
    bias.float()
    seen = []

    def watch(x, mix=None):
        seen.append(x.dtype)
        return x if mix is None else mix.float()(x)

    functions = [lambda x, mix=mix: watch(x, mix if heads else None) for mix in mixes]
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(query, key, value, bias, 1, functions, with_cp=False)
    assert seen == [torch.bfloat16, torch.bfloat16]
    if heads:
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)
