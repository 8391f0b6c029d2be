# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from mmeformer.layers.blocks import ConvMlp, keep_statistics, run_checkpointed


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
