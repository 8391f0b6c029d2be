# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmeformer.layers import norm_gelu as module
from mmeformer.layers.norm_gelu import can_fuse, norm_gelu


def make(shape, training=True, dtype=torch.float64):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1]).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return norm.train(training), x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (2, 300, 1, 1), (3, 1, 4, 4), (2, 8, 40, 30)])
@pytest.mark.parametrize("wanted", ["x weight bias", "x", "weight bias", "bias"])
def test_equals_norm_and_gelu(monkeypatch, training, shape, wanted):
    monkeypatch.setattr(module, "PIECE", 100)
    norm, x = make(shape, training)
    inputs = dict(x=x, weight=norm.weight, bias=norm.bias)
    for name, value in inputs.items():
        value.requires_grad_(name in wanted.split())
    plain = copy.deepcopy(norm)
    assert can_fuse(norm, x)
    found, again = norm_gelu(norm, x)
    expected = F.gelu(plain(x))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again(), expected)
    assert again().stride() == found.stride()
    # In another memory format than the result's.
    gradient = torch.randn(shape, dtype=x.dtype)
    others = dict(x=x, weight=plain.weight, bias=plain.bias)
    torch.testing.assert_close(
        torch.autograd.grad(found, [inputs[name] for name in wanted.split()], gradient),
        torch.autograd.grad(expected, [others[name] for name in wanted.split()], gradient),
    )
    assert plain.state_dict().keys() == norm.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value), key


def test_keeps_its_input_alone():
    norm, x = make((2, 16, 32, 32))
    x.requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm_gelu(norm, x)
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()] == [x.data_ptr()]


def test_second_derivatives_are_an_error_not_wrong():
    norm, x = make((2, 3, 4, 4))
    out, _ = norm_gelu(norm, x.requires_grad_())
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()


def test_what_cannot_be_fused():
    norm, x = make((2, 4, 6, 6))
    assert can_fuse(norm, x)
    assert not can_fuse(norm, x.contiguous())
    assert not can_fuse(norm, x.bfloat16())
    assert not can_fuse(nn.SyncBatchNorm(4).double(), x)
    assert not can_fuse(nn.BatchNorm2d(4, momentum=None).double(), x)
    assert not can_fuse(nn.BatchNorm2d(4, affine=False).double(), x)
