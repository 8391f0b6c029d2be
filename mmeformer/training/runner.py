# SPDX-License-Identifier: Apache-2.0
"""mmengine's Runner with exact restarts, safe checkpoints and checks of weights and losses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mmengine.dist import broadcast_object_list, get_world_size, is_main_process, master_only
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from mmengine.runner import Runner as MMEngineRunner
from torch.utils.data import DataLoader

from mmeformer import settings
from mmeformer.checkpoints.load import use_published
from mmeformer.checkpoints.matching import require_match
from mmeformer.checks.channels import require_channels
from mmeformer.configs import known_settings, read_test_metainfo
from mmeformer.errors import CheckpointError, TrainingError
from mmeformer.files import write_text
from mmeformer.settings import SettingError
from mmeformer.signals import PREEMPTED
from mmeformer.training.averaging import EMAHook
from mmeformer.training.changes import changed
from mmeformer.training.data import GuardedDataset, leaves
from mmeformer.training.deterministic import deterministic_kernels
from mmeformer.training.exclusive import only_training
from mmeformer.training.hooks import (
    CheckMetricsHook,
    LossCheckHook,
    MonitorHook,
    SharedBuffersHook,
    UnreadableFilesHook,
)
from mmeformer.training.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmeformer.training.optim import unused_keys, update_in_few_kernels
from mmeformer.training.preemption import Preempted, StopRequest, ignoring_signals
from mmeformer.training.progress import ProgressHook, for_people
from mmeformer.training.randomness import PositionSampler, StepSeedHook
from mmeformer.training.record import TrainingDataHook
from mmeformer.training.saving import (
    CheckpointHook,
    PreemptionHook,
    checkpoint_hook,
    last_checkpoint,
    write_checkpoint,
)
from mmeformer.training.schedule import Schedule, other_length, wrappers
from mmeformer.training.state import (
    find_nonfinite,
    newest_resumable,
    read_resumable,
    restore_hooks,
    training_state,
)
from mmeformer.training.transport import send_small_tensors_whole
from mmeformer.training.writer import HostCopy, Writer
from mmeformer.work_dirs import named_checkpoint

OUR_LOOPS = {
    MMEngineEpochBasedTrainLoop: EpochBasedTrainLoop,
    MMEngineIterBasedTrainLoop: IterBasedTrainLoop,
}
"""Our training loop for each of mmengine's."""

OWN_HOOKS = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
"""Hooks that mmengine registers if ``default_hooks`` does not name them."""


