# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmeformer.layers import blocks
from mmeformer.layers.blocks import (
    ConvMlp,
    ConvNorm,
    LayerScale,
    PointConv2d,
    Stem,
    run_chain,
    run_checkpointed,
    scaled_norm,
)
from mmeformer.layers.norm_gelu import norm_gelu, norm_gelu_conv


def plainly(layers, x):
    for layer in layers:
        x = layer.act(layer.bn(layer.conv(x)))
    return x


class Chain(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return run_chain(self.layers, x)


def chain():
    torch.manual_seed(0)
    return nn.ModuleList(
        [ConvNorm(3, 8, act=nn.GELU), ConvNorm(8, 8, 3, groups=8, act=nn.ReLU), ConvNorm(8, 4)]
    ).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_chain_has_the_plain_results_and_gradients(training, checkpointed, memory_format):
    results = []
    for run in (plainly, run_chain):
        layers = chain().train(training)
        x = torch.linspace(-2, 2, 2 * 3 * 6 * 5).view(2, 3, 6, 5).double()
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        if checkpointed and run is run_chain:
            out = run_checkpointed(Chain(layers), x)
        else:
            out = run(layers, x)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in layers.parameters()]
        results.append([out.detach(), x.grad, *gradients, layers[0].bn.running_mean])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("module", [ConvMlp(3, 2, depthwise=True), Stem(8, nn.GELU)])
def test_activations_are_not_kept(module):
    kept = []
    for part in module.modules():
        if isinstance(part, nn.GELU):
            part.register_forward_hook(lambda _, inputs, out: kept.append(weakref.ref(out)))
    out = module.train()(torch.randn(1, 3, 16, 16, requires_grad=True))
    gc.collect()
    last_is_output = isinstance(module, Stem)
    assert [ref() is None for ref in kept] == [True, not last_is_output]
    out.sum().backward()


def test_with_channels_last_norms_are_not_kept_either(monkeypatch):
    kept = []

    def spy(norm, x, shift):
        out, again = norm_gelu(norm, x, shift)
        kept.append(weakref.ref(out))
        return out, again

    def spy_on_last(norm, x, shift, conv):
        conv.register_forward_hook(lambda _, inputs, out: kept.append(weakref.ref(inputs[0])))
        return norm_gelu_conv(norm, x, shift, conv)

    monkeypatch.setattr(blocks, "norm_gelu", spy)
    monkeypatch.setattr(blocks, "norm_gelu_conv", spy_on_last)
    image = torch.randn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    out = ConvMlp(3, 2, depthwise=True).train()(image.requires_grad_())
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True]
    out.sum().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (3, 3, 1, 7), (2, 3, 1, 1), (0, 3, 4, 4)])
def test_point_convolution(memory_format, shape):
    torch.manual_seed(0)
    layer = PointConv2d(3, 6).double()
    x = torch.randn(shape).double().contiguous(memory_format=memory_format).requires_grad_()
    found = layer(x)
    expected = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected)
    if x.numel():
        assert found.stride() == expected.stride() or min(shape[2:]) == 1
        gradient = torch.randn_like(expected)
        inputs = (x, layer.weight, layer.bias)
        torch.testing.assert_close(
            torch.autograd.grad(found, inputs, gradient),
            torch.autograd.grad(expected, inputs, gradient),
        )


@pytest.mark.parametrize("training", [True, False])
def test_a_scale_goes_into_the_norm(training):
    torch.manual_seed(0)
    norm, scale = nn.BatchNorm2d(4).double(), LayerScale(4, 0.3).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias), nn.init.normal_(scale.gamma)
    results = []
    for run in (scaled_norm, lambda norm, scale, x: scale(norm(x))):
        copied, factor = copy.deepcopy(norm).train(training), copy.deepcopy(scale)
        x = torch.linspace(-2, 2, 2 * 4 * 6).view(2, 4, 2, 3).double().requires_grad_()
        run(copied, factor, x).pow(3).sum().backward()
        gradients = [copied.weight.grad, copied.bias.grad, factor.gamma.grad, x.grad]
        results.append([*gradients, *copied.buffers()])
    torch.testing.assert_close(results[0], results[1])


def test_frozen_layers_keep_nothing():
    layers = chain().requires_grad_(False)
    assert not run_chain(layers, torch.randn(1, 3, 4, 4).double()).requires_grad
