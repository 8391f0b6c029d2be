# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn
from torch._dynamo.testing import CompileCounter

from mmeformer.backbones import EfficientFormer, EfficientFormerV2
from mmeformer.registry import HOOKS

# PyTorch chooses other kernels for the smallest maps of a single image (and which maps count as small
# depends on the number of threads), so they would have a graph of their own: these are all larger.
SIZES = ((352, 384), (384, 352), (416, 352), (352, 448), (448, 384))


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = None


def runner_of(model):
    return SimpleNamespace(model=model, logger=MMLogger.get_instance("test of compile"))


@pytest.mark.parametrize(
    "kind, arch, training",
    [
        (EfficientFormerV2, "s0", True),
        (EfficientFormer, "l1", False),
        pytest.param(EfficientFormerV2, "s0", False, marks=pytest.mark.slow),
        pytest.param(EfficientFormer, "l1", True, marks=pytest.mark.slow),
    ],
)
def test_many_sizes_make_few_compilations(kind, arch, training):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Detector(kind(arch, layer_scale_init_value=0.5, drop_path_rate=0.0)).train(training)
    plain = [
        [level.detach() for level in model.backbone(torch.ones(1, 3, *size))] for size in SIZES[:2]
    ]
    counter = CompileCounter()
    hook = HOOKS.build(dict(type="mmeformer.CompileHook", backend=counter))
    hook.before_run(runner_of(model))
    outputs = []
    for size in SIZES:
        outputs.append(model.backbone(torch.ones(1, 3, *size)))
        if training:
            sum(level.mean() for level in outputs[-1]).backward()
    assert counter.frame_count <= 2
    for found, expected in zip(outputs[:2], plain, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_a_model_without_parts_is_named():
    hook = HOOKS.build(dict(type="mmeformer.CompileHook", parts=["trunk"]))
    with pytest.raises(ValueError, match="trunk"):
        hook.before_run(runner_of(nn.Sequential(nn.Linear(1, 1))))