class Runner(MMEngineRunner):
    """mmengine's Runner with these additions, which need no entries in configs.

    - A resumed run draws the same data and random numbers as an uninterrupted one
      (:mod:`mmeformer.training.randomness`), goes on after the samples seen
      (:mod:`mmeformer.training.loops`), and follows the config where it has changed
      (:mod:`mmeformer.training.schedule`).
    - A checkpoint is complete or absent (:mod:`mmeformer.training.saving`), and resuming takes the
      newest complete one (:mod:`mmeformer.training.state`). It is written in the background
      (:mod:`mmeformer.training.writer`).
    - SIGTERM and SIGUSR1 stop the run with a checkpoint (:mod:`mmeformer.training.preemption`).
    - Weights that do not fit the model are an error (:mod:`mmeformer.checkpoints.matching`).
    - Unreadable files are left out, counted and logged; a loss that is not finite, or 0 for long,
      stops the run (:mod:`mmeformer.training.hooks`).

    Arguments are those of mmengine.
    """

    writer: Writer | None = None
    """Writes checkpoints; None before and after a training."""
    stop: StopRequest | None = None
    """Notes signals; None before and after a training."""
    config_text = ""
    """The config as Python code; in the main process only."""
    resume_else: str | None = None
    """What to resume from if the work directory has no checkpoints; None for nothing."""
    load_else: str | None = None
    """Weights to start from if there is nothing to resume from; None for none."""
    _fine_tuning = False
    _stamps: ClassVar[set[str]] = set()
    # Attributes of mmengine's Runner.
    _timestamp: str
    _load_from: str | None
    _resume: bool
    _val_dataloader: Any
    _test_dataloader: Any
    optim_wrapper: Any
    param_schedulers: Any

    @classmethod
    def from_cfg(cls, cfg):
        """mmengine's; settings that nothing reads are an error or a warning."""
        settings.require_class_names(cfg)
        runner = super().from_cfg(cfg)
        # Where types are classes, there may be no scope.
        scope = runner.default_scope and runner.default_scope.scope_name
        settings.import_classes(("mmeformer", scope))
        read_here = known_settings() - {"report"}
        settings.check(cfg, [name for name in cfg if name in read_here])
        require_channels(cfg, runner.model)
        return runner

    def setup_env(self, env_cfg: dict) -> None:
        """mmengine's settings, with a time stamp that no other run of this process has.

        It names the run, and mmengine gives runs of one name one default scope, one log and one
        visualizer, even if their tasks differ.
        """
        super().setup_env(env_cfg)
        stamp, count = self._timestamp, 1
        while self._timestamp in self._stamps:
            count += 1
            self._timestamp = f"{stamp}_{count}"
        self._stamps.add(self._timestamp)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """mmengine's logger; a terminal or a notebook gets no lines by the hundred."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                for wanted in for_people():
                    handler.addFilter(wanted)
        return logger

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """mmengine's data loader with guarded data set and sampler; for training if not marked."""
        if isinstance(dataloader, Mapping):
            dataloader = {**dataloader}
            if not dataloader.get("num_workers"):
                # PyTorch refuses what needs workers; base configs have some.
                for key in ("persistent_workers", "prefetch_factor"):
                    dataloader.pop(key, None)
            if isinstance(dataset := dataloader["dataset"], Mapping):
                if dataset["type"] is not GuardedDataset:
                    dataset = dict(type=GuardedDataset, dataset=dataset)
                dataloader["dataset"] = {**dataset, "seed": seed}
            if isinstance(dataloader["sampler"], Mapping):
                dataloader["sampler"] = dict(type=PositionSampler, sampler=dataloader["sampler"])
        loader = MMEngineRunner.build_dataloader(dataloader, seed, diff_rank_seed)
        loader.worker_init_fn = send_small_tensors_whole(ignoring_signals(loader.worker_init_fn))
        _require_batches(loader)
        return loader

    def build_train_loop(self, loop):
        """mmengine's loops, which resume at the place of the checkpoint."""
        if isinstance(loop, Mapping):
            loop = {**loop}
            if "type" not in loop:
                by_epoch = loop.pop("by_epoch")
                loop["type"] = "EpochBasedTrainLoop" if by_epoch else "IterBasedTrainLoop"
            for theirs, ours in OUR_LOOPS.items():
                if settings.is_of_mmengine(loop["type"], theirs):
                    loop["type"] = ours
        return super().build_train_loop(loop)

    def build_val_loop(self, loop):
        """mmengine's loop, on data that must be complete."""
        self._val_dataloader = _for_evaluation(self._val_dataloader)
        return super().build_val_loop(loop)

    def build_test_loop(self, loop):
        """mmengine's loop, on data that must be complete."""
        self._test_dataloader = _for_evaluation(self._test_dataloader)
        return super().build_test_loop(loop)

    @master_only
    def dump_config(self) -> None:
        """Write the config beside the log.

        The work directory gets it when a training begins: there it is that of the checkpoints, for
        the report and ``load``, and not that of a test or of a start that failed.
        """
        self.config_text = self.cfg.pretty_text
        write_text(Path(self.log_dir, self._config_name), self.config_text)

    @property
    def _config_name(self) -> str:
        return f"{Path(self.cfg.filename or 'config').stem}.py"

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """mmengine's hooks, with our ``CheckpointHook`` instead of its own.

        ``default_hooks`` may have others, such as ``ema=dict(type="EMAHook")``; None removes any.
        """
        # mmengine expects None for its own hooks only.
        hooks = {
            name: hook
            for name, hook in (hooks or {}).items()
            if hook is not None or name in OWN_HOOKS
        }
        for name in hooks.keys() - set(OWN_HOOKS):
            if near := get_close_matches(name, OWN_HOOKS, n=1, cutoff=0.85):
                raise SettingError(
                    f"default_hooks.{name} would be a second hook beside mmengine's; did you mean "
                    f"default_hooks.{near[0]}?"
                )
        checkpoint = hooks.get("checkpoint", dict(type="CheckpointHook", interval=1))
        if isinstance(checkpoint, Mapping):
            if settings.is_of_mmengine(checkpoint["type"], MMEngineCheckpointHook):
                checkpoint = {**checkpoint, "type": CheckpointHook}
            hooks["checkpoint"] = MMENGINE_HOOKS.build(checkpoint)
        super().register_default_hooks(hooks)

    def register_hook(self, hook: Hook | dict, priority=None) -> None:
        """mmengine's, with our ``EMAHook`` instead of its own."""
        if isinstance(hook, Mapping) and settings.is_of_mmengine(hook["type"], MMEngineEMAHook):
            hook = {**hook, "type": EMAHook}
        super().register_hook(hook, priority)

    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        """Hooks of mmengine and of the config, and the guards that the config does not name."""
        super().register_hooks(default_hooks, custom_hooks)
        guards = (
            StepSeedHook,
            PreemptionHook,
            LossCheckHook,
            UnreadableFilesHook,
            CheckMetricsHook,
            MonitorHook,
            SharedBuffersHook,
            TrainingDataHook,
        )
        for guard in guards:
            if not any(isinstance(hook, guard) for hook in self.hooks):
                self.register_hook(guard())
        if ProgressHook.is_wanted():
            self.register_hook(ProgressHook())

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """mmengine's, whose steps launch few kernels."""
        try:
            wrapper = super().build_optim_wrapper(optim_wrapper)
        except NotImplementedError as error:
            # Of constructors that know the names of a few backbones only.
            raise SettingError(
                f"optim_wrapper.constructor={optim_wrapper.get('constructor')} does not know this "
                "model; for layer-wise decay use mmeformer.LayerDecayConstructor with "
                "paramwise_cfg.layer_decay_rate"
            ) from error
        if isinstance(optim_wrapper, Mapping):
            for name in unused_keys(self.model, optim_wrapper.get("paramwise_cfg") or {}):
                self.logger.warning(
                    f"optim_wrapper.paramwise_cfg.custom_keys: no parameter has {name!r} in its "
                    "name, so that nothing changes"
                )
        for item in wrappers(wrapper):
            update_in_few_kernels(item.optimizer)
        return wrapper

    def scale_lr(self, optim_wrapper, auto_scale_lr=None) -> None:
        """mmengine's scaling; also of the base learning rate, which the log shows."""
        base: Any = getattr(optim_wrapper, "base_param_settings", None)
        before = optim_wrapper.param_groups[0]["lr"] if base else None
        super().scale_lr(optim_wrapper, auto_scale_lr)
        if before:
            base["lr"] *= optim_wrapper.param_groups[0]["lr"] / before

    def train(self):
        """Train; a resumed run starts from the newest complete checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none is complete.
            TrainingError: the run cannot go on, or another runs in the same work directory; the
                message says why.
            Preempted: a signal has stopped the run; there is a checkpoint. A signal before the
                first iteration ends the process (:func:`mmeformer.signals.leave`).
        """
        with only_training(self.work_dir) if is_main_process() else nullcontext():
            with deterministic_kernels():
                return self._train()

    def test(self):
        """mmengine's evaluation."""
        with deterministic_kernels():
            return super().test()

    def _train(self):
        if self._resume:
            self._find_start()
        self._fine_tuning = not self._resume
        hook = checkpoint_hook(self)
        try:
            if hook is None:
                return super().train()
            with Writer(self.logger, hook.stop_on_error) as self.writer:
                with StopRequest() as self.stop:
                    return super().train()
        except RuntimeError as error:
            if get_world_size() == 1 or self.stop is None or self.stop.signal is None:
                raise
            # A process that got the signal before its first iteration has left the others alone.
            self.logger.warning(
                f"stopped by {self.stop.signal}, while another process had ended ({error}). "
                f"{last_checkpoint(self)} Continue with --resume (exit status {PREEMPTED})"
            )
            raise Preempted from error
        finally:
            self.writer = self.stop = None
            for hook in self.hooks:
                if isinstance(hook, ProgressHook):
                    hook.close()

    def _find_start(self) -> None:
        """Choose the file to resume from and use its seed, before any data is loaded."""
        start: list = [None, None]
        if is_main_process():
            found: tuple[str | Path, dict] | None = None
            given = self._load_from
            if given is None:
                found = newest_resumable(self.work_dir)
                given = self.resume_else
            if found is None and given is not None:
                found = given, read_resumable(given)
            if found is not None:
                path, content = found
                start = [str(path), content["meta"].get("seed")]
        broadcast_object_list(start)
        path, seed = start
        if path is None:
            self.logger.warning(
                f"no checkpoint in {self.work_dir} to resume from: starting from the beginning"
            )
            self._resume = False
            self._load_from = self.load_else
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
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        meta = checkpoint.get("meta", {})
        self._resumed = dict(
            place=meta.get("place"),
            validated=meta.get("validated", True),
            param_schedulers=checkpoint.get("param_schedulers"),
            hooks=checkpoint.get("hooks", {}),
            config=str(meta.get("cfg", "")),
        )
        return checkpoint

    def resume(self, filename: str, *args, **kwargs) -> None:
        """Resume; what the config changes since the checkpoint applies, and is logged.

        Raises:
            CheckpointError: the state of the optimizer does not fit the config.
        """
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        if self.param_schedulers is not None:
            self.param_schedulers = self.build_param_scheduler(self.param_schedulers)
        schedule = Schedule(self)
        try:
            super().resume(filename, *args, **kwargs)
            schedule.require_same_optimizer()
            schedule.follow_machine()
        except ValueError as error:
            raise CheckpointError(
                f"{filename} cannot be resumed with this optim_wrapper ({error}). Use that of the "
                "checkpoint, or start from its weights with --cfg-options load_from=..."
            ) from error
        loop = self.train_loop
        loop.validated = self._resumed["validated"]
        restore_hooks(self, self._resumed["hooks"])
        moved = hasattr(loop, "resume_at") and loop.resume_at(self._resumed["place"])
        changes = schedule.changes(self._resumed["param_schedulers"])
        other = changed(self._resumed["config"], self.config_text)
        if changes and schedule.follows_scores:
            self.logger.warning(
                "the schedule of the checkpoint goes on, as it depends on past scores; not "
                f"applied from the config: {', '.join(changes)}"
            )
        elif changes or moved:
            epochs = isinstance(loop, EpochBasedTrainLoop)
            schedule.restore(loop.epoch, loop.iter, len(loop.dataloader) if epochs else None)
            other = changes + other
        if other:
            self.logger.warning(
                "the config has changed since the checkpoint and applies from here on: "
                f"{', '.join(other)}"
            )
        self._warn_of_caches()
        self._warn_if_finished(filename)

    def _warn_of_caches(self) -> None:
        """Say if an augmentation uses earlier images, which no checkpoint keeps."""
        caches = {
            type(transform).__name__
            for leaf in leaves(self.train_loop.dataloader.dataset)
            for transform in getattr(getattr(leaf, "pipeline", None), "transforms", ())
            if hasattr(transform, "results_cache")  # of mmdet's CachedMosaic and CachedMixUp
        }
        if caches:
            self.logger.warning(
                f"{', '.join(sorted(caches))} mix images that were read before the interruption, "
                "and start without them: this run goes on as well as an unbroken one, but not with "
                "the same numbers"
            )

    def _warn_if_finished(self, filename: str) -> None:
        loop = self.train_loop
        if isinstance(loop, MMEngineEpochBasedTrainLoop):
            done, total, unit = loop.epoch, loop.max_epochs, "epochs"
        else:
            done, total, unit = loop.iter, loop.max_iters, "iters"
        if done >= total:
            self.logger.warning(
                f"nothing to train: {filename} has {done} {unit} and train_cfg.max_{unit} is "
                f"{total}. To train longer, raise it and the `end` of param_scheduler"
            )

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """mmengine's call; compares weights with the model before they are loaded."""
        super().call_hook(fn_name, **kwargs)
        if fn_name == "before_train":
            if is_main_process():
                write_text(Path(self.work_dir, self._config_name), self.config_text)
            if text := other_length(self):
                self.logger.warning(text)
        if fn_name == "after_load_checkpoint":
            use_published(self.model, kwargs["checkpoint"], str(self._source))
            require_match(
                self.model,
                kwargs["checkpoint"],
                str(self._source),
                part="backbone." if self._fine_tuning else "",
            )
            if not self._fine_tuning:
                self._require_order_of_classes(kwargs["checkpoint"])

    def _require_order_of_classes(self, checkpoint: Mapping) -> None:
        """Raise CheckpointError if data and checkpoint have the same classes in another order."""
        meta = (checkpoint.get("meta") or {}).get("dataset_meta") or {}
        learned = list(meta.get("classes") or ())
        if self.cfg.get("test_dataloader"):
            given = list(read_test_metainfo(self.cfg).get("classes") or ())
            if learned != given and sorted(learned) == sorted(given):
                raise CheckpointError(
                    f"{self._source} has the classes in the order {', '.join(learned)}, but the "
                    f"config in the order {', '.join(given)}: use the former in metainfo"
                )

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Save a checkpoint from a copy, during a training in the background.

        In the main process only. Weights have PyTorch's default memory format, as other programs
        expect it (safetensors, say); on a GPU the backbones keep theirs in channels last.

        Args:
            after: called when the checkpoint is on the disk.
            out_dir, filename, file_client_args, save_optimizer, save_param_scheduler, meta,
                by_epoch, backend_args: as in mmengine.

        Raises:
            TrainingError: the disk is full or not writable, or the weights are not finite. Older
                checkpoints stay as they were. In the background the error is that of this
                checkpoint's successor, or of the training.
        """
        if not is_main_process():
            return
        if self.writer is not None:
            self.writer.wait()
        done = dict(epoch=self.epoch + by_epoch, iter=self.iter + (not by_epoch))
        state = training_state(self, {**done, **(meta or {})}, save_optimizer, save_param_scheduler)
        host = HostCopy() if self.writer is None else self.writer.host
        write = partial(
            self._write,
            # Only its step changes the state of an optimizer, two thirds of a checkpoint with
            # AdamW. The step waits for the copy (CheckpointHook), which the writer finishes.
            host.copy(state, late="optimizer"),
            out_dir=out_dir,
            filename=filename,
            file_client_args=file_client_args,
            backend_args=backend_args,
            after=after,
        )
        if self.writer is None:
            host.finish()
            write()
        else:
            self.writer.start(write)

    def _write(self, state: dict, **target) -> None:
        model = self.model.module if is_model_wrapper(self.model) else self.model
        weights = {name for name, _ in model.named_parameters()}
        # The weights that are trained lie beside their average, if there is one.
        for part, prefix in (
            (state["state_dict"], ""),
            (state.get("ema_state_dict", {}), "module."),
        ):
            named = {name: part[prefix + name] for name in weights if prefix + name in part}
            if bad := find_nonfinite(named):
                last = named_checkpoint(self.work_dir)
                raise TrainingError(
                    f"{len(bad)} weights are NaN or infinite, the first {bad[0]}: nothing was "
                    f"saved. The last good checkpoint is {last or 'none'}. Lower the learning "
                    "rate or clip gradients"
                )
        write_checkpoint(state, **target)


def _require_batches(loader: DataLoader) -> None:
    """Raise TrainingError if all samples are left out, which mmengine takes for a whole epoch."""
    batches: Any = loader.batch_sampler
    sampler: Any = getattr(batches, "sampler", loader.sampler)
    if getattr(batches, "drop_last", False) and not getattr(sampler, "is_stream", False):
        if not len(loader):
            raise TrainingError(
                f"batch_size={batches.batch_size} with drop_last=True leaves out all "
                f"{len(sampler)} samples that a process has: lower train_dataloader.batch_size, "
                "or set train_dataloader.drop_last=False"
            )


def _for_evaluation(loader):
    """Config of a data loader that stops at unreadable files instead of replacing them."""
    if not isinstance(loader, Mapping) or not isinstance(loader["dataset"], Mapping):
        return loader
    dataset = dict(type=GuardedDataset, dataset=loader["dataset"], evaluation=True)
    return {**loader, "dataset": dataset}
