# SPDX-License-Identifier: Apache-2.0
"""A run resumed with another batch size, schedule or learning rate goes on where its data end."""

import json
import logging
import os
import signal
from collections import Counter
from contextlib import ExitStack
from itertools import islice
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.config import Config
from mmengine.hooks import Hook
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from mmeformer.errors import CheckpointError
from mmeformer.signals import PREEMPTED
from mmeformer.training import engine, loops
from mmeformer.training.changes import changed
from mmeformer.training.loops import total_batch_size
from mmeformer.training.randomness import PositionSampler


class Watch(Hook):
    """Keeps images, learning rate and epoch of every iteration."""

    priority = "VERY_HIGH"

    def __init__(self):
        self.images: list[tuple[int, list[str]]] = []
        self.rates: dict[int, list[float]] = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        names = [sample.img_path[-10:-4] for sample in data_batch["data_samples"]]
        self.images.append((runner.epoch, names))
        self.rates[runner.iter] = [group["lr"] for group in runner.optim_wrapper.param_groups]

    def of_epoch(self, epoch):
        return [name for number, names in self.images if number == epoch for name in names]


def run(config, work_dir, resume=None, launcher="none"):
    """(what was watched, warnings of the log)"""
    config = Config(config.copy().to_dict())
    config.work_dir = str(work_dir)
    runner = engine.build_train_runner(config, resume=resume, launcher=launcher)
    watch = Watch()
    lines: list[str] = []
    runner.register_hook(watch)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    runner.logger.addHandler(handler)
    try:
        runner.train()
    finally:
        runner.logger.removeHandler(handler)
    return watch, "\n".join(lines)


def by_epoch(folder, epochs, batch=2, end=None):
    """Epochs of 8 images, a warm-up by iteration and a cosine by epoch."""
    config = tiny.segmentation(folder)
    config.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=100)
    config.train_dataloader.sampler = dict(type="DefaultSampler", shuffle=True)
    config.train_dataloader.batch_size = batch
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=6),
        dict(
            type="CosineAnnealingLR",
            by_epoch=True,
            begin=0,
            end=end or epochs,
            eta_min_ratio=0.01,
            convert_to_iter_based=True,
        ),
        dict(type="MultiStepLR", by_epoch=True, begin=0, end=end or epochs, milestones=[1]),
    ]
    config.default_hooks.checkpoint.update(by_epoch=True, interval=1)
    return without_validation(config)


def by_iteration(folder, iterations, batch=2, lr=None):
    config = tiny.segmentation(folder, iterations)
    config.train_dataloader.batch_size = batch
    config.param_scheduler = [
        dict(type="PolyLR", eta_min=1e-6, begin=0, end=iterations, by_epoch=False)
    ]
    if lr:
        config.optim_wrapper.optimizer.lr = lr
    return without_validation(config)


def without_validation(config):
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    return config


