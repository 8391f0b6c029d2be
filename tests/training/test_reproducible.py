# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same result, however the data are loaded."""

import os
import pickle

import numpy as np
import pytest
import tiny
import torch

from mmeformer.commands import train
from mmeformer.training import engine
from mmeformer.training.randomness import Draw, PositionSampler, seed_all

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "task",
    ["segmentation", pytest.param("detection", marks=SLOW), pytest.param("rotated", marks=SLOW)],
)
def test_two_runs_are_equal(tmp_path, task):
    config = tiny.TASKS[task](tmp_path, iterations=20)
    config.default_hooks.checkpoint.interval = 20
    first = tiny.train(config, tmp_path / "first")
    second = tiny.train(config, tmp_path / "second")
    assert len(first) == 20 and tiny.equal(first, second)
    assert len(set(first.values())) == 20


def test_deterministic_kernels_are_the_users_choice(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = tiny.segmentation(tmp_path)
    config.work_dir = str(tmp_path)
    args = train.parse_args(["config.py", "--deterministic"])
    try:
        engine.build_train_runner(config, deterministic=args.deterministic)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_draws_keep_their_place_on_the_way_to_a_worker():
    draw = pickle.loads(pickle.dumps(Draw(3, 17)))
    assert draw == 3 and draw.position == 17 and [10, 11, 12, 13][draw] == 13


class TestSampler:
    def test_positions_go_on_over_epochs(self):
        sampler = PositionSampler(dict(type="DefaultSampler"), dataset=range(5), seed=1)
        seen = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            draws = list(sampler)
            assert sorted(draws) == [0, 1, 2, 3, 4]
            seen += [draw.position for draw in draws]
        assert seen == list(range(10))
        sampler.set_epoch(1)
        assert [draw.position for draw in sampler] == [5, 6, 7, 8, 9]

    def test_infinite_stream_can_be_entered_anywhere(self):
        def sampler():
            return PositionSampler(dict(type="InfiniteSampler"), dataset=range(5), seed=1)

        stream = iter(sampler())
        whole = [next(stream) for _ in range(20)]
        later = sampler()
        later.skip(7)
        stream = iter(later)
        rest = [next(stream) for _ in range(13)]
        assert rest == whole[7:]
        assert [draw.position for draw in rest] == list(range(7, 20))

    def test_only_an_infinite_sampler_can_skip(self):
        finite = PositionSampler(dict(type="DefaultSampler"), dataset=range(5), seed=1)
        assert not hasattr(finite, "skip")


def test_seeds_differ_in_every_number():
    drawn = set()
    for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_all(*numbers)
        drawn.add(np.random.rand())
    assert len(drawn) == 4
