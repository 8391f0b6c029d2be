# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are written in the background, one after the other, from a copy."""

import errno
import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import tiny
import torch

from mmeformer.errors import TrainingError
from mmeformer.training import saving
from mmeformer.training.saving import CheckpointHook, write_checkpoint
from mmeformer.training.writer import HostCopy, NotWritten, Writer
from mmeformer.work_dirs import named_checkpoint

LOGGER = logging.getLogger("writer")


class TestCopy:
    def test_is_independent_of_what_follows(self):
        weights = OrderedDict(a=torch.arange(5000.0), small=torch.tensor(1.0))
        weights._metadata = dict(version=2)
        tree = dict(weights=weights, states=[(torch.ones(2000), "text")], rate=0.1)
        copied = HostCopy().copy(tree)
        for tensor in (weights["a"], weights["small"], tree["states"][0][0]):
            tensor.fill_(7)
        assert torch.equal(copied["weights"]["a"], torch.arange(5000.0))
        assert copied["weights"]["small"] == 1 and copied["states"][0][0].sum() == 2000
        assert copied["weights"]._metadata == dict(version=2) and copied["rate"] == 0.1
        assert copied["states"][0][1] == "text"

    def test_uses_its_memory_again(self):
        host = HostCopy()
        first = host.copy(dict(a=torch.zeros(5000)))["a"]
        second = host.copy(dict(a=torch.ones(5000)))["a"]
        assert first.data_ptr() == second.data_ptr() and second.sum() == 5000
        assert host.copy(dict(a=torch.ones(6000)))["a"].sum() == 6000

    def test_a_part_is_copied_later(self):
        tree = dict(a=torch.zeros(5000), late=[torch.zeros(5000), torch.tensor(0.0)])
        host = HostCopy()
        copied = host.copy(tree, late="late")
        for tensor in (tree["a"], *tree["late"]):
            tensor.fill_(1)
        host.finish()
        for tensor in (tree["a"], *tree["late"]):
            tensor.fill_(2)
        assert copied["a"].sum() == 0 and copied["late"][1] == 0
        assert copied["late"][0].eq(1).all()

    def test_has_the_default_memory_format(self):
        weight = torch.randn(8, 4, 16, 16).to(memory_format=torch.channels_last)
        copied = HostCopy().copy([weight])[0]
        assert copied.is_contiguous() and torch.equal(copied, weight)