@pytest.mark.parametrize("batch", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_epoch_after_another_batch_size_has_all_its_images(folder, tmp_path, batch):
    run(by_epoch(folder, 1, end=2), tmp_path / "run")
    config = by_epoch(folder, 2, batch)
    watch, lines = run(config, tmp_path / "run", resume="auto")
    expected, _ = run(config, tmp_path / "whole")
    assert sorted(set(watch.of_epoch(1))) == [f"{index:06d}" for index in range(8)]
    assert watch.of_epoch(1) == expected.of_epoch(1)
    assert f"4 iterations of 2 samples and now have {-(-8 // batch)} of {batch}" in lines
    # The schedule is that of a run that always had this batch size.
    assert watch.rates == {i: rate for i, rate in expected.rates.items() if i in watch.rates}


@pytest.mark.forks
@pytest.mark.slow
def test_epoch_after_twice_the_processes_has_all_its_images(folder, tmp_path):
    run(by_epoch(folder, 1, end=2), tmp_path)

    def one(rank):
        watch, _ = run(by_epoch(folder, 2), tmp_path, resume="auto", launcher="pytorch")
        (tmp_path / f"images-{rank}.json").write_text(json.dumps(watch.of_epoch(1)))

    assert tiny.fork(one, world_size=2) == [0, 0]
    images = [json.loads((tmp_path / f"images-{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(sum(images, [])) == [f"{index:06d}" for index in range(8)]


@pytest.mark.slow
def test_middle_of_an_epoch_goes_by_samples(folder, tmp_path):
    config = by_epoch(folder, 2, batch=1)
    config.default_hooks.checkpoint.update(by_epoch=False, interval=11, max_keep_ckpts=-1)
    first, _ = run(config, tmp_path)
    # 8 images of the first epoch and 3 of the second: the other 5 are three batches.
    config = by_epoch(folder, 2, batch=2)
    watch, lines = run(config, tmp_path, resume=str(tmp_path / "iter_11.pth"))
    assert "iteration 11 of the checkpoint becomes 5: " in lines
    assert watch.of_epoch(1) == first.of_epoch(1)[3:] and watch.of_epoch(0) == []
    assert sorted(watch.rates) == [5, 6, 7]


@pytest.mark.forks
@pytest.mark.slow
def test_three_epochs_in_one_two_and_one_processes(folder, tmp_path):
    """A signal stops the run in the first and in the second epoch."""

    def part(world, batch, until=None, resume=None):
        """[(iteration, epoch, images)] of each process."""

        def one(rank):
            config = by_epoch(folder, 3, batch)
            config.default_hooks.checkpoint.update(max_keep_ckpts=1)
            config.work_dir = str(tmp_path)
            launcher = "none" if world == 1 else "pytorch"
            runner = engine.build_train_runner(config, resume=resume, launcher=launcher)
            watch = Watch()
            runner.register_hook(watch)
            send = {until: lambda: os.kill(os.getpid(), signal.SIGTERM)}
            runner.register_hook(tiny.Recorder(send if rank == 0 else None))
            try:
                runner.train()
            finally:
                (tmp_path / f"seen-{rank}.json").write_text(json.dumps(watch.images))

        codes = tiny.fork(one, world_size=world)
        assert codes == [0 if until is None else PREEMPTED] * world
        return [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(world)]

    # 2 iterations of 2 images; the other 4 of the epoch two at a time, and 2 of the next epoch.
    parts = [part(1, 2, until=1), part(2, 1, until=4, resume="auto"), part(1, 3, resume="auto")]
    order: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for seen in parts:
        for batches in zip(*seen, strict=True):
            for images in zip(*(images for _, images in batches), strict=True):
                order[batches[0][0]] += images
    for epoch in range(3):
        assert sorted(order[epoch]) == [f"{index:06d}" for index in range(8)], epoch
    expected, _ = run(by_epoch(folder, 3), tmp_path / "whole")
    assert order == {epoch: expected.of_epoch(epoch) for epoch in range(3)}


class Stop(Exception):
    pass


class Numbers(list):
    """A data set of numbers, every third of them tall."""

    def get_data_info(self, index):
        return dict(width=3, height=4) if self[index] % 3 == 0 else dict(width=4, height=3)


def part_of_epoch(size, grouped, world, batch, epoch, place, until):
    """Train on a part of an epoch in imaginary processes: (batches of each, iteration, place)."""
    seen: list[list[list[int]]] = []
    for rank in range(world):
        with ExitStack() as stack:
            for name in ("mmengine.dataset.sampler", "mmeformer.training.randomness"):
                stack.enter_context(
                    mock.patch(f"{name}.get_dist_info", lambda rank=rank: (rank, world))
                )
            stack.enter_context(mock.patch.object(loops, "get_rank", lambda rank=rank: rank))
            stack.enter_context(mock.patch.object(loops, "get_world_size", lambda: world))
            data = Numbers(range(size))
            sampler = PositionSampler(dict(type="DefaultSampler"), data, seed=5)
            if grouped:
                kwargs = dict(batch_sampler=AspectRatioBatchSampler(sampler, batch))
            else:
                kwargs = dict(sampler=sampler, batch_size=batch)
            loader = DataLoader(data, collate_fn=list, **kwargs)
            runner = mock.Mock()
            runner.call_hook = lambda name, sampler=sampler: sampler.set_epoch(epoch)
            loop = loops.EpochBasedTrainLoop(runner, loader, max_epochs=9)
            loop._epoch = epoch
            loop._iter = place[0] if place else epoch * len(loader)
            loop.resume_at(place[1] if place else None)
            seen.append([])

            def run_iter(index, numbers, loop=loop, mine=seen[-1]):
                if len(mine) == until:
                    raise Stop
                mine.append(numbers)
                loop._iter += 1

            loop.run_iter = run_iter
            try:
                loop.run_epoch()
                assert loop._iter == (epoch + 1) * len(loader)
            except Stop:
                pass
            place_after = loop._iter, loop.place(epoch, loop._iter)
    return seen, place_after


@settings(max_examples=60)
@given(
    size=st.integers(1, 40),
    grouped=st.booleans(),
    epoch=st.integers(0, 2),
    parts=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4
    ),
)
def test_each_sample_once_however_an_epoch_is_divided(size, grouped, epoch, parts):
    place, seen = None, Counter()
    for world, batch, until in [*parts, (*parts[-1][:2], None)]:
        ranks, place = part_of_epoch(size, grouped, world, batch, epoch, place, until)
        assert len({len(batches) for batches in ranks}) == 1
        seen.update(number for batches in ranks for numbers in batches for number in numbers)
    assert set(seen) == set(range(size))
    # At its end, processes without a sample take one of the first of the epoch.
    most = [world - 1 for world, _, _ in parts]
    assert sum(seen.values()) - size <= (sum(most) if grouped else max(most))


@pytest.mark.parametrize("grouped", [False, True])
def test_same_processes_go_on_with_the_same_batches(grouped):
    whole, _ = part_of_epoch(37, grouped, 3, 2, 1, None, None)
    first, place = part_of_epoch(37, grouped, 3, 2, 1, None, 3)
    rest, place = part_of_epoch(37, grouped, 3, 2, 1, place, 1)
    end, _ = part_of_epoch(37, grouped, 3, 2, 1, place, None)
    assert [a + b + c for a, b, c in zip(first, rest, end, strict=True)] == whole


def test_an_infinite_order_goes_on_at_any_sample():
    def draws(rank, world, start):
        with mock.patch("mmengine.dataset.sampler.get_dist_info", lambda: (rank, world)):
            with mock.patch("mmeformer.training.randomness.get_dist_info", lambda: (rank, world)):
                sampler = PositionSampler(dict(type="InfiniteSampler"), range(7), seed=5)
        sampler.start_at(start)
        return [(int(draw), draw.position) for draw in islice(iter(sampler), 10)]

    whole = draws(0, 1, 0)
    assert [position for _, position in whole] == list(range(10))
    assert draws(0, 1, 3)[:7] == whole[3:]
    assert [draws(rank, 2, 3)[0] for rank in (0, 1)] == whole[3:5]
    assert [draws(rank, 2, 3)[1] for rank in (0, 1)] == whole[5:7]


@pytest.mark.slow
def test_checkpoint_without_a_place_restarts_its_epoch(folder, tmp_path, monkeypatch):
    """Those of mmengine itself: nothing is skipped that may not have been trained on."""
    with monkeypatch.context() as patch:
        patch.setattr("mmeformer.training.loops.EpochBasedTrainLoop.place", lambda *args: None)
        run(by_epoch(folder, 1, end=2), tmp_path)
    watch, lines = run(by_epoch(folder, 2, batch=4), tmp_path, resume="auto")
    assert len(watch.of_epoch(1)) == 8
    assert "does not tell how many samples" in lines


@pytest.mark.slow
def test_iterations_after_another_batch_size_go_on_by_samples(folder, tmp_path):
    expected, _ = run(by_iteration(folder, 12), tmp_path / "whole")
    run(by_iteration(folder, 4), tmp_path / "run")
    images = [name for _, names in expected.images for name in names]
    watch, lines = run(by_iteration(folder, 6, batch=4), tmp_path / "run", resume="auto")
    assert [name for _, names in watch.images for name in names] == images[8:16]
    assert sorted(watch.rates) == [4, 5]
    assert "2 samples per iteration, now 4: the data go on after the 8 samples" in lines
    # Again, from a checkpoint that has seen two batch sizes.
    watch, _ = run(by_iteration(folder, 8, batch=2), tmp_path / "run", resume="auto")
    assert [name for _, names in watch.images for name in names] == images[16:20]


def test_longer_schedule_applies(folder, tmp_path):
    expected, _ = run(by_iteration(folder, 8), tmp_path / "whole")
    run(by_iteration(folder, 4), tmp_path / "run")
    watch, lines = run(by_iteration(folder, 8), tmp_path / "run", resume="auto")
    assert watch.rates == {i: rate for i, rate in expected.rates.items() if i >= 4}
    assert watch.rates[4][0] > 0.4 * expected.rates[0][0]
    assert "param_scheduler[0].end 4 -> 8" in lines


@pytest.mark.slow
def test_longer_schedule_by_epoch_applies(folder, tmp_path):
    config = by_epoch(folder, 3)
    expected, _ = run(config, tmp_path / "whole")
    run(by_epoch(folder, 1), tmp_path / "run")
    watch, lines = run(config, tmp_path / "run", resume="auto")
    assert watch.rates == {i: rate for i, rate in expected.rates.items() if i >= 4}
    assert "param_scheduler[1].end 4 -> 12" in lines and "param_scheduler[2].end 1 -> 3" in lines


@pytest.mark.slow
def test_other_learning_rate_applies(folder, tmp_path):
    before, _ = run(by_iteration(folder, 6, lr=1e-3), tmp_path)
    (tmp_path / "iter_6.pth").rename(tmp_path / "end.pth")
    run(by_iteration(folder, 4, lr=1e-3), tmp_path)
    config = by_iteration(folder, 6, lr=5e-4)
    config.optim_wrapper.optimizer.weight_decay = 0.5
    config.param_scheduler[0].eta_min = 0.0
    expected, _ = run(config, tmp_path / "whole")
    watch, lines = run(config, tmp_path, resume=str(tmp_path / "iter_4.pth"))
    assert watch.rates == {i: rate for i, rate in expected.rates.items() if i >= 4}
    assert "lr 0.001 -> 0.0005" in lines and "-> 0.5" in lines and "eta_min 1e-06 -> 0.0" in lines


@pytest.mark.slow
def test_added_warm_up_applies(folder, tmp_path):
    config = by_iteration(folder, 6)
    config.param_scheduler.insert(
        0, dict(type="LinearLR", start_factor=0.1, begin=0, end=6, by_epoch=False)
    )
    expected, _ = run(config, tmp_path / "whole")
    run(by_iteration(folder, 4), tmp_path / "run")
    watch, lines = run(config, tmp_path / "run", resume="auto")
    assert watch.rates == {i: rate for i, rate in expected.rates.items() if i >= 4}
    assert "1 -> 2 param_scheduler" in lines


@pytest.mark.slow
def test_same_config_is_silent(folder, tmp_path):
    run(by_iteration(folder, 8), tmp_path)
    watch, lines = run(by_iteration(folder, 8), tmp_path, resume=str(tmp_path / "iter_8.pth"))
    assert "has changed" not in lines and not watch.images
    assert f"nothing to train: {tmp_path / 'iter_8.pth'} has 8 iters" in lines


def test_checkpoint_of_another_machine_goes_on_the_same(folder, tmp_path):
    """A GPU has weights and so states in channels last; older versions took no fused steps."""
    config = by_iteration(folder, 4)
    config.optim_wrapper.optimizer.fused = False
    config.default_hooks.checkpoint.max_keep_ckpts = 2
    run(config, tmp_path)
    expected = torch.load(tmp_path / "iter_4.pth", weights_only=False)
    checkpoint = torch.load(tmp_path / "iter_2.pth", weights_only=False)
    for state in checkpoint["optimizer"]["state"].values():
        for name, value in state.items():
            if value.dim() == 4:
                state[name] = value.contiguous(memory_format=torch.channels_last)
    torch.save(checkpoint, tmp_path / "old.pth")
    config.optim_wrapper.optimizer.fused = True
    _, lines = run(config, tmp_path, resume=str(tmp_path / "old.pth"))
    assert "has changed" not in lines
    found = torch.load(tmp_path / "iter_4.pth", weights_only=False)
    assert found["optimizer"]["param_groups"][0]["fused"]
    # Fused steps round differently; states read in another order are off by whole steps.
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=1e-4, atol=1e-5)
    for tensor in found["state_dict"].values():
        assert tensor.is_contiguous()


@pytest.mark.slow
def test_finished_epochs_are_said(folder, tmp_path):
    run(by_epoch(folder, 1), tmp_path)
    watch, lines = run(by_epoch(folder, 1), tmp_path, resume="auto")
    assert not watch.images
    assert "epoch_1.pth has 1 epochs and train_cfg.max_epochs is 1" in lines
    assert "has changed" not in lines


@pytest.mark.slow
def test_schedule_that_follows_scores_stays(folder, tmp_path):
    def config(patience):
        config = by_epoch(folder, 1 if patience == 3 else 2)
        whole = tiny.segmentation(folder)
        for key in ("val_cfg", "val_dataloader", "val_evaluator"):
            config[key] = whole[key]
        config.param_scheduler = [
            dict(type="ReduceOnPlateauLR", monitor="mIoU", rule="greater", patience=patience)
        ]
        config.train_cfg.val_interval = 1
        return config

    run(config(3), tmp_path)
    watch, lines = run(config(4), tmp_path, resume="auto")
    assert "depends on past scores; not applied from the config" in lines
    assert "param_scheduler[0].patience 3 -> 4" in lines and sorted(watch.rates) == [4, 5, 6, 7]


@pytest.mark.slow
def test_images_mixed_from_a_cache_are_said(folder, tmp_path):
    config = without_validation(tiny.boxes_only(folder, 2))
    pipeline = config.train_dataloader.dataset.pipeline
    mosaic = dict(type="mmdet.CachedMosaic", img_scale=(64, 64), max_cached_images=4)
    pipeline.insert(-1, mosaic)
    _, lines = run(config, tmp_path)
    assert "CachedMosaic" not in lines
    config.train_cfg.max_iters = 3
    _, lines = run(config, tmp_path, resume="auto")
    assert "CachedMosaic mix images that were read before the interruption" in lines


def test_other_optimizer_is_an_error(folder, tmp_path):
    run(by_iteration(folder, 2), tmp_path)
    config = by_iteration(folder, 4)
    config.optim_wrapper = dict(
        type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=0.1)
    )
    with pytest.raises(CheckpointError, match="cannot be resumed with .*load_from"):
        run(config, tmp_path, resume="auto")
    # The same number of parameter groups.
    config.optim_wrapper.paramwise_cfg = dict(norm_decay_mult=0.0)
    with pytest.raises(CheckpointError, match="has no dampening, momentum.*load_from"):
        run(config, tmp_path, resume="auto")


def test_batch_size_counts_all_processes(monkeypatch):
    monkeypatch.setattr("mmeformer.training.loops.get_world_size", lambda: 4)
    data = list(range(12))
    batches = BatchSampler(SequentialSampler(data), 3, drop_last=False)
    assert total_batch_size(DataLoader(data, batch_size=2)) == 8
    assert total_batch_size(DataLoader(data, batch_sampler=batches)) == 12
    assert total_batch_size(DataLoader(data, batch_sampler=[[0], [1, 2]])) is None


def test_another_loss_and_augmentation_are_named(folder, tmp_path):
    """A config that inherits a shipped one may differ after an upgrade."""
    run(by_iteration(folder, 2), tmp_path)
    config = by_iteration(folder, 4)
    config.param_scheduler[0].end = 2
    config.model.decode_head.loss_decode.loss_weight = 0.5
    config.train_dataloader.dataset.pipeline[-2].prob = 0.25
    _, lines = run(config, tmp_path, resume="auto")
    (line,) = [line for line in lines.splitlines() if "has changed since the checkpoint" in line]
    named = line.partition("here on: ")[2].split(", ")
    assert [name.split(".")[0] for name in named] == ["model", "train_dataloader"]
    assert named[0].startswith("model.decode_head.loss_decode.loss_weight ")
    assert named[0].endswith(" 1.0 -> 0.5") and named[1].endswith("prob 0.75 -> 0.25")


def test_settings_of_a_checkpoint_are_compared_and_not_run(tmp_path):
    """The head of generated configs for rotated boxes, as 0.2.0 and later versions wrote it."""
    old = """
model = dict(
    bbox_head=dict(
        loss_cls=dict(alpha=0.25, type='mmdet.FocalLoss'),
        scales=[1, 2], steps=[dict(prob=0.5), {'a b': (1, 2)}]),
    init_cfg=dict(checkpoint='a.pth'), teacher=None)
resume = True
"""
    new = old.replace("alpha=0.25, type='mmdet.Focal", "type='mmdet.QualityFocal")
    new = new.replace("prob=0.5", "prob=0.1").replace("a.pth", "b.pth").replace("True", "False")
    assert changed(old, new.replace(", teacher=None", "")) == [
        "model.bbox_head.loss_cls.alpha 0.25 -> None",
        "model.bbox_head.loss_cls.type 'mmdet.FocalLoss' -> 'mmdet.QualityFocalLoss'",
        "model.bbox_head.steps[0].prob 0.5 -> 0.1",
    ]
    assert changed(old, new, most=1)[1:] == ["and 2 more"]
    hostile = f"model = dict(a=__import__('pathlib').Path({str(tmp_path / 'x')!r}).touch())"
    assert changed(hostile, old) and not (tmp_path / "x").exists()
    # Not Python, and the checkpoint of another program.
    assert changed("model = (", old) == changed("", old) == []
