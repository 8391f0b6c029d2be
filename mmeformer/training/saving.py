# SPDX-License-Identifier: Apache-2.0
"""Save training checkpoints safely: by time, on signals, and with the scores of validations."""

from __future__ import annotations

import errno
import inspect
import io
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path

import torch
from mmengine.dist import all_gather_object, barrier, is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from mmengine.runner.checkpoint import save_checkpoint

from mmeformer.errors import TrainingError
from mmeformer.files import is_draft, write_bytes, write_text
from mmeformer.signals import PREEMPTED
from mmeformer.training.exclusive import INTERIM, earlier_checkpoints, earlier_runs, set_aside
from mmeformer.training.preemption import Preempted, anywhere
from mmeformer.training.schedule import wrappers
from mmeformer.training.writer import NotWritten
from mmeformer.work_dirs import POINTER, named_checkpoint

DISKS = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the quota is used up: make room",
    errno.EROFS: "the drive is read-only: make it writable",
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
        "the drive does not answer: check its connection",
    ),
}
"""What to say about errors of the system."""

OUTDATED = "outdated_checkpoints"
"""Where a checkpoint's message hub lists the files that it replaces."""


class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's hook, with checkpoints by time, on signals and after validations.

    - Every ``minutes`` a checkpoint ``interim_iter_N.pth`` takes the place of the one before.
      So does one when a signal stops the run (:mod:`mmeformer.training.preemption`). They are
      removed at the end of the training.
    - After a validation, a checkpoint just saved is saved again, with the scores.
    - An old checkpoint is removed only after the new one is on the disk. mmengine removes it first,
      so a kill or a full disk at that moment leaves none. The new one lists what it replaces, so
      that a run resumed after a kill in between removes it.
    - If ``save_best`` names a metric that is not evaluated, the closest one takes its place.

    :class:`mmeformer.training.runner.Runner` uses it in place of mmengine's.

    Args:
        minutes: time between checkpoints, if no other comes earlier; None for none by time.
        stop_on_error: whether a checkpoint that cannot be written (a full disk, say) stops the run.
            By default it goes on to the next; only the last has to succeed.
        **kwargs: as in mmengine.

    Raises:
        ValueError: ``minutes`` is not positive, or a setting is unknown.
    """

    best_ckpt_path: str | None

    def __init__(
        self, *args, minutes: float | None = 10, stop_on_error: bool = False, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args:
            # mmengine hands them on, and stops at the first checkpoint.
            known = [*inspect.signature(super().__init__).parameters][:-1]
            raise ValueError(
                f"CheckpointHook has no setting {', '.join(self.args)}; it has minutes, "
                f"stop_on_error, {', '.join(known)}"
            )
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes of CheckpointHook must be positive or None, not {minutes}")
        self.minutes = minutes
        self.stop_on_error = stop_on_error
        self._saved: tuple[str, int, int] | None = None
        """Name, epoch and iteration of the newest checkpoint of this process."""
        self._saved_at = 0.0
        self._outdated: list[str] = []
        """Names of files to remove when a newer checkpoint is on the disk."""
        self._validating = False
        self._better = False

    def before_train(self, runner: Runner) -> None:
        """Remove files that a killed run left unfinished; set aside those of another training."""
        super().before_train(runner)
        self._saved_at = time.monotonic()
        for item in wrappers(runner.optim_wrapper):
            item.optimizer.register_step_pre_hook(partial(_wait_for_copy, runner))
        start = Path(runner._load_from) if runner._load_from else None
        folders = {Path(folder).resolve() for folder in (self.out_dir, runner.work_dir)}
        own = None
        if runner._resume and start is not None and start.resolve().parent in folders:
            own = start
        if own is not None and own.parent == Path(self.out_dir):
            # A validation that is repeated now adds its scores to it.
            self._saved = own.name, runner.epoch, runner.iter
        if not is_main_process():
            return
        for path in [path for folder in folders for path in folder.glob(".*")]:
            if is_draft(path) and path.is_file():
                path.unlink()
        if own is not None:
            newest = named_checkpoint(runner.work_dir)
            if newest is not None and newest.resolve() == own.resolve():
                outdated = runner.message_hub.get_info(OUTDATED, ())
                # The file may be a stranger's: nothing outside of the folder.
                self._outdated += [name for name in outdated if Path(name).name == name]
                self._remove_outdated()
            # It may be older than the newest, from which a later run would go on.
            write_text(Path(runner.work_dir, POINTER), str(own), sync=True)
            return
        for folder in folders:
            self._set_aside(runner, folder, start)

    def _set_aside(self, runner: Runner, folder: Path, start: Path | None) -> None:
        """Move an earlier training's checkpoints and logs, which would pass for those of this one.

        Raises:
            TrainingError: this training has begun with one of them.
        """
        found = earlier_checkpoints(folder, self.filename_tmpl)
        runs = earlier_runs(folder, Path(runner.log_dir))
        if not found and not runs:
            return
        if start is not None and start.resolve() in found:
            raise TrainingError(
                f"load_from={start} is a checkpoint of the earlier training in {runner.work_dir}, "
                "whose place a new one takes: choose another --work-dir"
            )
        target = set_aside(folder, found, runs)
        what = f"{len(found)} checkpoints" if found else "the logs"
        hint = " (with --resume that training would have gone on)" if found else ""
        runner.logger.warning(
            f"{folder} has {what} of an earlier training; they are in {target} now{hint}"
        )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Save by iteration, by time, and if a signal has arrived."""
        runner.stop.trained = True
        runner.writer.check()
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if not all(item.should_update() for item in wrappers(runner.optim_wrapper)):
            # Accumulated gradients that were not applied are not in the checkpoint.
            return
        late = self.minutes is not None and time.monotonic() - self._saved_at > 60 * self.minutes
        stop, late = anywhere(runner.stop.signal is not None, late)
        meta = dict(epoch=runner.epoch, iter=runner.iter + 1)
        if stop:
            self.stop(runner, meta)
        elif late and not self._is_saved(meta):
            self._save_interim(runner, meta)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the model if it is the best so far."""
        self._validating, self._better = True, False
        super().after_val_epoch(runner, metrics)
        self._validating = False

    def after_val(self, runner: Runner) -> None:
        """Save the scores, and stop if a signal has arrived."""
        if runner.stop is None:
            return
        meta = dict(epoch=runner.epoch, iter=runner.iter, validated=True)
        if self._better:
            step = runner.epoch if self.by_epoch else runner.iter
            self._save_checkpoint_with_step(runner, step, meta)
        elif self._saved is not None and self._is_saved(meta):
            self._save(runner, self._saved[0], meta)
        if anywhere(runner.stop.signal is not None)[0]:
            self.stop(runner, meta)

    def after_train(self, runner: Runner) -> None:
        """Remove interim checkpoints, once the last checkpoint is complete."""
        runner.writer.wait()
        super().after_train(runner)
        if is_main_process() and self.last_ckpt is not None:
            named = named_checkpoint(runner.work_dir)
            self._remove_interims("" if named is None else named.name)

    def stop(self, runner: Runner, meta: dict) -> None:
        """Stop the run with a checkpoint.

        Args:
            runner: of the training.
            meta: complete epochs (``epoch``) and iterations (``iter``).

        Raises:
            Preempted: the checkpoint is complete.
            TrainingError: it could not be written.
        """
        if not self._is_saved(meta):
            self._save_interim(runner, meta)
        runner.writer.finish()
        barrier()
        runner.logger.warning(
            f"stopped by {runner.stop.signal or 'a signal of another process'}. "
            f"{last_checkpoint(runner)} Continue with --resume (exit status {PREEMPTED})"
        )
        raise Preempted

    def _is_saved(self, meta: dict) -> bool:
        return self._saved is not None and self._saved[1:] == (meta["epoch"], meta["iter"])

    def _save_interim(self, runner: Runner, meta: dict) -> None:
        self._save(runner, f"{INTERIM}{meta['iter']}.pth", meta)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if self._validating:
            # For a better model mmengine saves again before all hooks have seen the scores.
            self._better = True
            return
        runner.writer.wait()
        if self.max_keep_ckpts > 0:
            kept = [known for known in self.keep_ckpt_ids if known != step] + [step]
            outdated, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept)
            runner.message_hub.update_info("keep_ckpt_ids", kept)
            self._outdated += [self.filename_tmpl.format(known) for known in outdated]
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        self._save(runner, name, meta)

    def _save(self, runner: Runner, name: str, meta: dict) -> None:
        self._saved = name, meta["epoch"], meta["iter"]
        self._saved_at = time.monotonic()
        runner.message_hub.update_info(OUTDATED, [*self._outdated])
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            after=partial(self._written, runner.work_dir, name),
            **self.args,
        )

    def _written(self, work_dir: str, name: str) -> None:
        """Name a checkpoint that is on the disk as the last, and remove what it replaces."""
        path = self.file_backend.join_path(self.out_dir, name)
        write_text(Path(work_dir, POINTER), path, sync=True)
        self._remove_interims(name)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        while self._outdated:
            self._remove(self._outdated.pop())

    def _remove_interims(self, kept: str) -> None:
        names = self.file_backend.list_dir_or_file(self.out_dir, list_dir=False, suffix=".pth")
        for name in list(names):
            if name.startswith(INTERIM) and name != kept:
                self._remove(name)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        self._require_indicators(runner, metrics)
        self._drop_other_metric(runner)
        # Hide the previous best from mmengine, which would remove it before saving.
        before = self._best()
        self._set_best({})
        super()._save_best_checkpoint(runner, metrics)
        after = self._best()
        self._set_best({**before, **after})
        for name, path in before.items():
            if name in after and after[name] != path:
                # By name: after a resume from another folder, that file is not ours to remove.
                if Path(path).name != Path(after[name]).name:
                    self._outdated.append(Path(path).name)

    def _require_indicators(self, runner: Runner, metrics: Mapping) -> None:
        """Replace metrics that are not evaluated by the closest ones that are.

        ``save_best`` of a base config does not know which metrics a config evaluates, such as those
        of masks only. mmengine would fail after the first epoch.
        """
        scores = [name for name, value in metrics.items() if isinstance(value, Real)]
        missing = [name for name in self.key_indicators if name not in (*metrics, "auto")]
        if not missing or not scores:
            return
        chosen = [
            closest_metric(name, scores) if name in missing else name
            for name in self.key_indicators
        ]
        self._init_rule(self.rules, chosen)
        runner.logger.warning(
            f"save_best: {', '.join(missing)} is not among the metrics {', '.join(scores)}; the "
            f"best checkpoint is that of {', '.join(chosen)}. To choose another, set "
            "default_hooks.checkpoint.save_best"
        )

    def _drop_other_metric(self, runner: Runner) -> None:
        """After resuming with another ``save_best``, do not compare with the score of the old."""
        if len(self.key_indicators) > 1 or "auto" in self.key_indicators or not self.best_ckpt_path:
            return
        (name,) = self.key_indicators
        if not Path(self.best_ckpt_path).name.startswith(f"best_{name}_".replace("/", "_")):
            self.best_ckpt_path = None
            runner.message_hub.pop_info("best_score", None)
            runner.message_hub.pop_info("best_ckpt", None)

    def _best(self) -> dict[str | None, str]:
        """Paths of the best checkpoints by metric, or under None if there is only one metric."""
        if hasattr(self, "best_ckpt_path_dict"):
            paths = self.best_ckpt_path_dict
        else:
            paths = {None: self.best_ckpt_path}
        return {name: path for name, path in paths.items() if path}

    def _set_best(self, paths: dict[str | None, str]) -> None:
        if hasattr(self, "best_ckpt_path_dict"):
            self.best_ckpt_path_dict = {name: paths.get(name) for name in self.key_indicators}
        else:
            self.best_ckpt_path = paths.get(None)

    def _remove(self, name: str) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)


def _wait_for_copy(runner: Runner, *step) -> None:
    """Let an optimizer change its state only when no copy is being made of it."""
    if runner.writer is not None:
        runner.writer.copied.wait()


class PreemptionHook(Hook):
    """Ends a validation when a signal arrives; the resumed run repeats it."""

    # Before a hook uses scores of an evaluation that was cut short.
    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._shared = 0
        """Iterations of the validation that all processes have."""

    def before_train(self, runner: Runner) -> None:
        """Let signals end the computation of scores too, which may take minutes."""
        if runner.stop is not None and runner.val_loop is not None:
            for metric in runner.val_loop.evaluator.metrics:
                metric.compute_metrics = runner.stop.interruptible(metric.compute_metrics)

    def before_val(self, runner: Runner) -> None:
        """Find how often the processes can ask each other."""
        if runner.stop is not None:
            self._shared = min(all_gather_object(len(runner.val_dataloader)))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Stop if a signal has arrived."""
        if runner.stop is not None and batch_idx < self._shared:
            if anywhere(runner.stop.signal is not None)[0]:
                self._stop(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Stop if a signal has cut the evaluation short."""
        if runner.stop is not None and anywhere(runner.stop.interrupted)[0]:
            self._stop(runner)

    @staticmethod
    def _stop(runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                # It validates the averaged weights in place of those that are trained.
                hook._swap_ema_parameters()
        hook = checkpoint_hook(runner)
        assert hook is not None  # else signals are not noted
        hook.stop(runner, dict(epoch=runner.epoch, iter=runner.iter))


def checkpoint_hook(runner: Runner) -> CheckpointHook | None:
    """The hook that saves checkpoints; None if the config has none, or mmengine's."""
    return next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)


