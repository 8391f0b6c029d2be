# SPDX-License-Identifier: Apache-2.0
"""Trainings of a chosen length in the comparison of recipes."""

from pathlib import Path

import pytest
from helpers import load_script
from mmengine.config import Config

FILE = Path(__file__).parents[1] / "benchmarks" / "recipes.py"


@pytest.fixture(scope="module")
def recipes():
    return load_script(FILE)


def schedule(warmup, end, by_epoch):
    return [
        dict(type="LinearLR", by_epoch=False, begin=0, end=warmup),
        dict(type="PolyLR", by_epoch=by_epoch, begin=0 if by_epoch else warmup, end=end),
    ]


@pytest.mark.parametrize(
    ("warmup", "length", "expected"),
    [(160, 300, 80), (160, 12, 10), (4000, 60, 60)],  # its share, at least 10, at most a tenth
)
def test_by_epochs(recipes, warmup, length, expected):
    config = Config(
        dict(train_cfg=dict(max_epochs=600), param_scheduler=schedule(warmup, 600, True))
    )
    recipes.set_length(config, length, epoch=10)
    assert config.train_cfg == dict(max_epochs=length, val_interval=length)
    assert [part.end for part in config.param_scheduler] == [expected, length]


def test_by_iterations(recipes):
    config = Config(
        dict(train_cfg=dict(max_iters=8000), param_scheduler=schedule(200, 8000, False))
    )
    recipes.set_length(config, 800, epoch=15)
    assert config.train_cfg == dict(max_iters=800, val_interval=800)
    warmup, rest = config.param_scheduler
    assert (warmup.begin, warmup.end, rest.begin, rest.end) == (0, 20, 20, 800)
