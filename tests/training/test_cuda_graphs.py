# SPDX-License-Identifier: Apache-2.0
"""Where CUDA graphs cannot be recorded the log says why; tests/gpu records them."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from torch import nn

from mmeformer.registry import HOOKS
from mmeformer.training import cuda_graphs


class Model(nn.Module):
    def __init__(self, backbone=True, with_cp=False, compiled=False):
        super().__init__()
        self.backbone = nn.Conv2d(3, 3, 1) if backbone else None
        if backbone:
            self.backbone.with_cp = with_cp
        if compiled:
            self.backbone.compile()


def before_train(model, monkeypatch, gpu=True, counts=1):
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(cuda_graphs, "print_log", lambda text, *_: said.append(text))
    runner = SimpleNamespace(
        model=model, logger=None, optim_wrapper=SimpleNamespace(_accumulative_counts=counts)
    )
    hook = HOOKS.build(dict(type="mmeformer.CudaGraphHook"))
    hook.before_train(runner)
    hook.before_train(runner)
    return said


@pytest.mark.parametrize(
    "reason, options",
    [
        ("no GPU", dict(gpu=False)),
        ("accumulated", dict(counts=2)),
        ("Model has no backbone", dict(model=Model(backbone=False))),
        ("several processes", dict(model=object.__new__(MMDistributedDataParallel))),
        ("recomputed", dict(model=Model(with_cp=True))),
        ("compiled", dict(model=Model(compiled=True))),
    ],
)
def test_reasons_are_said(reason, options, monkeypatch):
    model = options.pop("model", None) or Model()
    said = before_train(model, monkeypatch, **options)
    assert said and all(reason in text for text in said)
    if isinstance(model, Model) and model.backbone is not None:
        assert "forward" not in vars(model.backbone)


def test_only_training_passes_are_recorded(monkeypatch):
    model = Model()
    hook = HOOKS.build(dict(type="mmeformer.CudaGraphHook"))
    assert not before_train(model, monkeypatch)
    recorded = model.backbone.forward
    assert not isinstance(recorded.eager, cuda_graphs.Recorded)
    asked = []

    def record(backbone, eager, images):
        asked.append(tuple(images.shape))
        return lambda x: eager(x) + 1

    monkeypatch.setattr(cuda_graphs, "record", record)
    small, large = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8)
    eager = [recorded.eager(x) for x in (small, large)]
    model.eval()
    torch.testing.assert_close(model.backbone(small), eager[0])
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(small), eager[0])
    assert not asked
    torch.testing.assert_close(model.backbone(small), eager[0] + 1)
    torch.testing.assert_close(model.backbone(large), eager[1])
    # A second call in one step would overwrite the maps of the first.
    torch.testing.assert_close(model.backbone(small), eager[0])
    hook.before_train_iter(SimpleNamespace(model=model), 1)
    torch.testing.assert_close(model.backbone(small), eager[0] + 1)
    assert asked == [(1, 3, 4, 4)]
    assert list(model.state_dict()) == ["backbone.weight", "backbone.bias"]
