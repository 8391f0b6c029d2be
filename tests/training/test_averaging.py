# SPDX-License-Identifier: Apache-2.0
"""Averages in few kernels are those of mmengine."""

import copy

import pytest
import tiny
import torch
from launches import Launches
from mmdet.models.layers import ExpMomentumEMA
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.model import (
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from torch import nn

from mmeformer.training import averaging, engine


class Largest(ExponentialMovingAverage):
    """No average: a kind of one's own."""

    def avg_func(self, averaged_param, source_param, steps):
        averaged_param.copy_(torch.maximum(averaged_param, source_param))


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def states(kind, update, steps=6, **settings):
    """The averaged tensors after each step of a training."""
    model = network()
    averaged = kind(model, **settings)
    found = []
    for _ in range(steps):
        model(torch.randn(2, 3, 5, 5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        update(averaged, model)
        found.append(copy.deepcopy(averaged.state_dict()))
    return found


@pytest.mark.parametrize("update_buffers", [True, False])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize(
    ("kind", "settings", "exact"),
    [
        (ExponentialMovingAverage, dict(momentum=0.3), True),
        (MomentumAnnealingEMA, dict(momentum=0.01, gamma=2), True),
        (ExpMomentumEMA, dict(momentum=0.01, gamma=5), False),
        (StochasticWeightAverage, dict(), False),
        (Largest, dict(), True),
    ],
)
def test_averages_are_those_of_mmengine(kind, settings, exact, interval, update_buffers):
    settings = dict(settings, interval=interval, update_buffers=update_buffers)
    expected = states(kind, kind.update_parameters, **settings)
    found = states(kind, averaging.update, **settings)
    tolerance = dict(rtol=0, atol=0) if exact else {}
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    assert not torch.equal(expected[-1]["module.0.weight"], expected[1]["module.0.weight"])


@pytest.mark.parametrize("update_buffers", [True, False])
def test_shared_weights_are_averaged_once(update_buffers):
    first, other = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
    other.weight = first.weight
    model = nn.Sequential(first, first, other)
    averaged = ExponentialMovingAverage(model, momentum=0.25, update_buffers=update_buffers)
    averaging.update(averaged, model)
    before = first.weight.detach().clone()
    with torch.no_grad():
        first.weight += 1
    averaging.update(averaged, model)
    torch.testing.assert_close(averaged.module[2].weight.data, before + 0.25)
    assert averaged.module[0] is averaged.module[1]


def test_a_training_averages_in_few_kernels(tmp_path):
    config = tiny.everything("segmentation", tmp_path)
    config.work_dir = str(tmp_path / "run")
    config.custom_hooks.append(dict(type=MMEngineEMAHook, momentum=0.3))
    runner = engine.build_train_runner(config)
    hooks = [hook for hook in runner.hooks if isinstance(hook, MMEngineEMAHook)]
    assert [type(hook) for hook in hooks] == [averaging.EMAHook] * 2
    for hook in hooks:
        hook.before_run(runner)
        hook.after_train_iter(runner, 0)
        with Launches() as counted:
            hook.after_train_iter(runner, 1)
        assert len(hook.ema_model.avg_parameters) > 100
        assert counted.operators.total() < 20, counted.operators
