# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from golden_weights import relative_error
from helpers import build_backbone
from mmcv.cnn import ConvModule
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from trained_like import trained_like

from mmeformer.deploy import fold
from mmeformer.deploy.biases import GraphBias
from mmeformer.deploy.substitutes import replace_modules
from mmeformer.layers.attention_bias import AttentionBias
from mmeformer.layers.blocks import LayerScale
from mmeformer.variants import VARIANTS

S0, L1 = VARIANTS["efficientformerv2_s0"], VARIANTS["efficientformer_l1"]


def count(model: nn.Module, kind) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@torch.no_grad()
def test_backbones_stay_equal(any_variant):
    variant = any_variant
    backbone = trained_like(build_backbone(variant, drop_path_rate=0.2))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    image = torch.randn(1, 3, 96, 64)
    folded, fixed = fold(backbone), fold(backbone, image_size=(96, 64))
    for copy in (folded, fixed):
        for ours, theirs in zip(copy(image), backbone(image), strict=True):
            assert relative_error(ours, theirs) < 1e-5
        assert count(copy, (_BatchNorm, DropPath)) == 0
        # V1's pooling mixer keeps its scale, V2 keeps none.
        pooling = sum(variant.architecture.depths) - sum(variant.architecture.attention_blocks)
        assert count(copy, LayerScale) == (pooling if variant.family == "v1" else 0)
        assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert count(fixed, AttentionBias) == 0 < count(folded, AttentionBias)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


@torch.no_grad()
def test_a_folded_copy_runs_under_autocast(small_variant):
    backbone = trained_like(build_backbone(small_variant))
    image = torch.randn(1, 3, 64, 96)
    for size in (None, (64, 96)):
        with torch.autocast("cpu", torch.bfloat16):
            levels = fold(backbone, size)(image)
        for ours, theirs in zip(levels, backbone(image), strict=True):
            assert relative_error(ours.float(), theirs) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, LayerScale, AttentionBias])
def test_every_kind_of_part_counts(norm):
    """What the first test compares does depend on each part: without it the outputs differ."""
    backbone = trained_like(build_backbone(S0))
    image = torch.randn(1, 3, 64, 64)
    before = backbone(image)[-1]
    part = next(module for module in backbone.modules() if isinstance(module, norm))
    for parameter in part.parameters():
        parameter.neg_()
    assert relative_error(backbone(image)[-1], before) > 1e-4


@torch.no_grad()
def test_a_model_in_training_mode_is_folded_as_it_tests():
    backbone = trained_like(build_backbone(S0)).train()
    folded = fold(backbone)
    assert backbone.training and not folded.training
    image = torch.randn(2, 3, 64, 64)
    assert relative_error(folded(image)[-1], backbone.eval()(image)[-1]) < 1e-5


@torch.no_grad()
def test_modules_of_necks_and_heads():
    model = nn.Sequential(
        ConvModule(3, 8, 3, norm_cfg=dict(type="BN")),
        ConvModule(8, 8, 3, groups=8, norm_cfg=dict(type="SyncBN")),
        ConvModule(8, 8, 1, norm_cfg=dict(type="GN", num_groups=2)),
        ConvModule(8, 8, 1, norm_cfg=dict(type="BN"), order=("norm", "conv", "act")),
        ConvModule(8, 8, 1, norm_cfg=dict(type="BN"), order=("conv", "act", "norm")),
        ConvModule(8, 8, 1),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
    )
    trained_like(model)
    folded = fold(model)
    image = torch.randn(2, 3, 16, 16)
    assert relative_error(folded(image), model(image)) < 1e-5
    # A norm before its convolution, after an activation or without a convolution stays.
    assert count(folded, _BatchNorm) == 3


@torch.no_grad()
def test_layers_that_others_share_are_left_alone():
    shared = nn.Conv2d(3, 3, 1)
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    model = trained_like(
        nn.ModuleList([nn.Sequential(shared, first), nn.Sequential(shared, second)])
    )
    second.running_mean += 3
    folded = fold(model)
    image = torch.randn(1, 3, 4, 4)
    for ours, theirs in zip(folded, model, strict=True):
        assert relative_error(ours(image), theirs(image)) < 1e-5


def test_norm_without_statistics_stays():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    assert count(fold(model), nn.BatchNorm2d) == 1


def test_a_fixed_copy_names_other_sizes():
    fixed = fold(build_backbone(S0), image_size=(64, 64))
    with pytest.raises(ValueError, match=r"map of \(2, 2\), but got \(3, 3\)"):
        fixed(torch.zeros(1, 3, 96, 96))
    with pytest.raises(ValueError, match="no EfficientFormer backbone"):
        fold(nn.Conv2d(3, 3, 1), image_size=(64, 64))


@torch.no_grad()
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 7)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (14, 21), (5, 11), (25, 42)])
@pytest.mark.parametrize("stride", [1, 2])
def test_bias_as_a_graph(grid, size, stride):
    bias = AttentionBias(2, grid, stride)
    bias.table.normal_()
    torch.testing.assert_close(GraphBias(bias)(size), bias.compute(size), rtol=1e-6, atol=1e-6)


def test_bias_as_a_graph_has_no_matrix_resize():
    backbone = build_backbone(L1, bias_resize="matrix")
    with pytest.raises(ValueError, match="fixed --size"):
        replace_modules(backbone, AttentionBias, GraphBias)
