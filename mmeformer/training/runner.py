# SPDX-License-Identifier: Apache-2.0
"""mmengine's Runner with exact restarts, safe checkpoints and checks of weights and losses."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import Runner as MMEngineRunner
from torch.utils.data import DataLoader

from mmeformer.checkpoints.matching import require_match
from mmeformer.errors import TrainingError
from mmeformer.files import replacing
from mmeformer.training.data import GuardedDataset
from mmeformer.training.hooks import (
    CheckMetricsHook,
    FiniteLossHook,
    UnreadableFilesHook,
    last_checkpoint,
)
from mmeformer.training.loops import EpochBasedTrainLoop
from mmeformer.training.randomness import PositionSampler, StepSeedHook
from mmeformer.training.saving import (
    CheckpointHook,
    find_nonfinite,
    newest_resumable,
    read_resumable,
)


class Runner(MMEngineRunner):
    """mmengine's Runner with these additions, which need no entries in configs.

    - A resumed run draws the same data and random numbers as an uninterrupted one
      (:mod:`mmeformer.training.randomness`, :mod:`mmeformer.training.loops`).
    - A checkpoint is complete or absent, and resuming takes the newest complete one
      (:mod:`mmeformer.training.saving`).
    - Weights that do not fit the model are an error (:mod:`mmeformer.checkpoints.matching`).
    - Unreadable files are left out, counted and logged; a loss that is not finite stops the run
      (:mod:`mmeformer.training.hooks`).

    Arguments are those of mmengine.
    """

    _fine_tuning = False
    # Attributes of mmengine's Runner.
    _load_from: str | None
    _resume: bool

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """mmengine's data loader with a guarded data set and sampler."""
        if isinstance(dataloader, Mapping):
            dataloader = {**dataloader}
            if isinstance(dataloader["dataset"], Mapping):
                dataloader["dataset"] = dict(
                    type=GuardedDataset, dataset=dataloader["dataset"], seed=seed
                )
            if isinstance(dataloader["sampler"], Mapping):
                dataloader["sampler"] = dict(type=PositionSampler, sampler=dataloader["sampler"])
        return MMEngineRunner.build_dataloader(dataloader, seed, diff_rank_seed)

    def build_train_loop(self, loop):
        """mmengine's loop; loops by epoch can resume in the middle of an epoch."""
        if isinstance(loop, Mapping):
            loop = {**loop}
            by_epoch = "type" not in loop and loop.get("by_epoch")
            if by_epoch or loop.get("type") in ("EpochBasedTrainLoop", MMEngineEpochBasedTrainLoop):
                loop.pop("by_epoch", None)
                loop["type"] = EpochBasedTrainLoop
        return super().build_train_loop(loop)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """mmengine's hooks, with our ``CheckpointHook`` instead of its own."""
        hooks = dict(hooks or {})
        checkpoint = hooks.get("checkpoint", dict(type="CheckpointHook", interval=1))
        if isinstance(checkpoint, Mapping):
            if checkpoint["type"] in ("CheckpointHook", MMEngineCheckpointHook):
                checkpoint = {**checkpoint, "type": CheckpointHook}
            hooks["checkpoint"] = MMENGINE_HOOKS.build(checkpoint)
        super().register_default_hooks(hooks)

    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        """Hooks of mmengine and of the config, and the guards that the config does not name."""
        super().register_hooks(default_hooks, custom_hooks)
        for guard in (StepSeedHook, FiniteLossHook, UnreadableFilesHook, CheckMetricsHook):
            if not any(isinstance(hook, guard) for hook in self.hooks):
                self.register_hook(guard())

    def train(self):
        """Train; a resumed run starts from the newest complete checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none is complete.
            TrainingError: the run cannot go on; the message says why.
        """
        if self._resume:
            self._find_start()
        self._fine_tuning = not self._resume
        return super().train()

    def _find_start(self) -> None:
        """Choose the file to resume from and use its seed, before any data is loaded."""
        start: list = [None, None]
        if is_main_process():
            newest: tuple[str | Path, dict] | None
            if self._load_from is None:
                newest = newest_resumable(self.work_dir)
            else:
                newest = self._load_from, read_resumable(self._load_from)
            if newest is not None:
                path, content = newest
                start = [str(path), content["meta"].get("seed")]
        broadcast_object_list(start)
        path, seed = start
        if path is None:
            self.logger.warning(
                f"no checkpoint in {self.work_dir} to resume from: starting from the beginning"
            )
            self._resume = False
            return
        self._load_from = path
        if seed is not None and seed != self._randomness_cfg.get("seed"):
            self._randomness_cfg.update(seed=seed)
            self.set_randomness(**self._randomness_cfg)

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        """Load weights; raises CheckpointError if they do not fit the model.

        Fine-tuning (``load_from``) needs the weights of the backbone, resuming and testing all.
        """
        self._source = filename
        return super().load_checkpoint(filename, *args, **kwargs)

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """mmengine's call; compares weights with the model before they are loaded."""
        super().call_hook(fn_name, **kwargs)
        if fn_name == "after_load_checkpoint":
            require_match(
                self.model,
                kwargs["checkpoint"],
                str(self._source),
                part="backbone." if self._fine_tuning else "",
            )

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """Save under a temporary name, then rename; in the main process only.

        Raises:
            TrainingError: the disk is full or not writable, or the weights are not finite. Older
                checkpoints stay as they were.
        """
        if not is_main_process():
            return
        if bad := find_nonfinite(dict(self.model.named_parameters())):
            raise TrainingError(
                f"{len(bad)} weights are NaN or infinite, the first {bad[0]}: nothing was saved. "
                f"{last_checkpoint(self)} Lower the learning rate or clip gradients"
            )
        if "://" in str(out_dir):
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        target = Path(out_dir, filename)
        try:
            with replacing(target, sync=True) as draft:
                super().save_checkpoint(str(draft.parent), draft.name, *args, **kwargs)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = "the disk is full: make room"
            else:
                reason = f"{error.strerror}: make {out_dir} writable"
            raise TrainingError(
                f"checkpoint {target} could not be written, {reason}, then continue with --resume; "
                "older checkpoints are unchanged"
            ) from error