class TestWriter:
    def test_jobs_run_beside_their_caller_in_order(self):
        order, go = [], threading.Event()

        def slow():
            go.wait(30)
            order.append("first")

        with Writer(LOGGER, False) as writer:
            writer.start(slow)
            order.append("caller")
            go.set()
            writer.start(lambda: order.append("second"))
        assert order == ["caller", "first", "second"]

    def test_failed_write_is_made_up_for_by_the_next(self, caplog):
        def fail():
            raise NotWritten("checkpoint a could not be written, the disk is full")

        with Writer(LOGGER, False) as writer:
            writer.start(fail)
            writer.start(lambda: None)
        (record,) = caplog.records
        assert record.getMessage().endswith("disk is full; the training goes on to the next one")
        with pytest.raises(NotWritten), Writer(LOGGER, False) as writer:
            writer.start(fail)
        with pytest.raises(NotWritten), Writer(LOGGER, True) as writer:
            writer.start(fail)
            writer.start(lambda: None)

    def test_error_of_the_training_comes_first(self, caplog):
        def fail():
            raise NotWritten("not written")

        with pytest.raises(KeyError), Writer(LOGGER, True) as writer:
            writer.start(fail)
            raise KeyError
        assert "not written" in caplog.text

    def test_other_errors_are_raised_at_the_next_iteration(self):
        def fail():
            raise TrainingError("weights are NaN")

        with pytest.raises(TrainingError, match="are NaN"), Writer(LOGGER, False) as writer:
            writer.start(fail)
            while True:
                writer.check()
                time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "the disk is full: make room"),
        (errno.EDQUOT, "the quota is used up: make room"),
        (errno.EROFS, "the drive is read-only: make it writable"),
        (errno.ESTALE, "the drive does not answer: check its connection"),
        (errno.EACCES, "Permission denied: make FOLDER writable"),
    ],
)
def test_errors_of_the_system_say_what_to_do(code, text, tmp_path, monkeypatch):
    def fail(self, data):
        raise OSError(code, {errno.EACCES: "Permission denied"}.get(code, "?"), str(self))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(NotWritten) as error:
        write_checkpoint(dict(a=1), str(tmp_path), "iter_2.pth")
    assert str(error.value) == (
        f"checkpoint {tmp_path}/iter_2.pth could not be written, "
        f"{text.replace('FOLDER', str(tmp_path))}; older checkpoints are unchanged"
    )
    assert not list(tmp_path.iterdir())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """And the file has the state of its iteration, not that of the end of writing."""
    config = tiny.segmentation(tmp_path, iterations=4)
    config.default_hooks.checkpoint.max_keep_ckpts = 2
    tiny.train(config, tmp_path / "plain")
    seen, go = [], threading.Event()
    plain = saving.write_bytes

    def slow(path, data, sync):
        if path.name == "iter_2.pth":
            seen.append("waits")
            assert go.wait(60)
        plain(path, data, sync)

    def pass_by():
        seen.append(named_checkpoint(tmp_path / "slow"))
        go.set()

    monkeypatch.setattr(saving, "write_bytes", slow)
    tiny.train(config, tmp_path / "slow", at={3: pass_by})
    assert seen == ["waits", None]
    for name in ("iter_2.pth", "iter_4.pth"):
        tiny.assert_same_state(tmp_path / "plain" / name, tmp_path / "slow" / name)


def test_checkpoints_by_time(tmp_path, monkeypatch):
    """One takes the place of the other, between those by iteration."""
    config = tiny.segmentation(tmp_path, iterations=6)
    config.default_hooks.checkpoint.update(interval=4, minutes=1e-9)
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    there = []
    written = CheckpointHook._written

    def watch(self, work_dir, name):
        written(self, work_dir, name)
        there.append(sorted(path.name for path in Path(work_dir).glob("*.pth")))

    monkeypatch.setattr(CheckpointHook, "_written", watch)
    tiny.train(config, tmp_path / "run")
    assert there == [
        ["interim_iter_1.pth"],
        ["interim_iter_2.pth"],
        ["interim_iter_3.pth"],
        ["iter_4.pth"],
        ["interim_iter_5.pth", "iter_4.pth"],
        ["iter_6.pth"],
    ]


@pytest.mark.parametrize("minutes", [0, -1])
def test_time_between_checkpoints_must_be_positive(minutes):
    with pytest.raises(ValueError, match="minutes of CheckpointHook must be positive or None"):
        CheckpointHook(minutes=minutes)


def test_step_of_the_optimizer_waits_for_the_copy_of_its_state(tmp_path, monkeypatch):
    """The copy is made when the next step is about to begin: no sooner, and no later."""
    config = tiny.segmentation(tmp_path, iterations=3)
    config.default_hooks.checkpoint.max_keep_ckpts = 2
    tiny.train(config, tmp_path / "plain")
    at_step, wait, finish = threading.Event(), saving._wait_for_copy, HostCopy.finish
    seen = []

    def reach(runner, *step):
        if runner.iter == 2:
            seen.append(runner.writer.copied.is_set())
            at_step.set()
        wait(runner, *step)

    def finish_late(self):
        assert at_step.wait(60)
        finish(self)

    monkeypatch.setattr(saving, "_wait_for_copy", reach)
    monkeypatch.setattr(HostCopy, "finish", finish_late)
    tiny.train(config, tmp_path / "late")
    assert seen == [False]
    tiny.assert_same_state(tmp_path / "plain/iter_2.pth", tmp_path / "late/iter_2.pth")
