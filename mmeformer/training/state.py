# SPDX-License-Identifier: Apache-2.0
"""What the checkpoints of a training hold, and which one to resume from."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmeformer.checkpoints import safe_load
from mmeformer.errors import CheckpointError
from mmeformer.files import is_draft
from mmeformer.work_dirs import named_checkpoint

RESUMABLE = ("meta", "state_dict", "optimizer", "message_hub")
"""Entries that a checkpoint needs to resume from it."""


def read_resumable(path: str | Path) -> dict:
    """Read a training checkpoint from a file or URL.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: it is damaged, or has only the weights of a model.
    """
    content = safe_load.load(path)
    if missing := [key for key in RESUMABLE if key not in content]:
        raise CheckpointError(
            f"{path} has no {', '.join(missing)}: it has a model, not the state of a training. "
            "Resume from an epoch_*.pth or iter_*.pth, or start from its weights with "
            "--cfg-options load_from=..."
        )
    return content


def newest_resumable(work_dir: str | Path) -> tuple[Path, dict] | None:
    """Find the checkpoint to resume from.

    It is the one that ``last_checkpoint`` names, if complete, else the newest complete one. Damaged
    files are logged as warnings.

    Returns:
        The file and its content on the CPU, or None if the work directory has no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    damaged = []
    for path in _candidates(Path(work_dir)):
        try:
            content = read_resumable(path)
        except (CheckpointError, FileNotFoundError) as error:
            damaged.append(str(error))
            print_log(f"not resumed from: {error}", "current", logging.WARNING)
        else:
            return path, content
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {work_dir} can be resumed from; the first "
            f"of them: {damaged[0]}. To start from the beginning, train without --resume"
        )
    return None


def _candidates(work_dir: Path) -> Iterator[Path]:
    """Files to resume from, in the order to try them."""
    folders = [work_dir]
    named = named_checkpoint(work_dir)
    if named is not None:
        # The folder may have been moved or copied: prefer files in it to those at the old path.
        if (moved := work_dir / named.name).is_file():
            named = moved
        elif named.parent != Path():
            folders = [named.parent, work_dir]
    found = [path for folder in dict.fromkeys(folders) for path in folder.glob("*.pth")]
    # The best model is saved without optimizer; drafts may be incomplete.
    found = [path for path in found if not path.name.startswith("best_") and not is_draft(path)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    if named is not None:
        found.insert(0, named)
    yield from dict.fromkeys(path for path in found if path.is_file())


def training_state(runner: Runner, meta: dict, optimizer: bool, schedulers: bool) -> dict:
    """The content of a checkpoint, as in mmengine, and the states of hooks.

    Args:
        runner: of a training.
        meta: with ``epoch`` and ``iter``.
        optimizer: include the optimizer, with the scaler of AMP.
        schedulers: include the schedules.

    Returns:
        Tensors that the training changes, after the hooks' ``before_save_checkpoint``.
    """
    meta.update(
        cfg=runner.config_text or runner.cfg.pretty_text,
        seed=runner.seed,
        experiment_name=runner.experiment_name,
        time=time.strftime("%Y%m%d_%H%M%S", time.localtime()),
        mmengine_version=mmengine.__version__,
    )
    if hasattr(runner.train_dataloader.dataset, "metainfo"):
        meta["dataset_meta"] = runner.train_dataloader.dataset.metainfo
    if hasattr(runner.train_loop, "place"):
        meta["place"] = runner.train_loop.place(meta["epoch"], meta["iter"])
    meta.setdefault("validated", False)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    state = dict(
        meta=meta,
        state_dict=model.state_dict(),
        message_hub=runner.message_hub.state_dict(),
    )
    if optimizer:
        state["optimizer"] = runner.optim_wrapper.state_dict()
        state["hooks"] = hook_states(runner.hooks)
    if schedulers and runner.param_schedulers is not None:
        state["param_schedulers"] = _states(runner.param_schedulers)
    runner.call_hook("before_save_checkpoint", checkpoint=state)
    return state


def _states(schedulers) -> Any:
    if isinstance(schedulers, Mapping):
        return {name: _states(items) for name, items in schedulers.items()}
    return [scheduler.state_dict() for scheduler in schedulers]


def hook_states(hooks: Iterable[Hook]) -> dict[str, list[dict]]:
    """States of hooks by name of their class: of ``EarlyStoppingHook``, and what has state_dict."""
    states = defaultdict(list)
    for hook in hooks:
        if isinstance(hook, EarlyStoppingHook):
            state = dict(
                monitor=hook.monitor,
                configured=getattr(hook, "configured", hook.monitor),
                wait_count=hook.wait_count,
                best_score=float(hook.best_score),
            )
            states[type(hook).__name__].append(state)
        elif hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict"):
            states[type(hook).__name__].append(hook.state_dict())
    return dict(states)


def restore_hooks(runner: Runner, states: Mapping[str, Sequence[dict]]) -> None:
    """Give hooks their states of :func:`hook_states`; with early stopping, maybe end the run."""
    left = {name: list(items) for name, items in states.items()}
    for hook in runner.hooks:
        if not (items := left.get(type(hook).__name__)):
            continue
        state = items.pop(0)
        if not isinstance(hook, EarlyStoppingHook):
            hook.load_state_dict(state)
        elif hook.monitor in (state["monitor"], state.get("configured")):
            hook.monitor, hook.configured = state["monitor"], state.get("configured", hook.monitor)
            hook.wait_count, hook.best_score = state["wait_count"], state["best_score"]
            threshold = hook.stopping_threshold
            reached = threshold is not None and hook.rule_map[hook.rule](hook.best_score, threshold)
            if reached or hook.wait_count >= hook.patience:
                runner.train_loop.stop_training = True
                runner.logger.warning(
                    f"nothing to train: the run had stopped early ({hook.monitor} "
                    f"{hook.best_score:.4g}, {hook.wait_count} validations ago). To go on, raise "
                    "patience or stopping_threshold of EarlyStoppingHook"
                )


def find_nonfinite(state: dict) -> list[str]:
    """Names of the tensors that have NaN or infinite values."""
    return [
        name
        for name, tensor in state.items()
        if torch.is_floating_point(tensor) and not torch.isfinite(tensor).all()
    ]
