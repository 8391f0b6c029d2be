# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmeformer.layers.blocks import (
    ConvMlp,
    ConvNorm,
    MapNorm,
    average_by_convolution,
    average_neighbors,
    keep_statistics,
    normalize_map,
    run_checkpointed,
)


def mlp(**norm):
    torch.manual_seed(0)
    layer = ConvMlp(3, 2, depthwise=True).double()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
            for name, value in norm.items():
                setattr(module, name, value)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_changes_neither_numbers_nor_statistics(training, momentum):
    plain = mlp(momentum=momentum).train(training)
    checkpointed = copy.deepcopy(plain)
    results = []
    for layer, run in ((plain, lambda x: plain(x)), (checkpointed, None)):
        x = torch.linspace(-2, 2, 2 * 3 * 6 * 5).view(2, 3, 6, 5).double().requires_grad_()
        out = run(x) if run else run_checkpointed(layer, x)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        # Running means and variances, and how many batches went into them.
        results.append([out.detach(), x.grad, *gradients, *layer.buffers()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    assert plain.fc1.bn.num_batches_tracked == int(training and momentum is None)


@pytest.mark.parametrize("act", [None, nn.GELU, nn.ReLU])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_a_bias_before_a_norm_is_left_out_in_training(act, momentum):
    torch.manual_seed(0)
    layer = ConvNorm(3, 4, 3, stride=2, act=act).double().train()
    layer.bn.momentum = momentum
    nn.init.normal_(layer.bn.weight), nn.init.normal_(layer.bn.bias)
    plain = copy.deepcopy(layer)
    results = []
    for module, run in ((layer, layer), (plain, lambda x: plain.act(plain.bn(plain.conv(x))))):
        for seed in range(2):
            x = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(seed)).double()
            x.requires_grad_()
            out = run(x)
            out.square().sum().backward()
        evaluated = module.eval()(x)
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append([out, evaluated, x.grad, *gradients, *module.buffers()])
    # The bias has no effect: its gradient, zero here, is a rounding error there.
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert layer.conv.bias.grad.count_nonzero() == 0
    assert plain.conv.bias.count_nonzero() == 4


def test_a_bias_counts_where_the_norm_does_not_remove_it():
    layer = ConvNorm(3, 4).train()
    layer.bn.eval()
    x = torch.randn(2, 3, 5, 5)
    layer(x).sum().backward()
    assert layer.conv.bias.grad.count_nonzero() == 4
    torch.testing.assert_close(layer(x), layer.bn(layer.conv(x)))


def test_checkpointing_keeps_the_input_alone():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 3, 6, 5).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_checkpointed(mlp().train(), x)
    assert not [tensor for tensor in kept if tensor.data_ptr() != x.data_ptr()]


def test_statistics_are_taken_in_again_after_an_error():
    layer = mlp().train()
    with pytest.raises(RuntimeError), keep_statistics(layer):
        layer(torch.zeros(1))
    layer(torch.randn(2, 3, 4, 4).double())
    assert all(norm.running_mean.any() for norm in (layer.fc1.bn, layer.mid.bn, layer.fc2.bn))


FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 1, 1), (1, 2, 1, 6), (2, 2, 2, 1)])
def test_average_of_neighbors_on_a_gpu_is_the_same(shape, layout):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    found, expected = average_by_convolution(x), average_neighbors(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, weights)[0] for y in (found, expected)))


def test_average_of_large_values_is_finite_in_half_precision():
    x = torch.full((1, 2, 4, 5), 3e4, dtype=torch.float16)
    torch.testing.assert_close(average_by_convolution(x), x)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 1, 2)])
def test_norm_of_a_map_on_a_gpu_is_the_same(shape, layout):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 5
    x = x.contiguous(memory_format=layout).requires_grad_()
    norm = MapNorm(shape[1]).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    inputs = (x, norm.weight, norm.bias)
    found, expected = normalize_map(*inputs, norm.eps), norm(x)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=layout)
    weights = torch.randn_like(expected)
    for pair in zip(
        *(torch.autograd.grad(y, inputs, weights) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(*pair)


def test_norm_of_a_half_precise_map_sums_in_float32():
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 64, 64) + 20).bfloat16()
    norm = MapNorm(8)
    expected = F.group_norm(x.float(), 1)
    found = normalize_map(x, norm.weight.bfloat16(), norm.bias.bfloat16(), norm.eps)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        found = normalize_map(x, norm.weight, norm.bias, norm.eps)
    assert found.dtype is torch.float32  # as from PyTorch's norm
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
