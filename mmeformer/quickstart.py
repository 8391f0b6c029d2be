# SPDX-License-Identifier: Apache-2.0
"""Quickstart of a task: generate data, train, evaluate and draw predictions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.logging import print_log

from mmeformer import configs, tasks
from mmeformer.report import history
from mmeformer.report.build import after_training
from mmeformer.report.history import Series
from mmeformer.training import engine
from mmeformer.work_dirs import named_checkpoint


@dataclass(frozen=True)
class Quickstart:
    """Quickstart of one task.

    Args:
        config: path below ``configs/``.
        generate: function that writes the data set to a folder, unless it is there already.
        goals: metric name -> smallest value that counts as success.
    """

    config: str
    generate: Callable[[Path], object]
    goals: dict[str, float]


def run(
    task: str,
    work_dir: str | None = None,
    options: dict | None = None,
    light: bool = False,
) -> dict[str, float]:
    """Run a quickstart and return its metrics.

    Writes logs, checkpoint, ``report.html`` and ``loss_curve.png`` to the work directory, and the
    validation images with ground truth (left) and predictions (right) to ``pictures/`` in it.

    Args:
        task: a key of :data:`mmeformer.tasks.TASKS`.
        work_dir: default ``work_dirs/quickstart-<task>``, with ``-light`` for the light model.
        options: settings of the config to override, by dotted key.
        light: run the quickstart of the task's light model.

    Raises:
        ValueError: the task has no light model.
        FileExistsError: the data folder has another data set.
        RuntimeError: a metric misses its goal.
    """
    row = tasks.TASKS[task]
    reference = row.light_quickstart if light else row.quickstart
    if reference is None:
        names = ", ".join(name for name, other in tasks.TASKS.items() if other.light_quickstart)
        raise ValueError(f"{task} has no light model; --light is for {names}")
    quickstart = tasks.load(reference)
    config = configs.load_config(quickstart.config, options)
    config.work_dir = work_dir or f"work_dirs/quickstart-{task}{'-light' if light else ''}"
    root = Path(config.data_root)
    root.parent.mkdir(parents=True, exist_ok=True)
    quickstart.generate(root)

    started = time.monotonic()
    runner = engine.build_train_runner(config.copy())
    with after_training(runner):
        runner.train()
    checkpoint = str(named_checkpoint(config.work_dir))
    draw_losses(history.read(config.work_dir).losses(), Path(config.work_dir, "loss_curve.png"))

    pictures = Path(config.work_dir, "pictures")
    metrics = engine.build_test_runner(config, checkpoint, show_dir=str(pictures)).test()
    minutes = (time.monotonic() - started) / 60
    _report(quickstart.goals, metrics, minutes, Path(config.work_dir), pictures)
    return metrics


def draw_losses(losses: Sequence[Series], picture: Path) -> None:
    """Plot losses against the iteration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for series in losses:
        width = 2 if series.name == "loss" else 1
        axes.plot(series.steps, series.values, label=series.name, linewidth=width)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=120)


def _report(
    goals: dict[str, float], metrics: dict, minutes: float, work_dir: Path, pictures: Path
) -> None:
    lines = [f"trained and evaluated in {minutes:.1f} minutes"]
    lines += [f"{name} {metrics[name]:.3f} (goal {goal})" for name, goal in goals.items()]
    lines += [
        f"loss curve: {work_dir / 'loss_curve.png'}",
        f"pictures, ground truth left and predictions right: {pictures}",
    ]
    print_log("quickstart:\n  " + "\n  ".join(lines), "current")
    if missed := [name for name, goal in goals.items() if not metrics[name] >= goal]:
        raise RuntimeError(f"the quickstart missed its goal for {', '.join(missed)}")
