# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from helpers import build_backbone
from launches import Launches
from torch import nn
from trained_like import trained_like

from mmeformer.backbones.efficientformer import PoolBlock
from mmeformer.backbones.efficientformer_v2 import LocalGlobalQuery
from mmeformer.deploy import fold
from mmeformer.deploy.substitutes import (
    FoldedPoolBlock,
    GraphPoolBlock,
    InplaceGelu,
    PointwiseConv,
    is_pointwise,
    query_in_one_convolution,
    substitute_for_graph,
)
from mmeformer.layers.blocks import ConvNorm
from mmeformer.variants import VARIANTS


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 1, 1), (1, 2, 1, 6), (2, 2, 2, 1)])
@pytest.mark.parametrize("kind", [FoldedPoolBlock, GraphPoolBlock])
@torch.no_grad()
def test_pool_blocks_equal_the_trained_one(kind, shape, memory_format):
    block = trained_like(PoolBlock(shape[1], 4, drop_path=0.1, layer_scale=0.5).double())
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    before = x.clone()
    torch.testing.assert_close(kind(block)(x), block(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
@torch.no_grad()
def test_the_subsampled_map_is_part_of_the_query(size):
    query = trained_like(LocalGlobalQuery(4, 6).double().eval())
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    weight = query.local.weight.clone()
    torch.testing.assert_close(query_in_one_convolution(query)(x), query(x))
    assert torch.equal(query.local.weight, weight)


def test_a_graph_has_convolutions_in_place_of_sums():
    folded = fold(trained_like(build_backbone(VARIANTS["efficientformer_l1"])))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = folded(image)
        substitute_for_graph(folded)
        for found, expected in zip(folded(image), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kinds = [type(block) for stage in folded.stages for block in stage.blocks]
    assert kinds.count(GraphPoolBlock) == 14 and FoldedPoolBlock not in kinds


def test_every_layer_with_gelu_works_in_place(small_variant):
    backbone = build_backbone(small_variant)
    gelus = [sum(isinstance(m, nn.GELU) for m in backbone.modules())]
    folded = fold(backbone)
    gelus.append(sum(isinstance(m, InplaceGelu) for m in folded.modules()))
    assert gelus[0] == gelus[1] > 0
    assert not any(isinstance(m, nn.GELU) for m in folded.modules())


def _folded_conv(act, **settings):
    block = trained_like(ConvNorm(6, 8, act=act, **settings).eval())
    return fold(nn.Sequential(block))[0]


@pytest.mark.parametrize("act", [None, nn.GELU, nn.ReLU])
@pytest.mark.parametrize("settings", [{}, dict(kernel_size=3, stride=2), dict(groups=2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_the_activation_is_part_of_the_convolution(act, settings, memory_format):
    block = _folded_conv(act, **settings)
    x = torch.randn(2, 6, 9, 7).contiguous(memory_format=memory_format)
    wanted = (act or nn.Identity)()(block.conv(x))
    with Launches() as launches:
        found = block(x)
    assert launches.operators == {"_convolution_pointwise": 1}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=memory_format)


def test_layers_are_their_own_operators_where_onednn_is_not():
    block = _folded_conv(nn.GELU)
    x = torch.randn(2, 6, 9, 7)
    wanted = F.gelu(block.conv(x))
    torch.testing.assert_close(block.double()(x.double()).float(), wanted)
    block.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    image = x.clone().requires_grad_()
    block(image).sum().backward()
    assert image.grad.abs().sum() > 0
    assert block(x[:0]).shape == (0, 8, 9, 7)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(block(x), wanted)
    graph = torch.jit.trace(block, x).inlined_graph
    assert "mkldnn" not in str(graph)


@torch.no_grad()
def test_a_folded_copy_leaves_its_input_alone(small_variant):
    folded = fold(trained_like(build_backbone(small_variant)))
    image = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    before = image.clone()
    first = [level.clone() for level in folded(image)]
    assert torch.equal(image, before)
    # Nor does a later call change what an earlier one gave.
    for level, again in zip(first, folded(image), strict=True):
        assert torch.equal(level, again)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_product_of_matrices_is_a_pointwise_convolution(bias):
    conv = nn.Conv2d(3, 5, 1, bias=bias).double()
    product = PointwiseConv.of(conv)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert not x.is_contiguous()
    found = product.as_product(x)
    torch.testing.assert_close(found, conv(x))
    torch.testing.assert_close(product(x), conv(x))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_pointwise_convolutions_are_found(small_variant):
    assert is_pointwise(nn.Conv2d(4, 4, 1))
    for other in (
        dict(kernel_size=3),
        dict(kernel_size=1, stride=2),
        dict(kernel_size=1, groups=4),
    ):
        assert not is_pointwise(nn.Conv2d(4, 4, **other))
    folded = fold(build_backbone(small_variant))
    kinds = {type(m) for m in folded.modules() if isinstance(m, nn.Conv2d) and is_pointwise(m)}
    assert PointwiseConv in kinds and nn.Conv2d not in kinds
