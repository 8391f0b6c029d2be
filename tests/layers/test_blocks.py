# SPDX-License-Identifier: Apache-2.0
import gc
import weakref

import pytest
import torch
from torch import nn

from mmeformer.layers.blocks import ConvMlp, ConvNorm, Stem, run_chain, run_checkpointed


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
def test_chain_has_the_plain_results_and_gradients(training, checkpointed):
    results = []
    for run in (plainly, run_chain):
        layers = chain().train(training)
        x = torch.linspace(-2, 2, 2 * 3 * 6 * 5).view(2, 3, 6, 5).double().requires_grad_()
        if checkpointed and run is run_chain:
            out = run_checkpointed(Chain(layers), x)
        else:
            out = run(layers, x)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in layers.parameters()]
        results.append([out.detach(), x.grad, *gradients, layers[0].bn.running_mean])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


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


def test_frozen_layers_keep_nothing():
    layers = chain().requires_grad_(False)
    assert not run_chain(layers, torch.randn(1, 3, 4, 4).double()).requires_grad
