# SPDX-License-Identifier: Apache-2.0
"""Apply a changed schedule to a resumed run.

mmengine replaces the learning rate, the other settings of the optimizer and the whole schedule by
those of the checkpoint, so that a longer schedule or another learning rate has no effect. Here the
config decides: settings that differ from the checkpoint are applied and logged.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.runner import Runner
from torch import Tensor

from mmeformer.settings import SettingError

MOVING = {
    *("last_step", "_global_step", "_last_value", "verbose"),
    *("best", "num_bad_epochs", "cooldown_counter"),  # of ReduceOnPlateauLR
    "base_values",  # those of the optimizer, which are compared there
    "configured",  # the config's monitor, where another metric takes its place (MonitorHook)
}
"""Entries of a scheduler's state that are not its settings."""

MEANS = ("capturable", "foreach", "fused")
"""Settings of how PyTorch computes a step, which depend on the machine and not on the schedule."""


class Schedule:
    """Optimizer settings and schedulers of a runner, as its config builds them.

    Args:
        runner: with optimizer and schedulers, before a checkpoint is loaded into them.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.groups = [_settings(group) for group in _param_groups(runner.optim_wrapper)]
        self.states = [
            copy.deepcopy(scheduler.state_dict()) for scheduler in flat(runner.param_schedulers)
        ]

    def require_same_optimizer(self) -> None:
        """Raise ValueError if the settings just loaded are those of another kind of optimizer."""
        loaded = _param_groups(self.runner.optim_wrapper)[0]
        missing = _compared(self.groups[0]) - loaded.keys()
        if missing := {key for key in missing if not key.startswith("initial_")}:
            raise ValueError(f"its optimizer has no {', '.join(sorted(missing))}")

    def follow_machine(self) -> None:
        """Compute steps in the config's way (such as fused), in whatever way the checkpoint did."""
        settings = iter(self.groups)
        for wrapper in wrappers(self.runner.optim_wrapper):
            optimizer = wrapper.optimizer
            changed = False
            # One more than the optimizer has: mmengine's base settings.
            for group in wrapper.param_groups:
                now = next(settings)
                wanted = {key: now[key] for key in MEANS if key in now}
                changed |= any(group.get(key) != value for key, value in wanted.items())
                group.update(wanted)
            if changed:
                # PyTorch moves the counters of steps to the device where these settings need them.
                optimizer.load_state_dict(optimizer.state_dict())
            # Fused steps need states with the strides of the weights; in older checkpoints they
            # have PyTorch's default format.
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def changes(self, states: Mapping | Sequence | None) -> list[str]:
        """What differs between the checkpoint just loaded and the config.

        Args:
            states: ``param_schedulers`` of the checkpoint.
        """
        found: dict[str, str] = {}
        groups = _param_groups(self.runner.optim_wrapper)
        for before, now in zip(groups, self.groups, strict=True):
            for key in sorted(_compared(now) & before.keys()):
                if _differ(before[key], now[key]):
                    name = key.removeprefix("initial_")
                    found.setdefault(name, f"{name} {before[key]} -> {now[key]}")
        states = flat(states)
        if len(states) != len(self.states):
            found["schedulers"] = f"{len(states)} -> {len(self.states)} param_scheduler"
        else:
            for index, (before, now) in enumerate(zip(states, self.states, strict=True)):
                if "configured" in before and before["configured"] == now["monitor"]:
                    before = {**before, "monitor": now["monitor"]}
                for key in sorted((before.keys() | now.keys()) - MOVING):
                    if _differ(before.get(key), now.get(key)):
                        name = f"param_scheduler[{index}].{key}"
                        found[name] = f"{name} {before.get(key)} -> {now.get(key)}"
        return list(found.values())

    def restore(self, epochs: int, iterations: int, epoch_length: int | None) -> None:
        """Bring the config's settings to the place of the run, as if they had always been so.

        Args:
            epochs: complete epochs of the run.
            iterations: complete iterations of the run.
            epoch_length: iterations per epoch; None if the run has no epochs.
        """
        groups = _param_groups(self.runner.optim_wrapper)
        for group, settings in zip(groups, self.groups, strict=True):
            group.update(copy.deepcopy(settings))
        schedulers = flat(self.runner.param_schedulers)
        for scheduler, state in zip(schedulers, self.states, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))
        with warnings.catch_warnings():
            # PyTorch and mmengine miss the optimizer's steps in between.
            warnings.simplefilter("ignore")
            stepped = 0
            for iteration in range(1, iterations + 1):
                _step(schedulers, by_epoch=False)
                if epoch_length and iteration % epoch_length == 0 and stepped < epochs:
                    _step(schedulers, by_epoch=True)
                    stepped += 1

    @property
    def follows_scores(self) -> bool:
        """Whether a scheduler reads validation scores, so that its past cannot be recomputed."""
        schedulers = flat(self.runner.param_schedulers)
        return any(getattr(scheduler, "need_val_args", False) for scheduler in schedulers)


def _settings(group: Mapping) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


def _compared(group: Mapping) -> set[str]:
    """Settings of a parameter group to compare: where the schedule moves one, its initial value."""
    scheduled = {key.removeprefix("initial_") for key in group if key.startswith("initial_")}
    if "momentum" in scheduled:
        scheduled.add("betas")  # of Adam; mmengine schedules its first as the momentum
    return set(group) - scheduled


def _differ(before, now) -> bool:
    # Configs in JSON or YAML have lists in place of tuples.
    before, now = (tuple(item) if isinstance(item, list) else item for item in (before, now))
    return before != now


def wrappers(wrapper) -> list[OptimWrapper]:
    """The wrappers of all optimizers, of which there is usually one."""
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _param_groups(wrapper) -> list[dict]:
    return [group for item in wrappers(wrapper) for group in item.param_groups]


def flat(schedulers: Mapping[str, Sequence] | Sequence | None) -> list:
    """Schedulers or their states, by optimizer if there are several, in one list."""
    if isinstance(schedulers, Mapping):
        return [item for group in schedulers.values() for item in group]
    return list(schedulers or [])


def _step(schedulers: Sequence, *, by_epoch: bool) -> None:
    for scheduler in schedulers:
        if scheduler.by_epoch == by_epoch:
            scheduler.step()


def require_spans(config: Config) -> None:
    """Raise SettingError if a scheduler of a config ends before it begins.

    So it may be in a config that sets the end and inherits the begin.
    """
    given = config.get("param_scheduler") or []
    for index, scheduler in enumerate(given if isinstance(given, Sequence) else ()):
        begin, end = scheduler.get("begin", 0), scheduler.get("end", INF)
        if begin >= end:
            raise SettingError(
                f"{config.filename}: param_scheduler[{index}] ({scheduler.get('type')}) begins at "
                f"{begin} and ends at {end}: add the line param_scheduler[{index}].begin = 0, or "
                f"another begin before its end (--cfg-options param_scheduler.{index}.begin=0)"
            )


def other_length(runner: Runner) -> str | None:
    """A warning if the learning rate is scheduled for another length than that of the training."""
    total = runner.train_loop.max_iters
    epoch = len(runner.train_dataloader)
    ends = [
        scheduler.end * (epoch if scheduler.by_epoch else 1)
        for scheduler in flat(runner.param_schedulers)
        # Without an end it lasts forever.
        if scheduler.end < INF
    ]
    if not ends or max(ends) == total or len(ends) < len(flat(runner.param_schedulers)):
        return None
    return (
        f"the learning rate is scheduled for {max(ends)} iterations, but the training has {total}: "
        "set the `end` of param_scheduler too"
    )
