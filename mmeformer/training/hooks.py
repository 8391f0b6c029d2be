# SPDX-License-Identifier: Apache-2.0
"""Hooks that stop a training that goes wrong.

:class:`mmeformer.training.runner.Runner` adds those that a config does not name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, broadcast, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.runner import Runner
from torch import Tensor

from mmeformer.checks.interface import CheckedDataset
from mmeformer.errors import TrainingError
from mmeformer.registry import HOOKS
from mmeformer.training.data import UNREADABLE, GuardedFiles, leaves
from mmeformer.training.saving import closest_metric, common_words, last_checkpoint
from mmeformer.training.schedule import flat


@HOOKS.register_module()
class UnreadableFilesHook(Hook):
    """Log the files that training left out, and stop if there are too many.

    Each file counts once. Processes exchange their lists every :attr:`INTERVAL` iterations and at
    the end of an epoch.

    Args:
        max_share: share of the data set, 0 to 1, that may be unreadable. Unless it is 0, one file
            always may.

    Raises:
        TrainingError: more files are unreadable; the message lists the first ones.
    """

    INTERVAL = 100
    NAMED = 10

    def __init__(self, max_share: float = 0.01) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must lie between 0 and 1, but is {max_share}")
        self.max_share = max_share
        self.found: dict[str, str] = {}

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Record the files that this batch replaced."""
        for sample in _samples(data_batch):
            self._note(runner, sample.metainfo.get(UNREADABLE, {}))
        if self.every_n_train_iters(runner, self.INTERVAL):
            self._gather(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Exchange the lists of all processes and log them."""
        self._gather(runner)
        if self.found:
            runner.logger.warning(
                f"{len(self.found)} of {_file_count(runner)} samples could not be "
                f"read so far; others took their place:\n{self._list()}"
            )

    def _gather(self, runner: Runner) -> None:
        for found in all_gather_object(self.found):
            self._note(runner, found)

    def _note(self, runner: Runner, found: dict[str, str]) -> None:
        new = {path: reason for path, reason in found.items() if path not in self.found}
        for path, reason in new.items():
            self.found[path] = reason
            runner.logger.warning(f"left out of training: {path} {reason}")
        total = _file_count(runner)
        allowed = max(math.ceil(self.max_share), int(self.max_share * total))
        if new and len(self.found) > allowed:
            raise TrainingError(
                f"{len(self.found)} of {total} samples could not be read, more than the {allowed} "
                f"that max_share={self.max_share} allows:\n{self._list()}\nFix the files, or "
                "raise the share with custom_hooks=[dict(type='mmeformer.UnreadableFilesHook', "
                "max_share=...)]"
            )

    def _list(self) -> str:
        lines = [f"  {path} {reason}" for path, reason in list(self.found.items())[: self.NAMED]]
        if (more := len(self.found) - self.NAMED) > 0:
            lines.append(f"  and {more} more")
        return "\n".join(lines)


def on_host(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of the numbers among an iteration's results, for which the host waits once in all.

    Whoever reads numbers from a GPU one by one waits for each.
    """
    numbers = {
        name: value.detach().float().reshape(())
        for name, value in outputs.items()
        if isinstance(value, Tensor) and value.numel() == 1
    }
    if not numbers:
        return {}
    return dict(zip(numbers, torch.stack(list(numbers.values())).cpu(), strict=True))


class LossCheckHook(Hook):
    """Stop at a loss that is NaN or infinite, or exactly 0 for long, before more is saved.

    mmengine's ``CheckInvalidLossHook`` checks every 50 iterations and reports no details. A loss of
    exactly 0 has no gradient: the labels do not reach it. If only some of its terms are 0, that is
    logged once for each.

    Raises:
        TrainingError: a loss is not finite, or was 0 in :attr:`PATIENCE` iterations in a row. The
            message names the iteration, all terms of the loss, and the last checkpoint.
    """

    # Before any hook that saves the loss or the weights, and mmengine's, which reads every term.
    priority = "HIGHEST"

    PATIENCE = 100

    def __init__(self) -> None:
        self.zeros: Counter[str] = Counter()
        """Iterations in a row in which a term of the loss was 0; ``""``: all, in all processes."""

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return dict(zeros=dict(self.zeros))

    def load_state_dict(self, state: dict) -> None:
        """Go on as the hook whose state this is."""
        self.zeros = Counter(state["zeros"])

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Check the losses of this iteration in all processes."""
        outputs = {} if outputs is None else outputs
        outputs.update(on_host(outputs))
        terms = {
            name: torch.as_tensor(value).item() for name, value in outputs.items() if "loss" in name
        }
        bad = not all(map(math.isfinite, terms.values()))
        positive = any(terms.values())
        if get_world_size() > 1:
            # The shared gradient made the weights of all processes invalid: none may save them.
            anywhere = torch.tensor([float(bad), float(positive)])
            all_reduce(anywhere, "max")
            if anywhere[0] and not bad:
                raise TrainingError(
                    f"iteration {runner.iter + 1}: the loss of another process is not finite; see "
                    "its message"
                )
            positive = bool(anywhere[1])
        if bad:
            images = [sample.metainfo.get("img_path", "?") for sample in _samples(data_batch)]
            raise TrainingError(
                f"iteration {runner.iter + 1}: the loss is not finite ({_listed(terms)}). Images: "
                f"{', '.join(map(str, images))}. {last_checkpoint(runner)} Lower the learning "
                "rate, lengthen the warm-up, clip gradients (optim_wrapper.clip_grad), train "
                "without --amp, or check the labels of these images"
            )
        if terms:
            self._check_zeros(runner, terms, positive)

    def _check_zeros(self, runner: Runner, terms: dict[str, float], positive: bool) -> None:
        zero = {name: value == 0 for name, value in terms.items()}
        for name, is_zero in (zero | {"": not positive}).items():
            self.zeros[name] = self.zeros[name] + 1 if is_zero else 0
        if self.zeros[""] == self.PATIENCE:
            raise TrainingError(
                f"iteration {runner.iter + 1}: the loss was exactly 0 in {self.PATIENCE} "
                f"iterations in a row ({_listed(terms)}), so nothing is learned: no label reaches "
                "it, or there is only one class to choose from. Look at the labels with "
                f"mmeformer check CONFIG. {last_checkpoint(runner)}"
            )
        if positive and (names := [name for name in terms if self.zeros[name] == self.PATIENCE]):
            runner.logger.warning(
                f"{', '.join(names)} was exactly 0 in {self.PATIENCE} iterations in a row: no "
                "object of the labels was matched, or its weight is 0. Look at the labels with "
                "mmeformer check CONFIG"
            )


def _listed(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in terms.items())


class CheckMetricsHook(Hook):
    """Stop before the first iteration if a metric reads other labels than its data set.

    Raises:
        ValueError: it does; the message names both files.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the metrics of the validation."""
        self._check(runner.val_loop)

    def before_val(self, runner: Runner) -> None:
        """Check the metrics of the validation."""
        self._check(runner.val_loop)

    def before_test(self, runner: Runner) -> None:
        """Check the metrics of the test."""
        self._check(runner.test_loop)

    @staticmethod
    def _check(loop) -> None:
        metrics = getattr(getattr(loop, "evaluator", None), "metrics", ())
        for leaf in leaves(loop.dataloader.dataset) if metrics else ():
            dataset = leaf.dataset if isinstance(leaf, GuardedFiles) else leaf
            if isinstance(dataset, CheckedDataset):
                dataset.check_metrics(metrics)


class MonitorHook(Hook):
    """Let early stopping and ``ReduceOnPlateau`` schedules read metrics that are evaluated.

    mmengine's early stopping only warns of a name that is no metric, and never stops; a schedule
    fails at the first validation. As for ``save_best``, the closest metric takes the place.

    Raises:
        TrainingError: no metric resembles the name.
    """

    def __init__(self) -> None:
        self.readers: dict[str, Any] = {}
        """What reads a metric, by its setting; empty outside of a training."""

    def before_train(self, runner: Runner) -> None:
        """Find what reads metrics; warn if there will be none."""
        for hook in runner.hooks:
            if isinstance(hook, EarlyStoppingHook):
                self.readers[f"monitor of {type(hook).__name__}"] = hook
        for index, scheduler in enumerate(flat(runner.param_schedulers)):
            if getattr(scheduler, "need_val_args", False):
                self.readers[f"param_scheduler.{index}.monitor"] = scheduler
        if self.readers and runner.val_loop is None:
            runner.logger.warning(
                f"{', '.join(self.readers)}: without validations there is no metric: set "
                "val_dataloader, val_evaluator and val_cfg"
            )

    def after_val_epoch(self, runner: Runner, metrics: Mapping | None = None) -> None:
        """Replace names before the metrics are read, which later hooks do."""
        scores = [name for name, value in (metrics or {}).items() if isinstance(value, Real)]
        for setting, reader in self.readers.items() if scores else ():
            name = reader.monitor
            if name in scores or getattr(reader, "strict", False):
                continue
            chosen = closest_metric(name, scores)
            text = f"{setting}={name!r} is not among the metrics {', '.join(scores)}"
            if not common_words(name, chosen):
                raise TrainingError(
                    f"{text}; set it to one of these. {last_checkpoint(runner)} Continue with "
                    "--resume"
                )
            runner.logger.warning(f"{text}; {chosen} takes its place")
            # Checkpoints keep both, so that a resumed run goes on with the same.
            reader.configured, reader.monitor = name, chosen


class SharedBuffersHook(Hook):
    """Let all processes validate the model that is saved, that of the main process.

    Without synchronized batch norms (on CPUs) each process has statistics of its own images. They
    are in no checkpoint, so that a resumed run would have other scores.
    """

    # After EMAHook has put the averaged weights in place.
    priority = "BELOW_NORMAL"

    def before_val_epoch(self, runner: Runner) -> None:
        """Take the buffers of the main process."""
        for buffer in runner.model.buffers():
            broadcast(buffer)


def _file_count(runner: Runner) -> int:
    """Number of samples in the training files, each counted once."""
    dataset = runner.train_dataloader.dataset
    return getattr(dataset, "file_count", None) or len(dataset)


def _samples(batch) -> Iterator:
    """The data samples of a batch, however it is nested."""
    if isinstance(batch, dict):
        yield from _samples(batch.get("data_samples"))
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from _samples(item)
    elif hasattr(batch, "metainfo"):
        yield batch
