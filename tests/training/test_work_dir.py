# SPDX-License-Identifier: Apache-2.0
"""One training at a time in a work directory, which begins without checkpoints of another."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from mmengine.config import Config

from mmeformer.errors import CheckpointError, TrainingError
from mmeformer.report import history
from mmeformer.training import engine, exclusive
from mmeformer.training.exclusive import LOCK, earlier_checkpoints, only_training
from mmeformer.work_dirs import best_checkpoint, find_config, last_checkpoint

pytestmark = pytest.mark.forks


def best(config):
    config.train_cfg.val_interval = 2
    config.default_hooks.checkpoint.update(save_best="mIoU", rule="greater")
    return config


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def earlier(folder):
    (found,) = folder.glob("earlier_*")
    return found


def iteration(path):
    return torch.load(path, weights_only=False)["meta"]["iter"]


class TestEarlierTraining:
    def test_killed_before_its_first_checkpoint(self, folder, tmp_path):
        """It is not the earlier training that goes on then, and no best model is its own."""
        config = best(tiny.segmentation(folder, 4))
        tiny.train(config, tmp_path)
        before = names(tmp_path)
        assert len(before) == 2
        config.randomness.seed = 7
        assert tiny.fork(lambda rank: tiny.train(config, tmp_path, at={1: tiny.kill})) == [
            -signal.SIGKILL
        ]
        assert best_checkpoint(tmp_path) is None and last_checkpoint(tmp_path) is None
        assert names(earlier(tmp_path)) == before
        losses = tiny.train(config, tmp_path, resume="auto")
        assert sorted(losses) == [0, 1, 2, 3]
        assert tiny.equal(tiny.train(config, tmp_path / "alone"), losses)

    def test_killed_before_its_first_log_line(self, folder, tmp_path):
        """There are no curves then; a resumed run keeps its own."""
        config = tiny.segmentation(folder, 4)

        def killed(iteration, resume=None):
            """Iterations in the logs after a run that is killed before it logs this one."""
            time.sleep(1)  # runs are named by the second
            run = partial(tiny.train, config, tmp_path, resume, at={iteration: tiny.kill})
            assert tiny.fork(lambda rank: run()) == [-signal.SIGKILL]
            return history.read(tmp_path).iterations

        tiny.train(config, tmp_path)
        assert history.read(tmp_path).iterations == 4
        assert killed(0) == 0
        assert history.read(earlier(tmp_path)).iterations == 4
        # The earlier training may have no checkpoint either.
        (tmp_path / "report.html").write_text("of the first")
        assert killed(1) == 1
        assert killed(0) == 0
        assert not (tmp_path / "report.html").exists()
        assert killed(3) == 3
        assert killed(2, "auto") == 3

    def test_is_kept_whole(self, folder, tmp_path):
        config = best(tiny.segmentation(folder, 4))
        tiny.train(config, tmp_path)
        (tmp_path / "report.html").write_text("of the first")
        (tmp_path / "pretrained.pth").write_text("the user's")
        content = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
        tiny.train(tiny.segmentation(folder, 2), tmp_path)
        assert names(tmp_path) == ["iter_2.pth", "pretrained.pth"]
        kept = earlier(tmp_path)
        assert content == {path.name: path.read_bytes() for path in kept.glob("*.pth")} | {
            "pretrained.pth": b"the user's"
        }
        assert (kept / "report.html").read_text() == "of the first"
        assert not (tmp_path / "report.html").exists()
        assert Config.fromfile(find_config(kept)).train_cfg.max_iters == 4
        assert Config.fromfile(find_config(tmp_path)).train_cfg.max_iters == 2
        # It can go on where it is.
        config = best(tiny.segmentation(folder, 6))
        assert sorted(tiny.train(config, kept, resume="auto")) == [4, 5]
        log = "\n".join(path.read_text() for path in tmp_path.glob("*/*.log"))
        assert f"has 2 checkpoints of an earlier training; they are in {kept}" in log

    def test_weights_in_its_place_are_refused(self, folder, tmp_path):
        """The new training would write its own over them, and could not be started twice."""
        config = tiny.segmentation(folder, 2)
        tiny.train(config, tmp_path)
        config.load_from = str(tmp_path / "iter_2.pth")
        with pytest.raises(TrainingError, match=r"load_from=.*iter_2.pth is a .*--work-dir"):
            tiny.train(config, tmp_path)
        assert names(tmp_path) == ["iter_2.pth"] and last_checkpoint(tmp_path)
        tiny.train(config, tmp_path / "other")
        # Other names are no training's.
        (tmp_path / "iter_2.pth").rename(tmp_path / "weights.pth")
        config.load_from = str(tmp_path / "weights.pth")
        tiny.train(config, tmp_path)
        assert names(tmp_path) == ["iter_2.pth", "weights.pth"]

    def test_resumed_from_another_folder(self, folder, tmp_path):
        """The best model there stays; one here is of another training."""
        config = best(tiny.segmentation(folder, 2))
        tiny.train(config, tmp_path / "one")
        tiny.train(config, tmp_path / "two")
        best_of_one = best_checkpoint(tmp_path / "one")
        checkpoint = torch.load(tmp_path / "one/iter_2.pth", weights_only=False)
        # Any later model is better.
        checkpoint["message_hub"]["runtime_info"]["best_score"] = -1.0
        torch.save(checkpoint, tmp_path / "one/iter_2.pth")
        config = best(tiny.segmentation(folder, 8))
        losses = tiny.train(config, tmp_path / "two", resume=str(tmp_path / "one/iter_2.pth"))
        assert sorted(losses) == [2, 3, 4, 5, 6, 7]
        assert best_of_one.is_file()
        assert best_checkpoint(tmp_path / "two").name != best_of_one.name
        assert "iter_2.pth" in names(earlier(tmp_path / "two"))
        assert "iter_8.pth" in names(tmp_path / "two")

    def test_resumed_from_an_older_checkpoint(self, folder, tmp_path):
        """The older one is the last now, also for a run that is killed at once."""
        config = tiny.segmentation(folder, 6)
        config.default_hooks.checkpoint.max_keep_ckpts = -1
        tiny.train(config, tmp_path)
        older = str(tmp_path / "iter_2.pth")
        killed = tiny.fork(lambda rank: tiny.train(config, tmp_path, older, at={3: tiny.kill}))
        assert killed == [-signal.SIGKILL]
        assert last_checkpoint(tmp_path).name == "iter_2.pth"
        assert sorted(tiny.train(config, tmp_path, resume="auto")) == [2, 3, 4, 5]

    def test_checkpoints_in_another_folder(self, folder, tmp_path):
        config = tiny.segmentation(folder, 2)
        config.default_hooks.checkpoint.out_dir = str(tmp_path / "store")
        tiny.train(config, tmp_path / "run")
        assert names(tmp_path / "store/run") == ["iter_2.pth"]
        assert not list((tmp_path / "run").glob("earlier_*"))
        killed = tiny.fork(lambda rank: tiny.train(config, tmp_path / "run", at={1: tiny.kill}))
        assert killed == [-signal.SIGKILL]
        assert names(earlier(tmp_path / "store/run")) == ["iter_2.pth"]
        assert sorted(tiny.train(config, tmp_path / "run", resume="auto")) == [0, 1]

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ("epoch_{}.pth", {"epoch_3.pth", "iter_8.pth", "interim_iter_9.pth", "best_a.pth"}),
            ("mine-{:03d}.pth", {"mine-007.pth", "epoch_3.pth", "iter_8.pth"}),
        ],
    )
    def test_names(self, tmp_path, template, expected):
        for name in (*expected, "weights.pth", ".iter_4.draft-0123abcd.pth", "iter_8.txt"):
            (tmp_path / name).touch()
        assert {path.name for path in earlier_checkpoints(tmp_path, template)} == expected
        (tmp_path / "last_checkpoint").write_text("/elsewhere/weights.pth")
        found = earlier_checkpoints(tmp_path, template)
        assert {path.name for path in found} == {*expected, "weights.pth"}


class TestConfig:
    """The config in a work directory is that of its checkpoints."""

    def test_of_a_refused_resume_is_not(self, folder, tmp_path):
        tiny.train(tiny.segmentation(folder, 2), tmp_path)
        with pytest.raises(CheckpointError):
            other = tiny.segmentation(folder, 4)
            other.model.decode_head.channels = 8
            tiny.train(other, tmp_path, resume="auto")
        assert Config.fromfile(find_config(tmp_path)).model.decode_head.channels == 16

    def test_of_a_test_is_not(self, folder, tmp_path):
        config = tiny.segmentation(folder, 2)
        tiny.train(config, tmp_path)
        tested = config.copy()
        tested.work_dir = str(tmp_path)
        tested.test_dataloader.batch_size = 1
        engine.build_test_runner(tested, str(tmp_path / "iter_2.pth")).test()
        assert Config.fromfile(find_config(tmp_path)).test_dataloader.batch_size == 2


def train_until(path):
    """Lets a training go on once a file exists."""

    def wait():
        while not path.exists():
            time.sleep(0.05)

    return wait


class TestLock:
    def test_two_at_once(self, folder, tmp_path, monkeypatch):
        """The second is refused in one line, also if it would resume; the first is not harmed."""
        monkeypatch.setattr(exclusive, "PATIENCE", 0.2)
        config = tiny.segmentation(folder, 2)
        started, go = tmp_path / "started", tmp_path / "go"
        texts = []

        def second():
            for resume in (None, "auto"):
                with pytest.raises(TrainingError) as error:
                    tiny.train(config, tmp_path / "run", resume)
                texts.append(str(error.value))
            go.touch()

        def first(rank):
            tiny.train(
                config, tmp_path / "run", at={1: lambda: (started.touch(), train_until(go)())}
            )

        child = os.fork()
        if not child:
            os._exit(tiny.fork(first)[0])
        train_until(started)()
        second()
        assert os.waitpid(child, 0)[1] == 0
        for text in texts:
            assert text.startswith("another training (process ") and "\n" not in text
            assert f"runs in {tmp_path}/run: wait for its end, or train with another" in text
        assert names(tmp_path / "run") == ["iter_2.pth"]

    def test_ends_with_its_process(self, tmp_path):
        """Not with the processes that it has started, which outlive a killed one."""
        held = tmp_path / "held"

        def hold(rank):
            with only_training(tmp_path):
                if not os.fork():
                    time.sleep(30)
                    os._exit(0)
                held.touch()
                tiny.kill()

        assert tiny.fork(hold) == [-signal.SIGKILL] and held.exists()
        begin = time.monotonic()
        with only_training(tmp_path):
            assert time.monotonic() - begin < 5

    def test_waits_for_one_that_ends(self, tmp_path):
        held = tmp_path / "held"
        child = os.fork()
        if not child:
            with only_training(tmp_path):
                held.touch()
                time.sleep(1)
            os._exit(0)
        train_until(held)()
        begin = time.monotonic()
        with only_training(tmp_path):
            assert time.monotonic() - begin > 0.5
        os.waitpid(child, 0)

    def test_names_the_process(self, tmp_path):
        with only_training(tmp_path):
            assert f"process {os.getpid()} on " in Path(tmp_path, LOCK).read_text()

    @pytest.mark.parametrize("fault", ["no locks", "not writable"])
    def test_file_systems_without_locks(self, tmp_path, monkeypatch, fault):
        def fail(*args, **kwargs):
            raise OSError(95, "Operation not supported")

        if fault == "no locks":
            monkeypatch.setattr(exclusive.fcntl, "lockf", fail)
        else:
            monkeypatch.setattr(Path, "open", fail)
        begun = []
        with only_training(tmp_path):
            begun.append(True)
        assert begun
