# SPDX-License-Identifier: Apache-2.0
"""A run resumed with another batch size, schedule or learning rate goes on where its data end."""

import json
import logging

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from mmeformer.errors import CheckpointError
from mmeformer.training import engine
from mmeformer.training.loops import total_batch_size


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


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
    # 8 images of the first epoch and 3 of the second: one batch of two, and one image once more.
    config = by_epoch(folder, 2, batch=2)
    watch, lines = run(config, tmp_path, resume=str(tmp_path / "iter_11.pth"))
    assert "iteration 11 of the checkpoint becomes 5: " in lines
    assert watch.of_epoch(1) == first.of_epoch(1)[2:] and watch.of_epoch(0) == []
    assert sorted(watch.rates) == [5, 6, 7]


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
    """A GPU takes fused steps, of weights and so of states in channels last; a CPU has neither."""
    config = by_iteration(folder, 4)
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
