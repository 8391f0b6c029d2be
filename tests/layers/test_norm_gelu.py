# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmeformer.layers import norm_gelu as module
from mmeformer.layers.norm_gelu import can_fuse, conv_for_norm, norm_gelu, norm_gelu_conv


def make(shape, training=True, dtype=torch.float64):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1]).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return norm.train(training), x


SHAPES = [(2, 5, 7, 6), (2, 300, 1, 1), (3, 1, 4, 4), (2, 8, 40, 30)]


def compare(found, expected, parts, plain_parts, wanted):
    """Results and gradients; ``parts`` are the modules and tensors with the parameters."""
    torch.testing.assert_close(found, expected)
    # In another memory format than the result's.
    gradient = torch.randn(found.shape, dtype=found.dtype)
    torch.testing.assert_close(
        torch.autograd.grad(found, [parts[name] for name in wanted], gradient),
        torch.autograd.grad(expected, [plain_parts[name] for name in wanted], gradient),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", ["x kernel shift weight bias", "x", "weight kernel", "x bias"])
def test_equals_convolution_norm_and_gelu(monkeypatch, training, shape, wanted):
    monkeypatch.setattr(module, "PIECE", 100)
    norm, x = make(shape, training)
    conv = nn.Conv2d(shape[1], shape[1], 3, padding=1).double()
    plain, plain_conv = copy.deepcopy(norm), copy.deepcopy(conv)
    named = [
        dict(x=x, weight=n.weight, bias=n.bias, kernel=c.weight, shift=c.bias)
        for n, c in ((norm, conv), (plain, plain_conv))
    ]
    for name in set(named[0]) - set(wanted.split()):
        named[0][name].requires_grad_(False)
    if "x" in wanted.split():
        x.requires_grad_()
    assert can_fuse(norm, x)
    found, again = norm_gelu(norm, conv_for_norm(conv, x), conv.bias)
    expected = F.gelu(plain(plain_conv(x)))
    compare(found, expected, *named, wanted.split())
    torch.testing.assert_close(again(), expected)
    assert again().stride() == found.stride()
    assert plain.state_dict().keys() == norm.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "wanted", ["x shift weight bias matrix offset", "x", "x matrix", "weight offset x"]
)
def test_equals_all_of_that_and_a_point_convolution(monkeypatch, training, shape, wanted):
    monkeypatch.setattr(module, "PIECE", 100)
    norm, x = make(shape, training)
    first, last = nn.Conv2d(shape[1], shape[1], 1).double(), nn.Conv2d(shape[1], 3, 1).double()
    plain, plain_first, plain_last = map(copy.deepcopy, (norm, first, last))
    named = [
        dict(
            x=x,
            shift=a.bias,
            weight=n.weight,
            bias=n.bias,
            matrix=b.weight,
            offset=b.bias,
        )
        for n, a, b in ((norm, first, last), (plain, plain_first, plain_last))
    ]
    for name in set(named[0]) - set(wanted.split()):
        named[0][name].requires_grad_(False)
    x.requires_grad_()
    found = norm_gelu_conv(norm, conv_for_norm(first, x), first.bias, last)
    expected = plain_last(F.gelu(plain(plain_first(x))))
    compare(found, expected, *named, wanted.split())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value, msg=key)


def test_a_shift_before_batch_statistics_has_no_gradient():
    """Zero, not the rounding errors of a whole map, and not None: optimizers then skip it."""
    norm, x = make((2, 8, 20, 20), dtype=torch.float32)
    conv = nn.Conv2d(8, 8, 1)
    norm_gelu(norm, conv_for_norm(conv, x), conv.bias)[0].square().sum().backward()
    assert torch.equal(conv.bias.grad, torch.zeros(8))
    assert conv.weight.grad.abs().min() > 0


def test_single_values_are_an_error():
    norm, x = make((1, 4, 1, 1))
    with pytest.raises(ValueError, match="single value per channel"):
        norm_gelu(norm, x, torch.zeros(4, dtype=x.dtype))
    assert norm.running_var.isfinite().all()


def test_keeps_its_input_alone():
    norm, x = make((2, 16, 32, 32))
    x.requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm_gelu(norm, x, torch.zeros(16, dtype=x.dtype))
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()] == [x.data_ptr()]


def test_second_derivatives_are_an_error_not_wrong():
    norm, x = make((2, 3, 4, 4))
    out, _ = norm_gelu(norm, x.requires_grad_(), torch.zeros(3, dtype=x.dtype))
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
