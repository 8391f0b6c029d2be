# SPDX-License-Identifier: Apache-2.0
"""A run that was killed at any moment resumes as if it had not been interrupted."""

import errno
import functools
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch

from mmeformer import files
from mmeformer.errors import CheckpointError, TrainingError
from mmeformer.training import runner, saving
from mmeformer.training.state import newest_resumable, read_resumable

pytestmark = pytest.mark.forks


def at_call_for(name: str, action):
    """A function that performs ``action`` at its first call for a file, else what it replaces.

    Args:
        name: in one of the paths of that call.
        action: takes the same arguments.
    """
    done = []

    def wrap(original):
        def replacement(*args, **kwargs):
            if not done and any(name in str(argument) for argument in args):
                done.append(name)
                return action(*args, **kwargs)
            return original(*args, **kwargs)

        return replacement

    return wrap


def write_half(self, content):
    with self.open("wb") as file:
        file.write(content[: len(content) // 2])


def write_half_and_kill(self, content):
    write_half(self, content)
    tiny.kill()


def rename_and_kill(draft, target):
    os.replace(draft, target)
    tiny.kill()


# The function replaced, for which file, by what; the iterations that were then done for good.
MOMENTS = {
    "half written": (Path, "write_bytes", ".iter_4.draft", write_half_and_kill, 2),
    "not yet renamed": (files, "_move", "iter_4.pth", lambda *_: tiny.kill(), 2),
    "renamed, but not yet named as the last": (files, "_move", "iter_4.pth", rename_and_kill, 2),
    "named as the last, old one still there": (
        saving.CheckpointHook,
        "_remove",
        "iter_2.pth",
        lambda *_: tiny.kill(),
        4,
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """Function that returns the losses of an uninterrupted run of a task."""

    @functools.cache
    def losses(task):
        return tiny.train(tiny.ALL_TASKS[task](folder), folder / f"uninterrupted-{task}")

    return losses


def test_random_numbers_matter(folder, uninterrupted):
    """The comparisons below mean something: another seed gives other losses from the start."""
    config = tiny.segmentation(folder, iterations=1)
    config.randomness.seed = 2
    other = tiny.train(config, folder / "other-seed")
    assert not tiny.equal(uninterrupted("segmentation"), other)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(name, marks=[pytest.mark.slow] if index else [])
        for index, name in enumerate(MOMENTS)
    ],
)
def test_killed_while_saving(folder, uninterrupted, tmp_path, monkeypatch, moment):
    owner, name, file, action, done = MOMENTS[moment]
    config = tiny.segmentation(folder)

    def run(rank):
        setattr(owner, name, at_call_for(file, action)(getattr(owner, name)))
        tiny.train(config, tmp_path)

    assert tiny.fork(run) == [-signal.SIGKILL]
    named = Path((tmp_path / "last_checkpoint").read_text()).name
    assert named == f"iter_{done}.pth"
    losses = tiny.train(config, tmp_path, resume="auto")
    assert sorted(losses) == list(range(done, tiny.ITERATIONS))
    assert tiny.equal(uninterrupted("segmentation"), losses)
    assert not [path for path in tmp_path.iterdir() if files.is_draft(path)]


@pytest.mark.parametrize(
    ("task", "workers"),
    [
        ("detection", 0),
        *(
            pytest.param(*param.values, workers, marks=[*param.marks, pytest.mark.slow])
            for param in tiny.all_tasks()
            for workers in (0, 2)
            if (*param.values, workers) not in (("detection", 0), ("classification", 0))
        ),
    ],
)
def test_killed_between_steps(folder, uninterrupted, tmp_path, task, workers):
    config = tiny.ALL_TASKS[task](folder)
    assert tiny.fork(lambda rank: tiny.train(config, tmp_path, at={5: tiny.kill})) == [
        -signal.SIGKILL
    ]
    # Neither the number of workers nor a validation in between changes what is drawn.
    config.train_dataloader.num_workers = workers
    config.train_cfg.val_interval = 6
    losses = tiny.train(config, tmp_path, resume="auto")
    assert sorted(losses) == [4, 5, 6, 7]
    assert tiny.equal(uninterrupted(task), losses)


@pytest.mark.parametrize(
    ("by_epoch", "killed_at", "done"),
    [(False, 3, 2), (True, 7, 4), (False, 4, 4)],
)
@pytest.mark.slow
def test_epochs_with_batches_by_aspect_ratio(folder, tmp_path, by_epoch, killed_at, done):
    """COCO's recipe: epochs of 4 iterations, killed within them and right after one."""
    config = tiny.detection(folder)
    config.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2, val_interval=10)
    config.train_dataloader.sampler = dict(type="DefaultSampler", shuffle=True)
    config.train_dataloader.batch_sampler = dict(type="AspectRatioBatchSampler")
    config.default_hooks.checkpoint.update(by_epoch=by_epoch, interval=1 if by_epoch else 2)
    expected = tiny.train(config, tmp_path / "uninterrupted")
    assert sorted(expected) == list(range(8))
    tiny.fork(lambda rank: tiny.train(config, tmp_path / "killed", at={killed_at: tiny.kill}))
    losses = tiny.train(config, tmp_path / "killed", resume="auto")
    assert sorted(losses) == list(range(done, 8))
    assert tiny.equal(expected, losses)


@pytest.mark.slow
@pytest.mark.parametrize("task", tiny.TASKS)
def test_two_processes(folder, tmp_path, task):
    run = functools.partial(tiny.train_two, tiny.TASKS[task](folder, iterations=6))
    assert run(tmp_path / "uninterrupted") == [0, 0]
    assert run(tmp_path / "killed", at={4: tiny.kill}) == [-signal.SIGKILL] * 2
    assert run(tmp_path / "killed", resume="auto") == [0, 0]
    for rank in (0, 1):
        resumed = tiny.losses_of(tmp_path / "killed", rank)
        assert sorted(resumed) == [4, 5]
        assert tiny.equal(tiny.losses_of(tmp_path / "uninterrupted", rank), resumed)


@pytest.mark.slow
def test_random_seed_is_taken_over(folder, tmp_path):
    """Without a seed in the config mmengine draws one, which a resumed run must keep."""
    config = tiny.segmentation(folder, iterations=4)
    config.randomness = dict(seed=None)
    expected = tiny.train(config, tmp_path)
    shutil.copy(tmp_path / "iter_4.pth", tmp_path / "elsewhere.pth")
    config.train_cfg.max_iters = 6
    config.param_scheduler[0].end = 4
    first = tiny.train(config, tmp_path / "a", resume=str(tmp_path / "elsewhere.pth"))
    second = tiny.train(config, tmp_path / "b", resume=str(tmp_path / "elsewhere.pth"))
    assert sorted(first) == [4, 5] and tiny.equal(first, second)
    assert len(expected) == 4


class TestDiskFull:
    """The disk is full at one checkpoint, in the middle of its file."""

    @pytest.fixture
    def fail(self, monkeypatch):
        """A function that lets the checkpoint of a number (from 1) fail."""

        def no_space(self, content):
            write_half(self, content)
            raise OSError(errno.ENOSPC, "No space left on device")

        return lambda name: monkeypatch.setattr(
            Path, "write_bytes", at_call_for(f".{name}.draft", no_space)(Path.write_bytes)
        )

    def test_the_next_one_counts(self, folder, uninterrupted, tmp_path, fail):
        fail("iter_4")
        losses = tiny.train(tiny.segmentation(folder), tmp_path)
        assert len(losses) == 8 and tiny.equal(uninterrupted("segmentation"), losses)
        log = next(tmp_path.glob("*/*.log")).read_text()
        (line,) = (line for line in log.splitlines() if "could not be written" in line)
        assert line.endswith(
            f"checkpoint {tmp_path}/iter_4.pth could not be written, the disk is full: make room; "
            "older checkpoints are unchanged; the training goes on to the next one"
        )
        # What the failed one would have replaced is gone with the next.
        assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_8.pth"]

    @pytest.mark.slow
    def test_checkpoints_before_stay(self, folder, uninterrupted, tmp_path, fail, monkeypatch):
        config = tiny.segmentation(folder)
        config.default_hooks.checkpoint.stop_on_error = True
        fail("iter_4")
        with pytest.raises(TrainingError, match="iter_4.pth could not be .*the disk is full"):
            tiny.train(config, tmp_path)
        assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_2.pth"]
        assert Path((tmp_path / "last_checkpoint").read_text()).name == "iter_2.pth"
        losses = tiny.train(config, tmp_path, resume="auto")
        assert tiny.equal(uninterrupted("segmentation"), losses) and len(losses) == 6

    def test_the_last_one_must_succeed(self, folder, tmp_path, fail):
        config = tiny.segmentation(folder, iterations=2)
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
        fail("iter_2")
        with pytest.raises(TrainingError, match="iter_2.pth could not be .*the disk is full"):
            tiny.train(config, tmp_path)
        assert not list(tmp_path.glob("*.pth"))


class TestSearch:
    @pytest.fixture
    def work_dir(self, tmp_path):
        """Three checkpoints, the last of them named."""
        for number in (1, 2, 3):
            content = dict(meta=dict(iter=number), state_dict={"a": torch.ones(50)})
            torch.save(
                {**content, "optimizer": {}, "message_hub": {}}, tmp_path / f"iter_{number}.pth"
            )
            os.utime(tmp_path / f"iter_{number}.pth", (number, number))
        torch.save(content, tmp_path / "best_mIoU_iter_3.pth")
        (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_3.pth"))
        return tmp_path

    def test_the_named_one(self, work_dir):
        (work_dir / "last_checkpoint").write_text(str(work_dir / "iter_2.pth"))
        path, content = newest_resumable(work_dir)
        assert path.name == "iter_2.pth" and content["meta"]["iter"] == 2

    def test_moved_folder(self, work_dir, tmp_path):
        moved = shutil.move(work_dir, tmp_path.with_name("moved"))
        assert newest_resumable(moved)[0] == Path(moved, "iter_3.pth")

    def test_copied_folder(self, work_dir, tmp_path):
        """The original may be trained on; only what a copy lacks wholly is taken from there."""
        copied = Path(shutil.copytree(work_dir, tmp_path / "copied"))
        assert newest_resumable(copied)[0] == copied / "iter_3.pth"
        (copied / "iter_3.pth").write_bytes(b"")
        assert newest_resumable(copied)[0] == copied / "iter_2.pth"
        for path in copied.glob("*.pth"):
            path.unlink()
        assert newest_resumable(copied)[0] == work_dir / "iter_3.pth"

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
    def test_falls_back(self, work_dir, damage, caplog):
        path = work_dir / "iter_3.pth"
        content = bytearray(path.read_bytes())
        if damage == "gone":
            path.unlink()
        elif damage == "flipped":
            # Within the weights: 50 ones.
            content[content.index(b"\x00\x00\x80\x3f" * 50) + 2] ^= 1
            path.write_bytes(content)
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
        assert newest_resumable(work_dir)[0].name == "iter_2.pth"

    @pytest.mark.parametrize("text", ["", "nonsense\x00", "/no/such/file.pth"])
    def test_damaged_name(self, work_dir, text):
        (work_dir / "last_checkpoint").write_text(text)
        assert newest_resumable(work_dir)[0].name == "iter_3.pth"

    def test_drafts_are_no_checkpoints(self, work_dir):
        """A killed run may leave one that is newer than all checkpoints, whole or not."""
        draft = work_dir / ".iter_4.draft-0123abcd.pth"
        shutil.copy(work_dir / "iter_3.pth", draft)
        assert files.is_draft(draft)
        (work_dir / "last_checkpoint").unlink()
        assert newest_resumable(work_dir)[0].name == "iter_3.pth"

    def test_nothing_there(self, tmp_path):
        assert newest_resumable(tmp_path) is None

    def test_nothing_whole(self, work_dir):
        for path in work_dir.glob("iter_*"):
            path.write_bytes(b"PK\x03\x04")
        with pytest.raises(CheckpointError, match="none of the 3 checkpoints .*iter_3.pth"):
            newest_resumable(work_dir)

    def test_weights_alone_are_not_enough(self, work_dir):
        best = work_dir / "best_mIoU_iter_3.pth"
        with pytest.raises(CheckpointError, match="has no optimizer, message_hub"):
            read_resumable(best)


@pytest.mark.slow
def test_better_model_replaces_the_best_only_once_saved(folder, tmp_path, monkeypatch):
    config = tiny.segmentation(folder, iterations=4)
    config.train_cfg.val_interval = 2
    config.default_hooks.checkpoint.update(save_best="mIoU", rule="greater")
    scores = iter([10.0, 20.0])
    monkeypatch.setattr(
        "mmseg.evaluation.IoUMetric.compute_metrics", lambda self, results: dict(mIoU=next(scores))
    )
    there = []
    save = runner.Runner.save_checkpoint

    def watch(self, out_dir, filename, *args, **kwargs):
        save(self, out_dir, filename, *args, **kwargs)
        self.writer.wait()
        there.append(sorted(path.name for path in tmp_path.glob("best_*.pth")))

    monkeypatch.setattr(runner.Runner, "save_checkpoint", watch)
    tiny.train(config, tmp_path)
    assert ["best_mIoU_iter_2.pth", "best_mIoU_iter_4.pth"] in there
    assert [path.name for path in tmp_path.glob("best_*.pth")] == ["best_mIoU_iter_4.pth"]
    resumable = newest_resumable(tmp_path)[1]["message_hub"]["runtime_info"]
    assert Path(resumable["best_ckpt"]).name == "best_mIoU_iter_4.pth"


@pytest.mark.parametrize("outdated", ["iter_2.pth", "best_mIoU_iter_2.pth"])
def test_killed_before_what_is_outdated_is_removed(folder, tmp_path, monkeypatch, outdated):
    """A run that is resumed then removes it, and no other file, though it trains no more."""
    config = tiny.segmentation(folder, iterations=4)
    config.train_cfg.val_interval = 2
    config.default_hooks.checkpoint.update(save_best="mIoU", rule="greater")
    monkeypatch.setattr(
        "mmseg.evaluation.IoUMetric.compute_metrics", lambda *_: dict(mIoU=time.monotonic())
    )

    def run(rank):
        remove = saving.CheckpointHook._remove
        saving.CheckpointHook._remove = at_call_for(outdated, lambda *_: tiny.kill())(remove)
        tiny.train(config, tmp_path)

    assert tiny.fork(run) == [-signal.SIGKILL]
    assert (tmp_path / outdated).exists()
    (tmp_path / "best_mIoU_iter_1.pth").touch()
    tiny.train(config, tmp_path, resume="auto")
    left = {path.name for path in tmp_path.glob("*.pth")}
    assert left == {"iter_4.pth", "best_mIoU_iter_4.pth", "best_mIoU_iter_1.pth"}


def test_outdated_files_outside_of_the_folder_stay(folder, tmp_path):
    """A checkpoint from a stranger may name them."""
    config = tiny.segmentation(folder, iterations=2)
    work_dir = tmp_path / "run"
    tiny.train(config, work_dir)
    content = torch.load(work_dir / "iter_2.pth", weights_only=False)
    mine = tmp_path / "mine.pth"
    mine.touch()
    (work_dir / "old.pth").touch()
    content["message_hub"]["runtime_info"][saving.OUTDATED] = ["../mine.pth", str(mine), "old.pth"]
    torch.save(content, work_dir / "iter_2.pth")
    tiny.train(config, work_dir, resume="auto")
    assert mine.exists() and not (work_dir / "old.pth").exists()


def test_outdated_files_of_an_older_checkpoint_stay(folder, tmp_path):
    """Who goes on from an older checkpoint may have files again that it has replaced."""
    config = tiny.segmentation(folder, iterations=6)
    config.default_hooks.checkpoint.max_keep_ckpts = 2
    tiny.train(config, tmp_path)
    older, newest = tmp_path / "iter_4.pth", tmp_path / "iter_6.pth"
    content = torch.load(newest, weights_only=False)
    assert content["message_hub"]["runtime_info"][saving.OUTDATED] == ["iter_2.pth"]
    shutil.copy(newest, older)
    (tmp_path / "iter_2.pth").touch()
    tiny.train(config, tmp_path, resume=str(older))
    assert (tmp_path / "iter_2.pth").exists()


@pytest.mark.parametrize(
    ("name", "metrics", "closest"),
    [
        ("coco/bbox_mAP", ["coco/segm_mAP", "coco/segm_mAP_50"], "coco/segm_mAP"),
        ("mIoU", ["aAcc", "mDice", "mAcc"], "mDice"),
        ("mIoU", ["aAcc", "mFscore", "mPrecision", "mRecall"], "mFscore"),
        ("dota/AP50", ["dota/AP75"], "dota/AP75"),
        ("coco/bbox_mAP", ["pascal_voc/AP50", "pascal_voc/mAP"], "pascal_voc/mAP"),
    ],
)
def test_closest_metric(name, metrics, closest):
    assert saving.closest_metric(name, metrics) == closest


@pytest.mark.slow
def test_best_model_by_the_metric_that_is_evaluated(folder, tmp_path, monkeypatch):
    """Masks only: the base config's metric of boxes is not there, nor a resumed run's old one."""
    config = tiny.segmentation(folder, iterations=2)
    config.train_cfg.val_interval = 2
    config.default_hooks.checkpoint.update(save_best="mIoU", rule="greater")
    config.val_evaluator.iou_metrics = ["mDice"]
    scores = dict(aAcc=50.0, mDice=30.0, mAcc=20.0)
    monkeypatch.setattr(
        "mmseg.evaluation.IoUMetric.compute_metrics", lambda self, results: dict(scores)
    )
    tiny.train(config, tmp_path)
    assert [path.name for path in tmp_path.glob("best_*")] == ["best_mDice_iter_2.pth"]
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert (
        "mIoU is not among the metrics aAcc, mDice, mAcc; the best checkpoint is that of mDice"
        in log
    )
    # Better by its own score, though lower than the best one of the other metric.
    config.default_hooks.checkpoint.save_best = "mAcc"
    config.train_cfg.update(max_iters=4)
    tiny.train(config, tmp_path, resume="auto")
    names = sorted(path.name for path in tmp_path.glob("best_*"))
    assert names == ["best_mAcc_iter_4.pth", "best_mDice_iter_2.pth"]