def last_checkpoint(runner: Runner) -> str:
    """A sentence that names the checkpoint to resume from; waits for one that is being written."""
    writer = getattr(runner, "writer", None)
    if writer is not None:
        writer.wait()
    named = named_checkpoint(runner.work_dir)
    return (
        "There is no checkpoint yet." if named is None else f"The last good checkpoint is {named}."
    )


def write_checkpoint(
    content: Mapping,
    out_dir: str,
    filename: str,
    file_client_args: dict | None = None,
    backend_args: dict | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Write a checkpoint to a folder or a URL; files are complete or absent.

    Args:
        content: of :func:`mmeformer.training.state.training_state`.
        out_dir, filename, file_client_args, backend_args: as in mmengine.
        after: called when the checkpoint is on the disk.

    Raises:
        NotWritten: the disk is full or not writable. Older checkpoints stay as they were.
    """
    try:
        if "://" in str(out_dir):
            path = f"{str(out_dir).rstrip('/')}/{filename}"
            save_checkpoint(content, path, file_client_args, backend_args)
        else:
            # In memory first: PyTorch's own writing to files hides the reasons of errors.
            data = io.BytesIO()
            torch.save(content, data)
            write_bytes(Path(out_dir, filename), data.getbuffer(), sync=True)
        if after is not None:
            after()
    except OSError as error:
        reason = DISKS.get(error.errno or 0, f"{error.strerror}: make {out_dir} writable")
        raise NotWritten(
            f"checkpoint {out_dir}/{filename} could not be written, {reason}; older checkpoints "
            "are unchanged"
        ) from error


def closest_metric(name: str, others: Sequence[str]) -> str:
    """The first of ``others`` with most words of ``name``: for ``coco/bbox_mAP``, say,
    ``coco/segm_mAP``.
    """
    return max(others, key=lambda other: len(common_words(name, other)))


def common_words(name: str, other: str) -> set[str]:
    """Words that two names of metrics share."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"[A-Z]?[a-z]+|[A-Z]|\d+", text))

    return words(name) & words(other)
